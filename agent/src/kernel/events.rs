//! Decodes events from the ring, by tag and length: bytes that are not understood
//! are passed over, never trusted.

use std::{net::SocketAddr, sync::LazyLock};

use nix::errno::Errno;
use postern_ebpf::{
    ACCEPTED, Address, ClosedEvent, EVENT_CLOSED, EVENT_DATAGRAM, EVENT_EXEC, EVENT_EXIT,
    EVENT_FAILED, EVENT_LISTEN, EVENT_PACKET, EVENT_RAW, EventHeader, ExecEvent, ExitEvent,
    SocketEvent,
};

use super::maps::from_abi;

/// What the kernel saw of an enrolled pod.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub at: u64,
    pub netns: u64,
    /// The pod's own where it is known by its cgroup (on the host's network); else the
    /// one that the socket was made in, or the process is in.
    pub cgroup: u64,
    pub kind: EventKind,
}

#[derive(Clone, Debug, PartialEq)]
pub enum EventKind {
    /// A TCP connection ended. Also a connect that failed after its SYN was sent.
    Closed(SocketLife),
    /// A connect that failed before a SYN was sent.
    Failed {
        /// 0 where it has none.
        cookie: u64,
        /// As the application dialled it.
        remote: SocketAddr,
        task: Task,
        errno: u32,
    },
    Listen {
        cookie: u64,
        local: SocketAddr,
        task: Option<Task>,
    },
    /// The first of a UDP flow, or the first after five minutes without one. The local
    /// address is unspecified where the application left it to the route.
    Datagram {
        /// 0 where it has none and the kernel was probed by kprobes.
        cookie: u64,
        local: SocketAddr,
        remote: SocketAddr,
        task: Task,
    },
    /// The first packet that a raw or packet socket sends.
    Raw {
        /// As of [`Self::Datagram`].
        cookie: u64,
        packet: bool,
        /// Of IP, or of Ethernet for a packet socket (what it is bound to).
        protocol: u16,
        task: Task,
    },
    Exec {
        task: Task,
        parent: Option<(u32, String)>,
        path: String,
        /// As in `/proc/PID/cmdline`: each ends with a zero.
        argv: Vec<u8>,
        /// There is more than is here.
        truncated: bool,
    },
    Exit {
        task: Task,
        code: u32,
        signal: u32,
    },
}

/// Who did it.
#[derive(Clone, Debug, PartialEq)]
pub struct Task {
    pub pid: u32,
    pub uid: u32,
    pub comm: String,
    pub cgroup: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Dialled,
    Accepted,
}

/// A TCP socket, from its connect or its handshake's end to its close.
#[derive(Clone, Debug, PartialEq)]
pub struct SocketLife {
    pub cookie: u64,
    pub role: Role,
    pub local: SocketAddr,
    /// What it is connected to: the agent, where the connect was steered.
    pub remote: SocketAddr,
    /// What the application dialled, where the connect was steered.
    pub dialled: Option<SocketAddr>,
    /// Who called `connect`, or `accept`. `None`: nobody accepted it, or the kernel
    /// dialled, or nothing was known of it before its end.
    pub task: Option<Task>,
    /// `CLOCK_MONOTONIC`, nanoseconds. 0: it is older than the observers, or there were
    /// too many sockets; its role is a guess then (the larger port dialled).
    pub opened: u64,
    pub established: bool,
    /// Payload that was sent, each byte once, whether acknowledged or not.
    pub sent: u64,
    /// Payload that came in order, whether the application read it or not.
    pub received: u64,
    /// Segments that were sent again.
    pub retransmits: u32,
    /// Smoothed round-trip time. 0: none was measured.
    pub srtt_us: u32,
    /// `SO_ERROR` at its end; 0: none, as where the application gave up.
    pub errno: u32,
}

/// The largest number in `asm-generic/errno.h`.
const ERRNO_MAX: i32 = 133;

/// The name of an error number, as `errno(3)` has it.
pub fn errno_name(errno: u32) -> &'static str {
    static NAMES: LazyLock<Vec<String>> = LazyLock::new(|| {
        let known = (0..=ERRNO_MAX).map(Errno::from_raw);
        known.map(|errno| format!("{errno:?}")).collect()
    });
    match NAMES.get(errno as usize) {
        Some(name) if name != "UnknownErrno" => name,
        _ => "unknown",
    }
}

pub fn decode(bytes: &[u8]) -> Option<Event> {
    let header: EventHeader = read(bytes)?;
    let kind = match header.kind {
        EVENT_CLOSED => closed(&read(bytes)?)?,
        EVENT_FAILED | EVENT_LISTEN | EVENT_DATAGRAM | EVENT_RAW | EVENT_PACKET => {
            socket(header.kind, &read(bytes)?)?
        }
        EVENT_EXEC => exec(bytes)?,
        EVENT_EXIT => {
            let event: ExitEvent = read(bytes)?;
            EventKind::Exit {
                task: known(&event.task),
                code: event.status >> 8 & 0xff,
                signal: event.status & 0x7f,
            }
        }
        _ => return None,
    };
    Some(Event {
        at: header.at,
        netns: header.netns,
        cgroup: header.cgroup,
        kind,
    })
}

fn closed(event: &ClosedEvent) -> Option<EventKind> {
    Some(EventKind::Closed(SocketLife {
        cookie: event.cookie,
        role: if event.role == ACCEPTED {
            Role::Accepted
        } else {
            Role::Dialled
        },
        local: address(event.local, event.local_port)?,
        remote: address(event.remote, event.remote_port)?,
        dialled: match event.dialled_port {
            0 => None,
            port => Some(address(event.dialled, port)?),
        },
        task: task(&event.task),
        opened: event.opened,
        established: event.established != 0,
        sent: event.sent,
        received: event.received,
        retransmits: event.retransmits,
        srtt_us: event.srtt_us,
        errno: event.errno,
    }))
}

fn socket(kind: u32, event: &SocketEvent) -> Option<EventKind> {
    let local = || address(event.local, event.local_port);
    let remote = || address(event.remote, event.remote_port);
    let cookie = event.cookie;
    Some(match kind {
        EVENT_FAILED => EventKind::Failed {
            cookie,
            remote: remote()?,
            task: known(&event.task),
            errno: event.errno,
        },
        EVENT_LISTEN => EventKind::Listen {
            cookie,
            local: local()?,
            task: task(&event.task),
        },
        EVENT_DATAGRAM => EventKind::Datagram {
            cookie,
            local: local()?,
            remote: remote()?,
            task: known(&event.task),
        },
        _ => EventKind::Raw {
            cookie,
            packet: kind == EVENT_PACKET,
            protocol: u16::try_from(event.protocol).ok()?,
            task: known(&event.task),
        },
    })
}

fn exec(bytes: &[u8]) -> Option<EventKind> {
    let event: ExecEvent = read(bytes)?;
    let rest = bytes.get(size_of::<ExecEvent>()..)?;
    let (path, rest) = rest.split_at_checked(event.path_len as usize)?;
    let argv = rest.get(..event.argv_len as usize)?;
    Some(EventKind::Exec {
        task: known(&event.task),
        parent: (event.parent_tgid != 0).then(|| (event.parent_tgid, text(&event.parent_comm))),
        path: String::from_utf8_lossy(path).into_owned(),
        argv: argv.to_vec(),
        truncated: event.truncated != 0,
    })
}

fn address(ip: Address, port: u32) -> Option<SocketAddr> {
    Some(SocketAddr::new(from_abi(ip), u16::try_from(port).ok()?))
}

fn known(task: &postern_ebpf::Task) -> Task {
    Task {
        pid: task.tgid,
        uid: task.uid,
        comm: text(&task.comm),
        cgroup: task.cgroup,
    }
}

fn task(task: &postern_ebpf::Task) -> Option<Task> {
    (task.tgid != 0).then(|| known(task))
}

/// A C string in a fixed field.
pub fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// The ABI's types are integers and byte arrays only, valid for any bytes.
pub(super) fn read<T: aya::Pod>(bytes: &[u8]) -> Option<T> {
    if bytes.len() < size_of::<T>() {
        return None;
    }
    // SAFETY: long enough, and `Pod` is valid for any bytes; unaligned is allowed for.
    Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

#[cfg(test)]
mod tests;
