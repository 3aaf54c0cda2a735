//! Between an agent that has handed over and the one in charge: records go to the one that
//! has the log, and what the kernel sees of sockets comes back. An agent in charge that
//! dies, or hands over itself, is looked for again.

mod heir;

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
    Own, PATIENCE, Purpose, Told, door,
    wire::{Channel, LARGEST},
};
use crate::audit::{Audit, Handed, Join, Key};

pub(super) use heir::serve;

const NO_FDS: [BorrowedFd<'static>; 0] = [];

/// How often the agent in charge is told how much is left, and looked for when it is gone.
const BEAT: Duration = Duration::from_millis(100);
/// How long nobody may be in charge before an agent that has no connection left ends: who
/// starts it again gets one that is.
const ORPHANED: Duration = Duration::from_secs(3);
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
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Line {
    text: String,
    /// Of a connection that was counted in `left`.
    story: bool,
    /// It was said to an agent that left without confirming it: it may stand in the log.
    #[serde(default)]
    again: bool,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum ToElder {
    /// So many records of this conversation are in good hands: they will stand in the log, or
    /// be counted as lost. Those that were said to be lost count, too.
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
            keys: Vec::new(),
            unconfirmed: VecDeque::new(),
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
    unsent: VecDeque<Item>,
    keys: Vec<Key>,
    /// Said to the agent in charge, the oldest first: what it does not confirm, the next
    /// one gets.
    unconfirmed: VecDeque<Item>,
    /// Records that were passed on, or told as lost.
    passed: u64,
    drained: Arc<AtomicBool>,
    told: Option<oneshot::Sender<()>>,
}

/// What is said once, and confirmed.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Item {
    /// So many records were lost.
    Lost(u64),
    Line(Line),
}

impl Item {
    /// Records that it is.
    fn count(&self) -> u64 {
        match self {
            Self::Lost(count) => *count,
            Self::Line(_) => 1,
        }
    }

    fn size(&self) -> usize {
        match self {
            Self::Lost(_) => 16,
            Self::Line(line) => line.text.len() + 64,
        }
    }
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
                    listen(&channel, &had, &join);
                    gone.store(true, Ordering::SeqCst);
                })?
        };
        // One that came to be in charge meanwhile knows none of them.
        self.keys = self.join.keys();
        let mut confirmed = 0;
        let result = self.speak(channel, &had, &gone, &mut confirmed);
        // One that hands over itself confirms what it takes until it has gone: before that
        // nobody can know what the next one is to be told.
        let _ended = listener.join();
        self.settle(&mut confirmed, &had);
        self.say_again();
        result
    }

    /// Returns when the other one takes nothing more.
    fn speak(
        &mut self,
        channel: &Channel,
        had: &AtomicU64,
        gone: &AtomicBool,
        confirmed: &mut u64,
    ) -> io::Result<()> {
        let mut beat = None::<Instant>;
        // All is said, but that so much is left of which there is nothing to say.
        let mut last = None;
        while !gone.load(Ordering::SeqCst) {
            let closed = self.wait();
            self.settle(confirmed, had);
            let nothing = self.unsent.is_empty() && self.keys.is_empty();
            if nothing && closed && last == Some(self.left(closed)) {
                if self.unconfirmed.is_empty()
                    && let Some(told) = self.told.take()
                {
                    let _nobody_waits = told.send(());
                }
                std::thread::sleep(BEAT / 10);
                continue;
            }
            if nothing && !closed && beat.is_some_and(|beat| beat.elapsed() < BEAT) {
                continue;
            }
            beat = Some(Instant::now());
            let (message, items) = self.message(closed);
            match channel.send(&message, &NO_FDS) {
                Ok(()) => {
                    let all = closed && self.unsent.is_empty() && self.keys.is_empty();
                    last = all.then_some(message.left);
                    self.unconfirmed.extend(items);
                }
                Err(error) => {
                    self.take_back(message, items);
                    // It is slow, and not gone.
                    if error.kind() != io::ErrorKind::WouldBlock {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }

    /// What is confirmed is another agent's.
    fn settle(&mut self, confirmed: &mut u64, had: &AtomicU64) {
        let had = had.load(Ordering::SeqCst);
        let mut taken = had.saturating_sub(*confirmed);
        while let Some(item) = self.unconfirmed.pop_front_if(|item| item.count() <= taken) {
            taken -= item.count();
            *confirmed += item.count();
        }
    }

    /// What one that has gone did not confirm is said to the next.
    fn say_again(&mut self) {
        while let Some(mut item) = self.unconfirmed.pop_back() {
            self.passed -= item.count();
            if let Item::Line(line) = &mut item {
                line.again = true;
            }
            self.unsent.push_front(item);
        }
    }

    /// What was not sent is said later.
    fn take_back(&mut self, message: FromElder, items: Vec<Item>) {
        for item in items.into_iter().rev() {
            self.passed -= item.count();
            self.unsent.push_front(item);
        }
        self.keys.extend(message.keys);
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
                    self.sort(item);
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

    fn sort(&mut self, handed: Handed) {
        let item = match handed {
            Handed::Socket(key) => return self.keys.push(key),
            Handed::Lost(count) => Item::Lost(count),
            Handed::Record { text, .. } if text.len() > LARGEST / 2 => Item::Lost(1),
            Handed::Record { text, story } => Item::Line(Line {
                text,
                story,
                again: false,
            }),
        };
        self.unsent.push_back(item);
    }

    /// The next thing to say.
    fn next(&mut self) -> Option<Item> {
        while self.unsent.is_empty() {
            let handed = self.handed.try_recv().ok()?;
            self.sort(handed);
        }
        self.unsent.pop_front()
    }

    /// The next message, of what is there, and what of it is to be confirmed. `closed`:
    /// nothing more will come.
    fn message(&mut self, closed: bool) -> (FromElder, Vec<Item>) {
        const KEY: usize = 96;
        let mut message = FromElder::default();
        let keys = self.keys.len().min(ROOM / KEY);
        message.keys.extend(self.keys.drain(..keys));
        let mut room = ROOM - keys * KEY;
        let mut items = Vec::new();
        while let Some(item) = self.next() {
            // They are confirmed in order: losses first.
            let late = matches!(item, Item::Lost(_)) && !message.records.is_empty();
            if late || item.size() > room && room < ROOM {
                self.unsent.push_front(item);
                break;
            }
            room = room.saturating_sub(item.size());
            self.passed += item.count();
            match &item {
                Item::Lost(count) => message.lost += count,
                Item::Line(line) => message.records.push(line.clone()),
            }
            items.push(item);
        }
        message.left = self.left(closed);
        (message, items)
    }

    /// What is still to come after all that was taken for messages.
    fn left(&self, closed: bool) -> u64 {
        let (open, accepted) = self.audit.counts_since();
        let coming = match closed {
            true => self.unsent.iter().map(Item::count).sum(),
            false => accepted.saturating_sub(self.passed),
        };
        open + coming
    }
}

/// Hears the agent in charge until it leaves.
fn listen(channel: &Channel, had: &AtomicU64, join: &Join) {
    loop {
        let message = match channel.receive::<ToElder>() {
            Ok((message, _)) => message,
            // It left with something unread; what it said before is here.
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => continue,
            Err(_ended) => return,
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
}

#[cfg(test)]
mod tests;
