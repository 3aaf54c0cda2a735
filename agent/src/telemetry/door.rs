//! The admin address with TLS, for those who come from elsewhere, and `postern status`'s
//! way to it, with TLS or without.

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{Router, extract::Request};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, ServerConfig, SignatureScheme,
    StreamOwned,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _},
};
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt as _;

use super::page::From;
use crate::{
    config::{Admin, Guard},
    identity::read_certificates,
    lifecycle::Watcher,
    oauth::private_file,
};

/// Connections at once; more wait to be accepted.
const MOST: usize = 64;
/// For the handshake, and for a request's head.
const SLOWEST: Duration = Duration::from_secs(10);
/// Longest life of a connection.
const LIFE: Duration = Duration::from_secs(600);
/// How often the certificate is read from its file anew.
const RENEW: Duration = Duration::from_secs(3_600);
/// For `postern status`.
const ANSWER: Duration = Duration::from_secs(5);

const VERSIONS: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13];

/// An error says which key is wrong, and why.
pub fn tls(guard: &Guard) -> Result<TlsAcceptor, String> {
    let chain = read_certificates(&guard.certificate)
        .map_err(|e| format!("listen.adminCertificate: {e}"))?;
    let wrong = |why: String| format!("listen.adminKey: {why}");
    let pem = private_file(&guard.key).map_err(|e| wrong(e.to_string()))?;
    let key = PrivateKeyDer::from_pem_slice(&pem).map_err(|_quoting_it_could_tell| {
        wrong(format!("{} holds no PEM private key", guard.key.display()))
    })?;
    let mut tls = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(VERSIONS)
        .map(|tls| tls.with_no_client_auth())
        .and_then(|tls| tls.with_single_cert(chain, key))
        .map_err(|e| wrong(e.to_string()))?;
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(tls)))
}

/// Serves until told to stop.
pub async fn serve(
    listener: TcpListener,
    mut acceptor: TlsAcceptor,
    guard: Guard,
    routes: Router,
    stop: Watcher,
) {
    let places = Arc::new(Semaphore::new(MOST));
    let mut read = Instant::now();
    loop {
        let accepted = async {
            let place = places.clone().acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            accepted = accepted => accepted,
            () = stop.triggered() => return,
        };
        let Ok((stream, address)) = accepted else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        if read.elapsed() >= RENEW {
            read = Instant::now();
            match tls(&guard) {
                Ok(fresh) => acceptor = fresh,
                Err(error) => tracing::error!(error, "the last good certificate is shown"),
            }
        }
        let (acceptor, routes) = (acceptor.clone(), routes.clone());
        tokio::spawn(async move {
            let _held = place;
            let served = connection(acceptor, routes, stream, address);
            if let Ok(Err(error)) = tokio::time::timeout(LIFE, served).await {
                tracing::debug!(%address, error, "an admin connection ended");
            }
        });
    }
}

async fn connection(
    acceptor: TlsAcceptor,
    routes: Router,
    stream: tokio::net::TcpStream,
    address: SocketAddr,
) -> Result<(), String> {
    let tls = tokio::time::timeout(SLOWEST, acceptor.accept(stream)).await;
    let tls = tls.map_err(|_| "no handshake".to_owned())?;
    let tls = tls.map_err(|e| e.to_string())?;
    let from = From(address.ip().to_canonical());
    let service = routes.map_request(move |mut request: hyper::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(from);
        let (head, body) = request.into_parts();
        Request::from_parts(head, axum::body::Body::new(body))
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(SLOWEST)
        .max_buf_size(64 << 10)
        .serve_connection(TokioIo::new(tls), TowerToHyperService::new(service))
        .await
        .map_err(|e| e.to_string())
}

#[derive(Debug, thiserror::Error)]
pub enum AskError {
    #[error("no agent at {0}: {1}")]
    Connect(SocketAddr, std::io::Error),
    #[error("{0}")]
    Files(String),
    #[error("the agent at {0}: {1}")]
    Talk(SocketAddr, std::io::Error),
    #[error("the agent at {0} answered {1:?}")]
    Answer(SocketAddr, String),
}

/// What the agent that runs with this configuration answers to one GET: too little to
/// want a client library for.
pub fn ask(admin: &Admin, path: &str) -> Result<String, AskError> {
    let mut address = admin.address;
    if address.ip().is_unspecified() {
        address.set_ip(match address.ip() {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    let stream = TcpStream::connect_timeout(&address, ANSWER)
        .and_then(|stream| stream.set_read_timeout(Some(ANSWER)).map(|()| stream))
        .map_err(|e| AskError::Connect(address, e))?;
    let answer = match &admin.guard {
        None => talk(stream, path, ""),
        Some(guard) => {
            let token = private_file(&guard.token).map_err(|e| AskError::Files(e.to_string()))?;
            let token = String::from_utf8_lossy(token.trim_ascii());
            let tls = pinned(guard, address).map_err(AskError::Files)?;
            let authorization = format!("Authorization: Bearer {token}\r\n");
            talk(StreamOwned::new(tls, stream), path, &authorization)
        }
    };
    let answer = answer.map_err(|e| AskError::Talk(address, e))?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.contains(" 200 ") => Ok(body.to_owned()),
        _ => {
            let line = answer.lines().next().unwrap_or("").to_owned();
            Err(AskError::Answer(address, line))
        }
    }
}

fn talk(mut stream: impl Read + Write, path: &str, more: &str) -> std::io::Result<String> {
    let request = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n{more}\r\n");
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        // HTTP/1.0 ends with the connection; whether TLS was closed first is no matter.
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof && !answer.is_empty() => {}
        Err(e) => return Err(e),
        Ok(_) => {}
    }
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// TLS that trusts the configured certificate and no other, whatever name it is for.
fn pinned(guard: &Guard, address: SocketAddr) -> Result<ClientConnection, String> {
    let chain = read_certificates(&guard.certificate).map_err(|e| e.to_string())?;
    let provider = provider();
    let verifier = Pinned {
        leaf: chain.into_iter().next(),
        algorithms: provider.signature_verification_algorithms,
    };
    let mut tls = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(VERSIONS)
        .map_err(|e| e.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    tls.enable_sni = false;
    let name = ServerName::IpAddress(address.ip().into());
    ClientConnection::new(Arc::new(tls), name).map_err(|e| e.to_string())
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

#[derive(Debug)]
struct Pinned {
    leaf: Option<CertificateDer<'static>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        _above: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match self.leaf.as_ref() == Some(leaf) {
            true => Ok(ServerCertVerified::assertion()),
            false => Err(rustls::CertificateError::ApplicationVerificationFailure.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
