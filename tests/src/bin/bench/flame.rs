//! Where the agents' time goes: stacks by `perf`, folded a line each as flame graph tools
//! read them, and the functions that it ends in.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;
use postern_tests::{Running, eventually, output, text};

/// A second; no round number, so that it does not fall in with a timer.
const FREQUENCY: &str = "499";
const TOP: usize = 40;

/// Runs `load` while the agents are watched, and writes `NAME-client.folded` and so on.
pub fn watch(
    directory: &Path,
    name: &str,
    agents: &[i32],
    load: impl FnOnce() -> Result<()>,
) -> Result<()> {
    std::fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    let data = directory.join(format!("{name}.data"));
    let pids: Vec<String> = agents.iter().map(i32::to_string).collect();
    let mut record = Command::new("perf");
    // Not the CPU's counters: a virtual machine may have none. Nor frame pointers, which
    // are not kept.
    record.args(["record", "-q", "-e", "cpu-clock", "-F", FREQUENCY]);
    record.args(["--call-graph", "dwarf,8192"]);
    record.args(["-p", &pids.join(",")]).arg("-o").arg(&data);
    let log = directory.join(format!("{name}.log"));
    let mut perf = Running::start(&mut record, log).context("perf (package linux-perf)")?;
    load()?;
    perf.signal(Signal::SIGINT)?;
    eventually("perf ends", Duration::from_secs(30), || {
        perf.child.try_wait().is_ok_and(|status| status.is_some())
    })?;
    let mut script = Command::new("perf");
    script.args(["script", "--no-inline", "-F", "pid,ip,sym"]);
    let said = output(script.arg("-i").arg(&data))?;
    let stacks = fold(&text(&said.stdout));
    std::fs::remove_file(&data)?;
    for (pid, side) in agents.iter().zip(["client", "server"]) {
        let none = BTreeMap::new();
        let stacks = stacks.get(pid).unwrap_or(&none);
        let path = |ending: &str| -> PathBuf { directory.join(format!("{name}-{side}.{ending}")) };
        let folded: String = stacks.iter().fold(String::new(), |mut text, (stack, n)| {
            let _written = writeln!(text, "{stack} {n}");
            text
        });
        std::fs::write(path("folded"), folded)?;
        std::fs::write(path("top"), top(stacks))?;
    }
    Ok(())
}

/// How often each stack was seen, by process; outermost first.
type Stacks = BTreeMap<i32, BTreeMap<String, u64>>;

/// A sample is a process, then its frames from the innermost on, then an empty line.
fn fold(script: &str) -> Stacks {
    let mut stacks = Stacks::new();
    for sample in script.split("\n\n") {
        let mut lines = sample.lines().filter(|line| !line.trim().is_empty());
        let pid = lines.next().and_then(|line| line.trim().parse().ok());
        let Some(pid) = pid else { continue };
        let mut frames: Vec<String> = lines
            .map(|line| line.trim().split_once(' ').map_or("?", |(_, name)| name))
            // An array's type has one within.
            .map(|name| name.replace(';', ":"))
            .collect();
        frames.reverse();
        let stack = frames.join(";");
        *stacks.entry(pid).or_default().entry(stack).or_default() += 1;
    }
    stacks
}

/// Functions by how many samples end in them, with the share of those that pass through.
fn top(stacks: &BTreeMap<String, u64>) -> String {
    let total: u64 = stacks.values().sum();
    let mut functions: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for (stack, count) in stacks {
        let mut frames: Vec<&str> = stack.split(';').collect();
        if let Some(last) = frames.last() {
            functions.entry(last).or_default().0 += count;
        }
        // Once, however often it calls itself.
        frames.sort_unstable();
        frames.dedup();
        for frame in frames {
            functions.entry(frame).or_default().1 += count;
        }
    }
    let mut functions: Vec<_> = functions.into_iter().collect();
    functions.sort_by_key(|(_, (own, _))| std::cmp::Reverse(*own));
    let share = |count: u64| 100.0 * count as f64 / total.max(1) as f64;
    let mut text = format!("{total} samples\n{:>7} {:>7}\n", "itself", "with");
    for (name, (own, with)) in functions.into_iter().take(TOP) {
        let _written = writeln!(text, "{:6.2}% {:6.2}% {name}", share(own), share(with));
    }
    text
}
