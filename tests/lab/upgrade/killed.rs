//! `kill -9`: what breaks is what was open, and nothing leaves in plaintext.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::OpenOptionsExt as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::{
    libc,
    sys::{signal::Signal, stat::Mode},
    unistd::{Pid, mkfifo},
};
use postern_tests::{Capture, Lab, Pod, Running, binary, count_bytes, eventually};
use serde_json::{Value, json};

use super::{LONG_DRAIN, counted, ended, is_gap, load, upgrade, works};
use crate::{
    audit::verify,
    kit::{ECHO, at, echoes, pair},
};

/// A connection that stays open, and has said something.
fn stays(client: &Pod, to: &str) -> Result<Running> {
    let mut probe = client.command(binary("probe")?)?;
    let stay = client.start("stay", probe.args(["stay", to]))?;
    stay.says("beat 000002")?;
    Ok(stay)
}

fn goes_on(stay: &Running) -> Result<()> {
    let beats = stay.output().lines().count();
    eventually("it goes on", Duration::from_secs(10), || {
        stay.output().lines().count() > beats + 5
    })
}

/// As whoever supervises an agent starts it again.
#[test]
fn within_a_second_of_its_start_an_agent_carries_what_comes() -> Result<()> {
    const MARKER: &str = "NOT-EVEN-WHILE-NOBODY-IS-THERE";
    let mut lab = Lab::started()?;
    let (client, server, _echo) = pair(&mut lab)?;
    let near = lab.pod(2, "near")?;
    let to = at(&server, ECHO);
    // Between two pods of a node whose agent lives.
    let other = stays(&near, &to)?;
    let capture = Capture::start(&lab.nodes[0], lab.path().join("wire.pcap"))?;
    let stop = lab.path().join("stop");
    let there = load(&client, &to, &stop, &["--every", "10", "--word", MARKER])?;
    let mut fastest = Duration::MAX;
    for _ in 0..3 {
        let open = stays(&client, &to)?;
        lab.nodes[0].kill();
        open.says("ended")?;
        assert!(!echoes(&client, &to)?, "nobody is there");
        let started = Instant::now();
        let fresh = lab.nodes[0].launch()?;
        while !echoes(&client, &to)? {
            assert!(started.elapsed().as_secs() < 60, "{}", lab.nodes[0].log());
        }
        fastest = fastest.min(started.elapsed());
        lab.nodes[0].set_agent(fresh);
    }
    println!("carried {} ms after its start", fastest.as_millis());
    assert!(fastest < Duration::from_secs(1), "{fastest:?}");
    goes_on(&other)?;
    std::fs::write(&stop, "")?;
    let count = counted(there)?;
    assert!(count["requests"].as_u64() > Some(20), "{count}");
    assert_eq!(count_bytes(&capture.stop()?, MARKER.as_bytes())?, 0);
    let (code, said) = verify(&lab.nodes[0].audit_path(), &[])?;
    assert_eq!(code, Some(0), "{said}");
    Ok(())
}

/// A new agent of the first node when the old one has stepped back and nobody is in charge
/// yet: it opens the audit log, and has to wait for a file of it, until that is dropped.
fn half_way(lab: &Lab) -> Result<(Running, File)> {
    let node = &lab.nodes[0];
    let (public, kept) = (
        node.audit_path().join("audit.pub"),
        lab.path().join("audit.pub"),
    );
    std::fs::copy(&public, &kept)?;
    std::fs::remove_file(&public)?;
    mkfifo(&public, Mode::S_IRUSR | Mode::S_IWUSR)?;
    let fresh = node.launch()?;
    let mut waits = None::<File>;
    eventually("the new one has begun", Duration::from_secs(60), || {
        let mut fifo = OpenOptions::new();
        fifo.write(true).custom_flags(libc::O_NONBLOCK);
        // Nobody has opened it to read, until then.
        waits = fifo.open(&public).ok();
        waits.is_some()
    })
    .with_context(|| node.log())?;
    // For the old one.
    std::fs::rename(&kept, &public)?;
    Ok((fresh, waits.context("it waits")?))
}

/// Whoever stops the old one does not always wait until the new one is in charge.
#[test]
fn one_that_is_told_to_stop_while_another_takes_over_ends() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server, _echo) = pair(&mut lab)?;
    let (fresh, waits) = half_way(&lab)?;
    let node = &mut lab.nodes[0];
    let mut old = node.set_agent(fresh).context("an agent runs")?;
    old.signal(Signal::SIGTERM)?;
    std::thread::sleep(Duration::from_millis(100));
    assert!(!node.log().contains("draining"), "{}", node.log());
    drop(waits);
    ended(&mut old).with_context(|| node.log())?;
    assert!(works(&client, &at(&server, ECHO), 20)?, "{}", node.log());
    Ok(())
}

/// It is killed when the old one has stepped back and nobody is in charge yet.
#[test]
fn one_that_is_killed_before_it_has_taken_over_changes_nothing() -> Result<()> {
    const MARKER: &str = "NOT-BY-THE-HOOKS-OF-THE-DEAD";
    let mut lab = Lab::new(2)?;
    for node in &mut lab.nodes {
        node.options.more = LONG_DRAIN.into();
        node.start()?;
    }
    let (client, server, _echo) = pair(&mut lab)?;
    let to = at(&server, ECHO);
    let open = stays(&client, &to)?;
    let stop = lab.path().join("stop");
    let there = load(&client, &to, &stop, &["--every", "20", "--keep"])?;
    let kernel = lab.nodes[0].options.kernel.clone();
    let capture = Capture::start(&lab.nodes[0], lab.path().join("wire.pcap"))?;
    // The second one has maps of its own, and hooks of its own beside those that are there.
    for more in ["", ", maxConnections: 100000", ""] {
        lab.nodes[0].options.kernel = format!("{kernel}{more}");
        lab.nodes[0].configure()?;
        let (fresh, waits) = half_way(&lab)?;
        let node = &lab.nodes[0];
        assert!(!node.log().contains("draining"), "{}", node.log());
        nix::sys::signal::kill(Pid::from_raw(fresh.pid()), Signal::SIGKILL)?;
        drop((fresh, waits));
        assert!(works(&client, &to, 20)?, "{}", node.log());
        goes_on(&open)?;
        let said = client.dial(&to, &["--send", MARKER, "--half-close"])?;
        assert_eq!(said["text"], MARKER, "{said}");
    }
    assert_eq!(count_bytes(&capture.stop()?, MARKER.as_bytes())?, 0);
    lab.nodes[0].options.kernel = kernel;
    lab.nodes[0].configure()?;
    let node = &lab.nodes[0];
    std::fs::write(&stop, "")?;
    let count = counted(there)?;
    assert_eq!(count["failed"], json!({}), "{count}\n{}", node.log());
    assert!(count["requests"].as_u64() > Some(100), "{count}");
    let went_on = node.log().matches("this one goes on").count();
    assert_eq!(went_on, 3, "{}", node.log());
    // And the next one can still take over, with a log that is whole.
    drop(open);
    let mut old = upgrade(&mut lab.nodes[0])?;
    ended(&mut old)?;
    assert!(works(&client, &to, 20)?, "{}", lab.nodes[0].log());
    let gaps: Vec<Value> = lab.nodes[0].audit()?.into_iter().filter(is_gap).collect();
    assert!(gaps.is_empty(), "{gaps:?}");
    let (code, said) = verify(&lab.nodes[0].audit_path(), &[])?;
    assert_eq!(code, Some(0), "{said}");
    Ok(())
}

/// Whoever dies, whenever: nothing leaves in plaintext, and an agent that is started
/// afterwards is in charge.
#[test]
fn whoever_is_killed_in_an_upgrade() -> Result<()> {
    const MARKER: &str = "NOT-IN-PLAINTEXT-EITHER";
    let mut lab = Lab::started()?;
    let (client, server, _echo) = pair(&mut lab)?;
    let capture = Capture::start(&lab.nodes[0], lab.path().join("wire.pcap"))?;
    let stop = lab.path().join("stop");
    let to = at(&server, ECHO);
    let there = load(&client, &to, &stop, &["--every", "10", "--word", MARKER])?;
    for wait in [0, 100, 200, 300, 400, 600, 900] {
        // The new one: the old one goes on, or there is none left to.
        let fresh = lab.nodes[0].launch()?;
        std::thread::sleep(Duration::from_millis(wait));
        drop(fresh);
        if !works(&client, &to, 5)? {
            // It was in charge already.
            lab.nodes[0].kill();
            lab.nodes[0].start()?;
            assert!(
                works(&client, &to, 20)?,
                "after {wait} ms: {}",
                lab.nodes[0].log()
            );
        }
        // The old one: the new one is in charge, sooner or later.
        let mut fresh = lab.nodes[0].launch()?;
        std::thread::sleep(Duration::from_millis(wait));
        lab.nodes[0].kill();
        eventually("it is in charge, or ends", Duration::from_secs(20), || {
            let ended = fresh.child.try_wait().is_ok_and(|status| status.is_some());
            ended || echoes(&client, &to).unwrap_or(false)
        })
        .with_context(|| lab.nodes[0].log())?;
        match fresh.child.try_wait()? {
            // It came while the one before it was still being turned away: who started it
            // starts it again.
            Some(_) => lab.nodes[0].start()?,
            None => drop(lab.nodes[0].set_agent(fresh)),
        }
        assert!(
            works(&client, &to, 20)?,
            "after {wait} ms: {}",
            lab.nodes[0].log()
        );
    }
    std::fs::write(&stop, "")?;
    let count = counted(there)?;
    assert!(count["requests"].as_u64() > Some(100), "{count}");
    assert_eq!(count_bytes(&capture.stop()?, MARKER.as_bytes())?, 0);
    let (code, said) = verify(&lab.nodes[0].audit_path(), &[])?;
    assert_eq!(code, Some(0), "{said}");
    Ok(())
}

/// An agent that has handed over stays until it is stopped; killed while it drains, the
/// one in charge says how many connections nobody can tell of.
#[test]
fn one_that_is_killed_while_it_drains_is_told() -> Result<()> {
    let mut lab = Lab::new(2)?;
    for node in &mut lab.nodes {
        node.options.more = LONG_DRAIN.into();
        node.start()?;
    }
    let (client, server, _echo) = pair(&mut lab)?;
    let stay = stays(&client, &at(&server, ECHO))?;
    let old = lab.nodes[0].start_beside()?;
    goes_on(&stay)?;
    assert!(echoes(&client, &at(&server, ECHO))?);
    nix::sys::signal::kill(Pid::from_raw(old.pid()), Signal::SIGKILL)?;
    stay.says("ended")?;
    lab.nodes[0].record("the connection is missed", |r| {
        is_gap(r) && r["lost"] == "connections" && r["count"] == 1 && r["reason"] == "handover"
    })?;
    assert!(echoes(&client, &at(&server, ECHO))?);
    let (code, said) = verify(&lab.nodes[0].audit_path(), &[])?;
    assert_eq!(code, Some(0), "{said}");
    Ok(())
}
