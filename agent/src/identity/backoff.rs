//! Waits between attempts: doubled with each failure, up to a bound, and never the same
//! for two agents that failed together.

use std::{
    hash::{BuildHasher as _, RandomState},
    time::{Duration, Instant},
};

const FIRST: Duration = Duration::from_millis(250);
const LONGEST: Duration = Duration::from_secs(30);

#[derive(Clone, Copy, Debug, Default)]
pub struct Backoff {
    failures: u32,
    until: Option<Instant>,
}

impl Backoff {
    pub fn failed(&mut self) {
        self.failures = self.failures.saturating_add(1);
        self.until = Some(Instant::now() + wait(self.failures));
    }

    pub fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// How long it is not to be tried yet.
    pub fn left(&self) -> Duration {
        let left = |until: Instant| until.saturating_duration_since(Instant::now());
        self.until.map(left).unwrap_or_default()
    }
}

fn wait(failures: u32) -> Duration {
    let doubled = 1_u32 << failures.saturating_sub(1).min(16);
    let whole = FIRST.saturating_mul(doubled).min(LONGEST);
    // Hashers are seeded at random.
    let random = RandomState::new().hash_one(()) >> 11;
    whole.mul_f64(0.5 + 0.5 * (random as f64 / (1_u64 << 53) as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_a_bound() {
        for (failures, longest) in [
            (1, 250),
            (2, 500),
            (7, 16_000),
            (8, 30_000),
            (u32::MAX, 30_000),
        ] {
            let (wait, longest) = (wait(failures), Duration::from_millis(longest));
            assert!(
                (longest / 2..=longest).contains(&wait),
                "{failures}: {wait:?}"
            );
        }
        let mut backoff = Backoff::default();
        assert_eq!(backoff.left(), Duration::ZERO);
        backoff.failed();
        assert!(backoff.left() > Duration::ZERO);
        backoff.succeeded();
        assert_eq!(backoff.left(), Duration::ZERO);
    }
}
