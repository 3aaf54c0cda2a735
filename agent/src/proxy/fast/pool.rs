//! The source's side: connections that are free for the next stream, by source pod and
//! destination, and each in the hands of the thread that waits for its bytes.

use std::{
    collections::HashMap,
    future::poll_fn,
    io,
    net::IpAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use super::{FastStream, Home, Kind, Open, seal};
use crate::{
    identity::{Session, SpiffeId},
    proxy::{tls::Records, workers},
};
use http::StatusCode;

/// Free connections between a pod and a destination that are kept for long, on each thread.
pub const KEPT: usize = 64;
/// And how long others are.
pub const SOON: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PoolKey {
    /// Whose runtime the connection is registered with.
    worker: usize,
    /// [`LocalPod::serial`](crate::proxy::LocalPod): pods may share an identity, never a
    /// source address.
    pub pod: u64,
    pub destination: IpAddr,
}

impl PoolKey {
    pub fn new(pod: u64, destination: IpAddr) -> Self {
        Self {
            worker: workers::current(),
            pod,
            destination,
        }
    }
}

/// What was proven when a connection was made.
#[derive(Clone)]
pub struct Proven {
    pub peer: SpiffeId,
    pub session: Arc<Session>,
    /// End of the certificate it was opened with: a renewed one opens a new connection.
    pub svid_until: SystemTime,
}

struct Idle {
    records: Box<Records>,
    proven: Proven,
    room: Room,
    since: Instant,
}

pub struct Pool {
    idle: Mutex<HashMap<PoolKey, Vec<Idle>>>,
    /// Connections, idle or not.
    open: Arc<AtomicUsize>,
    /// Zero: this transport is not wanted.
    most: usize,
}

/// One connection's share of what may be open.
pub struct Room(Arc<AtomicUsize>);

impl Drop for Room {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Where a connection goes when its stream has ended.
pub struct Place {
    pool: Arc<Pool>,
    key: PoolKey,
    proven: Proven,
    room: Room,
}

impl Place {
    pub(super) fn put(self, records: Box<Records>) {
        let idle = Idle {
            records,
            proven: self.proven,
            room: self.room,
            since: Instant::now(),
        };
        self.pool.lock().entry(self.key).or_default().push(idle);
    }
}

/// A connection that no stream is on.
pub struct Fresh {
    records: Box<Records>,
    proven: Proven,
    room: Room,
    /// There was one before.
    reused: bool,
}

impl Fresh {
    pub fn new(records: Box<Records>, proven: Proven, room: Room) -> Self {
        Self {
            records,
            proven,
            room,
            reused: false,
        }
    }
}

impl Pool {
    /// `most`: connections, idle or not.
    pub fn new(most: usize) -> Self {
        Self {
            idle: Mutex::default(),
            open: Arc::default(),
            most,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<PoolKey, Vec<Idle>>> {
        self.idle.lock().expect("no panic while it is held")
    }

    /// A free connection to this workload that still stands.
    pub fn take(&self, key: PoolKey, expected: &SpiffeId, svid_until: SystemTime) -> Option<Fresh> {
        loop {
            let idle = self.lock().get_mut(&key)?.pop()?;
            let fits = idle.proven.peer == *expected && idle.proven.svid_until == svid_until;
            if fits && idle.records.is_quiet() {
                return Some(Fresh {
                    records: idle.records,
                    proven: idle.proven,
                    room: idle.room,
                    reused: true,
                });
            }
        }
    }

    /// Room for one more connection, if there is.
    pub fn join(&self) -> Option<Room> {
        let room = |open| (open < self.most).then_some(open + 1);
        let joined = (self.open).fetch_update(Ordering::Relaxed, Ordering::Relaxed, room);
        joined.ok().map(|_| Room(self.open.clone()))
    }

    /// Opens a stream: its first bytes go with it, and its answer is waited for.
    pub async fn open(
        self: &Arc<Self>,
        key: PoolKey,
        fresh: Fresh,
        open: Open,
        first: &[u8],
    ) -> Result<Opened, NotOpened> {
        let Fresh {
            records,
            proven,
            room,
            reused,
        } = fresh;
        let place = Place {
            pool: self.clone(),
            key,
            proven: proven.clone(),
            room,
        };
        let mut stream = FastStream::new(records, Home::Pool(place));
        let answer = async {
            let (mut reader, mut writer) = stream.split();
            seal(&mut writer.outgoing, Kind::Open, &open.encode())?;
            for frame in first.chunks(super::MOST) {
                seal(&mut writer.outgoing, Kind::Data, frame)?;
            }
            writer.outgoing.flush().await?;
            poll_fn(|cx| reader.poll_answer(cx)).await
        };
        match answer.await {
            Ok(Ok(())) => Ok(Opened { stream, proven }),
            Ok(Err(status)) => {
                stream.is_over();
                Err(NotOpened::Refused(status))
            }
            Err(error) => Err(NotOpened::Broke { error, reused }),
        }
    }

    /// Closes what has been idle for this long, or is no longer good; and soon, what a burst
    /// of streams has left.
    pub fn sweep(&self, limit: Duration) {
        let mut old = Vec::new();
        self.lock().retain(|_, idle| {
            // The oldest are in front: streams take the latest.
            let mut surplus = idle.len().saturating_sub(KEPT);
            let ends = |idle: &mut Idle| {
                let limit = match surplus {
                    0 => limit,
                    _ => limit.min(SOON),
                };
                surplus = surplus.saturating_sub(1);
                idle.since.elapsed() >= limit || !idle.records.is_quiet()
            };
            old.extend(idle.extract_if(.., ends));
            !idle.is_empty()
        });
    }

    /// Connections, idle or not.
    pub fn count(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }
}

pub struct Opened {
    pub stream: FastStream,
    pub proven: Proven,
}

pub enum NotOpened {
    Refused(StatusCode),
    /// Without an answer.
    Broke {
        error: io::Error,
        reused: bool,
    },
}
