//! Questions to logs in several files.

use std::{fs, io::Write as _, path::Path};

use clap::Parser;
use time::macros::datetime;

use super::*;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    filter: Filter,
}

fn filter(arguments: &str) -> Filter {
    let words = ["postern"].into_iter().chain(arguments.split_whitespace());
    let cli = Cli::try_parse_from(words).unwrap_or_else(|e| panic!("{arguments}: {e}"));
    cli.filter.settled(datetime!(2026-01-31 12:00 UTC))
}

fn record(seq: u64, hour: u64) -> String {
    let kind = if seq.is_multiple_of(2) {
        "flow"
    } else {
        "request"
    };
    format!("{{\"seq\":{seq},\"time\":\"2026-01-31T{hour:02}:00:00Z\",\"kind\":\"{kind}\"}}\n")
}

/// Ten records in each of three files, written at 1, 5 and 9 o'clock.
fn log() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a directory");
    for (first, hour) in [(1, 1), (11, 5), (21, 9)] {
        let text: String = (first..first + 10).map(|seq| record(seq, hour)).collect();
        write(directory.path(), first, &text);
    }
    directory
}

fn write(directory: &Path, first: u64, text: &str) {
    let path = directory.join(format!("audit-{first:020}.jsonl"));
    let mut file = fs::File::options()
        .append(true)
        .create(true)
        .open(path)
        .expect("a file");
    file.write_all(text.as_bytes()).expect("it is written");
}

/// Numbers of what is let through, and what is told.
fn asked(directory: &Path, arguments: &str) -> (Vec<u64>, Vec<String>) {
    let (mut seqs, mut told) = (Vec::new(), Vec::new());
    for item in Scan::new(directory, filter(arguments)).expect("a log") {
        match item {
            Ok(entry) => seqs.push(entry.line.seq),
            Err(trouble) => told.push(trouble.to_string()),
        }
    }
    (seqs, told)
}

#[test]
fn what_cannot_be_read_is_told_and_the_rest_is_shown() {
    let directory = log();
    write(directory.path(), 21, "nonsense\n{\"seq\":32}\n");
    write(directory.path(), 21, &record(33, 9));
    let (seqs, told) = asked(directory.path(), "--seq 29..");
    assert_eq!(seqs, [29, 30, 33]);
    let file = "audit-00000000000000000021.jsonl";
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(told[0].contains(&format!("{file}:11: ")), "{told:?}");
    assert!(
        told[1].contains(&format!("{file}:12: the record has no `kind`")),
        "{told:?}"
    );
}

/// What a file that is not needed holds is not even told. Of a file it is known when its
/// first record was written, not when its last was.
#[test]
fn files_that_a_question_does_not_need_are_not_read() {
    for (arguments, expected, troubles) in [
        ("--since 2026-01-31T08:00:00Z", 21..31, 1),
        ("--since 2026-01-31T09:30:00Z", 0..0, 0),
        (
            "--since 2026-01-31T04:00:00Z --until 2026-01-31T08:00:00Z",
            11..21,
            2,
        ),
        ("--until 2026-01-31T04:00:00Z", 1..11, 1),
        ("--seq 25..", 25..31, 0),
        ("--seq 3..8", 3..9, 0),
        ("--since 2026-01-31T08:00:00Z --seq 3..8", 0..0, 0),
        ("", 1..31, 2),
    ] {
        let directory = log();
        // At the ends of the first and the second.
        write(directory.path(), 1, "nonsense\n");
        write(directory.path(), 11, "nonsense\n");
        let (seqs, told) = asked(directory.path(), arguments);
        assert_eq!(seqs, expected.collect::<Vec<_>>(), "{arguments}");
        assert_eq!(told.len(), troubles, "{arguments}: {told:?}");
    }
}

#[test]
fn the_last_ones_are_found_and_followed_across_files() {
    let directory = log();
    let seqs = |entries: &mut dyn Iterator<Item = Entry>| -> Vec<u64> {
        entries.map(|entry| entry.line.seq).collect()
    };
    for (arguments, count, expected) in [
        ("", 3, vec![28, 29, 30]),
        ("--kind request", 2, vec![27, 29]),
        ("--until 2026-01-31T04:00:00Z", 2, vec![9, 10]),
        ("--seq 4..5", 10, vec![4, 5]),
        ("--kind gap", 10, vec![]),
        ("", 0, vec![]),
    ] {
        let found = tail(directory.path(), &filter(arguments), count).expect("a log");
        let found = seqs(&mut found.last.into_iter());
        assert_eq!(found, expected, "{arguments} {count}");
    }
    let mut tail = tail(directory.path(), &filter("--kind request"), 1).expect("a log");
    write(
        directory.path(),
        21,
        &(record(31, 9) + &record(32, 9) + "{\"seq\":33,"),
    );
    let mut next =
        || seqs(&mut (&mut tail.scan).map(|item| item.unwrap_or_else(|e| panic!("{e}"))));
    // Half a line is none yet.
    assert_eq!(next(), [31]);
    write(directory.path(), 21, &record(33, 9)["{\"seq\":33,".len()..]);
    write(directory.path(), 34, &(record(34, 10) + &record(35, 10)));
    assert_eq!(next(), [33, 35]);
    assert_eq!(next(), Vec::<u64>::new());
}

#[test]
fn a_directory_that_is_not_there_is_told() {
    let nowhere = Path::new("/nowhere/audit");
    for told in [
        Scan::new(nowhere, Filter::default()).err(),
        tail(nowhere, &Filter::default(), 1).err(),
    ] {
        let told = told.map(|error| error.to_string()).unwrap_or_default();
        assert!(told.starts_with("/nowhere/audit: "), "{told}");
    }
}
