//! The streams: one for the bundles, one for each account's certificates.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::SystemTime,
};

use rustls::{
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
    sign::CertifiedKey,
};
use tokio::sync::Notify;
use zeroize::Zeroizing;

use super::{
    Agent, LIMIT, MAX_MESSAGE,
    proto::{BundlesRequest, BundlesResponse, Selector, SvidsRequest, SvidsResponse},
};
use crate::identity::{Backoff, Bundle, SpiffeId, Svid, TrustDomain, grpc, issued, tls::PROVIDER};

const SVIDS: &str = "/spire.api.agent.delegatedidentity.v1.DelegatedIdentity/SubscribeToX509SVIDs";
const BUNDLES: &str =
    "/spire.api.agent.delegatedidentity.v1.DelegatedIdentity/SubscribeToX509Bundles";
/// Certificates of one trust domain.
const MOST_ROOTS: usize = 64;

/// Ends when it is dropped.
pub struct Task(tokio::task::JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A certificate and its key, as SPIRE gave them.
#[derive(Clone)]
pub struct Given {
    chain: Vec<CertificateDer<'static>>,
    key: Zeroizing<Vec<u8>>,
}

/// What the stream of an account said last.
#[derive(Default)]
pub struct Slot {
    state: Mutex<State>,
    told: Notify,
}

#[derive(Default)]
struct State {
    new: Option<Given>,
    /// The leaf that was taken last: after a reconnect it comes again.
    taken: Option<CertificateDer<'static>>,
    error: Option<String>,
}

/// What the stream of bundles said last.
#[derive(Default)]
pub struct Trust {
    /// `None`: nothing yet.
    state: Mutex<Option<Result<(), String>>>,
    told: Notify,
}

impl Given {
    /// Checked, as all that is handed out.
    pub fn svid(self, id: &SpiffeId, bundle: &Bundle, now: SystemTime) -> Result<Svid, String> {
        issued::usable(&self.chain, id, bundle, now)?;
        let key = || PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.to_vec()));
        let signing = PROVIDER.key_provider.load_private_key(key());
        // The parser's own error could quote the key.
        let signing = signing.map_err(|_could_quote_it| "its key cannot be used")?;
        let matches = CertifiedKey::new(self.chain.clone(), signing).keys_match();
        matches.map_err(|_other| "it is for another key")?;
        let (made, not_after) = issued::validity(&self.chain[0]).ok_or("it has no dates")?;
        let life = not_after.duration_since(made).unwrap_or_default();
        Ok(Svid {
            id: id.clone(),
            key: key(),
            chain: self.chain,
            not_after,
            // SPIRE renews by itself at about a half; that it did not is told by then.
            renew_at: made + life.mul_f64(2.0 / 3.0),
        })
    }
}

impl Slot {
    pub fn has_new(&self) -> bool {
        self.state().new.is_some()
    }

    /// What was not taken yet, once there is something to say.
    pub async fn take(&self) -> Result<Given, String> {
        loop {
            let told = self.told.notified();
            {
                let mut state = self.state();
                if let Some(given) = state.new.take() {
                    state.taken = given.chain.first().cloned();
                    return Ok(given);
                }
                if let Some(error) = &state.error {
                    return Err(error.clone());
                }
            }
            told.await;
        }
    }

    fn say(&self, said: Result<Given, String>) -> bool {
        let mut state = self.state();
        let fresh = match said {
            Ok(given) => {
                state.error = None;
                let fresh = state.taken.as_ref() != given.chain.first();
                state.new = fresh.then_some(given);
                fresh
            }
            Err(error) => {
                state.error = Some(error);
                false
            }
        };
        drop(state);
        self.told.notify_waiters();
        fresh
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no panic while it is held")
    }
}

impl Trust {
    pub async fn said(&self) -> Result<(), String> {
        loop {
            let told = self.told.notified();
            let said = self
                .state
                .lock()
                .expect("no panic while it is held")
                .clone();
            if let Some(said) = said {
                return said;
            }
            told.await;
        }
    }

    fn say(&self, said: Result<(), String>) {
        *self.state.lock().expect("no panic while it is held") = Some(said);
        self.told.notify_waiters();
    }
}

/// Keeps an account's slot.
pub fn svids(agent: Arc<Agent>, id: &SpiffeId, selectors: Vec<Selector>, slot: &Arc<Slot>) -> Task {
    let (id, slot) = (id.clone(), slot.clone());
    Task(tokio::spawn(async move {
        let mut backoff = Backoff::default();
        loop {
            let request = SvidsRequest {
                selectors: selectors.clone(),
            };
            let stream = grpc::subscribe(agent.channel(), SVIDS, request, MAX_MESSAGE, LIMIT).await;
            let why = match stream {
                Err(error) => error.to_string(),
                Ok(mut stream) => loop {
                    match stream.message().await {
                        Ok(Some(message)) => {
                            backoff.succeeded();
                            if slot.say(chosen(message, &id)) {
                                agent.changed.notify_one();
                            }
                        }
                        Ok(None) => break "the stream has ended".to_owned(),
                        Err(status) => break grpc::GrpcError::from(status).to_string(),
                    }
                },
            };
            slot.say(Err(format!("{}: {why}", agent.socket.display())));
            backoff.failed();
            tokio::time::sleep(backoff.left()).await;
        }
    }))
}

/// The one that is for this identity. SPIRE gives one for each entry that matches: those
/// for others are what the workload may be elsewhere, and nothing to this mesh.
fn chosen(message: SvidsResponse, id: &SpiffeId) -> Result<Given, String> {
    let name = id.to_string();
    let mut others = Vec::new();
    let mut best = None;
    for svid in message.x509_svids {
        let key = Zeroizing::new(svid.x509_svid_key);
        let Some(svid) = svid.x509_svid else { continue };
        let of = svid.id.map(|id| id.to_string()).unwrap_or_default();
        if of != name {
            others.push(of);
            continue;
        }
        let later = best.as_ref().is_none_or(|(at, _)| *at < svid.expires_at);
        if later {
            let chain = svid.cert_chain.into_iter().map(CertificateDer::from);
            let given = Given {
                chain: chain.collect(),
                key,
            };
            best = Some((svid.expires_at, given));
        }
    }
    if let Some((_, given)) = best {
        return Ok(given);
    }
    if others.is_empty() {
        return Err(format!("no registration entry gives {id} to such a pod"));
    }
    others.truncate(4);
    let others: String = others
        .join(", ")
        .chars()
        .filter(|c| !c.is_control())
        .take(300)
        .collect();
    Err(format!("the mesh expects {id}, and SPIRE gives {others}"))
}

/// Keeps the bundle.
pub fn bundles(agent: Arc<Agent>, trust: &Arc<Trust>) -> Task {
    let trust = trust.clone();
    Task(tokio::spawn(async move {
        let mut backoff = Backoff::default();
        loop {
            let stream = grpc::subscribe(
                agent.channel(),
                BUNDLES,
                BundlesRequest {},
                MAX_MESSAGE,
                LIMIT,
            )
            .await;
            let why = match stream {
                Err(error) => error.to_string(),
                Ok(mut stream) => loop {
                    match stream.message().await {
                        Ok(Some(message)) => {
                            backoff.succeeded();
                            trust.say(take(&agent, message));
                            agent.changed.notify_one();
                        }
                        Ok(None) => break "the stream has ended".to_owned(),
                        Err(status) => break grpc::GrpcError::from(status).to_string(),
                    }
                },
            };
            trust.say(Err(format!("{}: {why}", agent.socket.display())));
            agent.changed.notify_one();
            backoff.failed();
            tokio::time::sleep(backoff.left()).await;
        }
    }))
}

/// An answer without the mesh's own trust domain would trust nobody: a mistake, not an
/// order. The last good bundles stay.
fn take(agent: &Agent, message: BundlesResponse) -> Result<(), String> {
    let mut own = Vec::new();
    let mut federated = HashMap::new();
    for (name, der) in message.ca_certificates {
        let name = name.strip_prefix("spiffe://").unwrap_or(&name);
        let Ok(domain) = TrustDomain::try_from(name.trim_end_matches('/').to_owned()) else {
            return Err("a bundle of no trust domain".into());
        };
        if domain == agent.domain {
            own = certificates(&der)?;
        } else if agent.federated.contains(&domain) {
            federated.insert(domain, certificates(&der)?);
        }
    }
    if own.is_empty() {
        return Err(format!("there is none of {}", agent.domain));
    }
    for missing in agent
        .federated
        .iter()
        .filter(|d| !federated.contains_key(*d))
    {
        tracing::warn!(domain = %missing, "SPIRE federates with no such trust domain: its peers are refused");
    }
    // Without a bundle of its own, a federated domain must not fall to the mesh's.
    for domain in &agent.federated {
        federated.entry(domain.clone()).or_default();
    }
    let replaced = agent.bundle.replace_all(own, federated);
    replaced.map_err(|e| e.to_string())
}

/// Certificates in DER, one after the other.
fn certificates(mut der: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let mut all = Vec::new();
    while !der.is_empty() {
        let parsed = x509_parser::parse_x509_certificate(der);
        let (rest, _) = parsed.map_err(|e| format!("a bundle cannot be read: {e}"))?;
        let one = &der[..der.len() - rest.len()];
        all.push(CertificateDer::from(one.to_vec()));
        if all.len() > MOST_ROOTS {
            return Err(format!("a bundle has more than {MOST_ROOTS} roots"));
        }
        der = rest;
    }
    Ok(all)
}
