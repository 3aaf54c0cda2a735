use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::audit::chain::{Log, Settings, Sync};

/// xorshift64: the same tamperings each time.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }
}

/// A log of several segments.
fn log(dir: &TempDir, compress: bool) -> Settings {
    let settings = Settings {
        sync: Sync::Never,
        segment_bytes: 9_000,
        checkpoint_records: 20,
        compress,
        ..Settings::new(dir.path().join("audit"), dir.path())
    };
    let (mut log, _) = Log::open(settings.clone(), "node1").expect("a log");
    for number in 0..400 {
        let record =
            json!({"time": "2026-01-01T00:00:00Z", "kind": "connection", "number": number});
        log.append(|text| serde_json::to_writer(text, &record).expect("memory"));
        if number % 9 == 0 {
            log.commit();
        }
    }
    log.commit();
    log.close();
    let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while compress && std::time::Instant::now() < end {
        let all = list_all(&settings.directory).expect("a directory");
        if all.iter().filter(|s| !s.packed).count() == 1 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    settings
}

type Files = Vec<(Segment, Vec<Vec<u8>>)>;

/// All lines, by file.
fn read(directory: &Path) -> Files {
    let all = list_all(directory).expect("a directory");
    all.into_iter()
        .map(|segment| {
            let bytes = fs::read(&segment.path).expect("a file");
            let text = match segment.packed {
                true => zstd::decode_all(&bytes[..]).expect("zstd"),
                false => bytes,
            };
            let lines = text.split_inclusive(|&b| b == b'\n').map(<[u8]>::to_vec);
            (segment, lines.collect())
        })
        .collect()
}

fn write(to: &TempDir, public: &[u8], files: &Files) {
    for (segment, lines) in files {
        let text = lines.concat();
        let bytes = match segment.packed {
            true => zstd::encode_all(&text[..], 1).expect("zstd"),
            false => text,
        };
        fs::write(to.path().join(segment.name()), bytes).expect("written");
    }
    fs::write(to.path().join(PUBLIC_KEY), public).expect("written");
}

fn seq_of(line: &[u8]) -> u64 {
    Head::parse(line.strip_suffix(b"\n").unwrap_or(line))
        .expect("a record")
        .0
        .seq
}

/// Chains all lines from one on anew, as one would who has no key.
fn rechain(files: &mut Files, from: (usize, usize)) {
    let mut prev = None;
    let mut seq = 0;
    for (number, (_, lines)) in files.iter_mut().enumerate() {
        for (index, line) in lines.iter_mut().enumerate() {
            if (number, index) > from {
                let text = String::from_utf8(line.clone()).expect("text");
                let rest = text.split_once("\",").expect("`prev`").1;
                let prev: Hash = prev.expect("a line before");
                seq += 1;
                *line =
                    format!("{{\"seq\":{seq},\"prev\":\"{}\",{rest}", prev.as_str()).into_bytes();
            } else {
                seq = seq_of(line);
            }
            prev = Some(Hash::of(line.strip_suffix(b"\n").unwrap_or(line)));
        }
    }
}

/// What was done, and between which records it must be found.
struct Done {
    what: String,
    from: u64,
    to: u64,
    /// Only a checkpoint that was kept elsewhere can tell.
    only_since: bool,
}

fn tamper(files: &mut Files, kind: usize, random: &mut Random) -> Done {
    let file = random.below(files.len());
    let index = random.below(files[file].1.len());
    let at = seq_of(&files[file].1[index]);
    let done = |what: &str, from: u64, to: u64| Done {
        what: format!("{what} {at} in file {file}"),
        from,
        to,
        only_since: false,
    };
    let end = files
        .last()
        .and_then(|(_, lines)| lines.last())
        .map_or(0, |line| seq_of(line));
    let lines = &mut files[file].1;
    match kind {
        0 => {
            let line = &mut lines[index];
            // The line's end, too.
            let byte = random.below(line.len());
            let bit = 1 << random.below(8);
            line[byte] ^= bit;
            done(
                &format!("bit {bit} of byte {byte} of"),
                at.saturating_sub(1),
                at + 1,
            )
        }
        1 => {
            lines.remove(index);
            Done {
                only_since: at == end,
                ..done("removed", at, at + 1)
            }
        }
        2 => {
            let other = random.below(lines.len());
            if other == index {
                return tamper(files, 1, random);
            }
            lines.swap(index, other);
            let (low, high) = (index.min(other), index.max(other));
            let first = at - index as u64;
            done("swapped", first + low as u64 - 1, first + high as u64 + 1)
        }
        3 => {
            let forged = lines[random.below(lines.len())].clone();
            lines.insert(index + 1, forged);
            done("inserted behind", at, at + 2)
        }
        4 => {
            // One that hides it as well as can be without the key: the next checkpoint's
            // signature is what it cannot make.
            let line = String::from_utf8(lines[index].clone()).expect("text");
            if !line.contains("\"number\":") {
                return tamper(files, 0, random);
            }
            let forged = line.replace("\"number\":", "\"number\":9");
            lines[index] = forged.into_bytes();
            rechain(files, (file, index));
            done("changed and chained anew", at, at + 30)
        }
        5 => {
            let keep = random.below(index + 1);
            lines.truncate(keep);
            files.truncate(file + 1);
            let from = at - (index - keep) as u64;
            let mut done = done("cut off from", from, end);
            done.only_since = true;
            done
        }
        _ => {
            let (_, gone) = files.remove(file);
            let from = gone.first().map_or(0, |line| seq_of(line));
            let to = gone.last().map_or(0, |line| seq_of(line));
            Done {
                only_since: to == end,
                // Of the first, that record 1 is missing.
                ..done("without the file of", from, to + 1)
            }
        }
    }
}

#[test]
fn each_of_a_thousand_tamperings_is_found_and_named() {
    let mut random = Random(0x5eed_0fa1_0950);
    for compress in [false, true] {
        let dir = TempDir::new().expect("directory");
        let settings = log(&dir, compress);
        let report = verify(&settings.directory, None).expect("readable");
        assert_eq!(report.problems, [], "{report}");
        assert_eq!((report.uncovered, &report.notes[..]), (0, &[][..]));
        let whole = read(&settings.directory);
        assert!(whole.len() > 4, "{} files", whole.len());
        assert_eq!(whole.iter().filter(|(s, _)| s.packed).count() > 0, compress);
        let public = fs::read(settings.directory.join(PUBLIC_KEY)).expect("a key");
        let kept = dir.path().join("kept");
        let line = latest_checkpoint(&settings.directory).expect("readable");
        fs::write(&kept, line.expect("a checkpoint")).expect("written");
        for round in 0..500 {
            let mut files = whole.clone();
            let done = tamper(&mut files, round % 7, &mut random);
            let to = TempDir::new().expect("directory");
            write(&to, &public, &files);
            let alone = verify(to.path(), None).expect("readable");
            let held = verify(to.path(), Some(&kept)).expect("readable");
            let what = &done.what;
            assert!(!held.problems.is_empty(), "not found: {what}\n{held}");
            if !done.only_since {
                assert!(!alone.problems.is_empty(), "not found: {what}\n{alone}");
            }
            let report = if done.only_since { held } else { alone };
            let places = report.problems.iter().map(|problem| problem.seq);
            let near = |seq: u64| seq + 1 >= done.from && seq <= done.to + 1;
            assert!(
                places.clone().any(near),
                "{what}: found elsewhere than {}..{}\n{report}",
                done.from,
                done.to
            );
            assert!(places.count() <= 20);
        }
        // And the original is still what it was.
        let to = TempDir::new().expect("directory");
        write(&to, &public, &whole);
        let report = verify(to.path(), Some(&kept)).expect("readable");
        assert_eq!(report.problems, [], "{report}");
    }
}

/// A number far off is one problem, and hides no other.
#[test]
fn a_changed_number_hides_nothing() {
    let dir = TempDir::new().expect("directory");
    let settings = log(&dir, false);
    let mut files = read(&settings.directory);
    let public = fs::read(settings.directory.join(PUBLIC_KEY)).expect("a key");
    let change = |line: &mut Vec<u8>, from: &str, to: &str| {
        let text = String::from_utf8(line.clone()).expect("text");
        assert!(text.contains(from), "{text}");
        *line = text.replacen(from, to, 1).into_bytes();
    };
    change(&mut files[0].1[10], "\"seq\":11,", "\"seq\":9011,");
    let later = files[2].1.iter_mut().find(|line| {
        line.ends_with(b"}\n") && { String::from_utf8_lossy(line).contains("\"number\":") }
    });
    change(later.expect("a record"), "\"number\":", "\"number\":7");
    let to = TempDir::new().expect("directory");
    write(&to, &public, &files);
    let report = verify(to.path(), None).expect("readable");
    let places: Vec<u64> = report.problems.iter().map(|problem| problem.seq).collect();
    assert!(places.len() <= 4, "{report}");
    assert!(
        places[0] == 11 && places.iter().any(|seq| *seq > 100 && *seq < 400),
        "{report}"
    );
}

#[test]
fn a_log_with_another_key_is_not_the_log() {
    let dir = TempDir::new().expect("directory");
    let settings = log(&dir, false);
    let kept = dir.path().join("kept");
    let line = latest_checkpoint(&settings.directory).expect("readable");
    fs::write(&kept, line.expect("a checkpoint")).expect("written");
    // All of it made anew by someone who owns the node, with a key of their own.
    fs::remove_dir_all(&settings.directory).expect("removed");
    fs::remove_file(&settings.key).expect("removed");
    fs::remove_file(&settings.ledger).expect("removed");
    let settings = log(&dir, false);
    assert!(
        verify(&settings.directory, None)
            .expect("readable")
            .problems
            .is_empty()
    );
    let held = verify(&settings.directory, Some(&kept)).expect("readable");
    let found = held.problems.iter().any(|p| p.what.contains("another key"));
    assert!(found, "{held}");
}

#[test]
fn what_is_no_checkpoint_is_refused_by_name() {
    let dir = TempDir::new().expect("directory");
    let settings = log(&dir, false);
    let first = &read(&settings.directory)[0].1;
    let kept = dir.path().join("kept");
    for (content, why) in [
        (&b"nothing"[..], "expected"),
        (&first[0], "its kind is `reopened`"),
    ] {
        fs::write(&kept, content).expect("written");
        let error = verify(&settings.directory, Some(&kept)).expect_err("refused");
        assert!(error.to_string().contains(why), "{error}");
    }
    assert!(verify(&dir.path().join("absent"), None).is_err());
}

#[test]
fn what_no_checkpoint_covers_yet_is_told() {
    let dir = TempDir::new().expect("directory");
    let settings = Settings {
        sync: Sync::Never,
        ..Settings::new(dir.path().join("audit"), dir.path())
    };
    let (mut log, _) = Log::open(settings.clone(), "node1").expect("a log");
    log.append(|text| text.extend_from_slice(b"{\"kind\":\"agent\"}"));
    log.commit();
    let report = verify(&settings.directory, None).expect("readable");
    assert_eq!((report.uncovered, report.last), (2, log.seq()));
    assert!(
        report
            .to_string()
            .contains("not yet covered by a checkpoint: 2")
    );
    assert_eq!(
        latest_checkpoint(&settings.directory).expect("readable"),
        None
    );
}
