//! Every filter, what it lets through, and what is no filter.

use std::path::Path;

use clap::Parser;
use serde_json::{Value, json};

use super::*;
use crate::audit::chain::Line;

#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    filter: Filter,
}

fn now() -> OffsetDateTime {
    time::macros::datetime!(2026-01-31 12:00:00 UTC)
}

fn parse(arguments: &str) -> Result<Filter, String> {
    let words = ["postern"].into_iter().chain(arguments.split_whitespace());
    let cli = Cli::try_parse_from(words).map_err(|e| e.to_string())?;
    Ok(cli.filter.settled(now()))
}

pub fn entry(seq: u64, record: &Value) -> Entry {
    Entry::parse(Line {
        seq,
        text: record.to_string(),
        file: Path::new("log").into(),
        number: seq,
    })
    .unwrap_or_else(|e| panic!("{e}"))
}

/// Three records: a request, a connection that was refused, and what the kernel saw.
fn records() -> [Entry; 3] {
    let request = json!({
        "time": "2026-01-31T11:00:00Z", "kind": "request", "verdict": "allow", "method": "GET",
        "path": "/orders/1", "status": 204, "trace": "0af7651916cd43dd8448eb211c80319c",
        "policy": {"kind": "AuthorizationPolicy", "namespace": "shop", "name": "open"},
        "source": {"address": "10.0.0.1:5000", "identity": "spiffe://a/ns/shop/sa/cart",
            "namespace": "shop", "pod": "cart-1"},
        "destination": {"address": "10.0.0.2:80", "identity": "spiffe://a/ns/shop/sa/api",
            "namespace": "shop", "pod": "api-1",
            "process": {"pid": 77, "comm": "nginx", "exe": "/usr/sbin/nginx"}},
    });
    let connection = json!({
        "time": "2026-01-31T11:50:00.5Z", "kind": "connection", "verdict": "deny",
        "policy": {"kind": "AuthorizationPolicy", "namespace": "web", "name": "open", "rule": 1},
        "source": {"address": "10.0.0.9:5000", "identity": "spiffe://a/ns/web/sa/front",
            "namespace": "web", "pod": "front-1", "process": {"pid": 5, "comm": "curl", "exe": "/usr/bin/curl"}},
        "destination": {"address": "10.0.0.2:80", "namespace": "shop", "pod": "api-1"},
    });
    let flow = json!({
        "time": "2026-01-31T11:59:00Z", "kind": "flow", "direction": "outbound", "pod": "cart-1",
        "namespace": "shop", "identity": "spiffe://a/ns/shop/sa/cart", "local": "10.0.0.1:6000",
        "remote": "192.0.2.1:443", "process": {"pid": 6, "comm": "python3", "exe": "/usr/bin/python3"},
    });
    [entry(1, &request), entry(2, &connection), entry(3, &flow)]
}

#[test]
fn what_each_filter_lets_through() {
    let records = records();
    for (arguments, expected) in [
        ("", "123"),
        ("--since 15m", "23"),
        ("--since 2026-01-31T11:50:00.5Z", "23"),
        ("--until 2026-01-31T11:50:00.5Z", "1"),
        ("--until 2026-01-31T12:50:00.6+01:00", "12"),
        ("--since 90m --until 5m", "12"),
        ("--since 9999999999y", "123"),
        ("--seq 2", "2"),
        ("--seq 2..", "23"),
        ("--seq ..2", "12"),
        ("--seq 1..2", "12"),
        ("--kind request", "1"),
        ("--kind request --kind flow", "13"),
        ("--verdict allow", "1"),
        ("--verdict deny --verdict failed", "2"),
        ("--pod cart-1", "13"),
        ("--pod shop/cart-1", "13"),
        ("--pod web/cart-1", ""),
        ("--pod api-1", "12"),
        ("--pod cart", ""),
        ("--namespace web", "2"),
        ("--namespace shop", "123"),
        ("--identity spiffe://a/ns/shop/sa/cart", "13"),
        ("--identity spiffe://a/ns/shop/*", "13"),
        ("--identity spiffe://a/ns/shop/sa/c", ""),
        ("--identity spiffe://*", "123"),
        ("--source shop/cart-1", "13"),
        ("--source spiffe://a/ns/web/*", "2"),
        ("--source 10.0.0.1", "13"),
        ("--destination 10.0.0.1", ""),
        ("--destination 10.0.0.2", "12"),
        ("--destination api-1", "12"),
        ("--destination cart-1", ""),
        ("--policy open", "12"),
        ("--policy web/open", "2"),
        ("--policy web/other", ""),
        ("--process 77", "1"),
        ("--process nginx", "1"),
        ("--process /usr/bin/curl", "2"),
        ("--process python3 --process curl", "23"),
        ("--process python", ""),
        ("--path /orders/1", "1"),
        ("--path /orders/*", "1"),
        ("--path /orders", ""),
        ("--status 204", "1"),
        ("--status 2xx", "1"),
        ("--status 4xx", ""),
        ("--method GET", "1"),
        ("--method get", ""),
        ("--trace 0AF7651916CD43DD8448EB211C80319C", "1"),
        ("--kind request --verdict deny", ""),
        ("--pod cart-1 --kind flow --process python3", "3"),
    ] {
        let filter = parse(arguments).unwrap_or_else(|e| panic!("{arguments}: {e}"));
        let let_through: String = (records.iter())
            .filter(|entry| filter.accepts(entry))
            .map(|entry| entry.line.seq.to_string())
            .collect();
        assert_eq!(let_through, expected, "{arguments}");
    }
}

#[test]
fn what_is_wrong_is_told_with_what_would_be_right() {
    for (arguments, place, right) in [
        ("--since yesterday", "--since", "15m"),
        ("--until 2026-01-31", "--until", "2026-01-31T12:00:00Z"),
        ("--seq 5..2", "--seq", "100..200"),
        ("--seq ..x", "--seq", "100..200"),
        ("--seq=", "--seq", "100..200"),
        ("--kind conection", "--kind", "connection"),
        ("--verdict maybe", "--verdict", "allow, deny, failed"),
        ("--pod a/b/c", "--pod", "namespace/name"),
        ("--pod /a", "--pod", "namespace/name"),
        (
            "--identity cluster.local/ns/a/sa/b",
            "--identity",
            "spiffe://",
        ),
        ("--identity spiffe://*/ns/a", "--identity", "at the end"),
        ("--source a/b/c", "--source", "SPIFFE ID"),
        ("--source spiffe:/x", "--source", "spiffe://"),
        ("--policy a/b/c", "--policy", "namespace/name"),
        ("--process=", "--process", "pid"),
        ("--path orders", "--path", "begins with `/`"),
        ("--status 999", "--status", "4xx"),
        ("--status 9xx", "--status", "4xx"),
        ("--trace 123", "--trace", "32 hexadecimal"),
    ] {
        let error = parse(arguments).expect_err(arguments);
        assert!(
            error.contains(place) && error.contains(right),
            "{arguments}: {error}"
        );
    }
}

#[test]
fn what_is_no_record_is_told_with_its_place() {
    for (text, expected) in [
        ("{", "audit-1.jsonl:7: EOF"),
        ("[]", "has no `kind`"),
        (r#"{"kind": "flow"}"#, "has no `time`"),
        (r#"{"kind": "flow", "time": "now"}"#, "no time of RFC 3339"),
    ] {
        let line = Line {
            seq: 1,
            text: text.into(),
            file: Path::new("audit-1.jsonl").into(),
            number: 7,
        };
        let error = Entry::parse(line)
            .err()
            .map(|e| e.to_string())
            .unwrap_or_default();
        assert!(error.contains(expected), "{text}: {error}");
    }
}
