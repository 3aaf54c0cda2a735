//! What a token says that somebody brings back: whether we made it, whether it is still
//! good, and for whom. Others' tokens are never good here.

use serde_json::{Map, Value};

use super::{
    Server,
    client_auth::{has_type, part},
    error::OAuthError,
    keys::hash,
};
use crate::{
    identity::SpiffeId,
    jwt::{Expected, Token},
};

const ANY: Expected<'_> = Expected {
    issuer: None,
    audiences: &[],
    space_delimited: &[],
};

/// A token of ours that is good now.
pub struct Presented {
    pub claims: Map<String, Value>,
    /// Of a person's agreement.
    pub family: Option<String>,
    /// What the store knows it by.
    pub hash: String,
}

impl Presented {
    pub fn text(&self, name: &str) -> Option<&str> {
        self.claims.get(name)?.as_str()
    }

    pub fn number(&self, name: &str) -> u64 {
        self.claims.get(name).and_then(Value::as_u64).unwrap_or(0)
    }

    pub fn audiences(&self) -> Vec<&str> {
        match self.claims.get("aud") {
            Some(Value::String(one)) => vec![one],
            Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        }
    }

    pub fn scopes(&self) -> Vec<String> {
        let text = self.text("scope").unwrap_or("");
        text.split(' ')
            .filter(|word| !word.is_empty())
            .map(str::to_owned)
            .collect()
    }
}

/// An access token, JWT or opaque; `None`: not ours, expired or revoked.
pub async fn access(server: &Server, token: &str) -> Result<Option<Presented>, OAuthError> {
    let (known, claims) = if token.contains('.') {
        let Some(claims) = verified(server, token, &["at+jwt"]) else {
            return Ok(None);
        };
        let own = claims.get("iss").and_then(Value::as_str) == Some(&server.config.issuer);
        let jti = claims.get("jti").and_then(Value::as_str);
        let Some(jti) = jti.filter(|_| own) else {
            return Ok(None);
        };
        (hash(jti), Some(claims))
    } else {
        (hash(token), None)
    };
    let stored = server.store.access_token(&known).await?;
    let claims = match (claims, stored.claims) {
        (Some(claims), None) => claims,
        (None, Some(text)) => match serde_json::from_str(&text) {
            Ok(Value::Object(claims)) => claims,
            _ => return Ok(None),
        },
        _ => return Ok(None),
    };
    let presented = Presented {
        claims,
        family: stored.family,
        hash: known,
    };
    let good = !stored.revoked && presented.number("exp") > server.clock.seconds();
    Ok(good.then_some(presented))
}

/// A JWT-SVID of the trust domain, whoever it is for.
pub fn svid(server: &Server, token: &str) -> Option<Presented> {
    let claims = verified(server, token, &["jwt", "jose"])?;
    let id: SpiffeId = claims.get("sub")?.as_str()?.parse().ok()?;
    let expires = claims.get("exp")?.as_u64()?;
    if id.trust_domain != server.config.trust_domain || expires <= server.clock.seconds() {
        return None;
    }
    Some(Presented {
        claims,
        family: None,
        hash: hash(token),
    })
}

/// The claims of a JWT that one of our keys signed, with one of these types.
fn verified(server: &Server, token: &str, types: &[&str]) -> Option<Map<String, Value>> {
    let parsed = Token::parse(token).ok()?;
    let keys = server.keys.set();
    parsed.verify(ANY, Some(&keys), server.clock.now()).ok()?;
    if !has_type(&part(token, 0)?, types) {
        return None;
    }
    part(token, 1)
}
