//! `/logout`: asks first, so that no other site can log anybody out.

use axum::{body::Body, extract::State, response::Response};
use http::{HeaderMap, StatusCode, header::SET_COOKIE};

use super::{
    super::{Server, Shared, pages},
    PeopleError, Seen,
    form::{self, Checked, Form, Purpose},
    login::failed,
    session::Cookie,
};

pub async fn ask(State(server): State<Shared>, headers: HeaderMap) -> Response {
    question(&server, &headers)
        .await
        .unwrap_or_else(|error| failed(&error))
}

async fn question(server: &Server, headers: &HeaderMap) -> Result<Response, PeopleError> {
    let browser = server.browser(headers).await?;
    let Some(session) = browser.session else {
        return Ok(done());
    };
    let now = server.clock.seconds();
    let token = form::token(&browser.cookie, Purpose::Logout, "", now)?;
    let page = pages::Logout {
        account: &session.user.username,
        token: &token,
    };
    Ok(pages::page(StatusCode::OK, &page, None))
}

pub async fn logout(
    State(server): State<Shared>,
    seen: Seen,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let form = match Form::read(&server.config, &headers, body).await {
        Ok(form) => form,
        Err(answer) => {
            server.told(seen.record("refusal", None, "a logout form that is not ours"));
            return answer;
        }
    };
    end(&server, &seen, &headers, &form)
        .await
        .unwrap_or_else(|error| failed(&error))
}

async fn end(
    server: &Server,
    seen: &Seen,
    headers: &HeaderMap,
    form: &Form,
) -> Result<Response, PeopleError> {
    let Some(cookie) = Cookie::of(headers) else {
        return Ok(form::not_ours());
    };
    let now = server.clock.seconds();
    match form::check(&cookie, Purpose::Logout, "", form.field("token"), now) {
        Checked::Good { .. } => {}
        Checked::Old => return Ok(pages::redirect("logout")),
        Checked::Wrong => {
            server.told(seen.record("refusal", None, "a logout form without its token"));
            return Ok(form::not_ours());
        }
    }
    let session = server.browser(headers).await?.session;
    server.log_out(&cookie).await?;
    if let Some(session) = session {
        server.told(seen.record("logout", Some(&session.user.id), ""));
    }
    let mut response = done();
    response.headers_mut().insert(SET_COOKIE, Cookie::clear());
    Ok(response)
}

fn done() -> Response {
    let page = pages::Message {
        heading: "Logged out",
        text: "You are not logged in here. Applications that you used may still know you.",
        error: false,
    };
    pages::page(StatusCode::OK, &page, None)
}
