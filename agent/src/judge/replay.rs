//! DPoP proofs that were used (RFC 9449 11.1), as long as they could be used again.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use crate::jwt::ProofError;

/// Proofs that are kept in mind, some 20 MB: for proofs of this moment, 8000 a second.
const CAPACITY: usize = 1 << 19;

/// The first half of a SHA-256 will do: two proofs that share it are one too few.
type Id = [u8; 16];

/// Bounded. Full, it refuses: what it forgot too early could be used twice.
pub struct Replays {
    seen: Mutex<Seen>,
    capacity: usize,
}

#[derive(Default)]
struct Seen {
    /// The latest second that was seen. What could no longer be used then is forgotten,
    /// and refused: a request may have waited since its time was taken.
    latest: u64,
    ids: HashSet<Id>,
    /// By the last second in which they could be used.
    by_end: BTreeMap<u64, Vec<Id>>,
}

impl Default for Replays {
    fn default() -> Self {
        Self::new(CAPACITY)
    }
}

impl Replays {
    pub fn new(capacity: usize) -> Self {
        Self {
            seen: Mutex::default(),
            capacity,
        }
    }

    /// Notes the use of a proof that is taken until the end of the second `last`.
    pub fn first_use(
        &self,
        (id, last): ([u8; 32], u64),
        now: SystemTime,
    ) -> Result<(), ProofError> {
        let now = now.duration_since(UNIX_EPOCH).map_or(0, |n| n.as_secs());
        let id: Id = id[..16].try_into().expect("half of 32 bytes");
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let now = now.max(seen.latest);
        seen.latest = now;
        if last < now {
            return Err(ProofError::Time);
        }
        let kept = seen.by_end.split_off(&now);
        for old in std::mem::replace(&mut seen.by_end, kept)
            .into_values()
            .flatten()
        {
            seen.ids.remove(&old);
        }
        if seen.ids.contains(&id) {
            return Err(ProofError::Replayed);
        }
        if seen.ids.len() >= self.capacity {
            return Err(ProofError::TooMany);
        }
        seen.ids.insert(id);
        seen.by_end.entry(last).or_default().push(id);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_proof_is_used_once_and_a_full_memory_refuses_until_it_may_forget() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let replays = Replays::new(2);
        let (a, b, c) = (([1; 32], 110), ([2; 32], 120), ([3; 32], 120));
        assert_eq!(replays.first_use(a, at(100)), Ok(()));
        assert_eq!(replays.first_use(a, at(100)), Err(ProofError::Replayed));
        assert_eq!(replays.first_use(b, at(100)), Ok(()));
        assert_eq!(replays.first_use(c, at(100)), Err(ProofError::TooMany));
        // In its last second it could still be used.
        assert_eq!(replays.first_use(a, at(110)), Err(ProofError::Replayed));
        assert_eq!(replays.first_use(c, at(110)), Err(ProofError::TooMany));
        assert_eq!(replays.first_use(c, at(111)), Ok(()));
        assert_eq!(replays.first_use(b, at(120)), Err(ProofError::Replayed));
        // Forgotten by now, and judged with the time from before a wait.
        assert_eq!(replays.first_use(a, at(109)), Err(ProofError::Time));
    }
}
