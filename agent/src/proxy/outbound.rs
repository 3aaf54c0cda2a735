//! What a pod dials: steered here by the connect hook, carried to where it meant
//! to go. What the kernel did not steer (a process that dials the port itself) is
//! reset: there is no destination to carry it to.

use std::{net::SocketAddr, sync::Arc};

use tokio::net::TcpStream;

use super::{
    LocalPod, Proxy,
    connections::Registered,
    dial, hbone, is_agent_port, last_hop, reset,
    splice::{Counters, End, splice},
    story::{Ending, Story, process},
};
use crate::{
    audit::{Reporter, Transport},
    kernel::from_abi,
    lifecycle::Watcher,
    policy::Denial,
    workload::{Target, Workload},
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
        return story.finish(Ending::Refused("not steered here by the kernel".into()));
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
    story.process = Some(process(&dialled));
    story.source.identity = Some(pod.identity().clone());
    story.source.workload = Some(pod.workload.load_full());
    let ending = match route(&proxy, &mut story, address) {
        Err(why) => {
            reset(stream);
            Ending::Failed(why)
        }
        Ok(route) => run(&proxy, pod, route, &mut story, stream, client, drain).await,
    };
    story.finish(ending);
}

/// Where a connection goes.
enum Route {
    /// A pod in the mesh on this node.
    Local(Arc<LocalPod>, SocketAddr),
    /// A pod in the mesh on another node.
    Remote(Arc<Workload>, SocketAddr),
    /// An endpoint outside the mesh, behind a service that has others inside.
    Direct(SocketAddr),
}

fn route(proxy: &Proxy, story: &mut Story, dialled: SocketAddr) -> Result<Route, String> {
    let target = proxy.table.load().target(dialled);
    let (address, workload) = match target {
        Some(Target::Pod(workload)) => (dialled, Some(workload)),
        Some(Target::Service(port)) => {
            story.service = Some(port.service.name.clone());
            let endpoint = port
                .pick(dialled.ip())
                .ok_or("the service has no ready endpoint")?;
            (endpoint.address, endpoint.workload.clone())
        }
        None => return Err("the destination is no longer known".into()),
    };
    story.destination.address = Some(address);
    story.destination.workload = workload.clone();
    let Some(workload) = workload.filter(|w| w.in_mesh()) else {
        return Ok(Route::Direct(address));
    };
    if is_agent_port(address.port()) {
        return Err(format!("port {} is the agent's", address.port()));
    }
    story.destination.identity = Some(workload.identity(&proxy.trust_domains[0]));
    if workload.node != proxy.audit.node() {
        story.transport = Transport::Hbone;
        return Ok(Route::Remote(workload, address));
    }
    story.transport = Transport::Local;
    match proxy.pods.load().at(address.ip()) {
        Some(pod) => Ok(Route::Local(pod.clone(), address)),
        None => Err("the destination is a pod of this node that is not enrolled yet".into()),
    }
}

async fn run(
    proxy: &Arc<Proxy>,
    pod: &Arc<LocalPod>,
    route: Route,
    story: &mut Story,
    stream: TcpStream,
    client: SocketAddr,
    drain: Watcher,
) -> Ending {
    let mut source = End::Tcp(stream);
    match route {
        Route::Remote(workload, address) => {
            let expected = workload.identity(&proxy.trust_domains[0]);
            let opened = hbone::open(proxy, pod, address, &expected, client).await;
            let hbone::Stream {
                mut end,
                session,
                lease,
            } = match opened {
                Ok(stream) => stream,
                Err(error) => {
                    source.reset();
                    return match error {
                        hbone::HboneError::Denied(_) => Ending::Refused(error.to_string()),
                        other => Ending::Failed(other.to_string()),
                    };
                }
            };
            story.tls = Some(session);
            story.opened(None);
            let ending = carry_bytes(&mut source, &mut end, None, &story.counters, drain).await;
            finish(source, end, &ending);
            drop(lease);
            ending
        }
        Route::Local(to, address) => {
            let identity = Some(pod.identity().clone());
            let facts = to.facts(identity, client.ip(), address.port());
            let live = proxy.connections.register(to.clone(), &facts);
            let permitted = match proxy.policies.load().authorize(&facts) {
                Ok(permitted) => permitted,
                Err(denial) => {
                    source.reset();
                    return Ending::Denied(denial);
                }
            };
            let (stream, _client) = match last_hop(proxy, &permitted, &to, address, client).await {
                Ok(opened) => opened,
                Err(error) => {
                    source.reset();
                    return Ending::Failed(format!("the application at {address}: {error}"));
                }
            };
            story.opened(permitted.by());
            let mut end = End::Tcp(stream);
            let ending =
                carry_bytes(&mut source, &mut end, Some(live), &story.counters, drain).await;
            finish(source, end, &ending);
            ending
        }
        Route::Direct(address) => {
            let limit = proxy.transport.connect_timeout.0;
            match dial(&pod.netns, None, address, limit).await {
                Ok(stream) => {
                    story.opened(None);
                    let mut end = End::Tcp(stream);
                    let ending =
                        carry_bytes(&mut source, &mut end, None, &story.counters, drain).await;
                    finish(source, end, &ending);
                    ending
                }
                Err(error) => {
                    source.reset();
                    Ending::Failed(format!("{address}: {error}"))
                }
            }
        }
    }
}

/// Moves bytes until the connection ends by itself or by policy. A drain lets it go
/// on, until its time is up.
pub async fn carry_bytes(
    source: &mut End,
    destination: &mut End,
    live: Option<Registered>,
    counters: &Counters,
    mut drain: Watcher,
) -> Ending {
    let denied = async {
        match live {
            Some(mut live) => live.denied().await,
            None => std::future::pending::<Denial>().await,
        }
    };
    source.break_on_drop(true);
    destination.break_on_drop(true);
    tokio::select! {
        biased;
        denial = denied => Ending::Denied(denial),
        () = drain.time_is_up() => Ending::Drained,
        done = splice(source, destination, counters) => match done {
            Ok(()) => Ending::Closed,
            Err(broken) => Ending::Broken(broken),
        },
    }
}

/// A connection that did not end in order is broken at both ends.
pub fn finish(source: End, destination: End, ending: &Ending) {
    if matches!(ending, Ending::Closed) {
        // What is written is still to be sent.
        source.break_on_drop(false);
        destination.break_on_drop(false);
    } else {
        source.reset();
        destination.reset();
    }
}
