//! One HTTP request's head as policy sees it: the same for HTTP/1.1, for HTTP/2 and
//! for the command line. And what policy makes of it: edits, or an answer.

use std::borrow::Cow;

use http::{HeaderName, HeaderValue, StatusCode, header};

/// The head of a request. Framing has been checked by whoever read it.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// As sent; methods are case-sensitive (RFC 9110 9.1).
    pub method: &'a str,
    /// Path and query as sent (`:path`, or the origin form of the target), or `*`.
    pub path: &'a str,
    /// `Host` or `:authority` as sent; empty where HTTP/1.0 has none.
    pub host: &'a str,
    /// In the order of the wire, without pseudo-headers. `Host` may be among them.
    pub headers: Vec<(&'a HeaderName, &'a HeaderValue)>,
}

impl<'a> Request<'a> {
    /// All values of a header, joined with `,` as one string (RFC 9110 5.3); `Cookie`
    /// with `; ` (RFC 9113 8.2.3). Bytes beyond UTF-8 are replaced, so that no
    /// pattern can match them by chance.
    pub fn header(&self, name: &HeaderName) -> Option<Cow<'a, str>> {
        let mut values = self.values(name);
        let first = values.next()?;
        let Some(second) = values.next() else {
            return Some(first);
        };
        let separator = if name == header::COOKIE { "; " } else { "," };
        let mut joined = first.into_owned();
        for value in std::iter::once(second).chain(values) {
            joined.push_str(separator);
            joined.push_str(&value);
        }
        Some(Cow::Owned(joined))
    }

    /// The values of a header, one by one.
    pub fn values(&self, name: &HeaderName) -> impl Iterator<Item = Cow<'a, str>> {
        let own = self.headers.iter().filter(move |(other, _)| *other == name);
        own.map(|(_, value)| text(value.as_bytes()))
    }

    /// Whether it is a gRPC call: its refusals are told in trailers.
    pub fn is_grpc(&self) -> bool {
        self.headers.iter().any(|(name, value)| {
            **name == header::CONTENT_TYPE && value.as_bytes().starts_with(b"application/grpc")
        })
    }
}

/// Nearly all are ASCII, of which this takes many at a time.
fn text(value: &[u8]) -> Cow<'_, str> {
    match std::str::from_utf8(value) {
        Ok(text) => Cow::Borrowed(text),
        Err(_) => String::from_utf8_lossy(value),
    }
}

/// What is changed of a request before the application gets it. Removals come first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Edits {
    pub remove: Vec<HeaderName>,
    pub set: Vec<(HeaderName, HeaderValue)>,
    /// Path and query instead of those that were sent.
    pub path: Option<String>,
}

impl Edits {
    /// Whether a header of the request is kept. `-` and `_` are one to applications
    /// behind CGI and its kin: what is edited is edited under every reading.
    pub fn keeps(&self, name: &HeaderName) -> bool {
        let mut edited = self
            .remove
            .iter()
            .chain(self.set.iter().map(|(name, _)| name));
        !edited.any(|other| other == name || is_same(other.as_str(), name.as_str()))
    }

    /// The headers of a request after the edits.
    pub fn headers<'a>(&'a self, request: &Request<'a>) -> Vec<(&'a HeaderName, &'a HeaderValue)> {
        let kept = request.headers.iter().filter(|(name, _)| self.keeps(name));
        let set = self.set.iter().map(|(name, value)| (name, value));
        kept.copied().chain(set).collect()
    }
}

fn is_same(one: &str, other: &str) -> bool {
    let fold = |b: u8| if b == b'_' { b'-' } else { b };
    one.len() == other.len() && one.bytes().map(fold).eq(other.bytes().map(fold))
}

/// What the agent answers in the application's stead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    pub status: StatusCode,
    pub headers: Vec<(HeaderName, HeaderValue)>,
    pub body: Cow<'static, str>,
}

impl Reply {
    pub fn new(status: StatusCode, body: impl Into<Cow<'static, str>>) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: body.into(),
        }
    }

    /// The gRPC status that says the same (gRPC "HTTP to gRPC Status Code Mapping",
    /// and for 429 and 5xx what its text asks for).
    pub fn grpc_status(&self) -> u8 {
        match self.status.as_u16() {
            400 | 431 => 13,
            401 => 16,
            403 => 7,
            404 => 12,
            429 | 502..=504 => 14,
            _ => 2,
        }
    }
}
