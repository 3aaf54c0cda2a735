//! The time, as the server sees it: the system's, or in tests one that is set.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Clones show the same time.
#[derive(Clone, Debug)]
pub struct Clock(Option<Arc<AtomicU64>>);

impl Clock {
    pub fn system() -> Self {
        Self(None)
    }

    /// Stands still at this second since 1970 until it is moved.
    pub fn fixed(at: u64) -> Self {
        Self(Some(Arc::new(AtomicU64::new(at))))
    }

    /// Moves a fixed clock on.
    pub fn advance(&self, by: Duration) {
        if let Some(fixed) = &self.0 {
            fixed.fetch_add(by.as_secs(), Ordering::SeqCst);
        }
    }

    /// Seconds since 1970.
    pub fn seconds(&self) -> u64 {
        match &self.0 {
            Some(fixed) => fixed.load(Ordering::SeqCst),
            None => SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default()
                .as_secs(),
        }
    }

    pub fn now(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(self.seconds())
    }
}
