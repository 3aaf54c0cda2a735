//! Certificate signing requests (RFC 2986). Nothing of them is used but the public key:
//! the subject is passed over, and one that asks for extensions (names, rights, to be an
//! authority) is refused, so that nobody takes for granted what was not granted.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use rcgen::{
    CertificateSigningRequestParams, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519,
    PublicKeyData as _, SubjectPublicKeyInfo,
};
use rustls::pki_types::{CertificateSigningRequestDer, pem::PemObject as _};
use x509_parser::{certification_request::X509CertificationRequest, prelude::FromDer as _};

use super::problem::Problem;

/// A public key whose private one the asker has.
pub struct Key(SubjectPublicKeyInfo);

impl Key {
    pub fn info(&self) -> &SubjectPublicKeyInfo {
        &self.0
    }

    /// SubjectPublicKeyInfo in DER.
    pub fn der(&self) -> Vec<u8> {
        self.0.subject_public_key_info()
    }
}

/// The key of a request in PEM, or in DER as base64, if its signature is the key's.
pub fn public_key(text: &str) -> Result<Key, Problem> {
    let wrong = |what: &str| Problem::invalid(format!("`csr` {what}"));
    let der = match text.trim_start().starts_with("-----BEGIN") {
        true => CertificateSigningRequestDer::from_pem_slice(text.as_bytes())
            .map_err(|_| wrong("is no PEM certificate request"))?,
        false => STANDARD
            .decode(text.trim())
            .map_err(|_| wrong("is neither PEM nor base64"))?
            .into(),
    };
    let (rest, parsed) = X509CertificationRequest::from_der(&der)
        .map_err(|_| wrong("is no certificate request (PKCS #10)"))?;
    if !rest.is_empty() {
        return Err(wrong("has bytes behind its end"));
    }
    if parsed
        .requested_extensions()
        .is_some_and(|mut extensions| extensions.next().is_some())
    {
        return Err(wrong(
            "asks for extensions; a request here is for a key and nothing else",
        ));
    }
    // Before the signature: another kind of key is not even tried.
    let info = SubjectPublicKeyInfo::from_der(parsed.certification_request_info.subject_pki.raw)
        .ok()
        .filter(|info| {
            let accepted = [
                &PKCS_ECDSA_P256_SHA256,
                &PKCS_ECDSA_P384_SHA384,
                &PKCS_ED25519,
            ];
            accepted.contains(&info.algorithm())
        })
        .ok_or_else(|| wrong("has another key than P-256, P-384 or Ed25519"))?;
    // This checks the signature.
    CertificateSigningRequestParams::from_der(&der)
        .map_err(|_| wrong("is not signed with the key that it names"))?;
    Ok(Key(info))
}
