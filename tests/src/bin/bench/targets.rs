//! What Postern is to reach, judged by what was measured.

use std::{fmt, time::Duration};

use serde_json::{Value, json};

use crate::{
    drive::{CPU_BYTES, CPU_REQUESTS, GROWN, P99, P99_ALONE, RATE, RECEIVERS, REQUESTS},
    field::{IDLE, OPEN, READY},
    report::number,
    rows::Row,
};

const POSTERN: &str = "postern";
const DIRECT: &str = "direct";
const TCP: &str = "envoy-tcp";
const HBONE: &str = "envoy-hbone";
const HTTP: &str = "envoy-http";
const CACHE: &str = "envoy-cache";
/// What the connections of a receiver that does not read may hold, MiB, in both agents.
const HELD: f64 = 2.0;
const MICROSECOND: Duration = Duration::from_micros(1);

#[derive(Clone, Copy)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

impl Bound {
    fn met_by(self, value: f64) -> bool {
        match self {
            Self::AtLeast(least) => value >= least,
            Self::AtMost(most) => value <= most,
        }
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtLeast(least) => write!(f, ">= {least}"),
            Self::AtMost(most) => write!(f, "<= {most}"),
        }
    }
}

/// One target, and what was reached.
pub struct Outcome {
    what: String,
    bound: Bound,
    /// `None`: not measured in this run.
    reached: Option<f64>,
}

impl Outcome {
    fn met(&self) -> Option<bool> {
        self.reached.map(|value| self.bound.met_by(value))
    }

    pub fn is_measured(&self) -> bool {
        self.reached.is_some()
    }

    pub fn json(&self) -> Value {
        json!({
            "target": self.what, "bound": self.bound.to_string(),
            "reached": self.reached, "met": self.met(),
        })
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = match self.met() {
            Some(true) => "met",
            Some(false) => "NOT MET",
            None => "not measured",
        };
        let reached = self.reached.map_or_else(|| "-".into(), number);
        let bound = self.bound.to_string();
        write!(f, "{verdict:14}{reached:>8}  {bound:8}  {}", self.what)
    }
}

/// Judges all targets. `policy`: what `cargo xtask bench policy` said.
pub fn judge(rows: &[Row], policy: Option<&str>) -> Vec<Outcome> {
    let rows = Rows(rows);
    let mut all = Vec::new();
    let mut target = |what: String, bound, reached| {
        all.push(Outcome {
            what,
            bound,
            reached,
        });
    };
    for (key, unit, other, bound) in RATIOS {
        let row = rows.get(key, unit);
        let reached = row.and_then(|row| row.ratio(POSTERN, other));
        target(format!("{key}, {unit}: by {other}'s"), *bound, reached);
    }
    for (key, unit) in COSTS {
        let what = format!("{key}, {unit}: by the lower of {TCP}'s and {HBONE}'s");
        target(what, Bound::AtMost(0.7), rows.cost(key, unit));
    }
    target(
        format!("stalled, {P99}: by that without them"),
        Bound::AtMost(1.2),
        rows.stalled(),
    );
    target(
        format!("stalled, MiB of both agents for each of {RECEIVERS} receivers"),
        Bound::AtMost(HELD),
        rows.median("stalled", GROWN)
            .map(|mib| mib / RECEIVERS as f64),
    );
    let (_, _, each) = OPEN[1];
    for (key, unit, most) in [
        ("first-start", READY, 20.0),
        ("start", READY, 20.0),
        ("memory", each, 6.0),
        ("memory", IDLE, 15.0),
    ] {
        let reached = rows.median(key, unit);
        target(format!("{key}, {unit}"), Bound::AtMost(most), reached);
    }
    if let Some(policy) = policy {
        for (part, what) in [
            (
                "select: decide",
                "a decision, however many policies there are",
            ),
            ("remembered", "a token that is remembered"),
        ] {
            let micros = slowest(policy, part).map(|t| t.as_secs_f64() * 1e6);
            let most = Bound::AtMost(MICROSECOND.as_secs_f64() * 1e6);
            target(format!("policy, us: {what}"), most, micros);
        }
    }
    all
}

use Bound::{AtLeast, AtMost};

/// Load, unit, whose value Postern's is divided by, and what that is to be.
const RATIOS: &[(&str, &str, &str, Bound)] = &[
    ("http-64", REQUESTS, TCP, AtLeast(1.9)),
    ("http-64", REQUESTS, HBONE, AtLeast(1.25)),
    ("http-64", P99, HBONE, AtMost(1.0)),
    ("http-1", REQUESTS, TCP, AtLeast(1.6)),
    ("constant", P99, HBONE, AtMost(1.0)),
    ("fresh", REQUESTS, TCP, AtLeast(4.5)),
    ("fresh", REQUESTS, HBONE, AtLeast(1.5)),
    ("bulk-1", RATE, TCP, AtLeast(1.6)),
    ("bulk-8", RATE, TCP, AtLeast(1.6)),
    ("bulk-1-back", RATE, TCP, AtLeast(1.6)),
    ("bulk-8-back", RATE, TCP, AtLeast(1.6)),
    ("rs256-one", REQUESTS, HTTP, AtLeast(3.0)),
    ("rs256-many", REQUESTS, HTTP, AtLeast(3.0)),
    ("es256-one", REQUESTS, HTTP, AtLeast(3.0)),
    ("es256-many", REQUESTS, HTTP, AtLeast(3.0)),
    ("rs256-one", REQUESTS, CACHE, AtLeast(3.0)),
    ("rs256-many", REQUESTS, CACHE, AtLeast(3.0)),
    ("es256-one", REQUESTS, CACHE, AtLeast(3.0)),
    ("es256-many", REQUESTS, CACHE, AtLeast(3.0)),
    ("near-http-64", REQUESTS, DIRECT, AtLeast(0.6)),
    ("near-bulk-1", RATE, DIRECT, AtLeast(0.6)),
    ("near-bulk-8", RATE, DIRECT, AtLeast(0.6)),
    ("outside-http-1", REQUESTS, DIRECT, AtLeast(0.98)),
    ("outside-http-64", REQUESTS, DIRECT, AtLeast(0.98)),
    ("outside-fresh", REQUESTS, DIRECT, AtLeast(0.98)),
    ("outside-constant", P99, DIRECT, AtMost(1.02)),
    ("outside-bulk-1", RATE, DIRECT, AtLeast(0.98)),
    ("outside-bulk-8", RATE, DIRECT, AtLeast(0.98)),
    ("outside-bulk-1-back", RATE, DIRECT, AtLeast(0.98)),
    ("outside-bulk-8-back", RATE, DIRECT, AtLeast(0.98)),
];

/// Proxies' CPU, against the better of the Envoys that carry bytes.
const COSTS: &[(&str, &str)] = &[
    ("http-64", CPU_REQUESTS),
    ("bulk-1", CPU_BYTES),
    ("bulk-8", CPU_BYTES),
    ("bulk-1-back", CPU_BYTES),
    ("bulk-8-back", CPU_BYTES),
];

struct Rows<'a>(&'a [Row]);

impl Rows<'_> {
    fn get(&self, key: &str, unit: &str) -> Option<&Row> {
        let mut rows = self.0.iter();
        rows.find(|row| row.load.key == key && row.unit == unit)
    }

    fn median(&self, key: &str, unit: &str) -> Option<f64> {
        self.get(key, unit)?.median(POSTERN)
    }

    fn cost(&self, key: &str, unit: &str) -> Option<f64> {
        let row = self.get(key, unit)?;
        let [tcp, hbone] = [TCP, HBONE].map(|other| row.ratio(POSTERN, other));
        // By the lower cost: the higher ratio.
        Some(tcp?.max(hbone?))
    }

    /// Both are of the same run, so that they are compared round by round.
    fn stalled(&self) -> Option<f64> {
        let [alone, beside] = [P99_ALONE, P99].map(|unit| self.get("stalled", unit));
        let pairs = beside?.values(POSTERN).iter().zip(alone?.values(POSTERN));
        let ratios: Vec<f64> = pairs.map(|(beside, alone)| beside / alone).collect();
        (!ratios.is_empty()).then(|| crate::rows::median(&ratios))
    }
}

/// Of the lines that name something, the longest time at their end, as `1.234µs`.
fn slowest(said: &str, part: &str) -> Option<Duration> {
    let lines = said.lines().filter(|line| line.contains(part));
    let times = lines.filter_map(|line| duration(line.split_whitespace().last()?));
    times.max()
}

fn duration(text: &str) -> Option<Duration> {
    // The longer units first: `s` ends them all.
    [("ns", 1e-9), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0)]
        .iter()
        .find_map(|(unit, seconds)| {
            let number: f64 = text.strip_suffix(unit)?.parse().ok()?;
            Some(Duration::from_secs_f64(number * seconds))
        })
}
