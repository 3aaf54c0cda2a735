//! Moves bytes between two ends, each a TCP connection or a stream of a tunnel.
//! Half-close, reset and backpressure pass through: an end of one side becomes an
//! end of the other, a break of one side a break of the other, and nothing is read
//! that cannot be written.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    fmt,
    future::poll_fn,
    io,
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use tokio::{
    io::{AsyncRead as _, Interest, ReadBuf},
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    task::coop::poll_proceed,
};
use tokio_util::io::poll_read_buf;

use super::fast::{AT_ONCE, FastReader, FastStream, FastWriter};
use crate::audit::Bytes as Count;

/// Read from a TCP connection at once, bytes.
const CHUNK: usize = AT_ONCE;
/// And of one that has less than that at a time.
const FEW: usize = 16 << 10;
/// Records that are written on at once.
const TOGETHER: usize = 16;

pub enum End {
    Tcp(TcpStream),
    Stream {
        send: SendStream<Bytes>,
        recv: RecvStream,
    },
    Fast(FastStream),
}

/// Payload bytes that have been written on.
#[derive(Debug, Default)]
pub struct Counters {
    sent: AtomicU64,
    received: AtomicU64,
}

impl Counters {
    pub fn get(&self) -> Count {
        Count {
            sent: self.sent.load(Ordering::Relaxed),
            received: self.received.load(Ordering::Relaxed),
        }
    }

    pub(super) fn add_sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn add_received(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// Which end broke, and how.
#[derive(Debug)]
pub struct Broken {
    pub side: Side,
    pub error: io::Error,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Source,
    Destination,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = match self.side {
            Side::Source => "source",
            Side::Destination => "destination",
        };
        write!(f, "broken by the {side}: {}", self.error)
    }
}

/// Runs until both directions have ended, or one end breaks.
pub async fn splice(
    source: &mut End,
    destination: &mut End,
    counters: &Counters,
) -> Result<(), Broken> {
    let (from_source, mut to_source) = source.split();
    let (from_destination, mut to_destination) = destination.split();
    let (to_source, source) = to_source.parts();
    let (to_destination, destination) = to_destination.parts();
    let mut out = Pump::new(from_source, source, to_destination, &counters.sent);
    let mut back = Pump::new(from_destination, destination, to_source, &counters.received);
    let mut out_first = false;
    poll_fn(|cx| {
        // In turns: the first may use up all that the task may do at a time.
        out_first = !out_first;
        let (sent, received);
        if out_first {
            sent = out.poll(cx);
            received = back.poll(cx);
        } else {
            received = back.poll(cx);
            sent = out.poll(cx);
        }
        // Not before both: what fails one way may have been answered the other way.
        let (sent, received) = (sent.map_err(Failed::out)?, received.map_err(Failed::back)?);
        if sent && received {
            return Poll::Ready(Ok(()));
        }
        if let Poll::Ready(failed) = out.poll_broken(cx) {
            return Poll::Ready(Err(failed.out()));
        }
        if let Poll::Ready(failed) = back.poll_broken(cx) {
            return Poll::Ready(Err(failed.back()));
        }
        Poll::Pending
    })
    .await
}

impl End {
    fn split(&mut self) -> (Reader<'_>, Half<'_>) {
        match self {
            Self::Tcp(stream) => {
                let (tcp, writer) = stream.split();
                let reader = TcpReader {
                    tcp,
                    buffer: BytesMut::new(),
                    has_much: false,
                };
                (Reader::Tcp(reader), Half::Tcp(writer))
            }
            Self::Stream { send, recv } => (Reader::Stream(recv), Half::Stream(send)),
            Self::Fast(stream) => {
                let (reader, writer) = stream.split();
                (Reader::Fast(reader), Half::Fast(writer))
            }
        }
    }

    /// Says how the connection is closed if nobody does it in order: when the agent
    /// dies, its peers must see a break, not an end.
    pub fn break_on_drop(&self, yes: bool) {
        if let Self::Tcp(stream) = self {
            let linger = yes.then_some(std::time::Duration::ZERO);
            let _gone = socket2::SockRef::from(stream).set_linger(linger);
        }
    }

    /// Breaks the connection, so that the peer cannot take it for an orderly end.
    pub fn reset(self) {
        match self {
            Self::Tcp(stream) => super::reset(stream),
            Self::Stream { mut send, .. } => send.send_reset(Reason::CANCEL),
            Self::Fast(stream) => stream.reset(),
        }
    }
}

/// What of an end is written to.
enum Half<'a> {
    Tcp(WriteHalf<'a>),
    Stream(&'a mut SendStream<Bytes>),
    Fast(FastWriter<'a>),
}

impl Half<'_> {
    /// What writes to it, and the connection that it is, if it is one.
    fn parts(&mut self) -> (Writer<'_>, Option<&TcpStream>) {
        match self {
            Self::Tcp(half) => {
                let stream = (*half).as_ref();
                (Writer::Tcp(stream), Some(stream))
            }
            Self::Stream(send) => (Writer::Stream(send), None),
            Self::Fast(writer) => (Writer::Fast(*writer), None),
        }
    }
}

enum Failed {
    Read(io::Error),
    Write(io::Error),
}

impl Failed {
    /// Of the way to the destination.
    fn out(self) -> Broken {
        self.between(Side::Source, Side::Destination)
    }

    /// Of the way back.
    fn back(self) -> Broken {
        self.between(Side::Destination, Side::Source)
    }

    fn between(self, from: Side, to: Side) -> Broken {
        let (side, error) = match self {
            Self::Read(error) => (from, error),
            Self::Write(error) => (to, error),
        };
        Broken { side, error }
    }
}

/// One direction.
struct Pump<'a> {
    reader: Reader<'a>,
    /// What is read from, if it is a connection.
    from: Option<&'a TcpStream>,
    /// Ready when that breaks; while it is not read, which would tell.
    breaks: Option<Pin<Box<dyn Future<Output = io::Error> + Send + 'a>>>,
    writer: Writer<'a>,
    counter: &'a AtomicU64,
    /// Read, and not written yet.
    chunks: VecDeque<Bytes>,
    /// Bytes that were read with these.
    length: usize,
    stage: Stage,
}

#[derive(PartialEq, Eq)]
enum Stage {
    Moves,
    /// There is nothing more to read.
    Ends,
    Ended,
}

impl<'a> Pump<'a> {
    fn new(
        reader: Reader<'a>,
        from: Option<&'a TcpStream>,
        writer: Writer<'a>,
        counter: &'a AtomicU64,
    ) -> Self {
        Self {
            reader,
            from,
            breaks: None,
            writer,
            counter,
            chunks: VecDeque::new(),
            length: 0,
            stage: Stage::Moves,
        }
    }

    /// Moves what can be moved. Says whether its end was passed on.
    fn poll(&mut self, cx: &mut Context<'_>) -> Result<bool, Failed> {
        while self.stage != Stage::Ended {
            match self.step(cx) {
                Poll::Ready(result) => result?,
                Poll::Pending => return Ok(false),
            }
        }
        Ok(true)
    }

    fn step(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Failed>> {
        if self.stage == Stage::Ends {
            ready!(self.writer.poll_finish(cx)).map_err(Failed::Write)?;
            self.stage = Stage::Ended;
            return Poll::Ready(Ok(()));
        }
        // A fast peer must not keep the connection's end from its turn.
        let turn = ready!(poll_proceed(cx));
        if self.chunks.is_empty() {
            let Some(chunk) = ready!(self.reader.poll_read(cx)).map_err(Failed::Read)? else {
                self.writer.end().map_err(Failed::Write)?;
                self.stage = Stage::Ends;
                return Poll::Ready(Ok(()));
            };
            self.take(chunk);
            while self.chunks.len() < TOGETHER
                && let Some(more) = self.reader.received()
            {
                self.take(more);
            }
        }
        ready!(self.writer.poll_write(cx, &mut self.chunks)).map_err(Failed::Write)?;
        turn.made_progress();
        SPARE.set(std::mem::take(&mut self.chunks));
        let length = std::mem::take(&mut self.length);
        self.reader.release(length).map_err(Failed::Read)?;
        self.counter.fetch_add(length as u64, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }

    fn take(&mut self, chunk: Bytes) {
        if self.chunks.capacity() == 0 {
            self.chunks = SPARE.take();
        }
        self.length += chunk.len();
        self.chunks.push_back(chunk);
    }

    /// Ready when one of its ends is broken. Who has ended its side may break, too, while
    /// the other is held up.
    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<Failed> {
        if let Poll::Ready(error) = self.writer.poll_broken(cx) {
            return Poll::Ready(Failed::Write(error));
        }
        let reads = self.stage == Stage::Moves && self.chunks.is_empty();
        match self.from.filter(|_| !reads) {
            Some(from) => {
                let breaks = (self.breaks).get_or_insert_with(|| Box::pin(broken(from)));
                breaks.as_mut().poll(cx).map(Failed::Read)
            }
            None => {
                self.breaks = None;
                Poll::Pending
            }
        }
    }
}

enum Reader<'a> {
    Tcp(TcpReader<'a>),
    Stream(&'a mut RecvStream),
    Fast(FastReader<'a>),
}

struct TcpReader<'a> {
    tcp: ReadHalf<'a>,
    /// Of one that has much at a time.
    buffer: BytesMut,
    has_much: bool,
}

thread_local! {
    /// What few bytes are read into: connections have no buffer of their own for them.
    static ROOM: RefCell<[u8; FEW]> = const { RefCell::new([0; FEW]) };
    /// What chunks are gathered in between reading and writing: nor for these.
    static SPARE: Cell<VecDeque<Bytes>> = const { Cell::new(VecDeque::new()) };
}

impl TcpReader<'_> {
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        let bytes = match self.has_much {
            true => ready!(self.poll_much(cx))?,
            false => ready!(self.poll_few(cx))?,
        };
        Poll::Ready(Ok((!bytes.is_empty()).then_some(bytes)))
    }

    fn poll_few(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
        ROOM.with_borrow_mut(|room| {
            let mut room = ReadBuf::new(room);
            ready!(Pin::new(&mut self.tcp).poll_read(cx, &mut room))?;
            self.has_much = room.remaining() == 0;
            Poll::Ready(Ok(Bytes::copy_from_slice(room.filled())))
        })
    }

    fn poll_much(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
        if self.tcp.as_ref().poll_read_ready(cx)?.is_pending() {
            self.buffer = BytesMut::new();
            return Poll::Pending;
        }
        self.buffer.reserve(CHUNK);
        let read = ready!(poll_read_buf(Pin::new(&mut self.tcp), cx, &mut self.buffer))?;
        if read < FEW / 4 {
            // They must not keep a whole chunk while they are queued.
            self.has_much = false;
            let few = Bytes::copy_from_slice(&self.buffer);
            self.buffer = BytesMut::new();
            return Poll::Ready(Ok(few));
        }
        Poll::Ready(Ok(self.buffer.split().freeze()))
    }
}

impl Reader<'_> {
    /// The next bytes; `None` at an orderly end.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        match self {
            Self::Tcp(tcp) => tcp.poll_read(cx),
            Self::Stream(recv) => match ready!(recv.poll_data(cx)) {
                None => Poll::Ready(Ok(None)),
                Some(chunk) => Poll::Ready(chunk.map(Some).map_err(from_h2)),
            },
            Self::Fast(reader) => reader.poll_read(cx),
        }
    }

    /// More bytes, if they have come already.
    fn received(&mut self) -> Option<Bytes> {
        match self {
            Self::Tcp(..) | Self::Stream(_) => None,
            Self::Fast(reader) => reader.received(),
        }
    }

    /// Gives the peer room for as much again: the window is the backpressure.
    fn release(&mut self, length: usize) -> io::Result<()> {
        match self {
            Self::Tcp(..) | Self::Fast(_) => Ok(()),
            Self::Stream(recv) => recv
                .flow_control()
                .release_capacity(length)
                .map_err(from_h2),
        }
    }
}

enum Writer<'a> {
    Tcp(&'a TcpStream),
    Stream(&'a mut SendStream<Bytes>),
    Fast(FastWriter<'a>),
}

impl Writer<'_> {
    /// Writes all of them.
    fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        chunks: &mut VecDeque<Bytes>,
    ) -> Poll<io::Result<()>> {
        while let Some(chunk) = chunks.front_mut() {
            if chunk.is_empty() {
                chunks.pop_front();
                continue;
            }
            match self {
                Self::Tcp(stream) => {
                    let mut slices = [io::IoSlice::new(&[]); TOGETHER];
                    for (slice, chunk) in slices.iter_mut().zip(chunks.iter()) {
                        *slice = io::IoSlice::new(chunk);
                    }
                    match stream.try_write_vectored(&slices) {
                        Ok(written) => advance(chunks, written),
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            ready!(stream.poll_write_ready(cx))?;
                        }
                        Err(error) => return Poll::Ready(Err(error)),
                    }
                }
                Self::Stream(send) => {
                    send.reserve_capacity(chunk.len());
                    let room = match send.capacity() {
                        0 => ready!(send.poll_capacity(cx))
                            .ok_or(io::ErrorKind::BrokenPipe)?
                            .map_err(from_h2)?,
                        room => room,
                    };
                    let part = chunk.split_to(room.min(chunk.len()));
                    send.send_data(part, false).map_err(from_h2)?;
                }
                Self::Fast(writer) => ready!(writer.poll_write(cx, chunk))?,
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Passes on the end of this direction; the other goes on.
    fn end(&mut self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => {
                match socket2::SockRef::from(*stream).shutdown(std::net::Shutdown::Write) {
                    // The peer has ended its side, too, and is gone already.
                    Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
                    result => result,
                }
            }
            Self::Stream(send) => send.send_data(Bytes::new(), true).map_err(from_h2),
            Self::Fast(writer) => {
                writer.end();
                Ok(())
            }
        }
    }

    /// Ready when that is sent.
    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(_) | Self::Stream(_) => Poll::Ready(Ok(())),
            Self::Fast(writer) => writer.poll_flush(cx),
        }
    }

    /// Ready when the peer has broken the stream, or no longer takes bytes. A connection
    /// is watched by who reads from it.
    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        match self {
            Self::Tcp(_) => Poll::Pending,
            Self::Stream(send) => Poll::Ready(match ready!(send.poll_reset(cx)) {
                Ok(reason) => from_h2(reason.into()),
                Err(error) => from_h2(error),
            }),
            Self::Fast(writer) => writer.poll_broken(cx),
        }
    }
}

/// Takes away what was written.
fn advance(chunks: &mut VecDeque<Bytes>, mut written: usize) {
    while let Some(first) = chunks.front_mut() {
        let part = first.len().min(written);
        first.advance(part);
        written -= part;
        if !first.is_empty() {
            return;
        }
        chunks.pop_front();
    }
}

/// Returns when a connection is broken.
pub(super) async fn broken(stream: &TcpStream) -> io::Error {
    match stream.ready(Interest::ERROR).await {
        Err(error) => error,
        Ok(_) => stream
            .take_error()
            .ok()
            .flatten()
            .unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()),
    }
}

pub(super) fn from_h2(error: h2::Error) -> io::Error {
    if error.is_reset() {
        return io::Error::new(io::ErrorKind::ConnectionReset, error);
    }
    match error.is_io() {
        true => error.into_io().expect("it is one"),
        false => io::Error::other(error),
    }
}

#[cfg(test)]
mod tests;
