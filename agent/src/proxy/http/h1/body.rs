//! The body of a request on its way to the application.

use bytes::{Buf, BytesMut};

use super::super::{
    BadRequest, HttpError, Io, Limits,
    chunked::Decoder,
    head::{Body, skip, write_field},
    io::{BODY_CHUNK, Reader, Writer},
};
use crate::request::Edits;

/// What is still to come of a request's body.
pub(super) enum Incoming {
    Length(u64),
    Chunked(Box<Decoder>),
}

impl Incoming {
    pub fn new(body: Body, limits: &Limits) -> Self {
        match body {
            Body::None => Self::Length(0),
            Body::Length(length) => Self::Length(length),
            Body::Chunked => Self::Chunked(Box::new(Decoder::request(limits))),
        }
    }

    /// All of it has been read.
    pub fn is_done(&self) -> bool {
        match self {
            Self::Length(left) => *left == 0,
            Self::Chunked(decoder) => decoder.is_done(),
        }
    }

    /// Bytes to come, as far as they are known.
    pub fn left(&self) -> u64 {
        match self {
            Self::Length(left) => *left,
            Self::Chunked(_) => 0,
        }
    }

    /// Takes of the body what the buffer has, framed anew. The end of a chunked one is
    /// left to [`Self::end`].
    pub fn take(&mut self, buffer: &mut BytesMut, out: &mut BytesMut) -> Result<(), BadRequest> {
        match self {
            Self::Length(left) => {
                let part = available(*left, buffer);
                out.extend_from_slice(&buffer[..part]);
                buffer.advance(part);
                *left -= part as u64;
            }
            Self::Chunked(decoder) => {
                while !buffer.is_empty() && !decoder.is_done() {
                    let step = decoder.decode(buffer)?;
                    let data = &buffer[step.data.clone()];
                    if !data.is_empty() {
                        out.extend_from_slice(format!("{:x}\r\n", data.len()).as_bytes());
                        out.extend_from_slice(data);
                        out.extend_from_slice(b"\r\n");
                    }
                    buffer.advance(step.consumed);
                }
            }
        }
        Ok(())
    }

    /// Last chunk and trailers. A trailer must not smuggle in what policy takes out of
    /// the headers.
    fn end(&self, edits: &Edits, out: &mut BytesMut) {
        if let Self::Chunked(decoder) = self {
            out.extend_from_slice(b"0\r\n");
            for field in decoder.trailers() {
                if edits.keeps(&field.name) {
                    write_field(out, &field.wire, field.value.as_bytes());
                }
            }
            out.extend_from_slice(b"\r\n");
        }
    }

    /// Writes `out`, then the body as it comes.
    pub async fn upload(
        mut self,
        edits: &Edits,
        out: &BytesMut,
        from: &mut Reader<'_>,
        to: &mut Writer<'_>,
    ) -> Result<(), HttpError> {
        let chunked = matches!(self, Self::Chunked(_));
        let mut own = BytesMut::new();
        if chunked && self.is_done() {
            own.extend_from_slice(out);
            self.end(edits, &mut own);
            return to.write(&own).await.map_err(HttpError::Application);
        }
        to.write(out).await.map_err(HttpError::Application)?;
        while !self.is_done() {
            if from.buffer.is_empty() {
                let read = tokio::select! {
                    biased;
                    read = from.fill(BODY_CHUNK) => read.map_err(HttpError::Client)?,
                    error = to.broken() => return Err(HttpError::Application(error)),
                };
                if read == 0 {
                    let cut = std::io::ErrorKind::UnexpectedEof;
                    return Err(HttpError::Client(cut.into()));
                }
            }
            if let Self::Length(left) = &mut self {
                let part = available(*left, from.buffer);
                to.write(&from.buffer[..part])
                    .await
                    .map_err(HttpError::Application)?;
                from.buffer.advance(part);
                *left -= part as u64;
                continue;
            }
            own.clear();
            self.take(from.buffer, &mut own)?;
            if self.is_done() {
                self.end(edits, &mut own);
            }
            to.write(&own).await.map_err(HttpError::Application)?;
        }
        Ok(())
    }

    /// Reads the rest away, if it is no longer than `most`; says whether it was.
    pub async fn drain(&mut self, client: &mut Io, most: u64) -> Result<bool, HttpError> {
        let mut read = 0;
        loop {
            match self {
                Self::Length(left) => *left -= skip(&mut client.buffer, *left),
                Self::Chunked(decoder) => {
                    while !client.buffer.is_empty() && !decoder.is_done() {
                        let step = decoder.decode(&client.buffer)?;
                        client.buffer.advance(step.consumed);
                    }
                }
            }
            if self.is_done() || read > most {
                return Ok(self.is_done());
            }
            match client.fill(BODY_CHUNK).await.map_err(HttpError::Client)? {
                0 => return Ok(false),
                more => read += more as u64,
            }
        }
    }
}

fn available(left: u64, buffer: &BytesMut) -> usize {
    usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()))
}
