//! DPoP proofs (RFC 9449 4): a JWT by which the sender of a token shows, for one
//! request, that it has the key that the token is bound to. Pure: whether a proof was
//! seen before is for whoever keeps that in mind.

use std::{fmt, time::SystemTime, time::UNIX_EPOCH};

use aws_lc_rs::digest::{SHA256, digest};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Map, Value};

use super::{
    algorithm::Algorithm,
    keys::{EmbeddedKey, SkipReason},
    verify::{LEEWAY, TokenError, Validity, date, decode, object},
};

/// Longest proof in bytes; one by an RSA key of 8192 bits has some 3000.
pub const MAX_PROOF: usize = 8 * 1024;
/// Longest `jti` in bytes.
const MAX_ID: usize = 512;
/// How far `iat` may be from now, in seconds, either way.
pub const PROOF_WINDOW: u64 = LEEWAY;

/// Why a proof is refused; nothing that it holds is repeated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProofError {
    #[error("DPoP proof is missing")]
    Missing,
    #[error("more than one DPoP header")]
    Repeated,
    #[error("DPoP proof is longer than {MAX_PROOF} bytes")]
    TooLarge,
    #[error("DPoP proof is not three base64url parts with two dots between")]
    Form,
    #[error("DPoP proof: header is not a strict JSON object")]
    Header,
    #[error("DPoP proof: typ is not dpop+jwt")]
    Type,
    #[error("DPoP proof: alg is not accepted")]
    Algorithm,
    #[error("DPoP proof: {0} asks for an extension, and none is known")]
    Extension(&'static str),
    #[error("DPoP proof: jwk is missing or not usable: {0}")]
    Key(SkipReason),
    #[error("DPoP proof: payload is not a strict JSON object")]
    Payload,
    #[error("DPoP proof: {0} is missing or has the wrong type")]
    Claim(&'static str),
    #[error("DPoP proof: verification fails")]
    Signature,
    #[error("DPoP proof: htm is not the method")]
    Method,
    #[error("DPoP proof: htu is not the target")]
    Target,
    #[error("DPoP proof: iat is too far from now")]
    Time,
    #[error("DPoP proof: ath is not the token's hash")]
    TokenHash,
    #[error("DPoP proof was used before")]
    Replayed,
    #[error("a nonce of this server is required in the DPoP proof")]
    Nonce,
    /// The sender's fault is it not.
    #[error("too many DPoP proofs at once")]
    TooMany,
}

/// A proof whose form and signature are right.
pub struct Proof {
    key: EmbeddedKey,
    id: String,
    method: String,
    target: String,
    issued: u64,
    validity: Validity,
    token_hash: String,
    nonce: Option<String>,
}

impl Proof {
    pub fn parse(text: &str) -> Result<Self, ProofError> {
        if text.len() > MAX_PROOF {
            return Err(ProofError::TooLarge);
        }
        let mut parts = text.split('.');
        let (Some(header), Some(payload), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(ProofError::Form);
        };
        let strict = |part, error: ProofError| {
            object(part, TokenError::Header).map_err(|e| match e {
                TokenError::Form => ProofError::Form,
                _ => error,
            })
        };
        let (algorithm, key) = key(&strict(header, ProofError::Header)?)?;
        let signed = &text[..header.len() + 1 + payload.len()];
        let signature = decode(signature).map_err(|_| ProofError::Form)?;
        let payload = strict(payload, ProofError::Payload)?;
        let claim = |name: &'static str| match payload.get(name) {
            Some(Value::String(text)) if !text.is_empty() => Ok(text.clone()),
            _ => Err(ProofError::Claim(name)),
        };
        let nonce = match payload.contains_key("nonce") {
            true => Some(claim("nonce")?),
            false => None,
        };
        let issued = date(&payload, "iat").map_err(|_| ProofError::Claim("iat"))?;
        let proof = Self {
            id: claim("jti").and_then(|id| match id.len() <= MAX_ID {
                true => Ok(id),
                false => Err(ProofError::Claim("jti")),
            })?,
            method: claim("htm")?,
            target: claim("htu")?,
            issued: issued.ok_or(ProofError::Claim("iat"))?,
            validity: Validity::of(&payload).map_err(|_| ProofError::Claim("exp or nbf"))?,
            token_hash: claim("ath")?,
            nonce,
            key,
        };
        match (proof.key).verifies(algorithm, signed.as_bytes(), &signature) {
            true => Ok(proof),
            false => Err(ProofError::Signature),
        }
    }

    /// Whether it was made for this method and token. Methods have their case
    /// (RFC 9110 9.1).
    pub fn check_use(&self, method: &str, token: &str) -> Result<(), ProofError> {
        if self.method != method {
            return Err(ProofError::Method);
        }
        let hash = URL_SAFE_NO_PAD.encode(digest(&SHA256, token.as_bytes()));
        if self.token_hash != hash {
            return Err(ProofError::TokenHash);
        }
        Ok(())
    }

    /// Whether it was made just now. Clocks differ; also into the future.
    pub fn check_time(&self, now: SystemTime) -> Result<(), ProofError> {
        let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |n| n.as_secs());
        let fits = seconds.abs_diff(self.issued) <= PROOF_WINDOW;
        match fits && self.validity.check(now).is_ok() {
            true => Ok(()),
            false => Err(ProofError::Time),
        }
    }

    /// `htu` as it was sent: whoever knows the request's own target compares.
    pub fn target(&self) -> &str {
        &self.target
    }

    pub fn nonce(&self) -> Option<&str> {
        self.nonce.as_deref()
    }

    /// Of the key that made it (RFC 7638).
    pub fn thumbprint(&self) -> [u8; 32] {
        self.key.thumbprint()
    }

    /// What no other proof of this key has, and the last second at which
    /// [`Self::check_time`] takes it.
    pub fn once(&self) -> ([u8; 32], u64) {
        let mut all = self.key.thumbprint().to_vec();
        all.extend_from_slice(self.id.as_bytes());
        let once = digest(&SHA256, &all);
        let once = once.as_ref().try_into().expect("SHA-256 has 32 bytes");
        (once, self.issued.saturating_add(PROOF_WINDOW))
    }
}

/// Nothing of what it holds.
impl fmt::Debug for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proof").finish_non_exhaustive()
    }
}

fn key(header: &Map<String, Value>) -> Result<(Algorithm, EmbeddedKey), ProofError> {
    for name in ["crit", "b64"] {
        if header.contains_key(name) {
            return Err(ProofError::Extension(name));
        }
    }
    if header.get("typ").and_then(Value::as_str) != Some("dpop+jwt") {
        return Err(ProofError::Type);
    }
    let alg = header.get("alg").and_then(Value::as_str);
    let algorithm = alg.and_then(Algorithm::from_name);
    let algorithm = algorithm.ok_or(ProofError::Algorithm)?;
    let jwk = header.get("jwk");
    let jwk = jwk.ok_or(ProofError::Key(SkipReason::Missing("jwk")))?;
    Ok((algorithm, EmbeddedKey::parse(jwk).map_err(ProofError::Key)?))
}
