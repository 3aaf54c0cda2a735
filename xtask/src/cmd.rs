//! Running other programs, and what they depend on.

use std::{
    env,
    io::{BufRead as _, BufReader},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

/// The root of the repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the crate is in a directory of the workspace")
}

/// Where cargo puts what it builds.
pub fn target() -> PathBuf {
    let target = env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    root().join(target)
}

/// `cargo` at the root of the repository.
pub fn cargo() -> Command {
    in_root(env::var_os("CARGO").map_or_else(|| "cargo".into(), PathBuf::from))
}

/// `program` at the root of the repository.
pub fn in_root(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(root());
    command
}

/// `program`, stopped when it takes more than `seconds`. It stays in the
/// foreground, so that an interrupt reaches it.
pub fn bounded(seconds: u64, program: &str) -> Command {
    let mut command = in_root("timeout");
    command.args(["--foreground", "--kill-after=5"]);
    command.arg(seconds.to_string()).arg(program);
    command
}

/// Show what is run, run it, and fail when it fails.
pub fn run(command: &mut Command) -> Result<()> {
    announce(command);
    let status = command
        .status()
        .with_context(|| format!("cannot run {}", shown(command)))?;
    if !status.success() {
        bail!("`{}` failed: {status}", shown(command));
    }
    Ok(())
}

/// Like [`run`], and hand each line of its output to `line` after printing it.
pub fn run_lines(command: &mut Command, mut line: impl FnMut(&str)) -> Result<()> {
    announce(command);
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", shown(command)))?;
    let stdout = child.stdout.take().expect("stdout is piped");
    for bytes in BufReader::new(stdout).split(b'\n') {
        let bytes = bytes.context("cannot read the output")?;
        let text = String::from_utf8_lossy(&bytes);
        println!("{text}");
        line(&text);
    }
    let status = child.wait().context("cannot wait")?;
    if !status.success() {
        bail!("`{}` failed: {status}", shown(command));
    }
    Ok(())
}

/// Run `command` and show what it says only when it fails.
pub fn run_quietly(command: &mut Command) -> Result<()> {
    let out = command
        .stdin(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run {}", shown(command)))?;
    if !out.status.success() {
        eprint!("{}", String::from_utf8_lossy(&out.stdout));
        eprint!("{}", String::from_utf8_lossy(&out.stderr));
        bail!("`{}` failed: {}", shown(command), out.status);
    }
    Ok(())
}

/// The output of `command`; its errors go where ours go.
pub fn output(command: &mut Command) -> Result<String> {
    let out = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run {}", shown(command)))?;
    if !out.status.success() {
        bail!("`{}` failed: {}", shown(command), out.status);
    }
    String::from_utf8(out.stdout).with_context(|| format!("output of {}", shown(command)))
}

/// Whether `command` succeeds; nothing it says is shown.
pub fn succeeds(command: &mut Command) -> bool {
    let quiet = command.stdout(Stdio::null()).stderr(Stdio::null());
    quiet.status().is_ok_and(|status| status.success())
}

fn announce(command: &Command) {
    eprintln!("+ {}", shown(command));
}

/// The command as one would type it.
fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str());
    let mut text = name.to_string_lossy().into_owned();
    for arg in command.get_args() {
        let arg = arg.to_string_lossy();
        text.push(' ');
        // Whole scripts are given as arguments, too.
        text.push_str(if arg.contains('\n') { "..." } else { &arg });
    }
    text
}

/// Where `program` is; system directories count even when PATH omits them, as
/// it does for ordinary users of Debian.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

/// Whether this process has the rights of root.
pub fn is_root() -> bool {
    // The owner of this entry is the process's effective user.
    std::fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0)
}

/// Fail unless run by root.
pub fn need_root(verb: &str) -> Result<()> {
    if !is_root() {
        bail!(
            "`cargo xtask {verb}` needs root: it makes network namespaces and cgroups and loads kernel programs"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_program_is_an_error() {
        assert!(run(&mut Command::new("true")).is_ok());
        assert!(run(&mut Command::new("false")).is_err());
        assert!(run(&mut Command::new("/nonexistent/program")).is_err());
        assert!(output(&mut Command::new("false")).is_err());
        assert!(run_lines(&mut Command::new("false"), |_| ()).is_err());
    }

    #[test]
    fn what_takes_too_long_is_stopped() {
        assert!(run(bounded(1, "sleep").arg("60")).is_err());
        assert!(run(bounded(60, "sleep").arg("0")).is_ok());
    }

    #[test]
    fn lines_are_handed_over() {
        let mut seen = Vec::new();
        let mut echo = Command::new("printf");
        run_lines(echo.arg("one\\ntwo\\n"), |line| seen.push(line.to_owned()))
            .expect("printf runs");
        assert_eq!(seen, ["one", "two"]);
    }

    #[test]
    fn programs_are_found() {
        assert!(find("sh").is_some());
        assert!(find("no-such-program-anywhere").is_none());
    }
}
