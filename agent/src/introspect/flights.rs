//! Answers that still hold, and exchanges that are under way: one for each token, and
//! whoever asks meanwhile waits for the same.

use std::{
    collections::HashMap,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use moka::sync::Cache;
use tokio::{sync::OnceCell, time::Instant};

use super::{Introspected, Key, Told};

/// Bytes of answers that are kept.
const MAX_BYTES: u64 = 16 << 20;
/// Roughly what an entry costs beside its answer: parsed, that is some times larger.
const ENTRY_BYTES: usize = 512;

pub(super) struct Flights {
    /// Bounded by bytes, least used go first: they are asked about again.
    answers: Cache<Key, Told>,
    /// Held only by those who wait.
    under_way: Mutex<HashMap<Key, Arc<OnceCell<Told>>>>,
}

impl Default for Flights {
    fn default() -> Self {
        let weight =
            |_: &Key, told: &Told| u32::try_from(4 * told.size + ENTRY_BYTES).unwrap_or(u32::MAX);
        Self {
            answers: Cache::builder()
                .max_capacity(MAX_BYTES)
                .weigher(weight)
                .build(),
            under_way: Mutex::default(),
        }
    }
}

impl Flights {
    /// The answer that holds, or that of the exchange under way, or of a new one. If
    /// who began an exchange goes away, another of those who wait begins it anew.
    pub async fn get<F: Future<Output = Told>>(
        &self,
        key: Key,
        exchange: impl FnOnce() -> F,
    ) -> Introspected {
        let waiting = {
            let mut under_way = self.lock();
            // Under the lock: what has just come is in one of both places.
            if let Some(told) = self.answers.get(&key)
                && told.until > Instant::now()
            {
                return told.result;
            }
            Waiting {
                flights: self,
                key,
                flight: Some(under_way.entry(key).or_default().clone()),
            }
        };
        let flight = waiting.flight.as_ref().expect("taken when dropped only");
        let told = flight.get_or_init(exchange).await.clone();
        let mut under_way = self.lock();
        let own = |other: &Arc<OnceCell<Told>>| Arc::ptr_eq(other, flight);
        if under_way.get(&key).is_some_and(own) {
            under_way.remove(&key);
            self.answers.insert(key, told.clone());
        }
        drop(under_way);
        told.result
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Arc<OnceCell<Told>>>> {
        self.under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub fn under_way(&self) -> usize {
        self.lock().len()
    }
}

/// One who waits. With the last one the exchange is forgotten.
struct Waiting<'a> {
    flights: &'a Flights,
    key: Key,
    flight: Option<Arc<OnceCell<Told>>>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut under_way = self.flights.lock();
        // Within the lock, so that the count is that of the others.
        drop(self.flight.take());
        let alone = |flight: &Arc<OnceCell<Told>>| Arc::strong_count(flight) == 1;
        if under_way.get(&self.key).is_some_and(alone) {
            under_way.remove(&self.key);
        }
    }
}
