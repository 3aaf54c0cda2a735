//! The ABI between the kernel programs and the agent: keys, values and events,
//! byte for byte the same on both sides.
//!
//! Addresses are four words in network order, IPv4 as v4-mapped IPv6
//! (`::ffff:a.b.c.d`, RFC 4291 2.5.5.2); ports are in host order. Every type is
//! `repr(C)`, without implicit padding, and its size is asserted here.

#![no_std]

mod observed;

pub use observed::*;

/// An address: IPv6, or IPv4 as v4-mapped IPv6, in network order.
pub type Address = [u32; 4];

/// Third word of every v4-mapped address.
pub const MAPPED: u32 = 0xffff_u32.to_be();

/// Changes whenever a type, a map or a meaning in this file changes. It is part
/// of the pin path, so that agents of different ABIs never share a map.
pub const ABI: u32 = 4;

/// Directories that may hold pods: two kubelets, or two layouts, on one host.
pub const PODS_ROOTS: usize = 4;

/// What the programs need to know about the node; the one entry of `CONFIG`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Network namespace cookie of the node (the agent's own).
    pub node_netns: u64,
    /// The agent's own cgroup: when it is dead, a pod's process may get its id.
    pub agent_cgroup: u64,
    /// Whose observers tell what they see, of those that are attached.
    pub observer: u64,
    /// Cgroup ids of the directories that hold pods; 0 where there is none.
    pub pods_cgroup: [u64; PODS_ROOTS],
    /// Depth of each below the cgroup v2 root, or [`SOME_LEVEL`].
    pub pods_level: [u32; PODS_ROOTS],
    /// Thread group id of the agent, whose own sockets are never steered, or
    /// [`ANY_TGID`]; 0: the programs are not in charge yet.
    pub agent_tgid: u32,
    /// What happens to a process that may be a pod's and is not known yet:
    /// [`UNKNOWN_REFUSE`] or [`UNKNOWN_ALLOW`].
    pub unknown: u32,
    /// 1 when pods cannot be told by their cgroup (the runtime uses cgroup v1
    /// only), so that every foreign network namespace may be a pod's.
    pub pods_by_netns_only: u32,
    /// Port of the agent's outbound listener on loopback, in every pod.
    pub outbound_port: u32,
    /// Port that HBONE comes in on.
    pub hbone_port: u32,
    /// 1 when `AGENTS` names more than the agent above.
    pub more_agents: u32,
}

/// The agent sees process ids of a namespace only (a node that is a container itself), and
/// not those that the programs see: whatever is in its cgroup is the agent.
pub const ANY_TGID: u32 = u32::MAX;

/// Depth of a directory that is looked for: where the agent sees the inside of a cgroup
/// namespace only (a node that is a container itself), it cannot know how deep that lies.
pub const SOME_LEVEL: u32 = u32::MAX;
/// How deep [`SOME_LEVEL`] is looked for.
pub const DEEPEST: u32 = 12;

pub const UNKNOWN_REFUSE: u32 = 0;
pub const UNKNOWN_ALLOW: u32 = 1;

/// An agent beside the one that `CONFIG` names; key of `AGENTS`. One that has handed over
/// still dials for the connections that it has, and the sockets that were made by its
/// listeners stay in its cgroup for as long as those listeners are handed on.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Agent {
    pub cgroup: u64,
    /// 0: whoever was in this cgroup, of sockets that it made.
    pub tgid: u32,
    pub _pad: u32,
}

/// What the agent decided about a workload; value of `WORKLOADS` (by network
/// namespace cookie) and `CGROUPS` (by pod-level cgroup id).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Workload {
    /// 1: its traffic goes through the agent. 0: known, and left alone.
    pub enrolled: u32,
    pub _pad: u32,
}

/// A destination in the mesh; key of `MESH`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MeshKey {
    pub address: Address,
    /// 0 stands for every port of the address.
    pub port: u32,
}

/// Value of `MESH`: steered; moreover a pod of this node.
pub const MESH_LOCAL: u32 = 1;
/// Value of `MESH`: steered, a destination somewhere else.
pub const MESH_REMOTE: u32 = 0;
/// Value of `MESH`, for all ports of an address: not steered by itself. It is a node's,
/// so that ports which are entered for [`NODES`] are steered there.
pub const MESH_NODE: u32 = 3;

/// Stands in `MESH` for every address of a node. No TCP connection goes to a multicast
/// address.
pub const NODES: Address = [u32::MAX; 4];
/// Value of `MESH`, for all ports: known, and outside the mesh. It is not asked about,
/// whatever `RANGES` says; ports that have an entry are steered all the same.
pub const MESH_OUTSIDE: u32 = 2;

/// Entries of `RANGES`: addresses that pods may have. What is dialled there and stands
/// neither in `MESH` nor, with a time (`CLOCK_MONOTONIC`, ns) that is not over, in
/// `FOREIGN`, is steered: the agent asks what it is.
pub const RANGES: u32 = 4_096;

/// One TCP connect that was steered to the agent; value of `DIALS`, by socket cookie.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dial {
    /// The destination that the application asked for.
    pub destination: Address,
    /// The source address of the steered connection, once it is known.
    pub source: Address,
    pub netns: u64,
    /// Pod-level cgroup of the process that called `connect`; 0 where the pod was
    /// known by its network namespace.
    pub cgroup: u64,
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub at: u64,
    pub cookie: u64,
    pub destination_port: u32,
    pub source_port: u32,
    pub tgid: u32,
    pub uid: u32,
    pub comm: [u8; 16],
}

/// One end of a TCP connection within a network namespace; key of `FLOWS` (the
/// steered connection's source) and of `CLIENTS` (the
/// agent's last hop, to the real client).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    pub netns: u64,
    pub address: Address,
    pub port: u32,
    pub _pad: u32,
}

/// The real client of a last-hop connection; value of `CLIENTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client {
    pub address: Address,
    pub port: u32,
}

/// A connection that a process of the node itself opened to a local pod; key of
/// `PROBES`, to the time (`CLOCK_MONOTONIC`, ns) of its `connect`. This is the proof by which a kubelet's probe passes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Probe {
    pub source: Address,
    pub destination: Address,
    pub source_port: u32,
    pub destination_port: u32,
}

/// Where an enrolled pod's inbound connections go; key of `LISTENERS`. The pod
/// is named by the address that was dialled: `sk_lookup` programs cannot ask for
/// a namespace's cookie (seen on Linux 6.1 and 6.18).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Listener {
    /// An address in the pod's network namespace.
    pub address: Address,
    /// [`LISTENER_PLAINTEXT`] or [`LISTENER_HBONE`].
    pub kind: u32,
}

pub const LISTENER_PLAINTEXT: u32 = 0;
pub const LISTENER_HBONE: u32 = 1;

/// What is counted in the kernel: index into `COUNTERS`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Events that found the ring full: of TCP sockets, of programs started and ended.
    LostSocket = 0,
    LostExec = 1,
    LostExit = 2,
    /// Connects sent to the agent.
    Steered = 3,
    /// Connects refused because the workload was not known yet.
    RefusedUnknown = 4,
    /// Connects refused because a map was full.
    RefusedFull = 5,
    /// Inbound connections dropped because no listener of the agent was there.
    DroppedNoListener = 6,
    /// Connects refused because the protocol cannot be carried (MPTCP).
    RefusedProtocol = 7,
    /// Events that found the ring full: of UDP flows, and of raw and packet sockets.
    LostDatagram = 8,
    LostRaw = 9,
    /// Events beyond what is told of one pod, by kind.
    LimitedSocket = 10,
    LimitedExec = 11,
    LimitedExit = 12,
    LimitedDatagram = 13,
    LimitedRaw = 14,
    /// TCP sockets that `SOCKETS` had no room for: their end is told, but neither
    /// process nor beginning.
    UntrackedSocket = 15,
}

pub const COUNTERS: u32 = 16;

macro_rules! sizes {
    ($($ty:ident = $size:literal),* $(,)?) => {
        $(const _: () = assert!(size_of::<$ty>() == $size);)*

        // SAFETY: repr(C), integers and byte arrays only, and no padding: the
        // size asserted above is the sum of the fields.
        #[cfg(feature = "user")]
        mod pod { $(unsafe impl aya::Pod for super::$ty {})* }
    };
}

sizes! {
    Config = 96,
    Agent = 16,
    Workload = 8,
    MeshKey = 20,
    Dial = 96,
    Endpoint = 32,
    Client = 20,
    Probe = 40,
    Listener = 20,
    EventHeader = 32,
    Task = 32,
    Tracked = 88,
    ClosedEvent = 176,
    SocketEvent = 120,
    ExecEvent = 96,
    ExitEvent = 72,
    Flow = 48,
    Bucket = 24,
    Limits = 16,
    Call = 16,
    Offsets = 172,
}
