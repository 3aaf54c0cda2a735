//! TCP sockets from the connect, or the handshake's end, to their close. Each is
//! followed in `SOCKETS` and told once, when all is known; the kernel counts its bytes
//! anyway.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::{
    bpf_get_current_cgroup_id, bpf_get_current_task_btf, bpf_get_socket_cookie, bpf_skc_to_tcp_sock,
};
use postern_ebpf::{
    ACCEPTED, Address, ClosedEvent, Config, Counter, DIALLED, EVENT_CLOSED, EVENT_FAILED,
    EVENT_LISTEN, SocketEvent, Task, Tracked,
};

use super::{
    Agents, At, Kind, Subject, calling, config, cookie, field, header, now, offset, owner, room,
    sockaddr, socket_netns, task, typed, typed_ends,
};
use crate::{
    context::is_agent,
    lookup::is_loopback,
    maps::{DIALS, SOCKETS, TOLD, count},
};

/// `include/net/tcp_states.h`.
mod tcp {
    pub const ESTABLISHED: u32 = 1;
    pub const SYN_SENT: u32 = 2;
    pub const SYN_RECV: u32 = 3;
    pub const CLOSE: u32 = 7;
    pub const LISTEN: u32 = 10;
}

const IPPROTO_TCP: u16 = 6;
/// `SOCK_DONE` of `enum sock_flags`: the peer's FIN has come.
const SOCK_DONE: u64 = 1 << 1;
/// `include/linux/sched.h`: a thread of the kernel's own.
const PF_KTHREAD: u32 = 0x0020_0000;
const NOBODY: Task = Task {
    tgid: 0,
    uid: 0,
    cgroup: 0,
    comm: [0; 16],
};

mod errno {
    pub const EPERM: i32 = 1;
    pub const EISCONN: i32 = 106;
    pub const EALREADY: i32 = 114;
    pub const EINPROGRESS: i32 = 115;
}

/// `sock:inet_sock_set_state`: before the state changes.
#[inline(always)]
pub fn state(sk: *mut c_void, old: u32, new: u32) -> Option<()> {
    // Half of all changes are none of these.
    let change = match (old, new) {
        (tcp::CLOSE, tcp::SYN_SENT) => Change::Dialling,
        (tcp::CLOSE, tcp::LISTEN) => Change::Listening,
        (_, tcp::ESTABLISHED) => Change::Established,
        (tcp::LISTEN | tcp::CLOSE, _) => return None,
        (_, tcp::CLOSE) => Change::Closed,
        _ => return None,
    };
    // SAFETY: offset and type are those of the running kernel's BTF.
    let protocol: u16 = unsafe { typed(sk, offset!(sock_protocol)) };
    if protocol != IPPROTO_TCP {
        return None;
    }
    let config = config()?;
    match change {
        Change::Dialling => dialling(config, sk),
        Change::Listening => listening(config, sk),
        Change::Established => established(config, sk, old),
        Change::Closed => closed(config, sk, old),
    }
}

enum Change {
    Dialling,
    Listening,
    Established,
    Closed,
}

/// Within `connect`, or a kernel thread's doing (MPTCP's further subflows).
#[inline(always)]
fn dialling(config: &Config, sk: *mut c_void) -> Option<()> {
    let (subject, agents) = owner(config, sk)?;
    if matches!(agents, Agents::Unsure) && is_agent(config) {
        return None;
    }
    // SAFETY: the tracepoint's own argument; a helper that takes it.
    let cookie = unsafe { bpf_get_socket_cookie(sk) };
    forget_told(cookie);
    // The hook before has changed where it goes, if it is to the agent.
    let steered = matches!(tcp_ends(sk), Some((_, remote)) if is_loopback(remote.address));
    // SAFETY: the entry is copied out; it is written once, before.
    let (dialled, dialled_port) = match steered.then(|| unsafe { DIALS.get(cookie) }).flatten() {
        Some(dial) => (dial.destination, dial.destination_port),
        None => ([0; 4], 0),
    };
    // SAFETY: offset and type are those of the running kernel's BTF.
    let flags: u32 = unsafe { typed(bpf_get_current_task_btf().cast(), offset!(task_flags)) };
    let tracked = Tracked {
        task: if flags & PF_KTHREAD == 0 {
            task()
        } else {
            NOBODY
        },
        dialled,
        netns: subject.netns,
        cgroup: subject.cgroup,
        opened: now(),
        dialled_port,
        role: DIALLED,
        established: 0,
        _pad: 0,
    };
    track(cookie, &tracked);
    Some(())
}

/// In softirq, where it is a child of a listener.
#[inline(always)]
fn established(config: &Config, sk: *mut c_void, old: u32) -> Option<()> {
    let known = typed_cookie(sk);
    if known != 0
        && let Some(tracked) = SOCKETS.get_ptr_mut(known)
    {
        // SAFETY: a word of a map.
        unsafe { (*tracked).established = 1 };
        return Some(());
    }
    if old != tcp::SYN_RECV {
        return None;
    }
    let (subject, _) = owner(config, sk)?;
    // SAFETY: the tracepoint's own argument; a helper that takes it.
    let cookie = unsafe { bpf_get_socket_cookie(sk) };
    track(cookie, &accepted(subject.netns, subject.cgroup, NOBODY));
    Some(())
}

#[inline(always)]
fn accepted(netns: u64, cgroup: u64, task: Task) -> Tracked {
    Tracked {
        task,
        dialled: [0; 4],
        netns,
        cgroup,
        opened: now(),
        dialled_port: 0,
        role: ACCEPTED,
        established: 1,
        _pad: 0,
    }
}

#[inline(always)]
fn track(cookie: u64, tracked: &Tracked) {
    if SOCKETS.insert(cookie, tracked, 0).is_err() {
        count(Counter::UntrackedSocket);
    }
}

/// `inet_csk_accept` returned a socket. One that was taken from the queue before the
/// softirq was done with it is not here yet: then [`asked`] may find out.
#[inline(always)]
pub fn accept(sk: u64) -> Option<()> {
    if sk == 0 || protocol(sk)? != IPPROTO_TCP {
        return None;
    }
    let config = config()?;
    let cookie = cookie(sk);
    let tracked = SOCKETS.get_ptr_mut(cookie)?;
    if is_agent(config) {
        // Only where its cgroup could not tell.
        let _absent = SOCKETS.remove(cookie);
        return None;
    }
    // SAFETY: the entry is the socket's own, and only this writes its task.
    unsafe { (*tracked).task = task() };
    Some(())
}

#[inline(always)]
fn listening(config: &Config, sk: *mut c_void) -> Option<()> {
    let (subject, agents) = owner(config, sk)?;
    if matches!(agents, Agents::Unsure) && is_agent(config) {
        return None;
    }
    let (local, _) = tcp_ends(sk)?;
    // SAFETY: the tracepoint's own argument; a helper that takes it.
    let cookie = unsafe { bpf_get_socket_cookie(sk) };
    let mut entry = room::<SocketEvent>(config, subject, Kind::Socket)?;
    entry.write(SocketEvent {
        header: header(EVENT_LISTEN, subject),
        cookie,
        local: local.address,
        remote: [0; 4],
        local_port: local.port,
        remote_port: 0,
        protocol: 0,
        errno: 0,
        task: task(),
    });
    entry.submit(0);
    Some(())
}

#[inline(always)]
fn closed(config: &Config, sk: *mut c_void, old: u32) -> Option<()> {
    let cookie = typed_cookie(sk);
    let known = match cookie {
        0 => None, // nobody has asked for it
        _ => SOCKETS.get_ptr_mut(cookie),
    };
    let tracked = if let Some(known) = known {
        // SAFETY: copied out before it is removed.
        let tracked = unsafe { *known };
        let _there = SOCKETS.remove(cookie);
        tracked
    } else {
        untracked(config, sk, old)?
    };
    let tcp = tcp_sock(sk)?;
    // SAFETY: offset and type are those of the running kernel's BTF.
    let left: u32 = unsafe { typed(tcp, offset!(tcp_segs_out)) };
    if old == tcp::SYN_SENT && left == 0 {
        // `connect` has not returned yet, and only it knows why.
        return None;
    }
    if tracked.established == 0 {
        // Of what `connect` returns then, nothing is to be told again.
        let _full = TOLD.insert(cookie, 1, 0);
    }
    if tracked.role == ACCEPTED
        && tracked.task.tgid == 0
        && matches!(owner(config, sk)?.1, Agents::Unsure)
    {
        // Nobody accepted it: it may have been for the agent.
        return None;
    }
    tell(config, tcp, cookie, &tracked)
}

/// The close of a socket that is not in `SOCKETS`. Its end is known all the same.
#[inline(always)]
fn untracked(config: &Config, sk: *mut c_void, old: u32) -> Option<Tracked> {
    if old == tcp::SYN_RECV {
        return None; // it never came to be
    }
    let (subject, agents) = owner(config, sk)?;
    if matches!(agents, Agents::Unsure) {
        return None;
    }
    let (local, remote) = tcp_ends(sk)?;
    let mut tracked = accepted(subject.netns, subject.cgroup, NOBODY);
    tracked.opened = 0;
    // A guess: servers have the lower ports.
    if old == tcp::SYN_SENT || local.port > remote.port {
        tracked.role = DIALLED;
    }
    tracked.established = u32::from(old != tcp::SYN_SENT);
    Some(tracked)
}

#[inline(always)]
fn tell(config: &Config, tcp: *const c_void, cookie: u64, tracked: &Tracked) -> Option<()> {
    let subject = Subject {
        netns: tracked.netns,
        cgroup: tracked.cgroup,
    };
    let (local, remote) = typed_ends(tcp)?;
    // SAFETY: offsets and types are those of the running kernel's BTF.
    let (flags, sent, again, received, retransmits, srtt, errno) = unsafe {
        (
            typed::<u64>(tcp, offset!(sock_flags)),
            typed::<u64>(tcp, offset!(tcp_bytes_sent)),
            typed::<u64>(tcp, offset!(tcp_bytes_retrans)),
            typed::<u64>(tcp, offset!(tcp_bytes_received)),
            typed::<u32>(tcp, offset!(tcp_total_retrans)),
            typed::<u32>(tcp, offset!(tcp_srtt_us)),
            typed::<u32>(tcp, offset!(sock_err)),
        )
    };
    let mut entry = room::<ClosedEvent>(config, subject, Kind::Socket)?;
    entry.write(ClosedEvent {
        header: header(EVENT_CLOSED, subject),
        cookie,
        local: local.address,
        remote: remote.address,
        dialled: tracked.dialled,
        local_port: local.port,
        remote_port: remote.port,
        dialled_port: tracked.dialled_port,
        role: tracked.role,
        task: tracked.task,
        opened: tracked.opened,
        // Not `bytes_acked`, which counts SYN and FIN as bytes.
        sent: sent.wrapping_sub(again),
        // A FIN takes a number of the sequence, too.
        received: received.saturating_sub((flags & SOCK_DONE) >> 1),
        established: tracked.established,
        retransmits,
        srtt_us: srtt >> 3,
        errno,
    });
    entry.submit(0);
    Some(())
}

/// `inet_stream_connect` returned. `address` is where the application wanted to go, or
/// where the hook sent it.
#[inline(always)]
pub fn connect(sk: u64, address: u64, returned: i32) -> Option<()> {
    let errno = -returned;
    if errno <= 0 || matches!(errno, errno::EINPROGRESS | errno::EALREADY | errno::EISCONN) {
        return None;
    }
    let config = config()?;
    let cookie = cookie(sk);
    // SAFETY: offset and type are those of the running kernel's BTF.
    let state: u8 = unsafe { field(sk, offset!(sock_state))? };
    // A signal or the application's own time limit: it goes on, and its close is told.
    if u32::from(state) != tcp::CLOSE {
        return None;
    }
    // Subflows of MPTCP are told as TCP.
    if protocol(sk)? != IPPROTO_TCP {
        return None;
    }
    if forget_told(cookie) {
        return None;
    }
    let subject = calling(config, socket_netns(sk)?)?;
    // SAFETY: the entry is copied out; it is written once, before.
    let remote = match unsafe { DIALS.get(cookie) } {
        Some(dial) => At {
            address: dial.destination,
            port: dial.destination_port,
        },
        None => sockaddr(address)?,
    };
    failed(config, subject, cookie, remote, errno)
}

/// The hook refuses a connect. It says so itself: a pod that is not known yet is no
/// pod to what comes after.
#[inline(always)]
pub fn refused(config: &Config, netns: u64, cookie: u64, address: Address, port: u32) {
    // SAFETY: a helper without arguments.
    let cgroup = unsafe { bpf_get_current_cgroup_id() };
    let subject = Subject { netns, cgroup };
    let _full = TOLD.insert(cookie, 1, 0);
    let _told = failed(config, subject, cookie, At { address, port }, errno::EPERM);
}

#[inline(always)]
fn failed(config: &Config, subject: Subject, cookie: u64, remote: At, errno: i32) -> Option<()> {
    let mut entry = room::<SocketEvent>(config, subject, Kind::Socket)?;
    entry.write(SocketEvent {
        header: header(EVENT_FAILED, subject),
        cookie,
        local: [0; 4],
        remote: remote.address,
        local_port: 0,
        remote_port: remote.port,
        protocol: 0,
        errno: errno as u32,
        task: task(),
    });
    entry.submit(0);
    Some(())
}

/// A process asks for the peer of a socket, as `accept` does where it is to tell. Who
/// accepted it is known by that where `inet_csk_accept` cannot be probed.
#[inline(always)]
pub fn asked(cookie: u64) {
    if let Some(tracked) = SOCKETS.get_ptr_mut(cookie)
        // SAFETY: words of a map.
        && unsafe { (*tracked).role == ACCEPTED && (*tracked).task.tgid == 0 }
        && config().is_some_and(|config| !is_agent(config))
    {
        // SAFETY: as above.
        unsafe { (*tracked).task = task() };
    }
}

/// Whether the end of a socket's connect was told. A look-up takes no lock, a removal does
/// also where there is nothing.
#[inline(always)]
fn forget_told(cookie: u64) -> bool {
    // SAFETY: a plain number.
    unsafe { TOLD.get(cookie) }.is_some() && TOLD.remove(cookie).is_ok()
}

/// As [`cookie`], of a socket that is one to the verifier.
#[inline(always)]
fn typed_cookie(sk: *const c_void) -> u64 {
    // SAFETY: offset and type are those of the running kernel's BTF.
    unsafe { typed(sk, offset!(sock_cookie)) }
}

/// A TCP socket with all its fields.
#[inline(always)]
fn tcp_sock(sk: *mut c_void) -> Option<*const c_void> {
    // SAFETY: a helper that takes what the verifier knows to be a socket.
    let tcp = unsafe { bpf_skc_to_tcp_sock(sk) };
    (!tcp.is_null()).then_some(tcp.cast_const().cast())
}

#[inline(always)]
fn tcp_ends(sk: *mut c_void) -> Option<(At, At)> {
    typed_ends(tcp_sock(sk)?)
}

#[inline(always)]
fn protocol(sk: u64) -> Option<u16> {
    // SAFETY: offset and type are those of the running kernel's BTF.
    unsafe { field(sk, offset!(sock_protocol)) }
}
