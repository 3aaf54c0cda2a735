//! What the agent sees of pods beside what it carries. Each part stands alone: one that
//! this kernel does not allow is missing, named, and no reason not to run. No link of it
//! is pinned: without an agent nobody reads what it sees.

use std::{fs::File, path::Path};

use aya::{
    Btf, Endianness,
    programs::{
        BtfTracePoint, CgroupAttachMode, CgroupSockAddr,
        CgroupSockAddrAttachType::{self, UDPSendMsg4, UDPSendMsg6},
        FEntry, FExit, KProbe,
        ProbeKind::{self, Entry, Return},
        Program, ProgramError,
    },
};
use postern_ebpf::Limits;
use serde::{Deserialize, Serialize};

use super::{
    btf,
    pins::KernelError,
    start::{Programs, one_of},
};
use crate::config::{self, Probes};

/// A part that is missing or sees less than it could, and why.
#[derive(Clone, Debug)]
pub struct Blind {
    pub part: &'static str,
    pub why: String,
    /// What the audit log lacks.
    pub without: &'static str,
}

/// A part of what is seen.
#[derive(Debug)]
struct Part {
    name: &'static str,
    /// What is lacking where no way is to be had.
    without: &'static str,
    ways: &'static [Way],
}

/// One way of the kernel to call programs; which of a part's is the first that works,
/// among those that are wanted.
#[derive(Debug)]
struct Way {
    name: &'static str,
    wanted: &'static [Probes],
    programs: &'static [Attachment],
    /// What is lacking still.
    without: Option<&'static str>,
}

/// How a program is attached, its name, and what it is attached to.
type Attachment = (Kind, &'static str, &'static str);

#[derive(Debug)]
enum Kind {
    Tracepoint,
    Fentry,
    Fexit,
    Kprobe(ProbeKind),
    Hook(CgroupSockAddrAttachType),
}

impl Kind {
    fn pinned(&self, path: &Path) -> Result<Program, ProgramError> {
        Ok(match self {
            Self::Tracepoint => Program::BtfTracePoint(BtfTracePoint::from_pin(path)?),
            Self::Fentry => Program::FEntry(FEntry::from_pin(path)?),
            Self::Fexit => Program::FExit(FExit::from_pin(path)?),
            Self::Kprobe(kind) => Program::KProbe(KProbe::from_pin(path, *kind)?),
            Self::Hook(hook) => Program::CgroupSockAddr(CgroupSockAddr::from_pin(path, *hook)?),
        })
    }
}

const ANY: &[Probes] = &[Probes::Auto, Probes::Fentry, Probes::Kprobe];
const FENTRY: &[Probes] = &[Probes::Auto, Probes::Fentry];
const KPROBE: &[Probes] = &[Probes::Auto, Probes::Kprobe];

const fn tracepoint(programs: &'static [Attachment]) -> Way {
    Way {
        name: "a tracepoint",
        wanted: ANY,
        programs,
        without: None,
    }
}

const fn fentry(programs: &'static [Attachment]) -> Way {
    Way {
        name: "fentry",
        wanted: FENTRY,
        programs,
        without: None,
    }
}

const fn kprobe(programs: &'static [Attachment]) -> Way {
    Way {
        name: "kprobes",
        wanted: KPROBE,
        programs,
        without: None,
    }
}

const SENT: Attachment = (Kind::Tracepoint, "postern_sent", "sock_send_length");

static PARTS: [Part; 7] = [
    Part {
        name: "sockets",
        without: "TCP sockets are not recorded",
        ways: &[tracepoint(&[(
            Kind::Tracepoint,
            "postern_state",
            "inet_sock_set_state",
        )])],
    },
    Part {
        name: "accept",
        without: "the process that accepted a connection is recorded only where it asks for \
                  its peer's address",
        ways: &[
            fentry(&[(Kind::Fexit, "postern_accept", "inet_csk_accept")]),
            kprobe(&[(Kind::Kprobe(Return), "postern_k_accept", "inet_csk_accept")]),
        ],
    },
    Part {
        name: "connect",
        without: "of connects that fail before a SYN is sent, only those are recorded that the \
                  agent's hook refused",
        ways: &[
            fentry(&[(Kind::Fexit, "postern_connect", "inet_stream_connect")]),
            kprobe(&[
                (
                    Kind::Kprobe(Entry),
                    "postern_k_connect_enter",
                    "inet_stream_connect",
                ),
                (
                    Kind::Kprobe(Return),
                    "postern_k_connect",
                    "inet_stream_connect",
                ),
            ]),
        ],
    },
    Part {
        name: "udp",
        without: "UDP flows are not recorded",
        ways: &[
            fentry(&[
                (Kind::Fentry, "postern_udp4", "udp_sendmsg"),
                (Kind::Fentry, "postern_udp6", "udpv6_sendmsg"),
            ]),
            kprobe(&[
                (Kind::Kprobe(Entry), "postern_k_udp4", "udp_sendmsg"),
                (Kind::Kprobe(Entry), "postern_k_udp6", "udpv6_sendmsg"),
            ]),
            Way {
                name: "hooks and a tracepoint",
                wanted: &[Probes::Auto],
                programs: &[
                    (Kind::Hook(UDPSendMsg4), "postern_sendmsg4", ""),
                    (Kind::Hook(UDPSendMsg6), "postern_sendmsg6", ""),
                    SENT,
                ],
                without: None,
            },
            Way {
                name: "hooks",
                wanted: &[Probes::Auto],
                programs: &[
                    (Kind::Hook(UDPSendMsg4), "postern_sendmsg4", ""),
                    (Kind::Hook(UDPSendMsg6), "postern_sendmsg6", ""),
                ],
                without: Some("UDP flows of connected sockets are not recorded"),
            },
        ],
    },
    Part {
        name: "raw",
        without: "raw and packet sockets are not recorded",
        ways: &[
            fentry(&[
                (Kind::Fentry, "postern_raw4", "raw_sendmsg"),
                (Kind::Fentry, "postern_raw6", "rawv6_sendmsg"),
                (Kind::Fentry, "postern_packet", "packet_sendmsg"),
            ]),
            kprobe(&[
                (Kind::Kprobe(Entry), "postern_k_raw4", "raw_sendmsg"),
                (Kind::Kprobe(Entry), "postern_k_raw6", "rawv6_sendmsg"),
                (Kind::Kprobe(Entry), "postern_k_packet", "packet_sendmsg"),
            ]),
            Way {
                name: "a tracepoint",
                wanted: &[Probes::Auto],
                programs: &[SENT],
                without: None,
            },
        ],
    },
    Part {
        name: "exec",
        without: "programs that are started are not recorded",
        ways: &[tracepoint(&[(
            Kind::Tracepoint,
            "postern_exec",
            "sched_process_exec",
        )])],
    },
    Part {
        name: "exit",
        without: "ends of processes are not recorded",
        ways: &[tracepoint(&[(
            Kind::Tracepoint,
            "postern_exit",
            "sched_process_exit",
        )])],
    },
];

/// What became of a part.
pub struct Attached {
    pub part: &'static str,
    /// Which way it is called, if it is.
    pub way: Option<&'static str>,
    pub blind: Option<Blind>,
}

/// Of the kernel's types what programs of all parts are attached to.
pub(super) fn types(kernel: &btf::Btf) -> Result<Btf, String> {
    let names = attachments().map(|(kind, _, target)| match kind {
        Kind::Tracepoint => format!("btf_trace_{target}"),
        _ => (*target).to_owned(),
    });
    let names: Vec<String> = names.collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    Btf::parse(&kernel.only(&names), Endianness::default()).map_err(|error| error.to_string())
}

/// What is attached, of which parts.
#[derive(Default)]
pub(super) struct Observers {
    pub parts: Vec<Attached>,
    /// In their order; also of ways that failed half way.
    pub programs: Vec<&'static str>,
}

/// Attaches all parts, hooks to this cgroup.
pub(super) fn attach(
    programs: &mut Programs<'_>,
    btf: &Btf,
    cgroup: &File,
    probes: Probes,
) -> Observers {
    let mut attaching = Attaching {
        programs,
        btf: Some(btf),
        cgroup,
        done: Vec::new(),
    };
    let parts = PARTS.iter().map(|part| attaching.part(part, probes));
    Observers {
        parts: parts.collect(),
        programs: attaching.done,
    }
}

/// Observers, for who attaches the same programs again.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Seen {
    parts: Vec<Called>,
    programs: Vec<String>,
}

/// How a part is called, if it is, and why not otherwise.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Called {
    part: String,
    way: Option<String>,
    why: String,
}

impl From<&Observers> for Seen {
    fn from(observers: &Observers) -> Self {
        let called = |attached: &Attached| Called {
            part: attached.part.into(),
            way: attached.way.map(Into::into),
            why: (attached.blind.as_ref()).map_or_else(String::new, |blind| blind.why.clone()),
        };
        Self {
            parts: observers.parts.iter().map(called).collect(),
            programs: (observers.programs.iter())
                .map(|name| (*name).into())
                .collect(),
        }
    }
}

impl Called {
    fn attached(&self) -> Option<Attached> {
        let part = PARTS.iter().find(|part| part.name == self.part)?;
        let why = self.why.clone();
        let Some(way) = &self.way else {
            return Some(part.missing(why));
        };
        let way = part.ways.iter().find(|known| known.name == way)?;
        Some(part.seen_by(way, why))
    }
}

impl Seen {
    /// Whether something was not to be had.
    pub fn blind(&self) -> bool {
        self.parts.iter().any(|called| !called.why.is_empty())
    }

    fn programs(&self) -> impl Iterator<Item = &'static Attachment> {
        self.programs.iter().filter_map(|name| {
            let mut all = attachments();
            all.find(|(_, known, _)| known == name)
        })
    }

    /// The programs, by name, as they are pinned.
    pub fn pinned(
        &self,
        pins: &Path,
    ) -> impl Iterator<Item = Result<(&'static str, Program), KernelError>> {
        self.programs().map(|(kind, name, _)| {
            let program = kind.pinned(&pins.join(name));
            let program = program.map_err(|source| KernelError::Program { name, source })?;
            Ok((*name, program))
        })
    }

    /// Attaches programs that are loaded, as they were before.
    pub fn attach(
        &self,
        programs: &mut Programs<'_>,
        cgroup: &File,
    ) -> Result<Observers, KernelError> {
        let mut attaching = Attaching {
            programs,
            btf: None,
            cgroup,
            done: Vec::new(),
        };
        for (kind, name, target) in self.programs() {
            attaching.program(kind, name, target)?;
            attaching.done.push(name);
        }
        Ok(Observers {
            parts: self.parts.iter().filter_map(Called::attached).collect(),
            programs: attaching.done,
        })
    }
}

/// What there is to attach, as text: what was kept by another table is not of this one.
pub(super) fn table() -> String {
    format!("{PARTS:?}")
}

fn attachments() -> impl Iterator<Item = &'static Attachment> {
    let ways = PARTS.iter().flat_map(|part| part.ways);
    ways.flat_map(|way| way.programs)
}

pub(super) fn all_blind(why: &str) -> Observers {
    Observers {
        parts: PARTS.iter().map(|part| part.missing(why.into())).collect(),
        programs: Vec::new(),
    }
}

impl Part {
    fn blind(&self, without: &'static str, why: String) -> Blind {
        Blind {
            part: self.name,
            why,
            without,
        }
    }

    fn seen_by(&self, way: &Way, why: String) -> Attached {
        Attached {
            part: self.name,
            way: Some(way.name),
            blind: way.without.map(|without| self.blind(without, why)),
        }
    }

    fn missing(&self, why: String) -> Attached {
        Attached {
            part: self.name,
            way: None,
            blind: Some(self.blind(self.without, why)),
        }
    }
}

struct Attaching<'a, 'p> {
    programs: &'a mut Programs<'p>,
    /// `None`: all programs are loaded.
    btf: Option<&'a Btf>,
    cgroup: &'a File,
    /// Programs that are attached: some are of two parts, or of two ways.
    done: Vec<&'static str>,
}

impl Attaching<'_, '_> {
    fn part(&mut self, part: &Part, probes: Probes) -> Attached {
        let mut why = Vec::new();
        for way in part.ways.iter().filter(|way| way.wanted.contains(&probes)) {
            match self.way(way) {
                Ok(()) => return part.seen_by(way, why.join("; ")),
                Err(error) => why.push(told(&error)),
            }
        }
        part.missing(why.join("; "))
    }

    /// All of its programs. Where one cannot be attached, those before it stay: what two
    /// ways see is told once.
    fn way(&mut self, way: &Way) -> Result<(), KernelError> {
        for (kind, name, target) in way.programs {
            if !self.done.contains(name) {
                self.program(kind, name, target)?;
                self.done.push(name);
            }
        }
        Ok(())
    }

    fn program(
        &mut self,
        kind: &Kind,
        name: &'static str,
        target: &'static str,
    ) -> Result<(), KernelError> {
        let fail = |source| KernelError::Program { name, source };
        let (programs, btf) = (&mut *self.programs, self.btf);
        match kind {
            Kind::Tracepoint => {
                let program: &mut BtfTracePoint = one_of(programs, name)?;
                if let Some(btf) = btf {
                    program.load(target, btf).map_err(fail)?;
                }
                program.attach().map_err(fail)?;
            }
            Kind::Fentry => {
                let program: &mut FEntry = one_of(programs, name)?;
                if let Some(btf) = btf {
                    program.load(target, btf).map_err(fail)?;
                }
                program.attach().map_err(fail)?;
            }
            Kind::Fexit => {
                let program: &mut FExit = one_of(programs, name)?;
                if let Some(btf) = btf {
                    program.load(target, btf).map_err(fail)?;
                }
                program.attach().map_err(fail)?;
            }
            Kind::Kprobe(_) => {
                let program: &mut KProbe = one_of(programs, name)?;
                if btf.is_some() {
                    program.load().map_err(fail)?;
                }
                program.attach(target, 0).map_err(fail)?;
            }
            Kind::Hook(_) => {
                let program: &mut CgroupSockAddr = one_of(programs, name)?;
                if btf.is_some() {
                    program.load().map_err(fail)?;
                }
                let mode = CgroupAttachMode::Single;
                program.attach(self.cgroup, mode).map_err(fail)?;
            }
        }
        Ok(())
    }
}

/// An error and what caused it, on one line; of the verifier's log its beginning.
fn told(error: &KernelError) -> String {
    const MOST: usize = 400;
    let mut all = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        let text = error.to_string();
        if !all.contains(&text) {
            all = format!("{}: {text}", all.trim_end());
        }
        source = error.source();
    }
    let words: Vec<&str> = all.split_whitespace().collect();
    let line: String = words.join(" ").chars().take(MOST).collect();
    line.trim_end_matches(". Verifier output:").to_owned()
}

/// As the programs want it: the time between two events, nanoseconds; 0: none at all.
pub(super) fn limits(config: &config::Kernel, observe: bool) -> Limits {
    let between = |rate: config::Count| match observe {
        true => 1_000_000_000 / u64::from(rate.0),
        false => 0,
    };
    Limits {
        socket: between(config.sockets_per_second),
        other: between(config.events_per_second),
    }
}
