//! Reads a chunked body (RFC 9112 7.1), strictly. Chunk extensions mean nothing
//! between client and agent and are dropped; trailers are held to the rules of
//! headers. No I/O.

use std::ops::Range;

use bytes::BytesMut;

use super::{
    Limits,
    head::{Field, field},
    rules::{self, BadRequest, bad, is_token_byte},
};

/// Bytes of extensions that a body may have: they carry nothing, and cost work
/// (CVE-2023-39326 of Go was about them).
const EXTENSIONS: usize = 4 << 10;

#[derive(Debug)]
pub struct Decoder {
    state: State,
    /// Of the chunk that is read.
    size: u64,
    digits: u8,
    extensions: usize,
    line: BytesMut,
    trailers: Vec<Field>,
    trailer_bytes: usize,
    limits: (usize, usize),
    /// Whose body it is: of a request, or of a response.
    request: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Size,
    Extension(Extension),
    SizeLf,
    Data(u64),
    DataCr,
    DataLf,
    Trailer,
    Done,
}

/// `";" token [ "=" ( token / quoted-string ) ]` (RFC 9112 7.1.1), without the blanks
/// that only ever served smuggling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Extension {
    Name { begun: bool },
    Value { begun: bool },
    Quoted,
    Escaped,
    Closed,
}

/// What a call has read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Bytes of the input that are dealt with.
    pub consumed: usize,
    /// Those of them that are content.
    pub data: Range<usize>,
}

impl Decoder {
    /// For a request's body.
    pub fn request(limits: &Limits) -> Self {
        Self::new(limits, true)
    }

    /// For a response's, whose trailers may be any.
    pub fn response(limits: &Limits) -> Self {
        Self::new(limits, false)
    }

    fn new(limits: &Limits, request: bool) -> Self {
        Self {
            state: State::Size,
            size: 0,
            digits: 0,
            extensions: 0,
            line: BytesMut::new(),
            trailers: Vec::new(),
            trailer_bytes: 0,
            limits: (limits.head_bytes, limits.header_count),
            request,
        }
    }

    /// The last chunk and the trailers have been read.
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    pub fn trailers(&self) -> &[Field] {
        &self.trailers
    }

    /// Reads up to the end of the next piece of content, of the body, or of the input.
    pub fn decode(&mut self, input: &[u8]) -> Result<Step, BadRequest> {
        let mut at = 0;
        while at < input.len() && self.state != State::Done {
            if let State::Data(left) = self.state {
                let rest = input.len() - at;
                let part = usize::try_from(left).map_or(rest, |left| left.min(rest));
                self.state = match left - part as u64 {
                    0 => State::DataCr,
                    left => State::Data(left),
                };
                return Ok(Step {
                    consumed: at + part,
                    data: at..at + part,
                });
            }
            self.byte(input[at])?;
            at += 1;
        }
        Ok(Step {
            consumed: at,
            data: at..at,
        })
    }

    fn byte(&mut self, byte: u8) -> Result<(), BadRequest> {
        self.state = match (self.state, byte) {
            (State::Size, b'\r' | b';') if self.digits == 0 => {
                return Err(bad("a chunk has no size"));
            }
            (State::Size | State::Extension(Extension::Closed), b'\r')
            | (
                State::Extension(
                    Extension::Name { begun: true } | Extension::Value { begun: true },
                ),
                b'\r',
            ) => State::SizeLf,
            (State::Size, b';') => self.extended(Extension::Name { begun: false })?,
            (State::Size, _) => self.digit(byte)?,
            (State::Extension(extension), _) => self.extended(extension.next(byte)?)?,
            (State::SizeLf, b'\n') => match std::mem::take(&mut self.size) {
                0 => State::Trailer,
                size => State::Data(size),
            },
            (State::DataCr, b'\r') => State::DataLf,
            (State::DataLf, b'\n') => {
                self.digits = 0;
                State::Size
            }
            (State::Trailer, _) => self.trailer(byte)?,
            (State::DataCr | State::DataLf, _) => {
                return Err(bad("a chunk does not end where its size says"));
            }
            (State::SizeLf | State::Data(_) | State::Done, _) => {
                return Err(bad("a chunk's line does not end with CR LF"));
            }
        };
        Ok(())
    }

    fn digit(&mut self, byte: u8) -> Result<State, BadRequest> {
        const WRONG: BadRequest = bad("a chunk's size is not a hexadecimal number");
        let digit = char::from(byte).to_digit(16).ok_or(WRONG)?;
        self.digits += 1;
        self.size = self.size << 4 | u64::from(digit);
        // Sixteen digits fit; beyond 2^63-1 some applications overflow.
        if self.digits > 16 || i64::try_from(self.size).is_err() {
            return Err(WRONG);
        }
        Ok(State::Size)
    }

    fn extended(&mut self, extension: Extension) -> Result<State, BadRequest> {
        self.extensions += 1;
        if self.extensions > EXTENSIONS {
            return Err(bad("there are too many chunk extensions"));
        }
        Ok(State::Extension(extension))
    }

    fn trailer(&mut self, byte: u8) -> Result<State, BadRequest> {
        self.trailer_bytes += 1;
        if self.trailer_bytes > self.limits.0 {
            return Err(TRAILERS);
        }
        self.line.extend_from_slice(&[byte]);
        if byte != b'\n' {
            return Ok(State::Trailer);
        }
        let mut line = self.line.split();
        if !line.ends_with(b"\r\n") {
            return Err(bad("a trailer ends with a bare LF"));
        }
        line.truncate(line.len() - 2);
        if line.is_empty() {
            return Ok(State::Done);
        }
        let field = field(&line.freeze())?;
        if self.request && rules::forbidden_in_trailer(&field.name) {
            return Err(bad("a trailer carries what only a header may"));
        }
        if self.trailers.len() == self.limits.1 {
            return Err(TRAILERS);
        }
        self.trailers.push(field);
        Ok(State::Trailer)
    }
}

const TRAILERS: BadRequest = BadRequest::new(
    http::StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
    "the trailers are too large",
);

impl Extension {
    fn next(self, byte: u8) -> Result<Self, BadRequest> {
        let token = is_token_byte(byte);
        Ok(match (self, byte) {
            (Self::Name { .. }, _) if token => Self::Name { begun: true },
            (Self::Name { begun: true }, b'=') => Self::Value { begun: false },
            (Self::Value { .. }, _) if token => Self::Value { begun: true },
            (Self::Value { begun: false }, b'"') => Self::Quoted,
            (Self::Name { begun: true } | Self::Value { begun: true } | Self::Closed, b';') => {
                Self::Name { begun: false }
            }
            (Self::Quoted, b'"') => Self::Closed,
            (Self::Quoted, b'\\') => Self::Escaped,
            (Self::Quoted | Self::Escaped, b' '..=b'~') => Self::Quoted,
            _ => return Err(bad("a chunk extension is malformed")),
        })
    }
}
