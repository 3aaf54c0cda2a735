//! JWT-SVIDs that others sign, kept for most of their life. Who asks for the same one
//! at the same time waits for one exchange.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime},
};

use super::{IdentityError, JwtSvid, SpiffeId};

/// Tokens that are kept; what is expired goes when there are more.
const MOST: usize = 4096;
/// For how long a failure answers those that come after: an authority that is away
/// does not make them queue.
const FAILED_FOR: Duration = Duration::from_secs(1);

type Key = (SpiffeId, String);

#[derive(Default)]
pub struct Tokens(Mutex<HashMap<Key, Arc<Slot>>>);

#[derive(Default)]
struct Slot(tokio::sync::Mutex<State>);

#[derive(Default)]
struct State {
    /// With the time from which another is asked for.
    token: Option<(JwtSvid, SystemTime)>,
    failed: Option<(Instant, String)>,
}

impl Tokens {
    pub async fn get(
        &self,
        id: &SpiffeId,
        audience: &str,
        now: SystemTime,
        ask: impl AsyncFnOnce() -> Result<JwtSvid, IdentityError>,
    ) -> Result<JwtSvid, IdentityError> {
        let slot = self.slot((id.clone(), audience.to_owned()), now)?;
        let mut state = slot.0.lock().await;
        if let Some((token, renew_at)) = &state.token
            && now < *renew_at
        {
            return Ok(token.clone());
        }
        let recent = |(at, _): &&(Instant, String)| at.elapsed() < FAILED_FOR;
        let error = match state.failed.as_ref().filter(recent) {
            Some((_, error)) => error.clone(),
            None => match ask().await {
                Ok(token) => {
                    let life = token.expires.duration_since(now).unwrap_or_default();
                    state.token = Some((token.clone(), now + life.mul_f64(0.8)));
                    state.failed = None;
                    return Ok(token);
                }
                Err(error) => {
                    let error = error.to_string();
                    state.failed = Some((Instant::now(), error.clone()));
                    error
                }
            },
        };
        // The one before is good until it expires.
        match &state.token {
            Some((token, _)) if now < token.expires => Ok(token.clone()),
            _ => Err(IdentityError::Remote(error)),
        }
    }

    fn slot(&self, key: Key, now: SystemTime) -> Result<Arc<Slot>, IdentityError> {
        let mut slots = self.0.lock().expect("no panic while it is held");
        if slots.len() >= MOST && !slots.contains_key(&key) {
            // In use, or still good.
            slots.retain(|_, slot| match slot.0.try_lock() {
                Ok(state) => state.token.as_ref().is_some_and(|(t, _)| now < t.expires),
                Err(_in_use) => true,
            });
            if slots.len() >= MOST {
                let why = format!("{MOST} JWT-SVIDs are in use; no more are asked for");
                return Err(IdentityError::Remote(why));
            }
        }
        Ok(slots.entry(key).or_default().clone())
    }
}
