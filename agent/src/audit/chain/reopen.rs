//! What an agent before left: where the chain goes on, and what has to be told first.

use std::{
    io,
    path::{Path, PathBuf},
};

use super::{
    ReadError,
    key::write_whole,
    ledger::Logged,
    line::{Counts, Hash, Head},
    lines::Lines,
    segment::{self, Segment},
};

/// More records than any segment has.
const FAR: u64 = 1 << 32;

/// The end of a log.
pub struct Found {
    /// The segment to go on in, and the bytes of its whole lines. `None`: a new one is due.
    pub active: Option<(Segment, u64)>,
    /// Of the last line; 0: there is none.
    pub seq: u64,
    pub hash: Hash,
    pub logged: Logged,
    /// Behind the last whole line.
    pub torn: Vec<u8>,
    /// Where the last segment is not a chain.
    pub broken: Option<String>,
}

impl Found {
    pub fn read(directory: &Path) -> Result<Self, ReadError> {
        let all = segment::list(directory).map_err(ReadError::file(directory))?;
        let mut found = Self {
            active: None,
            seq: 0,
            hash: Hash::NONE,
            logged: Logged::default(),
            torn: Vec::new(),
            broken: None,
        };
        let oldest = all.first().map_or(1, |segment| segment.first);
        let mut last = true;
        for segment in all.into_iter().rev() {
            // One that cannot be read is evidence: a new one is begun behind it.
            let scan = Scan::of(&segment).unwrap_or_else(|error| Scan {
                last: Some((segment.first, Hash::NONE)),
                broken: Some(format!("{}: {error}", segment.name())),
                marked: true,
                ..Scan::default()
            });
            let marked = scan.marked;
            let gone = scan.unsigned_removal.filter(|last| *last < oldest);
            found.take(segment, scan, last);
            if let Some(gone) = gone.filter(|_| last) {
                let why = format!("records up to {gone} are gone, and nothing signed says why");
                found.broken.get_or_insert(why);
                found.active = None;
            }
            last = false;
            // Older ones say nothing more about the run before.
            if marked {
                break;
            }
        }
        Ok(found)
    }

    /// Segments come newest first.
    fn take(&mut self, segment: Segment, scan: Scan, last: bool) {
        self.logged.settled += scan.settled;
        self.logged.connections += scan.connections;
        self.logged.run = scan.run;
        if self.seq == 0 {
            // It may be an empty file whose name is all that is known.
            let before = segment.first.saturating_sub(1);
            (self.seq, self.hash) = scan.last.unwrap_or((before, Hash::NONE));
            self.logged.closed = scan.closed;
        } else if self.hash == Hash::NONE
            && let Some((seq, hash)) = scan.last
        {
            // The segment behind has no line yet.
            self.hash = hash;
            self.logged.closed = scan.closed;
            if seq != self.seq {
                let name = segment.name();
                self.broken = Some(format!("{name} ends with record {seq}"));
            }
        }
        if last {
            self.torn = scan.torn;
            self.broken = scan.broken;
            if self.broken.is_none() && !segment.packed {
                self.active = Some((segment, scan.whole));
            }
        }
    }

    /// Cuts the torn tail off, which is kept in a file of its own where there is room.
    pub fn cut(&self, directory: &Path, now: u128) -> io::Result<Option<PathBuf>> {
        let Some((segment, whole)) = self.active.as_ref().filter(|_| !self.torn.is_empty()) else {
            return Ok(None);
        };
        let aside = directory.join(format!("torn-{:020}-{now}", self.seq));
        let kept = write_whole(&aside, &self.torn);
        if let Err(error) = &kept {
            tracing::warn!(%error, "{}: {} bytes are cut off", aside.display(), self.torn.len());
        }
        let file = std::fs::File::options().write(true).open(&segment.path)?;
        file.set_len(*whole)?;
        file.sync_all()?;
        Ok(kept.is_ok().then_some(aside))
    }
}

/// One segment.
#[derive(Default)]
struct Scan {
    last: Option<(u64, Hash)>,
    /// Since the last record that names a run, or since the first.
    settled: u64,
    connections: u64,
    run: Option<u64>,
    marked: bool,
    closed: bool,
    whole: u64,
    torn: Vec<u8>,
    broken: Option<String>,
    /// Says that records up to this one were removed, and no checkpoint covers it.
    unsigned_removal: Option<u64>,
}

impl Scan {
    fn of(segment: &Segment) -> io::Result<Self> {
        let mut scan = Self::default();
        let mut lines = Lines::open(segment)?;
        while let Some(line) = lines.next()? {
            let hash = Hash::of(line);
            let said = scan.line(segment.first, line, hash);
            let number = lines.number();
            if let Err(why) = said {
                let place = format!("{}:{number}: {why}", segment.name());
                scan.broken.get_or_insert(place);
            }
        }
        scan.whole = lines.whole();
        scan.torn = lines.rest().to_vec();
        Ok(scan)
    }

    fn line(&mut self, first: u64, line: &[u8], hash: Hash) -> Result<(), String> {
        let before = self.last;
        let (seq, prev) = before.map_or((first.saturating_sub(1), None), |(seq, prev)| {
            (seq, Some(prev))
        });
        // A line that cannot be read is still what the next one is behind.
        self.last = Some((seq + 1, hash));
        self.closed = false;
        let (head, says) = Head::parse(line)?;
        // Lines may be missing; a number far off is damage.
        if (seq..seq.saturating_add(FAR)).contains(&head.seq) {
            self.last = Some((head.seq, hash));
        }
        self.count(&head.kind, line);
        if head.seq != seq + 1 {
            return Err(format!("record {} where {} is due", head.seq, seq + 1));
        }
        if prev.is_some_and(|prev| prev != says) {
            return Err(format!("`prev` is not the hash of record {seq}"));
        }
        Ok(())
    }

    fn count(&mut self, kind: &str, line: &[u8]) {
        if !matches!(kind, "checkpoint" | "reopened" | "retention" | "gap") {
            self.settled += 1;
            return;
        }
        let counts: Counts = serde_json::from_slice(line).unwrap_or_default();
        match (kind, counts.lost.as_str(), counts.reason.as_str()) {
            ("retention", ..) => self.unsigned_removal = Some(counts.last_seq),
            ("checkpoint" | "reopened", _, reason) => {
                if kind == "checkpoint" {
                    self.unsigned_removal = None;
                }
                self.closed = kind == "checkpoint" && reason == "closed";
                self.run = counts.ledger;
                self.marked |= counts.ledger.is_some();
                (self.settled, self.connections) = (counts.settled, 0);
            }
            ("gap", "records", _) => self.settled += counts.count,
            ("gap", "connections", "restart") => self.connections += counts.count,
            // Of the kernel: it was handed in as any record.
            ("gap", ..) => self.settled += 1,
            _ => {}
        }
    }
}
