//! The roots that peers may be signed under; replaced whole when the issuer's or files
//! change. A trust domain that has a bundle of its own is verified by that alone: its
//! roots sign for no other, nor others' for it.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::SystemTime,
};

use arc_swap::ArcSwap;
use rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime, pem::PemObject as _};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};

use super::{
    IdentityError, TrustDomain,
    tls::{PROVIDER, bad, only_uri},
};

type Certificates = Vec<CertificateDer<'static>>;

#[derive(Debug)]
pub struct Bundle {
    given: Mutex<Given>,
    /// A file of further roots.
    more: Option<PathBuf>,
    anchors: ArcSwap<Anchors>,
}

/// What the issuer gave.
#[derive(Debug, Default)]
struct Given {
    own: Certificates,
    federated: HashMap<TrustDomain, Certificates>,
}

#[derive(Debug)]
struct Anchors {
    /// For the mesh's own trust domain, and all that have no bundle of their own.
    own: Vec<TrustAnchor<'static>>,
    federated: HashMap<TrustDomain, Vec<TrustAnchor<'static>>>,
}

impl Bundle {
    /// `own` may be empty while there is no word from the authority yet: nobody is
    /// trusted then.
    pub fn new(own: Certificates, more: Option<PathBuf>) -> Result<Self, IdentityError> {
        let given = Given {
            own,
            federated: HashMap::new(),
        };
        let anchors = given.anchors(more.as_deref())?;
        Ok(Self {
            given: Mutex::new(given),
            more,
            anchors: ArcSwap::from_pointee(anchors),
        })
    }

    /// Reads the bundle file again. On error the last good roots stay.
    pub fn reload(&self) -> Result<(), IdentityError> {
        let given = self.given.lock().expect("no panic while it is held");
        self.anchors
            .store(Arc::new(given.anchors(self.more.as_deref())?));
        Ok(())
    }

    /// Replaces the issuer's roots. On error the last good roots stay.
    pub fn replace(&self, roots: Certificates) -> Result<(), IdentityError> {
        self.replace_all(roots, HashMap::new())
    }

    /// Replaces the issuer's roots, and those of other trust domains.
    pub fn replace_all(
        &self,
        own: Certificates,
        federated: HashMap<TrustDomain, Certificates>,
    ) -> Result<(), IdentityError> {
        let new = Given { own, federated };
        let mut given = self.given.lock().expect("no panic while it is held");
        let anchors = new.anchors(self.more.as_deref())?;
        *given = new;
        self.anchors.store(Arc::new(anchors));
        Ok(())
    }

    pub fn roots(&self) -> usize {
        let anchors = self.anchors.load();
        let federated = anchors.federated.values().map(Vec::len);
        anchors.own.len() + federated.sum::<usize>()
    }

    /// Whether a chain, leaf first, ends at one of them and may be used so.
    pub fn verify(
        &self,
        chain: &[CertificateDer<'_>],
        usage: KeyUsage,
        now: SystemTime,
    ) -> Result<(), rustls::Error> {
        let (leaf, above) = chain
            .split_first()
            .ok_or(rustls::Error::NoCertificatesPresented)?;
        let since = now.duration_since(SystemTime::UNIX_EPOCH);
        let now = UnixTime::since_unix_epoch(since.unwrap_or_default());
        self.verify_at(leaf, above, usage, now)
    }

    pub(super) fn verify_at(
        &self,
        leaf: &CertificateDer<'_>,
        above: &[CertificateDer<'_>],
        usage: KeyUsage,
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let algorithms = PROVIDER.signature_verification_algorithms.all;
        let anchors = self.anchors.load();
        let anchors = anchors.of(leaf);
        EndEntityCert::try_from(leaf)
            .and_then(|certificate| {
                certificate
                    .verify_for_usage(algorithms, anchors, above, now, usage, None, None)
                    .map(|_path| ())
            })
            .map_err(bad)
    }
}

impl Given {
    fn anchors(&self, more: Option<&Path>) -> Result<Anchors, IdentityError> {
        let mut own = self.own.clone();
        if let Some(path) = more {
            own.extend(read_certificates(path)?);
        }
        let name = more.unwrap_or(Path::new("root certificate"));
        let federated = self.federated.iter().map(|(domain, roots)| {
            let path = PathBuf::from(format!("bundle of {domain}"));
            Ok((domain.clone(), anchors(roots, &path)?))
        });
        Ok(Anchors {
            own: anchors(&own, name)?,
            federated: federated.collect::<Result<_, IdentityError>>()?,
        })
    }
}

impl Anchors {
    /// Those that may have signed this leaf, by the trust domain that it claims.
    fn of(&self, leaf: &CertificateDer<'_>) -> &[TrustAnchor<'static>] {
        if self.federated.is_empty() {
            return &self.own;
        }
        let domain = only_uri(leaf).and_then(|uri| {
            let rest = uri.strip_prefix("spiffe://")?;
            let domain = rest.split('/').next().unwrap_or_default();
            TrustDomain::try_from(domain.to_owned()).ok()
        });
        let federated = domain.and_then(|domain| self.federated.get(&domain));
        federated.unwrap_or(&self.own)
    }
}

fn anchors(
    certificates: &[CertificateDer<'static>],
    name: &Path,
) -> Result<Vec<TrustAnchor<'static>>, IdentityError> {
    certificates
        .iter()
        .map(|der| match anchor_from_trusted_cert(der) {
            Ok(anchor) => Ok(anchor.to_owned()),
            Err(e) => Err(IdentityError::Content {
                path: name.to_owned(),
                message: format!("not usable as a root: {e}"),
            }),
        })
        .collect()
}

/// The certificates of a PEM file; at least one.
pub fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let content = |message: String| IdentityError::Content {
        path: path.to_owned(),
        message,
    };
    let listed = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| content(e.to_string()))?;
    if listed.is_empty() {
        return Err(content("holds no PEM certificate".into()));
    }
    Ok(listed)
}
