//! The writer's side of the log: lines go into a batch, a batch goes to disk with one
//! write. What a disk does not take is cut back to the last whole line, counted, and told
//! by a gap record as soon as writing works again.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, mpsc::Sender},
    time::{Duration, Instant, SystemTime},
};

use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;

use super::{
    ReadError,
    batch::{Batch, Entry, State, Written},
    key::{Key, sync_directory, write_whole},
    ledger::{Ledger, Loss},
    pack::{self, Job},
    reopen::Found,
    retain,
    segment::{self, Segment},
};

/// How a log is kept.
#[derive(Clone, Debug)]
pub struct Settings {
    pub directory: PathBuf,
    /// Ed25519, PKCS #8; made where there is none.
    pub key: PathBuf,
    pub ledger: PathBuf,
    pub sync: Sync,
    pub segment_bytes: u64,
    pub segment_age: Duration,
    pub compress: bool,
    pub checkpoint_records: u64,
    pub checkpoint_every: Duration,
    pub retain_bytes: Option<u64>,
    pub retain_age: Option<Duration>,
}

/// When what is written is made to outlive a loss of power. It outlives the agent anyway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sync {
    /// With every write.
    Always,
    /// So often.
    Every(Duration),
    /// When the kernel likes.
    Never,
}

impl Settings {
    /// As the configuration's defaults are, with what belongs to the log in `state`.
    pub fn new(directory: PathBuf, state: &Path) -> Self {
        Self {
            directory,
            key: state.join("audit.key"),
            ledger: state.join("audit.ledger"),
            sync: Sync::Every(Duration::from_secs(1)),
            segment_bytes: 64 << 20,
            segment_age: Duration::from_secs(24 * 3600),
            compress: true,
            checkpoint_records: 1_000,
            checkpoint_every: Duration::from_secs(60),
            retain_bytes: None,
            retain_age: None,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{}: {source}", path.display())]
    Path { path: PathBuf, source: io::Error },
    #[error("{} is another process's log", .0.display())]
    Busy(PathBuf),
    #[error(transparent)]
    Read(#[from] ReadError),
}

impl OpenError {
    fn at(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Path { path, source }
    }
}

/// How often it is looked whether the file is still there.
const LOOK: Duration = Duration::from_secs(1);

/// How often the age of old segments is looked at.
const RETENTION: Duration = Duration::from_secs(60);

/// Public half of the key, for those who verify.
pub const PUBLIC_KEY: &str = "audit.pub";

pub struct Log {
    settings: Settings,
    node: Box<str>,
    key: Key,
    ledger: Arc<Ledger>,
    batch: Batch,
    /// Of what is on disk.
    state: State,
    active: Active,
    synced: Instant,
    dirty: bool,
    checkpointed: Instant,
    looked: Instant,
    retained: Instant,
    /// When a new segment could not be begun.
    rotated: Option<Instant>,
    /// The last record that is removed, or soon will be.
    removed: u64,
    /// Records that are lost and of which no gap record tells yet.
    lost: Lost,
    /// What a run begins with is written.
    begun: bool,
    /// Records that came before that.
    dropped: u64,
    /// The disk took nothing the last time.
    failing: bool,
    /// What stands behind the last whole line is still to be cut off.
    uncut: bool,
    jobs: Sender<Job>,
    _lock: Flock<File>,
}

#[derive(Clone, Copy, Default)]
struct Lost {
    queue: u64,
    disk: u64,
}

/// What a commit did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Committed {
    /// Records that were handed in and are in the log now.
    pub written: u64,
    /// Those that the disk did not take.
    pub lost: u64,
}

/// The file that is written to.
struct Active {
    segment: Segment,
    file: File,
    /// Bytes of whole lines.
    length: u64,
    since: Instant,
}

impl Active {
    fn make(directory: &Path, first: u64) -> io::Result<Self> {
        let segment = Segment::plain(directory, first);
        let file = File::options()
            .read(true)
            .append(true)
            .create_new(true)
            .mode(0o600)
            .open(&segment.path)?;
        if let Err(error) = sync_directory(directory) {
            // Readers would go on to it.
            let _as_it_was = fs::remove_file(&segment.path);
            return Err(error);
        }
        Ok(Self {
            segment,
            file,
            length: 0,
            since: Instant::now(),
        })
    }

    fn reopen(segment: Segment, length: u64) -> io::Result<Self> {
        let mut options = File::options();
        let file = options.read(true).append(true).open(&segment.path)?;
        Ok(Self {
            segment,
            file,
            length,
            since: Instant::now(),
        })
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Reopened<'a> {
    /// The record that it goes on behind.
    after: u64,
    /// Number of this run, for what the next start counts.
    ledger: u64,
    settled: u64,
    reason: &'a str,
    /// Bytes of a line that was not finished, which were cut off.
    #[serde(skip_serializing_if = "is_zero")]
    torn: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    torn_file: Option<String>,
    /// Where the log before is not as it was written.
    #[serde(skip_serializing_if = "Option::is_none")]
    broken: Option<String>,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

#[derive(Serialize)]
struct Gap {
    lost: &'static str,
    /// Absent: nobody knows.
    #[serde(skip_serializing_if = "Option::is_none")]
    count: Option<u64>,
    reason: &'static str,
}

impl Log {
    /// Opens a log, or begins one. What an agent before could not say is said first.
    pub fn open(settings: Settings, node: &str) -> Result<(Self, Arc<Ledger>), OpenError> {
        let directory = &settings.directory;
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(OpenError::at(directory))?;
        let lock = lock(directory)?;
        let key = Key::open(&settings.key).map_err(OpenError::at(&settings.key))?;
        let public = directory.join(PUBLIC_KEY);
        let text = key.public() + "\n";
        if fs::read(&public).ok().as_deref() != Some(text.as_bytes()) {
            write_whole(&public, text.as_bytes()).map_err(OpenError::at(&public))?;
        }
        let found = Found::read(directory)?;
        let (ledger, losses, error) = Ledger::open(&settings.ledger, &found.logged);
        if let Some(error) = error {
            let path = settings.ledger.display();
            tracing::warn!(%error, "{path}: losses of this run will be told without a number");
        }
        let ledger = Arc::new(ledger);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let aside = found
            .cut(directory, now.map_or(0, |now| now.as_nanos()))
            .map_err(OpenError::at(directory))?;
        // What was written does not go away with the agent: somebody took it.
        let missing = (losses.last > found.seq).then(|| {
            let (first, last) = (found.seq + 1, losses.last);
            format!("records {first} to {last} were written, and are gone")
        });
        let broken = found.broken.clone().or(missing);
        let state = State {
            seq: found.seq.max(losses.last),
            hash: found.hash,
            settled: found.logged.settled,
            uncovered: 1,
        };
        let active = match &found.active {
            Some((segment, length)) if broken.is_none() => Active::reopen(segment.clone(), *length),
            _ => Active::make(directory, state.seq + 1),
        };
        let active = active.map_err(OpenError::at(directory))?;
        let jobs = pack::start().map_err(OpenError::at(directory))?;
        let moment = Instant::now();
        let mut log = Self {
            node: node.into(),
            key,
            ledger: ledger.clone(),
            batch: Batch::new(state),
            state,
            active,
            synced: moment,
            dirty: false,
            checkpointed: moment,
            looked: moment,
            retained: moment,
            rotated: None,
            removed: 0,
            lost: Lost::default(),
            begun: false,
            dropped: 0,
            failing: false,
            uncut: false,
            jobs,
            _lock: lock,
            settings,
        };
        log.told_late("records", losses.records, Entry::Queue);
        log.told_late("connections", losses.connections, |_| Entry::Own);
        let reason = match (&broken, found.seq, found.logged.closed) {
            (Some(_), ..) => "broken",
            (None, 0, _) => "first",
            (None, _, true) => "start",
            _ => "unclean",
        };
        let what = Reopened {
            after: state.seq,
            ledger: ledger.run(),
            settled: 0,
            reason,
            torn: found.torn.len() as u64,
            torn_file: aside
                .and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned())),
            broken,
        };
        log.batch.own(Entry::Begin, node, "reopened", &what);
        match log.begin() {
            // A full disk costs records, not the node's traffic.
            Err(error) if error.kind() == io::ErrorKind::StorageFull => {
                let path = log.active.segment.path.display();
                tracing::error!(%error, "{path}: the audit log cannot be written; what is lost is counted");
                log.failing = true;
            }
            result => result.map_err(OpenError::at(&log.settings.directory))?,
        }
        log.tidy();
        Ok((log, ledger))
    }

    /// Writes what a run begins with, whole or not at all: it stays in the batch until then,
    /// and nothing comes before it.
    fn begin(&mut self) -> io::Result<()> {
        let (state, length) = (self.state, self.active.length);
        if let Err(error) = self.write() {
            self.state = state;
            self.active.length = length;
            self.uncut = true;
            self.cut()?;
            return Err(error);
        }
        self.begun = true;
        self.failing = false;
        self.batch.clear(self.state);
        Ok(())
    }

    /// What the run before lost, as far as it is known.
    fn told_late(&mut self, lost: &'static str, loss: Loss, entry: impl Fn(u64) -> Entry) {
        let count = match loss {
            Loss::Count(0) => return,
            Loss::Count(count) => Some(count),
            Loss::Unknown => None,
        };
        self.gap(lost, count, "restart", entry(count.unwrap_or(0)));
    }

    fn gap(&mut self, lost: &'static str, count: Option<u64>, reason: &'static str, entry: Entry) {
        let what = Gap {
            lost,
            count,
            reason,
        };
        self.batch.own(entry, &self.node, "gap", &what);
    }

    /// A record that was handed in: one JSON object.
    pub fn append(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        match self.begun {
            true => self.batch.push(Entry::Record, write),
            false => self.dropped += 1,
        }
    }

    /// So many more records found no place in the queue.
    pub fn lost_in_queue(&mut self, count: u64) {
        self.lost.queue += count;
    }

    /// Bytes that wait for [`Self::commit`].
    pub fn waiting(&self) -> usize {
        self.batch.text.len()
    }

    /// Writes what was appended, and tells of what was lost.
    pub fn commit(&mut self) -> Committed {
        if !self.begun {
            let lost = std::mem::take(&mut self.dropped);
            self.lost.disk += lost;
            let _still_full = self.begin();
            return Committed { written: 0, lost };
        }
        let lost = std::mem::take(&mut self.lost);
        for (count, reason, entry) in [
            (lost.queue, "queue", Entry::Queue(lost.queue)),
            (lost.disk, "disk", Entry::Disk(lost.disk)),
        ] {
            if count > 0 {
                self.gap("records", Some(count), reason, entry);
            }
        }
        let committed = self.write_or_count();
        if self.state.uncovered >= self.settings.checkpoint_records {
            self.checkpoint("records");
        }
        if self.active.length >= self.settings.segment_bytes {
            self.rotate();
        }
        committed
    }

    /// What is due by the clock. Intervals are the monotonic clock's: a wall clock may be
    /// set back.
    pub fn tick(&mut self) {
        if !self.begun {
            return;
        }
        let now = Instant::now();
        if now.duration_since(self.looked) >= LOOK {
            self.looked = now;
            self.find_again();
        }
        let waited = now.duration_since(self.checkpointed) >= self.settings.checkpoint_every;
        if self.state.uncovered > 0 && waited {
            self.checkpoint("due");
        }
        let old = now.duration_since(self.active.since) >= self.settings.segment_age;
        if self.active.length > 0 && old {
            self.rotate();
        }
        if now.duration_since(self.retained) >= RETENTION {
            self.retain();
        }
        if let Sync::Every(every) = self.settings.sync
            && now.duration_since(self.synced) >= every
        {
            self.sync();
        }
    }

    /// Ends the log in order: its last record is a checkpoint. What is being compressed
    /// may stay as it is.
    pub fn close(mut self) {
        self.find_again();
        self.commit();
        self.checkpoint("closed");
        self.sync();
    }

    /// Where the log ends.
    #[cfg(test)]
    pub fn seq(&self) -> u64 {
        self.state.seq
    }

    /// Writes the batch; what the disk does not take is counted, to be told later.
    fn write_or_count(&mut self) -> Committed {
        let result = self.write();
        let whole = |line: &&Written| line.state.seq <= self.state.seq;
        let of_records = |line: &&Written| line.entry == Entry::Record;
        let records = self.batch.lines.iter().filter(of_records).count() as u64;
        let lines = self.batch.lines.iter();
        let written = lines.take_while(whole).filter(of_records).count() as u64;
        match result {
            Ok(()) => self.failing = false,
            Err(error) => {
                if !self.failing {
                    let path = self.active.segment.path.display();
                    tracing::error!(%error, "{path}: the audit log cannot be written; what is lost is counted");
                }
                self.failing = true;
                for line in self.batch.lines.iter().skip_while(whole) {
                    match line.entry {
                        Entry::Record => self.lost.disk += 1,
                        Entry::Disk(count) => self.lost.disk += count,
                        Entry::Queue(count) => self.lost.queue += count,
                        Entry::Begin | Entry::Checkpoint | Entry::Own => {}
                    }
                }
            }
        }
        self.batch.clear(self.state);
        Committed {
            written,
            lost: records - written,
        }
    }

    /// One write of the whole batch. On failure the file ends with a whole line again, and
    /// `state` says which; the batch is the caller's to clear.
    fn write(&mut self) -> io::Result<()> {
        if self.uncut {
            self.cut()?;
        }
        let mut written = 0;
        let mut failed = None;
        while let Some(left) = self.batch.text.get(written..).filter(|l| !l.is_empty()) {
            match self.active.file.write(left) {
                Ok(0) => failed = Some(io::ErrorKind::WriteZero.into()),
                Ok(more) => {
                    written += more;
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => failed = Some(error),
            }
            break;
        }
        let whole = self
            .batch
            .lines
            .iter()
            .take_while(|l| l.end <= written)
            .last();
        if let Some(last) = whole {
            self.state = last.state;
            self.active.length += last.end as u64;
            self.ledger.set_last(self.state.seq);
            self.dirty = true;
        }
        match failed {
            Some(error) => {
                self.uncut = true;
                self.cut()?;
                Err(error)
            }
            None => {
                if self.settings.sync == Sync::Always {
                    self.sync();
                }
                Ok(())
            }
        }
    }

    fn cut(&mut self) -> io::Result<()> {
        self.active.file.set_len(self.active.length)?;
        self.uncut = false;
        Ok(())
    }

    fn sync(&mut self) {
        self.synced = Instant::now();
        if !std::mem::take(&mut self.dirty) {
            return;
        }
        if let Err(error) = self.active.file.sync_data() {
            // What the kernel could not write back it may have forgotten (fsync(2)).
            let path = self.active.segment.path.display();
            tracing::error!(%error, "{path}: what was written last may not outlive a loss of power");
        }
    }

    fn checkpoint(&mut self, reason: &'static str) {
        if !self.begun {
            return;
        }
        self.checkpointed = Instant::now();
        let run = self.ledger.run();
        self.batch.checkpoint(&self.node, &self.key, run, reason);
        self.write_or_count();
    }

    /// Goes on in a new file. Where none can be made, the old one grows.
    fn rotate(&mut self) {
        if self
            .rotated
            .is_some_and(|failed| failed.elapsed() < RETENTION)
        {
            return;
        }
        self.rotated = Some(Instant::now());
        self.checkpoint("rotation");
        // A segment ends with a signature.
        if self.state.uncovered > 0 {
            return;
        }
        self.sync();
        let directory = &self.settings.directory;
        match Active::make(directory, self.state.seq + 1) {
            Ok(active) => {
                let full = std::mem::replace(&mut self.active, active);
                self.rotated = None;
                if self.settings.compress {
                    self.job(Job::Pack(full.segment));
                }
                self.retain();
            }
            Err(error) => {
                self.active.since = Instant::now();
                tracing::warn!(%error, "{}: no new segment", directory.display());
            }
        }
    }

    /// Whether the file is still where it should be. One that was removed is written anew.
    fn find_again(&mut self) {
        let path = &self.active.segment.path;
        let own = self.active.file.metadata().map(|m| (m.dev(), m.ino()));
        let there = fs::metadata(path).map(|m| (m.dev(), m.ino()));
        let same = matches!((&own, &there), (Ok(own), Ok(there)) if own == there);
        let length = self.active.file.metadata().map_or(0, |m| m.len());
        if length < self.active.length {
            // Its own lines are gone: the chain goes on without them, and `verify` says so.
            tracing::error!("{}: was truncated", path.display());
            match Active::make(&self.settings.directory, self.state.seq + 1) {
                Ok(active) => self.active = active,
                Err(error) => tracing::error!(%error, "no new segment"),
            }
            return;
        }
        if !same && let Err(error) = self.restore() {
            let path = self.active.segment.path.display();
            tracing::error!(%error, "{path}: was removed, and cannot be restored yet");
        }
    }

    /// The open file has all that was written, whatever became of its name.
    fn restore(&mut self) -> io::Result<()> {
        let directory = &self.settings.directory;
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)?;
        let public = self.key.public() + "\n";
        write_whole(&directory.join(PUBLIC_KEY), public.as_bytes())?;
        let mut text = vec![0; usize::try_from(self.active.length).unwrap_or(usize::MAX)];
        self.active.file.read_exact_at(&mut text, 0)?;
        let path = &self.active.segment.path;
        if path.exists() {
            // Whatever was put there is evidence.
            fs::rename(path, path.with_added_extension("replaced"))?;
        }
        write_whole(path, &text)?;
        let Active {
            segment,
            length,
            since,
            ..
        } = &self.active;
        self.active = Active {
            since: *since,
            ..Active::reopen(segment.clone(), *length)?
        };
        tracing::error!(
            "{}: was removed; it is restored",
            self.active.segment.path.display()
        );
        Ok(())
    }

    /// Removes the oldest segments that retention no longer keeps. The log says so first,
    /// so that its new beginning is linked to what was before.
    fn retain(&mut self) {
        if !self.begun {
            return;
        }
        self.retained = Instant::now();
        let due = retain::due(&self.settings, self.active.segment.first, self.removed);
        let due = match due {
            Ok(Some(due)) => due,
            Ok(None) => return,
            Err(error) => {
                let path = self.settings.directory.display();
                return tracing::warn!(%error, "{path}: nothing is removed");
            }
        };
        let link = due.link(self.state.hash);
        let entry = Entry::Own;
        self.batch.own(entry, &self.node, "retention", &link);
        self.write_or_count();
        // Not without its record, and that not without a signature: anybody can write one.
        self.checkpoint("retention");
        if self.state.uncovered == 0 {
            self.sync();
            self.removed = due.last();
            for segment in due.segments {
                self.job(Job::Remove(segment));
            }
        }
    }

    /// What an agent that ended left undone.
    fn tidy(&mut self) {
        let directory = &self.settings.directory;
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let name = entry.file_name();
            if name.to_str().is_some_and(|n| n.ends_with(".zst.tmp")) {
                let _next_time = fs::remove_file(entry.path());
            }
        }
        let all = segment::list(directory).unwrap_or_default();
        for segment in all {
            let older = segment.first < self.active.segment.first;
            if self.settings.compress && !segment.packed && older {
                self.job(Job::Pack(segment));
            }
        }
        self.retain();
    }

    fn job(&self, job: Job) {
        // Its thread lives as long as this.
        let _ended = self.jobs.send(job);
    }
}

/// One writer a log: the lock goes with the process, even when it is killed.
fn lock(directory: &Path) -> Result<Flock<File>, OpenError> {
    let path = directory.join("lock");
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(OpenError::at(&path))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|_held| OpenError::Busy(directory.to_owned()))
}

#[cfg(test)]
mod tests;
