//! The trust domain's bundle (SPIFFE Trust Domain and Bundle 4): a JWK set with the
//! roots of X.509-SVIDs and the keys of JWT-SVIDs.

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use rustls::pki_types::CertificateDer;
use serde_json::{Map, Value, json};
use x509_parser::public_key::PublicKey;

use super::{problem::Problem, tokens};
use crate::{
    authority::{Config, Server},
    identity::{IdentityError, read_certificates},
};

/// How often consumers should fetch it, seconds.
const REFRESH: u64 = 300;

/// The own root, and those that the configuration adds.
pub fn roots(server: &Server) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let mut roots = vec![server.root.certificate().clone()];
    roots.extend(further(&server.config)?);
    Ok(roots)
}

/// Read each time: that is how a root is rotated.
pub fn further(config: &Config) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    match &config.certificates.bundle {
        Some(path) => read_certificates(path),
        None => Ok(Vec::new()),
    }
}

pub async fn document(server: &Server) -> Result<Value, Problem> {
    let roots = roots(server).map_err(|e| Problem::failed(e.to_string()))?;
    let mut keys = Vec::new();
    for root in &roots {
        keys.push(x509(root).ok_or_else(|| Problem::failed("a root has an unknown kind of key"))?);
    }
    let signing = server.keys.jwks();
    for key in signing["keys"].as_array().into_iter().flatten() {
        let mut key = key.clone();
        key["use"] = "jwt-svid".into();
        keys.push(key);
    }
    let keys = Value::Array(keys);
    let sequence = sequence(server, &keys).await?;
    Ok(json!({
        "keys": keys,
        "spiffe_sequence": sequence,
        "spiffe_refresh_hint": REFRESH,
    }))
}

/// The number of this content; asked of the store when the content has changed.
async fn sequence(server: &Server, keys: &Value) -> Result<u64, Problem> {
    let digest = tokens::hex(&tokens::digest(keys.to_string().as_bytes()));
    let known = || {
        server
            .ca
            .sequence
            .lock()
            .expect("no panic while it is held")
    };
    if let Some((of, number)) = &*known()
        && *of == digest
    {
        return Ok(*number);
    }
    let number = tokens::sequence(&server.store, &digest).await?;
    *known() = Some((digest, number));
    Ok(number)
}

/// A root as a JWK with `x5c` (RFC 7517 4.7).
fn x509(root: &CertificateDer<'_>) -> Option<Value> {
    let (_rest, certificate) = x509_parser::parse_x509_certificate(root).ok()?;
    let key = certificate.public_key();
    let text = |bytes: &[u8]| Value::from(URL_SAFE_NO_PAD.encode(bytes));
    // DER's integers have a zero before a first bit that is set; JWK's have none.
    let unsigned = |bytes: &[u8]| {
        let zeros = bytes.iter().take_while(|&&byte| byte == 0).count();
        text(&bytes[zeros..])
    };
    const ED25519: &str = "1.3.101.112";
    let mut jwk = Map::new();
    match key.parsed().ok()? {
        PublicKey::EC(point) => {
            // SEC 1 2.3.3: 4, then both coordinates.
            let data = point.data();
            let curve = match data.len() {
                65 => "P-256",
                97 => "P-384",
                133 => "P-521",
                _ => return None,
            };
            let (x, y) = data[1..].split_at(data.len() / 2);
            jwk.extend([
                ("kty".to_owned(), "EC".into()),
                ("crv".to_owned(), curve.into()),
                ("x".to_owned(), text(x)),
                ("y".to_owned(), text(y)),
            ]);
        }
        PublicKey::RSA(rsa) => jwk.extend([
            ("kty".to_owned(), "RSA".into()),
            ("n".to_owned(), unsigned(rsa.modulus)),
            ("e".to_owned(), unsigned(rsa.exponent)),
        ]),
        _ if key.algorithm.algorithm.to_id_string() == ED25519 => jwk.extend([
            ("kty".to_owned(), "OKP".into()),
            ("crv".to_owned(), "Ed25519".into()),
            ("x".to_owned(), text(&key.subject_public_key.data)),
        ]),
        _ => return None,
    }
    jwk.insert("use".into(), "x509-svid".into());
    jwk.insert("x5c".into(), json!([STANDARD.encode(root)]));
    Some(Value::Object(jwk))
}
