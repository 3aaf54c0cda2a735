//! The files the machine starts with: enough to mount those of this machine.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use crate::{cmd, test};

/// What mounting this machine's files takes; the rest is loaded from them.
const MODULES: &[&str] = &["virtio_pci", "9p", "9pnet_virtio", "overlay"];
const BUSYBOX: &str = "/bin/busybox";

/// Collect the files in `dir` and pack them into `image`.
pub fn build(dir: &Path, image: &Path, release: &str, command: &[String]) -> Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("clear {}", dir.display()))?;
    }
    fs::create_dir_all(dir.join("modules"))?;
    fs::copy(BUSYBOX, dir.join("busybox")).with_context(|| format!("copy {BUSYBOX}"))?;

    let modules = cmd::output(
        Command::new(cmd::find("modprobe").context("there is no modprobe")?)
            .args(["--set-version", release, "--show-depends", "--all"])
            .args(MODULES),
    )?;
    let mut order = String::new();
    for module in in_order(&modules) {
        let name = module.file_name().context("a module without a name")?;
        let target = Path::new("modules").join(name);
        fs::copy(&module, dir.join(&target))
            .with_context(|| format!("copy {}", module.display()))?;
        order += &format!("{}\n", target.display());
    }
    fs::write(dir.join("order"), order)?;
    fs::write(dir.join("main"), include_str!("main.sh"))?;
    fs::write(dir.join("command"), script(command))?;
    let init = dir.join("init");
    fs::write(&init, include_str!("init.sh"))?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    pack(dir, image)
}

/// The modules that `modprobe --show-depends` would load, each once.
fn in_order(depends: &str) -> Vec<PathBuf> {
    let mut modules = Vec::new();
    for line in depends.lines() {
        // Other lines tell of what is built in.
        let Some(rest) = line.strip_prefix("insmod ") else {
            continue;
        };
        let module = PathBuf::from(rest.split_whitespace().next().unwrap_or_default());
        if !modules.contains(&module) {
            modules.push(module);
        }
    }
    modules
}

/// A shell script that becomes `command`, at the root of the repository.
fn script(command: &[String]) -> String {
    let mut script = format!(
        "cd {} || exit\n",
        quoted(&cmd::root().display().to_string())
    );
    for (name, value) in test::programs() {
        script += &format!("export {name}={}\n", quoted(&value));
    }
    let words: Vec<String> = command.iter().map(|word| quoted(word)).collect();
    script + &format!("exec {}\n", words.join(" "))
}

fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn pack(dir: &Path, image: &Path) -> Result<()> {
    let out = fs::File::create(image).with_context(|| format!("create {}", image.display()))?;
    let mut cpio = Command::new("cpio")
        .args(["--quiet", "--create", "--format=newc", "--null"])
        .current_dir(dir)
        .stdin(Stdio::piped())
        .stdout(out)
        .spawn()
        .context("cannot run cpio")?;
    let mut names = cpio.stdin.take().expect("stdin is piped");
    for name in ["init", "busybox", "main", "command", "order", "modules"] {
        names.write_all(format!("{name}\0").as_bytes())?;
    }
    for module in fs::read_dir(dir.join("modules"))? {
        let name = module?.file_name();
        names.write_all(format!("modules/{}\0", name.to_string_lossy()).as_bytes())?;
    }
    drop(names);
    if !cpio.wait()?.success() {
        bail!("cpio failed");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_loaded_once_and_in_order() {
        let depends =
            "insmod /m/ring.ko \ninsmod /m/virtio.ko a=b\nbuiltin pci\ninsmod /m/ring.ko\n";
        let modules = ["/m/ring.ko", "/m/virtio.ko"].map(PathBuf::from);
        assert_eq!(in_order(depends), modules);
    }

    #[test]
    fn words_survive_the_shell() {
        let words = ["printf", "%s", "it's $HOME"].map(quoted).join(" ");
        let out = cmd::output(Command::new("sh").args(["-c", &words]));
        assert_eq!(out.expect("the shell runs"), "it's $HOME");
    }
}
