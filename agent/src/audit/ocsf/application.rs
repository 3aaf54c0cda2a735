//! API Activity of requests, and the agent's own life.

use serde_json::{Value, json};

use super::{
    event::{API, Event, LIFECYCLE, product},
    objects::{endpoint, object, process},
    record::Record,
};

/// Those that `http_method` can be; PATCH is not among them.
const METHODS: [&str; 8] = [
    "CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "POST", "PUT", "TRACE",
];

pub fn request(record: &mut Record) -> Option<Event> {
    let method = record.peek("/method").unwrap_or_default();
    if METHODS.contains(&method.as_str()) {
        record.take("/method");
    }
    let activity = match method.as_str() {
        "POST" => 1,
        "GET" | "HEAD" | "OPTIONS" | "TRACE" => 2,
        "PUT" | "PATCH" => 3,
        "DELETE" => 4,
        "" => 0,
        _ => 99,
    };
    let name = match activity {
        0 => "Unknown",
        1 => "Create",
        2 => "Read",
        3 => "Update",
        4 => "Delete",
        _ => &method,
    };
    let mut event = Event::new(API, activity, name);
    event.verdict(record);
    event.span(record);
    event.set("status_detail", record.text("/reason"));
    let user = record.text("/token/sub");
    let issuer = record.text("/token/iss");
    let app = record.peek("/source/identity");
    // Required; who has no identity is not known.
    let unknown = (user.is_none() && app.is_none()).then(|| json!("unknown"));
    let actor = object([
        ("user", user.map(|uid| json!({"uid": uid}))),
        ("idp", issuer.map(|issuer| json!({"name": issuer}))),
        ("app_uid", app.map(Value::from)),
        ("app_name", unknown),
        ("process", process(record, "/source/process")),
    ]);
    event.set("actor", actor);
    let path = record.text("/path");
    let host = record.text("/host");
    let operation = [Some(method.as_str()), path.as_deref()];
    let operation: Vec<_> = operation
        .into_iter()
        .flatten()
        .filter(|t| !t.is_empty())
        .collect();
    let operation = match operation.is_empty() {
        true => "unknown".to_owned(),
        false => operation.join(" "),
    };
    let service = host.clone().map(|name| json!({"name": name}));
    event.set(
        "api",
        object([("operation", Some(json!(operation))), ("service", service)]),
    );
    let url = path.map(|path| {
        let mut url = json!({"path": path, "scheme": "http"});
        if let Some(host) = host {
            url["hostname"] = host.into();
        }
        url
    });
    let version = record.text("/protocol");
    let version = version.and_then(|v| Some(json!(v.strip_prefix("http/")?)));
    let method = METHODS.contains(&method.as_str()).then(|| json!(method));
    event.set(
        "http_request",
        object([("http_method", method), ("url", url), ("version", version)]),
    );
    let status = record.number("/status");
    event.set("http_response", status.map(|code| json!({"code": code})));
    let trace = record.peek("/trace");
    event.set_by("trace", "trace", trace.map(|uid| json!({"uid": uid})));
    event.set("src_endpoint", endpoint(record, "/source"));
    event.set("dst_endpoint", endpoint(record, "/destination"));
    event.has("src_endpoint").then_some(event)
}

pub fn agent(record: &mut Record) -> Option<Event> {
    let what = record.peek("/event").unwrap_or_default();
    let (activity, name) = match what.as_str() {
        "started" => (3, "Start"),
        "stopped" => (4, "Stop"),
        "policies" => (8, "Update"),
        other => (99, other),
    };
    let mut event = Event::new(LIFECYCLE, activity, name);
    event.set("app", Some(product()));
    event.set(
        "message",
        record.text("/detail").filter(|text| !text.is_empty()),
    );
    Some(event)
}
