//! Writes what the agent answers itself.

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};

use super::{BadRequest, head::write_field};
use crate::request::Reply;

impl From<BadRequest> for Reply {
    fn from(bad: BadRequest) -> Self {
        Self::new(bad.status, bad.why)
    }
}

/// For what cannot be reached.
pub(super) fn unreachable() -> Reply {
    Reply::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "the application cannot be reached",
    )
}

/// For what was reached and did not answer as it must.
pub(super) fn no_answer() -> Reply {
    Reply::new(
        StatusCode::BAD_GATEWAY,
        "the application gave no valid answer",
    )
}

/// For a request whose permission has ended.
pub(super) fn revoked() -> Reply {
    Reply::new(StatusCode::FORBIDDEN, "the permission has ended")
}

/// As HTTP/1.1 has it. A reply to HEAD has no body, but its length (RFC 9110 9.3.2).
pub(super) fn write_http1(reply: &Reply, to_head: bool, close: bool, out: &mut BytesMut) {
    let reason = reply.status.canonical_reason().unwrap_or_default();
    out.extend_from_slice(format!("HTTP/1.1 {} {reason}\r\n", reply.status.as_str()).as_bytes());
    for (name, value) in &reply.headers {
        write_field(out, name.as_str().as_bytes(), value.as_bytes());
    }
    let bodiless = is_bodiless(reply.status);
    if !bodiless {
        if !names_type(reply) {
            write_field(out, b"content-type", b"text/plain");
        }
        let length = reply.body.len().to_string();
        write_field(out, b"content-length", length.as_bytes());
    }
    if close {
        write_field(out, b"connection", b"close");
    }
    out.extend_from_slice(b"\r\n");
    if !to_head && !bodiless {
        out.extend_from_slice(reply.body.as_bytes());
    }
}

/// Statuses whose answers have no body (RFC 9110 6.4.1): a provider may choose one.
fn is_bodiless(status: StatusCode) -> bool {
    matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
}

fn names_type(reply: &Reply) -> bool {
    let mut names = reply.headers.iter().map(|(name, _)| name);
    names.any(|name| *name == header::CONTENT_TYPE)
}

/// As HTTP/2 has it: the head, and the body if there is one.
pub(super) fn http2(reply: &Reply, to_head: bool) -> (Response<()>, Bytes) {
    let mut headers: HeaderMap = reply.headers.iter().cloned().collect();
    let bodiless = is_bodiless(reply.status);
    if !bodiless {
        if !names_type(reply) {
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        }
        headers.insert(header::CONTENT_LENGTH, reply.body.len().into());
    }
    let body = match to_head || bodiless {
        true => Bytes::new(),
        false => Bytes::copy_from_slice(reply.body.as_bytes()),
    };
    (response(reply.status, headers), body)
}

/// As gRPC has it: trailers only (gRPC over HTTP/2, "Responses").
pub(super) fn grpc(reply: &Reply) -> Response<()> {
    /// What `grpc-message` spells out: `%x20-24 / %x26-7E` stays.
    const ENCODED: &AsciiSet = &CONTROLS.add(b'%');
    let mut headers: HeaderMap = reply.headers.iter().cloned().collect();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/grpc"),
    );
    headers.insert("grpc-status", u64::from(reply.grpc_status()).into());
    let message = utf8_percent_encode(&reply.body, ENCODED).to_string();
    let message = HeaderValue::try_from(message).expect("it is visible ASCII and spaces");
    headers.insert("grpc-message", message);
    response(StatusCode::OK, headers)
}

fn response(status: StatusCode, headers: HeaderMap) -> Response<()> {
    let mut response = Response::new(());
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}
