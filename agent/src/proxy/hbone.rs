//! HBONE, client side: HTTP/2 CONNECT over mutual TLS 1.3 to port 15008 of the
//! destination pod, from within the source pod's network namespace, so that network
//! policy and the destination see the pod's own address. Tunnels are pooled by
//! source pod and destination address.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use h2::{PingPong, client::SendRequest};
use http::{Method, Request, StatusCode, header::FORWARDED};
use rustls::pki_types::ServerName;
use tokio::{
    net::TcpStream,
    sync::Mutex as AsyncMutex,
    time::{sleep, timeout},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{HBONE_PORT, LocalPod, Proxy, dial, splice::End};
use crate::{
    audit::Fault,
    config::Transport,
    identity::{Session, SpiffeId, peer_identity},
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
            Self::Tunnel { .. } | Self::Broke(_) => Fault::Network,
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
pub struct Tunnels(Mutex<HashMap<Key, Arc<AsyncMutex<Slot>>>>);

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
        let mut use_ = self.tunnel.use_.lock().expect("no panic while it is held");
        use_.streams -= 1;
        use_.idle_since = Instant::now();
        self.proxy.metrics.streams.dec();
    }
}

/// An open stream to a destination.
pub struct Stream {
    pub end: End,
    pub session: Session,
    pub lease: Lease,
}

/// Opens a stream to an address of a workload of this identity.
pub async fn open(
    proxy: &Arc<Proxy>,
    pod: &Arc<LocalPod>,
    destination: SocketAddr,
    expected: &SpiffeId,
    client: SocketAddr,
) -> Result<Stream, HboneError> {
    // A tunnel may end between being picked and being used; the peer has not seen
    // the request then, so that a second try on a new tunnel is safe.
    let mut again = true;
    loop {
        let lease = lease(proxy, pod, destination, expected).await?;
        let tunnel = lease.tunnel.clone();
        match request(proxy, lease, destination, client).await {
            Err(HboneError::Broke(error)) if again && unprocessed(&error) => {
                // Old streams may go on for long on a tunnel that takes no new ones.
                tunnel
                    .use_
                    .lock()
                    .expect("no panic while it is held")
                    .closed = true;
                again = false;
            }
            result => return result,
        }
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
    let (response, send) = answered.await.map_err(|_elapsed| HboneError::Silent)??;
    match response.status() {
        StatusCode::OK => {
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
        status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
            Err(HboneError::Denied(status))
        }
        status => Err(HboneError::Status(status)),
    }
}

/// A place on a tunnel that stands, or on a new one. One at a time per destination.
async fn lease(
    proxy: &Arc<Proxy>,
    pod: &Arc<LocalPod>,
    destination: SocketAddr,
    expected: &SpiffeId,
) -> Result<Lease, HboneError> {
    let key = Key {
        pod: pod.serial,
        destination: destination.ip(),
    };
    let slot = {
        let mut slots = proxy.tunnels.0.lock().expect("no panic while it is held");
        slots.entry(key).or_default().clone()
    };
    let mut slot = slot.lock().await;
    slot.tunnels.retain(|tunnel| {
        !tunnel
            .use_
            .lock()
            .expect("no panic while it is held")
            .closed
    });
    let svid_until = pod.credentials.not_after();
    if svid_until <= SystemTime::now() {
        let reason = "the workload's certificate has expired and could not be renewed".into();
        return Err(HboneError::Tunnel {
            destination,
            reason,
        });
    }
    for tunnel in &slot.tunnels {
        if tunnel.peer == *expected
            && tunnel.svid_until == svid_until
            && tunnel.join(proxy.transport.streams_per_tunnel.0)
        {
            proxy.metrics.streams.inc();
            return Ok(Lease {
                tunnel: tunnel.clone(),
                proxy: proxy.clone(),
            });
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
    match establish(proxy, pod, destination, expected).await {
        Ok((tunnel, connection)) => {
            slot.failed = None;
            let tunnel = Arc::new(tunnel);
            tokio::spawn(drive(proxy.clone(), key, tunnel.clone(), connection));
            slot.tunnels.push(tunnel.clone());
            proxy.metrics.streams.inc();
            Ok(Lease {
                tunnel,
                proxy: proxy.clone(),
            })
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
    /// Takes a place, unless the tunnel is full or closed.
    fn join(&self, most: u32) -> bool {
        let mut use_ = self.use_.lock().expect("no panic while it is held");
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
            let mut use_ = self.use_.lock().expect("no panic while it is held");
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
    let connector = TlsConnector::from(pod.credentials.client.clone());
    let began = Instant::now();
    // The name is not sent and not checked: the SPIFFE ID is, below.
    let tls = timeout(
        limit,
        connector.connect(ServerName::IpAddress(destination.ip().into()), tcp),
    );
    let tls = tls
        .await
        .unwrap_or_else(|_elapsed| Err(std::io::ErrorKind::TimedOut.into()));
    let tls = tls.map_err(|error| {
        proxy.metrics.handshake("client_failed");
        refused(format!("TLS: {error}"))
    })?;
    proxy.metrics.handshake("client");
    proxy
        .metrics
        .handshake_seconds
        .observe(began.elapsed().as_secs_f64());
    let (_, connection) = tls.get_ref();
    let peer = connection
        .peer_certificates()
        .and_then(|chain| peer_identity(chain.first()?));
    if peer.as_ref() != Some(expected) {
        return Err(HboneError::WrongIdentity {
            destination,
            expected: expected.clone(),
            found: peer.map_or_else(|| "unknown".into(), |id| id.to_string()),
        });
    }
    let session = Session::of(connection);
    let (requests, connection) = h2::client::Builder::new()
        .initial_window_size(proxy.transport.stream_window.0)
        .initial_connection_window_size(proxy.transport.tunnel_window())
        .max_frame_size(64 << 10)
        .max_send_buffer_size(SEND_BUFFER)
        .enable_push(false)
        .handshake(tls)
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
    Ok((tunnel, connection))
}

type Driver = h2::client::Connection<TlsStream<TcpStream>, Bytes>;

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
    tunnel
        .use_
        .lock()
        .expect("no panic while it is held")
        .closed = true;
    proxy.tunnels.forget(key);
}

impl Tunnels {
    /// Lets go of a destination without tunnels. One that is being dialled stays.
    fn forget(&self, key: Key) {
        let mut slots = self.0.lock().expect("no panic while it is held");
        let empty = slots.get(&key).is_some_and(|slot| {
            slot.try_lock().is_ok_and(|mut slot| {
                slot.tunnels
                    .retain(|t| !t.use_.lock().expect("no panic while it is held").closed);
                slot.tunnels.is_empty()
            })
        });
        if empty {
            slots.remove(&key);
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
