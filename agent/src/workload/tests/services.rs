//! What Service and EndpointSlice say of where connections go.

use super::*;

const CLUSTER: &str = "10.9.0.1:80";
const PORTS: &str = "{name: '', port: 80}";

fn endpoint(ip: &str, more: &str) -> String {
    format!("{{addresses: ['{ip}']{more}}}, ")
}

/// The service `web` at 10.9.0.1 and fd00:9::1 with these endpoints, on three nodes in
/// two zones.
fn world(spec: &str, endpoints: &str) -> Table {
    let nodes = node("n1", "a", &["192.0.2.1", "fd00:2::1"])
        + &node("n2", "a", &["192.0.2.2"])
        + &node("n3", "b", &["192.0.2.3"]);
    let spec = format!(
        "{{clusterIP: 10.9.0.1, clusterIPs: [10.9.0.1, 'fd00:9::1'], {spec} ports: [{{port: 80, nodePort: 30080}}]}}"
    );
    table(
        &(NAMESPACE.to_owned()
            + &nodes
            + &service(&spec)
            + &slice("IPv4", "web-1", PORTS, endpoints)),
    )
}

#[test]
fn named_target_ports_resolve_per_pod_and_slice() {
    let text = NAMESPACE.to_owned()
        + &pod("a", "10.0.0.1", "")
        + &pod("b", "10.0.0.2", "").replace("8080", "8081")
        + &service(
            "{clusterIP: 10.9.0.1, selector: {app: web}, ports: [{port: 80, targetPort: http}, {name: alt, port: 81, targetPort: 9000}, {name: none, port: 83, targetPort: absent}]}",
        );
    let table = table(&text);
    assert_eq!(
        reached(&table, "n1", CLUSTER),
        ["10.0.0.1:8080", "10.0.0.2:8081"]
    );
    assert_eq!(
        reached(&table, "n1", "10.9.0.1:81"),
        ["10.0.0.1:9000", "10.0.0.2:9000"]
    );
    assert_eq!(reached(&table, "n1", "10.9.0.1:83"), [""; 0]);
    assert_eq!(reach(&table, "n1", "10.9.0.1:82"), None);
    assert!(steered(&table, CLUSTER) && !steered(&table, "10.9.0.1:82"));
    // Pods whose numbers differ stand in slices of their own.
    let slices = slice(
        "IPv4",
        "web-1",
        "{name: '', port: 8080}",
        &endpoint("10.0.0.1", ""),
    ) + &slice(
        "IPv4",
        "web-2",
        "{name: '', port: 8081}",
        &endpoint("10.0.0.2", ""),
    );
    let listed =
        self::table(&(text.replace("{name: alt, port: 81, targetPort: 9000}, ", "") + &slices));
    assert_eq!(
        reached(&listed, "n1", CLUSTER),
        ["10.0.0.1:8080", "10.0.0.2:8081"]
    );
}

#[test]
fn all_slices_count_and_each_endpoint_once() {
    let text = service("{clusterIP: 10.9.0.1, ports: [{port: 80}]}")
        + &slice("IPv4", "web-1", PORTS, &(endpoint("10.0.0.1", ", conditions: {ready: false}") + &endpoint("10.0.0.2", "")))
        + &slice("IPv4", "web-2", PORTS, &(endpoint("10.0.0.1", "") + &endpoint("10.0.0.2", ", conditions: {ready: false}")))
        // Of another namespace, for another port, and without one.
        + &slice("IPv4", "web-3", PORTS, &endpoint("10.0.0.3", "")).replace("namespace: shop", "namespace: other")
        + &slice("IPv4", "web-4", "{name: '', port: 80, protocol: UDP}, {name: x, port: 80}, {name: ''}", &endpoint("10.0.0.4", ""))
        // Only the first address of an endpoint is one.
        + &slice("IPv4", "web-5", PORTS, "{addresses: [10.0.0.5, 10.0.0.6]}");
    let table = table(&text);
    assert_eq!(
        reached(&table, "n1", CLUSTER),
        ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.5:80"]
    );
    assert!(!steered(&table, CLUSTER), "no pod in the mesh behind it");
}

/// (conditions of a, b and c) -> where connections go; EndpointConditions, KEP-1669.
#[test]
fn what_is_ready_is_used_or_else_what_still_serves() {
    let (ready, no, ending, ended) = (
        "ready: true",
        "ready: false, serving: false",
        "ready: false, serving: true, terminating: true",
        "ready: false, serving: false, terminating: true",
    );
    let rows: [([&str; 3], &[&str]); 6] = [
        ([ready, no, ending], &["10.0.0.1:80"]),
        ([no, no, ending], &["10.0.0.3:80"]),
        ([ending, no, ending], &["10.0.0.1:80", "10.0.0.3:80"]),
        ([ended, no, ended], &[]),
        // Absent: ready. Serving without terminating is no reason.
        (["", "", ended], &["10.0.0.1:80", "10.0.0.2:80"]),
        (["ready: false, serving: true", no, ended], &[]),
    ];
    for (conditions, expected) in rows {
        let mut endpoints = String::new();
        for (number, conditions) in conditions.iter().enumerate() {
            let more = format!(", conditions: {{{conditions}}}");
            endpoints += &endpoint(&format!("10.0.0.{}", number + 1), &more);
        }
        let table = world("", &endpoints);
        assert_eq!(reached(&table, "n1", CLUSTER), expected, "{conditions:?}");
    }
}

#[test]
fn pods_that_a_selector_finds_have_the_conditions_that_the_controller_gives() {
    let not_ready = |name: &str, ip: &str| {
        pod(name, ip, "").replace(
            "status: {",
            "status: {conditions: [{type: Ready, status: 'False'}], ",
        )
    };
    let ending = |name: &str, ip: &str| {
        pod(name, ip, "").replace("uid: ", "deletionTimestamp: '2026-01-01T00:00:00Z', uid: ")
    };
    let spec = "{clusterIP: 10.9.0.1, selector: {app: web}, ports: [{port: 80}]}";
    let all = NAMESPACE.to_owned() + &not_ready("a", "10.0.0.1") + &ending("b", "10.0.0.2");
    let only = table(&(all.clone() + &service(spec)));
    assert_eq!(
        reached(&only, "n1", CLUSTER),
        ["10.0.0.2:80"],
        "still serving"
    );
    let ready = table(&(all.clone() + &pod("c", "10.0.0.3", "") + &service(spec)));
    assert_eq!(reached(&ready, "n1", CLUSTER), ["10.0.0.3:80"]);
    let spec = spec.replace("ports", "publishNotReadyAddresses: true, ports");
    let published = table(&(all + &service(&spec)));
    assert_eq!(
        reached(&published, "n1", CLUSTER),
        ["10.0.0.1:80", "10.0.0.2:80"]
    );
}

/// KEP-2086: `internalTrafficPolicy`.
#[test]
fn local_traffic_stays_on_the_node_or_goes_nowhere() {
    let endpoints = endpoint("10.0.0.1", ", nodeName: n1")
        + &endpoint(
            "10.0.0.2",
            ", nodeName: n2, conditions: {ready: false, serving: true, terminating: true}",
        )
        + &endpoint("10.0.0.3", ", nodeName: n3, conditions: {ready: false}");
    let table = world("internalTrafficPolicy: Local,", &endpoints);
    assert_eq!(reached(&table, "n1", CLUSTER), ["10.0.0.1:80"]);
    assert_eq!(
        reached(&table, "n2", CLUSTER),
        ["10.0.0.2:80"],
        "still serving"
    );
    assert_eq!(reached(&table, "n3", CLUSTER), [""; 0]);
    assert_eq!(reached(&table, "n4", CLUSTER), [""; 0]);
    let everywhere = world("internalTrafficPolicy: Cluster,", &endpoints);
    assert_eq!(reached(&everywhere, "n3", CLUSTER), ["10.0.0.1:80"]);
}

/// (hints of endpoints on n1, n2, n3) -> from n1 (zone a), from n3 (zone b), from a node
/// whose zone is not known; KEP-2433, KEP-3015, kube-proxy's `topologyModeFromHints`.
#[test]
fn hints_count_where_all_have_them_and_one_is_for_here() {
    let all: &[u8] = &[1, 2, 3];
    let rows: [([&str; 3], [&[u8]; 3]); 7] = [
        (["", "", ""], [all, all, all]),
        (["a", "a", "b"], [&[1, 2], &[3], all]),
        // One has none: none counts.
        (["a", "", "b"], [all, all, all]),
        // None is for zone b.
        (["a", "a", "a"], [all, all, all]),
        (["a", "a b", "b"], [&[1, 2], &[2, 3], all]),
        // For nodes, before zones; where none is for the node, by zone.
        (["a n1", "a n2", "b n2"], [&[1], &[3], all]),
        (["n1", "n2", ""], [all, all, all]),
    ];
    for (hints, expected) in rows {
        let mut endpoints = String::new();
        for (number, hints) in hints.iter().enumerate() {
            let named = |node: bool| -> String {
                let hints = hints.split_whitespace();
                let fits = hints.filter(|h| h.starts_with('n') == node);
                fits.map(|h| format!("{{name: {h}}}, ")).collect()
            };
            let number = number + 1;
            let more = format!(
                ", nodeName: n{number}, hints: {{forZones: [{}], forNodes: [{}]}}",
                named(false),
                named(true)
            );
            endpoints += &endpoint(&format!("10.0.0.{number}"), &more);
        }
        let table = world("", &endpoints);
        for (from, expected) in ["n1", "n3", "elsewhere"].iter().zip(expected) {
            let expected: Vec<String> = expected.iter().map(|n| format!("10.0.0.{n}:80")).collect();
            assert_eq!(
                reached(&table, from, CLUSTER),
                expected,
                "{hints:?} from {from}"
            );
        }
    }
    // An endpoint that is not ready has no say.
    let two = endpoint("10.0.0.1", ", hints: {forZones: [{name: a}]}")
        + &endpoint("10.0.0.2", ", hints: {forZones: [{name: b}]}")
        + &endpoint("10.0.0.3", ", conditions: {ready: false}");
    assert_eq!(reached(&world("", &two), "n1", CLUSTER), ["10.0.0.1:80"]);
}

/// KEP-4444, KEP-3015: without slices, as the controller would give hints.
#[test]
fn traffic_distribution_keeps_close() {
    let on = |name: &str, ip: &str, node: &str| {
        pod(name, ip, "").replace("nodeName: n1", &format!("nodeName: {node}"))
    };
    let rows: [(&str, [&[&str]; 2]); 4] = [
        (
            "PreferClose",
            [&["10.0.0.1:80", "10.0.0.2:80"], &["10.0.0.3:80"]],
        ),
        (
            "PreferSameZone",
            [&["10.0.0.1:80", "10.0.0.2:80"], &["10.0.0.3:80"]],
        ),
        ("PreferSameNode", [&["10.0.0.1:80"], &["10.0.0.3:80"]]),
        (
            "''",
            [
                &["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"],
                &["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"],
            ],
        ),
    ];
    for (distribution, expected) in rows {
        let text = node("n1", "a", &[])
            + &node("n2", "a", &[])
            + &node("n3", "b", &[])
            + &on("a", "10.0.0.1", "n1")
            + &on("b", "10.0.0.2", "n2")
            + &on("c", "10.0.0.3", "n3")
            + &service(&format!(
                "{{clusterIP: 10.9.0.1, trafficDistribution: {distribution}, selector: {{app: web}}, ports: [{{port: 80}}]}}"
            ));
        let table = table(&text);
        for (from, expected) in ["n1", "n3"].iter().zip(expected) {
            assert_eq!(
                reached(&table, from, CLUSTER),
                expected,
                "{distribution} from {from}"
            );
        }
    }
}

#[test]
fn the_family_of_what_is_dialled_is_kept() {
    let text = NAMESPACE.to_owned()
        + &service(
            "{clusterIPs: [10.9.0.1, 'fd00:9::1'], ipFamilies: [IPv4, IPv6], ports: [{port: 80}]}",
        )
        + &slice("IPv4", "web-1", PORTS, &endpoint("10.0.0.1", ""))
        + &slice("IPv6", "web-2", PORTS, &endpoint("fd00::1", ""));
    let table = table(&text);
    assert_eq!(reached(&table, "n1", CLUSTER), ["10.0.0.1:80"]);
    assert_eq!(reached(&table, "n1", "[fd00:9::1]:80"), ["[fd00::1]:80"]);
}

#[test]
fn what_leads_nowhere_by_a_service_has_no_entry() {
    let slices = slice(
        "IPv4",
        "web-1",
        PORTS,
        &endpoint("10.0.0.1", ", targetRef: {kind: Pod}"),
    );
    for spec in [
        // Headless, also with other addresses, which kube-proxy passes over then.
        "{clusterIP: None, clusterIPs: [None], externalIPs: [203.0.113.1], ports: [{port: 80}]}",
        // A name of DNS, also with an address from when it was something else.
        "{type: ExternalName, externalName: example.com, clusterIP: 10.9.0.1, ports: [{port: 80}]}",
        // Not TCP.
        "{clusterIP: 10.9.0.1, ports: [{port: 80, protocol: UDP}, {name: s, port: 80, protocol: SCTP}]}",
        "{clusterIP: 10.9.0.1}",
    ] {
        let table = table(&(service(spec) + &slices));
        assert_eq!(table.services().count(), 0, "{spec}");
        assert!(table.mesh().is_empty(), "{spec}");
    }
    let names = slice("FQDN", "web-2", PORTS, &endpoint("db.example.com", ""));
    let table = table(&(service("{clusterIP: 10.9.0.1, ports: [{port: 80}]}") + &names));
    assert_eq!(reached(&table, "n1", CLUSTER), [""; 0]);
    assert!(
        table.ignored.len() == 1 && table.ignored[0].contains("shop/web-2"),
        "{:?}",
        table.ignored
    );
}

/// Pods of a StatefulSet have names of their own, which lead to the pods' addresses.
#[test]
fn pods_behind_a_headless_service_are_dialled_themselves() {
    let text = NAMESPACE.to_owned()
        + &pod("a", "10.0.0.1", "")
        + &service("{clusterIP: None, selector: {app: web}, ports: [{port: 80}]}");
    let table = table(&text);
    assert!(steered(&table, "10.0.0.1:80") && steered(&table, "[fd00::a]:9"));
    let pod = table
        .pod("10.0.0.1".parse().expect("address"))
        .expect("pod");
    assert_eq!(table.services_of(pod), ["web"], "policy may name it");
}

/// The Service API's `externalIPs` and `status.loadBalancer`; KEP-1860.
#[test]
fn outer_addresses_lead_to_the_service_whatever_its_policies() {
    let outer = "externalIPs: [203.0.113.1, 127.0.0.1, 0.0.0.0, 'fd00:e::1', nonsense], \
                 internalTrafficPolicy: Local, externalTrafficPolicy: Local,";
    let endpoints = endpoint("10.0.0.1", ", nodeName: n1, targetRef: {kind: Pod}");
    let text = NAMESPACE.to_owned()
        + &service(&format!(
            "{{clusterIP: 10.9.0.1, {outer} ports: [{{port: 80}}]}}"
        ))
        + "status: {loadBalancer: {ingress: [{ip: 203.0.113.2}, {ip: 203.0.113.3, ipMode: VIP}, \
           {ip: 203.0.113.4, ipMode: Proxy}, {hostname: lb.example.com}]}}\n"
        + &slice("IPv4", "web-1", PORTS, &endpoints);
    let table = table(&text);
    for address in ["203.0.113.1:80", "203.0.113.2:80", "203.0.113.3:80"] {
        assert_eq!(reached(&table, "n3", address), ["10.0.0.1:80"], "{address}");
        assert!(steered(&table, address), "{address}");
    }
    assert_eq!(reached(&table, "n3", CLUSTER), [""; 0]);
    for address in [
        "203.0.113.4:80",
        "127.0.0.1:80",
        "0.0.0.0:80",
        "[fd00:e::1]:80",
    ] {
        assert_eq!(reach(&table, "n3", address), None, "{address}");
        assert!(!steered(&table, address), "{address}");
    }
}

#[test]
fn an_address_that_is_taken_is_not_claimed() {
    let thief = |created: &str| {
        service("{clusterIP: 10.9.0.9, externalIPs: [10.9.0.1, 10.0.0.1, 203.0.113.1], ports: [{port: 80}]}")
            .replace("name: web", &format!("name: thief, creationTimestamp: '{created}'"))
    };
    let rest = NAMESPACE.to_owned()
        + &pod("a", "10.0.0.1", "")
        + &service("{clusterIP: 10.9.0.1, externalIPs: [203.0.113.1], selector: {app: web}, ports: [{port: 80}]}")
            .replace("name: web,", "name: web, creationTimestamp: '2026-01-02T00:00:00Z',");
    for (created, outer) in [
        ("2026-01-03T00:00:00Z", "web"),
        ("2026-01-01T00:00:00Z", "thief"),
    ] {
        for text in [rest.clone() + &thief(created), thief(created) + &rest] {
            let table = table(&text);
            let of = |address: &str| {
                let port = table.service(address.parse().expect("address"));
                port.expect("a service").service.name.name.clone()
            };
            // The cluster's own, first; of others', the older.
            assert_eq!(
                (of(CLUSTER), of("203.0.113.1:80")),
                ("web".into(), outer.into())
            );
            let target = table.target("10.0.0.1:80".parse().expect("address"));
            assert!(matches!(target, Some(Target::Pod(_))), "{target:?}");
        }
    }
}

#[test]
fn session_affinity_has_its_time() {
    use std::time::Duration;
    for (spec, expected) in [
        ("", None),
        ("sessionAffinity: None,", None),
        ("sessionAffinity: ClientIP,", Some(10_800)),
        (
            "sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 60}},",
            Some(60),
        ),
        (
            "sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 999999}},",
            Some(86_400),
        ),
    ] {
        let table = world(spec, "");
        let port = table
            .service(CLUSTER.parse().expect("address"))
            .expect("service");
        assert_eq!(
            port.service.affinity,
            expected.map(Duration::from_secs),
            "{spec}"
        );
    }
}
