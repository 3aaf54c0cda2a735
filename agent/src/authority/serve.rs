//! TLS around the routes. Clients may show a certificate (RFC 8705); that they hold its
//! key is proven here, whose it is and whether it counts is the routes' question.

use std::{
    collections::HashMap,
    future::Future,
    net::{IpAddr, SocketAddr},
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow};
use axum::{Router, extract::Request};
use hyper::server::conn::{http1, http2};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
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

use super::{Shared, people::network};
use crate::app::Misconfigured;

/// Connections at once; more wait to be accepted.
const MAX_CONNECTIONS: usize = 4096;
/// Of them from one address (IPv6: one /64), so that nobody alone takes all.
const MAX_OF_ADDRESS: u32 = 128;
/// For the TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// For a request's head.
const HEAD: Duration = Duration::from_secs(10);
/// For requests that are under way when the server stops, or a connection ends.
const DRAIN: Duration = Duration::from_secs(5);
/// How often the server's certificate is made, or read from its files, anew.
const RENEW: Duration = Duration::from_secs(3_600);
/// Longest life of a connection.
const LIFE: Duration = Duration::from_secs(600);
/// The same of HTTP/2, which has no limit for how long nothing is asked.
const LIFE_H2: Duration = Duration::from_secs(60);

/// Connections by network.
#[derive(Default)]
struct Crowd(Mutex<HashMap<IpAddr, u32>>);

/// A connection that counts until this is dropped.
struct Counted(Arc<Crowd>, IpAddr);

impl Crowd {
    /// `None` where the network has enough of them.
    fn enter(self: &Arc<Self>, address: IpAddr) -> Option<Counted> {
        let network = network(address);
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(network).or_insert(0);
        if *count >= MAX_OF_ADDRESS {
            return None;
        }
        *count += 1;
        Some(Counted(self.clone(), network))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut counts = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.1);
            }
        }
    }
}

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
    let mut acceptor = TlsAcceptor::from(Arc::new(tls(&server)?));
    let mut read = Instant::now();
    let listener = TcpListener::bind(server.config.listen)
        .await
        .map_err(|e| Misconfigured(format!("listen {}: {e}", server.config.listen)))?;
    tracing::info!(issuer = %server.config.issuer, listen = %listener.local_addr()?, "ready");
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let crowd = Arc::new(Crowd::default());
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
        let Some(counted) = crowd.enter(address.ip()) else {
            tracing::debug!(%address, "too many connections of one address");
            continue;
        };
        if read.elapsed() >= RENEW {
            read = Instant::now();
            match tls(&server) {
                Ok(config) => acceptor = TlsAcceptor::from(Arc::new(config)),
                Err(error) => tracing::error!(%error, "the last good certificate is shown"),
            }
        }
        let (acceptor, routes, end) = (acceptor.clone(), routes.clone(), ending.subscribe());
        tokio::spawn(async move {
            let _held = (place, counted);
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
    end: watch::Receiver<()>,
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
    let service = TowerToHyperService::new(service);
    // Not by the first bytes: nothing limits how long those are waited for.
    if tls.get_ref().1.alpn_protocol() == Some(b"h2") {
        let serving = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .max_concurrent_streams(64)
            .max_header_list_size(64 << 10)
            .keep_alive_interval(HEAD)
            .serve_connection(TokioIo::new(tls), service);
        let close = http2::Connection::graceful_shutdown;
        lives(serving, close, LIFE_H2, end).await
    } else {
        let serving = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD)
            .max_buf_size(64 << 10)
            .serve_connection(TokioIo::new(tls), service);
        let close = http1::Connection::graceful_shutdown;
        lives(serving, close, LIFE, end).await
    }
}

/// Serves a connection until it ends, is `life` old or the server stops.
async fn lives<C: Future<Output = hyper::Result<()>>>(
    serving: C,
    close: impl FnOnce(Pin<&mut C>),
    life: Duration,
    mut end: watch::Receiver<()>,
) -> Result<()> {
    tokio::pin!(serving);
    let served = tokio::select! {
        served = &mut serving => served,
        () = async {
            // An error is the end of the server, too.
            let _ended = tokio::time::timeout(life, end.changed()).await;
        } => {
            close(serving.as_mut());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_network_does_not_take_all_places() {
        let crowd = Arc::new(Crowd::default());
        let enter = |address: &str| crowd.enter(address.parse().expect("an address"));
        let mut held: Vec<_> = (0..MAX_OF_ADDRESS).map(|_| enter("2001:db8::1")).collect();
        assert!(held.iter().all(Option::is_some));
        assert!(enter("2001:db8::2").is_none());
        assert!(enter("2001:db8:0:1::1").is_some() && enter("192.0.2.1").is_some());
        held.pop();
        assert!(enter("2001:db8::2").is_some());
        drop(held);
        assert!(crowd.0.lock().expect("a lock").is_empty());
    }
}
