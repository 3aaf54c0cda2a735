//! Whether agents that carry connections which come and go keep anything of them: memory,
//! descriptors, entries of the kernel's maps.

use std::{
    collections::BTreeMap,
    fmt,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use postern_tests::{Lab, Node, Running, output, text};
use serde_json::{Value, json};

use crate::{
    ECHO, agents,
    drive::{Way, Wrk},
    field::Ground,
    process,
    report::Machine,
};

/// Connections: kept, a request each, and such that do nothing or break.
const KEPT: u32 = 32;
const FRESH: u32 = 16;
const CHURN: usize = 16;
/// How long all loads run before the beginning is looked at.
const WARM: Duration = Duration::from_secs(10);
/// How long nothing runs until then.
const REST: Duration = Duration::from_secs(5);
/// Longer than a tunnel without streams is kept.
const SETTLES: Duration = Duration::from_secs(150);
/// The share of samples, from the first on, in which caches fill.
const FILLING: usize = 5;
/// What an allocator takes at a time is no growth, MiB.
const GRAIN: f64 = 0.5;
/// Evicts by itself, and is bounded.
const BOUNDED: &str = "FOREIGN";

/// What one agent has at a moment.
#[derive(Clone)]
struct Sample {
    minutes: f64,
    resident: f64,
    /// Of that, what is no file's: how much of the program is mapped says nothing.
    anonymous: f64,
    descriptors: usize,
    threads: usize,
    maps: BTreeMap<String, u64>,
}

impl Sample {
    fn take(node: &Node, began: Instant) -> Result<Self> {
        let pid = node.agent_pid().context("the agent does not run")?;
        let metrics = node.metrics()?;
        let entries = metrics.lines().filter_map(|line| {
            let (name, count) = line
                .strip_prefix("postern_map_entries{name=\"")?
                .split_once("\"} ")?;
            Some((name.to_owned(), count.parse().ok()?))
        });
        let maps: BTreeMap<String, u64> = entries.collect();
        ensure!(!maps.is_empty(), "no maps in the metrics: {metrics}");
        Ok(Self {
            minutes: began.elapsed().as_secs_f64() / 60.0,
            resident: process::resident(pid)?,
            anonymous: process::anonymous(pid)?,
            descriptors: process::descriptors(pid)?,
            threads: process::threads(pid)?,
            maps,
        })
    }

    fn entries(&self) -> u64 {
        self.maps.values().sum()
    }

    /// What it has more of than an earlier one, but for memory.
    fn left(&self, before: &Self) -> Vec<String> {
        let mut left = Vec::new();
        let mut compare = |what: &str, now: u64, then: u64| {
            if now > then {
                left.push(format!("{what}: {now}, at the beginning {then}"));
            }
        };
        compare(
            "descriptors",
            self.descriptors as u64,
            before.descriptors as u64,
        );
        for (name, entries) in self.maps.iter().filter(|(name, _)| *name != BOUNDED) {
            let then = before.maps.get(name).copied().unwrap_or(0);
            compare(name, *entries, then);
        }
        left
    }

    fn json(&self) -> Value {
        json!({
            "minutes": self.minutes, "residentMiB": self.resident,
            "anonymousMiB": self.anonymous,
            "descriptors": self.descriptors, "threads": self.threads, "maps": self.maps,
        })
    }
}

/// A line through points by least squares.
struct Line {
    /// A minute.
    slope: f64,
    /// Standard error of the slope.
    error: f64,
    /// Standard deviation of the points from the line.
    noise: f64,
    span: f64,
}

impl Line {
    fn through(points: &[(f64, f64)]) -> Self {
        let n = points.len() as f64;
        let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / n;
        let (x, y) = (mean(|p| p.0), mean(|p| p.1));
        let sum = |of: &dyn Fn(f64, f64) -> f64| -> f64 {
            points.iter().map(|p| of(p.0 - x, p.1 - y)).sum()
        };
        let width = sum(&|x, _| x * x);
        let slope = sum(&|x, y| x * y) / width;
        let off = sum(&|x, y| (y - slope * x).powi(2));
        let noise = (off / (n - 2.0)).sqrt();
        let last = points.last().map_or(0.0, |p| p.0);
        Self {
            slope,
            error: noise / width.sqrt(),
            noise,
            span: last - points.first().map_or(0.0, |p| p.0),
        }
    }

    /// Whether what the line rises by stands out of what the points scatter around it.
    fn rises(&self) -> bool {
        let risen = self.slope * self.span;
        risen > 2.0 * self.noise && risen > GRAIN
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:+.3} MiB/h (standard error {:.3}), {:+.3} MiB in {:.1} min; scatter {:.3} MiB",
            self.slope * 60.0,
            self.error * 60.0,
            self.slope * self.span,
            self.span,
            self.noise
        )
    }
}

/// Runs all of it and says what it sees; an error if anything is left or grows.
pub fn run(minutes: u32, write: impl FnOnce(&Value) -> Result<()>) -> Result<()> {
    let machine = Machine::here()?;
    println!("{machine}");
    let ground = Ground::new(Lab::started()?, true)?;
    agents::quiet(&ground.lab)?;
    let (way, nodes) = (ground.way(), &ground.lab.nodes);
    let long = Duration::from_secs(60) * minutes;
    let began = Instant::now();
    let all = || -> Result<Vec<Sample>> {
        let samples = nodes.iter().map(|node| Sample::take(node, began));
        samples.collect()
    };

    Loads::start(&way, WARM)?.end()?;
    std::thread::sleep(REST);
    let before = all()?;
    show("beginning", &before);
    let every = (long / 100).clamp(Duration::from_secs(1), Duration::from_secs(10));
    let loads = Loads::start(&way, long)?;
    let started = Instant::now();
    let mut samples = Vec::new();
    while started.elapsed() < long {
        std::thread::sleep(every);
        samples.push(all()?);
        if let Some(last) = samples.last() {
            show("", last);
        }
    }
    println!("{}", loads.end()?);

    let mut after = all()?;
    let left = |after: &[Sample]| -> Vec<String> {
        let pairs = after.iter().zip(&before).zip(nodes);
        pairs
            .flat_map(|((after, before), node)| {
                let left = after.left(before).into_iter();
                left.map(|what| format!("{}, {what}", node.name))
            })
            .collect()
    };
    let ended = Instant::now();
    while !left(&after).is_empty() && ended.elapsed() < SETTLES {
        std::thread::sleep(Duration::from_secs(1));
        after = all()?;
    }
    show("end", &after);
    let mut wrong = left(&after);
    if !wrong.is_empty() {
        // What is left may be of a connection that does not end.
        for pod in [way.client, &ground.server] {
            let mut ss = pod.command("ss")?;
            let open = output(ss.args(["-Htn", "state", "connected", "exclude", "time-wait"]))?;
            println!("{} has open:\n{}", pod.name, text(&open.stdout));
        }
    }
    for (index, node) in nodes.iter().enumerate() {
        let filled = &samples[samples.len() / FILLING..];
        let points = filled
            .iter()
            .map(|all| (all[index].minutes, all[index].anonymous));
        let line = Line::through(&points.collect::<Vec<_>>());
        println!("{}, memory: {line}", node.name);
        if line.rises() {
            wrong.push(format!("{}, memory grows: {line}", node.name));
        }
    }
    let told = |all: &[Sample]| all.iter().map(Sample::json).collect::<Vec<_>>();
    write(&json!({
        "machine": machine.json(), "minutes": minutes, "wrong": wrong,
        "nodes": nodes.iter().map(|node| &node.name).collect::<Vec<_>>(),
        "before": told(&before), "after": told(&after),
        "samples": samples.iter().map(|all| told(all)).collect::<Vec<_>>(),
    }))?;
    if !wrong.is_empty() {
        bail!("{}", wrong.join("\n"));
    }
    println!("nothing is left, and memory does not grow beyond its noise");
    Ok(())
}

fn show(when: &str, all: &[Sample]) {
    let minutes = all.first().map_or(0.0, |sample| sample.minutes);
    print!("{minutes:6.1} min {when:10}");
    for sample in all {
        let Sample {
            resident,
            anonymous,
            descriptors,
            threads,
            ..
        } = sample;
        let entries = sample.entries();
        print!(
            "  | {resident:7.2} MiB ({anonymous:.2}) {descriptors:4} fds {threads:3} threads {entries:5} entries"
        );
    }
    println!();
}

/// All that runs at the same time.
struct Loads {
    wrk: [Running; 2],
    churn: Running,
    ends: Instant,
}

impl Loads {
    fn start(way: &Way, long: Duration) -> Result<Self> {
        let wrk = |name: &str, load: Wrk| -> Result<Running> {
            let mut command = load.command(way, long.as_secs() as u32)?;
            let log = way.client.dir().join(format!("{name}.log"));
            // It is read from its beginning.
            let _none = std::fs::remove_file(log);
            way.client.start(name, &mut command)
        };
        let mut churn = way.client.command(std::env::current_exe()?)?;
        churn.args(["churn", &way.address(ECHO), &CHURN.to_string()]);
        Ok(Self {
            wrk: [
                wrk("kept", Wrk::new(KEPT, true, None))?,
                wrk("fresh", Wrk::new(FRESH, false, None))?,
            ],
            churn: way.client.start("churn", &mut churn)?,
            ends: Instant::now() + long,
        })
    }

    /// Waits for it; what it did.
    fn end(mut self) -> Result<String> {
        const LATE: Duration = Duration::from_secs(30);
        let mut said = Vec::new();
        for wrk in &mut self.wrk {
            let ended = || wrk.child.try_wait().is_ok_and(|status| status.is_some());
            let limit = self.ends.saturating_duration_since(Instant::now()) + LATE;
            postern_tests::eventually("wrk ends", limit, ended)?;
            let report = crate::drive::last_json(wrk.output().as_bytes())?;
            let requests = report["requests"].as_u64().unwrap_or(0);
            ensure!(requests > 0, "no request was answered: {report}");
            let [errors, late] = ["errors", "late"].map(|key| report[key].as_u64());
            let (errors, late) = (errors.context("no errors")?, late.context("no late")?);
            ensure!(errors == late, "requests failed: {report}");
            said.push(format!("{requests} requests, {late} took longer than 2 s"));
        }
        if self.churn.child.try_wait()?.is_some() {
            bail!(
                "a connection that came and went failed: {}",
                self.churn.output()
            );
        }
        Ok(said.join("; "))
    }
}
