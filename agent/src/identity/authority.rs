//! The embedded issuer: a root, this node's intermediate, and a short-lived leaf
//! for each service account of the node. Leaf keys are made here and live in memory
//! only; the root key is a file of mode 0600.

use std::{
    io::Write as _,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType, string::Ia5String,
};
use rustls::{
    DistinguishedName,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use zeroize::Zeroizing;

use super::{
    SpiffeId, TrustDomain,
    backoff::renewal,
    intermediate::{BACKDATE, Intermediates, Purpose, dated},
};
use crate::config;

/// Lifetime of a server's certificate; a new one is made every hour.
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
    #[error("the system has no randomness")]
    Randomness,
    #[error("identity.{key}: {why}")]
    Config { key: &'static str, why: String },
    #[error(
        "{} exclude each other: one issuer signs for a node, by identity.authority, \
         identity.spire, identity.istio, or a root of its own",
        .0.join(" and ")
    )]
    Mixed(Vec<&'static str>),
    /// Not joined, not reached, refused, or an answer that cannot be used.
    #[error("{0}")]
    Remote(String),
}

/// A workload's certificate chain and key (an X.509-SVID).
pub struct Svid {
    pub id: SpiffeId,
    /// Leaf first, then the node's intermediate.
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
    pub not_after: SystemTime,
    /// When the next one is due.
    pub renew_at: SystemTime,
}

/// Signs for this node.
pub struct Authority {
    root: Root,
    leaf_lifetime: Duration,
    intermediates: Intermediates,
}

/// The trust domain's root certificate and its key.
pub struct Root {
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
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
            leaf_lifetime: identity.leaf_lifetime.0,
            intermediates: Intermediates::new(
                format!("Postern node {node}"),
                identity.node_lifetime.0,
            ),
        })
    }

    /// The root that this authority signs under.
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// A new key and certificate for a service account.
    pub fn issue(&self, id: &SpiffeId, now: SystemTime) -> Result<Svid, IdentityError> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let certified = self.intermediates.certify(
            &self.root,
            &id.to_string(),
            &key,
            Purpose::Workload,
            self.leaf_lifetime,
            now,
        )?;
        Ok(Svid {
            id: id.clone(),
            chain: certified.chain,
            key: PrivateKeyDer::Pkcs8(key.serialize_der().into()),
            not_after: certified.not_after,
            renew_at: renewal(certified.not_before + BACKDATE, certified.not_after),
        })
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

    /// What other keys are derived from: the private key.
    pub(super) fn secret(&self) -> Zeroizing<Vec<u8>> {
        Zeroizing::new(self.issuer.key().serialize_der())
    }

    pub(super) fn issuer(&self) -> &Issuer<'static, KeyPair> {
        &self.issuer
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

pub(super) fn read(path: &Path) -> Result<Vec<u8>, IdentityError> {
    std::fs::read(path).map_err(|source| IdentityError::File {
        path: path.to_owned(),
        source,
    })
}

/// Writes a file that is whole or as it was, whatever happens in between.
pub(super) fn write_new(path: &Path, content: &[u8], mode: u32) -> Result<(), IdentityError> {
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
        let first = authority(dir.path()).root().certificate().clone();
        assert_eq!(authority(dir.path()).root().certificate(), &first);
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
        let half = now + Duration::from_secs(12 * 3_600);
        assert!(svid.renew_at <= half && svid.renew_at >= half - Duration::from_secs(9_000));
        let (_, leaf) = x509_parser::parse_x509_certificate(&svid.chain[0]).expect("parses");
        let from = leaf.validity().not_before.timestamp() as u64;
        let since = (now - BACKDATE).duration_since(SystemTime::UNIX_EPOCH);
        assert_eq!(from, since.expect("later").as_secs());
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
