//! Certificates under a root: an intermediate whose key is made here and lives in
//! memory only, and leaves below it. The root's key signs nothing but intermediates
//! (and a server's own certificate).

use std::{
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType, string::Ia5String,
};
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;

use super::{IdentityError, Root};

/// Certificates begin this long before they are made, for nodes whose clocks lag.
pub(crate) const BACKDATE: Duration = Duration::from_secs(60);

/// The intermediate that signs now, made anew at half of its lifetime, so that no leaf
/// is cut short by it in normal operation.
pub struct Intermediates {
    /// Common name.
    name: String,
    lifetime: Duration,
    current: Mutex<Option<Arc<Intermediate>>>,
}

struct Intermediate {
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
    not_after: SystemTime,
}

/// What a leaf is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Both ends of connections between workloads.
    Workload,
    /// An agent before the authority: a client and nothing else.
    Agent,
}

/// A signed leaf.
pub struct Certified {
    /// Leaf first, then its intermediate.
    pub chain: Vec<CertificateDer<'static>>,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
}

impl Intermediates {
    pub fn new(name: String, lifetime: Duration) -> Self {
        Self {
            name,
            lifetime,
            current: Mutex::default(),
        }
    }

    /// A leaf for this public key with one URI name and nothing else (SPIFFE X509-SVID
    /// 2 and 4: exactly one URI, no CA, digital signature). Serial numbers are random.
    pub fn certify(
        &self,
        root: &Root,
        uri: &str,
        key: &impl PublicKeyData,
        purpose: Purpose,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Certified, IdentityError> {
        let above = self.current(root, now)?;
        let not_after = (now + lifetime).min(above.not_after);
        let mut params = dated(now, not_after);
        params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(uri)?)];
        params.use_authority_key_identifier_extension = true;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = match purpose {
            Purpose::Workload => vec![
                ExtendedKeyUsagePurpose::ServerAuth,
                ExtendedKeyUsagePurpose::ClientAuth,
            ],
            Purpose::Agent => vec![ExtendedKeyUsagePurpose::ClientAuth],
        };
        params.serial_number = Some(serial()?);
        let leaf = params.signed_by(key, &above.issuer)?;
        Ok(Certified {
            chain: vec![leaf.der().clone(), above.certificate.clone()],
            not_before: now - BACKDATE,
            not_after,
        })
    }

    fn current(&self, root: &Root, now: SystemTime) -> Result<Arc<Intermediate>, IdentityError> {
        let mut slot = self.current.lock().expect("no panic while it is held");
        if let Some(current) = slot.as_ref()
            && current.not_after > now + self.lifetime / 2
        {
            return Ok(current.clone());
        }
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let not_after = now + self.lifetime;
        let mut params = dated(now, not_after);
        params
            .distinguished_name
            .push(DnType::CommonName, self.name.clone());
        params.use_authority_key_identifier_extension = true;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.serial_number = Some(serial()?);
        let certificate = params.signed_by(&key, root.issuer())?.der().clone();
        let made = Arc::new(Intermediate {
            issuer: Issuer::new(params, key),
            certificate,
            not_after,
        });
        *slot = Some(made.clone());
        Ok(made)
    }
}

/// 159 random bits (RFC 5280 4.1.2.2: positive, 20 bytes at most).
fn serial() -> Result<rcgen::SerialNumber, IdentityError> {
    let mut bytes = [0; 20];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_nothing_more| IdentityError::Randomness)?;
    // Never negative, and never shorter than it looks.
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(rcgen::SerialNumber::from_slice(&bytes))
}

/// A certificate's frame: when it is valid, and no name.
pub(super) fn dated(now: SystemTime, not_after: SystemTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.not_before = OffsetDateTime::from(now - BACKDATE);
    params.not_after = OffsetDateTime::from(not_after);
    params.distinguished_name = rcgen::DistinguishedName::new();
    params
}
