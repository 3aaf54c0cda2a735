//! What is at an address: from the table, or, where that does not hold the whole
//! cluster, asked for.
//!
//! What cannot be found out fails closed. What turns out to be outside the mesh goes on
//! as the application meant it, and as it would have gone had it been known before: no
//! policy of the mesh has a say in it, and the kernel lets the next one pass.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Proxy, story::Story};
use crate::{
    audit::Fault,
    workload::{Discovery, Found, ServicePort, Target, Workload},
};

/// How long the kernel lets an address pass that is no pod's. It is told so only after
/// something there took a connection: then it is not an address that the next pod gets.
pub const FOREIGN_FOR: Duration = Duration::from_secs(10);

/// How many endpoints that are listed and gone a connection tries.
const ENDPOINTS: usize = 3;

type Lost = (Fault, String);

/// Where a connection goes.
pub enum Place {
    /// To a pod, or to an endpoint that is none.
    At(SocketAddr, Option<Arc<Workload>>),
    /// The mesh has nothing there. `None`: and the cluster has no pod there either.
    Outside(Option<Arc<Workload>>),
}

pub async fn look(
    proxy: &Proxy,
    story: &mut Story,
    dialled: SocketAddr,
    client: IpAddr,
) -> Result<Place, Lost> {
    let target = || proxy.table.load().target(dialled);
    let mut found = target();
    // A service is asked for by an address of its own: the dialled one may be a node's.
    let unknown_at = match &found {
        Some(Target::Pod(_) | Target::HostPort(..)) => None,
        Some(Target::Service(port)) if port.known => None,
        Some(Target::Service(port)) => Some(port.asked_by(dialled.ip())),
        None => Some(dialled.ip()),
    };
    let mut nothing = false;
    if let (Some(discovery), Some(address)) = (&proxy.discover, unknown_at) {
        nothing = ask(discovery, proxy, address).await? == Found::Foreign;
        found = target();
    }
    match found {
        Some(Target::Pod(workload)) => {
            if !workload.in_mesh() && proxy.discover.is_some() {
                return Ok(Place::Outside(Some(workload)));
            }
            Ok(Place::At(dialled, Some(workload)))
        }
        Some(Target::HostPort(workload, address)) => Ok(Place::At(address, Some(workload))),
        Some(Target::Service(port)) => {
            story.service = Some(port.service.name.clone());
            endpoint(proxy, dialled, client, &port).await
        }
        None if nothing => Ok(Place::Outside(None)),
        None => Err(unknown("the destination is no longer known")),
    }
}

/// Who a client is, for what is told of it: nothing is decided by that.
pub async fn client(proxy: &Proxy, address: IpAddr) -> Option<Arc<Workload>> {
    let known = || proxy.table.load().pod(address).cloned();
    let Some(discovery) = &proxy.discover else {
        return known();
    };
    match known() {
        Some(workload) => {
            discovery.used(address);
            Some(workload)
        }
        None => {
            discovery.introduce(address).await;
            known()
        }
    }
}

async fn endpoint(
    proxy: &Proxy,
    dialled: SocketAddr,
    client: IpAddr,
    port: &ServicePort,
) -> Result<Place, Lost> {
    if let Some(discovery) = &proxy.discover {
        if !port.known {
            return Err(unknown("what is behind the service is not known"));
        }
        if !port.in_mesh {
            return Ok(Place::Outside(None));
        }
        discovery.used(port.asked_by(dialled.ip()));
    }
    for _ in 0..ENDPOINTS {
        let endpoint = {
            let table = proxy.table.load();
            let mut among = table.reachable(port, dialled.ip(), proxy.audit.node());
            // A pod that is listed before it is known may be in the mesh: not used yet,
            // where it comes by itself.
            among.retain(|e| proxy.discover.is_some() || !e.is_unknown());
            let chosen = (proxy.choices).choose(port, &among, client, Instant::now());
            chosen.cloned()
        };
        let Some(endpoint) = endpoint else {
            let why = "the service has no endpoint that may be used from here";
            return Err(unknown(why));
        };
        let (address, workload) = (endpoint.address, &endpoint.workload);
        let discovery = match &proxy.discover {
            // A pod that has its node's address is never in the mesh.
            Some(discovery) if endpoint.is_unknown() && discovery.may_be_a_pod(address.ip()) => {
                discovery
            }
            _ => return Ok(Place::At(address, workload.clone())),
        };
        // Another connection may have asked since the service was looked up.
        let known = || proxy.table.load().pod(address.ip()).cloned();
        let mut workload = known();
        if workload.is_none() {
            ask(discovery, proxy, address.ip()).await?;
            workload = known();
        }
        if workload.is_some() {
            return Ok(Place::At(address, workload));
        }
    }
    Err(unknown("endpoints of the service are gone"))
}

/// `Known` or `Foreign`.
async fn ask(discovery: &Discovery, proxy: &Proxy, address: IpAddr) -> Result<Found, Lost> {
    let found = discovery.ask(address).await;
    let name = match &found {
        Found::Known => "known",
        Found::Foreign => "foreign",
        Found::Unknown(_) => "unknown",
    };
    proxy.metrics.discovery(name);
    match found {
        Found::Unknown(why) => {
            let why = format!("it could not be found out what {address} is: {why}");
            Err((Fault::Agent, why))
        }
        found => Ok(found),
    }
}

fn unknown(why: &str) -> Lost {
    (Fault::Destination, why.to_owned())
}
