//! What people see: pages without script, every value escaped, with headers that let a
//! browser do nothing but show them and send their forms.

use askama::Template;
use axum::response::{IntoResponse, Response};
use http::{
    HeaderMap, HeaderName, HeaderValue, StatusCode,
    header::{
        CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, LOCATION, REFERRER_POLICY,
        STRICT_TRANSPORT_SECURITY, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
    },
};

const STYLE: &str = include_str!("../../templates/style.css");
/// No page needs any of these.
const PERMISSIONS: &str =
    "camera=(), display-capture=(), geolocation=(), microphone=(), payment=(), usb=()";

#[derive(Template)]
#[template(path = "login.html")]
pub struct Login<'a> {
    pub client: &'a str,
    pub request: &'a str,
    pub token: &'a str,
    /// What was typed before, or `login_hint`.
    pub username: &'a str,
    pub wrong: bool,
}

#[derive(Template)]
#[template(path = "consent.html")]
pub struct Consent<'a> {
    pub client: &'a str,
    pub account: &'a str,
    pub scopes: Vec<Asked<'a>>,
    pub audiences: &'a [String],
    /// Where the answer goes, so that people can see it.
    pub destination: &'a str,
    pub request: &'a str,
    pub token: &'a str,
}

/// A scope, as the consent page shows it.
pub enum Asked<'a> {
    Known(&'static str),
    Named(&'a str),
}

impl<'a> Asked<'a> {
    /// In words where OpenID Connect Core 5.4 and 11 say what it means.
    pub fn new(scope: &'a str) -> Self {
        match scope {
            "openid" => Self::Known("know who you are"),
            "profile" => Self::Known("read your name and user name"),
            "email" => Self::Known("read your e-mail address"),
            "offline_access" => Self::Known("keep this access while you are away"),
            other => Self::Named(other),
        }
    }
}

#[derive(Template)]
#[template(path = "logout.html")]
pub struct Logout<'a> {
    pub account: &'a str,
    pub token: &'a str,
}

#[derive(Template)]
#[template(path = "message.html")]
pub struct Message<'a> {
    pub heading: &'a str,
    pub text: &'a str,
    pub error: bool,
}

/// A page. `form_to` is where else than here its form may lead in the end: browsers
/// hold redirects after a form to `form-action` too (CSP 3 6.4.1.1).
pub fn page(status: StatusCode, template: &impl Template, form_to: Option<&str>) -> Response {
    let Ok(text) = template.render() else {
        tracing::error!("a page could not be rendered");
        return secured(StatusCode::INTERNAL_SERVER_ERROR.into_response(), None);
    };
    let mut response = (status, text).into_response();
    let html = HeaderValue::from_static("text/html; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, html);
    secured(response, form_to)
}

/// A page that only says what went wrong.
pub fn refused(status: StatusCode, heading: &str, text: &str) -> Response {
    let message = Message {
        heading,
        text,
        error: true,
    };
    page(status, &message, None)
}

/// The store did not answer: nobody is let through.
pub fn unavailable() -> Response {
    refused(
        StatusCode::SERVICE_UNAVAILABLE,
        "Not available",
        "The server cannot answer at the moment. Please try again in a while.",
    )
}

/// 303, so that what was posted is not posted on (RFC 9700 4.12).
pub fn redirect(to: &str) -> Response {
    let Ok(to) = HeaderValue::from_str(to) else {
        // A registered URI is printable ASCII, and all that is added is encoded.
        return unavailable();
    };
    let mut response = StatusCode::SEE_OTHER.into_response();
    response.headers_mut().insert(LOCATION, to);
    secured(response, None)
}

pub async fn style() -> Response {
    let mut response = secured(STYLE.into_response(), None);
    let headers = response.headers_mut();
    headers.insert(
        CONTENT_TYPE,
        HeaderValue::from_static("text/css; charset=utf-8"),
    );
    headers.insert(
        CACHE_CONTROL,
        HeaderValue::from_static("public, max-age=3600"),
    );
    response
}

/// Adds what every answer to a browser has.
fn secured(mut response: Response, form_to: Option<&str>) -> Response {
    let policy = match form_to {
        Some(origin) => content_policy(&format!("'self' {origin}")),
        None => content_policy("'self'"),
    };
    let headers: &mut HeaderMap = response.headers_mut();
    headers.insert(CONTENT_SECURITY_POLICY, policy);
    for (name, value) in [
        (CACHE_CONTROL, "no-store"),
        (REFERRER_POLICY, "no-referrer"),
        (STRICT_TRANSPORT_SECURITY, "max-age=31536000"),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (X_FRAME_OPTIONS, "DENY"),
        (HeaderName::from_static("permissions-policy"), PERMISSIONS),
        (
            HeaderName::from_static("cross-origin-resource-policy"),
            "same-origin",
        ),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

fn content_policy(form_action: &str) -> HeaderValue {
    let text = format!(
        "default-src 'none'; style-src 'self'; form-action {form_action}; \
         frame-ancestors 'none'; base-uri 'none'"
    );
    HeaderValue::from_str(&text).unwrap_or(HeaderValue::from_static(
        "default-src 'none'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    ))
}
