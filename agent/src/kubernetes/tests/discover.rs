//! What is found when it is dialled.

use std::net::IpAddr;

use super::*;
use crate::workload::{Discover as _, Found};

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn node(name: &str, cidr: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": name},
        "spec": {"podCIDR": cidr, "podCIDRs": [cidr]},
        "status": {"images": [{"names": ["long"]}]},
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_dialled_is_found_and_nobody_else() {
    let lab = Lab::new();
    for n in 1..=4 {
        lab.put(node(&format!("n{n}"), &format!("10.0.{n}.0/24")));
        lab.put(pod(
            &format!("p{n}"),
            &format!("n{n}"),
            &format!("10.0.{n}.1"),
        ));
    }
    let mut host = pod("host", "n3", "192.168.0.3");
    host["spec"]["hostNetwork"] = json!(true);
    lab.put(host);
    let mut second = pod("dual", "n4", "10.0.4.2");
    second["status"]["podIPs"] = json!([{"ip": "10.0.4.2"}, {"ip": "fd00:4::2"}]);
    lab.put(second);
    lab.put(node("n4", "fd00:4::/64"));
    lab.put(service("front", "10.9.0.1", json!({"app": "p2"})));
    lab.put(slice("front", "n2", "10.0.2.1"));
    lab.put(service("bare", "10.9.0.2", json!({})));
    lab.put(slice("bare", "n3", "10.0.3.1"));
    let followed = lab.follow().await;
    followed.synced().await;
    let cluster = &followed.cluster;
    let ranges = ["10.0.1.0/24", "10.0.2.0/23", "fd00:4::/64"].map(|r| r.parse().expect("range"));
    until("the ranges", || {
        *cluster.ranges() == ranges.into_iter().collect()
    })
    .await;
    // A service without a selector is listed before it is dialled.
    until("the bare service", || {
        let table = followed.table();
        table
            .service("10.9.0.2:80".parse().expect("address"))
            .is_some_and(|port| port.known)
    })
    .await;
    assert_eq!(followed.pods(), ["p1"]);
    let watches = cluster.watches();

    assert_eq!(cluster.discover(ip("10.0.1.1")).await, Found::Known);
    assert_eq!(cluster.discover(ip("10.0.7.7")).await, Found::Foreign);
    assert_eq!(cluster.discover(ip("192.168.0.3")).await, Found::Foreign);
    assert_eq!(cluster.watches(), watches, "nothing was to be watched");

    assert_eq!(cluster.discover(ip("10.9.0.1")).await, Found::Known);
    let table = followed.table();
    let front = table
        .service("10.9.0.1:80".parse().expect("address"))
        .expect("it is there");
    assert!(front.known);
    assert_eq!(followed.pods(), ["p1"], "its pods are not asked for yet");
    // The slice says on which node it is.
    let before = lab.server.requests().len();
    assert_eq!(cluster.discover(ip("10.0.2.1")).await, Found::Known);
    assert_eq!(followed.pods(), ["p1", "p2"]);
    let asked = lab.server.requests().split_off(before);
    assert!(
        !asked.iter().any(|r| r.query.contains("podIP")),
        "{asked:?}"
    );

    // By its second address, which no API server finds.
    assert_eq!(cluster.discover(ip("fd00:4::2")).await, Found::Known);
    assert_eq!(cluster.discover(ip("fd00:4::3")).await, Found::Foreign);
    assert_eq!(followed.pods(), ["dual", "p1", "p2", "p4"]);

    lab.server.away(true);
    until("it is away", || !cluster.standing().errors.is_empty()).await;
    let lost = cluster.discover(ip("10.0.9.1")).await;
    assert!(matches!(lost, Found::Unknown(_)), "{lost:?}");
    assert_eq!(cluster.discover(ip("10.0.2.1")).await, Found::Known);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_dials_any_more_is_forgotten() {
    let lab = Lab::new();
    lab.put(pod("near", NODE, "10.0.1.1"));
    lab.put(pod("far", "n2", "10.0.2.1"));
    let pace = Pace {
        unused: Duration::from_secs(1),
        ..pace()
    };
    let cluster = Cluster::connect_with(&lab.config, pace).await;
    let followed = Followed::start(cluster.expect("it connects").expect("it is a source"));
    followed.synced().await;
    assert_eq!(
        followed.cluster.discover(ip("10.0.2.1")).await,
        Found::Known
    );
    // As long as it is used, it stays.
    let limit = Instant::now() + Duration::from_secs(3);
    while Instant::now() < limit {
        followed.cluster.used(ip("10.0.2.1"));
        followed.cluster.sweep();
        assert_eq!(followed.pods(), ["far", "near"]);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    until("it is forgotten", || {
        followed.cluster.sweep();
        followed.pods() == ["near"]
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_of_a_node_without_ranges_are_known_ahead() {
    let mut lab = Lab::new();
    lab.put(node("n2", "10.0.2.0/24"));
    lab.put(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n3"}, "spec": {}}));
    for (name, node, address) in [
        ("near", NODE, "10.0.1.1"),
        ("far", "n2", "10.0.2.1"),
        ("silent", "n3", "10.0.3.1"),
    ] {
        lab.put(pod(name, node, address));
    }
    let followed = lab.follow().await;
    until("the silent node's pods", || {
        followed.pods() == ["near", "silent"]
    })
    .await;
    // It is said for the whole cluster where they are.
    lab.config.kubernetes.pod_cidrs = vec!["10.0.0.0/16".parse().expect("a range")];
    let followed = lab.follow().await;
    followed.synced().await;
    assert_eq!(followed.pods(), ["near"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn all_is_known_ahead_where_that_is_wanted() {
    let mut lab = Lab::new();
    lab.config.kubernetes.discovery = Discovery::All;
    lab.put(pod("near", NODE, "10.0.1.1"));
    lab.put(pod("far", "n2", "10.0.2.1"));
    lab.put(service("front", "10.9.0.1", json!({"app": "far"})));
    lab.put(slice("front", "n2", "10.0.2.1"));
    let followed = lab.follow().await;
    followed.synced().await;
    assert!(!followed.cluster.on_demand());
    assert_eq!(followed.pods(), ["far", "near"]);
    let table = followed.table();
    let front = table
        .service("10.9.0.1:80".parse().expect("address"))
        .expect("it is there");
    assert!(front.known && front.endpoints.len() == 1);
}
