//! The transport between two Postern agents, where both want it (`transport.fastPath`): a
//! TLS connection, a lane, carries streams side by side. Frames of all its streams that are
//! there at a time leave in one record and one segment, which is what makes small messages
//! cheap; a large one is sealed from where it lies. ALPN tells who speaks it; with everybody
//! else it is HBONE.
//!
//! Each stream has a window of its own, and a lane has none: a receiver that does not read
//! holds up its stream alone. A lane and its streams stay on the thread that has made it.
//!
//! A record is frames, back to back. A frame is its payload, then the payload's length (16
//! bits), the number of its stream (32 bits), and what it is (8 bits), so that a record is
//! read from its end.
//!
//! ```text
//! source                                destination
//! Open(destination, client) ---------->
//! Data (the first bytes)    ---------->  judged, the application dialled
//!                           <---------- Accepted, or Refused(status): the stream is over
//! Data ... End              <---------> Data ... End
//!          Credit           <---------> Credit        so much more may be sent
//!          Reset            <---------> Reset         it is broken, at any time
//!                           <---------- Leave: no other stream after these (stream 0)
//!          Ping, Pong       <---------> Ping, Pong    whether the other is there (stream 0)
//! ```
//!
//! Nothing but the first bytes is sent before the answer, and the application gets nothing
//! before the answer is sent: a stream without an answer has not been, and can be opened
//! again on another lane. A lane that ends breaks its streams.

mod lane;
mod stream;

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

use super::tls::MOST_PLAIN;

pub use lane::{Driver, Event, Lane};
pub use stream::{FastReader, FastStream, FastWriter, NotOpened};

/// Largest payload of a frame, bytes.
pub const MOST: usize = MOST_PLAIN - TRAILER;
/// What is best written at once, bytes.
pub const AT_ONCE: usize = 16 * MOST;
/// Behind each payload.
const TRAILER: usize = 7;
/// Of frames that are the lane's.
const NO_STREAM: u32 = 0;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    Data,
    /// The sender says no more on this stream.
    End,
    /// The sender has broken the stream.
    Reset,
    /// So many bytes more may be sent on this stream.
    Credit,
    Open,
    Accepted,
    Refused,
    Leave,
    Ping,
    Pong,
}

impl Kind {
    fn of(byte: u8) -> Option<Self> {
        [
            Self::Data,
            Self::End,
            Self::Reset,
            Self::Credit,
            Self::Open,
            Self::Accepted,
            Self::Refused,
            Self::Leave,
            Self::Ping,
            Self::Pong,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == byte)
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Frame {
    stream: u32,
    kind: Kind,
    payload: Bytes,
}

impl Frame {
    fn new(stream: u32, kind: Kind, payload: Bytes) -> Self {
        Self {
            stream,
            kind,
            payload,
        }
    }

    fn trailer(&self) -> [u8; TRAILER] {
        let length = u16::try_from(self.payload.len()).expect("no longer than MOST");
        let mut trailer = [0; TRAILER];
        let mut into = &mut trailer[..];
        into.put_u16(length);
        into.put_u32(self.stream);
        into.put_u8(self.kind as u8);
        trailer
    }

    /// Those of a record, the last one first.
    fn split_off(record: &mut Bytes) -> io::Result<Option<Self>> {
        if record.is_empty() {
            return Ok(None);
        }
        let cut = || invalid("a frame is cut off");
        let body = record.len().checked_sub(TRAILER).ok_or_else(cut)?;
        let mut trailer = record.split_off(body);
        let length = usize::from(trailer.get_u16());
        let stream = trailer.get_u32();
        let kind = Kind::of(trailer.get_u8()).ok_or_else(|| invalid("a frame of no known kind"))?;
        let payload = record.split_off(body.checked_sub(length).ok_or_else(cut)?);
        Ok(Some(Self::new(stream, kind, payload)))
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
    fn encode(&self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(36);
        for address in [self.destination, self.client] {
            let ip = match address.ip() {
                IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                IpAddr::V6(ip) => ip,
            };
            bytes.put_slice(&ip.octets());
            bytes.put_u16(address.port());
        }
        bytes.freeze()
    }

    fn decode(mut bytes: &[u8]) -> Option<Self> {
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

fn invalid(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests;
