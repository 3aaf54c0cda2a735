//! What would be otherwise, in groups.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{call::Call, written};
use crate::{audit::ask::grid, judge::past::Carried, policy::PolicyRef};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    /// It was allowed, and would not be.
    Denied,
    /// It was denied, and would not be.
    Allowed,
    Undecidable,
}

/// Calls that are alike.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    change: Change,
    source: String,
    destination: String,
    /// Of a request its method and the form of its path; of a connection its port.
    call: String,
    /// The policy that would decide.
    policy: Option<String>,
    why: String,
}

#[derive(Debug)]
struct Group {
    calls: u64,
    first: OffsetDateTime,
    last: OffsetDateTime,
}

#[derive(Debug, Default)]
pub struct Report {
    unchanged: u64,
    groups: BTreeMap<Key, Group>,
    /// Records that tell of no judgement, and why.
    unjudged: BTreeMap<String, u64>,
}

impl Key {
    pub fn new(change: Change, call: &Call, policy: Option<&PolicyRef>, why: String) -> Self {
        let source = match &call.facts.source {
            Some(identity) => identity.to_string(),
            None => call.facts.source_ip.to_string(),
        };
        let what = match &call.carried {
            Carried::Request(request) => format!(
                "{} {}",
                request.method.as_deref().unwrap_or("?"),
                request.path.as_deref().map_or("?".into(), form)
            ),
            Carried::Unread | Carried::Raw => format!("port {}", call.facts.destination.port()),
        };
        Self {
            change,
            source,
            destination: call.destination.name(),
            call: what,
            policy: policy.map(written),
            why,
        }
    }
}

impl Report {
    pub fn add(&mut self, key: Key, time: OffsetDateTime) {
        let group = self.groups.entry(key).or_insert(Group {
            calls: 0,
            first: time,
            last: time,
        });
        group.calls += 1;
        group.first = group.first.min(time);
        group.last = group.last.max(time);
    }

    pub fn unchanged(&mut self) {
        self.unchanged += 1;
    }

    pub fn unjudged(&mut self, why: impl Into<String>) {
        *self.unjudged.entry(why.into()).or_default() += 1;
    }

    /// How many calls there are of a change.
    pub fn calls(&self, change: Change) -> u64 {
        let groups = self.groups.iter().filter(|(key, _)| key.change == change);
        groups.map(|(_, group)| group.calls).sum()
    }

    pub fn changes(&self) -> bool {
        self.calls(Change::Denied) + self.calls(Change::Allowed) > 0
    }

    pub fn has_undecidable(&self) -> bool {
        self.calls(Change::Undecidable) > 0
    }

    pub fn json(&self) -> Value {
        let of = |change| -> Vec<Value> {
            let groups = self.groups.iter().filter(|(key, _)| key.change == change);
            groups.map(|(key, group)| group_json(key, group)).collect()
        };
        json!({
            "newlyDenied": of(Change::Denied),
            "newlyAllowed": of(Change::Allowed),
            "undecidable": of(Change::Undecidable),
            "unchanged": self.unchanged,
            "unjudged": self.unjudged,
        })
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut out = String::new();
        for (change, title) in [
            (Change::Denied, "newly denied"),
            (Change::Allowed, "newly allowed"),
            (Change::Undecidable, "undecidable"),
        ] {
            out.push_str(&format!("{title}: {} calls\n", self.calls(change)));
            let rows: Vec<Vec<String>> = (self.groups.iter())
                .filter(|(key, _)| key.change == change)
                .map(|(key, group)| row(key, group))
                .collect();
            if !rows.is_empty() {
                let headings = [
                    "CALLS",
                    "SOURCE",
                    "DESTINATION",
                    "CALL",
                    "FIRST",
                    "LAST",
                    "POLICY",
                    "WHY",
                ];
                out.push_str(&grid(&headings, &rows));
                out.push('\n');
            }
        }
        out.push_str(&format!("unchanged: {} calls\n", self.unchanged));
        for (why, count) in &self.unjudged {
            out.push_str(&format!("not judged: {count}: {why}\n"));
        }
        out
    }
}

fn group_json(key: &Key, group: &Group) -> Value {
    let mut json = json!({
        "source": key.source,
        "destination": key.destination,
        "call": key.call,
        "policy": key.policy,
        "calls": group.calls,
        "first": stamp(group.first),
        "last": stamp(group.last),
    });
    if !key.why.is_empty() {
        json["why"] = key.why.clone().into();
    }
    json
}

fn row(key: &Key, group: &Group) -> Vec<String> {
    let none = match key.change {
        Change::Allowed => "no ALLOW policy selects it",
        _ => "",
    };
    vec![
        group.calls.to_string(),
        key.source.clone(),
        key.destination.clone(),
        key.call.clone(),
        stamp(group.first),
        stamp(group.last),
        key.policy.clone().unwrap_or_else(|| none.into()),
        key.why.clone(),
    ]
}

fn stamp(time: OffsetDateTime) -> String {
    time.format(&Rfc3339).unwrap_or_default()
}

/// A path with `{*}` for segments that look like names of single things: numbers, UUIDs
/// and the like.
pub fn form(path: &str) -> String {
    let is_id = |segment: &str| {
        let digits = segment.bytes().filter(u8::is_ascii_digit).count();
        let hex = |b: u8| b.is_ascii_hexdigit() || b == b'-';
        let number = digits > 0 && digits == segment.len();
        number
            || (segment.len() >= 8 && digits > 0 && segment.bytes().all(hex))
            || (segment.len() >= 20 && digits >= 3)
    };
    let segments = path.split('/').map(|segment| match is_id(segment) {
        true => "{*}",
        false => segment,
    });
    segments.collect::<Vec<_>>().join("/")
}
