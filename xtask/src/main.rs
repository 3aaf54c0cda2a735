//! The project's task runner: `cargo xtask <verb>`.

mod apt;
mod bench;
mod bpf;
mod cmd;
mod docs;
mod image;
mod lint;
mod manifests;
mod profile;
mod setup;
mod test;
mod vm;

use std::{ffi::OsString, process::ExitCode};

use anyhow::Result;
use clap::{CommandFactory as _, Parser, Subcommand};

use profile::Profile;
use setup::Tier;

/// Sets a machine up, builds, tests, lints and packs Postern.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Install what building and testing need; does nothing when all is there
    Setup {
        /// What the machine has to be ready for
        #[arg(long, value_enum, default_value = "all")]
        tier: Tier,
    },
    /// Build the agent, its kernel programs and the lab
    Build {
        /// Build with optimisations
        #[arg(long)]
        release: bool,
    },
    /// Run the demonstration (needs root)
    Demo {
        /// Arguments of the demonstration
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Run the tests: all tiers, or one of them
    Test {
        /// Run this tier only
        #[arg(value_enum)]
        tier: Option<test::Tier>,
        /// Run the tests whose name contains one of these
        filter: Vec<String>,
    },
    /// Check formatting, lints, dependencies and documents
    Lint,
    /// Write anew what is generated of the Kubernetes manifests
    Manifests,
    /// Run the benchmarks (needs root), or `policy`: what a decision costs
    Bench {
        /// `policy`, or arguments of the benchmarks
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Pack a static release binary as an OCI image
    Image {
        /// Name and tag of the image
        #[arg(long, default_value = "postern:latest")]
        tag: String,
        /// Machine that it is for; without it, this one
        #[arg(long, value_enum)]
        arch: Option<image::Arch>,
        /// Write what `docker load` reads, too
        #[arg(long)]
        docker: bool,
        /// Of a program as tests have it, built in a fraction of the time
        #[arg(long)]
        quick: bool,
    },
    /// Run one command in the virtual machine of the vm tier
    #[command(hide = true)]
    VmRun {
        /// The command, searched in the machine's PATH
        #[arg(required = true, last = true)]
        command: Vec<String>,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse().verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<()> {
    match verb {
        Verb::Setup { tier } => setup::run(tier),
        Verb::Build { release } => {
            setup::ensure(&[Tier::Build])?;
            let mut build = cmd::cargo();
            build.args(["build", "--workspace", "--exclude", "postern-ebpf"]);
            if release {
                build.arg("--release");
            }
            cmd::run(&mut build)
        }
        Verb::Demo { args } => bench::exec(Profile::Quick, "demo", &args),
        Verb::Test { tier, filter } => test::run(tier, &filter),
        Verb::Lint => lint::run(&verbs()),
        Verb::Manifests => manifests::update(),
        Verb::Bench { args } => bench::run(&args),
        Verb::Image {
            tag,
            arch,
            docker,
            quick,
        } => image::run(&image::Wanted {
            tag,
            arch,
            docker,
            profile: if quick {
                Profile::Quick
            } else {
                Profile::Release
            },
        })
        .map(|_made| ()),
        Verb::VmRun { command } => vm::run_command(&command),
    }
}

/// The verbs and the flags of each, which the documents are held to.
fn verbs() -> docs::Verbs {
    Cli::command()
        .get_subcommands()
        .map(|verb| {
            let flags = verb.get_arguments().filter_map(|arg| arg.get_long());
            let flags = flags.map(|flag| format!("--{flag}")).collect();
            (verb.get_name().to_owned(), flags)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_tier_may_be_followed_by_filters() {
        let cli = Cli::parse_from(["xtask", "test", "lab", "rotation", "policy"]);
        let Verb::Test { tier, filter } = cli.verb else {
            panic!("not parsed as test");
        };
        assert_eq!(tier, Some(test::Tier::Lab));
        assert_eq!(filter, ["rotation", "policy"]);
    }

    #[test]
    fn an_unknown_tier_is_refused() {
        assert!(Cli::try_parse_from(["xtask", "test", "smoke"]).is_err());
        assert!(Cli::try_parse_from(["xtask", "setup", "--tier", "smoke"]).is_err());
    }

    #[test]
    fn verbs_list_their_flags() {
        assert!(verbs()["setup"].contains("--tier"));
        assert!(!verbs()["lint"].contains("--tier"));
    }
}
