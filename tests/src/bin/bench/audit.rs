//! What auditing costs: two meshes on one machine, of which one keeps no audit log and
//! has no eyes in the kernel. (Eyes see all of a kernel; of the other mesh's sockets they
//! see at once that they are not theirs.)

use std::fmt;

use anyhow::{Result, ensure};
use postern_tests::{Lab, NodeOptions};
use serde_json::{Value, json};

use crate::{
    agents, drive,
    field::Ground,
    load, process,
    report::{self, Machine, number},
    rows::{Measured, Row, in_turns},
    tokens::Tokens,
};

const LOADS: [&str; 5] = ["http-1", "http-64", "fresh", "bulk-1", "bulk-8"];
const COLUMNS: [&str; 2] = ["audit off", "audit on"];

pub fn bench(rounds: u32, seconds: u32) -> Result<AuditReport> {
    let machine = Machine::here()?;
    eprintln!("{machine}");
    let loads = LOADS.iter().filter_map(|key| load::find(key).ok());
    let loads: Vec<_> = loads.collect();
    let grounds = [mesh(", enabled: false")?, mesh("")?];
    let tokens = Tokens::mint(grounds[0].lab.path())?;
    let Measured {
        rows,
        repeated,
        failed,
    } = in_turns(&loads, COLUMNS.len(), rounds, |load, column, _| {
        let sample = drive::run(&grounds[column].way(), load.kind, &tokens, seconds)?;
        Ok(Some((COLUMNS[column], sample)))
    });
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    let records = |ground: &Ground| -> Result<usize> {
        let nodes = ground.lab.nodes.iter();
        nodes.map(|node| Ok(node.audit()?.len())).sum()
    };
    let [off, on] = &grounds;
    ensure!(
        records(off)? == 0,
        "there are records where there is no log"
    );
    let memory = |ground: &Ground| -> Result<Vec<f64>> {
        let agents = ground.way().proxies.into_iter();
        agents.map(process::resident).collect()
    };
    Ok(AuditReport {
        machine,
        rounds,
        seconds,
        rows,
        repeated,
        records: records(on)?,
        memory: [memory(off)?, memory(on)?],
    })
}

fn mesh(audit: &str) -> Result<Ground> {
    let mut lab = Lab::new(2)?;
    for node in &mut lab.nodes {
        node.options = NodeOptions {
            audit: audit.into(),
            ..NodeOptions::default()
        };
        node.start()?;
    }
    agents::quiet(&lab)?;
    Ground::new(lab, true)
}

/// What auditing costs: the same through two meshes, one without an audit log.
pub struct AuditReport {
    machine: Machine,
    rounds: u32,
    seconds: u32,
    rows: Vec<Row>,
    repeated: Vec<String>,
    /// In the logs of both nodes, at the end.
    records: usize,
    /// Resident memory of each agent, MiB: without, and with.
    memory: [Vec<f64>; 2],
}

impl AuditReport {
    pub fn json(&self) -> Value {
        json!({
            "machine": self.machine.json(),
            "rounds": self.rounds,
            "seconds": self.seconds,
            "rows": self.rows.iter().map(Row::json).collect::<Vec<_>>(),
            "repeated": self.repeated,
            "records": self.records,
            "memoryMiB": { "off": self.memory[0], "on": self.memory[1] },
        })
    }
}

impl fmt::Display for AuditReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows: Vec<&Row> = self.rows.iter().collect();
        report::table(f, &rows, &COLUMNS, COLUMNS[1])?;
        report::noise(f, &self.rows, &COLUMNS, &self.repeated)?;
        let list = |values: &[f64]| {
            let numbers: Vec<String> = values.iter().map(|value| number(*value)).collect();
            numbers.join(" and ")
        };
        let [off, on] = self.memory.each_ref().map(|memory| list(memory));
        writeln!(f, "\n{} records on both nodes", self.records)?;
        write!(f, "memory of the agents, MiB: {off} without, {on} with")
    }
}
