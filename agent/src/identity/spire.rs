//! The SPIRE agent of this node as the issuer, by its Delegated Identity API
//! (`spire.api.agent.delegatedidentity.v1`) over its admin socket: Postern is a delegate
//! (`authorized_delegates`), which asks for workloads by their selectors. SPIRE makes the
//! keys and hands them over: here they live in memory only, as all others do.
//!
//! Certificates and bundles are streams: SPIRE says by itself when there is another. A
//! stream that breaks is opened again, later each time. Fail closed: a certificate counts
//! if it names the identity that the mesh expects of the workload, and no other; what was
//! given before is used until it expires.

mod proto;
#[cfg(test)]
mod tests;
mod watch;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::sync::Notify;
use tonic::transport::Channel;
use zeroize::Zeroizing;

use super::{Bundle, IdentityError, JwtSvid, SpiffeId, Svid, TrustDomain, grpc, tokens::Tokens};
use crate::config::SpireAgent;
use proto::{Selector, TokensRequest, TokensResponse};
use watch::{Slot, Task, Trust};

const FETCH_TOKENS: &str = "/spire.api.agent.delegatedidentity.v1.DelegatedIdentity/FetchJWTSVIDs";
/// For a stream to open and say its first word, and for a call.
const LIMIT: Duration = Duration::from_secs(5);
/// Largest message, bytes.
const MAX_MESSAGE: usize = 4 << 20;
/// Pods of one account that it is asked for by, the latest: as many as a node may have.
const MOST_PODS: usize = 256;

pub struct Spire {
    agent: Arc<Agent>,
    accounts: Mutex<HashMap<SpiffeId, Account>>,
    trust: OnceLock<(Arc<Trust>, Task)>,
    tokens: Tokens,
}

/// What the tasks share.
struct Agent {
    socket: PathBuf,
    domain: TrustDomain,
    federated: Vec<TrustDomain>,
    /// Opened under the runtime that asks first.
    channel: OnceLock<Channel>,
    bundle: Arc<Bundle>,
    /// Told when there is something new.
    changed: Arc<Notify>,
}

/// A service account of this node.
#[derive(Default)]
struct Account {
    /// Its pods' UIDs, the latest last: SPIRE's entries may name them.
    pods: VecDeque<String>,
    watched: Option<(Arc<Slot>, Task)>,
}

impl Agent {
    fn channel(&self) -> Channel {
        let open = || grpc::unix_channel(self.socket.clone(), LIMIT);
        self.channel.get_or_init(open).clone()
    }
}

impl Spire {
    pub fn open(
        config: &crate::config::Config,
        spire: &SpireAgent,
        changed: Arc<Notify>,
    ) -> Result<Self, IdentityError> {
        let wrong = |why: &str| IdentityError::Config {
            key: "spire",
            why: why.into(),
        };
        if !spire.socket.is_absolute() {
            return Err(wrong("socket is not the absolute path of a socket"));
        }
        if spire.federated.contains(&config.trust_domain) {
            return Err(wrong("federated lists the mesh's own trust domain"));
        }
        let bundle = Bundle::new(Vec::new(), config.identity.bundle.clone())?;
        Ok(Self {
            agent: Arc::new(Agent {
                socket: spire.socket.clone(),
                domain: config.trust_domain.clone(),
                federated: spire.federated.clone(),
                channel: OnceLock::new(),
                bundle: Arc::new(bundle),
                changed,
            }),
            accounts: Mutex::default(),
            trust: OnceLock::new(),
            tokens: Tokens::default(),
        })
    }

    pub fn bundle(&self) -> &Arc<Bundle> {
        &self.agent.bundle
    }

    /// A pod of this account is on the node.
    pub fn pod(&self, id: &SpiffeId, uid: &str) {
        let mut accounts = self.accounts.lock().expect("no panic while it is held");
        let account = accounts.entry(id.clone()).or_default();
        if account.pods.iter().any(|known| known == uid) {
            return;
        }
        if account.pods.len() == MOST_PODS {
            account.pods.pop_front();
        }
        account.pods.push_back(uid.to_owned());
        // Asked for anew, by all of them: the entry of an earlier pod goes with it.
        if let Some((slot, task)) = &mut account.watched {
            *task = watch::svids(self.agent.clone(), id, selectors(id, &account.pods), slot);
        }
    }

    /// Forgets accounts that have no pod here any more.
    pub fn retain(&self, used: &HashSet<SpiffeId>) {
        let mut accounts = self.accounts.lock().expect("no panic while it is held");
        accounts.retain(|id, _| used.contains(id));
    }

    /// Whether SPIRE gave a certificate that was not taken yet.
    pub fn has_newer(&self, id: &SpiffeId) -> bool {
        let accounts = self.accounts.lock().expect("no panic while it is held");
        let watched = accounts
            .get(id)
            .and_then(|account| account.watched.as_ref());
        watched.is_some_and(|(slot, _)| slot.has_new())
    }

    /// Follows the bundles; the first time it waits for them.
    pub async fn keep(&self) -> Result<(), IdentityError> {
        let (trust, _task) = self.trust.get_or_init(|| {
            let trust = Arc::new(Trust::default());
            let task = watch::bundles(self.agent.clone(), &trust);
            (trust, task)
        });
        let said = tokio::time::timeout(LIMIT, trust.said()).await;
        said.unwrap_or_else(|_elapsed| Err("no bundle came".into()))
            .map_err(|why| IdentityError::Remote(format!("bundles: {why}")))
    }

    /// Whether there is a bundle to verify by.
    pub fn ready(&self) -> bool {
        self.agent.bundle.roots() > 0
    }

    /// The newest certificate of an account; waits for the first, or for another than
    /// was taken last.
    pub async fn issue(&self, id: &SpiffeId, now: SystemTime) -> Result<Svid, IdentityError> {
        let slot = {
            let mut accounts = self.accounts.lock().expect("no panic while it is held");
            let account = accounts.entry(id.clone()).or_default();
            let (slot, _task) = account.watched.get_or_insert_with(|| {
                let slot = Arc::new(Slot::default());
                let selectors = selectors(id, &account.pods);
                let task = watch::svids(self.agent.clone(), id, selectors, &slot);
                (slot, task)
            });
            slot.clone()
        };
        let failed = |why: String| IdentityError::Remote(format!("SPIRE: {why}"));
        let taken = tokio::time::timeout(LIMIT, slot.take()).await;
        let taken = taken.unwrap_or_else(|_elapsed| Err("no new certificate came".into()));
        let given = taken.map_err(failed)?;
        given
            .svid(id, &self.agent.bundle, now)
            .map_err(|why| failed(format!("its certificate cannot be used: {why}")))
    }

    /// A JWT-SVID, kept for most of its life.
    pub async fn jwt_svid(
        &self,
        id: &SpiffeId,
        audience: &str,
        now: SystemTime,
    ) -> Result<JwtSvid, IdentityError> {
        let ask = async || self.ask_token(id, audience).await;
        self.tokens.get(id, audience, now, ask).await
    }

    async fn ask_token(&self, id: &SpiffeId, audience: &str) -> Result<JwtSvid, IdentityError> {
        let selectors = {
            let accounts = self.accounts.lock().expect("no panic while it is held");
            match accounts.get(id) {
                Some(account) => selectors(id, &account.pods),
                None => return Err(IdentityError::Remote(format!("no pod of {id} is here"))),
            }
        };
        let request = TokensRequest {
            audience: vec![audience.to_owned()],
            selectors,
        };
        let request = tonic::Request::new(request);
        let channel = self.agent.channel();
        let failed = |why: String| IdentityError::Remote(format!("SPIRE: a JWT-SVID: {why}"));
        let answer: TokensResponse = grpc::call(channel, FETCH_TOKENS, request, MAX_MESSAGE, LIMIT)
            .await
            .map_err(|e| failed(e.to_string()))?;
        let name = id.to_string();
        let ours = |token: &proto::Token| token.id.as_ref().is_some_and(|i| i.to_string() == name);
        let token = answer.svids.into_iter().find(ours);
        let token = token.ok_or_else(|| failed(format!("none is for {id}")))?;
        let expires = u64::try_from(token.expires_at).unwrap_or_default();
        Ok(JwtSvid {
            token: Zeroizing::new(token.token),
            expires: UNIX_EPOCH + Duration::from_secs(expires),
        })
    }
}

/// What the Kubernetes workload attestor says of such pods. SPIRE gives what entries with
/// a part of these selectors name.
fn selectors(id: &SpiffeId, pods: &VecDeque<String>) -> Vec<Selector> {
    let selector = |value: String| Selector {
        kind: "k8s".into(),
        value,
    };
    let mut all = vec![
        selector(format!("ns:{}", id.namespace)),
        selector(format!("sa:{}", id.service_account)),
    ];
    all.extend(pods.iter().map(|uid| selector(format!("pod-uid:{uid}"))));
    all
}

impl std::fmt::Debug for Spire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spire")
            .field("socket", &self.agent.socket)
            .finish_non_exhaustive()
    }
}
