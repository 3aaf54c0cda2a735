//! Loads, attaches and pins. Everything is pinned, so that capture stays when the
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
    sync::{Arc, Mutex},
    thread,
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{MapData, MapError, RingBuf},
    pin::PinError,
    programs::{
        CgroupAttachMode, CgroupSock, CgroupSockAddr, Program, ProgramError, SkLookup, SockOps,
        links::{FdLink, LinkError},
    },
};
use postern_ebpf::{ABI, Config, Offsets, RANGES};

use super::{
    btf::{self, Btf},
    guard,
    link::{self, Place},
    maps::Maps,
    netns::Netns,
    observers::{self, Attached, Blind},
};
use crate::config;

pub(super) static PROGRAMS: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/postern-ebpf"));

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
    #[error("the kernel programs lack the map {0}")]
    NoMap(&'static str),
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
    /// Holds the programs; `sk_lookup` is attached to each pod that comes.
    ebpf: Mutex<Ebpf>,
    links: PathBuf,
    maps_dir: PathBuf,
    /// What is not seen of pods, and why.
    pub blind: Vec<Blind>,
    /// Sockets that an earlier agent followed, by namespace, until it is known which of
    /// them are still open.
    pub(super) inherited: Mutex<HashMap<u64, Vec<u64>>>,
    /// Sockets that were followed and not open when they were looked for last.
    pub(super) missed: Mutex<HashSet<u64>>,
    /// Where the hooks hang.
    root: Place,
    /// Released when the agent ends, however it ends. `None`: an agent that is still in
    /// charge has it, or the next one.
    lock: Mutex<Option<File>>,
}

/// How an agent comes to a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// No other is in charge: whatever an earlier one left ended with it.
    Alone,
    /// Beside one that is: nothing that it works by is changed yet.
    Beside,
}

const MAPS: [&str; 16] = [
    "CONFIG",
    "AGENTS",
    "WORKLOADS",
    "CGROUPS",
    "MESH",
    "RANGES",
    "FOREIGN",
    "DIALS",
    "FLOWS",
    "CLIENTS",
    "ORIGINS",
    "PROBES",
    "LISTENERS",
    "SOCKETS",
    "EVENTS",
    "COUNTERS",
];
pub(super) const SOCK_ADDR: [&str; 4] = [
    "postern_connect4",
    "postern_connect6",
    "postern_peer4",
    "postern_peer6",
];
const SOCK_OPS: &str = "postern_sockops";
const RELEASE: &str = "postern_release";
const LOOKUP: &str = "postern_lookup";
/// All that carry; the others observe.
const HOOKS: [&str; 7] = [
    SOCK_ADDR[0],
    SOCK_ADDR[1],
    SOCK_ADDR[2],
    SOCK_ADDR[3],
    SOCK_OPS,
    RELEASE,
    LOOKUP,
];

/// By name; taken apart, they can be loaded at the same time.
pub(super) type Programs<'a> = HashMap<&'a str, &'a mut Program>;

/// What the kernel says of its own types. Reading it takes long and touches nothing.
pub struct Types {
    /// Where fields lie, and what observers are attached to.
    read: Result<(Offsets, aya::Btf), String>,
    /// It reads them, too, if only to leave them.
    loader: EbpfLoader<'static>,
}

impl Types {
    pub fn read() -> Self {
        let mut loader = EbpfLoader::new();
        loader.btf(None);
        let read = || {
            let btf = Btf::of_kernel().map_err(|e| e.to_string())?;
            Ok((btf::offsets(&btf)?, observers::types(&btf)?))
        };
        Self {
            read: read(),
            loader,
        }
    }
}

impl Kernel {
    /// Loads the programs and attaches them to the cgroup, taking over what an
    /// earlier agent left pinned.
    pub fn load(
        config: &config::Kernel,
        cgroup: &Path,
        state: &Path,
        observe: bool,
        start: Start,
        types: Types,
    ) -> Result<Arc<Self>, KernelError> {
        let lock = match start {
            Start::Alone => Some(lock(state)?),
            Start::Beside => None,
        };
        mount_bpffs(&config.pin)?;
        let pins = config.pin.join(shape(config));
        let links = config.pin.join("links");
        for dir in [&pins, &links] {
            fs::create_dir_all(dir).map_err(|source| KernelError::Path {
                path: dir.clone(),
                source,
            })?;
        }
        let Types { read, mut loader } = types;
        let offsets = (read.as_ref()).map_or_else(|_| Offsets::default(), |(offsets, _)| *offsets);
        let limits = observers::limits(config, observe);
        let observer = super::pids::own();
        loader
            .override_global("OFFSETS", &offsets, true)
            .override_global("LIMITS", &limits, true)
            .override_global("OBSERVER", &observer, true)
            .map_max_entries("MESH", config.max_destinations)
            .map_max_entries("WORKLOADS", config.max_workloads)
            .map_max_entries("CGROUPS", config.max_workloads)
            // Two kinds of listener, and a pod of two families has four or so addresses.
            .map_max_entries("LISTENERS", config.max_workloads.saturating_mul(8))
            .map_max_entries("DIALS", config.max_connections)
            .map_max_entries("FLOWS", config.max_connections)
            .map_max_entries("CLIENTS", config.max_connections)
            .map_max_entries("SOCKETS", config.max_connections)
            .map_max_entries("EVENTS", config.ring_bytes.0);
        for name in MAPS {
            loader.map_pin_path(name, pins.join(name));
        }
        let mut ebpf = loader.load(PROGRAMS)?;
        let maps = Maps::take(&mut ebpf)?;
        let root = File::open(cgroup).map_err(|source| KernelError::Path {
            path: cgroup.to_owned(),
            source,
        })?;
        let mut kernel = Self {
            maps,
            ebpf: Mutex::new(ebpf),
            links,
            maps_dir: pins,
            blind: Vec::new(),
            inherited: Mutex::default(),
            missed: Mutex::default(),
            root: Place::Cgroup(
                super::cgroup::id(cgroup).map_err(|source| KernelError::Path {
                    path: cgroup.to_owned(),
                    source,
                })?,
            ),
            lock: Mutex::new(lock),
        };
        let before = kernel.configured();
        if start == Start::Alone {
            // Those of an earlier one, still draining, may have some.
            let draining = kernel.draining();
            kernel.forget_connections(draining == 0)?;
            if before.agent_tgid != 0 {
                // Before anything listens: what this agent dials must not be steered to it.
                let (agent_tgid, agent_cgroup) = (super::pids::own(), own_cgroup(cgroup));
                kernel.configure(Config {
                    agent_tgid,
                    agent_cgroup,
                    ..before
                })?;
            }
        }
        if observe && start == Start::Alone {
            kernel.inherit_sockets();
        }
        let ebpf = kernel.ebpf.get_mut();
        let ebpf = ebpf.expect("no panic while programs are held");
        let hook = |name: &&str| HOOKS.contains(name);
        let (mut hooks, mut others): (Programs<'_>, Programs<'_>) =
            ebpf.programs_mut().partition(|(name, _)| hook(name));
        // The kernel takes milliseconds to check a program: it can check two at a time.
        let (hooked, observers) = thread::scope(|scope| {
            let observing = observe.then(|| {
                scope.spawn(|| match &read {
                    Ok((_, btf)) => observers::attach(&mut others, btf, &root, config.probes),
                    Err(why) => observers::all_blind(why),
                })
            });
            // Hooks of other maps know nothing of these: own ones stand beside them, so that
            // what is dialled meanwhile is found in one or the other.
            let (links, place) = (&kernel.links, kernel.root);
            let hooked = attach_hooks(&mut hooks, &root, links, place, before.agent_tgid != 0);
            (hooked, observing.map(|observing| observing.join()))
        });
        hooked?;
        let observers = observers.map(|joined| joined.expect("it does not panic"));
        let attached = observers.into_iter().flatten();
        kernel.blind = attached.filter_map(|a| a.blind).collect();
        Ok(Arc::new(kernel))
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

    /// How each part of what is seen of pods would be attached, for `postern doctor`. It
    /// is tried with maps of its own, and gone again.
    pub fn try_observers(
        config: &config::Kernel,
        cgroup: &Path,
    ) -> Result<Vec<Attached>, KernelError> {
        let Types { read, mut loader } = Types::read();
        let (offsets, btf) = match read {
            Ok(read) => read,
            Err(why) => return Ok(observers::all_blind(&why)),
        };
        let root = File::open(cgroup).map_err(|source| KernelError::Path {
            path: cgroup.to_owned(),
            source,
        })?;
        let mut ebpf = loader
            .override_global("OFFSETS", &offsets, true)
            .load(PROGRAMS)?;
        let mut programs = ebpf.programs_mut().collect();
        Ok(observers::attach(&mut programs, &btf, &root, config.probes))
    }

    /// Puts this agent's hooks in the place of an earlier one's, once the maps say all
    /// that they should.
    pub fn commit(&self) -> Result<(), KernelError> {
        let ebpf = self.ebpf.lock().expect("no panic while programs are held");
        // Where old ones stand beside, what they steer is still found when they are gone.
        for name in SOCK_ADDR.iter().chain([&SOCK_OPS, &RELEASE]) {
            if fresh(name, &self.links).exists() {
                replace_pin(name, &self.links)?;
                continue;
            }
            let program = ebpf.program(name).ok_or(KernelError::NoProgram(name))?;
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

    /// Removes maps of other shapes, which no hook uses any more.
    pub fn remove_other_maps(&self) {
        remove_other_maps(&self.maps_dir);
    }

    /// Where this agent's links are pinned, for what must be the same in the next one.
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
        let mut ebpf = self.ebpf.lock().expect("no panic while programs are held");
        let program: &mut SkLookup = program(&mut ebpf, LOOKUP)?;
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
        drop(ebpf);
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

fn attach_hooks(
    programs: &mut Programs<'_>,
    root: &File,
    links: &Path,
    place: Place,
    same_maps: bool,
) -> Result<(), KernelError> {
    // Links always stand beside others; they take no flags (bpf_link_create).
    let multi = CgroupAttachMode::Single;
    // One that stands there gets this agent's program when all is ready.
    let stands = |name: &str| {
        let _stale = fs::remove_file(fresh(name, links));
        same_maps && link::stands(&links.join(name), place)
    };
    // What finds the way back comes before what steers.
    let program: &mut SockOps = one_of(programs, SOCK_OPS)?;
    let fail = |source| KernelError::Program {
        name: SOCK_OPS,
        source,
    };
    program.load().map_err(fail)?;
    if !stands(SOCK_OPS) {
        let id = program.attach(root, multi).map_err(fail)?;
        let link = program.take_link(id).map_err(fail)?;
        pin(
            SOCK_OPS,
            links,
            FdLink::try_from(link).map_err(|source| KernelError::Link {
                name: SOCK_OPS,
                source,
            })?,
        )?;
    }

    let program: &mut CgroupSock = one_of(programs, RELEASE)?;
    let fail = |source| KernelError::Program {
        name: RELEASE,
        source,
    };
    program.load().map_err(fail)?;
    if !stands(RELEASE) {
        let id = program.attach(root, multi).map_err(fail)?;
        let link = program.take_link(id).map_err(fail)?;
        pin(
            RELEASE,
            links,
            FdLink::try_from(link).map_err(|source| KernelError::Link {
                name: RELEASE,
                source,
            })?,
        )?;
    }

    for name in SOCK_ADDR.iter().rev() {
        let program: &mut CgroupSockAddr = one_of(programs, name)?;
        let fail = |source| KernelError::Program { name, source };
        program.load().map_err(fail)?;
        if stands(name) {
            continue;
        }
        let id = program.attach(root, multi).map_err(fail)?;
        let link = program.take_link(id).map_err(fail)?;
        pin(
            name,
            links,
            FdLink::try_from(link).map_err(|source| KernelError::Link { name, source })?,
        )?;
    }
    let program: &mut SkLookup = one_of(programs, LOOKUP)?;
    program.load().map_err(|source| KernelError::Program {
        name: LOOKUP,
        source,
    })
}

fn lookup_name(cookie: u64) -> String {
    format!("lookup-{cookie}")
}

pub(super) fn program<'a, T>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut T, KernelError>
where
    &'a mut T: TryFrom<&'a mut Program, Error = ProgramError>,
{
    typed(ebpf.program_mut(name), name)
}

pub(super) fn one_of<'a, T>(
    programs: &'a mut Programs<'_>,
    name: &'static str,
) -> Result<&'a mut T, KernelError>
where
    &'a mut T: TryFrom<&'a mut Program, Error = ProgramError>,
{
    typed(programs.get_mut(name).map(|program| &mut **program), name)
}

fn typed<'a, T>(
    program: Option<&'a mut Program>,
    name: &'static str,
) -> Result<&'a mut T, KernelError>
where
    &'a mut T: TryFrom<&'a mut Program, Error = ProgramError>,
{
    program
        .ok_or(KernelError::NoProgram(name))?
        .try_into()
        .map_err(|source| KernelError::Program { name, source })
}

/// Where a link stands until it replaces an earlier one. bpffs allows no dot.
fn fresh(name: &str, dir: &Path) -> PathBuf {
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
fn lock(state: &Path) -> Result<File, KernelError> {
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
