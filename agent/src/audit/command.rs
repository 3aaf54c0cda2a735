//! `postern audit`: what is asked of the log, and how it is answered.
//!
//! Exit codes: 0 done, 1 something could not be read, 2 wrong configuration or command
//! line; with `replay --exit-code` 3 for changes, 4 for calls that cannot be decided.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, BufWriter, IsTerminal as _, StdoutLock, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Args, Subcommand, ValueEnum};
use time::OffsetDateTime;

use super::{
    ask::{
        By, Entry, FileError, Filter, Format, Scan, Stats, Table, Troubles, tail, terminal_width,
        write_file,
    },
    chain::{self, ReadError, VerifyError},
    ocsf,
    replay::{Replay, Sets, Workloads},
};
use crate::{
    config::Config,
    inspect::{self, Problem},
    objects::{LoadError, load_directory},
    policy::PolicySet,
    workload::{Table as WorkloadTable, WorkloadObject},
};

#[derive(Subcommand)]
pub enum AuditCommand {
    /// Prove that the log is as it was written, and name each place where it is not.
    Verify(VerifyArgs),
    /// Print the last checkpoint, to be kept elsewhere: `verify --since-checkpoint` holds
    /// the log to it.
    Checkpoint(CheckpointArgs),
    /// Show records.
    Query(Query),
    /// Show the last records, and with --follow those to come.
    Tail(TailArgs),
    /// Sums: kinds, verdicts, policies, who calls whom, processes, gaps.
    Stats(StatsArgs),
    /// Say what other policies would have decided on the calls of the log.
    Replay(ReplayArgs),
}

/// Where the log is.
#[derive(Args)]
struct Place {
    /// The agent's configuration.
    #[arg(long, short, default_value = "/etc/postern/agent.yaml")]
    config: PathBuf,
    /// Directory of the log, instead of the configuration's.
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
}

#[derive(Args)]
pub struct VerifyArgs {
    #[command(flatten)]
    place: Place,
    /// A checkpoint that the log must still have, as `checkpoint` printed it.
    #[arg(long, value_name = "FILE")]
    since_checkpoint: Option<PathBuf>,
}

#[derive(Args)]
pub struct CheckpointArgs {
    #[command(flatten)]
    place: Place,
}

#[derive(Args)]
pub struct Query {
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    filter: Filter,
    /// The first so many records.
    #[arg(long, value_name = "N", conflicts_with = "last")]
    limit: Option<usize>,
    /// The last so many records.
    #[arg(long, value_name = "N")]
    last: Option<usize>,
    #[arg(long, short, value_enum, default_value_t)]
    output: Output,
    /// Where Parquet and Arrow go, instead of standard output.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
}

#[derive(Args)]
pub struct TailArgs {
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    filter: Filter,
    /// Go on with what is written from now on.
    #[arg(long, short)]
    follow: bool,
    /// So many records of what stands there.
    #[arg(short, value_name = "N", default_value_t = 10)]
    number: usize,
    #[arg(long, short, value_enum, default_value_t)]
    output: Rows,
}

#[derive(Args)]
pub struct StatsArgs {
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    filter: Filter,
    /// What is told apart; may be repeated. Without it, everything.
    #[arg(long, value_enum)]
    by: Vec<By>,
    #[arg(long, short, value_enum, default_value_t)]
    output: Lines,
}

#[derive(Args)]
pub struct ReplayArgs {
    #[command(flatten)]
    place: Place,
    /// Directory of the policies to be tried.
    #[arg(long, value_name = "DIR")]
    policies: PathBuf,
    /// Directory of manifests with the pods that were called; without it the
    /// configuration's.
    #[arg(long, value_name = "DIR")]
    manifests: Option<PathBuf>,
    /// Directory of the policies that the calls were recorded under: where they looked
    /// for a token and the record has none, there was none.
    #[arg(long, value_name = "DIR")]
    recorded_under: Option<PathBuf>,
    /// Exit with 3 if some call would be decided otherwise, else with 4 if some cannot be
    /// decided.
    #[arg(long)]
    exit_code: bool,
    #[command(flatten)]
    filter: Filter,
    #[arg(long, short, value_enum, default_value_t)]
    output: Lines,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Output {
    #[default]
    Table,
    /// Lines as they stand in the log, byte for byte.
    Json,
    Parquet,
    /// Arrow IPC file.
    Arrow,
    /// Events of the Open Cybersecurity Schema Framework, a JSON object a line.
    Ocsf,
}

/// How records are shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Rows {
    #[default]
    Table,
    /// Lines as they stand in the log, byte for byte.
    Json,
    /// As of `query`.
    Ocsf,
}

/// How sums are shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Lines {
    #[default]
    Table,
    Json,
}

#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    #[error(transparent)]
    Config(LoadError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Verify(#[from] VerifyError),
    #[error("the log has no checkpoint yet")]
    NoCheckpoint,
    #[error("--file is for --output parquet and arrow")]
    FileOfText,
    #[error("a terminal shows no Parquet or Arrow: name a --file, or redirect the output")]
    Terminal,
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Format(#[from] FileError),
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Policies(Vec<Problem>),
    #[error(transparent)]
    Manifests(LoadError),
    #[error("standard output: {0}")]
    Output(#[from] io::Error),
}

/// How often a log that is followed is looked at.
const POLL: Duration = Duration::from_millis(200);
const UNREADABLE: u8 = 1;
const CHANGES: u8 = 3;
const UNDECIDABLE: u8 = 4;

/// Answers with the exit code. Whoever closes standard output has seen enough.
pub fn run(command: AuditCommand) -> Result<u8, AuditError> {
    let answered = match command {
        AuditCommand::Query(query) => query.run(),
        AuditCommand::Tail(tail) => tail.run(),
        AuditCommand::Verify(verify) => verify.run(),
        AuditCommand::Checkpoint(checkpoint) => checkpoint.run(),
        AuditCommand::Stats(stats) => stats.run(),
        AuditCommand::Replay(replay) => replay.run(),
    };
    match answered {
        Err(AuditError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(0),
        other => other,
    }
}

impl VerifyArgs {
    fn run(self) -> Result<u8, AuditError> {
        let directory = self.place.directory()?;
        let report = chain::verify(&directory, self.since_checkpoint.as_deref())?;
        writeln!(io::stdout(), "{report}").map_err(AuditError::Output)?;
        Ok(if report.problems.is_empty() {
            0
        } else {
            UNREADABLE
        })
    }
}

impl CheckpointArgs {
    fn run(self) -> Result<u8, AuditError> {
        let Some(line) = chain::latest_checkpoint(&self.place.directory()?)? else {
            return Err(AuditError::NoCheckpoint);
        };
        writeln!(io::stdout(), "{line}").map_err(AuditError::Output)?;
        Ok(0)
    }
}

impl Place {
    /// A host without configuration has the defaults.
    fn config(&self) -> Result<Config, AuditError> {
        match self.config.exists() {
            true => Config::load(&self.config).map_err(AuditError::Config),
            false => Ok(Config::default()),
        }
    }

    fn directory(&self) -> Result<PathBuf, AuditError> {
        Ok(match &self.directory {
            Some(directory) => directory.clone(),
            None => {
                let config = self.config()?;
                config.audit.directory(&config.state)
            }
        })
    }

    fn scan(&self, filter: Filter) -> Result<Scan, AuditError> {
        let filter = filter.settled(OffsetDateTime::now_utc());
        Ok(Scan::new(&self.directory()?, filter)?)
    }
}

/// 1 where something could not be read.
fn code(troubles: &Troubles) -> u8 {
    if troubles.any() { UNREADABLE } else { 0 }
}

/// Where records of text go.
enum Shown<'a> {
    Table(Table<BufWriter<StdoutLock<'a>>>),
    Json(BufWriter<StdoutLock<'a>>),
    Ocsf(BufWriter<StdoutLock<'a>>),
}

impl Shown<'_> {
    fn new(output: Rows) -> Self {
        let out = BufWriter::new(io::stdout().lock());
        match output {
            Rows::Table => Self::Table(Table::new(out, terminal_width())),
            Rows::Json => Self::Json(out),
            Rows::Ocsf => Self::Ocsf(out),
        }
    }

    fn add(&mut self, entry: &Entry) -> io::Result<()> {
        match self {
            Self::Table(table) => table.add(entry),
            Self::Json(out) => writeln!(out, "{}", entry.line.text),
            Self::Ocsf(out) => match ocsf::map(&entry.value) {
                Some(event) => writeln!(out, "{event}"),
                None => Ok(()),
            },
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Table(table) => table.flush(),
            Self::Json(out) | Self::Ocsf(out) => out.flush(),
        }
    }
}

impl Query {
    fn run(self) -> Result<u8, AuditError> {
        let output = match self.output {
            Output::Table => Ok(Rows::Table),
            Output::Json => Ok(Rows::Json),
            Output::Ocsf => Ok(Rows::Ocsf),
            Output::Parquet => Err(Format::Parquet),
            Output::Arrow => Err(Format::Arrow),
        };
        match (&output, &self.file) {
            (Ok(_), Some(_)) => return Err(AuditError::FileOfText),
            (Err(_), None) if io::stdout().is_terminal() => return Err(AuditError::Terminal),
            _ => {}
        }
        let mut troubles = Troubles::default();
        let mut scan = self.place.scan(self.filter)?;
        let entries = (&mut scan).filter_map(|item| troubles.pass(item));
        let entries: Box<dyn Iterator<Item = Entry>> = match (self.limit, self.last) {
            (Some(limit), _) => Box::new(entries.take(limit)),
            (None, Some(count)) => Box::new(last(entries, count).into_iter()),
            (None, None) => Box::new(entries),
        };
        match (output, &self.file) {
            (Ok(lines), _) => {
                let mut shown = Shown::new(lines);
                for entry in entries {
                    shown.add(&entry)?;
                }
                shown.flush()?;
            }
            (Err(format), Some(path)) => to_file(path, format, entries)?,
            (Err(format), None) => write_file(io::stdout(), format, entries)?,
        }
        Ok(code(&troubles))
    }
}

fn last(entries: impl Iterator<Item = Entry>, count: usize) -> VecDeque<Entry> {
    let mut last = VecDeque::new();
    for entry in entries {
        last.push_back(entry);
        if last.len() > count {
            last.pop_front();
        }
    }
    last
}

/// Records tell of people: nobody else may read them.
fn to_file(
    path: &Path,
    format: Format,
    entries: impl Iterator<Item = Entry>,
) -> Result<(), AuditError> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let fail = |source| AuditError::File {
        path: path.to_owned(),
        source,
    };
    let mut options = File::options();
    let options = options.write(true).create(true).truncate(true).mode(0o600);
    let file = options.open(path).map_err(fail)?;
    Ok(write_file(file, format, entries)?)
}

impl TailArgs {
    fn run(self) -> Result<u8, AuditError> {
        let directory = self.place.directory()?;
        let filter = self.filter.settled(OffsetDateTime::now_utc());
        let mut troubles = Troubles::default();
        let mut shown = Shown::new(self.output);
        let tail = tail(&directory, &filter, self.number)?;
        for trouble in tail.troubles {
            troubles.pass(Err(trouble));
        }
        for entry in &tail.last {
            shown.add(entry)?;
        }
        shown.flush()?;
        if self.follow {
            follow(tail.scan, &mut troubles, &mut shown)?;
        }
        Ok(code(&troubles))
    }
}

/// Until it is interrupted, or nobody reads any more.
fn follow(
    mut scan: Scan,
    troubles: &mut Troubles,
    shown: &mut Shown<'_>,
) -> Result<(), AuditError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let interrupted = tokio::signal::ctrl_c();
        tokio::pin!(interrupted);
        loop {
            for item in &mut scan {
                if let Some(entry) = troubles.pass(item) {
                    shown.add(&entry)?;
                }
            }
            shown.flush()?;
            tokio::select! {
                _ = &mut interrupted => return Ok(()),
                () = tokio::time::sleep(POLL) => {}
            }
        }
    })
}

impl StatsArgs {
    fn run(self) -> Result<u8, AuditError> {
        let mut troubles = Troubles::default();
        let mut stats = Stats::default();
        for entry in (self.place.scan(self.filter)?).filter_map(|item| troubles.pass(item)) {
            stats.add(&entry);
        }
        let mut out = io::stdout().lock();
        match self.output {
            Lines::Table => write!(out, "{}", stats.text(&self.by))?,
            Lines::Json => writeln!(out, "{}", stats.json(&self.by))?,
        }
        Ok(code(&troubles))
    }
}

impl ReplayArgs {
    fn run(self) -> Result<u8, AuditError> {
        let config = self.place.config()?;
        let context = inspect::Context::from(&config);
        let load = |directory: &Path| -> Result<PolicySet, AuditError> {
            inspect::load(directory, &context).map_err(AuditError::Policies)
        };
        let manifests = self.manifests.as_ref();
        let mut replay = Replay::new(Sets {
            candidate: load(&self.policies)?,
            recorded_under: self.recorded_under.as_deref().map(load).transpose()?,
            workloads: match manifests {
                Some(directory) => workloads(directory, &config)?,
                // What is not there is not known.
                None if !config.workloads.directory.exists() => Workloads::default(),
                None => workloads(&config.workloads.directory, &config)?,
            },
        });
        let mut troubles = Troubles::default();
        for entry in (self.place.scan(self.filter)?).filter_map(|item| troubles.pass(item)) {
            replay.add(&entry);
        }
        let report = replay.finish();
        let mut out = io::stdout().lock();
        match self.output {
            Lines::Table => write!(out, "{}", report.text())?,
            Lines::Json => writeln!(out, "{}", report.json())?,
        }
        Ok(match code(&troubles) {
            0 if self.exit_code && report.changes() => CHANGES,
            0 if self.exit_code && report.has_undecidable() => UNDECIDABLE,
            code => code,
        })
    }
}

fn workloads(directory: &Path, config: &Config) -> Result<Workloads, AuditError> {
    let objects = load_directory::<WorkloadObject>(directory).map_err(AuditError::Manifests)?;
    let objects: Vec<WorkloadObject> = objects.into_iter().map(|one| one.object).collect();
    Ok(Workloads::new(WorkloadTable::build(
        &objects,
        config.enrol.default,
    )))
}
