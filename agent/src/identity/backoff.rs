//! Waits between attempts: doubled with each failure, up to a bound, and never the same
//! for two agents that failed together.

use std::{
    hash::{BuildHasher as _, RandomState},
    time::{Duration, Instant, SystemTime},
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

/// From 0 to 1, never the same for two agents.
pub(super) fn random() -> f64 {
    // Hashers are seeded at random.
    let bits = RandomState::new().hash_one(()) >> 11;
    bits as f64 / (1_u64 << 53) as f64
}

/// When what was made then should be made anew: at half of its life, or up to a tenth of
/// it before, so that a hundred nodes that started together do not come together.
pub(super) fn renewal(made: SystemTime, not_after: SystemTime) -> SystemTime {
    let life = not_after.duration_since(made).unwrap_or_default();
    made + life.mul_f64(0.5 - 0.1 * random())
}

fn wait(failures: u32) -> Duration {
    let doubled = 1_u32 << failures.saturating_sub(1).min(16);
    let whole = FIRST.saturating_mul(doubled).min(LONGEST);
    whole.mul_f64(0.5 + 0.5 * random())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewals_are_spread_over_a_tenth_of_the_life() {
        let made = SystemTime::UNIX_EPOCH;
        let hours = |n: u64| Duration::from_secs(n * 3600);
        let due: std::collections::BTreeSet<_> =
            (0..100).map(|_| renewal(made, made + hours(100))).collect();
        let within = made + hours(40)..=made + hours(50);
        assert!(due.iter().all(|at| within.contains(at)), "{due:?}");
        assert!(due.len() > 90, "{due:?}");
        // What expires before it is made is due at once.
        assert_eq!(renewal(made + hours(1), made), made + hours(1));
    }

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
