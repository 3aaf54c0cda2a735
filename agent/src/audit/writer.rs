//! The thread that writes the log, or hands on what it would write to the agent whose log
//! it is now.

use std::{
    sync::{
        Arc, RwLock,
        atomic::Ordering,
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use tokio::sync::mpsc;

use super::{
    Counts, Message, Record,
    chain::{Ledger, Log, OpenError, Settings},
    handed::{Handed, Order, Return},
};

/// Between two writes: a record is in the file this much later at most.
const PAUSE: Duration = Duration::from_millis(1);
/// How often the writer looks at what is due by the clock.
const IDLE: Duration = Duration::from_millis(200);
/// What is written at once, bytes; more waits for the next write.
const BATCH: usize = 1 << 20;

/// How long an agent that was to take over, and died, may have the log's lock.
const BUSY: Duration = Duration::from_secs(3);

pub(super) struct Writer {
    node: Box<str>,
    settings: Settings,
    to: To,
    counts: Arc<Counts>,
    ledger: Arc<RwLock<Arc<Ledger>>>,
    /// Losses of the queue that were told.
    told: u64,
}

enum To {
    Log(Box<Log>),
    /// The log is another agent's.
    Agent(mpsc::Sender<Handed>),
    /// It was, and could not be had back.
    Nobody,
}

impl Writer {
    pub fn new(
        node: &str,
        settings: Settings,
        log: Log,
        counts: Arc<Counts>,
        ledger: Arc<RwLock<Arc<Ledger>>>,
    ) -> Self {
        Self {
            node: node.into(),
            settings,
            to: To::Log(Box::new(log)),
            counts,
            ledger,
            told: 0,
        }
    }

    pub fn run(mut self, queue: &Receiver<Message>) {
        loop {
            let mut open = true;
            match queue.recv_timeout(IDLE) {
                Ok(message) => {
                    open &= self.take(message, queue);
                    // One write for all that is waiting.
                    while open
                        && self.waiting() < BATCH
                        && let Ok(message) = queue.try_recv()
                    {
                        open &= self.take(message, queue);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => open = false,
            }
            let lost = self.counts.queue.load(Ordering::Relaxed);
            self.commit(lost);
            if !open {
                if let To::Log(log) = self.to {
                    log.close();
                }
                return;
            }
            if let To::Log(log) = &mut self.to {
                log.tick();
                // What comes meanwhile is written together, and wakes nobody.
                std::thread::sleep(PAUSE);
            }
        }
    }

    fn waiting(&self) -> usize {
        match &self.to {
            To::Log(log) => log.waiting(),
            To::Agent(_) | To::Nobody => 0,
        }
    }

    /// Writes what waits. `lost`: by the queue, so far.
    fn commit(&mut self, lost: u64) {
        let more = lost - self.told;
        self.told = lost;
        match &mut self.to {
            To::Log(log) => {
                log.lost_in_queue(more);
                let committed = log.commit();
                let Counts { disk, written, .. } = &*self.counts;
                written.fetch_add(committed.written, Ordering::Relaxed);
                disk.fetch_add(committed.lost, Ordering::Relaxed);
            }
            To::Agent(agent) if more > 0 => {
                let _the_end = agent.blocking_send(Handed::Lost(more));
            }
            To::Agent(_) | To::Nobody => {}
        }
    }

    /// `false`: the log ends.
    fn take(&mut self, message: Message, queue: &Receiver<Message>) -> bool {
        match message {
            Message::Record(record) => self.record(&record),
            Message::Line(text) => self.line(text, false),
            Message::HandOver(order) => self.hand_over(order),
            Message::TakeBack(back) => return self.take_back(back, queue),
            Message::Close => return false,
        }
        true
    }

    fn record(&mut self, record: &Record) {
        match &mut self.to {
            To::Log(log) => log.append(|text| record.write(&self.node, text)),
            _ => {
                let mut text = Vec::new();
                record.write(&self.node, &mut text);
                self.line(text, matches!(record, Record::Connection(_)));
            }
        }
    }

    /// `story`: it is a connection's.
    fn line(&mut self, line: Vec<u8>, story: bool) {
        match &mut self.to {
            To::Log(log) => log.append(|text| text.extend_from_slice(&line)),
            To::Agent(agent) => {
                // It is a promise until it stands in a log: who waits here is the queue,
                // which counts what it has no room for.
                let text = String::from_utf8(line).unwrap_or_default();
                let _the_end = agent.blocking_send(Handed::Record { text, story });
            }
            To::Nobody => {
                self.counts.disk.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn hand_over(&mut self, order: Order) {
        self.commit(order.lost);
        if let To::Log(log) = std::mem::replace(&mut self.to, To::Agent(order.to)) {
            log.close();
        }
        let _gone = order.done.send(());
    }

    /// Goes on in the log, which nobody else wrote to. `false`: and it ends.
    fn take_back(&mut self, back: Return, queue: &Receiver<Message>) -> bool {
        let until = Instant::now() + BUSY;
        let opened = loop {
            match Log::open(self.settings.clone(), &self.node) {
                // One that was killed has its locks until the last of its threads is gone.
                Err(OpenError::Busy(_)) if Instant::now() < until => std::thread::sleep(PAUSE),
                opened => break opened,
            }
        };
        let (log, fresh) = match opened {
            Ok((log, ledger)) => (To::Log(Box::new(log)), ledger),
            Err(error) => {
                tracing::error!(%error, "the audit log cannot be opened again; what is lost is counted");
                (To::Nobody, Arc::new(Ledger::detached()))
            }
        };
        self.to = log;
        let mut waiting = Vec::new();
        let lost = {
            // Nobody counts now, and nobody hands in.
            let mut ledger = self.ledger.write().expect("no panic while it is held");
            waiting.extend(queue.try_iter());
            let (_, accepted) = ledger.counts();
            for _ in 0..accepted {
                fresh.accept();
            }
            ledger.move_open(&fresh);
            *ledger = fresh;
            self.counts.queue.load(Ordering::Relaxed)
        };
        let mut handed = back.handed;
        handed.close();
        while let Some(item) = handed.blocking_recv() {
            match item {
                Handed::Record { text, story } => self.line(text.into_bytes(), story),
                // Its records were counted as accepted, too.
                Handed::Lost(count) => self.told = self.told.saturating_sub(count),
                Handed::Socket(_) => {}
            }
        }
        let mut open = true;
        for message in waiting {
            match message {
                Message::Record(record) => self.record(&record),
                Message::Line(text) => self.line(text, false),
                // Of who has not waited for this: it finds that nothing came of it.
                Message::HandOver(_) | Message::TakeBack(_) => {}
                Message::Close => open = false,
            }
        }
        self.commit(lost);
        let _gone = back.done.send(());
        open
    }
}
