//! Every kind of record, against what the published schema says of its class.

mod schema;

use serde_json::{Value, json};

use schema::Schema;

/// One of each shape, what the log knows and as little as there can be, with the
/// `type_uid` that it is to have. The lab shows them to a validator.
fn samples() -> Vec<(Value, Value)> {
    (include_str!("tests/samples.jsonl").lines())
        .map(|line| {
            let mut sample: Value = serde_json::from_str(line).expect("JSON");
            (sample["record"].take(), sample["type_uid"].take())
        })
        .collect()
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
