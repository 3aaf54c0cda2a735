//! To another node: mutual TLS 1.3 to port 15008 of the destination pod, from within the
//! source pod's network namespace, so that network policy and the destination see the
//! pod's own address. With another Postern it is a lane (`fast`), with everybody else HBONE:
//! HTTP/2 CONNECT. Both are tunnels, which are pooled by source pod and destination address.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use h2::{PingPong, client::SendRequest};
use http::{Method, Request, StatusCode, header::FORWARDED};
use rustls::pki_types::ServerName;
use tokio::{
    sync::Mutex as AsyncMutex,
    time::{sleep, timeout},
};

use super::{
    HBONE_PORT, LocalPod, Proxy, dial,
    fast::{self, FastStream, Lane, NotOpened, Open},
    splice::End,
    tls::{self, Records},
    workers,
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

    /// Whether the peer has not acted on the stream.
    fn is_unseen(&self) -> bool {
        match self {
            Self::Broke(error) => {
                error.is_go_away() || error.reason() == Some(h2::Reason::REFUSED_STREAM)
            }
            Self::Ended(_) => true,
            _ => false,
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
    /// A tunnel is used by the thread that has made it.
    worker: usize,
    /// [`LocalPod::serial`]: pods may share an identity, never a source address.
    pod: u64,
    destination: IpAddr,
}

#[derive(Default)]
pub struct Tunnels(Mutex<HashMap<Key, Arc<Destination>>>);

#[derive(Default)]
struct Destination(AsyncMutex<Slot>);

#[derive(Default)]
struct Slot {
    tunnels: Vec<Arc<Tunnel>>,
    failed: Option<(Instant, String)>,
}

struct Tunnel {
    wire: Wire,
    peer: SpiffeId,
    session: Arc<Session>,
    /// End of the certificate it was opened with: a renewed one opens a new tunnel.
    svid_until: SystemTime,
    use_: Mutex<Use>,
}

/// What both sides speak.
enum Wire {
    Hbone(SendRequest<Bytes>),
    Lane(Arc<Lane>),
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

impl Lease {
    /// Of a place that was taken.
    fn new(proxy: &Arc<Proxy>, tunnel: Arc<Tunnel>) -> Self {
        proxy.metrics.streams.inc();
        Self {
            tunnel,
            proxy: proxy.clone(),
        }
    }
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
    pub session: Arc<Session>,
    pub lease: Lease,
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
    // A tunnel may end between being picked and being used; the peer has not acted on the
    // stream then, so that a second try on a new one is safe.
    let mut again = true;
    loop {
        let lease = lease(proxy, pod, destination, expected).await?;
        let tunnel = lease.tunnel.clone();
        let opened = match &tunnel.wire {
            Wire::Lane(lane) => {
                let open = Open {
                    destination,
                    client,
                };
                ride(proxy, lane, lease, open, first).await
            }
            Wire::Hbone(requests) => {
                let requests = requests.clone();
                request(proxy, requests, lease, destination, client, first).await
            }
        };
        match opened {
            Err(error) if again && error.is_unseen() => {
                // Old streams may go on for long on a tunnel that takes no new ones.
                tunnel.use_().closed = true;
                again = false;
            }
            result => return result,
        }
    }
}

/// Opens a stream of a lane.
async fn ride(
    proxy: &Proxy,
    lane: &Arc<Lane>,
    lease: Lease,
    open: Open,
    first: &[u8],
) -> Result<Stream, HboneError> {
    let limit = proxy.transport.connect_timeout.0;
    match timeout(limit, FastStream::open(lane, open, first)).await {
        Ok(Ok(stream)) => Ok(Stream {
            end: End::Fast(stream),
            session: lease.tunnel.session.clone(),
            lease,
        }),
        Ok(Err(NotOpened::Refused(status))) => Err(refusal(status)),
        Ok(Err(NotOpened::Broke(error))) => Err(HboneError::Ended(error)),
        Err(_elapsed) => Err(HboneError::Silent),
    }
}

fn refusal(status: StatusCode) -> HboneError {
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => HboneError::Denied(status),
        status => HboneError::Status(status),
    }
}

async fn request(
    proxy: &Proxy,
    requests: SendRequest<Bytes>,
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
        let mut requests = requests.ready().await?;
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
                lease,
            })
        }
        status => Err(refusal(status)),
    }
}

/// A place on a tunnel that stands, or on a new one. One at a time per destination.
async fn lease(
    proxy: &Arc<Proxy>,
    pod: &Arc<LocalPod>,
    destination: SocketAddr,
    expected: &SpiffeId,
) -> Result<Lease, HboneError> {
    let refused = |reason| HboneError::Tunnel {
        destination,
        reason,
    };
    let svid_until = pod.credentials.not_after();
    if svid_until <= SystemTime::now() {
        let reason = "the workload's certificate has expired and could not be renewed";
        return Err(refused(reason.into()));
    }
    let key = Key {
        worker: workers::current(),
        pod: pod.serial,
        destination: destination.ip(),
    };
    let to = {
        let mut all = proxy.tunnels.0.lock().expect("no panic while it is held");
        all.entry(key).or_default().clone()
    };
    let mut slot = to.0.lock().await;
    slot.tunnels.retain(|tunnel| !tunnel.use_().closed);
    for tunnel in &slot.tunnels {
        if tunnel.peer == *expected
            && tunnel.svid_until == svid_until
            && tunnel.join(proxy.transport.streams_per_tunnel.0)
        {
            return Ok(Lease::new(proxy, tunnel.clone()));
        }
    }
    if let Some((at, reason)) = &slot.failed
        && at.elapsed() < RETRY_AFTER
    {
        return Err(refused(reason.clone()));
    }
    match establish(proxy, pod, destination, expected).await {
        Ok((tunnel, driver)) => {
            slot.failed = None;
            let tunnel = Arc::new(tunnel);
            tokio::spawn(Box::pin(drive(proxy.clone(), key, tunnel.clone(), driver)));
            slot.tunnels.push(tunnel.clone());
            Ok(Lease::new(proxy, tunnel))
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

impl Tunnel {
    fn use_(&self) -> MutexGuard<'_, Use> {
        self.use_.lock().expect("no panic while it is held")
    }

    /// Takes a place, unless the tunnel is full or closed.
    fn join(&self, most: u32) -> bool {
        let mut use_ = self.use_();
        // The peer may allow fewer than we would open.
        let most = match &self.wire {
            Wire::Hbone(requests) => {
                let allowed = requests.current_max_send_streams();
                most.min(u32::try_from(allowed).unwrap_or(u32::MAX))
            }
            Wire::Lane(_) => most,
        };
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

/// Connects, shakes hands and makes sure who answered. Joined by its caller.
async fn establish(
    proxy: &Arc<Proxy>,
    pod: &Arc<LocalPod>,
    destination: SocketAddr,
    expected: &SpiffeId,
) -> Result<(Tunnel, Driver), HboneError> {
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
    let config = match proxy.transport.fast_path {
        true => &pod.credentials.fast_client,
        false => &pod.credentials.client,
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
    let (wire, driver) = match shaken.protocol.as_deref() == Some(FAST) {
        true => {
            let lane = Lane::new(&proxy.transport);
            let driver = fast::Driver::dialled(lane.clone(), shaken.records);
            (Wire::Lane(lane.clone()), Driver::Lane(lane, driver))
        }
        false => {
            let (requests, connection) = h2::client::Builder::new()
                .initial_window_size(proxy.transport.stream_window.0)
                .initial_connection_window_size(proxy.transport.tunnel_window())
                .max_frame_size(64 << 10)
                .max_send_buffer_size(SEND_BUFFER)
                .enable_push(false)
                .handshake(shaken.records)
                .await
                .map_err(|e| refused(e.to_string()))?;
            (Wire::Hbone(requests), Driver::Hbone(Box::new(connection)))
        }
    };
    let use_ = Mutex::new(Use {
        streams: 1,
        idle_since: Instant::now(),
        closed: false,
    });
    let tunnel = Tunnel {
        wire,
        peer: expected.clone(),
        session: Arc::new(shaken.session),
        svid_until,
        use_,
    };
    Ok((tunnel, driver))
}

/// The connection below a tunnel.
enum Driver {
    Hbone(Box<h2::client::Connection<Box<Records>, Bytes>>),
    Lane(Arc<Lane>, fast::Driver),
}

impl Driver {
    /// Runs it until it ends, and says why.
    async fn run(self, tunnel: &Tunnel, transport: &Transport) -> String {
        const SILENT: &str = "keepalive was not answered";
        match self {
            Self::Lane(lane, driver) => tokio::select! {
                reason = ridden(driver, tunnel) => reason,
                () = lane.silent(transport) => SILENT.into(),
            },
            Self::Hbone(mut connection) => {
                let pings = connection.ping_pong().expect("taken once");
                tokio::select! {
                    result = connection => result.err().map_or("closed".into(), |e| e.to_string()),
                    () = keepalive(pings, transport) => SILENT.into(),
                }
            }
        }
    }
}

async fn ridden(mut driver: fast::Driver, tunnel: &Tunnel) -> String {
    loop {
        match driver.run().await {
            Ok(fast::Event::Leaves) => tunnel.use_().closed = true,
            Ok(_) => return "the destination has left".into(),
            Err(error) => return error.to_string(),
        }
    }
}

/// Runs a tunnel until it breaks, its peer falls silent, or nobody uses it.
async fn drive(proxy: Arc<Proxy>, key: Key, tunnel: Arc<Tunnel>, driver: Driver) {
    proxy.metrics.tunnels.inc();
    let reason = tokio::select! {
        reason = driver.run(&tunnel, &proxy.transport) => reason,
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
            && self.0.try_lock().is_ok_and(|mut slot| {
                slot.tunnels.retain(|tunnel| !tunnel.use_().closed);
                slot.tunnels.is_empty()
            })
    }
}

/// Forgets destinations. Ends with the agent.
pub async fn sweep(proxy: Arc<Proxy>) {
    const EVERY: Duration = Duration::from_secs(60);
    loop {
        sleep(EVERY).await;
        proxy.tunnels.forget_unused();
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
