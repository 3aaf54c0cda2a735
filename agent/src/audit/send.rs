//! Sends the audit log away. The log on the disk is the queue: each sink follows it by
//! itself from a cursor of its own, so that nothing waits in memory and a receiver that
//! is slow or dead keeps nobody waiting. What is acknowledged moves the cursor: records
//! arrive at least once, and `seq` tells which came twice.

pub mod config;
mod cursor;
mod deliver;
mod follow;
mod otlp;
mod stdout;
mod syslog;
mod tls;
mod worker;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{sync::watch, task::JoinSet};

use crate::{
    audit::chain::{self, ReadError, Reader},
    config::Config,
};

use config::{Begin, Sink};
use cursor::{Cursor, CursorError};
pub use deliver::Severity;
use deliver::Target;
use follow::Follower;
use worker::{Standing, Worker};

/// Where cursors are, below the state directory.
const CURSORS: &str = "audit-cursors";

/// What is wrong with a sink: configuration, or the state directory.
#[derive(Debug, thiserror::Error)]
#[error("audit.sinks: {sink}: {cause}")]
pub struct SendError {
    pub sink: String,
    pub cause: Cause,
}

#[derive(Debug, thiserror::Error)]
pub enum Cause {
    #[error(transparent)]
    Cursor(#[from] CursorError),
    #[error(transparent)]
    Log(#[from] ReadError),
    #[error(transparent)]
    Roots(#[from] crate::fetch::RootsError),
    /// A certificate, a key, or a file of headers.
    #[error("{path}: {message}")]
    File { path: PathBuf, message: String },
}

/// The sinks, at work.
pub struct Senders {
    standings: Standings,
    tasks: JoinSet<()>,
    stop: watch::Sender<bool>,
}

/// What metrics read. Cheap to clone.
#[derive(Clone)]
pub struct Standings {
    log: Arc<Path>,
    all: Arc<[(String, Arc<Standing>)]>,
}

/// How far a sink is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    pub name: String,
    /// Records that its receiver took, since the agent was started.
    pub sent: u64,
    /// Records that are still to be looked at.
    pub behind: u64,
    /// Records that were no longer there, or not readable, when their turn came.
    pub skipped: u64,
    /// Records that the receiver got and refused for good.
    pub rejected: u64,
    /// Why nothing goes on, while that is so.
    pub error: Option<String>,
}

/// Starts all sinks; what is wrong with one is found before any of them sends.
pub fn start(config: &Config, log: &Path, node: &str) -> Result<Senders, SendError> {
    let (stop, stopped) = watch::channel(false);
    let cursors = config.state.join(CURSORS);
    let mut workers = Vec::new();
    for sink in config.audit.sinks.iter() {
        let named = |cause| SendError {
            sink: sink.name.clone(),
            cause,
        };
        let target = Target::new(sink, node, &config.trust_domain).map_err(named)?;
        let worker = worker(sink, target, log, &cursors, node, stopped.clone());
        workers.push((sink.name.clone(), worker.map_err(named)?));
    }
    let all = (workers.iter()).map(|(name, worker)| (name.clone(), worker.standing.clone()));
    let standings = Standings {
        log: log.into(),
        all: all.collect(),
    };
    let mut tasks = JoinSet::new();
    for (_, worker) in workers {
        tasks.spawn(worker.run());
    }
    Ok(Senders {
        standings,
        tasks,
        stop,
    })
}

fn worker(
    sink: &Sink,
    target: Target,
    log: &Path,
    cursors: &Path,
    node: &str,
    stopped: watch::Receiver<bool>,
) -> Result<Worker, Cause> {
    let last = chain::last_seq(log)?;
    let first = match sink.from {
        Begin::Now => last,
        Begin::Beginning => before_the_oldest(log)?,
    };
    let mut cursor = Cursor::open(cursors, &sink.name, first)?;
    if cursor.reached() > last {
        // Sent twice rather than never: it may be another log, or one that lost its end.
        tracing::warn!(
            sink = sink.name,
            cursor = cursor.reached(),
            last,
            "the log ends before what was sent of it; all of it is sent again"
        );
        cursor.reach(before_the_oldest(log)?)?;
    }
    let reached = cursor.reached();
    let reader = Reader::open(log, reached + 1)?;
    let follower = Follower::new(reader, reached, sink.filter.clone(), node);
    Ok(Worker::new(
        &sink.name, log, follower, cursor, target, stopped,
    ))
}

/// What retention removed before there was a cursor is missed by nobody.
fn before_the_oldest(log: &Path) -> Result<u64, ReadError> {
    let oldest = Reader::open(log, 0)?.next().transpose()?;
    Ok(oldest.map_or(0, |line| line.seq.saturating_sub(1)))
}

impl Standings {
    pub fn progress(&self) -> Vec<Progress> {
        if self.all.is_empty() {
            return Vec::new();
        }
        // A log that cannot be read is told by its senders.
        let last = chain::last_seq(&self.log).unwrap_or(0);
        (self.all.iter())
            .map(|(name, standing)| standing.progress(name, last))
            .collect()
    }
}

impl Senders {
    pub fn standings(&self) -> Standings {
        self.standings.clone()
    }

    pub fn progress(&self) -> Vec<Progress> {
        self.standings.progress()
    }

    /// Lets the sinks send what is left, for so long at most. To be called when the log
    /// has its last record; what is not sent by then is sent after the next start.
    pub async fn finish(mut self, limit: Duration) {
        self.stop.send_replace(true);
        let all = async { while self.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(limit, all).await.is_err() {
            tracing::warn!("the audit log is not all sent; it goes on at the next start");
        }
    }
}
