//! One token's place: the token, the flight that fetches it, and what failed.

use std::{
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use aws_lc_rs::rand;
use http::HeaderValue;
use tokio::sync::watch;

use super::{super::GrantError, Issued};

pub(super) type Outcome = Result<Arc<Issued>, Arc<GrantError>>;
/// Tells the outcome once it is there.
pub(super) type Flight = watch::Receiver<Option<Outcome>>;

/// Pause after a first failure; twice as long after each that follows.
const PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

#[derive(Default)]
pub(super) struct Slot(Mutex<State>);

#[derive(Default)]
struct State {
    token: Option<Arc<Issued>>,
    flight: Option<Flight>,
    failed: Option<(Instant, Arc<GrantError>)>,
    failures: u32,
    /// The last token was refused by a destination.
    refused: bool,
}

/// What a caller finds.
pub(super) enum Take {
    Token(Arc<Issued>),
    Failed(Arc<GrantError>),
    Wait(Flight),
}

impl Slot {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no panic while it is held")
    }

    /// The token; or the flight to wait for, which is started if there is none. One is
    /// also started, and not waited for, when the token nears its end.
    pub fn take(&self, now: Instant, start: impl FnOnce() -> Flight) -> Take {
        let mut state = self.state();
        // A flight that ended without a word was cut off.
        if state
            .flight
            .as_ref()
            .is_some_and(|f| f.has_changed().is_err())
        {
            state.flight = None;
        }
        let pausing = (state.failed.as_ref()).filter(|(until, _)| now < *until);
        if let Some(token) = state.token.as_ref().filter(|t| now < t.expires) {
            let token = token.clone();
            if now >= token.refresh && pausing.is_none() && state.flight.is_none() {
                state.flight = Some(start());
            }
            return Take::Token(token);
        }
        if let Some((_, error)) = pausing {
            return Take::Failed(error.clone());
        }
        Take::Wait(state.flight.get_or_insert_with(start).clone())
    }

    /// Waits for a flight's outcome.
    pub async fn land(&self, mut flight: Flight) -> Outcome {
        let landed = flight.wait_for(Option::is_some).await;
        let outcome = landed.ok().and_then(|outcome| outcome.clone());
        outcome.unwrap_or_else(|| Err(Arc::new(GrantError::Ended)))
    }

    /// Takes what a flight brought.
    pub fn store(
        &self,
        brought: Result<(HeaderValue, Duration), GrantError>,
        now: Instant,
    ) -> Outcome {
        let mut state = self.state();
        state.flight = None;
        match brought {
            Ok((value, life)) => {
                // It must not end on its way.
                let usable = life - (life / 10).min(Duration::from_secs(10));
                let issued = Arc::new(Issued {
                    value,
                    expires: now + usable,
                    refresh: now + usable.mul_f64(0.75 + 0.1 * random()),
                    second: std::mem::take(&mut state.refused),
                });
                state.token = Some(issued.clone());
                state.failed = None;
                state.failures = 0;
                Ok(issued)
            }
            Err(error) => {
                let error = Arc::new(error);
                let pause = PAUSE * 2_u32.pow(state.failures.min(10));
                let pause = pause.min(LONGEST_PAUSE).mul_f64(0.75 + 0.5 * random());
                state.failures = state.failures.saturating_add(1);
                state.failed = Some((now + pause, error.clone()));
                Err(error)
            }
        }
    }

    pub fn refused(&self, issued: &Arc<Issued>) {
        let mut state = self.state();
        if !issued.second && state.token.as_ref().is_some_and(|t| Arc::ptr_eq(t, issued)) {
            state.token = None;
            state.refused = true;
        }
    }

    pub fn wipe(&self, now: Instant) {
        let mut state = self.state();
        if state.token.as_ref().is_some_and(|t| now >= t.expires) {
            state.token = None;
        }
    }
}

/// From 0 to 1: so that agents do not come all at once.
fn random() -> f64 {
    let mut byte = [0; 1];
    match rand::fill(&mut byte) {
        Ok(()) => f64::from(byte[0]) / 255.0,
        Err(_no_randomness) => 0.5,
    }
}
