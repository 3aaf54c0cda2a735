//! Key sets of issuers (RFC 7517): which keys may check a signature, and with what.

use std::{
    fmt,
    hash::{Hash, Hasher},
};

use aws_lc_rs::{
    digest,
    signature::{ParsedPublicKey, RsaPublicKeyComponents},
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Map, Value};

use super::{
    algorithm::Algorithm,
    json::{self, JsonError},
};

const MAX_TEXT: usize = 1 << 20;
/// A token without `kid` is tried against each.
const MAX_KEYS: usize = 256;
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;
/// What the library takes; real exponents have 17 bits.
const MAX_EXPONENT_BITS: usize = 33;
/// Members that only the owner of a key should have (RFC 7518 6.2.2, 6.3.2, 6.4).
const PRIVATE: [&str; 8] = ["d", "p", "q", "dp", "dq", "qi", "oth", "k"];

/// The usable keys of one issuer, at least one. Equal when read from the same text.
pub struct KeySet {
    digest: [u8; 32],
    keys: Vec<Key>,
    skipped: Vec<Skipped>,
    private: bool,
}

/// A key of the set that is not used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    pub kid: Option<String>,
    pub reason: SkipReason,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SkipReason {
    #[error("not an object")]
    NotAnObject,
    #[error("`{0}` is missing")]
    Missing(&'static str),
    #[error("`{0}` has the wrong type")]
    Type(&'static str),
    #[error("`{0}` is not base64url without padding")]
    Encoding(&'static str),
    #[error("`kty` {0:?} is unknown")]
    KeyType(String),
    #[error("`kty` oct is a shared secret, not a public key")]
    SharedSecret,
    #[error("it has private members")]
    Private,
    #[error("`use` is not sig")]
    Use,
    #[error("`key_ops` is without verify")]
    Operations,
    #[error("`crv` {0:?} is unknown for this `kty`")]
    Curve(String),
    #[error("not a point of its curve")]
    Point,
    #[error("RSA key of {0} bits; 2048 to 8192 are accepted")]
    RsaSize(usize),
    #[error("RSA modulus or exponent cannot be one")]
    RsaNumbers,
    #[error("`alg` {0:?} does not fit the key")]
    Algorithm(String),
}

/// The issuer's fault, or that of whoever wrote the set into a policy.
#[derive(Debug, thiserror::Error)]
pub enum KeySetError {
    #[error("key set of more than {MAX_TEXT} bytes")]
    TooLarge,
    #[error("key set: {0}")]
    Json(#[from] JsonError),
    #[error("key set without a list `keys`")]
    NoList,
    #[error("key set of {0} keys; at most {MAX_KEYS} are accepted")]
    TooMany(usize),
    #[error("no usable key in the key set: {}", Reasons(.0))]
    NoneUsable(Vec<Skipped>),
}

impl KeySet {
    pub fn parse(text: &[u8]) -> Result<Self, KeySetError> {
        if text.len() > MAX_TEXT {
            return Err(KeySetError::TooLarge);
        }
        let Value::Object(mut set) = json::parse(text)? else {
            return Err(KeySetError::NoList);
        };
        let Some(Value::Array(list)) = set.remove("keys") else {
            return Err(KeySetError::NoList);
        };
        if list.len() > MAX_KEYS {
            return Err(KeySetError::TooMany(list.len()));
        }
        let mut keys = Vec::new();
        let mut skipped = Vec::new();
        for jwk in &list {
            match Key::parse(jwk) {
                Ok(key) => keys.push(key),
                Err(reason) => skipped.push(Skipped {
                    kid: jwk.get("kid").and_then(Value::as_str).map(shown),
                    reason,
                }),
            }
        }
        if keys.is_empty() {
            return Err(KeySetError::NoneUsable(skipped));
        }
        let digest = digest::digest(&digest::SHA256, text);
        Ok(Self {
            digest: digest.as_ref().try_into().expect("SHA-256 has 32 bytes"),
            keys,
            skipped,
            private: list
                .iter()
                .any(|jwk| PRIVATE.iter().any(|member| jwk.get(member).is_some())),
        })
    }

    /// SHA-256 of the text: the same keys have the same name, whenever they were read.
    pub fn digest(&self) -> &[u8; 32] {
        &self.digest
    }

    pub fn skipped(&self) -> &[Skipped] {
        &self.skipped
    }

    /// Whether private members were published with the keys. They are not kept, but
    /// whoever read the set can sign.
    pub fn has_private(&self) -> bool {
        self.private
    }

    pub fn knows(&self, kid: &str) -> bool {
        self.keys.iter().any(|key| key.kid.as_deref() == Some(kid))
    }

    /// Whether one of the keys made this signature (RFC 7515 5.2): for tokens that are
    /// not read as bearer tokens.
    pub fn verifies(&self, algorithm: Algorithm, signed: &[u8], signature: &[u8]) -> bool {
        algorithm
            .signature_len()
            .is_none_or(|length| signature.len() == length)
            && self
                .candidates(None, algorithm)
                .any(|key| key.verify_sig(signed, signature).is_ok())
    }

    /// Keys that may have signed a token with this header. The key says which
    /// algorithms are its own; the token only chooses among them.
    pub(super) fn candidates<'a>(
        &'a self,
        kid: Option<&'a str>,
        algorithm: Algorithm,
    ) -> impl Iterator<Item = &'a ParsedPublicKey> {
        self.keys
            .iter()
            .filter(move |key| match (kid, key.kid.as_deref()) {
                (Some(asked), Some(own)) => asked == own,
                _ => true,
            })
            .filter_map(move |key| {
                key.parsed
                    .iter()
                    .find(|(own, _)| *own == algorithm)
                    .map(|(_, parsed)| parsed)
            })
    }
}

/// A public key that a message brings along (RFC 7515 4.1.3). It proves nothing of
/// whose it is: that is for whoever knows its thumbprint.
pub struct EmbeddedKey {
    key: Key,
    thumbprint: [u8; 32],
}

impl EmbeddedKey {
    /// Refuses private members: whoever sends them has given the key away.
    pub fn parse(jwk: &Value) -> Result<Self, SkipReason> {
        if PRIVATE.iter().any(|member| jwk.get(member).is_some()) {
            return Err(SkipReason::Private);
        }
        let key = Key::parse(jwk)?;
        // RFC 7638 3.2: the members that make the key, sorted; serde_json sorts them.
        let members: &[&str] = match jwk.get("kty").and_then(Value::as_str) {
            Some("RSA") => &["e", "kty", "n"],
            Some("EC") => &["crv", "kty", "x", "y"],
            _ => &["crv", "kty", "x"],
        };
        let own = members
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), jwk.get(name)?.clone())));
        let text = Value::Object(own.collect()).to_string();
        let digest = digest::digest(&digest::SHA256, text.as_bytes());
        Ok(Self {
            key,
            thumbprint: digest.as_ref().try_into().expect("SHA-256 has 32 bytes"),
        })
    }

    /// RFC 7638, with SHA-256.
    pub fn thumbprint(&self) -> [u8; 32] {
        self.thumbprint
    }

    pub(super) fn verifies(&self, algorithm: Algorithm, signed: &[u8], signature: &[u8]) -> bool {
        let length_fits = algorithm
            .signature_len()
            .is_none_or(|length| signature.len() == length);
        let mut fitting = (self.key.parsed.iter()).filter(|(own, _)| *own == algorithm);
        length_fits && fitting.any(|(_, key)| key.verify_sig(signed, signature).is_ok())
    }
}

/// Numbers and key ids, no key.
impl fmt::Debug for KeySet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kids: Vec<_> = self.keys.iter().map(|key| key.kid.as_deref()).collect();
        f.debug_struct("KeySet")
            .field("kids", &kids)
            .field("skipped", &self.skipped)
            .finish_non_exhaustive()
    }
}

impl PartialEq for KeySet {
    fn eq(&self, other: &Self) -> bool {
        self.digest == other.digest
    }
}

impl Eq for KeySet {}

impl Hash for KeySet {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.digest.hash(state);
    }
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kid {
            Some(kid) => write!(f, "key {kid:?}: {}", self.reason),
            None => write!(f, "key without id: {}", self.reason),
        }
    }
}

struct Reasons<'a>(&'a [Skipped]);

impl fmt::Display for Reasons<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 4;
        if self.0.is_empty() {
            return f.write_str("it is empty");
        }
        for (index, skipped) in self.0.iter().take(SHOWN).enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{skipped}")?;
        }
        match self.0.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, "; and {more} more"),
        }
    }
}

struct Key {
    /// Never empty.
    kid: Option<String>,
    /// Parsed once for each algorithm that this key may be used with.
    parsed: Vec<(Algorithm, ParsedPublicKey)>,
}

impl Key {
    fn parse(jwk: &Value) -> Result<Self, SkipReason> {
        let jwk = jwk.as_object().ok_or(SkipReason::NotAnObject)?;
        let kid = text(jwk, "kid")?.filter(|kid| !kid.is_empty());
        let kty = text(jwk, "kty")?.ok_or(SkipReason::Missing("kty"))?;
        if kty == "oct" {
            return Err(SkipReason::SharedSecret);
        }
        if text(jwk, "use")?.is_some_and(|usage| usage != "sig") {
            return Err(SkipReason::Use);
        }
        match jwk.get("key_ops") {
            None => {}
            Some(Value::Array(operations)) if operations.iter().any(|o| o == "verify") => {}
            Some(Value::Array(_)) => return Err(SkipReason::Operations),
            Some(_) => return Err(SkipReason::Type("key_ops")),
        }
        let mut parsed = match kty {
            "RSA" => rsa(jwk)?,
            "EC" | "OKP" => vec![curve(jwk, kty)?],
            _ => return Err(SkipReason::KeyType(shown(kty))),
        };
        if let Some(alg) = text(jwk, "alg")? {
            parsed.retain(|(own, _)| own.name() == alg);
            if parsed.is_empty() {
                return Err(SkipReason::Algorithm(shown(alg)));
            }
        }
        Ok(Self {
            kid: kid.map(str::to_owned),
            parsed,
        })
    }
}

fn rsa(jwk: &Map<String, Value>) -> Result<Vec<(Algorithm, ParsedPublicKey)>, SkipReason> {
    let n = number(jwk, "n")?;
    let e = number(jwk, "e")?;
    let size = bits(&n);
    if !RSA_BITS.contains(&size) {
        return Err(SkipReason::RsaSize(size));
    }
    let odd = |number: &[u8]| number.last().is_some_and(|last| last & 1 == 1);
    // An exponent of 1 would make every message its own signature.
    if !odd(&n) || !odd(&e) || e == [1] || bits(&e) > MAX_EXPONENT_BITS {
        return Err(SkipReason::RsaNumbers);
    }
    let components = RsaPublicKeyComponents { n, e };
    Algorithm::ALL
        .into_iter()
        .filter_map(|algorithm| Some((algorithm, algorithm.rsa()?)))
        .map(|(algorithm, parameters)| {
            let parsed = components
                .to_parsed_public_key(parameters)
                .map_err(|_| SkipReason::RsaNumbers)?;
            Ok((algorithm, parsed))
        })
        .collect()
}

fn curve(jwk: &Map<String, Value>, kty: &str) -> Result<(Algorithm, ParsedPublicKey), SkipReason> {
    let crv = text(jwk, "crv")?.ok_or(SkipReason::Missing("crv"))?;
    let (algorithm, parameters, length) =
        Algorithm::curve(kty, crv).ok_or_else(|| SkipReason::Curve(shown(crv)))?;
    let point = match kty {
        // Uncompressed, SEC 1 2.3.3.
        "EC" => {
            let (x, y) = (coordinate(jwk, "x", length)?, coordinate(jwk, "y", length)?);
            [vec![4], x, y].concat()
        }
        // RFC 8037 2: octets, not a number.
        _ => bytes(jwk, "x").and_then(|x| match x.len() == length {
            true => Ok(x),
            false => Err(SkipReason::Point),
        })?,
    };
    let parsed = ParsedPublicKey::new(parameters, point).map_err(|_| SkipReason::Point)?;
    Ok((algorithm, parsed))
}

fn text<'a>(
    jwk: &'a Map<String, Value>,
    name: &'static str,
) -> Result<Option<&'a str>, SkipReason> {
    match jwk.get(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(SkipReason::Type(name)),
    }
}

fn bytes(jwk: &Map<String, Value>, name: &'static str) -> Result<Vec<u8>, SkipReason> {
    let text = text(jwk, name)?.ok_or(SkipReason::Missing(name))?;
    URL_SAFE_NO_PAD
        .decode(text)
        .map_err(|_| SkipReason::Encoding(name))
}

/// Big-endian, without the leading zeros that some libraries write.
fn number(jwk: &Map<String, Value>, name: &'static str) -> Result<Vec<u8>, SkipReason> {
    let bytes = bytes(jwk, name)?;
    let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
    Ok(bytes[zeros..].to_vec())
}

/// In full length (RFC 7518 6.2.1.2). PyJWT and Authlib leave leading zeros out, in one key
/// of 128: those are filled in.
fn coordinate(
    jwk: &Map<String, Value>,
    name: &'static str,
    length: usize,
) -> Result<Vec<u8>, SkipReason> {
    let number = number(jwk, name)?;
    let zeros = length.checked_sub(number.len()).ok_or(SkipReason::Point)?;
    Ok([vec![0; zeros], number].concat())
}

/// As much of an issuer's word as fits a message.
fn shown(name: &str) -> String {
    name.chars().take(64).collect()
}

fn bits(number: &[u8]) -> usize {
    match number.first() {
        Some(first) => number.len() * 8 - first.leading_zeros() as usize,
        None => 0,
    }
}
