//! A request as the endpoints for clients read it: bounded, and only one way to read it.

use std::{net::IpAddr, sync::Arc, time::Duration};

use axum::{body::to_bytes, extract::Request};
use http::{HeaderMap, StatusCode, header};
use rustls::pki_types::CertificateDer;

use super::{
    Peer,
    error::{Code, OAuthError},
};
use crate::audit::AuthorityRecord;

/// Longest body, bytes.
const MAX_BODY: usize = 64 << 10;
/// Most parameters.
const MAX_PARAMETERS: usize = 100;
/// For a body to arrive.
const BODY: Duration = Duration::from_secs(10);
/// Parameters that may come more than once (RFC 8707 2, RFC 8693 2.1).
const MANY: [&str; 2] = ["resource", "audience"];

/// Who asks, and with what beside the body.
pub struct Asker {
    pub address: Option<IpAddr>,
    /// Leaf first. The leaf's key is proven, its chain not.
    pub certificates: Arc<[CertificateDer<'static>]>,
    pub headers: HeaderMap,
    /// Trace id (W3C Trace Context).
    pub trace: Option<String>,
}

/// Parameters of a form, none of them empty (RFC 6749 3.1). No `Debug`: it has secrets.
pub struct Form(Vec<(String, String)>);

impl Asker {
    pub fn new(request: &Request) -> Self {
        let peer = request.extensions().get::<Peer>();
        Self {
            address: peer.map(|peer| peer.address.ip()),
            certificates: peer.map_or_else(|| Arc::new([]) as Arc<[_]>, |p| p.certificates.clone()),
            headers: request.headers().clone(),
            trace: request.headers().get("traceparent").and_then(trace_id),
        }
    }

    /// The record of what became of the request.
    pub fn record(&self, event: &'static str) -> AuthorityRecord {
        AuthorityRecord {
            event,
            address: self.address,
            trace: self.trace.clone(),
            ..AuthorityRecord::default()
        }
    }

    /// A header's only value; `Err` where there are two of them, or it is no text.
    pub fn header(&self, name: impl header::AsHeaderName) -> Result<Option<&str>, OAuthError> {
        let mut values = self.headers.get_all(name).iter();
        let Some(value) = values.next() else {
            return Ok(None);
        };
        match (value.to_str(), values.next()) {
            (Ok(text), None) => Ok(Some(text)),
            _ => Err(OAuthError::request("a header is repeated or not ASCII")),
        }
    }
}

impl Form {
    /// Reads the body.
    pub async fn read(request: Request) -> Result<Self, OAuthError> {
        let content = request.headers().get(header::CONTENT_TYPE);
        let content = content.and_then(|value| value.to_str().ok()).unwrap_or("");
        let media = content.split(';').next().unwrap_or("").trim();
        if !media.eq_ignore_ascii_case("application/x-www-form-urlencoded") {
            let why = "the body must be application/x-www-form-urlencoded";
            return Err(OAuthError::request(why));
        }
        let body = match tokio::time::timeout(BODY, to_bytes(request.into_body(), MAX_BODY)).await {
            Ok(Ok(body)) => body,
            Ok(Err(_)) => {
                let error = OAuthError::request("the body is longer than 64 KiB, or broken off");
                return Err(error.with_status(StatusCode::PAYLOAD_TOO_LARGE));
            }
            Err(_elapsed) => {
                let error = OAuthError::request("the body did not arrive in time");
                return Err(error.with_status(StatusCode::REQUEST_TIMEOUT));
            }
        };
        Self::parse(&body)
    }

    pub fn parse(body: &[u8]) -> Result<Self, OAuthError> {
        let mut form: Vec<(String, String)> = Vec::new();
        for (count, (name, value)) in form_urlencoded::parse(body).enumerate() {
            if count == MAX_PARAMETERS {
                return Err(OAuthError::request("more than 100 parameters"));
            }
            // RFC 6749 3.2: a parameter must not be included more than once.
            if !MANY.contains(&&*name) && form.iter().any(|(known, _)| *known == name) {
                return Err(OAuthError::request("a parameter is repeated"));
            }
            form.push((name.into_owned(), value.into_owned()));
        }
        form.retain(|(_, value)| !value.is_empty());
        Ok(Self(form))
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        let named = self.0.iter().find(|(known, _)| known == name);
        named.map(|(_, value)| value.as_str())
    }

    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        let named = self.0.iter().filter(move |(known, _)| known == name);
        named.map(|(_, value)| value.as_str())
    }

    pub fn required(&self, name: &'static str, missing: &'static str) -> Result<&str, OAuthError> {
        self.get(name).ok_or_else(|| OAuthError::request(missing))
    }

    /// The words of `scope` (RFC 6749 3.3), each once; `None`: left to us.
    pub fn scopes(&self) -> Result<Option<Vec<String>>, OAuthError> {
        let Some(text) = self.get("scope") else {
            return Ok(None);
        };
        let mut scopes = Vec::new();
        for word in text.split(' ').filter(|word| !word.is_empty()) {
            let allowed = |b: u8| b.is_ascii_graphic() && b != b'"' && b != b'\\';
            if !word.bytes().all(allowed) {
                let why = "scope has characters that no scope has";
                return Err(OAuthError::new(Code::InvalidScope, why));
            }
            if !scopes.iter().any(|known| known == word) {
                scopes.push(word.to_owned());
            }
        }
        Ok(Some(scopes))
    }

    /// `resource` and `audience`, each once.
    pub fn targets(&self) -> Vec<String> {
        let mut targets: Vec<String> = Vec::new();
        for target in MANY.into_iter().flat_map(|name| self.all(name)) {
            if !targets.iter().any(|known| known == target) {
                targets.push(target.to_owned());
            }
        }
        targets
    }
}

/// The trace id of a valid `traceparent` (W3C Trace Context 3.2).
fn trace_id(value: &http::HeaderValue) -> Option<String> {
    let text = value.to_str().ok()?;
    let hex = |part: &str, length: usize| {
        let digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        part.len() == length && part.bytes().all(digit)
    };
    let mut parts = text.split('-');
    let (version, trace, parent, flags) =
        (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let known = version == "00" && parts.next().is_none();
    let good = hex(version, 2) && version != "ff" && (known || version != "00");
    let good = good && hex(trace, 32) && hex(parent, 16) && hex(flags, 2);
    let zero = |part: &str| part.bytes().all(|b| b == b'0');
    (good && !zero(trace) && !zero(parent)).then(|| trace.to_owned())
}
