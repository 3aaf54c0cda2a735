//! The table of workloads: a pure function of the objects that were read,
//! published as one snapshot.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use serde::{Deserialize, Serialize};

use super::{
    WorkloadObject,
    manifest::{self, EndpointSlice, Pod, PortOrName},
};
use crate::{
    config::Mesh,
    identity::{SpiffeId, TrustDomain},
};

/// Label on a pod or a namespace: `enabled` or `disabled`.
pub const MESH_LABEL: &str = "postern.dev/mesh";

/// A pod.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    pub uid: String,
    pub namespace: String,
    pub name: String,
    pub service_account: String,
    pub node: String,
    pub addresses: Vec<IpAddr>,
    pub labels: BTreeMap<String, String>,
    /// Name of the controller that made it, or its own.
    pub owner: String,
    pub host_network: bool,
    pub enrolled: bool,
    pub ready: bool,
    /// Named container ports.
    pub ports: Vec<(String, u16)>,
}

impl Workload {
    pub fn identity(&self, trust_domain: &TrustDomain) -> SpiffeId {
        SpiffeId {
            trust_domain: trust_domain.clone(),
            namespace: self.namespace.clone(),
            service_account: self.service_account.clone(),
        }
    }

    /// Whether its inbound traffic goes through the agent of its node. A
    /// host-network pod shares the node's addresses, which are never steered.
    pub fn in_mesh(&self) -> bool {
        self.enrolled && !self.host_network
    }

    /// `app` label, or Kubernetes' recommended one: Istio's canonical name.
    pub fn app(&self) -> Option<&str> {
        [
            "service.istio.io/canonical-name",
            "app.kubernetes.io/name",
            "app",
        ]
        .iter()
        .find_map(|label| self.labels.get(*label))
        .map(String::as_str)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, Serialize)]
pub struct NamespacedName {
    pub namespace: String,
    pub name: String,
}

/// One port of a Service, with its ready endpoints.
#[derive(Debug)]
pub struct ServicePort {
    pub service: Arc<Service>,
    pub port: u16,
    /// Those that are ready.
    pub endpoints: Vec<Endpoint>,
    /// Whether any endpoint, ready or not, is a pod in the mesh, or may be one.
    pub in_mesh: bool,
    /// Whether its endpoints are known. Where they are not, they are asked for.
    pub known: bool,
    next: AtomicUsize,
}

#[derive(Debug)]
pub struct Service {
    pub name: NamespacedName,
    pub addresses: Vec<IpAddr>,
}

#[derive(Clone, Debug)]
pub struct Endpoint {
    pub address: SocketAddr,
    /// `None` where the endpoint is no pod that is known.
    pub workload: Option<Arc<Workload>>,
    /// Whether it is a pod, known or not.
    pub is_pod: bool,
}

/// An endpoint as it is listed for a service.
struct Listed {
    endpoint: Endpoint,
    ready: bool,
}

impl ServicePort {
    /// The next endpoint of an address family, in turn.
    pub fn pick(&self, like: IpAddr) -> Option<&Endpoint> {
        let fits = |e: &&Endpoint| e.address.is_ipv4() == like.is_ipv4();
        let count = self.endpoints.iter().filter(fits).count();
        if count == 0 {
            return None;
        }
        let turn = self.next.fetch_add(1, Ordering::Relaxed) % count;
        self.endpoints.iter().filter(fits).nth(turn)
    }
}

/// What a destination address stands for.
#[derive(Clone, Debug)]
pub enum Target {
    Pod(Arc<Workload>),
    Service(Arc<ServicePort>),
}

#[derive(Debug, Default)]
pub struct Table {
    pub workloads: Vec<Arc<Workload>>,
    pods: HashMap<IpAddr, Arc<Workload>>,
    services: HashMap<SocketAddr, Arc<ServicePort>>,
    /// By uid of a workload, the services of its namespace that it is behind.
    behind: HashMap<String, BTreeSet<String>>,
}

impl Table {
    /// Of objects that are all there is.
    pub fn build<'a>(objects: impl IntoIterator<Item = &'a WorkloadObject>, default: Mesh) -> Self {
        Self::of(objects, default, None)
    }

    /// Of all services, but only some pods: what is missing is discovered when it is
    /// dialled. `listed`: services whose EndpointSlices are among the objects, if they
    /// have any; of the others it is not known what is behind them.
    pub fn partial<'a>(
        objects: impl IntoIterator<Item = &'a WorkloadObject>,
        default: Mesh,
        listed: &HashSet<NamespacedName>,
    ) -> Self {
        Self::of(objects, default, Some(listed))
    }

    fn of<'a>(
        objects: impl IntoIterator<Item = &'a WorkloadObject>,
        default: Mesh,
        partial: Option<&HashSet<NamespacedName>>,
    ) -> Self {
        let mut namespaces = HashMap::new();
        let (mut pods, mut services, mut slices) = (Vec::new(), Vec::new(), Vec::new());
        for object in objects {
            match object {
                WorkloadObject::Pod(pod) => pods.push(pod.as_ref()),
                WorkloadObject::Service(service) => services.push(service.as_ref()),
                WorkloadObject::EndpointSlice(slice) => slices.push(slice.as_ref()),
                WorkloadObject::Namespace(namespace) => {
                    let meta = &namespace.metadata;
                    namespaces.insert(meta.name.clone(), label(&meta.labels));
                }
                WorkloadObject::Node(_) => {}
            }
        }
        let mut table = Self::default();
        for pod in pods {
            let inherited = namespaces.get(pod.metadata.namespace()).copied().flatten();
            let Some(workload) = workload(pod, inherited.unwrap_or(default)) else {
                continue;
            };
            let workload = Arc::new(workload);
            if !workload.host_network {
                for address in &workload.addresses {
                    table.pods.insert(*address, workload.clone());
                }
            }
            table.workloads.push(workload);
        }
        for service in services {
            table.add_service(service, &slices, partial);
        }
        table
    }

    pub fn pod(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.pods.get(&address)
    }

    pub fn service(&self, address: SocketAddr) -> Option<&Arc<ServicePort>> {
        self.services.get(&address)
    }

    /// Names of the services of its namespace that a workload is behind, ready or not.
    pub fn services_of(&self, workload: &Workload) -> Vec<String> {
        let own = self.behind.get(&workload.uid);
        own.into_iter().flatten().cloned().collect()
    }

    pub fn target(&self, address: SocketAddr) -> Option<Target> {
        match self.pods.get(&address.ip()) {
            Some(pod) => Some(Target::Pod(pod.clone())),
            None => self.services.get(&address).cloned().map(Target::Service),
        }
    }

    /// Addresses whose connects are steered: every port of each pod in the mesh,
    /// and the ports of services that have such a pod behind them, ready or not.
    pub fn mesh(&self) -> HashSet<(IpAddr, Option<u16>)> {
        let pods = self
            .pods
            .iter()
            .filter(|(_, w)| w.in_mesh())
            .map(|(a, _)| (*a, None));
        let services = self
            .services
            .iter()
            .filter(|(_, port)| port.in_mesh)
            .map(|(address, _)| (address.ip(), Some(address.port())));
        pods.chain(services).collect()
    }

    /// Addresses of workloads that are not in the mesh. (Those of the node that a
    /// host-network pod shares may be a service's, too.)
    pub fn outside(&self) -> HashSet<IpAddr> {
        let workloads = self.workloads.iter().filter(|w| !w.in_mesh());
        let addresses = workloads.flat_map(|w| &w.addresses).copied();
        let free = |address: &IpAddr| self.pods.get(address).is_none_or(|w| !w.in_mesh());
        addresses.filter(free).collect()
    }

    pub fn services(&self) -> impl Iterator<Item = (&SocketAddr, &Arc<ServicePort>)> {
        self.services.iter()
    }

    fn add_service(
        &mut self,
        object: &manifest::Service,
        slices: &[&EndpointSlice],
        partial: Option<&HashSet<NamespacedName>>,
    ) {
        let name = NamespacedName {
            namespace: object.metadata.namespace().to_owned(),
            name: object.metadata.name.clone(),
        };
        let spec = &object.spec;
        // Headless services have the address "None": clients dial pods directly.
        let mut addresses: Vec<IpAddr> = spec
            .cluster_ips
            .iter()
            .filter_map(|a| a.parse().ok())
            .collect();
        if addresses.is_empty() {
            addresses.extend(
                spec.cluster_ip
                    .as_ref()
                    .and_then(|a| a.parse::<IpAddr>().ok()),
            );
        }
        // What leads to the service from elsewhere leads there from a pod, too.
        let outside = spec.external_ips.iter().chain(
            object
                .status
                .load_balancer
                .ingress
                .iter()
                .map(|ingress| &ingress.ip),
        );
        addresses.extend(outside.filter_map(|a| a.parse::<IpAddr>().ok()));
        let service = Arc::new(Service { name, addresses });
        let known = partial.is_none_or(|listed| listed.contains(&service.name));
        for port in &spec.ports {
            if port.protocol.as_deref().is_some_and(|p| p != "TCP") {
                continue;
            }
            let listed = match self.listed(&service.name, port, slices) {
                Some(listed) => listed,
                None => self.selected(&service.name, port, &spec.selector),
            };
            for workload in listed.iter().filter_map(|e| e.endpoint.workload.as_ref()) {
                if workload.namespace == service.name.namespace {
                    let behind = self.behind.entry(workload.uid.clone()).or_default();
                    behind.insert(service.name.name.clone());
                }
            }
            // What is not known may be in the mesh: it is asked for before it is used.
            let in_mesh = !known
                || listed.iter().any(|e| match &e.endpoint.workload {
                    Some(workload) => workload.in_mesh(),
                    None => e.endpoint.is_pod,
                });
            // A pod that is listed before it is known may be in the mesh: not used yet,
            // where it comes by itself.
            let usable = |e: &Listed| {
                e.ready
                    && (partial.is_some() || e.endpoint.workload.is_some() || !e.endpoint.is_pod)
            };
            let endpoints = listed
                .into_iter()
                .filter(usable)
                .map(|e| e.endpoint)
                .collect();
            let entry = Arc::new(ServicePort {
                service: service.clone(),
                port: port.port,
                endpoints,
                in_mesh,
                known,
                next: AtomicUsize::new(0),
            });
            for address in &service.addresses {
                self.services
                    .insert(SocketAddr::new(*address, port.port), entry.clone());
            }
        }
    }

    /// Endpoints as the cluster's controller lists them; `None` when it lists none
    /// for this service, as in a directory of hand-written manifests.
    fn listed(
        &self,
        service: &NamespacedName,
        port: &manifest::ServicePort,
        slices: &[&EndpointSlice],
    ) -> Option<Vec<Listed>> {
        const SERVICE_NAME: &str = "kubernetes.io/service-name";
        let ours = |slice: &&&EndpointSlice| {
            slice.metadata.namespace() == service.namespace
                && slice.metadata.labels.get(SERVICE_NAME) == Some(&service.name)
        };
        let mut slices = slices.iter().filter(ours).peekable();
        slices.peek()?;
        let mut endpoints = Vec::new();
        let mut seen = HashSet::new();
        for slice in slices {
            let named = slice.ports.iter().find(|p| p.name == port.name);
            let Some(number) = named.and_then(|p| p.port) else {
                continue;
            };
            for endpoint in &slice.endpoints {
                for ip in endpoint
                    .addresses
                    .iter()
                    .filter_map(|a| a.parse::<IpAddr>().ok())
                {
                    let address = SocketAddr::new(ip, number);
                    // A moving endpoint may stand in two slices (API reference).
                    if seen.insert(address) {
                        endpoints.push(Listed {
                            endpoint: Endpoint {
                                address,
                                workload: self.pod(ip).cloned(),
                                is_pod: endpoint.target_ref.kind == "Pod",
                            },
                            // EndpointConditions.ready: absent means ready.
                            ready: endpoint.conditions.ready != Some(false),
                        });
                    }
                }
            }
        }
        Some(endpoints)
    }

    /// Endpoints as the controller would list them.
    fn selected(
        &self,
        service: &NamespacedName,
        port: &manifest::ServicePort,
        selector: &BTreeMap<String, String>,
    ) -> Vec<Listed> {
        // Without a selector nothing is selected (Service API).
        if selector.is_empty() {
            return Vec::new();
        }
        let selected = self.workloads.iter().filter(|w| {
            w.namespace == service.namespace
                && selector
                    .iter()
                    .all(|(key, value)| w.labels.get(key) == Some(value))
        });
        selected
            .filter_map(|w| {
                let number = match &port.target_port {
                    None => port.port,
                    Some(PortOrName::Port(number)) => *number,
                    Some(PortOrName::Name(name)) => w.ports.iter().find(|(n, _)| n == name)?.1,
                };
                Some(w.addresses.iter().map(move |ip| Listed {
                    endpoint: Endpoint {
                        address: SocketAddr::new(*ip, number),
                        workload: Some(w.clone()),
                        is_pod: true,
                    },
                    ready: w.ready,
                }))
            })
            .flatten()
            .collect()
    }
}

fn label(labels: &BTreeMap<String, String>) -> Option<Mesh> {
    match labels.get(MESH_LABEL)?.as_str() {
        "enabled" => Some(Mesh::Enabled),
        "disabled" => Some(Mesh::Disabled),
        _ => None,
    }
}

/// `None` for a pod that has ended: its address may be another's by now.
fn workload(pod: &Pod, inherited: Mesh) -> Option<Workload> {
    let Pod {
        metadata: meta,
        spec,
        status,
    } = pod;
    if matches!(status.phase.as_str(), "Succeeded" | "Failed") {
        return None;
    }
    let listed = status.pod_ips.iter().map(|a| &a.ip).chain(&status.pod_ip);
    let mut addresses: Vec<IpAddr> = Vec::new();
    for address in listed.filter_map(|a| a.parse().ok()) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    let condition = status.conditions.iter().find(|c| c.r#type == "Ready");
    let ready = condition.is_none_or(|c| c.status == "True");
    let terminating = meta.deletion_timestamp.is_some();
    let ports = spec
        .containers
        .iter()
        .flat_map(|c| &c.ports)
        .filter_map(|p| Some((p.name.clone()?, p.container_port)))
        .collect();
    Some(Workload {
        uid: meta.uid.clone(),
        namespace: meta.namespace().to_owned(),
        name: meta.name.clone(),
        service_account: spec
            .service_account_name
            .clone()
            .unwrap_or_else(|| "default".into()),
        node: spec.node_name.clone(),
        labels: meta.labels.clone(),
        owner: owner(pod).unwrap_or_else(|| meta.name.clone()),
        host_network: spec.host_network,
        enrolled: label(&meta.labels).unwrap_or(inherited) == Mesh::Enabled,
        ready: ready && !terminating && !addresses.is_empty(),
        addresses,
        ports,
    })
}

/// The Deployment behind a ReplicaSet (whose name ends in the template's hash), or
/// whatever controls the pod.
fn owner(pod: &Pod) -> Option<String> {
    let controller = pod
        .metadata
        .owner_references
        .iter()
        .find(|o| o.controller)?;
    let hash = pod.metadata.labels.get("pod-template-hash");
    match hash.and_then(|hash| controller.name.strip_suffix(&format!("-{hash}"))) {
        Some(deployment) if controller.kind == "ReplicaSet" => Some(deployment.to_owned()),
        _ => Some(controller.name.clone()),
    }
}
