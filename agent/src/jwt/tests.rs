//! Tokens are really signed here; nothing is taken from files.

mod dpop;
mod keys;
mod rules;
mod tokens;

use std::{
    sync::{Arc, LazyLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::{
    encoding::AsDer,
    rand::SystemRandom,
    rsa::KeySize,
    signature::{
        self, ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P256_SHA256_FIXED_SIGNING,
        ECDSA_P384_SHA384_FIXED_SIGNING, ECDSA_P521_SHA512_FIXED_SIGNING, EcdsaKeyPair,
        Ed25519KeyPair, KeyPair, RsaEncoding, RsaKeyPair,
    },
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Value, json};

use super::*;

const ISSUER: &str = "https://issuer.example";
const NOW: u64 = 1_800_000_000;

fn now() -> SystemTime {
    at(NOW)
}

fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}

fn b64(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// A key pair of an issuer, and the id it goes by.
struct Signer {
    kid: &'static str,
    pair: Pair,
}

enum Pair {
    Rsa(RsaKeyPair),
    Ec(EcdsaKeyPair, &'static str),
    Ed(Ed25519KeyPair),
}

static RSA: LazyLock<Signer> = LazyLock::new(|| Signer::rsa("rsa"));
static OTHER_RSA: LazyLock<Signer> = LazyLock::new(|| Signer::rsa("rsa"));
static P256: LazyLock<Signer> = LazyLock::new(|| Signer::ec("p256"));
static OTHER_P256: LazyLock<Signer> = LazyLock::new(|| Signer::ec("other"));
static P384: LazyLock<Signer> = LazyLock::new(|| Signer::ec("p384"));
static P521: LazyLock<Signer> = LazyLock::new(|| Signer::ec("p521"));
static ED: LazyLock<Signer> = LazyLock::new(|| Signer {
    kid: "ed",
    pair: Pair::Ed(Ed25519KeyPair::generate().expect("a key")),
});

/// All keys of [`ISSUER`].
static KEYS: LazyLock<Arc<KeySet>> =
    LazyLock::new(|| key_set(&[RSA.jwk(), P256.jwk(), P384.jwk(), P521.jwk(), ED.jwk()]));

impl Signer {
    fn rsa(kid: &'static str) -> Self {
        let pair = RsaKeyPair::generate(KeySize::Rsa2048).expect("a key");
        Self {
            kid,
            pair: Pair::Rsa(pair),
        }
    }

    fn ec(kid: &'static str) -> Self {
        let (algorithm, crv) = match kid {
            "p384" => (&ECDSA_P384_SHA384_FIXED_SIGNING, "P-384"),
            "p521" => (&ECDSA_P521_SHA512_FIXED_SIGNING, "P-521"),
            _ => (&ECDSA_P256_SHA256_FIXED_SIGNING, "P-256"),
        };
        let pair = EcdsaKeyPair::generate(algorithm).expect("a key");
        Self {
            kid,
            pair: Pair::Ec(pair, crv),
        }
    }

    /// Modulus of an RSA key, without leading zeros.
    fn modulus(&self) -> Vec<u8> {
        let Pair::Rsa(pair) = &self.pair else {
            panic!("not an RSA key");
        };
        // PKCS#1 RSAPublicKey: a sequence of modulus and exponent 65537.
        let der = pair.public_key().as_ref();
        assert_eq!((der.len(), &der[4..9]), (270, &[2, 130, 1, 1, 0][..]));
        der[9..265].to_vec()
    }

    fn jwk(&self) -> Value {
        let kid = self.kid;
        match &self.pair {
            Pair::Rsa(_) => {
                json!({"kty": "RSA", "kid": kid, "n": b64(self.modulus()), "e": "AQAB"})
            }
            Pair::Ec(pair, crv) => {
                let (x, y) = {
                    let point = &pair.public_key().as_ref()[1..];
                    point.split_at(point.len() / 2)
                };
                json!({"kty": "EC", "kid": kid, "crv": crv, "x": b64(x), "y": b64(y)})
            }
            Pair::Ed(pair) => {
                let x = b64(pair.public_key().as_ref());
                json!({"kty": "OKP", "kid": kid, "crv": "Ed25519", "x": x})
            }
        }
    }

    /// SubjectPublicKeyInfo.
    fn spki(&self) -> Vec<u8> {
        match &self.pair {
            Pair::Rsa(pair) => pair.public_key().as_der().expect("DER").as_ref().to_vec(),
            Pair::Ec(pair, _) => pair.public_key().as_der().expect("DER").as_ref().to_vec(),
            Pair::Ed(pair) => pair.public_key().as_der().expect("DER").as_ref().to_vec(),
        }
    }

    fn sign_bytes(&self, alg: &str, message: &[u8]) -> Vec<u8> {
        let random = SystemRandom::new();
        match &self.pair {
            Pair::Rsa(pair) => {
                let encoding: &'static dyn RsaEncoding = match alg {
                    "RS384" => &signature::RSA_PKCS1_SHA384,
                    "RS512" => &signature::RSA_PKCS1_SHA512,
                    "PS256" => &signature::RSA_PSS_SHA256,
                    "PS384" => &signature::RSA_PSS_SHA384,
                    "PS512" => &signature::RSA_PSS_SHA512,
                    _ => &signature::RSA_PKCS1_SHA256,
                };
                let mut bytes = vec![0; pair.public_modulus_len()];
                pair.sign(encoding, &random, message, &mut bytes)
                    .expect("a signature");
                bytes
            }
            Pair::Ec(pair, _) => {
                let bytes = pair.sign(&random, message).expect("a signature");
                bytes.as_ref().to_vec()
            }
            Pair::Ed(pair) => pair.sign(message).as_ref().to_vec(),
        }
    }

    /// A token with any header and payload, correctly signed.
    fn sign_raw(&self, alg: &str, header: impl AsRef<[u8]>, payload: impl AsRef<[u8]>) -> String {
        let signed = format!("{}.{}", b64(header), b64(payload));
        let signature = self.sign_bytes(alg, signed.as_bytes());
        format!("{signed}.{}", b64(signature))
    }

    fn sign(&self, alg: &str, payload: &Value) -> String {
        let header = json!({"alg": alg, "kid": self.kid, "typ": "JWT"});
        self.sign_raw(alg, header.to_string(), payload.to_string())
    }
}

/// Signed with ASN.1, as other protocols do, by the key of `signer`.
fn sign_der(signer: &Signer, message: &[u8]) -> Vec<u8> {
    let Pair::Ec(pair, _) = &signer.pair else {
        panic!("not an EC key");
    };
    let pkcs8 = pair.to_pkcs8v1().expect("PKCS#8");
    let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, pkcs8.as_ref())
        .expect("the same key");
    let bytes = pair
        .sign(&SystemRandom::new(), message)
        .expect("a signature");
    bytes.as_ref().to_vec()
}

fn key_set(keys: &[Value]) -> Arc<KeySet> {
    let text = json!({ "keys": keys }).to_string();
    Arc::new(KeySet::parse(text.as_bytes()).expect("usable keys"))
}

fn payload() -> Value {
    json!({"iss": ISSUER, "sub": "alice", "aud": "api", "exp": NOW + 600})
}

/// The payload with members changed; `null` takes one out.
fn payload_with(changes: Value) -> Value {
    let mut payload = payload();
    let members = payload.as_object_mut().expect("an object");
    for (name, value) in changes.as_object().expect("an object") {
        match value {
            Value::Null => members.remove(name),
            value => members.insert(name.clone(), value.clone()),
        };
    }
    payload
}

fn good() -> String {
    P256.sign("ES256", &payload())
}
