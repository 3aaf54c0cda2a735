//! The record layer of TLS 1.3 (RFC 8446 5): a record is sealed from where its bytes lie
//! into the buffer that is sent, and opened in the buffer that was received.

use std::{
    io,
    ops::Range,
    pin::Pin,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use aws_lc_rs::aead::{
    AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey,
};
use bytes::{Buf as _, Bytes, BytesMut};
use rustls::{ConnectionTrafficSecrets, ExtractedSecrets};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
};
use tokio_util::io::poll_read_buf;

use super::Keys;

const HEADER: usize = 5;
const TAG: usize = 16;
/// Largest plaintext of a record, without its content type.
pub const MOST_PLAIN: usize = 16 << 10;
/// Largest record on the wire, with its header.
const MOST_WIRE: usize = HEADER + MOST_PLAIN + 256;
/// Read at once of a connection that has more than a record at a time.
const BULK: usize = 16 * MOST_WIRE;
/// What is sealed before it is sent.
const SEALED: usize = 64 << 10;
/// Records of one key (RFC 8446 5.5); ChaCha20-Poly1305 has no bound, and is renewed with
/// the others.
const RENEW: u64 = 1 << 23;

const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const DATA: u8 = 23;

const CLOSE_NOTIFY: [u8; 2] = [1, 0];
const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;

/// One direction's key, initialization vector and number of the next record.
struct Key {
    aead: LessSafeKey,
    iv: [u8; 12],
    next: u64,
}

impl Key {
    fn new((next, secrets): (u64, ConnectionTrafficSecrets)) -> io::Result<Self> {
        let (algorithm, key, iv) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(io::ErrorKind::Unsupported.into()),
        };
        let unbound = UnboundKey::new(algorithm, key.as_ref()).map_err(io::Error::other)?;
        Ok(Self {
            aead: LessSafeKey::new(unbound),
            iv: iv.as_ref().try_into().map_err(io::Error::other)?,
            next,
        })
    }

    /// Never the same twice (RFC 8446 5.3).
    fn nonce(&mut self) -> Nonce {
        let mut nonce = self.iv;
        for (byte, number) in nonce[4..].iter_mut().zip(self.next.to_be_bytes()) {
            *byte ^= number;
        }
        self.next += 1;
        Nonce::assume_unique_for_key(nonce)
    }

    /// A record. `last`: the end of the plaintext that lies elsewhere, with the content
    /// type at its end. Returns its length.
    fn seal(&mut self, plain: &[u8], last: &[u8], into: &mut [u8]) -> io::Result<usize> {
        let length = plain.len() + last.len() + TAG;
        let header = header(length);
        into[..HEADER].copy_from_slice(&header);
        let body = &mut into[HEADER..HEADER + length];
        let (sealed, tail) = body.split_at_mut(plain.len());
        let nonce = self.nonce();
        self.aead
            .seal_out_of_place_scatter(nonce, Aad::from(header), plain, sealed, last, tail)
            .map_err(io::Error::other)?;
        Ok(HEADER + length)
    }

    /// Opens a record in place: its plaintext, and its content type.
    fn open<'a>(&mut self, header: [u8; HEADER], body: &'a mut [u8]) -> io::Result<(&'a [u8], u8)> {
        let nonce = self.nonce();
        let plain = self.aead.open_in_place(nonce, Aad::from(header), body);
        let plain = plain.map_err(|_| invalid("a record is not its sender's"))?;
        // Padding: zeros behind the content type (RFC 8446 5.4).
        let last = plain.iter().rposition(|byte| *byte != 0);
        let last = last.ok_or_else(|| invalid("a record without a content type"))?;
        if last > MOST_PLAIN {
            return Err(invalid("a record is too long"));
        }
        Ok((&plain[..last], plain[last]))
    }
}

fn header(length: usize) -> [u8; HEADER] {
    let [high, low] = u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes();
    [DATA, 3, 3, high, low]
}

/// Of the record at the front, with its header, if it is there as a whole.
pub(super) fn length(bytes: &[u8]) -> Option<usize> {
    let (header, body) = bytes.split_first_chunk::<HEADER>()?;
    let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
    (body.len() >= length).then_some(HEADER + length)
}

fn invalid(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// A connection after its handshake, as records.
pub struct Records {
    tcp: TcpStream,
    receive: Receive,
    send: Send,
    shared: Shared,
    /// Opened, for who reads bytes and not records.
    opened: Bytes,
}

struct Receive {
    key: Key,
    /// Received and not opened yet.
    buffer: BytesMut,
    /// What is read at once.
    chunk: usize,
    /// The peer has ended its direction.
    ended: bool,
}

struct Send {
    key: Key,
    buffer: Vec<u8>,
    /// Of it, what is sealed and not sent yet.
    sealed: Range<usize>,
    /// Our direction has been ended.
    ended: bool,
}

struct Shared {
    keys: Mutex<Keys>,
    /// The peer wants our next key (RFC 8446 4.6.3).
    update: AtomicBool,
}

impl Keys {
    fn next(&mut self, sending: bool) -> io::Result<Key> {
        let secrets = match (self, sending) {
            (Self::Client(keys), true) => keys.update_tx_secret(),
            (Self::Client(keys), false) => keys.update_rx_secret(),
            (Self::Server(keys), true) => keys.update_tx_secret(),
            (Self::Server(keys), false) => keys.update_rx_secret(),
        };
        Key::new(secrets.map_err(io::Error::other)?)
    }
}

/// The direction to us.
pub struct Incoming<'a> {
    tcp: ReadHalf<'a>,
    receive: &'a mut Receive,
    shared: &'a Shared,
}

/// The direction from us.
pub struct Outgoing<'a> {
    tcp: WriteHalf<'a>,
    send: &'a mut Send,
    shared: &'a Shared,
}

impl Records {
    /// `received`: what came after the handshake already.
    pub(super) fn new(
        tcp: TcpStream,
        secrets: ExtractedSecrets,
        keys: Keys,
        received: BytesMut,
    ) -> io::Result<Self> {
        Ok(Self {
            tcp,
            receive: Receive {
                key: Key::new(secrets.rx)?,
                buffer: match received.is_empty() {
                    true => BytesMut::new(),
                    false => received,
                },
                chunk: MOST_WIRE,
                ended: false,
            },
            send: Send {
                key: Key::new(secrets.tx)?,
                buffer: Vec::new(),
                sealed: 0..0,
                ended: false,
            },
            shared: Shared {
                keys: Mutex::new(keys),
                update: AtomicBool::new(false),
            },
            opened: Bytes::new(),
        })
    }

    pub fn split(&mut self) -> (Incoming<'_>, Outgoing<'_>) {
        let (read, write) = self.tcp.split();
        let incoming = Incoming {
            tcp: read,
            receive: &mut self.receive,
            shared: &self.shared,
        };
        let outgoing = Outgoing {
            tcp: write,
            send: &mut self.send,
            shared: &self.shared,
        };
        (incoming, outgoing)
    }
}

#[cfg(test)]
impl Records {
    /// The next record has the next key.
    pub fn renew_soon(&mut self) {
        self.shared.update.store(true, Ordering::Relaxed);
    }

    /// Changes a byte of what is to be sent.
    pub fn spoil(&mut self) {
        self.send.buffer[HEADER] ^= 1;
    }

    /// Buffers that it keeps, bytes.
    pub fn held(&self) -> usize {
        self.receive.buffer.capacity() + self.send.buffer.capacity()
    }
}

impl Receive {
    /// The next record's plaintext, of what has been received. `None`: more is needed.
    fn open(&mut self, shared: &Shared) -> io::Result<Option<Bytes>> {
        loop {
            let Some((header, _)) = self.buffer.split_first_chunk::<HEADER>() else {
                return Ok(None);
            };
            let header = *header;
            let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
            if header[..3] != [DATA, 3, 3] || length > MOST_WIRE - HEADER || length <= TAG {
                return Err(invalid("what came is no record of TLS 1.3"));
            }
            if self.buffer.len() < HEADER + length {
                return Ok(None);
            }
            let mut record = self.buffer.split_to(HEADER + length);
            let (plain, kind) = self.key.open(header, &mut record[HEADER..])?;
            match kind {
                DATA => {
                    let length = plain.len();
                    record.advance(HEADER);
                    record.truncate(length);
                    return Ok(Some(record.freeze()));
                }
                ALERT if plain == CLOSE_NOTIFY => {
                    self.ended = true;
                    return Ok(None);
                }
                ALERT => return Err(invalid("the peer sent a fatal alert")),
                HANDSHAKE => {
                    let (renew, answer) = messages(plain)?;
                    if renew {
                        self.key = shared.renew(false)?;
                    }
                    if answer {
                        shared.update.store(true, Ordering::Relaxed);
                    }
                }
                _ => return Err(invalid("a record of a kind that is not for now")),
            }
        }
    }
}

impl Shared {
    fn renew(&self, sending: bool) -> io::Result<Key> {
        let mut keys = self.keys.lock().expect("no panic while it is held");
        keys.next(sending)
    }
}

/// What messages after the handshake want: the next key of the peer's, and one of ours.
/// Tickets are not used. They are not split over records by any peer that is known.
fn messages(mut plain: &[u8]) -> io::Result<(bool, bool)> {
    let (mut renew, mut answer) = (false, false);
    while let [kind, a, b, c, rest @ ..] = plain {
        let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
        let Some((body, behind)) = rest.split_at_checked(length) else {
            return Err(invalid("a message after the handshake is cut off"));
        };
        match (*kind, body) {
            (NEW_SESSION_TICKET, _) => {}
            // The last in its record: what follows has the next key.
            (KEY_UPDATE, [asks @ 0..=1]) if behind.is_empty() => {
                renew = true;
                answer = *asks == 1;
            }
            _ => return Err(invalid("a message that is not for after the handshake")),
        }
        plain = behind;
    }
    match plain {
        [] => Ok((renew, answer)),
        _ => Err(invalid("a message after the handshake is cut off")),
    }
}

impl Receive {
    /// The next record's plaintext; `None` at an orderly end.
    fn poll_next(
        &mut self,
        tcp: &mut ReadHalf<'_>,
        shared: &Shared,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<Option<Bytes>>> {
        loop {
            if let Some(plain) = self.open(shared)? {
                return Poll::Ready(Ok(Some(plain)));
            }
            if self.ended {
                return Poll::Ready(Ok(None));
            }
            if self.buffer.is_empty() {
                // An idle connection keeps no buffer.
                self.buffer = BytesMut::new();
                ready!(tcp.as_ref().poll_read_ready(cx))?;
            }
            self.buffer.reserve(self.chunk);
            let room = self.buffer.capacity() - self.buffer.len();
            let read = ready!(poll_read_buf(Pin::new(tcp), cx, &mut self.buffer))?;
            if read == 0 {
                // Without the peer's word it may be an attacker's (RFC 8446 6.1).
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            self.chunk = if read == room { BULK } else { MOST_WIRE };
        }
    }
}

impl Incoming<'_> {
    /// The next record's plaintext; `None` at an orderly end.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        self.receive.poll_next(&mut self.tcp, self.shared, cx)
    }
}

impl Outgoing<'_> {
    /// Appends a record to what is sent next.
    pub fn seal(&mut self, plain: &[u8], last: &[u8]) -> io::Result<()> {
        self.send.seal(self.shared, plain, last)
    }

    /// Sends what is sealed.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.send.poll_flush(&mut self.tcp, cx)
    }

    /// What is sealed and not sent, bytes.
    pub fn waiting(&self) -> usize {
        self.send.sealed.len()
    }
}

impl Send {
    fn seal(&mut self, shared: &Shared, plain: &[u8], last: &[u8]) -> io::Result<()> {
        if shared.update.swap(false, Ordering::Relaxed) || self.key.next >= RENEW {
            self.append(&[KEY_UPDATE, 0, 0, 1, 0], &[HANDSHAKE])?;
            self.key = shared.renew(true)?;
        }
        self.append(plain, last)
    }

    fn append(&mut self, plain: &[u8], last: &[u8]) -> io::Result<()> {
        let end = self.sealed.end + HEADER + plain.len() + last.len() + TAG;
        if end > self.buffer.len() {
            self.buffer.resize(end, 0);
        }
        let free = &mut self.buffer[self.sealed.end..];
        self.sealed.end += self.key.seal(plain, last, free)?;
        Ok(())
    }

    fn unsent(&self) -> &[u8] {
        &self.buffer[self.sealed.clone()]
    }

    fn sent(&mut self, bytes: usize) {
        self.sealed.start += bytes;
        if self.sealed.is_empty() {
            // An idle connection keeps no buffer, and a busy one need not make it anew.
            if self.sealed.end <= MOST_WIRE {
                self.buffer = Vec::new();
            }
            self.sealed = 0..0;
        }
    }

    fn poll_flush(
        &mut self,
        tcp: &mut WriteHalf<'_>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while !self.sealed.is_empty() {
            match ready!(Pin::new(&mut *tcp).poll_write(cx, self.unsent()))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => self.sent(written),
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// As bytes, for HTTP/2.
impl AsyncRead for Records {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.opened.is_empty() {
            match ready!(self.split().0.poll_next(cx))? {
                Some(opened) => self.opened = opened,
                None => return Poll::Ready(Ok(())),
            }
        }
        let part = self.opened.len().min(into.remaining());
        into.put_slice(&self.opened[..part]);
        self.opened.advance(part);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Records {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let (_, mut outgoing) = self.split();
        if outgoing.waiting() >= SEALED {
            ready!(outgoing.poll_flush(cx))?;
        }
        let mut taken = 0;
        match slices {
            [one] => {
                for part in one.chunks(MOST_PLAIN).take(SEALED / MOST_PLAIN) {
                    outgoing.seal(part, &[DATA])?;
                    taken += part.len();
                }
            }
            // A frame's head and its payload are to be one record.
            many => {
                let mut plain = BytesMut::with_capacity(MOST_PLAIN);
                for slice in many {
                    let part = slice.len().min(MOST_PLAIN - plain.len());
                    plain.extend_from_slice(&slice[..part]);
                }
                taken = plain.len();
                outgoing.seal(&plain, &[DATA])?;
            }
        }
        Poll::Ready(Ok(taken))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.split().1.poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let (_, mut outgoing) = self.split();
        if !std::mem::replace(&mut outgoing.send.ended, true) {
            outgoing.seal(&CLOSE_NOTIFY, &[ALERT])?;
        }
        ready!(outgoing.poll_flush(cx))?;
        Pin::new(&mut outgoing.tcp).poll_shutdown(cx)
    }
}
