//! What the lab asks of the machine: programs, namespaces, cgroups.

use std::{
    fs::File,
    io::Write as _,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

/// A program of this project, beside the running one or named by the environment.
pub fn binary(name: &str) -> Result<PathBuf> {
    let variable = format!(
        "POSTERN_{}",
        if name == "postern" { "BIN" } else { "PROBE" }
    );
    if let Some(path) = std::env::var_os(&variable) {
        return Ok(path.into());
    }
    let own = std::env::current_exe()?;
    let beside = own
        .ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join(name))
        .find(|p| p.is_file());
    beside.with_context(|| format!("no {name} beside {}; set {variable}", own.display()))
}

/// Runs to its end and wants success.
pub fn output(command: &mut Command) -> Result<Output> {
    let result = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{command:?}"))?;
    if !result.status.success() {
        let (out, err) = (text(&result.stdout), text(&result.stderr));
        bail!("{command:?}: {}\n{out}{err}", result.status);
    }
    Ok(result)
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// `ip` commands within a namespace.
pub fn ip(netns: &str, commands: &[impl AsRef<str>]) -> Result<()> {
    let mut child = Command::new("ip")
        .args(["-n", netns, "-batch", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("ip (package iproute2)")?;
    let mut input = child.stdin.take().context("a pipe")?;
    for command in commands {
        writeln!(input, "{}", command.as_ref())?;
    }
    drop(input);
    let result = child.wait_with_output()?;
    if !result.status.success() {
        bail!("ip in {netns}: {}", text(&result.stderr));
    }
    Ok(())
}

pub fn add_netns(name: &str) -> Result<()> {
    output(Command::new("ip").args(["netns", "add", name]))?;
    ip(name, &["link set lo up"])?;
    let mut set = Command::new("ip");
    set.args(["netns", "exec", name, "sysctl", "-q", "-w"]);
    // Where the machine's default is BBR, all connections would be paced, and its timers be
    // what is measured. This one every kernel has, and allows in a namespace.
    set.arg("net.ipv4.tcp_congestion_control=reno");
    // An interface's own address is there at once, and not only when nobody has answered
    // for seconds that it is taken: a browser drops its connections when one comes.
    for all in ["all", "default"] {
        set.arg(format!("net.ipv6.conf.{all}.accept_dad=0"));
    }
    output(&mut set).map(drop)
}

pub fn netns_path(name: &str) -> PathBuf {
    Path::new("/run/netns").join(name)
}

/// The cgroup v2 mount of this machine.
pub fn cgroup_mount() -> Result<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts")?;
    mounts
        .lines()
        .filter_map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            (words.get(2) == Some(&"cgroup2")).then(|| PathBuf::from(words[1]))
        })
        .next()
        .context("no cgroup v2 is mounted")
}

/// A cgroup's path below the mount, as runtimes name it.
pub fn below_mount(cgroup: &Path) -> PathBuf {
    let mount = cgroup_mount().unwrap_or_default();
    cgroup.strip_prefix(mount).unwrap_or(cgroup).to_owned()
}

/// Puts a program into a cgroup and a network namespace before it starts.
pub fn place(command: &mut Command, cgroup: &Path, netns: &str) -> Result<()> {
    let procs = File::options()
        .write(true)
        .open(cgroup.join("cgroup.procs"))?;
    let namespace = OwnedFd::from(File::open(netns_path(netns))?);
    let enter = move || {
        // SAFETY: plain system calls on descriptors that outlive the fork.
        let joined = unsafe { nix::libc::write(procs.as_raw_fd(), c"0".as_ptr().cast(), 1) };
        if joined != 1 {
            return Err(std::io::Error::last_os_error());
        }
        nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
        Ok(())
    };
    // SAFETY: the closure makes system calls only.
    unsafe { command.pre_exec(enter) };
    Ok(())
}

/// A program that runs until dropped.
pub struct Running {
    pub child: Child,
    /// Where its standard output goes.
    pub log: PathBuf,
}

impl Running {
    pub fn start(command: &mut Command, log: PathBuf) -> Result<Self> {
        let file = File::options().create(true).append(true).open(&log)?;
        command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        let child = command.spawn().with_context(|| format!("{command:?}"))?;
        Ok(Self { child, log })
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) -> Result<()> {
        Ok(nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(self.pid()),
            signal,
        )?)
    }

    pub fn output(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until its output contains something.
    pub fn says(&self, what: &str) -> Result<()> {
        self.says_within(what, Duration::from_secs(20))
    }

    pub fn says_within(&self, what: &str, limit: Duration) -> Result<()> {
        crate::eventually(
            &format!("{} says {what:?}: {}", self.log.display(), self.output()),
            limit,
            || self.output().contains(what),
        )
        .with_context(|| self.output())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}
