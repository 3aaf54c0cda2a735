//! The demonstration and the benchmarks: programs of the lab, run as they are.

use std::{ffi::OsString, os::unix::process::CommandExt as _};

use anyhow::{Context as _, Result};

use crate::{
    cmd,
    setup::{self, Tier},
};

/// Build everything with optimisations and become `program`.
pub fn exec(program: &str, args: &[OsString]) -> Result<()> {
    cmd::need_root(program)?;
    setup::ensure(&[Tier::Build, Tier::Lab])?;
    build_release()?;
    let path = cmd::target().join("release").join(program);
    let error = cmd::in_root(&path).args(args).exec();
    Err(error).with_context(|| format!("cannot run {}", path.display()))
}

/// The agent and the lab. Always both, whichever of them is wanted: cargo chooses
/// the features of dependencies by what is selected, and builds them anew for
/// every choice.
pub const SELECTED: &[&str] = &["--release", "-p", "postern", "-p", "postern-tests"];

/// Build the agent and the programs of the lab.
pub fn build_release() -> Result<()> {
    cmd::run(cmd::cargo().arg("build").args(SELECTED).arg("--bins"))
}

/// What decisions and tokens cost: a program of the agent's library, without root.
pub fn policy() -> Result<()> {
    setup::ensure(&[Tier::Build])?;
    let mut bench = cmd::cargo();
    bench.args(["bench", "--profile"]);
    // The first of those is `--release`.
    cmd::run(
        bench
            .arg("release")
            .args(&SELECTED[1..])
            .args(["--bench", "policy"]),
    )
}
