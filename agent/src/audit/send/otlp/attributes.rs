//! What a record says, under the names of OpenTelemetry's semantic conventions where
//! they have one, else below `postern.`.

use serde_json::{Value, json};

/// Where in a record an attribute's value is.
const FIELDS: &[(&str, &str)] = &[
    ("postern.seq", "/seq"),
    ("postern.event", "/event"),
    ("postern.reporter", "/reporter"),
    ("postern.transport", "/transport"),
    ("postern.verdict", "/verdict"),
    ("postern.fault", "/fault"),
    ("postern.connection.id", "/id"),
    ("postern.connection.id", "/connection"),
    ("postern.policy.kind", "/policy/kind"),
    ("postern.policy.namespace", "/policy/namespace"),
    ("postern.policy.name", "/policy/name"),
    ("postern.policy.rule", "/policy/rule"),
    ("postern.source.identity", "/source/identity"),
    ("postern.source.namespace", "/source/namespace"),
    ("postern.source.pod", "/source/pod"),
    ("postern.source.workload", "/source/workload"),
    ("postern.destination.identity", "/destination/identity"),
    ("postern.destination.namespace", "/destination/namespace"),
    ("postern.destination.pod", "/destination/pod"),
    ("postern.destination.workload", "/destination/workload"),
    ("postern.destination.service", "/service"),
    ("postern.bytes.sent", "/bytes/sent"),
    ("postern.bytes.received", "/bytes/received"),
    ("postern.duration_ms", "/durationMs"),
    ("postern.lost", "/lost"),
    ("postern.count", "/count"),
    ("http.request.method", "/method"),
    ("url.path", "/path"),
    ("server.address", "/host"),
    ("http.response.status_code", "/status"),
    ("tls.protocol.version", "/tls/version"),
    ("tls.cipher", "/tls/cipher"),
    ("tls.curve", "/tls/group"),
    ("k8s.pod.name", "/pod"),
    ("k8s.namespace.name", "/namespace"),
    ("enduser.id", "/token/sub"),
    ("enduser.id", "/subject"),
    ("postern.client", "/client"),
    ("client.address", "/address"),
    ("error.type", "/error"),
    ("error.type", "/socket/errno"),
];

/// Below a process, wherever that stands.
const PROCESS: &[(&str, &str)] = &[
    ("process.pid", "/pid"),
    ("process.user.id", "/uid"),
    ("postern.process.comm", "/comm"),
    ("process.executable.path", "/exe"),
    ("process.parent_pid", "/parent/pid"),
    ("process.linux.cgroup", "/cgroup"),
    ("container.id", "/container"),
];

pub fn of(record: &Value) -> Vec<(&'static str, Value)> {
    let mut all = Vec::new();
    read(FIELDS, record, &mut all);
    let outbound = record["direction"] == "outbound";
    let (source, destination) = match outbound {
        true => ("/local", "/remote"),
        false => ("/remote", "/local"),
    };
    for (name, port, places) in [
        ("source.address", "source.port", ["/source/address", source]),
        (
            "destination.address",
            "destination.port",
            ["/destination/address", destination],
        ),
    ] {
        let place = places.iter().find_map(|at| record.pointer(at)?.as_str());
        if let Some((address, number)) = place.and_then(address) {
            all.extend([(name, json!(address)), (port, json!(number))]);
        }
    }
    // The reporter's own pod is the one that the node is asked about.
    let own = match record["reporter"].as_str() {
        Some("source") => &record["source"],
        Some("destination") => &record["destination"],
        _ => record,
    };
    if let Some(process) = own.get("process") {
        read(PROCESS, process, &mut all);
    }
    let pod = [
        ("k8s.pod.name", "/pod"),
        ("k8s.namespace.name", "/namespace"),
    ];
    if record.get("reporter").is_some() {
        read(&pod, own, &mut all);
    }
    network(record, &mut all);
    all
}

fn network(record: &Value, all: &mut Vec<(&'static str, Value)>) {
    let transport = match (record["kind"].as_str(), record["protocol"].as_str()) {
        (Some("connection"), _) => "tcp",
        (Some("flow" | "bypass"), Some(protocol @ ("tcp" | "udp"))) => protocol,
        _ => "",
    };
    if !transport.is_empty() {
        all.push(("network.transport", json!(transport)));
    }
    let protocol = record["protocol"].as_str();
    if let Some(version) = protocol.and_then(|protocol| protocol.strip_prefix("http/")) {
        // `http/1` is 1.0 or 1.1: which, is not known.
        all.push(("network.protocol.name", json!("http")));
        all.push(("network.protocol.version", json!(version)));
    }
}

fn read(fields: &[(&'static str, &str)], value: &Value, all: &mut Vec<(&'static str, Value)>) {
    for (name, place) in fields {
        let scalar = |v: &&Value| v.is_string() || v.is_number() || v.is_boolean();
        let found = value.pointer(place).filter(scalar);
        // Names are unique in a record.
        if let Some(found) = found
            && !all.iter().any(|(there, _)| there == name)
        {
            all.push((name, found.clone()));
        }
    }
}

fn address(text: &str) -> Option<(String, u16)> {
    let address: std::net::SocketAddr = text.parse().ok()?;
    Some((address.ip().to_canonical().to_string(), address.port()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get<'a>(all: &'a [(&'static str, Value)], name: &str) -> &'a Value {
        let mut found = all.iter().filter(|(there, _)| *there == name);
        let value = found.next().unwrap_or_else(|| panic!("{name} in {all:?}"));
        assert!(found.next().is_none(), "{name} twice in {all:?}");
        &value.1
    }

    #[test]
    fn a_request() {
        let all = of(&json!({
            "seq": 4, "kind": "request", "connection": 8, "reporter": "destination",
            "protocol": "http/2", "method": "POST", "host": "orders", "path": "/v1", "status": 403,
            "verdict": "deny", "policy": {"kind": "AuthorizationPolicy", "name": "p"},
            "source": {"address": "10.0.0.1:5000", "identity": "spiffe://d/ns/a/sa/b"},
            "destination": {"address": "[::ffff:10.0.0.2]:80", "pod": "o-1", "namespace": "shop",
                "process": {"pid": 7, "exe": "/bin/o"}},
            "token": {"sub": "alice"},
        }));
        for (name, value) in [
            ("postern.seq", json!(4)),
            ("postern.connection.id", json!(8)),
            ("source.address", json!("10.0.0.1")),
            ("source.port", json!(5000)),
            ("destination.address", json!("10.0.0.2")),
            ("http.request.method", json!("POST")),
            ("http.response.status_code", json!(403)),
            ("url.path", json!("/v1")),
            ("server.address", json!("orders")),
            ("network.protocol.version", json!("2")),
            ("process.pid", json!(7)),
            ("process.executable.path", json!("/bin/o")),
            ("k8s.pod.name", json!("o-1")),
            ("k8s.namespace.name", json!("shop")),
            ("enduser.id", json!("alice")),
            ("postern.policy.name", json!("p")),
        ] {
            assert_eq!(get(&all, name), &value, "{name}");
        }
    }

    #[test]
    fn a_flow_has_its_ends_by_its_direction() {
        for (direction, source) in [("outbound", "10.0.0.1"), ("inbound", "192.0.2.9")] {
            let all = of(&json!({
                "kind": "flow", "protocol": "udp", "direction": direction, "pod": "p",
                "local": "10.0.0.1:4000", "remote": "192.0.2.9:53",
                "process": {"pid": 3, "comm": "dig", "parent": {"pid": 1}},
            }));
            assert_eq!(get(&all, "source.address"), source);
            assert_eq!(get(&all, "network.transport"), "udp");
            assert_eq!(get(&all, "process.parent_pid"), 1);
            assert_eq!(get(&all, "k8s.pod.name"), "p");
        }
    }
}
