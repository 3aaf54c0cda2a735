//! Programs that stay loaded. The kernel checks a program instruction by instruction when
//! it is loaded, and reading its types, which takes as long, serves nothing but that: an
//! agent that starts again after it was killed finds programs of the same build, made for
//! the same maps, where the last one has pinned them. They are of use to one agent at a
//! time; one that takes over from another loads its own, and keeps them when it is in
//! charge. With them stays what they remember for themselves: of which raw sockets and UDP
//! flows they have told.

use std::{
    collections::HashMap,
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use aya::{Ebpf, maps::MapData, programs::Program};
use serde::{Deserialize, Serialize};

use super::{
    observers::{self, Seen},
    pins::{self, KernelError},
    start::{self, MAPS, Programs},
};
use crate::config;

/// What is known of the programs beside their pins; in the agent's state. One that says
/// what is not so (any more) is of no use, and costs nothing but the time to load anew.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Kept {
    /// What they were made of.
    key: String,
    /// Whose observers they are: what `OBSERVER` is in them.
    pub observer: u64,
    pub seen: Seen,
}

/// What could not be attached when programs were loaded is tried again after that time.
const RETRY: Duration = Duration::from_secs(600);

/// Programs that are in the kernel, and let go with this.
pub(super) enum Loaded {
    Anew(Ebpf),
    Kept(HashMap<&'static str, Program>),
}

impl Loaded {
    pub fn all(&mut self) -> Programs<'_> {
        match self {
            Self::Anew(ebpf) => ebpf.programs_mut().collect(),
            Self::Kept(kept) => kept.iter_mut().map(|(name, p)| (*name, p)).collect(),
        }
    }

    pub fn get(&self, name: &str) -> Option<&Program> {
        match self {
            Self::Anew(ebpf) => ebpf.program(name),
            Self::Kept(kept) => kept.get(name),
        }
    }
}

/// What programs are made of.
#[derive(Clone)]
pub(super) struct Source {
    pub config: config::Kernel,
    pub observe: bool,
    /// The agent's.
    state: PathBuf,
}

impl Source {
    pub fn new(config: &config::Kernel, state: &Path, observe: bool) -> Self {
        Self {
            config: config.clone(),
            observe,
            state: state.to_owned(),
        }
    }

    fn file(&self) -> PathBuf {
        self.state.join("programs.json")
    }

    fn pins(&self, observer: u64) -> PathBuf {
        self.config.pin.join(format!("programs-{observer:016x}"))
    }

    /// The same for the same programs with the same maps; types of the kernel are the same
    /// for as long as a pin can last. `None`: not all maps are there.
    fn key(&self) -> Option<String> {
        let maps = self.config.pin.join(pins::shape(&self.config));
        let limits = observers::limits(&self.config, self.observe);
        let mut table = DefaultHasher::new();
        observers::table().hash(&mut table);
        let mut key = format!(
            "{} {:016x} {:?} {:?} {}",
            env!("POSTERN_PROGRAMS"),
            table.finish(),
            (limits.socket, limits.other),
            self.config.probes,
            self.observe,
        );
        for name in MAPS {
            let map = MapData::from_pin(maps.join(name)).ok()?;
            // The kernel gives no number twice before it has given them all.
            key += &format!(" {}", map.info().ok()?.id());
        }
        Some(key)
    }

    /// What an earlier agent has kept that this one could use.
    pub fn find(&self) -> Option<Kept> {
        let file = self.file();
        let kept: Kept = serde_json::from_slice(&fs::read(&file).ok()?).ok()?;
        let age = fs::metadata(&file).and_then(|file| file.modified());
        let fresh = age.is_ok_and(|made| made.elapsed().is_ok_and(|age| age < RETRY));
        let same = self.pins(kept.observer).is_dir() && self.key()? == kept.key;
        (same && (fresh || !kept.seen.blind())).then_some(kept)
    }

    /// The programs that an earlier agent has kept, by name.
    pub fn open(&self, kept: &Kept) -> Result<HashMap<&'static str, Program>, KernelError> {
        let pins = self.pins(kept.observer);
        start::hooks(&pins).chain(kept.seen.pinned(&pins)).collect()
    }

    /// From now on nobody finds what is kept.
    pub fn forget(&self) {
        let _absent = fs::remove_file(self.file());
    }

    /// Pins programs for the next agent, and removes those of others.
    pub fn keep(
        &self,
        observer: u64,
        seen: &Seen,
        programs: Programs<'_>,
    ) -> Result<(), KernelError> {
        let pins = self.pins(observer);
        let fail = |path: &Path| {
            let path = path.to_owned();
            move |source: io::Error| KernelError::Path { path, source }
        };
        self.forget();
        for entry in fs::read_dir(&self.config.pin)
            .into_iter()
            .flatten()
            .flatten()
        {
            if entry.file_name().to_string_lossy().starts_with("programs-") {
                let path = entry.path();
                fs::remove_dir_all(&path).map_err(fail(&path))?;
            }
        }
        fs::create_dir(&pins).map_err(fail(&pins))?;
        for (name, program) in programs {
            // Not all are for this kernel.
            if program.fd().is_ok() {
                let path = pins.join(name);
                program
                    .pin(&path)
                    .map_err(|source| KernelError::Pin { path, source })?;
            }
        }
        let Some(key) = self.key() else { return Ok(()) };
        let kept = Kept {
            key,
            observer,
            seen: seen.clone(),
        };
        let file = self.file();
        let text = serde_json::to_vec(&kept).map_err(io::Error::from);
        text.and_then(|text| fs::write(&file, text))
            .map_err(fail(&file))
    }
}
