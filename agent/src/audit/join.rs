//! One record of what the agent decided and of what the kernel saw: a connection's
//! story and its applications' sockets meet here. A dialled socket is known by its
//! cookie, an accepted one by the last hop that it answers.
//!
//! A story waits a moment for its sockets, then it is told without: the kernel may
//! have had no room for an event. A socket that comes later than that is dropped, so
//! that nothing is told twice.

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::{
    Audit, Connection, Handed, Record,
    seen::{Process, Socket},
};

/// How long a story that has ended waits for its sockets.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a key is remembered after its story was told without its socket.
const LATE: Duration = Duration::from_secs(60);
/// Stories that wait at once; one more is told at once, without its sockets.
const MOST: usize = 65_536;

/// By what a socket and a connection know each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Key {
    /// The socket that dialled, by its cookie.
    Dialled(u64),
    /// The socket that accepted, by the agent's end of the last hop.
    Hop { netns: u64, source: SocketAddr },
}

/// What the kernel saw of one socket.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub socket: Socket,
    pub process: Option<Arc<Process>>,
}

/// The sockets of one connection.
#[derive(Clone, Default)]
pub struct Ends(Arc<Mutex<Found>>);

#[derive(Default)]
struct Found {
    /// Sockets that are still to be seen.
    expected: Vec<Key>,
    source: Option<Box<Seen>>,
    destination: Option<Box<Seen>>,
    /// The story, once it has ended.
    record: Option<Box<Connection>>,
    /// It stands in the log.
    told: bool,
}

/// Where stories and sockets meet.
pub struct Join {
    audit: Audit,
    /// Whether the kernel tells of sockets at all.
    sees: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    keys: HashMap<Key, Ends>,
    waiting: VecDeque<(Instant, Ends)>,
    late: VecDeque<(Instant, Key)>,
    /// Stories that were told without a socket that they should have.
    incomplete: u64,
    /// Who sees sockets now, if it is another agent.
    other: Option<mpsc::Sender<Handed>>,
}

impl Join {
    pub fn new(audit: Audit, sees: bool) -> Self {
        Self {
            audit,
            sees: sees.into(),
            state: Mutex::default(),
        }
    }

    /// A connection has a socket by this key. To be called before the socket can end.
    pub fn expect(&self, ends: &Ends, key: Key) {
        if !self.sees.load(Ordering::Relaxed) {
            return;
        }
        let mut state = self.lock();
        if let Some(other) = &state.other {
            // Without room for it, the story is told without its socket.
            let _full = other.try_send(Handed::Socket(key));
        }
        // The last hop's address may have been an earlier connection's.
        if let Some(before) = state.keys.insert(key, ends.clone()) {
            before.lock().expected.retain(|other| *other != key);
        }
        let expected = &mut ends.lock().expected;
        // Most have one, or two.
        expected.reserve_exact(1);
        expected.push(key);
    }

    /// The socket did not come about.
    pub fn never_mind(&self, ends: &Ends, key: Key) {
        let mut state = self.lock();
        ends.lock().expected.retain(|other| *other != key);
        state.keys.remove(&key);
    }

    /// The kernel has seen a socket end. `false`: it is of no connection that is known.
    pub fn socket(&self, key: Key, seen: impl FnOnce() -> Seen) -> bool {
        let Some(ends) = self.lock().keys.remove(&key) else {
            return false;
        };
        // Not while anything is locked: it may have to look into `/proc`.
        let seen = seen();
        let done = {
            let mut found = ends.lock();
            found.expected.retain(|other| *other != key);
            found.add(key, seen);
            found.whole()
        };
        self.tell(done);
        true
    }

    /// A connection has ended.
    pub fn ended(&self, ends: &Ends, record: Connection) {
        let now = Instant::now();
        let done = {
            let mut state = self.lock();
            ends.lock().record = Some(Box::new(record));
            let mut whole = ends.lock().whole();
            if whole.is_none() && !self.sees.load(Ordering::Relaxed) {
                let mut found = ends.lock();
                whole = found.record.take().map(|record| found.complete(record));
            }
            if whole.is_none() {
                state.waiting.push_back((now + PATIENCE, ends.clone()));
            }
            // The oldest goes without, rather than that memory has no end.
            match state.waiting.len() > MOST {
                true => state.give_up(now),
                false => whole,
            }
        };
        self.tell(done);
    }

    /// Tells what has waited long enough; with `all`, whatever waits.
    pub fn sweep(&self, now: Instant, all: bool) {
        let mut due = Vec::new();
        {
            let mut state = self.lock();
            while state.is_due(now, all) {
                due.extend(state.give_up(now));
            }
            state.forget(now);
        }
        for record in due {
            self.tell(Some(record));
        }
    }

    /// Another agent sees sockets from now on: it is told of those that are expected. `None`:
    /// this one does again, or nobody is to be told any more.
    pub fn set_other(&self, other: Option<mpsc::Sender<Handed>>) -> Vec<Key> {
        let mut state = self.lock();
        state.other = other;
        state.keys.keys().copied().collect()
    }

    /// Sockets that are expected.
    pub fn keys(&self) -> Vec<Key> {
        self.lock().keys.keys().copied().collect()
    }

    /// Stories that have ended and wait for their sockets.
    pub fn waits(&self) -> usize {
        self.lock().waiting.len()
    }

    /// Nobody tells of sockets any more: stories that wait are told without, and no other
    /// waits.
    pub fn sees_no_more(&self) {
        self.sees.store(false, Ordering::Relaxed);
        self.sweep(Instant::now(), true);
    }

    /// Stories that were told without a socket of theirs, and keys that are held.
    pub fn counts(&self) -> (u64, usize) {
        let state = self.lock();
        (state.incomplete, state.keys.len())
    }

    fn tell(&self, record: Option<Box<Connection>>) {
        if let Some(record) = record {
            self.audit.ended(Record::Connection(record));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while it is held")
    }
}

impl State {
    /// Takes the story that has waited longest; `None` where it was told meanwhile.
    fn give_up(&mut self, now: Instant) -> Option<Box<Connection>> {
        let (_, ends) = self.waiting.pop_front()?;
        let mut found = ends.lock();
        let record = found.record.take()?;
        self.incomplete += 1;
        let late = found.expected.iter().map(|key| (now + LATE, *key));
        self.late.extend(late);
        Some(found.complete(record))
    }

    fn is_due(&self, now: Instant, all: bool) -> bool {
        self.waiting
            .front()
            .is_some_and(|(at, _)| all || *at <= now)
    }

    /// Keys whose sockets never came.
    fn forget(&mut self, now: Instant) {
        while let Some((_, key)) = self.late.pop_front_if(|(at, _)| *at <= now) {
            // The same address may be another connection's by now.
            let told = |ends: &Ends| ends.lock().told;
            if self.keys.get(&key).is_some_and(told) {
                self.keys.remove(&key);
            }
        }
    }
}

impl Ends {
    fn lock(&self) -> MutexGuard<'_, Found> {
        self.0.lock().expect("no panic while it is held")
    }
}

impl Found {
    /// A story's requests may have gone over several last hops: their sockets count as
    /// one, the process is that of the last.
    fn add(&mut self, key: Key, seen: Seen) {
        let side = match key {
            Key::Dialled(_) => &mut self.source,
            Key::Hop { .. } => &mut self.destination,
        };
        let before = side.take().map(|seen| seen.socket).unwrap_or_default();
        let socket = Socket {
            sent: before.sent + seen.socket.sent,
            received: before.received + seen.socket.received,
            retransmits: before.retransmits + seen.socket.retransmits,
            ..seen.socket
        };
        *side = Some(Box::new(Seen { socket, ..seen }));
    }

    /// The story, if it has ended and all its sockets were seen.
    fn whole(&mut self) -> Option<Box<Connection>> {
        if !self.expected.is_empty() {
            return None;
        }
        self.record.take().map(|record| self.complete(record))
    }

    fn complete(&mut self, mut record: Box<Connection>) -> Box<Connection> {
        self.told = true;
        let sides = [
            (&mut record.source, self.source.take()),
            (&mut record.destination, self.destination.take()),
        ];
        for (peer, seen) in sides {
            let Some(seen) = seen else { continue };
            peer.socket = Some(seen.socket);
            // The story's own is from when it began.
            peer.process = peer.process.take().or(seen.process);
        }
        record
    }
}

#[cfg(test)]
mod tests;
