use std::thread::JoinHandle;

use super::*;
use crate::{
    audit::chain::{Settings, records},
    handover::{Elders, Hello, wire::Door},
    kernel::AgentProcess,
};

const LIMIT: Duration = Duration::from_secs(60);

/// A node whose log changes hands, and the link of an agent that drains.
struct Node {
    dir: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    link: Link,
    tell: Option<mpsc::Sender<Handed>>,
}

/// An agent in charge.
struct Heir {
    door: Door,
    audit: Audit,
    writer: JoinHandle<()>,
}

impl Node {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let own = Own {
            node: "node".into(),
            pin: "/pin".into(),
            shape: String::new(),
            process: AgentProcess { tgid: 1, cgroup: 1 },
        };
        let (tell, handed) = mpsc::channel(64);
        let audit = Audit::off("node");
        let join = Arc::new(Join::new(audit.clone(), true));
        let link = Link::start(dir.path(), own, audit, join, handed).expect("a thread");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build();
        Self {
            dir,
            runtime: runtime.expect("a runtime"),
            link,
            tell: Some(tell),
        }
    }

    fn tell(&self, item: Handed) {
        let tell = self.tell.as_ref().expect("not all is said");
        tell.try_send(item).expect("room");
    }

    fn record(&self, what: &str) {
        self.tell(Handed::Record {
            text: text(what),
            story: false,
        });
    }

    /// All is said; whether it is confirmed.
    fn told(&mut self) -> bool {
        self.tell = None;
        self.runtime.block_on(self.link.told(LIMIT))
    }

    fn settings(&self) -> Settings {
        Settings::new(self.dir.path().join("audit"), self.dir.path())
    }

    fn heir(&self) -> Heir {
        let (audit, writer) = Audit::open("node", self.settings(), 64).expect("a log");
        let door = Door::open(&door(self.dir.path())).expect("a door");
        Heir {
            door,
            audit,
            writer,
        }
    }

    /// What stands in the log.
    fn said(&self) -> Vec<String> {
        let all = records(&self.settings().directory);
        all.into_iter()
            .map(|record| match record["kind"].as_str() {
                Some("gap") => format!("lost {}", record["count"]),
                _ => record["what"].as_str().unwrap_or_default().to_owned(),
            })
            .collect()
    }
}

fn text(what: &str) -> String {
    format!(r#"{{"kind":"test","what":"{what}"}}"#)
}

impl Heir {
    fn meet(&self) -> Arc<Channel> {
        let channel = self.door.next(LIMIT).expect("the elder");
        let hello = channel.receive::<Hello>().expect("a greeting").0;
        assert_eq!(hello.purpose, Purpose::Drain);
        Arc::new(channel)
    }

    fn close(self) {
        self.audit.close(&self.writer, LIMIT);
        assert!(self.writer.is_finished());
    }
}

/// Records of the next message that has any.
fn hear(channel: &Channel) -> Vec<Line> {
    loop {
        let message = channel.receive::<FromElder>().expect("a message").0;
        if !message.records.is_empty() {
            return message.records;
        }
    }
}

/// Serves the elder until all that it has to say is confirmed.
fn served(node: &mut Node, heir: Heir) {
    let channel = heir.meet();
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| {
            let elders = Elders::default();
            serve(&channel, 1, &heir.audit, &elders, || true)
        });
        assert!(node.told());
        channel.hear_no_more();
        let _left = serving.join().expect("served");
    });
    drop(channel);
    heir.close();
}

#[test]
fn what_one_that_died_did_not_take_the_next_one_gets_once() {
    let mut node = Node::new();
    let first = node.heir();
    let channel = first.meet();
    node.record("one");
    assert_eq!(hear(&channel)[0].text, text("one"));
    drop(channel);
    first.close();
    node.record("two");
    let next = node.heir();
    served(&mut node, next);
    assert_eq!(node.said(), ["one", "two"]);
}

#[test]
fn what_one_that_died_has_written_is_not_written_twice() {
    let mut node = Node::new();
    let first = node.heir();
    let channel = first.meet();
    node.record("one");
    for line in hear(&channel) {
        assert!(first.audit.append(line.text, false));
    }
    first.close();
    drop(channel);
    node.record("two");
    let next = node.heir();
    served(&mut node, next);
    assert_eq!(node.said(), ["one", "two"]);
}

#[test]
fn what_one_that_leaves_has_confirmed_is_not_said_again() {
    let mut node = Node::new();
    let first = node.heir();
    let channel = first.meet();
    node.tell(Handed::Lost(3));
    node.record("one");
    node.record("two");
    let mut heard = Vec::new();
    while heard.len() < 2 {
        heard.extend(hear(&channel));
    }
    // The losses, and the first record.
    channel.send(&ToElder::Had(4), &NO_FDS).expect("sent");
    drop(channel);
    first.close();
    let next = node.heir();
    served(&mut node, next);
    assert_eq!(node.said(), ["two"]);
}

/// Its log has ended, and it still has an ear.
#[test]
fn one_that_can_no_longer_write_confirms_nothing() {
    let mut node = Node::new();
    let first = node.heir();
    first.audit.close(&first.writer, LIMIT);
    node.record("one");
    node.tell(Handed::Lost(2));
    let channel = first.meet();
    let elders = Elders::default();
    serve(&channel, 1, &first.audit, &elders, || true).expect("it has left");
    drop(channel);
    first.close();
    let next = node.heir();
    served(&mut node, next);
    assert_eq!(node.said(), ["one", "lost 2"]);
}

#[test]
fn nobody_in_charge_is_an_end() {
    let mut node = Node::new();
    node.record("one");
    assert!(!node.told());
    assert_eq!(node.runtime.block_on(node.link.end()), LinkEnd::Orphaned);
}
