//! Introspection (RFC 7662) and revocation (RFC 7009).
//!
//! A client learns only of tokens that are for it or were issued to it; of all others
//! it hears what it hears of those that never were: `{"active": false}`.

use axum::{
    Json, Router,
    extract::{Request, State},
    response::{IntoResponse as _, Response},
    routing::post,
};
use http::StatusCode;
use serde_json::{Map, Value, json};

use super::{
    Server, Shared,
    client_auth::{Authenticated, authenticate},
    clients::Client,
    error::{Code, OAuthError, no_store},
    keys::hash,
    present::{self, Presented},
    request::{Asker, Form},
    token::tell_refusal,
};
use crate::audit::AuthorityRecord;

pub fn routes() -> Router<Shared> {
    Router::new()
        .route("/introspect", post(introspect))
        .route("/revoke", post(revoke))
}

async fn introspect(State(server): State<Shared>, request: Request) -> Response {
    let asker = Asker::new(&request);
    let mut record = asker.record("introspection");
    let answer = match Form::read(request).await {
        Ok(form) => introspected(&server, &asker, &form, &mut record).await,
        Err(error) => Err(error),
    };
    match answer {
        Ok(answer) => {
            server.told(record);
            (no_store(), Json(answer)).into_response()
        }
        Err(error) => {
            tell_refusal(&server, record, &error);
            error.into_response()
        }
    }
}

async fn introspected(
    server: &Server,
    asker: &Asker,
    form: &Form,
    record: &mut AuthorityRecord,
) -> Result<Value, OAuthError> {
    let Authenticated { client, method } = authenticate(server, asker, form).await?;
    record.client = Some(client.id.clone());
    record.authentication = Some(method);
    if client.is_public() {
        // RFC 7662 2.1: or anybody could try tokens out.
        return Err(OAuthError::client("a public client may not introspect"));
    }
    let token = form.required("token", "token is missing")?;
    let found = match present::access(server, token).await? {
        Some(presented) => of_access(server, &client, &presented).await?,
        None => of_refresh(server, &client, token).await?,
    };
    let text = |name: &str| {
        let value = found.as_ref().and_then(|found| found.get(name));
        value.and_then(Value::as_str).map(str::to_owned)
    };
    record.subject = text("sub");
    record.reason = match found {
        Some(_) => "active".into(),
        None => "inactive".into(),
    };
    if let Some(jti) = text("jti") {
        record.jti = Some(hash(&jti)[..32].to_owned());
    }
    Ok(Value::Object(found.unwrap_or_else(|| {
        Map::from_iter([("active".to_owned(), false.into())])
    })))
}

async fn of_access(
    server: &Server,
    client: &Client,
    token: &Presented,
) -> Result<Option<Map<String, Value>>, OAuthError> {
    if token.text("client_id") != Some(&client.id) && !client.is_among(token.audiences()) {
        return Ok(None);
    }
    let mut found = token.claims.clone();
    found.insert("active".into(), true.into());
    let by_dpop = found.get("cnf").is_some_and(|cnf| cnf.get("jkt").is_some());
    let kind = if by_dpop { "DPoP" } else { "Bearer" };
    found.insert("token_type".into(), kind.into());
    match server.user(token.text("sub").unwrap_or("")).await? {
        Some(user) if user.disabled => return Ok(None),
        Some(user) => {
            found.insert("username".into(), user.username.into());
        }
        // Only people log in: without its account, a token with `auth_time` is nobody's.
        None if token.claims.contains_key("auth_time") => return Ok(None),
        None => {}
    }
    Ok(Some(found))
}

/// A refresh token is its client's business alone.
async fn of_refresh(
    server: &Server,
    client: &Client,
    token: &str,
) -> Result<Option<Map<String, Value>>, OAuthError> {
    let now = server.clock.seconds();
    let found = server.store.refresh_token(&hash(token), now).await?;
    let Some((family, true)) = found else {
        return Ok(None);
    };
    let user = server.user(&family.subject).await?;
    if family.client != client.id || user.is_none_or(|user| user.disabled) {
        return Ok(None);
    }
    let found = json!({
        "active": true,
        "iss": server.config.issuer,
        "sub": family.subject,
        "client_id": family.client,
        "scope": family.scopes.join(" "),
        "exp": family.expires,
        "auth_time": family.auth_time,
    });
    match found {
        Value::Object(found) => Ok(Some(found)),
        _ => unreachable!("an object, as written above"),
    }
}

async fn revoke(State(server): State<Shared>, request: Request) -> Response {
    let asker = Asker::new(&request);
    let mut record = asker.record("revocation");
    let answer = match Form::read(request).await {
        Ok(form) => revoked(&server, &asker, &form, &mut record).await,
        Err(error) => Err(error),
    };
    match answer {
        Ok(()) => {
            server.told(record);
            (StatusCode::OK, no_store()).into_response()
        }
        Err(error) => {
            tell_refusal(&server, record, &error);
            error.into_response()
        }
    }
}

/// RFC 7009 2.1: a client revokes its own tokens. Of a refresh token the family goes, its
/// access tokens too. A token that is not known needs no revoking.
async fn revoked(
    server: &Server,
    asker: &Asker,
    form: &Form,
    record: &mut AuthorityRecord,
) -> Result<(), OAuthError> {
    let Authenticated { client, method } = authenticate(server, asker, form).await?;
    record.client = Some(client.id.clone());
    record.authentication = Some(method);
    let token = form.required("token", "token is missing")?;
    let now = server.clock.seconds();
    record.reason = "unknown".into();
    if let Some((family, _active)) = server.store.refresh_token(&hash(token), now).await? {
        if family.client != client.id {
            return Err(foreign());
        }
        server.store.revoke_family(&family.id).await?;
        record.subject = Some(family.subject);
        record.reason = "refresh token and its family".into();
    } else if let Some(presented) = present::access(server, token).await? {
        if presented.text("client_id") != Some(&client.id) {
            return Err(foreign());
        }
        let expires = presented.number("exp");
        server.store.revoke_token(&presented.hash, expires).await?;
        record.subject = presented.text("sub").map(str::to_owned);
        record.jti = presented.text("jti").map(|jti| hash(jti)[..32].to_owned());
        record.reason = "access token".into();
    }
    Ok(())
}

fn foreign() -> OAuthError {
    let why = "the token was issued to another client";
    OAuthError::new(Code::UnauthorizedClient, why)
}
