//! Which watch an address of the table comes from, and where an address that is not
//! known may be: made anew with each table.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    sync::{Arc, atomic::AtomicU64},
};

use ipnet::IpNet;

use super::{Held, Scope, store::Inner};
use crate::workload::{NamespacedName, WorkloadObject};

#[derive(Debug, Default)]
pub struct Index {
    /// When an address of what is watched because it was dialled was last dialled; `None`
    /// for what is watched anyway.
    pub known: HashMap<IpAddr, Option<Arc<AtomicU64>>>,
    /// Services by their addresses.
    pub services: HashMap<IpAddr, NamespacedName>,
    /// Nodes of endpoints, as EndpointSlices tell.
    pub nodes: HashMap<IpAddr, Arc<str>>,
    /// Which node has which pods' addresses, as far as nodes tell.
    pub cidrs: Vec<(IpNet, Arc<str>)>,
}

impl Index {
    pub fn new(inner: &Inner, stamps: &HashMap<Scope, Arc<AtomicU64>>) -> Self {
        let mut index = Self::default();
        for (scope, kept) in &inner.scopes {
            let stamp = stamps.get(scope).cloned();
            for held in kept.objects.values() {
                if let Held::Workload(object) = held {
                    index.add(object, stamp.as_ref());
                }
            }
        }
        // A service is known when what is behind it is.
        let services = index.services.iter();
        let listed = services.filter_map(|(address, name)| {
            let scope = Scope::Slices(Some(name.clone()));
            let kept = inner.scopes.get(&scope).filter(|kept| kept.is_whole());
            kept.map(|_| (*address, stamps.get(&scope).cloned()))
        });
        let listed: Vec<_> = listed.collect();
        index.known.extend(listed);
        index
    }

    fn add(&mut self, object: &WorkloadObject, stamp: Option<&Arc<AtomicU64>>) {
        match object {
            WorkloadObject::Pod(pod) => {
                let ended = matches!(pod.status.phase.as_str(), "Succeeded" | "Failed");
                if pod.spec.host_network || ended {
                    return;
                }
                let all = pod.status.pod_ips.iter().map(|a| &a.ip);
                let all = all.chain(&pod.status.pod_ip);
                for address in all.filter_map(|a| a.parse().ok()) {
                    self.known.insert(address, stamp.cloned());
                }
            }
            WorkloadObject::Service(service) => {
                let name = NamespacedName {
                    namespace: service.metadata.namespace().to_owned(),
                    name: service.metadata.name.clone(),
                };
                let spec = &service.spec;
                let ingress = service.status.load_balancer.ingress.iter();
                let all = spec.cluster_ips.iter().chain(&spec.cluster_ip);
                let all = all.chain(&spec.external_ips);
                let all = all.chain(ingress.map(|ingress| &ingress.ip));
                for address in all.filter_map(|a| a.parse::<IpAddr>().ok()) {
                    self.services.insert(address, name.clone());
                }
            }
            WorkloadObject::EndpointSlice(slice) => {
                for endpoint in &slice.endpoints {
                    let Some(node) = &endpoint.node_name else {
                        continue;
                    };
                    let node: Arc<str> = node.as_str().into();
                    for address in endpoint.addresses.iter().filter_map(|a| a.parse().ok()) {
                        self.nodes.insert(address, node.clone());
                    }
                }
            }
            WorkloadObject::Node(node) => {
                let name: Arc<str> = node.metadata.name.as_str().into();
                for cidr in cidrs(&node.spec.pod_cidrs, node.spec.pod_cidr.as_ref()) {
                    self.cidrs.push((cidr, name.clone()));
                }
            }
            WorkloadObject::Namespace(_) => {}
        }
    }
}

fn cidrs<'a>(many: &'a [String], one: Option<&'a String>) -> impl Iterator<Item = IpNet> + 'a {
    many.iter().chain(one).filter_map(|text| text.parse().ok())
}

/// Whether it is a node that does not say which addresses its pods have.
pub fn is_silent(object: &WorkloadObject) -> bool {
    let WorkloadObject::Node(node) = object else {
        return false;
    };
    cidrs(&node.spec.pod_cidrs, node.spec.pod_cidr.as_ref())
        .next()
        .is_none()
}

/// Addresses that pods may have, as nodes and the configuration tell: as few ranges as
/// say the same.
pub fn ranges(inner: &Inner, configured: &[IpNet]) -> BTreeSet<IpNet> {
    let nodes = inner.workloads().filter_map(|object| match object {
        WorkloadObject::Node(node) => Some(&node.spec),
        _ => None,
    });
    let mut all: Vec<IpNet> = nodes
        .flat_map(|spec| cidrs(&spec.pod_cidrs, spec.pod_cidr.as_ref()))
        .collect();
    all.extend(configured);
    IpNet::aggregate(&all).into_iter().collect()
}
