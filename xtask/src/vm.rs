//! Debian's kernel in a virtual machine, with the files of this machine.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{
    cmd,
    profile::Profile,
    setup::{self, Tier},
    test::Count,
};

mod initramfs;
mod reboot;

/// The oldest kernel that is promised to work, as Debian 12 has it.
const KERNEL: &str = "6.1.";
const LIMIT: Duration = Duration::from_secs(30 * 60);
/// Everything is slow without hardware to help, so few tests run by default: what is
/// steered, and what is seen and by programs of an agent before, the latter two by both ways
/// that this kernel has.
const DEFAULT: [&str; 3] = ["smoke", "kernel::", "programs_stay_loaded"];
const BY_KPROBES: &str = "POSTERN_PROBES=kprobe";

/// The tier: the end-to-end tests on the older kernel.
pub fn test(filter: &[String]) -> Result<Count> {
    setup::ensure(&[Tier::Build, Tier::Lab, Tier::Vm])?;
    Profile::Quick.build()?;
    let mut count = Count::default();
    if filter != ["reboot"] {
        let lab = test_program("lab")?;
        let command = script(&lab, filter);
        let code = run(&command, &mut |line| count.line(line))?;
        if code != 0 {
            bail!("the tests ended with {code}");
        }
    }
    if reboot::wanted(filter) {
        reboot::test(&mut count)?;
    }
    count.verdict()
}

/// The tests that are asked for, or those that run by default, in one go: to boot takes
/// its time, too.
fn script(lab: &str, filter: &[String]) -> Vec<String> {
    let tests = |before: &str, filter: &[&str]| {
        let filter = filter.join(" ");
        format!("{before} {lab} {filter} --test-threads=1 --nocapture")
    };
    let filter: Vec<&str> = filter.iter().map(String::as_str).collect();
    let all = match &filter[..] {
        [] => [tests("", &DEFAULT), tests(BY_KPROBES, &DEFAULT[1..])].join(" && "),
        filter => tests("", filter),
    };
    ["sh", "-c", &all].map(str::to_owned).to_vec()
}

/// Run any command in the machine.
pub fn run_command(command: &[String]) -> Result<()> {
    setup::ensure(&[Tier::Vm])?;
    match run(command, &mut |_| ())? {
        0 => Ok(()),
        code => bail!("the command ended with {code}"),
    }
}

/// Build the test program `name` and find out where cargo put it.
fn test_program(name: &str) -> Result<String> {
    let mut build = Profile::Quick.cargo("test");
    build.args(["--test", name, "--no-run"]);
    build.arg("--message-format=json-render-diagnostics");
    executable(&cmd::output(&mut build)?, name)
        .with_context(|| format!("postern-tests has no test program {name}"))
}

/// The test program `name` among cargo's messages.
fn executable(messages: &str, name: &str) -> Option<String> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["target"]["name"] == name && message["profile"]["test"] == true)
        .find_map(|message| message["executable"].as_str().map(str::to_owned))
}

/// Boot, run `command` with what it prints going to `line`, and return its exit
/// code.
fn run(command: &[String], line: &mut dyn FnMut(&str)) -> Result<u8> {
    let machine = Machine::new(command)?;
    let kernel = machine.kernel_log.clone();
    machine.run(line)?.with_context(|| {
        format!(
            "the machine ended without running the command; see {}:\n{}",
            kernel.display(),
            tail(&fs::read(&kernel).unwrap_or_default())
        )
    })
}

/// A machine that runs one command and ends.
struct Machine {
    qemu: Command,
    console: PathBuf,
    kernel_log: PathBuf,
    status: PathBuf,
}

impl Machine {
    fn new(command: &[String]) -> Result<Self> {
        let dir = cmd::target().join("vm");
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        let release = newest_kernel(Path::new("/lib/modules"))?;
        let image = dir.join("initramfs.cpio");
        initramfs::build(&dir.join("initramfs"), &image, &release, command)?;
        let (kernel_log, status) = (dir.join("kernel.log"), dir.join("status"));
        // What an earlier run left must not pass for what this one says.
        let _ = fs::remove_file(&status);
        Ok(Self {
            qemu: qemu(&release, &image, &kernel_log, &status),
            console: dir.join("console.log"),
            kernel_log,
            status,
        })
    }

    /// Gives it a disk that outlives it.
    fn disk(&mut self, image: &Path) {
        let disk = format!("file={},format=raw,if=virtio", image.display());
        self.qemu.arg("-drive").arg(disk);
    }

    /// Boots; returns the command's exit code, or nothing where the machine ended before
    /// the command did.
    fn run(mut self, line: &mut dyn FnMut(&str)) -> Result<Option<u8>> {
        let mut log = File::create(&self.console).context("create the log of the console")?;
        let start = Instant::now();
        let ended = cmd::run_lines(&mut self.qemu, |text| {
            let text = text.trim_end_matches('\r');
            // The log is for reading later; the test does not depend on it.
            let _ = writeln!(log, "{text}");
            line(text);
        });
        if start.elapsed() >= LIMIT {
            bail!(
                "the machine was stopped after {} minutes",
                LIMIT.as_secs() / 60
            );
        }
        ended?;
        Ok(exit_code(
            &fs::read_to_string(&self.status).unwrap_or_default(),
        ))
    }
}

/// The virtual machine. Its serial ports are the kernel's console, the output of
/// the command, and its exit code.
fn qemu(release: &str, initramfs: &Path, kernel_log: &Path, status: &Path) -> Command {
    let mut qemu = cmd::bounded(LIMIT.as_secs(), "qemu-system-x86_64");
    qemu.stdin(Stdio::null());
    // Never the hardware's virtualisation: inside of another virtual machine it
    // may be offered and yet hang.
    qemu.args(["-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "3072"]);
    qemu.args(["-nodefaults", "-display", "none", "-no-reboot"]);
    qemu.arg("-kernel").arg(format!("/boot/vmlinuz-{release}"));
    qemu.arg("-initrd").arg(initramfs);
    qemu.args(["-append", "console=ttyS0 panic=-1"]);
    qemu.arg("-serial")
        .arg(format!("file:{}", kernel_log.display()));
    qemu.args(["-serial", "stdio"]);
    qemu.arg("-serial")
        .arg(format!("file:{}", status.display()));
    qemu.args([
        "-virtfs",
        "local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap",
    ]);
    qemu
}

/// What the machine wrote to the port for the exit code.
fn exit_code(status: &str) -> Option<u8> {
    status.trim().strip_prefix("exit ")?.parse().ok()
}

/// The newest kernel we promise to run on, of those that have modules.
fn newest_kernel(modules: &Path) -> Result<String> {
    let entries = fs::read_dir(modules).with_context(|| format!("read {}", modules.display()))?;
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|release| release.starts_with(KERNEL))
        .filter(|release| PathBuf::from(format!("/boot/vmlinuz-{release}")).is_file())
        .max_by_key(|release| numbers(release))
        .with_context(|| format!("no kernel {KERNEL}x is installed"))
}

/// The numbers in a release, which is what orders releases.
fn numbers(release: &str) -> Vec<u32> {
    let parts = release.split(|c: char| !c.is_ascii_digit());
    parts.filter_map(|part| part.parse().ok()).collect()
}

/// The last lines of a log.
fn tail(log: &[u8]) -> String {
    let text = String::from_utf8_lossy(log);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_written_exit_code_counts() {
        assert_eq!(exit_code("exit 0\r\n"), Some(0));
        assert_eq!(exit_code("exit 101\n"), Some(101));
        assert_eq!(exit_code(""), None);
        assert_eq!(exit_code("exit "), None);
    }

    #[test]
    fn releases_are_ordered_by_their_numbers() {
        assert!(numbers("6.1.0-56-amd64") > numbers("6.1.0-9-amd64"));
        assert!(newest_kernel(Path::new("/nonexistent")).is_err());
        assert!(newest_kernel(Path::new("/proc/self")).is_err());
    }

    #[test]
    fn the_test_program_is_told_from_others() {
        let messages = r#"
{"target":{"name":"lab"},"profile":{"test":false},"executable":"/a"}
{"target":{"name":"lab"},"profile":{"test":true},"executable":"/b"}
{"target":{"name":"demo"},"profile":{"test":true},"executable":"/c"}
not json"#;
        assert_eq!(executable(messages, "lab").as_deref(), Some("/b"));
        assert_eq!(executable(messages, "gone"), None);
    }
}
