//! What observers and agent share: the events in the ring, the sockets that are
//! followed, and where the kernel's structures have their fields.

use crate::Address;

/// Begins every event in the ring.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventHeader {
    /// One of the `EVENT_` constants; the reader skips what it does not know.
    pub kind: u32,
    pub _pad: u32,
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub at: u64,
    pub netns: u64,
    /// The key of `CGROUPS` where the pod is known by that; else the cgroup of the
    /// socket, or of the process.
    pub cgroup: u64,
}

/// [`ClosedEvent`]: a TCP connection, or the try of one, ended.
pub const EVENT_CLOSED: u32 = 1;
/// [`SocketEvent`]: `connect` failed before a SYN was sent.
pub const EVENT_FAILED: u32 = 2;
/// [`SocketEvent`]: a TCP socket listens.
pub const EVENT_LISTEN: u32 = 3;
/// [`SocketEvent`]: the first datagram of a flow is sent.
pub const EVENT_DATAGRAM: u32 = 4;
/// [`SocketEvent`]: the first packet is sent by a raw socket (raw(7)).
pub const EVENT_RAW: u32 = 5;
/// [`SocketEvent`]: the first packet is sent by a packet socket (packet(7)).
pub const EVENT_PACKET: u32 = 6;
/// [`ExecEvent`]: a process replaced its program.
pub const EVENT_EXEC: u32 = 7;
/// [`ExitEvent`]: a process ended.
pub const EVENT_EXIT: u32 = 8;

/// Who did it; all zero where the kernel did, or nobody can be named.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Task {
    pub tgid: u32,
    pub uid: u32,
    /// Its own, at any depth.
    pub cgroup: u64,
    pub comm: [u8; 16],
}

/// A TCP socket of a pod that is open, or on its way; value of `SOCKETS`, by socket
/// cookie.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tracked {
    pub task: Task,
    /// What the application asked for, where the connect was steered; else zero.
    pub dialled: Address,
    pub netns: u64,
    /// As [`EventHeader::cgroup`].
    pub cgroup: u64,
    /// `CLOCK_MONOTONIC`, nanoseconds: of the connect, or of the handshake's end.
    pub opened: u64,
    pub dialled_port: u32,
    /// [`DIALLED`] or [`ACCEPTED`].
    pub role: u32,
    pub established: u32,
    pub _pad: u32,
}

pub const DIALLED: u32 = 0;
pub const ACCEPTED: u32 = 1;

/// A TCP socket closed: all that was seen of it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClosedEvent {
    pub header: EventHeader,
    pub cookie: u64,
    pub local: Address,
    pub remote: Address,
    /// Port 0: not steered.
    pub dialled: Address,
    pub local_port: u32,
    pub remote_port: u32,
    pub dialled_port: u32,
    pub role: u32,
    pub task: Task,
    /// 0: the socket is older than the observers, or `SOCKETS` was full.
    pub opened: u64,
    /// Payload that was sent, each byte once.
    pub sent: u64,
    /// Payload that came in order.
    pub received: u64,
    pub established: u32,
    pub retransmits: u32,
    pub srtt_us: u32,
    pub errno: u32,
}

/// Something else that a socket did.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketEvent {
    pub header: EventHeader,
    /// 0 where none was made yet and none can be (in a kprobe).
    pub cookie: u64,
    pub local: Address,
    pub remote: Address,
    pub local_port: u32,
    pub remote_port: u32,
    /// IP protocol of a raw socket, Ethernet protocol of a packet socket.
    pub protocol: u32,
    pub errno: u32,
    pub task: Task,
}

/// Bytes of a path, with its closing zero.
pub const PATH_LEN: usize = 256;
/// Bytes of a process's arguments.
pub const ARGV_LEN: usize = 2_048;

/// A process replaced its program. Path and arguments follow: `path_len` bytes, then
/// `argv_len`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExecEvent {
    pub header: EventHeader,
    pub task: Task,
    pub parent_comm: [u8; 16],
    /// 0: there is none.
    pub parent_tgid: u32,
    pub path_len: u32,
    pub argv_len: u32,
    /// 1: there is more of the arguments than is here.
    pub truncated: u32,
}

/// A process ended.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitEvent {
    pub header: EventHeader,
    pub task: Task,
    /// As wait(2) has it: `code << 8 | core dumped << 7 | signal`.
    pub status: u32,
    pub _pad: u32,
}

/// A UDP flow; key of `DATAGRAMS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    pub netns: u64,
    pub local: Address,
    pub remote: Address,
    pub local_port: u32,
    pub remote_port: u32,
}

/// Whose events of which kind are counted together; key of `BUCKETS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket {
    pub netns: u64,
    /// Only in the node's own namespace, which pods share.
    pub cgroup: u64,
    pub kind: u32,
    pub _pad: u32,
}

/// How many events of a pod are told, as the time between two of them, nanoseconds.
/// Set by the agent before load.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Of TCP sockets.
    pub socket: u64,
    /// Of each other kind.
    pub other: u64,
}

/// Seconds' worth of events that may come at once.
pub const BURST_SECONDS: u64 = 4;

/// Arguments of one call that a kretprobe needs; value of `CALLS`, by thread.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    pub socket: u64,
    pub address: u64,
}

/// Where fields lie in this kernel's structures, read from its BTF by the agent
/// and set before load. The kernel's own layout differs between versions.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offsets {
    pub sock_net: u32,
    pub sock_family: u32,
    pub sock_state: u32,
    pub sock_flags: u32,
    pub sock_daddr: u32,
    pub sock_rcv_saddr: u32,
    pub sock_dport: u32,
    pub sock_num: u32,
    pub sock_v6_daddr: u32,
    pub sock_v6_rcv_saddr: u32,
    pub sock_cookie: u32,
    pub sock_protocol: u32,
    pub sock_type: u32,
    pub sock_err: u32,
    /// Of the pointer in `sk_cgrp_data`.
    pub sock_cgroup: u32,
    pub inet_sport: u32,
    pub packet_num: u32,
    pub tcp_bytes_sent: u32,
    pub tcp_bytes_retrans: u32,
    pub tcp_bytes_received: u32,
    pub tcp_segs_out: u32,
    pub tcp_total_retrans: u32,
    pub tcp_srtt_us: u32,
    pub socket_sk: u32,
    pub msg_name: u32,
    pub net_cookie: u32,
    pub cgroup_kn: u32,
    pub kernfs_id: u32,
    /// Of a cgroup's parent, which is a `cgroup_subsys_state` as it begins itself.
    pub cgroup_parent: u32,
    /// Of the cgroup that a `cgroup_subsys_state` is of.
    pub css_cgroup: u32,
    pub task_nsproxy: u32,
    pub nsproxy_net: u32,
    pub task_flags: u32,
    pub task_exit_code: u32,
    pub task_real_parent: u32,
    pub task_tgid: u32,
    pub task_comm: u32,
    pub task_mm: u32,
    pub task_signal: u32,
    pub signal_group_exec: u32,
    pub mm_arg_start: u32,
    pub mm_arg_end: u32,
    pub binprm_filename: u32,
}
