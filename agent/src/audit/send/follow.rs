//! Reads the log onward from a cursor, in batches that are bounded in records and bytes.
//! Records that retention removed before they were read become a record of kind `gap`.

use std::time::SystemTime;

use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::config::Filter;
use crate::audit::chain::{Line, ReadError};

/// Records of a batch, and bytes of their lines; one line alone may be longer.
pub const MAX_RECORDS: usize = 512;
pub const MAX_BYTES: usize = 1 << 20;
/// Lines that are looked at for one batch, where the filter takes few of them.
const MAX_LOOKED_AT: usize = 16_384;

/// A record to send.
#[derive(Clone, Debug)]
pub struct Entry {
    /// As it stands in the log.
    pub text: String,
    pub record: Value,
}

#[derive(Debug, Default)]
pub struct Batch {
    pub entries: Vec<Entry>,
    /// The last record that was looked at: where the cursor goes when this is sent.
    pub reached: u64,
    /// Records that are no longer there.
    pub skipped: u64,
    bytes: usize,
}

pub struct Follower<R> {
    reader: R,
    filter: Filter,
    node: Box<str>,
    /// The last record that went into a batch, or past the filter.
    reached: u64,
    /// Read, and too much for the batch before.
    held: Option<Line>,
    /// Met behind records that were still to be sent.
    failed: Option<ReadError>,
    /// What is missing next could not be read; else it is no longer there.
    damaged: bool,
}

impl<R: Iterator<Item = Result<Line, ReadError>>> Follower<R> {
    /// `reader` begins behind `reached`, or with whatever is the oldest by now.
    pub fn new(reader: R, reached: u64, filter: Filter, node: &str) -> Self {
        Self {
            reader,
            filter,
            node: node.into(),
            reached,
            held: None,
            failed: None,
            damaged: false,
        }
    }

    /// Goes on with another reader of the same log.
    pub fn reopen(&mut self, reader: R) {
        self.reader = reader;
        self.held = None;
    }

    pub fn reached(&self) -> u64 {
        self.reached
    }

    /// What comes next; it has reached nothing new at the end of the log.
    pub fn batch(&mut self) -> Result<Batch, ReadError> {
        let before = self.reached;
        let mut batch = Batch {
            reached: before,
            ..Batch::default()
        };
        for _ in 0..MAX_LOOKED_AT {
            let line = match self.next() {
                None => break,
                Some(Ok(line)) => line,
                Some(Err(error)) if batch.reached == before => {
                    self.damaged = true;
                    return Err(error);
                }
                Some(Err(error)) => {
                    self.failed = Some(error);
                    break;
                }
            };
            if line.seq <= self.reached {
                continue;
            }
            if batch.is_full(line.text.len()) {
                self.held = Some(line);
                break;
            }
            let missing = line.seq - self.reached - 1;
            if missing > 0 {
                let reason = if self.damaged { "damage" } else { "retention" };
                batch.add(gap(&self.node, reason, self.reached + 1, line.seq - 1));
                batch.skipped += missing;
            }
            self.damaged = false;
            self.reached = line.seq;
            batch.reached = line.seq;
            // The reader has seen that it is JSON.
            let record: Value = serde_json::from_str(&line.text).unwrap_or_default();
            if self
                .filter
                .takes(record["kind"].as_str().unwrap_or_default())
            {
                batch.add(Entry {
                    text: line.text,
                    record,
                });
            }
        }
        Ok(batch)
    }

    fn next(&mut self) -> Option<Result<Line, ReadError>> {
        if let Some(error) = self.failed.take() {
            return Some(Err(error));
        }
        match self.held.take() {
            Some(line) => Some(Ok(line)),
            None => self.reader.next(),
        }
    }
}

impl Batch {
    fn is_full(&self, more: usize) -> bool {
        // A gap may come before the line.
        let full = self.entries.len() + 2 > MAX_RECORDS || self.bytes + more > MAX_BYTES;
        full && !self.entries.is_empty()
    }

    fn add(&mut self, entry: Entry) {
        self.bytes += entry.text.len();
        self.entries.push(entry);
    }
}

/// Tells the receiver, whatever its filter, of what it will never get. It is not of the
/// log, and has no `seq`.
pub fn gap(node: &str, reason: &str, first: u64, last: u64) -> Entry {
    let time = OffsetDateTime::from(SystemTime::now())
        .format(&Rfc3339)
        .expect("a time of this century");
    let record = json!({
        "time": time,
        "node": node,
        "kind": "gap",
        "lost": "records",
        "count": last - first + 1,
        "reason": reason,
        "first": first,
        "last": last,
    });
    Entry {
        text: record.to_string(),
        record,
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::VecDeque, path::Path, sync::Arc};

    use super::{super::config::Kind, *};

    type Source = VecDeque<Line>;

    fn line(seq: u64, kind: &str, padding: usize) -> Line {
        let padding = "x".repeat(padding);
        Line {
            seq,
            text: json!({"seq": seq, "kind": kind, "padding": padding}).to_string(),
            file: Arc::from(Path::new("audit")),
            number: seq,
        }
    }

    fn follower(
        lines: Vec<Line>,
        reached: u64,
        kinds: Vec<Kind>,
    ) -> Follower<impl Iterator<Item = Result<Line, ReadError>>> {
        let lines: Source = lines.into();
        Follower::new(lines.into_iter().map(Ok), reached, Filter { kinds }, "n")
    }

    fn sequence(batch: &Batch) -> Vec<u64> {
        let seq = |e: &Entry| e.record["seq"].as_u64().unwrap_or(0);
        batch.entries.iter().map(seq).collect()
    }

    #[test]
    fn batches_are_bounded_and_leave_nothing_out() {
        let lines = (1..=1_200).map(|seq| line(seq, "flow", 10)).collect();
        let mut follower = follower(lines, 0, vec![]);
        let mut all = Vec::new();
        loop {
            let batch = follower.batch().expect("read");
            assert!(batch.entries.len() <= MAX_RECORDS);
            if batch.entries.is_empty() {
                break;
            }
            all.extend(sequence(&batch));
            assert_eq!(batch.reached, *all.last().expect("some"));
        }
        assert_eq!(all, (1..=1_200).collect::<Vec<_>>());
    }

    #[test]
    fn a_long_line_goes_alone() {
        let long = MAX_BYTES + 1;
        let lines = vec![
            line(1, "flow", 1),
            line(2, "flow", long),
            line(3, "flow", 1),
        ];
        let mut follower = follower(lines, 0, vec![]);
        for expected in [[1], [2], [3]] {
            assert_eq!(sequence(&follower.batch().expect("read")), expected);
        }
    }

    #[test]
    fn the_filter_moves_the_cursor_too() {
        let lines = vec![
            line(1, "flow", 1),
            line(2, "request", 1),
            line(3, "flow", 1),
        ];
        let mut follower = follower(lines, 0, vec![Kind::Request]);
        let batch = follower.batch().expect("read");
        assert_eq!((sequence(&batch), batch.reached), (vec![2], 3));
    }

    #[test]
    fn what_is_gone_is_told_and_counted() {
        let lines = vec![line(5, "flow", 1), line(6, "flow", 1), line(9, "flow", 1)];
        let mut follower = follower(lines, 2, vec![Kind::Request]);
        let batch = follower.batch().expect("read");
        assert_eq!((batch.skipped, batch.reached), (4, 9));
        let told: Vec<_> = (batch.entries.iter())
            .map(|e| (&e.record["count"], &e.record["first"], &e.record["last"]))
            .collect();
        assert_eq!(
            told,
            [
                (&json!(2), &json!(3), &json!(4)),
                (&json!(2), &json!(7), &json!(8))
            ]
        );
        assert_eq!(batch.entries[0].record["reason"], "retention");
    }

    #[test]
    fn what_cannot_be_read_is_told_behind_what_can() {
        let failure = || ReadError::Line {
            file: Arc::from(Path::new("audit")),
            number: 2,
            why: "no JSON".into(),
        };
        let lines = [
            Ok(line(1, "flow", 1)),
            Err(failure()),
            Ok(line(3, "flow", 1)),
        ];
        let mut follower = Follower::new(lines.into_iter(), 0, Filter::default(), "n");
        assert_eq!(sequence(&follower.batch().expect("the first")), [1]);
        let error = follower.batch().expect_err("the second");
        assert_eq!(error.to_string(), "audit:2: no JSON");
        let batch = follower.batch().expect("the third");
        assert_eq!(sequence(&batch), [0, 3]);
        assert_eq!(batch.entries[0].record["reason"], "damage");
    }

    #[test]
    fn what_was_sent_is_not_sent_again() {
        let mut follower = follower(vec![line(3, "flow", 1), line(4, "flow", 1)], 3, vec![]);
        assert_eq!(sequence(&follower.batch().expect("read")), [4]);
    }
}
