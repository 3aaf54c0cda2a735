use std::io::Write as _;

use super::*;

/// A directory that a log is written to by hand.
struct Log(tempfile::TempDir);

impl Log {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    fn at(&self) -> &Path {
        self.0.path()
    }

    fn append(&self, first: u64, text: &str) {
        let path = Segment::plain(self.at(), first).path;
        let file = File::options().create(true).append(true).open(path);
        file.expect("a segment")
            .write_all(text.as_bytes())
            .expect("written");
    }

    fn records(&self, first: u64, seqs: impl Iterator<Item = u64>) {
        self.append(first, &seqs.map(line).collect::<String>());
    }

    fn pack(&self, first: u64) {
        let plain = Segment::plain(self.at(), first);
        let text = std::fs::read(&plain.path).expect("read");
        let packed = zstd::encode_all(text.as_slice(), 3).expect("compressed");
        std::fs::write(plain.to_packed().path, packed).expect("written");
        std::fs::remove_file(plain.path).expect("removed");
    }

    fn remove(&self, first: u64) {
        std::fs::remove_file(Segment::plain(self.at(), first).path).expect("removed");
    }

    fn reader(&self, from: u64) -> Reader {
        Reader::open(self.at(), from).expect("opens")
    }
}

fn line(seq: u64) -> String {
    format!("{{\"seq\":{seq},\"kind\":\"agent\"}}\n")
}

fn rest(reader: &mut Reader) -> Vec<u64> {
    reader.map(|line| line.expect("a line").seq).collect()
}

#[test]
fn from_a_record_on_through_plain_and_compressed_files() {
    let log = Log::new();
    log.records(1, 1..=10);
    log.records(11, 11..=20);
    log.records(21, 21..=25);
    log.pack(1);
    for from in [0, 1, 2, 10, 11, 12, 20, 21, 25, 26, 40] {
        let wanted: Vec<u64> = (from.max(1)..=25).collect();
        assert_eq!(rest(&mut log.reader(from)), wanted, "from {from}");
    }
    let line = log.reader(12).next().expect("one").expect("a line");
    assert_eq!(line.number, 2);
    assert_eq!(*line.file, *Segment::plain(log.at(), 11).path);
    assert_eq!(line.text, super::tests::line(12).trim_end());
}

#[test]
fn goes_on_where_it_was() {
    let log = Log::new();
    let mut reader = log.reader(1);
    assert!(rest(&mut reader).is_empty());
    log.records(1, 1..=3);
    assert_eq!(rest(&mut reader), [1, 2, 3]);
    // Half a line is not there yet, and may be cut off again.
    log.append(1, "{\"seq\":4,\"kind\":\"ag");
    assert!(rest(&mut reader).is_empty());
    let path = Segment::plain(log.at(), 1).path;
    let file = File::options().write(true).open(path).expect("opens");
    file.set_len(3 * line(1).len() as u64).expect("cut");
    assert!(rest(&mut reader).is_empty());
    log.append(1, "{\"seq\":4,");
    assert!(rest(&mut reader).is_empty());
    log.append(1, "\"kind\":\"other\"}\n");
    assert_eq!(rest(&mut reader), [4]);
    // Rotation, and compression of the file that it stands in.
    log.records(1, 5..=6);
    log.records(7, 7..=8);
    log.pack(1);
    assert_eq!(rest(&mut reader), [5, 6, 7, 8]);
    log.records(9, 9..=9);
    log.pack(7);
    log.records(10, 10..=11);
    log.pack(9);
    assert_eq!(rest(&mut reader), [9, 10, 11]);
    // Retention: what is left.
    log.records(10, 12..=12);
    log.records(13, 13..=14);
    log.records(15, 15..=16);
    log.remove(10);
    log.remove(13);
    assert_eq!(rest(&mut reader), [12, 15, 16]);
}

#[test]
fn a_segment_that_is_there_twice_is_read_once() {
    let log = Log::new();
    log.records(1, 1..=3);
    log.pack(1);
    log.records(1, 1..=3);
    log.records(4, 4..=4);
    assert_eq!(rest(&mut log.reader(0)), [1, 2, 3, 4]);
}

#[test]
fn errors_name_file_and_line_and_the_rest_is_read() {
    let log = Log::new();
    log.records(1, 1..=1);
    log.append(1, "{\"seq\":2\n{\"sequence\":3}\n\u{0}\n");
    log.records(1, 5..=5);
    log.records(6, 6..=6);
    let packed = Segment::plain(log.at(), 6).to_packed();
    log.pack(6);
    let mut bytes = std::fs::read(&packed.path).expect("read");
    bytes.truncate(bytes.len() - 2);
    std::fs::write(&packed.path, bytes).expect("written");
    log.records(7, 7..=7);
    let read: Vec<String> = log
        .reader(0)
        .map(|read| match read {
            Ok(line) => line.seq.to_string(),
            Err(error) => error.to_string(),
        })
        .collect();
    let [one, two, three, four, five, bad, seven] = read.as_slice() else {
        panic!("{read:?}");
    };
    assert_eq!([one, five, seven], ["1", "5", "7"]);
    for (error, number) in [(two, 2), (three, 3), (four, 4)] {
        let place = format!("audit-00000000000000000001.jsonl:{number}: ");
        assert!(error.contains(&place), "{error}");
    }
    assert!(bad.contains("audit-00000000000000000006.jsonl.zst: "));
    let error = Reader::open(&log.at().join("none"), 1).map(|_| ());
    let error = error.expect_err("no directory").to_string();
    assert!(error.contains("/none: "), "{error}");
}

#[test]
fn the_last_record() {
    let log = Log::new();
    let last = |log: &Log| last_seq(log.at()).expect("a number");
    assert_eq!(last(&log), 0);
    log.append(1, "");
    assert_eq!(last(&log), 0);
    log.append(1, "{\"seq\":1,");
    assert_eq!(last(&log), 0);
    log.append(1, "\"kind\":\"x\"}\n");
    assert_eq!(last(&log), 1);
    let long = "x".repeat(200_000);
    log.append(1, &format!("{{\"seq\":2,\"long\":\"{long}\"}}\n"));
    assert_eq!(last(&log), 2);
    log.append(1, &format!("{{\"seq\":3,\"long\":\"{long}"));
    assert_eq!(last(&log), 2);
    log.append(4, "");
    assert_eq!(last(&log), 3);
    log.records(4, 4..=6);
    log.pack(4);
    assert_eq!(last(&log), 6);
    log.append(7, "nonsense\n");
    let error = last_seq(log.at()).expect_err("no record").to_string();
    assert!(error.contains("audit-00000000000000000007.jsonl: last line"));
}
