//! Where pods stand in the cgroup trees. The mounts are looked up, not assumed: a
//! hybrid host has v1 controllers beside a v2 tree, and some runtimes put
//! containers into v1 only.

use std::{
    collections::{HashMap, HashSet},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use postern_ebpf::SOME_LEVEL;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupMount {
    pub path: PathBuf,
    pub v2: bool,
    /// Whether it shows the whole tree, and not the inside of a cgroup namespace.
    pub whole: bool,
}

/// All cgroup mounts of this mount namespace, each tree once; v2 first, and of these
/// the whole one. A container has one of its own, beside what it is given of the node's.
pub fn cgroup_mounts() -> io::Result<Vec<CgroupMount>> {
    /// Inode of the tree's own root.
    const ROOT: u64 = 1;
    let mut mounts = parse_mounts(&std::fs::read_to_string("/proc/self/mounts")?);
    let mut seen = HashSet::new();
    mounts.retain_mut(|mount| {
        let Ok(about) = std::fs::metadata(&mount.path) else {
            return false;
        };
        mount.whole = about.ino() == ROOT;
        seen.insert((about.dev(), about.ino()))
    });
    mounts.sort_by_key(|mount| (!mount.v2, !mount.whole));
    Ok(mounts)
}

fn parse_mounts(text: &str) -> Vec<CgroupMount> {
    let mounts = text.lines().filter_map(|line| {
        let mut words = line.split(' ');
        let (_device, path, kind) = (words.next()?, words.next()?, words.next()?);
        let v2 = kind == "cgroup2";
        (v2 || kind == "cgroup").then(|| CgroupMount {
            path: path.into(),
            v2,
            whole: true,
        })
    });
    mounts.collect()
}

/// The cgroup that this process is in, as the hooks see it: looked for, where what
/// `/proc/self/cgroup` says is relative to a cgroup namespace that this mount does not
/// begin with.
pub fn own(mount: &Path) -> Option<u64> {
    let listed = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let path = listed.lines().find_map(|line| line.strip_prefix("0::/"));
    let here = mount.join(path.unwrap_or_default());
    let own = std::process::id() as i32;
    let dir = if members(&here).contains(&own) {
        here
    } else {
        holder(mount, own)?
    };
    id(&dir).ok()
}

fn holder(dir: &Path, pid: i32) -> Option<PathBuf> {
    if members(dir).contains(&pid) {
        return Some(dir.to_owned());
    }
    directories(dir).iter().find_map(|below| holder(below, pid))
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
    /// Depth below the root of the tree; [`SOME_LEVEL`] where that is out of sight.
    pub level: u32,
}

/// How deep the kubelet's directory is looked for: `kubelet/kubepods` (kind),
/// `kubelet.slice/kubelet-kubepods.slice` (kind, systemd driver), `docker/ID/kubepods`
/// (k3d, seen from its host), and below a `--cgroup-root`.
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
        let before = roots.len();
        search(start, mount.v2, level, SEARCH_DEPTH, &mut roots);
        if !mount.whole {
            for root in &mut roots[before..] {
                root.level = SOME_LEVEL;
            }
        }
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
    /// All pods' directories by uid. A Guaranteed pod's lies in the root itself, others'
    /// in the directory of their class (kubelet `pkg/kubelet/cm`).
    pub fn scan(&self) -> HashMap<String, PodDirs> {
        let mut found: HashMap<String, PodDirs> = HashMap::new();
        for root in &self.roots {
            for class in ["", "burstable", "besteffort"] {
                let Some(names) = Names::of(&root.path, class) else {
                    continue;
                };
                for dir in directories(&names.parent) {
                    if let Some(uid) = names.uid(&dir) {
                        found.entry(uid).or_default().push((dir, root.v2));
                    }
                }
            }
        }
        found
    }
}

/// How the pods of one class are named.
struct Names {
    parent: PathBuf,
    before: String,
    /// What follows the uid: `.slice`, or nothing.
    after: &'static str,
}

impl Names {
    /// `ROOT/CLASS/podUID` (cgroupfs driver), or each directory named after all above
    /// it: `kubepods.slice/kubepods-CLASS.slice/kubepods-CLASS-podUID.slice` (systemd).
    fn of(root: &Path, class: &str) -> Option<Self> {
        let name = root.file_name()?.to_str()?;
        Some(match (name.strip_suffix(".slice"), class) {
            (None, _) => Self {
                parent: root.join(class),
                before: "pod".into(),
                after: "",
            },
            (Some(stem), "") => Self {
                parent: root.to_owned(),
                before: format!("{stem}-pod"),
                after: ".slice",
            },
            (Some(stem), class) => Self {
                parent: root.join(format!("{stem}-{class}.slice")),
                before: format!("{stem}-{class}-pod"),
                after: ".slice",
            },
        })
    }

    /// Systemd's names have `_` for the uid's `-`, which would be a level to it.
    fn uid(&self, dir: &Path) -> Option<String> {
        let name = dir.file_name()?.to_str()?;
        let uid = name.strip_prefix(&self.before)?.strip_suffix(self.after)?;
        let uid = match self.after {
            "" => uid.to_owned(),
            _ => uid.replace('_', "-"),
        };
        (!uid.is_empty()).then_some(uid)
    }
}

/// The processes of a directory and all below it.
pub fn processes(dir: &Path) -> Vec<i32> {
    let mut all = members(dir);
    for below in directories(dir) {
        all.extend(processes(&below));
    }
    all
}

/// When a process began, in ticks since the machine did (`/proc/PID/stat`, field 22);
/// of one that is gone, never.
pub fn started(pid: i32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The second field may contain anything, and ends with the last bracket.
    let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks = rest.split_whitespace().nth(19);
    ticks
        .and_then(|ticks| ticks.parse().ok())
        .unwrap_or(u64::MAX)
}

fn members(dir: &Path) -> Vec<i32> {
    let own = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    own.lines().filter_map(|pid| pid.parse().ok()).collect()
}

fn directories(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
        .map(|e| e.path())
        .collect()
}

#[cfg(test)]
mod tests;
