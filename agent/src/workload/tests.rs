//! Tables built from manifests.

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

const NAMESPACE: &str = "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {postern.dev/mesh: enabled}}\n";

#[test]
fn the_shipped_example_makes_a_mesh() {
    let table = table(include_str!("../../../config/manifests/example.yaml"));
    let service = "10.96.0.10".parse().expect("address");
    let pod = "10.0.1.10".parse().expect("address");
    assert_eq!(table.mesh(), [(service, Some(80)), (pod, None)].into());
}

#[test]
fn named_target_ports_resolve_per_pod_and_turns_are_even() {
    let text = NAMESPACE.to_owned()
        + &pod("a", "10.0.0.1", "")
        + &pod("b", "10.0.0.2", "")
        + &service(
            "{clusterIP: 10.9.0.1, selector: {app: web}, ports: [{port: 80, targetPort: http}, {name: alt, port: 81, targetPort: 9000}]}",
        );
    let table = table(&text);
    let port = table
        .service("10.9.0.1:80".parse().expect("address"))
        .expect("service");
    let like = "10.9.0.1".parse().expect("address");
    let picks: Vec<String> = (0..4)
        .map(|_| port.pick(like).expect("endpoint").address.to_string())
        .collect();
    assert_eq!(
        picks,
        [
            "10.0.0.1:8080",
            "10.0.0.2:8080",
            "10.0.0.1:8080",
            "10.0.0.2:8080"
        ]
    );
    let alt = table
        .service("10.9.0.1:81".parse().expect("address"))
        .expect("service");
    assert_eq!(alt.pick(like).expect("endpoint").address.port(), 9000);
    assert!(
        table
            .service("10.9.0.1:82".parse().expect("address"))
            .is_none()
    );
    assert!(table.mesh().contains(&(like, Some(80))));
}

#[test]
fn slices_win_over_selectors_and_unready_endpoints_are_left_out() {
    let slice = "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\nmetadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}\nports: [{name: '', port: 7070}]\nendpoints:\n- {addresses: [10.0.0.1], conditions: {ready: false}}\n- {addresses: [10.0.0.2]}\n";
    let text = NAMESPACE.to_owned()
        + &pod("a", "10.0.0.1", "")
        + &pod("b", "10.0.0.2", "")
        + &service("{clusterIP: 10.9.0.1, selector: {app: web}, ports: [{port: 80}]}")
        + slice;
    let table = table(&text);
    let port = table
        .service("10.9.0.1:80".parse().expect("address"))
        .expect("service");
    let all: Vec<String> = port
        .endpoints
        .iter()
        .map(|e| e.address.to_string())
        .collect();
    assert_eq!(all, ["10.0.0.2:7070"]);
    // Without any that is ready it is still the mesh's: refused, not let past.
    let table = self::table(&text.replace("[10.0.0.2]", "[10.0.0.1], conditions: {ready: false}"));
    let address = "10.9.0.1".parse().expect("address");
    assert!(table.mesh().contains(&(address, Some(80))));
    // A pod that is not known yet is neither an endpoint nor outside the mesh.
    let unknown = text.replace("[10.0.0.2]", "[10.0.0.77], targetRef: {kind: Pod}");
    let table = self::table(&unknown);
    assert!(table.mesh().contains(&(address, Some(80))));
    let port = table
        .service("10.9.0.1:80".parse().expect("address"))
        .expect("service");
    assert!(port.pick(address).is_none());
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

#[test]
fn headless_and_ended_pods_have_no_entries() {
    let ended = pod("z", "10.0.0.9", "").replace("status: {", "status: {phase: Succeeded, ");
    let text = NAMESPACE.to_owned()
        + &ended
        + &service("{clusterIP: None, selector: {app: web}, ports: [{port: 80}]}");
    let table = table(&text);
    assert!(table.pod("10.0.0.9".parse().expect("address")).is_none());
    assert_eq!(table.services().count(), 0);
    assert!(table.mesh().is_empty());
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
