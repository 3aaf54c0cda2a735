//! What an issuer hands out is checked before it is used: it must be for the key and the
//! name that were asked for, good for both ends of a connection, and end at a root of the
//! bundle. Peers would refuse anything else, and say so less clearly.

use std::time::SystemTime;

use rcgen::{CertificateParams, KeyPair, PublicKeyData as _, SanType, string::Ia5String};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use webpki::KeyUsage;

use super::{Bundle, IdentityError, SpiffeId, Svid, backoff::renewal, peer_identity};

/// Largest chain that is taken.
pub const MOST: usize = 16;

/// A new key, and a request (PKCS #10, PEM) for it that names nothing but, if there is
/// one, the identity.
pub fn request(id: Option<&SpiffeId>) -> Result<(KeyPair, String), IdentityError> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    if let Some(id) = id {
        params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(id.to_string())?)];
    }
    let csr = params.serialize_request(&key)?.pem()?;
    Ok((key, csr))
}

/// Whether a chain's leaf is for this key.
pub fn for_key(chain: &[CertificateDer<'_>], key: &KeyPair) -> Result<(), String> {
    let leaf = chain.first().ok_or("it has no certificate")?;
    let (_rest, parsed) = x509_parser::parse_x509_certificate(leaf).map_err(|e| e.to_string())?;
    if parsed.public_key().raw != key.subject_public_key_info() {
        return Err("it is for another key".into());
    }
    Ok(())
}

/// Whether a chain can stand for a workload now.
pub fn usable(
    chain: &[CertificateDer<'_>],
    id: &SpiffeId,
    bundle: &Bundle,
    now: SystemTime,
) -> Result<(), String> {
    let leaf = chain.first().ok_or("it has no certificate")?;
    if chain.len() > MOST {
        return Err(format!("it has more than {MOST} certificates"));
    }
    match peer_identity(leaf) {
        Some(of) if of == *id => {}
        Some(of) => return Err(format!("it is for {of}, not for {id}")),
        None => return Err(format!("it is not for {id}")),
    }
    for usage in [KeyUsage::client_auth(), KeyUsage::server_auth()] {
        bundle
            .verify(chain, usage, now)
            .map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// A workload's certificate for a key that was made here.
pub fn svid(
    chain: Vec<CertificateDer<'static>>,
    key: &KeyPair,
    id: &SpiffeId,
    bundle: &Bundle,
    now: SystemTime,
) -> Result<Svid, String> {
    for_key(&chain, key)?;
    usable(&chain, id, bundle, now)?;
    let (_not_before, not_after) = validity(&chain[0]).ok_or("it has no dates")?;
    Ok(Svid {
        id: id.clone(),
        key: PrivateKeyDer::Pkcs8(key.serialize_der().into()),
        not_after,
        renew_at: renewal(now, not_after),
        chain,
    })
}

/// `notBefore` and `notAfter`.
pub fn validity(leaf: &CertificateDer<'_>) -> Option<(SystemTime, SystemTime)> {
    let (_rest, certificate) = x509_parser::parse_x509_certificate(leaf).ok()?;
    let validity = certificate.validity();
    let time = |at: x509_parser::time::ASN1Time| SystemTime::from(at.to_datetime());
    Some((time(validity.not_before), time(validity.not_after)))
}
