//! The static program. For this machine it is linked from the very objects that were
//! built and tested: that the C library is linked statically is decided at the last link
//! alone, which cargo cannot repeat with other flags without building everything anew.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{
    cmd,
    profile::Profile,
    setup::{self, Tier},
};

const STATIC: &str = "target-feature=+crt-static";
/// Symbols are two thirds of the program; who needs them builds it again.
const STRIP: &str = "strip=symbols";

const CROSS: &str = "aarch64-unknown-linux-gnu";
/// Debian's compiler, where it has the other machine's standard library.
const DEBIAN: &str = "/usr/lib/rustlib/aarch64-unknown-linux-gnu/lib";

/// The agent's package, as `cargo metadata` has it, with `deps`: what its code may name.
pub fn package() -> Result<Value> {
    let mut metadata = cmd::cargo();
    metadata.args(["metadata", "--format-version=1"]);
    let text = cmd::output(&mut metadata)?;
    agent(&serde_json::from_str(&text).context("cargo metadata")?)
        .context("cargo metadata does not know the package postern")
}

fn agent(metadata: &Value) -> Option<Value> {
    let packages = metadata["packages"].as_array()?;
    let mut package = packages.iter().find(|p| p["name"] == "postern")?.clone();
    let nodes = metadata["resolve"]["nodes"].as_array()?;
    let node = nodes.iter().find(|n| n["id"] == package["id"])?;
    package["deps"] = node["deps"].clone();
    Some(package)
}

/// Builds what is not built yet, and links the program once more, as `program`.
pub fn again(profile: Profile, package: &Value, program: &Path) -> Result<()> {
    let mut build = profile.cargo("build");
    build.args(["--bins", "--message-format=json-render-diagnostics"]);
    let built = Built::new(&cmd::output(&mut build)?);

    let mut rustc = cmd::in_root("rustc");
    rustc.args(["--crate-name", "postern", "--crate-type", "bin"]);
    rustc.args([
        "--edition",
        "2024",
        "agent/src/main.rs",
        "--cap-lints",
        "allow",
    ]);
    rustc.args(["-C", "opt-level=2", "-C", STATIC, "-C", STRIP]);
    rustc.arg("-L").arg(dependencies(profile));
    for path in &built.native {
        rustc.arg("-L").arg(path);
    }
    let own = package["id"].as_str().context("an id")?;
    let named = package["deps"].as_array().context("dependencies")?;
    let named = named
        .iter()
        .filter_map(|dependency| Some((dependency["name"].as_str()?, dependency["pkg"].as_str()?)));
    for (name, id) in named.chain([("postern", own)]) {
        if let Some(library) = built.libraries.get(id) {
            rustc.arg("--extern");
            rustc.arg(format!("{name}={}", library.display()));
        }
    }
    for key in ["name", "version", "description"] {
        let value = package[key].as_str().unwrap_or_default();
        rustc.env(format!("CARGO_PKG_{}", key.to_uppercase()), value);
    }
    eprintln!("+ rustc -C {STATIC} agent/src/main.rs");
    cmd::run_quietly(rustc.arg("-o").arg(program))
}

fn dependencies(profile: Profile) -> String {
    let deps = profile.directory().join("deps");
    format!("dependency={}", deps.display())
}

/// What cargo said that it built, or had.
#[derive(Debug, Default)]
struct Built {
    /// By package. Of one that was built for build scripts, too, the other.
    libraries: HashMap<String, PathBuf>,
    /// Where build scripts said that native libraries are.
    native: Vec<String>,
}

impl Built {
    fn new(messages: &str) -> Self {
        let mut built = Self::default();
        let messages = messages
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok());
        for message in messages {
            let message: Value = message;
            let Some(id) = message["package_id"].as_str() else {
                continue;
            };
            let list = |key: &str| message[key].as_array().cloned().unwrap_or_default();
            let paths = list("linked_paths");
            built
                .native
                .extend(paths.iter().filter_map(|p| Some(p.as_str()?.to_owned())));
            let files = list("filenames");
            let mut files = files.iter().filter_map(Value::as_str);
            let Some(library) = files.find(|file| file.ends_with(".rlib")) else {
                continue;
            };
            // Build scripts and what they use are not optimised.
            let optimised = message["profile"]["opt_level"] != "0";
            if optimised || !built.libraries.contains_key(id) {
                built.libraries.insert(id.to_owned(), library.into());
            }
        }
        built
    }
}

/// Builds the program for the other machine: everything anew, in a directory of its own.
pub fn cross(profile: Profile, program: &Path) -> Result<()> {
    let toolchain = cross_toolchain()?;
    setup::ensure(&[Tier::Cross])?;
    let mut build = match toolchain {
        None => cmd::cargo(),
        Some(name) => {
            let mut build = cmd::in_root("rustup");
            build.args(["run", name, "cargo"]);
            build
        }
    };
    build.args(["build", "--profile", profile.name()]);
    build.args(["-p", "postern", "--bins", "--target", CROSS]);
    build.env(
        "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER",
        "aarch64-linux-gnu-gcc",
    );
    build.env(
        "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS",
        format!("-C {STATIC} -C {STRIP}"),
    );
    // The allocator must know the largest page that a kernel there may have: 64 KiB.
    build.env("JEMALLOC_SYS_WITH_LG_PAGE", "16");
    cmd::run(&mut build)?;
    let built = cmd::target().join(CROSS);
    let built = built.join(profile.name()).join("postern");
    fs::copy(&built, program)
        .with_context(|| format!("copy {} to {}", built.display(), program.display()))?;
    Ok(())
}

/// The toolchain that has the other machine's standard library; `None`: the one in use.
fn cross_toolchain() -> Result<Option<&'static str>> {
    let sysroot = cmd::output(cmd::in_root("rustc").args(["--print", "sysroot"]))?;
    let own = Path::new(sysroot.trim()).join("lib/rustlib").join(CROSS);
    if own.join("lib").is_dir() {
        return Ok(None);
    }
    let linked = cmd::succeeds(Command::new("rustup").args(["run", "postern-bpf", "rustc", "-V"]));
    if linked && Path::new(DEBIAN).is_dir() {
        return Ok(Some("postern-bpf"));
    }
    bail!(
        "there is no standard library of Rust for {CROSS} here; get it by\n  \
         rustup target add {CROSS}\nor, with Debian's compiler, as root by\n  \
         dpkg --add-architecture arm64 && apt-get update && apt-get install libstd-rust-web-dev:arm64"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_for_the_program_are_told_from_those_of_build_scripts() {
        let built = Built::new(
            r#"
{"reason":"compiler-artifact","package_id":"a","profile":{"opt_level":"3"},"filenames":["/d/liba-1.rlib","/d/liba-1.rmeta"]}
{"reason":"compiler-artifact","package_id":"a","profile":{"opt_level":"0"},"filenames":["/d/liba-2.rlib"]}
{"reason":"compiler-artifact","package_id":"b","profile":{"opt_level":"0"},"filenames":["/d/libb-1.rlib"]}
{"reason":"compiler-artifact","package_id":"b","profile":{"opt_level":"0"},"filenames":["/d/postern"]}
{"reason":"compiler-artifact","package_id":"m","profile":{"opt_level":"0"},"filenames":["/d/libm.so"]}
{"reason":"build-script-executed","package_id":"a","linked_paths":["native=/out"]}
not json"#,
        );
        assert_eq!(built.libraries["a"], Path::new("/d/liba-1.rlib"));
        assert_eq!(built.libraries["b"], Path::new("/d/libb-1.rlib"));
        assert!(!built.libraries.contains_key("m"));
        assert_eq!(built.native, ["native=/out"]);
    }

    #[test]
    fn the_agents_package_comes_with_its_dependencies() {
        let metadata = serde_json::json!({
            "packages": [{"name": "postern", "id": "p", "version": "1"}],
            "resolve": {"nodes": [{"id": "x", "deps": []}, {"id": "p", "deps": [{"name": "d"}]}]},
        });
        let package = agent(&metadata).expect("found");
        assert_eq!(package["deps"][0]["name"], "d");
        assert!(agent(&serde_json::json!({})).is_none());
    }
}
