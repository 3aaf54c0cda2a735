//! A lane: what its streams share, and the task that receives and sends for all of them.

use std::{
    collections::{HashMap, VecDeque},
    io,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use http::StatusCode;
use tokio::time::sleep;

use super::{AT_ONCE, FastStream, Frame, Kind, NO_STREAM, Open, TRAILER, invalid};
use crate::{
    config::Transport,
    proxy::tls::{MOST_PLAIN, Outgoing, Records},
};

/// What may be sent on a new stream before there is credit, bytes.
const WINDOW: usize = 64 << 10;
/// How much larger the window of a stream becomes whose receiver keeps up.
const GROWTH: usize = 8;
/// And what may be sent on any, at most.
const MOST_CREDIT: usize = 1 << 30;
/// What streams may have waiting to be sealed, bytes, before they wait themselves.
const QUEUE: usize = 512 << 10;
/// A payload of this size is sealed from where it lies, and kept as it was received.
const LARGE: usize = 4 << 10;
/// Records that are received before others have their turn.
const TURN: usize = 16;
/// Content type of application data, which every record is.
const DATA_RECORD: u8 = 23;

pub struct Lane {
    state: Mutex<State>,
    /// Streams that there may be here: twice as many as the peer may have open, for what has
    /// ended there may not have been let go here.
    most_streams: usize,
    /// What the peer may send on a stream before it is read, bytes.
    window: usize,
}

#[derive(Default)]
pub(super) struct State {
    /// Apart: half of the map may be empty.
    pub(super) streams: HashMap<u32, Box<Stream>>,
    /// Number of the stream that was opened last.
    opened: u32,
    out: VecDeque<Frame>,
    /// Bytes in there.
    queued: usize,
    /// Frames that were ever put there.
    pub(super) pushed: u64,
    /// And of these, those that are with the kernel.
    sent: u64,
    driver: Option<Waker>,
    /// Streams that wait for what is queued to be sent.
    waiting: Vec<u32>,
    /// What the next stream gathers its chunks in: idle ones have none.
    spare: VecDeque<Bytes>,
    /// Something has come since this was last looked at.
    heard: bool,
    /// The peer wants no other stream.
    left: bool,
    /// The connection has ended.
    pub(super) ended: bool,
}

/// One stream.
pub(super) struct Stream {
    chunks: VecDeque<Bytes>,
    /// Bytes in there.
    waiting: usize,
    /// The peer may send so many bytes before it must be given more.
    room: usize,
    /// What the peer may send in all before it is read.
    window: usize,
    /// Taken, and not given back to the peer's credit.
    taken: usize,
    /// Taken since the window has grown.
    since: usize,
    /// We may send so many bytes.
    credit: usize,
    pub(super) answer: Option<Result<(), StatusCode>>,
    /// Our direction has ended, with this frame of all that were pushed.
    sent_end: Option<u64>,
    received_end: bool,
    pub(super) reset: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
    watcher: Option<Waker>,
    /// It is in the list of those that wait.
    waits: bool,
}

impl Stream {
    fn new() -> Self {
        Self {
            chunks: VecDeque::new(),
            waiting: 0,
            room: WINDOW,
            window: WINDOW,
            taken: 0,
            since: 0,
            credit: WINDOW,
            answer: None,
            sent_end: None,
            received_end: false,
            reset: false,
            reader: None,
            writer: None,
            watcher: None,
            waits: false,
        }
    }

    /// Both directions have ended, and nothing is left to read.
    pub(super) fn is_over(&self) -> bool {
        self.sent_end.is_some() && self.received_end && self.chunks.is_empty()
    }

    /// Its reader does: it is what the sender waits for.
    fn keeps_up(&self) -> bool {
        self.since >= 2 * self.window && self.waiting < self.window / 2
    }

    fn wake_all(&mut self) {
        for waker in [&mut self.reader, &mut self.writer, &mut self.watcher] {
            wake(waker);
        }
    }
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

fn wait(waker: &mut Option<Waker>, cx: &Context<'_>) {
    if !waker.as_ref().is_some_and(|w| w.will_wake(cx.waker())) {
        *waker = Some(cx.waker().clone());
    }
}

impl Lane {
    pub fn new(transport: &Transport) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            most_streams: 2 * transport.streams_per_tunnel.0 as usize,
            window: (transport.stream_window.0 as usize).max(WINDOW),
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while it is held")
    }

    /// A stream's largest window.
    pub(super) fn most_window(&self) -> usize {
        self.window * GROWTH
    }

    /// A new stream to the peer, with its first bytes. `None`: the connection has ended.
    pub(super) fn begin(self: &Arc<Self>, open: Open, first: &[u8]) -> Option<FastStream> {
        let mut state = self.lock();
        if state.ended {
            return None;
        }
        state.opened = state.opened.checked_add(1)?;
        let (id, mut stream) = (state.opened, Stream::new());
        state.push(Frame::new(id, Kind::Open, open.encode()));
        for part in first.chunks(super::MOST) {
            stream.credit -= part.len();
            state.push(Frame::new(id, Kind::Data, Bytes::copy_from_slice(part)));
        }
        state.streams.insert(id, Box::new(stream));
        state.grant(id, 0, self.window - WINDOW);
        drop(state);
        Some(FastStream::new(self.clone(), id))
    }

    /// No other stream is to come.
    pub fn leave(&self) {
        (self.lock()).push(Frame::new(NO_STREAM, Kind::Leave, Bytes::new()));
    }

    pub fn is_unused(&self) -> bool {
        self.lock().streams.is_empty()
    }

    /// Returns when the peer has been silent for too long, and did not answer when it was
    /// asked.
    pub async fn silent(&self, transport: &Transport) {
        let heard = || std::mem::take(&mut self.lock().heard);
        loop {
            sleep(transport.keepalive_interval.0).await;
            if heard() {
                continue;
            }
            (self.lock()).push(Frame::new(NO_STREAM, Kind::Ping, Bytes::new()));
            sleep(transport.keepalive_timeout.0).await;
            if !heard() {
                return;
            }
        }
    }

    /// Returns when it has had no stream for a moment.
    pub async fn unused(&self, moment: Duration) {
        loop {
            sleep(moment).await;
            if self.is_unused() {
                return;
            }
        }
    }
}

impl State {
    pub(super) fn push(&mut self, frame: Frame) {
        self.queued += frame.payload.len();
        self.pushed += 1;
        self.out.push_back(frame);
        wake(&mut self.driver);
    }

    /// A stream of ours is gone.
    pub(super) fn forget(&mut self, id: u32) -> Option<Box<Stream>> {
        let stream = self.streams.remove(&id);
        if self.left && self.streams.is_empty() {
            wake(&mut self.driver);
        }
        stream
    }

    fn stream(&mut self, id: u32) -> &mut Stream {
        self.streams.get_mut(&id).expect("as long as its owner")
    }

    /// The next bytes of a stream; `None` at an orderly end.
    pub(super) fn poll_read(
        &mut self,
        id: u32,
        most_window: usize,
        cx: &Context<'_>,
    ) -> Poll<io::Result<Option<Bytes>>> {
        let ended = self.ended;
        if let Some(chunk) = self.received(id, most_window) {
            return Poll::Ready(Ok(Some(chunk)));
        }
        let stream = self.stream(id);
        if stream.received_end {
            return Poll::Ready(Ok(None));
        }
        if ended || stream.reset {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        wait(&mut stream.reader, cx);
        Poll::Pending
    }

    /// Bytes of a stream that have come already.
    pub(super) fn received(&mut self, id: u32, most_window: usize) -> Option<Bytes> {
        let stream = self.streams.get_mut(&id).expect("as long as its owner");
        let chunk = stream.chunks.pop_front()?;
        if stream.chunks.is_empty() {
            self.spare = std::mem::take(&mut stream.chunks);
        }
        stream.waiting -= chunk.len();
        stream.taken += chunk.len();
        stream.since += chunk.len();
        if stream.taken >= stream.window / 2 && !stream.received_end {
            let more = match stream.keeps_up() {
                true => stream.window.min(most_window - stream.window),
                false => 0,
            };
            let taken = std::mem::take(&mut stream.taken);
            self.grant(id, taken, more);
        }
        Some(chunk)
    }

    /// The peer may send what was taken once more, and `more`.
    fn grant(&mut self, id: u32, taken: usize, more: usize) {
        let stream = self.stream(id);
        if more > 0 {
            stream.window += more;
            stream.since = 0;
        }
        stream.room += taken + more;
        let credit = u32::try_from(taken + more).expect("no more than two windows");
        let credit = Bytes::copy_from_slice(&credit.to_be_bytes());
        self.push(Frame::new(id, Kind::Credit, credit));
    }

    /// How much of a payload of this length can be sent on a stream now.
    pub(super) fn poll_room(
        &mut self,
        id: u32,
        length: usize,
        cx: &Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let (ended, full) = (self.ended, self.queued >= QUEUE);
        let stream = self.stream(id);
        if ended || stream.reset {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        let room = length.min(stream.credit).min(super::MOST);
        if room > 0 && !full {
            stream.credit -= room;
            return Poll::Ready(Ok(room));
        }
        wait(&mut stream.writer, cx);
        if full {
            self.list(id);
        }
        Poll::Pending
    }

    /// Whether all that was put here until then is with the kernel.
    pub(super) fn poll_sent(
        &mut self,
        id: u32,
        until: u64,
        cx: &Context<'_>,
    ) -> Poll<io::Result<()>> {
        if self.sent >= until {
            return Poll::Ready(Ok(()));
        }
        if self.ended {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        wait(&mut self.stream(id).writer, cx);
        self.list(id);
        Poll::Pending
    }

    pub(super) fn has_ended(&mut self, id: u32) -> bool {
        self.stream(id).sent_end.is_some()
    }

    /// What was pushed last is the end of our direction.
    pub(super) fn ends(&mut self, id: u32) {
        let last = self.pushed;
        self.stream(id).sent_end = Some(last);
    }

    pub(super) fn poll_end_sent(&mut self, id: u32, cx: &Context<'_>) -> Poll<io::Result<()>> {
        match self.stream(id).sent_end {
            Some(until) => self.poll_sent(id, until, cx),
            None => Poll::Ready(Ok(())),
        }
    }

    fn list(&mut self, id: u32) {
        if !std::mem::replace(&mut self.stream(id).waits, true) {
            self.waiting.push(id);
        }
    }

    /// Whether the peer has broken a stream.
    pub(super) fn poll_broken(&mut self, id: u32, cx: &Context<'_>) -> Poll<io::Error> {
        let ended = self.ended;
        let stream = self.stream(id);
        // A lane that ends takes nothing from a stream that both sides have ended.
        let whole = stream.sent_end.is_some() && stream.received_end;
        if stream.reset || ended && !whole {
            return Poll::Ready(io::ErrorKind::ConnectionReset.into());
        }
        wait(&mut stream.watcher, cx);
        Poll::Pending
    }

    pub(super) fn poll_answer(
        &mut self,
        id: u32,
        cx: &Context<'_>,
    ) -> Poll<io::Result<Result<(), StatusCode>>> {
        let ended = self.ended;
        let stream = self.stream(id);
        if let Some(answer) = stream.answer {
            return Poll::Ready(Ok(answer));
        }
        if ended || stream.reset {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        wait(&mut stream.reader, cx);
        Poll::Pending
    }

    /// Takes what has come for a stream of ours. What is of none was on its way when that
    /// ended.
    fn take(&mut self, frame: Frame) -> io::Result<()> {
        let Frame {
            stream,
            kind,
            mut payload,
        } = frame;
        let Some(stream) = self.streams.get_mut(&stream) else {
            return Ok(());
        };
        match kind {
            Kind::Data if stream.received_end => return Err(invalid("bytes behind their end")),
            Kind::Data => {
                let left = stream.room.checked_sub(payload.len());
                stream.room = left.ok_or_else(|| invalid("more bytes than there is room for"))?;
                // A few bytes must not keep what they were received with while they wait.
                if payload.len() < LARGE {
                    payload = Bytes::copy_from_slice(&payload);
                }
                if !payload.is_empty() {
                    stream.waiting += payload.len();
                    if stream.chunks.capacity() == 0 {
                        stream.chunks = std::mem::take(&mut self.spare);
                    }
                    stream.chunks.push_back(payload);
                }
                wake(&mut stream.reader);
            }
            Kind::End => {
                stream.received_end = true;
                wake(&mut stream.reader);
            }
            Kind::Reset => {
                stream.reset = true;
                if !stream.received_end {
                    stream.chunks.clear();
                    stream.waiting = 0;
                }
                stream.wake_all();
            }
            Kind::Credit if payload.len() == 4 => {
                stream.credit += payload.get_u32() as usize;
                if stream.credit > MOST_CREDIT {
                    return Err(invalid("more credit than there is"));
                }
                wake(&mut stream.writer);
            }
            Kind::Accepted => {
                stream.answer = Some(Ok(()));
                wake(&mut stream.reader);
            }
            Kind::Refused if payload.len() == 2 => {
                let status = StatusCode::from_u16(payload.get_u16()).map_err(io::Error::other)?;
                stream.answer = Some(Err(status));
                wake(&mut stream.reader);
            }
            _ => return Err(invalid("a frame that is not for a stream")),
        }
        Ok(())
    }
}

/// The connection below a lane. Whoever holds it polls it as long as the lane is to be.
pub struct Driver {
    lane: Arc<Lane>,
    records: Box<Records>,
    /// Frames that are sealed.
    sealed: u64,
    /// Of one record.
    frames: Vec<Frame>,
    offers: VecDeque<(FastStream, Open)>,
    /// The peer may open streams.
    serves: bool,
}

/// What the holder of a lane must know.
pub enum Event {
    /// The peer opens a stream.
    Offered(FastStream, Open),
    /// The peer wants no other stream.
    Leaves,
    /// It has left, and its streams have ended.
    Over,
}

impl Driver {
    /// Of a connection that was dialled.
    pub fn dialled(lane: Arc<Lane>, records: Box<Records>) -> Self {
        Self::new(lane, records, false)
    }

    /// Of one that was accepted.
    pub fn accepted(lane: Arc<Lane>, records: Box<Records>) -> Self {
        Self::new(lane, records, true)
    }

    fn new(lane: Arc<Lane>, records: Box<Records>, serves: bool) -> Self {
        Self {
            lane,
            records,
            sealed: 0,
            frames: Vec::new(),
            offers: VecDeque::new(),
            serves,
        }
    }

    /// Receives and sends; returns when there is something to know. Safe to cancel.
    pub async fn run(&mut self) -> io::Result<Event> {
        std::future::poll_fn(|cx| self.poll(cx)).await
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Event>> {
        let mut left = false;
        let mut more = true;
        for _ in 0..TURN {
            let (mut incoming, _) = self.records.split();
            match incoming.poll_next(cx) {
                Poll::Ready(record) => {
                    let record = record?.ok_or(io::ErrorKind::UnexpectedEof)?;
                    left |= self.receive(record)?;
                }
                Poll::Pending => {
                    more = false;
                    break;
                }
            }
        }
        if more {
            cx.waker().wake_by_ref();
        }
        self.send(cx)?;
        if let Some((stream, open)) = self.offers.pop_front() {
            return Poll::Ready(Ok(Event::Offered(stream, open)));
        }
        if left {
            return Poll::Ready(Ok(Event::Leaves));
        }
        let state = self.lane.lock();
        match state.left && state.streams.is_empty() && state.sent == state.pushed {
            true => Poll::Ready(Ok(Event::Over)),
            false => Poll::Pending,
        }
    }

    /// Gives what came to whom it is for. Says whether the peer leaves.
    fn receive(&mut self, mut record: Bytes) -> io::Result<bool> {
        while let Some(frame) = Frame::split_off(&mut record)? {
            self.frames.push(frame);
        }
        let mut left = false;
        let mut state = self.lane.lock();
        state.heard = true;
        while let Some(frame) = self.frames.pop() {
            match frame.kind {
                Kind::Ping => state.push(Frame::new(NO_STREAM, Kind::Pong, Bytes::new())),
                Kind::Pong => {}
                Kind::Leave if !self.serves => {
                    state.left = true;
                    left = true;
                }
                Kind::Open if self.serves => {
                    let open = Open::decode(&frame.payload);
                    let open = open.ok_or_else(|| invalid("a stream to nowhere"))?;
                    let id = frame.stream;
                    if state.streams.len() >= self.lane.most_streams {
                        // It has not been: the peer may open it on another lane.
                        state.push(Frame::new(id, Kind::Reset, Bytes::new()));
                    } else if id <= state.opened {
                        return Err(invalid("a stream that has been"));
                    } else {
                        state.opened = id;
                        state.streams.insert(id, Box::new(Stream::new()));
                        state.grant(id, 0, self.lane.window - WINDOW);
                        let stream = FastStream::new(self.lane.clone(), id);
                        self.offers.push_back((stream, open));
                    }
                }
                _ => state.take(frame)?,
            }
        }
        Ok(left)
    }

    /// Sends what is queued, as far as the connection takes it.
    fn send(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let (_, mut outgoing) = self.records.split();
        loop {
            let flushed = outgoing.poll_flush(cx)?.is_ready();
            let mut state = self.lane.lock();
            wait(&mut state.driver, cx);
            if !flushed {
                return Ok(());
            }
            state.sent = self.sealed;
            for id in std::mem::take(&mut state.waiting) {
                if let Some(stream) = state.streams.get_mut(&id) {
                    stream.waits = false;
                    wake(&mut stream.writer);
                }
            }
            if state.out.is_empty() {
                return Ok(());
            }
            self.sealed += seal(&mut state, &mut outgoing)?;
        }
    }
}

/// Seals what is best sent at once: small frames together, large ones each as a record. Says
/// how many.
fn seal(state: &mut State, outgoing: &mut Outgoing<'_>) -> io::Result<u64> {
    let mut frames = 0;
    let mut together = BytesMut::new();
    while outgoing.waiting() + together.len() < AT_ONCE
        && let Some(frame) = state.out.pop_front()
    {
        let Frame { payload, .. } = &frame;
        state.queued -= payload.len();
        frames += 1;
        let large = payload.len() >= LARGE;
        if large || together.len() + payload.len() + TRAILER > MOST_PLAIN {
            flush(&mut together, outgoing)?;
        }
        if large {
            let mut last = [DATA_RECORD; TRAILER + 1];
            last[..TRAILER].copy_from_slice(&frame.trailer());
            outgoing.seal(payload, &last)?;
        } else {
            together.put_slice(payload);
            together.put_slice(&frame.trailer());
        }
    }
    flush(&mut together, outgoing)?;
    Ok(frames)
}

fn flush(together: &mut BytesMut, outgoing: &mut Outgoing<'_>) -> io::Result<()> {
    if !together.is_empty() {
        outgoing.seal(together, &[DATA_RECORD])?;
        together.clear();
    }
    Ok(())
}

impl Drop for Driver {
    /// The connection ends, and its streams break.
    fn drop(&mut self) {
        let mut state = self.lane.lock();
        state.ended = true;
        state.out.clear();
        state
            .streams
            .values_mut()
            .for_each(|stream| stream.wake_all());
        drop(state);
        // Their own ends are nobody's any more, and need the lock.
        self.offers.clear();
    }
}
