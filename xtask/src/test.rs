//! The three tiers of tests.

use std::{fmt, fs, path::Path};

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::{cmd, image, profile::Profile, setup, vm};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Tier {
    /// Within one process
    Unit,
    /// End to end, in namespaces of this machine (needs root), in containers, and beside
    /// Envoy
    Lab,
    /// End to end on Debian's kernel, in a virtual machine
    Vm,
}

/// What test programs said about their tests.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Count {
    passed: u32,
    failed: u32,
    ignored: u32,
}

impl Count {
    /// Take a line of output into account.
    pub fn line(&mut self, line: &str) {
        // With --nocapture this line may follow what a test printed.
        let Some((_, result)) = line.split_once("test result: ") else {
            return;
        };
        for part in result.split(['.', ';']) {
            match part.trim().split_once(' ') {
                Some((count, "passed")) => self.passed += count.parse().unwrap_or(0),
                Some((count, "failed")) => self.failed += count.parse().unwrap_or(0),
                Some((count, "ignored")) => self.ignored += count.parse().unwrap_or(0),
                _ => {}
            }
        }
    }

    /// A tier passes only if tests ran, none was left out and none failed.
    pub fn verdict(self) -> Result<Self> {
        if self.failed > 0 {
            bail!("{} tests failed", self.failed);
        }
        if self.ignored > 0 {
            bail!("{} tests were left out as ignored", self.ignored);
        }
        if self.passed == 0 {
            bail!("no test ran");
        }
        Ok(self)
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed", self.passed)
    }
}

/// Run one tier or all, and end with a line on each.
pub fn run(only: Option<Tier>, filter: &[String]) -> Result<()> {
    let tiers = only.map_or_else(|| Tier::value_variants().to_vec(), |tier| vec![tier]);
    let mut summary = Vec::new();
    let mut failed = false;
    for tier in tiers {
        let result = match tier {
            Tier::Unit => unit(filter),
            Tier::Lab => lab(filter),
            Tier::Vm => vm::test(filter),
        };
        failed |= result.is_err();
        let name = format!("{tier:?}").to_lowercase();
        summary.push(match result {
            Ok(count) => format!("{name:5} ok      {count}"),
            Err(error) => format!("{name:5} FAILED  {error:#}"),
        });
    }
    println!();
    for line in summary {
        println!("{line}");
    }
    if failed {
        bail!("tests failed");
    }
    Ok(())
}

fn unit(filter: &[String]) -> Result<Count> {
    setup::ensure(&[setup::Tier::Build, setup::Tier::Unit])?;
    let mut count = Count::default();
    let mut test = Profile::Quick.cargo("test");
    test.args(["--lib", "--bins", "--no-fail-fast", "--"])
        .args(filter);
    cmd::run_lines(&mut test, |line| count.line(line))?;
    count.verdict()
}

fn lab(filter: &[String]) -> Result<Count> {
    let lacking = lacking(Path::new("/"));
    if !lacking.is_empty() {
        bail!("cannot run here: {}", lacking.join(", "));
    }
    setup::ensure(&[setup::Tier::Build, setup::Tier::Lab])?;
    Profile::Quick.build()?;
    let image = image::run(&image::Wanted {
        tag: "localhost/postern:test".into(),
        arch: None,
        docker: false,
        profile: Profile::Quick,
    })?;
    let mut count = Count::default();
    let image = [("POSTERN_IMAGE", image.archive.display().to_string())];
    let all = ["lab", "envoy", "containers"];
    let first = lab_run(&all, filter, &image, &mut count);
    let again: Vec<String> = AGAIN
        .iter()
        .flat_map(|module| narrowed(module, filter))
        .collect();
    if !again.is_empty() {
        println!("again, with pods and policies from an API server, and HBONE to the second node:");
        let ways = [
            ("POSTERN_LAB_SOURCE", "kubernetes".to_owned()),
            ("POSTERN_LAB_FAST_PATH", "mixed".to_owned()),
        ];
        lab_run(&all[..1], &again, &ways, &mut count)?;
        println!("again, with HBONE alone:");
        let hbone = [("POSTERN_LAB_FAST_PATH", "off".to_owned())];
        lab_run(&all[..1], &again, &hbone, &mut count)?;
    }
    first?;
    count.verdict()
}

/// Modules of the lab that must pass whatever agents have pods and policies from, and
/// however they carry connections.
const AGAIN: &[&str] = &[
    "addresses",
    "enrolment",
    "identity",
    "lifecycle",
    "operate",
    "outbound",
    "policy",
    "programs",
    "smoke",
    "streams",
];

/// Of a module, what a filter asks for: all without one, else what names the module.
fn narrowed(module: &str, filter: &[String]) -> Vec<String> {
    let all = format!("{module}::");
    if filter.is_empty() {
        return vec![all];
    }
    let ours = |word: &&String| word.starts_with(&all) || **word == *module;
    filter.iter().filter(ours).cloned().collect()
}

fn lab_run(
    programs_of_tests: &[&str],
    filter: &[String],
    more: &[(&str, String)],
    count: &mut Count,
) -> Result<()> {
    let mut test = Profile::Quick.cargo("test");
    for program in programs_of_tests {
        test.args(["--test", program]);
    }
    test.arg("--no-fail-fast");
    test.args(["--", "--test-threads=2"]).args(filter);
    test.envs(programs()).env("POSTERN_ENVOY", setup::envoy());
    test.env("POSTERN_TOOLS", setup::tools());
    test.envs(more.iter().cloned());
    cmd::run_lines(&mut test, |line| count.line(line))
}

/// Where the tests find the programs under test.
pub fn programs() -> [(&'static str, String); 2] {
    let path = |name| {
        let program = Profile::Quick.directory().join(name);
        program.display().to_string()
    };
    [
        ("POSTERN_BIN", path("postern")),
        ("POSTERN_PROBE", path("probe")),
    ]
}

/// What the machine whose files are below `root` lacks for the lab.
fn lacking(root: &Path) -> Vec<&'static str> {
    let there = |path: &str| root.join(path).exists();
    let mounts = fs::read_to_string(root.join("proc/self/mounts")).unwrap_or_default();
    let cgroup2 = mounts
        .lines()
        .any(|mount| mount.split(' ').nth(2) == Some("cgroup2"));
    [
        (cmd::is_root(), "not root"),
        (cgroup2, "no cgroup2 is mounted"),
        (there("sys/kernel/btf/vmlinux"), "the kernel has no BTF"),
        (
            there("proc/self/ns/net"),
            "the kernel has no network namespaces",
        ),
    ]
    .into_iter()
    .filter_map(|(fulfilled, lack)| (!fulfilled).then_some(lack))
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OK: &str = "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 7 filtered out; finished in 0.00s";

    fn counted(lines: &[&str]) -> Count {
        let mut count = Count::default();
        lines.iter().for_each(|line| count.line(line));
        count
    }

    #[test]
    fn results_add_up() {
        let count = counted(&["running 3 tests", OK, "noise", OK]);
        assert_eq!(count.verdict().expect("passes").passed, 6);
    }

    #[test]
    fn a_result_is_seen_behind_other_output() {
        assert_eq!(counted(&[&format!("half a line{OK}")]).passed, 3);
    }

    #[test]
    fn nothing_run_is_a_failure() {
        assert!(counted(&[]).verdict().is_err());
        assert!(
            counted(&["test result: ok. 0 passed; 0 failed; 0 ignored"])
                .verdict()
                .is_err()
        );
    }

    #[test]
    fn failed_and_ignored_tests_are_failures() {
        let failed = "test result: FAILED. 2 passed; 1 failed; 0 ignored";
        assert!(counted(&[OK, failed]).verdict().is_err());
        let ignored = "test result: ok. 2 passed; 0 failed; 1 ignored";
        assert!(counted(&[OK, ignored]).verdict().is_err());
    }

    #[test]
    fn what_is_asked_for_is_run_again_by_module() {
        let filter = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
        assert_eq!(narrowed("smoke", &[]), ["smoke::"]);
        assert_eq!(
            narrowed("policy", &filter(&["policy", "half_close"])),
            ["policy"]
        );
        assert_eq!(narrowed("policy", &filter(&["policy::a"])), ["policy::a"]);
        assert!(narrowed("policy", &filter(&["half_close"])).is_empty());
    }

    #[test]
    fn an_unfit_machine_is_told_all_it_lacks() {
        let lacking = lacking(Path::new("/nonexistent"));
        assert!(lacking.contains(&"no cgroup2 is mounted"));
        assert!(lacking.contains(&"the kernel has no BTF"));
    }
}
