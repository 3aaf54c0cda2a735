//! What is at an address: from the table, or, where that does not hold the whole
//! cluster, asked for.
//!
//! What cannot be found out fails closed. What turns out to be outside the mesh goes on
//! as the application meant it, and as it would have gone had it been known before: no
//! policy of the mesh has a say in it, and the kernel lets the next one pass.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
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

pub async fn look(proxy: &Proxy, story: &mut Story, dialled: SocketAddr) -> Result<Place, Lost> {
    let target = || proxy.table.load().target(dialled);
    let mut found = target();
    let known = match &found {
        Some(Target::Pod(_)) => true,
        Some(Target::Service(port)) => port.known,
        None => false,
    };
    let mut nothing = false;
    if let (Some(discovery), false) = (&proxy.discover, known) {
        nothing = ask(discovery, proxy, dialled.ip()).await? == Found::Foreign;
        found = target();
    }
    match found {
        Some(Target::Pod(workload)) => {
            if !workload.in_mesh() && proxy.discover.is_some() {
                return Ok(Place::Outside(Some(workload)));
            }
            Ok(Place::At(dialled, Some(workload)))
        }
        Some(Target::Service(port)) => {
            story.service = Some(port.service.name.clone());
            endpoint(proxy, dialled, &port).await
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

async fn endpoint(proxy: &Proxy, dialled: SocketAddr, port: &ServicePort) -> Result<Place, Lost> {
    if let Some(discovery) = &proxy.discover {
        if !port.known {
            return Err(unknown("what is behind the service is not known"));
        }
        if !port.in_mesh {
            return Ok(Place::Outside(None));
        }
        discovery.used(dialled.ip());
    }
    for _ in 0..ENDPOINTS {
        let endpoint = port
            .pick(dialled.ip())
            .ok_or_else(|| unknown("the service has no ready endpoint"))?;
        let (address, workload) = (endpoint.address, &endpoint.workload);
        let discovery = match &proxy.discover {
            Some(discovery) if workload.is_none() && endpoint.is_pod => discovery,
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
