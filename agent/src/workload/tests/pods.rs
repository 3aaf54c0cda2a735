//! Which pod is meant: by address, by what a slice says, by what the kubelet calls it.

use super::*;

const CLUSTER: &str = "10.9.0.1:80";

/// What stands behind the service's one endpoint, and whether that is a pod not known.
fn behind(pods: &str, target: &str) -> (Option<String>, bool) {
    let endpoints = format!("{{addresses: [10.0.0.1], targetRef: {target}}}");
    let text = NAMESPACE.to_owned()
        + pods
        + &service("{clusterIP: 10.9.0.1, ports: [{port: 80}]}")
        + &slice("IPv4", "web-1", "{name: '', port: 80}", &endpoints);
    let table = table(&text);
    let port = table
        .service(CLUSTER.parse().expect("address"))
        .expect("service");
    let endpoint = &port.endpoints[0];
    assert_eq!(port.in_mesh, steered(&table, CLUSTER));
    (
        endpoint.workload.as_ref().map(|w| w.uid.clone()),
        endpoint.is_unknown(),
    )
}

#[test]
fn an_endpoint_is_the_pod_that_its_slice_names() {
    let a = pod("a", "10.0.0.1", "");
    let named = |more: &str| format!("{{kind: Pod, namespace: shop, name: a{more}}}");
    let known = (Some("u-a".to_owned()), false);
    assert_eq!(behind(&a, &named("")), known);
    assert_eq!(behind(&a, &named(", uid: u-a")), known);
    assert_eq!(behind(&a, "{kind: Pod}"), known);
    assert_eq!(behind(&a, "{}"), known, "by hand, by address");
    // Not known: not the pod of this name, not at this address any more, not there yet,
    // and another has its address.
    let unknown = (None, true);
    assert_eq!(behind(&a, &named(", uid: u-b")), unknown);
    assert_eq!(behind(&pod("a", "10.0.0.7", ""), &named("")), unknown);
    assert_eq!(behind("", &named("")), unknown);
    assert_eq!(behind(&pod("b", "10.0.0.1", ""), &named("")), unknown);
    assert_eq!(behind("", "{}"), (None, false), "no pod at all");
}

/// Their addresses are their nodes', and several share them.
#[test]
fn host_network_pods_are_endpoints_outside_the_mesh() {
    let host =
        |name: &str| pod(name, "10.0.0.1", "").replace("spec: {", "spec: {hostNetwork: true, ");
    let both = host("a") + &host("b");
    for name in ["a", "b"] {
        let target = format!("{{kind: Pod, namespace: shop, name: {name}}}");
        assert_eq!(behind(&both, &target), (Some(format!("u-{name}")), false));
    }
    let table = table(&(NAMESPACE.to_owned() + &both));
    assert!(table.mesh().is_empty() && table.workloads.len() == 2);
}

#[test]
fn a_pod_that_is_listed_before_it_is_known_is_refused_not_let_past() {
    let unready = "{addresses: [10.0.0.1], conditions: {ready: false}}";
    let text = NAMESPACE.to_owned()
        + &pod("a", "10.0.0.1", "")
        + &service("{clusterIP: 10.9.0.1, ports: [{port: 80}]}")
        + &slice("IPv4", "web-1", "{name: '', port: 80}", unready);
    let table = table(&text);
    assert_eq!(reached(&table, "n1", CLUSTER), [""; 0]);
    assert!(steered(&table, CLUSTER));
}

#[test]
fn pods_that_have_ended_have_no_entries() {
    for phase in ["Succeeded", "Failed"] {
        let ended =
            pod("z", "10.0.0.9", "").replace("status: {", &format!("status: {{phase: {phase}, "));
        let table = table(&(NAMESPACE.to_owned() + &ended));
        assert!(table.pod("10.0.0.9".parse().expect("address")).is_none());
        assert!(table.mesh().is_empty() && table.workloads.is_empty());
    }
}

/// A cluster's allocator may give an address to the next pod at once.
#[test]
fn an_address_is_its_latest_pods() {
    let made = |name: &str, when: &str, ending: bool| {
        let ending = if ending {
            "deletionTimestamp: '2026-02-01T00:00:00Z', "
        } else {
            ""
        };
        pod(name, "10.0.0.1", "").replace(
            "uid: ",
            &format!("creationTimestamp: '2026-01-0{when}T00:00:00Z', {ending}uid: "),
        )
    };
    for (a, b, expected) in [
        (made("a", "1", false), made("b", "2", false), "u-b"),
        (made("a", "2", true), made("b", "1", false), "u-b"),
        (made("a", "1", true), made("b", "2", true), "u-b"),
    ] {
        for text in [format!("{a}{b}"), format!("{b}{a}")] {
            let table = table(&(NAMESPACE.to_owned() + &text));
            let pod = table.pod("10.0.0.1".parse().expect("address"));
            assert_eq!(pod.expect("a pod").uid, expected);
        }
    }
}

/// Pods of one name, as a StatefulSet's, one after the other.
#[test]
fn a_pod_of_the_same_name_is_another() {
    let text = NAMESPACE.to_owned()
        + &pod("a", "10.0.0.1", "").replace("u-a", "u-old")
        + &service("{clusterIP: 10.9.0.1, selector: {app: web}, ports: [{port: 80}]}");
    let new = text
        .replace("u-old", "u-new")
        .replace("10.0.0.1", "10.0.0.2");
    for (text, uid, ip) in [(text, "u-old", "10.0.0.1"), (new, "u-new", "10.0.0.2")] {
        let table = table(&text);
        let pod = table.pod(ip.parse().expect("address")).expect("a pod");
        assert_eq!(
            (pod.uid.as_str(), table.services_of(pod)),
            (uid, vec!["web".to_owned()])
        );
    }
}

#[test]
fn a_static_pods_cgroup_is_by_the_hash_of_its_manifest() {
    const HASH: &str = "8f6a44fc62e8cb075753c843896568ca";
    let mirror = |hash: &str, annotations: &str, owner: &str| {
        let annotations = annotations.replace("HASH", hash);
        let text = pod("a", "10.0.0.1", "").replace(
            "uid: u-a",
            &format!("uid: u-a, annotations: {{{annotations}}}, ownerReferences: [{{{owner}}}]"),
        );
        table(&text).workloads[0].cgroup_uid.clone()
    };
    let both = "kubernetes.io/config.hash: HASH, kubernetes.io/config.mirror: HASH";
    let node = "kind: Node, name: n1, controller: true";
    assert_eq!(mirror(HASH, both, node), HASH);
    assert_eq!(
        mirror(HASH, "kubernetes.io/config.mirror: HASH", node),
        HASH
    );
    // What anyone may write on a pod of theirs.
    let uid = "0a1b2c3d-0000-4000-8000-00000000000f";
    assert_eq!(mirror(uid, both, node), "u-a");
    assert_eq!(mirror(HASH, both, "kind: Node, name: n2"), "u-a");
    assert_eq!(mirror(HASH, both, "kind: ReplicaSet, name: n1"), "u-a");
    assert_eq!(mirror(HASH, "kubernetes.io/config.hash: HASH", node), "u-a");
    assert_eq!(mirror("'../../x'", both, node), "u-a");
}

#[test]
fn sidecars_have_named_ports_and_init_containers_do_not() {
    let with = |policy: &str| {
        let init = format!(
            "spec: {{initContainers: [{{name: i, {policy} ports: [{{name: side, containerPort: 7}}]}}], "
        );
        let text = pod("a", "10.0.0.1", "").replace("spec: {", &init);
        table(&text).workloads[0].ports.clone()
    };
    let http = ("http".to_owned(), 8080);
    assert_eq!(with(""), std::slice::from_ref(&http));
    assert_eq!(
        with("restartPolicy: Always,"),
        [http, ("side".to_owned(), 7)]
    );
}
