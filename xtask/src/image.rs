//! The image: one static program and nothing else. Neither certificates nor a passwd
//! file: the program has Mozilla's roots built in, and resolves names by `/etc/hosts` and
//! `/etc/resolv.conf`, which the runtime puts there.
//!
//! What goes in is what the same sources, toolchain and cargo home make again: no time of
//! this build, no name of this host or directory, no version of the tool that packs.

mod link;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;
use serde_json::Value;

use crate::{
    cmd,
    profile::Profile,
    setup::{self, Tier},
};

/// Machines that the image is for, as images name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Arch {
    Amd64,
    Arm64,
}

impl Arch {
    /// This machine's.
    pub fn host() -> Result<Self> {
        match env::consts::ARCH {
            "x86_64" => Ok(Self::Amd64),
            "aarch64" => Ok(Self::Arm64),
            other => bail!("no image is made for {other}"),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }
}

/// What is made of the program.
pub struct Wanted {
    /// Name and tag of the image.
    pub tag: String,
    pub arch: Option<Arch>,
    /// Whether to write what `docker load` reads, too.
    pub docker: bool,
    pub profile: Profile,
}

/// The program and the archives.
pub struct Made {
    pub archive: PathBuf,
    pub digest: String,
}

/// Build the program and pack it as an archive named after the tag.
pub fn run(wanted: &Wanted) -> Result<Made> {
    setup::ensure(&[Tier::Build, Tier::Image])?;
    let arch = wanted.arch.map_or_else(Arch::host, Ok)?;
    let dir = cmd::target().join("image").join(arch.name());
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let program = dir.join("postern");
    let package = link::package()?;
    if arch == Arch::host()? {
        link::again(wanted.profile, &package, &program)?;
    } else {
        link::cross(wanted.profile, &program)?;
    }
    let headers = cmd::output(Command::new("readelf").args(["-lW"]).arg(&program))?;
    if headers.contains("INTERP") {
        bail!("{} is not static", program.display());
    }

    let container = cmd::output(buildah(&dir).args(["from", "scratch"]))?;
    let container = container.trim();
    let packed = pack(&dir, container, &program, &package, arch)
        .and_then(|image| export(&dir, &image, wanted));
    let removed = cmd::run_quietly(buildah(&dir).args(["rm", container]));
    let made = packed?;
    removed?;
    let size = |path: &Path| fs::metadata(path).map_or(0, |meta| meta.len() / 1_000_000);
    println!(
        "image: {} {} {} is {}, {} MB, of which the program unpacked is {} MB",
        wanted.tag,
        arch.name(),
        made.digest,
        made.archive.display(),
        size(&made.archive),
        size(&program)
    );
    Ok(made)
}

/// Makes an image in buildah's storage and returns its id.
fn pack(
    dir: &Path,
    container: &str,
    program: &Path,
    package: &Value,
    arch: Arch,
) -> Result<String> {
    let copy = ["copy", "--chmod", "0755", container];
    cmd::run_quietly(buildah(dir).args(copy).arg(program).arg("/postern"))?;
    let mut config = buildah(dir);
    config.args(["config", "--entrypoint", r#"["/postern"]"#, "--cmd", ""]);
    config.args(["--os", "linux", "--arch", arch.name()]);
    config.args(["--created-by", "cargo xtask image"]);
    let text = |key: &str| package[key].as_str().unwrap_or_default().to_owned();
    let labels = [
        ("title", "postern".to_owned()),
        ("description", text("description")),
        ("version", text("version")),
        ("licenses", text("license")),
        ("revision", revision().unwrap_or_default()),
    ];
    for (label, value) in labels.iter().filter(|(_, value)| !value.is_empty()) {
        config.arg("--label");
        config.arg(format!("org.opencontainers.image.{label}={value}"));
    }
    cmd::run_quietly(config.arg(container))?;
    let mut commit = buildah(dir);
    commit.args(["commit", "--quiet", "--format", "oci"]);
    commit.args(["--identity-label=false", "--timestamp", &epoch()?]);
    Ok(cmd::output(commit.arg(container))?.trim().to_owned())
}

/// Writes the archives that are asked for, and forgets the image.
fn export(dir: &Path, image: &str, wanted: &Wanted) -> Result<Made> {
    let archive = |kind: &str| dir.join(format!("postern.{kind}.tar"));
    let digest = dir.join("digest");
    let mut kinds = vec!["oci"];
    if wanted.docker {
        kinds.push("docker");
    }
    for kind in kinds {
        let path = archive(kind);
        if path.exists() {
            // An archive that is there would be added to.
            fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
        }
        let to = format!("{kind}-archive:{}:{}", path.display(), wanted.tag);
        let mut push = buildah(dir);
        push.args(["push", "--quiet"]);
        if kind == "oci" {
            push.arg("--digestfile").arg(&digest);
        }
        cmd::run_quietly(push.args([image, &to]))?;
    }
    cmd::run_quietly(buildah(dir).args(["rmi", image]))?;
    let digest = fs::read_to_string(&digest).context("the image's digest")?;
    Ok(Made {
        archive: archive("oci"),
        digest: digest.trim().to_owned(),
    })
}

/// The commit that is packed; `None` outside of a repository. That there are changes on
/// top of it is part of its name.
fn revision() -> Option<String> {
    let mut describe = cmd::in_root("git");
    describe.args([
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty",
        "--exclude=*",
    ]);
    let out = describe.output().ok().filter(|out| out.status.success())?;
    Some(String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

/// The time of everything in the image, seconds since 1970: SOURCE_DATE_EPOCH
/// (reproducible-builds.org), or that of the commit.
fn epoch() -> Result<String> {
    let given = env::var("SOURCE_DATE_EPOCH").ok();
    let mut log = cmd::in_root("git");
    let text = match given {
        Some(given) => given,
        None => cmd::output(log.args(["log", "-1", "--format=%ct"]))
            .context("no commit to take the time of: set SOURCE_DATE_EPOCH")?,
    };
    let seconds: u64 = text.trim().parse().with_context(|| {
        format!(
            "SOURCE_DATE_EPOCH: {:?} is no number of seconds",
            text.trim()
        )
    })?;
    Ok(seconds.to_string())
}

/// `buildah` with storage of its own, by the driver that works on any
/// filesystem.
fn buildah(dir: &Path) -> Command {
    let mut buildah = cmd::in_root("buildah");
    buildah.args(["--storage-driver", "vfs"]);
    buildah.arg("--root").arg(dir.join("storage"));
    buildah.arg("--runroot").arg(dir.join("run"));
    buildah
}
