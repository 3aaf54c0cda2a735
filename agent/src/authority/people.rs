//! People: their passwords, their sessions, and what keeps guessers away.
//!
//! `form -> limit (address) -> lockout (account) -> password -> session`. A wrong
//! password, an unknown name, a locked and a disabled account get the same answer after
//! the same work. Whatever cannot be decided, because the store or the processor is
//! busy, lets nobody in.

pub mod command;
pub mod form;
mod limit;
mod login;
mod logout;
pub mod password;
mod secret;
mod seen;
pub mod session;
mod store;

#[cfg(test)]
pub(super) mod kit;
#[cfg(test)]
mod tests;

use std::{collections::HashSet, sync::Arc, time::Duration};

use axum::{
    Router,
    routing::{get, post},
};
use tokio::sync::Semaphore;
use zeroize::Zeroizing;

use super::{Config, Server, Shared, StoreError, User, config::UserEntry, pages};
use crate::audit::AuthorityRecord;

pub use limit::{Limit, network};
pub use secret::{hash, random};
pub use seen::Seen;
pub(super) use store::TABLES;

/// How long a login waits for its turn to have the password hashed.
const TURN: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum PeopleError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the system has no randomness")]
    Randomness,
    #[error("too many passwords are being checked")]
    Busy,
    #[error("the password could not be checked: {0}")]
    Task(#[from] tokio::task::JoinError),
    #[error(transparent)]
    Password(#[from] password::PasswordError),
}

/// What logins share within this process.
pub struct People {
    limit: Limit,
    /// Passwords hashed at once: each takes a processor and 19 MiB.
    turns: Arc<Semaphore>,
    /// A hash that nobody's password has, for names that nobody has.
    nobody: Arc<str>,
}

/// A person with what a login is checked against.
pub(super) struct Account {
    pub user: User,
    pub password_hash: String,
    /// Kept in the store, where a better hash can take its place.
    pub stored: bool,
}

impl People {
    /// Refuses people of the configuration that could never log in.
    pub fn new(config: &Config) -> Result<Self, String> {
        let (mut ids, mut names) = (HashSet::new(), HashSet::new());
        for user in &config.users {
            let wrong = |what: &str| format!("users: `{}`: {what}", user.username);
            if !ids.insert(&user.id) {
                return Err(wrong(&format!("the id `{}` is another's too", user.id)));
            }
            if !names.insert(&user.username) {
                return Err(wrong("the username is another's too"));
            }
            password::check_hash(&user.password_hash).map_err(|e| wrong(&e.to_string()))?;
        }
        let random = random::<32>().map_err(|e| e.to_string())?;
        let processors = std::thread::available_parallelism().map_or(2, usize::from);
        Ok(Self {
            limit: Limit::new(config.people.attempts_per_minute.0),
            turns: Arc::new(Semaphore::new(processors)),
            nobody: password::hash(random.as_bytes())
                .map_err(|e| e.to_string())?
                .into(),
        })
    }

    /// Counts an attempt of this address; false where it had enough for this minute.
    fn admits(&self, seen: &Seen, now: u64) -> bool {
        self.limit.admits(seen.address, now)
    }
}

pub fn routes() -> Router<Shared> {
    Router::new()
        .route("/login", post(login::login))
        .route("/logout", get(logout::ask).post(logout::logout))
        .route("/style.css", get(pages::style))
}

impl Server {
    /// A person of the configuration or of the store, by `sub`.
    pub async fn user(&self, id: &str) -> Result<Option<User>, StoreError> {
        match self.config.users.iter().find(|u| u.id == id) {
            Some(entry) => Ok(Some(user_of(entry))),
            None => self.store.user(id).await,
        }
    }

    /// The store is asked in any case, so that time does not tell where a name is.
    async fn account(&self, username: &str) -> Result<Option<Account>, StoreError> {
        let stored = self.store.account(username).await?;
        let entry = self.config.users.iter().find(|u| u.username == username);
        let entry = entry.map(|entry| Account {
            user: user_of(entry),
            password_hash: entry.password_hash.clone(),
            stored: false,
        });
        Ok(entry.or(stored))
    }

    /// Whose name and password these are; `None` is all that a caller may tell where
    /// they are nobody's. Every attempt is counted before its password is looked at, so
    /// that parallel guesses have no more tries than others.
    pub(super) async fn authenticate(
        &self,
        username: &str,
        password: Zeroizing<String>,
        seen: &Seen,
    ) -> Result<Option<User>, PeopleError> {
        let turns = self.people.turns.clone();
        let turn = tokio::time::timeout(TURN, turns.acquire_owned())
            .await
            .ok()
            .and_then(Result::ok)
            .ok_or(PeopleError::Busy)?;
        let limits = &self.config.people;
        let (after, lockout) = (limits.lockout_after.0 as u64, limits.lockout.0.as_secs());
        let now = self.clock.seconds();
        let account = self.account(username).await?;
        let subject = account.as_ref().map(|a| a.user.id.clone());
        let (known, mut why) = match account {
            Some(account) if account.user.disabled => (None, "the account is disabled"),
            Some(account) => (Some(account), "wrong password"),
            None => (None, "no such user"),
        };
        let mut failures = None;
        if let Some(account) = &known {
            let attempt = self.store.attempt(&account.user.id, now, after, lockout);
            failures = attempt.await?;
            if failures.is_none() {
                why = "the account is locked";
            }
        }
        if failures.is_none() {
            // The same write, so that its time tells nothing.
            self.store.attempt("", now, i64::MAX as u64, 0).await?;
        }
        let candidate = known.filter(|_| failures.is_some());
        let against = match &candidate {
            Some(account) => account.password_hash.as_str().into(),
            None => self.people.nobody.clone(),
        };
        let (right, better) = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            let right = password::verify(&against, password.as_bytes());
            // Costs once what the next login saves in strength.
            let better = (right && password::is_outdated(&against))
                .then(|| password::hash(password.as_bytes()))
                .transpose();
            (right, better)
        })
        .await?;
        let Some(account) = candidate.filter(|_| right) else {
            self.told(seen.record("login", subject.as_deref(), why));
            if failures.is_some_and(|failures| failures >= after) {
                let why = format!("{after} wrong passwords in a row");
                self.told(seen.record("lockout", subject.as_deref(), &why));
            }
            return Ok(None);
        };
        self.store.forgive(&account.user.id).await?;
        if let (true, Some(better)) = (account.stored, better?) {
            let (id, old) = (&account.user.id, &account.password_hash);
            self.store.replace_hash(id, old, &better).await?;
        }
        Ok(Some(account.user))
    }
}

fn user_of(entry: &UserEntry) -> User {
    User {
        id: entry.id.clone(),
        username: entry.username.clone(),
        name: entry.name.clone(),
        email: entry.email.clone(),
        disabled: false,
    }
}

impl Seen {
    /// A record of this request.
    pub fn record(
        &self,
        event: &'static str,
        subject: Option<&str>,
        reason: &str,
    ) -> AuthorityRecord {
        AuthorityRecord {
            event,
            subject: subject.map(str::to_owned),
            reason: reason.to_owned(),
            address: Some(self.address),
            trace: self.trace.clone(),
            ..AuthorityRecord::default()
        }
    }
}
