//! Moves bytes between two ends, each a TCP connection or a stream of a tunnel.
//! Half-close, reset and backpressure pass through: an end of one side becomes an
//! end of the other, a break of one side a break of the other, and nothing is read
//! that cannot be written.

use std::{
    cell::RefCell,
    collections::VecDeque,
    fmt,
    future::poll_fn,
    io,
    pin::Pin,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
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
    let (mut from_source, mut to_source) = source.split();
    let (mut from_destination, mut to_destination) = destination.split();
    let ended = AtomicU32::new(0);
    let broken = |side| move |error| Broken { side, error };
    let out = async {
        match pump(&mut from_source, &mut to_destination, &counters.sent).await {
            Ok(()) => last(&ended, &mut to_destination)
                .await
                .map_err(broken(Side::Destination)),
            Err(Failed::Read(error)) => Err(broken(Side::Source)(error)),
            Err(Failed::Write(error)) => Err(broken(Side::Destination)(error)),
        }
    };
    let back = async {
        match pump(&mut from_destination, &mut to_source, &counters.received).await {
            Ok(()) => last(&ended, &mut to_source)
                .await
                .map_err(broken(Side::Source)),
            Err(Failed::Read(error)) => Err(broken(Side::Destination)(error)),
            Err(Failed::Write(error)) => Err(broken(Side::Source)(error)),
        }
    };
    tokio::select! {
        result = out => result,
        result = back => result,
    }
}

/// Called when a direction has ended. The last one to end ends the connection; the
/// first goes on watching its peer, which may break while the other is held up.
async fn last(ended: &AtomicU32, writer: &mut Writer<'_>) -> io::Result<()> {
    if ended.fetch_add(1, Ordering::Relaxed) == 1 {
        Ok(())
    } else {
        Err(writer.broken().await)
    }
}

impl End {
    fn split(&mut self) -> (Reader<'_>, Writer<'_>) {
        match self {
            Self::Tcp(stream) => {
                let (tcp, writer) = stream.split();
                let reader = TcpReader {
                    tcp,
                    buffer: BytesMut::new(),
                    has_much: false,
                };
                (Reader::Tcp(reader), Writer::Tcp(writer))
            }
            Self::Stream { send, recv } => (Reader::Stream(recv), Writer::Stream(send)),
            Self::Fast(stream) => {
                let (reader, writer) = stream.split();
                (Reader::Fast(reader), Writer::Fast(writer))
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

enum Failed {
    Read(io::Error),
    Write(io::Error),
}

async fn pump(
    reader: &mut Reader<'_>,
    writer: &mut Writer<'_>,
    counter: &AtomicU64,
) -> Result<(), Failed> {
    let mut chunks = VecDeque::new();
    loop {
        // A fast peer must not keep the connection's end from its turn.
        tokio::task::consume_budget().await;
        // A writer that breaks while nothing is read must be noticed, too.
        let chunk = tokio::select! {
            biased;
            chunk = reader.read() => chunk.map_err(Failed::Read)?,
            error = writer.broken() => return Err(Failed::Write(error)),
        };
        let Some(chunk) = chunk else {
            return writer.finish().await.map_err(Failed::Write);
        };
        let mut length = chunk.len();
        chunks.push_back(chunk);
        while chunks.len() < TOGETHER
            && let Some(more) = reader.received()
        {
            length += more.len();
            chunks.push_back(more);
        }
        writer.write(&mut chunks).await.map_err(Failed::Write)?;
        reader.release(length).map_err(Failed::Read)?;
        counter.fetch_add(length as u64, Ordering::Relaxed);
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
    /// The next bytes; `None` at an orderly end. Safe to cancel.
    async fn read(&mut self) -> io::Result<Option<Bytes>> {
        match self {
            Self::Tcp(tcp) => poll_fn(|cx| tcp.poll_read(cx)).await,
            Self::Stream(recv) => match recv.data().await {
                None => Ok(None),
                Some(chunk) => chunk.map(Some).map_err(from_h2),
            },
            Self::Fast(reader) => poll_fn(|cx| reader.poll_read(cx)).await,
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
    Tcp(WriteHalf<'a>),
    Stream(&'a mut SendStream<Bytes>),
    Fast(FastWriter<'a>),
}

impl Writer<'_> {
    /// Writes all of them.
    async fn write(&mut self, chunks: &mut VecDeque<Bytes>) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => {
                while !chunks.is_empty() {
                    let mut slices = [io::IoSlice::new(&[]); TOGETHER];
                    for (slice, chunk) in slices.iter_mut().zip(chunks.iter()) {
                        *slice = io::IoSlice::new(chunk);
                    }
                    match stream.try_write_vectored(&slices) {
                        Ok(written) => advance(chunks, written),
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            stream.writable().await?;
                        }
                        Err(error) => return Err(error),
                    }
                }
            }
            Self::Stream(send) => {
                for mut chunk in chunks.drain(..) {
                    while !chunk.is_empty() {
                        send.reserve_capacity(chunk.len());
                        let room = match send.capacity() {
                            0 => poll_fn(|cx| send.poll_capacity(cx))
                                .await
                                .ok_or(io::ErrorKind::BrokenPipe)?
                                .map_err(from_h2)?,
                            room => room,
                        };
                        let part = chunk.split_to(room.min(chunk.len()));
                        send.send_data(part, false).map_err(from_h2)?;
                    }
                }
            }
            Self::Fast(writer) => {
                for mut chunk in chunks.drain(..) {
                    poll_fn(|cx| writer.poll_write(cx, &mut chunk)).await?;
                }
            }
        }
        Ok(())
    }

    /// Passes on the end of this direction; the other goes on.
    async fn finish(&mut self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => {
                match socket2::SockRef::from(stream.as_ref()).shutdown(std::net::Shutdown::Write) {
                    // The peer has ended its side, too, and is gone already.
                    Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
                    result => result,
                }
            }
            Self::Stream(send) => send.send_data(Bytes::new(), true).map_err(from_h2),
            Self::Fast(writer) => {
                writer.end();
                poll_fn(|cx| writer.poll_flush(cx)).await
            }
        }
    }

    /// Returns when the peer has broken the connection, or no longer takes bytes.
    async fn broken(&mut self) -> io::Error {
        match self {
            Self::Tcp(stream) => broken(stream.as_ref()).await,
            Self::Fast(writer) => writer.broken().await,
            Self::Stream(send) => match poll_fn(|cx| send.poll_reset(cx)).await {
                Ok(reason) => from_h2(reason.into()),
                Err(error) => from_h2(error),
            },
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
