//! What all events have.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::record::Record;
use crate::audit::send::Severity;

pub const VERSION: &str = "1.5.0";

pub struct Class {
    uid: u32,
    name: &'static str,
    category: u32,
}

pub const BASE: Class = class(0, "Base Event", 0);
pub const PROCESS: Class = class(1007, "Process Activity", 1);
pub const AUTHENTICATION: Class = class(3002, "Authentication", 3);
pub const AUTHORIZE_SESSION: Class = class(3003, "Authorize Session", 3);
pub const NETWORK: Class = class(4001, "Network Activity", 4);
pub const LIFECYCLE: Class = class(6002, "Application Lifecycle", 6);
pub const API: Class = class(6003, "API Activity", 6);

const fn class(uid: u32, name: &'static str, category: u32) -> Class {
    Class {
        uid,
        name,
        category,
    }
}

pub struct Event {
    fields: Map<String, Value>,
    profiles: BTreeSet<&'static str>,
}

impl Event {
    pub fn new(class: Class, activity: u32, name: impl Into<String>) -> Self {
        let mut event = Self {
            fields: Map::new(),
            profiles: BTreeSet::new(),
        };
        event.set("activity_id", Some(activity));
        event.set("activity_name", Some(name.into()));
        event.set("category_uid", Some(class.category));
        event.set("class_uid", Some(class.uid));
        event.set("class_name", Some(class.name));
        event.set("type_uid", Some(class.uid * 100 + activity));
        event
    }

    /// What is absent is left out.
    pub fn set(&mut self, name: &str, value: Option<impl Into<Value>>) {
        if let Some(value) = value {
            self.fields.insert(name.into(), value.into());
        }
    }

    /// An attribute that a profile brings.
    pub fn set_by(&mut self, profile: &'static str, name: &str, value: Option<impl Into<Value>>) {
        if value.is_some() {
            self.profiles.insert(profile);
        }
        self.set(name, value);
    }

    pub fn profile(&mut self, profile: &'static str) {
        self.profiles.insert(profile);
    }

    pub fn has(&self, name: &str) -> bool {
        self.fields.contains_key(name)
    }

    pub fn succeeded(&mut self) {
        self.set("status_id", Some(1));
    }

    pub fn failed(&mut self) {
        self.set("status_id", Some(2));
    }

    /// Whether an error is what it came to.
    pub fn outcome(&mut self, record: &mut Record) {
        let error = record.text("/error");
        let reason = record.text("/reason");
        match &error {
            None => self.succeeded(),
            Some(_) => self.failed(),
        }
        self.set("status_code", error);
        self.set("status_detail", reason);
    }

    /// What the mesh decided, and by which policy.
    pub fn verdict(&mut self, record: &mut Record) {
        let decision = match record.text("/verdict").as_deref() {
            Some("allow") => Some((1, 1)),
            Some("deny") => Some((2, 2)),
            _ => None,
        };
        match decision {
            Some((1, _)) => self.succeeded(),
            _ => self.failed(),
        }
        self.decided(decision);
        if let Some(name) = record.text("/policy/name") {
            let namespace = record.text("/policy/namespace");
            let name = namespace.map_or(name.clone(), |namespace| format!("{namespace}/{name}"));
            let kind = record.text("/policy/kind");
            let policy = super::objects::object([
                ("name", Some(json!(name))),
                ("desc", kind.map(Value::from)),
            ]);
            self.set_by("security_control", "policy", policy);
        }
    }

    /// `action_id` and `disposition_id`.
    pub fn decided(&mut self, decision: Option<(u32, u32)>) {
        if let Some((action, disposition)) = decision {
            self.set_by("security_control", "action_id", Some(action));
            self.set_by("security_control", "disposition_id", Some(disposition));
        }
    }

    /// How long it took.
    pub fn span(&mut self, record: &mut Record) {
        let started = record.peek("/started").and_then(|text| milliseconds(&text));
        if started.is_some() {
            record.take("/started");
        }
        let duration = record.number("/durationMs");
        self.set("start_time", started);
        self.set("duration", duration);
        let end = started.zip(duration.and_then(|d| i64::try_from(d).ok()));
        self.set("end_time", end.map(|(start, duration)| start + duration));
    }

    pub fn finish(mut self, record: &Value, mut left: Record) -> Value {
        let time = left.text("/time");
        let when = time.as_deref().and_then(milliseconds);
        let node = left.text("/node").unwrap_or_default();
        let seq = left.number("/seq");
        let kind = left.text("/kind").unwrap_or_default();
        let code = match left.text("/event") {
            Some(event) => format!("{kind}.{event}"),
            None => kind,
        };
        let severity = match Severity::of(record) {
            Severity::Info => 1,
            Severity::Warning => 3,
            Severity::Error => 4,
        };
        // Required, and 0 is what OCSF has for what nobody knows.
        self.set("time", Some(when.unwrap_or(0)));
        self.set("severity_id", Some(severity));
        if !self.has("device") {
            let profile = "host";
            self.set_by(profile, "device", super::objects::device(&node));
        }
        let metadata = super::objects::object([
            ("version", Some(json!(VERSION))),
            ("product", Some(product())),
            ("profiles", Some(json!(self.profiles))),
            ("log_name", Some(json!("audit"))),
            ("log_provider", Some(json!("postern"))),
            ("event_code", Some(json!(code))),
            ("uid", seq.map(|seq| json!(format!("{node}/{seq}")))),
            ("sequence", seq.map(Value::from)),
            ("original_time", time.map(Value::from)),
            ("correlation_uid", left.text("/trace").map(Value::from)),
        ]);
        self.set("metadata", metadata);
        self.set("unmapped", left.rest());
        Value::Object(self.fields)
    }
}

pub fn product() -> Value {
    json!({
        "name": "Postern",
        "vendor_name": "Postern",
        "version": env!("CARGO_PKG_VERSION"),
    })
}

/// Since the epoch.
fn milliseconds(text: &str) -> Option<i64> {
    let time = OffsetDateTime::parse(text, &Rfc3339).ok()?;
    (time.unix_timestamp_nanos() / 1_000_000).try_into().ok()
}
