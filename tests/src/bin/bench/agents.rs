//! Agents, started and told to say less.

use std::time::{Duration, Instant};

use anyhow::Result;
use postern_tests::{Lab, Node, output};

use crate::process;

const READY: Duration = Duration::from_secs(60);

/// The lab's agents log for debugging, a line a connection. Now they do not.
pub fn quiet(lab: &Lab) -> Result<()> {
    for node in lab.nodes.iter().filter(|node| node.running()) {
        quieten(node)?;
    }
    Ok(())
}

pub fn quieten(node: &Node) -> Result<()> {
    let mut curl = node.command("curl")?;
    curl.args(["-sS", "-f", "-m", "5", "-X", "POST"]);
    curl.arg("http://127.0.0.1:15000/log?level=info");
    output(&mut curl).map(drop)
}

/// Milliseconds until a new agent is ready. It takes over what one before it left in the
/// kernel, if there is any.
pub fn start(node: &mut Node) -> Result<f64> {
    node.configure()?;
    let seen = process::size(&node.directory().join("agent.log"));
    let began = Instant::now();
    let mut agent = node.launch()?;
    process::says(&mut agent, seen, " ready", READY)?;
    let took = began.elapsed().as_secs_f64() * 1e3;
    node.set_agent(agent);
    Ok(took)
}
