//! One port of a Service: which of its endpoints a connection may go to, as kube-proxy
//! has it.

use std::{
    collections::hash_map::RandomState,
    hash::{BuildHasher as _, Hasher as _},
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::pod::Workload;

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, Serialize)]
pub struct NamespacedName {
    pub namespace: String,
    pub name: String,
}

#[derive(Debug)]
pub struct Service {
    pub name: NamespacedName,
    /// Its cluster IPs.
    pub addresses: Vec<IpAddr>,
    /// `sessionAffinity: ClientIP`: for how long after its last connection a client
    /// stays with its endpoint.
    pub affinity: Option<Duration>,
}

/// One port of a Service, as one kind of its addresses leads to it.
#[derive(Debug)]
pub struct ServicePort {
    pub service: Arc<Service>,
    pub port: u16,
    /// All of them, also those that are not ready.
    pub endpoints: Arc<[Endpoint]>,
    /// Whether any endpoint, ready or not, is a pod in the mesh, or may be one.
    pub in_mesh: bool,
    /// Whether its endpoints are known. Where they are not, they are asked for.
    pub known: bool,
    scope: Scope,
    next: AtomicUsize,
}

/// What was dialled, and which endpoints that allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// A cluster IP. `local`: `internalTrafficPolicy: Local` (KEP-2086).
    Cluster { local: bool },
    /// An external IP or a load balancer's: from a pod neither traffic policy applies
    /// (kube-proxy's "pod traffic for external destinations").
    Outside,
    /// A node's port. `local`: `externalTrafficPolicy: Local`.
    NodePort { local: bool },
}

#[derive(Clone, Debug)]
pub struct Endpoint {
    pub address: SocketAddr,
    /// `None` where the endpoint is no pod that is known.
    pub workload: Option<Arc<Workload>>,
    /// Whether it is listed as a pod.
    pub is_pod: bool,
    pub node: Option<String>,
    pub ready: bool,
    /// Of one that is terminating: whether it still answers (KEP-1669).
    pub serving: bool,
    pub terminating: bool,
    /// `hints.forZones` (KEP-2433) and `hints.forNodes` (KEP-3015).
    pub zones: Vec<String>,
    pub nodes: Vec<String>,
}

impl Endpoint {
    /// A pod that is listed before it is known: it may be in the mesh.
    pub fn is_unknown(&self) -> bool {
        self.is_pod && self.workload.is_none()
    }
}

/// Where a connection begins, and at which node's address it is aimed.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    pub node: &'a str,
    pub zone: Option<&'a str>,
    /// The node whose address was dialled, if it is one's.
    pub dialled_node: Option<&'a str>,
}

impl ServicePort {
    pub fn new(
        service: Arc<Service>,
        port: u16,
        endpoints: Arc<[Endpoint]>,
        scope: Scope,
        known: bool,
    ) -> Self {
        // What is not known may be in the mesh: it is asked for before it is used.
        let in_mesh = !known
            || endpoints.iter().any(|e| match &e.workload {
                Some(workload) => workload.in_mesh(),
                None => e.is_pod,
            });
        Self {
            service,
            port,
            endpoints,
            in_mesh,
            known,
            scope,
            // All agents would else begin with the same endpoint.
            next: AtomicUsize::new(RandomState::new().build_hasher().finish() as usize),
        }
    }

    /// The endpoints of the dialled address' family that this connection may go to:
    /// kube-proxy's `CategorizeEndpoints` (pkg/proxy/topology.go). None: it drops the
    /// connection.
    pub fn reachable(&self, dialled: IpAddr, view: View<'_>) -> Vec<&Endpoint> {
        let family = |e: &&Endpoint| e.address.is_ipv4() == dialled.is_ipv4();
        let all: Vec<&Endpoint> = self.endpoints.iter().filter(family).collect();
        let only_on = match self.scope {
            Scope::Cluster { local: true } => Some(view.node),
            // Another node's kube-proxy keeps to its own; this one's treats its pods as
            // if they came from inside.
            Scope::NodePort { local: true } => view.dialled_node.filter(|n| *n != view.node),
            _ => None,
        };
        if let Some(node) = only_on {
            let here = |e: &&Endpoint| e.node.as_deref() == Some(node);
            return usable(all.into_iter().filter(here).collect());
        }
        match Topology::of(&all, view) {
            Topology::None => usable(all),
            Topology::Node => usable(all.into_iter().filter(|e| for_node(e, view)).collect()),
            Topology::Zone => usable(all.into_iter().filter(|e| for_zone(e, view)).collect()),
        }
    }

    /// By which address its endpoints are asked for.
    pub fn asked_by(&self, dialled: IpAddr) -> IpAddr {
        self.service.addresses.first().copied().unwrap_or(dialled)
    }

    /// One after the other of so many.
    pub fn turn(&self, count: usize) -> usize {
        self.next.fetch_add(1, Ordering::Relaxed) % count.max(1)
    }

    /// Goes on where the one of the table before stopped.
    pub fn continue_from(&self, before: &Self) {
        let next = before.next.load(Ordering::Relaxed);
        self.next.store(next, Ordering::Relaxed);
    }
}

/// Those that are ready, or where none is, those that still answer while they end
/// (KEP-1669).
fn usable(mut all: Vec<&Endpoint>) -> Vec<&Endpoint> {
    if all.iter().any(|e| e.ready) {
        all.retain(|e| e.ready);
    } else {
        all.retain(|e| e.serving && e.terminating);
    }
    all
}

/// Which hints count: those that all ready endpoints have, if any is for here.
enum Topology {
    None,
    Node,
    Zone,
}

impl Topology {
    fn of(all: &[&Endpoint], view: View<'_>) -> Self {
        let ready = || all.iter().filter(|e| e.ready);
        if ready().all(|e| !e.nodes.is_empty()) && ready().any(|e| for_node(e, view)) {
            return Self::Node;
        }
        if ready().all(|e| !e.zones.is_empty()) && ready().any(|e| for_zone(e, view)) {
            return Self::Zone;
        }
        Self::None
    }
}

fn for_node(endpoint: &Endpoint, view: View<'_>) -> bool {
    endpoint.nodes.iter().any(|node| node == view.node)
}

fn for_zone(endpoint: &Endpoint, view: View<'_>) -> bool {
    endpoint
        .zones
        .iter()
        .any(|zone| Some(zone.as_str()) == view.zone)
}
