//! Power is lost while pods talk, and comes back. One test for each side of that, each in
//! a virtual machine of its own that have one disk in common; run by `cargo xtask test
//! vm`.

use std::{
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use postern_tests::{Capture, Lab, binary, count_bytes, eventually, output};

const ECHO: u16 = 9000;
const MARKER: &str = "NOT-IN-PLAINTEXT-AFTER-A-REBOOT";
const CONTROL: &str = "WHAT-ANYBODY-MAY-READ";
/// How the words begin that `probe stay` sends.
const BEAT: &[u8] = b"beat 0";

#[test]
fn before_power_is_lost() -> Result<()> {
    let mut lab = on_disk()?;
    for node in &mut lab.nodes {
        node.start()?;
    }
    let (server, client) = (lab.pod(2, "server")?, lab.pod(1, "client")?);
    let _echo = server.serve("echo", ECHO)?;
    let _capture = Capture::start(&lab.nodes[0], disk()?.join("before.pcap"))?;
    let mut stay = client.command(binary("probe")?)?;
    stay.args(["stay", &format!("{}:{ECHO}", server.ip), "--every", "5"]);
    let stay = client.start("stay", &mut stay)?;
    stay.says("beat 000050")?;
    // What was captured so far outlives what comes.
    nix::unistd::sync();
    println!("power is lost now");
    std::thread::sleep(Duration::from_millis(500));
    // The machine resets at once: nothing is written back, nobody is told.
    std::fs::write("/proc/sysrq-trigger", "b")?;
    std::thread::sleep(Duration::from_secs(60));
    bail!("power was not lost")
}

#[test]
fn after_power_is_back() -> Result<()> {
    let before = disk()?.join("before.pcap");
    assert!(
        std::fs::metadata(&before)?.len() > 5_000,
        "traffic was captured"
    );
    assert_eq!(count_bytes(&before, BEAT)?, 0);

    let mut lab = on_disk()?;
    let capture = Capture::start(&lab.nodes[0], lab.path().join("after.pcap"))?;
    for node in &lab.nodes {
        // As the unit does, before the kubelet.
        node.configure()?;
        output(&mut node.postern(&["guard"])?)?;
    }
    // Pods come back, and talk before there is an agent.
    let (server, client) = (lab.pod(2, "server")?, lab.pod(1, "client")?);
    let _echo = server.serve("echo", ECHO)?;
    let address = format!("{}:{ECHO}", server.ip);
    let dial = || {
        client.dial(
            &address,
            &["--send", MARKER, "--half-close", "--limit", "20"],
        )
    };
    for _ in 0..2 {
        assert_eq!(dial()?["connect"], "EPERM");
    }
    // And while the agents start.
    let started = AtomicBool::new(false);
    let (nodes, dialled) = std::thread::scope(|scope| {
        let dialling = scope.spawn(|| {
            let mut seen = Vec::new();
            while !started.load(Ordering::Relaxed) {
                seen.push(dial());
            }
            seen
        });
        let nodes = lab.nodes.iter_mut().try_for_each(|node| node.start());
        started.store(true, Ordering::Relaxed);
        (nodes, dialling.join())
    });
    nodes?;
    let dialled = dialled.ok().context("the thread ends")?;
    assert!(!dialled.is_empty());
    for seen in dialled {
        seen?;
    }
    lab.known(&client)?;
    lab.known(&server)?;
    eventually("they talk by the mesh", Duration::from_secs(60), || {
        dial().is_ok_and(|seen| seen["text"] == MARKER)
    })?;
    lab.nodes[1].record("by their identities", |r| {
        r["source"]["identity"] == "spiffe://cluster.local/ns/shop/sa/client"
    })?;
    // The log of before goes on.
    let starts = lab.nodes[0].audit()?;
    assert!(starts.iter().filter(|r| r["event"] == "started").count() >= 2);
    // Were the capture blind, this would show it: the node itself is not in the mesh.
    let mut node = lab.nodes[0].command(binary("probe")?)?;
    output(node.args(["dial", &address, "--send", CONTROL, "--half-close"]))?;
    let file = capture.stop()?;
    assert_eq!(count_bytes(&file, MARKER.as_bytes())?, 0);
    assert!(count_bytes(&file, CONTROL.as_bytes())? > 0);
    Ok(())
}

fn disk() -> Result<PathBuf> {
    let disk = std::env::var_os("POSTERN_DISK");
    disk.map(PathBuf::from)
        .context("POSTERN_DISK names no directory")
}

/// A lab whose agents have their state on the disk.
fn on_disk() -> Result<Lab> {
    let (lab, disk) = (Lab::new(2)?, disk()?);
    for name in ["root.pem", "root.key"] {
        let (kept, new) = (disk.join(name), lab.path().join(name));
        match kept.exists() {
            true => std::fs::copy(&kept, &new)?,
            false => std::fs::copy(&new, &kept)?,
        };
    }
    for node in &lab.nodes {
        for (name, place) in [
            ("state", node.directory().join("state")),
            ("audit", node.audit_path()),
        ] {
            keep(&disk.join(format!("{}-{name}", node.name)), &place)?;
        }
    }
    Ok(lab)
}

fn keep(kept: &Path, place: &Path) -> Result<()> {
    std::fs::create_dir_all(kept)?;
    symlink(kept, place).with_context(|| place.display().to_string())
}
