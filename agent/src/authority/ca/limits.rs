//! How often one asker may ask: a bucket each, in memory, that fills evenly.

use std::{collections::HashMap, hash::Hash, sync::Mutex};

/// Askers that are remembered; those whose bucket is full again go when there are more.
const MOST: usize = 10_000;
/// Parts of one request that buckets are counted in: a minute's seconds.
const PARTS: u64 = 60;

pub struct Limits<K> {
    per_minute: u64,
    buckets: Mutex<HashMap<K, Bucket>>,
}

#[derive(Clone, Copy)]
struct Bucket {
    parts: u64,
    /// Seconds since 1970.
    at: u64,
}

impl<K: Hash + Eq> Limits<K> {
    pub fn new(per_minute: u32) -> Self {
        Self {
            per_minute: per_minute.into(),
            buckets: Mutex::default(),
        }
    }

    /// Whether it may ask now; `now` in seconds since 1970. Fails closed: with more
    /// askers at once than are remembered, new ones wait.
    pub fn take(&self, asker: K, now: u64) -> bool {
        let full = self.per_minute * PARTS;
        let filled = |bucket: &Bucket| {
            let gained = now.saturating_sub(bucket.at) * self.per_minute;
            (bucket.parts + gained).min(full)
        };
        let mut buckets = self.buckets.lock().expect("no panic while it is held");
        if buckets.len() >= MOST && !buckets.contains_key(&asker) {
            buckets.retain(|_, bucket| filled(bucket) < full);
            if buckets.len() >= MOST {
                return false;
            }
        }
        let bucket = buckets.entry(asker).or_insert(Bucket {
            parts: full,
            at: now,
        });
        bucket.parts = filled(bucket);
        bucket.at = now;
        match bucket.parts.checked_sub(PARTS) {
            Some(left) => {
                bucket.parts = left;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_empties_and_fills_and_others_have_their_own() {
        let limits = Limits::new(3);
        let taken = |who, now| (0..10).filter(|_| limits.take(who, now)).count();
        assert_eq!(taken("a", 100), 3);
        assert_eq!(taken("a", 110), 0);
        assert_eq!(taken("a", 120), 1);
        assert_eq!(taken("b", 120), 3);
        assert_eq!(taken("a", 10_000), 3);
        // A clock that steps back gives nothing.
        assert_eq!(taken("a", 50), 0);
    }

    #[test]
    fn the_table_is_bounded() {
        let limits = Limits::new(1);
        for asker in 0..MOST {
            assert!(limits.take(asker, 0));
        }
        assert!(!limits.take(MOST, 0));
        assert!(limits.take(MOST, 60));
        assert!(limits.buckets.lock().expect("no panic").len() < MOST);
    }
}
