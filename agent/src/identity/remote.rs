//! `postern authority` as the issuer: no key of the root is on this node. The agent
//! joins with a proof of which node it is, keeps the certificate that it gets in the
//! state directory, and has each workload's certificate signed for a key that is made
//! here and lives in memory only.
//!
//! What is handed out is checked before it is used: it must be for the key and the
//! name that were asked for, and end at a root of the bundle.

mod agent_key;

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use arc_swap::ArcSwap;
use http::{HeaderName, HeaderValue, StatusCode, header};
use rcgen::KeyPair;
use rustls::pki_types::CertificateDer;
use serde::{Serialize, de::DeserializeOwned};
use webpki::KeyUsage;
use zeroize::Zeroizing;

use super::{
    AgentId, Bundle, IdentityError, JwtSvid, SpiffeId, Svid,
    authority::write_new,
    backoff::random,
    issued, read_certificates,
    token_file::read_token,
    tokens::Tokens,
    wire::{
        self, BundleAnswer, CertificateAnswer, CertificateRequest, JoinRequest, RenewRequest,
        TokenAnswer, TokenRequest,
    },
};
use crate::{
    config::RemoteAuthority,
    fetch::{Fetcher, RootsError, Trust},
    oauth::private_file,
};
use agent_key::{AgentKey, Shown};

/// For each exchange with the authority.
const LIMIT: Duration = Duration::from_secs(10);
/// How often the roots are fetched, at most and where the authority says nothing.
const REFRESH: Duration = Duration::from_secs(300);

/// Gets certificates from `postern authority`.
pub struct Remote {
    /// Without a slash at its end.
    url: String,
    /// Of the authority's TLS certificate.
    tls_roots: Option<PathBuf>,
    fetchers: ArcSwap<Fetchers>,
    shown: Arc<Shown>,
    id: AgentId,
    proof: Proof,
    /// This agent's key and certificate.
    file: PathBuf,
    /// The trust domain's roots, for the next start.
    roots_file: PathBuf,
    bundle: Arc<Bundle>,
    roots_due: Mutex<Instant>,
    /// The authority no longer takes the agent's certificate.
    rejoin: AtomicBool,
    tokens: Tokens,
}

struct Fetchers {
    /// What the roots' file held when they were made.
    roots: Vec<u8>,
    /// To join: there is no certificate to show yet.
    plain: Fetcher,
    mutual: Fetcher,
}

/// How the agent proves which node it is. Files are read when they are needed: tokens
/// of service accounts are replaced as they expire.
enum Proof {
    JoinToken(PathBuf),
    ServiceAccount(PathBuf),
}

/// Why the authority gave nothing.
#[derive(Debug, thiserror::Error)]
enum CallError {
    #[error("{0}")]
    Unreachable(#[from] crate::fetch::FetchError),
    #[error("the authority refused {what}: {status}: {detail}")]
    Refused {
        what: &'static str,
        status: StatusCode,
        detail: String,
    },
    #[error("the authority's answer to {what} cannot be used: {why}")]
    Answer { what: &'static str, why: String },
}

impl From<CallError> for IdentityError {
    fn from(error: CallError) -> Self {
        Self::Remote(error.to_string())
    }
}

impl Remote {
    /// Opens what an earlier agent of this node left in the state directory; asks
    /// nobody yet.
    pub fn open(config: &crate::config::Config, node: &str) -> Result<Option<Self>, IdentityError> {
        let Some(authority) = &config.identity.authority else {
            return Ok(None);
        };
        let wrong = |why: String| IdentityError::Config {
            key: "authority",
            why,
        };
        if !authority.url.starts_with("https://") {
            return Err(wrong("url must be https".into()));
        }
        let proof = Proof::of(authority).map_err(wrong)?;
        let domain = &config.trust_domain;
        let id = AgentId::new(domain.clone(), node)
            .ok_or_else(|| wrong("node is no name that can stand in a SPIFFE ID".into()))?;
        let file = config.state.join("agent.pem");
        let roots_file = config.state.join("agent-roots.pem");
        let shown = Arc::new(Shown::default());
        let fetchers = Fetchers::open(authority.roots.as_deref(), &shown)
            .map_err(|e| wrong(format!("roots: {e}")))?;
        let mut roots = Vec::new();
        if file.exists() {
            let key = AgentKey::read(&file)?;
            if key.id() == Some(&id) {
                shown.set(key);
                // Another domain's would be no good here.
                if roots_file.exists() {
                    roots = read_certificates(&roots_file)?;
                }
            } else {
                tracing::warn!(file = %file.display(), %id, "is another agent's; joining anew");
            }
        }
        let bundle = Arc::new(Bundle::new(roots, config.identity.bundle.clone())?);
        Ok(Some(Self {
            url: authority.url.trim_end_matches('/').to_owned(),
            fetchers: ArcSwap::from_pointee(fetchers),
            tls_roots: authority.roots.clone(),
            shown,
            id,
            proof,
            file,
            roots_file,
            bundle,
            roots_due: Mutex::new(Instant::now()),
            rejoin: AtomicBool::new(false),
            tokens: Tokens::default(),
        }))
    }

    pub fn bundle(&self) -> &Arc<Bundle> {
        &self.bundle
    }

    /// Whether the agent has a certificate that the authority should take.
    pub fn joined(&self, now: SystemTime) -> bool {
        self.shown.get().is_some_and(|key| now < key.not_after())
    }

    /// Joins or renews where it is due, and fetches the roots. An error does not mean
    /// that nothing can be asked for: see [`Self::joined`].
    pub async fn keep(&self, now: SystemTime) -> Result<(), IdentityError> {
        self.follow_roots();
        match self.shown.get() {
            // If a proof is refused as well, the certificate is tried again next.
            Some(key) if now < key.not_after() && !self.rejoin.swap(false, Ordering::Relaxed) => {
                if key.renew_at() <= now {
                    self.renew(now).await?;
                }
            }
            _ => self.join(now).await?,
        }
        if *self.roots_due.lock().expect("no panic while it is held") <= Instant::now() {
            self.refresh_roots().await?;
        }
        Ok(())
    }

    /// Roots of the authority's TLS certificate are replaced under a running agent, as
    /// a ConfigMap is. What cannot be read leaves those that were read last.
    fn follow_roots(&self) {
        let Some(path) = &self.tls_roots else { return };
        let same = std::fs::read(path).is_ok_and(|now| now == self.fetchers.load().roots);
        if same {
            return;
        }
        match Fetchers::open(Some(path), &self.shown) {
            Ok(fetchers) => {
                tracing::info!(path = %path.display(), "roots of the authority read again");
                self.fetchers.store(Arc::new(fetchers));
            }
            Err(error) => tracing::warn!(%error, "roots of the authority; the last good stay"),
        }
    }

    /// When [`Self::keep`] has something to do, if nothing happens before.
    pub fn due(&self, now: SystemTime) -> Duration {
        let roots = *self.roots_due.lock().expect("no panic while it is held");
        let roots = roots.saturating_duration_since(Instant::now());
        let renewal = self.shown.get().map(|key| key.renew_at());
        let renewal = renewal.and_then(|at| at.duration_since(now).ok());
        roots.min(renewal.unwrap_or_default())
    }

    /// A certificate for a service account of this node, for a new key.
    pub async fn issue(&self, id: &SpiffeId, now: SystemTime) -> Result<Svid, IdentityError> {
        const WHAT: &str = "a certificate";
        let (key, csr) = issued::request(None)?;
        let body = CertificateRequest {
            csr,
            identity: id.to_string(),
        };
        let answer: CertificateAnswer = self.call(WHAT, "/v1/certificates", &body).await?;
        let chain = wire::decode(&answer.chain).map_err(|e| unusable(WHAT, e.to_string()))?;
        let svid = issued::svid(chain, &key, id, &self.bundle, now);
        Ok(svid.map_err(|why| unusable(WHAT, why))?)
    }

    /// A JWT-SVID, kept for most of its life.
    pub async fn jwt_svid(
        &self,
        id: &SpiffeId,
        audience: &str,
        now: SystemTime,
    ) -> Result<JwtSvid, IdentityError> {
        self.tokens
            .get(id, audience, now, || self.ask_token(id, audience, now))
            .await
    }

    async fn ask_token(
        &self,
        id: &SpiffeId,
        audience: &str,
        now: SystemTime,
    ) -> Result<JwtSvid, IdentityError> {
        if !self.joined(now) {
            return Err(IdentityError::Remote("the agent has not joined".into()));
        }
        let body = TokenRequest {
            identity: id.to_string(),
            audience: vec![audience.to_owned()],
        };
        let answer: TokenAnswer = self.call("a JWT-SVID", "/v1/jwt-svids", &body).await?;
        Ok(JwtSvid {
            token: Zeroizing::new(answer.token),
            expires: UNIX_EPOCH + Duration::from_secs(answer.expires),
        })
    }

    /// Shows the proof and gets this agent's own certificate.
    async fn join(&self, now: SystemTime) -> Result<(), IdentityError> {
        const WHAT: &str = "to join";
        let proof = self.proof.read()?;
        let (key, csr) = issued::request(None)?;
        let body = JoinRequest {
            node: self.id.node().to_owned(),
            csr,
        };
        let mut bearer = HeaderValue::from_bytes(&[b"Bearer ", proof.as_slice()].concat())
            .map_err(|_what_it_was| {
                IdentityError::Remote("cannot join: the token file holds no token".into())
            })?;
        bearer.set_sensitive(true);
        let headers = [(header::AUTHORIZATION, bearer)];
        let answer: CertificateAnswer = self
            .exchange(
                &self.fetchers.load().plain.clone(),
                WHAT,
                "/v1/agents/join",
                &body,
                &headers,
            )
            .await?;
        self.hold(WHAT, &answer, key, now)?;
        tracing::info!(id = %self.id, "joined");
        Ok(())
    }

    async fn renew(&self, now: SystemTime) -> Result<(), IdentityError> {
        const WHAT: &str = "to renew the agent's certificate";
        let (key, csr) = issued::request(None)?;
        let answer: CertificateAnswer = self
            .call(WHAT, "/v1/agents/renew", &RenewRequest { csr })
            .await?;
        self.hold(WHAT, &answer, key, now)?;
        tracing::debug!(id = %self.id, "agent's certificate renewed");
        Ok(())
    }

    /// Keeps the agent's new certificate, in its file before it is used.
    fn hold(
        &self,
        what: &'static str,
        answer: &CertificateAnswer,
        key: KeyPair,
        now: SystemTime,
    ) -> Result<(), IdentityError> {
        let chain = self.chain(what, answer, &key)?;
        if AgentId::of(&chain[0]).as_ref() != Some(&self.id) {
            return Err(unusable(what, format!("it is not for {}", self.id)).into());
        }
        let roots = wire::decode(&answer.roots).map_err(|e| unusable(what, e.to_string()))?;
        self.take_roots(what, roots)?;
        let verified = self.bundle.verify(&chain, KeyUsage::client_auth(), now);
        verified.map_err(|e| unusable(what, e.to_string()))?;
        let key = AgentKey::new(key.serialize_der().into(), chain)?;
        key.write(&self.file)?;
        self.shown.set(key);
        Ok(())
    }

    async fn refresh_roots(&self) -> Result<(), IdentityError> {
        const WHAT: &str = "the bundle";
        let url = format!("{}/v1/bundle", self.url);
        let plain = self.fetchers.load().plain.clone();
        let fetched = plain.get(&url, LIMIT).await.map_err(CallError::from)?;
        let answer: BundleAnswer =
            serde_json::from_slice(&fetched.body).map_err(|e| unusable(WHAT, e.to_string()))?;
        let roots = wire::decode(answer.roots()).map_err(|e| unusable(WHAT, e.to_string()))?;
        self.take_roots(WHAT, roots)?;
        let hint = answer.spiffe_refresh_hint.map(Duration::from_secs);
        let wait = hint
            .unwrap_or(REFRESH)
            .clamp(Duration::from_secs(10), REFRESH)
            .mul_f64(1.0 - 0.2 * random());
        *self.roots_due.lock().expect("no panic while it is held") = Instant::now() + wait;
        Ok(())
    }

    /// An answer without roots would trust nobody: a mistake, not an order.
    fn take_roots(
        &self,
        what: &'static str,
        roots: Vec<CertificateDer<'static>>,
    ) -> Result<(), IdentityError> {
        if roots.is_empty() {
            return Err(unusable(what, "it has no roots".into()).into());
        }
        let pem = pem(&roots);
        self.bundle.replace(roots)?;
        let before = std::fs::read(&self.roots_file).unwrap_or_default();
        if before != pem.as_bytes() {
            write_new(&self.roots_file, pem.as_bytes(), 0o644)?;
        }
        Ok(())
    }

    /// The chain of an answer, if it is for this key.
    fn chain(
        &self,
        what: &'static str,
        answer: &CertificateAnswer,
        key: &KeyPair,
    ) -> Result<Vec<CertificateDer<'static>>, CallError> {
        let chain = wire::decode(&answer.chain).map_err(|e| unusable(what, e.to_string()))?;
        issued::for_key(&chain, key).map_err(|why| unusable(what, why))?;
        Ok(chain)
    }

    /// An exchange in which the agent shows its certificate.
    async fn call<A: DeserializeOwned>(
        &self,
        what: &'static str,
        path: &str,
        body: &impl Serialize,
    ) -> Result<A, CallError> {
        let result = {
            let fetcher = self.fetchers.load().mutual.clone();
            self.exchange(&fetcher, what, path, body, &[]).await
        };
        if let Err(CallError::Refused { status, .. }) = &result
            && *status == StatusCode::UNAUTHORIZED
        {
            self.rejoin.store(true, Ordering::Relaxed);
        }
        result
    }

    async fn exchange<A: DeserializeOwned>(
        &self,
        fetcher: &Fetcher,
        what: &'static str,
        path: &str,
        body: &impl Serialize,
        headers: &[(HeaderName, HeaderValue)],
    ) -> Result<A, CallError> {
        let url = format!("{}{path}", self.url);
        let body = serde_json::to_vec(body).expect("names and strings");
        let answer = fetcher
            .post(&url, "application/json", body.into(), headers, LIMIT)
            .await?;
        if answer.status != StatusCode::OK {
            let problem = serde_json::from_slice::<wire::Problem>(&answer.body);
            let detail = problem.map(|p| p.detail).unwrap_or_default();
            let readable = |c: &char| !c.is_control();
            return Err(CallError::Refused {
                what,
                status: answer.status,
                detail: detail.chars().filter(readable).take(300).collect(),
            });
        }
        // The parser's own error could quote a token.
        serde_json::from_slice(&answer.body)
            .map_err(|_quoting| unusable(what, "not the JSON that was expected".into()))
    }
}

impl Fetchers {
    fn open(roots: Option<&Path>, shown: &Arc<Shown>) -> Result<Self, RootsError> {
        let (held, trust) = match roots {
            Some(path) => {
                // Read first: what changes in between is seen as a change.
                let held = std::fs::read(path).unwrap_or_default();
                (held, Trust::only(path)?)
            }
            None => (Vec::new(), Trust::new(None)?),
        };
        Ok(Self {
            roots: held,
            plain: Fetcher::with_trust(&trust),
            mutual: Fetcher::with_certificate(&trust, shown.clone()),
        })
    }
}

impl Proof {
    fn of(authority: &RemoteAuthority) -> Result<Self, String> {
        match (
            &authority.join_token_file,
            &authority.service_account_token_file,
        ) {
            (Some(path), None) => Ok(Self::JoinToken(path.clone())),
            (None, Some(path)) => Ok(Self::ServiceAccount(path.clone())),
            _ => Err("needs one of joinTokenFile and serviceAccountTokenFile".into()),
        }
    }

    fn read(&self) -> Result<Zeroizing<Vec<u8>>, IdentityError> {
        match self {
            Self::JoinToken(path) => {
                let text = private_file(path);
                let text = text.map_err(|e| IdentityError::Remote(format!("cannot join: {e}")))?;
                Ok(Zeroizing::new(text.trim_ascii().to_vec()))
            }
            Self::ServiceAccount(path) => read_token(path),
        }
    }
}

fn unusable(what: &'static str, why: String) -> CallError {
    CallError::Answer { what, why }
}

/// Certificates as PEM (RFC 7468).
pub(crate) fn pem(certificates: &[CertificateDer<'_>]) -> String {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    let mut text = String::new();
    for der in certificates {
        text.push_str("-----BEGIN CERTIFICATE-----\n");
        let encoded = STANDARD.encode(der);
        for line in encoded.as_bytes().chunks(64) {
            text.extend(line.iter().map(|&byte| char::from(byte)));
            text.push('\n');
        }
        text.push_str("-----END CERTIFICATE-----\n");
    }
    text
}

impl std::fmt::Debug for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Remote")
            .field("url", &self.url)
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}
