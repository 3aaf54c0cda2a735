//! The authorization endpoint: RFC 6749 4.1.1 and 4.1.2 with PKCE (RFC 7636), resource
//! indicators (RFC 8707), the issuer in each answer (RFC 9207), as RFC 9700 wants it;
//! OpenID Connect Core 3.1.2.
//!
//! `request -> validate -> login? -> consent? -> code`. Nothing about the request is
//! kept while a person is at a page: the page carries it, tied to the browser by the
//! form's token, and it is validated anew each time. So nobody can fill the store who
//! has not logged in.

mod parameters;
mod redirect;
#[cfg(test)]
mod tests;

use axum::{
    Router,
    body::Body,
    extract::{RawQuery, State},
    response::Response,
    routing::{get, post},
};
use http::{HeaderMap, StatusCode, header::SET_COOKIE};

use super::{
    Code, Server, Shared, pages,
    people::{
        self, PeopleError, Seen,
        form::{self, Checked, Form, Purpose},
        session::{Browser, Cookie, Session},
    },
};
use crate::audit::AuthorityRecord;
use parameters::{Refusal, Request, Return};

pub use parameters::{after_login, validate};

pub fn routes() -> Router<Shared> {
    Router::new()
        .route("/authorize", get(asked).post(posted))
        .route("/consent", post(consented))
}

async fn asked(
    State(server): State<Shared>,
    seen: Seen,
    headers: HeaderMap,
    RawQuery(query): RawQuery,
) -> Response {
    answer(&server, &seen, &headers, &query.unwrap_or_default())
        .await
        .unwrap_or_else(|error| failed(&error))
}

/// The request as a form, from the client's own pages (OpenID Connect Core 3.1.2.1). A
/// GET makes of it what the browser sends its cookie with.
async fn posted(headers: HeaderMap, body: Body) -> Response {
    match Form::read_from_anywhere(&headers, body).await {
        Ok(form) => match form.query() {
            query if query.len() <= parameters::LONGEST => again(&query),
            _ => told("The request is too long."),
        },
        Err(answer) => answer,
    }
}

async fn consented(
    State(server): State<Shared>,
    seen: Seen,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let form = match Form::read(&server.config, &headers, body).await {
        Ok(form) => form,
        Err(answer) => {
            server.told(seen.record("refusal", None, "a consent form that is not ours"));
            return answer;
        }
    };
    consent(&server, &seen, &headers, &form)
        .await
        .unwrap_or_else(|error| failed(&error))
}

/// Fails closed: no code.
fn failed(error: &PeopleError) -> Response {
    tracing::error!(%error, "an authorization request cannot be answered");
    pages::unavailable()
}

/// What a request still wants before there is a code.
enum Next<'a> {
    Login,
    Consent(&'a Session),
    Code(&'a Session),
}

async fn next<'a>(
    server: &Server,
    request: &Request,
    session: Option<&'a Session>,
) -> Result<Next<'a>, PeopleError> {
    let age = |session: &Session| server.clock.seconds().saturating_sub(session.auth_time);
    let session = session.filter(|session| {
        !request.prompt.login
            && request
                .max_age
                .is_none_or(|most| age(session) <= most && most > 0)
    });
    let Some(session) = session else {
        return Ok(Next::Login);
    };
    let Request { client, to, .. } = request;
    // Where any program of the device could have asked, even one that pretends to be a
    // trusted client, the person decides.
    let agreed = to.uri.assures(client)
        && (client.trusted
            || server
                .store
                .has_consent(
                    &session.user.id,
                    &client.id,
                    &request.audiences,
                    &request.scopes,
                )
                .await?);
    Ok(match agreed && !request.prompt.consent {
        true => Next::Code(session),
        false => Next::Consent(session),
    })
}

async fn answer(
    server: &Server,
    seen: &Seen,
    headers: &HeaderMap,
    query: &str,
) -> Result<Response, PeopleError> {
    let request = match validate(server, query).await? {
        Ok(request) => request,
        Err(refusal) => return Ok(refuse(server, seen, refusal)),
    };
    let browser = server.browser(headers).await?;
    let next = next(server, &request, browser.session.as_ref()).await?;
    match next {
        Next::Login if request.prompt.none => {
            let refusal = request.refused("login_required", "nobody is logged in");
            Ok(refuse(server, seen, refusal))
        }
        Next::Consent(_) if request.prompt.none => {
            let refusal = request.refused("consent_required", "the person was not asked yet");
            Ok(refuse(server, seen, refusal))
        }
        Next::Login => {
            let mut page = login_page(server, &browser.cookie, &request, query, None)?;
            if browser.new {
                page.headers_mut()
                    .insert(SET_COOKIE, browser.cookie.set(None));
            }
            Ok(page)
        }
        Next::Consent(session) => consent_page(server, &browser, session, &request, query),
        Next::Code(session) => {
            let code = people::random::<32>()?;
            grant(server, seen, &request, session, &code).await
        }
    }
}

/// The login page; `typed` is the user name of an attempt that failed.
pub fn login_page(
    server: &Server,
    cookie: &Cookie,
    request: &Request,
    query: &str,
    typed: Option<&str>,
) -> Result<Response, PeopleError> {
    let now = server.clock.seconds();
    let token = form::token(cookie, Purpose::Login, query, now)?;
    let hint = request.login_hint.as_deref().unwrap_or_default();
    let page = pages::Login {
        client: request.client_name(),
        request: query,
        token: &token,
        username: typed.unwrap_or(hint),
        wrong: typed.is_some(),
    };
    let status = match typed {
        Some(_) => StatusCode::FORBIDDEN,
        None => StatusCode::OK,
    };
    Ok(pages::page(status, &page, Some(request.to.uri.source())))
}

fn consent_page(
    server: &Server,
    browser: &Browser,
    session: &Session,
    request: &Request,
    query: &str,
) -> Result<Response, PeopleError> {
    let now = server.clock.seconds();
    let token = form::token(&browser.cookie, Purpose::Consent, query, now)?;
    let scopes = request
        .scopes
        .iter()
        .map(|s| pages::Asked::new(s))
        .collect();
    let page = pages::Consent {
        client: request.client_name(),
        account: &session.user.username,
        scopes,
        audiences: match request.client.audiences.is_empty() {
            true => &[],
            false => &request.audiences,
        },
        destination: request.to.uri.as_str(),
        request: query,
        token: &token,
    };
    let form_to = Some(request.to.uri.source());
    Ok(pages::page(StatusCode::OK, &page, form_to))
}

async fn consent(
    server: &Server,
    seen: &Seen,
    headers: &HeaderMap,
    form: &Form,
) -> Result<Response, PeopleError> {
    let (query, now) = (form.field("request"), server.clock.seconds());
    let browser = server.browser(headers).await?;
    let token = form.field("token");
    let (nonce, expires) = match form::check(&browser.cookie, Purpose::Consent, query, token, now) {
        Checked::Good { nonce, expires } => (nonce, expires),
        Checked::Old => return Ok(again(query)),
        Checked::Wrong => {
            server.told(seen.record("refusal", None, "a consent form without its token"));
            return Ok(form::not_ours());
        }
    };
    let request = match validate(server, query).await? {
        Ok(request) => request,
        Err(refusal) => return Ok(refuse(server, seen, refusal)),
    };
    // The login may be over since the page was shown.
    let session = match next(server, &request, browser.session.as_ref()).await? {
        Next::Login => return Ok(again(query)),
        Next::Consent(session) | Next::Code(session) => session,
    };
    let allowed = match form.field("answer") {
        "allow" => true,
        "deny" => false,
        _ => return Ok(form::not_ours()),
    };
    let code = form::derived(&browser.cookie, &nonce);
    if !server.store.answer_once(&nonce, now, expires).await? {
        // A second click must neither end at an error nor make a second code.
        return match allowed && server.store.has_code(&people::hash(&code)).await? {
            true => Ok(pages::redirect(
                &request.to.answer(server, &[("code", &code)]),
            )),
            false => Ok(pages::refused(
                StatusCode::CONFLICT,
                "Answered already",
                "This page was answered already. Go back to the application and start again.",
            )),
        };
    }
    let user = &session.user.id;
    if !allowed {
        let refusal = request.refused("access_denied", "the person said no");
        server.told(request.record(seen, "consent", user, "denied"));
        return Ok(refuse(server, seen, refusal));
    }
    let (client, audiences, scopes) = (&request.client.id, &request.audiences, &request.scopes);
    let consent = server.store.add_consent(user, client, audiences, scopes);
    consent.await?;
    server.told(request.record(seen, "consent", user, ""));
    grant(server, seen, &request, session, &code).await
}

/// Hands out a code. It is in the store before it is on its way.
async fn grant(
    server: &Server,
    seen: &Seen,
    request: &Request,
    session: &Session,
    code: &str,
) -> Result<Response, PeopleError> {
    let now = server.clock.seconds();
    let kept = Code {
        client: request.client.id.clone(),
        redirect_uri: request.to.uri.as_str().to_owned(),
        subject: session.user.id.clone(),
        scopes: request.scopes.clone(),
        audiences: request.audiences.clone(),
        nonce: request.nonce.clone(),
        challenge: request.challenge.clone(),
        auth_time: session.auth_time,
        dpop_jkt: request.dpop_jkt.clone(),
        expires: now.saturating_add(server.config.tokens.code.0.as_secs()),
    };
    server.store.add_code(&people::hash(code), &kept).await?;
    server.told(request.record(seen, "code", &session.user.id, ""));
    Ok(pages::redirect(
        &request.to.answer(server, &[("code", code)]),
    ))
}

/// From the beginning, with this request.
pub fn again(query: &str) -> Response {
    pages::redirect(&format!("authorize?{query}"))
}

/// Tells the client, or where that cannot be, the person.
pub fn refuse(server: &Server, seen: &Seen, refusal: Refusal) -> Response {
    match refusal {
        Refusal::Page { why } => {
            server.told(AuthorityRecord {
                error: Some("invalid_request"),
                ..seen.record("refusal", None, why)
            });
            told(why)
        }
        Refusal::Redirect {
            to,
            client,
            error,
            why,
        } => {
            server.told(AuthorityRecord {
                client: Some(client),
                error: Some(error),
                ..seen.record("refusal", None, why)
            });
            let parameters = [("error", error), ("error_description", why)];
            pages::redirect(&to.answer(server, &parameters))
        }
    }
}

fn told(why: &str) -> Response {
    pages::refused(StatusCode::BAD_REQUEST, "This cannot go on", why)
}

impl Return {
    /// RFC 6749 4.1.2, with `iss` (RFC 9207 2).
    fn answer(&self, server: &Server, parameters: &[(&str, &str)]) -> String {
        let mut parameters = parameters.to_vec();
        if let Some(state) = &self.state {
            parameters.push(("state", state));
        }
        parameters.push(("iss", &server.config.issuer));
        self.uri.with(&parameters)
    }
}

impl Request {
    fn client_name(&self) -> &str {
        self.client.name.as_deref().unwrap_or(&self.client.id)
    }

    fn refused(&self, error: &'static str, why: &'static str) -> Refusal {
        Refusal::Redirect {
            to: self.to.clone(),
            client: self.client.id.clone(),
            error,
            why,
        }
    }

    fn record(
        &self,
        seen: &Seen,
        event: &'static str,
        subject: &str,
        reason: &str,
    ) -> AuthorityRecord {
        AuthorityRecord {
            client: Some(self.client.id.clone()),
            audience: self.audiences.clone(),
            scope: self.scopes.clone(),
            ..seen.record(event, Some(subject), reason)
        }
    }
}
