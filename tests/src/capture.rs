//! The eavesdropper: tcpdump on the wire between nodes, and what it got.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;

use crate::{
    Node, eventually,
    host::{self, Running},
};

/// Everything that crosses a node's link while it runs.
pub struct Capture {
    tcpdump: Running,
    path: PathBuf,
}

impl Capture {
    pub fn start(node: &Node, path: PathBuf) -> Result<Self> {
        let mut command = node.command("tcpdump")?;
        command
            .args([
                "-i",
                "wire",
                "-s",
                "0",
                "-U",
                "--immediate-mode",
                "-B",
                "65536",
                "-Z",
                "root",
                "-w",
            ])
            .arg(&path);
        let tcpdump = Running::start(&mut command, path.with_extension("log"))?;
        tcpdump.says("listening on")?;
        Ok(Self { tcpdump, path })
    }

    /// Stops and returns the file.
    pub fn stop(mut self) -> Result<PathBuf> {
        std::thread::sleep(Duration::from_millis(200));
        self.tcpdump.signal(Signal::SIGINT)?;
        eventually("tcpdump ends", Duration::from_secs(10), || {
            self.tcpdump
                .child
                .try_wait()
                .is_ok_and(|status| status.is_some())
        })?;
        Ok(self.path.clone())
    }
}

/// How often a byte string stands in a file.
pub fn count_bytes(path: &Path, needle: &[u8]) -> Result<usize> {
    let bytes = std::fs::read(path)?;
    Ok(bytes
        .windows(needle.len())
        .filter(|window| *window == needle)
        .count())
}

/// Fields of the packets of a capture that a display filter selects, a line each.
pub fn tshark(path: &Path, filter: &str, fields: &[&str]) -> Result<Vec<String>> {
    let mut command = Command::new("tshark");
    command
        .arg("-r")
        .arg(path)
        .args(["-d", "tcp.port==15008,tls", "-Y", filter, "-T", "fields"]);
    for field in fields {
        command.args(["-e", field]);
    }
    let output = host::output(&mut command).context("tshark (package tshark)")?;
    Ok(host::text(&output.stdout)
        .lines()
        .map(str::to_owned)
        .collect())
}
