//! The audit log of a running agent when things go wrong: it is killed, its disk is full,
//! its queue overflows, its files are changed.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use postern_tests::{Lab, Node, Pod, Running, audit_records, binary, eventually, text};
use serde_json::Value;

use crate::kit::{ECHO, at, echoes, is_connection, pair};

/// Kinds that the log writes of itself, but for gaps.
const OWN: [&str; 3] = ["checkpoint", "reopened", "retention"];

/// `postern audit verify` and what it says.
pub fn verify(directory: &Path, more: &[&str]) -> Result<(Option<i32>, String)> {
    let mut command = Command::new(binary("postern")?);
    command
        .args(["audit", "verify", "--directory"])
        .arg(directory);
    let said = command.args(more).output()?;
    let all = text(&said.stdout) + &text(&said.stderr);
    Ok((said.status.code(), all))
}

fn storm(pod: &Pod, to: &str, count: u64) -> Result<Value> {
    let mut probe = pod.command(binary("probe")?)?;
    probe.args([
        "storm",
        to,
        "--kind",
        "short",
        "--count",
        &count.to_string(),
    ]);
    let said = postern_tests::output(&mut probe)?;
    Ok(serde_json::from_slice(&said.stdout)?)
}

pub fn metric(node: &Node, name: &str) -> Result<u64> {
    let metrics = node.metrics()?;
    let line = metrics
        .lines()
        .find_map(|line| line.strip_prefix(&format!("{name} ")));
    Ok(line.with_context(|| metrics.clone())?.trim().parse()?)
}

/// Counts of gap records of this kind of loss.
fn gaps(records: &[Value], lost: &str, reason: &str) -> u64 {
    let gaps = records
        .iter()
        .filter(|r| r["kind"] == "gap" && r["lost"] == lost);
    let counts = gaps.filter(|r| r["reason"] == reason);
    counts.filter_map(|r| r["count"].as_u64()).sum()
}

/// What was written and what was lost is what the agent says itself: waits until the last
/// loss is told.
fn adds_up(node: &Node, reason: &str) -> Result<()> {
    let mut seen = String::new();
    eventually("losses are told", Duration::from_secs(20), || {
        let mut look = || -> Result<bool> {
            let lost = metric(node, "postern_audit_records_lost_total")?;
            let written = metric(node, "postern_audit_records_written_total")?;
            let records = node.audit()?;
            let told = gaps(&records, "records", reason);
            let handed_in = |r: &&Value| {
                let kind = r["kind"].as_str().unwrap_or_default();
                let own = OWN.contains(&kind) || (kind == "gap" && r["lost"] == "records");
                !own
            };
            let there = records.iter().filter(handed_in).count() as u64;
            seen = format!("lost {lost}, told {told}, written {written}, there {there}");
            Ok(lost > 0 && lost == told && written == there)
        };
        look().unwrap_or(false)
    })
    .with_context(|| seen.clone())
}

/// Held open until dropped.
fn hold(pod: &Pod, to: &str, count: usize) -> Result<Vec<Running>> {
    (0..count)
        .map(|number| {
            let mut stay = pod.command(binary("probe")?)?;
            let stay = pod.start(&format!("hold-{number}"), stay.args(["stay", to]))?;
            stay.says("beat 000001")?;
            Ok(stay)
        })
        .collect()
}

#[test]
fn what_was_open_when_the_agent_was_killed_is_counted_and_the_rest_is_there() -> Result<()> {
    const DONE: u64 = 300;
    const OPEN: usize = 12;
    let mut lab = Lab::started()?;
    let (client, server, _echo) = pair(&mut lab)?;
    let to = at(&server, ECHO);
    for round in 1..=2_u64 {
        assert_eq!(storm(&client, &to, DONE)?["outcomes"]["eof"], DONE);
        let held = hold(&client, &to, OPEN)?;
        eventually("all is on record", Duration::from_secs(10), || {
            let records = lab.nodes[0].audit().unwrap_or_default();
            let ended = records
                .iter()
                .filter(|r| is_connection(r) && r["end"] == "closed");
            ended.count() as u64 == DONE * round
        })?;
        lab.nodes[0].kill();
        drop(held);
        lab.nodes[0].start()?;
        lab.known(&client)?;
        let records = lab.nodes[0].audit()?;
        assert_eq!(
            gaps(&records, "connections", "restart"),
            OPEN as u64 * round
        );
        assert_eq!(gaps(&records, "records", "restart"), 0);
        let again = records.iter().rfind(|r| r["kind"] == "reopened");
        assert_eq!(again.context("reopened")?["reason"], "unclean");
    }
    let (code, said) = verify(&lab.nodes[0].audit_path(), &[])?;
    assert_eq!(code, Some(0), "{said}");
    // Killed in the middle of writing, again and again: the chain holds.
    for _ in 0..5 {
        let mut probe = client.command(binary("probe")?)?;
        probe.args([
            "storm",
            &to,
            "--kind",
            "any",
            "--count",
            "5000",
            "--threads",
            "8",
        ]);
        let storm = client.start("storm", &mut probe)?;
        std::thread::sleep(Duration::from_millis(300));
        lab.nodes[0].kill();
        drop(storm);
        lab.nodes[0].start()?;
        lab.known(&client)?;
        let (code, said) = verify(&lab.nodes[0].audit_path(), &[])?;
        assert_eq!(code, Some(0), "{said}");
    }
    assert!(echoes(&client, &to)?);
    // An orderly end leaves nothing to count.
    let before = lab.nodes[0]
        .audit()?
        .iter()
        .filter(|r| r["kind"] == "gap")
        .count();
    lab.nodes[0].stop()?;
    lab.nodes[0].start()?;
    let after = lab.nodes[0]
        .audit()?
        .iter()
        .filter(|r| r["kind"] == "gap")
        .count();
    assert_eq!(before, after);
    Ok(())
}

/// A small file system of its own, gone when dropped.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn new(path: PathBuf, bytes: u32) -> Result<Self> {
        std::fs::create_dir_all(&path)?;
        let size = format!("size={bytes},mode=0700");
        mount(
            Some("tmpfs"),
            &path,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(&*size),
        )?;
        Ok(Self(path))
    }

    fn resize(&self, bytes: u32) -> Result<()> {
        let size = format!("size={bytes}");
        Ok(mount(
            None::<&str>,
            &self.0,
            None::<&str>,
            MsFlags::MS_REMOUNT,
            Some(&*size),
        )?)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _gone = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// A file that takes all the room that is left.
fn node_filler(node: &Node) -> Result<PathBuf> {
    use std::io::Write as _;
    let path = node.audit_path().join("filler");
    let mut file = std::fs::File::create(&path)?;
    let block = [0; 4096];
    while file.write_all(&block).is_ok() {}
    Ok(path)
}

#[test]
fn a_full_disk_costs_records_that_are_counted_and_never_traffic() -> Result<()> {
    const CALLS: u64 = 1_500;
    let mut lab = Lab::new(2)?;
    let disk = Tmpfs::new(lab.nodes[0].audit_path(), 256 << 10)?;
    for node in &mut lab.nodes {
        node.start()?;
    }
    let (client, server, _echo) = pair(&mut lab)?;
    let seen = storm(&client, &at(&server, ECHO), CALLS)?;
    assert_eq!(seen["outcomes"]["eof"], CALLS, "{seen}");
    let node = &lab.nodes[0];
    eventually("the disk is full", Duration::from_secs(10), || {
        metric(node, "postern_audit_records_lost_total").is_ok_and(|lost| lost > 0)
    })?;
    disk.resize(64 << 20)?;
    let seen = storm(&client, &at(&server, ECHO), 100)?;
    assert_eq!(seen["outcomes"]["eof"], 100, "{seen}");
    adds_up(node, "disk")?;
    let (code, said) = verify(&node.audit_path(), &[])?;
    assert_eq!(code, Some(0), "{said}");
    assert!(node.log().contains("the audit log cannot be written"));
    // A disk that is full at the start keeps no agent from it, either.
    lab.nodes[0].stop()?;
    let filler = node_filler(&lab.nodes[0])?;
    lab.nodes[0].start()?;
    lab.known(&client)?;
    // The rest of a page still takes some.
    let seen = storm(&client, &at(&server, ECHO), 200)?;
    assert_eq!(seen["outcomes"]["eof"], 200, "{seen}");
    // A record waits for its socket: they are lost before there is room again.
    eventually("most are lost", Duration::from_secs(10), || {
        metric(&lab.nodes[0], "postern_audit_records_lost_total").is_ok_and(|lost| lost > 100)
    })?;
    std::fs::remove_file(filler)?;
    eventually("it is told", Duration::from_secs(10), || {
        let records = lab.nodes[0].audit().unwrap_or_default();
        let again = records.iter().rposition(|r| r["kind"] == "reopened");
        again.is_some_and(|at| gaps(&records[at..], "records", "disk") > 100)
    })?;
    let (code, said) = verify(&lab.nodes[0].audit_path(), &[])?;
    assert_eq!(code, Some(0), "{said}");
    lab.nodes[0].stop()?;
    drop(disk);
    Ok(())
}

#[test]
fn a_queue_that_overflows_is_a_gap_of_the_right_size() -> Result<()> {
    let mut lab = Lab::new(2)?;
    lab.nodes[0].options.audit = ", queue: 1".into();
    for node in &mut lab.nodes {
        node.start()?;
    }
    let (client, server, _echo) = pair(&mut lab)?;
    let seen = storm(&client, &at(&server, ECHO), 2_000)?;
    assert_eq!(seen["outcomes"]["eof"], 2_000, "{seen}");
    adds_up(&lab.nodes[0], "queue")?;
    let (code, said) = verify(&lab.nodes[0].audit_path(), &[])?;
    assert_eq!(code, Some(0), "{said}");
    Ok(())
}

#[test]
fn without_a_place_for_its_log_no_agent_starts() -> Result<()> {
    let mut lab = Lab::new(1)?;
    let node = &mut lab.nodes[0];
    std::fs::write(node.audit_path(), "a file")?;
    assert_eq!(node.start_refused()?, Some(2));
    assert!(node.log().contains("audit.directory"), "{}", node.log());
    Ok(())
}

#[test]
fn what_is_changed_is_named_and_what_is_cut_off_is_missed() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server, _echo) = pair(&mut lab)?;
    storm(&client, &at(&server, ECHO), 50)?;
    lab.nodes[0].stop()?;
    let directory = lab.nodes[0].audit_path();
    let mut command = Command::new(binary("postern")?);
    command
        .args(["audit", "checkpoint", "--directory"])
        .arg(&directory);
    let kept = lab.path().join("checkpoint");
    std::fs::write(&kept, postern_tests::output(&mut command)?.stdout)?;
    let since = ["--since-checkpoint", &kept.display().to_string()];
    let (code, said) = verify(&directory, &since)?;
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("the log is as it was written"), "{said}");

    let path = directory.join("audit-00000000000000000001.jsonl");
    let whole = std::fs::read_to_string(&path)?;
    let lines: Vec<&str> = whole.split_inclusive('\n').collect();
    let (at, line) = (lines.iter().enumerate())
        .find(|(_, line)| line.contains("\"kind\":\"connection\""))
        .context("a connection")?;
    let mut changed: Vec<String> = lines.iter().map(ToString::to_string).collect();
    changed[at] = line.replace("sa/client", "sa/clienT");
    std::fs::write(&path, changed.concat())?;
    let (code, said) = verify(&directory, &[])?;
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains(&format!("record {}: was changed", at + 1)),
        "{said}"
    );

    std::fs::write(&path, lines[..at].concat())?;
    let (code, said) = verify(&directory, &since)?;
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("the checkpoint that was kept is missing"),
        "{said}"
    );
    std::fs::write(&path, whole)?;
    assert_eq!(verify(&directory, &since)?.0, Some(0));
    Ok(())
}

/// The senders of a whole agent: from the first record, across its restart, to the last.
#[test]
fn the_agent_sends_its_log_where_it_is_told() -> Result<()> {
    let mut lab = Lab::new(2)?;
    lab.nodes[0].options.audit =
        ", sinks: [{name: out, from: beginning, filter: {kinds: [connection, agent]}, stdout: {}}]"
            .into();
    for node in &mut lab.nodes {
        node.start()?;
    }
    let (client, server, _echo) = pair(&mut lab)?;
    storm(&client, &at(&server, ECHO), 30)?;
    lab.nodes[0].stop()?;
    lab.nodes[0].start()?;
    lab.known(&client)?;
    storm(&client, &at(&server, ECHO), 30)?;
    lab.nodes[0].stop()?;
    let wanted: Vec<u64> = audit_records(&lab.nodes[0].audit_path())?
        .iter()
        .filter(|r| is_connection(r) || r["kind"] == "agent")
        .filter_map(|r| r["seq"].as_u64())
        .collect();
    assert!(wanted.len() >= 64, "{wanted:?}");
    // Records stand between the agent's own log lines.
    let sent: Vec<u64> = (lab.nodes[0].log().lines())
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter_map(|record| record["seq"].as_u64())
        .collect();
    assert_eq!(sent, wanted, "{}", lab.nodes[0].log());
    Ok(())
}
