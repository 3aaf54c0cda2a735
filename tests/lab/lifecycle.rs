//! The agent dies, comes back, stops, and is removed.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};
use postern_tests::{
    Capture, Lab, Node, Pod, audit_records, binary, count_bytes, eventually, output,
};
use serde_json::Value;

use crate::kit::{ECHO, at, echoes, is_connection, pair};

const MARKER: &str = "NOT-IN-PLAINTEXT-EVEN-NOW";

#[test]
fn when_the_agent_is_killed_nothing_leaves_in_plaintext() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server, _echo) = pair(&mut lab)?;
    let mut stay = client.command(binary("probe")?)?;
    let stay = client.start(
        "stay",
        stay.args(["stay", &at(&server, ECHO), "--every", "5"]),
    )?;
    stay.says("beat 000010")?;
    let capture = Capture::start(&lab.nodes[0], lab.path().join("wire.pcap"))?;
    lab.nodes[0].kill();
    stay.says("ended")?;
    for _ in 0..20 {
        let seen = client.dial(&at(&server, ECHO), &["--send", MARKER, "--limit", "3"])?;
        assert_ne!(seen["connect"], "ok", "{seen}");
    }
    // Inbound fails closed, too: nobody reaches a pod past its dead agent.
    let server_on_1 = client.serve("echo", ECHO)?;
    let mut curl = lab.nodes[1].command("curl")?;
    curl.args(["-s", "-m", "3", &format!("telnet://{}", at(&client, ECHO))]);
    assert!(!curl.output()?.status.success());
    assert!(!server_on_1.output().contains("accept"));
    let file = capture.stop()?;
    assert_eq!(count_bytes(&file, MARKER.as_bytes())?, 0);
    assert_eq!(count_bytes(&file, b"beat 0")?, 0);
    // The next agent takes over what is pinned, and traffic resumes.
    lab.nodes[0].start()?;
    lab.known(&client)?;
    assert!(
        echoes(&client, &at(&server, ECHO))?,
        "{}",
        lab.nodes[0].log()
    );
    Ok(())
}

/// Where programs stay that no agent has to load again.
fn kept(node: &Node) -> Result<PathBuf> {
    let pins = fs::read_dir(node.pin())?.collect::<std::io::Result<Vec<_>>>()?;
    let mut kept = pins.iter().map(fs::DirEntry::path);
    let mut kept = kept.by_ref().filter(|path| {
        let name = path.file_name().unwrap_or_default();
        name.to_string_lossy().starts_with("programs-")
    });
    let found = kept.next().context("no programs are kept")?;
    assert_eq!(kept.next(), None);
    Ok(found)
}

/// An agent that was killed comes back, carries, and is told by its observers of both ends.
fn comes_back(lab: &mut Lab, client: &Pod, server: &Pod) -> Result<()> {
    lab.nodes[0].kill();
    assert!(!echoes(client, &at(server, ECHO))?, "nobody is there");
    lab.nodes[0].start()?;
    lab.known(client)?;
    let node = &lab.nodes[0];
    let before = audit_records(&node.audit_path())?.len();
    assert!(echoes(client, &at(server, ECHO))?, "{}", node.log());
    eventually("its records are whole", Duration::from_secs(20), || {
        let records = audit_records(&node.audit_path()).unwrap_or_default();
        let new = || records.iter().skip(before);
        let connection =
            new().any(|r| is_connection(r) && !r["source"]["process"]["exe"].is_null());
        connection && new().any(|r| r["kind"] == "process" && r["event"] == "exit")
    })
    .with_context(|| node.log())
}

#[test]
fn programs_stay_loaded_for_the_next_agent_where_they_are_the_same() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server, _echo) = pair(&mut lab)?;
    lab.known(&client)?;
    let first = kept(&lab.nodes[0])?;
    let blind = |node: &Node| -> Result<Value> { Ok(node.status()?["problems"].clone()) };
    let problems = blind(&lab.nodes[0])?;
    for _ in 0..2 {
        comes_back(&mut lab, &client, &server)?;
        assert_eq!(kept(&lab.nodes[0])?, first);
        assert_eq!(blind(&lab.nodes[0])?, problems);
    }
    // What is not right any more is loaded anew: a program that is gone, what is known of
    // them, maps, a configuration.
    let state = lab.path().join("node1/state/programs.json");
    let mut last = first;
    let maps = |node: &Node| -> Result<()> {
        for pinned in fs::read_dir(node.pin())?.flatten() {
            if pinned.file_name().to_string_lossy().starts_with("maps-") {
                fs::remove_dir_all(pinned.path())?;
            }
        }
        Ok(())
    };
    for change in ["program", "known", "torn", "maps", "configuration"] {
        lab.nodes[0].kill();
        match change {
            "program" => fs::remove_file(last.join("postern_sockops"))?,
            "known" => fs::remove_file(&state)?,
            "torn" => fs::write(&state, &fs::read(&state)?[..20])?,
            "maps" => maps(&lab.nodes[0])?,
            _ => lab.nodes[0].options.kernel += ", eventsPerSecond: 777",
        }
        comes_back(&mut lab, &client, &server).context(change)?;
        let now = kept(&lab.nodes[0])?;
        assert_ne!(now, last, "{change}");
        last = now;
    }
    Ok(())
}

#[test]
fn an_agent_of_another_node_is_refused() -> Result<()> {
    let lab = Lab::started()?;
    let node = &lab.nodes[0];
    let config = std::fs::read_to_string(node.config_path())?;
    let other = lab.path().join("second.yaml");
    std::fs::write(
        &other,
        config.replace("node: node1", "node: another")
            + "listen: {admin: '127.0.0.1:16000', metrics: '127.0.0.1:16020', ready: '127.0.0.1:16021'}\n",
    )?;
    let mut second = node.command(binary("postern")?)?;
    let refused = second.arg("run").arg("--config").arg(&other).output()?;
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("held by another agent"));
    assert!(node.status()?["ready"].as_bool().unwrap_or(false));
    Ok(())
}

#[test]
fn sigterm_drains_and_what_is_open_goes_on() -> Result<()> {
    let mut lab = Lab::new(2)?;
    for node in &mut lab.nodes {
        node.options.more = "drain: {timeout: 3s}\n".into();
        node.start()?;
    }
    let (client, server, _echo) = pair(&mut lab)?;
    let mut stay = client.command(binary("probe")?)?;
    let stay = client.start("stay", stay.args(["stay", &at(&server, ECHO)]))?;
    stay.says("beat 000001")?;
    let pid = lab.nodes[1].agent_pid().unwrap_or_default();
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid),
        nix::sys::signal::Signal::SIGTERM,
    )?;
    let at_signal = stay.output().lines().count();
    std::thread::sleep(Duration::from_millis(1500));
    assert!(
        stay.output().lines().count() > at_signal + 10,
        "it goes on: {}",
        stay.output()
    );
    assert!(!stay.output().contains("ended"));
    lab.nodes[1].stop()?;
    stay.says("ended")?;
    lab.nodes[1].record("it says how it ended", |r| {
        r["end"].as_str().is_some_and(|e| e.contains("shutdown"))
    })?;
    lab.nodes[1].record("the agent says that it stopped", |r| {
        r["event"] == "stopped"
    })?;
    Ok(())
}

#[test]
fn a_drain_without_connections_is_short() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server, _echo) = pair(&mut lab)?;
    assert!(echoes(&client, &at(&server, ECHO))?);
    let began = std::time::Instant::now();
    for node in &mut lab.nodes {
        node.stop()?;
    }
    // The default limit is 30 s each: idle tunnels must not be waited for.
    assert!(
        began.elapsed() < Duration::from_secs(15),
        "{:?}",
        began.elapsed()
    );
    Ok(())
}

#[test]
fn cleanup_leaves_nothing_and_traffic_is_direct() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server, echo) = pair(&mut lab)?;
    assert!(echoes(&client, &at(&server, ECHO))?);
    for node in &mut lab.nodes {
        node.stop()?;
    }
    assert!(
        !echoes(&client, &at(&server, ECHO))?,
        "stopped, but still attached: refused"
    );
    for node in &lab.nodes {
        output(&mut node.postern(&["cleanup"])?)?;
        assert!(!node.pin().exists());
    }
    // The kernel lets go of a hook in its own time.
    eventually("traffic is direct", Duration::from_secs(5), || {
        echoes(&client, &at(&server, ECHO)).unwrap_or(false)
    })?;
    echo.says(&format!("accept=[::ffff:{}]", client.ip))?;
    eventually("cleanup can be repeated", Duration::from_secs(1), || {
        lab.nodes[0]
            .postern(&["cleanup"])
            .is_ok_and(|mut c| output(&mut c).is_ok())
    })
}
