//! All maps. Sizes here are the defaults; the agent sets those of its
//! configuration before it loads. A map is LRU only where losing an entry is
//! safe: `ORIGINS` and `PROBES`, where it turns a probe away under STRICT, `FOREIGN`, where
//! it costs a question, `AGENTS`, which is larger than the number of agents that live at
//! once, and those of observers, where something is told once more.

use aya_ebpf::{
    macros::map,
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf, SockHash},
};
use postern_ebpf::{
    Address, Agent, Bucket, COUNTERS as COUNTER_COUNT, Call, Client, Config, Counter, Dial,
    Endpoint, Flow, Listener, MeshKey, Probe, RANGES as RANGE_COUNT, Tracked, Workload,
};

use crate::observe::processes::ExecScratch;

/// Allocate entries when they are needed, not all at once.
const NO_PREALLOC: u32 = aya_ebpf::bindings::BPF_F_NO_PREALLOC;

#[map]
pub static CONFIG: Array<Config> = Array::with_max_entries(1, 0);

/// Agents that have handed over. LRU: there is one for each upgrade, and the oldest have
/// long ended.
#[map]
pub static AGENTS: LruHashMap<Agent, u32> = LruHashMap::with_max_entries(1_024, 0);

/// Known workloads by the cookie of their network namespace.
#[map]
pub static WORKLOADS: HashMap<u64, Workload> = HashMap::with_max_entries(4_096, NO_PREALLOC);

/// Known workloads by the id of their pod-level cgroup.
#[map]
pub static CGROUPS: HashMap<u64, Workload> = HashMap::with_max_entries(4_096, NO_PREALLOC);

/// Destinations in the mesh.
#[map]
pub static MESH: HashMap<MeshKey, u32> = HashMap::with_max_entries(131_072, NO_PREALLOC);

/// Addresses that pods of the cluster may have, whether they are known or not.
#[map]
pub static RANGES: LpmTrie<Address, u32> = LpmTrie::with_max_entries(RANGE_COUNT, 0);

/// Addresses within `RANGES` that are no pod's, to the time until which that holds.
#[map]
pub static FOREIGN: LruHashMap<Address, u64> = LruHashMap::with_max_entries(16_384, 0);

/// Steered connections by socket cookie, until the socket is released.
#[map]
pub static DIALS: HashMap<u64, Dial> = HashMap::with_max_entries(131_072, NO_PREALLOC);

/// Steered connections by source, until the agent has accepted them.
#[map]
pub static FLOWS: HashMap<Endpoint, Dial> = HashMap::with_max_entries(131_072, NO_PREALLOC);

/// Real clients of the agent's last-hop connections; written by the agent.
#[map]
pub static CLIENTS: HashMap<Endpoint, Client> = HashMap::with_max_entries(131_072, NO_PREALLOC);

/// Sockets of the node's own processes on their way to a local pod.
#[map]
pub static ORIGINS: LruHashMap<u64, u32> = LruHashMap::with_max_entries(1_024, 0);

/// Connections of the node's own processes to local pods.
#[map]
pub static PROBES: LruHashMap<Probe, u64> = LruHashMap::with_max_entries(4_096, 0);

/// The agent's listening sockets.
#[map]
pub static LISTENERS: SockHash<Listener> = SockHash::with_max_entries(8_192, 0);

/// Open TCP sockets of enrolled pods by cookie.
#[map]
pub static SOCKETS: HashMap<u64, Tracked> = HashMap::with_max_entries(131_072, NO_PREALLOC);

/// Sockets whose connect has failed and was told, until `connect` says so itself.
#[map]
pub static TOLD: LruHashMap<u64, u32> = LruHashMap::with_max_entries(4_096, 0);

/// UDP flows that were told, to the time (`CLOCK_MONOTONIC`, ns) of their last packet.
#[map]
pub static DATAGRAMS: LruHashMap<Flow, u64> = LruHashMap::with_max_entries(16_384, 0);

/// Raw and packet sockets that were told, by cookie.
#[map]
pub static RAWS: LruHashMap<u64, u32> = LruHashMap::with_max_entries(1_024, 0);

/// When each pod may have used up its events of a kind.
#[map]
pub static BUCKETS: LruHashMap<Bucket, u64> = LruHashMap::with_max_entries(16_384, 0);

/// Calls of `inet_stream_connect` that kprobes wait for, by thread.
#[map]
pub static CALLS: LruHashMap<u64, Call> = LruHashMap::with_max_entries(8_192, 0);

/// Where an exec event is put together.
#[map]
pub static EXEC: PerCpuArray<ExecScratch> = PerCpuArray::with_max_entries(1, 0);

/// Kernel events of enrolled pods.
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);

#[map]
pub static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(COUNTER_COUNT, 0);

#[inline(always)]
pub fn config() -> Option<&'static Config> {
    CONFIG.get(0)
}

#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: a per-CPU slot, and programs are not preempted by themselves.
        unsafe { *value += 1 };
    }
}
