use super::*;

#[test]
fn a_dial_is_the_same_to_both_agents() {
    let dial = Dial {
        destination: to_abi("10.0.2.11".parse().expect("an address")),
        source: to_abi("127.0.0.1".parse().expect("an address")),
        netns: 7,
        cgroup: 8,
        at: 9,
        cookie: 10,
        destination_port: 80,
        source_port: 40_000,
        tgid: 11,
        uid: 12,
        comm: *b"curl\0\0\0\0\0\0\0\0\0\0\0\0",
    };
    let flow = Endpoint {
        netns: 7,
        address: dial.source,
        port: 40_000,
        _pad: 0,
    };
    let text = serde_json::to_string(&Waiting::of(&(flow, dial))).expect("JSON");
    let read: Waiting = serde_json::from_str(&text).expect("the same");
    assert_eq!(read.entry(), (flow, dial));
}

#[test]
fn what_the_kernel_saw_is_the_same_to_both_agents() {
    let seen = Seen {
        socket: Socket {
            cookie: 1 << 60,
            sent: 2,
            received: 3,
            retransmits: 4,
            srtt_us: 5,
            errno: Some("ECONNRESET"),
        },
        process: Some(Arc::new(Process {
            pid: 6,
            comm: "curl".into(),
            ..Process::default()
        })),
    };
    for key in [
        Key::Dialled(1 << 60),
        Key::Hop {
            netns: 7,
            source: "127.64.0.1:1".parse().expect("an address"),
        },
    ] {
        let text = serde_json::to_string(&Told::of(key, seen.clone())).expect("JSON");
        let (same, read) = serde_json::from_str::<Told>(&text)
            .expect("the same")
            .seen();
        assert_eq!(same, key);
        assert_eq!(read.socket, seen.socket);
        assert_eq!(read.process, seen.process);
    }
}
