use std::sync::mpsc::{Receiver, sync_channel};

use super::*;
use crate::audit::{Bytes, Fault, Message, Peer, Reporter, Requests, Transport, Verdict};

fn join() -> (Join, Receiver<Message>) {
    let (sender, receiver) = sync_channel(16);
    (Join::new(Audit::of_queue("node", sender), true), receiver)
}

fn story() -> Connection {
    Connection {
        id: 1,
        reporter: Reporter::Source,
        transport: Transport::Local,
        started: std::time::SystemTime::UNIX_EPOCH,
        duration_ms: 0,
        source: Peer::default(),
        destination: Peer::default(),
        dialled: ([10, 0, 0, 1], 80).into(),
        service: None,
        protocol: None,
        verdict: Verdict::Allow,
        policy: None,
        told: Vec::new(),
        tls: None,
        bytes: Bytes::default(),
        requests: Requests::default(),
        end: "closed".into(),
        fault: Fault::None,
    }
}

fn seen(cookie: u64, sent: u64) -> Seen {
    let socket = Socket {
        cookie,
        sent,
        ..Socket::default()
    };
    Seen {
        socket,
        process: Some(Arc::new(Process {
            pid: cookie as u32,
            ..Process::default()
        })),
    }
}

fn hop(port: u16) -> Key {
    Key::Hop {
        netns: 3,
        source: ([127, 64, 0, 1], port).into(),
    }
}

fn told(from: &Receiver<Message>) -> Option<Box<Connection>> {
    match from.try_recv() {
        Ok(Message::Record(Record::Connection(connection))) => Some(connection),
        Ok(_) => panic!("no connection's record"),
        Err(_nothing) => None,
    }
}

#[test]
fn a_story_and_its_sockets_are_one_record_in_whatever_order() {
    for order in [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ] {
        let (join, records) = join();
        let ends = Ends::default();
        join.expect(&ends, Key::Dialled(5));
        join.expect(&ends, hop(40_000));
        for step in order {
            assert!(told(&records).is_none(), "{order:?}");
            match step {
                0 => join.ended(&ends, story()),
                1 => assert!(join.socket(Key::Dialled(5), || seen(5, 10))),
                _ => assert!(join.socket(hop(40_000), || seen(6, 20))),
            }
        }
        let record = told(&records).expect("whole");
        let socket = |peer: &Peer| peer.socket.clone().map(|s| (s.cookie, s.sent));
        assert_eq!(socket(&record.source), Some((5, 10)), "{order:?}");
        assert_eq!(socket(&record.destination), Some((6, 20)));
        assert_eq!(record.destination.process.as_ref().map(|p| p.pid), Some(6));
        join.sweep(Instant::now() + PATIENCE * 2, false);
        assert!(told(&records).is_none(), "once");
        assert_eq!(join.counts(), (0, 0));
    }
}

#[test]
fn several_last_hops_count_as_one_socket() {
    let (join, records) = join();
    let ends = Ends::default();
    for port in [1, 2] {
        join.expect(&ends, hop(port));
        assert!(join.socket(hop(port), || seen(u64::from(port), 10)));
    }
    join.ended(&ends, story());
    let socket = told(&records).and_then(|r| r.destination.socket);
    assert_eq!(socket.map(|s| (s.cookie, s.sent)), Some((2, 20)));
}

#[test]
fn a_socket_that_never_comes_is_not_waited_for_long_and_not_told_late() {
    let (join, records) = join();
    let ends = Ends::default();
    join.expect(&ends, Key::Dialled(5));
    join.ended(&ends, story());
    let now = Instant::now();
    join.sweep(now, false);
    assert!(told(&records).is_none(), "not yet");
    join.sweep(now + PATIENCE, false);
    let record = told(&records).expect("without its socket");
    assert_eq!(record.source.socket, None);
    assert_eq!(join.counts(), (1, 1));
    // Late: it is the connection's all the same, and not told again.
    assert!(join.socket(Key::Dialled(5), || seen(5, 10)));
    assert!(told(&records).is_none());
    assert_eq!(join.counts(), (1, 0));
    assert!(!join.socket(Key::Dialled(5), || seen(5, 10)), "not known");
}

#[test]
fn keys_of_sockets_that_never_came_are_forgotten() {
    let (join, _records) = join();
    let ends = Ends::default();
    join.expect(&ends, Key::Dialled(5));
    join.ended(&ends, story());
    let now = Instant::now();
    join.sweep(now + PATIENCE, false);
    // The same address, another connection.
    let other = Ends::default();
    join.expect(&ends, hop(7));
    join.expect(&other, hop(7));
    join.sweep(now + PATIENCE + LATE, false);
    assert_eq!(join.counts(), (1, 1));
    assert!(join.socket(hop(7), || seen(1, 1)));
}

#[test]
fn a_dial_that_failed_has_no_socket() {
    let (join, records) = join();
    let ends = Ends::default();
    join.expect(&ends, hop(1));
    join.never_mind(&ends, hop(1));
    join.ended(&ends, story());
    assert!(told(&records).is_some());
    assert_eq!(join.counts(), (0, 0));
}

#[test]
fn without_eyes_nothing_waits() {
    let (join, records) = join();
    let (early, late) = (Ends::default(), Ends::default());
    join.expect(&early, hop(1));
    join.expect(&late, hop(2));
    join.ended(&early, story());
    join.sees_no_more();
    assert!(told(&records).is_some());
    join.ended(&late, story());
    assert!(told(&records).is_some());
}

#[test]
fn all_is_told_at_the_end() {
    let (join, records) = join();
    let ends = Ends::default();
    join.expect(&ends, hop(1));
    join.ended(&ends, story());
    join.sweep(Instant::now(), true);
    assert!(told(&records).is_some());
}
