//! The agent's own cgroup, by which the hooks know its connects.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::cgroup::{cgroup_mounts, directories, id};

/// The agent's cgroup as the hooks see it (`bpf_get_current_cgroup_id`); 0 when it cannot
/// be found.
pub fn own_cgroup(hooks: &Path) -> u64 {
    let text = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let path = text
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .unwrap_or_default();
    // The mount is the part of the hooks' path that the agent's own is relative to.
    let mounts = cgroup_mounts().unwrap_or_default();
    let mount = mounts
        .into_iter()
        .find(|m| m.v2 && hooks.starts_with(&m.path));
    let pid = std::process::id();
    let found = mount.and_then(|mount| {
        let named = mount.path.join(path);
        // In a container with a cgroup namespace of its own the name says nothing: there
        // every process is at the root.
        match holds(&named, pid) {
            true => Some(named),
            false => search(&mount.path, pid),
        }
    });
    found.and_then(|dir| id(&dir).ok()).unwrap_or(0)
}

fn holds(dir: &Path, pid: u32) -> bool {
    let processes = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    let pid = pid.to_string();
    processes.lines().any(|line| line == pid)
}

/// The directory at or below `dir` that a process is in.
fn search(dir: &Path, pid: u32) -> Option<PathBuf> {
    if holds(dir, pid) {
        return Some(dir.to_owned());
    }
    directories(dir).iter().find_map(|below| search(below, pid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_found_wherever_it_is() {
        let tmp = tempfile::tempdir().expect("directory");
        let at = |name: &str| tmp.path().join(name);
        for (dir, processes) in [
            ("", "1\n12\n"),
            ("a", ""),
            ("a/b", "7\n123\n"),
            ("c", "9\n"),
        ] {
            fs::create_dir_all(at(dir)).expect("made");
            fs::write(at(dir).join("cgroup.procs"), processes).expect("written");
        }
        assert_eq!(search(tmp.path(), 123), Some(at("a/b")));
        assert_eq!(search(tmp.path(), 12), Some(tmp.path().to_owned()));
        assert_eq!(search(tmp.path(), 3), None);
    }
}
