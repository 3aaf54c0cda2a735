//! Istio's certificate authority as the issuer (`istio.v1.auth.IstioCertificateService`),
//! so that Postern's nodes are in a mesh of Istio's. As ztunnel does, the agent shows its
//! own service account's token and names the workload that it asks for; istiod grants that
//! to accounts that `CA_TRUSTED_NODE_ACCOUNTS` lists, for pods of their own node. Keys are
//! made here and live in memory only.

mod proto;
#[cfg(test)]
mod tests;

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime},
};

use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use tonic::{Code, metadata::MetadataValue, transport::Endpoint};

use super::{
    Bundle, IdentityError, SpiffeId, Svid,
    grpc::{self, GrpcError},
    issued, read_certificates,
    tls::{H2, PROVIDER},
    token_file::read_token,
};
use crate::config::IstioCa;
use proto::{CertificateRequest, CertificateResponse, Struct, Value};

const CREATE: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";
/// For each exchange with the CA, connection included.
const LIMIT: Duration = Duration::from_secs(10);
/// Largest answer, bytes.
const MAX_ANSWER: usize = 256 << 10;
/// How often the roots' file is looked at.
const LOOK: Duration = Duration::from_secs(10);

pub struct Istio {
    ca: IstioCa,
    /// Of `ca.address`.
    host: String,
    port: u16,
    lifetime: Duration,
    bundle: Arc<Bundle>,
    /// The roots' file as it was read last, and when it is to be looked at.
    roots: Mutex<(Vec<CertificateDer<'static>>, Instant)>,
}

impl Istio {
    /// Reads the roots; asks nobody yet.
    pub fn open(config: &crate::config::Config, ca: &IstioCa) -> Result<Self, IdentityError> {
        let wrong = |why: String| IdentityError::Config { key: "istio", why };
        let url = url::Url::parse(&ca.address).ok();
        let url = url.filter(|url| url.scheme() == "https" && url.path() == "/");
        let host = url
            .as_ref()
            .and_then(|url| Some(url.host_str()?.to_owned()));
        let (Some(url), Some(host)) = (&url, host) else {
            let why = format!("address `{}` is not https://HOST:PORT", ca.address);
            return Err(wrong(why));
        };
        if MetadataValue::try_from(ca.cluster_id.as_str()).is_err() {
            return Err(wrong("clusterId is not printable ASCII".into()));
        }
        let roots = read_certificates(&ca.roots).map_err(|e| wrong(format!("roots: {e}")))?;
        Ok(Self {
            host: host.trim_matches(['[', ']']).to_owned(),
            port: url.port_or_known_default().unwrap_or(443),
            lifetime: config.identity.leaf_lifetime.0,
            bundle: Arc::new(Bundle::new(roots.clone(), config.identity.bundle.clone())?),
            roots: Mutex::new((roots, Instant::now() + LOOK)),
            ca: ca.clone(),
        })
    }

    pub fn bundle(&self) -> &Arc<Bundle> {
        &self.bundle
    }

    /// Follows the roots' file. Roots that cannot be read leave the last good ones.
    pub fn keep(&self) -> Result<(), IdentityError> {
        let mut held = self.roots.lock().expect("no panic while it is held");
        held.1 = Instant::now() + LOOK;
        let now = read_certificates(&self.ca.roots)?;
        if now != held.0 {
            self.bundle.replace(now.clone())?;
            tracing::info!(path = %self.ca.roots.display(), "roots of the mesh read again");
            held.0 = now;
        }
        Ok(())
    }

    /// When [`Self::keep`] has something to do.
    pub fn due(&self) -> Duration {
        let held = self.roots.lock().expect("no panic while it is held");
        held.1.saturating_duration_since(Instant::now())
    }

    /// A certificate for a service account of this node, for a new key.
    pub async fn issue(&self, id: &SpiffeId, now: SystemTime) -> Result<Svid, IdentityError> {
        let (key, csr) = issued::request(Some(id))?;
        let answer = self.ask(id, csr).await?;
        let unusable = |why: String| {
            IdentityError::Remote(format!("Istio's CA: its answer cannot be used: {why}"))
        };
        let chain = chain(&answer.cert_chain).map_err(unusable)?;
        issued::svid(chain, &key, id, &self.bundle, now).map_err(unusable)
    }

    async fn ask(&self, id: &SpiffeId, csr: String) -> Result<CertificateResponse, IdentityError> {
        let token = read_token(&self.ca.token_file)?;
        let bearer = zeroize::Zeroizing::new([b"Bearer ", token.as_slice()].concat());
        let mut bearer = MetadataValue::try_from(bearer.as_slice())
            .map_err(|_what_it_was| IdentityError::Remote("tokenFile holds no token".into()))?;
        bearer.set_sensitive(true);
        let name = Value {
            string_value: Some(id.to_string()),
        };
        let mut request = tonic::Request::new(CertificateRequest {
            csr,
            validity_duration: self.lifetime.as_secs().try_into().unwrap_or(i64::MAX),
            metadata: Some(Struct {
                fields: [("ImpersonatedIdentity".to_owned(), name)].into(),
            }),
        });
        request.metadata_mut().insert("authorization", bearer);
        let cluster = MetadataValue::try_from(self.ca.cluster_id.as_str())
            .expect("it was looked at when it was opened");
        request.metadata_mut().insert("clusterid", cluster);
        let failed = |error: GrpcError| {
            let hint = match error.code() {
                Some(Code::Unauthenticated) => {
                    " (is the token's audience istio-ca, and the agent's service account in \
                     CA_TRUSTED_NODE_ACCOUNTS?)"
                }
                Some(Code::PermissionDenied) => " (does a pod of it run on this node?)",
                _ => "",
            };
            IdentityError::Remote(format!("Istio's CA: {error}{hint}"))
        };
        let channel = tokio::time::timeout(LIMIT, self.connect());
        let channel = channel.await.unwrap_or(Err(GrpcError::Timeout(LIMIT)));
        let channel = channel.map_err(failed)?;
        grpc::call(channel, CREATE, request, MAX_ANSWER, LIMIT)
            .await
            .map_err(failed)
    }

    /// A connection for one call: hours pass between two, and each meets the roots that
    /// are there by then.
    async fn connect(&self) -> Result<tonic::transport::Channel, GrpcError> {
        let unreachable = |why: String| GrpcError::Unreachable(why);
        let mut store = RootCertStore::empty();
        let roots = self
            .roots
            .lock()
            .expect("no panic while it is held")
            .0
            .clone();
        store.add_parsable_certificates(roots);
        let mut tls = ClientConfig::builder_with_provider(PROVIDER.clone())
            .with_safe_default_protocol_versions()
            .map_err(|e| unreachable(e.to_string()))?
            .with_root_certificates(store)
            .with_no_client_auth();
        tls.alpn_protocols = vec![H2.to_vec()];
        let tls = tokio_rustls::TlsConnector::from(Arc::new(tls));
        let (host, port) = (self.host.clone(), self.port);
        let connector = tower::service_fn(move |_uri| {
            let (tls, host) = (tls.clone(), host.clone());
            async move {
                let name = ServerName::try_from(host.clone()).map_err(std::io::Error::other)?;
                let tcp = tokio::net::TcpStream::connect((host, port)).await?;
                tcp.set_nodelay(true)?;
                let stream = tls.connect(name, tcp).await?;
                Ok::<_, std::io::Error>(TokioIo::new(stream))
            }
        });
        // TLS is the connector's business; the scheme is what tonic asks for.
        let authority = match self.host.contains(':') {
            true => format!("[{}]:{port}", self.host),
            false => format!("{}:{port}", self.host),
        };
        Endpoint::from_shared(format!("http://{authority}"))
            .map_err(|e| unreachable(e.to_string()))?
            .connect_with_connector(connector)
            .await
            .map_err(|e| unreachable(crate::fetch::causes(&e)))
    }
}

/// Leaf first, without the root at the end: peers have it, or do not trust it.
fn chain(listed: &[String]) -> Result<Vec<CertificateDer<'static>>, String> {
    let mut chain = Vec::new();
    for pem in listed {
        for der in CertificateDer::pem_slice_iter(pem.as_bytes()) {
            let der = der.map_err(|e| e.to_string())?;
            let (_rest, parsed) =
                x509_parser::parse_x509_certificate(&der).map_err(|e| e.to_string())?;
            if chain.is_empty() || parsed.subject() != parsed.issuer() {
                chain.push(der);
            }
            if chain.len() > issued::MOST {
                return Err(format!("it has more than {} certificates", issued::MOST));
            }
        }
    }
    Ok(chain)
}

impl std::fmt::Debug for Istio {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Istio")
            .field("address", &self.ca.address)
            .finish_non_exhaustive()
    }
}
