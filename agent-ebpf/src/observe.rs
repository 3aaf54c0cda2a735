//! Observers: what the kernel itself saw of enrolled pods, for the audit log.
//! They decide nothing, so they fail open. An event that finds the ring full, or is
//! more than is told of one pod, is counted by kind.
//!
//! The agent's own sockets in a pod's namespace are nobody's business: they carry
//! what the pod's sockets were seen to do.

pub mod datagrams;
pub mod processes;
pub mod sockets;

use core::ffi::c_void;

use aya_ebpf::{
    helpers::generated::{bpf_get_current_cgroup_id, bpf_get_current_task, bpf_ktime_get_ns},
    helpers::{
        bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_get_current_uid_gid,
        bpf_probe_read_kernel,
    },
    maps::ring_buf::RingBufEntry,
};
use postern_ebpf::{
    Address, BURST_SECONDS, Bucket, Config, Counter, EventHeader, Limits, Offsets, Task,
};

use crate::{
    context::{Caller, caller, is_agent, is_agents_cgroup, mapped},
    maps::{BUCKETS, CGROUPS, EVENTS, WORKLOADS, count},
};

/// Set by the agent before load, from the kernel's BTF.
#[unsafe(no_mangle)]
pub static OFFSETS: Offsets = Offsets {
    sock_net: 0,
    sock_family: 0,
    sock_state: 0,
    sock_flags: 0,
    sock_daddr: 0,
    sock_rcv_saddr: 0,
    sock_dport: 0,
    sock_num: 0,
    sock_v6_daddr: 0,
    sock_v6_rcv_saddr: 0,
    sock_cookie: 0,
    sock_protocol: 0,
    sock_type: 0,
    sock_err: 0,
    sock_cgroup: 0,
    inet_sport: 0,
    packet_num: 0,
    tcp_bytes_sent: 0,
    tcp_bytes_retrans: 0,
    tcp_bytes_received: 0,
    tcp_segs_out: 0,
    tcp_total_retrans: 0,
    tcp_srtt_us: 0,
    socket_sk: 0,
    msg_name: 0,
    net_cookie: 0,
    cgroup_kn: 0,
    kernfs_id: 0,
    cgroup_parent: 0,
    css_cgroup: 0,
    task_nsproxy: 0,
    nsproxy_net: 0,
    task_flags: 0,
    task_exit_code: 0,
    task_real_parent: 0,
    task_tgid: 0,
    task_comm: 0,
    task_mm: 0,
    task_signal: 0,
    signal_group_exec: 0,
    mm_arg_start: 0,
    mm_arg_end: 0,
    binprm_filename: 0,
};

/// Set by the agent before load: whose observers these are.
#[unsafe(no_mangle)]
static OBSERVER: u64 = 0;

/// Set by the agent before load, from its configuration.
#[unsafe(no_mangle)]
static LIMITS: Limits = Limits {
    socket: 0,
    other: 0,
};

/// Reads what the agent has set before load: a constant to the verifier.
#[inline(always)]
pub fn set<T: Copy>(value: &'static T) -> T {
    // SAFETY: a reference; volatile, because the compiler sees what it is set to here.
    unsafe { (&raw const *value).read_volatile() }
}

/// One of [`OFFSETS`].
macro_rules! offset {
    ($field:ident) => {
        $crate::observe::set(&$crate::observe::OFFSETS.$field)
    };
}
pub(crate) use offset;

/// Reads a field of a kernel structure.
///
/// # Safety
/// `T` is what lies at `offset` of the structure at `base`.
#[inline(always)]
unsafe fn field<T>(base: u64, offset: u32) -> Option<T> {
    // SAFETY: the helper checks the address; the caller promises the type.
    unsafe { bpf_probe_read_kernel((base + u64::from(offset)) as *const T) }.ok()
}

/// Reads a field of a structure whose type the verifier knows: a plain load, where
/// [`field`] is a call. What is not there reads as zero.
///
/// # Safety
/// `T` is what lies at `offset` of the structure at `base`.
#[inline(always)]
unsafe fn typed<T: Copy>(base: *const c_void, offset: u32) -> T {
    // SAFETY: the kernel passes over a fault; the caller promises the type.
    unsafe {
        let at = base.cast::<u8>().add(offset as usize);
        at.cast::<T>().read_volatile()
    }
}

/// The pod that an event is about.
#[derive(Clone, Copy)]
pub struct Subject {
    pub netns: u64,
    /// As [`EventHeader::cgroup`].
    pub cgroup: u64,
}

/// `sk` of a `struct socket`.
#[inline(always)]
pub fn socket_sk(socket: u64) -> Option<u64> {
    // SAFETY: offset and type are those of the running kernel's BTF.
    unsafe { field(socket, offset!(socket_sk)) }
}

/// A socket's cookie, 0 where nobody has asked for one yet.
#[inline(always)]
pub fn cookie(sk: u64) -> u64 {
    // SAFETY: as above.
    unsafe { field(sk, offset!(sock_cookie)) }.unwrap_or(0)
}

#[inline(always)]
fn socket_netns(sk: u64) -> Option<u64> {
    // SAFETY: offsets and types are those of the running kernel's BTF.
    unsafe {
        let net: u64 = field(sk, offset!(sock_net))?;
        field(net, offset!(net_cookie))
    }
}

/// 0: there is none.
///
/// # Safety
/// `cgroup` is a cgroup to the verifier.
#[inline(always)]
unsafe fn cgroup_id(cgroup: *const c_void) -> u64 {
    // SAFETY: offsets and types are those of the running kernel's BTF, and the caller's
    // promise.
    unsafe {
        let node: *const c_void = typed(cgroup, offset!(cgroup_kn));
        typed(node, offset!(kernfs_id))
    }
}

/// How far above a socket's cgroup its pod's is looked for: a container's, one that it
/// made itself, and one more.
const LEVELS_ABOVE: usize = 4;

/// The enrolled pod that a socket belongs to, whoever runs: softirq is nobody. The socket
/// is one to the verifier.
#[inline(always)]
fn owner(config: &Config, sk: *const c_void) -> Option<(Subject, Agents)> {
    // SAFETY: offsets and types are those of the running kernel's BTF. What `sk_cgrp_data`
    // points to is the cgroup that the socket was made in; an accepted one has its
    // listener's.
    let (netns, mut at, own) = unsafe {
        let net: *const c_void = typed(sk, offset!(sock_net));
        let at: *const c_void = typed(sk, offset!(sock_cgroup));
        (typed(net, offset!(net_cookie)), at, cgroup_id(at))
    };
    let agents = Agents::tell(config, own);
    if matches!(agents, Agents::Yes) {
        return None;
    }
    if netns != config.node_netns {
        // SAFETY: the map's values are only replaced whole, by the agent.
        if let Some(workload) = unsafe { WORKLOADS.get(netns) } {
            let subject = Subject { netns, cgroup: own };
            return (workload.enrolled == 1).then_some((subject, agents));
        }
    }
    for _ in 0..LEVELS_ABOVE {
        // SAFETY: a cgroup begins with its `cgroup_subsys_state`, whose parent is of the
        // same kind and knows its cgroup.
        let cgroup = unsafe {
            let above: *const c_void = typed(at, offset!(cgroup_parent));
            at = typed(above, offset!(css_cgroup));
            cgroup_id(at)
        };
        if cgroup == 0 {
            return None; // above the root
        }
        // SAFETY: the map's values are only replaced whole, by the agent.
        if let Some(workload) = unsafe { CGROUPS.get(cgroup) } {
            return (workload.enrolled == 1).then_some((Subject { netns, cgroup }, agents));
        }
    }
    None
}

/// Whether a socket is the agent's own.
#[derive(Clone, Copy)]
enum Agents {
    Yes,
    No,
    /// Pods share the agent's cgroup: on hosts where their cgroups are v1 only. Then
    /// its process is asked for, where there is one.
    Unsure,
}

impl Agents {
    #[inline(always)]
    fn tell(config: &Config, cgroup: u64) -> Self {
        let agents = is_agents_cgroup(config, cgroup);
        if config.pods_by_netns_only == 1 || config.agent_cgroup == 0 {
            if agents || config.agent_cgroup == 0 {
                return Self::Unsure;
            }
            return Self::No;
        }
        if agents { Self::Yes } else { Self::No }
    }
}

/// The configuration, for the observers of the agent in charge: while one takes over from
/// another, both have theirs attached, and everything is to be told once.
#[inline(always)]
fn config() -> Option<&'static Config> {
    crate::maps::config().filter(|config| config.observer == set(&OBSERVER))
}

/// The enrolled pod that the current process belongs to, given a namespace: its own or
/// its socket's.
#[inline(always)]
fn calling(config: &Config, netns: u64) -> Option<Subject> {
    match caller(config, netns) {
        Caller::Known(workload, pod) if workload.enrolled == 1 && !is_agent(config) => {
            // SAFETY: a helper without arguments.
            let own = unsafe { bpf_get_current_cgroup_id() };
            let cgroup = if pod == 0 { own } else { pod };
            Some(Subject { netns, cgroup })
        }
        _ => None,
    }
}

#[inline(always)]
fn current_netns() -> Option<u64> {
    // SAFETY: offsets and types are those of the running kernel's BTF.
    unsafe {
        let nsproxy: u64 = field(bpf_get_current_task(), offset!(task_nsproxy))?;
        let net: u64 = field(nsproxy, offset!(nsproxy_net))?;
        field(net, offset!(net_cookie))
    }
}

/// The current process.
#[inline(always)]
fn task() -> Task {
    Task {
        tgid: (bpf_get_current_pid_tgid() >> 32) as u32,
        uid: bpf_get_current_uid_gid() as u32,
        // SAFETY: a helper without arguments.
        cgroup: unsafe { bpf_get_current_cgroup_id() },
        comm: bpf_get_current_comm().unwrap_or_default(),
    }
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_ktime_get_ns() }
}

const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

/// An address and its port, in host order.
#[derive(Clone, Copy)]
struct At {
    address: Address,
    port: u32,
}

/// Both ends of a socket, as it has them.
#[inline(always)]
fn ends(sk: u64) -> Option<(At, At)> {
    // SAFETY: offsets and types are those of the running kernel's BTF.
    unsafe {
        let (local, remote) = match field(sk, offset!(sock_family))? {
            AF_INET => (
                mapped(field(sk, offset!(sock_rcv_saddr))?),
                mapped(field(sk, offset!(sock_daddr))?),
            ),
            AF_INET6 => (
                field(sk, offset!(sock_v6_rcv_saddr))?,
                field(sk, offset!(sock_v6_daddr))?,
            ),
            _ => return None,
        };
        // Not `skc_num`: it is gone by the time that a TCP socket is closed.
        let (near, far): (u16, u16) = (
            field(sk, offset!(inet_sport))?,
            field(sk, offset!(sock_dport))?,
        );
        let at = |address, port| At {
            address,
            port: u32::from(u16::from_be(port)),
        };
        Some((at(local, near), at(remote, far)))
    }
}

/// As [`ends`], of a socket that is an `inet_sock`, or what has one in it, to the verifier.
#[inline(always)]
fn typed_ends(sk: *const c_void) -> Option<(At, At)> {
    // SAFETY: offsets and types are those of the running kernel's BTF.
    unsafe {
        let (local, remote) = match typed(sk, offset!(sock_family)) {
            AF_INET => (
                mapped(typed(sk, offset!(sock_rcv_saddr))),
                mapped(typed(sk, offset!(sock_daddr))),
            ),
            AF_INET6 => (
                typed_address(sk, offset!(sock_v6_rcv_saddr)),
                typed_address(sk, offset!(sock_v6_daddr)),
            ),
            _ => return None,
        };
        let (near, far): (u16, u16) = (
            typed(sk, offset!(inet_sport)),
            typed(sk, offset!(sock_dport)),
        );
        let at = |address, port| At {
            address,
            port: u32::from(u16::from_be(port)),
        };
        Some((at(local, near), at(remote, far)))
    }
}

/// # Safety
/// An IPv6 address lies at `offset` of the structure at `base`.
#[inline(always)]
unsafe fn typed_address(base: *const c_void, offset: u32) -> Address {
    // SAFETY: the caller's promise.
    unsafe {
        [
            typed(base, offset),
            typed(base, offset + 4),
            typed(base, offset + 8),
            typed(base, offset + 12),
        ]
    }
}

/// A `sockaddr` that the kernel has copied.
#[inline(always)]
fn sockaddr(at: u64) -> Option<At> {
    // SAFETY: `sockaddr_in` and `sockaddr_in6` begin with family and port.
    unsafe {
        let address = match field(at, 0)? {
            AF_INET => mapped(field(at, 4)?),
            AF_INET6 => field(at, 8)?,
            _ => return None,
        };
        let port: u16 = field(at, 2)?;
        Some(At {
            address,
            port: u32::from(u16::from_be(port)),
        })
    }
}

/// What is limited, and counted, together.
#[derive(Clone, Copy)]
enum Kind {
    Socket,
    Exec,
    Exit,
    Datagram,
    Raw,
}

impl Kind {
    #[inline(always)]
    fn lost(self) -> Counter {
        match self {
            Self::Socket => Counter::LostSocket,
            Self::Exec => Counter::LostExec,
            Self::Exit => Counter::LostExit,
            Self::Datagram => Counter::LostDatagram,
            Self::Raw => Counter::LostRaw,
        }
    }

    #[inline(always)]
    fn limited(self) -> Counter {
        match self {
            Self::Socket => Counter::LimitedSocket,
            Self::Exec => Counter::LimitedExec,
            Self::Exit => Counter::LimitedExit,
            Self::Datagram => Counter::LimitedDatagram,
            Self::Raw => Counter::LimitedRaw,
        }
    }
}

/// Room in the ring for an event; what there is none for is counted.
#[inline(always)]
fn room<T: 'static>(config: &Config, subject: Subject, kind: Kind) -> Option<RingBufEntry<T>> {
    if !allowed(config, subject, kind) {
        return None;
    }
    let entry = EVENTS.reserve::<T>(0);
    if entry.is_none() {
        count(kind.lost());
    }
    entry
}

/// A token bucket, kept as the time at which it is full again (GCRA, ITU-T I.371). Two
/// CPUs may both take the last token: the limit bounds the cost, it is no promise.
#[inline(always)]
fn allowed(config: &Config, subject: Subject, kind: Kind) -> bool {
    let interval = set(match kind {
        Kind::Socket => &LIMITS.socket,
        _ => &LIMITS.other,
    });
    if interval == 0 {
        return false; // nobody wants to know
    }
    // A pod can make namespaces of its own: only that of a workload has a bucket, in all
    // others the pod is told by its cgroup.
    // SAFETY: only whether it is there.
    let known =
        subject.netns != config.node_netns && unsafe { WORKLOADS.get(subject.netns) }.is_some();
    let bucket = Bucket {
        netns: if known { subject.netns } else { 0 },
        cgroup: if known { 0 } else { subject.cgroup },
        kind: kind as u32,
        _pad: 0,
    };
    let now = now();
    let Some(full) = BUCKETS.get_ptr_mut(bucket) else {
        let _full = BUCKETS.insert(bucket, now + interval, 0);
        return true;
    };
    // SAFETY: a word of a map; a write that is lost lets one event more through.
    unsafe {
        let from = if *full > now { *full } else { now };
        if from - now > BURST_SECONDS * 1_000_000_000 {
            count(kind.limited());
            return false;
        }
        *full = from + interval;
    }
    true
}

#[inline(always)]
fn header(kind: u32, subject: Subject) -> EventHeader {
    EventHeader {
        kind,
        _pad: 0,
        at: now(),
        netns: subject.netns,
        cgroup: subject.cgroup,
    }
}
