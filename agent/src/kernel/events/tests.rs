use super::*;
use crate::kernel::to_abi;
use postern_ebpf::{DIALLED, Task as AbiTask};

fn header(kind: u32) -> EventHeader {
    EventHeader {
        kind,
        _pad: 0,
        at: 5,
        netns: 6,
        cgroup: 7,
    }
}

const CURL: AbiTask = AbiTask {
    tgid: 42,
    uid: 1000,
    cgroup: 8,
    comm: *b"curl\0\0\0\0\0\0\0\0\0\0\0\0",
};

const NOBODY: AbiTask = AbiTask {
    tgid: 0,
    uid: 0,
    cgroup: 0,
    comm: [0; 16],
};

fn curl() -> Task {
    Task {
        pid: 42,
        uid: 1000,
        comm: "curl".into(),
        cgroup: 8,
    }
}

/// What the kernel would have written.
fn bytes<T: aya::Pod>(value: &T) -> Vec<u8> {
    // SAFETY: no padding, as the ABI asserts.
    unsafe { std::slice::from_raw_parts((&raw const *value).cast(), size_of::<T>()) }.to_vec()
}

fn abi(address: &str) -> (Address, u32) {
    let address: SocketAddr = address.parse().expect("an address");
    (to_abi(address.ip()), u32::from(address.port()))
}

fn at(address: &str) -> SocketAddr {
    address.parse().expect("an address")
}

fn closed_event() -> ClosedEvent {
    let (local, local_port) = abi("10.0.1.10:40000");
    let (remote, remote_port) = abi("127.0.0.1:15001");
    let (dialled, dialled_port) = abi("10.0.2.10:80");
    ClosedEvent {
        header: header(EVENT_CLOSED),
        cookie: 9,
        local,
        remote,
        dialled,
        local_port,
        remote_port,
        dialled_port,
        role: DIALLED,
        task: CURL,
        opened: 3,
        sent: 100,
        received: 2_000,
        established: 1,
        retransmits: 4,
        srtt_us: 250,
        errno: 104,
    }
}

fn socket_event(kind: u32) -> SocketEvent {
    let (local, local_port) = abi("[fd00::1]:5353");
    let (remote, remote_port) = abi("[fd00::2]:53");
    SocketEvent {
        header: header(kind),
        cookie: 9,
        local,
        remote,
        local_port,
        remote_port,
        protocol: 58,
        errno: 101,
        task: CURL,
    }
}

fn kind(bytes: &[u8]) -> Option<EventKind> {
    decode(bytes).map(|event| event.kind)
}

#[test]
fn a_closed_socket_is_told_whole() {
    let mut event = closed_event();
    let life = SocketLife {
        cookie: 9,
        role: Role::Dialled,
        local: at("10.0.1.10:40000"),
        remote: at("127.0.0.1:15001"),
        dialled: Some(at("10.0.2.10:80")),
        task: Some(curl()),
        opened: 3,
        established: true,
        sent: 100,
        received: 2_000,
        retransmits: 4,
        srtt_us: 250,
        errno: 104,
    };
    let decoded = decode(&bytes(&event)).expect("decodes");
    assert_eq!((decoded.at, decoded.netns, decoded.cgroup), (5, 6, 7));
    assert_eq!(decoded.kind, EventKind::Closed(life.clone()));
    event.role = ACCEPTED;
    event.task = NOBODY;
    event.dialled_port = 0;
    let accepted = SocketLife {
        role: Role::Accepted,
        task: None,
        dialled: None,
        ..life
    };
    assert_eq!(kind(&bytes(&event)), Some(EventKind::Closed(accepted)));
    event.remote_port = 70_000;
    assert_eq!(kind(&bytes(&event)), None, "no port");
}

#[test]
fn sockets_are_told_by_kind() {
    let (local, remote) = (at("[fd00::1]:5353"), at("[fd00::2]:53"));
    let (cookie, task) = (9, curl());
    let raw = |packet| EventKind::Raw {
        cookie,
        packet,
        protocol: 58,
        task: curl(),
    };
    let failed = EventKind::Failed {
        cookie,
        remote,
        task: task.clone(),
        errno: 101,
    };
    let listen = EventKind::Listen {
        cookie,
        local,
        task: Some(task.clone()),
    };
    let datagram = EventKind::Datagram {
        cookie,
        local,
        remote,
        task,
    };
    for (number, expected) in [
        (EVENT_FAILED, failed),
        (EVENT_LISTEN, listen),
        (EVENT_DATAGRAM, datagram),
        (EVENT_RAW, raw(false)),
        (EVENT_PACKET, raw(true)),
    ] {
        let whole = bytes(&socket_event(number));
        assert_eq!(kind(&whole), Some(expected), "{number}");
        assert_eq!(kind(&whole[..whole.len() - 1]), None, "{number}, cut");
    }
}

#[test]
fn an_exec_has_its_path_and_arguments() {
    let mut event = ExecEvent {
        header: header(EVENT_EXEC),
        task: CURL,
        parent_comm: *b"sh\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        parent_tgid: 41,
        path_len: 9,
        argv_len: 8,
        truncated: 1,
    };
    let tail = b"/bin/curlcurl\0-V\0";
    let whole = |event: &ExecEvent| [bytes(event), tail.to_vec()].concat();
    let expected = EventKind::Exec {
        task: curl(),
        parent: Some((41, "sh".into())),
        path: "/bin/curl".into(),
        argv: b"curl\0-V\0".to_vec(),
        truncated: true,
    };
    assert_eq!(kind(&whole(&event)), Some(expected));
    event.argv_len = 9;
    assert_eq!(
        kind(&whole(&event)),
        None,
        "arguments longer than the event"
    );
    (event.path_len, event.argv_len) = (u32::MAX, 0);
    assert_eq!(kind(&whole(&event)), None, "a path longer than the event");
}

#[test]
fn an_exit_has_code_or_signal() {
    for (status, code, signal) in [(3 << 8, 3, 0), (9, 0, 9), (11 | 0x80, 0, 11)] {
        let event = ExitEvent {
            header: header(EVENT_EXIT),
            task: CURL,
            status,
            _pad: 0,
        };
        let expected = EventKind::Exit {
            task: curl(),
            code,
            signal,
        };
        assert_eq!(kind(&bytes(&event)), Some(expected));
    }
}

#[test]
fn unknown_events_are_passed_over() {
    assert_eq!(decode(&[]), None);
    assert_eq!(decode(&bytes(&header(0))), None);
    assert_eq!(decode(&bytes(&header(99))), None);
}

#[test]
fn errors_have_names() {
    assert_eq!(errno_name(111), "ECONNREFUSED");
    assert_eq!(errno_name(1), "EPERM");
    for none in [0, 58, 134, u32::MAX] {
        assert_eq!(errno_name(none), "unknown", "{none}");
    }
}
