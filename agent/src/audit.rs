//! The audit log: one JSON object a line, one line for each connection at its end
//! and for each denial, one for each request that was read, and what the kernel saw of
//! enrolled pods beside that. `join` makes one record of a connection's story and its
//! sockets, `chain` keeps the log, `send` sends it elsewhere, `command` asks it.
//!
//! It never slows traffic: a record that finds the queue full, or a disk that takes no
//! more, is counted, and the loss is written as a record of kind `gap` as soon as writing
//! works again. No decision reads the log back.

pub mod ask;
pub mod chain;
pub mod command;
mod handed;
mod join;
pub mod ocsf;
mod processes;
mod record;
pub mod replay;
mod seen;
pub mod send;
mod writer;

use std::{
    path::PathBuf,
    sync::{
        Arc, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{SyncSender, TrySendError, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use chain::{Ledger, Log, OpenError, Settings};
use writer::Writer;

pub use handed::{Handed, HandedOver, NotHandedOver};
pub use join::{Ends, Join, Key, Seen};
pub use processes::{Exec, Processes, executable};
use record::timestamp;
pub use record::{
    AuthorityRecord, Bytes, Connection, Fault, GrantRecord, Lost, OutboundRecord, Peer, Record,
    Reporter, RequestRecord, Requests, TokenRecord, Transport, Verdict,
};
pub use seen::{Direction, Flow, FlowEvent, FlowProtocol, Process, ProcessEvent, Socket};

/// Where records are handed in. Cheap to clone.
#[derive(Clone)]
pub struct Audit {
    node: Arc<str>,
    /// `None`: there is no log.
    open: Option<Arc<Open>>,
}

struct Open {
    queue: SyncSender<Message>,
    /// Another one once the log is another agent's. Held for writing, nobody hands in.
    ledger: Arc<RwLock<Arc<Ledger>>>,
    /// Its last word is in the queue. Set while the ledger is held for writing.
    ended: AtomicBool,
    counts: Arc<Counts>,
    directory: PathBuf,
}

enum Message {
    Record(Record),
    /// A record that another agent made.
    Line(Vec<u8>),
    /// The log becomes another agent's.
    HandOver(handed::Order),
    /// It does not, after all.
    TakeBack(handed::Return),
    /// Ends the log in order, whoever still holds it.
    Close,
}

#[derive(Default)]
struct Counts {
    /// Records that found no place in the queue, and how many of them the writer knows of.
    queue: AtomicU64,
    disk: AtomicU64,
    written: AtomicU64,
}

impl Audit {
    /// Opens the log and starts its writer, which ends with [`Self::close`] or when the
    /// last clone is dropped.
    pub fn open(
        node: &str,
        settings: Settings,
        queue: usize,
    ) -> Result<(Self, JoinHandle<()>), OpenError> {
        let directory = settings.directory.clone();
        let (log, ledger) = Log::open(settings.clone(), node)?;
        let (sender, receiver) = sync_channel(queue);
        let counts = Arc::new(Counts::default());
        let ledger = Arc::new(RwLock::new(ledger));
        let writer = Writer::new(node, settings, log, counts.clone(), ledger.clone());
        let thread = std::thread::Builder::new()
            .name("audit".into())
            .spawn(move || writer.run(&receiver))
            .map_err(|source| OpenError::Path {
                path: directory.clone(),
                source,
            })?;
        let open = Open {
            queue: sender,
            ledger,
            ended: AtomicBool::new(false),
            counts,
            directory,
        };
        Ok((
            Self {
                node: node.into(),
                open: Some(Arc::new(open)),
            },
            thread,
        ))
    }

    /// One whose records a test looks at.
    #[cfg(test)]
    fn of_queue(node: &str, queue: SyncSender<Message>) -> Self {
        let open = Open {
            queue,
            ledger: Arc::new(RwLock::new(Arc::new(Ledger::detached()))),
            ended: AtomicBool::new(false),
            counts: Arc::default(),
            directory: PathBuf::new(),
        };
        Self {
            node: node.into(),
            open: Some(Arc::new(open)),
        }
    }

    /// One that keeps no log.
    pub fn off(node: &str) -> Self {
        Self {
            node: node.into(),
            open: None,
        }
    }

    pub fn node(&self) -> &str {
        &self.node
    }

    /// Says whether it found a place in the queue.
    pub fn record(&self, record: Record) -> bool {
        let Some(open) = &self.open else {
            return true;
        };
        open.counted(|ledger| {
            ledger.accept();
            open.hand_in(Message::Record(record))
        })
    }

    /// A connection has begun, whose record is to come: if the agent is killed before,
    /// the next one says how many such there were.
    pub fn opened(&self) {
        if let Some(open) = &self.open {
            open.counted(Ledger::opened);
        }
    }

    /// The record of one that began with [`Self::opened`]. Behind the log's last word it
    /// stays one whose record is to come, and never came.
    pub fn ended(&self, record: Record) {
        if let Some(open) = &self.open {
            open.counted(|ledger| {
                if !open.ended.load(Ordering::Relaxed) {
                    ledger.accept_closed();
                    let _counted_if_not = open.hand_in(Message::Record(record));
                }
            });
        }
    }

    /// The last word: what is handed in after it is lost, and told by the next start. A
    /// disk that hangs is waited for so long at most. Not for the runtime's threads.
    pub fn close(&self, writer: &JoinHandle<()>, limit: Duration) {
        let Some(open) = &self.open else { return };
        let until = Instant::now() + limit;
        let mut told = false;
        while Instant::now() < until && !writer.is_finished() {
            told = told || open.end();
            std::thread::sleep(Duration::from_millis(5));
        }
        if !writer.is_finished() {
            tracing::warn!("the audit log could not be ended in order");
        }
    }

    /// A count of kernel losses that stands in the log: it outlives the agent, as the
    /// kernel's own count does. `kind`: below [`chain::KINDS`].
    pub fn reported(&self, kind: usize) -> u64 {
        let open = self.open.as_ref();
        open.map_or(0, |open| open.counted(|ledger| ledger.reported(kind)))
    }

    pub fn set_reported(&self, kind: usize, count: u64) {
        if let Some(open) = &self.open {
            open.counted(|ledger| ledger.set_reported(kind, count));
        }
    }

    /// Records lost so far, for metrics.
    pub fn lost(&self) -> u64 {
        self.counts(|counts| &counts.queue) + self.counts(|counts| &counts.disk)
    }

    pub fn written(&self) -> u64 {
        self.counts(|counts| &counts.written)
    }

    fn counts(&self, which: impl Fn(&Counts) -> &AtomicU64) -> u64 {
        let open = self.open.as_ref();
        open.map_or(0, |open| which(&open.counts).load(Ordering::Relaxed))
    }
}

impl Open {
    /// What is counted and what is handed in belong together: in between, the log does
    /// not become another agent's.
    fn counted<T>(&self, count: impl FnOnce(&Ledger) -> T) -> T {
        count(&self.ledger.read().expect("no panic while it is held"))
    }

    fn hand_in(&self, message: Message) -> bool {
        let taken = self.offer(message).is_ok();
        if !taken {
            self.counts.queue.fetch_add(1, Ordering::Relaxed);
        }
        taken
    }

    /// What is taken comes before the last word. To be called within [`Self::counted`].
    fn offer(&self, message: Message) -> Result<(), TrySendError<Message>> {
        match self.ended.load(Ordering::Relaxed) {
            true => Err(TrySendError::Disconnected(message)),
            false => self.queue.try_send(message),
        }
    }

    /// The last word; `false`: the queue has no room for it.
    fn end(&self) -> bool {
        let _nobody_hands_in = self.ledger.write().expect("no panic while it is held");
        let full = matches!(
            self.queue.try_send(Message::Close),
            Err(TrySendError::Full(_))
        );
        self.ended.store(!full, Ordering::Relaxed);
        !full
    }
}
