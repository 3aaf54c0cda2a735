use std::os::unix::fs::PermissionsExt as _;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::audit::chain::{Reader, verify};

fn settings(dir: &TempDir) -> Settings {
    Settings {
        sync: Sync::Never,
        ..Settings::new(dir.path().join("audit"), dir.path())
    }
}

fn open(settings: &Settings) -> (Log, Arc<Ledger>) {
    Log::open(settings.clone(), "node1").expect("a log")
}

fn append(log: &mut Log, number: u64) {
    let record =
        json!({"time": "2026-01-01T00:00:00Z", "node": "node1", "kind": "agent", "number": number});
    log.append(|text| serde_json::to_writer(text, &record).expect("memory"));
}

fn lines(settings: &Settings) -> Vec<Value> {
    let reader = Reader::open(&settings.directory, 0).expect("a log");
    reader
        .map(|line| serde_json::from_str(&line.expect("a line").text).expect("JSON"))
        .collect()
}

fn of_kind<'a>(lines: &'a [Value], kind: &str) -> Vec<&'a Value> {
    lines.iter().filter(|line| line["kind"] == kind).collect()
}

fn is_whole(settings: &Settings) {
    let report = verify(&settings.directory, None).expect("readable");
    assert_eq!(report.problems, [], "{report}");
}

#[test]
fn an_orderly_log_ends_in_a_checkpoint_and_loses_nothing() {
    let dir = TempDir::new().expect("directory");
    let settings = settings(&dir);
    for run in 0..3 {
        let (mut log, ledger) = open(&settings);
        for number in 0..10 {
            ledger.accept();
            append(&mut log, run * 10 + number);
        }
        assert_eq!(
            log.commit(),
            Committed {
                written: 10,
                lost: 0
            }
        );
        log.close();
    }
    let lines = lines(&settings);
    assert_eq!(of_kind(&lines, "agent").len(), 30);
    assert_eq!(of_kind(&lines, "gap"), Vec::<&Value>::new());
    let reasons: Vec<&Value> = of_kind(&lines, "reopened")
        .iter()
        .map(|r| &r["reason"])
        .collect();
    assert_eq!(reasons, ["first", "start", "start"]);
    assert_eq!(lines.last().expect("a line")["kind"], "checkpoint");
    let report = verify(&settings.directory, None).expect("readable");
    assert_eq!((report.uncovered, report.records), (0, lines.len() as u64));
    is_whole(&settings);
    for name in [
        "audit.key",
        "audit.ledger",
        "audit/audit-00000000000000000001.jsonl",
    ] {
        let mode = fs::metadata(dir.path().join(name))
            .expect(name)
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
}

#[test]
fn a_second_writer_is_refused() {
    let dir = TempDir::new().expect("directory");
    let settings = settings(&dir);
    let (_log, _ledger) = open(&settings);
    let second = Log::open(settings.clone(), "node1");
    assert!(matches!(second.err(), Some(OpenError::Busy(_))));
}

/// As after `kill -9`: the log is dropped without its end, some records never came.
#[test]
fn what_a_killed_agent_had_accepted_is_counted() {
    let dir = TempDir::new().expect("directory");
    let settings = settings(&dir);
    for run in 1..=3_u64 {
        let (mut log, ledger) = open(&settings);
        for number in 0..20 {
            ledger.accept();
            if number < 20 - run {
                append(&mut log, number);
            }
        }
        for _ in 0..run + 4 {
            ledger.opened();
        }
        ledger.accept_closed();
        log.commit();
        log.sync();
    }
    let (log, _) = open(&settings);
    log.close();
    let lines = lines(&settings);
    let gaps: Vec<(&str, u64)> = of_kind(&lines, "gap")
        .iter()
        .map(|g| {
            (
                g["lost"].as_str().expect("text"),
                g["count"].as_u64().expect("a number"),
            )
        })
        .collect();
    // Each run accepted 21, of which 20 - run came; of its connections one ended.
    let expected: Vec<(&str, u64)> = (1..=3)
        .flat_map(|run| [("records", run + 1), ("connections", run + 3)])
        .collect();
    assert_eq!(gaps, expected);
    let reasons: Vec<&Value> = of_kind(&lines, "reopened")
        .iter()
        .map(|r| &r["reason"])
        .collect();
    assert_eq!(reasons, ["first", "unclean", "unclean", "unclean"]);
    is_whole(&settings);
}

/// A tail that is torn at any byte: whole lines stay, the rest is set aside and told.
#[test]
fn a_torn_write_costs_what_was_torn_and_no_more() {
    let dir = TempDir::new().expect("directory");
    let own = settings(&dir);
    let (mut log, ledger) = open(&own);
    for number in 0..4 {
        ledger.accept();
        append(&mut log, number);
    }
    log.commit();
    ledger.accept();
    append(&mut log, 4);
    // The agent dies within its write: of its end the ledger knows nothing.
    let before = fs::read(&own.ledger).expect("a ledger");
    log.commit();
    fs::write(&own.ledger, before).expect("written");
    let path = log.active.segment.path.clone();
    drop((log, ledger));
    let whole = fs::read(&path).expect("a segment");
    let last = whole[..whole.len() - 1]
        .iter()
        .rposition(|&b| b == b'\n')
        .expect("lines")
        + 1;
    for cut in last..whole.len() {
        let dir = TempDir::new().expect("directory");
        let settings = settings(&dir);
        fs::create_dir(&settings.directory).expect("made");
        for name in ["audit.key", "audit.ledger"] {
            fs::copy(own.key.with_file_name(name), dir.path().join(name)).expect("copied");
        }
        let torn = settings.directory.join(path.file_name().expect("a name"));
        fs::write(&torn, &whole[..cut]).expect("written");
        let (log, _) = open(&settings);
        log.close();
        let lines = lines(&settings);
        assert_eq!(of_kind(&lines, "agent").len(), 4, "{cut}");
        let gap = of_kind(&lines, "gap")[0];
        assert_eq!(
            (&gap["lost"], &gap["count"]),
            (&json!("records"), &json!(1)),
            "{cut}"
        );
        let again = of_kind(&lines, "reopened")[1];
        if cut > last {
            assert_eq!(again["torn"], cut - last);
            let aside = settings
                .directory
                .join(again["tornFile"].as_str().expect("a file"));
            assert_eq!(fs::read(aside).expect("kept"), &whole[last..cut]);
        }
        is_whole(&settings);
    }
}

#[test]
fn segments_are_compressed_and_removed_only_with_a_link() {
    let dir = TempDir::new().expect("directory");
    let settings = Settings {
        segment_bytes: 10_000,
        checkpoint_records: 17,
        retain_bytes: Some(14_000),
        ..settings(&dir)
    };
    let (mut log, ledger) = open(&settings);
    for number in 0..600 {
        ledger.accept();
        append(&mut log, number);
        if number % 7 == 0 {
            log.commit();
        }
    }
    log.commit();
    log.close();
    // It is whole at any moment, also while segments are compressed and removed.
    is_whole(&settings);
    // Which is done in its own time: at the end all but the last are compressed, and the
    // log begins behind what it says is removed.
    let end = Instant::now() + Duration::from_secs(10);
    let (packed, first) = loop {
        let all = segment::list_all(&settings.directory).expect("a directory");
        let packed = all.iter().filter(|s| s.packed).count();
        let first = all[0].first;
        let removed = Reader::open(&settings.directory, 0)
            .expect("a log")
            .filter_map(|line| serde_json::from_str::<Value>(&line.ok()?.text).ok())
            .filter_map(|line| line["lastSeq"].as_u64())
            .max();
        let settled = packed + 1 == all.len() && removed == Some(first - 1);
        if settled || Instant::now() > end {
            break (packed, first);
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    assert!(packed > 0 && first > 1, "{packed} {first}");
    is_whole(&settings);
    let lines = lines(&settings);
    let links = of_kind(&lines, "retention");
    assert!(
        links.iter().any(|link| link["lastSeq"] == first - 1),
        "{links:?}"
    );
    // Without its link the new beginning is no beginning.
    let oldest = segment::list(&settings.directory).expect("a directory");
    fs::remove_file(&oldest[0].path).expect("removed");
    let report = verify(&settings.directory, None).expect("readable");
    assert_eq!(report.problems.len(), 1, "{report}");
    assert!(report.problems[0].what.contains("are missing"), "{report}");
    // It opens all the same, and what is wrong stays told (by the log, too, where it could
    // see it).
    let (log, _) = open(&settings);
    log.close();
    let report = verify(&settings.directory, None).expect("readable");
    assert_eq!(report.problems.len(), 1, "{report}");
}

#[test]
fn segments_end_by_age_and_checkpoints_come_by_time() {
    let dir = TempDir::new().expect("directory");
    let settings = Settings {
        segment_age: Duration::from_millis(1),
        checkpoint_every: Duration::from_millis(1),
        compress: false,
        ..settings(&dir)
    };
    let (mut log, _ledger) = open(&settings);
    append(&mut log, 1);
    log.commit();
    std::thread::sleep(Duration::from_millis(5));
    log.tick();
    let all = segment::list(&settings.directory).expect("a directory");
    assert_eq!(all.len(), 2);
    assert_eq!(log.state.uncovered, 0);
    // Nothing was written since: nothing to sign, and no file without a record.
    let seq = log.state.seq;
    std::thread::sleep(Duration::from_millis(5));
    log.tick();
    assert_eq!(log.state.seq, seq);
    log.close();
    is_whole(&settings);
}

#[test]
fn a_directory_that_is_taken_away_comes_back_whole() {
    let dir = TempDir::new().expect("directory");
    let settings = settings(&dir);
    let (mut log, _ledger) = open(&settings);
    append(&mut log, 1);
    log.commit();
    fs::remove_dir_all(&settings.directory).expect("removed");
    append(&mut log, 2);
    log.commit();
    log.looked = Instant::now() - LOOK;
    log.tick();
    append(&mut log, 3);
    assert_eq!(log.commit().written, 1);
    // Another file in its place is kept, and is not the log.
    let path = log.active.segment.path.clone();
    fs::remove_file(&path).expect("removed");
    fs::write(&path, "forged\n").expect("written");
    log.looked = Instant::now() - LOOK;
    log.tick();
    log.close();
    assert_eq!(of_kind(&lines(&settings), "agent").len(), 3);
    is_whole(&settings);
    let kept = fs::read(path.with_added_extension("replaced")).expect("evidence");
    assert_eq!(kept, b"forged\n");
}

/// Time goes back in the records; order, age and intervals do not mind.
#[test]
fn a_clock_that_is_set_back_changes_nothing() {
    let dir = TempDir::new().expect("directory");
    let settings = settings(&dir);
    let (mut log, _ledger) = open(&settings);
    for year in [2026, 2025, 1970, 2030] {
        let record = json!({"time": format!("{year}-01-01T00:00:00Z"), "kind": "agent"});
        log.append(|text| serde_json::to_writer(text, &record).expect("memory"));
        log.commit();
        log.tick();
    }
    log.close();
    is_whole(&settings);
    let lines = lines(&settings);
    let numbers: Vec<u64> = lines.iter().filter_map(|l| l["seq"].as_u64()).collect();
    assert!(
        numbers.windows(2).all(|pair| pair[1] == pair[0] + 1),
        "{numbers:?}"
    );
}

#[test]
fn tampering_of_the_last_segment_is_kept_as_it_is() {
    let dir = TempDir::new().expect("directory");
    let settings = Settings {
        compress: false,
        ..settings(&dir)
    };
    let (mut log, _ledger) = open(&settings);
    for number in 0..5 {
        append(&mut log, number);
    }
    log.commit();
    let path = log.active.segment.path.clone();
    log.close();
    let text = fs::read_to_string(&path).expect("a segment");
    let changed = text.replace("\"number\":3", "\"number\":7");
    assert_ne!(text, changed);
    fs::write(&path, &changed).expect("written");
    let (log, _) = open(&settings);
    log.close();
    assert_eq!(fs::read_to_string(&path).expect("a segment"), changed);
    let lines = lines(&settings);
    let again = of_kind(&lines, "reopened")[1];
    assert_eq!(again["reason"], "broken");
    assert!(
        again["broken"]
            .as_str()
            .is_some_and(|b| b.contains("record 5")),
        "{again}"
    );
    let report = verify(&settings.directory, None).expect("readable");
    let places: Vec<u64> = report.problems.iter().map(|problem| problem.seq).collect();
    // What was changed, and that the next agent saw it.
    assert!(places.len() == 2 && places[0] == 5, "{report}");
    assert!(
        report.problems[1].what.contains("was not whole"),
        "{report}"
    );
}

#[test]
fn a_ledger_that_cannot_be_read_is_an_unknown_loss() {
    let dir = TempDir::new().expect("directory");
    let settings = settings(&dir);
    let (mut log, _ledger) = open(&settings);
    append(&mut log, 1);
    log.commit();
    drop((log, _ledger));
    fs::write(&settings.ledger, b"nonsense").expect("written");
    let (log, _) = open(&settings);
    log.close();
    let lines = lines(&settings);
    let gaps = of_kind(&lines, "gap");
    assert_eq!(gaps.len(), 2);
    assert!(
        gaps.iter()
            .all(|gap| gap["count"].is_null() && gap["reason"] == "restart")
    );
}

#[test]
fn a_tail_that_was_cut_off_between_two_agents_is_missed() {
    let dir = TempDir::new().expect("directory");
    let settings = settings(&dir);
    let (mut log, _ledger) = open(&settings);
    for number in 0..5 {
        append(&mut log, number);
    }
    log.commit();
    let path = log.active.segment.path.clone();
    log.close();
    let text = fs::read_to_string(&path).expect("a segment");
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    fs::write(&path, lines[..4].concat()).expect("written");
    let (log, _) = open(&settings);
    log.close();
    let report = verify(&settings.directory, None).expect("readable");
    assert!(
        report
            .problems
            .iter()
            .any(|p| p.what.contains("are missing")),
        "{report}"
    );
    assert!(
        report.problems.iter().any(|p| p.what.contains("are gone")),
        "{report}"
    );
}

/// One without the key removes the oldest segments and says that it was in order.
#[test]
fn a_removal_that_nothing_signed_is_none() {
    let dir = TempDir::new().expect("directory");
    let settings = Settings {
        segment_bytes: 2_000,
        compress: false,
        ..settings(&dir)
    };
    let (mut log, _ledger) = open(&settings);
    for number in 0..60 {
        append(&mut log, number);
        log.commit();
    }
    log.close();
    let all = segment::list(&settings.directory).expect("a directory");
    assert!(all.len() > 2);
    let last = fs::read_to_string(&all[all.len() - 1].path).expect("a segment");
    let next = fs::read_to_string(&all[1].path).expect("a segment");
    let prev = &next[next.find("\"prev\":\"").expect("prev") + 8..][..64];
    let end = last.lines().last().expect("a line");
    let seq = crate::audit::chain::last_seq(&settings.directory).expect("readable") + 1;
    let forged = format!(
        "{{\"seq\":{seq},\"prev\":\"{}\",\"kind\":\"retention\",\"firstSeq\":1,\"lastSeq\":{},\"lastHash\":\"{prev}\",\"files\":[]}}\n",
        super::super::line::Hash::of(end.as_bytes()).as_str(),
        all[1].first - 1
    );
    fs::write(&all[all.len() - 1].path, last.clone() + &forged).expect("written");
    fs::remove_file(&all[0].path).expect("removed");
    let report = verify(&settings.directory, None).expect("readable");
    assert!(!report.problems.is_empty(), "{report}");
    // Nor does the next agent sign it away.
    let (log, _) = open(&settings);
    log.close();
    let report = verify(&settings.directory, None).expect("readable");
    assert!(
        report
            .problems
            .iter()
            .any(|p| p.what.contains("nothing signed")),
        "{report}"
    );
}
