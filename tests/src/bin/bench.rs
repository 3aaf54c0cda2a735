//! The benchmarks: the same loads between pods directly, through Postern and through
//! Envoy, in turns, so that all meet the same machine.

#[path = "bench/agents.rs"]
mod agents;
#[path = "bench/audit.rs"]
mod audit;
#[path = "bench/churn.rs"]
mod churn;
#[path = "bench/drive.rs"]
mod drive;
#[path = "bench/envoy.rs"]
mod envoy;
#[path = "bench/field.rs"]
mod field;
#[path = "bench/flame.rs"]
mod flame;
#[path = "demo/guard.rs"]
mod guard;
#[path = "bench/hold.rs"]
mod hold;
#[path = "bench/load.rs"]
mod load;
#[path = "bench/pace.rs"]
mod pace;
#[path = "bench/population.rs"]
mod population;
#[path = "bench/process.rs"]
mod process;
#[path = "bench/report.rs"]
mod report;
#[path = "bench/rows.rs"]
mod rows;
#[path = "bench/scale.rs"]
mod scale;
#[path = "bench/soak.rs"]
mod soak;
#[path = "bench/targets.rs"]
mod targets;
#[path = "bench/tokens.rs"]
mod tokens;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, Subcommand};

use field::Field;
use load::{LOADS, Load, Scene, System};
use report::{Machine, Report};
use rows::Measured;

const HTTP: u16 = 8080;
const ECHO: u16 = 7000;
const SOURCE: u16 = 7001;
const IPERF: u16 = 5201;
/// Size of the file that nginx serves.
const PAGE: usize = 128;

/// Measure what Postern costs: direct, through Postern and through Envoy, in turns.
#[derive(Parser)]
struct Cli {
    /// How often everything is measured; medians are shown
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// How long each load runs, after a second that does not count
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// One round of one second each: whether it works
    #[arg(long)]
    quick: bool,
    /// Measure these loads only
    #[arg(long, value_delimiter = ',', value_name = "LOAD,..", value_parser = load::find)]
    only: Vec<&'static Load>,
    /// Measure these systems only
    #[arg(long, value_delimiter = ',', value_name = "SYSTEM,..")]
    systems: Vec<System>,
    /// Write all values to this file; else to `target/bench/report.json`
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Once more and uncounted, with `perf`: where the agents' time goes, to files in there
    #[arg(long, value_name = "DIRECTORY")]
    flamegraph: Option<PathBuf>,
    /// What `cargo xtask bench policy` said: its targets are judged, too. The runner makes
    /// this of `--policy`
    #[arg(long, value_name = "FILE")]
    policy_output: Option<PathBuf>,
    #[command(subcommand)]
    part: Option<Part>,
}

#[derive(Subcommand)]
enum Part {
    /// What auditing costs: with an audit log and without, in turns
    Audit,
    /// What a large cluster costs an agent: 500 and 5,000 pods, discovered on demand and
    /// all known ahead
    Scale {
        /// Changes of pods elsewhere, in a second
        #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1_000))]
        rate: u32,
    },
    /// Whether anything is left of connections that come and go
    Soak {
        #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=10_000))]
        minutes: u32,
    },
    /// Connections that come and go until killed
    #[command(hide = true)]
    Churn { address: SocketAddr, clients: usize },
    /// Hold connections to an echo server open until killed
    #[command(hide = true)]
    Hold { address: SocketAddr, count: usize },
    /// Hold connections open until killed, and read nothing of them
    #[command(hide = true)]
    Stall { address: SocketAddr, count: usize },
    /// Requests at a constant rate
    #[command(hide = true)]
    Pace(pace::Pace),
}

fn main() -> ExitCode {
    let mut cli = Cli::parse();
    if cli.quick {
        (cli.rounds, cli.seconds) = (1, 1);
    }
    match &cli.part {
        Some(Part::Hold { address, count }) => hold::echoing(*address, *count),
        Some(Part::Stall { address, count }) => hold::stalled(*address, *count),
        Some(Part::Pace(pace)) => pace::run(pace),
        Some(Part::Churn { address, clients }) => churn::run(*address, *clients),
        Some(Part::Soak { minutes }) => {
            let limit = Duration::from_secs(60) * (minutes + 10);
            guard::run(limit, || {
                soak::run(*minutes, |report| cli.write("soak", report))
            })
        }
        Some(Part::Audit) => guard::run(cli.limit(), || {
            let report = audit::bench(cli.rounds, cli.seconds)?;
            println!("{report}");
            cli.write("audit", &report.json())
        }),
        Some(Part::Scale { rate }) => {
            let churn = scale::Churn {
                rate: *rate,
                seconds: cli.seconds,
            };
            guard::run(cli.limit() + cli.rounds * Duration::from_secs(600), || {
                let report = scale::bench(cli.rounds, churn)?;
                println!("{report}");
                cli.write("scale", &report.json())
            })
        }
        None => guard::run(cli.limit(), || bench(&cli)),
    }
}

impl Cli {
    fn loads(&self) -> Vec<&'static Load> {
        match self.only.is_empty() {
            true => LOADS.iter().collect(),
            false => self.only.clone(),
        }
    }

    fn systems(&self) -> Vec<System> {
        let all = System::ALL.into_iter();
        let wanted = |system: &System| self.systems.is_empty() || self.systems.contains(system);
        all.filter(wanted).collect()
    }

    fn write(&self, name: &str, report: &serde_json::Value) -> Result<()> {
        let path = match &self.json {
            Some(path) => path.clone(),
            None => {
                let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench");
                std::fs::create_dir_all(&target)?;
                target.join(format!("{name}.json"))
            }
        };
        let text = serde_json::to_string_pretty(report)?;
        std::fs::write(&path, text + "\n").with_context(|| path.display().to_string())
    }

    /// Several times what it should take.
    fn limit(&self) -> Duration {
        const BESIDES: u32 = 20;
        let (loads, systems) = (self.loads().len() as u32, System::ALL.len() as u32);
        let runs = self.rounds * loads * systems;
        Duration::from_secs(u64::from(runs * (2 * self.seconds + BESIDES) + 120))
    }
}

fn bench(cli: &Cli) -> Result<()> {
    let machine = Machine::here()?;
    eprintln!("{machine}");
    let (loads, systems) = (cli.loads(), cli.systems());
    let policy = cli.policy_output.as_ref().map(|path| {
        let text = std::fs::read_to_string(path);
        text.with_context(|| path.display().to_string())
    });
    let policy = policy.transpose()?;
    let mut field = Field::new(&systems, cli.seconds)?;
    field.check(&loads, &systems)?;
    eprintln!("all ways are what they are called");
    let Measured {
        rows,
        repeated,
        failed,
    } = rows::in_turns(&loads, systems.len(), cli.rounds, |load, column, _| {
        let system = systems[column];
        if !load.runs_in(system) {
            return Ok(None);
        }
        let sample = field.measure(load, system).context(system.name())?;
        Ok(Some((system.name(), sample)))
    });
    if let Some(directory) = &cli.flamegraph {
        let carried = loads.iter().filter(|load| load.scene != Scene::Proxies);
        for load in carried.filter(|load| load.runs_in(System::Postern)) {
            let agents = field.agents();
            flame::watch(directory, load.key, &agents, || {
                field.measure(load, System::Postern).map(drop)
            })
            .context(load.key)?;
        }
    }
    drop(field);
    let report = Report {
        targets: targets::judge(&rows, policy.as_deref()),
        machine,
        rounds: cli.rounds,
        seconds: cli.seconds,
        columns: systems.iter().map(|system| system.name()).collect(),
        rows,
        repeated,
        policy,
    };
    println!("{report}");
    cli.write("report", &report.json())?;
    ensure!(failed.is_empty(), "not measured: {}", failed.join("\n"));
    Ok(())
}
