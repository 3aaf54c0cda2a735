//! Bounds how long a client may take over a head. The HTTP/2 library waits for the
//! rest of one without end; so frames are followed as they are read (RFC 9113 4.1),
//! and a header block that is begun has a time to be complete. A client that was told the
//! end is read on for a moment, so that it hears that.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep},
};

use super::super::{Io, LINGER, LINGER_BYTES};

const PREFACE: usize = 24;
const FRAME_HEAD: usize = 9;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;

pub(super) struct Watch {
    io: Io,
    frames: Frames,
    limit: Duration,
    timer: Pin<Box<Sleep>>,
    /// The timer runs.
    timed: bool,
    /// It has been told the end, and is read so far still.
    lingers: Option<usize>,
}

impl Watch {
    pub fn new(io: Io, limit: Duration) -> Self {
        Self {
            io,
            frames: Frames::default(),
            limit,
            timer: Box::pin(sleep(limit)),
            timed: true,
            lingers: None,
        }
    }
}

/// Where in the stream of frames the client is.
#[derive(Debug)]
struct Frames {
    /// Bytes to be passed over: the preface, or a frame's payload.
    skip: usize,
    head: [u8; FRAME_HEAD],
    read: usize,
    /// A header block has begun and not ended.
    block: bool,
    /// It ends with the payload that is passed over.
    last: bool,
}

impl Default for Frames {
    fn default() -> Self {
        Self {
            skip: PREFACE,
            head: [0; FRAME_HEAD],
            read: 0,
            block: true,
            last: true,
        }
    }
}

impl Frames {
    fn follow(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let part = self.skip.min(bytes.len());
            self.skip -= part;
            bytes = &bytes[part..];
            if self.skip > 0 {
                return;
            }
            self.passed();
            let part = (FRAME_HEAD - self.read).min(bytes.len());
            self.head[self.read..self.read + part].copy_from_slice(&bytes[..part]);
            self.read += part;
            bytes = &bytes[part..];
            if self.read == FRAME_HEAD {
                self.read = 0;
                self.begun();
            }
        }
    }

    /// A frame's head has been read.
    fn begun(&mut self) {
        let [a, b, c, kind, flags, ..] = self.head;
        self.skip = u32::from_be_bytes([0, a, b, c]) as usize;
        if matches!(kind, HEADERS | CONTINUATION) {
            self.block = true;
            self.last = flags & END_HEADERS != 0;
        }
        if self.skip == 0 {
            self.passed();
        }
    }

    /// What was to be passed over has been.
    fn passed(&mut self) {
        if std::mem::take(&mut self.last) {
            self.block = false;
        }
    }

    /// The client owes the rest of something.
    fn is_open(&self) -> bool {
        self.block || self.read > 0
    }
}

impl Watch {
    /// Ready when the client has stopped sending, or has had its time.
    fn poll_left(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        const CHUNK: usize = 4096;
        let mut left = match self.lingers {
            Some(left) => left,
            None => {
                self.timer.as_mut().reset(Instant::now() + LINGER);
                LINGER_BYTES
            }
        };
        while left > 0 {
            let mut bytes = [0; CHUNK];
            let mut into = ReadBuf::new(&mut bytes);
            match Pin::new(&mut self.io).poll_read(cx, &mut into) {
                Poll::Ready(Ok(())) if !into.filled().is_empty() => {
                    left = left.saturating_sub(into.filled().len());
                }
                Poll::Ready(_ended) => return Poll::Ready(()),
                Poll::Pending => {
                    self.lingers = Some(left);
                    return self.timer.as_mut().poll(cx);
                }
            }
        }
        Poll::Ready(())
    }
}

impl AsyncRead for Watch {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = into.filled().len();
        let polled = Pin::new(&mut this.io).poll_read(cx, into);
        this.frames.follow(&into.filled()[before..]);
        if !this.frames.is_open() {
            this.timed = false;
        } else if !std::mem::replace(&mut this.timed, true) {
            this.timer.as_mut().reset(Instant::now() + this.limit);
        }
        if polled.is_pending() && this.timed && this.timer.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        polled
    }
}

impl AsyncWrite for Watch {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.io).poll_shutdown(cx))?;
        self.poll_left(cx).map(Ok)
    }
}
