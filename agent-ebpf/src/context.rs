//! Who is calling: which workload the current process belongs to, or an agent.

use aya_ebpf::helpers::{
    bpf_get_current_pid_tgid,
    generated::{bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id},
};
use postern_ebpf::{
    ANY_TGID, Address, Agent, Config, DEEPEST, MAPPED, PODS_ROOTS, SOME_LEVEL, Workload,
};

use crate::maps::{AGENTS, CGROUPS, WORKLOADS};

/// Whether an agent itself is running: the one in charge, or one that drains. By process
/// and cgroup together, for a number may be another process's by now. (Where its number is
/// not to be had, it has its cgroup for itself: kernel/pids.rs of the agent.)
#[inline(always)]
pub fn is_agent(config: &Config) -> bool {
    let tgid = match config.agent_tgid {
        ANY_TGID => ANY_TGID,
        _ => (bpf_get_current_pid_tgid() >> 32) as u32,
    };
    // SAFETY: a helper without arguments.
    let cgroup = unsafe { bpf_get_current_cgroup_id() };
    (tgid == config.agent_tgid && cgroup == config.agent_cgroup)
        || config.more_agents == 1 && known(cgroup, tgid)
}

/// Whether it is the cgroup of an agent: the one in charge, or one before it.
#[inline(always)]
pub fn is_agents_cgroup(config: &Config, cgroup: u64) -> bool {
    cgroup == config.agent_cgroup || config.more_agents == 1 && known(cgroup, 0)
}

#[inline(always)]
fn known(cgroup: u64, tgid: u32) -> bool {
    let agent = Agent {
        cgroup,
        tgid,
        _pad: 0,
    };
    // SAFETY: a plain number.
    unsafe { AGENTS.get(agent) }.is_some()
}

pub enum Caller {
    /// A pod that the agent knows, and its pod-level cgroup's id where it was
    /// known by that.
    Known(Workload, u64),
    /// May be a pod; the agent does not know it yet.
    Unknown,
    /// The node's own process: in its network namespace and in no pod.
    Node,
    /// Not a pod, and not the node: some other namespace on a host where pods
    /// are told by their cgroup.
    Foreign,
}

/// The workload that the current process belongs to. `netns` is the cookie of
/// the namespace of the socket or process in question.
#[inline(always)]
pub fn caller(config: &Config, netns: u64) -> Caller {
    let on_node = netns == config.node_netns;
    if !on_node {
        // SAFETY: the map's values are only replaced whole, by the agent.
        if let Some(workload) = unsafe { WORKLOADS.get(netns) } {
            return Caller::Known(*workload, 0);
        }
    }
    if let Some(level) = pods_level(config) {
        return match by_cgroup(level) {
            Some((workload, cgroup)) => Caller::Known(workload, cgroup),
            None => Caller::Unknown,
        };
    }
    if on_node {
        Caller::Node
    } else if config.pods_by_netns_only == 1 {
        Caller::Unknown
    } else {
        Caller::Foreign
    }
}

/// The depth of the pods' directory that the current process is below, if it is.
#[inline(always)]
fn pods_level(config: &Config) -> Option<u32> {
    for root in 0..PODS_ROOTS {
        let (id, level) = (config.pods_cgroup[root], config.pods_level[root]);
        if id == 0 {
            continue;
        }
        if level != SOME_LEVEL {
            if ancestor(level) == id {
                return Some(level);
            }
            continue;
        }
        for level in 1..=DEEPEST {
            if ancestor(level) == id {
                return Some(level);
            }
        }
    }
    None
}

/// The pod's directory lies one level below the pods' (QoS class Guaranteed) or
/// two (Burstable, BestEffort).
#[inline(always)]
fn by_cgroup(pods_level: u32) -> Option<(Workload, u64)> {
    for below in 1..=2 {
        let id = ancestor(pods_level + below);
        // SAFETY: the map's values are only replaced whole, by the agent.
        if let Some(workload) = unsafe { CGROUPS.get(id) } {
            return Some((*workload, id));
        }
    }
    None
}

#[inline(always)]
fn ancestor(level: u32) -> u64 {
    // SAFETY: a helper without pointer arguments.
    unsafe { bpf_get_current_ancestor_cgroup_id(level as i32) }
}

/// `::ffff:a.b.c.d` of an IPv4 address in network order.
#[inline(always)]
pub fn mapped(v4: u32) -> Address {
    [0, 0, MAPPED, v4]
}

#[inline(always)]
pub fn is_mapped(address: Address) -> bool {
    address[0] == 0 && address[1] == 0 && address[2] == MAPPED
}

/// An address in a context, word by word: the verifier refuses wider loads.
///
/// # Safety
/// `words` points into a program context at four readable words.
#[inline(always)]
pub unsafe fn read_address(words: *const u32) -> Address {
    // SAFETY: the caller's promise.
    unsafe {
        [
            words.read_volatile(),
            words.add(1).read_volatile(),
            words.add(2).read_volatile(),
            words.add(3).read_volatile(),
        ]
    }
}

/// Writes an address into a context, word by word.
///
/// # Safety
/// `words` points into a program context at four writable words.
#[inline(always)]
pub unsafe fn write_address(words: *mut u32, address: Address) {
    // SAFETY: the caller's promise.
    unsafe {
        words.write_volatile(address[0]);
        words.add(1).write_volatile(address[1]);
        words.add(2).write_volatile(address[2]);
        words.add(3).write_volatile(address[3]);
    }
}
