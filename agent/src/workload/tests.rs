//! Tables built from manifests.

mod nodes;
mod pods;
mod services;

use std::{collections::HashSet, path::Path};

use super::*;
use crate::{config::Mesh, objects::load_text};

fn objects(text: &str) -> Vec<WorkloadObject> {
    load_text(Path::new("t.yaml"), text)
        .expect("manifests parse")
        .into_iter()
        .map(|located| located.object)
        .collect()
}

fn table(text: &str) -> Table {
    Table::build(&objects(text), Mesh::Disabled)
}

fn pod(name: &str, ip: &str, more: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, uid: u-{name}, \
         labels: {{app: web{more}}}}}\nspec: {{nodeName: n1, serviceAccountName: web, containers: \
         [{{name: c, ports: [{{name: http, containerPort: 8080}}]}}]}}\nstatus: {{podIP: {ip}, \
         podIPs: [{{ip: {ip}}}, {{ip: 'fd00::{name}'}}]}}\n"
    )
}

fn service(body: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: shop}}\nspec: {body}\n"
    )
}

/// A slice of the service `web`.
fn slice(family: &str, name: &str, ports: &str, endpoints: &str) -> String {
    format!(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: {family}\n\
         metadata: {{name: {name}, namespace: shop, labels: {{kubernetes.io/service-name: web}}}}\n\
         ports: [{ports}]\nendpoints: [{endpoints}]\n"
    )
}

fn node(name: &str, zone: &str, addresses: &[&str]) -> String {
    let addresses: Vec<String> = addresses
        .iter()
        .map(|address| format!("{{type: InternalIP, address: '{address}'}}"))
        .collect();
    format!(
        "---\napiVersion: v1\nkind: Node\nmetadata: {{name: {name}, labels: \
         {{topology.kubernetes.io/zone: {zone}}}}}\nspec: {{podCIDR: 10.1.0.0/24}}\n\
         status: {{addresses: [{{type: Hostname, address: {name}}}, {}]}}\n",
        addresses.join(", ")
    )
}

const NAMESPACE: &str = "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {postern.dev/mesh: enabled}}\n";

/// Where a connection from this node to an address may go, sorted; `None`: the address
/// is no service's.
fn reach(table: &Table, from: &str, dialled: &str) -> Option<Vec<String>> {
    let dialled = dialled.parse().expect("an address");
    let port = table.service(dialled)?;
    let among = table.reachable(port, dialled.ip(), from);
    let mut all: Vec<String> = among.iter().map(|e| e.address.to_string()).collect();
    all.sort();
    Some(all)
}

/// The same, of addresses that are services'.
fn reached(table: &Table, from: &str, dialled: &str) -> Vec<String> {
    reach(table, from, dialled).expect("a service")
}

/// Whether connects there are steered.
fn steered(table: &Table, address: &str) -> bool {
    let address: std::net::SocketAddr = address.parse().expect("an address");
    let (mesh, (ports, nodes)) = (table.mesh(), table.mesh_node_ports());
    mesh.contains(&(address.ip(), None))
        || mesh.contains(&(address.ip(), Some(address.port())))
        || (nodes.contains(&address.ip()) && ports.contains(&address.port()))
}

#[test]
fn the_shipped_example_makes_a_mesh() {
    let table = table(include_str!("../../../config/manifests/example.yaml"));
    let service = "10.96.0.10".parse().expect("address");
    let pod = "10.0.1.10".parse().expect("address");
    assert_eq!(table.mesh(), [(service, Some(80)), (pod, None)].into());
}

#[test]
fn enrolment_is_by_pod_then_namespace_then_default() {
    let text = NAMESPACE.to_owned()
        + &pod("a", "10.0.0.1", "")
        + &pod("b", "10.0.0.2", ", postern.dev/mesh: disabled")
        + &pod("c", "10.0.0.3", "").replace("namespace: shop", "namespace: other");
    let table = table(&text);
    let enrolled = |ip: &str| {
        table
            .pod(ip.parse().expect("address"))
            .expect("pod")
            .enrolled
    };
    assert!(enrolled("10.0.0.1"));
    assert!(enrolled("fd00::a"));
    assert!(!enrolled("10.0.0.2"));
    assert!(!enrolled("10.0.0.3"));
}

/// As large as a cluster gets: what is looked for is found by an index. (Half of the
/// services have slices; looking through all of everything for each takes minutes.)
#[test]
fn a_large_cluster_makes_a_table() {
    let text = NAMESPACE.to_owned()
        + &pod("a", "10.0.0.1", "")
        + &service("{clusterIP: 10.9.0.1, selector: {app: web}, ports: [{port: 80}]}")
        + &slice(
            "IPv4",
            "web-1",
            "{name: '', port: 80}",
            "{addresses: [10.0.0.1], targetRef: {kind: Pod, name: a}}",
        );
    let objects = load_text(Path::new("t.yaml"), &text).expect("manifests parse");
    let mut all = Vec::new();
    for object in objects.into_iter().map(|located| located.object) {
        match object {
            WorkloadObject::Pod(like) => all.extend((0..5_000).map(|number| {
                let (mut pod, ip) = (
                    like.clone(),
                    format!("10.1.{}.{}", number / 250, number % 250),
                );
                pod.metadata.name = format!("p{number}");
                pod.metadata.uid = format!("u{number}");
                pod.metadata
                    .labels
                    .insert("app".into(), format!("s{}", number % 500));
                (pod.status.pod_ip, pod.status.pod_ips) = (Some(ip), Vec::new());
                WorkloadObject::Pod(pod)
            })),
            WorkloadObject::Service(like) => all.extend((0..500).map(|number| {
                let (mut service, ip) = (
                    like.clone(),
                    format!("10.9.{}.{}", number / 250, number % 250),
                );
                service.metadata.name = format!("s{number}");
                service.spec.cluster_ip = Some(ip);
                service
                    .spec
                    .selector
                    .insert("app".into(), format!("s{number}"));
                WorkloadObject::Service(service)
            })),
            WorkloadObject::EndpointSlice(like) => all.extend((0..500).step_by(2).map(|number| {
                let mut slice = like.clone();
                let of = "kubernetes.io/service-name".to_owned();
                slice.metadata.labels.insert(of, format!("s{number}"));
                let listed = (number..5_000).step_by(500).map(|pod| {
                    let mut endpoint = like.endpoints[0].clone();
                    endpoint.addresses = vec![format!("10.1.{}.{}", pod / 250, pod % 250)];
                    endpoint.target_ref.name = format!("p{pod}");
                    endpoint
                });
                slice.endpoints = listed.collect();
                WorkloadObject::EndpointSlice(slice)
            })),
            other => all.push(other),
        }
    }
    let table = Table::build(&all, Mesh::Disabled);
    assert_eq!(table.workloads.len(), 5_000);
    assert_eq!(table.services().count(), 500);
    for (_, port) in table.services() {
        let known = port.endpoints.iter().filter(|e| e.workload.is_some());
        assert_eq!(known.count(), 10, "{:?}", port.service.name);
        assert!(port.in_mesh);
    }
}

#[test]
fn what_a_partial_table_lacks_may_be_in_the_mesh() {
    let text = pod("a", "10.0.0.1", ", postern.dev/mesh: disabled")
        + &service("{clusterIP: 10.9.0.1, selector: {app: web}, ports: [{port: 80}]}");
    let slice = "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: web-1, \
        namespace: shop, labels: {kubernetes.io/service-name: web}}\naddressType: IPv4\n\
        ports: [{port: 8080}]\nendpoints: [{addresses: [10.0.0.1], targetRef: {kind: Pod}}, \
        {addresses: [10.0.0.2], targetRef: {kind: Pod}}]\n";
    let name = NamespacedName {
        namespace: "shop".into(),
        name: "web".into(),
    };
    let partial = |text: &str, listed: &HashSet<NamespacedName>| {
        Table::partial(&objects(text), Mesh::Disabled, listed)
    };
    let vip: std::net::SocketAddr = "10.9.0.1:80".parse().expect("address");
    // Nobody has looked behind the service yet.
    let table = partial(&text, &HashSet::new());
    assert_eq!(table.mesh(), [(vip.ip(), Some(80))].into());
    assert!(!table.service(vip).expect("service").known);
    // One endpoint is known to be outside, the other is not known: it is asked for when
    // its turn comes.
    let table = partial(&(text.clone() + slice), &[name.clone()].into());
    let port = table.service(vip).expect("service");
    assert!(port.known && port.in_mesh);
    let unknown: Vec<bool> = (port.endpoints.iter())
        .map(|e| e.is_pod && e.workload.is_none())
        .collect();
    assert_eq!(unknown, [false, true]);
    assert_eq!(
        table.outside(),
        ["10.0.0.1", "fd00::a"]
            .map(|a| a.parse().expect("address"))
            .into()
    );
    // All are known.
    let text = text + slice + &pod("b", "10.0.0.2", ", postern.dev/mesh: disabled");
    let table = partial(&text, &[name].into());
    assert!(table.mesh().is_empty());
}
