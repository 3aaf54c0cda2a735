//! Debian packages.

use std::{cell::Cell, process::Command};

use anyhow::{Result, bail};

use crate::cmd;

/// Keeps Debian from starting the services it installs: the lab starts its own.
/// A shell does it because its trap also runs when the user interrupts.
const INSTALL: &str = r#"
set -eu
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 130' HUP INT TERM
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod 755 "$policy"
fi
DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 \
    install --yes --no-install-recommends "$@"
"#;

/// Installs packages; refreshes the package lists at most once.
#[derive(Default)]
pub struct Apt {
    fresh: Cell<bool>,
}

impl Apt {
    /// Whether a package of this name could be installed.
    pub fn has(&self, package: &str) -> Result<bool> {
        if cmd::find("apt-get").is_none() {
            return Ok(false);
        }
        self.refresh(&[package])?;
        let policy = cmd::output(
            Command::new("apt-cache")
                .env("LC_ALL", "C")
                .args(["policy", package]),
        )?;
        Ok(candidate(&policy))
    }

    /// Install `packages`, if there are any.
    pub fn install(&self, packages: &[&str]) -> Result<()> {
        if packages.is_empty() {
            return Ok(());
        }
        self.refresh(packages)?;
        println!("setup: installing from Debian: {}", packages.join(" "));
        let mut install = privileged("sh", packages)?;
        install.args(["-c", INSTALL, "apt-install"]).args(packages);
        cmd::run_quietly(&mut install)
    }

    fn refresh(&self, packages: &[&str]) -> Result<()> {
        if self.fresh.replace(true) {
            return Ok(());
        }
        let mut update = privileged("apt-get", packages)?;
        println!("setup: refreshing the package lists");
        cmd::run_quietly(update.args(["-qq", "update"]))
    }
}

/// Whether the output of `apt-cache policy` names a version to install.
fn candidate(policy: &str) -> bool {
    policy.lines().any(|line| {
        line.trim()
            .strip_prefix("Candidate:")
            .is_some_and(|version| version.trim() != "(none)")
    })
}

/// `program` with the rights of root, which `packages` are wanted for.
fn privileged(program: &str, packages: &[&str]) -> Result<Command> {
    if cmd::find("apt-get").is_none() {
        bail!(
            "there is no apt-get here; install what these Debian packages hold: {}",
            packages.join(" ")
        );
    }
    if cmd::is_root() {
        return Ok(Command::new(program));
    }
    if cmd::find("sudo").is_none() {
        bail!(
            "installing needs root and there is no sudo; as root run: apt-get install {}",
            packages.join(" ")
        );
    }
    let mut sudo = Command::new("sudo");
    sudo.arg(program);
    Ok(sudo)
}

/// Whether dpkg has `package` installed.
pub fn installed(package: &str) -> bool {
    Command::new("dpkg-query")
        .args(["-W", "-f=${db:Status-Status}\n", package])
        .output()
        .is_ok_and(|out| {
            out.stdout
                .split(|&byte| byte == b'\n')
                .any(|l| l == b"installed")
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_candidate_is_told_from_none() {
        assert!(candidate("pkg:\n  Installed: (none)\n  Candidate: 1.2-3\n"));
        assert!(!candidate(
            "pkg:\n  Installed: (none)\n  Candidate: (none)\n"
        ));
        assert!(!candidate(""));
    }

    #[test]
    fn packages_are_told_from_nonsense() {
        assert!(!installed("no-such-package-anywhere"));
    }
}
