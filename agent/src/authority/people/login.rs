//! `POST /login`: what the login page sends. Who proves right goes on with the
//! authorization request that led to the page.

use axum::{
    body::Body,
    extract::State,
    response::{IntoResponse as _, Response},
};
use http::{
    HeaderMap, StatusCode,
    header::{RETRY_AFTER, SET_COOKIE},
};
use zeroize::Zeroizing;

use super::{
    super::{Server, Shared, authorize, pages},
    PeopleError, Seen,
    form::{self, Checked, Form, Purpose},
    session::Cookie,
};

/// Longest user name that is looked up, in bytes.
pub const LONGEST_NAME: usize = 128;

pub async fn login(
    State(server): State<Shared>,
    seen: Seen,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let form = match Form::read(&server.config, &headers, body).await {
        Ok(form) => form,
        Err(answer) => {
            server.told(seen.record("refusal", None, "a login form that is not ours"));
            return answer;
        }
    };
    answer(&server, &seen, &headers, &form)
        .await
        .unwrap_or_else(|error| failed(&error))
}

/// Fails closed.
pub fn failed(error: &PeopleError) -> Response {
    tracing::error!(%error, "a page cannot be answered");
    pages::unavailable()
}

async fn answer(
    server: &Server,
    seen: &Seen,
    headers: &HeaderMap,
    form: &Form,
) -> Result<Response, PeopleError> {
    let (query, now) = (form.field("request"), server.clock.seconds());
    let checked = Cookie::of(headers).map(|cookie| {
        let checked = form::check(&cookie, Purpose::Login, query, form.field("token"), now);
        (cookie, checked)
    });
    let (cookie, nonce, expires) = match checked {
        Some((cookie, Checked::Good { nonce, expires })) => (cookie, nonce, expires),
        Some((_, Checked::Old)) => return Ok(authorize::again(query)),
        Some((_, Checked::Wrong)) | None => {
            // A second page of before a login: no more than a link to the same request.
            if server.browser(headers).await?.session.is_some() {
                return Ok(authorize::again(query));
            }
            server.told(seen.record("refusal", None, "a login form without its token"));
            return Ok(form::not_ours());
        }
    };
    // Ours, but the client may have changed since.
    let request = match authorize::validate(server, query).await? {
        Ok(request) => request,
        Err(refusal) => return Ok(authorize::refuse(server, seen, refusal)),
    };
    if !server.people.admits(seen, now) {
        server.told(seen.record("login", None, "too many attempts from this address"));
        return Ok(too_many(60 - now % 60));
    }
    let username = form.field("username");
    let password = Zeroizing::new(form.field("password").to_owned());
    let user = match username.len() {
        0..=LONGEST_NAME => server.authenticate(username, password, seen).await?,
        _ => None,
    };
    let Some(user) = user else {
        let name = if username.len() > LONGEST_NAME {
            ""
        } else {
            username
        };
        return authorize::login_page(server, &cookie, &request, query, Some(name));
    };
    if !server.store.answer_once(&nonce, now, expires).await? {
        // Sent twice: the other one has the new cookie.
        return Ok(authorize::again(query));
    }
    let set = server.log_in(&cookie, &user).await?;
    server.told(seen.record("login", Some(&user.id), ""));
    let mut response = authorize::again(&authorize::after_login(query));
    response.headers_mut().insert(SET_COOKIE, set);
    Ok(response)
}

fn too_many(seconds: u64) -> Response {
    let mut response = pages::refused(
        StatusCode::TOO_MANY_REQUESTS,
        "Too many attempts",
        "There were too many attempts to log in from your address. Please try again in a minute.",
    );
    response.headers_mut().insert(RETRY_AFTER, seconds.into());
    response.into_response()
}
