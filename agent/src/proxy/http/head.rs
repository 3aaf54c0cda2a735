//! Reads the head of an HTTP/1 request (RFC 9112 2 to 6), strictly: what the
//! grammar does not say is refused, and so is whatever of it applications are known
//! to read in two ways. No I/O.

mod fields;

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderName, HeaderValue, StatusCode, Version};

use self::fields::Framing;
use super::{
    Limits,
    rules::{self, BadRequest, bad, is_token_byte},
};
use crate::request::{Edits, Request};

/// What follows a request's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    None,
    Length(u64),
    Chunked,
}

/// A header as it was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    pub name: HeaderName,
    /// The name in the client's spelling.
    pub wire: Bytes,
    pub value: HeaderValue,
}

/// A request's head, without what is between client and agent only.
#[derive(Clone, Debug)]
pub struct Head {
    method: Bytes,
    /// Origin form, or `*`.
    path: Bytes,
    host: Bytes,
    /// 1.0 or 1.1.
    pub version: Version,
    pub fields: Vec<Field>,
    pub body: Body,
    /// The client wants the connection to live on (RFC 9112 9.3).
    pub keep_alive: bool,
    /// The client waits for 100 before it sends the body (RFC 9110 10.1.1).
    pub expect: bool,
    /// Protocols that the client asks to change to (RFC 9110 7.8).
    pub upgrade: Option<Bytes>,
    /// The client takes trailers (RFC 9110 10.1.4).
    trailers: bool,
}

/// Takes one head off the buffer; `None` while it is incomplete.
pub fn parse(buffer: &mut BytesMut, limits: &Limits) -> Result<Option<Head>, BadRequest> {
    let Some(end) = end(buffer, limits)? else {
        return Ok(None);
    };
    let bytes = buffer.split_to(end).freeze();
    let (line, fields) = take_line(&bytes, 0);
    let mut head = request_line(&bytes.slice(..line))?;
    let absolute = std::mem::take(&mut head.host);
    let mut framing = Framing::default();
    let mut from = fields;
    loop {
        let (line, next) = take_line(&bytes, from);
        if line == 0 {
            break;
        }
        let field = field(&bytes.slice(from..from + line))?;
        head.sort(field, &mut framing)?;
        from = next;
    }
    head.conclude(&framing, &absolute)?;
    Ok(Some(head))
}

/// Where the head ends. Every line ends with CR LF: a bare LF, which RFC 9112 2.2
/// lets a recipient take for a line's end, ends it for some and not for others.
fn end(buffer: &[u8], limits: &Limits) -> Result<Option<usize>, BadRequest> {
    const LARGE: BadRequest = BadRequest::new(
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
        "the head is too large",
    );
    let mut lines = 0;
    let mut start = 0;
    while let Some(length) = buffer[start..].iter().position(|b| *b == b'\n') {
        let lf = start + length;
        if length == 0 || buffer[lf - 1] != b'\r' {
            return Err(bad("a line ends with a bare LF"));
        }
        if lf >= limits.head_bytes {
            return Err(match lines {
                0 => TOO_LONG,
                _ => LARGE,
            });
        }
        if length == 1 {
            return match lines {
                0 => Err(bad("an empty line stands before the request")),
                _ => Ok(Some(lf + 1)),
            };
        }
        lines += 1;
        if lines > limits.header_count + 1 {
            return Err(BadRequest::new(
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                "there are too many headers",
            ));
        }
        start = lf + 1;
    }
    match (buffer.len() >= limits.head_bytes, lines) {
        (false, _) => Ok(None),
        (true, 0) => Err(TOO_LONG),
        (true, _) => Err(LARGE),
    }
}

const TOO_LONG: BadRequest =
    BadRequest::new(StatusCode::URI_TOO_LONG, "the request line is too long");

/// Length of the line from `from`, and where the next begins. There is one: [`end`]
/// has seen the LF, and the CR before it.
fn take_line(bytes: &[u8], from: usize) -> (usize, usize) {
    let lf = bytes[from..]
        .iter()
        .position(|b| *b == b'\n')
        .expect("the head ends with an empty line");
    (lf - 1, from + lf + 1)
}

/// `method SP request-target SP HTTP-version` (RFC 9112 3). The authority of an
/// absolute target is left in `host`.
fn request_line(line: &Bytes) -> Result<Head, BadRequest> {
    let mut parts = line.split(|b| *b == b' ');
    let (Some(method), Some(target), Some(version), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(bad("the request line is not three words"));
    };
    rules::method(method)?;
    let version = match version {
        b"HTTP/1.1" => Version::HTTP_11,
        b"HTTP/1.0" => Version::HTTP_10,
        _ => return Err(bad("the version is neither HTTP/1.1 nor HTTP/1.0")),
    };
    let (authority, path) = match target.first() {
        Some(b'/' | b'*') => (Bytes::new(), line.slice_ref(target)),
        _ => absolute(line, target, method)?,
    };
    rules::path(&path, method)?;
    Ok(Head {
        method: line.slice_ref(method),
        path,
        host: authority,
        version,
        fields: Vec::with_capacity(16),
        body: Body::None,
        keep_alive: version == Version::HTTP_11,
        expect: false,
        upgrade: None,
        trailers: false,
    })
}

/// Authority and origin form of an absolute target (RFC 9112 3.2.2).
fn absolute(line: &Bytes, target: &[u8], method: &[u8]) -> Result<(Bytes, Bytes), BadRequest> {
    let prefix = |scheme: &[u8]| {
        target
            .get(..scheme.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(scheme))
            .then_some(scheme.len())
    };
    let Some(start) = prefix(b"http://").or_else(|| prefix(b"https://")) else {
        return Err(bad("the target is neither a path nor an http URI"));
    };
    let rest = &target[start..];
    let end = rest
        .iter()
        .position(|b| matches!(b, b'/' | b'?' | b'#'))
        .unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    // Userinfo has no place here (RFC 9110 4.2.4): no host has an `@`.
    rules::host(authority)?;
    let path = match path.first() {
        Some(b'/') => line.slice_ref(path),
        // RFC 9112 3.2.4.
        None if method == b"OPTIONS" => Bytes::from_static(b"*"),
        None => Bytes::from_static(b"/"),
        Some(_) => [b"/", path].concat().into(),
    };
    Ok((line.slice_ref(authority), path))
}

/// `field-name ":" OWS field-value OWS` (RFC 9112 5), without its line end.
pub(super) fn field(line: &Bytes) -> Result<Field, BadRequest> {
    let colon = line.iter().position(|b| !is_token_byte(*b));
    let colon = match colon.map(|at| (at, line[at])) {
        Some((0, b' ' | b'\t')) => return Err(bad("a header is folded")),
        Some((0, _)) => return Err(bad("a header has no name")),
        Some((at, b':')) => at,
        Some((_, b' ' | b'\t')) => return Err(bad("a header's name is followed by a blank")),
        Some(_) => return Err(bad("a header's name is not a token")),
        None => return Err(bad("a header has no colon")),
    };
    let value = trim(&line[colon + 1..]);
    // Visible characters, blanks, and obs-text; no CR, NUL or other control.
    let value = HeaderValue::from_maybe_shared(line.slice_ref(value))
        .map_err(|_control| bad("a header's value has a control character"))?;
    let name = HeaderName::from_bytes(&line[..colon])
        .map_err(|_long| bad("a header's name is not a token"))?;
    Ok(Field {
        name,
        wire: line.slice(..colon),
        value,
    })
}

/// Without the blanks around it: OWS is SP and HTAB only.
fn trim(mut value: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = value {
        value = rest;
    }
    value
}

impl Head {
    pub fn method(&self) -> &str {
        text(&self.method)
    }

    pub fn path(&self) -> &str {
        text(&self.path)
    }

    pub fn request(&self) -> Request<'_> {
        Request {
            method: self.method(),
            path: self.path(),
            host: text(&self.host),
            headers: self.fields.iter().map(|f| (&f.name, &f.value)).collect(),
        }
    }

    /// Writes the head as the application gets it.
    pub fn write(&self, edits: &Edits, out: &mut BytesMut) {
        out.reserve(512);
        out.extend_from_slice(&self.method);
        out.extend_from_slice(b" ");
        out.extend_from_slice(edits.path.as_ref().map_or(&self.path[..], |p| p.as_bytes()));
        out.extend_from_slice(match self.version {
            Version::HTTP_10 => b" HTTP/1.0\r\n",
            _ => b" HTTP/1.1\r\n",
        });
        for field in &self.fields {
            if rules::is_framing(&field.name) || edits.keeps(&field.name) {
                write_field(out, &field.wire, field.value.as_bytes());
            }
        }
        for (name, value) in &edits.set {
            if !rules::is_framing(name) {
                write_field(out, name.as_str().as_bytes(), value.as_bytes());
            }
        }
        if self.trailers {
            write_field(out, b"TE", b"trailers");
        }
        if let Some(protocols) = &self.upgrade {
            write_field(out, b"Upgrade", protocols);
        }
        self.write_connection(out);
        out.extend_from_slice(b"\r\n");
    }

    /// Our own options for the connection to the application (RFC 9110 7.6.1).
    fn write_connection(&self, out: &mut BytesMut) {
        let lives = match (self.keep_alive, self.version) {
            (false, Version::HTTP_11) => Some("close"),
            (true, Version::HTTP_10) => Some("keep-alive"),
            _ => None,
        };
        let options = [
            lives,
            self.upgrade.as_ref().map(|_| "Upgrade"),
            self.trailers.then_some("TE"),
        ];
        let mut separator = "Connection: ";
        for option in options.into_iter().flatten() {
            out.extend_from_slice(separator.as_bytes());
            out.extend_from_slice(option.as_bytes());
            separator = ", ";
        }
        if separator == ", " {
            out.extend_from_slice(b"\r\n");
        }
    }
}

pub(super) fn write_field(out: &mut BytesMut, name: &[u8], value: &[u8]) {
    out.extend_from_slice(name);
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

fn text(bytes: &Bytes) -> &str {
    std::str::from_utf8(bytes).expect("it was found to be visible ASCII")
}

/// Takes `count` bytes off without using them.
pub(super) fn skip(buffer: &mut BytesMut, count: u64) -> u64 {
    let part = usize::try_from(count).map_or(buffer.len(), |count| count.min(buffer.len()));
    buffer.advance(part);
    part as u64
}
