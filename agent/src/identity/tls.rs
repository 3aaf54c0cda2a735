//! TLS between agents: version 1.3 only, X25519MLKEM768 first, both sides prove a
//! SPIFFE ID under a root of the bundle. No session resumption: every connection
//! proves its identities anew, and tunnels are pooled above this layer.

use std::{
    sync::{Arc, LazyLock},
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
    sign::CertifiedKey,
};
use webpki::KeyUsage;

use super::{Bundle, IdentityError, SpiffeId, Svid};
use crate::jwt::SigningKey;

/// ALPN of HTTP/2, which HBONE is.
pub(super) const H2: &[u8] = b"h2";

/// And of the transport between two Postern agents.
pub const FAST: &[u8] = b"postern/2";

pub(super) static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    let mut provider = aws_lc_rs::default_provider();
    provider.kx_groups = vec![
        aws_lc_rs::kx_group::X25519MLKEM768,
        aws_lc_rs::kx_group::X25519,
        aws_lc_rs::kx_group::SECP256R1,
    ];
    Arc::new(provider)
});

/// One service account's certificate, renewed in place, and the rustls
/// configurations that always use the latest.
#[derive(Debug)]
pub struct Credentials {
    pub id: SpiffeId,
    current: Arc<Current>,
    /// For HBONE alone.
    pub client: Arc<ClientConfig>,
    pub server: Arc<ServerConfig>,
    /// For Postern's own transport, or HBONE.
    pub fast_client: Arc<ClientConfig>,
    pub fast_server: Arc<ServerConfig>,
}

#[derive(Debug)]
struct Current(ArcSwap<Held>);

#[derive(Debug)]
struct Held {
    key: Arc<CertifiedKey>,
    /// `None` for kinds of keys that sign no assertions: an issuer that makes keys itself
    /// may make RSA's.
    signing: Option<Arc<SigningKey>>,
    renew_at: SystemTime,
    not_after: SystemTime,
}

impl Credentials {
    pub fn new(svid: Svid, bundle: Arc<Bundle>) -> Result<Self, IdentityError> {
        let id = svid.id.clone();
        let current = Arc::new(Current(ArcSwap::from_pointee(held(svid)?)));
        let verifier = Arc::new(Verifier {
            bundle,
            algorithms: PROVIDER.signature_verification_algorithms,
        });
        let versions = &[&rustls::version::TLS13];
        let mut client = ClientConfig::builder_with_provider(PROVIDER.clone())
            .with_protocol_versions(versions)?
            .dangerous()
            .with_custom_certificate_verifier(verifier.clone())
            .with_client_cert_resolver(current.clone());
        client.alpn_protocols = vec![H2.to_vec()];
        client.resumption = Resumption::disabled();
        client.enable_secret_extraction = true;
        client.enable_sni = false;
        let mut server = ServerConfig::builder_with_provider(PROVIDER.clone())
            .with_protocol_versions(versions)?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(current.clone());
        server.alpn_protocols = vec![H2.to_vec()];
        server.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        server.enable_secret_extraction = true;
        let (mut fast_client, mut fast_server) = (client.clone(), server.clone());
        fast_client.alpn_protocols.insert(0, FAST.to_vec());
        fast_server.alpn_protocols.insert(0, FAST.to_vec());
        Ok(Self {
            id,
            current,
            fast_client: Arc::new(fast_client),
            fast_server: Arc::new(fast_server),
            client: Arc::new(client),
            server: Arc::new(server),
        })
    }

    pub fn renew(&self, svid: Svid) -> Result<(), IdentityError> {
        self.current.0.store(Arc::new(held(svid)?));
        Ok(())
    }

    /// SHA-256 of the certificate (RFC 8705 3.1).
    pub fn fingerprint(&self) -> Option<[u8; 32]> {
        let held = self.current.0.load();
        held.key.cert.first().map(fingerprint)
    }

    /// The certificate's key and chain, to sign assertions with (RFC 7523).
    pub fn signing(&self) -> (Option<Arc<SigningKey>>, Vec<CertificateDer<'static>>) {
        let held = self.current.0.load();
        (held.signing.clone(), held.key.cert.clone())
    }

    /// The latest certificate, to show to servers outside of the mesh (RFC 8705 2).
    pub fn certificate(&self) -> Arc<dyn rustls::client::ResolvesClientCert> {
        self.current.clone()
    }

    pub fn renew_at(&self) -> SystemTime {
        self.current.0.load().renew_at
    }

    pub fn not_after(&self) -> SystemTime {
        self.current.0.load().not_after
    }
}

fn held(svid: Svid) -> Result<Held, IdentityError> {
    let (renew_at, not_after) = (svid.renew_at, svid.not_after);
    let signing = SigningKey::from_pkcs8(svid.key.secret_der()).ok();
    let key = PROVIDER.key_provider.load_private_key(svid.key)?;
    Ok(Held {
        key: Arc::new(CertifiedKey::new(svid.chain, key)),
        signing: signing.map(Arc::new),
        renew_at,
        not_after,
    })
}

impl rustls::client::ResolvesClientCert for Current {
    fn resolve(
        &self,
        _issuers: &[&[u8]],
        _schemes: &[SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load().key.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl rustls::server::ResolvesServerCert for Current {
    fn resolve(&self, _hello: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load().key.clone())
    }
}

/// Accepts a peer whose chain ends at a root of the bundle and whose leaf carries
/// exactly one SPIFFE ID. Whose ID it must be is the caller's question.
#[derive(Debug)]
struct Verifier {
    bundle: Arc<Bundle>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Verifier {
    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        above: &[CertificateDer<'_>],
        now: UnixTime,
        usage: KeyUsage,
    ) -> Result<(), rustls::Error> {
        self.bundle.verify_at(leaf, above, usage, now)?;
        if peer_identity(leaf).is_none() {
            return Err(rustls::CertificateError::ApplicationVerificationFailure.into());
        }
        Ok(())
    }
}

pub(super) fn bad(error: webpki::Error) -> rustls::Error {
    use rustls::CertificateError as E;
    match error {
        webpki::Error::CertExpired { time, not_after } => {
            E::ExpiredContext { time, not_after }.into()
        }
        webpki::Error::CertNotValidYet { time, not_before } => {
            E::NotValidYetContext { time, not_before }.into()
        }
        webpki::Error::UnknownIssuer => E::UnknownIssuer.into(),
        other => E::Other(rustls::OtherError(Arc::new(other))).into(),
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        above: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(leaf, above, now, KeyUsage::server_auth())?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::PeerIncompatible::Tls12NotOffered.into())
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

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        above: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verify(leaf, above, now, KeyUsage::client_auth())?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::PeerIncompatible::Tls12NotOffered.into())
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

/// The SPIFFE ID of a leaf: its only URI name.
pub fn peer_identity(leaf: &CertificateDer<'_>) -> Option<SpiffeId> {
    only_uri(leaf)?.parse().ok()
}

/// The only URI name of a leaf (X509-SVID 2 allows no second).
pub(super) fn only_uri(leaf: &CertificateDer<'_>) -> Option<String> {
    use x509_parser::extensions::GeneralName;
    let (_rest, certificate) = x509_parser::parse_x509_certificate(leaf).ok()?;
    let names = certificate.subject_alternative_name().ok()??;
    let mut uris = names
        .value
        .general_names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        });
    let uri = uris.next()?;
    if uris.next().is_some() {
        return None;
    }
    Some(uri.to_owned())
}

/// SHA-256 of a certificate's DER.
pub fn fingerprint(certificate: &CertificateDer<'_>) -> [u8; 32] {
    let digest = ::aws_lc_rs::digest::digest(&::aws_lc_rs::digest::SHA256, certificate);
    digest.as_ref().try_into().expect("SHA-256 has 32 bytes")
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// How long a leaf is still valid.
pub fn valid_for(leaf: &CertificateDer<'_>) -> Duration {
    let parsed = x509_parser::parse_x509_certificate(leaf);
    let left = parsed
        .ok()
        .and_then(|(_rest, certificate)| certificate.validity().time_to_expiration());
    left.and_then(|left| left.try_into().ok())
        .unwrap_or_default()
}

/// What a finished handshake agreed on, for the record.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Session {
    pub version: &'static str,
    pub group: &'static str,
    pub cipher: &'static str,
    /// SHA-256 of the other side's certificate, hexadecimal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer_certificate: Option<String>,
}

impl Session {
    pub fn of(connection: &rustls::CommonState) -> Self {
        Self {
            version: "TLSv1.3",
            group: connection
                .negotiated_key_exchange_group()
                .and_then(|group| group.name().as_str())
                .unwrap_or("unknown"),
            cipher: connection
                .negotiated_cipher_suite()
                .and_then(|suite| suite.suite().as_str())
                .unwrap_or("unknown"),
            peer_certificate: connection
                .peer_certificates()
                .and_then(|chain| chain.first())
                .map(|leaf| hex(&fingerprint(leaf))),
        }
    }
}
