//! HTTP/1 requests: what the agent takes for a request is one for every reader, and
//! still the same one after it was forwarded.

#![no_main]

use std::time::Duration;

use bytes::BytesMut;
use http::{HeaderName, HeaderValue};
use libfuzzer_sys::fuzz_target;
use postern::{
    proxy::http::{
        BadRequest, Limits, Protocol,
        chunked::Decoder,
        classify,
        head::{self, Body, Head},
    },
    request::Edits,
};

fuzz_target!(|bytes: &[u8]| {
    if let Some(rest) = request(bytes) {
        chunked(rest);
    }
    chunked(bytes);
});

fn limits(head_bytes: usize, header_count: usize) -> Limits {
    Limits {
        head_bytes,
        header_count,
        head_timeout: Duration::from_secs(10),
        streams: 100,
        stream_window: 65_535,
        resets: 100,
    }
}

/// Reads a head; what follows it if its body is chunked.
fn request(bytes: &[u8]) -> Option<&[u8]> {
    let limits = limits(2048, 24);
    let mut whole = BytesMut::from(bytes);
    let read = head::parse(&mut whole, &limits);
    let pieces = in_pieces(bytes, &limits);
    match (&read, &pieces) {
        (Ok(Some(one)), Ok(Some(other))) => assert_eq!(forwarded(one), forwarded(other)),
        (Ok(None), Ok(None)) | (Err(_), Err(_)) => {}
        other => panic!("whole and in pieces: {other:?}"),
    }
    let head = read.ok()??;
    let length = bytes.len() - whole.len();
    assert_eq!(
        classify(bytes, limits.head_bytes),
        Some(Protocol::Http1),
        "a request passed for something else"
    );
    same_when_forwarded(&head);
    same_framing_when_edited(&head);
    (head.body == Body::Chunked).then(|| &bytes[length..])
}

/// Reads a head that comes piece by piece, as long as it needs.
fn in_pieces(bytes: &[u8], limits: &Limits) -> Result<Option<Head>, BadRequest> {
    let mut buffer = BytesMut::new();
    for piece in bytes.chunks(piece_length(bytes)) {
        buffer.extend_from_slice(piece);
        if let Some(head) = head::parse(&mut buffer, limits)? {
            return Ok(Some(head));
        }
    }
    Ok(None)
}

/// Any length, but always the same of the same input.
fn piece_length(bytes: &[u8]) -> usize {
    1 + bytes.iter().map(|byte| usize::from(*byte)).sum::<usize>() % 61
}

fn forwarded(head: &Head) -> BytesMut {
    let mut out = BytesMut::new();
    head.write(&Edits::default(), &mut out);
    out
}

/// The head that the application reads.
fn read_again(bytes: &BytesMut) -> Head {
    let mut again = bytes.clone();
    let head = head::parse(&mut again, &limits(1 << 20, 1 << 10));
    assert!(again.is_empty(), "a request follows: {bytes:?}");
    head.expect("well-formed").expect("complete")
}

fn same_when_forwarded(head: &Head) {
    let bytes = forwarded(head);
    let again = read_again(&bytes);
    assert_eq!(forwarded(&again), bytes);
    assert_eq!(head.method(), again.method());
    assert_eq!(head.path(), again.path());
    assert_eq!(head.request().host, again.request().host);
    assert_eq!(head.fields, again.fields);
    assert_eq!(head.body, again.body);
    assert_eq!(
        (head.version, head.keep_alive, head.expect, &head.upgrade),
        (
            again.version,
            again.keep_alive,
            again.expect,
            &again.upgrade
        )
    );

    let text = bytes.strip_suffix(b"\r\n\r\n").expect("an empty line");
    let mut lines = 0;
    for line in text.split(|byte| *byte == b'\n') {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        assert!(!line.is_empty(), "{bytes:?}");
        assert!(!line.iter().any(|b| b"\r\n\0".contains(b)), "{bytes:?}");
        lines += 1;
    }

    // Another reader, with other code.
    let mut headers = vec![httparse::EMPTY_HEADER; lines];
    let mut other = httparse::Request::new(&mut headers);
    let end = other.parse(&bytes).expect("well-formed to others");
    assert_eq!(end, httparse::Status::Complete(bytes.len()));
    assert_eq!(other.method, Some(head.method()));
    assert_eq!(other.path, Some(head.path()));
    assert_eq!(other.headers.len(), lines - 1);
}

/// Edits change what they say and nothing about where the request ends.
fn same_framing_when_edited(head: &Head) {
    let removed = [
        "authorization",
        "x-user",
        "content-length",
        "transfer-encoding",
    ];
    let edits = Edits {
        remove: removed.map(HeaderName::from_static).into(),
        set: vec![
            (
                HeaderName::from_static("x-user"),
                HeaderValue::from_static("alice"),
            ),
            (
                HeaderName::from_static("content-length"),
                HeaderValue::from_static("7"),
            ),
        ],
        path: Some("/edited".into()),
    };
    let mut out = BytesMut::new();
    head.write(&edits, &mut out);
    let edited = read_again(&out);
    assert_eq!((edited.path(), edited.body), ("/edited", head.body));
    let users: Vec<_> = (edited.fields.iter())
        .filter(|field| field.name.as_str().replace('_', "-") == "x-user")
        .map(|field| field.value.as_bytes())
        .collect();
    assert_eq!(users, [b"alice"]);
}

fn chunked(bytes: &[u8]) {
    let limits = limits(512, 8);
    let request = decode(Decoder::request(&limits), bytes.chunks(usize::MAX));
    let pieces = bytes.chunks(piece_length(bytes));
    assert_eq!(decode(Decoder::request(&limits), pieces), request);
    let response = decode(Decoder::response(&limits), bytes.chunks(usize::MAX));
    if request.end.is_ok() {
        assert_eq!(response, request, "a response's body is read otherwise");
    }
    assert!(request.data.len() <= bytes.len());
    for value in request.trailers {
        assert!(!value.as_bytes().iter().any(|b| b"\r\n\0".contains(b)));
    }
}

#[derive(Debug, PartialEq)]
struct Decoded {
    data: Vec<u8>,
    /// How many bytes the body has, if it is all there.
    end: Result<Option<usize>, BadRequest>,
    trailers: Vec<HeaderValue>,
}

fn decode<'a>(mut decoder: Decoder, pieces: impl Iterator<Item = &'a [u8]>) -> Decoded {
    let (mut data, mut read, mut wrong) = (Vec::new(), 0, None);
    'pieces: for mut piece in pieces {
        while !piece.is_empty() && !decoder.is_done() {
            match decoder.decode(piece) {
                Ok(step) => {
                    assert!(step.consumed > 0, "no progress");
                    data.extend_from_slice(&piece[step.data]);
                    piece = &piece[step.consumed..];
                    read += step.consumed;
                }
                Err(error) => {
                    wrong = Some(error);
                    break 'pieces;
                }
            }
        }
    }
    Decoded {
        data,
        end: match wrong {
            Some(error) => Err(error),
            None => Ok(decoder.is_done().then_some(read)),
        },
        trailers: decoder.trailers().iter().map(|t| t.value.clone()).collect(),
    }
}
