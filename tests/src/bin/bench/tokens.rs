//! Tokens of an issuer, as clients of a real service have them, and its key set.

use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use aws_lc_rs::{
    rand::SystemRandom,
    rsa::KeySize,
    signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _, RSA_PKCS1_SHA256, RsaKeyPair,
    },
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use clap::ValueEnum;
use serde_json::{Value, json};

pub const ISSUER: &str = "https://issuer.example";
/// How many tokens clients take turns with.
pub const DISTINCT: usize = 5_000;
/// Longer than any benchmark.
const LIFETIME: Duration = Duration::from_secs(24 * 3600);

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Algorithm {
    Rs256,
    Es256,
}

impl Algorithm {
    fn name(self) -> &'static str {
        match self {
            Self::Rs256 => "RS256",
            Self::Es256 => "ES256",
        }
    }
}

/// Files of tokens, one a line.
pub struct Tokens {
    directory: PathBuf,
    pub jwks: String,
}

impl Tokens {
    pub fn mint(directory: &Path) -> Result<Self> {
        let random = SystemRandom::new();
        let rsa = RsaKeyPair::generate(KeySize::Rsa2048)?;
        let ec = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING)?;
        let exp = (SystemTime::now() + LIFETIME).duration_since(UNIX_EPOCH)?;
        let tokens = Self {
            directory: directory.to_owned(),
            jwks: json!({"keys": [jwk_of_rsa(&rsa), jwk_of_ec(&ec)]}).to_string(),
        };
        for algorithm in [Algorithm::Rs256, Algorithm::Es256] {
            let sign = |message: &[u8]| -> Result<Vec<u8>> {
                Ok(match algorithm {
                    Algorithm::Es256 => ec.sign(&random, message)?.as_ref().to_vec(),
                    Algorithm::Rs256 => {
                        let mut signature = vec![0; rsa.public_modulus_len()];
                        rsa.sign(&RSA_PKCS1_SHA256, &random, message, &mut signature)?;
                        signature
                    }
                })
            };
            let all = (0..DISTINCT).map(|n| token(algorithm, n, exp.as_secs(), sign));
            let all: Vec<String> = all.collect::<Result<_>>()?;
            let write = |count: usize| -> Result<()> {
                let path = tokens.file(algorithm, count > 1);
                let text = all[..count].join("\n") + "\n";
                std::fs::write(&path, text).with_context(|| path.display().to_string())
            };
            write(1)?;
            write(DISTINCT)?;
        }
        Ok(tokens)
    }

    pub fn file(&self, algorithm: Algorithm, distinct: bool) -> PathBuf {
        let which = if distinct { "distinct" } else { "one" };
        let name = format!("{}-{which}.tokens", algorithm.name());
        self.directory.join(name)
    }

    /// One that is good.
    pub fn one(&self, algorithm: Algorithm) -> Result<String> {
        let text = std::fs::read_to_string(self.file(algorithm, false))?;
        Ok(text.trim().to_owned())
    }
}

fn token(
    algorithm: Algorithm,
    number: usize,
    exp: u64,
    sign: impl Fn(&[u8]) -> Result<Vec<u8>>,
) -> Result<String> {
    let encoded = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let name = algorithm.name();
    let header = encoded(json!({"alg": name, "kid": name, "typ": "JWT"}));
    let payload = encoded(json!({
        "iss": ISSUER, "aud": "shop", "sub": format!("user-{number}"), "exp": exp,
        "scope": "read write", "jti": format!("{number:032x}"),
    }));
    let message = format!("{header}.{payload}");
    let signature = URL_SAFE_NO_PAD.encode(sign(message.as_bytes())?);
    Ok(format!("{message}.{signature}"))
}

fn jwk_of_ec(pair: &EcdsaKeyPair) -> Value {
    // An uncompressed point: a byte that says so, then x and y.
    let (x, y) = pair.public_key().as_ref()[1..].split_at(32);
    json!({
        "kty": "EC", "crv": "P-256", "kid": "ES256", "alg": "ES256", "use": "sig",
        "x": URL_SAFE_NO_PAD.encode(x), "y": URL_SAFE_NO_PAD.encode(y),
    })
}

fn jwk_of_rsa(pair: &RsaKeyPair) -> Value {
    let key = pair.public_key();
    let part = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    json!({
        "kty": "RSA", "kid": "RS256", "alg": "RS256", "use": "sig",
        "n": part(key.modulus().big_endian_without_leading_zero()),
        "e": part(key.exponent().big_endian_without_leading_zero()),
    })
}
