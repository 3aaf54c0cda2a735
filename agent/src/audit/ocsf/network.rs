//! Network Activity: connections, flows, and traffic that went past the mesh.

use serde_json::{Value, json};

use super::{
    event::{Event, NETWORK},
    objects::{at, endpoint, object, process},
    record::Record,
};

pub fn event(record: &mut Record) -> Option<Event> {
    let connection = record.peek("/kind").as_deref() == Some("connection");
    let mut event = match connection {
        true => self::connection(record),
        false => flow(record),
    };
    event.span(record);
    (event.has("src_endpoint") || event.has("dst_endpoint")).then_some(event)
}

fn connection(record: &mut Record) -> Event {
    // The record is made when it ends.
    let (activity, name) = match record.peek("/verdict").as_deref() {
        Some("allow") => (2, "Close"),
        Some("deny") => (5, "Refuse"),
        _ => (4, "Fail"),
    };
    let mut event = Event::new(NETWORK, activity, name);
    event.verdict(record);
    let (sent, received) = (
        record.number("/bytes/sent"),
        record.number("/bytes/received"),
    );
    event.set("traffic", traffic(sent, received));
    event.set("status_detail", record.text("/end"));
    let version = record.text("/tls/version");
    if let Some(version) = version {
        let cipher = record.text("/tls/cipher").map(Value::from);
        event.set(
            "tls",
            object([("version", Some(json!(version))), ("cipher", cipher)]),
        );
    }
    let process = process(record, "/source/process");
    event.set_by(
        "host",
        "actor",
        process.map(|process| json!({"process": process})),
    );
    let direction = match record.peek("/reporter").as_deref() {
        Some("source") => 2,
        Some("destination") => 1,
        _ => 0,
    };
    let mut source = endpoint(record, "/source");
    let mut destination = endpoint(record, "/destination");
    if let (Some(destination), Some(service)) = (&mut destination, record.text("/service")) {
        destination["svc_name"] = service.into();
    }
    let id = record.number("/id").map(|id| id.to_string());
    event.set("connection_info", Some(info(&source, direction, "tcp", id)));
    event.set("src_endpoint", source.take());
    event.set("dst_endpoint", destination);
    event
}

fn flow(record: &mut Record) -> Event {
    let bypass = record.peek("/kind").as_deref() == Some("bypass");
    let (activity, name) = match record.peek("/event").as_deref() {
        Some("open") => (1, "Open"),
        Some("closed") => (2, "Close"),
        Some("failed") => (4, "Fail"),
        Some("listen") => (7, "Listen"),
        _ => (6, "Traffic"),
    };
    let mut event = Event::new(NETWORK, activity, name);
    match activity {
        4 => event.failed(),
        _ => event.succeeded(),
    }
    event.set("status_code", record.text("/socket/errno"));
    if bypass {
        // Mesh traffic that no policy was asked about: cut, or only seen.
        let cut = record.take("/cut") == Some(json!(true));
        event.decided(Some(if cut { (2, 2) } else { (3, 15) }));
        event.set("status_detail", record.text("/why"));
    }
    let outbound = record.text("/direction");
    let direction = match outbound.as_deref() {
        Some("outbound") => 2,
        Some("inbound") => 1,
        _ => 0,
    };
    let local = record.address("/local");
    let own = at(local, record.text("/pod"), record.text("/identity"));
    let remote = record.address("/remote");
    let other = at(remote, None, None);
    let (sent, received) = (
        record.number("/socket/sent"),
        record.number("/socket/received"),
    );
    let process = process(record, "/process");
    event.set_by(
        "host",
        "actor",
        process.map(|process| json!({"process": process})),
    );
    let protocol = record.text("/protocol").unwrap_or_default();
    let cookie = record
        .number("/socket/cookie")
        .map(|cookie| cookie.to_string());
    event.set(
        "connection_info",
        Some(info(&own, direction, &protocol, cookie)),
    );
    // A listener has nobody on the other side.
    let inbound = direction == 1 || activity == 7;
    let (source, destination) = if inbound { (other, own) } else { (own, other) };
    let (out, back) = if inbound {
        (received, sent)
    } else {
        (sent, received)
    };
    event.set("traffic", traffic(out, back));
    event.set("src_endpoint", source);
    event.set("dst_endpoint", destination);
    event
}

/// From the source, and from the destination.
fn traffic(out: Option<u64>, back: Option<u64>) -> Option<Value> {
    let whole = out.zip(back).map(|(out, back)| out + back);
    object([
        ("bytes_out", out.map(Value::from)),
        ("bytes_in", back.map(Value::from)),
        ("bytes", whole.map(Value::from)),
    ])
}

fn info(end: &Option<Value>, direction: u32, protocol: &str, uid: Option<String>) -> Value {
    let mut info = json!({"direction_id": direction});
    let number = match protocol {
        "tcp" => Some(6),
        "udp" => Some(17),
        _ => None,
    };
    if !protocol.is_empty() {
        info["protocol_name"] = protocol.into();
    }
    if let Some(number) = number {
        info["protocol_num"] = number.into();
    }
    let ip = end.as_ref().and_then(|end| end["ip"].as_str());
    if let Some(ip) = ip {
        info["protocol_ver_id"] = json!(if ip.contains(':') { 6 } else { 4 });
    }
    if let Some(uid) = uid {
        info["uid"] = uid.into();
    }
    info
}
