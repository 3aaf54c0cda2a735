//! Builds the kernel programs with whichever toolchain has `core` for the BPF
//! target: `postern-bpf`, which `cargo xtask setup` links to Debian's compiler, or
//! a nightly with `rust-src`.
//!
//! Not by aya-build, whose flags leave the name of this directory in what is built: the
//! image is to be the same wherever it is made.

use std::{
    env, fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

/// Linked by `cargo xtask setup`.
const LINKED: &str = "postern-bpf";
const NIGHTLY: &str = "nightly";
const PACKAGE: &str = "postern-ebpf";
const MISSING: &str =
    "the tools that build the kernel programs are not all installed: run `cargo xtask setup`";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=../agent-ebpf");
    if let Err(error) = build() {
        // Fails the build with these words, where an exit code would print all that
        // the script said.
        for line in format!("{error:#}").lines() {
            println!("cargo::error={line}");
        }
    }
}

fn build() -> Result<()> {
    if which::which("bpf-linker").is_err() {
        bail!("{MISSING} (bpf-linker is not on PATH)");
    }
    // The linked one first: its LLVM is the one that bpf-linker was built with,
    // while a nightly's may be newer than bpf-linker can read.
    let toolchain = if runs(LINKED) {
        LINKED
    } else if nightly_has_core() {
        NIGHTLY
    } else {
        bail!("{MISSING} (no toolchain has `core` for bpfel-unknown-none)");
    };
    let (order, bits) = (
        env::var("CARGO_CFG_TARGET_ENDIAN")?,
        env::var("CARGO_CFG_TARGET_ARCH")?,
    );
    let target = match order.as_str() {
        "big" => "bpfeb-unknown-none",
        _ => "bpfel-unknown-none",
    };
    let root = Path::new(&env::var("CARGO_MANIFEST_DIR")?)
        .parent()
        .context("the agent is in a workspace")?
        .to_owned();
    let out = PathBuf::from(env::var("OUT_DIR")?);
    // Beside what is handed on, whose name is the package's.
    let directory = out.join("programs");

    let mut cargo = Command::new("rustup");
    cargo.args(["run", toolchain, "cargo", "build", "--release", "--bins"]);
    cargo.args(["--package", PACKAGE, "--target", target, "--target-dir"]);
    cargo.arg(&directory).current_dir(&root);
    match toolchain {
        NIGHTLY => cargo.args(["-Z", "build-std=core"]),
        // Its `core` is prebuilt; aya-ebpf still needs unstable features.
        _ => cargo.env("RUSTC_BOOTSTRAP", "aya_ebpf"),
    };
    // Sources are named from the root on, where the linker finds their lines for BTF.
    let flags = [
        format!("--cfg=bpf_target_arch=\"{bits}\""),
        "-Cdebuginfo=2".into(),
        "-Clink-arg=--btf".into(),
        format!("--remap-path-prefix={}=.", root.display()),
    ];
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    // Those of whoever builds the agent are of another toolchain.
    for key in ["RUSTC", "RUSTC_WORKSPACE_WRAPPER"] {
        cargo.env_remove(key);
    }
    let built = cargo.output().context("rustup")?;
    if !built.status.success() {
        bail!("{cargo:?}:\n{}", String::from_utf8_lossy(&built.stderr));
    }
    let program = directory.join(target).join("release").join(PACKAGE);
    let program = fs::read(&program).with_context(|| program.display().to_string())?;
    // By what an agent knows those that an earlier one has left loaded.
    let mut hasher = DefaultHasher::new();
    program.hash(&mut hasher);
    println!("cargo::rustc-env=POSTERN_PROGRAMS={:016x}", hasher.finish());
    fs::write(out.join(PACKAGE), program)?;
    Ok(())
}

fn nightly_has_core() -> bool {
    let sysroot = Command::new("rustup")
        .args(["run", NIGHTLY, "rustc", "--print", "sysroot"])
        .output();
    sysroot.is_ok_and(|out| {
        let root = String::from_utf8_lossy(&out.stdout);
        out.status.success()
            && Path::new(root.trim())
                .join("lib/rustlib/src/rust/library/core")
                .is_dir()
    })
}

fn runs(toolchain: &str) -> bool {
    Command::new("rustup")
        .args(["run", toolchain, "rustc", "--version"])
        .output()
        .is_ok_and(|out| out.status.success())
}
