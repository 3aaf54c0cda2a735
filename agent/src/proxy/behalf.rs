//! On whose behalf a pod calls others: the users' tokens that requests brought it, by
//! the trace that they are of. In memory only, wiped when they go; bounded in number
//! and in time. What is not known for sure is not known.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant, SystemTime},
};

use zeroize::Zeroizing;

use crate::{jwt::Claims, trace::TraceId};

/// Traces of one pod at once. Who comes beyond that is not remembered: calls on
/// their behalf are refused.
const MOST: usize = 4_096;
/// What is done for a request may go on for a while after its answer.
const AFTERWARDS: Duration = Duration::from_secs(30);

/// One pod's.
#[derive(Clone, Default)]
pub struct Behalf(Arc<Mutex<HashMap<TraceId, Entry>>>);

struct Entry {
    user: User,
    /// Another user came with the same trace: whose calls are made is not known.
    ambiguous: bool,
    /// Requests of the trace that still run.
    running: u32,
    /// When the last of them ended.
    ended: Instant,
}

/// A user, and the token that came in.
#[derive(Clone)]
pub struct User {
    pub token: Arc<Zeroizing<String>>,
    pub subject: Option<String>,
    issuer: Option<String>,
    expires: Option<SystemTime>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unknown {
    #[error("no user's token came in with this trace")]
    Trace,
    #[error("tokens of two users came in with this trace")]
    Ambiguous,
}

/// A request of a trace, while it runs.
pub struct Remembered {
    behalf: Behalf,
    trace: TraceId,
}

impl User {
    pub fn new(token: Zeroizing<String>, claims: &Claims) -> Self {
        Self {
            token: Arc::new(token),
            subject: claims.subject().map(str::to_owned),
            issuer: claims.issuer().map(str::to_owned),
            expires: claims.expires(),
        }
    }

    fn is_same(&self, other: &Self) -> bool {
        match (&self.issuer, &self.subject) {
            (Some(_), Some(_)) => self.issuer == other.issuer && self.subject == other.subject,
            _ => self.token == other.token,
        }
    }

    fn is_over(&self, now: SystemTime) -> bool {
        self.expires.is_some_and(|at| at <= now)
    }
}

impl Entry {
    fn is_over(&self, now: (Instant, SystemTime)) -> bool {
        let left = self.running == 0 && now.0.duration_since(self.ended) >= AFTERWARDS;
        left || self.user.is_over(now.1)
    }
}

impl Behalf {
    fn entries(&self) -> MutexGuard<'_, HashMap<TraceId, Entry>> {
        self.0.lock().expect("no panic while it is held")
    }

    /// To be called when a request is let in; it is remembered while the result lives,
    /// and a while longer.
    pub fn remember(&self, trace: TraceId, user: User) -> Option<Remembered> {
        let now = (Instant::now(), SystemTime::now());
        let mut entries = self.entries();
        if let Some(entry) = entries.get_mut(&trace).filter(|entry| !entry.is_over(now)) {
            entry.ambiguous |= !entry.user.is_same(&user);
            entry.user = user;
            entry.running += 1;
        } else {
            if entries.len() >= MOST {
                entries.retain(|_, entry| !entry.is_over(now));
            }
            if entries.len() >= MOST {
                return None;
            }
            let entry = Entry {
                user,
                ambiguous: false,
                running: 1,
                ended: now.0,
            };
            entries.insert(trace, entry);
        }
        Some(Remembered {
            behalf: self.clone(),
            trace,
        })
    }

    /// Whose calls of this trace are.
    pub fn find(&self, trace: TraceId) -> Result<User, Unknown> {
        let now = (Instant::now(), SystemTime::now());
        let entries = self.entries();
        match entries.get(&trace).filter(|entry| !entry.is_over(now)) {
            None => Err(Unknown::Trace),
            Some(entry) if entry.ambiguous => Err(Unknown::Ambiguous),
            Some(entry) => Ok(entry.user.clone()),
        }
    }

    /// Wipes what is over. To be called now and then.
    pub fn sweep(&self) {
        let now = (Instant::now(), SystemTime::now());
        let mut entries = self.entries();
        entries.retain(|_, entry| !entry.is_over(now));
        if entries.is_empty() {
            entries.shrink_to_fit();
        }
    }
}

impl Drop for Remembered {
    fn drop(&mut self) {
        if let Some(entry) = self.behalf.entries().get_mut(&self.trace) {
            entry.running = entry.running.saturating_sub(1);
            entry.ended = Instant::now();
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn trace(n: u32) -> TraceId {
        TraceId::parse(format!("00-{n:032x}-b7ad6b7169203331-01").as_bytes()).expect("a trace")
    }

    fn user(name: &str, token: &str) -> User {
        let claims = Claims::of_test(json!({"iss": "i", "sub": name}), &[]);
        User::new(Zeroizing::new(token.into()), &claims)
    }

    #[test]
    fn a_trace_is_one_users_or_nobodys() {
        let behalf = Behalf::default();
        assert_eq!(behalf.find(trace(1)).err(), Some(Unknown::Trace));
        let first = behalf.remember(trace(1), user("alice", "a1"));
        // The same user with a newer token.
        let _second = behalf.remember(trace(1), user("alice", "a2"));
        drop(first);
        let found = behalf.find(trace(1)).expect("known");
        assert_eq!(
            (found.token.as_str(), found.subject.as_deref()),
            ("a2", Some("alice"))
        );
        let _mallory = behalf.remember(trace(1), user("mallory", "m"));
        assert_eq!(behalf.find(trace(1)).err(), Some(Unknown::Ambiguous));
        let _again = behalf.remember(trace(1), user("mallory", "m"));
        assert_eq!(behalf.find(trace(1)).err(), Some(Unknown::Ambiguous));
        assert_eq!(behalf.find(trace(2)).err(), Some(Unknown::Trace));
    }

    #[test]
    fn it_is_forgotten_after_its_time_and_never_more_than_so_many() {
        let behalf = Behalf::default();
        let held = behalf.remember(trace(1), user("alice", "a"));
        let back = |behalf: &Behalf| {
            for entry in behalf.entries().values_mut() {
                entry.ended = Instant::now()
                    .checked_sub(AFTERWARDS)
                    .expect("up for half a minute");
            }
        };
        back(&behalf);
        assert!(behalf.find(trace(1)).is_ok(), "it still runs");
        drop(held);
        assert!(behalf.find(trace(1)).is_ok(), "a while longer");
        back(&behalf);
        assert_eq!(behalf.find(trace(1)).err(), Some(Unknown::Trace));
        behalf.sweep();
        assert!(behalf.entries().is_empty());
        let mut late = user("bob", "b");
        late.expires = Some(SystemTime::now());
        let _held = behalf.remember(trace(2), late);
        assert_eq!(behalf.find(trace(2)).err(), Some(Unknown::Trace));
        let held: Vec<_> = (10..=9 + MOST as u32)
            .map(|n| behalf.remember(trace(n), user("alice", "a")))
            .collect();
        assert!(held.iter().all(Option::is_some));
        assert!(behalf.remember(trace(9), user("alice", "a")).is_none());
    }
}
