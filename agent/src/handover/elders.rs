//! Agents that have handed over to this one and still carry connections. The kernel's
//! events come to the agent in charge alone: what it sees of a socket that is of an older
//! agent's connection, it passes on.

use std::{
    collections::{HashMap, VecDeque},
    os::fd::BorrowedFd,
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
};

use super::{Told, link::ToElder, wire::Channel};
use crate::audit::{Key, Seen};

/// What waits for an elder that has not come yet; one more is dropped, and its connection
/// is told without it.
const MOST: usize = 16_384;
/// Sockets of one message.
const AT_ONCE: usize = 64;

#[derive(Default)]
pub struct Elders(Mutex<State>);

#[derive(Default)]
struct State {
    /// Whose connection a socket is of, by the elder's process.
    keys: HashMap<Key, i32>,
    all: HashMap<i32, Elder>,
}

#[derive(Default)]
struct Elder {
    waiting: VecDeque<Told>,
    channel: Option<Arc<Channel>>,
}

impl Elders {
    /// A socket by this key is one of that agent's.
    pub fn expect(&self, pid: i32, keys: impl IntoIterator<Item = Key>) {
        let mut state = self.lock();
        state.all.entry(pid).or_default();
        state.keys.extend(keys.into_iter().map(|key| (key, pid)));
    }

    /// The kernel has seen a socket end. `false`: it is no elder's.
    pub fn socket(&self, key: Key, seen: impl FnOnce() -> Seen) -> bool {
        let Some(pid) = self.lock().keys.remove(&key) else {
            return false;
        };
        // Not while anything is locked: it may have to look into `/proc`.
        let told = Told::of(key, seen());
        let channel = {
            let mut state = self.lock();
            let elder = state.all.entry(pid).or_default();
            if elder.waiting.len() < MOST {
                elder.waiting.push_back(told);
            }
            elder.channel.clone()
        };
        if let Some(channel) = channel {
            self.pass_on(pid, &channel);
        }
        true
    }

    /// Whether there are any: then a socket may be one's that has not said so yet.
    pub fn any(&self) -> bool {
        !self.lock().all.is_empty()
    }

    pub(super) fn came(&self, pid: i32, channel: &Arc<Channel>) {
        let mut state = self.lock();
        state.all.entry(pid).or_default().channel = Some(channel.clone());
        drop(state);
        self.pass_on(pid, channel);
    }

    pub(super) fn left(&self, pid: i32) {
        let mut state = self.lock();
        state.all.remove(&pid);
        state.keys.retain(|_, of| *of != pid);
    }

    /// Forgets those that were killed before they came.
    pub fn forget_dead(&self) {
        let mut state = self.lock();
        let dead = |pid: &i32| !Path::new(&format!("/proc/{pid}")).exists();
        let gone: Vec<i32> = state.all.keys().copied().filter(dead).collect();
        state.all.retain(|pid, _| !gone.contains(pid));
        state.keys.retain(|_, of| !gone.contains(of));
    }

    /// A full socket is waited for a moment: an elder reads all the time.
    fn pass_on(&self, pid: i32, channel: &Channel) {
        loop {
            let some: Vec<Told> = {
                let mut state = self.lock();
                let Some(elder) = state.all.get_mut(&pid) else {
                    return;
                };
                let count = elder.waiting.len().min(AT_ONCE);
                elder.waiting.drain(..count).collect()
            };
            if some.is_empty() {
                return;
            }
            let none: [BorrowedFd<'_>; 0] = [];
            if channel.send(&ToElder::Sockets(some), &none).is_err() {
                // It is gone, and will tell its connections without, or come again.
                return;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no panic while it is held")
    }
}
