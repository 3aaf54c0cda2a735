//! podman with Debian's runc, on one of the layouts of cgroup trees, with storage of its
//! own below a lab's directory.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use postern_tests::{Running, output, text};

/// How the machine has its cgroup trees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// A v2 tree alone, as distributions come today.
    Pure,
    /// Controllers on v1, and a v2 tree beside them.
    Hybrid,
}

pub struct Engine {
    storage: PathBuf,
    layout: Layout,
    /// Holds the mount namespace in which there is nothing but v2.
    holder: Option<Running>,
}

impl Engine {
    pub fn new(directory: &Path, layout: Layout) -> Result<Self> {
        let storage = directory.join("podman");
        std::fs::create_dir_all(&storage)?;
        let holder = match layout {
            Layout::Hybrid => {
                let hybrid = Path::new("/sys/fs/cgroup/unified/cgroup.procs").exists();
                if !hybrid || !Path::new("/sys/fs/cgroup/devices").exists() {
                    bail!("/sys/fs/cgroup is not hybrid here: v1 controllers, and v2 in `unified`");
                }
                None
            }
            Layout::Pure => {
                let mut unshare = Command::new("unshare");
                let script = "mount -t cgroup2 none /sys/fs/cgroup \
                              && echo mounted && exec sleep infinity";
                // Namespaces that are made later are to be seen there, too.
                unshare.args(["--mount", "--propagation", "slave", "sh", "-c", script]);
                let holder = Running::start(&mut unshare, directory.join("mounts.log"))?;
                holder.says("mounted")?;
                Some(holder)
            }
        };
        Ok(Self {
            storage,
            layout,
            holder,
        })
    }

    /// A program where the layout is as it should be.
    pub fn command(&self, program: &str) -> Command {
        match &self.holder {
            None => Command::new(program),
            Some(holder) => {
                let mut command = Command::new("nsenter");
                command.args(["--mount", "--target", &holder.pid().to_string(), program]);
                command
            }
        }
    }

    fn podman(&self) -> Command {
        let mut podman = self.command("podman");
        podman.arg("--root").arg(self.storage.join("root"));
        podman.arg("--runroot").arg(self.storage.join("run"));
        podman.arg("--tmpdir").arg(self.storage.join("tmp"));
        podman.args(["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs"]);
        podman.args(["--runtime", "runc", "--events-backend", "none"]);
        podman
    }

    /// The directory of the v2 tree as containers and agents here see it.
    pub fn cgroups(&self) -> &'static Path {
        Path::new(match self.layout {
            Layout::Pure => "/sys/fs/cgroup",
            Layout::Hybrid => "/sys/fs/cgroup/unified",
        })
    }

    /// An image out of an archive that `cargo xtask image` wrote; its name.
    pub fn load(&self, archive: &Path) -> Result<String> {
        let loaded = output(
            self.podman()
                .arg("load")
                .arg("--quiet")
                .arg("-i")
                .arg(archive),
        )?;
        let said = text(&loaded.stdout);
        let name = said
            .trim()
            .rsplit_once(": ")
            .map(|(_, name)| name.to_owned());
        name.with_context(|| format!("podman load said {said}"))
    }

    /// An image of programs of this machine and the libraries they need.
    pub fn image_of(&self, name: &str, programs: &[&str]) -> Result<()> {
        let root = self.storage.join(name);
        for program in programs {
            let mut files = vec![(*program).to_owned()];
            let libraries = Command::new("ldd").arg(program).output()?;
            let libraries = text(&libraries.stdout);
            files.extend(
                libraries
                    .split_whitespace()
                    .filter(|word| word.starts_with('/'))
                    .map(str::to_owned),
            );
            for file in files {
                let to = root.join(file.trim_start_matches('/'));
                std::fs::create_dir_all(to.parent().context("a file is in a directory")?)?;
                std::fs::copy(&file, to).with_context(|| file.clone())?;
            }
        }
        for (name, line) in [
            ("passwd", "root:x:0:0::/:/bin/sh\n"),
            ("group", "root:x:0:\n"),
        ] {
            std::fs::create_dir_all(root.join("etc"))?;
            std::fs::write(root.join("etc").join(name), line)?;
        }
        let archive = self.storage.join(format!("{name}.tar"));
        output(
            Command::new("tar")
                .arg("-C")
                .arg(&root)
                .arg("-cf")
                .arg(&archive)
                .arg("."),
        )?;
        output(
            self.podman()
                .args(["import", "--quiet"])
                .arg(&archive)
                .arg(name),
        )?;
        Ok(())
    }

    /// Starts a container; what it writes goes to a file that is returned.
    pub fn start(
        &self,
        name: &str,
        options: &[String],
        image: &str,
        command: &[&str],
    ) -> Result<PathBuf> {
        let log = self.storage.join(format!("{name}.log"));
        output(
            self.run(options)
                .args(["--detach", "--name", name, "--log-driver", "k8s-file"])
                .arg("--log-opt")
                .arg(format!("path={}", log.display()))
                .arg(image)
                .args(command),
        )?;
        Ok(log)
    }

    /// Runs a container to its end: exit code and what it wrote.
    pub fn once(&self, options: &[String], image: &str, command: &[&str]) -> Result<(i32, String)> {
        let mut run = self.run(options);
        let out = run.arg("--rm").arg(image).args(command).output()?;
        Ok((
            out.status.code().unwrap_or(-1),
            text(&out.stdout) + &text(&out.stderr),
        ))
    }

    /// What every container here has: no limits that this machine may not set.
    fn run(&self, options: &[String]) -> Command {
        let mut run = self.podman();
        run.args(["run", "--ipc", "none", "--pids-limit", "0"]);
        run.args([
            "--ulimit",
            "nofile=4096:4096",
            "--ulimit",
            "nproc=4096:4096",
        ]);
        run.args(options);
        run
    }

    pub fn kill(&self, name: &str) -> Result<()> {
        output(self.podman().args(["rm", "--force", "--time", "0", name]))?;
        Ok(())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _gone = self
            .podman()
            .args(["rm", "--all", "--force", "--time", "0"])
            .output();
    }
}
