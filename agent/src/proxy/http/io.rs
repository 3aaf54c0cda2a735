//! A connection as HTTP reads and writes it: an end of the splicer with what has been
//! read ahead of its use. As a whole it is a byte stream for the HTTP/2 library; in
//! two halves it serves HTTP/1, which reads and writes at once.

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes, BytesMut};
use h2::{RecvStream, SendStream};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use super::super::{
    fast::{FastReader, FastWriter},
    splice::{Counters, End, broken, from_h2},
};

/// Read at once while a head is awaited, bytes.
pub(super) const HEAD_CHUNK: usize = 8 << 10;
/// And while a body flows.
pub(super) const BODY_CHUNK: usize = 64 << 10;

pub struct Io {
    pub(super) end: End,
    /// Read and not yet used.
    pub(super) buffer: BytesMut,
    counters: Option<Arc<Counters>>,
    /// The end of our direction has been sent.
    finished: bool,
    /// It leads to where requests go.
    upstream: bool,
}

impl Io {
    /// `prefix` has been read of the connection already.
    pub fn new(end: End, prefix: BytesMut) -> Self {
        Self {
            end,
            buffer: prefix,
            counters: None,
            finished: false,
            upstream: false,
        }
    }

    /// A connection to where requests go: an application, or a tunnel to one.
    pub fn upstream(end: End) -> Self {
        let mut io = Self::new(end, BytesMut::new());
        io.upstream = true;
        io.break_on_drop(true);
        io
    }

    /// Counts what is read as sent by the client, what is written as received by it.
    pub fn counted(mut self, counters: Arc<Counters>) -> Self {
        counters.add_sent(self.buffer.len());
        self.counters = Some(counters);
        self
    }

    /// What was read and not used.
    pub fn buffered(&self) -> &[u8] {
        &self.buffer
    }

    /// The connection, and what was read of it and not used.
    pub fn into_end(self) -> (End, BytesMut) {
        (self.end, self.buffer)
    }

    /// Breaks the connection, so that the peer cannot take it for an orderly end.
    pub fn reset(self) {
        self.end.reset();
    }

    /// How the connection ends when it is dropped without an order: broken, while
    /// messages may be under way.
    pub(super) fn break_on_drop(&self, yes: bool) {
        self.end.break_on_drop(yes);
    }

    pub(super) fn counters(&self) -> Option<Arc<Counters>> {
        self.counters.clone()
    }

    pub(super) fn split(&mut self) -> (Reader<'_>, Writer<'_>) {
        let counters = self.counters.as_deref();
        let (source, sink) = match &mut self.end {
            End::Tcp(stream) => {
                let stream = &*stream;
                (Source::Tcp(stream), Sink::Tcp(stream))
            }
            End::Stream { send, recv } => (Source::Stream(recv), Sink::Stream(send)),
            End::Fast(stream) => {
                let (reader, writer) = stream.split();
                (Source::Fast(reader), Sink::Fast(writer))
            }
        };
        let reader = Reader {
            source,
            buffer: &mut self.buffer,
            counters,
        };
        let writer = Writer {
            sink,
            counters,
            finished: &mut self.finished,
        };
        (reader, writer)
    }

    /// Reads more into the buffer; 0 at an orderly end. Safe to cancel.
    pub(in crate::proxy) async fn fill(&mut self, chunk: usize) -> io::Result<usize> {
        self.split().0.fill(chunk).await
    }

    pub(in crate::proxy) async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.split().1.write(bytes).await
    }

    /// Ends our direction; the other goes on.
    pub(super) async fn finish(&mut self) -> io::Result<()> {
        let (_, mut writer) = self.split();
        writer.finish()?;
        poll_fn(|cx| writer.poll_flush(cx)).await
    }

    /// After the end of our direction: waits for the other's, where dropping the
    /// connection before would break it. What comes until then, nobody asked for.
    pub(super) async fn ended(&mut self) {
        let _gone = poll_fn(|cx| self.poll_ended(cx)).await;
    }

    fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.end {
            End::Tcp(_) => {}
            End::Stream { recv, .. } => {
                while let Some(data) = ready!(recv.poll_data(cx)) {
                    let data = data.map_err(from_h2)?;
                    recv.flow_control()
                        .release_capacity(data.len())
                        .map_err(from_h2)?;
                }
            }
            End::Fast(stream) => {
                let (mut reader, _) = stream.split();
                while ready!(reader.poll_read(cx))?.is_some() {}
            }
        }
        Poll::Ready(Ok(()))
    }
}

enum Source<'a> {
    Tcp(&'a TcpStream),
    Stream(&'a mut RecvStream),
    Fast(FastReader<'a>),
}

pub(super) struct Reader<'a> {
    source: Source<'a>,
    pub(super) buffer: &'a mut BytesMut,
    counters: Option<&'a Counters>,
}

impl Reader<'_> {
    /// See [`Io::fill`].
    pub(super) async fn fill(&mut self, chunk: usize) -> io::Result<usize> {
        // Fast peers must not keep others, and their own end, from their turn.
        tokio::task::consume_budget().await;
        let read = match &mut self.source {
            Source::Tcp(stream) => loop {
                stream.readable().await?;
                self.buffer.reserve(chunk);
                match stream.try_read_buf(self.buffer) {
                    Ok(read) => break read,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        // An idle connection keeps no memory.
                        if self.buffer.is_empty() {
                            *self.buffer = BytesMut::new();
                        }
                    }
                    Err(error) => return Err(error),
                }
            },
            Source::Stream(recv) => loop {
                let Some(data) = recv.data().await else {
                    break 0;
                };
                let data = data.map_err(from_h2)?;
                self.buffer.extend_from_slice(&data);
                recv.flow_control()
                    .release_capacity(data.len())
                    .map_err(from_h2)?;
                if !data.is_empty() {
                    break data.len();
                }
            },
            Source::Fast(reader) => match poll_fn(|cx| reader.poll_read(cx)).await? {
                None => 0,
                Some(data) => {
                    self.buffer.extend_from_slice(&data);
                    data.len()
                }
            },
        };
        if let Some(counters) = self.counters {
            counters.add_sent(read);
        }
        Ok(read)
    }
}

enum Sink<'a> {
    Tcp(&'a TcpStream),
    Stream(&'a mut SendStream<Bytes>),
    Fast(FastWriter<'a>),
}

pub(super) struct Writer<'a> {
    sink: Sink<'a>,
    counters: Option<&'a Counters>,
    finished: &'a mut bool,
}

impl Writer<'_> {
    pub(super) async fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = match &mut self.sink {
                Sink::Tcp(stream) => match stream.try_write(bytes) {
                    Ok(written) => written,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        stream.writable().await?;
                        continue;
                    }
                    Err(error) => return Err(error),
                },
                Sink::Stream(send) => poll_fn(|cx| poll_send(send, cx, bytes)).await?,
                Sink::Fast(writer) => poll_fn(|cx| writer.poll_copy(cx, bytes)).await?,
            };
            if let Some(counters) = self.counters {
                counters.add_received(written);
            }
            bytes = &bytes[written..];
        }
        poll_fn(|cx| self.poll_flush(cx)).await
    }

    /// What is written is on its way.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.sink {
            Sink::Fast(writer) => writer.poll_flush(cx),
            Sink::Tcp(_) | Sink::Stream(_) => Poll::Ready(Ok(())),
        }
    }

    fn finish(&mut self) -> io::Result<()> {
        if std::mem::replace(self.finished, true) {
            return Ok(());
        }
        match &mut self.sink {
            Sink::Tcp(stream) => {
                match socket2::SockRef::from(*stream).shutdown(std::net::Shutdown::Write) {
                    // The peer has ended its side, too, and is gone already.
                    Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
                    result => result,
                }
            }
            Sink::Stream(send) => send.send_data(Bytes::new(), true).map_err(from_h2),
            Sink::Fast(writer) => {
                writer.end();
                Ok(())
            }
        }
    }

    /// Returns when the peer has broken the connection, or no longer takes bytes.
    pub(super) async fn broken(&mut self) -> io::Error {
        match &mut self.sink {
            Sink::Tcp(stream) => broken(stream).await,
            Sink::Fast(writer) => poll_fn(|cx| writer.poll_broken(cx)).await,
            Sink::Stream(send) => match poll_fn(|cx| send.poll_reset(cx)).await {
                Ok(reason) => from_h2(reason.into()),
                Err(error) => from_h2(error),
            },
        }
    }
}

/// Sends what the stream's window has room for; waits for some.
fn poll_send(
    send: &mut SendStream<Bytes>,
    cx: &mut Context<'_>,
    bytes: &[u8],
) -> Poll<io::Result<usize>> {
    send.reserve_capacity(bytes.len());
    let room = match send.capacity() {
        0 => match ready!(send.poll_capacity(cx)) {
            Some(room) => room.map_err(from_h2)?,
            None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        },
        room => room,
    };
    let part = &bytes[..room.min(bytes.len())];
    send.send_data(Bytes::copy_from_slice(part), false)
        .map_err(from_h2)?;
    Poll::Ready(Ok(part.len()))
}

impl AsyncRead for Io {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.buffer.is_empty() {
            match &mut this.end {
                End::Tcp(stream) => {
                    let before = into.filled().len();
                    ready!(Pin::new(stream).poll_read(cx, into))?;
                    if let Some(counters) = &this.counters {
                        counters.add_sent(into.filled().len() - before);
                    }
                    return Poll::Ready(Ok(()));
                }
                End::Stream { recv, .. } => {
                    while this.buffer.is_empty() {
                        let Some(data) = ready!(recv.poll_data(cx)) else {
                            return Poll::Ready(Ok(()));
                        };
                        let data = data.map_err(from_h2)?;
                        this.buffer.extend_from_slice(&data);
                        recv.flow_control()
                            .release_capacity(data.len())
                            .map_err(from_h2)?;
                        if let Some(counters) = &this.counters {
                            counters.add_sent(data.len());
                        }
                    }
                }
                End::Fast(stream) => {
                    let Some(data) = ready!(stream.split().0.poll_read(cx))? else {
                        return Poll::Ready(Ok(()));
                    };
                    this.buffer.extend_from_slice(&data);
                    if let Some(counters) = &this.counters {
                        counters.add_sent(data.len());
                    }
                }
            }
        }
        let part = this.buffer.len().min(into.remaining());
        into.put_slice(&this.buffer[..part]);
        this.buffer.advance(part);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Io {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let written = match &mut this.end {
            End::Tcp(stream) => ready!(Pin::new(stream).poll_write(cx, bytes))?,
            End::Stream { .. } if bytes.is_empty() => 0,
            End::Stream { send, .. } => ready!(poll_send(send, cx, bytes))?,
            End::Fast(_) if bytes.is_empty() => 0,
            End::Fast(stream) => ready!(stream.split().1.poll_copy(cx, bytes))?,
        };
        if let Some(counters) = &this.counters {
            counters.add_received(written);
        }
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let End::Tcp(stream) = &mut self.end {
            let written = ready!(Pin::new(stream).poll_write_vectored(cx, slices))?;
            if let Some(counters) = &self.counters {
                counters.add_received(written);
            }
            return Poll::Ready(Ok(written));
        }
        let first = slices.iter().find(|s| !s.is_empty());
        self.poll_write(cx, first.map_or(&[], |s| &**s))
    }

    fn is_write_vectored(&self) -> bool {
        matches!(self.end, End::Tcp(_))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.split().1.poll_flush(cx)
    }

    /// The orderly end: from here on, dropping it breaks nothing.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.split().1.finish()?;
        ready!(self.split().1.poll_flush(cx))?;
        self.break_on_drop(false);
        match self.upstream {
            true => self.poll_ended(cx),
            false => Poll::Ready(Ok(())),
        }
    }
}
