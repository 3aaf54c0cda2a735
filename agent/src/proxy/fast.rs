//! The transport between two Postern agents, where both want it (`transport.fastPath`):
//! a TLS connection carries one stream at a time, and the next one when that has ended in
//! order. No frames of HTTP/2, no windows but TCP's own, no task but the stream's. ALPN
//! tells who speaks it; with everybody else it is HBONE.
//!
//! A record is a frame: its payload, then one byte that says what it is.
//!
//! ```text
//! source                                destination
//! Open(destination, client) ---------->
//! Data (the first bytes)    ---------->  judged, the application dialled
//!                           <---------- Accepted, or Refused(status): the stream is over
//! Data ... End              <---------> Data ... End
//! Open ...                               the next stream
//!                           <---------- Leave, at any time: no other stream after this one
//! ```
//!
//! Nothing but the first bytes is sent before the answer, and the application gets nothing
//! before the answer is sent: a stream without an answer has not been, and can be opened
//! again on another connection. A connection that ends in the midst of a stream breaks it.

mod pool;

use std::{
    future::poll_fn,
    io,
    net::{IpAddr, SocketAddr},
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use http::StatusCode;
use socket2::{SockRef, TcpKeepalive};
use tokio::{net::TcpStream, sync::oneshot};

use super::tls::{Incoming, MOST_PLAIN, Outgoing, Records};
use crate::config::Transport;

pub use pool::{Fresh, NotOpened, Place, Pool, PoolKey, Proven, Room};

/// Largest payload of a frame, bytes.
pub const MOST: usize = MOST_PLAIN - 1;
/// What is best written at once, bytes.
pub const AT_ONCE: usize = 4 * MOST;
/// Content type of application data, which every frame is.
const DATA_RECORD: u8 = 23;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    Data,
    /// The sender says no more on this stream.
    End,
    Open,
    Accepted,
    Refused,
    Leave,
}

impl Kind {
    fn of(byte: u8) -> Option<Self> {
        [
            Self::Data,
            Self::End,
            Self::Open,
            Self::Accepted,
            Self::Refused,
            Self::Leave,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == byte)
    }
}

/// What a stream is opened with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Open {
    pub destination: SocketAddr,
    /// The client, as the source's agent knows it.
    pub client: SocketAddr,
}

impl Open {
    fn encode(&self) -> BytesMut {
        let mut bytes = BytesMut::with_capacity(40);
        for address in [self.destination, self.client] {
            let ip = match address.ip() {
                IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                IpAddr::V6(ip) => ip,
            };
            bytes.put_slice(&ip.octets());
            bytes.put_u16(address.port());
        }
        bytes
    }

    pub fn decode(mut bytes: &[u8]) -> Option<Self> {
        if bytes.len() != 36 {
            return None;
        }
        let mut address = || {
            let ip = std::net::Ipv6Addr::from(bytes.get_u128()).to_canonical();
            SocketAddr::new(ip, bytes.get_u16())
        };
        Some(Self {
            destination: address(),
            client: address(),
        })
    }
}

/// The next frame; `None`: the connection has ended, between two of them.
fn poll_frame(
    incoming: &mut Incoming<'_>,
    cx: &mut Context<'_>,
) -> Poll<io::Result<Option<(Kind, Bytes)>>> {
    match ready!(incoming.poll_next(cx))? {
        Some(plain) => Poll::Ready(kind_of(plain).map(Some)),
        None => Poll::Ready(Ok(None)),
    }
}

fn kind_of(mut plain: Bytes) -> io::Result<(Kind, Bytes)> {
    let kind = plain.last().copied().and_then(Kind::of);
    let kind = kind.ok_or_else(|| invalid("a frame of no known kind"))?;
    plain.truncate(plain.len() - 1);
    Ok((kind, plain))
}

/// The next frame of a connection without a stream. Safe to cancel.
pub async fn frame(records: &mut Records) -> io::Result<Option<(Kind, Bytes)>> {
    let (mut incoming, _) = records.split();
    match poll_fn(|cx| poll_frame(&mut incoming, cx)).await {
        // It was between two streams: nothing is cut off.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        frame => frame,
    }
}

/// No other stream is to come.
pub async fn leave(records: &mut Records) -> io::Result<()> {
    let (_, mut outgoing) = records.split();
    seal(&mut outgoing, Kind::Leave, &[])?;
    outgoing.flush().await
}

fn seal(outgoing: &mut Outgoing<'_>, kind: Kind, payload: &[u8]) -> io::Result<()> {
    outgoing.seal(payload, &[kind as u8, DATA_RECORD])
}

/// Finds out when a peer has gone without a word; what is under way is the kernel's to
/// repeat.
pub fn keep_alive(records: &Records, transport: &Transport) {
    const PROBES: u32 = 2;
    let keepalive = TcpKeepalive::new()
        .with_time(transport.keepalive_interval.0)
        .with_interval(transport.keepalive_timeout.0 / PROBES)
        .with_retries(PROBES);
    let _best_effort = SockRef::from(records.tcp()).set_tcp_keepalive(&keepalive);
}

fn invalid(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// A stream, and the connection that is its own as long as it lasts. Dropped after both
/// directions have ended, the connection goes back to where it came from. Dropped after
/// ours alone has, it is closed; before that, it is broken.
pub struct FastStream {
    /// There until it is dropped.
    records: Option<Box<Records>>,
    state: State,
    home: Option<Home>,
}

#[derive(Default)]
struct State {
    sent_end: bool,
    received_end: bool,
    /// The peer wants no other stream on this connection.
    leaves: bool,
    /// Received, and not read yet.
    payload: Bytes,
}

pub enum Home {
    /// The source's: free for the next stream to where it leads.
    Pool(Place),
    /// The destination's: it waits for the next stream.
    Serving(oneshot::Sender<Box<Records>>),
}

impl FastStream {
    pub fn new(records: Box<Records>, home: Home) -> Self {
        Self {
            records: Some(records),
            state: State::default(),
            home: Some(home),
        }
    }

    pub fn split(&mut self) -> (FastReader<'_>, FastWriter<'_>) {
        let records = self.records.as_mut().expect("there until it is dropped");
        let (incoming, outgoing) = records.split();
        let State {
            sent_end,
            received_end,
            leaves,
            payload,
        } = &mut self.state;
        let reader = FastReader {
            incoming,
            ended: received_end,
            leaves,
            payload,
        };
        let writer = FastWriter {
            outgoing,
            ended: sent_end,
        };
        (reader, writer)
    }

    pub fn tcp(&self) -> &TcpStream {
        self.records
            .as_ref()
            .expect("there until it is dropped")
            .tcp()
    }

    /// Lets the other side go on.
    pub fn accept(&mut self) -> io::Result<()> {
        let (_, mut writer) = self.split();
        seal(&mut writer.outgoing, Kind::Accepted, &[])?;
        writer.outgoing.try_flush()
    }

    /// Ends the stream with a reason.
    pub fn refuse(mut self, status: StatusCode) {
        let (_, mut writer) = self.split();
        let said = seal(
            &mut writer.outgoing,
            Kind::Refused,
            &status.as_u16().to_be_bytes(),
        )
        .and_then(|()| writer.outgoing.try_flush());
        if said.is_ok() {
            self.is_over();
        }
    }

    /// It has ended, as both sides know.
    fn is_over(&mut self) {
        self.state.sent_end = true;
        self.state.received_end = true;
    }

    /// Breaks the stream, so that the peer cannot take it for an orderly end.
    pub fn reset(mut self) {
        self.state.sent_end = false;
    }
}

impl Drop for FastStream {
    fn drop(&mut self) {
        let Some(records) = self.records.take() else {
            return;
        };
        let State {
            sent_end,
            received_end,
            leaves,
            payload,
        } = &self.state;
        let ordered = *sent_end && !records.is_sending();
        if !ordered {
            let _best_effort = records.tcp().set_zero_linger();
        }
        let whole = ordered && *received_end && payload.is_empty();
        match self.home.take() {
            Some(Home::Pool(place)) if whole && !leaves => place.put(records),
            Some(Home::Serving(back)) if whole => {
                // Nobody waits for it when the agent ends.
                let _ends = back.send(records);
            }
            _ => {}
        }
    }
}

pub struct FastReader<'a> {
    incoming: Incoming<'a>,
    ended: &'a mut bool,
    leaves: &'a mut bool,
    payload: &'a mut Bytes,
}

impl FastReader<'_> {
    /// The next bytes; `None` at an orderly end.
    pub fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        loop {
            if !self.payload.is_empty() {
                return Poll::Ready(Ok(Some(std::mem::take(self.payload))));
            }
            if *self.ended {
                return Poll::Ready(Ok(None));
            }
            match ready!(poll_frame(&mut self.incoming, cx))? {
                Some(frame) => *self.payload = self.take(frame)?,
                None => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
            }
        }
    }

    /// More of them, if they have come already.
    pub fn received(&mut self) -> io::Result<Option<Bytes>> {
        if *self.ended {
            return Ok(None);
        }
        let Some(payload) = self.incoming.received()? else {
            return Ok(None);
        };
        match self.take(kind_of(payload)?)? {
            // What is not bytes is told by the next read.
            bytes if bytes.is_empty() => Ok(None),
            bytes => Ok(Some(bytes)),
        }
    }

    /// The payload of a frame of the stream.
    fn take(&mut self, (kind, payload): (Kind, Bytes)) -> io::Result<Bytes> {
        match kind {
            Kind::Data => {}
            Kind::End => *self.ended = true,
            Kind::Leave => *self.leaves = true,
            _ => return Err(invalid("a frame that is not for now")),
        }
        Ok(payload)
    }

    /// Of a stream that was opened: the answer.
    fn poll_answer(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Result<(), StatusCode>>> {
        loop {
            match ready!(poll_frame(&mut self.incoming, cx))? {
                Some((Kind::Accepted, _)) => return Poll::Ready(Ok(Ok(()))),
                Some((Kind::Refused, mut status)) if status.len() == 2 => {
                    let status = StatusCode::from_u16(status.get_u16());
                    return Poll::Ready(status.map(Err).map_err(io::Error::other));
                }
                Some((Kind::Leave, _)) => *self.leaves = true,
                Some(_) => return Poll::Ready(Err(invalid("a frame that is no answer"))),
                None => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
            }
        }
    }
}

pub struct FastWriter<'a> {
    outgoing: Outgoing<'a>,
    ended: &'a mut bool,
}

impl FastWriter<'_> {
    /// Seals some of the bytes, when what was sealed before is sent. They are sent by
    /// `poll_flush`.
    pub fn poll_seal(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.outgoing.poll_flush(cx))?;
        let part = &bytes[..bytes.len().min(AT_ONCE)];
        for frame in part.chunks(MOST) {
            seal(&mut self.outgoing, Kind::Data, frame)?;
        }
        Poll::Ready(Ok(part.len()))
    }

    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.outgoing.poll_flush(cx)
    }

    pub fn tcp(&self) -> &TcpStream {
        self.outgoing.tcp()
    }

    /// Ends our direction; to be flushed.
    pub fn end(&mut self) -> io::Result<()> {
        if std::mem::replace(self.ended, true) {
            return Ok(());
        }
        seal(&mut self.outgoing, Kind::End, &[])
    }
}

#[cfg(test)]
mod tests;
