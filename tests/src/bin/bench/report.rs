//! Medians and ratios, for people and as JSON.

use std::fmt;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::scale::Churn;

const NOTES: &str = "\
Medians. Spread is the wider of the two ranges of rounds, in percent of its median.
wrk begins to time a request when its connection stands: p50 and p99 are without connect().";
/// A spread above which a median says little.
const NOISY: f64 = 0.3;

/// One quantity, a value a round.
pub struct Series {
    pub load: &'static str,
    pub unit: &'static str,
    pub direct: Vec<f64>,
    pub postern: Vec<f64>,
}

impl Series {
    pub fn new(load: &'static str, unit: &'static str) -> Self {
        Self {
            load,
            unit,
            direct: Vec::new(),
            postern: Vec::new(),
        }
    }

    fn ratio(&self) -> f64 {
        median(&self.postern) / median(&self.direct)
    }

    /// The wider of the two ranges, relative to its median.
    fn spread(&self) -> f64 {
        spread(&self.direct).max(spread(&self.postern))
    }

    fn is_errors(&self) -> bool {
        self.unit == "errors"
    }

    fn json(&self) -> Value {
        let side = |values: &[f64]| json!({ "median": median(values), "rounds": values });
        let mut value = json!({
            "load": self.load, "unit": self.unit,
            "direct": side(&self.direct), "postern": side(&self.postern),
        });
        if !self.is_errors() {
            value["ratio"] = json!(self.ratio());
        }
        value
    }
}

/// Resident memory of each agent, MiB.
pub struct Memory {
    pub connections: usize,
    pub idle: Vec<f64>,
    pub open: Vec<f64>,
}

impl Memory {
    /// What a connection takes at each of its two agents, KiB.
    fn per_connection(&self) -> Vec<f64> {
        let grown = self
            .idle
            .iter()
            .zip(&self.open)
            .map(|(idle, open)| open - idle);
        grown
            .map(|mib| mib * 1024.0 / self.connections as f64)
            .collect()
    }
}

pub struct Machine {
    kernel: String,
    model: String,
    cpus: usize,
    /// Runnable processes in the last minute, before the benchmark began.
    busy: f64,
}

impl Machine {
    pub fn here() -> Result<Self> {
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
        let info = std::fs::read_to_string("/proc/cpuinfo")?;
        let busy = std::fs::read_to_string("/proc/loadavg")?;
        let busy = busy.split(' ').next().unwrap_or_default().parse()?;
        let model = info
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1));
        Ok(Self {
            kernel: kernel.trim().to_owned(),
            model: model.unwrap_or("CPU of unknown model").to_owned(),
            cpus: std::thread::available_parallelism().context("CPUs")?.get(),
            busy,
        })
    }

    fn json(&self) -> Value {
        json!({
            "kernel": self.kernel, "model": self.model, "cpus": self.cpus,
            "loadBefore": self.busy,
        })
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            kernel,
            model,
            cpus,
            busy,
        } = self;
        writeln!(
            f,
            "{model}, {cpus} CPUs, Linux {kernel}, load before: {busy}"
        )?;
        write!(f, "Both nodes, the load and the agents share this machine.")
    }
}

pub struct Report {
    pub machine: Machine,
    pub rounds: u32,
    pub seconds: u32,
    pub series: Vec<Series>,
    pub memory: Memory,
    /// Milliseconds from start to ready.
    pub starts: Vec<f64>,
    pub restarts: Vec<f64>,
}

impl Report {
    pub fn json(&self) -> Value {
        let side = |values: &[f64]| json!({ "median": median(values), "rounds": values });
        json!({
            "machine": self.machine.json(),
            "rounds": self.rounds,
            "seconds": self.seconds,
            "series": self.series.iter().map(Series::json).collect::<Vec<_>>(),
            "memory": {
                "unit": "MiB resident, an agent each",
                "idle": self.memory.idle,
                "open": self.memory.open,
                "connections": self.memory.connections,
                "kibPerConnection": self.memory.per_connection(),
            },
            "startToReadyMs": side(&self.starts),
            "restartToReadyMs": side(&self.restarts),
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        table(f, &self.series, ["direct", "Postern"])?;
        self.agents(f)
    }
}

/// What was measured two ways, side by side.
fn table(f: &mut fmt::Formatter<'_>, all: &[Series], ways: [&str; 2]) -> fmt::Result {
    writeln!(
        f,
        "\n{:30}{:12}{:>12}{:>12}{:>8}{:>9}",
        "", "", ways[0], ways[1], "ratio", "spread"
    )?;
    let mut before = "";
    for series in all.iter().filter(|s| !s.is_errors()) {
        let load = if series.load == before {
            ""
        } else {
            series.load
        };
        before = series.load;
        let [direct, postern] = [&series.direct, &series.postern].map(|v| number(median(v)));
        let spread = 100.0 * series.spread();
        let (unit, ratio) = (series.unit, series.ratio());
        writeln!(
            f,
            "{load:30}{unit:12}{direct:>12}{postern:>12}{ratio:>8.2}{spread:>8.0}%"
        )?;
    }
    writeln!(f, "{NOTES}")?;
    if all.iter().any(|series| series.spread() > NOISY) {
        writeln!(
            f,
            "Some spreads are wide: was the machine busy with something else?"
        )?;
    }
    for series in all.iter().filter(|s| s.is_errors()) {
        let total = |values: &[f64]| values.iter().sum::<f64>();
        let errors = [total(&series.direct), total(&series.postern)];
        if errors != [0.0, 0.0] {
            let load = series.load;
            writeln!(
                f,
                "{load}: {} errors {}, {} {}",
                errors[0], ways[0], errors[1], ways[1]
            )?;
        }
    }
    Ok(())
}

/// What auditing costs: the same through two meshes, one without an audit log.
pub struct AuditReport {
    pub machine: Machine,
    pub rounds: u32,
    pub seconds: u32,
    /// `direct`: without.
    pub series: Vec<Series>,
    /// In the logs of both nodes, at the end.
    pub records: usize,
    /// Resident memory of each agent, MiB: without, and with.
    pub memory: [Vec<f64>; 2],
}

impl AuditReport {
    pub fn json(&self) -> Value {
        let series = self.series.iter().map(|series| {
            let mut value = series.json();
            if let Value::Object(members) = &mut value {
                for (from, to) in [("direct", "off"), ("postern", "on")] {
                    let side = members.remove(from).unwrap_or_default();
                    members.insert(to.into(), side);
                }
            }
            value
        });
        json!({
            "machine": self.machine.json(),
            "rounds": self.rounds,
            "seconds": self.seconds,
            "series": series.collect::<Vec<_>>(),
            "records": self.records,
            "memoryMiB": { "off": self.memory[0], "on": self.memory[1] },
        })
    }
}

impl fmt::Display for AuditReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        table(f, &self.series, ["audit off", "audit on"])?;
        let [off, on] = self.memory.each_ref().map(|memory| list(memory));
        writeln!(f, "\n{} records on both nodes", self.records)?;
        write!(f, "memory of the agents, MiB: {off} without, {on} with")
    }
}

/// What one agent took in a cluster.
pub struct Measure {
    pub start_ms: f64,
    pub start_cpu: f64,
    pub start_mib: f64,
    pub memory: f64,
    pub churn_cpu: f64,
    pub churn_kib: f64,
    pub watches: f64,
    pub lists: f64,
}

type Quantity = (&'static str, &'static str, fn(&Measure) -> f64);

const QUANTITIES: [Quantity; 8] = [
    ("start to ready", "ms", |m| m.start_ms),
    ("CPU until then", "s", |m| m.start_cpu),
    ("from the API server until then", "MiB", |m| m.start_mib),
    ("memory, in use", "MiB", |m| m.memory),
    ("CPU while pods change", "%", |m| m.churn_cpu),
    ("from the API server meanwhile", "KiB/s", |m| m.churn_kib),
    ("watches", "", |m| m.watches),
    ("lists of pods", "", |m| m.lists),
];

/// What a large cluster costs one agent.
pub struct ScaleReport {
    pub machine: Machine,
    pub rounds: u32,
    pub churn: Churn,
    /// A value a round.
    pub columns: Vec<(String, Vec<Measure>)>,
}

impl ScaleReport {
    pub fn json(&self) -> Value {
        let columns = self.columns.iter().map(|(name, measured)| {
            let quantities = QUANTITIES.iter().map(|(what, unit, of)| {
                let values: Vec<f64> = measured.iter().map(of).collect();
                json!({ "what": what, "unit": unit, "median": median(&values), "rounds": values })
            });
            json!({ "cluster": name, "quantities": quantities.collect::<Vec<_>>() })
        });
        json!({
            "machine": self.machine.json(),
            "rounds": self.rounds,
            "changesPerSecond": self.churn.rate,
            "seconds": self.churn.seconds,
            "columns": columns.collect::<Vec<_>>(),
        })
    }
}

impl fmt::Display for ScaleReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\n{:32}{:8}", "pods in the cluster", "")?;
        for (name, _) in &self.columns {
            write!(f, "{name:>15}")?;
        }
        for (what, unit, of) in QUANTITIES {
            write!(f, "\n{what:32}{unit:8}")?;
            for (_, measured) in &self.columns {
                let values: Vec<f64> = measured.iter().map(of).collect();
                write!(f, "{:>15}", number(median(&values)))?;
            }
        }
        let Churn { rate, seconds } = self.churn;
        write!(
            f,
            "\nMedians. {rate} pods a second changed for {seconds} s on nodes that this one's pods do not talk to."
        )
    }
}

fn list(values: &[f64]) -> String {
    let numbers: Vec<String> = values.iter().map(|value| number(*value)).collect();
    numbers.join(" and ")
}

impl Report {
    fn agents(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Memory {
            connections,
            idle,
            open,
        } = &self.memory;
        writeln!(f, "\nThe agents (of the client's node and of the server's)")?;
        let mut row =
            |what: &str, unit: &str, value: String| writeln!(f, "{what:42}{value:>16} {unit}");
        row("memory, idle", "MiB", list(idle))?;
        row(
            &format!("memory, {connections} connections open"),
            "MiB",
            list(open),
        )?;
        row("a connection", "KiB", list(&self.memory.per_connection()))?;
        row("start to ready", "ms", number(median(&self.starts)))?;
        row(
            "start to ready after a kill",
            "ms",
            number(median(&self.restarts)),
        )
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

/// Width of the range of values, relative to their median.
fn spread(values: &[f64]) -> f64 {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    (most - least) / median(values)
}

/// Three digits or more.
fn number(value: f64) -> String {
    if value < 10.0 {
        format!("{value:.2}")
    } else if value < 100.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.0}")
    }
}
