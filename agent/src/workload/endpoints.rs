//! The endpoints of services: as the cluster's controllers list them in EndpointSlices,
//! or, in a directory of hand-written manifests that has none for a service, as they
//! would.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::Arc,
};

use super::{
    manifest::{self, EndpointSlice, PortOrName, is_tcp},
    node::Node,
    pod::Workload,
    service::Endpoint,
    table::{Table, parse},
};

/// What endpoints are found by. Built once for all services: looking through all slices
/// and pods for each would take seconds in a large cluster.
pub struct Index<'a> {
    table: &'a Table,
    slices: HashMap<(&'a str, &'a str), Vec<&'a EndpointSlice>>,
    by_name: HashMap<(&'a str, &'a str), &'a Arc<Workload>>,
    /// By namespace, and one label that a service's selector asks for.
    labelled: HashMap<(&'a str, &'a str, &'a str), Vec<&'a Arc<Workload>>>,
}

impl<'a> Index<'a> {
    pub fn new(
        table: &'a Table,
        services: &[&'a manifest::Service],
        slices: &[&'a EndpointSlice],
    ) -> Self {
        const SERVICE_NAME: &str = "kubernetes.io/service-name";
        let mut index = Self {
            table,
            slices: HashMap::new(),
            by_name: HashMap::new(),
            labelled: HashMap::new(),
        };
        for slice in slices {
            if let Some(service) = slice.metadata.labels.get(SERVICE_NAME) {
                let of = (slice.metadata.namespace(), service.as_str());
                index.slices.entry(of).or_default().push(slice);
            }
        }
        for service in services {
            let namespace = service.metadata.namespace();
            let listed = (index.slices).contains_key(&(namespace, service.metadata.name.as_str()));
            if let Some((key, value)) = service.spec.selector.first_key_value()
                && !listed
            {
                index.labelled.entry((namespace, key, value)).or_default();
            }
        }
        for workload in &table.workloads {
            let namespace = workload.namespace.as_str();
            index.by_name.insert((namespace, &workload.name), workload);
            if index.labelled.is_empty() {
                continue;
            }
            for (key, value) in &workload.labels {
                if let Some(with) = index.labelled.get_mut(&(namespace, key, value)) {
                    with.push(workload);
                }
            }
        }
        index
    }

    pub fn endpoints(
        &self,
        service: &manifest::Service,
        port: &manifest::ServicePort,
    ) -> Vec<Endpoint> {
        let meta = &service.metadata;
        match self.slices.get(&(meta.namespace(), meta.name.as_str())) {
            Some(slices) => self.listed(port, slices),
            None => self.selected(service, port),
        }
    }

    fn listed(&self, port: &manifest::ServicePort, slices: &[&EndpointSlice]) -> Vec<Endpoint> {
        let mut endpoints: Vec<Endpoint> = Vec::new();
        let mut seen: HashMap<SocketAddr, usize> = HashMap::new();
        for slice in slices {
            // Names, not IP addresses: no service proxy uses them (Table::ignored).
            if slice.address_type == "FQDN" {
                continue;
            }
            // Each slice has numbers of its own, where a named target port differs.
            let mut named = slice.ports.iter();
            let named = named.find(|p| p.name == port.name && is_tcp(p.protocol.as_ref()));
            let Some(number) = named.and_then(|p| p.port) else {
                continue;
            };
            for endpoint in &slice.endpoints {
                // All addresses of one stand for the same; consumers take the first
                // (API reference, Endpoint.addresses).
                let Some(ip) = endpoint.addresses.first().and_then(|a| parse(a)) else {
                    continue;
                };
                let found = self.endpoint(slice, endpoint, SocketAddr::new(ip, number));
                // A moving endpoint may stand in two slices (API reference).
                match seen.get(&found.address) {
                    Some(at) if found.ready && !endpoints[*at].ready => endpoints[*at] = found,
                    Some(_) => {}
                    None => {
                        seen.insert(found.address, endpoints.len());
                        endpoints.push(found);
                    }
                }
            }
        }
        endpoints
    }

    fn endpoint(
        &self,
        slice: &EndpointSlice,
        endpoint: &manifest::Endpoint,
        address: SocketAddr,
    ) -> Endpoint {
        let (target, conditions) = (&endpoint.target_ref, &endpoint.conditions);
        let is_pod = target.kind == "Pod";
        let workload = if is_pod && !target.name.is_empty() {
            // The very pod that is meant, host-network ones too: a slice may be older
            // than its pod's address, and than the pod of this name.
            let namespace = match target.namespace.as_str() {
                "" => slice.metadata.namespace(),
                namespace => namespace,
            };
            let named = self
                .by_name
                .get(&(namespace, target.name.as_str()))
                .copied();
            named.filter(|w| {
                (target.uid.is_empty() || w.uid == target.uid)
                    && w.addresses.contains(&address.ip())
            })
        } else {
            self.table.pod(address.ip())
        };
        let names = |hints: &[manifest::Hint]| hints.iter().map(|h| h.name.clone()).collect();
        // EndpointConditions: absent means ready, serving, and not terminating.
        Endpoint {
            address,
            workload: workload.cloned(),
            is_pod,
            node: endpoint.node_name.clone(),
            ready: conditions.ready != Some(false),
            serving: conditions.serving != Some(false),
            terminating: conditions.terminating == Some(true),
            zones: names(&endpoint.hints.for_zones),
            nodes: names(&endpoint.hints.for_nodes),
        }
    }

    /// Endpoints as the controller would list them.
    fn selected(&self, service: &manifest::Service, port: &manifest::ServicePort) -> Vec<Endpoint> {
        let (namespace, spec) = (service.metadata.namespace(), &service.spec);
        // Without a selector nothing is selected (Service API).
        let Some((key, value)) = spec.selector.first_key_value() else {
            return Vec::new();
        };
        let of = (namespace, key.as_str(), value.as_str());
        let mut endpoints = Vec::new();
        for workload in self.labelled.get(&of).into_iter().flatten() {
            let number = match &port.target_port {
                None => Some(port.port),
                Some(PortOrName::Port(number)) => Some(*number),
                Some(PortOrName::Name(name)) => {
                    let mut ports = workload.ports.iter();
                    ports.find(|(n, _)| n == name).map(|(_, number)| *number)
                }
            };
            let Some(number) = number.filter(|_| selects(&spec.selector, workload)) else {
                continue;
            };
            let zone = self.zone(workload);
            let (zones, nodes) = hints(&spec.traffic_distribution, zone, workload);
            endpoints.extend(workload.addresses.iter().map(|ip| Endpoint {
                address: SocketAddr::new(*ip, number),
                workload: Some(Arc::clone(workload)),
                is_pod: true,
                node: Some(workload.node.clone()),
                ready: spec.publish_not_ready_addresses
                    || (workload.ready && !workload.terminating),
                serving: workload.ready,
                terminating: workload.terminating,
                zones: zones.clone(),
                nodes: nodes.clone(),
            }));
        }
        endpoints
    }

    fn zone(&self, workload: &Workload) -> Option<&String> {
        let node: Option<&Node> = self.table.nodes.get(&workload.node);
        node.and_then(|node| node.zone.as_ref())
    }
}

fn selects(selector: &BTreeMap<String, String>, workload: &Workload) -> bool {
    let mut wanted = selector.iter();
    wanted.all(|(key, value)| workload.labels.get(key) == Some(value))
}

/// The hints that the controller gives for `trafficDistribution` (KEP-4444, KEP-3015).
fn hints(
    distribution: &str,
    zone: Option<&String>,
    workload: &Workload,
) -> (Vec<String>, Vec<String>) {
    let zones = || zone.cloned().into_iter().collect();
    match distribution {
        "PreferClose" | "PreferSameZone" => (zones(), Vec::new()),
        "PreferSameNode" => (zones(), vec![workload.node.clone()]),
        _ => (Vec::new(), Vec::new()),
    }
}
