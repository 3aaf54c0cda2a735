//! The latest records that say what was decided, bounded in number and in bytes, and
//! what people look for among them.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::record::{At, Verdict, cut, policy, text};

const MOST: usize = 2_000;
const MOST_BYTES: usize = 4 << 20;
const MOST_ANSWERED: usize = 500;
const ANSWERED: usize = 100;

#[derive(Default)]
pub struct Decisions {
    rows: VecDeque<Kept>,
    bytes: usize,
}

struct Kept {
    row: Row,
    at: At,
    /// What a search looks through, in lower case.
    names: String,
    namespaces: Vec<String>,
    /// The record itself.
    line: Box<str>,
}

/// A line of the table.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Row {
    pub seq: u64,
    /// RFC 3339, as the record has it.
    pub time: String,
    pub kind: String,
    /// `allow`, `deny` or `failed`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verdict: Option<Verdict>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub transport: String,
    /// `namespace/pod`, or an address.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub source: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub destination: String,
    /// What it was about: a request's line, what was dialled, what happened.
    pub what: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// Of the process at the source, as the kernel has it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub process: String,
}

/// The query of `GET /api/decisions`. What is absent or empty filters nothing.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Filter {
    /// Of the source or the destination, whole.
    namespace: String,
    /// Part of an identity, a pod, a workload, an address or a host, in any case.
    who: String,
    verdict: String,
    kind: String,
    /// Part of a policy's kind, namespace or name.
    policy: String,
    /// Part of a process's name or path.
    process: String,
    /// RFC 3339: only records from then on.
    since: String,
    /// RFC 3339: only records until then.
    until: String,
    /// Only records before this number: the next page.
    before: Option<u64>,
    /// 1 to 500; 100 where it is not said.
    limit: Option<usize>,
}

/// `GET /api/decisions`, newest first.
#[derive(Debug, Serialize)]
pub struct Found<'a> {
    pub rows: Vec<&'a Row>,
    /// Whether there are older ones that fit.
    pub more: bool,
    /// Records that were looked through, and the number of the oldest.
    pub kept: usize,
    pub oldest: u64,
}

impl Decisions {
    pub fn add(&mut self, record: &Value, line: &str, at: At) {
        let kind = text(record, "/kind");
        // The rest is many and nobody's decision.
        let shown = [
            "connection",
            "request",
            "bypass",
            "token",
            "agent",
            "gap",
            "retention",
            "reopened",
        ];
        if !shown.contains(&kind) || line.len() > MOST_BYTES {
            return;
        }
        self.rows.push_back(Kept::new(record, line, at));
        self.bytes += line.len();
        while self.rows.len() > MOST || self.bytes > MOST_BYTES {
            match self.rows.pop_front() {
                Some(oldest) => self.bytes -= oldest.line.len(),
                None => break,
            }
        }
    }

    /// What fits a filter; an error says what is wrong with the filter.
    pub fn find(&self, filter: &Filter) -> Result<Found<'_>, String> {
        let time = |name: &str, text: &str| match text {
            "" => Ok(None),
            text => At::parse(text)
                .map(Some)
                .ok_or_else(|| format!("{name}: `{text}` is no time such as 2026-01-31T12:00:00Z")),
        };
        let (since, until) = (time("since", &filter.since)?, time("until", &filter.until)?);
        let (who, policy, process) = (
            filter.who.to_lowercase(),
            filter.policy.to_lowercase(),
            filter.process.to_lowercase(),
        );
        let same = |wanted: &str, is: &str| wanted.is_empty() || wanted == is;
        let within =
            |wanted: &str, text: &str| wanted.is_empty() || text.to_lowercase().contains(wanted);
        let fits = |kept: &&Kept| {
            filter.before.is_none_or(|before| kept.row.seq < before)
                && since.is_none_or(|since| kept.at >= since)
                && until.is_none_or(|until| kept.at <= until)
                && same(&filter.kind, &kept.row.kind)
                && same(&filter.verdict, kept.row.verdict.map_or("", Verdict::name))
                && (filter.namespace.is_empty() || kept.namespaces.contains(&filter.namespace))
                && kept.names.contains(&who)
                && within(&policy, kept.row.policy.as_deref().unwrap_or_default())
                && within(&process, &kept.row.process)
        };
        let limit = filter.limit.unwrap_or(ANSWERED).clamp(1, MOST_ANSWERED);
        let mut rows: Vec<&Row> = (self.rows.iter().rev().filter(fits))
            .map(|kept| &kept.row)
            .take(limit + 1)
            .collect();
        let more = rows.len() > limit;
        rows.truncate(limit);
        Ok(Found {
            rows,
            more,
            kept: self.rows.len(),
            oldest: self.rows.front().map_or(0, |kept| kept.row.seq),
        })
    }

    /// The record itself, while it is here.
    pub fn line(&self, seq: u64) -> Option<&str> {
        let found = self.rows.binary_search_by_key(&seq, |kept| kept.row.seq);
        found.ok().map(|index| &*self.rows[index].line)
    }
}

impl Kept {
    fn new(record: &Value, line: &str, at: At) -> Self {
        let kind = text(record, "/kind");
        let own = party(record, "");
        let (source, destination) = match (kind, text(record, "/direction")) {
            ("bypass", "inbound") => (cut(text(record, "/remote")), own),
            ("bypass", _) => (own, cut(text(record, "/remote"))),
            ("token", _) => (cut(text(record, "/identity")), cut(text(record, "/issuer"))),
            _ => (party(record, "/source"), party(record, "/destination")),
        };
        let ends = ["", "/source", "/destination"];
        let of_ends = |names: &[&str]| -> Vec<String> {
            let all = (ends.iter()).flat_map(|end| names.iter().map(move |n| format!("{end}/{n}")));
            all.map(|pointer| cut(text(record, &pointer)))
                .filter(|text| !text.is_empty())
                .collect()
        };
        let mut names = of_ends(&["identity", "pod", "workload", "address"]);
        for pointer in [
            "/host", "/dialled", "/service", "/remote", "/local", "/object", "/subject",
        ] {
            names.push(cut(text(record, pointer)));
        }
        let process = ["/source/process", "/process"]
            .iter()
            .map(|at| {
                (
                    text(record, &format!("{at}/comm")),
                    text(record, &format!("{at}/exe")),
                )
            })
            .find(|(comm, exe)| !comm.is_empty() || !exe.is_empty());
        let row = Row {
            seq: record["seq"].as_u64().unwrap_or(0),
            time: cut(text(record, "/time")),
            kind: cut(kind),
            verdict: Verdict::of(record),
            transport: cut(text(record, "/transport")),
            source,
            destination,
            what: cut(&what(record, kind)),
            policy: policy(record),
            process: match process {
                Some((comm, "")) => cut(comm),
                Some((comm, exe)) => cut(&format!("{comm} ({exe})")),
                None => String::new(),
            },
        };
        Self {
            names: names.join("\n").to_lowercase(),
            namespaces: of_ends(&["namespace"]),
            row,
            at,
            line: line.into(),
        }
    }
}

/// A pod, or the address where none is known.
fn party(record: &Value, at: &str) -> String {
    let field = |name: &str| text(record, &format!("{at}/{name}"));
    match (field("namespace"), field("pod")) {
        ("", _) | (_, "") => cut(field("address")),
        (namespace, pod) => cut(&format!("{namespace}/{pod}")),
    }
}

/// What a record is about, in a line.
fn what(record: &Value, kind: &str) -> String {
    let some = |pointers: &[&str]| -> String {
        let texts = pointers.iter().map(|pointer| text(record, pointer));
        let texts: Vec<&str> = texts.filter(|text| !text.is_empty()).collect();
        texts.join(" ")
    };
    match kind {
        "request" => {
            let line = some(&["/method", "/host", "/path"]);
            match (record["status"].as_u64(), line.as_str()) {
                // It was no request that anybody could read.
                (Some(status), "") => format!("{status} {}", text(record, "/reason")),
                (Some(status), line) => format!("{status} {line}"),
                (None, line) => format!("{line} {}", text(record, "/reason")),
            }
        }
        "connection" => some(&["/service", "/dialled", "/protocol"]),
        "bypass" => some(&["/event", "/protocol", "/why"]),
        "token" => some(&["/grant", "/object", "/error"]),
        "gap" => {
            let count = record["count"].as_u64().unwrap_or(0);
            let (lost, reason) = (text(record, "/lost"), text(record, "/reason"));
            format!("{count} lost: {lost} {reason}")
                .trim_end()
                .to_owned()
        }
        _ => some(&["/event", "/detail"]),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn add(decisions: &mut Decisions, mut record: Value, seq: u64) {
        record["seq"] = seq.into();
        record["time"] = At::from_seconds(seq as i64).to_string().into();
        let at = At::from_seconds(seq as i64);
        decisions.add(&record, &record.to_string(), at);
    }

    fn some() -> Decisions {
        let mut decisions = Decisions::default();
        let web = json!({"address": "10.0.1.10:1", "namespace": "shop", "pod": "web-0",
            "workload": "web", "identity": "spiffe://cluster.local/ns/shop/sa/web",
            "process": {"comm": "curl", "exe": "/usr/bin/curl"}});
        let bank = json!({"address": "10.0.2.10:80", "namespace": "bank", "pod": "db-0"});
        for (seq, record) in [
            (
                1,
                json!({"kind": "connection", "transport": "hbone", "verdict": "allow",
                "source": web, "destination": bank, "dialled": "10.0.2.10:80"}),
            ),
            (
                2,
                json!({"kind": "request", "verdict": "deny", "source": web, "destination": bank,
                "method": "GET", "host": "bank.example", "path": "/<b>", "status": 403,
                "policy": {"kind": "AuthorizationPolicy", "namespace": "bank", "name": "Nobody"}}),
            ),
            (
                3,
                json!({"kind": "flow", "namespace": "shop", "pod": "web-0"}),
            ),
            (
                4,
                json!({"kind": "bypass", "direction": "outbound", "namespace": "shop",
                "pod": "web-0", "remote": "198.51.100.1:53", "event": "first", "protocol": "udp",
                "why": "UDP is not carried", "cut": false, "process": {"comm": "dig"}}),
            ),
            (
                5,
                json!({"kind": "token", "identity": "spiffe://cluster.local/ns/shop/sa/web",
                "grant": "tokenExchange", "object": "shop/api", "error": "invalid_grant"}),
            ),
            (
                6,
                json!({"kind": "agent", "event": "started", "detail": "version 1"}),
            ),
            (
                7,
                json!({"kind": "gap", "lost": "records", "count": 3, "reason": "queue"}),
            ),
        ] {
            add(&mut decisions, record, seq);
        }
        decisions
    }

    fn found(decisions: &Decisions, filter: Value) -> Vec<u64> {
        let filter = serde_json::from_value(filter).expect("a filter");
        let found = decisions.find(&filter).expect("found");
        found.rows.iter().map(|row| row.seq).collect()
    }

    #[test]
    fn filters_find_what_fits() {
        let decisions = some();
        for (filter, expected) in [
            (json!({}), vec![7, 6, 5, 4, 2, 1]),
            (json!({"namespace": "shop"}), vec![4, 2, 1]),
            (json!({"namespace": "sho"}), vec![]),
            (json!({"namespace": "bank"}), vec![2, 1]),
            (json!({"who": "SA/WEB"}), vec![5, 2, 1]),
            (json!({"who": "bank.example"}), vec![2]),
            (json!({"who": "198.51.100"}), vec![4]),
            (json!({"verdict": "deny"}), vec![2]),
            (json!({"verdict": "failed"}), vec![5]),
            (json!({"kind": "connection"}), vec![1]),
            (json!({"policy": "bank/nobody"}), vec![2]),
            (json!({"process": "CURL"}), vec![2, 1]),
            (json!({"process": "dig"}), vec![4]),
            (json!({"since": "1970-01-01T00:00:05Z"}), vec![7, 6, 5]),
            (json!({"until": "1970-01-01T00:00:02Z"}), vec![2, 1]),
            (json!({"before": 4}), vec![2, 1]),
            (json!({"limit": 2}), vec![7, 6]),
            (json!({"verdict": "deny", "kind": "connection"}), vec![]),
        ] {
            assert_eq!(found(&decisions, filter.clone()), expected, "{filter}");
        }
        let wrong: Filter = serde_json::from_value(json!({"since": "noon"})).expect("a filter");
        assert!(
            decisions
                .find(&wrong)
                .expect_err("no time")
                .contains("noon")
        );
        assert!(serde_json::from_value::<Filter>(json!({"sinse": ""})).is_err());
    }

    #[test]
    fn rows_say_what_happened() {
        let decisions = some();
        let found = decisions.find(&Filter::default()).expect("found");
        let what: Vec<_> = found.rows.iter().map(|row| row.what.as_str()).collect();
        assert_eq!(
            what,
            [
                "3 lost: records queue",
                "started version 1",
                "tokenExchange shop/api invalid_grant",
                "first udp UDP is not carried",
                "403 GET bank.example /<b>",
                "10.0.2.10:80",
            ]
        );
        assert_eq!(found.rows[4].source, "shop/web-0");
        assert_eq!(found.rows[4].process, "curl (/usr/bin/curl)");
        assert_eq!(found.rows[3].destination, "198.51.100.1:53");
        assert!(!found.more);
        let line = decisions.line(2).expect("it is there");
        assert_eq!(
            serde_json::from_str::<Value>(line).expect("JSON")["status"],
            403
        );
        assert_eq!(decisions.line(3), None);
    }

    #[test]
    fn the_number_and_the_bytes_are_bounded() {
        let mut decisions = Decisions::default();
        for seq in 0..MOST as u64 + 5 {
            add(&mut decisions, json!({"kind": "agent", "event": "e"}), seq);
        }
        assert_eq!((decisions.rows.len(), decisions.rows[0].row.seq), (MOST, 5));
        let long = "x".repeat(MOST_BYTES / 8);
        for seq in 0..16 {
            add(
                &mut decisions,
                json!({"kind": "agent", "detail": long}),
                10_000 + seq,
            );
        }
        assert!(decisions.bytes <= MOST_BYTES && decisions.rows.len() == 7);
        let sum: usize = decisions.rows.iter().map(|kept| kept.line.len()).sum();
        assert_eq!(sum, decisions.bytes);
        let too_long = "x".repeat(MOST_BYTES);
        add(
            &mut decisions,
            json!({"kind": "agent", "detail": too_long}),
            20_000,
        );
        assert_eq!(decisions.rows.len(), 7);
    }
}
