//! TLS around the routes. Clients may show a certificate (RFC 8705); that they hold its
//! key is proven here, whose it is and whether it counts is the routes' question.

use std::{future::Future, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use anyhow::{Result, anyhow};
use axum::{Router, extract::Request};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use rustls::{
    DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::{WebPkiSupportedAlgorithms, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject as _},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
};
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt as _;

use super::Shared;
use crate::app::Misconfigured;

/// Connections at once; more wait to be accepted.
const MAX_CONNECTIONS: usize = 4096;
/// For the TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// For a request's head.
const HEAD: Duration = Duration::from_secs(10);
/// For requests that are under way when the server stops, or a connection ends.
const DRAIN: Duration = Duration::from_secs(5);
/// Longest life of a connection.
const LIFE: Duration = Duration::from_secs(600);

/// Who is at the other end; an extension of every request.
#[derive(Clone, Debug)]
pub struct Peer {
    pub address: SocketAddr,
    /// Leaf first; empty where none was shown. The leaf's key is proven, its chain not.
    pub certificates: Arc<[CertificateDer<'static>]>,
}

pub async fn serve(
    server: Shared,
    routes: Router,
    stop: impl Future<Output = ()> + Send,
) -> Result<()> {
    let acceptor = TlsAcceptor::from(Arc::new(tls(&server)?));
    let listener = TcpListener::bind(server.config.listen)
        .await
        .map_err(|e| Misconfigured(format!("listen {}: {e}", server.config.listen)))?;
    tracing::info!(issuer = %server.config.issuer, listen = %listener.local_addr()?, "ready");
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let ending = watch::Sender::new(());
    tokio::pin!(stop);
    loop {
        let accepted = async {
            let place = places.clone().acquire_owned().await;
            let accepted = listener.accept().await;
            (place.expect("never closed"), accepted)
        };
        let (place, (stream, address)) = tokio::select! {
            (place, accepted) = accepted => match accepted {
                Ok(accepted) => (place, accepted),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
            () = &mut stop => break,
        };
        let (acceptor, routes, end) = (acceptor.clone(), routes.clone(), ending.subscribe());
        tokio::spawn(async move {
            let _place = place;
            if let Err(error) = connection(acceptor, routes, stream, address, end).await {
                tracing::debug!(%address, %error, "connection ended");
            }
        });
    }
    drop(listener);
    ending.send_replace(());
    // What was begun is answered, within reason.
    let all = places.acquire_many(MAX_CONNECTIONS as u32);
    let _some_may_be_left = tokio::time::timeout(DRAIN, all).await;
    Ok(())
}

async fn connection(
    acceptor: TlsAcceptor,
    routes: Router,
    stream: TcpStream,
    address: SocketAddr,
    mut end: watch::Receiver<()>,
) -> Result<()> {
    stream.set_nodelay(true)?;
    let tls = tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await??;
    let shown = tls.get_ref().1.peer_certificates().unwrap_or_default();
    let peer = Peer {
        address,
        certificates: shown
            .iter()
            .cloned()
            .map(CertificateDer::into_owned)
            .collect(),
    };
    let service = routes.map_request(move |mut request: hyper::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(peer.clone());
        let (head, body) = request.into_parts();
        Request::from_parts(head, axum::body::Body::new(body))
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_buf_size(64 << 10);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(64)
        .max_header_list_size(64 << 10)
        .keep_alive_interval(HEAD);
    let serving = builder.serve_connection(TokioIo::new(tls), TowerToHyperService::new(service));
    tokio::pin!(serving);
    let served = tokio::select! {
        served = &mut serving => served,
        () = async {
            // An error is the end of the server, too.
            let _ended = tokio::time::timeout(LIFE, end.changed()).await;
        } => {
            serving.as_mut().graceful_shutdown();
            match tokio::time::timeout(DRAIN, serving).await {
                Ok(served) => served,
                Err(_elapsed) => return Ok(()),
            }
        }
    };
    served.map_err(|error| anyhow!("{error}"))
}

fn tls(server: &Shared) -> Result<ServerConfig> {
    let config = &server.config;
    let (chain, key) = match (&config.tls.certificate, &config.tls.key) {
        (Some(certificate), Some(key)) => (read_chain(certificate)?, read_key(key)?),
        (None, None) => {
            let host = host(&config.issuer)?;
            let made = server.root.server_certificate(&host, server.clock.now());
            made.map_err(|e| Misconfigured(e.to_string()))?
        }
        _ => {
            let why = "tls.certificate and tls.key belong together; only one is set";
            return Err(Misconfigured(why.into()).into());
        }
    };
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = Arc::new(Possession {
        algorithms: provider.signature_verification_algorithms,
        hints: vec![server.root.subject()],
    });
    let mut tls = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(|e| Misconfigured(format!("tls: {e}")))?;
    // A resumed session would show the certificate of the first one, which may have been
    // replaced or have expired since.
    tls.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    tls.send_tls13_tickets = 0;
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(tls)
}

/// The host of an https URL.
fn host(issuer: &str) -> Result<String> {
    let url = url::Url::parse(issuer).map_err(|e| Misconfigured(format!("issuer: {e}")))?;
    match url.host_str() {
        Some(host) if url.scheme() == "https" => Ok(host.trim_matches(['[', ']']).to_owned()),
        _ => Err(Misconfigured(format!("issuer `{issuer}` is no https URL")).into()),
    }
}

fn read_chain(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let wrong = |what: String| Misconfigured(format!("{}: {what}", path.display()));
    let chain: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|e| wrong(e.to_string()))?;
    if chain.is_empty() {
        return Err(wrong("holds no PEM certificate".into()).into());
    }
    Ok(chain)
}

fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>> {
    let pem = crate::oauth::private_file(path).map_err(|e| Misconfigured(e.to_string()))?;
    PrivateKeyDer::from_pem_slice(&pem).map_err(|_quoting_it_could_tell| {
        Misconfigured(format!("{}: holds no PEM private key", path.display())).into()
    })
}

/// Takes any certificate whose key the client proves to have.
#[derive(Debug)]
struct Possession {
    algorithms: WebPkiSupportedAlgorithms,
    /// So that browsers ask nobody for a certificate of another authority.
    hints: Vec<DistinguishedName>,
}

impl ClientCertVerifier for Possession {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.hints
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn verify_client_cert(
        &self,
        _leaf: &CertificateDer<'_>,
        _above: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
