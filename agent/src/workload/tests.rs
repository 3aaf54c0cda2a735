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

/// As large as a cluster gets: what is looked for is found by an index. (Quadratic, this
/// would take minutes.)
#[test]
fn a_large_cluster_makes_a_table() {
    use std::fmt::Write as _;
    let mut text = NAMESPACE.to_owned();
    for number in 0..5_000 {
        let (ip, service) = (
            format!("10.1.{}.{}", number / 250, number % 250),
            number % 500,
        );
        let label = format!(", service: s{service}");
        text += &pod(&format!("{number:x}"), &ip, &label);
    }
    for number in 0..500 {
        let name = format!("s{number}");
        text += &service(&format!(
            "{{clusterIP: 10.9.{}.{}, selector: {{service: {name}, app: web}}, ports: [{{port: 80}}]}}",
            number / 250,
            number % 250
        ))
        .replace("name: web", &format!("name: {name}"));
        if number % 2 == 0 {
            let mut endpoints = String::new();
            for pod in (number..5_000).step_by(500) {
                let (x, y) = (pod / 250, pod % 250);
                let _written = write!(
                    endpoints,
                    "{{addresses: [10.1.{x}.{y}], targetRef: {{kind: Pod, name: {pod:x}, namespace: shop, uid: u-{pod:x}}}}}, "
                );
            }
            text += &slice("IPv4", &name, "{name: '', port: 80}", &endpoints)
                .replace("service-name: web", &format!("service-name: {name}"));
        }
    }
    // YAML wants a string where a name is all digits.
    let text = quoted(&text);
    let table = table(&text);
    assert_eq!(table.workloads.len(), 5_000);
    assert_eq!(table.services().count(), 500);
    for (_, port) in table.services() {
        let known = port.endpoints.iter().filter(|e| e.workload.is_some());
        let v4 = known.filter(|e| e.address.is_ipv4());
        assert_eq!(v4.count(), 10, "{:?}", port.service.name);
    }
}

fn quoted(text: &str) -> String {
    let mut quoted = String::new();
    for part in text.split_inclusive("name: ") {
        let (name, rest) = part.split_at(part.find([',', '}', '\n']).unwrap_or(0));
        match name.chars().all(|c| c.is_ascii_hexdigit()) && !name.is_empty() {
            true => quoted += &format!("'{name}'{rest}"),
            false => quoted += part,
        }
    }
    quoted
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
