//! The image: one static program and nothing else.

use std::{env, fs, path::Path, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::{
    cmd,
    setup::{self, Tier},
};

/// Build the program and pack it as an archive named after `tag`.
pub fn run(tag: &str) -> Result<()> {
    setup::ensure(&[Tier::Build, Tier::Image])?;
    let program = build()?;
    let dir = cmd::target().join("image");
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let archive = dir.join("postern.tar");
    if archive.exists() {
        // An archive that is there would be added to.
        fs::remove_file(&archive).with_context(|| format!("remove {}", archive.display()))?;
    }

    let container = cmd::output(buildah(&dir).args(["from", "scratch"]))?;
    let container = container.trim();
    let packed = pack(&dir, container, &program, &archive, tag);
    let removed = cmd::run_quietly(buildah(&dir).args(["rm", container]));
    packed?;
    removed?;
    println!("image: {} holds {tag}", archive.display());
    Ok(())
}

/// Build the program without need of any library.
fn build() -> Result<std::path::PathBuf> {
    let target = format!("{}-unknown-linux-gnu", env::consts::ARCH);
    let variable = target.to_uppercase().replace('-', "_");
    let mut build = cmd::cargo();
    build.args(["build", "--release", "-p", "postern", "--bins"]);
    // With a target named, the flags leave build scripts and macros alone, which
    // cannot be static.
    build.args(["--target", &target]);
    build.env(
        format!("CARGO_TARGET_{variable}_RUSTFLAGS"),
        "-C target-feature=+crt-static",
    );
    cmd::run(&mut build)?;
    let program = cmd::target().join(target).join("release/postern");
    let headers = cmd::output(Command::new("readelf").args(["-lW"]).arg(&program))?;
    if headers.contains("INTERP") {
        bail!("{} is not static", program.display());
    }
    Ok(program)
}

fn pack(dir: &Path, container: &str, program: &Path, archive: &Path, tag: &str) -> Result<()> {
    let copy = ["copy", "--chmod", "0755", container];
    cmd::run_quietly(buildah(dir).args(copy).arg(program).arg("/postern"))?;
    let entry = [
        "config",
        "--entrypoint",
        r#"["/postern"]"#,
        "--cmd",
        "",
        container,
    ];
    cmd::run_quietly(buildah(dir).args(entry))?;
    let target = format!("oci-archive:{}:{tag}", archive.display());
    cmd::run_quietly(buildah(dir).args(["commit", container, &target]))
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
