//! The embedded issuer: a root, this node's intermediate, and a short-lived leaf
//! for each service account of the node. Leaf and intermediate keys are made here
//! and live in memory only; the root key is a file of mode 0600.

use std::{
    io::Write as _,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, string::Ia5String,
};
use rustls::{
    DistinguishedName,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use time::OffsetDateTime;

use super::{SpiffeId, TrustDomain};
use crate::config;

/// Certificates begin this long before they are made, for nodes whose clocks lag.
const BACKDATE: Duration = Duration::from_secs(60);
/// Lifetime of a server's certificate; a new one is made at each start.
const SERVER_LIFETIME: Duration = Duration::from_secs(90 * 24 * 3_600);
/// Lifetime of a root that the agent makes for itself.
const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3_600);

#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("{path}: {source}")]
    File {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path}: {message}")]
    Content { path: PathBuf, message: String },
    #[error("{path} is readable by others (mode {mode:o}); private keys must be 0600")]
    Exposed { path: PathBuf, mode: u32 },
    #[error("identity.rootCertificate and identity.rootKey belong together; only one is set")]
    HalfRoot,
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
    #[error("cannot use a certificate: {0}")]
    Use(#[from] rustls::Error),
    #[error("cannot sign a JWT-SVID: {0}")]
    Sign(#[source] crate::jwt::SigningKeyError),
}

/// A workload's certificate chain and key (an X.509-SVID).
pub struct Svid {
    pub id: SpiffeId,
    /// Leaf first, then the node's intermediate.
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
}

impl Svid {
    /// When the next one is due: half of its lifetime, counted from when it was made.
    pub fn renew_at(&self) -> SystemTime {
        let made = self.not_before + BACKDATE;
        let life = self.not_after.duration_since(made).unwrap_or_default();
        made + life / 2
    }
}

/// Signs for this node.
pub struct Authority {
    root: Root,
    node_name: String,
    node_lifetime: Duration,
    leaf_lifetime: Duration,
    intermediate: Mutex<Option<Arc<Intermediate>>>,
}

/// The trust domain's root certificate and its key.
pub struct Root {
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

struct Intermediate {
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
    not_after: SystemTime,
}

impl Authority {
    /// Opens the configured root, or the one in the state directory, which is made
    /// at the first start.
    pub fn open(config: &config::Config, node: &str) -> Result<Self, IdentityError> {
        let identity = &config.identity;
        let root = Root::of(
            identity.root_certificate.as_deref(),
            identity.root_key.as_deref(),
            &config.state,
            &config.trust_domain,
        )?;
        Ok(Self {
            root,
            node_name: node.to_owned(),
            node_lifetime: identity.node_lifetime.0,
            leaf_lifetime: identity.leaf_lifetime.0,
            intermediate: Mutex::default(),
        })
    }

    /// The root that this authority signs under.
    pub fn root(&self) -> &CertificateDer<'static> {
        &self.root.certificate
    }

    /// A new key and certificate for a service account.
    pub fn issue(&self, id: &SpiffeId, now: SystemTime) -> Result<Svid, IdentityError> {
        let above = self.intermediate(now)?;
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let not_after = (now + self.leaf_lifetime).min(above.not_after);
        let mut params = dated(now, not_after);
        // SPIFFE X509-SVID 4: exactly one URI, no CA, digital signature.
        params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(id.to_string())?)];
        params.use_authority_key_identifier_extension = true;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let leaf = params.signed_by(&key, &above.issuer)?;
        Ok(Svid {
            id: id.clone(),
            chain: vec![leaf.der().clone(), above.certificate.clone()],
            key: PrivateKeyDer::Pkcs8(key.serialize_der().into()),
            not_before: now - BACKDATE,
            not_after,
        })
    }

    /// The node's intermediate, made anew at half of its lifetime, so that no leaf
    /// is cut short by it in normal operation.
    fn intermediate(&self, now: SystemTime) -> Result<Arc<Intermediate>, IdentityError> {
        let mut slot = self.intermediate.lock().expect("no panic while it is held");
        if let Some(current) = slot.as_ref()
            && current.not_after > now + self.node_lifetime / 2
        {
            return Ok(current.clone());
        }
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let not_after = now + self.node_lifetime;
        let mut params = dated(now, not_after);
        params.distinguished_name.push(
            DnType::CommonName,
            format!("Postern node {}", self.node_name),
        );
        params.use_authority_key_identifier_extension = true;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params.signed_by(&key, &self.root.issuer)?.der().clone();
        let made = Arc::new(Intermediate {
            issuer: Issuer::new(params, key),
            certificate,
            not_after,
        });
        *slot = Some(made.clone());
        Ok(made)
    }
}

impl Root {
    /// The configured root, or the one in the state directory, which is made at the
    /// first start.
    pub fn of(
        certificate: Option<&Path>,
        key: Option<&Path>,
        state: &Path,
        domain: &TrustDomain,
    ) -> Result<Self, IdentityError> {
        let (certificate, key) = match (certificate, key) {
            (Some(certificate), Some(key)) => (certificate.to_owned(), key.to_owned()),
            (None, None) => {
                let certificate = state.join("root.pem");
                let key = state.join("root.key");
                if !certificate.exists() {
                    make_root(&certificate, &key, domain.as_str())?;
                }
                (certificate, key)
            }
            _ => return Err(IdentityError::HalfRoot),
        };
        Self::open(&certificate, &key)
    }

    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// Its name as it stands in certificates below it.
    pub fn subject(&self) -> DistinguishedName {
        let parsed = x509_parser::parse_x509_certificate(&self.certificate);
        let (_rest, certificate) = parsed.expect("it was parsed when it was opened");
        DistinguishedName::from(certificate.subject().as_raw().to_vec())
    }

    /// A chain and key for a server at a DNS name or an IP address.
    pub fn server_certificate(
        &self,
        host: &str,
        now: SystemTime,
    ) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), IdentityError> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut params = dated(now, now + SERVER_LIFETIME);
        params.subject_alt_names = vec![match host.parse() {
            Ok(address) => SanType::IpAddress(address),
            Err(_name) => SanType::DnsName(Ia5String::try_from(host)?),
        }];
        params.use_authority_key_identifier_extension = true;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let leaf = params.signed_by(&key, &self.issuer)?;
        let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        Ok((vec![leaf.der().clone()], key))
    }

    fn open(certificate: &Path, key: &Path) -> Result<Self, IdentityError> {
        let content = |path: &Path, message: String| IdentityError::Content {
            path: path.to_owned(),
            message,
        };
        let pem = read(certificate)?;
        let der = CertificateDer::from_pem_slice(&pem)
            .map_err(|_malformed| content(certificate, "holds no PEM certificate".into()))?;
        let mode = std::fs::metadata(key)
            .map_err(|source| IdentityError::File {
                path: key.to_owned(),
                source,
            })?
            .permissions()
            .mode()
            & 0o777;
        if mode & 0o077 != 0 {
            return Err(IdentityError::Exposed {
                path: key.to_owned(),
                mode,
            });
        }
        // The parser's own error could quote the key.
        let pair = String::from_utf8(read(key)?)
            .ok()
            .and_then(|pem| KeyPair::from_pem(&pem).ok())
            .ok_or_else(|| content(key, "holds no PEM private key (PKCS #8)".into()))?;
        let (_rest, parsed) = x509_parser::parse_x509_certificate(&der)
            .map_err(|e| content(certificate, format!("is no certificate: {e}")))?;
        if !parsed.is_ca() {
            return Err(content(
                certificate,
                "is not a certificate authority".into(),
            ));
        }
        use rcgen::PublicKeyData as _;
        if parsed.public_key().raw != pair.subject_public_key_info() {
            return Err(content(
                key,
                format!("is not the key of {}", certificate.display()),
            ));
        }
        let issuer = Issuer::from_ca_cert_der(&der, pair)?;
        Ok(Self {
            certificate: der,
            issuer,
        })
    }
}

fn make_root(certificate: &Path, key: &Path, domain: &str) -> Result<(), IdentityError> {
    let now = SystemTime::now();
    let pair = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384)?;
    let mut params = dated(now, now + ROOT_LIFETIME);
    params
        .distinguished_name
        .push(DnType::CommonName, format!("Postern root of {domain}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let made = params.self_signed(&pair)?;
    // The key first: a certificate without its key would look like a whole root.
    write_new(key, pair.serialize_pem().as_bytes(), 0o600)?;
    write_new(certificate, made.pem().as_bytes(), 0o644)
}

fn dated(now: SystemTime, not_after: SystemTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.not_before = OffsetDateTime::from(now - BACKDATE);
    params.not_after = OffsetDateTime::from(not_after);
    params.distinguished_name = rcgen::DistinguishedName::new();
    params
}

fn read(path: &Path) -> Result<Vec<u8>, IdentityError> {
    std::fs::read(path).map_err(|source| IdentityError::File {
        path: path.to_owned(),
        source,
    })
}

/// Writes a file that is whole or absent, whatever happens in between.
fn write_new(path: &Path, content: &[u8], mode: u32) -> Result<(), IdentityError> {
    let fail = |source| IdentityError::File {
        path: path.to_owned(),
        source,
    };
    let partial = path.with_extension("new");
    let _absent = std::fs::remove_file(&partial);
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&partial)
        .map_err(fail)?;
    file.write_all(content)
        .and_then(|()| file.sync_all())
        .map_err(fail)?;
    std::fs::rename(&partial, path).map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn authority(dir: &Path) -> Authority {
        let config = config::Config {
            state: dir.to_owned(),
            ..config::Config::default()
        };
        Authority::open(&config, "n1").expect("opens")
    }

    #[test]
    fn the_root_outlives_the_agent_and_its_key_is_private() {
        let dir = tempfile::tempdir().expect("directory");
        let first = authority(dir.path()).root().clone();
        assert_eq!(authority(dir.path()).root(), &first);
        let key = dir.path().join("root.key");
        let mode = std::fs::metadata(&key).expect("key").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).expect("chmod");
        let config = config::Config {
            state: dir.path().to_owned(),
            ..config::Config::default()
        };
        let error = Authority::open(&config, "n1")
            .err()
            .expect("refused")
            .to_string();
        assert!(
            error.contains("root.key") && error.contains("0600"),
            "{error}"
        );
    }

    #[test]
    fn leaves_are_backdated_and_renewed_at_half_life() {
        let dir = tempfile::tempdir().expect("directory");
        let id = "spiffe://cluster.local/ns/a/sa/b".parse().expect("valid");
        let now = SystemTime::now();
        let svid = authority(dir.path()).issue(&id, now).expect("issued");
        assert_eq!(svid.not_before, now - BACKDATE);
        assert_eq!(svid.renew_at(), now + Duration::from_secs(12 * 3_600));
        let (_, leaf) = x509_parser::parse_x509_certificate(&svid.chain[0]).expect("parses");
        assert!(leaf.subject().iter().next().is_none());
        assert!(!leaf.is_ca());
        assert_eq!(svid.chain.len(), 2);
    }

    #[test]
    fn half_a_root_is_refused() {
        let mut config = config::Config::default();
        config.identity.root_key = Some("/nowhere".into());
        assert!(matches!(
            Authority::open(&config, "n"),
            Err(IdentityError::HalfRoot)
        ));
    }
}
