//! The UserInfo endpoint (OIDC Core 5.3): what an access token with the scope `openid`
//! may know of its person. The token comes in the header alone (RFC 6750 2.1, RFC 9449
//! 7.1), and a bound one with the proof of its key.

use axum::{
    Json, Router,
    extract::{Request, State},
    response::{IntoResponse as _, Response},
    routing::get,
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use http::{StatusCode, header};
use serde_json::{Map, Value};

use super::{
    Server, Shared, dpop,
    error::{Code, OAuthError, no_store},
    issue,
    present::{self, Presented},
    request::Asker,
    token::tell_refusal,
};
use crate::{audit::AuthorityRecord, identity::fingerprint};

const BEARER: &str = r#"Bearer realm="postern", error="invalid_token""#;
const DPOP: &str = r#"DPoP realm="postern", error="invalid_token""#;
const SCOPE: &str = r#"Bearer realm="postern", error="insufficient_scope", scope="openid""#;

pub fn routes() -> Router<Shared> {
    Router::new().route("/userinfo", get(userinfo).post(userinfo))
}

async fn userinfo(State(server): State<Shared>, request: Request) -> Response {
    let asker = Asker::new(&request);
    if !asker.headers.contains_key(header::AUTHORIZATION) {
        // RFC 6750 3.1: who brought nothing is told no error.
        let challenge = [(header::WWW_AUTHENTICATE, r#"Bearer realm="postern""#)];
        return (StatusCode::UNAUTHORIZED, no_store(), challenge).into_response();
    }
    let method = request.method().clone();
    let mut record = asker.record("introspection");
    match told(&server, &asker, method.as_str(), &mut record).await {
        Ok(claims) => {
            record.reason = "userinfo".into();
            server.told(record);
            (no_store(), Json(claims)).into_response()
        }
        Err(error) => {
            tell_refusal(&server, record, &error);
            error.into_response()
        }
    }
}

async fn told(
    server: &Server,
    asker: &Asker,
    method: &str,
    record: &mut AuthorityRecord,
) -> Result<Map<String, Value>, OAuthError> {
    let header = asker.header(header::AUTHORIZATION)?.unwrap_or("");
    let (scheme, token) = header.split_once(' ').unwrap_or((header, ""));
    let by_dpop = scheme.eq_ignore_ascii_case("DPoP");
    let refused = |why: &str| {
        let error = OAuthError::new(Code::InvalidToken, "the access token is not valid");
        error
            .with_detail(why)
            .with_challenge(if by_dpop { DPOP } else { BEARER })
    };
    if !by_dpop && !scheme.eq_ignore_ascii_case("Bearer") {
        return Err(refused("another scheme"));
    }
    let presented = present::access(server, token.trim()).await?;
    let presented = presented.ok_or_else(|| refused("unknown, expired or revoked"))?;
    record.client = presented.text("client_id").map(str::to_owned);
    record.subject = presented.text("sub").map(str::to_owned);
    if !bound_to(server, asker, method, token.trim(), &presented, by_dpop).await? {
        return Err(refused("bound to another key, or shown in the wrong way"));
    }
    let scopes = presented.scopes();
    if !scopes.iter().any(|scope| scope == "openid") {
        let error = OAuthError::new(Code::InsufficientScope, "the scope openid is needed");
        return Err(error.with_challenge(SCOPE));
    }
    let user = server.user(presented.text("sub").unwrap_or("")).await?;
    let user = user.filter(|user| !user.disabled);
    let user = user.ok_or_else(|| refused("no person's, or one whose account is disabled"))?;
    Ok(issue::about(&user, &scopes))
}

/// Whether whoever sent the token has the keys that it is bound to.
async fn bound_to(
    server: &Server,
    asker: &Asker,
    method: &str,
    token: &str,
    presented: &Presented,
    by_dpop: bool,
) -> Result<bool, OAuthError> {
    let bound = |name: &str| {
        let cnf = presented.claims.get("cnf")?;
        cnf.get(name)?.as_str()
    };
    if let Some(certificate) = bound("x5t#S256") {
        let shown = asker.certificates.first();
        let shown = shown.map(|leaf| URL_SAFE_NO_PAD.encode(fingerprint(leaf)));
        if shown.as_deref() != Some(certificate) {
            return Ok(false);
        }
    }
    match (bound("jkt"), by_dpop) {
        (None, false) => Ok(true),
        (Some(key), true) => {
            let url = server.config.endpoint("/userinfo");
            let proven = dpop::thumbprint(server, asker, method, &url, Some(token)).await?;
            Ok(proven.as_deref() == Some(key))
        }
        // RFC 9449 7.2: a bound token is no bearer token, nor the other way round.
        _ => Ok(false),
    }
}
