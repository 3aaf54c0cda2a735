//! What comes to a pod from outside its node's mesh: HBONE on 15008 and plaintext
//! on every other port, handed here by `sk_lookup`.

use std::{net::SocketAddr, sync::Arc};

use bytes::Bytes;
use h2::{RecvStream, server::SendResponse};
use http::{Method, Request, StatusCode, header::FORWARDED};
use tokio::{
    net::TcpStream,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;

use super::{
    LocalPod, Proxy,
    deliver::{Arrived, Delivery, answer},
    hbone::{SEND_BUFFER, keepalive},
    is_agent_port, look, reset,
    splice::End,
    story::{Ending, Story},
};
use crate::{
    audit::{Fault, Reporter, Transport},
    identity::{Session, SpiffeId, fingerprint, peer_identity, valid_for},
    lifecycle::Watcher,
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
    mut drain: Watcher,
) {
    let client = canonical(client);
    let limit = proxy.transport.connect_timeout.0;
    let _ = stream.set_nodelay(true);
    // Before its handshake a peer is nobody: so many of them, and no more.
    let Ok(handshake) = proxy.handshakes.try_acquire() else {
        proxy.metrics.handshake("server_turned_away");
        return reset(stream);
    };
    let acceptor = TlsAcceptor::from(pod.credentials.server.clone());
    let tls = match timeout(limit, acceptor.accept(stream)).await {
        Ok(Ok(tls)) => tls,
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
    let connection = tls.get_ref().1;
    let session = Session::of(connection);
    let chain = connection.peer_certificates();
    // The verifier has made sure that there is one.
    let Some(leaf) = chain.and_then(|chain| chain.first()) else {
        return;
    };
    let Some(peer) = peer_identity(leaf) else {
        return;
    };
    let (expired, certificate) = (sleep(valid_for(leaf)), fingerprint(leaf));
    let handshake = h2::server::Builder::new()
        .initial_window_size(proxy.transport.stream_window.0)
        .initial_connection_window_size(proxy.transport.tunnel_window())
        .max_frame_size(64 << 10)
        .max_send_buffer_size(SEND_BUFFER)
        .max_concurrent_streams(proxy.transport.streams_per_tunnel.0)
        .max_header_list_size(MAX_HEADERS)
        .handshake(tls);
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
                let caller = Caller {
                    peer: peer.clone(),
                    certificate,
                    session: session.clone(),
                    address: client,
                };
                let (proxy, pod, drain) = (proxy.clone(), pod.clone(), drain.clone());
                let served = stream_of(proxy, pod, caller, request, respond, drain.clone());
                tokio::spawn(drain.hold(served));
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
    session: Session,
    address: SocketAddr,
}

/// Carries one stream of a tunnel, if everything about it is right.
async fn stream_of(
    proxy: Arc<Proxy>,
    pod: Arc<LocalPod>,
    caller: Caller,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    drain: Watcher,
) {
    let authority = request
        .uri()
        .authority()
        .and_then(|a| a.as_str().parse::<SocketAddr>().ok());
    let Some(destination) = authority.map(canonical).filter(|a| {
        request.method() == Method::CONNECT && pod.has_address(a.ip()) && !is_agent_port(a.port())
    }) else {
        answer(&mut respond, StatusCode::BAD_REQUEST);
        let Some(own) = pod.address_like(caller.address.ip()) else {
            return;
        };
        let gate = SocketAddr::new(own, super::HBONE_PORT);
        let mut story = Story::new(
            &proxy,
            Reporter::Destination,
            Transport::Hbone,
            caller.address,
            gate,
        );
        story.tls = Some(caller.session);
        story.source.identity = Some(caller.peer);
        story.destination.workload = Some(pod.workload.load_full());
        // The authority is the peer's word: shortened, and escaped where it is written.
        let asked: String = request.uri().to_string().chars().take(100).collect();
        let why = format!(
            "{} {asked:?} is not a CONNECT to this workload",
            request.method()
        );
        return story.finish(Ending::Refused(Fault::Source, why));
    };
    // Believed only as far as the packets' own source confirms it.
    let client = forwarded(&request)
        .filter(|claimed| claimed.ip() == caller.address.ip())
        .unwrap_or(caller.address);
    let mut story = Story::new(
        &proxy,
        Reporter::Destination,
        Transport::Hbone,
        client,
        destination,
    );
    story.tls = Some(caller.session);
    story.source.identity = Some(caller.peer.clone());
    story.source.workload = look::client(&proxy, client.ip()).await;
    story.destination.identity = Some(pod.identity().clone());
    story.destination.workload = Some(pod.workload.load_full());
    if !proxy.trust_domains.contains(&caller.peer.trust_domain) {
        answer(&mut respond, StatusCode::UNAUTHORIZED);
        let domain = &caller.peer.trust_domain;
        let why = format!("trust domain {domain} is not known");
        return story.finish(Ending::Refused(Fault::Policy, why));
    }
    let mut facts = Facts::new(Some(caller.peer), client.ip(), destination);
    facts.certificate = Some(caller.certificate);
    let delivery = Delivery {
        proxy: &proxy,
        pod: &pod,
        facts,
        client,
        story: &mut story,
        attacher: None,
        drain,
    };
    let body = request.into_body();
    let ending = delivery.run(Arrived::Asked { body, respond }).await;
    story.finish(ending);
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
