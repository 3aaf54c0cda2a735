//! What the HTTP/2 library lets through and a request must not have (RFC 9113 8).

use http::{HeaderValue, StatusCode, header, request::Parts};

use super::super::{
    BadRequest, Limits,
    rules::{self, bad},
};

/// Headers that belong to a connection (RFC 9113 8.2.2). The library refuses most.
const CONNECTION: [&str; 5] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "transfer-encoding",
    "upgrade",
];

/// Returns path and host.
pub(super) fn check<'a>(
    parts: &'a Parts,
    limits: &Limits,
) -> Result<(&'a str, &'a str), BadRequest> {
    if parts.headers.len() > limits.header_count {
        return Err(BadRequest::new(
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            "there are too many headers",
        ));
    }
    let method = parts.method.as_str().as_bytes();
    rules::method(method)?;
    if let Some(scheme) = parts.uri.scheme_str()
        && !matches!(scheme, "http" | "https")
    {
        return Err(bad("the scheme is not http"));
    }
    let path = parts.uri.path_and_query().map_or("", |p| p.as_str());
    rules::path(path.as_bytes(), method)?;
    let host = host(parts)?;
    for (name, value) in &parts.headers {
        if CONNECTION.contains(&name.as_str()) {
            return Err(bad("a header belongs to HTTP/1's connection"));
        }
        if name == header::TE && value != "trailers" {
            return Err(bad("TE is not trailers"));
        }
        if padded(value) {
            return Err(bad("a header's value has blanks around it"));
        }
        rules::disguised(name)?;
    }
    let mut lengths = parts.headers.get_all(header::CONTENT_LENGTH).iter();
    if let Some(length) = lengths.next() {
        rules::content_length(length.as_bytes())?;
        if lengths.next().is_some() {
            return Err(bad("content-length is there twice"));
        }
    }
    for expectation in parts.headers.get_all(header::EXPECT) {
        rules::expect(expectation.as_bytes())?;
    }
    Ok((path, host))
}

/// RFC 9113 8.3.1: `host` must not differ from `:authority`, and may stand for it.
fn host(parts: &Parts) -> Result<&str, BadRequest> {
    let mut hosts = parts.headers.get_all(header::HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(bad("host is there twice"));
    }
    let host = host
        .map(|host| host.to_str().map_err(|_| bad("the host is not ASCII")))
        .transpose()?;
    let authority = parts.uri.authority().map(|a| a.as_str());
    let named = match (authority, host) {
        (Some(authority), Some(host)) if !authority.eq_ignore_ascii_case(host) => {
            return Err(bad("host is not the authority"));
        }
        (Some(named), _) | (None, Some(named)) => named,
        (None, None) => return Err(bad("there is no authority")),
    };
    rules::host(named.as_bytes())?;
    Ok(named)
}

/// RFC 9113 8.2.1.
fn padded(value: &HeaderValue) -> bool {
    let blank = |b: Option<&u8>| matches!(b, Some(b' ' | b'\t'));
    blank(value.as_bytes().first()) || blank(value.as_bytes().last())
}
