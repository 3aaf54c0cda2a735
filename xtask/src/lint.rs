//! Formatting, lints, dependencies, documents and manifests.

use std::{env, fs, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::{
    bpf::{self, Core},
    cmd, docs, manifests,
    profile::Profile,
    setup::{self, Tier},
};

/// How many seconds the database of advisories may take to arrive.
const FETCH_SECONDS: u64 = 60;

/// Run every check, and fail in the end if one failed.
pub fn run(verbs: &docs::Verbs) -> Result<()> {
    setup::ensure(&[Tier::Build, Tier::Lint])?;
    let checks: [(&str, &dyn Fn() -> Result<()>); 7] = [
        ("format", &format),
        ("clippy", &clippy),
        ("clippy of the kernel programs", &clippy_bpf),
        ("dependencies", &dependencies),
        ("advisories", &advisories),
        ("documents", &|| docs::run(verbs)),
        ("manifests", &manifests::run),
    ];
    let mut failed = Vec::new();
    for (name, check) in checks {
        if let Err(error) = check() {
            eprintln!("xtask: {name}: {error:#}");
            failed.push(name);
        }
    }
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

fn format() -> Result<()> {
    cmd::run(cmd::cargo().args(["fmt", "--all", "--check"]))
}

fn clippy() -> Result<()> {
    let mut clippy = Profile::Quick.cargo("clippy");
    clippy.args(["--all-targets", "--", "-D", "warnings"]);
    cmd::run(&mut clippy)
}

/// The kernel programs, seen as the BPF target sees them. The flags are those
/// that `agent/build.rs` gives when it builds them.
fn clippy_bpf() -> Result<()> {
    let core = Core::found().context("no toolchain has `core` for the BPF target")?;
    let mut clippy = cmd::in_root("rustup");
    clippy.args(["run", core.toolchain(), "cargo", "clippy"]);
    clippy.args([
        "-p",
        "postern-ebpf",
        "--lib",
        "--bins",
        "--target",
        bpf::TARGET,
    ]);
    if core == Core::Nightly {
        clippy.args(["-Z", "build-std=core"]);
    }
    // Its own directory: the other compiler would undo what this one built.
    clippy
        .arg("--target-dir")
        .arg(cmd::target().join("lint-bpf"));
    clippy.args(["--", "-D", "warnings"]);
    let arch = env::consts::ARCH;
    let flags = format!("--cfg=bpf_target_arch=\"{arch}\"");
    clippy.env("CARGO_ENCODED_RUSTFLAGS", flags);
    // aya-ebpf uses unstable features, which a stable compiler refuses else.
    clippy.env("RUSTC_BOOTSTRAP", "1");
    for inherited in [
        "RUSTC",
        "RUSTDOC",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
    ] {
        clippy.env_remove(inherited);
    }
    cmd::run(&mut clippy)
}

fn dependencies() -> Result<()> {
    cmd::run(cmd::cargo().args(["deny", "check", "licenses", "bans", "sources"]))
}

/// Known vulnerabilities, as far as the database of them is to be had: that is
/// said, since a machine without a way to it could never pass otherwise.
fn advisories() -> Result<()> {
    let mut fetch = cmd::bounded(FETCH_SECONDS, "cargo");
    fetch.args(["deny", "fetch", "db"]);
    let fetched = cmd::succeeds(&mut fetch);
    if !fetched && !database() {
        println!(
            "note: the database of advisories could not be fetched and none is kept here: advisories were NOT checked"
        );
        return Ok(());
    }
    if !fetched {
        println!("note: the database of advisories could not be refreshed: checking an older one");
    }
    cmd::run(cmd::cargo().args(["deny", "check", "--disable-fetch", "advisories"]))
}

/// Whether an earlier run left a database of advisories.
fn database() -> bool {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| env::home_dir().map(|home| home.join(".cargo")));
    let dbs = home.unwrap_or_default().join("advisory-dbs");
    // What a fetch that broke off leaves has no commit to check against.
    let complete = |db: fs::DirEntry| {
        let mut git = Command::new("git");
        git.arg("--git-dir").arg(db.path().join(".git"));
        cmd::succeeds(git.args(["rev-parse", "--verify", "HEAD"]))
    };
    fs::read_dir(dbs).is_ok_and(|dbs| dbs.flatten().any(complete))
}
