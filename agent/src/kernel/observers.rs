//! What the agent sees of pods beside what it carries. Each part stands alone: one that
//! this kernel does not allow is missing, named, and no reason not to run. Nothing of it
//! is pinned: without an agent nobody reads what it sees.

use std::fs::File;

use aya::{
    Btf, Endianness,
    programs::{BtfTracePoint, CgroupAttachMode, CgroupSockAddr, FEntry, FExit, KProbe},
};
use postern_ebpf::Limits;

use super::{
    btf,
    load::{KernelError, Programs, one_of},
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
struct Part {
    name: &'static str,
    /// What is lacking where no way is to be had.
    without: &'static str,
    ways: &'static [Way],
}

/// One way of the kernel to call programs; which of a part's is the first that works,
/// among those that are wanted.
struct Way {
    name: &'static str,
    wanted: &'static [Probes],
    programs: &'static [(Kind, &'static str, &'static str)],
    /// What is lacking still.
    without: Option<&'static str>,
}

/// How a program is attached to what is named beside it.
enum Kind {
    Tracepoint,
    Fentry,
    Fexit,
    /// A kprobe or a kretprobe.
    Kprobe,
    Hook,
}

const ANY: &[Probes] = &[Probes::Auto, Probes::Fentry, Probes::Kprobe];
const FENTRY: &[Probes] = &[Probes::Auto, Probes::Fentry];
const KPROBE: &[Probes] = &[Probes::Auto, Probes::Kprobe];

const fn tracepoint(programs: &'static [(Kind, &'static str, &'static str)]) -> Way {
    Way {
        name: "a tracepoint",
        wanted: ANY,
        programs,
        without: None,
    }
}

const fn fentry(programs: &'static [(Kind, &'static str, &'static str)]) -> Way {
    Way {
        name: "fentry",
        wanted: FENTRY,
        programs,
        without: None,
    }
}

const fn kprobe(programs: &'static [(Kind, &'static str, &'static str)]) -> Way {
    Way {
        name: "kprobes",
        wanted: KPROBE,
        programs,
        without: None,
    }
}

const SENT: (Kind, &str, &str) = (Kind::Tracepoint, "postern_sent", "sock_send_length");

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
            kprobe(&[(Kind::Kprobe, "postern_k_accept", "inet_csk_accept")]),
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
                    Kind::Kprobe,
                    "postern_k_connect_enter",
                    "inet_stream_connect",
                ),
                (Kind::Kprobe, "postern_k_connect", "inet_stream_connect"),
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
                (Kind::Kprobe, "postern_k_udp4", "udp_sendmsg"),
                (Kind::Kprobe, "postern_k_udp6", "udpv6_sendmsg"),
            ]),
            Way {
                name: "hooks and a tracepoint",
                wanted: &[Probes::Auto],
                programs: &[
                    (Kind::Hook, "postern_sendmsg4", ""),
                    (Kind::Hook, "postern_sendmsg6", ""),
                    SENT,
                ],
                without: None,
            },
            Way {
                name: "hooks",
                wanted: &[Probes::Auto],
                programs: &[
                    (Kind::Hook, "postern_sendmsg4", ""),
                    (Kind::Hook, "postern_sendmsg6", ""),
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
                (Kind::Kprobe, "postern_k_raw4", "raw_sendmsg"),
                (Kind::Kprobe, "postern_k_raw6", "rawv6_sendmsg"),
                (Kind::Kprobe, "postern_k_packet", "packet_sendmsg"),
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
    let ways = PARTS.iter().flat_map(|part| part.ways);
    let programs = ways.flat_map(|way| way.programs);
    let names = programs.map(|(kind, _, target)| match kind {
        Kind::Tracepoint => format!("btf_trace_{target}"),
        _ => (*target).to_owned(),
    });
    let names: Vec<String> = names.collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    Btf::parse(&kernel.only(&names), Endianness::default()).map_err(|error| error.to_string())
}

/// Attaches all parts, hooks to this cgroup.
pub(super) fn attach(
    programs: &mut Programs<'_>,
    btf: &Btf,
    cgroup: &File,
    probes: Probes,
) -> Vec<Attached> {
    let mut attaching = Attaching {
        programs,
        btf,
        cgroup,
        done: Vec::new(),
    };
    let parts = PARTS.iter();
    parts.map(|part| attaching.part(part, probes)).collect()
}

pub(super) fn all_blind(why: &str) -> Vec<Attached> {
    PARTS.iter().map(|part| part.missing(why.into())).collect()
}

impl Part {
    fn blind(&self, without: &'static str, why: String) -> Blind {
        Blind {
            part: self.name,
            why,
            without,
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
    btf: &'a Btf,
    cgroup: &'a File,
    /// Programs that are attached: some are of two parts, or of two ways.
    done: Vec<&'static str>,
}

impl Attaching<'_, '_> {
    fn part(&mut self, part: &Part, probes: Probes) -> Attached {
        let mut why = Vec::new();
        for way in part.ways.iter().filter(|way| way.wanted.contains(&probes)) {
            match self.way(way) {
                Ok(()) => {
                    let lacking = way.without.map(|w| part.blind(w, why.join("; ")));
                    return Attached {
                        part: part.name,
                        way: Some(way.name),
                        blind: lacking,
                    };
                }
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
                program.load(target, btf).map_err(fail)?;
                program.attach().map_err(fail)?;
            }
            Kind::Fentry => {
                let program: &mut FEntry = one_of(programs, name)?;
                program.load(target, btf).map_err(fail)?;
                program.attach().map_err(fail)?;
            }
            Kind::Fexit => {
                let program: &mut FExit = one_of(programs, name)?;
                program.load(target, btf).map_err(fail)?;
                program.attach().map_err(fail)?;
            }
            Kind::Kprobe => {
                let program: &mut KProbe = one_of(programs, name)?;
                program.load().map_err(fail)?;
                program.attach(target, 0).map_err(fail)?;
            }
            Kind::Hook => {
                let program: &mut CgroupSockAddr = one_of(programs, name)?;
                program.load().map_err(fail)?;
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
