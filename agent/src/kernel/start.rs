//! How an agent comes to have its programs: loaded anew, or kept from an earlier one; and
//! attached, each where it belongs.

use std::{
    collections::HashMap,
    fs::{self, File},
    hash::{BuildHasher as _, RandomState},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread,
};

use aya::{
    Ebpf, EbpfLoader,
    programs::{
        CgroupAttachMode, CgroupSock, CgroupSockAddr,
        CgroupSockAddrAttachType::{self, Connect4, Connect6, GetPeerName4, GetPeerName6},
        CgroupSockAttachType::SockRelease,
        Program, ProgramError, SkLookup, SockOps,
        links::FdLink,
    },
};
use postern_ebpf::{Config, Offsets};

use super::{
    btf::{self, Btf},
    kept::{Kept, Loaded, Source},
    link::{self, Place},
    maps::Maps,
    observers::{self, Attached, Observers, Seen},
    pins::{Kernel, KernelError, fresh, lock, mount_bpffs, own_cgroup, pin, shape},
};
use crate::config;

pub(super) static PROGRAMS: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/postern-ebpf"));

/// How an agent comes to a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// No other is in charge: whatever an earlier one left ended with it.
    Alone,
    /// Beside one that is: nothing that it works by is changed yet.
    Beside,
}

pub(super) const MAPS: [&str; 16] = [
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
pub(super) const SOCK_ADDR: [(&str, CgroupSockAddrAttachType); 4] = [
    ("postern_connect4", Connect4),
    ("postern_connect6", Connect6),
    ("postern_peer4", GetPeerName4),
    ("postern_peer6", GetPeerName6),
];
const SOCK_OPS: &str = "postern_sockops";
const RELEASE: &str = "postern_release";
pub(super) const LOOKUP: &str = "postern_lookup";

/// All that carry, by name; the others observe.
pub(super) const HOOKS: [&str; 7] = [
    SOCK_ADDR[0].0,
    SOCK_ADDR[1].0,
    SOCK_ADDR[2].0,
    SOCK_ADDR[3].0,
    SOCK_OPS,
    RELEASE,
    LOOKUP,
];

/// The hooks as they are pinned.
pub(super) fn hooks(
    pins: &Path,
) -> impl Iterator<Item = Result<(&'static str, Program), KernelError>> {
    let at = |name| pins.join(name);
    let sock_addr = SOCK_ADDR.map(|(name, hook)| {
        let program = CgroupSockAddr::from_pin(at(name), hook);
        (name, program.map(Program::CgroupSockAddr))
    });
    let release = CgroupSock::from_pin(at(RELEASE), SockRelease);
    let others = [
        (
            SOCK_OPS,
            SockOps::from_pin(at(SOCK_OPS)).map(Program::SockOps),
        ),
        (RELEASE, release.map(Program::CgroupSock)),
        (
            LOOKUP,
            SkLookup::from_pin(at(LOOKUP)).map(Program::SkLookup),
        ),
    ];
    sock_addr.into_iter().chain(others).map(|(name, program)| {
        let program = program.map_err(|source| KernelError::Program { name, source })?;
        Ok((name, program))
    })
}

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
        thread::scope(|scope| {
            let loader = scope.spawn(|| {
                let mut loader = EbpfLoader::new();
                loader.btf(None);
                loader
            });
            let read = || {
                let btf = Btf::of_kernel().map_err(|e| e.to_string())?;
                Ok((btf::offsets(&btf)?, observers::types(&btf)?))
            };
            Self {
                read: read(),
                loader: loader.join().expect("it does not panic"),
            }
        })
    }
}

/// What stands before programs do.
struct Ground {
    source: Source,
    start: Start,
    links: PathBuf,
    maps: PathBuf,
    root: File,
    place: Place,
}

impl Ground {
    fn prepare(source: Source, cgroup: &Path, start: Start) -> Result<Self, KernelError> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| KernelError::Path { path, source }
        };
        mount_bpffs(&source.config.pin)?;
        let maps = source.config.pin.join(shape(&source.config));
        let links = source.config.pin.join("links");
        for dir in [&maps, &links] {
            fs::create_dir_all(dir).map_err(at(dir))?;
        }
        Ok(Self {
            source,
            start,
            links,
            maps,
            root: File::open(cgroup).map_err(at(cgroup))?,
            place: Place::Cgroup(super::cgroup::id(cgroup).map_err(at(cgroup))?),
        })
    }

    /// With programs that an earlier agent has kept.
    fn again(&self, kept: &Kept, cgroup: &Path) -> Result<Kernel, KernelError> {
        let programs = Loaded::Kept(self.source.open(kept)?);
        let mut kernel = self.kernel(programs, kept.observer, cgroup)?;
        let observe = |programs: &mut Programs<'_>| kept.seen.attach(programs, &self.root);
        self.attach(&mut kernel, observe)?;
        Ok(kernel)
    }

    fn anew(&self, types: Types, cgroup: &Path) -> Result<Kernel, KernelError> {
        let Types { read, mut loader } = types;
        let config = &self.source.config;
        let offsets = (read.as_ref()).map_or_else(|_| Offsets::default(), |(offsets, _)| *offsets);
        let limits = observers::limits(config, self.source.observe);
        // No other agent's.
        let observer = RandomState::new().hash_one("observer").max(1);
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
            loader.map_pin_path(name, self.maps.join(name));
        }
        let programs = Loaded::Anew(loader.load(PROGRAMS)?);
        let mut kernel = self.kernel(programs, observer, cgroup)?;
        let observers = self.attach(&mut kernel, |programs| {
            Ok(match &read {
                Ok((_, btf)) => observers::attach(programs, btf, &self.root, config.probes),
                Err(why) => observers::all_blind(why),
            })
        })?;
        // Where types could not be read, more may be seen the next time.
        kernel.keep = read.is_ok().then(|| Seen::from(&observers));
        Ok(kernel)
    }

    /// Whose programs are loaded, and not attached by this agent yet.
    fn kernel(
        &self,
        programs: Loaded,
        observer: u64,
        cgroup: &Path,
    ) -> Result<Kernel, KernelError> {
        let kernel = Kernel {
            maps: Maps::open(&self.maps)?,
            programs: Mutex::new(programs),
            observer,
            keep: None,
            source: self.source.clone(),
            links: self.links.clone(),
            maps_dir: self.maps.clone(),
            beside: Mutex::default(),
            blind: Vec::new(),
            inherited: Mutex::default(),
            missed: Mutex::default(),
            root: self.place,
            lock: Mutex::default(),
        };
        if self.start == Start::Alone {
            let before = kernel.configured();
            // Those of an earlier one, still draining, may have some.
            let draining = kernel.draining();
            kernel.forget_connections(draining == 0)?;
            if before.agent_tgid != 0 {
                // Before anything listens: what this agent dials must not be steered to it.
                let (agent_tgid, agent_cgroup) = (super::pids::own(), own_cgroup(cgroup));
                kernel.configure(Config {
                    agent_tgid,
                    agent_cgroup,
                    observer,
                    ..before
                })?;
            }
            if self.source.observe {
                kernel.inherit_sockets();
            }
        }
        Ok(kernel)
    }

    /// Says how the parts of what is observed are called, if they are.
    fn attach(
        &self,
        kernel: &mut Kernel,
        observe: impl FnOnce(&mut Programs<'_>) -> Result<Observers, KernelError> + Send,
    ) -> Result<Observers, KernelError> {
        let before = kernel.configured();
        let programs = kernel.programs.get_mut();
        let programs = programs.expect("no panic while programs are held");
        let hook = |name: &&str| HOOKS.contains(name);
        let (mut hooks, mut others): (Programs<'_>, Programs<'_>) =
            (programs.all().into_iter()).partition(|(name, _)| hook(name));
        // The kernel takes milliseconds to check a program: it can check two at a time.
        let (hooked, observers) = thread::scope(|scope| {
            let observing = (self.source.observe).then(|| scope.spawn(|| observe(&mut others)));
            // Hooks of other maps know nothing of these: own ones stand beside them, so that
            // what is dialled meanwhile is found in one or the other.
            let (links, same_maps) = (&self.links, before.agent_tgid != 0);
            let hooked = attach_hooks(&mut hooks, &self.root, links, self.place, same_maps);
            (hooked, observing.map(|observing| observing.join()))
        });
        kernel.beside = Mutex::new(hooked?);
        let observers = observers.map(|joined| joined.expect("it does not panic"));
        let observers = observers.transpose()?.unwrap_or_default();
        let parts = observers.parts.iter();
        kernel.blind = parts.filter_map(|part| part.blind.clone()).collect();
        Ok(observers)
    }
}

/// Whether an earlier agent has kept what this one could use, so that the kernel's types need
/// not be read.
pub fn kept(config: &config::Kernel, state: &Path, observe: bool) -> bool {
    Source::new(config, state, observe).find().is_some()
}

impl Kernel {
    /// Brings the programs into the kernel, or finds them there, and attaches them to the
    /// cgroup, taking over what an earlier agent left pinned.
    pub fn load(
        config: &config::Kernel,
        cgroup: &Path,
        state: &Path,
        observe: bool,
        start: Start,
        types: impl FnOnce() -> Types,
    ) -> Result<Arc<Self>, KernelError> {
        let lock = match start {
            Start::Alone => Some(lock(state)?),
            Start::Beside => None,
        };
        let ground = Ground::prepare(Source::new(config, state, observe), cgroup, start)?;
        // Beside another agent its programs may be attached, as only its can be.
        let kept = (start == Start::Alone).then(|| ground.source.find());
        let again = kept.flatten().map(|kept| ground.again(&kept, cgroup));
        let mut kernel = match again {
            Some(Ok(kernel)) => kernel,
            Some(Err(error)) => {
                tracing::warn!(%error, "programs that stayed loaded are of no use");
                ground.anew(types(), cgroup)?
            }
            None => ground.anew(types(), cgroup)?,
        };
        kernel.lock = Mutex::new(lock);
        Ok(Arc::new(kernel))
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
            Err(why) => return Ok(observers::all_blind(&why).parts),
        };
        let root = File::open(cgroup).map_err(|source| KernelError::Path {
            path: cgroup.to_owned(),
            source,
        })?;
        let mut ebpf = loader
            .override_global("OFFSETS", &offsets, true)
            .load(PROGRAMS)?;
        let mut programs = ebpf.programs_mut().collect();
        Ok(observers::attach(&mut programs, &btf, &root, config.probes).parts)
    }
}

/// Says which of them stand beside an earlier agent's, or alone.
fn attach_hooks(
    programs: &mut Programs<'_>,
    root: &File,
    links: &Path,
    place: Place,
    same_maps: bool,
) -> Result<Vec<&'static str>, KernelError> {
    let mut beside = Vec::new();
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
    if program.fd().is_err() {
        program.load().map_err(fail)?;
    }
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
        beside.push(SOCK_OPS);
    }

    let program: &mut CgroupSock = one_of(programs, RELEASE)?;
    let fail = |source| KernelError::Program {
        name: RELEASE,
        source,
    };
    if program.fd().is_err() {
        program.load().map_err(fail)?;
    }
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
        beside.push(RELEASE);
    }

    for (name, _) in SOCK_ADDR.into_iter().rev() {
        let program: &mut CgroupSockAddr = one_of(programs, name)?;
        let fail = |source| KernelError::Program { name, source };
        if program.fd().is_err() {
            program.load().map_err(fail)?;
        }
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
        beside.push(name);
    }
    let program: &mut SkLookup = one_of(programs, LOOKUP)?;
    if program.fd().is_err() {
        let fail = |source| KernelError::Program {
            name: LOOKUP,
            source,
        };
        program.load().map_err(fail)?;
    }
    Ok(beside)
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
