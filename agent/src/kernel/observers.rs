//! What the agent sees of pods beside what it carries. Each part stands alone: one that
//! this kernel does not allow is missing, named, and no reason not to run.

use aya::{
    Btf as AyaBtf, Ebpf, EbpfError,
    programs::{BtfTracePoint, FEntry, FExit, KProbe},
};
use postern_ebpf::Limits;

use super::{
    btf::{self, Btf},
    load::{KernelError, program},
};
use crate::config::{self, Probes};

/// A part of what is seen.
#[derive(Debug)]
pub struct Part {
    pub name: &'static str,
    /// What the audit log lacks without it.
    pub without: &'static str,
    way: Way,
}

/// How the kernel calls the program.
#[derive(Debug)]
enum Way {
    /// A tracepoint, and the program.
    Tracepoint(&'static str, &'static str),
    /// A function that is entered: by fentry, or by a kprobe.
    Entry(&'static str, &'static str, &'static str),
    /// A function that returns: by fexit, or by a kretprobe, and the kprobe before it
    /// that remembers its arguments.
    Exit(
        &'static str,
        &'static str,
        &'static str,
        Option<&'static str>,
    ),
}

/// A part that is missing, and why.
#[derive(Clone, Debug)]
pub struct Blind {
    pub part: &'static str,
    pub why: String,
    pub without: &'static str,
}

static PARTS: [Part; 10] = [
    Part {
        name: "sockets",
        without: "TCP sockets are not recorded",
        way: Way::Tracepoint("inet_sock_set_state", "postern_state"),
    },
    Part {
        name: "accept",
        without: "the process that accepted a connection is not recorded",
        way: Way::Exit(
            "inet_csk_accept",
            "postern_accept",
            "postern_k_accept",
            None,
        ),
    },
    Part {
        name: "connect",
        without: "connects that fail before a SYN is sent are not recorded",
        way: Way::Exit(
            "inet_stream_connect",
            "postern_connect",
            "postern_k_connect",
            Some("postern_k_connect_enter"),
        ),
    },
    Part {
        name: "udp",
        without: "UDP flows are not recorded",
        way: Way::Entry("udp_sendmsg", "postern_udp4", "postern_k_udp4"),
    },
    Part {
        name: "udp6",
        without: "UDP flows over IPv6 are not recorded",
        way: Way::Entry("udpv6_sendmsg", "postern_udp6", "postern_k_udp6"),
    },
    Part {
        name: "raw",
        without: "raw sockets are not recorded",
        way: Way::Entry("raw_sendmsg", "postern_raw4", "postern_k_raw4"),
    },
    Part {
        name: "raw6",
        without: "raw sockets over IPv6 are not recorded",
        way: Way::Entry("rawv6_sendmsg", "postern_raw6", "postern_k_raw6"),
    },
    Part {
        name: "packet",
        without: "packet sockets are not recorded",
        way: Way::Entry("packet_sendmsg", "postern_packet", "postern_k_packet"),
    },
    Part {
        name: "exec",
        without: "programs that are started are not recorded",
        way: Way::Tracepoint("sched_process_exec", "postern_exec"),
    },
    Part {
        name: "exit",
        without: "ends of processes are not recorded",
        way: Way::Tracepoint("sched_process_exit", "postern_exit"),
    },
];

impl Part {
    fn blind(&self, why: String) -> Blind {
        Blind {
            part: self.name,
            why,
            without: self.without,
        }
    }

    /// How this kernel would call the program, or why it cannot. It is asked for by what
    /// its type information names: nothing is loaded.
    fn available(&self, btf: &Btf, probes: Probes) -> Result<&'static str, String> {
        let (function, fentry, kprobe) = match self.way {
            Way::Tracepoint(..) => return Ok("tracepoint"),
            Way::Entry(function, ..) => (function, "fentry", "kprobe"),
            Way::Exit(function, ..) => (function, "fexit", "kretprobe"),
        };
        let has = |function| btf.arguments(function).is_some();
        if !has(function) {
            return Err(format!("this kernel has no {function}"));
        }
        if probes != Probes::Kprobe && has("register_ftrace_direct") {
            return Ok(fentry);
        }
        if probes != Probes::Fentry && has("register_kprobe") {
            return Ok(kprobe);
        }
        Err(match probes {
            Probes::Auto => "this kernel has neither fentry nor kprobes",
            Probes::Fentry => "this kernel has no fentry",
            Probes::Kprobe => "this kernel has no kprobes",
        }
        .into())
    }

    fn attach(&self, ebpf: &mut Ebpf, btf: &AyaBtf, probes: Probes) -> Result<(), KernelError> {
        match self.way {
            Way::Tracepoint(tracepoint, name) => {
                let program: &mut BtfTracePoint = program(ebpf, name)?;
                let fail = |source| KernelError::Program { name, source };
                program.load(tracepoint, btf).map_err(fail)?;
                program.attach().map_err(fail)?;
                Ok(())
            }
            Way::Entry(function, fentry, kprobe) => one_of(
                probes,
                ebpf,
                |ebpf| {
                    let program: &mut FEntry = program(ebpf, fentry)?;
                    let fail = |source| KernelError::Program {
                        name: fentry,
                        source,
                    };
                    program.load(function, btf).map_err(fail)?;
                    program.attach().map_err(fail)?;
                    Ok(())
                },
                |ebpf| attach_kprobe(ebpf, kprobe, function),
            ),
            Way::Exit(function, fexit, kretprobe, before) => one_of(
                probes,
                ebpf,
                |ebpf| {
                    let program: &mut FExit = program(ebpf, fexit)?;
                    let fail = |source| KernelError::Program {
                        name: fexit,
                        source,
                    };
                    program.load(function, btf).map_err(fail)?;
                    program.attach().map_err(fail)?;
                    Ok(())
                },
                |ebpf| {
                    if let Some(before) = before {
                        attach_kprobe(ebpf, before, function)?;
                    }
                    attach_kprobe(ebpf, kretprobe, function)
                },
            ),
        }
    }
}

fn attach_kprobe(
    ebpf: &mut Ebpf,
    name: &'static str,
    function: &'static str,
) -> Result<(), KernelError> {
    let program: &mut KProbe = program(ebpf, name)?;
    let fail = |source| KernelError::Program { name, source };
    program.load().map_err(fail)?;
    program.attach(function, 0).map_err(fail)?;
    Ok(())
}

/// One way, or where it is allowed and the first fails, the other.
fn one_of(
    probes: Probes,
    ebpf: &mut Ebpf,
    fentry: impl FnOnce(&mut Ebpf) -> Result<(), KernelError>,
    kprobe: impl FnOnce(&mut Ebpf) -> Result<(), KernelError>,
) -> Result<(), KernelError> {
    match probes {
        Probes::Fentry => fentry(ebpf),
        Probes::Kprobe => kprobe(ebpf),
        // What fails first tells more: kprobes are the older way.
        Probes::Auto => fentry(ebpf).or_else(|first| kprobe(ebpf).map_err(|_also| first)),
    }
}

/// Attaches all parts; those that are missing. They are not pinned: without an agent
/// nobody reads what they see.
pub(super) fn attach(ebpf: &mut Ebpf, probes: Probes) -> Vec<Blind> {
    let btf = match AyaBtf::from_sys_fs().map_err(EbpfError::from) {
        Ok(btf) => btf,
        Err(error) => return all_blind(&error.to_string()),
    };
    let missing = PARTS.iter().filter_map(|part| {
        let error = part.attach(ebpf, &btf, probes).err()?;
        Some(part.blind(told(&error)))
    });
    missing.collect()
}

fn told(error: &KernelError) -> String {
    let mut all = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        let text = error.to_string();
        if !all.contains(&text) {
            all = format!("{all}: {text}");
        }
        source = error.source();
    }
    all
}

pub(super) fn all_blind(why: &str) -> Vec<Blind> {
    PARTS
        .iter()
        .map(|part| part.blind(why.to_owned()))
        .collect()
}

/// The parts, and how each would be called; for `postern doctor`.
pub fn available(probes: Probes) -> Vec<(&'static Part, Result<&'static str, String>)> {
    let btf = Btf::of_kernel().map_err(|error| error.to_string());
    let btf = btf.and_then(|btf| btf::offsets(&btf).map(|_all_there| btf));
    let way = |part: &Part| match &btf {
        Ok(btf) => part.available(btf, probes),
        Err(why) => Err(why.clone()),
    };
    PARTS.iter().map(|part| (part, way(part))).collect()
}

/// As the programs want it: the time between two events, nanoseconds.
pub(super) fn limits(config: &config::Kernel) -> Limits {
    let between = |rate: config::Count| 1_000_000_000 / u64::from(rate.0);
    Limits {
        socket: between(config.sockets_per_second),
        other: between(config.events_per_second),
    }
}
