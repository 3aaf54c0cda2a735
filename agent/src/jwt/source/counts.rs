//! What the tasks of a store count.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counted since the store was made, over all sources.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Attempts that ended, failures included.
    pub attempts: u64,
    pub failures: u64,
    /// Attempts made because a token named a key that its set lacked.
    pub refetches: u64,
}

#[derive(Debug, Default)]
pub struct Counters {
    pub attempts: AtomicU64,
    pub failures: AtomicU64,
    pub refetches: AtomicU64,
}

impl Counters {
    pub fn read(&self) -> Counts {
        Counts {
            attempts: self.attempts.load(Ordering::Relaxed),
            failures: self.failures.load(Ordering::Relaxed),
            refetches: self.refetches.load(Ordering::Relaxed),
        }
    }
}
