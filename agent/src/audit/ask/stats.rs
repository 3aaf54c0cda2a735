//! Sums over records: exact, in memory that grows with what is told apart, not with the
//! log.

use std::collections::BTreeMap;

use clap::ValueEnum;
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    entry::{Entry, number, text},
    table::{grid, party, policy},
};

/// What is told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum By {
    Kind,
    Verdict,
    Policy,
    /// Source and destination of connections and requests, by identity.
    Pair,
    Process,
    Gap,
}

/// Sums of connections or of requests.
#[derive(Debug, Default)]
struct Calls {
    calls: u64,
    denied: u64,
    failed: u64,
    sent: u64,
    received: u64,
    /// How many lasted so many milliseconds.
    durations: BTreeMap<u64, u64>,
}

#[derive(Debug, Default, Serialize)]
struct Decided {
    allow: u64,
    deny: u64,
    failed: u64,
}

#[derive(Debug, Default)]
pub struct Stats {
    records: u64,
    first: Option<String>,
    last: Option<String>,
    kinds: BTreeMap<String, u64>,
    /// By kind.
    verdicts: BTreeMap<String, Decided>,
    policies: BTreeMap<String, Decided>,
    /// By source, destination and kind.
    pairs: BTreeMap<(String, String, String), Calls>,
    /// By pod and executable.
    processes: BTreeMap<(String, String), BTreeMap<String, u64>>,
    /// By what is lost, and why.
    gaps: BTreeMap<(String, String), u64>,
}

impl Decided {
    fn add(&mut self, verdict: &str) {
        match verdict {
            "allow" => self.allow += 1,
            "deny" => self.deny += 1,
            _ => self.failed += 1,
        }
    }

    fn cells(&self) -> [String; 3] {
        [self.allow, self.deny, self.failed].map(|count| count.to_string())
    }
}

impl Calls {
    /// The duration that so many hundredths of the calls do not exceed.
    fn percentile(&self, percent: u64) -> Option<u64> {
        let all: u64 = self.durations.values().sum();
        let rank = (all * percent).div_ceil(100).max(1);
        let mut seen = 0;
        let mut durations = self.durations.iter();
        durations
            .find(|(_, count)| {
                seen += **count;
                seen >= rank
            })
            .map(|(duration, _)| *duration)
    }
}

impl Stats {
    pub fn add(&mut self, entry: &Entry) {
        let value = &entry.value;
        let kind = entry.kind();
        self.records += 1;
        let time = text(value, "/time").map(str::to_owned);
        self.first = self.first.take().or_else(|| time.clone());
        self.last = time;
        *self.kinds.entry(kind.to_owned()).or_default() += 1;
        if let Some(verdict) = text(value, "/verdict") {
            let of_kind = self.verdicts.entry(kind.to_owned()).or_default();
            of_kind.add(verdict);
            let policy = policy(&value["policy"]);
            let named = match text(value, "/policy/kind") {
                Some(kind) => format!("{kind} {policy}"),
                None => "none".into(),
            };
            self.policies.entry(named).or_default().add(verdict);
        }
        if matches!(kind, "connection" | "request") {
            self.add_call(kind, value);
        }
        for process in entry.processes() {
            let exe = text(process, "/exe").or_else(|| text(process, "/comm"));
            let key = (owner(value, process), exe.unwrap_or("unknown").to_owned());
            let kinds = self.processes.entry(key).or_default();
            *kinds.entry(kind.to_owned()).or_default() += 1;
        }
        if kind == "gap" {
            let own = |pointer| text(value, pointer).unwrap_or("unknown").to_owned();
            let count = self.gaps.entry((own("/lost"), own("/reason"))).or_default();
            *count += number(value, "/count").unwrap_or(1);
        }
    }

    fn add_call(&mut self, kind: &str, value: &Value) {
        let who = |name: &str| match text(&value[name], "/identity") {
            Some(identity) => identity.to_owned(),
            None => party(&value[name]),
        };
        let key = (who("source"), who("destination"), kind.to_owned());
        let calls = self.pairs.entry(key).or_default();
        calls.calls += 1;
        match text(value, "/verdict") {
            Some("deny") => calls.denied += 1,
            Some("failed") => calls.failed += 1,
            _ => {}
        }
        calls.sent += number(value, "/bytes/sent").unwrap_or(0);
        calls.received += number(value, "/bytes/received").unwrap_or(0);
        if let Some(duration) = number(value, "/durationMs") {
            *calls.durations.entry(duration).or_default() += 1;
        }
    }

    pub fn json(&self, by: &[By]) -> Value {
        let decided = |(name, decided): (&String, &Decided)| json!({"name": name, "allow": decided.allow, "deny": decided.deny, "failed": decided.failed});
        let mut out = json!({"records": self.records, "first": self.first, "last": self.last});
        for by in chosen(by) {
            let (name, section) = match by {
                By::Kind => ("kinds", json!(self.kinds)),
                By::Verdict => ("verdicts", self.verdicts.iter().map(decided).collect()),
                By::Policy => ("policies", self.policies.iter().map(decided).collect()),
                By::Pair => ("pairs", self.pairs.iter().map(pair).collect()),
                By::Process => (
                    "processes",
                    (self.processes.iter())
                        .map(|((pod, exe), kinds)| json!({"pod": pod, "exe": exe, "records": kinds}))
                        .collect(),
                ),
                By::Gap => (
                    "gaps",
                    (self.gaps.iter())
                        .map(|((lost, reason), count)| json!({"lost": lost, "reason": reason, "count": count}))
                        .collect(),
                ),
            };
            out[name] = section;
        }
        out
    }

    /// For people.
    pub fn text(&self, by: &[By]) -> String {
        let span = match (&self.first, &self.last) {
            (Some(first), Some(last)) => format!(", {first} to {last}"),
            _ => String::new(),
        };
        let mut out = format!("{} records{span}\n", self.records);
        for by in chosen(by) {
            let (headings, rows) = self.section(by);
            if !rows.is_empty() {
                out.push('\n');
                out.push_str(&grid(headings, &rows));
            }
        }
        out
    }

    fn section(&self, by: By) -> (&'static [&'static str], Vec<Vec<String>>) {
        let decided = |(name, decided): (&String, &Decided)| {
            [name.clone()].into_iter().chain(decided.cells()).collect()
        };
        match by {
            By::Kind => (
                &["KIND", "RECORDS"],
                (self.kinds.iter())
                    .map(|(kind, count)| vec![kind.clone(), count.to_string()])
                    .collect(),
            ),
            By::Verdict => (
                &["KIND", "ALLOW", "DENY", "FAILED"],
                self.verdicts.iter().map(decided).collect(),
            ),
            By::Policy => (
                &["POLICY", "ALLOW", "DENY", "FAILED"],
                self.policies.iter().map(decided).collect(),
            ),
            By::Pair => (
                &[
                    "SOURCE",
                    "DESTINATION",
                    "KIND",
                    "CALLS",
                    "DENIED",
                    "FAILED",
                    "SENT",
                    "RECEIVED",
                    "P50 MS",
                    "P99 MS",
                ],
                self.pairs.iter().map(pair_row).collect(),
            ),
            By::Process => (
                &["POD", "EXECUTABLE", "RECORDS"],
                (self.processes.iter())
                    .map(|((pod, exe), kinds)| {
                        let all: u64 = kinds.values().sum();
                        vec![pod.clone(), exe.clone(), all.to_string()]
                    })
                    .collect(),
            ),
            By::Gap => (
                &["LOST", "REASON", "COUNT"],
                (self.gaps.iter())
                    .map(|((lost, why), count)| vec![lost.clone(), why.clone(), count.to_string()])
                    .collect(),
            ),
        }
    }
}

/// All, where none is named.
fn chosen(by: &[By]) -> Vec<By> {
    match by {
        [] => By::value_variants().to_vec(),
        some => some.to_vec(),
    }
}

/// The pod of a process: of that end of a call which it is at.
fn owner(value: &Value, process: &Value) -> String {
    let ends = ["source", "destination"].into_iter();
    let mut ends = ends.filter_map(|name| value.get(name));
    let at = ends.find(|end| {
        end.get("process")
            .is_some_and(|own| std::ptr::eq(own, process))
    });
    let (namespace, pod) = {
        let end = at.unwrap_or(value);
        (text(end, "/namespace"), text(end, "/pod"))
    };
    match (namespace, pod) {
        (Some(namespace), Some(pod)) => format!("{namespace}/{pod}"),
        _ => "unknown".into(),
    }
}

fn pair(((source, destination, kind), calls): (&(String, String, String), &Calls)) -> Value {
    json!({
        "source": source, "destination": destination, "kind": kind,
        "calls": calls.calls, "denied": calls.denied, "failed": calls.failed,
        "sent": calls.sent, "received": calls.received,
        "p50Ms": calls.percentile(50), "p99Ms": calls.percentile(99),
    })
}

fn pair_row(
    ((source, destination, kind), calls): (&(String, String, String), &Calls),
) -> Vec<String> {
    let duration = |percent| {
        let duration = calls.percentile(percent);
        duration.map_or_else(String::new, |ms| ms.to_string())
    };
    let names = [source, destination, kind].map(Clone::clone);
    let sums = [
        calls.calls,
        calls.denied,
        calls.failed,
        calls.sent,
        calls.received,
    ];
    names
        .into_iter()
        .chain(sums.map(|sum| sum.to_string()))
        .chain([duration(50), duration(99)])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::ask::filter::tests::entry;

    fn sums() -> Stats {
        let mut stats = Stats::default();
        let mut seq = 0;
        let mut add = |record: Value| {
            seq += 1;
            let mut record = record;
            record["time"] = format!("2026-01-31T11:00:{seq:02}Z").into();
            stats.add(&entry(seq, &record));
        };
        for duration in 1..=20 {
            let verdict = match duration {
                1..=17 => "allow",
                18..=19 => "deny",
                _ => "failed",
            };
            add(json!({
                "kind": "request", "verdict": verdict, "durationMs": duration,
                "policy": {"kind": "AuthorizationPolicy", "namespace": "shop", "name": "p"},
                "source": {"identity": "spiffe://a/ns/shop/sa/cart"},
                "destination": {"address": "10.0.0.2:80"},
            }));
        }
        add(json!({
            "kind": "connection", "verdict": "allow", "bytes": {"sent": 5, "received": 7},
            "source": {"namespace": "shop", "pod": "cart-1", "process": {"exe": "/usr/bin/curl"}},
            "destination": {"identity": "spiffe://a/ns/shop/sa/api"},
        }));
        for _ in 0..2 {
            add(json!({"kind": "gap", "lost": "records", "reason": "disk", "count": 4}));
        }
        stats
    }

    #[test]
    fn totals_are_the_counts_of_records() {
        let json = sums().json(&[]);
        assert_eq!(json["records"], 23);
        assert_eq!(
            json["kinds"],
            json!({"connection": 1, "gap": 2, "request": 20})
        );
        assert_eq!(
            json["verdicts"],
            json!([{"name": "connection", "allow": 1, "deny": 0, "failed": 0},
                {"name": "request", "allow": 17, "deny": 2, "failed": 1}])
        );
        assert_eq!(
            json["policies"],
            json!([{"name": "AuthorizationPolicy shop/p", "allow": 17, "deny": 2, "failed": 1},
                {"name": "none", "allow": 1, "deny": 0, "failed": 0}])
        );
        assert_eq!(
            json["pairs"],
            json!([{"source": "shop/cart-1", "destination": "spiffe://a/ns/shop/sa/api",
                "kind": "connection", "calls": 1, "denied": 0, "failed": 0, "sent": 5, "received": 7,
                "p50Ms": null, "p99Ms": null},
                {"source": "spiffe://a/ns/shop/sa/cart", "destination": "10.0.0.2:80",
                "kind": "request", "calls": 20, "denied": 2, "failed": 1, "sent": 0, "received": 0,
                "p50Ms": 10, "p99Ms": 20}])
        );
        assert_eq!(
            json["processes"],
            json!([{"pod": "shop/cart-1", "exe": "/usr/bin/curl", "records": {"connection": 1}}])
        );
        assert_eq!(
            json["gaps"],
            json!([{"lost": "records", "reason": "disk", "count": 8}])
        );
        assert_eq!(json["first"], "2026-01-31T11:00:01Z");
        assert_eq!(json["last"], "2026-01-31T11:00:23Z");
    }

    #[test]
    fn sections_can_be_chosen() {
        let json = sums().json(&[By::Gap]);
        assert!(json.get("gaps").is_some() && json.get("pairs").is_none());
        let text = sums().text(&[By::Verdict, By::Gap]);
        assert_eq!(
            text,
            "23 records, 2026-01-31T11:00:01Z to 2026-01-31T11:00:23Z\n\n\
             KIND        ALLOW  DENY  FAILED\n\
             connection  1      0     0\n\
             request     17     2     1\n\n\
             LOST     REASON  COUNT\n\
             records  disk    8\n"
        );
    }
}
