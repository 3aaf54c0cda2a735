//! Tokens, good and bad, and the key sets that they are checked with.

use std::{
    collections::BTreeMap,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Result, bail};
use aws_lc_rs::{
    rand::SystemRandom,
    rsa::KeySize,
    signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _,
        RSA_PKCS1_SHA256, RsaKeyPair,
    },
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::Deserialize;
use serde_json::{Map, Value, json};

pub const ISSUER: &str = "https://issuer.example";

/// How a token departs from a good one.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenSpec {
    /// Who signs.
    #[serde(default = "rsa")]
    pub key: String,
    /// Members of the header that are set otherwise, or (null) left out.
    #[serde(default)]
    pub header: Map<String, Value>,
    /// Claims that are set otherwise, or (null) left out. Times are from now.
    #[serde(default)]
    pub claims: Map<String, Value>,
    /// Times are since 1970.
    #[serde(default)]
    pub absolute: bool,
    /// The text of the payload, instead of claims.
    #[serde(default)]
    pub payload: Option<String>,
    /// How the parts are put together.
    #[serde(default = "shape")]
    pub shape: String,
}

fn rsa() -> String {
    "rsa".into()
}

fn shape() -> String {
    "HEADER.PAYLOAD.SIGNATURE".into()
}

/// The keys of this run. `other` is in no key set; `second` is another issuer's.
pub struct Keys {
    rsa: RsaKeyPair,
    other: RsaKeyPair,
    ec: EcdsaKeyPair,
    second: EcdsaKeyPair,
    ed: Ed25519KeyPair,
    now: i64,
}

impl Keys {
    pub fn generate() -> Result<Self> {
        let ec = || EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING);
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        Ok(Self {
            rsa: RsaKeyPair::generate(KeySize::Rsa2048)?,
            other: RsaKeyPair::generate(KeySize::Rsa2048)?,
            ec: ec()?,
            second: ec()?,
            ed: Ed25519KeyPair::generate()?,
            now: i64::try_from(now)?,
        })
    }

    /// Key sets by the names that policies have for them.
    pub fn documents(&self) -> BTreeMap<String, String> {
        let set = |keys: &[Value]| json!({ "keys": keys }).to_string();
        let rsa = jwk_of_rsa("rsa", &self.rsa);
        let ec = jwk_of_ec("ec", &self.ec);
        let ed = json!({
            "kty": "OKP", "crv": "Ed25519", "kid": "ed",
            "x": URL_SAFE_NO_PAD.encode(self.ed.public_key()),
        });
        let second = jwk_of_ec("second", &self.second);
        [
            ("${jwks}", set(&[rsa, ec, ed])),
            ("${second}", set(&[second])),
        ]
        .map(|(name, text)| (name.to_owned(), text))
        .into()
    }

    pub fn mint(&self, spec: &TokenSpec) -> Result<String> {
        let algorithm = match spec.key.as_str() {
            "rsa" | "other" => "RS256",
            "ec" | "second" => "ES256",
            "ed" => "EdDSA",
            unknown => bail!("there is no key {unknown}"),
        };
        let mut header = members(json!({"alg": algorithm, "kid": spec.key, "typ": "JWT"}));
        merge(&mut header, &spec.header);
        let payload = match &spec.payload {
            Some(text) => text.replace("LATER", &(self.now + 3600).to_string()),
            None => self.claims(spec).to_string(),
        };
        let header = URL_SAFE_NO_PAD.encode(Value::Object(header).to_string());
        let payload = URL_SAFE_NO_PAD.encode(payload);
        let signature = self.sign(&spec.key, format!("{header}.{payload}").as_bytes())?;
        Ok(spec
            .shape
            .replace("HEADER", &header)
            .replace("PAYLOAD", &payload)
            .replace("SIGNATURE", &URL_SAFE_NO_PAD.encode(signature))
            .replace("ZEROES", &URL_SAFE_NO_PAD.encode([0; 64])))
    }

    fn claims(&self, spec: &TokenSpec) -> Value {
        let mut claims = members(json!({"iss": ISSUER, "sub": "alice", "exp": self.now + 3600}));
        let mut other = spec.claims.clone();
        for time in ["exp", "nbf", "iat"] {
            if let Some(from_now) = other.get(time).and_then(Value::as_i64)
                && !spec.absolute
            {
                other.insert(time.into(), (self.now + from_now).into());
            }
        }
        merge(&mut claims, &other);
        Value::Object(claims)
    }

    fn sign(&self, key: &str, message: &[u8]) -> Result<Vec<u8>> {
        let random = SystemRandom::new();
        let rsa = |pair: &RsaKeyPair| -> Result<Vec<u8>> {
            let mut signature = vec![0; pair.public_modulus_len()];
            pair.sign(&RSA_PKCS1_SHA256, &random, message, &mut signature)?;
            Ok(signature)
        };
        Ok(match key {
            "rsa" => rsa(&self.rsa)?,
            "other" => rsa(&self.other)?,
            "ec" => self.ec.sign(&random, message)?.as_ref().to_vec(),
            "second" => self.second.sign(&random, message)?.as_ref().to_vec(),
            _ => self.ed.sign(message).as_ref().to_vec(),
        })
    }
}

fn members(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(members) => members,
        _ => Map::new(),
    }
}

fn merge(into: &mut Map<String, Value>, from: &Map<String, Value>) {
    for (name, value) in from {
        if value.is_null() {
            into.remove(name);
        } else {
            into.insert(name.clone(), value.clone());
        }
    }
}

fn jwk_of_ec(kid: &str, pair: &EcdsaKeyPair) -> Value {
    // An uncompressed point: a byte that says so, then x and y.
    let (x, y) = pair.public_key().as_ref()[1..].split_at(32);
    json!({
        "kty": "EC", "crv": "P-256", "kid": kid, "alg": "ES256",
        "x": URL_SAFE_NO_PAD.encode(x), "y": URL_SAFE_NO_PAD.encode(y),
    })
}

fn jwk_of_rsa(kid: &str, pair: &RsaKeyPair) -> Value {
    // PKCS #1's RSAPublicKey: a sequence of a modulus of 2048 bits, which has a
    // zero before it, and the exponent 65537.
    let der = pair.public_key().as_ref();
    assert_eq!((der.len(), &der[4..9]), (270, &[2, 130, 1, 1, 0][..]));
    let modulus = URL_SAFE_NO_PAD.encode(&der[9..265]);
    json!({"kty": "RSA", "kid": kid, "alg": "RS256", "n": modulus, "e": "AQAB"})
}
