//! Where pods stand in the cgroup trees. The mounts are looked up, not assumed: a
//! hybrid host has v1 controllers beside a v2 tree, and some runtimes put
//! containers into v1 only.

use std::{
    collections::HashMap,
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupMount {
    pub path: PathBuf,
    pub v2: bool,
}

/// All cgroup mounts of this mount namespace, v2 first.
pub fn cgroup_mounts() -> io::Result<Vec<CgroupMount>> {
    Ok(parse_mounts(&std::fs::read_to_string("/proc/self/mounts")?))
}

fn parse_mounts(text: &str) -> Vec<CgroupMount> {
    let mut mounts: Vec<CgroupMount> = text
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (_device, path, kind) = (words.next()?, words.next()?, words.next()?);
            let v2 = kind == "cgroup2";
            (v2 || kind == "cgroup").then(|| CgroupMount {
                path: path.into(),
                v2,
            })
        })
        .collect();
    mounts.sort_by_key(|mount| !mount.v2);
    mounts
}

/// A cgroup's id, as `bpf_get_current_cgroup_id` has it: its inode.
pub fn id(path: &Path) -> io::Result<u64> {
    Ok(std::fs::metadata(path)?.ino())
}

/// A directory below which pods' directories lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodsRoot {
    pub path: PathBuf,
    pub v2: bool,
    /// Depth below the root of its cgroup mount.
    pub level: u32,
}

/// How deep the kubelet's directory is looked for: `kubelet/kubepods`,
/// `kubelet.slice/kubelet-kubepods.slice` and the like.
const SEARCH_DEPTH: u32 = 4;

/// The directories named `kubepods`, `kubepods.slice` or `*-kubepods.slice` below
/// the given ones.
pub fn find_pods_roots(mounts: &[CgroupMount], below: Option<&Path>) -> Vec<PodsRoot> {
    let mut roots = Vec::new();
    for mount in mounts {
        let start = match below {
            Some(dir) if dir.starts_with(&mount.path) => dir,
            Some(_) => continue,
            None => &mount.path,
        };
        let level = start
            .strip_prefix(&mount.path)
            .map_or(0, |p| p.components().count() as u32);
        search(start, mount.v2, level, SEARCH_DEPTH, &mut roots);
    }
    roots
}

fn search(dir: &Path, v2: bool, level: u32, depth: u32, roots: &mut Vec<PodsRoot>) {
    for path in directories(dir) {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let stem = name.strip_suffix(".slice").unwrap_or(&name);
        if stem == "kubepods" || stem.ends_with("-kubepods") {
            roots.push(PodsRoot {
                path,
                v2,
                level: level + 1,
            });
        } else if depth > 1 {
            search(&path, v2, level + 1, depth - 1, roots);
        }
    }
}

/// The pods' directories on this node.
#[derive(Clone, Debug, Default)]
pub struct Pods {
    pub roots: Vec<PodsRoot>,
}

/// The directories of one pod, one for each tree it stands in; whether it is v2.
pub type PodDirs = Vec<(PathBuf, bool)>;

impl Pods {
    /// All pods' directories by uid.
    pub fn scan(&self) -> HashMap<String, PodDirs> {
        let mut found: HashMap<String, PodDirs> = HashMap::new();
        for root in &self.roots {
            let classes = directories(&root.path).into_iter().filter(|d| !is_pod(d));
            for parent in std::iter::once(root.path.clone()).chain(classes) {
                for dir in directories(&parent) {
                    if let Some(uid) = pod_uid(&dir) {
                        found.entry(uid).or_default().push((dir, root.v2));
                    }
                }
            }
        }
        found
    }
}

fn is_pod(dir: &Path) -> bool {
    pod_uid(dir).is_some()
}

/// The uid in a pod's directory name: `pod<uid>` (cgroupfs driver), or
/// `kubepods[-<class>]-pod<uid with _ for ->.slice` (systemd driver).
fn pod_uid(dir: &Path) -> Option<String> {
    let name = dir.file_name()?.to_str()?;
    match name.strip_suffix(".slice") {
        Some(stem) => Some(stem.rsplit_once("-pod")?.1.replace('_', "-")),
        None => name.strip_prefix("pod").map(str::to_owned),
    }
}

/// The processes of a directory and all below it.
pub fn processes(dir: &Path) -> Vec<i32> {
    let own = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    let mut all: Vec<i32> = own.lines().filter_map(|pid| pid.parse().ok()).collect();
    for below in directories(dir) {
        all.extend(processes(&below));
    }
    all
}

pub(super) fn directories(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
        .map(|e| e.path())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_layouts_are_found_by_uid() {
        let tmp = tempfile::tempdir().expect("directory");
        let mount = CgroupMount {
            path: tmp.path().to_owned(),
            v2: true,
        };
        let uid = "0a1b2c3d-0000-4000-8000-00000000000f";
        let flat = uid.replace('-', "_");
        for (layout, level) in [
            (format!("kubepods/burstable/pod{uid}"), 1),
            (format!("kubepods/pod{uid}"), 1),
            (
                format!(
                    "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{flat}.slice"
                ),
                1,
            ),
            (format!("kubepods.slice/kubepods-pod{flat}.slice"), 1),
            (
                format!(
                    "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{flat}.slice"
                ),
                2,
            ),
            (format!("docker/k3d/kubepods/pod{uid}"), 3),
        ] {
            let dir = tmp.path().join(&layout);
            std::fs::create_dir_all(dir.join("container")).expect("made");
            let roots = find_pods_roots(std::slice::from_ref(&mount), None);
            assert_eq!(roots.len(), 1, "{layout}");
            assert_eq!(roots[0].level, level, "{layout}");
            let pods = Pods { roots };
            let found = pods.scan();
            assert_eq!(found.len(), 1, "{layout}");
            assert_eq!(found[uid], [(dir, true)], "{layout}");
            std::fs::remove_dir_all(tmp.path().join(layout.split('/').next().expect("first")))
                .expect("removed");
        }
    }

    #[test]
    fn mounts_are_v2_first() {
        let text = "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\nproc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        let mounts = parse_mounts(text);
        assert_eq!(mounts.len(), 2);
        assert!(mounts[0].v2 && mounts[0].path.ends_with("unified"));
    }
}
