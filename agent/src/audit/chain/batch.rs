//! Lines that are written at once.

use serde::Serialize;

use super::{key::Key, line::Hash};
use crate::audit::timestamp;

/// Where the chain stands.
#[derive(Clone, Copy)]
pub struct State {
    /// Of the last line.
    pub seq: u64,
    pub hash: Hash,
    /// Accepted records that are in the log, or counted in it as lost.
    pub settled: u64,
    /// Lines since the last checkpoint.
    pub uncovered: u64,
}

/// What a line is to those who count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A record that was handed in.
    Record,
    /// Tells of records that the queue, or the disk, did not take.
    Queue(u64),
    Disk(u64),
    /// The first of a run, with which its counting begins.
    Begin,
    Checkpoint,
    /// Any other record of the log's own.
    Own,
}

/// Lines in one buffer, which is used again and again.
pub struct Batch {
    pub text: Vec<u8>,
    pub lines: Vec<Written>,
    state: State,
}

pub struct Written {
    /// Where it ends in the text, with its line end.
    pub end: usize,
    /// After it.
    pub state: State,
    pub entry: Entry,
}

/// What the log writes of itself.
#[derive(Serialize)]
struct Own<'a, T> {
    time: String,
    node: &'a str,
    kind: &'static str,
    #[serde(flatten)]
    what: &'a T,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Checkpoint<'a> {
    /// Why it was made now.
    reason: &'static str,
    /// SHA-256 of the public key.
    key: &'a str,
    public_key: String,
    /// For the next start, which counts what this run lost.
    ledger: u64,
    settled: u64,
}

impl Batch {
    pub fn new(state: State) -> Self {
        Self {
            text: Vec::new(),
            lines: Vec::new(),
            state,
        }
    }

    /// Empty, behind this.
    pub fn clear(&mut self, state: State) {
        self.text.clear();
        self.lines.clear();
        self.state = state;
    }

    /// A line, of what writes one JSON object.
    pub fn push(&mut self, entry: Entry, write: impl FnOnce(&mut Vec<u8>)) {
        let start = self.begin(write);
        self.end(start, entry);
    }

    /// A record of the log's own.
    pub fn own<T: Serialize>(&mut self, entry: Entry, node: &str, kind: &'static str, what: &T) {
        self.push(entry, |text| own(text, node, kind, what));
    }

    pub fn checkpoint(&mut self, node: &str, key: &Key, run: u64, reason: &'static str) {
        let public_key = key.public();
        let id = super::key::id(&public_key).unwrap_or(Hash::NONE);
        let what = Checkpoint {
            reason,
            key: id.as_str(),
            public_key,
            ledger: run,
            settled: self.state.settled,
        };
        let start = self.begin(|text| own(text, node, "checkpoint", &what));
        self.text.pop();
        let signature = key.sign(&self.text[start..]);
        self.text.extend_from_slice(SIGNATURE.as_bytes());
        self.text.extend_from_slice(signature.as_bytes());
        self.text.extend_from_slice(b"\"}");
        self.end(start, Entry::Checkpoint);
    }

    fn begin(&mut self, write: impl FnOnce(&mut Vec<u8>)) -> usize {
        let start = self.text.len();
        let (seq, prev) = (self.state.seq + 1, self.state.hash);
        let head = format!("{{\"seq\":{seq},\"prev\":\"{}\"", prev.as_str());
        self.text.extend_from_slice(head.as_bytes());
        let brace = self.text.len();
        write(&mut self.text);
        // Its members follow on ours.
        self.text[brace] = b',';
        start
    }

    fn end(&mut self, start: usize, entry: Entry) {
        let state = &mut self.state;
        state.seq += 1;
        state.hash = Hash::of(&self.text[start..]);
        state.uncovered += 1;
        match entry {
            Entry::Record => state.settled += 1,
            Entry::Queue(count) | Entry::Disk(count) => state.settled += count,
            Entry::Begin => state.settled = 0,
            Entry::Checkpoint => state.uncovered = 0,
            Entry::Own => {}
        }
        self.text.push(b'\n');
        self.lines.push(Written {
            end: self.text.len(),
            state: *state,
            entry,
        });
    }
}

/// Behind it is a checkpoint's signature, over all that is before.
pub const SIGNATURE: &str = ",\"signature\":\"";

fn own<T: Serialize>(text: &mut Vec<u8>, node: &str, kind: &'static str, what: &T) {
    let own = Own {
        time: timestamp(std::time::SystemTime::now()),
        node,
        kind,
        what,
    };
    serde_json::to_writer(text, &own).expect("records have string keys only");
}
