//! Follows the audit log for who is looking, and only as long as somebody is: a thread
//! that reads what the writer has committed. Nothing here is in the way of traffic.

use std::{
    collections::HashSet,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use serde::Serialize;
use serde_json::Value;

use super::{
    decisions::Decisions,
    edges::Edges,
    record::{At, text},
};
use crate::audit::chain::{Line, ReadError, Reader, last_seq};

/// How far back it begins, in records.
const BACK: u64 = 5_000;
/// How long it goes on for nobody.
const IDLE: Duration = Duration::from_secs(180);
const PAUSE: Duration = Duration::from_millis(250);
/// Records that are taken in one go, while nobody can look.
const AT_ONCE: usize = 200;

/// The pods of this node, as `namespace/name`.
type Here = dyn Fn() -> HashSet<String> + Send + Sync;

pub struct Live {
    directory: PathBuf,
    here: Box<Here>,
    state: Mutex<State>,
}

struct State {
    shown: Shown,
    asked: Instant,
    follows: bool,
}

#[derive(Default)]
pub struct Shown {
    pub decisions: Decisions,
    pub edges: Edges,
    pub log: Log,
}

/// How the reading of the log goes.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Log {
    /// Whether all that is written has been read.
    pub current: bool,
    /// Number of the first record, and of the latest.
    pub first: u64,
    pub latest: u64,
    /// Time of the first record that counts in the map, RFC 3339.
    pub since: String,
    /// What is wrong, as long as it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The last line that is none; what stands behind it is read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub damage: Option<String>,
}

impl Live {
    /// `here` is asked now and then which pods are on this node.
    pub fn new(
        directory: PathBuf,
        here: impl Fn() -> HashSet<String> + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            directory,
            here: Box::new(here),
            state: Mutex::new(State {
                shown: Shown::default(),
                asked: Instant::now(),
                follows: false,
            }),
        })
    }

    /// Looks at what there is. The first look starts the reading: it finds nothing yet.
    pub fn look<T>(self: &Arc<Self>, look: impl FnOnce(&Shown) -> T) -> T {
        let mut state = self.state();
        state.asked = Instant::now();
        if !state.follows {
            let live = self.clone();
            let thread = std::thread::Builder::new().name("admin-page".into());
            match thread.spawn(move || live.follow(IDLE)) {
                Ok(_thread) => state.follows = true,
                Err(error) => state.shown.log.error = Some(format!("no thread: {error}")),
            }
        }
        look(&state.shown)
    }

    /// Until nobody has looked for so long.
    fn follow(&self, idle: Duration) {
        let mut reader = None;
        loop {
            {
                let mut state = self.state();
                if state.asked.elapsed() > idle {
                    state.shown = Shown::default();
                    state.follows = false;
                    return;
                }
            }
            match self.read(&mut reader) {
                Ok(AT_ONCE) => continue,
                Ok(_all) => {}
                Err(error) => {
                    // It is opened again where it was.
                    reader = None;
                    let mut state = self.state();
                    state.shown.log.error = Some(error);
                    state.shown.log.current = false;
                }
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Takes what is new; says how many records that were.
    fn read(&self, reader: &mut Option<Reader>) -> Result<usize, String> {
        let latest = self.state().shown.log.latest;
        let reader = match reader {
            Some(reader) => reader,
            None => {
                let from = match latest {
                    0 => {
                        let last = last_seq(&self.directory).map_err(|e| e.to_string())?;
                        last.saturating_sub(BACK) + 1
                    }
                    latest => latest + 1,
                };
                let opened = Reader::open(&self.directory, from);
                reader.insert(opened.map_err(|e| e.to_string())?)
            }
        };
        let mut lines: Vec<(Line, Value)> = Vec::new();
        let (mut taken, mut damage, mut wrong) = (0, None, None);
        for line in reader.take(AT_ONCE) {
            taken += 1;
            match line.map_err(Wrong::from).and_then(parsed) {
                Ok(line) => lines.push(line),
                // The reader is past it.
                Err(Wrong::Line(error)) => damage = Some(error),
                // What came before it is shown all the same.
                Err(Wrong::File(error)) => {
                    wrong = Some(error);
                    break;
                }
            }
        }
        let here = match lines.is_empty() {
            true => HashSet::new(),
            false => (self.here)(),
        };
        let mut state = self.state();
        let Shown {
            decisions,
            edges,
            log,
        } = &mut state.shown;
        for (line, record) in &lines {
            let at = At::parse(text(record, "/time")).unwrap_or_default();
            decisions.add(record, &line.text, at);
            edges.add(record, at, &here);
            if log.first == 0 {
                (log.first, log.since) = (line.seq, text(record, "/time").to_owned());
            }
            log.latest = line.seq;
        }
        if damage.is_some() {
            log.damage = damage;
        }
        if let Some(wrong) = wrong {
            return Err(wrong);
        }
        log.current = taken < AT_ONCE;
        log.error = None;
        Ok(taken)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while it is held")
    }
}

/// Why there is no record.
enum Wrong {
    Line(String),
    File(String),
}

impl From<ReadError> for Wrong {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Line { .. } => Self::Line(error.to_string()),
            ReadError::File { .. } => Self::File(error.to_string()),
        }
    }
}

fn parsed(line: Line) -> Result<(Line, Value), Wrong> {
    match serde_json::from_str(&line.text) {
        Ok(record) => Ok((line, record)),
        Err(error) => {
            let at = format!("{}:{}", line.file.display(), line.number);
            Err(Wrong::Line(format!("{at}: {error}")))
        }
    }
}
