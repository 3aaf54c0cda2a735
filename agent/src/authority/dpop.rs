//! DPoP proofs (RFC 9449 4.3): that whoever sends a request has a key, so that tokens
//! can be bound to it. Each proof is good for one request, by the store's word.

use aws_lc_rs::digest;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Map, Value, json};

use super::{
    Server,
    client_auth::{has_type, part},
    error::{Code, OAuthError},
    keys::hash,
    request::Asker,
};
use crate::jwt::{Algorithm, KeySet};

/// Longest proof, bytes.
const MAX_PROOF: usize = 8 << 10;
/// How far its `iat` may be from now, seconds.
const WINDOW: u64 = 60;
/// Members that only the owner of a key should have.
const PRIVATE: [&str; 8] = ["d", "p", "q", "dp", "dq", "qi", "oth", "k"];

/// The thumbprint (RFC 7638) of the key that the request proves, if it has a proof.
/// `url` is where it was sent; `token`: the access token that came with it.
pub async fn thumbprint(
    server: &Server,
    asker: &Asker,
    method: &str,
    url: &str,
    token: Option<&str>,
) -> Result<Option<String>, OAuthError> {
    let invalid = || OAuthError::new(Code::InvalidDpopProof, "the DPoP proof is not valid");
    let Some(proof) = asker.header("dpop").map_err(|_| invalid())? else {
        return Ok(None);
    };
    let now = server.clock.seconds();
    let (jkt, id) = check(proof, method, url, token, now)
        .map_err(|why: &'static str| invalid().with_detail(why))?;
    let once = hash(&format!("dpop {jkt} {id}"));
    match server.store.use_id(&once, now + 2 * WINDOW + 1).await? {
        true => Ok(Some(jkt)),
        false => Err(invalid().with_detail("used before").of_reuse()),
    }
}

/// Thumbprint and `jti`, or what is wrong.
fn check(
    proof: &str,
    method: &str,
    url: &str,
    token: Option<&str>,
    now: u64,
) -> Result<(String, String), &'static str> {
    if proof.len() > MAX_PROOF {
        return Err("too long");
    }
    let (signed, signature) = proof.rsplit_once('.').ok_or("not a JWT")?;
    if signed.split('.').count() != 2 {
        return Err("not a JWT");
    }
    let signature = URL_SAFE_NO_PAD.decode(signature).map_err(|_| "not a JWT")?;
    let header = part(proof, 0).ok_or("header")?;
    let claims = part(proof, 1).ok_or("claims")?;
    if !header.contains_key("typ") || !has_type(&header, &["dpop+jwt"]) {
        return Err("typ is not dpop+jwt");
    }
    if header.contains_key("crit") || header.contains_key("b64") {
        return Err("asks for an extension");
    }
    let algorithm = header.get("alg").and_then(Value::as_str);
    let algorithm = algorithm
        .and_then(Algorithm::from_name)
        .ok_or("alg is not accepted")?;
    let Some(Value::Object(jwk)) = header.get("jwk") else {
        return Err("no jwk");
    };
    if PRIVATE.iter().any(|member| jwk.contains_key(*member)) {
        return Err("jwk is a private key");
    }
    let set = json!({"keys": [jwk]}).to_string();
    let set = KeySet::parse(set.as_bytes()).map_err(|_| "jwk is no usable key")?;
    if !set.verifies(algorithm, signed.as_bytes(), &signature) {
        return Err("signature");
    }
    let text = |name: &str| claims.get(name).and_then(Value::as_str);
    if text("htm") != Some(method) {
        return Err("htm is another method");
    }
    if !text("htu").is_some_and(|htu| same_url(htu, url)) {
        return Err("htu is another URL");
    }
    let issued = claims.get("iat").and_then(Value::as_f64).ok_or("no iat")? as u64;
    if issued.abs_diff(now) > WINDOW {
        return Err("iat is not now");
    }
    if let Some(token) = token {
        let digest = digest::digest(&digest::SHA256, token.as_bytes());
        if text("ath") != Some(&URL_SAFE_NO_PAD.encode(digest)) {
            return Err("ath is another token's");
        }
    }
    let id = text("jti").filter(|id| !id.is_empty()).ok_or("no jti")?;
    Ok((key_thumbprint(jwk).ok_or("jwk")?, id.to_owned()))
}

/// RFC 9449 4.3: without query and fragment, otherwise as RFC 3986 6.2 normalizes them.
fn same_url(htu: &str, url: &str) -> bool {
    let read = |text: &str| {
        let mut url = url::Url::parse(text).ok()?;
        url.set_query(None);
        url.set_fragment(None);
        Some(url)
    };
    read(htu).is_some_and(|htu| Some(htu) == read(url))
}

/// RFC 7638 3.2: the required members alone, in order; serde_json sorts them.
fn key_thumbprint(jwk: &Map<String, Value>) -> Option<String> {
    let names: &[&str] = match jwk.get("kty")?.as_str()? {
        "EC" => &["crv", "kty", "x", "y"],
        "OKP" => &["crv", "kty", "x"],
        "RSA" => &["e", "kty", "n"],
        _ => return None,
    };
    let mut members = Map::new();
    for name in names {
        members.insert((*name).to_owned(), jwk.get(*name)?.clone());
    }
    let text = Value::Object(members).to_string();
    let digest = digest::digest(&digest::SHA256, text.as_bytes());
    Some(URL_SAFE_NO_PAD.encode(digest))
}
