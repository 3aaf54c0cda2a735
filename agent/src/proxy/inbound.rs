//! What comes to a pod from outside its node's mesh: HBONE on 15008 and plaintext
//! on every other port, handed here by `sk_lookup`.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use h2::{RecvStream, server::SendResponse};
use http::{Method, Request, StatusCode, header::FORWARDED};
use tokio::{
    net::TcpStream,
    time::{Sleep, sleep, timeout},
};

use super::{
    LocalPod, Proxy,
    deliver::{Arrived, Delivery},
    fast::{Driver, Event, Lane},
    hbone::{SEND_BUFFER, keepalive},
    is_agent_port, look, reset,
    splice::End,
    story::{Ending, Story},
    tls::{self, Records},
};
use crate::{
    audit::{Fault, Reporter, Transport},
    identity::{FAST, Session, SpiffeId, fingerprint, peer_identity, valid_for},
    lifecycle::{Held, Watcher},
    policy::Facts,
};

/// Size of a request's headers; ours have two.
const MAX_HEADERS: u32 = 16 << 10;

/// Carries a plaintext connection, if PeerAuthentication and policy let it.
pub async fn plaintext(
    proxy: Arc<Proxy>,
    pod: Arc<LocalPod>,
    stream: TcpStream,
    client: SocketAddr,
    drain: Watcher,
) {
    // sk_lookup keeps the address that was dialled.
    let Ok(dialled) = stream.local_addr() else {
        return reset(stream);
    };
    let (client, dialled) = (canonical(client), canonical(dialled));
    if dialled.ip().is_loopback() || is_agent_port(dialled.port()) {
        reset(stream);
        let mut story = Story::new(
            &proxy,
            Reporter::Destination,
            Transport::Plaintext,
            client,
            dialled,
        );
        story.destination.workload = Some(pod.workload.load_full());
        return story.finish(Ending::Refused(
            Fault::Source,
            "not handed over here by the kernel".into(),
        ));
    }
    let _ = stream.set_nodelay(true);
    let probe = proxy.kernel.is_probe(client, dialled);
    let transport = if probe {
        Transport::Probe
    } else {
        Transport::Plaintext
    };
    let mut story = Story::new(&proxy, Reporter::Destination, transport, client, dialled);
    story.source.workload = match probe {
        true => proxy.table.load().pod(client.ip()).cloned(),
        false => look::client(&proxy, client.ip()).await,
    };
    story.destination.identity = Some(pod.identity().clone());
    story.destination.workload = Some(pod.workload.load_full());
    let delivery = Delivery {
        proxy: &proxy,
        pod: &pod,
        facts: Facts::new(None, client.ip(), dialled),
        client,
        story: &mut story,
        attacher: None,
        drain,
    };
    let end = End::Tcp(stream);
    let ending = match probe {
        true => delivery.unjudged(end).await,
        false => delivery.run(Arrived::Open(end)).await,
    };
    story.finish(ending);
}

/// Serves one tunnel from another node's agent.
pub async fn tunnel(
    proxy: Arc<Proxy>,
    pod: Arc<LocalPod>,
    stream: TcpStream,
    client: SocketAddr,
    drain: Watcher,
) {
    let client = canonical(client);
    let limit = proxy.transport.connect_timeout.0;
    let _ = stream.set_nodelay(true);
    // Before its handshake a peer is nobody: so many of them, and no more.
    let Ok(handshake) = proxy.handshakes.try_acquire() else {
        proxy.metrics.handshake("server_turned_away");
        return reset(stream);
    };
    let config = match proxy.transport.fast_path {
        true => &pod.credentials.fast_server,
        false => &pod.credentials.server,
    };
    let shaken = match timeout(limit, Box::pin(tls::accept(stream, config.clone()))).await {
        Ok(Ok(shaken)) => shaken,
        failed => {
            proxy.metrics.handshake("server_failed");
            let why = match failed {
                Ok(Err(error)) => format!("TLS: {error}"),
                _ => "the TLS handshake took too long".into(),
            };
            let Some(own) = pod.address_like(client.ip()) else {
                return;
            };
            let dialled = SocketAddr::new(own, super::HBONE_PORT);
            let mut story = Story::new(
                &proxy,
                Reporter::Destination,
                Transport::Hbone,
                client,
                dialled,
            );
            story.source.workload = proxy.table.load().pod(client.ip()).cloned();
            story.destination.identity = Some(pod.identity().clone());
            story.destination.workload = Some(pod.workload.load_full());
            return story.finish(Ending::Failed(Fault::Source, why));
        }
    };
    drop(handshake);
    proxy.metrics.handshake("server");
    let Some(peer) = peer_identity(&shaken.leaf) else {
        return;
    };
    let expired = sleep(valid_for(&shaken.leaf));
    let caller = Caller {
        peer,
        certificate: fingerprint(&shaken.leaf),
        session: Arc::new(shaken.session),
        address: client,
    };
    match shaken.protocol.as_deref() == Some(FAST) {
        true => Box::pin(lane(proxy, pod, caller, shaken.records, expired, drain)).await,
        false => Box::pin(hbone(proxy, pod, caller, shaken.records, expired, drain)).await,
    }
}

/// Serves a lane.
async fn lane(
    proxy: Arc<Proxy>,
    pod: Arc<LocalPod>,
    caller: Caller,
    records: Box<Records>,
    expired: Sleep,
    drain: Watcher,
) {
    /// How long a stream may still come that was on its way when this side left.
    const CROSSING: Duration = Duration::from_millis(100);
    let caller = Arc::new(caller);
    let lane = Lane::new(&proxy.transport);
    let mut driver = Driver::accepted(lane.clone(), records);
    let silent = lane.silent(&proxy.transport);
    tokio::pin!(silent, expired);
    let mut left = false;
    loop {
        let event = tokio::select! {
            event = driver.run() => event,
            () = &mut silent => return,
            // The source ends it, as soon as its streams have ended; or does not.
            () = lane.unused(CROSSING), if left => return,
            () = async { tokio::select! {
                () = &mut expired => {}
                () = drain.triggered() => {}
            }}, if !left => {
                lane.leave();
                left = true;
                continue;
            }
        };
        match event {
            Ok(Event::Offered(stream, open)) => {
                let (proxy, pod, caller) = (proxy.clone(), pod.clone(), caller.clone());
                let offer = Offer {
                    destination: Some(canonical(open.destination)),
                    asked: open.destination.to_string(),
                    client: Some(canonical(open.client)),
                    arrived: Arrived::Offered(stream),
                };
                let serve = stream_of(proxy, pod, caller, offer, drain.clone());
                // A task's future is moved about, and this is large.
                tokio::spawn(Box::pin(Held::new(serve, drain.clone())));
            }
            Ok(Event::Leaves | Event::Over) => return,
            Err(error) => {
                tracing::debug!(client = %caller.address, %error, "lane ended");
                return;
            }
        }
    }
}

/// Serves one tunnel.
async fn hbone(
    proxy: Arc<Proxy>,
    pod: Arc<LocalPod>,
    caller: Caller,
    records: Box<Records>,
    expired: Sleep,
    drain: Watcher,
) {
    let (client, limit) = (caller.address, proxy.transport.connect_timeout.0);
    let caller = Arc::new(caller);
    let handshake = h2::server::Builder::new()
        .initial_window_size(proxy.transport.stream_window.0)
        .initial_connection_window_size(proxy.transport.tunnel_window())
        .max_frame_size(64 << 10)
        .max_send_buffer_size(SEND_BUFFER)
        .max_concurrent_streams(proxy.transport.streams_per_tunnel.0)
        .max_header_list_size(MAX_HEADERS)
        .handshake(records);
    let Ok(Ok(mut connection)) = timeout(limit, handshake).await else {
        return;
    };
    let pings = connection.ping_pong().expect("taken once");
    let keepalive = keepalive(pings, &proxy.transport);
    tokio::pin!(keepalive, expired);
    let mut draining = false;
    loop {
        let accepted = tokio::select! {
            accepted = connection.accept() => accepted,
            () = &mut keepalive => return,
            // GOAWAY: streams that stand go on, new ones need a new tunnel.
            () = &mut expired, if !draining => {
                connection.graceful_shutdown();
                draining = true;
                continue;
            }
            () = drain.triggered(), if !draining => {
                connection.graceful_shutdown();
                draining = true;
                continue;
            }
        };
        match accepted {
            Some(Ok((request, respond))) => {
                let (proxy, pod, caller) = (proxy.clone(), pod.clone(), caller.clone());
                let offer = Offer::of(request, respond);
                let serve = stream_of(proxy, pod, caller, offer, drain.clone());
                // A task's future is moved about, and this is large.
                tokio::spawn(Box::pin(Held::new(serve, drain.clone())));
            }
            Some(Err(error)) => {
                tracing::debug!(%client, %error, "tunnel ended");
                return;
            }
            None => return,
        }
    }
}

/// Who is at the other end of a tunnel.
struct Caller {
    peer: SpiffeId,
    /// SHA-256 of its certificate.
    certificate: [u8; 32],
    session: Arc<Session>,
    address: SocketAddr,
}

/// A stream that a peer wants to open.
struct Offer {
    /// `None`: it asks for something else than a CONNECT to an address.
    destination: Option<SocketAddr>,
    /// In its own words.
    asked: String,
    /// Who the source's agent says is the client.
    client: Option<SocketAddr>,
    arrived: Arrived,
}

impl Offer {
    fn of(request: Request<RecvStream>, respond: SendResponse<Bytes>) -> Self {
        let authority = request.uri().authority();
        let authority = authority.and_then(|a| a.as_str().parse::<SocketAddr>().ok());
        let is_connect = request.method() == Method::CONNECT;
        Self {
            destination: authority.map(canonical).filter(|_| is_connect),
            asked: format!("{} {}", request.method(), request.uri()),
            client: forwarded(&request),
            arrived: Arrived::Asked {
                body: request.into_body(),
                respond,
            },
        }
    }
}

/// Carries one stream, if everything about it is right.
fn stream_of(
    proxy: Arc<Proxy>,
    pod: Arc<LocalPod>,
    caller: Arc<Caller>,
    offer: Offer,
    drain: Watcher,
) -> impl Future<Output = ()> {
    // What this takes is not to be kept as long as the stream lasts.
    let examined = {
        let (proxy, pod) = (proxy.clone(), pod.clone());
        Box::pin(async move { examine(&proxy, &pod, &caller, offer).await })
    };
    async move {
        let Some(Examined {
            mut story,
            facts,
            client,
            arrived,
        }) = examined.await
        else {
            return;
        };
        let delivery = Delivery {
            proxy: &proxy,
            pod: &pod,
            facts,
            client,
            story: &mut story,
            attacher: None,
            drain,
        };
        let ending = delivery.run(arrived).await;
        story.finish(ending);
    }
}

/// A stream that asks for what there is, from somebody who may ask.
struct Examined {
    story: Story,
    facts: Facts,
    client: SocketAddr,
    arrived: Arrived,
}

/// `None`: it was refused.
async fn examine(
    proxy: &Arc<Proxy>,
    pod: &Arc<LocalPod>,
    caller: &Caller,
    offer: Offer,
) -> Option<Examined> {
    let Offer {
        destination,
        asked,
        client,
        arrived,
    } = offer;
    let meant = |a: &SocketAddr| pod.has_address(a.ip()) && !is_agent_port(a.port());
    let Some(destination) = destination.filter(meant) else {
        arrived.refuse(StatusCode::BAD_REQUEST);
        let own = pod.address_like(caller.address.ip())?;
        let gate = SocketAddr::new(own, super::HBONE_PORT);
        let mut story = Story::new(
            proxy,
            Reporter::Destination,
            Transport::Hbone,
            caller.address,
            gate,
        );
        story.tls = Some(caller.session.clone());
        story.source.identity = Some(caller.peer.clone());
        story.destination.workload = Some(pod.workload.load_full());
        // It is the peer's word: shortened, and escaped where it is written.
        let asked: String = asked.chars().take(100).collect();
        let why = format!("{asked:?} is not a CONNECT to this workload");
        story.finish(Ending::Refused(Fault::Source, why));
        return None;
    };
    // Believed only as far as the packets' own source confirms it.
    let client = client
        .filter(|claimed| claimed.ip() == caller.address.ip())
        .unwrap_or(caller.address);
    let mut story = Story::new(
        proxy,
        Reporter::Destination,
        Transport::Hbone,
        client,
        destination,
    );
    story.tls = Some(caller.session.clone());
    story.source.identity = Some(caller.peer.clone());
    story.source.workload = look::client(proxy, client.ip()).await;
    story.destination.identity = Some(pod.identity().clone());
    story.destination.workload = Some(pod.workload.load_full());
    if !proxy.trust_domains.contains(&caller.peer.trust_domain) {
        arrived.refuse(StatusCode::UNAUTHORIZED);
        let domain = &caller.peer.trust_domain;
        let why = format!("trust domain {domain} is not known");
        story.finish(Ending::Refused(Fault::Policy, why));
        return None;
    }
    let mut facts = Facts::new(Some(caller.peer.clone()), client.ip(), destination);
    facts.certificate = Some(caller.certificate);
    Some(Examined {
        story,
        facts,
        client,
        arrived,
    })
}

/// The client that the source's agent names (RFC 7239, `for`).
fn forwarded(request: &Request<RecvStream>) -> Option<SocketAddr> {
    let value = request.headers().get(FORWARDED)?.to_str().ok()?;
    value
        .strip_prefix("for=\"")?
        .strip_suffix('"')?
        .parse()
        .ok()
        .map(canonical)
}

/// IPv4 as IPv4, also where a dual-stack socket shows it as v4-mapped.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
