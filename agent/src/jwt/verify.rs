//! One token: its form (RFC 7515 compact serialization), its claims, its signature.

use std::{
    fmt,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use http::StatusCode;
use serde_json::{Map, Value};

use super::{
    algorithm::Algorithm,
    claims::{Checked, Claims},
    json,
    keys::KeySet,
};

/// Longest token in bytes.
pub const MAX_TOKEN: usize = 16 * 1024;
/// Clocks of issuers differ, by this many seconds at most.
pub const LEEWAY: u64 = 60;
/// Signed by the same issuers for another purpose (RFC 8725 3.11): a logout notice or
/// a security event, replayed as a bearer token, would carry its subject's rights.
const OTHER_TYPES: [&str; 5] = [
    "dpop+jwt",
    "logout+jwt",
    "oauth-authz-req+jwt",
    "secevent+jwt",
    "token-introspection+jwt",
];

/// Why a token is refused, in words for whoever sent it: nothing that it holds is
/// repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error("Jwt issuer is not configured")]
    Issuer,
    #[error("Jwt is longer than {MAX_TOKEN} bytes")]
    TooLarge,
    #[error("more Jwts than one request needs")]
    TooMany,
    #[error("Jwt is not three base64url parts with two dots between")]
    Form,
    #[error("Jwt header is not a strict JSON object")]
    Header,
    #[error("Jwt header: {0} has the wrong type")]
    HeaderMember(&'static str),
    #[error("Jwt header: alg is not accepted")]
    Algorithm,
    #[error("Jwt header: {0} asks for an extension, and none is known")]
    Extension(&'static str),
    #[error("Jwt header: typ names another kind of token")]
    Type,
    #[error("Jwt is no access token: its typ is not at+jwt")]
    NotAccessToken,
    #[error("Jwt payload is not a strict JSON object")]
    Payload,
    #[error("Jwt claim {0} is missing")]
    Missing(&'static str),
    #[error("Jwt claim {0} has the wrong type or range")]
    Claim(&'static str),
    #[error("Jwt is expired")]
    Expired,
    #[error("Jwt is not valid yet")]
    NotYetValid,
    #[error("Audiences in Jwt are not allowed")]
    Audience,
    /// The issuer's keys could not be fetched, or none of them is usable.
    #[error("Jwt cannot be checked: the keys of its issuer are not available")]
    KeysUnavailable,
    /// The set may be older than the token.
    #[error("Jwt is signed by an unknown key")]
    UnknownKey,
    #[error("Jwt verification fails")]
    Signature,
}

impl TokenError {
    pub fn status(self) -> StatusCode {
        match self {
            Self::Audience => StatusCode::FORBIDDEN,
            _ => StatusCode::UNAUTHORIZED,
        }
    }

    /// Whether a newer key set of the issuer may change the answer.
    pub fn may_be_stale(self) -> bool {
        matches!(self, Self::UnknownKey | Self::KeysUnavailable)
    }

    /// How far the token came. Of several errors the farthest is told.
    pub(super) fn stage(self) -> u8 {
        match self {
            Self::Issuer => 0,
            Self::Expired | Self::NotYetValid => 2,
            Self::Audience => 3,
            Self::KeysUnavailable => 4,
            Self::UnknownKey => 5,
            Self::Signature => 6,
            _ => 1,
        }
    }
}

/// What a rule asks of a token.
#[derive(Clone, Copy, Debug)]
pub struct Expected<'a> {
    /// `None`: any, or none at all.
    pub issuer: Option<&'a str>,
    /// One of them must be in `aud`; empty: `aud` is not looked at.
    pub audiences: &'a [String],
    /// Claims that are lists written as one string, beside `scope` and `permission`.
    pub space_delimited: &'a [String],
}

/// A token in the right form, of whom nothing is proven yet.
pub struct Token<'a> {
    /// Header and payload as they were signed.
    signed: &'a str,
    signature: Vec<u8>,
    algorithm: Algorithm,
    /// Never empty.
    kid: Option<String>,
    /// In lower case, without `application/`.
    typ: Option<String>,
    payload: Arc<Map<String, Value>>,
    validity: Validity,
}

impl<'a> Token<'a> {
    pub fn parse(text: &'a str) -> Result<Self, TokenError> {
        if text.len() > MAX_TOKEN {
            return Err(TokenError::TooLarge);
        }
        let mut parts = text.split('.');
        let (Some(header), Some(payload), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(TokenError::Form);
        };
        let Header {
            algorithm,
            kid,
            typ,
        } = header_members(&object(header, TokenError::Header)?)?;
        let signed = &text[..header.len() + 1 + payload.len()];
        let payload = object(payload, TokenError::Payload)?;
        registered(&payload)?;
        Ok(Self {
            signed,
            signature: decode(signature)?,
            algorithm,
            kid,
            typ,
            validity: Validity::of(&payload)?,
            payload: Arc::new(payload),
        })
    }

    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Whether its payload is that of these claims.
    pub(super) fn says(&self, claims: &Claims) -> bool {
        claims.is_of(&self.payload)
    }

    /// The claims, once the token is proven. `keys` are those of the issuer that the
    /// rule names; `None`: there are none that can be used.
    pub fn verify(
        &self,
        expected: Expected<'_>,
        keys: Option<&KeySet>,
        now: SystemTime,
    ) -> Result<Claims, TokenError> {
        let issuer = self.payload.get("iss").and_then(Value::as_str);
        if expected.issuer.is_some() && expected.issuer != issuer {
            return Err(TokenError::Issuer);
        }
        self.validity.check(now)?;
        let claims = Claims::new(
            self.payload.clone(),
            expected.space_delimited,
            self.validity,
            Checked::Jwt {
                typ: self.typ.as_deref().map(Arc::from),
            },
        );
        if !audience_fits(expected.audiences, &claims.audiences()) {
            return Err(TokenError::Audience);
        }
        self.check_signature(keys.ok_or(TokenError::KeysUnavailable)?)?;
        Ok(claims)
    }

    fn check_signature(&self, keys: &KeySet) -> Result<(), TokenError> {
        let kid = self.kid.as_deref();
        let mut candidates = keys.candidates(kid, self.algorithm).peekable();
        let unknown = candidates.peek().is_none() || kid.is_some_and(|kid| !keys.knows(kid));
        let length_fits = self
            .algorithm
            .signature_len()
            .is_none_or(|length| self.signature.len() == length);
        if length_fits
            && candidates.any(|key| {
                key.verify_sig(self.signed.as_bytes(), &self.signature)
                    .is_ok()
            })
        {
            return Ok(());
        }
        Err(match unknown {
            true => TokenError::UnknownKey,
            false => TokenError::Signature,
        })
    }
}

/// Nothing of what it holds.
impl fmt::Debug for Token<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token")
            .field("algorithm", &self.algorithm)
            .finish_non_exhaustive()
    }
}

/// When a token may be used, in seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Validity {
    pub not_before: Option<u64>,
    /// `None`: never expires.
    pub expires: Option<u64>,
}

impl Validity {
    pub fn of(payload: &Map<String, Value>) -> Result<Self, TokenError> {
        Ok(Self {
            not_before: date(payload, "nbf")?,
            expires: date(payload, "exp")?,
        })
    }

    pub fn check(self, now: SystemTime) -> Result<(), TokenError> {
        let now = now
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        if self
            .expires
            .is_some_and(|expires| now > expires.saturating_add(LEEWAY))
        {
            return Err(TokenError::Expired);
        }
        if self
            .not_before
            .is_some_and(|start| now.saturating_add(LEEWAY) < start)
        {
            return Err(TokenError::NotYetValid);
        }
        Ok(())
    }
}

/// Strict: no padding, no white space, no bits behind the last byte, not empty.
pub(super) fn decode(part: &str) -> Result<Vec<u8>, TokenError> {
    if part.is_empty() {
        return Err(TokenError::Form);
    }
    URL_SAFE_NO_PAD.decode(part).map_err(|_| TokenError::Form)
}

pub(super) fn object(part: &str, error: TokenError) -> Result<Map<String, Value>, TokenError> {
    match json::parse(&decode(part)?) {
        Ok(Value::Object(object)) => Ok(object),
        _ => Err(error),
    }
}

struct Header {
    algorithm: Algorithm,
    kid: Option<String>,
    typ: Option<String>,
}

/// `jwk`, `jku`, `x5c`, `x5u` and `x5t` are not looked at: keys come from the issuer,
/// never from the token.
fn header_members(header: &Map<String, Value>) -> Result<Header, TokenError> {
    // RFC 7515 4.1.11, RFC 7797 6: whoever does not know an extension must refuse.
    for name in ["crit", "b64"] {
        if header.contains_key(name) {
            return Err(TokenError::Extension(name));
        }
    }
    let text = |name| match header.get(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str())),
        Some(_) => Err(TokenError::HeaderMember(name)),
    };
    let alg = text("alg")?.ok_or(TokenError::HeaderMember("alg"))?;
    let algorithm = Algorithm::from_name(alg).ok_or(TokenError::Algorithm)?;
    let typ = text("typ")?.map(|typ| {
        // RFC 7515 4.1.9: a media type, whose `application/` may be left out.
        let typ = typ.to_ascii_lowercase();
        typ.strip_prefix("application/").unwrap_or(&typ).to_owned()
    });
    if typ.as_deref().is_some_and(|typ| OTHER_TYPES.contains(&typ)) {
        return Err(TokenError::Type);
    }
    let kid = text("kid")?.filter(|kid| !kid.is_empty());
    Ok(Header {
        algorithm,
        kid: kid.map(str::to_owned),
        typ,
    })
}

/// Types of the registered claims (RFC 7519 4.1), beside `nbf` and `exp`.
pub(super) fn registered(payload: &Map<String, Value>) -> Result<(), TokenError> {
    for name in ["iss", "sub", "jti"] {
        if payload.get(name).is_some_and(|value| !value.is_string()) {
            return Err(TokenError::Claim(name));
        }
    }
    date(payload, "iat")?;
    match payload.get("aud") {
        None | Some(Value::String(_)) => Ok(()),
        Some(Value::Array(list)) if list.iter().all(Value::is_string) => Ok(()),
        Some(_) => Err(TokenError::Claim("aud")),
    }
}

/// A date in [0, 2^64), its fraction dropped.
pub(super) fn date(
    payload: &Map<String, Value>,
    name: &'static str,
) -> Result<Option<u64>, TokenError> {
    const END: f64 = 18_446_744_073_709_551_616.0; // 2^64
    let Some(value) = payload.get(name) else {
        return Ok(None);
    };
    match (value.as_u64(), value.as_f64()) {
        (Some(whole), _) => Ok(Some(whole)),
        (None, Some(number)) if (0.0..END).contains(&number) => Ok(Some(number as u64)),
        _ => Err(TokenError::Claim(name)),
    }
}

pub(super) fn audience_fits(accepted: &[String], audiences: &[&str]) -> bool {
    accepted.is_empty()
        || accepted.iter().any(|accepted| {
            audiences
                .iter()
                .any(|audience| bare(accepted) == bare(audience))
        })
}

/// An audience is often a URL, and its scheme and last slash are often lost; Envoy
/// compares without them.
fn bare(audience: &str) -> &str {
    let rest = audience
        .strip_prefix("http://")
        .or_else(|| audience.strip_prefix("https://"))
        .unwrap_or(audience);
    rest.strip_suffix('/').unwrap_or(rest)
}
