//! Builds the kernel programs with whichever toolchain has `core` for the BPF
//! target: `postern-bpf`, which `cargo xtask setup` links to Debian's compiler, or
//! a nightly with `rust-src`.

use std::{env, path::Path, process::Command};

use anyhow::{Result, bail};
use aya_build::{Package, Toolchain};

/// Linked by `cargo xtask setup`.
const LINKED: &str = "postern-bpf";
const MISSING: &str =
    "the tools that build the kernel programs are not all installed: run `cargo xtask setup`";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if let Err(error) = build() {
        // Fails the build with one sentence, where an exit code would print all that
        // the script said.
        println!("cargo::error={error}");
    }
}

fn build() -> Result<()> {
    if which::which("bpf-linker").is_err() {
        bail!("{MISSING} (bpf-linker is not on PATH)");
    }
    // The linked one first: its LLVM is the one that bpf-linker was built with,
    // while a nightly's may be newer than bpf-linker can read.
    let toolchain = if runs(LINKED) {
        // Its `core` is prebuilt; aya-ebpf still needs unstable features.
        // SAFETY: a build script has one thread here.
        unsafe { env::set_var("RUSTC_BOOTSTRAP", "aya_ebpf") };
        Toolchain::Custom(LINKED)
    } else if nightly_has_core() {
        Toolchain::Nightly
    } else {
        bail!("{MISSING} (no toolchain has `core` for bpfel-unknown-none)");
    };
    let root = env::var("CARGO_MANIFEST_DIR")?;
    let ebpf = Path::new(&root).join("../agent-ebpf");
    let package = Package {
        name: "postern-ebpf",
        root_dir: ebpf.to_str().expect("the source path is UTF-8"),
        ..Package::default()
    };
    aya_build::build_ebpf([package], toolchain)
}

fn nightly_has_core() -> bool {
    let sysroot = Command::new("rustup")
        .args(["run", "nightly", "rustc", "--print", "sysroot"])
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
