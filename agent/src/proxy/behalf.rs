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

/// Users' traces of one pod at once. Who comes beyond that is not remembered: calls on
/// their behalf are refused.
const MOST: usize = 4_096;
/// Traces of requests without a user. Beyond that no call is on anybody's behalf, for
/// as long as one that was not noted could matter.
const NOBODYS: usize = 65_536;
/// What is done for a request may go on for a while after its answer.
const AFTERWARDS: Duration = Duration::from_secs(30);

/// One pod's.
#[derive(Clone, Default)]
pub struct Behalf(Arc<Mutex<Traces>>);

#[derive(Default)]
struct Traces {
    entries: HashMap<TraceId, Entry>,
    /// How many of them are users'.
    users: usize,
    /// Until then requests may run whose traces were not noted.
    blind: Option<Instant>,
}

/// It stands while requests of the trace run and for a while after, also when its
/// user's token is over: who else came with the trace is not forgotten before.
struct Entry {
    /// `None`: a request without a user's token came first.
    user: Option<User>,
    /// Another user, or nobody known, came with the same trace: whose calls are made is
    /// not known. A trace's id is no secret.
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
    /// The client that it was made for, and what it may do: one user's tokens differ.
    rights: Vec<String>,
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
            rights: rights(claims),
            expires: claims.expires(),
        }
    }

    fn is_same(&self, other: &Self) -> bool {
        match (&self.issuer, &self.subject) {
            (Some(_), Some(_)) => {
                self.issuer == other.issuer
                    && self.subject == other.subject
                    && self.rights == other.rights
            }
            _ => self.token == other.token,
        }
    }

    fn is_over(&self, now: SystemTime) -> bool {
        self.expires.is_some_and(|at| at <= now)
    }
}

fn rights(claims: &Claims) -> Vec<String> {
    let words = |name: &str| {
        let mut words: Vec<String> = (claims.values(&[name.to_owned()]).into_iter())
            .map(|word| format!("{name} {word}"))
            .collect();
        words.sort_unstable();
        words
    };
    ["azp", "client_id", "scope", "scp"]
        .into_iter()
        .flat_map(words)
        .collect()
}

impl Entry {
    fn is_over(&self, now: Instant) -> bool {
        self.running == 0 && now.duration_since(self.ended) >= AFTERWARDS
    }
}

impl Traces {
    fn clean(&mut self, now: Instant) {
        self.entries.retain(|_, entry| !entry.is_over(now));
        self.users = (self.entries.values())
            .filter(|entry| entry.user.is_some())
            .count();
    }

    /// Whether there is room for another entry.
    fn has_room(&mut self, of_user: bool, now: Instant) -> bool {
        let full = |this: &Self| match of_user {
            true => this.users >= MOST,
            false => this.entries.len() - this.users >= NOBODYS,
        };
        if full(self) {
            self.clean(now);
        }
        !full(self)
    }
}

impl Behalf {
    fn traces(&self) -> MutexGuard<'_, Traces> {
        self.0.lock().expect("no panic while it is held")
    }

    /// To be called when a request is let in, with its user where that is known; it is
    /// remembered while the result lives, and a while longer.
    pub fn remember(&self, trace: TraceId, user: Option<User>) -> Option<Remembered> {
        let now = Instant::now();
        let mut traces = self.traces();
        if let Some(entry) = (traces.entries.get_mut(&trace)).filter(|e| !e.is_over(now)) {
            entry.ambiguous |= match (&entry.user, &user) {
                (Some(known), Some(user)) => !known.is_same(user),
                _ => true,
            };
            if entry.user.is_some() && user.is_some() {
                entry.user = user;
            }
            entry.running += 1;
        } else {
            if !traces.has_room(user.is_some(), now) {
                if user.is_none() {
                    traces.blind = Some(now + AFTERWARDS);
                }
                return None;
            }
            let entry = Entry {
                ambiguous: user.is_none(),
                user,
                running: 1,
                ended: now,
            };
            let is_user = entry.user.is_some();
            let old = traces.entries.insert(trace, entry);
            traces.users += usize::from(is_user);
            traces.users -= usize::from(old.is_some_and(|old| old.user.is_some()));
        }
        Some(Remembered {
            behalf: self.clone(),
            trace,
        })
    }

    /// Whose calls of this trace are.
    pub fn find(&self, trace: TraceId) -> Result<User, Unknown> {
        let now = Instant::now();
        let traces = self.traces();
        if traces.blind.is_some_and(|until| now < until) {
            return Err(Unknown::Ambiguous);
        }
        let entry = traces.entries.get(&trace).filter(|e| !e.is_over(now));
        let entry = entry.ok_or(Unknown::Trace)?;
        match &entry.user {
            _ if entry.ambiguous => Err(Unknown::Ambiguous),
            Some(user) if !user.is_over(SystemTime::now()) => Ok(user.clone()),
            _ => Err(Unknown::Trace),
        }
    }

    /// Wipes what is over. To be called now and then.
    pub fn sweep(&self) {
        let (now, time) = (Instant::now(), SystemTime::now());
        let mut traces = self.traces();
        traces.clean(now);
        for user in traces.entries.values_mut().filter_map(|e| e.user.as_mut()) {
            if user.is_over(time) {
                user.token = Arc::default();
            }
        }
        if traces.entries.is_empty() {
            traces.entries.shrink_to_fit();
        }
    }
}

impl Drop for Remembered {
    fn drop(&mut self) {
        if let Some(entry) = self.behalf.traces().entries.get_mut(&self.trace) {
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
        let first = behalf.remember(trace(1), Some(user("alice", "a1")));
        // The same user with a newer token.
        let _second = behalf.remember(trace(1), Some(user("alice", "a2")));
        drop(first);
        let found = behalf.find(trace(1)).expect("known");
        assert_eq!(
            (found.token.as_str(), found.subject.as_deref()),
            ("a2", Some("alice"))
        );
        let _mallory = behalf.remember(trace(1), Some(user("mallory", "m")));
        assert_eq!(behalf.find(trace(1)).err(), Some(Unknown::Ambiguous));
        let _again = behalf.remember(trace(1), Some(user("mallory", "m")));
        assert_eq!(behalf.find(trace(1)).err(), Some(Unknown::Ambiguous));
        assert_eq!(behalf.find(trace(2)).err(), Some(Unknown::Trace));
    }

    /// A trace's id is known to whoever was called with it.
    #[test]
    fn who_comes_without_a_user_makes_a_trace_nobodys() {
        let behalf = Behalf::default();
        let _alice = behalf.remember(trace(1), Some(user("alice", "a")));
        let _nobody = behalf.remember(trace(1), None);
        assert_eq!(behalf.find(trace(1)).err(), Some(Unknown::Ambiguous));
        let _nobody = behalf.remember(trace(2), None);
        let _alice = behalf.remember(trace(2), Some(user("alice", "a")));
        assert_eq!(behalf.find(trace(2)).err(), Some(Unknown::Ambiguous));
        // One user, two clients.
        let claims = |client: &str| {
            let claims = json!({"iss": "i", "sub": "alice", "client_id": client, "scope": "a b"});
            User::new(Zeroizing::new(client.into()), &Claims::of_test(claims, &[]))
        };
        let _first = behalf.remember(trace(3), Some(claims("one")));
        assert!(behalf.find(trace(3)).is_ok());
        let _second = behalf.remember(trace(3), Some(claims("two")));
        assert_eq!(behalf.find(trace(3)).err(), Some(Unknown::Ambiguous));
    }

    /// Else the next who comes with the trace would have it to himself, while others
    /// of it still run.
    #[test]
    fn a_token_that_ends_does_not_end_what_is_known_of_its_trace() {
        let behalf = Behalf::default();
        let mut mallory = user("mallory", "m");
        mallory.expires = Some(SystemTime::now());
        let _runs_on = behalf.remember(trace(1), Some(mallory));
        behalf.sweep();
        let _alice = behalf.remember(trace(1), Some(user("alice", "a")));
        assert_eq!(behalf.find(trace(1)).err(), Some(Unknown::Ambiguous));
    }

    #[test]
    fn it_is_forgotten_after_its_time_and_never_more_than_so_many() {
        let behalf = Behalf::default();
        let held = behalf.remember(trace(1), Some(user("alice", "a")));
        let back = |behalf: &Behalf| {
            for entry in behalf.traces().entries.values_mut() {
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
        assert!(behalf.traces().entries.is_empty());
        let mut late = user("bob", "b");
        late.expires = Some(SystemTime::now());
        let _held = behalf.remember(trace(2), Some(late));
        assert_eq!(behalf.find(trace(2)).err(), Some(Unknown::Trace));
        // That one counts while its request runs.
        let held: Vec<_> = (11..=9 + MOST as u32)
            .map(|n| behalf.remember(trace(n), Some(user("alice", "a"))))
            .collect();
        assert!(held.iter().all(Option::is_some));
        assert!(
            behalf
                .remember(trace(9), Some(user("alice", "a")))
                .is_none()
        );
    }
}
