//! To another node: mutual TLS 1.3 to port 15008 of the destination pod, from within the
//! source pod's network namespace, so that network policy and the destination see the
//! pod's own address. Another Postern gets a connection for each stream (`fast`), everybody
//! else HBONE: HTTP/2 CONNECT, on tunnels that are pooled by source pod and destination
//! address.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use h2::{PingPong, client::SendRequest};
use http::{Method, Request, StatusCode, header::FORWARDED};
use rustls::pki_types::ServerName;
use tokio::{
    sync::{Mutex as AsyncMutex, Semaphore},
    time::{sleep, timeout},
};

use super::{
    HBONE_PORT, LocalPod, Proxy, dial,
    fast::{self, Fresh, NotOpened, Open, Proven},
    splice::End,
    tls::{self, Records},
};
use crate::{
    audit::Fault,
    config::Transport,
    identity::{FAST, Session, SpiffeId, peer_identity},
};

#[derive(Debug, thiserror::Error)]
pub enum HboneError {
    #[error("no tunnel to {destination}: {reason}")]
    Tunnel {
        destination: SocketAddr,
        reason: String,
    },
    #[error("{destination} is {found} and not {expected}; nothing was sent")]
    WrongIdentity {
        destination: SocketAddr,
        expected: SpiffeId,
        found: String,
    },
    #[error("the tunnel broke before the destination answered: {0}")]
    Broke(#[from] h2::Error),
    #[error("the connection broke before the destination answered: {0}")]
    Ended(std::io::Error),
    #[error("the destination's agent did not answer in time")]
    Silent,
    #[error("refused by the destination's agent ({0})")]
    Denied(StatusCode),
    #[error("the destination's agent answered {0}")]
    Status(StatusCode),
}

impl HboneError {
    /// Whose doing it was.
    pub fn fault(&self) -> Fault {
        match self {
            Self::Tunnel { .. } | Self::Broke(_) | Self::Ended(_) => Fault::Network,
            Self::WrongIdentity { .. } | Self::Status(_) => Fault::Destination,
            Self::Silent => Fault::Agent,
            Self::Denied(_) => Fault::Policy,
        }
    }
}

/// What one stream may have waiting to be sent, bytes.
pub const SEND_BUFFER: usize = 256 << 10;

/// A failed attempt is not repeated for this long: callers that queued up behind it
/// share its outcome.
const RETRY_AFTER: Duration = Duration::from_millis(200);

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    /// [`LocalPod::serial`]: pods may share an identity, never a source address.
    pod: u64,
    destination: IpAddr,
}

#[derive(Default)]
pub struct Tunnels(Mutex<HashMap<Key, Arc<Destination>>>);

struct Destination {
    slot: AsyncMutex<Slot>,
    /// The agent there speaks as `fast` does; as far as is known.
    fast: AtomicBool,
    /// Handshakes with it at once, for streams that have found no free connection.
    shaking: Semaphore,
}

impl Default for Destination {
    fn default() -> Self {
        const AT_ONCE: usize = 8;
        Self {
            slot: AsyncMutex::default(),
            fast: AtomicBool::new(false),
            shaking: Semaphore::new(AT_ONCE),
        }
    }
}

#[derive(Default)]
struct Slot {
    tunnels: Vec<Arc<Tunnel>>,
    failed: Option<(Instant, String)>,
}

struct Tunnel {
    requests: SendRequest<Bytes>,
    peer: SpiffeId,
    session: Session,
    /// End of the certificate it was opened with: a renewed one opens a new tunnel.
    svid_until: SystemTime,
    use_: Mutex<Use>,
}

struct Use {
    streams: u32,
    idle_since: Instant,
    closed: bool,
}

/// A stream's place on its tunnel.
pub struct Lease {
    tunnel: Arc<Tunnel>,
    proxy: Arc<Proxy>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut use_ = self.tunnel.use_();
        use_.streams -= 1;
        use_.idle_since = Instant::now();
        self.proxy.metrics.streams.dec();
    }
}

/// An open stream to a destination.
pub struct Stream {
    pub end: End,
    pub session: Session,
    /// Of a tunnel that it shares.
    pub lease: Option<Lease>,
}

/// What a stream is carried by.
enum Carrier {
    Own(Fresh),
    Tunnel(Lease),
}

/// Opens a stream to an address of a workload of this identity. `first`: what is sent on it
/// at once.
pub async fn open(
    proxy: &Arc<Proxy>,
    pod: &Arc<LocalPod>,
    destination: SocketAddr,
    expected: &SpiffeId,
    client: SocketAddr,
    first: &[u8],
) -> Result<Stream, HboneError> {
    // What carries it may end between being picked and being used; the peer has not acted
    // on it then, so that a second try on a new one is safe.
    let mut again = true;
    loop {
        match carrier(proxy, pod, destination, expected, again).await? {
            Carrier::Own(fresh) => match own(proxy, pod, fresh, destination, client, first).await {
                Err((_, true)) if again => again = false,
                Err((error, _)) => return Err(error),
                Ok(stream) => return Ok(stream),
            },
            Carrier::Tunnel(lease) => {
                let tunnel = lease.tunnel.clone();
                match request(proxy, lease, destination, client, first).await {
                    Err(HboneError::Broke(error)) if again && unprocessed(&error) => {
                        // Old streams may go on for long on a tunnel that takes no new ones.
                        tunnel.use_().closed = true;
                        again = false;
                    }
                    result => return result,
                }
            }
        }
    }
}

/// Opens a stream that has a connection to itself. An error says whether the connection may
/// have been stale, so that nobody has seen the stream.
async fn own(
    proxy: &Arc<Proxy>,
    pod: &LocalPod,
    fresh: Fresh,
    destination: SocketAddr,
    client: SocketAddr,
    first: &[u8],
) -> Result<Stream, (HboneError, bool)> {
    let limit = proxy.transport.connect_timeout.0;
    let key = fast::PoolKey::new(pod.serial, destination.ip());
    let open = Open {
        destination,
        client,
    };
    let answered = timeout(limit, proxy.fast.open(key, fresh, open, first));
    match answered.await {
        Ok(Ok(opened)) => Ok(Stream {
            end: End::Fast(opened.stream),
            session: (*opened.proven.session).clone(),
            lease: None,
        }),
        Ok(Err(NotOpened::Refused(status))) => Err((refusal(status), false)),
        Ok(Err(NotOpened::Broke { error, reused })) => Err((HboneError::Ended(error), reused)),
        Err(_elapsed) => Err((HboneError::Silent, false)),
    }
}

fn refusal(status: StatusCode) -> HboneError {
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => HboneError::Denied(status),
        status => HboneError::Status(status),
    }
}

fn unprocessed(error: &h2::Error) -> bool {
    error.is_go_away() || error.reason() == Some(h2::Reason::REFUSED_STREAM)
}

async fn request(
    proxy: &Arc<Proxy>,
    lease: Lease,
    destination: SocketAddr,
    client: SocketAddr,
    first: &[u8],
) -> Result<Stream, HboneError> {
    let limit = proxy.transport.connect_timeout.0;
    let request = Request::builder()
        .method(Method::CONNECT)
        .uri(destination.to_string())
        .header(FORWARDED, format!("for=\"{client}\""))
        .body(())
        .expect("an address is an authority");
    let answered = timeout(limit, async {
        let mut requests = lease.tunnel.requests.clone().ready().await?;
        let (response, send) = requests.send_request(request, false)?;
        Ok::<_, h2::Error>((response.await?, send))
    });
    let (response, mut send) = answered.await.map_err(|_elapsed| HboneError::Silent)??;
    match response.status() {
        StatusCode::OK => {
            if !first.is_empty() {
                send.send_data(Bytes::copy_from_slice(first), false)?;
            }
            let end = End::Stream {
                send,
                recv: response.into_body(),
            };
            Ok(Stream {
                end,
                session: lease.tunnel.session.clone(),
                lease: Some(lease),
            })
        }
        status => Err(refusal(status)),
    }
}

/// A connection of its own, or a place on a tunnel; one that stands, or a new one.
async fn carrier(
    proxy: &Arc<Proxy>,
    pod: &Arc<LocalPod>,
    destination: SocketAddr,
    expected: &SpiffeId,
    reuse: bool,
) -> Result<Carrier, HboneError> {
    let svid_until = pod.credentials.not_after();
    if svid_until <= SystemTime::now() {
        let reason = "the workload's certificate has expired and could not be renewed".into();
        return Err(HboneError::Tunnel {
            destination,
            reason,
        });
    }
    let free = || {
        let key = fast::PoolKey::new(pod.serial, destination.ip());
        (proxy.fast.take(key, expected, svid_until)).map(Carrier::Own)
    };
    if reuse && let Some(free) = free() {
        return Ok(free);
    }
    let key = Key {
        pod: pod.serial,
        destination: destination.ip(),
    };
    let to = {
        let mut all = proxy.tunnels.0.lock().expect("no panic while it is held");
        all.entry(key).or_default().clone()
    };
    if to.fast.load(Ordering::Relaxed)
        && let Some(room) = proxy.fast.join()
    {
        let _turn = to.shaking.acquire().await.expect("never closed");
        if reuse && let Some(free) = free() {
            return Ok(free);
        }
        return match establish(proxy, pod, destination, expected, Some(room)).await {
            Ok(Established::Own(fresh)) => Ok(Carrier::Own(fresh)),
            // Another agent is there now.
            Ok(Established::Tunnel(tunnel, driver)) => {
                to.fast.store(false, Ordering::Relaxed);
                let mut slot = to.slot.lock().await;
                Ok(Carrier::Tunnel(slot.add(proxy, key, *tunnel, *driver)))
            }
            Err(error) => {
                // The next ones learn together what is there.
                to.fast.store(false, Ordering::Relaxed);
                Err(error)
            }
        };
    }
    lease(proxy, pod, destination, expected, (key, &to)).await
}

/// A place on a tunnel that stands, or on a new one; or, of an agent that was not known
/// before, a connection. One at a time per destination.
async fn lease(
    proxy: &Arc<Proxy>,
    pod: &Arc<LocalPod>,
    destination: SocketAddr,
    expected: &SpiffeId,
    (key, to): (Key, &Arc<Destination>),
) -> Result<Carrier, HboneError> {
    let mut slot = to.slot.lock().await;
    let room = match to.fast.load(Ordering::Relaxed) {
        // It has turned out meanwhile.
        true => proxy.fast.join(),
        false => None,
    };
    if let Some(room) = room {
        drop(slot);
        let _turn = to.shaking.acquire().await.expect("never closed");
        return match establish(proxy, pod, destination, expected, Some(room)).await? {
            Established::Own(fresh) => Ok(Carrier::Own(fresh)),
            Established::Tunnel(tunnel, driver) => {
                let mut slot = to.slot.lock().await;
                Ok(Carrier::Tunnel(slot.add(proxy, key, *tunnel, *driver)))
            }
        };
    }
    slot.tunnels.retain(|tunnel| !tunnel.use_().closed);
    let svid_until = pod.credentials.not_after();
    for tunnel in &slot.tunnels {
        if tunnel.peer == *expected
            && tunnel.svid_until == svid_until
            && tunnel.join(proxy.transport.streams_per_tunnel.0)
        {
            proxy.metrics.streams.inc();
            return Ok(Carrier::Tunnel(Lease {
                tunnel: tunnel.clone(),
                proxy: proxy.clone(),
            }));
        }
    }
    let refused = |reason| HboneError::Tunnel {
        destination,
        reason,
    };
    if let Some((at, reason)) = &slot.failed
        && at.elapsed() < RETRY_AFTER
    {
        return Err(refused(reason.clone()));
    }
    match establish(proxy, pod, destination, expected, proxy.fast.join()).await {
        Ok(Established::Own(fresh)) => {
            slot.failed = None;
            to.fast.store(true, Ordering::Relaxed);
            Ok(Carrier::Own(fresh))
        }
        Ok(Established::Tunnel(tunnel, driver)) => {
            Ok(Carrier::Tunnel(slot.add(proxy, key, *tunnel, *driver)))
        }
        Err(error) => {
            if let HboneError::Tunnel { reason, .. } = &error {
                slot.failed = Some((Instant::now(), reason.clone()));
            }
            drop(slot);
            proxy.tunnels.forget(key);
            Err(error)
        }
    }
}

impl Slot {
    /// A tunnel whose first stream is its caller's.
    fn add(&mut self, proxy: &Arc<Proxy>, key: Key, tunnel: Tunnel, driver: Driver) -> Lease {
        self.failed = None;
        let tunnel = Arc::new(tunnel);
        tokio::spawn(drive(proxy.clone(), key, tunnel.clone(), driver));
        self.tunnels.push(tunnel.clone());
        proxy.metrics.streams.inc();
        Lease {
            tunnel,
            proxy: proxy.clone(),
        }
    }
}

impl Tunnel {
    fn use_(&self) -> MutexGuard<'_, Use> {
        self.use_.lock().expect("no panic while it is held")
    }

    /// Takes a place, unless the tunnel is full or closed.
    fn join(&self, most: u32) -> bool {
        let mut use_ = self.use_();
        // The peer may allow fewer than we would open.
        let allowed = self.requests.current_max_send_streams();
        let most = most.min(u32::try_from(allowed).unwrap_or(u32::MAX));
        let room = !use_.closed && use_.streams < most;
        if room {
            use_.streams += 1;
        }
        room
    }

    /// Returns when nobody has used the tunnel for this long; it is closed then.
    async fn idle(&self, limit: Duration) {
        let mut wait = limit;
        loop {
            sleep(wait).await;
            let mut use_ = self.use_();
            let idle = use_.idle_since.elapsed();
            if use_.streams == 0 && idle >= limit {
                use_.closed = true;
                return;
            }
            wait = if use_.streams == 0 {
                limit - idle
            } else {
                limit
            };
        }
    }
}

/// What a new connection is, as both sides agreed.
enum Established {
    Own(Fresh),
    Tunnel(Box<Tunnel>, Box<Driver>),
}

/// Connects, shakes hands and makes sure who answered. Joined by its caller. `room`: it may
/// be a connection for one stream at a time.
async fn establish(
    proxy: &Arc<Proxy>,
    pod: &Arc<LocalPod>,
    destination: SocketAddr,
    expected: &SpiffeId,
    room: Option<fast::Room>,
) -> Result<Established, HboneError> {
    let refused = |reason: String| HboneError::Tunnel {
        destination,
        reason,
    };
    let limit = proxy.transport.connect_timeout.0;
    let gate = SocketAddr::new(destination.ip(), HBONE_PORT);
    let tcp = dial(&pod.netns, None, gate, limit)
        .await
        .map_err(|e| refused(e.to_string()))?;
    let svid_until = pod.credentials.not_after();
    let config = match room {
        Some(_) => &pod.credentials.fast_client,
        None => &pod.credentials.client,
    };
    let began = Instant::now();
    // The name is not sent and not checked: the SPIFFE ID is, below.
    let name = ServerName::IpAddress(destination.ip().into());
    let shaken = timeout(limit, Box::pin(tls::connect(tcp, config.clone(), name)));
    let shaken = shaken
        .await
        .unwrap_or_else(|_elapsed| Err(std::io::ErrorKind::TimedOut.into()));
    let shaken = shaken.map_err(|error| {
        proxy.metrics.handshake("client_failed");
        refused(format!("TLS: {error}"))
    })?;
    proxy.metrics.handshake("client");
    proxy
        .metrics
        .handshake_seconds
        .observe(began.elapsed().as_secs_f64());
    let peer = peer_identity(&shaken.leaf);
    if peer.as_ref() != Some(expected) {
        return Err(HboneError::WrongIdentity {
            destination,
            expected: expected.clone(),
            found: peer.map_or_else(|| "unknown".into(), |id| id.to_string()),
        });
    }
    let session = shaken.session;
    if let Some(room) = room
        && shaken.protocol.as_deref() == Some(FAST)
    {
        fast::keep_alive(&shaken.records, &proxy.transport);
        let proven = Proven {
            peer: expected.clone(),
            session: Arc::new(session),
            svid_until,
        };
        return Ok(Established::Own(Fresh::new(shaken.records, proven, room)));
    }
    let (requests, connection) = h2::client::Builder::new()
        .initial_window_size(proxy.transport.stream_window.0)
        .initial_connection_window_size(proxy.transport.tunnel_window())
        .max_frame_size(64 << 10)
        .max_send_buffer_size(SEND_BUFFER)
        .enable_push(false)
        .handshake(shaken.records)
        .await
        .map_err(|e| refused(e.to_string()))?;
    let use_ = Mutex::new(Use {
        streams: 1,
        idle_since: Instant::now(),
        closed: false,
    });
    let tunnel = Tunnel {
        requests,
        peer: expected.clone(),
        session,
        svid_until,
        use_,
    };
    Ok(Established::Tunnel(Box::new(tunnel), Box::new(connection)))
}

type Driver = h2::client::Connection<Box<Records>, Bytes>;

/// Runs a tunnel until it breaks, its peer falls silent, or nobody uses it.
async fn drive(proxy: Arc<Proxy>, key: Key, tunnel: Arc<Tunnel>, mut connection: Driver) {
    let pings = connection.ping_pong().expect("taken once");
    proxy.metrics.tunnels.inc();
    let reason = tokio::select! {
        result = connection => result.err().map_or("closed".into(), |e| e.to_string()),
        () = keepalive(pings, &proxy.transport) => "keepalive was not answered".into(),
        () = tunnel.idle(proxy.transport.idle_timeout.0) => "idle".into(),
    };
    tracing::debug!(peer = %tunnel.peer, destination = %key.destination, reason, "tunnel ended");
    proxy.metrics.tunnels.dec();
    tunnel.use_().closed = true;
    proxy.tunnels.forget(key);
}

impl Tunnels {
    /// Lets go of a destination without tunnels. One that is being dialled stays.
    fn forget(&self, key: Key) {
        let mut all = self.0.lock().expect("no panic while it is held");
        if all.get(&key).is_some_and(|to| to.is_unused()) {
            all.remove(&key);
        }
    }

    /// The same, of all.
    fn forget_unused(&self) {
        let mut all = self.0.lock().expect("no panic while it is held");
        all.retain(|_, to| !to.is_unused());
    }
}

impl Destination {
    fn is_unused(self: &Arc<Self>) -> bool {
        // One that is in use is learnt anew, if it must be.
        Arc::strong_count(self) == 1
            && self.slot.try_lock().is_ok_and(|mut slot| {
                slot.tunnels.retain(|tunnel| !tunnel.use_().closed);
                slot.tunnels.is_empty()
            })
    }
}

/// Closes connections that nobody has used for long. Ends with the agent.
pub async fn sweep(proxy: Arc<Proxy>) {
    const EVERY: Duration = Duration::from_secs(1);
    const FORGET_EVERY: u32 = 60;
    for round in 1_u32.. {
        sleep(EVERY).await;
        proxy.fast.sweep(proxy.transport.idle_timeout.0);
        if round % FORGET_EVERY == 0 {
            proxy.tunnels.forget_unused();
        }
    }
}

/// Returns when the peer does not answer a ping in time.
pub async fn keepalive(mut pings: PingPong, transport: &Transport) {
    loop {
        sleep(transport.keepalive_interval.0).await;
        let answer = timeout(
            transport.keepalive_timeout.0,
            pings.ping(h2::Ping::opaque()),
        );
        if !matches!(answer.await, Ok(Ok(_))) {
            return;
        }
    }
}
