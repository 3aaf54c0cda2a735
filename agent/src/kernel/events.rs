//! Decodes events from the ring, by tag and length: bytes that are not understood
//! are passed over, never trusted.

use std::net::SocketAddr;

use postern_ebpf::{
    EVENT_EXEC, EVENT_EXIT, EVENT_SOCKET, EventHeader, ExecEvent, ExitEvent, SocketEvent,
};

use super::maps::from_abi;

/// What the kernel saw of an enrolled pod.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    pub pid: u32,
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub at: u64,
    pub netns: u64,
    pub cgroup: u64,
    pub comm: String,
    pub kind: EventKind,
}

#[derive(Clone, Debug, PartialEq)]
pub enum EventKind {
    Socket {
        cookie: u64,
        local: SocketAddr,
        remote: SocketAddr,
        old: &'static str,
        new: &'static str,
    },
    Exec {
        uid: u32,
        path: String,
    },
    Exit,
}

pub fn decode(bytes: &[u8]) -> Option<Event> {
    let header: EventHeader = read(bytes)?;
    let kind = match header.kind {
        EVENT_SOCKET => {
            let event: SocketEvent = read(bytes)?;
            let address =
                |ip, port: u32| Some(SocketAddr::new(from_abi(ip), u16::try_from(port).ok()?));
            EventKind::Socket {
                cookie: event.cookie,
                local: address(event.local, event.local_port)?,
                remote: address(event.remote, event.remote_port)?,
                old: state(event.old_state),
                new: state(event.new_state),
            }
        }
        EVENT_EXEC => {
            let event: ExecEvent = read(bytes)?;
            let path = event.path.get(..event.path_len as usize)?;
            EventKind::Exec {
                uid: event.uid,
                path: String::from_utf8_lossy(path).into_owned(),
            }
        }
        EVENT_EXIT => {
            let _whole: ExitEvent = read(bytes)?;
            EventKind::Exit
        }
        _ => return None,
    };
    Some(Event {
        pid: header.tgid,
        at: header.at,
        netns: header.netns,
        cgroup: header.cgroup,
        comm: text(&header.comm),
        kind,
    })
}

/// A C string in a fixed field.
pub fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// The ABI's types are integers and byte arrays only, valid for any bytes.
fn read<T: aya::Pod>(bytes: &[u8]) -> Option<T> {
    if bytes.len() < size_of::<T>() {
        return None;
    }
    // SAFETY: long enough, and `Pod` is valid for any bytes; unaligned is allowed for.
    Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

/// Names of `include/net/tcp_states.h`, as `ss` prints them.
fn state(number: u32) -> &'static str {
    match number {
        1 => "ESTAB",
        2 => "SYN-SENT",
        3 => "SYN-RECV",
        4 => "FIN-WAIT-1",
        5 => "FIN-WAIT-2",
        6 => "TIME-WAIT",
        7 => "CLOSE",
        8 => "CLOSE-WAIT",
        9 => "LAST-ACK",
        10 => "LISTEN",
        11 => "CLOSING",
        12 => "NEW-SYN-RECV",
        _ => "UNKNOWN",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_and_unknown_events_are_passed_over() {
        assert_eq!(decode(&[]), None);
        let mut exit = vec![0; size_of::<ExitEvent>()];
        assert_eq!(decode(&exit), None, "kind 0");
        exit[0] = EVENT_EXIT as u8;
        exit[4] = 7;
        exit[32..36].copy_from_slice(b"curl");
        let event = decode(&exit).expect("an exit");
        assert_eq!((event.pid, event.comm.as_str()), (7, "curl"));
        exit[0] = EVENT_EXEC as u8;
        assert_eq!(decode(&exit), None, "too short for an exec");
        let mut exec = vec![0; size_of::<ExecEvent>()];
        exec[0] = EVENT_EXEC as u8;
        exec[52] = 0xff;
        exec[53] = 0xff;
        assert_eq!(decode(&exec), None, "a path longer than its field");
    }
}
