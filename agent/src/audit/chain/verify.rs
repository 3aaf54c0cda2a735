//! Proves that the log is as it was written: every record is there, in its place, and
//! unchanged; and names each place where it is not.
//!
//! What it rests on: each record names the hash of the one before, and checkpoints sign
//! that. Who has the node's key can sign anew; a checkpoint that is kept elsewhere
//! (`postern audit checkpoint`, then `--since-checkpoint`) pins key and content against
//! that, and against a log whose end was cut off.

use std::{
    collections::HashMap,
    fmt, fs, io,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::{
    PUBLIC_KEY, ReadError, Reader,
    batch::SIGNATURE,
    key::verifies,
    last_seq,
    line::{Hash, Head},
    lines::Lines,
    pack::same,
    segment::{Segment, list_all},
};

/// Problems that are told one by one.
const MOST: usize = 20;

#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error("{}: {source}", path.display())]
    Path { path: PathBuf, source: io::Error },
    #[error("{}: is no checkpoint: {why}", path.display())]
    NoCheckpoint { path: PathBuf, why: String },
}

impl VerifyError {
    fn at(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Path { path, source }
    }
}

/// Where the log is not as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub file: String,
    /// In the file, from 1; 0: the file as a whole.
    pub line: u64,
    /// The record in question.
    pub seq: u64,
    pub what: String,
}

#[derive(Debug, Default)]
pub struct Report {
    pub records: u64,
    pub segments: usize,
    pub checkpoints: u64,
    pub first: u64,
    pub last: u64,
    /// Records behind the last checkpoint: only the chain of hashes holds them.
    pub uncovered: u64,
    pub problems: Vec<Problem>,
    /// Those that are not in `problems`.
    pub more: u64,
    /// Nothing wrong, and worth knowing.
    pub notes: Vec<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: record {}: {}", self.file, self.seq, self.what),
            line => write!(
                f,
                "{}:{line}: record {}: {}",
                self.file, self.seq, self.what
            ),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for problem in &self.problems {
            writeln!(f, "{problem}")?;
        }
        if self.more > 0 {
            writeln!(f, "... and {} more", self.more)?;
        }
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        let Self {
            records,
            segments,
            checkpoints,
            first,
            last,
            uncovered,
            ..
        } = self;
        writeln!(
            f,
            "{records} records ({first} to {last}) in {segments} files, {checkpoints} checkpoints"
        )?;
        if *uncovered > 0 {
            writeln!(f, "not yet covered by a checkpoint: {uncovered}")?;
        }
        match self.problems.len() as u64 + self.more {
            0 => write!(f, "the log is as it was written"),
            problems => write!(f, "{problems} places are not as they were written"),
        }
    }
}

/// How often it begins anew, where retention was faster.
const ATTEMPTS: u32 = 10;

/// Reads all of a log. `since`: a file with a checkpoint that the log must still have.
pub fn verify(directory: &Path, since: Option<&Path>) -> Result<Report, VerifyError> {
    let since = since.map(Pinned::read).transpose()?;
    let mut attempts = 1;
    loop {
        let (report, gone) = attempt(directory, since.clone())?;
        // A live log may lose its beginning while it is read. Whether it may, the next
        // attempt says: it must find a signed link there.
        if gone.is_empty() || attempts == ATTEMPTS || !removed_since(directory, &gone)? {
            return Ok(report);
        }
        attempts += 1;
    }
}

/// Whether the log begins behind all these now.
fn removed_since(directory: &Path, gone: &[u64]) -> Result<bool, VerifyError> {
    let now = list_all(directory).map_err(VerifyError::at(directory))?;
    let first = now.iter().map(|segment| segment.first).min();
    Ok(first.is_some_and(|first| gone.iter().all(|gone| *gone < first)))
}

/// What one reading found, and the segments that were listed and then not there.
fn attempt(directory: &Path, since: Option<Pinned>) -> Result<(Report, Vec<u64>), VerifyError> {
    let mut all = list_all(directory).map_err(VerifyError::at(directory))?;
    let mut check = Check::new(directory, since);
    all.dedup_by(|packed, plain| {
        let twice = packed.first == plain.first;
        if twice {
            check.twin(plain, packed);
        }
        twice
    });
    let last = all.len().saturating_sub(1);
    for (number, segment) in all.iter().enumerate() {
        check.segment(segment, number == last);
    }
    let gone = std::mem::take(&mut check.gone);
    Ok((check.finish(all.len()), gone))
}

/// The last checkpoint's line, to be kept elsewhere.
pub fn latest_checkpoint(directory: &Path) -> Result<Option<String>, ReadError> {
    // They are never far from the end; where none is there, all is read.
    let end = last_seq(directory)?;
    for back in [5_000, 100_000, u64::MAX] {
        let from = end.saturating_sub(back);
        let mut found = None;
        for line in Reader::open(directory, from)? {
            let line = line?;
            if is_checkpoint(&line.text) {
                found = Some(line.text);
            }
        }
        if found.is_some() || from == 0 {
            return Ok(found);
        }
    }
    Ok(None)
}

fn is_checkpoint(line: &str) -> bool {
    Head::parse(line.as_bytes()).is_ok_and(|(head, _)| head.kind == "checkpoint")
}

/// A checkpoint that was kept elsewhere.
#[derive(Clone)]
struct Pinned {
    seq: u64,
    hash: Hash,
    key: String,
    met: bool,
}

impl Pinned {
    fn read(path: &Path) -> Result<Self, VerifyError> {
        let text = fs::read_to_string(path).map_err(VerifyError::at(path))?;
        let line = text.trim_end_matches(['\n', '\r']);
        let fail = |why: &str| VerifyError::NoCheckpoint {
            path: path.to_owned(),
            why: why.to_owned(),
        };
        let (head, _) = Head::parse(line.as_bytes()).map_err(|why| fail(&why))?;
        if head.kind != "checkpoint" {
            return Err(fail(&format!("its kind is `{}`", head.kind)));
        }
        let key = signed_by(line).map_err(|why| fail(&why))?;
        Ok(Self {
            seq: head.seq,
            hash: Hash::of(line.as_bytes()),
            key,
            met: false,
        })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Signed {
    public_key: String,
    signature: String,
}

/// The key that a checkpoint is signed with.
fn signed_by(line: &str) -> Result<String, String> {
    let signed: Signed = serde_json::from_str(line).map_err(|e| e.to_string())?;
    let (text, end) = line
        .rsplit_once(SIGNATURE)
        .ok_or("it does not end with its signature")?;
    let alone = end.strip_suffix("\"}") == Some(&signed.signature);
    if !alone || !verifies(&signed.public_key, text.as_bytes(), &signed.signature) {
        return Err("its signature is wrong: it, or what it covers, was changed".into());
    }
    Ok(signed.public_key)
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Removed {
    first_seq: u64,
    last_seq: u64,
    last_hash: String,
}

struct Check {
    report: Report,
    /// The last record, and the hash that the next must name; `None` after one that cannot
    /// be read.
    before: Option<(u64, Option<Hash>)>,
    key: Option<String>,
    pinned: Option<Pinned>,
    /// The first record of the log, if it is behind others: they must have been removed
    /// by retention.
    begins_behind: Option<(Problem, Hash)>,
    removed: HashMap<u64, String>,
    /// The last record that retention removed.
    removed_to: u64,
    /// What says so and no checkpoint covers yet: anybody can write such a record.
    unsigned: Vec<Removed>,
    /// The number that the last record should have had, where it has a larger one: the
    /// next may go on from there.
    meant: Option<u64>,
    /// Segments that are not there any more.
    gone: Vec<u64>,
}

impl Check {
    fn new(directory: &Path, pinned: Option<Pinned>) -> Self {
        let own = fs::read_to_string(directory.join(PUBLIC_KEY)).ok();
        let key = pinned.as_ref().map(|p| p.key.clone());
        Self {
            report: Report::default(),
            before: None,
            key: key.or(own.map(|key| key.trim().to_owned())),
            pinned,
            begins_behind: None,
            removed: HashMap::new(),
            removed_to: 0,
            unsigned: Vec::new(),
            meant: None,
            gone: Vec::new(),
        }
    }

    fn problem(&mut self, file: &str, line: u64, seq: u64, what: impl Into<String>) {
        if self.report.problems.len() == MOST {
            self.report.more += 1;
            return;
        }
        self.report.problems.push(Problem {
            file: file.to_owned(),
            line,
            seq,
            what: what.into(),
        });
    }

    /// A segment that an agent ended while compressing.
    fn twin(&mut self, plain: &Segment, packed: &Segment) {
        match same(&plain.path, &packed.path) {
            Ok(true) => {}
            Ok(false) => {
                let what = format!("it says something else than {}", plain.name());
                self.problem(&packed.name(), 0, packed.first, what);
            }
            // One of them was compressed, or both were removed, since they were listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => self.problem(&packed.name(), 0, packed.first, error.to_string()),
        }
    }

    fn segment(&mut self, segment: &Segment, last: bool) {
        let name = segment.name();
        let opened = match Lines::open(segment) {
            // It has been compressed since it was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound && !segment.packed => {
                Lines::open(&segment.to_packed())
            }
            opened => opened,
        };
        let mut lines = match opened {
            Ok(lines) => lines,
            Err(error) => {
                if error.kind() == io::ErrorKind::NotFound {
                    self.gone.push(segment.first);
                }
                return self.problem(&name, 0, segment.first, error.to_string());
            }
        };
        loop {
            match lines.next() {
                Ok(Some(line)) => {
                    let line = line.to_vec();
                    self.line(&name, lines.number(), &line, segment.first);
                }
                Ok(None) => break,
                Err(error) => {
                    let seq = self.due(segment.first);
                    let what = format!("cannot be read: {error}");
                    self.problem(&name, lines.number() + 1, seq, what);
                    break;
                }
            }
        }
        let torn = lines.rest().len();
        if torn > 0 {
            let seq = self.due(segment.first);
            if last && !segment.packed {
                let note = format!("{name} ends with {torn} bytes of an unfinished line");
                self.report.notes.push(note);
            } else {
                let what = format!("{torn} bytes without a line end");
                self.problem(&name, lines.number() + 1, seq, what);
            }
        }
        if lines.number() == 0 && !last {
            self.problem(&name, 0, segment.first, "there is no record in it");
        }
    }

    /// The record that comes next.
    fn due(&self, first: u64) -> u64 {
        self.before.map_or(first, |(seq, _)| seq + 1)
    }

    fn line(&mut self, file: &str, number: u64, line: &[u8], first: u64) {
        let hash = Hash::of(line);
        let due = self.due(first);
        self.report.records += 1;
        let (head, prev) = match Head::parse(line) {
            Ok(parsed) => parsed,
            Err(why) => {
                self.problem(
                    file,
                    number,
                    due,
                    format!("is no record as it is written: {why}"),
                );
                self.before = Some((due, None));
                self.report.uncovered += 1;
                return;
            }
        };
        let seq = head.seq;
        if number == 1 && seq != first {
            let what = format!("the name of its file says that it is {first}");
            self.problem(file, number, seq, what);
        }
        // Each file but the last ends with a checkpoint, unless its agent could not go on.
        let unsigned = self.report.uncovered > 0 && head.kind != "reopened";
        if let Some((before, _)) = self.before
            && number == 1
            && unsigned
        {
            let what = "no checkpoint is where its file ends";
            self.problem(file, number, before, what);
        }
        let meant = self.meant.take();
        match self.before {
            None => self.begin(file, number, seq, prev),
            Some((before, _)) if seq > before + 1 => {
                let what = match seq - before {
                    2 => format!("record {} is missing before it", before + 1),
                    _ => format!(
                        "records {} to {} are missing before it",
                        before + 1,
                        seq - 1
                    ),
                };
                self.problem(file, number, before + 1, what);
                self.meant = Some(before + 1);
            }
            // The record before has another number than it was written with.
            Some((before, _)) if seq <= before && meant.is_some_and(|meant| seq == meant + 1) => {}
            Some((before, _)) if seq <= before => {
                // One that is too many: the next is due all the same.
                let what = format!("record {seq} stands in its place");
                self.problem(file, number, before + 1, what);
                self.report.uncovered += 1;
                return;
            }
            Some((before, Some(hash))) if hash != prev => {
                let what = format!("was changed, or `prev` of record {seq} was");
                self.problem(file, number, before, what);
            }
            Some(_) => {}
        }
        self.report.uncovered += 1;
        let text = std::str::from_utf8(line).unwrap_or_default();
        match head.kind.as_ref() {
            "checkpoint" => self.checkpoint(file, number, seq, text),
            "retention" => self.retention(file, number, seq, text),
            "reopened" => self.reopened(file, number, seq, text),
            _ => {}
        }
        if let Some(pinned) = &mut self.pinned
            && pinned.seq == seq
        {
            pinned.met = true;
            if pinned.hash != hash {
                self.problem(file, number, seq, "is not the checkpoint that was kept");
            }
        }
        self.report.last = seq;
        self.before = Some((seq, Some(hash)));
    }

    /// The log's first record.
    fn begin(&mut self, file: &str, number: u64, seq: u64, prev: Hash) {
        self.report.first = seq;
        if seq == 1 {
            if prev != Hash::NONE {
                let what = "is the first, and says that there was one before";
                self.problem(file, number, seq, what);
            }
            return;
        }
        let problem = Problem {
            file: file.to_owned(),
            line: number,
            seq: 1,
            what: format!(
                "records 1 to {} are missing, and no record says that they were removed in order",
                seq - 1
            ),
        };
        self.begins_behind = Some((problem, prev));
    }

    fn checkpoint(&mut self, file: &str, number: u64, seq: u64, line: &str) {
        match signed_by(line) {
            Err(why) => self.problem(file, number, seq, why),
            Ok(key) => {
                self.report.checkpoints += 1;
                self.report.uncovered = 0;
                for removed in std::mem::take(&mut self.unsigned) {
                    self.removed_to = self.removed_to.max(removed.last_seq);
                    self.removed.insert(removed.last_seq, removed.last_hash);
                }
                let known = self.key.get_or_insert_with(|| key.clone());
                if *known != key {
                    // The next ones with this key are one problem with it.
                    *known = key;
                    let what = "is signed with another key than the log's";
                    self.problem(file, number, seq, what);
                }
            }
        }
    }

    /// An agent found the log otherwise than it was written, and went on behind that.
    fn reopened(&mut self, file: &str, number: u64, seq: u64, line: &str) {
        #[derive(Deserialize)]
        struct Reopened {
            broken: Option<String>,
        }
        if let Ok(Reopened { broken: Some(why) }) = serde_json::from_str(line) {
            let what = format!("says that the log was not whole when an agent started: {why}");
            self.problem(file, number, seq, what);
        }
    }

    fn retention(&mut self, file: &str, number: u64, seq: u64, line: &str) {
        match serde_json::from_str::<Removed>(line) {
            Ok(removed) if removed.first_seq <= removed.last_seq => self.unsigned.push(removed),
            Ok(_) => self.problem(file, number, seq, "removes nothing"),
            Err(error) => self.problem(file, number, seq, error.to_string()),
        }
    }

    fn finish(mut self, segments: usize) -> Report {
        self.report.segments = segments;
        if let Some((problem, prev)) = self.begins_behind.take() {
            let linked = self.removed.get(&(self.report.first - 1));
            if linked.is_none_or(|hash| hash != prev.as_str()) {
                let Problem {
                    file,
                    line,
                    seq,
                    what,
                } = problem;
                self.problem(&file, line, seq, what);
            }
        }
        if let Some(pinned) = self.pinned.take().filter(|pinned| !pinned.met) {
            let (seq, last) = (pinned.seq, self.report.last);
            // Its segment may be gone in order.
            if seq > self.removed_to || seq >= self.report.first {
                let what = match seq > last {
                    true => format!(
                        "the checkpoint that was kept is missing: the log ends with record {last}"
                    ),
                    false => "the checkpoint that was kept is missing".into(),
                };
                self.problem("the log", 0, seq, what);
            }
        }
        self.report
    }
}

#[cfg(test)]
mod tests;
