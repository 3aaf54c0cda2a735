//! The benchmark: the same load between two nodes, once between pods outside the
//! mesh and once through Postern, in turns, so that both meet the same machine.

#[path = "bench/agents.rs"]
mod agents;
#[path = "bench/audit.rs"]
mod audit;
#[path = "demo/guard.rs"]
mod guard;
#[path = "bench/load.rs"]
mod load;
#[path = "bench/population.rs"]
mod population;
#[path = "bench/report.rs"]
mod report;
#[path = "bench/scale.rs"]
mod scale;

use std::{net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, Subcommand};
use postern_tests::{Lab, Pod, PodOptions, Running};

use load::{LOADS, Load};
use report::{Machine, Report, Series};

const HTTP: u16 = 8080;
const ECHO: u16 = 7000;
const IPERF: u16 = 5201;
/// Size of the file that nginx serves.
const PAGE: usize = 128;
/// Open connections for the measure of memory.
const OPEN: usize = 1_000;

/// Measure what Postern costs: direct and through Postern, in turns.
#[derive(Parser)]
struct Cli {
    /// How often everything is measured; medians are shown
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// How long each load runs
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// Also write all values to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(subcommand)]
    part: Option<Part>,
}

/// What the benchmark runs of itself within a pod.
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
    /// Hold connections to an echo server open until killed
    #[command(hide = true)]
    Hold { address: SocketAddr, count: usize },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.part {
        Some(Part::Hold { address, count }) => load::hold(address, count),
        Some(Part::Audit) => guard::run(cli.limit(), || {
            let report = audit::bench(cli.rounds, cli.seconds)?;
            println!("{report}");
            cli.write(&report.json())
        }),
        Some(Part::Scale { rate }) => {
            let churn = scale::Churn {
                rate,
                seconds: cli.seconds,
            };
            guard::run(cli.limit() + cli.rounds * Duration::from_secs(600), || {
                let report = scale::bench(cli.rounds, churn)?;
                println!("{report}");
                cli.write(&report.json())
            })
        }
        None => guard::run(cli.limit(), || bench(&cli)),
    }
}

impl Cli {
    fn write(&self, report: &serde_json::Value) -> Result<()> {
        if let Some(path) = &self.json {
            let text = serde_json::to_string_pretty(report)?;
            std::fs::write(path, text + "\n").with_context(|| path.display().to_string())?;
        }
        Ok(())
    }

    /// Twice what it should take.
    fn limit(&self) -> Duration {
        let load = self.rounds * LOADS.len() as u32 * 2 * (self.seconds + 2);
        Duration::from_secs(u64::from(2 * (load + 10 * self.rounds) + 60))
    }
}

fn bench(cli: &Cli) -> Result<()> {
    let machine = Machine::here()?;
    println!("{machine}");
    println!("{} rounds of {} s for each load", cli.rounds, cli.seconds);
    let starts = agents::starts(cli.rounds)?;
    let mut field = Field::new()?;
    let memory = field.memory()?;
    let series = field.run(cli.rounds, cli.seconds)?;
    let restarts = agents::restarts(&mut field.lab, cli.rounds)?;
    let report = Report {
        machine,
        rounds: cli.rounds,
        seconds: cli.seconds,
        series,
        memory,
        starts,
        restarts,
    };
    println!("{report}");
    cli.write(&report.json())
}

/// A client on the first node and its server on the second.
struct Pair {
    client: Pod,
    server: Pod,
    _servers: Vec<Running>,
}

impl Pair {
    fn new(lab: &mut Lab, name: &str, mesh: bool) -> Result<Self> {
        let mut pod = |node, role: &str| {
            let options = PodOptions {
                mesh: Some(mesh),
                ..PodOptions::default()
            };
            lab.pod_with(node, &format!("{name}-{role}"), options)
        };
        let (client, server) = (pod(1, "client")?, pod(2, "server")?);
        let mut iperf = server.command("iperf3")?;
        iperf.args(["--server", "--forceflush", "--port", &IPERF.to_string()]);
        let iperf = server.start("iperf3", &mut iperf)?;
        iperf.says("listening")?;
        let servers = vec![
            server.nginx(HTTP, &"x".repeat(PAGE))?,
            server.serve("echo", ECHO)?,
            iperf,
        ];
        Ok(Self {
            client,
            server,
            _servers: servers,
        })
    }
}

/// Where all loads run. In the order in which it is taken down.
struct Field {
    direct: Pair,
    postern: Pair,
    lab: Lab,
}

impl Field {
    fn new() -> Result<Self> {
        let mut lab = Lab::started()?;
        // The lab's agents log for debugging, a line a connection.
        for node in &lab.nodes {
            agents::set_log_level(node, "info")?;
        }
        let direct = Pair::new(&mut lab, "direct", false)?;
        let postern = Pair::new(&mut lab, "postern", true)?;
        let field = Self {
            direct,
            postern,
            lab,
        };
        field.is_what_it_says()?;
        Ok(field)
    }

    /// What is measured as direct must not pass an agent, and the other must.
    fn is_what_it_says(&self) -> Result<()> {
        for Pair { client, server, .. } in [&self.direct, &self.postern] {
            let (code, body) = client.curl(&[&format!("http://{}:{HTTP}/", server.ip)])?;
            ensure!(code == 0 && body.len() == PAGE, "{}: {body}", client.name);
        }
        let node = &self.lab.nodes[0];
        let own = |record: &serde_json::Value, pair: &Pair| {
            record["kind"] == "connection" && record["source"]["pod"] == pair.client.name
        };
        let record = node.record("a record of the call through Postern", |r| {
            own(r, &self.postern)
        })?;
        ensure!(
            record["tls"]["version"] == "TLSv1.3",
            "not encrypted: {record}"
        );
        let strays = node
            .audit()?
            .iter()
            .filter(|r| own(r, &self.direct))
            .count();
        ensure!(strays == 0, "direct connections went through the agent");
        Ok(())
    }

    fn memory(&self) -> Result<report::Memory> {
        let idle = agents::memory(&self.lab)?;
        let Pair { client, server, .. } = &self.postern;
        let address = format!("{}:{ECHO}", server.ip);
        let mut hold = client.command(std::env::current_exe()?)?;
        hold.args(["hold", &address, &OPEN.to_string()]);
        let holder = client.start("hold", &mut hold)?;
        holder.says("open")?;
        let open = agents::memory(&self.lab)?;
        Ok(report::Memory {
            connections: OPEN,
            idle,
            open,
        })
    }

    fn run(&self, rounds: u32, seconds: u32) -> Result<Vec<Series>> {
        let ways = [(&self.direct, &self.lab), (&self.postern, &self.lab)];
        in_turns(ways, rounds, seconds)
    }
}

/// All loads one way and the other, so that both meet the same machine.
fn in_turns(ways: [(&Pair, &Lab); 2], rounds: u32, seconds: u32) -> Result<Vec<Series>> {
    let mut series: Vec<Series> = LOADS.iter().flat_map(Load::series).collect();
    for round in 0..rounds {
        println!("round {} of {rounds}", round + 1);
        let mut row = 0;
        for load in LOADS {
            let measure = |(pair, lab)| load.run(pair, lab, seconds);
            // Neither is always first.
            let (first, second) = if round % 2 == 0 {
                let first = measure(ways[0])?;
                (first, measure(ways[1])?)
            } else {
                let second = measure(ways[1])?;
                (measure(ways[0])?, second)
            };
            for (first, second) in first.into_iter().zip(second) {
                series[row].direct.push(first);
                series[row].postern.push(second);
                row += 1;
            }
        }
    }
    Ok(series)
}
