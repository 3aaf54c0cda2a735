//! Who a process is: kept from what the kernel told at its exec, because a short one
//! is gone from `/proc` by the time that it is asked for.

use std::{
    collections::{HashMap, VecDeque},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use aws_lc_rs::digest::{SHA256, digest};

use super::seen::{Parent, Process};
use crate::{
    identity::hex,
    kernel::{cgroup_id, cgroup_mounts, pids, text},
};

/// Processes that are known at once; the oldest are forgotten first.
const MOST: usize = 32_768;
/// How long an ended process is still known: its last connections end after it.
const GRACE: Duration = Duration::from_secs(10);

/// What an exec told of a process.
pub struct Exec<'a> {
    pub pid: u32,
    pub uid: u32,
    pub comm: &'a str,
    pub path: &'a str,
    pub argv: &'a [u8],
    pub parent: Option<(u32, String)>,
    pub cgroup: Option<String>,
}

#[derive(Default)]
pub struct Processes(Mutex<Known>);

#[derive(Default)]
struct Known {
    by_pid: HashMap<u32, (u64, Arc<Process>)>,
    /// In the order in which they came; entries that were replaced are stale.
    order: VecDeque<(u32, u64)>,
    ended: VecDeque<(Instant, u32, u64)>,
    next: u64,
    /// Paths of containers' cgroups, by id.
    cgroups: HashMap<u64, String>,
}

/// Cgroups that are known at once.
const MOST_CGROUPS: usize = 4_096;

impl Processes {
    /// A process has a new program. Says who it is now.
    pub fn exec(&self, exec: Exec<'_>) -> Arc<Process> {
        let Exec {
            pid,
            uid,
            comm,
            path,
            argv,
            parent,
            cgroup,
        } = exec;
        let process = Arc::new(Process {
            pid,
            uid,
            comm: comm.to_owned(),
            exe: Some(path.to_owned()),
            argv: (!argv.is_empty()).then(|| argv_hash(argv)),
            container: cgroup.as_deref().and_then(container),
            cgroup,
            parent: parent.map(|(pid, comm)| Parent { pid, comm }),
        });
        let mut known = self.lock();
        known.insert(process.clone());
        known.forget(Instant::now());
        process
    }

    /// It has ended. Says who it was, if that is known.
    pub fn exit(&self, pid: u32) -> Option<Arc<Process>> {
        let mut known = self.lock();
        let (number, process) = known.by_pid.get(&pid)?.clone();
        known.ended.push_back((Instant::now(), pid, number));
        Some(process)
    }

    /// Who made a system call, by what the kernel noted of it, for the record. What an exec
    /// told counts only while the user is the same: the number may have become another's.
    pub fn of(&self, pid: u32, uid: u32, comm: &str) -> Arc<Process> {
        if let Some((_, known)) = self.lock().by_pid.get(&pid)
            && known.uid == uid
        {
            let mut process = known.clone();
            // A thread may have a name of its own.
            if process.comm != comm {
                Arc::make_mut(&mut process).comm = comm.to_owned();
            }
            return process;
        }
        Arc::new(look(pid, uid, comm))
    }

    /// Path of a cgroup in the v2 tree: by a process in it, or below its pod's directories.
    pub fn cgroup(&self, id: u64, pid: u32, dirs: &[PathBuf]) -> Option<String> {
        if let Some(path) = self.lock().cgroups.get(&id) {
            return Some(path.clone());
        }
        let found = cgroup_of(pid).or_else(|| below(dirs, id))?;
        let mut known = self.lock();
        if known.cgroups.len() >= MOST_CGROUPS {
            known.cgroups.clear();
        }
        known.cgroups.insert(id, found.clone());
        Some(found)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.0.lock().expect("no panic while it is held")
    }
}

impl Known {
    fn insert(&mut self, process: Arc<Process>) {
        self.next += 1;
        self.order.push_back((process.pid, self.next));
        self.by_pid.insert(process.pid, (self.next, process));
    }

    fn forget(&mut self, now: Instant) {
        while let Some((at, pid, number)) = self.ended.front().copied()
            && now.duration_since(at) > GRACE
        {
            self.ended.pop_front();
            self.remove(pid, number);
        }
        while self.order.len() > MOST {
            if let Some((pid, number)) = self.order.pop_front() {
                self.remove(pid, number);
            }
        }
    }

    fn remove(&mut self, pid: u32, number: u64) {
        if self.by_pid.get(&pid).is_some_and(|(n, _)| *n == number) {
            self.by_pid.remove(&pid);
        }
    }
}

/// The program that a process runs now; `None`: it is gone. What an exec told is the name
/// that was asked for, which may be relative or a link: decisions go by this.
pub fn executable(pid: u32) -> Option<String> {
    // Of another namespace, the id would be another process's.
    let path = pids::shared()
        .then(|| std::fs::read_link(format!("/proc/{pid}/exe")))?
        .ok()?;
    Some(path.to_string_lossy().into_owned())
}

/// What `/proc` still tells.
fn look(pid: u32, uid: u32, comm: &str) -> Process {
    if !pids::shared() {
        return Process {
            pid,
            uid,
            comm: comm.to_owned(),
            ..Process::default()
        };
    }
    let proc = |what: &str| format!("/proc/{pid}/{what}");
    let cgroup = cgroup_of(pid);
    let argv = std::fs::read(proc("cmdline")).unwrap_or_default();
    Process {
        pid,
        uid,
        comm: comm.to_owned(),
        exe: executable(pid),
        argv: (!argv.is_empty()).then(|| argv_hash(&argv)),
        container: cgroup.as_deref().and_then(container),
        cgroup,
        parent: parent(&proc("stat")),
    }
}

/// The v2 line begins with "0::" (cgroups(7)).
fn cgroup_of(pid: u32) -> Option<String> {
    let cgroups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let own = cgroups.lines().find_map(|line| line.strip_prefix("0::"));
    own.map(str::to_owned)
}

/// The directory with this id, in or below a pod's.
fn below(dirs: &[PathBuf], id: u64) -> Option<String> {
    let found = dirs.iter().find_map(|dir| directory(dir, id, 3))?;
    let mounts = cgroup_mounts().ok()?;
    let path = mounts
        .iter()
        .filter(|mount| mount.v2)
        .find_map(|mount| found.strip_prefix(&mount.path).ok())?;
    Some(format!("/{}", path.display()))
}

fn directory(dir: &Path, id: u64, depth: u32) -> Option<PathBuf> {
    if cgroup_id(dir).is_ok_and(|own| own == id) {
        return Some(dir.to_owned());
    }
    let deeper = depth.checked_sub(1)?;
    let entries = std::fs::read_dir(dir).ok()?.flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .find_map(|entry| directory(&entry.path(), id, deeper))
}

/// The fourth field of `/proc/PID/stat`; the second may hold anything, in parentheses
/// (proc_pid_stat(5)).
fn parent(stat: &str) -> Option<Parent> {
    let stat = std::fs::read_to_string(stat).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    let pid: u32 = rest.split_whitespace().nth(1)?.parse().ok()?;
    let comm = std::fs::read(format!("/proc/{pid}/comm")).ok()?;
    Some(Parent {
        pid,
        comm: text(comm.strip_suffix(b"\n").unwrap_or(&comm)),
    })
}

/// What the kernel's probe takes of the arguments; longer ones are told by their
/// beginning, from `/proc` as well.
const ARGV: usize = 2048;

fn argv_hash(argv: &[u8]) -> String {
    let digest = digest(&SHA256, &argv[..argv.len().min(ARGV)]);
    hex(&digest.as_ref()[..8])
}

/// The id in a container's directory: 64 hexadecimal digits, with what runtimes put
/// around them (`cri-containerd-<id>.scope`, `crio-<id>.scope`, `docker-<id>.scope`).
fn container(cgroup: &str) -> Option<String> {
    let name = Path::new(cgroup).file_name()?.to_str()?;
    let name = name.strip_suffix(".scope").unwrap_or(name);
    let id = name.rsplit(['-', ':']).next()?;
    let is_id = id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit());
    is_id.then(|| id.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exec(pid: u32, path: &str) -> Exec<'_> {
        Exec {
            pid,
            uid: 1000,
            comm: "prog",
            path,
            argv: b"prog\0--key\0secret\0",
            parent: Some((1, "init".into())),
            cgroup: None,
        }
    }

    #[test]
    fn a_process_is_known_after_it_is_gone() {
        let processes = Processes::default();
        let pid = u32::MAX - 1;
        let told = processes.exec(exec(pid, "/bin/prog"));
        assert_eq!(told.argv.as_deref().map(str::len), Some(16));
        assert_eq!(processes.exit(pid), Some(told.clone()));
        let thread = processes.of(pid, 1000, "worker");
        assert_eq!(thread.exe.as_deref(), Some("/bin/prog"));
        assert_eq!(thread.comm, "worker");
        // Another user's: the number was given again.
        assert_eq!(processes.of(pid, 0, "other").exe, None);
        assert_eq!(processes.exit(7), None);
    }

    #[test]
    fn what_proc_tells_is_what_exec_tells() {
        let own = std::process::id();
        let seen = look(own, 0, "test");
        let argv = std::fs::read("/proc/self/cmdline").expect("procfs");
        assert_eq!(seen.argv, Some(argv_hash(&argv)));
        assert!(seen.exe.is_some() && seen.parent.is_some());
    }

    #[test]
    fn the_number_of_processes_is_bounded() {
        let processes = Processes::default();
        for pid in 0..(MOST as u32 + 10) {
            processes.exec(exec(pid, "/bin/prog"));
        }
        let known = processes.lock();
        assert_eq!(known.by_pid.len(), MOST);
        assert!(!known.by_pid.contains_key(&9));
        assert!(known.by_pid.contains_key(&10));
    }

    #[test]
    fn containers_are_told_by_their_directory() {
        let id = "0123456789abcdef".repeat(4);
        for name in [
            format!("/kubepods/burstable/pod1/{id}"),
            format!("/kubepods.slice/kubepods-pod1.slice/cri-containerd-{id}.scope"),
            format!("/kubepods.slice/kubepods-pod1.slice/crio-{id}.scope"),
            format!("/system.slice/kubepods-pod1.slice:cri-containerd:{id}"),
        ] {
            assert_eq!(container(&name).as_ref(), Some(&id), "{name}");
        }
        assert_eq!(container("/kubepods/burstable/pod1/app"), None);
        assert_eq!(container("/"), None);
    }
}
