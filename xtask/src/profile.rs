//! How the agent and the lab are built: as they are shipped, or quickly.

use std::{path::PathBuf, process::Command};

use anyhow::Result;

use crate::cmd;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// As shipped: for benchmarks and the image.
    Release,
    /// For tests, lints and the demonstration: a fraction of the time to build.
    Quick,
}

impl Profile {
    /// As cargo names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Release => "release",
            Self::Quick => "quick",
        }
    }

    /// Where cargo puts what it builds.
    pub fn directory(self) -> PathBuf {
        cmd::target().join(self.name())
    }

    /// `cargo VERB` of everything but the kernel programs, which `agent/build.rs` builds
    /// and a kernel runs. Always everything, whichever part is wanted: cargo chooses the
    /// features of dependencies by what is selected, and builds them anew for every choice.
    pub fn cargo(self, verb: &str) -> Command {
        let mut cargo = cmd::cargo();
        cargo.args([verb, "--profile", self.name()]);
        cargo.args(["--workspace", "--exclude", "postern-ebpf"]);
        cargo
    }

    /// Builds all programs.
    pub fn build(self) -> Result<()> {
        cmd::run(self.cargo("build").arg("--bins"))
    }
}
