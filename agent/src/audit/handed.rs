//! The log changes hands: at an upgrade the agent that takes over opens it, and what the
//! one before still has to say comes to it over a socket. At no time has it two writers.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{RecvTimeoutError, SyncSender, TrySendError, sync_channel},
    },
    time::{Duration, Instant},
};

use tokio::sync::mpsc;

use super::{
    Audit, Key, Message,
    chain::{Ledger, ReadError, Reader, last_seq},
};

/// What waits at most for the agent that writes the log now; what finds no room waits in
/// the queue, and is counted where that has none.
const MOST: usize = 8_192;
/// How far back a record is looked for that an agent had when it was killed.
const RECENT: u64 = 100_000;

/// Said to the agent whose log it is now.
#[derive(Debug)]
pub enum Handed {
    /// One JSON object. `story`: of a connection that was counted as open.
    Record { text: String, story: bool },
    /// So many records found no room.
    Lost(u64),
    /// A socket by this key is of a connection that is still to be told.
    Socket(Key),
}

/// The log is handed over: what there is to say from now on.
pub struct HandedOver {
    pub handed: mpsc::Receiver<Handed>,
    /// Where sockets that are expected are told.
    pub tell: mpsc::Sender<Handed>,
}

#[derive(Debug, thiserror::Error)]
pub enum NotHandedOver {
    #[error("the audit log could not be ended in order within {0:?}")]
    Late(Duration),
    #[error("the audit log has ended")]
    Ended,
}

pub(super) struct Order {
    pub to: mpsc::Sender<Handed>,
    /// Records that the queue has lost so far.
    pub lost: u64,
    pub done: SyncSender<()>,
}

pub(super) struct Return {
    pub handed: mpsc::Receiver<Handed>,
    pub done: SyncSender<()>,
}

impl Audit {
    /// Ends the log in order, with all that was handed in so far, and lets go of it.
    /// `None`: there is no log. Waits for a disk so long at most; not for the runtime's
    /// threads.
    pub fn hand_over(&self, limit: Duration) -> Result<Option<HandedOver>, NotHandedOver> {
        let Some(open) = &self.open else {
            return Ok(None);
        };
        let until = Instant::now() + limit;
        let (to, handed) = mpsc::channel(MOST);
        let (done, is_done) = sync_channel(1);
        let over = HandedOver {
            handed,
            tell: to.clone(),
        };
        loop {
            // What was counted by the log's ledger is in front of this in the queue, and
            // nothing else is.
            let mut ledger = open.ledger.write().expect("no panic while it is held");
            let order = Order {
                to: to.clone(),
                lost: open.counts.queue.load(Ordering::Relaxed),
                done: done.clone(),
            };
            match open.queue.try_send(Message::HandOver(order)) {
                Ok(()) => {
                    let own = Arc::new(Ledger::detached());
                    ledger.move_open(&own);
                    *ledger = own;
                    break;
                }
                Err(TrySendError::Disconnected(_)) => return Err(NotHandedOver::Ended),
                Err(TrySendError::Full(_)) => {}
            }
            drop(ledger);
            if Instant::now() > until {
                return Err(NotHandedOver::Late(limit));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        match is_done.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(()) => Ok(Some(over)),
            Err(RecvTimeoutError::Disconnected) => Err(NotHandedOver::Ended),
            Err(RecvTimeoutError::Timeout) => {
                // As soon as the disk answers, the log is this agent's again.
                let _told_already = self.take_back(over, Duration::ZERO);
                Err(NotHandedOver::Late(limit))
            }
        }
    }

    /// Takes the log back that nobody else has opened.
    pub fn take_back(&self, over: HandedOver, limit: Duration) -> Result<(), NotHandedOver> {
        let Some(open) = &self.open else {
            return Ok(());
        };
        let (done, is_done) = sync_channel(1);
        let back = Return {
            handed: over.handed,
            done,
        };
        drop(over.tell);
        // Blocks only while the queue is full, which its writer empties.
        open.queue
            .send(Message::TakeBack(back))
            .map_err(|_ended| NotHandedOver::Ended)?;
        is_done
            .recv_timeout(limit)
            .map_err(|_late| NotHandedOver::Late(limit))
    }

    /// Connections whose record is to come, and records that were handed in: counted since
    /// the log became another agent's.
    pub fn counts_since(&self) -> (u64, u64) {
        let open = self.open.as_ref();
        open.map_or((0, 0), |open| open.counted(Ledger::counts))
    }

    /// A record of an agent that has handed over. `story`: it was counted as open. Waits
    /// for room in the queue; not for the runtime's threads. `false`: this log has ended,
    /// and it is not in it.
    pub fn append(&self, text: String, story: bool) -> bool {
        let Some(open) = &self.open else { return true };
        let mut line = Message::Line(text.into_bytes());
        loop {
            let offered = open.counted(|ledger| {
                match story {
                    true => ledger.accept_closed(),
                    false => ledger.accept(),
                }
                open.offer(line).inspect_err(|_| ledger.not_accepted(story))
            });
            match offered {
                Ok(()) => return true,
                Err(TrySendError::Disconnected(_)) => return false,
                Err(TrySendError::Full(same)) => line = same,
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Which of these records stand in the log, among those that it got last.
    pub fn stand(&self, texts: &[&str]) -> Result<HashSet<String>, ReadError> {
        let mut found = HashSet::new();
        let Some(open) = self.open.as_ref().filter(|_| !texts.is_empty()) else {
            return Ok(found);
        };
        let from = last_seq(&open.directory)?.saturating_sub(RECENT);
        for line in Reader::open(&open.directory, from)? {
            let line = line?.text;
            // The chain's own members are in front of a record's.
            let has = |text: &&&str| text.get(1..).is_some_and(|text| line.ends_with(text));
            found.extend(texts.iter().find(has).map(|text| (*text).to_owned()));
        }
        Ok(found)
    }

    /// An agent that has handed over says that so many connections are to be told, where
    /// it said `before` the last time.
    pub fn adopted(&self, before: u64, now: u64) {
        let Some(open) = &self.open else { return };
        open.counted(|ledger| {
            for _ in before..now {
                ledger.opened();
            }
            for _ in now..before {
                ledger.closed();
            }
        });
    }

    /// So many records were lost on their way here. `false`: this log has ended, and does
    /// not tell.
    pub fn lost_before(&self, count: u64) -> bool {
        let Some(open) = &self.open else { return true };
        open.counted(|ledger| {
            if open.ended.load(Ordering::Relaxed) {
                return false;
            }
            for _ in 0..count {
                ledger.accept();
            }
            open.counts.queue.fetch_add(count, Ordering::Relaxed);
            true
        })
    }
}

#[cfg(test)]
mod tests;
