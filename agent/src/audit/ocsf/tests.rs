//! Every kind of record, against what the published schema says of its class.

mod schema;

use serde_json::{Value, json};

use schema::Schema;

/// One of each shape: what the contract of records knows, and as little as there can be.
fn samples() -> Vec<(Value, u64)> {
    let process = json!({"pid": 77, "uid": 1000, "comm": "curl", "exe": "/usr/bin/curl",
        "argv": "0123456789abcdef", "cgroup": "/kubepods/x", "container": "ab",
        "parent": {"pid": 70, "comm": "sh"}});
    let source = json!({"address": "10.0.0.1:40000", "identity": "spiffe://d/ns/shop/sa/web",
        "pod": "web-1", "namespace": "shop", "workload": "web", "process": process,
        "socket": {"cookie": 5, "sent": 10, "received": 20, "retransmits": 0}});
    let destination = json!({"address": "[2001:db8::2]:80", "pod": "db-1"});
    let policy =
        json!({"kind": "AuthorizationPolicy", "namespace": "shop", "name": "p", "rule": 0});
    let mut all = vec![
        (
            json!({"kind": "connection", "id": 9, "reporter": "source", "transport": "hbone",
            "started": "2026-01-01T00:00:00Z", "durationMs": 1500, "source": source,
            "destination": destination, "dialled": "10.96.0.1:80", "service": "shop/db",
            "protocol": "http/2", "requests": 3, "verdict": "allow", "policy": policy,
            "told": [policy], "tls": {"version": "TLSv1.3", "group": "X25519MLKEM768",
            "peerCertificate": "00"}, "bytes": {"sent": 5, "received": 7}, "end": "closed",
            "trace": "0af7651916cd43dd8448eb211c80319c", "fault": "none"}),
            400_102,
        ),
        (
            json!({"kind": "connection", "reporter": "destination", "verdict": "deny",
            "source": {"address": "10.0.0.9:1"}, "destination": destination}),
            400_105,
        ),
        (
            json!({"kind": "connection", "reporter": "source", "verdict": "failed",
            "source": source, "destination": {}, "fault": "network"}),
            400_104,
        ),
        (json!({"kind": "connection", "verdict": "failed"}), 99),
        (
            json!({"kind": "flow", "protocol": "tcp", "event": "failed", "direction": "outbound",
            "pod": "web-1", "local": "10.0.0.1:4000", "remote": "192.0.2.1:443",
            "process": process, "socket": {"cookie": 3, "errno": "ECONNREFUSED", "sent": 0,
            "received": 0}, "started": "2026-01-01T00:00:00Z", "durationMs": 3}),
            400_104,
        ),
        (
            json!({"kind": "flow", "protocol": "udp", "event": "first", "direction": "inbound",
            "pod": "web-1", "local": "10.0.0.1:53", "remote": "192.0.2.1:4000"}),
            400_106,
        ),
        (
            json!({"kind": "flow", "protocol": "tcp", "event": "listen", "pod": "web-1",
            "local": "0.0.0.0:80"}),
            400_107,
        ),
        (
            json!({"kind": "flow", "protocol": "raw", "event": "open", "pod": "web-1"}),
            400_101,
        ),
        (
            json!({"kind": "bypass", "protocol": "tcp", "event": "closed", "direction": "outbound",
            "pod": "web-1", "local": "10.0.0.1:4000", "remote": "10.0.0.2:80", "why": "host socket",
            "cut": true}),
            400_102,
        ),
        (
            json!({"kind": "request", "connection": 9, "reporter": "destination",
            "protocol": "http/1", "started": "2026-01-01T00:00:00.5Z", "durationMs": 2,
            "source": source, "destination": destination, "method": "GET", "host": "db:80",
            "path": "/a", "status": 200, "verdict": "allow", "policy": policy,
            "token": {"iss": "https://i", "sub": "alice", "aud": ["a"], "checked": "jwt"},
            "outbound": {"object": "shop/o", "grant": "clientCredentials"},
            "trace": "0af7651916cd43dd8448eb211c80319c"}),
            600_302,
        ),
        (
            json!({"kind": "request", "verdict": "deny", "reason": "no token", "method": "MKCOL",
            "source": {"address": "10.0.0.9:1"}, "destination": {}}),
            600_399,
        ),
        (
            json!({"kind": "request", "verdict": "failed", "source": {"address": "10.0.0.9:1"},
            "destination": {}}),
            600_300,
        ),
        (
            json!({"kind": "request", "verdict": "failed", "source": {}, "destination": {}}),
            99,
        ),
        (
            json!({"kind": "process", "event": "exec", "pod": "web-1", "namespace": "shop",
            "process": process}),
            100_701,
        ),
        (
            json!({"kind": "process", "event": "exit", "pod": "web-1", "process": {"pid": 4},
            "code": 1, "signal": 9}),
            100_702,
        ),
        (
            json!({"kind": "token", "identity": "spiffe://d/ns/shop/sa/web", "object": "shop/o",
            "grant": "clientCredentials", "issuer": "as.example", "audiences": ["a"],
            "scopes": ["s"], "durationMs": 12, "lifetime": 300}),
            300_204,
        ),
        (
            json!({"kind": "token", "identity": "spiffe://d/ns/shop/sa/web", "error": "no answer",
            "durationMs": 12}),
            300_204,
        ),
        (
            json!({"kind": "agent", "event": "started", "detail": "version 1"}),
            600_203,
        ),
        (
            json!({"kind": "agent", "event": "stopped", "detail": ""}),
            600_204,
        ),
        (
            json!({"kind": "agent", "event": "policies", "detail": "3"}),
            600_208,
        ),
        (
            json!({"kind": "gap", "lost": "records", "count": 4, "reason": "queue"}),
            99,
        ),
        (json!({"kind": "checkpoint", "signature": "AA=="}), 99),
        (json!({"kind": "retention", "first": 1, "last": 9}), 99),
        (json!({"kind": "reopened"}), 99),
        (json!({"kind": "of tomorrow", "x": {"y": [1]}}), 99),
    ];
    for (event, uid) in [
        ("login", 300_201),
        ("lockout", 300_201),
        ("logout", 300_202),
        ("grant", 300_301),
        ("refusal", 300_301),
        ("consent", 300_301),
        ("code", 300_301),
        ("certificate", 600_301),
        ("join", 600_301),
        ("token", 600_301),
        ("introspection", 600_302),
        ("keys", 600_303),
        ("client", 600_303),
        ("user", 600_303),
        ("revocation", 600_304),
        ("reuse", 600_399),
    ] {
        all.push((json!({"kind": "authority", "event": event}), uid));
        all.push((
            json!({"kind": "authority", "event": event, "grant": "authorization_code",
            "client": "c", "authentication": "private_key_jwt", "subject": "alice",
            "actor": "bob", "audience": ["a"], "scope": ["read"], "jti": "00",
            "error": "invalid_grant", "reason": "used", "address": "192.0.2.7",
            "trace": "0af7651916cd43dd8448eb211c80319c"}),
            uid,
        ));
    }
    for (index, (record, _)) in all.iter_mut().enumerate() {
        record["seq"] = (index + 1).into();
        record["prev"] = "0".repeat(64).into();
        record["time"] = "2026-01-01T00:00:02.25Z".into();
        record["node"] = "node1".into();
    }
    all
}

fn mapped(record: &Value) -> Value {
    super::map(record).unwrap_or_else(|| panic!("{record}"))
}

#[test]
fn every_event_is_as_its_class_has_it() {
    let schema = Schema::published();
    for (record, uid) in samples() {
        let event = mapped(&record);
        assert_eq!(event["type_uid"], uid, "{record}");
        let wrong = schema.wrong(&event);
        assert!(wrong.is_empty(), "{wrong:#?}\n{record}\n{event:#}");
    }
}

/// The check finds what is wrong: else the test above would say nothing.
#[test]
fn wrong_events_are_found() {
    let schema = Schema::published();
    let (record, _) = samples().remove(0);
    let good = mapped(&record);
    for (place, value, part) in [
        ("/time", json!("2026"), "time: no timestamp_t"),
        ("/activity_id", json!(42), "activity_id: 42 is none of"),
        ("/type_uid", json!(400_199), "type_uid"),
        (
            "/metadata/product",
            json!(null),
            "metadata.product: required",
        ),
        (
            "/metadata/profiles",
            json!(["host"]),
            "by the profile security_control",
        ),
        (
            "/connection_info/direction_id",
            json!(null),
            "direction_id: required",
        ),
        (
            "/src_endpoint/pod",
            json!("web"),
            "src_endpoint.pod: unknown",
        ),
        (
            "/src_endpoint/port",
            json!("80"),
            "src_endpoint.port: no port_t",
        ),
        (
            "/src_endpoint",
            json!({"port": 80}),
            "src_endpoint: at_least_one",
        ),
    ] {
        let mut event = good.clone();
        let (parent, name) = place.rsplit_once('/').expect("a place");
        let parent = event.pointer_mut(parent).and_then(Value::as_object_mut);
        let parent = parent.expect("an object");
        match value {
            Value::Null => parent.remove(name),
            value => parent.insert(name.into(), value),
        };
        let wrong = schema.wrong(&event);
        assert!(wrong.iter().any(|w| w.contains(part)), "{place}: {wrong:?}");
    }
}

#[test]
fn nothing_is_left_out() {
    // Values that stand in the event in another form, or not at all because they say
    // what another value says.
    let elsewhere = [
        "/kind",
        "/event",
        "/verdict",
        "/direction",
        "/reporter",
        "/method",
        "/protocol",
    ];
    for (record, _) in samples() {
        let event = mapped(&record);
        let text = event.to_string();
        let mut leaves = Vec::new();
        collect("", &record, &mut leaves);
        for (place, value) in leaves {
            if elsewhere.contains(&place.as_str()) || value == json!("") {
                continue;
            }
            let found = match &value {
                Value::String(s) if s.parse::<std::net::SocketAddr>().is_ok() => {
                    let address: std::net::SocketAddr = s.parse().expect("address");
                    text.contains(&address.ip().to_string())
                        && text.contains(&address.port().to_string())
                }
                Value::String(_) if place == "/started" => event["start_time"].is_i64(),
                Value::Bool(_) => true,
                Value::String(s) => text.contains(s.as_str()),
                other => text.contains(&other.to_string()),
            };
            assert!(found, "{place} {value} of {record} is not in {event:#}");
        }
    }
}

fn collect(place: &str, value: &Value, leaves: &mut Vec<(String, Value)>) {
    match value {
        Value::Object(map) => {
            for (name, value) in map {
                collect(&format!("{place}/{name}"), value, leaves);
            }
        }
        Value::Array(list) => list.iter().for_each(|value| collect(place, value, leaves)),
        leaf => leaves.push((place.to_owned(), leaf.clone())),
    }
}

#[test]
fn values_stand_where_they_belong() {
    let samples = samples();
    let connection = mapped(&samples[0].0);
    for (place, value) in [
        ("/time", json!(1_767_225_602_250_i64)),
        ("/start_time", json!(1_767_225_600_000_i64)),
        ("/end_time", json!(1_767_225_601_500_i64)),
        ("/metadata/uid", json!("node1/1")),
        (
            "/metadata/correlation_uid",
            json!("0af7651916cd43dd8448eb211c80319c"),
        ),
        ("/src_endpoint/ip", json!("10.0.0.1")),
        ("/dst_endpoint/ip", json!("2001:db8::2")),
        ("/dst_endpoint/svc_name", json!("shop/db")),
        ("/traffic/bytes", json!(12)),
        ("/actor/process/parent_process/name", json!("sh")),
        ("/action_id", json!(1)),
        ("/policy/name", json!("shop/p")),
        ("/unmapped/tls/group", json!("X25519MLKEM768")),
        ("/severity_id", json!(1)),
    ] {
        assert_eq!(connection.pointer(place), Some(&value), "{place}");
    }
    // Seen from its own end, which is the destination's.
    let inbound = json!({"kind": "flow", "protocol": "tcp", "event": "closed",
        "direction": "inbound", "pod": "p", "local": "10.0.0.1:80", "remote": "10.0.0.2:9",
        "socket": {"sent": 5, "received": 3}, "node": "n"});
    let event = mapped(&inbound);
    assert_eq!(
        event["traffic"],
        json!({"bytes_in": 5, "bytes_out": 3, "bytes": 8})
    );
    assert_eq!(event["src_endpoint"]["ip"], "10.0.0.2");
    let gap = samples
        .iter()
        .find(|(r, _)| r["kind"] == "gap")
        .expect("a gap");
    assert_eq!(mapped(&gap.0)["message"], "4 records are missing: queue");
    assert_eq!(super::map(&json!({"no": "record"})), None);
}
