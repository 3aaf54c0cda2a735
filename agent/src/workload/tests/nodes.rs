//! Nodes: their addresses lead to services by node ports and to pods by host ports.

use super::*;

fn world(policy: &str) -> Table {
    let text = NAMESPACE.to_owned()
        + &node("n1", "a", &["192.0.2.1", "fd00:2::1"])
        + &node("n2", "a", &["192.0.2.2"])
        + &pod("a", "10.0.0.1", "")
        + &service(&format!(
            "{{type: NodePort, clusterIP: 10.9.0.1, {policy} ports: [{{port: 80, nodePort: 30080}}]}}"
        ))
        + &slice(
            "IPv4",
            "web-1",
            "{name: '', port: 8080}",
            "{addresses: [10.0.0.1], nodeName: n1, targetRef: {kind: Pod, name: a}}",
        );
    table(&text)
}

#[test]
fn a_node_says_where_it_is() {
    let table = world("");
    let node = &table.nodes["n1"];
    assert_eq!(node.zone.as_deref(), Some("a"));
    assert_eq!(node.addresses.len(), 2, "and no host name: {node:?}");
    assert_eq!(node.pod_cidrs, ["10.1.0.0/24"]);
    let both = self::node("n1", "a", &[]).replace(
        "podCIDR: 10.1.0.0/24",
        "podCIDR: 10.1.0.0/24, podCIDRs: [10.1.0.0/24, 'fd00:1::/64']",
    );
    let table = self::table(&both);
    assert_eq!(table.nodes["n1"].pod_cidrs, ["10.1.0.0/24", "fd00:1::/64"]);
}

#[test]
fn a_node_port_leads_to_the_service_at_every_nodes_address() {
    let table = world("");
    for (from, address) in [
        ("n1", "192.0.2.1:30080"),
        ("n2", "192.0.2.1:30080"),
        ("n1", "192.0.2.2:30080"),
    ] {
        assert_eq!(
            reached(&table, from, address),
            ["10.0.0.1:8080"],
            "{from} {address}"
        );
        assert!(steered(&table, address));
    }
    // No endpoint of this family.
    assert_eq!(reached(&table, "n1", "[fd00:2::1]:30080"), [""; 0]);
    for address in [
        "192.0.2.3:30080",
        "192.0.2.1:80",
        "192.0.2.1:30081",
        "10.9.0.1:30080",
    ] {
        assert_eq!(reach(&table, "n1", address), None, "{address}");
        assert!(!steered(&table, address), "{address}");
    }
    // Where nothing in the mesh is behind node ports, no node is looked at.
    let outside = self::table(&node("n1", "a", &["192.0.2.1"]));
    assert_eq!(outside.mesh_node_ports(), Default::default());
}

/// `externalTrafficPolicy: Local`: another node keeps to its own endpoints; to this one's
/// kube-proxy its own pods come from inside.
#[test]
fn a_node_port_may_be_local_to_its_node() {
    let table = world("externalTrafficPolicy: Local,");
    assert_eq!(reached(&table, "n2", "192.0.2.1:30080"), ["10.0.0.1:8080"]);
    assert_eq!(reached(&table, "n1", "192.0.2.2:30080"), [""; 0]);
    assert_eq!(reached(&table, "n2", "192.0.2.2:30080"), ["10.0.0.1:8080"]);
    // The other policy is not for those that come by a node's address.
    let table = world("internalTrafficPolicy: Local,");
    assert_eq!(reached(&table, "n2", "192.0.2.2:30080"), ["10.0.0.1:8080"]);
    assert_eq!(reached(&table, "n2", "10.9.0.1:80"), [""; 0]);
}

#[test]
fn a_host_port_leads_to_its_pod() {
    let with = |port: &str| pod("a", "10.0.0.1", "").replace("containerPort: 8080", port);
    let target =
        |table: &Table, address: &str| match table.target(address.parse().expect("address")) {
            Some(Target::HostPort(pod, at)) => Some((pod.name.clone(), at.to_string())),
            _ => None,
        };
    let n1 = NAMESPACE.to_owned() + &node("n1", "a", &["192.0.2.1", "198.51.100.1", "fd00:2::1"]);
    let table = self::table(&(n1.clone() + &with("containerPort: 8080, hostPort: 80")));
    let at = |to: &str| Some(("a".to_owned(), to.to_owned()));
    assert_eq!(target(&table, "192.0.2.1:80"), at("10.0.0.1:8080"));
    assert_eq!(target(&table, "198.51.100.1:80"), at("10.0.0.1:8080"));
    assert_eq!(target(&table, "[fd00:2::1]:80"), at("[fd00::a]:8080"));
    assert_eq!(target(&table, "192.0.2.1:8080"), None);
    assert!(steered(&table, "192.0.2.1:80") && !steered(&table, "192.0.2.1:81"));
    // One address only; UDP; none of the node's.
    let table =
        self::table(&(n1.clone() + &with("containerPort: 8080, hostPort: 80, hostIP: 192.0.2.1")));
    assert_eq!(target(&table, "192.0.2.1:80"), at("10.0.0.1:8080"));
    assert_eq!(target(&table, "198.51.100.1:80"), None);
    for port in [
        "containerPort: 8080, hostPort: 80, protocol: UDP",
        "containerPort: 8080, hostPort: 80, hostIP: 203.0.113.1",
        "containerPort: 8080, hostPort: 80, hostIP: 127.0.0.1",
    ] {
        let table = self::table(&(n1.clone() + &with(port)));
        for address in ["192.0.2.1:80", "203.0.113.1:80", "127.0.0.1:80"] {
            assert_eq!(target(&table, address), None, "{port}");
        }
    }
    // Without Node objects the pod itself says where it is.
    let alone = with("containerPort: 8080, hostPort: 80")
        .replace("status: {", "status: {hostIP: 192.0.2.9, ");
    assert_eq!(
        target(&self::table(&alone), "192.0.2.9:80"),
        at("10.0.0.1:8080")
    );
    // In the host's network its ports are the node's, and not steered.
    let host =
        with("containerPort: 80, hostPort: 80").replace("spec: {", "spec: {hostNetwork: true, ");
    let table = self::table(&(n1 + &host));
    assert_eq!(target(&table, "192.0.2.1:80"), None);
    assert!(table.mesh().is_empty());
}

/// Whoever writes what a node's addresses are does not get pods'.
#[test]
fn a_pods_address_is_no_nodes() {
    let text = NAMESPACE.to_owned()
        + &pod("a", "10.0.0.1", "")
        + &node("n9", "a", &["10.0.0.1", "127.0.0.1"])
        + &service(
            "{clusterIP: 10.9.0.1, selector: {app: web}, ports: [{port: 80, nodePort: 30080}]}",
        );
    let table = table(&text);
    let target = table.target("10.0.0.1:30080".parse().expect("address"));
    assert!(matches!(target, Some(Target::Pod(_))), "{target:?}");
    assert_eq!(table.mesh_node_ports().1.len(), 0);
}
