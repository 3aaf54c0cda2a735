//! Twenty thousand connections of all kinds: each is in the log once, with process and
//! identities, and the totals are those that clients and servers counted themselves.

use std::{collections::HashSet, time::Duration};

use anyhow::{Context as _, Result};
use postern_tests::{Lab, Node, binary, eventually, output, text};
use serde_json::Value;

use crate::{
    audit::{metric, verify},
    kit::{at, authorization, is_connection},
    requests::{PYTHON, script},
};

const SHORT: u64 = 8_000;
const NEAR: u64 = 4_000;
const RESET: u64 = 1_000;
const DENIED: u64 = 2_000;
const HTTP: u64 = 3_000;
const GRPC: u64 = 200;
const LONG: u64 = 800;
const UDP: u64 = 1_000;

const ECHO: u16 = 9000;
const CLOSED_OFF: u16 = 9001;
const WEB: u16 = 8080;
const CALLS: u16 = 50051;
const DATAGRAMS: u16 = 5353;

#[test]
fn every_connection_of_twenty_thousand_is_recorded_once_and_in_full() -> Result<()> {
    assert_eq!(
        SHORT + NEAR + RESET + DENIED + HTTP + GRPC + LONG + UDP,
        20_000
    );
    let mut lab = Lab::started()?;
    let server = lab.pod(2, "server")?;
    let (client, near) = (lab.pod(1, "client")?, lab.pod(1, "near")?);
    let echo = server.serve("echo", ECHO)?;
    let near_echo = near.serve("echo", ECHO)?;
    let _closed_off = server.serve("echo", CLOSED_OFF)?;
    let _nginx = server.nginx(WEB, "page")?;
    let grpc = script(&lab, "grpc_peer.py", include_str!("requests/grpc_peer.py"))?;
    let mut python = server.command(PYTHON)?;
    let calls = server.start("grpc", python.args([&grpc, "serve", &CALLS.to_string()]))?;
    calls.says("listening")?;
    let mut probe = server.command(binary("probe")?)?;
    let listen = format!("0.0.0.0:{DATAGRAMS}");
    let datagrams = server.start("udp", probe.args(["datagrams", "--listen", &listen]))?;
    datagrams.says("listening")?;
    lab.policy(
        "closed-off",
        &authorization(
            "closed-off",
            &format!(
                "{{action: DENY, rules: [{{to: [{{operation: {{ports: ['{CLOSED_OFF}']}}}}]}}]}}"
            ),
        ),
    )?;
    lab.policy(
        "private",
        &authorization(
            "private",
            &format!(
                "{{action: DENY, rules: [{{to: [{{operation: {{ports: ['{WEB}', '{CALLS}'], paths: [/private]}}}}]}}]}}"
            ),
        ),
    )?;
    lab.policies(2)?;

    // All kinds at once.
    let storm = |kind: &str, to: &str, count: u64, more: &[&str]| -> Result<_> {
        let mut probe = client.command(binary("probe")?)?;
        probe.args(["storm", to, "--kind", kind, "--count", &count.to_string()]);
        client.start(&format!("{kind}-{count}"), probe.args(more))
    };
    let far = at(&server, ECHO);
    let storms = [
        storm("short", &far, SHORT, &[])?,
        storm("short", &at(&near, ECHO), NEAR, &[])?,
        storm("reset", &far, RESET, &["--threads", "4"])?,
        storm("any", &at(&server, CLOSED_OFF), DENIED, &["--threads", "4"])?,
        storm("http", &at(&server, WEB), HTTP, &["--threads", "4"])?,
        storm("long", &far, LONG, &["--threads", "200"])?,
        storm("udp", &at(&server, DATAGRAMS), UDP, &["--threads", "1"])?,
    ];
    let mut python = client.command(PYTHON)?;
    python.args([
        &grpc,
        "each",
        &at(&server, CALLS),
        "/a.B/C",
        &GRPC.to_string(),
    ]);
    assert_eq!(
        text(&output(&mut python)?.stdout).trim(),
        format!("OK {GRPC}")
    );
    let mut counted = Vec::new();
    for mut storm in storms {
        eventually("a storm is over", Duration::from_secs(240), || {
            storm.child.try_wait().is_ok_and(|status| status.is_some())
        })
        .with_context(|| lab.nodes[0].log())?;
        let told = storm.output();
        counted.push(serde_json::from_str::<Value>(&told).context(told)?);
    }
    let [short, local, reset, denied, http, long, udp] = &counted[..] else {
        unreachable!("seven storms");
    };
    assert_eq!(short["outcomes"]["eof"], SHORT, "{short}");
    assert_eq!(local["outcomes"]["eof"], NEAR, "{local}");
    assert_eq!(reset["outcomes"]["reset by me"], RESET, "{reset}");
    assert_eq!(long["outcomes"]["eof"], LONG, "{long}");
    assert_eq!(http["outcomes"]["403"], HTTP / 3, "{http}");
    assert_eq!(http["outcomes"]["200"], HTTP - HTTP / 3, "{http}");
    assert!(denied["outcomes"]["eof"].is_null(), "{denied}");

    // Source's node: each once, with process, both identities and the socket's bytes.
    let everything = SHORT + NEAR + RESET + DENIED + HTTP + GRPC + LONG;
    let all = |node: usize, total: u64| -> Result<Vec<Value>> {
        let mut records = Vec::new();
        eventually("all are on record", Duration::from_secs(30), || {
            records = lab.nodes[node].audit().unwrap_or_default();
            records.iter().filter(|r| is_connection(r)).count() as u64 >= total
        })
        .with_context(|| format!("{}", records.iter().filter(|r| is_connection(r)).count()))?;
        Ok(records)
    };
    let records = all(0, everything)?;
    let connections: Vec<&Value> = records.iter().filter(|r| is_connection(r)).collect();
    assert_eq!(connections.len() as u64, everything);
    let cookies: HashSet<u64> = (connections.iter())
        .filter_map(|r| r["source"]["socket"]["cookie"].as_u64())
        .collect();
    // An observer that interrupts itself is passed over by the kernel: the agent says how
    // many stories it told without a socket.
    let without = incomplete(&lab.nodes[0])?;
    assert!(without <= everything / 1_000, "{without} without a socket");
    let sockets = cookies.len() as u64;
    assert!(
        sockets + without >= everything,
        "each socket once: {sockets}, {without}"
    );
    for record in &connections {
        assert!(record["source"]["process"]["exe"].is_string(), "{record}");
        for (side, name) in [("source", "client"), ("destination", "server")] {
            let identity = format!("spiffe://cluster.local/ns/shop/sa/{name}");
            let near = "spiffe://cluster.local/ns/shop/sa/near";
            let found = &record[side]["identity"];
            assert!(*found == identity || *found == near, "{record}");
        }
    }
    let to = |records: &[&Value], address: &str| -> (u64, u64, u64) {
        let those = records.iter().filter(|r| r["dialled"] == address);
        those.fold((0, 0, 0), |(count, sent, received), record| {
            let bytes = |what: &str| record["bytes"][what].as_u64().unwrap_or(0);
            (
                count + 1,
                sent + bytes("sent"),
                received + bytes("received"),
            )
        })
    };
    let number = |counts: &[&Value], what: &str| -> u64 {
        counts.iter().filter_map(|c| c[what].as_u64()).sum()
    };
    let echoed = [short, reset, long];
    let expected = (
        SHORT + RESET + LONG,
        number(&echoed, "sent"),
        number(&echoed, "received"),
    );
    assert_eq!(to(&connections, &far), expected, "what clients counted");
    let expected = (NEAR, number(&[local], "sent"), number(&[local], "received"));
    assert_eq!(to(&connections, &at(&near, ECHO)), expected);
    let web = (HTTP, number(&[http], "sent"), number(&[http], "received"));
    assert_eq!(to(&connections, &at(&server, WEB)), web);
    let (count, _, received) = to(&connections, &at(&server, CLOSED_OFF));
    assert_eq!((count, received), (DENIED, 0));
    let verdict = |records: &[&Value], wanted: &str| {
        records.iter().filter(|r| r["verdict"] == wanted).count() as u64
    };
    assert_eq!(verdict(&connections, "deny"), DENIED);
    let local = connections.iter().filter(|r| r["transport"] == "local");
    let by_probe = |r: &&&Value| r["destination"]["process"]["comm"] == "probe";
    assert!(local.filter(by_probe).count() as u64 + without >= NEAR);
    let flows = records
        .iter()
        .filter(|r| r["kind"] == "bypass" && r["protocol"] == "udp");
    let locals: HashSet<&str> = flows.clone().filter_map(|r| r["local"].as_str()).collect();
    assert_eq!((flows.count() as u64, locals.len() as u64), (UDP, UDP));
    assert_eq!(udp["outcomes"]["sent"], UDP);
    datagrams.says("datagrams=")?;

    // Destination's node: the same connections, and what the servers counted.
    let remote = everything - NEAR;
    let records = all(1, remote)?;
    let connections: Vec<&Value> = records.iter().filter(|r| is_connection(r)).collect();
    assert_eq!(connections.len() as u64, remote);
    let (count, sent, received) = to(&connections, &far);
    assert_eq!(count, SHORT + RESET + LONG);
    assert_eq!(
        (sent, received),
        (number(&echoed, "sent"), number(&echoed, "received"))
    );
    assert_eq!(verdict(&connections, "deny"), DENIED + HTTP / 3);
    let seen = connections.iter().filter(|r| {
        r["dialled"] == far
            && r["destination"]["process"]["comm"] == "probe"
            && r["destination"]["socket"]["received"] == r["bytes"]["sent"]
    });
    let without = incomplete(&lab.nodes[1])?;
    assert!(without <= everything / 1_000, "{without} without a socket");
    assert!(seen.count() as u64 + without >= SHORT + RESET + LONG);
    let served = |output: &str| output.lines().filter(|l| l.starts_with("accept=")).count() as u64;
    assert_eq!(
        served(&echo.output()),
        SHORT + RESET + LONG,
        "what the server accepted"
    );
    assert_eq!(served(&near_echo.output()), NEAR);
    let requests = |status: u64, path: &str| {
        let one = |r: &&Value| r["kind"] == "request" && r["status"] == status && r["path"] == path;
        records.iter().filter(one).count() as u64
    };
    assert_eq!(requests(403, "/private"), HTTP / 3);
    assert_eq!(requests(200, "/"), HTTP - HTTP / 3);
    assert_eq!(requests(200, "/a.B/C"), GRPC);
    for node in &lab.nodes {
        let (code, said) = verify(&node.audit_path(), &[])?;
        assert_eq!(code, Some(0), "{said}");
        let gaps: Vec<Value> = node
            .audit()?
            .into_iter()
            .filter(|r| r["kind"] == "gap")
            .collect();
        assert!(gaps.is_empty(), "{gaps:?}");
    }
    Ok(())
}

/// Stories that were told without a socket that they should have.
fn incomplete(node: &Node) -> Result<u64> {
    metric(node, "postern_audit_incomplete_total")
}
