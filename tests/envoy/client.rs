//! Requests to Envoy, byte for byte as the case has them.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, IsCa, KeyPair,
    SanType, string::Ia5String,
};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};
use serde_json::{Map, Value};

use crate::cases::{Case, Set};

/// The name of the server that is asked for unless the case says another.
const SERVER: &str = "web.shop";

/// A certificate and its key, in PEM.
pub struct Identity {
    pub certificate: String,
    pub key: String,
}

/// The certificates of Envoy and of all its clients.
pub struct Pki {
    pub authority: String,
    pub server: Identity,
    clients: BTreeMap<String, Arc<ClientConfig>>,
}

/// What came of a request.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    /// What the application got, if the request came that far.
    pub headers: Option<Map<String, Value>>,
    pub body: String,
}

impl Pki {
    /// Certificates for everybody who occurs in the cases.
    pub fn new(sets: &[Set]) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        (params.distinguished_name).push(DnType::CommonName, "authority");
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let issue = |names: Vec<SanType>| -> Result<Identity> {
            let mut params = CertificateParams::default();
            params.subject_alt_names = names;
            // With its issuer's name it would pass for one that signed itself.
            params.distinguished_name = DistinguishedName::new();
            let key = KeyPair::generate()?;
            Ok(Identity {
                certificate: params.signed_by(&key, &authority)?.pem(),
                key: key.serialize_pem(),
            })
        };
        let cases = || sets.iter().flat_map(|set| &set.requests);
        let names: BTreeSet<&str> = cases().filter_map(|case| case.sni.as_deref()).collect();
        let names = names.into_iter().chain([SERVER]);
        let names = names.map(|name| Ok(SanType::DnsName(Ia5String::try_from(name)?)));
        let server = issue(names.collect::<Result<_>>()?)?;

        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(authority.pem().as_bytes())?)?;
        let roots = Arc::new(roots);
        let mut clients = BTreeMap::new();
        for peer in cases().filter_map(|case| case.peer.as_deref()) {
            if clients.contains_key(peer) {
                continue;
            }
            let uri = Ia5String::try_from(format!("spiffe://{peer}"))?;
            let own = issue(vec![SanType::URI(uri)])?;
            let provider = Arc::new(aws_lc_rs::default_provider());
            let config = ClientConfig::builder_with_provider(provider)
                .with_safe_default_protocol_versions()?
                .with_root_certificates(roots.clone())
                .with_client_auth_cert(
                    vec![CertificateDer::from_pem_slice(own.certificate.as_bytes())?],
                    PrivateKeyDer::from_pem_slice(own.key.as_bytes())?,
                )?;
            clients.insert(peer.to_owned(), Arc::new(config));
        }
        Ok(Self {
            authority: authority.pem(),
            server,
            clients,
        })
    }

    /// Puts the case to Envoy's listener.
    pub fn ask(&self, listener: SocketAddr, case: &Case) -> Result<Answer> {
        let mut stream = TcpStream::connect(listener)?;
        // Else the request would wait for the PROXY line to be acknowledged.
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let destination = case.destination();
        let family = if destination.is_ipv4() {
            "TCP4"
        } else {
            "TCP6"
        };
        let (source, port) = (case.from, case.port);
        write!(
            stream,
            "PROXY {family} {source} {destination} 40000 {port}\r\n"
        )?;
        let request = request(case);
        let (status, body) = match &case.peer {
            None => exchange(&mut stream, &request)?,
            Some(peer) => {
                let config = self
                    .clients
                    .get(peer)
                    .context("every peer has a certificate")?;
                let name = case.sni.clone().unwrap_or_else(|| SERVER.to_owned());
                let name = ServerName::try_from(name)?;
                let session = ClientConnection::new(config.clone(), name)?;
                exchange(&mut StreamOwned::new(session, stream), &request)?
            }
        };
        let headers = match status {
            // An answer to HEAD says nothing.
            200 if case.method != "HEAD" => {
                Some(serde_json::from_str(&body).context("the application's answer")?)
            }
            _ => None,
        };
        Ok(Answer {
            status,
            headers,
            body,
        })
    }
}

fn request(case: &Case) -> Vec<u8> {
    let mut text = format!(
        "{} {} HTTP/1.1\r\nHost: {}\r\n",
        case.method, case.path, case.host
    );
    for (name, value) in case.header_lines() {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    text.push_str("Connection: close\r\n\r\n");
    text.into_bytes()
}

/// Sends a request and reads the answer: its status and its body.
pub fn exchange(stream: &mut (impl Read + Write), request: &[u8]) -> Result<(u16, String)> {
    stream.write_all(request)?;
    stream.flush()?;
    let mut bytes = Vec::new();
    let read = stream.read_to_end(&mut bytes);
    let text = String::from_utf8_lossy(&bytes);
    let parts = text.split_once("\r\n\r\n");
    // A peer may end a TLS connection without saying so; the answer is whole then.
    let (head, body) = match (parts, read) {
        (Some(parts), _) => parts,
        (None, Err(error)) => return Err(error).context("no answer"),
        (None, Ok(_)) => anyhow::bail!("no answer but {text:?}"),
    };
    let status = head.split(' ').nth(1).context("a status")?.parse()?;
    let chunked = head.to_lowercase().contains("transfer-encoding: chunked");
    let body = if chunked {
        dechunked(body)
    } else {
        body.to_owned()
    };
    Ok((status, body))
}

fn dechunked(mut body: &str) -> String {
    let mut out = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap_or(0);
        let Some(chunk) = rest.get(..size).filter(|chunk| !chunk.is_empty()) else {
            break;
        };
        out.push_str(chunk);
        body = rest[size..].trim_start_matches("\r\n");
    }
    out
}
