//! What agents and `postern authority` say to each other: JSON over TLS.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

/// `POST /v1/agents/join`, with a proof as bearer token.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinRequest {
    pub node: String,
    /// PKCS #10 (RFC 2986): PEM, or DER in base64.
    pub csr: String,
}

/// `POST /v1/agents/renew`, with the agent's certificate.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RenewRequest {
    pub csr: String,
}

/// `POST /v1/certificates`, with the agent's certificate.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CertificateRequest {
    pub csr: String,
    /// SPIFFE ID of a workload of the agent's node.
    pub identity: String,
}

/// `POST /v1/jwt-svids`, with the agent's certificate.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenRequest {
    pub identity: String,
    pub audience: Vec<String>,
}

/// The answer to the first three. Unknown members are passed over, so that a newer
/// authority may say more.
#[derive(Debug, Serialize, Deserialize)]
pub struct CertificateAnswer {
    /// DER in base64 (not base64url), leaf first, without the root: as `x5c`.
    pub chain: Vec<String>,
    /// The trust domain's roots, written likewise.
    pub roots: Vec<String>,
    /// Seconds since 1970.
    pub expires: u64,
}

#[derive(Serialize, Deserialize)]
pub struct TokenAnswer {
    pub token: String,
    /// Seconds since 1970.
    pub expires: u64,
}

/// A refusal (RFC 9457), as far as it is used.
#[derive(Debug, Serialize, Deserialize)]
pub struct Problem {
    pub title: String,
    pub status: u16,
    pub detail: String,
}

/// `GET /v1/bundle` (SPIFFE Trust Domain and Bundle 4), as far as an agent uses it.
#[derive(Debug, Deserialize)]
pub struct BundleAnswer {
    pub keys: Vec<BundleKey>,
    #[serde(default)]
    pub spiffe_refresh_hint: Option<u64>,
}

#[derive(Debug, Deserialize)]
pub struct BundleKey {
    #[serde(default, rename = "use")]
    pub purpose: String,
    #[serde(default)]
    pub x5c: Vec<String>,
}

impl BundleAnswer {
    /// The roots that X.509-SVIDs may be signed under.
    pub fn roots(&self) -> impl Iterator<Item = &String> {
        let x509 = self.keys.iter().filter(|key| key.purpose == "x509-svid");
        x509.flat_map(|key| key.x5c.first())
    }
}

pub fn encode(certificates: &[CertificateDer<'_>]) -> Vec<String> {
    certificates
        .iter()
        .map(|der| STANDARD.encode(der))
        .collect()
}

pub fn decode<'a>(
    certificates: impl IntoIterator<Item = &'a String>,
) -> Result<Vec<CertificateDer<'static>>, base64::DecodeError> {
    certificates
        .into_iter()
        .map(|text| STANDARD.decode(text).map(CertificateDer::from))
        .collect()
}
