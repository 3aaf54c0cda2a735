//! What a pod dials: steered here by the connect hook, carried to where it meant
//! to go. What the kernel did not steer (a process that dials the port itself) is
//! reset: there is no destination to carry it to.

use std::{io, mem::MaybeUninit, net::SocketAddr, pin::Pin, sync::Arc};

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
    splice::{Broken, End, Side},
    story::{Ending, Story},
};
use crate::{
    audit::{Fault, Key, Reporter, Transport, executable},
    identity::SpiffeId,
    kernel::{from_abi, text},
    lifecycle::Watcher,
    policy::{Caller, Denial, Facts},
};

/// Carries one accepted connection to its end. `pod`: whose listener it came to;
/// host-network pods share one, and are told by their cgroup.
pub fn carry(
    proxy: Arc<Proxy>,
    netns: u64,
    pod: Option<Arc<LocalPod>>,
    stream: TcpStream,
    source: SocketAddr,
    drain: Watcher,
) -> impl Future<Output = ()> {
    // What opening takes is not to be kept as long as the connection lasts.
    let opening = {
        let proxy = proxy.clone();
        Box::pin(async move { open(&proxy, netns, pod, stream, source).await })
    };
    async move {
        let Some(Standing {
            mut story,
            source,
            way,
            mut unread,
        }) = opening.await
        else {
            return;
        };
        let ending = tokio::select! {
            ending = along(way, &proxy, &mut story, source, drain) => ending,
            ending = needs_tokens(&proxy, &mut unread) => ending,
        };
        story.finish(ending);
    }
}

/// Carries it along its way.
fn along<'a>(
    way: Way,
    proxy: &'a Arc<Proxy>,
    story: &'a mut Story,
    mut source: End,
    drain: Watcher,
) -> Pin<Box<dyn Future<Output = Ending> + Send + 'a>> {
    match way {
        Way::Bytes(Opened { mut end, guard, .. }) => Box::pin(async move {
            let ending =
                carry_bytes(&mut source, &mut end, &mut None, &story.counters, &drain).await;
            finish(source, end, &ending);
            drop(guard);
            ending
        }),
        Way::Requests(requests) => {
            let (upstream, attacher, opened) = *requests;
            let sending = Sending {
                upstream,
                attacher,
                story,
                drain,
                live: None,
            };
            Box::pin(sending.carry(source, opened))
        }
        Way::Here(here) => Box::pin(async move {
            let delivery = Delivery {
                proxy,
                pod: &here.pod,
                facts: here.facts,
                client: here.client,
                story,
                attacher: here.attacher,
                drain,
            };
            delivery.run(Arrived::Open(source)).await
        }),
    }
}

/// A connection whose way is open.
struct Standing {
    story: Story,
    source: End,
    way: Way,
    unread: Option<Unread>,
}

enum Way {
    /// Unread, to another node or out of the mesh.
    Bytes(Opened),
    /// There, too; its requests may need tokens.
    Requests(Box<(Upstream, Arc<Attacher>, Opened)>),
    /// To a pod of this node, where it is judged.
    Here(Box<Here>),
}

struct Here {
    pod: Arc<LocalPod>,
    facts: Facts,
    client: SocketAddr,
    attacher: Option<Arc<Attacher>>,
}

/// A connection that is not read, because no policy wants tokens on it.
struct Unread {
    pod: Arc<LocalPod>,
    port: u16,
    changed: watch::Receiver<()>,
}

/// Returns when policy has come to want tokens on what goes to the connection's port:
/// requests on it would go without.
async fn needs_tokens(proxy: &Proxy, unread: &mut Option<Unread>) -> Ending {
    while let Some(Unread { pod, port, changed }) = unread
        && changed.changed().await.is_ok()
    {
        if proxy.selected(pod).sends_tokens(*port) {
            let why = "its requests may need a token now, and it is not read";
            return Ending::Refused(Fault::Policy, why.into());
        }
    }
    std::future::pending().await
}

/// Opens the way of a connection; `None`: it has ended.
async fn open(
    proxy: &Arc<Proxy>,
    netns: u64,
    pod: Option<Arc<LocalPod>>,
    stream: TcpStream,
    source: SocketAddr,
) -> Option<Standing> {
    let dialled = proxy.kernel.take_dial(netns, source);
    let pod = pod.or_else(|| proxy.pods.load().in_cgroup(dialled?.cgroup).cloned());
    let (Some(dialled), Some(pod)) = (dialled, &pod) else {
        let to = stream.local_addr().unwrap_or(source);
        reset(stream);
        let mut story = Story::new(proxy, Reporter::Source, Transport::Plaintext, source, to);
        story.source.workload = pod.map(|pod| pod.workload.load_full());
        story.finish(Ending::Refused(
            Fault::Source,
            "not steered here by the kernel".into(),
        ));
        return None;
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
        proxy,
        Reporter::Source,
        Transport::Plaintext,
        client,
        address,
    );
    proxy.join.expect(&story.ends, Key::Dialled(dialled.cookie));
    let program = executable(dialled.tgid);
    let mut process = (proxy.processes).of(dialled.tgid, dialled.uid, &text(&dialled.comm));
    if program.is_some() && process.exe != program {
        Arc::make_mut(&mut process).exe.clone_from(&program);
    }
    story.source.process = Some(process);
    story.source.identity = Some(pod.identity().clone());
    story.source.workload = Some(pod.workload.load_full());
    let judged = match route(proxy, &mut story, address, client).await {
        Ok(outside @ Route::Outside(..)) => Ok(outside),
        Ok(route) => match may_connect(proxy, pod, program.as_deref(), &story) {
            Ok(()) => Ok(route),
            Err(denial) => Err(Ending::Denied(denial)),
        },
        Err((fault, why)) => Err(Ending::Failed(fault, why)),
    };
    let failed = match judged {
        Err(ending) => ending,
        Ok(route) => {
            let port = (story.destination.address).map_or(0, |address| address.port());
            // Looked at after it has subscribed: policy may change in between.
            let changed = proxy.changed.subscribe();
            let outside = matches!(route, Route::Outside(..));
            let sends = !outside && proxy.selected(pod).sends_tokens(port);
            let attacher = sends.then(|| {
                let bare = matches!(route, Route::Direct(_));
                Arc::new(Attacher::new(proxy, pod, &story, bare))
            });
            let mut unread = (attacher.is_none() && !outside).then(|| Unread {
                pod: pod.clone(),
                port,
                changed,
            });
            let way = take(proxy, pod, route, attacher, &mut story, &stream, client);
            let taken = tokio::select! {
                way = way => way,
                ending = needs_tokens(proxy, &mut unread) => Err(ending),
            };
            match taken {
                Ok(way) => {
                    return Some(Standing {
                        story,
                        source: End::Tcp(stream),
                        way,
                        unread,
                    });
                }
                Err(ending) => ending,
            }
        }
    };
    reset(stream);
    story.finish(failed);
    None
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
    Remote(SocketAddr, SpiffeId),
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
    let identity = workload.identity(&proxy.trust_domains[0]);
    story.destination.identity = Some(identity.clone());
    if workload.node != proxy.audit.node() {
        if let Some(discovery) = &proxy.discover {
            discovery.used(address.ip());
        }
        story.transport = Transport::Hbone;
        return Ok(Route::Remote(address, identity));
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
fn waiting(stream: &TcpStream) -> io::Result<Vec<u8>> {
    let mut room = [MaybeUninit::uninit(); fast::MOST];
    // The runtime does not know yet whether there is something: it is not asked.
    let read = match SockRef::from(stream).recv(&mut room) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
        // It is said once: asked again, the kernel would tell of an orderly end.
        read => read?,
    };
    // Safety: so many bytes were written.
    Ok(unsafe { room[..read].assume_init_ref() }.to_vec())
}

/// Opens the way that a connection is to go.
async fn take(
    proxy: &Arc<Proxy>,
    pod: &Arc<LocalPod>,
    route: Route,
    attacher: Option<Arc<Attacher>>,
    story: &mut Story,
    source: &TcpStream,
    client: SocketAddr,
) -> Result<Way, Ending> {
    let foreign = match route {
        Route::Outside(address, true) => Some(address.ip()),
        _ => None,
    };
    let upstream = match route {
        Route::Local(to, address) => {
            let mut facts = Facts::new(Some(pod.identity().clone()), client.ip(), address);
            facts.certificate = pod.credentials.fingerprint();
            return Ok(Way::Here(Box::new(Here {
                pod: to,
                facts,
                client,
                attacher,
            })));
        }
        Route::Remote(address, expected) => Upstream::Tunnel {
            proxy: proxy.clone(),
            pod: pod.clone(),
            address,
            expected,
            client,
        },
        Route::Direct(address) | Route::Outside(address, _) => Upstream::Direct {
            pod: pod.clone(),
            address,
            limit: proxy.transport.connect_timeout.0,
        },
    };
    // Applications that speak first have done so by now.
    let first = match (&upstream, &attacher) {
        (Upstream::Tunnel { .. }, None) => waiting(source).map_err(|error| {
            let side = Side::Source;
            Ending::Broken(Broken { side, error })
        })?,
        _ => Vec::new(),
    };
    story.counters.add_sent(first.len());
    let opened = upstream.open(first).await?;
    if let Some(address) = foreign {
        proxy.foreign(address);
    }
    story.tls = opened.session.clone();
    story.opened(None);
    Ok(match attacher {
        Some(attacher) => {
            story.id = proxy.connections.number();
            Way::Requests(Box::new((upstream, attacher, opened)))
        }
        None => Way::Bytes(opened),
    })
}
