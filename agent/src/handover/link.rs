//! Between an agent that has handed over and the one in charge: records go to the one that
//! has the log, and what the kernel sees of sockets comes back. An agent in charge that
//! dies, or hands over itself, is looked for again.

use std::{
    collections::VecDeque,
    io,
    os::fd::BorrowedFd,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use super::{
    Elders, Own, PATIENCE, Purpose, Told, door,
    wire::{Channel, LARGEST},
};
use crate::audit::{Audit, Handed, Join, Key, Record};

const NO_FDS: [BorrowedFd<'static>; 0] = [];

/// How often the agent in charge is told how much is left, and looked for when it is gone.
const BEAT: Duration = Duration::from_millis(100);
/// How long nobody may be in charge before an agent that has no connection left ends: who
/// starts it again gets one that is.
const ORPHANED: Duration = Duration::from_secs(3);
/// How long an agent that leaves may take to confirm what it had.
const CONFIRM: Duration = Duration::from_secs(2);
/// Text of one message, as JSON may write it.
const ROOM: usize = LARGEST / 4;

#[derive(Debug, Default, Serialize, Deserialize)]
struct FromElder {
    records: Vec<Line>,
    keys: Vec<Key>,
    /// Records that were lost.
    lost: u64,
    /// Connections, and records on their way, that are still to come.
    left: u64,
    /// All is said.
    bye: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Line {
    text: String,
    /// Of a connection that was counted in `left`.
    story: bool,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum ToElder {
    /// So many records of this conversation stand in the log, or are counted as lost.
    Had(u64),
    Sockets(Vec<Told>),
}

/// The elder's end.
pub struct Link {
    end: Option<oneshot::Receiver<LinkEnd>>,
    drained: Arc<AtomicBool>,
    told: Option<oneshot::Receiver<()>>,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkEnd {
    /// Nobody is in charge any more, and this agent has nothing left to do.
    Orphaned,
}

impl Link {
    /// Begins to hand on what comes, until all senders are dropped; then it stays, to see
    /// whether somebody is in charge.
    pub fn start(
        state: &std::path::Path,
        own: Own,
        audit: Audit,
        join: Arc<Join>,
        handed: mpsc::Receiver<Handed>,
    ) -> io::Result<Self> {
        let (ended, end) = oneshot::channel();
        let (is_told, told) = oneshot::channel();
        let drained = Arc::new(AtomicBool::new(false));
        let mut sender = Sender {
            path: door(state),
            own,
            audit,
            handed,
            join,
            unsent: VecDeque::new(),
            lost: 0,
            passed: 0,
            drained: drained.clone(),
            told: Some(is_told),
        };
        std::thread::Builder::new()
            .name("handover-link".into())
            .spawn(move || {
                let how = sender.run();
                let _nobody_waits = ended.send(how);
            })?;
        Ok(Self {
            end: Some(end),
            drained,
            told: Some(told),
        })
    }

    /// All that was handed in was said to the agent in charge, or could not be within the
    /// limit. To be called when nothing more is handed in.
    pub async fn told(&mut self, limit: Duration) -> bool {
        self.drained.store(true, Ordering::SeqCst);
        match self.told.take() {
            Some(told) => matches!(tokio::time::timeout(limit, told).await, Ok(Ok(()))),
            None => true,
        }
    }

    /// Returns when nobody is in charge.
    pub async fn end(&mut self) -> LinkEnd {
        match self.end.take() {
            Some(end) => end.await.unwrap_or(LinkEnd::Orphaned),
            None => LinkEnd::Orphaned,
        }
    }
}

struct Sender {
    path: PathBuf,
    own: Own,
    audit: Audit,
    handed: mpsc::Receiver<Handed>,
    join: Arc<Join>,
    /// Taken from the queue, and in no message yet.
    unsent: VecDeque<Handed>,
    /// To be told as lost.
    lost: u64,
    /// Records that were passed on, or are counted in `lost`.
    passed: u64,
    drained: Arc<AtomicBool>,
    told: Option<oneshot::Sender<()>>,
}

impl Sender {
    fn run(&mut self) -> LinkEnd {
        let mut alone = Instant::now();
        loop {
            if let Ok(Some(channel)) = Channel::connect(&self.path, PATIENCE) {
                if let Err(error) = self.talk(&Arc::new(channel)) {
                    tracing::debug!(%error, "the agent in charge left");
                }
                alone = Instant::now();
            }
            let orphaned = alone.elapsed() > ORPHANED;
            if orphaned && self.drained.load(Ordering::SeqCst) {
                return LinkEnd::Orphaned;
            }
            std::thread::sleep(BEAT);
        }
    }

    /// Speaks with one agent in charge until it leaves.
    fn talk(&mut self, channel: &Arc<Channel>) -> io::Result<()> {
        channel.peer()?;
        channel.send(&self.own.hello(Purpose::Drain), &NO_FDS)?;
        let had = Arc::new(AtomicU64::new(0));
        let gone = Arc::new(AtomicBool::new(false));
        let listener = {
            let (channel, had, gone) = (channel.clone(), had.clone(), gone.clone());
            let join = self.join.clone();
            channel.set_patience(None)?;
            std::thread::Builder::new()
                .name("handover-ear".into())
                .spawn(move || {
                    loop {
                        let message = match channel.receive::<ToElder>() {
                            Ok((message, _)) => message,
                            // It left with something unread; what it said before is here.
                            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => continue,
                            Err(_ended) => break,
                        };
                        match message {
                            ToElder::Had(count) => had.store(count, Ordering::SeqCst),
                            ToElder::Sockets(told) => {
                                for told in told {
                                    let (key, seen) = told.seen();
                                    join.socket(key, || seen);
                                }
                            }
                        }
                    }
                    gone.store(true, Ordering::SeqCst);
                })?
        };
        let mut sent = 0;
        // One that came to be in charge meanwhile knows none of them.
        let known = self.join.keys();
        self.unsent.extend(known.into_iter().map(Handed::Socket));
        let result = self.speak(channel, &had, &gone, &mut sent);
        // One that hands over itself confirms what it had until then.
        let until = Instant::now() + CONFIRM;
        while !gone.load(Ordering::SeqCst) && Instant::now() < until {
            std::thread::sleep(BEAT / 20);
        }
        channel.end();
        let _ended = listener.join();
        // What it did not confirm may be in its log, or not: it is told as lost.
        self.lost += sent - had.load(Ordering::SeqCst).min(sent);
        result
    }

    fn speak(
        &mut self,
        channel: &Channel,
        had: &AtomicU64,
        gone: &AtomicBool,
        sent: &mut u64,
    ) -> io::Result<()> {
        let mut beat = None::<Instant>;
        let mut bye = false;
        while !gone.load(Ordering::SeqCst) {
            let closed = self.wait();
            if self.unsent.is_empty() && self.lost == 0 {
                if bye {
                    if had.load(Ordering::SeqCst) == *sent
                        && let Some(told) = self.told.take()
                    {
                        let _nobody_waits = told.send(());
                    }
                    std::thread::sleep(BEAT / 10);
                    continue;
                }
                if !closed && beat.is_some_and(|beat| beat.elapsed() < BEAT) {
                    continue;
                }
            }
            beat = Some(Instant::now());
            bye = closed && self.unsent.is_empty();
            let message = self.message(bye);
            if let Err(error) = channel.send(&message, &NO_FDS) {
                self.take_back(message);
                return Err(error);
            }
            *sent += message.records.len() as u64;
            self.lost -= message.lost;
        }
        Ok(())
    }

    /// What was not sent is said to the next one.
    fn take_back(&mut self, message: FromElder) {
        self.passed -= message.records.len() as u64;
        for Line { text, story } in message.records.into_iter().rev() {
            self.unsent.push_front(Handed::Record { text, story });
        }
        let keys = message.keys.into_iter().map(Handed::Socket);
        self.unsent.extend(keys);
    }

    /// Waits a moment for something to say; whether nothing will come any more.
    fn wait(&mut self) -> bool {
        if !self.unsent.is_empty() {
            return false;
        }
        let until = Instant::now() + BEAT / 4;
        loop {
            match self.handed.try_recv() {
                Ok(item) => {
                    self.unsent.push_back(item);
                    return false;
                }
                Err(mpsc::error::TryRecvError::Disconnected) => return true,
                Err(mpsc::error::TryRecvError::Empty) if Instant::now() > until => return false,
                Err(mpsc::error::TryRecvError::Empty) => {
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        }
    }

    /// The next message, of what is there.
    fn message(&mut self, bye: bool) -> FromElder {
        let mut message = FromElder {
            lost: self.lost,
            bye,
            ..FromElder::default()
        };
        let mut room = ROOM;
        while let Some(item) = (self.unsent.pop_front()).or_else(|| self.handed.try_recv().ok()) {
            let size = match &item {
                Handed::Record { text, .. } => text.len() + 64,
                Handed::Lost(_) => 16,
                Handed::Socket(_) => 96,
            };
            if size > room && room < ROOM {
                self.unsent.push_front(item);
                break;
            }
            room = room.saturating_sub(size);
            match item {
                Handed::Record { text, .. } if text.len() > LARGEST / 2 => {
                    self.passed += 1;
                    self.lost += 1;
                    message.lost += 1;
                }
                Handed::Record { text, story } => {
                    self.passed += 1;
                    message.records.push(Line { text, story });
                }
                Handed::Lost(count) => {
                    self.passed += count;
                    self.lost += count;
                    message.lost += count;
                }
                Handed::Socket(key) => message.keys.push(key),
            }
        }
        let (open, accepted) = self.audit.counts_since();
        message.left = open + accepted.saturating_sub(self.passed);
        message
    }
}

/// The end of the agent in charge: takes what an elder says until it leaves. `handing_over`:
/// whether this agent is no longer in charge.
pub(super) fn serve(
    channel: &Arc<Channel>,
    pid: i32,
    audit: &Audit,
    elders: &Elders,
    handing_over: impl Fn() -> bool,
) -> io::Result<()> {
    channel.set_patience(None)?;
    elders.came(pid, channel);
    let (mut left, mut had, mut bye) = (0, 0, false);
    let result = loop {
        let message = match channel.receive::<FromElder>() {
            Ok((message, _)) => message,
            Err(error) => break Err(error),
        };
        elders.expect(pid, message.keys);
        audit.lost_before(message.lost);
        for Line { text, story } in message.records {
            had += 1;
            if story {
                if left == 0 {
                    audit.adopted(0, 1);
                } else {
                    left -= 1;
                }
            }
            audit.append(text, story);
        }
        audit.adopted(left, message.left);
        (left, bye) = (message.left, message.bye);
        if channel.send(&ToElder::Had(had), &NO_FDS).is_err() {
            break Ok(());
        }
    };
    // One that goes on, goes on with the next agent.
    audit.adopted(left, 0);
    elders.left(pid);
    if left > 0 && !bye && !handing_over() {
        tracing::error!(left, "an agent that had handed over died while it drained");
        let lost = crate::audit::Lost::Connections;
        audit.record(Record::gap(lost, left, "handover"));
    }
    result
}
