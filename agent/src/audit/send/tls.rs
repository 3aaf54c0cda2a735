//! TLS to receivers.

use std::{path::Path, sync::Arc};

use rustls::{
    ClientConfig,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};

use super::Cause;
use crate::{fetch::Trust, oauth::private_file};

/// Trusts the roots of a file and no others, or the system's; shows a certificate if
/// there is one.
pub fn client(
    roots: Option<&Path>,
    certificate: Option<&Path>,
    key: Option<&Path>,
) -> Result<ClientConfig, Cause> {
    let trust = match roots {
        Some(path) => Trust::only(path)?,
        None => Trust::new(None)?,
    };
    let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("the provider has suites of both versions")
        .with_root_certificates(trust.roots());
    let (Some(certificate), Some(key)) = (certificate, key) else {
        return Ok(builder.with_no_client_auth());
    };
    let wrong = |path: &Path, message: String| Cause::File {
        path: path.to_owned(),
        message,
    };
    let chain: Vec<_> = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect)
        .map_err(|e| wrong(certificate, e.to_string()))?;
    let pem = private_file(key).map_err(|e| wrong(key, e.to_string()))?;
    let private =
        PrivateKeyDer::from_pem_slice(&pem).map_err(|_e| wrong(key, "no private key".into()))?;
    builder
        .with_client_auth_cert(chain, private)
        .map_err(|e| wrong(certificate, e.to_string()))
}
