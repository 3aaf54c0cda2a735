//! The tools that build the kernel programs: a toolchain with `core` for the
//! BPF target, and `bpf-linker`.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Result, bail};

use crate::{apt::Apt, cmd};

pub const TARGET: &str = "bpfel-unknown-none";
const LINKED: &str = "postern-bpf";
/// Debian's compiler, and `core` built for BPF by it.
const DEBIAN: &[&str] = &["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf"];
const DEBIAN_CORE: &str = "/usr/lib/rustlib/bpfel-unknown-none/lib";
/// What `bpf-linker` is built with. Its LLVM must not be older than the
/// compiler's, or it cannot read what that wrote.
const LLVM: &[(&str, &str)] = &[
    ("llvm-22-dev", "/usr/lib/llvm-22/bin/llvm-config"),
    ("libpolly-22-dev", "/usr/lib/llvm-22/lib/libPolly.a"),
    ("zlib1g-dev", "/usr/include/zlib.h"),
    ("libzstd-dev", "/usr/include/zstd.h"),
];
const LLVM_PREFIX: &str = "/usr/lib/llvm-22";
const LLVM_FEATURE: &str = "llvm-22";
/// How many seconds the sources of `core`, or a toolchain with them, may take to
/// arrive.
const FETCH_SOURCES: u64 = 60;
const FETCH_TOOLCHAIN: u64 = 900;
/// How long a failure to fetch them is remembered.
const REMEMBER: Duration = Duration::from_secs(60 * 60);

/// A toolchain that has `core` for the BPF target. The agent's build script
/// chooses in the same order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Core {
    /// Debian's compiler, which has `core` built, linked as a toolchain.
    Linked,
    /// A nightly with the sources of `core`, which cargo builds. Its LLVM may be
    /// newer than the one `bpf-linker` was built with.
    Nightly,
}

impl Core {
    pub fn toolchain(self) -> &'static str {
        match self {
            Core::Linked => LINKED,
            Core::Nightly => "nightly",
        }
    }

    /// The one that is ready for use.
    pub fn found() -> Option<Self> {
        let linked = toolchains().join(LINKED);
        if debian_core() && linked.join("bin/rustc").is_file() {
            return Some(Core::Linked);
        }
        let source = |dir: PathBuf| dir.join("lib/rustlib/src/rust/library/core").is_dir();
        nightly().is_some_and(source).then_some(Core::Nightly)
    }
}

/// What is missing and how it will be got.
pub struct Plan {
    core: Route,
    linker: bool,
}

#[derive(PartialEq, Eq)]
enum Route {
    Ready,
    Debian,
    Rustup,
}

impl Plan {
    /// Find out what is missing; add the packages that brings to `packages`.
    pub fn new(apt: &Apt, packages: &mut Vec<&'static str>) -> Result<Self> {
        let linker = cmd::find("bpf-linker").is_none();
        if linker {
            let absent = LLVM.iter().filter(|(_, file)| !Path::new(file).exists());
            packages.extend(absent.map(|(package, _)| package));
        }
        let found = Core::found();
        // A nightly that works already is not worth asking apt at every turn.
        let settled = found == Some(Core::Linked) || (found.is_some() && !linker);
        let core = if settled {
            Route::Ready
        } else if debian_core() {
            Route::Debian
        } else if apt.has(DEBIAN[2])? {
            packages.extend(DEBIAN);
            Route::Debian
        } else if found.is_some() {
            Route::Ready
        } else {
            Route::Rustup
        };
        Ok(Self { core, linker })
    }

    /// Do what installing packages did not.
    pub fn finish(&self) -> Result<()> {
        match self.core {
            Route::Ready => {}
            Route::Debian => link()?,
            Route::Rustup => fetch()?,
        }
        if self.linker {
            println!("setup: building bpf-linker");
            cmd::run(
                Command::new("cargo")
                    .env("LLVM_PREFIX", LLVM_PREFIX)
                    .args(["install", "--quiet", "--locked", "bpf-linker"])
                    .args(["--version", "^0.13", "--no-default-features"])
                    .args(["--features", LLVM_FEATURE]),
            )?;
            if cmd::find("bpf-linker").is_none() {
                bail!("bpf-linker was installed but is not on PATH: add cargo's bin directory");
            }
        }
        Ok(())
    }
}

/// Make Debian's compiler known to rustup, which is how builds name it.
fn link() -> Result<()> {
    println!("setup: linking Debian's compiler as the toolchain {LINKED}");
    cmd::run_quietly(Command::new("rustup").args(["toolchain", "link", LINKED, "/usr"]))?;
    if Core::found() != Some(Core::Linked) {
        bail!("{DEBIAN_CORE} and the toolchain {LINKED} are there but of no use");
    }
    Ok(())
}

/// Fetch the sources of `core` for the nightly toolchain.
fn fetch() -> Result<()> {
    let marker = cmd::target().join("xtask/no-rust-src");
    let failed = fs::metadata(&marker).and_then(|meta| meta.modified());
    if failed.is_ok_and(|at| at.elapsed().is_ok_and(|age| age < REMEMBER)) {
        bail!(
            "no toolchain has `core` for {TARGET}, and fetching rust-src failed less than an hour ago; remove {} to try again",
            marker.display()
        );
    }
    let mut rustup;
    if nightly().is_some() {
        println!("setup: fetching rust-src for the nightly toolchain");
        rustup = cmd::bounded(FETCH_SOURCES, "rustup");
        rustup.args(["component", "add", "rust-src", "--toolchain", "nightly"]);
    } else {
        println!("setup: fetching a nightly toolchain with rust-src");
        rustup = cmd::bounded(FETCH_TOOLCHAIN, "rustup");
        rustup.args(["toolchain", "install", "nightly", "--profile", "minimal"]);
        rustup.args(["--no-self-update", "--component", "rust-src"]);
    }
    let fetched = cmd::run(&mut rustup);
    if fetched.is_ok() && Core::found() == Some(Core::Nightly) {
        return Ok(());
    }
    fs::create_dir_all(marker.parent().expect("a file in a directory"))?;
    fs::write(&marker, "")?;
    fetched?;
    bail!("rustup fetched rust-src but the nightly toolchain does not have it")
}

fn debian_core() -> bool {
    let built = |entry: fs::DirEntry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        name.starts_with("libcore-") && name.ends_with(".rlib")
    };
    Path::new("/usr/bin/rustc").is_file()
        && Path::new("/usr/bin/cargo").is_file()
        && fs::read_dir(DEBIAN_CORE).is_ok_and(|dir| dir.flatten().any(built))
}

fn nightly() -> Option<PathBuf> {
    let host = format!("nightly-{}-unknown-linux-gnu", env::consts::ARCH);
    Some(toolchains().join(host)).filter(|dir| dir.join("bin/rustc").is_file())
}

fn toolchains() -> PathBuf {
    let home = env::var_os("RUSTUP_HOME").map(PathBuf::from);
    let home = home.or_else(|| env::home_dir().map(|home| home.join(".rustup")));
    home.unwrap_or_default().join("toolchains")
}
