//! Signs JWTs (RFC 7515 compact serialization), with ES256 or EdDSA: what the
//! authorization server, JWT-SVIDs and client assertions are made with.

use std::fmt;

use aws_lc_rs::{
    agreement, digest,
    error::{KeyRejected, Unspecified},
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _},
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Map, Value, json};
use zeroize::Zeroizing;

use super::Algorithm;

/// A private key. Its `kid` is the thumbprint of the public one (RFC 7638), so that
/// it never names another.
pub struct SigningKey {
    kid: String,
    pair: Pair,
}

enum Pair {
    Es256(EcdsaKeyPair),
    EdDsa(Ed25519KeyPair),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SigningKeyError {
    /// The library's own error could tell of the key.
    #[error("not a private key for ES256 or EdDSA (PKCS #8, P-256 or Ed25519)")]
    Unusable,
    #[error("only ES256 and EdDSA are signed with")]
    Algorithm,
    #[error("the system has no randomness")]
    Randomness,
}

impl From<KeyRejected> for SigningKeyError {
    fn from(_of_the_key: KeyRejected) -> Self {
        Self::Unusable
    }
}

impl From<Unspecified> for SigningKeyError {
    fn from(_nothing_more: Unspecified) -> Self {
        Self::Randomness
    }
}

impl SigningKey {
    /// A new key for `ES256` or `EdDSA`.
    pub fn generate(algorithm: Algorithm) -> Result<Self, SigningKeyError> {
        let pair = match algorithm {
            Algorithm::Es256 => {
                Pair::Es256(EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING)?)
            }
            Algorithm::EdDsa => Pair::EdDsa(Ed25519KeyPair::generate()?),
            _ => return Err(SigningKeyError::Algorithm),
        };
        Ok(Self::new(pair))
    }

    /// From PKCS #8 in DER; the curve says which algorithm.
    pub fn from_pkcs8(der: &[u8]) -> Result<Self, SigningKeyError> {
        let pair = match EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, der) {
            Ok(pair) => Pair::Es256(pair),
            Err(_other_kind) => Pair::EdDsa(Ed25519KeyPair::from_pkcs8(der)?),
        };
        Ok(Self::new(pair))
    }

    /// ES256 with this private scalar, big-endian.
    pub fn from_p256(scalar: &[u8; 32]) -> Result<Self, SigningKeyError> {
        let point = agreement::PrivateKey::from_private_key(&agreement::ECDH_P256, scalar)?
            .compute_public_key()?;
        Ok(Self::new(Pair::Es256(
            EcdsaKeyPair::from_private_key_and_public_key(
                &ECDSA_P256_SHA256_FIXED_SIGNING,
                scalar,
                point.as_ref(),
            )?,
        )))
    }

    /// PKCS #8 in DER. For files of mode 0600 and nothing else.
    pub fn to_pkcs8(&self) -> Result<Zeroizing<Vec<u8>>, SigningKeyError> {
        let der = match &self.pair {
            Pair::Es256(pair) => pair.to_pkcs8v1()?.as_ref().to_vec(),
            Pair::EdDsa(pair) => pair.to_pkcs8()?.as_ref().to_vec(),
        };
        Ok(Zeroizing::new(der))
    }

    fn new(pair: Pair) -> Self {
        let mut key = Self {
            kid: String::new(),
            pair,
        };
        // RFC 7638 3.2: the required members alone, in order; serde_json sorts them.
        let members = Value::Object(key.public_members()).to_string();
        key.kid = URL_SAFE_NO_PAD.encode(digest::digest(&digest::SHA256, members.as_bytes()));
        key
    }

    pub fn kid(&self) -> &str {
        &self.kid
    }

    pub fn algorithm(&self) -> Algorithm {
        match self.pair {
            Pair::Es256(_) => Algorithm::Es256,
            Pair::EdDsa(_) => Algorithm::EdDsa,
        }
    }

    /// The public key as a member of a key set (RFC 7517 4).
    pub fn jwk(&self) -> Value {
        let mut jwk = self.public_members();
        jwk.insert("kid".into(), self.kid.clone().into());
        jwk.insert("alg".into(), self.algorithm().name().into());
        jwk.insert("use".into(), "sig".into());
        Value::Object(jwk)
    }

    fn public_members(&self) -> Map<String, Value> {
        let text = |bytes: &[u8]| Value::from(URL_SAFE_NO_PAD.encode(bytes));
        let members = match &self.pair {
            Pair::Es256(pair) => {
                // SEC 1 2.3.3: 4, then both coordinates.
                let point = pair.public_key().as_ref();
                let (x, y) = point[1..].split_at(32);
                json!({"crv": "P-256", "kty": "EC", "x": text(x), "y": text(y)})
            }
            Pair::EdDsa(pair) => {
                json!({"crv": "Ed25519", "kty": "OKP", "x": text(pair.public_key().as_ref())})
            }
        };
        match members {
            Value::Object(members) => members,
            _ => unreachable!("an object, as written above"),
        }
    }

    /// A token of these claims. `typ` is the header's (RFC 7515 4.1.9).
    pub fn sign(&self, typ: &str, claims: &Value) -> Result<String, SigningKeyError> {
        self.sign_with(typ, Map::new(), claims)
    }

    /// The same with further members in the header, such as `jwk` or `x5c`.
    pub fn sign_with(
        &self,
        typ: &str,
        more: Map<String, Value>,
        claims: &Value,
    ) -> Result<String, SigningKeyError> {
        let mut header = more;
        header.insert("alg".into(), self.algorithm().name().into());
        header.insert("kid".into(), self.kid.clone().into());
        header.insert("typ".into(), typ.into());
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let mut token = format!("{}.{}", part(&Value::Object(header)), part(claims));
        let signature = match &self.pair {
            Pair::Es256(pair) => pair.sign(&SystemRandom::new(), token.as_bytes())?,
            Pair::EdDsa(pair) => pair.sign(token.as_bytes()),
        };
        token.push('.');
        URL_SAFE_NO_PAD.encode_string(signature, &mut token);
        Ok(token)
    }
}

/// Never the key.
impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SigningKey")
            .field("kid", &self.kid)
            .field("algorithm", &self.algorithm())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::jwt::{Expected, KeySet, Token, TokenError};

    const ANY: Expected<'_> = Expected {
        issuer: None,
        audiences: &[],
        space_delimited: &[],
    };

    #[test]
    fn what_is_signed_verifies_and_a_key_survives_its_file() {
        for algorithm in [Algorithm::Es256, Algorithm::EdDsa] {
            let key = SigningKey::generate(algorithm).expect("key");
            let again =
                SigningKey::from_pkcs8(&key.to_pkcs8().expect("serializes")).expect("the same");
            assert_eq!(again.kid(), key.kid());
            let set = json!({"keys": [key.jwk()]}).to_string();
            let set = KeySet::parse(set.as_bytes()).expect("a key set");
            assert!(!set.has_private());
            let token = again.sign("JWT", &json!({"sub": "x"})).expect("signs");
            let now = SystemTime::now();
            let parsed = Token::parse(&token).expect("a token");
            let claims = parsed.verify(ANY, Some(&set), now).expect("verifies");
            assert_eq!(claims.subject(), Some("x"));
            let other = SigningKey::generate(algorithm).expect("key");
            let other = json!({"keys": [other.jwk()]}).to_string();
            let other = KeySet::parse(other.as_bytes()).expect("a key set");
            let refused = parsed.verify(ANY, Some(&other), now);
            assert_eq!(refused.err(), Some(TokenError::UnknownKey));
        }
    }

    #[test]
    fn the_kid_is_the_thumbprint() {
        // RFC 8037 A.2 and A.3.
        let der = {
            let seed = URL_SAFE_NO_PAD
                .decode("nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A")
                .expect("base64url");
            // RFC 8410 7: the fixed head of such a key.
            let mut der = vec![
                0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22,
                0x04, 0x20,
            ];
            der.extend(seed);
            der
        };
        let key = SigningKey::from_pkcs8(&der).expect("a key");
        assert_eq!(key.kid(), "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k");
        assert!(!format!("{key:?}").contains("nWGx"));
    }
}
