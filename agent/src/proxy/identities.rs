//! Certificates of the service accounts on this node: asked for by enrolment, made by
//! the issuer of this node, renewed at about half of their life.
//!
//! Fail closed: an account without a certificate has no pod in the mesh, and its pods'
//! connections are refused until it comes. One that cannot be renewed is used until it
//! expires; peers refuse it then.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant, SystemTime},
};

use futures_util::{StreamExt as _, stream};
use tokio::sync::Notify;

use crate::{
    config::Config,
    identity::{Backoff, Bundle, Credentials, IdentityError, Issuer, JwtSvid, SpiffeId},
};

/// Certificates that are asked for at once.
const AT_ONCE: usize = 8;
/// How long an account is kept that no pod uses: enrolment asks every few seconds.
const FORGET: Duration = Duration::from_secs(30);
const SOONEST: Duration = Duration::from_millis(100);
const LATEST: Duration = Duration::from_secs(60);

pub struct Identities {
    issuer: Issuer,
    pub bundle: Arc<Bundle>,
    accounts: Mutex<HashMap<SpiffeId, Account>>,
    /// Of attempts to join and to renew the agent's own certificate; with the last error.
    agent: Mutex<(Backoff, Option<String>)>,
    /// Told when there is something to make, or to keep an eye on.
    pub added: Arc<Notify>,
}

struct Account {
    /// `None` until the first is there.
    credentials: Option<Arc<Credentials>>,
    asked: Instant,
    backoff: Backoff,
    /// Of the last attempt.
    error: Option<String>,
}

/// What [`Identities::renew`] did.
pub struct Round {
    /// When it should be called again.
    pub next: Duration,
    /// Attempts that failed, by what they were for.
    pub failed: Vec<(String, String)>,
    /// What is wrong now, whether it was tried in this round or not.
    pub problem: Option<String>,
    /// An account has its first certificate: its pods can be enrolled.
    pub fresh: bool,
}

impl Identities {
    /// Opens what the configuration says. Nobody is asked yet.
    pub fn open(config: &Config, node: &str) -> Result<Self, IdentityError> {
        let added = Arc::new(Notify::new());
        let (issuer, bundle) = Issuer::open(config, node, &added)?;
        Ok(Self {
            issuer,
            bundle,
            accounts: Mutex::default(),
            agent: Mutex::default(),
            added,
        })
    }

    /// A JWT-SVID of an account of this node (SPIFFE JWT-SVID).
    pub async fn jwt_svid(&self, id: &SpiffeId, audience: &str) -> Result<JwtSvid, IdentityError> {
        self.issuer.jwt_svid(id, audience, SystemTime::now()).await
    }

    /// The public keys that this node's JWT-SVIDs are signed with; `None` where another
    /// signs and publishes.
    pub fn jwks(&self) -> Option<serde_json::Value> {
        self.issuer.jwks()
    }

    /// The credentials of an account, for a pod of it. The embedded issuer makes them at
    /// once; what others make is `None` until it is there, and asked for from now on.
    pub fn get(&self, id: &SpiffeId, pod: &str) -> Result<Option<Arc<Credentials>>, IdentityError> {
        let mut accounts = self.accounts.lock().expect("no panic while it is held");
        self.issuer.pod(id, pod);
        let account = accounts.entry(id.clone()).or_insert_with(|| {
            self.added.notify_one();
            Account {
                credentials: None,
                asked: Instant::now(),
                backoff: Backoff::default(),
                error: None,
            }
        });
        account.asked = Instant::now();
        if account.credentials.is_none()
            && let Some(svid) = self.issuer.at_once(id, SystemTime::now())
        {
            let credentials = Credentials::new(svid?, self.bundle.clone())?;
            account.credentials = Some(Arc::new(credentials));
        }
        Ok(account.credentials.clone())
    }

    /// All accounts, by name: what they have, and what the last attempt came to.
    pub fn list(&self) -> Vec<(SpiffeId, Option<Arc<Credentials>>, Option<String>)> {
        let accounts = self.accounts.lock().expect("no panic while it is held");
        let mut list: Vec<_> = accounts
            .iter()
            .map(|(id, account)| {
                (
                    id.clone(),
                    account.credentials.clone(),
                    account.error.clone(),
                )
            })
            .collect();
        list.sort_by_key(|(id, ..)| id.to_string());
        list
    }

    /// Why an account has no certificate yet.
    pub fn why_not(&self, id: &SpiffeId) -> Option<String> {
        let accounts = self.accounts.lock().expect("no panic while it is held");
        accounts.get(id)?.error.clone()
    }

    /// Makes what is asked for, renews what is due and forgets accounts that no pod
    /// uses any more. To be called by one task alone.
    pub async fn renew(&self, now: SystemTime) -> Round {
        let mut round = Round {
            next: LATEST,
            failed: Vec::new(),
            problem: None,
            fresh: false,
        };
        self.keep_issuer(now, &mut round).await;
        let due = self.due(now);
        let attempts: Vec<_> = stream::iter(due)
            .map(|id| async move {
                let svid = self.issuer.issue(&id, now).await;
                (id, svid)
            })
            .buffer_unordered(AT_ONCE)
            .collect()
            .await;
        let mut accounts = self.accounts.lock().expect("no panic while it is held");
        for (id, svid) in attempts {
            let Some(account) = accounts.get_mut(&id) else {
                continue;
            };
            let taken = svid.and_then(|svid| match &account.credentials {
                Some(credentials) => {
                    credentials.renew(svid)?;
                    tracing::debug!(%id, "certificate renewed");
                    Ok(())
                }
                None => {
                    let credentials = Credentials::new(svid, self.bundle.clone())?;
                    account.credentials = Some(Arc::new(credentials));
                    round.fresh = true;
                    Ok(())
                }
            });
            match taken {
                Ok(()) => {
                    account.backoff.succeeded();
                    account.error = None;
                }
                Err(error) => {
                    account.backoff.failed();
                    account.error = Some(error.to_string());
                    round.failed.push((id.to_string(), error.to_string()));
                }
            }
        }
        for (id, account) in accounts.iter() {
            if let Some(error) = &account.error {
                round
                    .problem
                    .get_or_insert_with(|| format!("{id}: {error}"));
            }
            let renewal = account.credentials.as_ref().map(|c| c.renew_at());
            let renewal = renewal.and_then(|at| at.duration_since(now).ok());
            let due = renewal.unwrap_or_default().max(account.backoff.left());
            round.next = round.next.min(due);
        }
        round.next = round.next.max(SOONEST);
        round
    }

    /// What the issuer itself needs.
    async fn keep_issuer(&self, now: SystemTime, round: &mut Round) {
        let (backoff, error) = self.agent().clone();
        if self.issuer.keeping_asks() && !backoff.left().is_zero() {
            round.next = round.next.min(backoff.left());
            round.problem = error;
            return;
        }
        let kept = self.issuer.keep(now).await;
        let about = self.issuer.name();
        let mut agent = self.agent();
        match kept {
            Ok(()) => *agent = Default::default(),
            Err(error) => {
                agent.0.failed();
                agent.1 = Some(format!("{about}: {error}"));
                round.problem = agent.1.clone();
                round.failed.push((about.to_owned(), error.to_string()));
            }
        }
        if let Some(due) = self.issuer.due(now) {
            round.next = round.next.min(due.max(agent.0.left()));
        }
    }

    /// The accounts whose certificate is to be made now.
    fn due(&self, now: SystemTime) -> Vec<SpiffeId> {
        let not_ready = self.issuer.not_ready(now);
        let mut accounts = self.accounts.lock().expect("no panic while it is held");
        accounts.retain(|_, account| {
            let used = account.credentials.as_ref();
            account.asked.elapsed() < FORGET || used.is_some_and(|c| Arc::strong_count(c) > 1)
        });
        self.issuer.retain(|| accounts.keys().cloned().collect());
        let due = |account: &Account| match &account.credentials {
            Some(credentials) => credentials.renew_at() <= now,
            None => true,
        };
        let mut wanted = Vec::new();
        for (id, account) in accounts.iter_mut() {
            let newer = self.issuer.has_newer(id);
            if !newer && !due(account) {
                continue;
            }
            if let Some(why) = not_ready {
                // Not its own fault: it is tried as soon as the issuer can be asked.
                account.error = Some(why.into());
            } else if newer || account.backoff.left().is_zero() {
                wanted.push(id.clone());
            }
        }
        wanted
    }

    fn agent(&self) -> MutexGuard<'_, (Backoff, Option<String>)> {
        self.agent.lock().expect("no panic while it is held")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        judge::Judge,
        jwt::{Expected, RemoteKeys, Token},
    };

    #[tokio::test]
    async fn the_own_jwt_svids_verify_without_a_word_of_configuration() {
        let state = tempfile::tempdir().expect("directory");
        let config = Config {
            state: state.path().to_owned(),
            ..Config::default()
        };
        let identities = Identities::open(&config, "node1").expect("opens");
        let id: SpiffeId = "spiffe://cluster.local/ns/a/sa/b".parse().expect("valid");
        let token = identities.jwt_svid(&id, "shop").await.expect("signed");
        // What a RequestAuthentication with this issuer and no `jwksUri` has.
        let keys = RemoteKeys::Discovery {
            issuer: "spiffe://cluster.local".into(),
            timeout: Duration::from_secs(5),
        };
        let judge = Judge::new(&config).expect("a judge");
        judge.keys.want([keys.clone()].into());
        let set = judge.keys.ready(&keys, Duration::from_secs(5)).await;
        let claims = Token::parse(&token.token).expect("a token").verify(
            Expected {
                issuer: Some("spiffe://cluster.local"),
                audiences: &["shop".into()],
                space_delimited: &[],
            },
            set.as_deref(),
            SystemTime::now(),
        );
        let claims = claims.expect("verifies");
        assert_eq!(claims.subject(), Some("spiffe://cluster.local/ns/a/sa/b"));
        assert!(identities.jwks().is_some());
    }

    #[tokio::test]
    async fn what_no_pod_uses_is_forgotten_and_what_one_uses_is_renewed() {
        let state = tempfile::tempdir().expect("directory");
        let config = Config {
            state: state.path().to_owned(),
            ..Config::default()
        };
        let identities = Identities::open(&config, "node1").expect("opens");
        let id = |name: &str| -> SpiffeId {
            let id = format!("spiffe://cluster.local/ns/a/sa/{name}");
            id.parse().expect("valid")
        };
        let used = identities
            .get(&id("used"), "u1")
            .expect("made")
            .expect("at once");
        identities
            .get(&id("left"), "u2")
            .expect("made")
            .expect("at once");
        let long_ago = Instant::now().checked_sub(FORGET);
        for account in identities.accounts.lock().expect("no panic").values_mut() {
            account.asked = long_ago.expect("the machine is up for longer");
        }
        let before = used.fingerprint();
        let round = identities.renew(used.renew_at()).await;
        assert!(round.problem.is_none() && !round.fresh);
        assert_ne!(used.fingerprint(), before);
        let accounts = identities.accounts.lock().expect("no panic");
        assert_eq!(accounts.keys().collect::<Vec<_>>(), [&id("used")]);
    }
}
