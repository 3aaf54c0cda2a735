//! Removes what labs made, by name: every name begins with the process that made
//! it, so that a living lab is never touched.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use crate::host;

pub const PREFIX: &str = "ptl";
pub const BPF: &str = "/sys/fs/bpf";

/// Removes all labs of a process.
pub fn sweep(pid: u32) {
    for id in ids() {
        if owner(&id) == Some(pid) {
            remove(&id);
        }
    }
}

/// Removes the labs of processes that are gone.
pub fn sweep_dead() {
    for id in ids() {
        if owner(&id).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            remove(&id);
        }
    }
}

fn owner(id: &str) -> Option<u32> {
    id.strip_prefix(PREFIX)?.split('-').next()?.parse().ok()
}

/// Identifiers of all labs that left anything: `ptl<pid>-<sequence>`.
fn ids() -> Vec<String> {
    let mut ids = Vec::new();
    let cgroups = host::cgroup_mount().ok();
    let dirs = [
        Some(Path::new("/run/netns").to_owned()),
        cgroups,
        Some(BPF.into()),
        Some("/tmp".into()),
    ];
    for name in dirs.into_iter().flatten().flat_map(|dir| names(&dir)) {
        let id: Vec<&str> = name.splitn(3, '-').take(2).collect();
        let sequence = id.get(1).map(|s| {
            s.chars()
                .take_while(char::is_ascii_digit)
                .collect::<String>()
        });
        if let (Some(_), Some(sequence)) = (owner(&name), sequence) {
            let id = format!("{}-{sequence}", id[0]);
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
    }
    ids
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with(PREFIX))
        .collect()
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

/// Removes one lab: processes, pins, namespaces, cgroups, files.
pub fn remove(id: &str) {
    let ours = |name: &String| {
        name.strip_prefix(id)
            .is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    if let Ok(mount) = host::cgroup_mount() {
        let dir = mount.join(id);
        let _none_left = fs::write(dir.join("cgroup.kill"), "1");
        remove_cgroup(&dir);
    }
    // What a container runtime made beside it on a hybrid host.
    for mount in entries(Path::new("/sys/fs/cgroup")) {
        remove_cgroup(&mount.join(id));
    }
    for name in names(Path::new(BPF)).iter().filter(|n| ours(n)) {
        let _gone = fs::remove_dir_all(Path::new(BPF).join(name));
    }
    for name in names(Path::new("/run/netns")).iter().filter(|n| ours(n)) {
        let _gone = Command::new("ip")
            .args(["netns", "del", name])
            .stderr(std::process::Stdio::null())
            .status();
    }
    for name in names(Path::new("/tmp")).iter().filter(|n| ours(n)) {
        let _gone = fs::remove_dir_all(Path::new("/tmp").join(name));
    }
}

/// Removes a cgroup and all below it; processes that are ending take a moment.
pub fn remove_cgroup(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    for _ in 0..100 {
        match fs::remove_dir(dir) {
            Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => {
                std::thread::sleep(Duration::from_millis(10));
            }
            _ => return,
        }
    }
}
