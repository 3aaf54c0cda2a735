//! What a pod dials: steered here by the connect hook, carried to where it meant
//! to go. What the kernel did not steer (a process that dials the port itself) is
//! reset: there is no destination to carry it to.

use std::{net::SocketAddr, sync::Arc};

use tokio::net::TcpStream;

use super::{
    LocalPod, Proxy,
    deliver::{Arrived, Delivery, carry_bytes, finish},
    dial, hbone, is_agent_port, reset,
    splice::End,
    story::{Ending, Story, process},
};
use crate::{
    audit::{Reporter, Transport},
    kernel::from_abi,
    lifecycle::Watcher,
    policy::{Caller, Denial, Facts},
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
    let judged = route(&proxy, &mut story, address)
        .map_err(Ending::Failed)
        .and_then(|route| match may_connect(&proxy, pod, &story) {
            Ok(()) => Ok(route),
            Err(denial) => Err(Ending::Denied(denial)),
        });
    let ending = match judged {
        Err(ending) => {
            reset(stream);
            ending
        }
        Ok(route) => run(&proxy, pod, route, &mut story, stream, client, drain).await,
    };
    story.finish(ending);
}

/// Whether ConnectPolicy lets this process go where the connection leads. A process
/// that is gone already has no executable: it matches no rule that names one.
fn may_connect(proxy: &Proxy, pod: &LocalPod, story: &Story) -> Result<(), Denial> {
    let process = story.process.as_ref();
    proxy.selected(pod).connect(&Caller {
        executable: process.and_then(|p| p.exe.as_deref()),
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
            let mut facts = Facts::new(Some(pod.identity().clone()), client.ip(), address);
            facts.certificate = pod.credentials.fingerprint();
            let delivery = Delivery {
                proxy,
                pod: &to,
                facts,
                client,
                story,
                drain,
            };
            delivery.run(Arrived::Open(source)).await
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
