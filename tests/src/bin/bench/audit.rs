//! What auditing costs: two meshes on one machine, of which one keeps no audit log and
//! has no eyes in the kernel. (Eyes see all of a kernel; of the other mesh's sockets they
//! see at once that they are not theirs.)

use anyhow::{Result, ensure};
use postern_tests::{Lab, NodeOptions};

use crate::{
    Pair, agents, in_turns,
    report::{AuditReport, Machine},
};

pub fn bench(rounds: u32, seconds: u32) -> Result<AuditReport> {
    let machine = Machine::here()?;
    println!("{machine}");
    println!("{rounds} rounds of {seconds} s for each load");
    let (off_lab, off) = mesh(", enabled: false")?;
    let (on_lab, on) = mesh("")?;
    let series = in_turns([(&off, &off_lab), (&on, &on_lab)], rounds, seconds)?;
    let memory = [agents::memory(&off_lab)?, agents::memory(&on_lab)?];
    let records =
        |lab: &Lab| -> Result<usize> { lab.nodes.iter().map(|node| Ok(node.audit()?.len())).sum() };
    ensure!(
        records(&off_lab)? == 0,
        "there are records where there is no log"
    );
    Ok(AuditReport {
        machine,
        rounds,
        seconds,
        series,
        records: records(&on_lab)?,
        memory,
    })
}

fn mesh(audit: &str) -> Result<(Lab, Pair)> {
    let mut lab = Lab::new(2)?;
    for node in &mut lab.nodes {
        node.options = NodeOptions {
            audit: audit.into(),
            ..NodeOptions::default()
        };
        node.start()?;
        // The lab's agents log for debugging, a line a connection.
        agents::set_log_level(node, "info")?;
    }
    let pair = Pair::new(&mut lab, "postern", true)?;
    Ok((lab, pair))
}
