//! Logins and tokens.

use serde_json::{Value, json};

use super::{
    event::{API, AUTHENTICATION, AUTHORIZE_SESSION, Event},
    objects::{at, object},
    record::Record,
};

const OAUTH: u32 = 6;
const OPENID: u32 = 4;
const AUTHORITY: &str = "postern authority";

/// A token that the agent got for a workload, or failed to get.
pub fn token(record: &mut Record) -> Option<Event> {
    let mut event = Event::new(AUTHENTICATION, 4, "Service Ticket Request");
    event.outcome(record);
    event.span(record);
    event.set("auth_protocol_id", Some(OAUTH));
    event.set("user", user(record.text("/identity")));
    let issuer = record.text("/issuer").unwrap_or_else(|| "unknown".into());
    event.set("service", Some(json!({"name": issuer})));
    Some(event)
}

pub fn authority(record: &mut Record) -> Option<Event> {
    let what = record.peek("/event")?;
    let mut event = match what.as_str() {
        "login" | "lockout" => Event::new(AUTHENTICATION, 1, "Logon"),
        "logout" => Event::new(AUTHENTICATION, 2, "Logoff"),
        "grant" | "refusal" | "consent" | "code" => {
            Event::new(AUTHORIZE_SESSION, 1, "Assign Privileges")
        }
        "certificate" | "join" | "token" => Event::new(API, 1, "Create"),
        "introspection" => Event::new(API, 2, "Read"),
        "keys" | "client" | "user" => Event::new(API, 3, "Update"),
        "revocation" => Event::new(API, 4, "Delete"),
        other => Event::new(API, 99, other),
    };
    event.outcome(record);
    let from = at(record.address("/address"), None, None);
    match what.as_str() {
        "login" | "lockout" | "logout" => {
            event.set("auth_protocol_id", Some(OPENID));
            event.set("service", Some(json!({"name": AUTHORITY})));
            event.set("is_remote", from.is_some().then_some(true));
            event.set("src_endpoint", from);
            event.set("user", user(record.text("/subject")));
        }
        "grant" | "refusal" | "consent" | "code" => {
            session(record, &mut event);
            event.set("src_endpoint", from);
            let whom = record.text("/subject").or_else(|| record.text("/client"));
            event.set("user", user(whom));
        }
        _ => {
            let (subject, client) = (record.text("/subject"), record.text("/client"));
            let unknown = (subject.is_none() && client.is_none()).then(|| json!("unknown"));
            let actor = object([
                ("user", subject.map(|uid| json!({"uid": uid}))),
                ("app_uid", client.map(Value::from)),
                ("app_name", unknown),
            ]);
            event.set("actor", actor);
            let api = json!({"operation": what, "service": {"name": AUTHORITY}});
            event.set("api", Some(api));
            // Required; what has no address was done on the authority's own host.
            let here = record.peek("/node").map(|node| json!({"name": node}));
            event.set("src_endpoint", from.or(here));
        }
    }
    if what == "lockout" || what == "reuse" {
        event.failed();
    }
    Some(event)
}

/// Exactly one of privileges and group is required: the scopes, or whom the token is for.
fn session(record: &mut Record, event: &mut Event) {
    let list = |value: Value| {
        value
            .as_array()
            .is_some_and(|l| !l.is_empty())
            .then_some(value)
    };
    let privileges = record.take("/scope").and_then(list);
    let privileges = privileges.or_else(|| record.take("/audience").and_then(list));
    event.set(
        "privileges",
        Some(privileges.unwrap_or_else(|| json!(["none"]))),
    );
    let jti = record.text("/jti");
    event.set(
        "session",
        jti.map(|uid| json!({"uid": uid, "issuer": AUTHORITY})),
    );
    let actor = record.text("/actor");
    event.set("actor", actor.map(|uid| json!({"user": {"uid": uid}})));
}

fn user(uid: Option<String>) -> Option<Value> {
    Some(match uid {
        Some(uid) => json!({"uid": uid}),
        None => json!({"name": "unknown", "type_id": 0}),
    })
}
