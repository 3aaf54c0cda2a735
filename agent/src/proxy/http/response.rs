//! Reads the head of an application's HTTP/1 response, as far as its framing goes
//! (RFC 9112 6.3): it is passed on as it is.

use http::StatusCode;

/// Of a response's head, bytes.
const HEAD_BYTES: usize = 64 << 10;
const HEADERS: usize = 256;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub status: StatusCode,
    /// Length of the head.
    pub head: usize,
    pub framing: Framing,
    pub keep_alive: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Framing {
    Length(u64),
    Chunked,
    /// The connection's end is the body's.
    Close,
}

/// What of a request decides on how its response is read.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Asker {
    /// The method is HEAD.
    pub head: bool,
    /// The client takes the connection to end unless it is told otherwise.
    pub http10: bool,
}

/// A head as an application wrote it, but that it says that the connection ends.
pub(super) fn closing(head: &[u8]) -> Vec<u8> {
    let mut closing = Vec::with_capacity(head.len() + 32);
    let mut options = vec![&b"close"[..]];
    let start = head.iter().position(|b| !b.is_ascii_whitespace());
    for line in head[start.unwrap_or(0)..].split_inclusive(|b| *b == b'\n') {
        let (name, value) = match line.iter().position(|b| *b == b':') {
            Some(colon) => (&line[..colon], &line[colon + 1..]),
            None => (line, &[][..]),
        };
        if name.eq_ignore_ascii_case(b"connection") {
            let said = value.split(|b| *b == b',').map(<[u8]>::trim_ascii);
            let others = said.filter(|option| !option.is_empty() && !is_about_end(option));
            options.extend(others);
        } else if line.trim_ascii().is_empty() {
            closing.extend_from_slice(b"connection: ");
            closing.extend_from_slice(&options.join(&b", "[..]));
            closing.extend_from_slice(b"\r\n\r\n");
        } else if !name.eq_ignore_ascii_case(b"keep-alive") {
            closing.extend_from_slice(line);
        }
    }
    closing
}

fn is_about_end(option: &[u8]) -> bool {
    option.eq_ignore_ascii_case(b"keep-alive") || option.eq_ignore_ascii_case(b"close")
}

/// `None` while the head is incomplete.
pub(super) fn parse(buffer: &[u8], asker: Asker) -> Result<Option<Answer>, &'static str> {
    let mut headers = [const { std::mem::MaybeUninit::uninit() }; HEADERS];
    let mut response = httparse::Response::new(&mut []);
    let parsed = httparse::ParserConfig::default().parse_response_with_uninit_headers(
        &mut response,
        buffer,
        &mut headers,
    );
    let head = match parsed {
        Ok(httparse::Status::Complete(head)) if head <= HEAD_BYTES => head,
        Ok(httparse::Status::Partial) if buffer.len() < HEAD_BYTES => return Ok(None),
        Ok(_) => return Err("its head is too large"),
        Err(httparse::Error::TooManyHeaders) => return Err("it has too many headers"),
        Err(_) => return Err("its head is not HTTP"),
    };
    let status = response
        .code
        .and_then(|code| StatusCode::from_u16(code).ok())
        .ok_or("its status is not one")?;
    let named = |name: &'static str| {
        response
            .headers
            .iter()
            .filter(move |h| h.name.eq_ignore_ascii_case(name))
            .map(|h| h.value.trim_ascii())
    };
    let option = |wanted: &str| {
        named("connection")
            .flat_map(|value| value.split(|b| *b == b','))
            .any(|option| option.trim_ascii().eq_ignore_ascii_case(wanted.as_bytes()))
    };
    let coded = named("transfer-encoding").next().is_some();
    let keep_alive = match response.version {
        // Faulty framing (RFC 9112 6.1): nothing may follow.
        Some(0) if coded => false,
        Some(1) if !asker.http10 => !option("close"),
        _ => option("keep-alive") && !option("close"),
    };
    let answer = |framing| {
        Ok(Some(Answer {
            status,
            head,
            framing,
            keep_alive,
        }))
    };
    let mut lengths = named("content-length");
    let length = match lengths.next() {
        None => None,
        Some(first) if lengths.all(|other| other == first) => {
            Some(super::rules::content_length(first).map_err(|_| "its Content-Length is wrong")?)
        }
        Some(_) => return Err("its Content-Lengths differ"),
    };
    if coded && length.is_some() {
        return Err("it has both Transfer-Encoding and Content-Length");
    }
    if asker.head || status.is_informational() || matches!(status.as_u16(), 204 | 304) {
        return answer(Framing::Length(0));
    }
    if coded {
        let mut codings = named("transfer-encoding").flat_map(|v| v.split(|b| *b == b','));
        let last = codings.next_back().unwrap_or_default().trim_ascii();
        return answer(match last.eq_ignore_ascii_case(b"chunked") {
            true => Framing::Chunked,
            false => Framing::Close,
        });
    }
    answer(length.map_or(Framing::Close, Framing::Length))
}
