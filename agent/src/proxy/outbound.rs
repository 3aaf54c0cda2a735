//! What a pod dials: steered here by the connect hook, carried to where it meant
//! to go. What the kernel did not steer (a process that dials the port itself) is
//! reset: there is no destination to carry it to.

use std::{mem::MaybeUninit, net::SocketAddr, sync::Arc};

use socket2::SockRef;
use tokio::{net::TcpStream, sync::watch};

use super::{
    LocalPod, Proxy,
    attach::Attacher,
    deliver::{Arrived, Delivery, carry_bytes, finish},
    fast, is_agent_port,
    look::{Place, look},
    reset,
    source::{Opened, Sending, Upstream},
    splice::End,
    story::{Ending, Story},
};
use crate::{
    audit::{Fault, Key, Reporter, Transport, executable},
    kernel::{from_abi, text},
    lifecycle::Watcher,
    policy::{Caller, Denial, Facts},
    workload::Workload,
};

/// Carries one accepted connection to its end. `pod`: whose listener it came to;
/// host-network pods share one, and are told by their cgroup.
pub async fn carry(
    proxy: Arc<Proxy>,
    netns: u64,
    pod: Option<Arc<LocalPod>>,
    stream: TcpStream,
    source: SocketAddr,
    drain: Watcher,
) {
    let dialled = proxy.kernel.take_dial(netns, source);
    let pod = pod.or_else(|| proxy.pods.load().in_cgroup(dialled?.cgroup).cloned());
    let (Some(dialled), Some(pod)) = (dialled, &pod) else {
        let to = stream.local_addr().unwrap_or(source);
        reset(stream);
        let mut story = Story::new(&proxy, Reporter::Source, Transport::Plaintext, source, to);
        story.source.workload = pod.map(|pod| pod.workload.load_full());
        return story.finish(Ending::Refused(
            Fault::Source,
            "not steered here by the kernel".into(),
        ));
    };
    let address = SocketAddr::new(
        from_abi(dialled.destination),
        dialled.destination_port as u16,
    );
    let _ = stream.set_nodelay(true);
    // The application's side is loopback; what others see is the pod's address.
    let own = pod.address_like(address.ip()).unwrap_or(source.ip());
    let client = SocketAddr::new(own, source.port());
    let mut story = Story::new(
        &proxy,
        Reporter::Source,
        Transport::Plaintext,
        client,
        address,
    );
    proxy.join.expect(&story.ends, Key::Dialled(dialled.cookie));
    let program = executable(dialled.tgid);
    let mut process = (proxy.processes).of(dialled.tgid, dialled.uid, &text(&dialled.comm));
    process.exe = program.clone().or(process.exe);
    story.source.process = Some(process);
    story.source.identity = Some(pod.identity().clone());
    story.source.workload = Some(pod.workload.load_full());
    let judged = match Box::pin(route(&proxy, &mut story, address, client)).await {
        Ok(outside @ Route::Outside(..)) => Ok(outside),
        Ok(route) => match may_connect(&proxy, pod, program.as_deref(), &story) {
            Ok(()) => Ok(route),
            Err(denial) => Err(Ending::Denied(denial)),
        },
        Err((fault, why)) => Err(Ending::Failed(fault, why)),
    };
    let ending = match judged {
        Err(ending) => {
            reset(stream);
            ending
        }
        Ok(route) => {
            let port = story
                .destination
                .address
                .map_or(0, |address| address.port());
            // Looked at after it has subscribed: policy may change in between.
            let changed = proxy.changed.subscribe();
            let outside = matches!(route, Route::Outside(..));
            let sends = !outside && proxy.selected(pod).sends_tokens(port);
            let attacher = sends.then(|| {
                let bare = matches!(route, Route::Direct(_));
                Arc::new(Attacher::new(&proxy, pod, &story, bare))
            });
            let unread = attacher.is_none() && !outside;
            let run = run(
                &proxy, pod, route, attacher, &mut story, stream, client, drain,
            );
            tokio::select! {
                ending = run => ending,
                () = now_sends_tokens(&proxy, pod, port, changed), if unread => {
                    let why = "its requests may need a token now, and it is not read";
                    Ending::Refused(Fault::Policy, why.into())
                }
            }
        }
    };
    story.finish(ending);
}

/// Returns when policy has come to want tokens on what goes to this port: requests on
/// a connection that was opened unread would go without.
async fn now_sends_tokens(
    proxy: &Proxy,
    pod: &LocalPod,
    port: u16,
    mut changed: watch::Receiver<()>,
) {
    loop {
        match changed.changed().await {
            Ok(()) if proxy.selected(pod).sends_tokens(port) => return,
            Ok(()) => {}
            Err(_agent_ends) => std::future::pending().await,
        }
    }
}

/// Whether ConnectPolicy lets this process go where the connection leads. A process
/// that is gone already has no executable: it matches no rule that names one.
fn may_connect(
    proxy: &Proxy,
    pod: &LocalPod,
    executable: Option<&str>,
    story: &Story,
) -> Result<(), Denial> {
    let process = story.source.process.as_ref();
    proxy.selected(pod).connect(&Caller {
        executable,
        uid: process.map_or(u32::MAX, |p| p.uid),
        destination: story.destination.address.unwrap_or(story.dialled),
    })
}

/// Where a connection goes.
enum Route {
    /// A pod in the mesh on this node.
    Local(Arc<LocalPod>, SocketAddr),
    /// A pod in the mesh on another node.
    Remote(Arc<Workload>, SocketAddr),
    /// An endpoint outside the mesh, behind a service that has others inside.
    Direct(SocketAddr),
    /// Out of the mesh, as it was dialled: it came here only to be asked about. `true`:
    /// the cluster has no pod there.
    Outside(SocketAddr, bool),
}

async fn route(
    proxy: &Proxy,
    story: &mut Story,
    dialled: SocketAddr,
    client: SocketAddr,
) -> Result<Route, (Fault, String)> {
    let (address, workload) = match look(proxy, story, dialled, client.ip()).await? {
        Place::At(address, workload) => (address, workload),
        Place::Outside(workload) => {
            let foreign = workload.is_none() && story.service.is_none();
            story.destination.workload = workload;
            return Ok(Route::Outside(dialled, foreign));
        }
    };
    story.destination.address = Some(address);
    story.destination.workload = workload.clone();
    let Some(workload) = workload.filter(|w| w.in_mesh()) else {
        return Ok(Route::Direct(address));
    };
    if is_agent_port(address.port()) {
        let why = format!("port {} is the agent's", address.port());
        return Err((Fault::Source, why));
    }
    story.destination.identity = Some(workload.identity(&proxy.trust_domains[0]));
    if workload.node != proxy.audit.node() {
        if let Some(discovery) = &proxy.discover {
            discovery.used(address.ip());
        }
        story.transport = Transport::Hbone;
        return Ok(Route::Remote(workload, address));
    }
    story.transport = Transport::Local;
    match proxy.pods.load().at(address.ip()) {
        Some(pod) => Ok(Route::Local(pod.clone(), address)),
        None => {
            let why = "the destination is a pod of this node that is not enrolled yet";
            Err((Fault::Agent, why.into()))
        }
    }
}

/// What has come already. Does not wait.
fn waiting(stream: &TcpStream) -> Vec<u8> {
    let mut room = [MaybeUninit::uninit(); fast::MOST];
    // The runtime does not know yet whether there is something: it is not asked.
    let read = SockRef::from(stream).recv(&mut room).unwrap_or(0);
    // Safety: so many bytes were written.
    unsafe { room[..read].assume_init_ref() }.to_vec()
}

#[expect(clippy::too_many_arguments, reason = "it is the rest of `carry`")]
async fn run(
    proxy: &Arc<Proxy>,
    pod: &Arc<LocalPod>,
    route: Route,
    attacher: Option<Arc<Attacher>>,
    story: &mut Story,
    stream: TcpStream,
    client: SocketAddr,
    drain: Watcher,
) -> Ending {
    let mut source = End::Tcp(stream);
    let foreign = match route {
        Route::Outside(address, true) => Some(address.ip()),
        _ => None,
    };
    let upstream = match route {
        Route::Local(to, address) => {
            let mut facts = Facts::new(Some(pod.identity().clone()), client.ip(), address);
            facts.certificate = pod.credentials.fingerprint();
            let delivery = Delivery {
                proxy,
                pod: &to,
                facts,
                client,
                story,
                attacher,
                drain,
            };
            return Box::pin(delivery.run(Arrived::Open(source))).await;
        }
        Route::Remote(workload, address) => Upstream::Tunnel {
            proxy: proxy.clone(),
            pod: pod.clone(),
            address,
            expected: workload.identity(&proxy.trust_domains[0]),
            client,
        },
        Route::Direct(address) | Route::Outside(address, _) => Upstream::Direct {
            pod: pod.clone(),
            address,
            limit: proxy.transport.connect_timeout.0,
        },
    };
    // Applications that speak first have done so by now.
    let first = match (&upstream, &attacher, &source) {
        (Upstream::Tunnel { .. }, None, End::Tcp(stream)) => waiting(stream),
        _ => Vec::new(),
    };
    story.counters.add_sent(first.len());
    // What opening takes is not to be kept as long as the connection lasts.
    let opened = match Box::pin(upstream.open(first)).await {
        Ok(opened) => opened,
        Err(ending) => {
            source.reset();
            return ending;
        }
    };
    if let Some(address) = foreign {
        proxy.foreign(address);
    }
    story.tls = opened.session.clone();
    story.opened(None);
    if let Some(attacher) = attacher {
        story.id = proxy.connections.number();
        let sending = Sending {
            upstream,
            attacher,
            story,
            drain,
            live: None,
        };
        return Box::pin(sending.carry(source, opened)).await;
    }
    let Opened { mut end, guard, .. } = opened;
    let ending = carry_bytes(&mut source, &mut end, None, &story.counters, drain).await;
    finish(source, end, &ending);
    drop(guard);
    ending
}
