//! Keeps one source's set fresh, until its handle is dropped.

use std::{
    hash::{BuildHasher as _, RandomState},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until},
};

use super::{
    Shared,
    origin::{Origin, SourceError, watch},
};
use crate::{
    fetch::{Fetched, Fetcher},
    jwt::KeySet,
};

/// A file is often written in several steps; it is read when they are over.
const SETTLE: Duration = Duration::from_millis(50);
/// In case a change of a file was not told: some network file systems tell none.
const ANYWAY: Duration = Duration::from_secs(30);

/// How fast a source is asked, besides what is configured.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// A server cannot ask for a faster refresh than this.
    pub shortest: Duration,
    /// Wait after a first failure; it doubles with each further one.
    pub retry: Duration,
    /// Longest wait after a failure.
    pub longest_retry: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            shortest: Duration::from_secs(30),
            retry: Duration::from_secs(1),
            longest_retry: Duration::from_secs(60),
        }
    }
}

impl Pace {
    /// When to fetch again after success.
    fn refresh(&self, configured: Duration, lifetime: Option<Duration>) -> Duration {
        let asked = lifetime.unwrap_or(configured).max(self.shortest);
        // Agents that were started together drift apart.
        configured.min(asked).mul_f64(0.9 + 0.1 * chance())
    }

    /// When to try again after this many failures.
    fn backoff(&self, failures: u32) -> Duration {
        let doubled = 1u32 << failures.saturating_sub(1).min(16);
        let whole = self.retry.saturating_mul(doubled).min(self.longest_retry);
        whole.mul_f64(0.5 + 0.5 * chance())
    }
}

pub struct Task {
    pub origin: Origin,
    pub fetcher: Arc<Fetcher>,
    pub shared: Arc<Shared>,
    /// Asks for an attempt now; closed when the task is to end.
    pub asked: mpsc::Receiver<()>,
    pub refresh: Duration,
    pub keep: Duration,
    pub pace: Pace,
}

/// The set that serves.
struct Good {
    body: Bytes,
    until: Instant,
}

impl Task {
    pub async fn run(self) {
        let Self {
            origin,
            fetcher,
            shared,
            mut asked,
            refresh,
            keep,
            pace,
        } = self;
        let (changed, mut changes) = mpsc::channel(1);
        let (refresh, _watcher) = match origin.file() {
            Some(path) => {
                let watcher = watch(path, changed.clone());
                if let Err(error) = &watcher {
                    tracing::warn!(source = shared.name, %error, "cannot watch a key file; reading every 30 s");
                }
                (refresh.min(ANYWAY), watcher.ok())
            }
            None => (refresh, None),
        };
        let mut good: Option<Good> = None;
        let mut failures = 0u32;
        loop {
            let attempt = attempt(&origin, &fetcher);
            tokio::pin!(attempt);
            let result = loop {
                tokio::select! {
                    result = &mut attempt => break result,
                    // Who asks now is answered by this attempt.
                    ask = asked.recv() => if ask.is_none() { return },
                    () = expiry(&good) => shared.expire(&mut good),
                }
            };
            let wait = match result {
                Ok((fetched, keys)) => {
                    failures = 0;
                    let new = good.as_ref().is_none_or(|good| good.body != fetched.body);
                    good = Some(Good {
                        body: fetched.body,
                        until: Instant::now() + keep,
                    });
                    shared.succeeded(new.then_some(keys), &mut asked);
                    pace.refresh(refresh, fetched.lifetime)
                }
                Err(error) => {
                    failures = failures.saturating_add(1);
                    shared.failed(&error, &mut asked);
                    pace.backoff(failures)
                }
            };
            let due = Instant::now() + wait;
            loop {
                tokio::select! {
                    () = sleep_until(due) => break,
                    ask = asked.recv() => match ask {
                        Some(()) => break,
                        None => return,
                    },
                    Some(()) = changes.recv() => {
                        sleep(SETTLE).await;
                        let _more_of_the_same = changes.try_recv();
                        break;
                    }
                    () = expiry(&good) => shared.expire(&mut good),
                }
            }
            shared.progress.send_modify(|p| p.under_way = true);
        }
    }
}

async fn attempt(origin: &Origin, fetcher: &Fetcher) -> Result<(Fetched, KeySet), SourceError> {
    let fetched = origin.read(fetcher).await?;
    let keys = KeySet::parse(&fetched.body)?;
    Ok((fetched, keys))
}

/// Waits for the end of the set that serves.
async fn expiry(good: &Option<Good>) {
    match good {
        Some(good) => sleep_until(good.until).await,
        None => std::future::pending().await,
    }
}

impl Shared {
    fn succeeded(&self, keys: Option<KeySet>, asked: &mut mpsc::Receiver<()>) {
        let changed = keys.is_some();
        if let Some(keys) = keys {
            self.keys.store(Some(Arc::new(keys)));
            self.changed.send_replace(());
        }
        let before = self.end(asked, None, changed);
        if before.is_some() {
            tracing::info!(source = self.name, "keys can be read again");
        }
    }

    fn failed(&self, error: &SourceError, asked: &mut mpsc::Receiver<()>) {
        self.counters.failures.fetch_add(1, Ordering::Relaxed);
        let error: Arc<str> = error.to_string().into();
        let before = self.end(asked, Some(error.clone()), false);
        // The same failure is told once.
        if before.is_none_or(|before| before != error) {
            tracing::warn!(source = self.name, %error, "keys cannot be read");
        }
    }

    /// Tells that an attempt ended; gives the error of the one before.
    fn end(
        &self,
        asked: &mut mpsc::Receiver<()>,
        error: Option<Arc<str>>,
        changed: bool,
    ) -> Option<Arc<str>> {
        self.counters.attempts.fetch_add(1, Ordering::Relaxed);
        let _answered = asked.try_recv();
        let mut before = None;
        self.progress.send_modify(|p| {
            p.under_way = false;
            p.ended += 1;
            p.changes += u64::from(changed);
            before = std::mem::replace(&mut p.error, error);
        });
        before
    }

    /// Gives up a set that was not confirmed for too long: its keys may have been
    /// withdrawn meanwhile. Fail closed: tokens are refused until it is read again.
    fn expire(&self, good: &mut Option<Good>) {
        *good = None;
        self.keys.store(None);
        self.changed.send_replace(());
        tracing::error!(source = self.name, "keys are too old and no longer used");
    }
}

/// Any number from 0 to 1: hashers are seeded at random.
fn chance() -> f64 {
    let random = RandomState::new().hash_one(()) >> 11;
    random as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refresh_is_the_smaller_of_ours_and_theirs_within_bounds() {
        let pace = Pace::default();
        let seconds = Duration::from_secs;
        for (configured, lifetime, longest) in [
            (300, None, 300),
            (300, Some(60), 60),
            (300, Some(3600), 300),
            (300, Some(0), 30),
            (10, Some(0), 10),
        ] {
            let wait = pace.refresh(seconds(configured), lifetime.map(seconds));
            let range = seconds(longest).mul_f64(0.9)..=seconds(longest);
            assert!(range.contains(&wait), "{configured} {lifetime:?}: {wait:?}");
        }
    }

    #[test]
    fn waits_double_up_to_a_bound() {
        let pace = Pace::default();
        for (failures, longest) in [(1, 1), (2, 2), (6, 32), (7, 60), (u32::MAX, 60)] {
            let wait = pace.backoff(failures);
            let longest = Duration::from_secs(longest);
            assert!(
                (longest / 2..=longest).contains(&wait),
                "{failures}: {wait:?}"
            );
        }
        let waits: std::collections::HashSet<_> = (0..8).map(|_| pace.backoff(7)).collect();
        assert!(waits.len() > 1, "no jitter");
    }
}
