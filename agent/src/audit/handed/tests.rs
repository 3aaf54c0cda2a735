use std::thread::JoinHandle;

use serde_json::Value;

use super::*;
use crate::audit::{
    Record,
    chain::{Settings, records},
};

const LIMIT: Duration = Duration::from_secs(60);
const QUEUE: usize = 64;

struct Node(tempfile::TempDir);

impl Node {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    fn settings(&self) -> Settings {
        Settings::new(self.0.path().join("audit"), self.0.path())
    }

    fn open(&self) -> (Audit, JoinHandle<()>) {
        Audit::open("node", self.settings(), QUEUE).expect("a log")
    }

    /// What stands in the log, but for its own records.
    fn said(&self) -> Vec<String> {
        let said = |record: Value| match record["kind"].as_str() {
            Some("gap") => format!("lost {}", record["count"]),
            _ => record["detail"].as_str().unwrap_or_default().to_owned(),
        };
        let all = records(&self.settings().directory);
        all.into_iter().map(said).collect()
    }
}

fn agent(detail: &str) -> Record {
    Record::Agent {
        event: "test",
        detail: detail.into(),
    }
}

fn line(detail: &str) -> String {
    format!(r#"{{"kind":"agent","detail":"{detail}"}}"#)
}

fn over(audit: &Audit) -> HandedOver {
    let over = audit.hand_over(LIMIT).expect("handed over");
    over.expect("there is a log")
}

fn heard(over: &mut HandedOver) -> String {
    match over.handed.blocking_recv() {
        Some(Handed::Record { text, .. }) => text,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_comes_after_the_log_is_handed_over_goes_to_the_other_agent() {
    let node = Node::new();
    let (audit, writer) = node.open();
    audit.record(agent("before"));
    let mut handed = over(&audit);
    // Another agent's from here on.
    let (next, next_writer) = node.open();
    audit.record(agent("after"));
    assert!(audit.append(line("an elder's"), false));
    assert!(heard(&mut handed).contains("after"));
    assert_eq!(heard(&mut handed), line("an elder's"));
    assert_eq!(audit.counts_since(), (0, 2));
    audit.close(&writer, LIMIT);
    next.close(&next_writer, LIMIT);
    assert_eq!(node.said(), ["before"]);
}

#[test]
fn a_log_that_is_taken_back_has_all_that_was_said_meanwhile_once() {
    let node = Node::new();
    let (audit, writer) = node.open();
    audit.record(agent("before"));
    let handed = over(&audit);
    audit.record(agent("own"));
    assert!(audit.append(line("an elder's"), false));
    audit.take_back(handed, LIMIT).expect("taken back");
    assert!(audit.append(line("and later"), false));
    audit.close(&writer, LIMIT);
    assert_eq!(node.said(), ["before", "own", "an elder's", "and later"]);
}

/// As the one that was to take over holds it until the kernel has ended the last of it.
#[test]
fn a_log_is_taken_back_when_its_lock_is_let_go() {
    let node = Node::new();
    let (audit, writer) = node.open();
    let handed = over(&audit);
    let directory = node.settings().directory;
    let lock = std::fs::File::open(directory.join("lock")).expect("the log's lock");
    lock.lock().expect("nobody has it");
    audit.record(agent("meanwhile"));
    std::thread::scope(|scope| {
        let taking = scope.spawn(|| audit.take_back(handed, LIMIT));
        std::thread::sleep(std::time::Duration::from_millis(50));
        drop(lock);
        taking.join().expect("no panic").expect("taken back");
    });
    audit.close(&writer, LIMIT);
    assert_eq!(node.said(), ["meanwhile"]);
}

/// Whoever says that it was taken is held to it, however the end comes between.
#[test]
fn what_is_taken_stands_in_the_log_and_what_is_not_is_refused() {
    for over_first in [false, true] {
        let node = Node::new();
        let (audit, writer) = node.open();
        let mut handed = over_first.then(|| over(&audit));
        let taken = std::thread::scope(|scope| {
            let elders: Vec<_> = (0..4)
                .map(|elder| {
                    let audit = &audit;
                    scope.spawn(move || {
                        let say = |n: &u32| audit.append(line(&format!("{elder} {n}")), false);
                        (0..).take_while(say).count()
                    })
                })
                .collect();
            std::thread::sleep(Duration::from_millis(20));
            let mut got = 0;
            let closing = scope.spawn(|| audit.close(&writer, LIMIT));
            while let Some(over) = &mut handed
                && !(closing.is_finished() && over.handed.is_empty())
            {
                got += usize::from(over.handed.try_recv().is_ok());
            }
            closing.join().expect("closed");
            let taken = elders
                .into_iter()
                .map(|elder| elder.join().expect("refused"));
            (taken.sum::<usize>(), got)
        });
        assert!(writer.is_finished());
        assert!(!audit.append(line("too late"), false));
        assert!(!audit.lost_before(1));
        let stands = if over_first {
            taken.1
        } else {
            node.said().len()
        };
        assert_eq!(stands, taken.0);
        // And the ledger agrees: the next start misses nothing.
        drop(audit);
        let (next, writer) = node.open();
        next.close(&writer, LIMIT);
        assert!(!node.said().iter().any(|said| said.starts_with("lost")));
    }
}

#[test]
fn a_queue_that_is_full_is_waited_for() {
    let (queue, from) = sync_channel(1);
    let audit = Audit::of_queue("node", queue);
    assert!(audit.append(line("one"), false));
    std::thread::scope(|scope| {
        let second = scope.spawn(|| audit.append(line("two"), false));
        std::thread::sleep(Duration::from_millis(20));
        for _ in 0..2 {
            assert!(matches!(from.recv(), Ok(Message::Line(_))));
        }
        assert!(second.join().expect("taken"));
    });
    assert_eq!((audit.counts_since(), audit.lost()), ((0, 2), 0));
}

#[test]
fn records_are_found_again_in_the_log() {
    let node = Node::new();
    let (audit, writer) = node.open();
    let (there, absent) = (line("there"), line("not there"));
    assert!(audit.append(there.clone(), false));
    audit.close(&writer, LIMIT);
    let found = audit.stand(&[&there, &absent]).expect("read");
    assert_eq!(found, HashSet::from([there]));
}
