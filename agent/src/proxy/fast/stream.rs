//! One stream of a lane, as who carries it sees it.

use std::{
    future::poll_fn,
    io,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::StatusCode;

use super::{Frame, Kind, Lane, Open};

/// Dropped after both directions have ended, it is over. Dropped before that, it is broken.
pub struct FastStream {
    lane: Arc<Lane>,
    id: u32,
}

pub enum NotOpened {
    Refused(StatusCode),
    /// Without an answer.
    Broke(io::Error),
}

impl FastStream {
    pub(super) fn new(lane: Arc<Lane>, id: u32) -> Self {
        Self { lane, id }
    }

    /// Opens a stream: its first bytes go with it, and its answer is waited for.
    pub async fn open(lane: &Arc<Lane>, open: Open, first: &[u8]) -> Result<Self, NotOpened> {
        let Some(stream) = lane.begin(open, first) else {
            return Err(NotOpened::Broke(io::ErrorKind::ConnectionReset.into()));
        };
        match poll_fn(|cx| lane.lock().poll_answer(stream.id, cx)).await {
            Ok(Ok(())) => Ok(stream),
            Ok(Err(status)) => {
                stream.is_over();
                Err(NotOpened::Refused(status))
            }
            Err(error) => Err(NotOpened::Broke(error)),
        }
    }

    pub fn split(&mut self) -> (FastReader<'_>, FastWriter<'_>) {
        (FastReader(self), FastWriter(self))
    }

    /// Lets the other side go on; returns when that is sent.
    pub async fn accept(&mut self) -> io::Result<()> {
        self.push(Kind::Accepted, Bytes::new());
        let until = self.lane.lock().pushed;
        poll_fn(|cx| self.lane.lock().poll_sent(self.id, until, cx)).await
    }

    /// Ends the stream with a reason.
    pub fn refuse(self, status: StatusCode) {
        let status = status.as_u16().to_be_bytes();
        self.push(Kind::Refused, Bytes::copy_from_slice(&status));
        self.is_over();
    }

    /// Breaks the stream, so that the peer cannot take it for an orderly end.
    pub fn reset(self) {
        let mut state = self.lane.lock();
        if state.forget(self.id).is_some() && !state.ended {
            state.push(Frame::new(self.id, Kind::Reset, Bytes::new()));
        }
    }

    /// It has ended, as both sides know.
    fn is_over(&self) {
        self.lane.lock().forget(self.id);
    }

    fn push(&self, kind: Kind, payload: Bytes) {
        (self.lane.lock()).push(Frame::new(self.id, kind, payload));
    }
}

impl Drop for FastStream {
    fn drop(&mut self) {
        let mut state = self.lane.lock();
        let broken = (state.forget(self.id)).is_some_and(|s| !s.is_over() && !s.reset);
        if broken && !state.ended {
            state.push(Frame::new(self.id, Kind::Reset, Bytes::new()));
        }
    }
}

pub struct FastReader<'a>(&'a FastStream);

impl FastReader<'_> {
    /// The next bytes; `None` at an orderly end.
    pub fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        let FastStream { lane, id } = self.0;
        lane.lock().poll_read(*id, lane.most_window(), cx)
    }

    /// More of them, if they have come already.
    pub fn received(&mut self) -> Option<Bytes> {
        let FastStream { lane, id } = self.0;
        lane.lock().received(*id, lane.most_window())
    }
}

#[derive(Clone, Copy)]
pub struct FastWriter<'a>(&'a FastStream);

impl FastWriter<'_> {
    /// Queues all of the bytes, as far as there is room.
    pub fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &mut Bytes) -> Poll<io::Result<()>> {
        let FastStream { lane, id } = self.0;
        let mut state = lane.lock();
        while !bytes.is_empty() {
            let room = std::task::ready!(state.poll_room(*id, bytes.len(), cx))?;
            state.push(Frame::new(*id, Kind::Data, bytes.split_to(room)));
        }
        Poll::Ready(Ok(()))
    }

    /// Queues some of the bytes, when there is room.
    pub fn poll_copy(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let FastStream { lane, id } = self.0;
        let mut state = lane.lock();
        let room = std::task::ready!(state.poll_room(*id, bytes.len(), cx))?;
        let part = Bytes::copy_from_slice(&bytes[..room]);
        state.push(Frame::new(*id, Kind::Data, part));
        Poll::Ready(Ok(room))
    }

    /// Ends our direction; to be flushed.
    pub fn end(&mut self) {
        let FastStream { lane, id } = self.0;
        let mut state = lane.lock();
        if !state.has_ended(*id) {
            state.push(Frame::new(*id, Kind::End, Bytes::new()));
            state.ends(*id);
        }
    }

    /// Bytes are on their way by themselves; an end is waited for.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let FastStream { lane, id } = self.0;
        lane.lock().poll_end_sent(*id, cx)
    }

    /// Ready when the peer has broken the stream.
    pub fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        let FastStream { lane, id } = self.0;
        lane.lock().poll_broken(*id, cx)
    }
}
