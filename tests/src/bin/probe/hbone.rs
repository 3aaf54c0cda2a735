//! A client of HBONE that is not the agent: with any certificate, to any authority.
//! It does not look at the server's certificate.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use anyhow::Result;
use rcgen::{CertificateParams, Issuer, KeyPair, SanType, string::Ia5String};
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime},
};
use tokio::{net::TcpStream, time::timeout};

/// Status of the answer to a CONNECT.
pub fn ask(gate: SocketAddr, authority: &str, id: &str, root: &Path) -> Result<String> {
    let config = config(id, root)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        timeout(Duration::from_secs(10), request(gate, authority, config)).await?
    })
}

async fn request(gate: SocketAddr, authority: &str, config: ClientConfig) -> Result<String> {
    let tcp = TcpStream::connect(gate).await?;
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let tls = connector
        .connect(ServerName::IpAddress(gate.ip().into()), tcp)
        .await?;
    let (requests, connection) = h2::client::handshake(tls).await?;
    tokio::spawn(connection);
    let request = http::Request::builder()
        .method("CONNECT")
        .uri(authority)
        .body(())?;
    let (response, _send) = requests.ready().await?.send_request(request, false)?;
    Ok(response.await?.status().as_u16().to_string())
}

fn config(id: &str, root: &Path) -> Result<ClientConfig> {
    let pem = |ending: &str| std::fs::read_to_string(root.with_extension(ending));
    let issuer = Issuer::from_ca_cert_pem(&pem("pem")?, KeyPair::from_pem(&pem("key")?)?)?;
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(id)?)];
    let leaf = params.signed_by(&key, &issuer)?;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone(provider)))
        .with_client_auth_cert(
            vec![leaf.der().clone()],
            PrivateKeyDer::Pkcs8(key.serialize_der().into()),
        )?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _leaf: &CertificateDer<'_>,
        _above: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(
            message,
            cert,
            dss,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            cert,
            dss,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
