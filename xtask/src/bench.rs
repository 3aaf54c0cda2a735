//! The demonstration and the benchmarks: programs of the lab, run as they are.

use std::{ffi::OsString, fs, os::unix::process::CommandExt as _, path::PathBuf, process::Command};

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
    let mut command = cmd::in_root(&path);
    let error = command
        .args(args)
        .env("POSTERN_ENVOY", setup::envoy())
        .exec();
    Err(error).with_context(|| format!("cannot run {}", path.display()))
}

/// The benchmarks. `--quickly-built` and `--policy` are for here, the rest is theirs.
pub fn run(args: &[OsString]) -> Result<()> {
    if args.first().is_some_and(|first| first == "policy") {
        return policy();
    }
    let mut args = args.to_vec();
    let mut taken = |flag: &str| {
        let before = args.len();
        args.retain(|arg| arg != flag);
        args.len() < before
    };
    let profile = match taken("--quickly-built") {
        true => Profile::Quick,
        false => Profile::Release,
    };
    if taken("--policy") {
        let said = policy_said()?;
        args.splice(0..0, ["--policy-output".into(), said.into()]);
    }
    exec(profile, "bench", &args)
}

/// What decisions and tokens cost: a program of the agent's library, without root.
fn policy() -> Result<()> {
    setup::ensure(&[Tier::Build])?;
    cmd::run(&mut policy_command())
}

/// The same, into a file.
fn policy_said() -> Result<PathBuf> {
    setup::ensure(&[Tier::Build])?;
    let said = cmd::output(&mut policy_command())?;
    let directory = cmd::target().join("bench");
    fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    let path = directory.join("policy.txt");
    fs::write(&path, said).with_context(|| path.display().to_string())?;
    Ok(path)
}

fn policy_command() -> Command {
    let mut bench = Profile::Release.cargo("bench");
    bench.args(["--bench", "policy"]);
    bench
}
