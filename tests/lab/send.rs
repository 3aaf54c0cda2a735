//! The audit log on its way to receivers that nobody here wrote: OTLP by the official
//! protobuf classes, syslog by rsyslog, OCSF by its published schema. The log is written
//! by the test, so that each case is the same each time.

mod harness;

use std::time::Duration;

use anyhow::Result;
use postern_tests::eventually;
use serde_json::Value;

use harness::{World, line_of, python, sequences};

const LONG: Duration = Duration::from_secs(30);

fn complete(found: &[u64], last: u64) -> bool {
    let mut found = found.to_vec();
    found.sort_unstable();
    found.dedup();
    found == (1..=last).collect::<Vec<_>>()
}

#[test]
fn all_records_arrive_in_order_and_once() -> Result<()> {
    for (protocol, more) in [
        ("grpc", ""),
        ("grpc", ", compression: gzip"),
        ("http", ", compression: gzip"),
    ] {
        let mut world = World::new(protocol, more)?;
        let _receiver = world.receiver()?;
        world.start()?;
        world.write(1_300)?;
        eventually("all are there", LONG, || world.received().len() >= 1_300)?;
        let records = world.received();
        assert_eq!(
            sequences(&records),
            (1..=1_300).collect::<Vec<_>>(),
            "{protocol}"
        );
        // Bodies are lines of the log: the chain can be checked where they are kept.
        let bodies: Vec<&str> = records.iter().map(line_of).collect();
        for pair in bodies.windows(2) {
            let next: Value = serde_json::from_str(pair[1])?;
            assert_eq!(next["prev"], harness::sha256(pair[0]));
        }
        let record = &records[0];
        assert_eq!(record["eventName"], "postern.agent");
        assert_eq!(record["severityNumber"], "SEVERITY_NUMBER_INFO");
        assert!(record["resource"].to_string().contains("k8s.node.name"));
        assert_eq!(record["metadata"]["x-tenant"], "mesh");
        assert_eq!(record["metadata"]["authorization"], "Bearer secret-of-file");
        let progress = world.progress();
        assert_eq!(
            (progress.sent, progress.behind, progress.error),
            (1_300, 0, None)
        );
        world.finish();
    }
    Ok(())
}

#[test]
fn a_receiver_that_dies_gets_all_when_it_is_back() -> Result<()> {
    for protocol in ["grpc", "http"] {
        let mut world = World::new(protocol, "")?;
        let receiver = world.receiver()?;
        world.start()?;
        world.write(700)?;
        eventually("some are there", LONG, || !world.received().is_empty())?;
        drop(receiver);
        world.write(700)?;
        eventually("it is noticed", LONG, || world.progress().error.is_some())?;
        let _receiver = world.receiver()?;
        world.write(10)?;
        eventually("all are there", LONG, || {
            complete(&sequences(&world.received()), 1_410)
        })?;
        world.finish();
    }
    Ok(())
}

#[test]
fn a_busy_receiver_is_left_alone_for_as_long_as_it_asks() -> Result<()> {
    for protocol in ["grpc", "http"] {
        let mut world = World::new(protocol, "")?;
        world.mode("busy")?;
        let _receiver = world.receiver()?;
        world.start()?;
        world.write(5)?;
        eventually("two attempts", LONG, || world.attempts().len() >= 2)?;
        world.mode("ok")?;
        eventually("all are there", LONG, || {
            complete(&sequences(&world.received()), 5)
        })?;
        let attempts = world.attempts();
        // It asked for two seconds; our own first wait would be a quarter of one.
        assert!(attempts[1] - attempts[0] > 1.9, "{protocol}: {attempts:?}");
        world.finish();
    }
    Ok(())
}

#[test]
fn a_receiver_that_refuses_everything_costs_no_record() -> Result<()> {
    for protocol in ["grpc", "http"] {
        let mut world = World::new(protocol, "")?;
        world.mode("wrong")?;
        let _receiver = world.receiver()?;
        world.start()?;
        world.write(9)?;
        eventually("it is asked again", LONG, || world.attempts().len() > 8)?;
        assert_eq!(world.progress().rejected, 0);
        // One record alone is another thing: it would hold up all others for ever.
        world.mode("picky")?;
        eventually("the others are there", LONG, || {
            let mut there = sequences(&world.received());
            there.sort_unstable();
            there.dedup();
            there == [1, 2, 4, 5, 6, 7, 8, 9]
        })?;
        eventually("it is counted", LONG, || world.progress().rejected == 1)?;
        world.finish();
    }
    Ok(())
}

#[test]
fn a_receiver_that_hangs_is_asked_again() -> Result<()> {
    for protocol in ["grpc", "http"] {
        let mut world = World::new(protocol, ", timeout: 300ms")?;
        world.mode("hang")?;
        let _receiver = world.receiver()?;
        world.start()?;
        world.write(5)?;
        let timed_out = || {
            world
                .progress()
                .error
                .is_some_and(|e| e.contains("no answer"))
        };
        eventually("it is noticed", LONG, timed_out)?;
        world.mode("ok")?;
        eventually("all are there", LONG, || {
            complete(&sequences(&world.received()), 5)
        })?;
        world.finish();
    }
    Ok(())
}

#[test]
fn what_is_refused_in_part_is_counted() -> Result<()> {
    let mut world = World::new("grpc", "")?;
    world.mode("partial")?;
    let _receiver = world.receiver()?;
    world.write(0)?;
    world.start()?;
    world.write(20)?;
    eventually("all is looked at", LONG, || world.progress().behind == 0)?;
    eventually("it is counted", LONG, || world.progress().rejected >= 2)?;
    let progress = world.progress();
    assert_eq!(progress.sent + progress.rejected, 20);
    world.finish();
    Ok(())
}

#[test]
fn a_restart_goes_on_at_the_cursor() -> Result<()> {
    let mut world = World::new("http", "")?;
    let _receiver = world.receiver()?;
    world.start()?;
    world.write(50)?;
    eventually("the receiver is there", LONG, || {
        world.received().len() >= 50
    })?;
    world.write(50)?;
    // What is left when the agent ends is sent before it does.
    world.finish();
    assert_eq!(sequences(&world.received()).len(), 100);
    world.write(50)?;
    world.start()?;
    eventually("the rest", LONG, || world.received().len() >= 150)?;
    assert_eq!(sequences(&world.received()), (1..=150).collect::<Vec<_>>());
    world.finish();
    Ok(())
}

#[test]
fn what_retention_took_is_counted_and_told() -> Result<()> {
    let mut world = World::new("grpc", "")?;
    world.start()?;
    for _ in 0..6 {
        world.write(600)?;
        world.rotate();
    }
    eventually("it is noticed", LONG, || world.progress().error.is_some())?;
    world.retain(1)?;
    let _receiver = world.receiver()?;
    world.write(1)?;
    eventually("the last is there", LONG, || {
        sequences(&world.received()).last() == Some(&3_601)
    })?;
    let records = world.received();
    let told: u64 = (records.iter())
        .filter_map(|r| serde_json::from_str::<Value>(line_of(r)).ok())
        .filter(|r| r["kind"] == "gap" && r["reason"] == "retention")
        .filter_map(|r| r["count"].as_u64())
        .sum();
    let skipped = world.progress().skipped;
    assert!(skipped >= 1_200, "{skipped}");
    assert_eq!(told, skipped);
    let arrived = sequences(&records).len() as u64;
    assert_eq!(arrived + skipped, 3_601);
    world.finish();
    Ok(())
}

#[test]
fn a_tls_receiver_is_who_its_roots_say() -> Result<()> {
    for protocol in ["grpc", "http"] {
        let mut world = World::with_tls(protocol)?;
        let _receiver = world.receiver()?;
        world.start()?;
        world.write(3)?;
        eventually("all are there", LONG, || {
            complete(&sequences(&world.received()), 3)
        })?;
        world.finish();
        world.trust_another()?;
        world.start()?;
        world.write(1)?;
        eventually("it is refused", LONG, || world.progress().error.is_some())?;
        assert_eq!(world.received().len(), 3);
        world.finish();
    }
    Ok(())
}

#[test]
fn rsyslog_reads_every_field() -> Result<()> {
    let mut world = World::syslog()?;
    let rsyslog = world.rsyslog()?;
    world.start()?;
    world.write(200)?;
    eventually("all are there", LONG, || world.syslog_lines().len() >= 200)?;
    let lines = world.syslog_lines();
    for (index, line) in lines.iter().enumerate() {
        // PRI, version, time, host, application, id, structured data, message.
        let fields: Vec<&str> = line.splitn(7, '|').collect();
        let [pri, host, app, id, data, time, message] = fields[..] else {
            anyhow::bail!("{line}")
        };
        let seq = index + 1;
        assert_eq!((pri, host, app, id), ("110", "node1", "postern", "agent"));
        assert_eq!(
            data,
            format!("[postern@32473 seq=\"{seq}\" kind=\"agent\"]")
        );
        assert!(time.starts_with("2026-01-01T00:00:00.25"), "{time}");
        let record: Value = serde_json::from_str(message.trim_start_matches('\u{feff}'))?;
        assert_eq!(record["seq"], seq);
        assert_eq!(record["detail"], "ein Wörtchen", "{message}");
    }
    // It is stopped as a service is, and has read all by then.
    world.stop(rsyslog)?;
    world.write(50)?;
    eventually("it is noticed", LONG, || world.progress().error.is_some())?;
    let _rsyslog = world.rsyslog()?;
    eventually("the rest", LONG, || world.syslog_lines().len() >= 250)?;
    world.finish();
    Ok(())
}

#[test]
fn ocsf_events_are_valid_by_the_published_schema() -> Result<()> {
    let lab = tempfile::tempdir()?;
    let file = lab.path().join("events.jsonl");
    let records = include_str!("../../agent/src/audit/ocsf/tests/samples.jsonl");
    let mut events = String::new();
    for line in records.lines() {
        let sample: Value = serde_json::from_str(line)?;
        let event = postern::audit::ocsf::map(&sample["record"]);
        events.push_str(&format!("{}\n", event.expect("each has a class")));
    }
    std::fs::write(&file, events)?;
    let mut check = python("ocsf.py", include_str!("send/ocsf.py"), lab.path())?;
    let said = postern_tests::output(check.arg(&file))?;
    let said: Value = serde_json::from_slice(&said.stdout)
        .map_err(|e| anyhow::anyhow!("{e}: {}", String::from_utf8_lossy(&said.stderr)))?;
    assert_eq!(said["wrong"], serde_json::json!([]), "{said:#}");
    assert_eq!(said["seen"], records.lines().count());
    Ok(())
}
