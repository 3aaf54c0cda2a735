//! Tells whether a connection speaks HTTP. What could be understood as a request by
//! any application counts as HTTP, however badly it is written: the strict parser
//! then refuses it. What is not HTTP is judged as a mere TCP connection.

use std::io;

use tokio::time::{Instant, timeout_at};

use super::{Io, Limits, io::HEAD_CHUNK, rules::is_token_byte};

/// RFC 9113 3.4.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Http1,
    /// With prior knowledge (RFC 9113 3.3).
    Http2,
    NotHttp,
}

/// Reads of the connection until it is clear; what was read stays in it. Waits
/// without bound for a client that says nothing, as those of protocols in which the
/// server speaks first do. Safe to cancel.
pub async fn sniff(io: &mut Io, limits: &Limits) -> io::Result<Protocol> {
    /// By then all but a tedious client have told, bytes.
    const SHORT: usize = 64;
    // From the first byte on.
    let mut deadline = None;
    let mut unseen = 0;
    loop {
        // Of a longer line, no byte is looked at each time that another has come.
        let ended = io.buffer[unseen..].contains(&b'\n');
        let worth = unseen < SHORT || ended || io.buffer.len() > limits.head_bytes;
        if worth && let Some(protocol) = classify(&io.buffer, limits.head_bytes) {
            return Ok(protocol);
        }
        unseen = io.buffer.len();
        // A first line that never ends is neither: nobody may choose to be unread.
        let read = match io.buffer.is_empty() {
            true => io.fill(HEAD_CHUNK).await?,
            false => {
                let limit = || Instant::now() + limits.head_timeout;
                let deadline = deadline.get_or_insert_with(limit);
                let late = |_elapsed| io::Error::from(io::ErrorKind::TimedOut);
                let more = timeout_at(*deadline, io.fill(HEAD_CHUNK));
                more.await.map_err(late)??
            }
        };
        if read == 0 {
            // An application may take the end for that of the line.
            let mut line = io.buffer.clone();
            line.extend_from_slice(b"\n");
            return Ok(classify(&line, limits.head_bytes).unwrap_or(Protocol::NotHttp));
        }
    }
}

/// What begins with these bytes; `None` while more are needed. A first line longer
/// than `limit` is HTTP, and too long there.
pub fn classify(bytes: &[u8], limit: usize) -> Option<Protocol> {
    if bytes.starts_with(PREFACE) {
        return Some(Protocol::Http2);
    }
    if PREFACE.starts_with(bytes) {
        return None;
    }
    // Lenient applications skip empty lines, and blanks.
    let start = (bytes.iter().position(|b| !is_blank(*b))).unwrap_or(bytes.len());
    let text = &bytes[start..];
    let over = bytes.len() > limit;
    let undecided = || over.then_some(Protocol::Http1);
    let Some(end) = text.iter().position(|b| !is_token_byte(*b)) else {
        return undecided();
    };
    if end == 0 || !is_blank(text[end]) || matches!(text[end], b'\r' | b'\n') {
        return Some(Protocol::NotHttp);
    }
    let end_of_line = text.iter().position(|b| *b == b'\n');
    let line = &text[..end_of_line.unwrap_or(text.len())];
    let second = (line[end..].split(|b| is_blank(*b)))
        .find(|word| !word.is_empty())
        .unwrap_or_default();
    if matches!(second.first(), Some(b'/' | b'*'))
        || second.windows(3).any(|w| w == b"://")
        || line.windows(5).any(|w| w.eq_ignore_ascii_case(b"HTTP/"))
    {
        return Some(Protocol::Http1);
    }
    match end_of_line {
        Some(_) => Some(Protocol::NotHttp),
        None => undecided(),
    }
}

/// What some application takes for a blank between words: Python's `str.split` has
/// the longest list.
fn is_blank(b: u8) -> bool {
    matches!(b, b'\t'..=b'\r' | 0x1c..=0x1f | b' ' | 0x85 | 0xa0)
}
