//! The table of workloads and services: a pure function of the objects that were read,
//! published as one snapshot.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use super::{
    WorkloadObject,
    endpoints::Index,
    manifest::{self, EndpointSlice, is_tcp},
    node::Node,
    pod::{Workload, label, workload},
    service::{Endpoint, NamespacedName, Scope, Service, ServicePort, View},
};
use crate::config::Mesh;

/// Label on a pod or a namespace: `enabled` or `disabled`.
pub const MESH_LABEL: &str = "postern.dev/mesh";

/// An address as objects write it; IPv4 as IPv4, also where it is v4-mapped.
pub fn parse(address: &str) -> Option<IpAddr> {
    address.parse().ok().map(|ip: IpAddr| ip.to_canonical())
}

/// What a destination address stands for.
#[derive(Clone, Debug)]
pub enum Target {
    Pod(Arc<Workload>),
    /// A pod by a port of its node, and its own address for that.
    HostPort(Arc<Workload>, SocketAddr),
    Service(Arc<ServicePort>),
}

#[derive(Debug, Default)]
pub struct Table {
    pub workloads: Vec<Arc<Workload>>,
    pub nodes: HashMap<String, Node>,
    /// What is in the objects and is not used, in words.
    pub ignored: Vec<String>,
    pods: HashMap<IpAddr, Arc<Workload>>,
    services: HashMap<SocketAddr, Arc<ServicePort>>,
    /// Names of nodes by their addresses.
    node_addresses: HashMap<IpAddr, String>,
    node_ports: HashMap<u16, Arc<ServicePort>>,
    host_ports: HashMap<SocketAddr, (Arc<Workload>, u16)>,
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
        let mut table = Self::default();
        for object in objects {
            match object {
                WorkloadObject::Pod(pod) => pods.push(pod.as_ref()),
                WorkloadObject::Service(service) => services.push(service.as_ref()),
                WorkloadObject::EndpointSlice(slice) => slices.push(slice.as_ref()),
                WorkloadObject::Namespace(namespace) => {
                    let meta = &namespace.metadata;
                    namespaces.insert(meta.name.clone(), label(&meta.labels));
                }
                WorkloadObject::Node(node) => {
                    let name = node.metadata.name.clone();
                    table.nodes.insert(name, Node::new(node));
                }
            }
        }
        // Where two pods claim an address, the later one has it: first those that are
        // on their way out, then by age.
        pods.sort_by_key(|pod| {
            let meta = &pod.metadata;
            (
                Reverse(meta.deletion_timestamp.is_some()),
                &meta.creation_timestamp,
            )
        });
        for pod in pods {
            let inherited = namespaces.get(pod.metadata.namespace()).copied().flatten();
            let Some(workload) = workload(pod, inherited.unwrap_or(default)) else {
                continue;
            };
            table.add_pod(Arc::new(workload), &pod.status);
        }
        table.find_nodes();
        // The older of two services keeps what both claim.
        services.sort_by_key(|service| {
            let meta = &service.metadata;
            (&meta.creation_timestamp, meta.namespace(), &meta.name)
        });
        table.add_services(&services, &slices, partial);
        let names = slices.iter().filter(|slice| slice.address_type == "FQDN");
        table.ignored = names.map(|slice| fqdn(slice)).collect();
        table
    }

    pub fn pod(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.pods.get(&address)
    }

    pub fn service(&self, address: SocketAddr) -> Option<&Arc<ServicePort>> {
        self.services.get(&address).or_else(|| {
            self.node_addresses.get(&address.ip())?;
            self.node_ports.get(&address.port())
        })
    }

    /// Services go on with the endpoint whose turn it is: tables come with every pod of
    /// the cluster, and endpoints would get as many connections as chance has it.
    pub fn continue_from(&self, before: &Self) {
        let addresses = self
            .services
            .iter()
            .map(|(at, port)| (port, before.services.get(at)));
        let nodes = (self.node_ports.iter()).map(|(at, port)| (port, before.node_ports.get(at)));
        for (port, before) in addresses.chain(nodes) {
            if let Some(before) = before.filter(|b| b.service.name == port.service.name) {
                port.continue_from(before);
            }
        }
    }

    /// Names of the services of its namespace that a workload is behind, ready or not.
    pub fn services_of(&self, workload: &Workload) -> Vec<String> {
        let own = self.behind.get(&workload.uid);
        own.into_iter().flatten().cloned().collect()
    }

    pub fn target(&self, address: SocketAddr) -> Option<Target> {
        if let Some(pod) = self.pods.get(&address.ip()) {
            return Some(Target::Pod(pod.clone()));
        }
        if let Some((pod, port)) = self.host_ports.get(&address) {
            // Port mapping keeps the family (CNI portmap).
            let like = |ip: &&IpAddr| ip.is_ipv4() == address.is_ipv4();
            let ip = pod.addresses.iter().find(like)?;
            return Some(Target::HostPort(pod.clone(), SocketAddr::new(*ip, *port)));
        }
        self.service(address).cloned().map(Target::Service)
    }

    /// The endpoints of a service that a connection from `node` to `dialled` may go to.
    pub fn reachable<'a>(
        &self,
        port: &'a ServicePort,
        dialled: IpAddr,
        node: &str,
    ) -> Vec<&'a Endpoint> {
        let view = View {
            node,
            zone: self.nodes.get(node).and_then(|node| node.zone.as_deref()),
            dialled_node: self.node_addresses.get(&dialled).map(String::as_str),
        };
        port.reachable(dialled, view)
    }

    /// Addresses whose connects are steered: every port of each pod in the mesh,
    /// the ports of services that have such a pod behind them, ready or not, and those
    /// of nodes that lead to such a pod.
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
        let hosts = self
            .host_ports
            .iter()
            .filter(|(_, (w, _))| w.in_mesh())
            .map(|(address, _)| (address.ip(), Some(address.port())));
        pods.chain(services).chain(hosts).collect()
    }

    /// Node ports whose connects are steered at every address of the nodes, and these
    /// addresses. Not multiplied: a thousand nodes and services would fill the kernel's
    /// map.
    pub fn mesh_node_ports(&self) -> (HashSet<u16>, HashSet<IpAddr>) {
        let ports = self.node_ports.iter().filter(|(_, port)| port.in_mesh);
        let ports: HashSet<u16> = ports.map(|(number, _)| *number).collect();
        if ports.is_empty() {
            return Default::default();
        }
        (ports, self.node_addresses.keys().copied().collect())
    }

    /// Addresses of workloads that are not in the mesh. (Those of the node that a
    /// host-network pod shares may be a service's, too.)
    pub fn outside(&self) -> HashSet<IpAddr> {
        let workloads = self.workloads.iter().filter(|w| !w.in_mesh());
        let addresses = workloads.flat_map(|w| &w.addresses).copied();
        let free = |address: &IpAddr| self.pods.get(address).is_none_or(|w| !w.in_mesh());
        addresses.filter(free).collect()
    }

    /// All that leads to services but node ports.
    pub fn services(&self) -> impl Iterator<Item = (&SocketAddr, &Arc<ServicePort>)> {
        self.services.iter()
    }

    fn add_pod(&mut self, workload: Arc<Workload>, status: &manifest::PodStatus) {
        if !workload.node.is_empty() {
            let addresses = status.host_ips.iter().map(|a| &a.ip).chain(&status.host_ip);
            for address in addresses {
                let node = self.nodes.entry(workload.node.clone()).or_default();
                node.add(parse(address));
            }
        }
        if !workload.host_network {
            for address in &workload.addresses {
                self.pods.insert(*address, workload.clone());
            }
        }
        self.workloads.push(workload);
    }

    /// What the nodes' addresses lead to. A pod's address is never taken for a node's.
    fn find_nodes(&mut self) {
        for (name, node) in &self.nodes {
            for address in &node.addresses {
                if !self.pods.contains_key(address) {
                    self.node_addresses.insert(*address, name.clone());
                }
            }
        }
        for workload in &self.workloads {
            for port in &workload.host_ports {
                let of_node = self.nodes.get(&workload.node);
                let addresses = of_node.into_iter().flat_map(|node| &node.addresses);
                // An address that is not the node's is nobody's to give.
                let wanted = |ip: &&IpAddr| port.address.is_none_or(|only| only == **ip);
                for address in addresses.filter(wanted) {
                    let at = SocketAddr::new(*address, port.port);
                    self.host_ports
                        .insert(at, (workload.clone(), port.container_port));
                }
            }
        }
    }

    fn add_services(
        &mut self,
        objects: &[&manifest::Service],
        slices: &[&EndpointSlice],
        partial: Option<&HashSet<NamespacedName>>,
    ) {
        let index = Index::new(self, objects, slices);
        let (mut inside, mut outside) = (HashMap::new(), Vec::new());
        let mut node_ports = HashMap::new();
        let mut behind: HashMap<String, BTreeSet<String>> = HashMap::new();
        for object in objects {
            // An ExternalName is a name of DNS and nothing to a service proxy.
            if object.spec.r#type == "ExternalName" {
                continue;
            }
            let service = Arc::new(service(object));
            let addresses = service.addresses.clone();
            let known = partial.is_none_or(|listed| listed.contains(&service.name));
            for port in &object.spec.ports {
                if !is_tcp(port.protocol.as_ref()) {
                    continue;
                }
                let endpoints: Arc<[Endpoint]> = index.endpoints(object, port).into();
                let own = endpoints.iter().filter_map(|e| e.workload.as_ref());
                for workload in own.filter(|w| w.namespace == service.name.namespace) {
                    let services = behind.entry(workload.uid.clone()).or_default();
                    if !services.contains(&service.name.name) {
                        services.insert(service.name.name.clone());
                    }
                }
                // Headless services have the address "None": clients dial the pods that
                // the names (of StatefulSets' pods, too) resolve to. kube-proxy passes
                // them over with all that they say of other addresses.
                if addresses.is_empty() {
                    continue;
                }
                let entry = |scope| {
                    let (service, endpoints) = (service.clone(), endpoints.clone());
                    Arc::new(ServicePort::new(
                        service, port.port, endpoints, scope, known,
                    ))
                };
                let local = object.spec.internal_traffic_policy == "Local";
                let cluster = entry(Scope::Cluster { local });
                for ip in &addresses {
                    let at = SocketAddr::new(*ip, port.port);
                    inside.entry(at).or_insert_with(|| cluster.clone());
                }
                let external = external_addresses(object, &addresses);
                if !external.is_empty() {
                    outside.push((external, entry(Scope::Outside)));
                }
                if port.node_port != 0 {
                    let local = object.spec.external_traffic_policy == "Local";
                    let scope = Scope::NodePort { local };
                    node_ports
                        .entry(port.node_port)
                        .or_insert_with(|| entry(scope));
                }
            }
        }
        // Whoever may write a Service may claim any address in it: one that the cluster
        // gave to a service stays with that.
        for (addresses, port) in outside {
            for ip in addresses {
                let at = SocketAddr::new(ip, port.port);
                inside.entry(at).or_insert_with(|| port.clone());
            }
        }
        (self.services, self.node_ports, self.behind) = (inside, node_ports, behind);
    }
}

fn service(object: &manifest::Service) -> Service {
    // Service API: three hours where nothing is said, a day at most.
    const DEFAULT: u32 = 10_800;
    const LONGEST: u32 = 86_400;
    let spec = &object.spec;
    let timeout = spec.session_affinity_config.client_ip.timeout_seconds;
    let timeout = timeout.unwrap_or(DEFAULT).clamp(1, LONGEST);
    Service {
        name: NamespacedName {
            namespace: object.metadata.namespace().to_owned(),
            name: object.metadata.name.clone(),
        },
        addresses: cluster_addresses(object),
        affinity: (spec.session_affinity == "ClientIP")
            .then(|| Duration::from_secs(u64::from(timeout))),
    }
}

/// `clusterIPs`, one for each of its families.
fn cluster_addresses(object: &manifest::Service) -> Vec<IpAddr> {
    let spec = &object.spec;
    let all: Vec<IpAddr> = spec.cluster_ips.iter().filter_map(|a| parse(a)).collect();
    if !all.is_empty() {
        return all;
    }
    // The older field, which is the first of them.
    spec.cluster_ip.iter().filter_map(|a| parse(a)).collect()
}

/// What leads to the service from elsewhere leads there from a pod, too: `externalIPs`,
/// and the load balancer's addresses, where packets that it hands over still have them
/// (`ipMode: VIP`). One that is a proxy itself is dialled as any other host (KEP-1860).
fn external_addresses(object: &manifest::Service, cluster: &[IpAddr]) -> Vec<IpAddr> {
    let ingress = object.status.load_balancer.ingress.iter();
    let virtual_ips = ingress
        .filter(|ingress| ingress.ip_mode.as_deref() != Some("Proxy"))
        .map(|ingress| &ingress.ip);
    let all = object.spec.external_ips.iter().chain(virtual_ips);
    // Of the families that the service has. Loopback would be every pod's own.
    let family = |ip: &IpAddr| cluster.iter().any(|own| own.is_ipv4() == ip.is_ipv4());
    let usable = |ip: &IpAddr| !ip.is_loopback() && !ip.is_unspecified() && family(ip);
    all.filter_map(|a| parse(a)).filter(usable).collect()
}

fn fqdn(slice: &EndpointSlice) -> String {
    format!(
        "EndpointSlice {}/{} lists names (addressType FQDN): its endpoints are not used",
        slice.metadata.namespace(),
        slice.metadata.name
    )
}
