//! Forms: their fields, where they came from, and the token that ties each to the page
//! it was on.
//!
//! A token is an HMAC, keyed with the browser's cookie, over the form's purpose, a
//! nonce, an expiry and the authorization request that the page was about. Another site
//! knows no cookie and so can make none (CSRF, login CSRF); a hidden field cannot be
//! exchanged for another; the nonce lets each form be answered once.

use std::time::Duration;

use aws_lc_rs::hmac;
use axum::{body::Body, response::Response};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use http::{
    HeaderMap, StatusCode,
    header::{CONTENT_TYPE, ORIGIN},
};
use zeroize::Zeroizing;

use super::{
    super::{Config, pages},
    PeopleError, random,
    session::Cookie,
};

/// Longest body, in bytes: an authorization request, a password, and what encoding adds.
const MAX_BODY: usize = 32 << 10;
/// For a body to arrive.
const BODY: Duration = Duration::from_secs(10);
/// How long a page may be looked at before its form is sent, in seconds.
const LIFETIME: u64 = 30 * 60;
/// 16 bytes in base64url.
const NONCE: usize = 22;

/// What a form does. A token for one is none for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    Login,
    Consent,
    Logout,
}

impl Purpose {
    fn name(self) -> &'static str {
        match self {
            Self::Login => "login",
            Self::Consent => "consent",
            Self::Logout => "logout",
        }
    }
}

/// What a form's token turned out to be.
#[derive(Debug, PartialEq, Eq)]
pub enum Checked {
    Good {
        nonce: String,
        expires: u64,
    },
    /// It was good once.
    Old,
    Wrong,
}

/// A token for a form that is shown now.
pub fn token(
    cookie: &Cookie,
    purpose: Purpose,
    request: &str,
    now: u64,
) -> Result<String, PeopleError> {
    let (nonce, expires) = (random::<16>()?, now.saturating_add(LIFETIME));
    let message = message(purpose, &nonce, expires, request);
    let tag = hmac::sign(&key(cookie), message.as_bytes());
    Ok(format!("{nonce}.{expires}.{}", URL_SAFE_NO_PAD.encode(tag)))
}

/// Compares in constant time.
pub fn check(cookie: &Cookie, purpose: Purpose, request: &str, token: &str, now: u64) -> Checked {
    let mut parts = token.splitn(3, '.');
    let (Some(nonce), Some(expires), Some(tag)) = (parts.next(), parts.next(), parts.next()) else {
        return Checked::Wrong;
    };
    let (Ok(expires), Ok(tag)) = (expires.parse(), URL_SAFE_NO_PAD.decode(tag)) else {
        return Checked::Wrong;
    };
    if nonce.len() != NONCE {
        return Checked::Wrong;
    }
    let message = message(purpose, nonce, expires, request);
    if hmac::verify(&key(cookie), message.as_bytes(), &tag).is_err() {
        return Checked::Wrong;
    }
    if now >= expires {
        return Checked::Old;
    }
    Checked::Good {
        nonce: nonce.to_owned(),
        expires,
    }
}

/// A value that only this form of this browser leads to: 256 bits that nobody without
/// the cookie can tell from random ones. Sending the form twice leads to it twice.
pub fn derived(cookie: &Cookie, nonce: &str) -> String {
    let tag = hmac::sign(&key(cookie), format!("code\n{nonce}").as_bytes());
    URL_SAFE_NO_PAD.encode(tag)
}

fn key(cookie: &Cookie) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, cookie.value().as_bytes())
}

/// Parts are told apart by their lines: a nonce's length is fixed, and a request is last.
fn message(purpose: Purpose, nonce: &str, expires: u64, request: &str) -> String {
    format!("form\n{}\n{nonce}\n{expires}\n{request}", purpose.name())
}

/// The fields of a form that was sent from a page of ours.
pub struct Form(Vec<(String, Zeroizing<String>)>);

impl Form {
    /// Reads and bounds the body. `Err` is the answer. Where a browser says that the form
    /// is from elsewhere nothing more is asked.
    pub async fn read(config: &Config, headers: &HeaderMap, body: Body) -> Result<Self, Response> {
        if !is_ours(config, headers) {
            return Err(not_ours());
        }
        Self::read_from_anywhere(headers, body).await
    }

    /// The same for a form that any site may send.
    pub async fn read_from_anywhere(headers: &HeaderMap, body: Body) -> Result<Self, Response> {
        let kind = headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok());
        let kind = kind.unwrap_or_default().split(';').next().unwrap_or("");
        if !kind
            .trim()
            .eq_ignore_ascii_case("application/x-www-form-urlencoded")
        {
            let what = "This is no form.";
            let status = StatusCode::UNSUPPORTED_MEDIA_TYPE;
            return Err(pages::refused(status, "Not understood", what));
        }
        let body = match tokio::time::timeout(BODY, axum::body::to_bytes(body, MAX_BODY)).await {
            Ok(Ok(body)) => body,
            Ok(Err(_too_long_or_broken_off)) => {
                let status = StatusCode::PAYLOAD_TOO_LARGE;
                return Err(pages::refused(status, "Too long", "The form is too long."));
            }
            Err(_elapsed) => {
                let status = StatusCode::REQUEST_TIMEOUT;
                return Err(pages::refused(
                    status,
                    "Too slow",
                    "The form took too long.",
                ));
            }
        };
        let fields = form_urlencoded::parse(&body)
            .map(|(name, value)| (name.into_owned(), Zeroizing::new(value.into_owned())));
        Ok(Self(fields.collect()))
    }

    /// A field that is there once; empty where it is not.
    pub fn field(&self, name: &str) -> &str {
        let mut values = self.0.iter().filter(|(other, _)| other == name);
        match (values.next(), values.next()) {
            (Some((_, value)), None) => value,
            _ => "",
        }
    }

    /// All fields, encoded anew as a query.
    pub fn query(&self) -> String {
        let mut query = form_urlencoded::Serializer::new(String::new());
        for (name, value) in &self.0 {
            query.append_pair(name, value);
        }
        query.finish()
    }
}

/// The answer to a form that no page of ours sent, or of another browser's.
pub fn not_ours() -> Response {
    pages::refused(
        StatusCode::FORBIDDEN,
        "Not accepted",
        "This form does not come from the page that was shown to you. \
         Go back to the application and start again.",
    )
}

/// `Sec-Fetch-Site` decides where there is one: scripts cannot set it. `Origin` is `null`
/// under our own `Referrer-Policy` (Fetch 3.2, "serializing a request origin"), so that it
/// counts alone in browsers without the first. A client that sends neither is no
/// browser; the token is checked in any case.
fn is_ours(config: &Config, headers: &HeaderMap) -> bool {
    let origin = headers.get(ORIGIN).map(|v| v.as_bytes());
    let own = url::Url::parse(&config.issuer)
        .map(|url| url.origin().ascii_serialization())
        .unwrap_or_default();
    match headers.get("sec-fetch-site").map(|v| v.as_bytes()) {
        Some(site) => {
            site == b"same-origin" && origin.is_none_or(|o| o == b"null" || o == own.as_bytes())
        }
        None => origin.is_none_or(|o| o == own.as_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_for_one_form_of_one_browser() {
        let cookie = Cookie::generate().expect("random");
        let made = token(&cookie, Purpose::Login, "a=b", 1_000).expect("random");
        let check = |cookie, purpose, request, token: &str, now| {
            check(cookie, purpose, request, token, now)
        };
        let good = check(&cookie, Purpose::Login, "a=b", &made, 1_000);
        assert!(
            matches!(good, Checked::Good { expires: 2_800, .. }),
            "{good:?}"
        );
        assert_eq!(
            check(&cookie, Purpose::Login, "a=b", &made, 2_800),
            Checked::Old
        );
        let other = Cookie::generate().expect("random");
        let (nonce, rest) = made.split_once('.').expect("parts");
        for (cookie, purpose, request, token) in [
            (&other, Purpose::Login, "a=b", made.clone()),
            (&cookie, Purpose::Consent, "a=b", made.clone()),
            (&cookie, Purpose::Login, "a=c", made.clone()),
            (&cookie, Purpose::Login, "a=b", String::new()),
            (&cookie, Purpose::Login, "a=b", "..".to_owned()),
            (&cookie, Purpose::Login, "a=b", format!("x{nonce}.{rest}")),
            (
                &cookie,
                Purpose::Login,
                "a=b",
                made.replace(".2800.", ".9999."),
            ),
            (
                &cookie,
                Purpose::Login,
                "a=b",
                made[..made.len() - 4].to_owned(),
            ),
        ] {
            let wrong = check(cookie, purpose, request, &token, 1_000);
            assert_eq!(wrong, Checked::Wrong, "{token}");
        }
    }

    #[test]
    fn where_a_form_comes_from() {
        let config = Config {
            issuer: "https://id.example:8443".into(),
            ..Config::default()
        };
        let own = "https://id.example:8443";
        for (site, origin, ours) in [
            (Some("same-origin"), Some("null"), true),
            (Some("same-origin"), Some(own), true),
            (Some("same-origin"), None, true),
            (Some("same-origin"), Some("https://evil.example"), false),
            (Some("cross-site"), Some("null"), false),
            (Some("same-site"), Some(own), false),
            (Some("none"), None, false),
            (None, Some(own), true),
            (None, None, true),
            (None, Some("null"), false),
            (None, Some("https://id.example"), false),
            (None, Some("http://id.example:8443"), false),
        ] {
            let mut headers = HeaderMap::new();
            for (name, value) in [("sec-fetch-site", site), ("origin", origin)] {
                if let Some(value) = value {
                    headers.insert(name, value.parse().expect("a header"));
                }
            }
            assert_eq!(is_ours(&config, &headers), ours, "{site:?} {origin:?}");
        }
    }
}
