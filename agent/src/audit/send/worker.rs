//! One sink at work: reads a batch, hands it over until it is acknowledged, moves the
//! cursor.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::watch;

use super::{
    Progress,
    cursor::Cursor,
    deliver::{Failure, Target},
    follow::{Batch, Entry, Follower},
};
use crate::{
    audit::chain::{ReadError, Reader},
    identity::Backoff,
};

/// How often the end of the log is looked at for more.
const POLL: Duration = Duration::from_millis(200);
/// The longest that a receiver can have us wait.
const LONGEST_ASKED: Duration = Duration::from_secs(600);
/// How often a file is tried that cannot be read, before it is left out.
const READ_ATTEMPTS: u32 = 5;

pub struct Worker {
    name: String,
    log: PathBuf,
    /// None while it reads.
    follower: Option<Follower<Reader>>,
    cursor: Cursor,
    target: Target,
    pub standing: Arc<Standing>,
    stopped: watch::Receiver<bool>,
}

/// What operators see of a sink.
#[derive(Debug, Default)]
pub struct Standing {
    sent: AtomicU64,
    reached: AtomicU64,
    skipped: AtomicU64,
    rejected: AtomicU64,
    error: Mutex<Option<String>>,
}

/// The agent ends, and this sink cannot go on before it does.
struct Stopped;

impl Worker {
    pub fn new(
        name: &str,
        log: &Path,
        follower: Follower<Reader>,
        cursor: Cursor,
        target: Target,
        stopped: watch::Receiver<bool>,
    ) -> Self {
        let standing = Standing::default();
        standing
            .reached
            .store(follower.reached(), Ordering::Relaxed);
        Self {
            name: name.into(),
            log: log.into(),
            follower: Some(follower),
            cursor,
            target,
            standing: Arc::new(standing),
            stopped,
        }
    }

    pub async fn run(mut self) {
        loop {
            let Ok(batch) = self.read().await else { return };
            if batch.reached == self.standing.reached.load(Ordering::Relaxed) {
                // The end of the log; at the end of the agent, that is all.
                if *self.stopped.borrow() {
                    self.target.close().await;
                    return;
                }
                self.pause(POLL).await;
                continue;
            }
            self.standing
                .skipped
                .fetch_add(batch.skipped, Ordering::Relaxed);
            if self.deliver(&batch.entries).await.is_err() {
                return;
            }
            self.standing
                .reached
                .store(batch.reached, Ordering::Relaxed);
            if let Err(error) = self.cursor.reach(batch.reached) {
                // Nothing is lost by it: what follows is sent, and again after a start.
                self.failed(&error.to_string());
            }
        }
    }

    /// The next batch, of as many attempts as it takes.
    async fn read(&mut self) -> Result<Batch, Stopped> {
        let mut backoff = Backoff::default();
        let mut failures = 0;
        loop {
            let mut follower = self.follower.take().expect("it is put back below");
            let log = self.log.clone();
            let again = (1..READ_ATTEMPTS).contains(&failures);
            // A disk may take its time.
            let read = tokio::task::spawn_blocking(move || {
                let result = if again {
                    Reader::open(&log, follower.reached() + 1).and_then(|reader| {
                        follower.reopen(reader);
                        follower.batch()
                    })
                } else {
                    follower.batch()
                };
                (follower, result)
            });
            let (follower, result) = read.await.expect("reading does not panic");
            self.follower = Some(follower);
            match result {
                Ok(batch) => return Ok(batch),
                Err(error @ ReadError::Line { .. }) => {
                    // The reader is past it; the receiver is told of a gap.
                    self.failed(&error.to_string());
                }
                Err(error @ ReadError::File { .. }) => {
                    // What is not to be had now is no damage: it is asked for again.
                    failures = if is_for_now(&error) { 1 } else { failures + 1 };
                    self.failed(&error.to_string());
                    if *self.stopped.borrow() {
                        return Err(Stopped);
                    }
                    backoff.failed();
                    self.pause(backoff.left()).await;
                }
            }
        }
    }

    /// Hands records over until all are taken, or refused for good.
    async fn deliver(&mut self, entries: &[Entry]) -> Result<(), Stopped> {
        let mut backoff = Backoff::default();
        let mut parts = vec![entries];
        while let Some(part) = parts.pop() {
            if part.is_empty() {
                continue;
            }
            match self.target.send(part).await {
                Ok(taken) => {
                    backoff.succeeded();
                    let rejected = taken.rejected.min(part.len() as u64);
                    self.reject(rejected, &taken.message);
                    let sent = part.len() as u64 - rejected;
                    self.standing.sent.fetch_add(sent, Ordering::Relaxed);
                    self.works();
                }
                // One of them is to blame; the others are to arrive.
                Err(Failure::Bad { .. } | Failure::Large { .. }) if part.len() > 1 => {
                    let (first, second) = part.split_at(part.len() / 2);
                    parts.extend([second, first]);
                }
                Err(Failure::Bad { why }) => match self.target.takes_nothing().await {
                    Ok(()) => self.reject(1, &why),
                    // It is not the record: somebody in between refuses everything.
                    Err(_as_well) => {
                        parts.push(part);
                        self.later(&mut backoff, None, &why).await?;
                    }
                },
                Err(Failure::Later { after, why }) => {
                    parts.push(part);
                    self.later(&mut backoff, after, &why).await?;
                }
                Err(Failure::Large { why }) => {
                    parts.push(part);
                    self.later(&mut backoff, None, &why).await?;
                }
            }
        }
        Ok(())
    }

    /// What is not taken now is handed over again after a while.
    async fn later(
        &mut self,
        backoff: &mut Backoff,
        after: Option<Duration>,
        why: &str,
    ) -> Result<(), Stopped> {
        self.failed(why);
        if *self.stopped.borrow() {
            return Err(Stopped);
        }
        backoff.failed();
        let asked = after.unwrap_or_default().min(LONGEST_ASKED);
        self.pause(backoff.left().max(asked)).await;
        Ok(())
    }

    /// Waits; not when the agent ends.
    async fn pause(&mut self, time: Duration) {
        let stopped = self.stopped.wait_for(|stopped| *stopped);
        let _either = tokio::time::timeout(time, stopped).await;
    }

    fn reject(&self, count: u64, message: &str) {
        if count > 0 {
            self.standing.rejected.fetch_add(count, Ordering::Relaxed);
            tracing::error!(sink = self.name, count, message, "audit records refused");
        }
    }

    fn failed(&self, why: &str) {
        let before = self.standing.error().replace(why.to_owned());
        if before.as_deref() != Some(why) {
            tracing::warn!(sink = self.name, why, "the audit log is not sent");
        }
    }

    fn works(&self) {
        if self.standing.error().take().is_some() {
            tracing::info!(sink = self.name, "the audit log is sent again");
        }
    }
}

impl Standing {
    pub fn progress(&self, name: &str, last: u64) -> Progress {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Progress {
            name: name.to_owned(),
            sent: get(&self.sent),
            behind: last.saturating_sub(get(&self.reached)),
            skipped: get(&self.skipped),
            rejected: get(&self.rejected),
            error: self.error().clone(),
        }
    }

    fn error(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.error.lock().expect("no panic while it is held")
    }
}
/// Too many open files, no memory, no right to read: an operator or time mends it.
fn is_for_now(error: &ReadError) -> bool {
    let ReadError::File { source, .. } = error else {
        return false;
    };
    let passing = [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::EACCES];
    source
        .raw_os_error()
        .is_some_and(|code| passing.contains(&code))
}
