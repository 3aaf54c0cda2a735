//! What came out, for people and as JSON.

use std::fmt::{self, Write as _};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::{load::Scene, rows::Row, targets::Outcome};

const NOTES: &str = "\
Medians over the rounds. A ratio is Postern's value by the other's in the same round, the
median of these. Spread is the widest range of a column, in percent of its median.
wrk begins to time a request when its connection stands: p50 and p99 are without connect().
CPU is what the kernel charges to the proxies' processes, of both sides together.";
/// A spread above which a median says little.
const NOISY: f64 = 0.3;

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

    pub fn json(&self) -> Value {
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
    /// In the order in which they are shown.
    pub columns: Vec<&'static str>,
    pub rows: Vec<Row>,
    pub repeated: Vec<String>,
    pub targets: Vec<Outcome>,
    /// What `cargo xtask bench policy` said, if it was asked.
    pub policy: Option<String>,
}

impl Report {
    pub fn json(&self) -> Value {
        json!({
            "machine": self.machine.json(),
            "rounds": self.rounds,
            "seconds": self.seconds,
            "rows": self.rows.iter().map(Row::json).collect::<Vec<_>>(),
            "repeated": self.repeated,
            "targets": self.targets.iter().map(Outcome::json).collect::<Vec<_>>(),
            "policy": self.policy,
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for scene in [
            Scene::Nodes,
            Scene::Tokens,
            Scene::OneNode,
            Scene::Unmeshed,
            Scene::Proxies,
        ] {
            let rows: Vec<&Row> = self.rows.iter().filter(|r| r.load.scene == scene).collect();
            if !rows.is_empty() {
                writeln!(f, "\n{}", scene.title())?;
                table(f, &rows, &self.columns, "postern")?;
            }
        }
        writeln!(f, "\n{NOTES}")?;
        noise(f, &self.rows, &self.columns, &self.repeated)?;
        if let Some(policy) = &self.policy {
            writeln!(f, "\n{}", policy.trim_end())?;
        }
        writeln!(f, "\nTargets")?;
        let (measured, not): (Vec<_>, Vec<_>) = self.targets.iter().partition(|t| t.is_measured());
        for target in measured {
            writeln!(f, "{target}")?;
        }
        if !not.is_empty() {
            writeln!(f, "{} others were not measured", not.len())?;
        }
        Ok(())
    }
}

/// Those of `columns` that any of the rows has, side by side, and the ratios of one to each
/// other.
pub fn table(
    f: &mut fmt::Formatter<'_>,
    rows: &[&Row],
    columns: &[&'static str],
    of: &str,
) -> fmt::Result {
    let columns = columns
        .iter()
        .filter(|column| rows.iter().any(|row| row.has(column)));
    let columns: Vec<&str> = columns.copied().collect();
    let others: Vec<&str> = columns.iter().filter(|c| **c != of).copied().collect();
    let mut head = format!("{:34}{:22}", "", "");
    for column in &columns {
        write!(head, "{column:>12}")?;
    }
    for other in &others {
        let other = other.strip_prefix("envoy-").unwrap_or(other);
        write!(head, "{:>11}", format!("/{other}"))?;
    }
    writeln!(f, "{head}{:>9}", "spread")?;
    let mut before = "";
    for row in rows.iter().filter(|row| !row.is_errors()) {
        let load = match row.load.key == before {
            true => "",
            false => row.load.name,
        };
        before = row.load.key;
        write!(f, "{load:34}{:22}", row.unit)?;
        let shown = |value: Option<f64>| value.map_or_else(|| "-".into(), number);
        for column in &columns {
            write!(f, "{:>12}", shown(row.median(column)))?;
        }
        for other in &others {
            let ratio = row.ratio(of, other).map(|ratio| format!("{ratio:.2}"));
            write!(f, "{:>11}", ratio.unwrap_or_else(|| "-".into()))?;
        }
        writeln!(f, "{:>8.0}%", 100.0 * row.spread())?;
    }
    Ok(())
}

/// What casts doubt on the rest.
pub fn noise(
    f: &mut fmt::Formatter<'_>,
    rows: &[Row],
    columns: &[&'static str],
    repeated: &[String],
) -> fmt::Result {
    let measured = || rows.iter().filter(|row| !row.is_errors());
    let wide = measured().filter(|row| row.spread() > NOISY).count();
    if wide > 0 {
        writeln!(
            f,
            "{wide} of {} spreads are above {:.0} %: was the machine busy with something else?",
            measured().count(),
            100.0 * NOISY
        )?;
    }
    for row in rows.iter().filter(|row| row.is_errors()) {
        for column in columns {
            let errors: f64 = row.values(column).iter().sum();
            if errors > 0.0 {
                writeln!(f, "{}: {errors} errors of {column}", row.load.name)?;
            }
        }
    }
    for why in repeated {
        writeln!(f, "failed, and was measured again: {why}")?;
    }
    Ok(())
}

/// Three digits or more.
pub fn number(value: f64) -> String {
    if value < 10.0 {
        format!("{value:.2}")
    } else if value < 100.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.0}")
    }
}
