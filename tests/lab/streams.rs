//! Bytes, ends and breaks pass through in both directions.

use std::time::Duration;

use anyhow::Result;
use postern_tests::{Lab, Pod, Running, binary, eventually, output, text};

use crate::kit::{ECHO, at, echoes, pair};

const GIB: &str = "1073741824";

#[test]
fn a_server_that_speaks_first() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server, _echo) = pair(&mut lab)?;
    let _greet = server.serve("greet", 9001)?;
    let seen = client.dial(
        &at(&server, 9001),
        &["--wait", "300", "--send", "thanks", "--half-close"],
    )?;
    assert_eq!(seen["text"], "hello from the server\nthanks");
    assert_eq!(seen["end"], "eof");
    Ok(())
}

#[test]
fn a_gibibyte_each_way_arrives_whole() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server, _echo) = pair(&mut lab)?;
    let (_sink, _source) = (server.serve("sink", 9001)?, server.serve("source", 9002)?);
    let up = client.dial(
        &at(&server, 9001),
        &["--pattern", GIB, "--half-close", "--limit", "120"],
    )?;
    let hash = up["sent_hash"].as_str().unwrap_or_default();
    assert_eq!(up["text"], format!("{GIB} {hash}\n"), "{up}");
    let down = client.dial(&at(&server, 9002), &["--limit", "120"])?;
    assert_eq!(down["received"].to_string(), GIB, "{down}");
    assert_eq!(down["hash"], hash);
    let record = lab.nodes[1].record("the bytes are on record", |r| {
        r["dialled"] == at(&server, 9002) && r["bytes"]["received"] == 1_u64 << 30
    })?;
    assert_eq!(record["end"], "closed");
    Ok(())
}

/// Tunnel, same node and plaintext must all behave alike.
fn on_each_path(test: impl Fn(&Pod, &Pod, &str) -> Result<()>) -> Result<()> {
    let mut lab = Lab::started()?;
    let server = lab.pod(2, "server")?;
    let remote = lab.pod(1, "remote")?;
    let local = lab.pod(2, "local")?;
    let outside = postern_tests::PodOptions {
        mesh: Some(false),
        ..Default::default()
    };
    let plain = lab.pod_with(1, "plain", outside)?;
    for (client, path) in [(&remote, "hbone"), (&local, "local"), (&plain, "plaintext")] {
        test(client, &server, path)?;
    }
    Ok(())
}

fn serve(server: &Pod, mode: &str, path: &str) -> Result<(Running, u16)> {
    let port = match path {
        "hbone" => 9100,
        "local" => 9101,
        _ => 9102,
    };
    Ok((server.serve(mode, port)?, port))
}

#[test]
fn half_close_each_way() -> Result<()> {
    on_each_path(|client, server, path| {
        // The client ends first; the answer still comes.
        let (sink, port) = serve(server, "sink", path)?;
        let seen = client.dial(&at(server, port), &["--pattern", "1000000", "--half-close"])?;
        assert!(
            seen["text"]
                .as_str()
                .is_some_and(|t| t.starts_with("1000000 ")),
            "{path} {seen}"
        );
        assert_eq!(seen["end"], "eof", "{path}");
        drop(sink);
        // The server ends first; what the client sends still arrives.
        let (server_side, port) = serve(server, "half-close", path)?;
        let arguments = ["--wait", "300", "--pattern", "1000000", "--half-close"];
        let seen = client.dial(&at(server, port), &arguments)?;
        assert_eq!(
            (&seen["text"], &seen["end"]),
            (&"my last word\n".into(), &"eof".into()),
            "{path}"
        );
        server_side.says("end=eof bytes=1000000")
    })
}

/// Writes, closes and is gone, perhaps before the agent has looked.
#[test]
fn a_client_that_leaves_at_once_is_heard() -> Result<()> {
    on_each_path(|client, server, path| {
        let (echo, port) = serve(server, "sink", path)?;
        for _ in 0..50 {
            let seen = client.dial(&at(server, port), &["--send", "goodbye", "--leave"])?;
            assert_eq!(seen["connect"], "ok", "{path} {seen}");
        }
        let heard = || echo.output().matches("end=eof bytes=7").count();
        eventually(
            &format!("{path}: all are heard"),
            Duration::from_secs(10),
            || heard() == 50,
        )
        .map_err(|e| e.context(format!("{} of 50: {}", heard(), echo.output())))
    })
}

#[test]
fn reset_each_way() -> Result<()> {
    on_each_path(|client, server, path| {
        let (running, port) = serve(server, "reset", path)?;
        let seen = client.dial(&at(server, port), &["--send", "please"])?;
        assert_eq!(seen["end"], "ECONNRESET", "{path} {seen}");
        drop(running);
        let (echo, port) = serve(server, "echo", path)?;
        let seen = client.dial(&at(server, port), &["--send", "x", "--reset"])?;
        assert_eq!(seen["end"], "reset by me", "{path}");
        echo.says("end=ECONNRESET")
    })
}

#[test]
fn nobody_there_is_a_reset_not_a_silence() -> Result<()> {
    on_each_path(|client, server, path| {
        let seen = client.dial(&at(server, 9999), &["--send", "anyone", "--limit", "5"])?;
        // Not EPERM, not a time-out: ECONNREFUSED or ECONNRESET, from `connect` already
        // or from the first read.
        assert!(
            !["EPERM", "ETIMEDOUT", "timeout"].contains(&seen["connect"].as_str().unwrap_or(""))
        );
        // A reset that the write has told of is told once.
        let refused = seen["connect"] != "ok"
            || [&seen["end"], &seen["write"]].contains(&&"ECONNRESET".into());
        assert!(refused, "{path} {seen}");
        Ok(())
    })
}

#[test]
fn two_thousand_connections_at_once() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server, _echo) = pair(&mut lab)?;
    let mut many = client.command(binary("probe")?)?;
    many.args(["many", &at(&server, ECHO), "--count", "2000"]);
    let seen = text(&output(&mut many)?.stdout);
    assert!(
        seen.contains("\"good\":2000"),
        "{seen}\n{}\n{}",
        lab.nodes[0].log(),
        lab.nodes[1].log()
    );
    eventually("all have ended", Duration::from_secs(10), || {
        lab.nodes
            .iter()
            .all(|n| n.status().is_ok_and(|s| s["connections"] == 0))
    })
}

/// Receivers that never read must not hold up others of the same pair of pods.
#[test]
fn a_receiver_that_stops_reading_stalls_only_itself() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server, _echo) = pair(&mut lab)?;
    let _source = server.serve("source", 9001)?;
    let _stalled: Vec<Running> = (0..8)
        .map(|number| {
            // Connects, waits a minute before it reads; the server sends a gibibyte.
            let mut command = client.command(binary("probe")?)?;
            command.args(["dial", &at(&server, 9001), "--wait", "60000"]);
            client.start(&format!("stalled-{number}"), &mut command)
        })
        .collect::<Result<_>>()?;
    std::thread::sleep(Duration::from_secs(2));
    assert!(echoes(&client, &at(&server, ECHO))?);
    for node in &lab.nodes {
        let pid = node.agent_pid().unwrap_or_default();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let rss = status
            .lines()
            .find_map(|l| l.strip_prefix("VmRSS:"))
            .unwrap_or_default();
        let kib: u64 = rss.trim().trim_end_matches(" kB").parse()?;
        assert!(kib < 150_000, "{} holds {kib} KiB", node.name);
    }
    Ok(())
}
