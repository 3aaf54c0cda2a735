//! The agent dies, comes back, stops, and is removed.

use std::time::Duration;

use anyhow::Result;
use postern_tests::{Capture, Lab, binary, count_bytes, eventually, output};

use crate::kit::{ECHO, at, echoes, pair};

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
