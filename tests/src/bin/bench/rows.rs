//! What was measured, load by load, in turns so that all meet the same machine.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::{Value, json};

use crate::{
    drive::{ERRORS, Sample},
    load::Load,
};

/// One quantity of one load; a value a round, by column.
pub struct Row {
    pub load: &'static Load,
    pub unit: &'static str,
    values: BTreeMap<&'static str, Vec<f64>>,
}

/// All rows, which measurements did not come to their end and were made again, and which of
/// these failed again: they are missing.
pub struct Measured {
    pub rows: Vec<Row>,
    pub repeated: Vec<String>,
    pub failed: Vec<String>,
}

/// Runs every load in every column that it has, round by round; none is always first.
pub fn in_turns(
    loads: &[&'static Load],
    columns: usize,
    rounds: u32,
    mut measure: impl FnMut(&'static Load, usize, u32) -> Result<Option<(&'static str, Sample)>>,
) -> Measured {
    let mut rows: Vec<Row> = Vec::new();
    let (mut repeated, mut failed) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        eprintln!("round {} of {rounds}", round + 1);
        for load in loads {
            for turn in 0..columns {
                let column = (turn + round as usize) % columns;
                let measured = measure(load, column, round).or_else(|error| {
                    let why = format!("{}: {error:#}", load.key);
                    eprintln!("once more: {why}");
                    repeated.push(why);
                    measure(load, column, round)
                });
                let (name, sample) = match measured {
                    Ok(Some(measured)) => measured,
                    Ok(None) => continue,
                    Err(error) => {
                        let why = format!("{}: {error:#}", load.key);
                        eprintln!("failed: {why}");
                        failed.push(why);
                        continue;
                    }
                };
                for (unit, value) in sample {
                    let of = |row: &Row| row.load.key == load.key && row.unit == unit;
                    let at = rows.iter().position(of).unwrap_or_else(|| {
                        rows.push(Row::new(load, unit));
                        rows.len() - 1
                    });
                    rows[at].values.entry(name).or_default().push(value);
                }
            }
        }
    }
    // A unit that not all columns have may have come after another load's.
    rows.sort_by_key(|row| loads.iter().position(|load| load.key == row.load.key));
    Measured {
        rows,
        repeated,
        failed,
    }
}

impl Row {
    fn new(load: &'static Load, unit: &'static str) -> Self {
        Self {
            load,
            unit,
            values: BTreeMap::new(),
        }
    }

    pub fn is_errors(&self) -> bool {
        self.unit == ERRORS
    }

    pub fn values(&self, column: &str) -> &[f64] {
        self.values.get(column).map_or(&[], Vec::as_slice)
    }

    pub fn has(&self, column: &str) -> bool {
        self.values.contains_key(column)
    }

    pub fn median(&self, column: &str) -> Option<f64> {
        self.has(column).then(|| median(self.values(column)))
    }

    /// Median over the rounds of one column's value by another's in the same round.
    pub fn ratio(&self, of: &str, to: &str) -> Option<f64> {
        let pairs = self.values(of).iter().zip(self.values(to));
        let ratios: Vec<f64> = pairs.map(|(of, to)| of / to).collect();
        (!ratios.is_empty()).then(|| median(&ratios))
    }

    /// The widest range of a column, relative to its median.
    pub fn spread(&self) -> f64 {
        let all = self.values.values().map(|values| spread(values));
        all.fold(0.0, f64::max)
    }

    pub fn json(&self) -> Value {
        let columns: serde_json::Map<String, Value> = self
            .values
            .iter()
            .map(|(name, values)| {
                let column = json!({ "median": median(values), "rounds": values });
                ((*name).to_owned(), column)
            })
            .collect();
        json!({
            "key": self.load.key, "load": self.load.name, "scene": self.load.scene.title(),
            "unit": self.unit, "systems": columns,
        })
    }
}

pub fn median(values: &[f64]) -> f64 {
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
    let median = median(values);
    // What is nothing but for one round has no spread to speak of.
    if median == 0.0 {
        return 0.0;
    }
    (most - least) / median.abs()
}
