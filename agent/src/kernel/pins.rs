//! What is pinned: links, maps and programs. Capture stays when the
//! agent dies: connects are refused then, and never leave in plaintext. The next
//! agent takes over the maps, and only when it has told them all that it knows
//! ([`Kernel::commit`]) its programs take the place of the old ones, link by link. Where
//! the old links hang on another cgroup, its own stand beside them until then (a connect
//! that is steered twice stays steered once: the second sees loopback). At no time is a
//! hook missing.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File, TryLockError},
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::Mutex,
};

use aya::{
    EbpfError,
    maps::{MapData, MapError, RingBuf},
    pin::PinError,
    programs::{
        ProgramError, SkLookup,
        links::{FdLink, LinkError},
    },
};
use postern_ebpf::{ABI, RANGES};

use super::{
    guard,
    kept::{Loaded, Source},
    link::{self, Place},
    maps::Maps,
    netns::Netns,
    observers::{Blind, Seen},
    start::{HOOKS, LOOKUP, one_of},
};
use crate::config;

const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("cannot load the kernel programs: {0}")]
    Load(#[from] EbpfError),
    #[error("program {name}: {source}")]
    Program {
        name: &'static str,
        source: ProgramError,
    },
    #[error("program {name}: {source}")]
    Link {
        name: &'static str,
        source: LinkError,
    },
    #[error("the kernel programs lack the program {0}")]
    NoProgram(&'static str),
    #[error("map {name}: {source}")]
    Map {
        name: &'static str,
        source: MapError,
    },
    #[error(
        "{0} ranges of pod addresses, adjacent ones taken as one; at most {max} have room: \
         name wider ones in kubernetes.podCidrs", max = RANGES
    )]
    TooManyRanges(usize),
    #[error("cannot pin {path}: {source}")]
    Pin { path: PathBuf, source: PinError },
    #[error("{path}: {source}")]
    Path { path: PathBuf, source: io::Error },
    #[error("{0} is held by another agent; only one can run on a node")]
    Busy(PathBuf),
}

pub struct Kernel {
    pub(super) maps: Maps,
    /// `sk_lookup` is attached to each pod that comes.
    pub(super) programs: Mutex<Loaded>,
    /// Whose observers these are, as `CONFIG` says whose are to tell.
    pub observer: u64,
    /// What is to be kept for the next agent; `None`: it is what an earlier one has kept.
    pub(super) keep: Option<Seen>,
    pub(super) source: Source,
    pub(super) links: PathBuf,
    pub(super) maps_dir: PathBuf,
    /// Hooks that are pinned, but not in their place yet.
    pub(super) beside: Mutex<Vec<&'static str>>,
    /// What is not seen of pods, and why.
    pub blind: Vec<Blind>,
    /// Sockets that an earlier agent followed, by namespace, until it is known which of
    /// them are still open.
    pub(super) inherited: Mutex<HashMap<u64, Vec<u64>>>,
    /// Sockets that were followed and not open when they were looked for last.
    pub(super) missed: Mutex<HashSet<u64>>,
    /// Where the hooks hang.
    pub(super) root: Place,
    /// Released when the agent ends, however it ends. `None`: an agent that is still in
    /// charge has it, or the next one.
    pub(super) lock: Mutex<Option<File>>,
}

impl Kernel {
    /// Leaves the programs loaded when this agent ends, for the next one.
    pub fn keep(&self) {
        let Some(seen) = &self.keep else {
            return;
        };
        let mut programs = self
            .programs
            .lock()
            .expect("no panic while programs are held");
        if let Err(error) = self.source.keep(self.observer, seen, programs.all()) {
            tracing::warn!(%error, "the next agent has to load its programs anew");
        }
    }

    /// What an earlier agent has kept is attached by that one for as long as it drains: not
    /// for another.
    pub fn forget_kept(&self) {
        self.source.forget();
    }

    /// The kernel's events, from where the last reader stopped: there may be one at a time.
    pub fn events(&self) -> Result<RingBuf<MapData>, KernelError> {
        let fail = |source| KernelError::Map {
            name: "EVENTS",
            source,
        };
        let map = MapData::from_pin(self.maps_dir.join("EVENTS")).map_err(fail)?;
        RingBuf::try_from(aya::maps::Map::RingBuf(map)).map_err(fail)
    }

    /// Whether the ends of sockets are told of.
    pub fn sees_sockets(&self) -> bool {
        !self.blind.iter().any(|blind| blind.part == "sockets")
    }

    /// Puts this agent's hooks in the place of an earlier one's, once the maps say all
    /// that they should.
    pub fn commit(&self) -> Result<(), KernelError> {
        let programs = self
            .programs
            .lock()
            .expect("no panic while programs are held");
        let mut beside = super::maps::hold(&self.beside);
        // Where old ones stand beside, what they steer is still found when they are gone.
        for name in HOOKS.into_iter().filter(|name| *name != LOOKUP) {
            if beside.contains(&name) {
                // The one in charge has not waited, and removed it.
                let path = fresh(name, &self.links);
                fs::metadata(&path).map_err(|source| KernelError::Path { path, source })?;
                replace_pin(name, &self.links)?;
                beside.retain(|other| *other != name);
                continue;
            }
            let program = programs.get(name).ok_or(KernelError::NoProgram(name))?;
            let program = program
                .fd()
                .map_err(|source| KernelError::Program { name, source })?;
            let path = self.links.join(name);
            match link::update(&path, self.root, program.as_fd()) {
                Ok(true) => {}
                Ok(false) => {
                    let source = io::Error::other("was taken away while this agent ran");
                    return Err(KernelError::Path { path, source });
                }
                Err(source) => return Err(KernelError::Path { path, source }),
            }
        }
        guard::lift(&self.links);
        Ok(())
    }

    /// Another agent was to be in charge, and is not: this one's hooks are in their places
    /// again, and what that one has pinned beside them is gone.
    pub fn resume(&self) -> Result<(), KernelError> {
        self.commit()?;
        for name in HOOKS {
            let path = fresh(name, &self.links);
            if let Some(link) = link::Link::at(&path) {
                fs::remove_file(&path).map_err(|source| KernelError::Path { path, source })?;
                link.detach();
            }
        }
        Ok(())
    }

    /// Removes maps of other shapes, which no hook uses any more.
    pub fn remove_other_maps(&self) {
        remove_other_maps(&self.maps_dir);
    }

    /// Where this agent's maps are pinned, for what must be the same in the next one.
    pub fn maps_dir(&self) -> &Path {
        &self.maps_dir
    }

    /// The lock of the agent in charge, for the next one: it is never free in between.
    pub fn lend_lock(&self) -> io::Result<File> {
        match &*super::maps::hold(&self.lock) {
            Some(lock) => lock.try_clone(),
            None => Err(io::Error::other("another agent is in charge")),
        }
    }

    /// Takes the lock over, or lets go of it.
    pub fn set_lock(&self, lock: Option<File>) {
        *super::maps::hold(&self.lock) = lock;
    }

    /// Hands a pod's inbound connections to the agent from now on.
    pub fn attach_lookup(&self, netns: &Netns) -> Result<(), KernelError> {
        let mut programs = self
            .programs
            .lock()
            .expect("no panic while programs are held");
        let mut all = programs.all();
        let program: &mut SkLookup = one_of(&mut all, LOOKUP)?;
        let fail = |source| KernelError::Program {
            name: LOOKUP,
            source,
        };
        let name = lookup_name(netns.cookie);
        let path = self.links.join(&name);
        // An inode of a namespace has 32 bits.
        let place = Place::Netns(netns.inode as u32);
        let own = program.fd().map_err(fail)?;
        let updated = link::update(&path, place, own.as_fd());
        if !updated.map_err(|source| KernelError::Path { path, source })? {
            let id = program.attach(netns.fd().as_fd()).map_err(fail)?;
            let link = program.take_link(id).map_err(fail)?;
            pin(&name, &self.links, FdLink::from(link))?;
            replace_pin(&name, &self.links)?;
        }
        drop(programs);
        self.forget_closed(netns);
        Ok(())
    }

    /// Leaves a pod's inbound connections to itself.
    pub fn detach_lookup(&self, cookie: u64) {
        let _absent = fs::remove_file(self.links.join(lookup_name(cookie)));
    }

    /// Removes the look-ups of namespaces that an earlier agent served and this one
    /// does not.
    pub fn keep_lookups(&self, cookies: &[u64]) {
        if let Ok(own) = Netns::own() {
            self.forget_closed(&own);
        }
        self.forget_inherited(|netns| cookies.contains(&netns));
        let keep: Vec<String> = cookies.iter().map(|cookie| lookup_name(*cookie)).collect();
        for entry in fs::read_dir(&self.links).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("lookup-") && !keep.contains(&name) {
                let _gone = fs::remove_file(entry.path());
            }
        }
    }
}

fn lookup_name(cookie: u64) -> String {
    format!("lookup-{cookie}")
}

/// Where a link stands until it replaces an earlier one. bpffs allows no dot.
pub(super) fn fresh(name: &str, dir: &Path) -> PathBuf {
    dir.join(format!("{name}-new"))
}

/// Pins a link beside the one that an earlier agent left.
pub(super) fn pin(name: &str, dir: &Path, link: FdLink) -> Result<(), KernelError> {
    let path = fresh(name, dir);
    let _absent = fs::remove_file(&path);
    link.pin(&path)
        .map_err(|source| KernelError::Pin { path, source })
        .map(|_pinned| ())
}

/// Puts the new link in the old one's place: whoever dies in between, one remains.
pub(super) fn replace_pin(name: &str, dir: &Path) -> Result<(), KernelError> {
    let path = dir.join(name);
    let old = link::Link::at(&path);
    let _absent = fs::remove_file(&path);
    fs::rename(fresh(name, dir), &path).map_err(|source| KernelError::Path { path, source })?;
    if let Some(old) = old {
        old.detach();
    }
    Ok(())
}

/// The agent's cgroup as the hooks see it: `bpf_get_current_cgroup_id`. 0: it
/// cannot be told, for want of the node's process ids, or of the node's tree.
pub fn own_cgroup(hooks: &Path) -> u64 {
    // The innermost mount that the hooks are on.
    let mounts = super::cgroup::cgroup_mounts().unwrap_or_default();
    let below = |m: &super::CgroupMount| m.v2 && hooks.starts_with(&m.path);
    let mounts = mounts.into_iter().filter(below);
    let mount = mounts.max_by_key(|m| m.path.components().count());
    mount.and_then(|m| super::cgroup::own(&m.path)).unwrap_or(0)
}

fn remove_other_maps(keep: &Path) {
    let entries = keep.parent().and_then(|pin| fs::read_dir(pin).ok());
    for entry in entries.into_iter().flatten().flatten() {
        let maps = entry.file_name().to_string_lossy().starts_with("maps-");
        if maps && entry.path() != keep {
            let _gone = fs::remove_dir_all(entry.path());
        }
    }
}

/// Makes sure that a path lies on a bpffs, mounting one at `/sys/fs/bpf` if it
/// should and none is there.
pub fn mount_bpffs(pin: &Path) -> Result<(), KernelError> {
    let mount_point = Path::new("/sys/fs/bpf");
    let fail = |source: io::Error| KernelError::Path {
        path: mount_point.to_owned(),
        source,
    };
    if pin.starts_with(mount_point) {
        let found = nix::sys::statfs::statfs(mount_point).map_err(|e| fail(e.into()))?;
        if found.filesystem_type().0 != BPF_FS_MAGIC {
            use nix::mount::{MsFlags, mount};
            mount(
                Some("bpf"),
                mount_point,
                Some("bpf"),
                MsFlags::empty(),
                None::<&str>,
            )
            .map_err(|e| fail(e.into()))?;
        }
    }
    Ok(())
}

/// One agent in charge of a node: the lock goes with the process, even when it is killed.
/// It is of the open file, so that it can be handed on.
pub(super) fn lock(state: &Path) -> Result<File, KernelError> {
    let path = state.join("agent.lock");
    let fail = |source| KernelError::Path {
        path: path.clone(),
        source,
    };
    let file = File::create(&path).map_err(fail)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(KernelError::Busy(path)),
        Err(TryLockError::Error(source)) => Err(fail(source)),
    }
}

/// Maps of another ABI or size cannot be adopted: they lie in another directory.
pub fn shape(config: &config::Kernel) -> String {
    format!(
        "maps-{ABI}-{}-{}-{}-{}",
        config.max_destinations, config.max_workloads, config.max_connections, config.ring_bytes.0
    )
}

/// Removes all that is pinned: programs are detached, traffic is direct again.
/// Refused while an agent is in charge, but by who has its lock. Says what it removed.
pub fn cleanup(pin: &Path, state: &Path, lent: Option<File>) -> Result<Vec<PathBuf>, KernelError> {
    let _lock = match lent {
        None if state.exists() => Some(lock(state)?),
        lent => lent,
    };
    let fail = |path: &Path| {
        let path = path.to_owned();
        move |source| KernelError::Path { path, source }
    };
    let mut removed = Vec::new();
    // Links first: a hook without its maps would have to refuse.
    let mut dirs: Vec<PathBuf> = fs::read_dir(pin)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path())
        .collect();
    dirs.sort();
    for dir in dirs {
        for entry in fs::read_dir(&dir).map_err(fail(&dir))?.flatten() {
            if dir.file_name().is_some_and(|name| name == "links")
                && let Some(link) = link::Link::at(&entry.path())
            {
                link.detach();
            }
            fs::remove_file(entry.path()).map_err(fail(&entry.path()))?;
            removed.push(entry.path());
        }
        fs::remove_dir(&dir).map_err(fail(&dir))?;
    }
    if pin.exists() {
        fs::remove_dir(pin).map_err(fail(pin))?;
    }
    Ok(removed)
}
