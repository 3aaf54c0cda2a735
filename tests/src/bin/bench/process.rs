//! What the kernel and their logs say of the processes that carry traffic.

use std::{
    io::{Read as _, Seek as _, SeekFrom},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use postern_tests::{Running, text};

/// `USER_HZ`, the same on all that this runs on.
const TICKS: f64 = 100.0;
/// How exactly a start is timed.
const STEP: Duration = Duration::from_micros(500);

fn proc(pid: i32, file: &str) -> Result<String> {
    let path = format!("/proc/{pid}/{file}");
    std::fs::read_to_string(&path).context(path)
}

/// Resident memory, MiB.
pub fn resident(pid: i32) -> Result<f64> {
    memory(pid, "VmRSS:")
}

/// Of that, what is no file's: neither the program nor its libraries.
pub fn anonymous(pid: i32) -> Result<f64> {
    memory(pid, "RssAnon:")
}

fn memory(pid: i32, key: &str) -> Result<f64> {
    let status = proc(pid, "status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    let kib = line
        .and_then(|line| line.trim().strip_suffix(" kB"))
        .context("no memory in /proc")?;
    Ok(kib.parse::<f64>()? / 1024.0)
}

/// Seconds of CPU used so far, in user mode and in the kernel on its behalf.
pub fn cpu(pid: i32) -> Result<f64> {
    let stat = proc(pid, "stat")?;
    // The name may hold anything; `utime` and `stime` are the 14th and 15th.
    let fields = stat.rsplit(") ").next().unwrap_or_default().split(' ');
    let times = fields.skip(11).take(2).map(str::parse::<f64>);
    let times: Vec<f64> = times.collect::<Result<_, _>>()?;
    Ok(times.iter().sum::<f64>() / TICKS)
}

pub fn descriptors(pid: i32) -> Result<usize> {
    Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

pub fn threads(pid: i32) -> Result<usize> {
    Ok(std::fs::read_dir(format!("/proc/{pid}/task"))?.count())
}

/// Of all of them.
pub fn sum(pids: &[i32], of: impl Fn(i32) -> Result<f64>) -> Result<f64> {
    pids.iter().map(|pid| of(*pid)).sum()
}

/// How long a log is by now.
pub fn size(log: &Path) -> u64 {
    std::fs::metadata(log).map_or(0, |meta| meta.len())
}

/// Waits until its log says something beyond `seen` bytes; looks often enough to time it.
pub fn says(running: &mut Running, seen: u64, what: &str, limit: Duration) -> Result<()> {
    let began = Instant::now();
    loop {
        let mut said = Vec::new();
        let mut log = std::fs::File::open(&running.log)?;
        log.seek(SeekFrom::Start(seen))?;
        log.read_to_end(&mut said)?;
        if text(&said).contains(what) {
            return Ok(());
        }
        if let Some(status) = running.child.try_wait()? {
            bail!("{}: {status}\n{}", running.log.display(), text(&said));
        }
        if began.elapsed() > limit {
            bail!("after {limit:?} no {what:?} of {}", text(&said));
        }
        std::thread::sleep(STEP);
    }
}
