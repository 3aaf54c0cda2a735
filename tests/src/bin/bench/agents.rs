//! What the agents themselves take: memory, and time to start.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use postern_tests::{Lab, Node, output};

/// An agent at rest: allocations of what just happened are over.
const REST: Duration = Duration::from_secs(1);

pub fn set_log_level(node: &Node, level: &str) -> Result<()> {
    let mut curl = node.command("curl")?;
    curl.args(["-sS", "-f", "-m", "5", "-X", "POST"]);
    curl.arg(format!("http://127.0.0.1:15000/log?level={level}"));
    output(&mut curl).map(drop)
}

/// Resident memory of each node's agent, MiB.
pub fn memory(lab: &Lab) -> Result<Vec<f64>> {
    std::thread::sleep(REST);
    lab.nodes.iter().map(resident).collect()
}

pub fn resident(node: &Node) -> Result<f64> {
    let pid = node.agent_pid().context("the agent does not run")?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line
        .and_then(|line| line.trim().strip_suffix(" kB"))
        .context("VmRSS")?;
    Ok(kib.parse::<f64>()? / 1024.0)
}

/// Milliseconds to ready of agents on new nodes, which load and attach everything.
pub fn starts(rounds: u32) -> Result<Vec<f64>> {
    (0..rounds)
        .map(|_| {
            let mut lab = Lab::new(1)?;
            start(&mut lab.nodes[0])
        })
        .collect()
}

/// Milliseconds to ready of agents that follow one that was killed, and take over
/// what it left in the kernel.
pub fn restarts(lab: &mut Lab, rounds: u32) -> Result<Vec<f64>> {
    (0..rounds)
        .map(|_| {
            lab.nodes[0].kill();
            start(&mut lab.nodes[0])
        })
        .collect()
}

fn start(node: &mut Node) -> Result<f64> {
    let began = Instant::now();
    node.start()?;
    Ok(began.elapsed().as_secs_f64() * 1e3)
}
