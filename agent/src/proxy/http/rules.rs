//! What makes a request well-formed, for HTTP/1.1 and HTTP/2 alike. Where two
//! readers could understand a request differently it is refused: the agent's
//! reading must be the application's.

use http::{HeaderName, StatusCode, header};

/// A request that is refused for its form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why} ({})", .status.as_u16())]
pub struct BadRequest {
    pub status: StatusCode,
    pub why: &'static str,
}

impl BadRequest {
    pub(super) const fn new(status: StatusCode, why: &'static str) -> Self {
        Self { status, why }
    }
}

/// 400, for this reason.
pub(super) const fn bad(why: &'static str) -> BadRequest {
    BadRequest::new(StatusCode::BAD_REQUEST, why)
}

/// `tchar` of RFC 9110 5.6.2.
pub(super) const fn is_token_byte(byte: u8) -> bool {
    matches!(byte,
        b'!' | b'#' | b'$' | b'%' | b'&' | b'\'' | b'*' | b'+' | b'-' | b'.' | b'^' | b'_'
        | b'`' | b'|' | b'~' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z')
}

pub(super) fn is_token(bytes: &[u8]) -> bool {
    !bytes.is_empty() && bytes.iter().all(|b| is_token_byte(*b))
}

/// Methods the agent cannot let through, whoever asks: CONNECT makes a tunnel that
/// no policy sees into (in any case, as applications differ); PRI is no method but
/// HTTP/2's preface (RFC 9113 3.4).
pub(super) fn method(method: &[u8]) -> Result<(), BadRequest> {
    if !is_token(method) {
        return Err(bad("the method is not a token"));
    }
    if method.eq_ignore_ascii_case(b"CONNECT") {
        return Err(BadRequest::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "CONNECT is not served",
        ));
    }
    if method == b"PRI" {
        return Err(bad("HTTP/2's preface is broken"));
    }
    Ok(())
}

/// Origin form or asterisk form (RFC 9112 3.2.1, 3.2.4), of visible ASCII: anything
/// else must be percent-encoded (RFC 3986 2).
pub(super) fn path(path: &[u8], method: &[u8]) -> Result<(), BadRequest> {
    if !path.iter().all(u8::is_ascii_graphic) {
        return Err(bad("the path is not visible ASCII"));
    }
    match path.first() {
        Some(b'/') => Ok(()),
        Some(b'*') if path.len() == 1 && method == b"OPTIONS" => Ok(()),
        _ => Err(bad("the path does not begin with a slash")),
    }
}

/// `uri-host [ ":" port ]` (RFC 9110 7.2). Narrower than RFC 3986, whose percent
/// encoding and sub-delimiters no real host has: policy compares hosts as they are
/// sent, an application may decode them.
pub(super) fn host(host: &[u8]) -> Result<(), BadRequest> {
    const WRONG: BadRequest = bad("the host has characters that no host has");
    let (name, rest) = match host.first() {
        None => return Err(bad("the host is empty")),
        Some(b'[') => {
            let end = host.iter().position(|b| *b == b']').ok_or(WRONG)?;
            let address = std::str::from_utf8(&host[1..end]).map_err(|_not_ascii| WRONG)?;
            if address.parse::<std::net::Ipv6Addr>().is_err() {
                return Err(WRONG);
            }
            (&host[..=end], &host[end + 1..])
        }
        Some(_) => {
            let end = host.iter().position(|b| *b == b':').unwrap_or(host.len());
            let name = &host[..end];
            let fits = |b: &u8| b.is_ascii_alphanumeric() || b"-._~".contains(b);
            if !name.iter().all(fits) {
                return Err(WRONG);
            }
            (name, &host[end..])
        }
    };
    let port = match rest {
        [] => &[][..],
        [b':', port @ ..] => port,
        _ => return Err(WRONG),
    };
    if name.is_empty() || port.len() > 5 || !port.iter().all(u8::is_ascii_digit) {
        return Err(WRONG);
    }
    Ok(())
}

/// `1*DIGIT` (RFC 9110 8.6), and one number: a list, even of equal ones, may be
/// refused (RFC 9112 6.3).
pub(super) fn content_length(value: &[u8]) -> Result<u64, BadRequest> {
    const WRONG: BadRequest = bad("Content-Length is not a number");
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return Err(WRONG);
    }
    // Beyond 2^63-1 some applications overflow.
    value
        .iter()
        .try_fold(0i64, |sum, digit| {
            sum.checked_mul(10)?.checked_add(i64::from(digit - b'0'))
        })
        .and_then(|sum| u64::try_from(sum).ok())
        .ok_or(WRONG)
}

/// RFC 9110 10.1.1: an expectation that is not known is refused.
pub(super) fn expect(value: &[u8]) -> Result<(), BadRequest> {
    if value.eq_ignore_ascii_case(b"100-continue") {
        Ok(())
    } else {
        Err(BadRequest::new(
            StatusCode::EXPECTATION_FAILED,
            "the expectation is not known",
        ))
    }
}

/// Applications behind CGI and its kin take `_` for `-` in names: what would be
/// framing by that reading is refused.
pub(super) fn disguised(name: &HeaderName) -> Result<(), BadRequest> {
    if !name.as_str().contains('_') {
        return Ok(());
    }
    match name.as_str().replace('_', "-").as_str() {
        "content-length" | "transfer-encoding" => {
            Err(bad("a framing header is spelled with underscores"))
        }
        _ => Ok(()),
    }
}

/// Headers that frame a message or name its connection: edits leave them alone.
pub(super) fn is_framing(name: &HeaderName) -> bool {
    matches!(
        *name,
        header::CONTENT_LENGTH | header::TRANSFER_ENCODING | header::CONNECTION | header::UPGRADE
    )
}

/// Headers that a client may not have removed by naming them in `Connection` (RFC
/// 9110 7.6.1 lets it): framing, routing, credentials, and who the client is.
pub(super) fn is_protected(name: &str) -> bool {
    matches!(
        name,
        "host"
            | "content-length"
            | "transfer-encoding"
            | "content-type"
            | "authorization"
            | "cookie"
            | "forwarded"
            | "x-real-ip"
            | "expect"
            | "trailer"
    ) || name.starts_with("x-forwarded-")
}

/// Fields that a trailer may not carry (RFC 9110 6.5.1): framing, routing, request
/// modifiers, authentication, and how the content is to be read. An application that
/// merges trailers into headers would take them for the client's headers, which
/// policy has not seen.
pub(super) fn forbidden_in_trailer(name: &HeaderName) -> bool {
    let name = name.as_str().replace('_', "-");
    matches!(
        name.as_str(),
        "transfer-encoding"
            | "content-length"
            | "host"
            | "trailer"
            | "connection"
            | "keep-alive"
            | "proxy-connection"
            | "upgrade"
            | "http2-settings"
            | "te"
            | "expect"
            | "max-forwards"
            | "cache-control"
            | "pragma"
            | "range"
            | "authorization"
            | "proxy-authorization"
            | "cookie"
            | "set-cookie"
            | "forwarded"
            | "x-real-ip"
            | "content-encoding"
            | "content-type"
            | "content-range"
    ) || name.starts_with("if-")
        || name.starts_with("x-forwarded-")
}
