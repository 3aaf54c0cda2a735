//! Makes access tokens (RFC 9068, or opaque ones) and ID tokens (OIDC Core 2). What is
//! made here is handed out only once the store has what it must know of it.

use aws_lc_rs::{digest, rand};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Map, Value, json};

use super::{
    Server, User,
    clients::{Client, TokenFormat},
    error::{Code, OAuthError},
    keys::hash,
    store::Issued,
};
use crate::jwt::Algorithm;

/// What an access token says.
pub struct Subject<'a> {
    /// `sub`.
    pub subject: &'a str,
    pub scopes: Vec<String>,
    /// Never empty.
    pub audiences: Vec<String>,
    /// Of a person's login, seconds since 1970.
    pub auth_time: Option<u64>,
    /// Who acts for the subject (RFC 8693 4.1).
    pub actor: Option<Value>,
    /// To what the token is bound (RFC 7800): `cnf`.
    pub bound: Option<Value>,
    /// It ends then at the latest.
    pub latest: Option<u64>,
}

/// An access token that is not handed out yet.
pub struct Access {
    pub token: String,
    pub expires_in: u64,
    /// For the audit log.
    pub jti: String,
    pub audiences: Vec<String>,
    /// For the store.
    pub issued: Issued,
}

/// 32 random bytes, base64url.
pub fn random() -> Result<String, OAuthError> {
    let mut bytes = [0; 32];
    rand::fill(&mut bytes)
        .map_err(|_| OAuthError::new(Code::ServerError, "the system has no randomness"))?;
    Ok(URL_SAFE_NO_PAD.encode(bytes))
}

pub fn access(
    server: &Server,
    client: &Client,
    subject: Subject<'_>,
) -> Result<Access, OAuthError> {
    let config = &server.config;
    let now = server.clock.seconds();
    let lifetime = client.access_lifetime.unwrap_or(config.tokens.access).0;
    // Keys are published no longer than this after they have signed.
    let lifetime = lifetime.min(config.keys.overlap.0).as_secs().max(1);
    let latest = subject.latest.unwrap_or(u64::MAX);
    let expires = (now + lifetime).min(latest);
    let jti = random()?;
    let mut claims = Map::from_iter([
        ("iss".to_owned(), json!(config.issuer)),
        ("sub".to_owned(), json!(subject.subject)),
        ("aud".to_owned(), json!(subject.audiences)),
        ("exp".to_owned(), json!(expires)),
        ("iat".to_owned(), json!(now)),
        ("jti".to_owned(), json!(jti)),
        ("client_id".to_owned(), json!(client.id)),
        ("azp".to_owned(), json!(client.id)),
    ]);
    if !subject.scopes.is_empty() {
        claims.insert("scope".into(), subject.scopes.join(" ").into());
    }
    let more = [
        ("auth_time", subject.auth_time.map(Value::from)),
        ("act", subject.actor),
        ("cnf", subject.bound),
    ];
    for (name, value) in more {
        if let Some(value) = value {
            claims.insert(name.into(), value);
        }
    }
    let claims = Value::Object(claims);
    let (token, known, kept) = match client.token_format {
        TokenFormat::Jwt => {
            let token = server.keys.sign("at+jwt", &claims)?;
            (token, hash(&jti), None)
        }
        TokenFormat::Opaque => {
            let token = random()?;
            let known = hash(&token);
            (token, known, Some(claims.to_string()))
        }
    };
    Ok(Access {
        token,
        expires_in: expires.saturating_sub(now),
        jti: hash(&jti)[..32].to_owned(),
        audiences: subject.audiences,
        issued: Issued {
            access: known,
            access_expires: expires,
            claims: kept,
            refresh: None,
        },
    })
}

/// OIDC Core 2, for the client that asked.
pub fn identity(
    server: &Server,
    client: &Client,
    user: &User,
    scopes: &[String],
    auth_time: u64,
    nonce: Option<&str>,
    access_token: &str,
) -> Result<String, OAuthError> {
    let now = server.clock.seconds();
    let mut claims = about(user, scopes);
    claims.extend([
        ("iss".to_owned(), json!(server.config.issuer)),
        ("aud".to_owned(), json!(client.id)),
        ("azp".to_owned(), json!(client.id)),
        (
            "exp".to_owned(),
            json!(now + server.config.tokens.identity.0.as_secs()),
        ),
        ("iat".to_owned(), json!(now)),
        ("auth_time".to_owned(), json!(auth_time)),
        // OIDC Core 3.1.3.6: half of the hash that the signature's algorithm uses.
        (
            "at_hash".to_owned(),
            json!(half_hash(server.keys.algorithm(), access_token)),
        ),
    ]);
    if let Some(nonce) = nonce {
        claims.insert("nonce".into(), nonce.into());
    }
    Ok(server.keys.sign("JWT", &Value::Object(claims))?)
}

/// Claims about a person by scope (OIDC Core 5.4).
pub fn about(user: &User, scopes: &[String]) -> Map<String, Value> {
    let has = |scope: &str| scopes.iter().any(|known| known == scope);
    let mut claims = Map::from_iter([("sub".to_owned(), json!(user.id))]);
    if has("profile") {
        claims.insert("preferred_username".into(), json!(user.username));
        if let Some(name) = &user.name {
            claims.insert("name".into(), json!(name));
        }
    }
    if has("email")
        && let Some(email) = &user.email
    {
        claims.insert("email".into(), json!(email));
    }
    claims
}

fn half_hash(algorithm: Algorithm, token: &str) -> String {
    let kind = match algorithm {
        Algorithm::EdDsa => &digest::SHA512,
        _ => &digest::SHA256,
    };
    let whole = digest::digest(kind, token.as_bytes());
    URL_SAFE_NO_PAD.encode(&whole.as_ref()[..whole.as_ref().len() / 2])
}
