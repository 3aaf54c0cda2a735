//! Key sets that are not written into a policy: fetched from a rule's `jwksUri`,
//! found by OIDC discovery at its issuer, or read from a file that stands in for
//! discovery. Each has a task that keeps its set fresh; who needs keys reads the
//! latest snapshot and waits for no server.

mod counts;
mod origin;
mod task;
#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, HashSet},
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::Duration,
};

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::{
    runtime::Handle,
    sync::{mpsc, watch},
    time::Instant,
};

use super::KeySet;
use crate::fetch::{Fetcher, RootsError, shown};
use counts::Counters;
pub use counts::Counts;
use origin::Origin;
use task::{Pace, Task};

/// Where a rule's keys come from (Istio `JWTRule`).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum RemoteKeys {
    /// `jwksUri`.
    Url { url: String, timeout: Duration },
    /// Neither `jwksUri` nor `jwks`: OIDC Discovery 1.0, section 4.
    Discovery { issuer: String, timeout: Duration },
}

impl RemoteKeys {
    /// The rule's `timeout`, for each document that is fetched.
    pub fn timeout(&self) -> Duration {
        match self {
            Self::Url { timeout, .. } | Self::Discovery { timeout, .. } => *timeout,
        }
    }
}

impl fmt::Display for RemoteKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Url { url, .. } => f.write_str(&shown(url)),
            Self::Discovery { issuer, .. } => write!(f, "issuer {}", shown(issuer)),
        }
    }
}

#[derive(Clone, Debug)]
pub struct Options {
    /// How often a set is fetched again; sooner where its server says so.
    pub refresh: Duration,
    /// How long a set serves after its last successful fetch.
    pub keep: Duration,
    /// Least time between two fetches of a source for keys that its set lacks.
    pub refetch_interval: Duration,
    /// PEM file of further roots that servers are trusted under.
    pub roots: Option<PathBuf>,
    /// Files with the key sets of issuers that are not asked by discovery.
    pub files: HashMap<String, PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            refresh: Duration::from_secs(5 * 60),
            keep: Duration::from_secs(60 * 60),
            refetch_interval: Duration::from_secs(10),
            roots: None,
            files: HashMap::new(),
        }
    }
}

/// A source that could not be read at its last attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub source: String,
    pub error: String,
    /// Whether an earlier set still serves. Without one, its tokens are refused.
    pub usable: bool,
}

/// The sources in use. Clones share them; with the last clone their tasks end.
#[derive(Clone)]
pub struct KeyStore(Arc<Inner>);

struct Inner {
    fetcher: Arc<Fetcher>,
    options: Options,
    pace: Pace,
    runtime: Handle,
    sources: ArcSwap<HashMap<RemoteKeys, Arc<Source>>>,
    /// Whether the store was shut down; held by whoever changes the sources.
    closed: Mutex<bool>,
    changed: watch::Sender<()>,
    counters: Arc<Counters>,
}

/// One source. Its task runs as long as this is held.
struct Source {
    shared: Arc<Shared>,
    asks: mpsc::Sender<()>,
}

/// What a task tells.
struct Shared {
    name: String,
    keys: ArcSwapOption<KeySet>,
    progress: watch::Sender<Progress>,
    /// The store's: told when the set is another one.
    changed: watch::Sender<()>,
    counters: Arc<Counters>,
}

#[derive(Clone, Debug, Default)]
struct Progress {
    under_way: bool,
    /// Attempts that have ended.
    ended: u64,
    /// How many of them brought another set than the one before.
    changes: u64,
    /// When it was last fetched for a key that was lacking.
    asked: Option<Instant>,
    error: Option<Arc<str>>,
}

impl KeyStore {
    /// Needs a tokio runtime, which its tasks run on.
    pub fn new(options: Options) -> Result<Self, RootsError> {
        Self::with_pace(options, Pace::default())
    }

    fn with_pace(options: Options, pace: Pace) -> Result<Self, RootsError> {
        Ok(Self(Arc::new(Inner {
            fetcher: Arc::new(Fetcher::new(options.roots.as_deref())?),
            options,
            pace,
            runtime: Handle::current(),
            sources: ArcSwap::default(),
            closed: Mutex::new(false),
            changed: watch::Sender::new(()),
            counters: Arc::default(),
        })))
    }

    /// Sets the sources that policies name. New ones are fetched at once, before
    /// a token comes; those that are named no longer are given up with their keys.
    pub fn want(&self, wanted: HashSet<RemoteKeys>) {
        let closed = self.0.closed.lock().unwrap_or_else(PoisonError::into_inner);
        if *closed {
            return;
        }
        let old = self.0.sources.load();
        let sources = wanted
            .into_iter()
            .map(|from| {
                let source = match old.get(&from) {
                    Some(source) => source.clone(),
                    None => Arc::new(self.0.start(&from)),
                };
                (from, source)
            })
            .collect();
        self.0.sources.store(Arc::new(sources));
    }

    /// The latest set, if there is one.
    pub fn get(&self, from: &RemoteKeys) -> Option<Arc<KeySet>> {
        self.0.sources.load().get(from)?.shared.keys.load_full()
    }

    /// The latest set, once the first attempt to read it has ended or `limit` is over.
    pub async fn ready(&self, from: &RemoteKeys, limit: Duration) -> Option<Arc<KeySet>> {
        let source = self.source(from)?;
        let mut progress = source.shared.progress.subscribe();
        let first = progress.wait_for(|p| p.ended > 0);
        let _ended_or_late = tokio::time::timeout(limit, first).await;
        source.shared.keys.load_full()
    }

    /// Reads a source again, for a token whose key its set lacks; true if the set
    /// is another one then. Callers at the same time share one attempt, and
    /// attempts keep their distance: anyone can name unknown keys.
    pub async fn refetch(&self, from: &RemoteKeys) -> bool {
        let Some(source) = self.source(from) else {
            return false;
        };
        let mut ask = false;
        let mut before = None;
        source.shared.progress.send_if_modified(|p| {
            let interval = self.0.options.refetch_interval;
            if !p.under_way {
                if p.asked.is_some_and(|at| at.elapsed() < interval) {
                    return false;
                }
                p.asked = Some(Instant::now());
                p.under_way = true;
                ask = true;
            }
            before = Some((p.ended, p.changes));
            false
        });
        let Some((ended, changes)) = before else {
            return false;
        };
        if ask {
            self.0.counters.refetches.fetch_add(1, Ordering::Relaxed);
            // Full: the task has been asked already.
            let _asked = source.asks.try_send(());
        }
        let mut progress = source.shared.progress.subscribe();
        let done = progress.wait_for(|p| p.ended > ended);
        // Two documents at most, and some time to be scheduled.
        let fetches = from.timeout().saturating_mul(2);
        let limit = fetches.saturating_add(Duration::from_secs(1));
        match tokio::time::timeout(limit, done).await {
            Ok(Ok(p)) => p.changes != changes,
            Ok(Err(_)) | Err(_) => false,
        }
    }

    /// The sources whose last attempt failed, by name.
    pub fn problems(&self) -> Vec<Problem> {
        let sources = self.0.sources.load();
        let mut problems: Vec<_> = sources
            .values()
            .filter_map(|source| {
                let error = source.shared.progress.borrow().error.clone()?;
                Some(Problem {
                    source: source.shared.name.clone(),
                    error: error.to_string(),
                    usable: source.shared.keys.load().is_some(),
                })
            })
            .collect();
        problems.sort_by(|a, b| a.source.cmp(&b.source));
        problems
    }

    pub fn counts(&self) -> Counts {
        self.0.counters.read()
    }

    /// Told when a source has other keys, or none any more: what was verified by the
    /// old ones may no longer hold.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.0.changed.subscribe()
    }

    /// Ends all tasks; what is wanted later is not fetched.
    pub fn shutdown(&self) {
        *self.0.closed.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.sources.store(Arc::default());
    }

    fn source(&self, from: &RemoteKeys) -> Option<Arc<Source>> {
        self.0.sources.load().get(from).cloned()
    }
}

impl Inner {
    fn start(&self, from: &RemoteKeys) -> Source {
        let shared = Arc::new(Shared {
            name: from.to_string(),
            keys: ArcSwapOption::empty(),
            // The task is about to begin.
            progress: watch::Sender::new(Progress {
                under_way: true,
                ..Progress::default()
            }),
            changed: self.changed.clone(),
            counters: self.counters.clone(),
        });
        let (asks, asked) = mpsc::channel(1);
        let task = Task {
            origin: Origin::new(from, &self.options.files),
            fetcher: self.fetcher.clone(),
            shared: shared.clone(),
            asked,
            refresh: self.options.refresh,
            keep: self.options.keep,
            pace: self.pace,
        };
        self.runtime.spawn(task.run());
        Source { shared, asks }
    }
}
