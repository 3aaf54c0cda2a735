//! The demonstration and the benchmarks: programs of the lab, run as they are.

use std::{ffi::OsString, os::unix::process::CommandExt as _};

use anyhow::{Context as _, Result};

use crate::{
    cmd,
    profile::Profile,
    setup::{self, Tier},
};

/// Build everything and become `program`.
pub fn exec(profile: Profile, program: &str, args: &[OsString]) -> Result<()> {
    cmd::need_root(program)?;
    setup::ensure(&[Tier::Build, Tier::Lab])?;
    profile.build()?;
    let path = profile.directory().join(program);
    let error = cmd::in_root(&path).args(args).exec();
    Err(error).with_context(|| format!("cannot run {}", path.display()))
}

/// What decisions and tokens cost: a program of the agent's library, without root.
pub fn policy() -> Result<()> {
    setup::ensure(&[Tier::Build])?;
    let mut bench = Profile::Release.cargo("bench");
    cmd::run(bench.args(["--bench", "policy"]))
}
