//! Certificates of the service accounts on this node: asked for by enrolment, made by
//! the embedded issuer or `postern authority`, renewed at half of their life.
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
    identity::{
        Authority, Backoff, Bundle, Credentials, IdentityError, JwtIssuer, JwtSvid, Remote,
        SpiffeId, Svid,
    },
};

/// Certificates that are asked for at once.
const AT_ONCE: usize = 8;
/// How long an account is kept that no pod uses: enrolment asks every few seconds.
const FORGET: Duration = Duration::from_secs(30);
const SOONEST: Duration = Duration::from_millis(100);
const LATEST: Duration = Duration::from_secs(60);

/// Who signs.
pub enum Issuer {
    /// A root on this node.
    Embedded {
        authority: Box<Authority>,
        jwt: Box<JwtIssuer>,
    },
    /// `postern authority`.
    Remote(Box<Remote>),
}

pub struct Identities {
    issuer: Issuer,
    pub bundle: Arc<Bundle>,
    accounts: Mutex<HashMap<SpiffeId, Account>>,
    /// Of attempts to join and to renew the agent's own certificate; with the last error.
    agent: Mutex<(Backoff, Option<String>)>,
    /// Told when there is something to make, or to keep an eye on.
    pub added: Notify,
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
    /// Opens what the configuration says: the root, or what an earlier agent left of
    /// its place with the authority. Nobody is asked yet.
    pub fn open(config: &Config, node: &str) -> Result<Self, IdentityError> {
        let (issuer, bundle) = match Remote::open(config, node)? {
            Some(remote) => {
                let bundle = remote.bundle().clone();
                (Issuer::Remote(Box::new(remote)), bundle)
            }
            None => {
                let authority = Authority::open(config, node)?;
                let roots = vec![authority.root().certificate().clone()];
                let bundle = Bundle::new(roots, config.identity.bundle.clone())?;
                let jwt = JwtIssuer::new(
                    authority.root(),
                    &config.trust_domain,
                    config.jwt_issuer(),
                    config.jwks_file(),
                );
                jwt.publish(SystemTime::now())?;
                let issuer = Issuer::Embedded {
                    authority: Box::new(authority),
                    jwt: Box::new(jwt),
                };
                (issuer, Arc::new(bundle))
            }
        };
        Ok(Self {
            issuer,
            bundle,
            accounts: Mutex::default(),
            agent: Mutex::default(),
            added: Notify::new(),
        })
    }

    /// A JWT-SVID of an account of this node (SPIFFE JWT-SVID).
    pub async fn jwt_svid(&self, id: &SpiffeId, audience: &str) -> Result<JwtSvid, IdentityError> {
        let now = SystemTime::now();
        match &self.issuer {
            Issuer::Embedded { jwt, .. } => jwt.issue(id, audience, now),
            Issuer::Remote(remote) => remote.jwt_svid(id, audience, now).await,
        }
    }

    /// The public keys that this node's JWT-SVIDs are signed with; `None` where the
    /// authority signs and publishes.
    pub fn jwks(&self) -> Option<serde_json::Value> {
        match &self.issuer {
            Issuer::Embedded { jwt, .. } => jwt.jwks(SystemTime::now()).ok(),
            Issuer::Remote(_) => None,
        }
    }

    /// The account's credentials. The embedded issuer makes them at once; what the
    /// authority makes is `None` until it is there, and asked for from now on.
    pub fn get(&self, id: &SpiffeId) -> Result<Option<Arc<Credentials>>, IdentityError> {
        let mut accounts = self.accounts.lock().expect("no panic while it is held");
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
            && let Issuer::Embedded { authority, .. } = &self.issuer
        {
            let svid = authority.issue(id, SystemTime::now())?;
            let credentials = Credentials::new(svid, self.bundle.clone())?;
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
                let svid = self.issue(&id, now).await;
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
        let kept = match &self.issuer {
            Issuer::Embedded { jwt, .. } => jwt.publish(now).map_err(|e| ("jwks.json", e)),
            Issuer::Remote(remote) => {
                let (backoff, error) = self.agent().clone();
                if !backoff.left().is_zero() {
                    round.next = round.next.min(backoff.left());
                    round.problem = error;
                    return;
                }
                let kept = remote.keep(now).await;
                let mut agent = self.agent();
                match &kept {
                    Ok(()) => *agent = Default::default(),
                    Err(error) => {
                        agent.0.failed();
                        agent.1 = Some(format!("the authority: {error}"));
                    }
                }
                let wait = remote.due(now).max(agent.0.left());
                round.next = round.next.min(wait);
                kept.map_err(|e| ("the authority", e))
            }
        };
        if let Err((about, error)) = kept {
            round.problem = Some(format!("{about}: {error}"));
            round.failed.push((about.to_owned(), error.to_string()));
        }
    }

    /// The accounts whose certificate is to be made now.
    fn due(&self, now: SystemTime) -> Vec<SpiffeId> {
        let joined = match &self.issuer {
            Issuer::Embedded { .. } => true,
            Issuer::Remote(remote) => remote.joined(now),
        };
        let mut accounts = self.accounts.lock().expect("no panic while it is held");
        accounts.retain(|_, account| {
            let used = account.credentials.as_ref();
            account.asked.elapsed() < FORGET || used.is_some_and(|c| Arc::strong_count(c) > 1)
        });
        let due = |account: &Account| match &account.credentials {
            Some(credentials) => credentials.renew_at() <= now,
            None => true,
        };
        let mut wanted = Vec::new();
        for (id, account) in accounts.iter_mut().filter(|(_, account)| due(account)) {
            if !joined {
                // Not its own fault: it is tried as soon as the agent has joined.
                account.error = Some("the agent has not joined the authority".into());
            } else if account.backoff.left().is_zero() {
                wanted.push(id.clone());
            }
        }
        wanted
    }

    async fn issue(&self, id: &SpiffeId, now: SystemTime) -> Result<Svid, IdentityError> {
        match &self.issuer {
            Issuer::Embedded { authority, .. } => authority.issue(id, now),
            Issuer::Remote(remote) => remote.issue(id, now).await,
        }
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
        let used = identities.get(&id("used")).expect("made").expect("at once");
        identities.get(&id("left")).expect("made").expect("at once");
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
