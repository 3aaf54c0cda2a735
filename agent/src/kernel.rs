//! The kernel side, seen from the agent: `load` brings programs, links and maps
//! into the kernel or adopts those that are pinned, `maps` is what is read and
//! written at run time (`ranges`: what is asked about), `observers` is what pods are seen
//! by, `events` decodes the ring,
//! `inherit` takes over the sockets that an earlier agent followed, `diag` lists sockets
//! and destroys them. `cgroup` and `netns` are the two kernel objects that a pod is known
//! by, `pids` says whose process ids are seen, `btf` finds fields in the kernel's structures.
//! `guard` keeps pods from connecting while no agent is there yet. `link` replaces hooks in
//! place, `agents` are those that have handed over.

mod agents;
mod btf;
mod cgroup;
mod container;
pub mod diag;
mod events;
mod guard;
mod inherit;
mod link;
mod load;
mod maps;
mod netns;
mod observers;
pub mod pids;
mod ranges;

pub use agents::AgentProcess;
pub use cgroup::{
    CgroupMount, PodDirs, Pods, PodsRoot, cgroup_mounts, find_pods_roots, id as cgroup_id,
    processes, started,
};
pub use container::read_in_pod;
pub use events::{Event, EventKind, Role, SocketLife, Task, decode, errno_name, text};
pub use guard::guard;
pub use load::{Kernel, KernelError, Start, Types, cleanup, own_cgroup, shape};
pub use maps::{ClientEntry, from_abi, monotonic, to_abi};
pub use netns::{Netns, addresses as netns_addresses, namespace_inode};
pub use observers::{Attached, Blind};
