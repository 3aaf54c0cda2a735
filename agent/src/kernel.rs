//! The kernel side, seen from the agent: `start` brings programs, links and maps into the
//! kernel or adopts those that are there, `pins` is what outlives the agent of them (`kept`:
//! programs for the next one; `link` replaces hooks in place), `maps` is what is read and
//! written at run time (`ranges`: what is asked about), `observers` is what pods are seen
//! by, `events` decodes the ring, `inherit` takes over the sockets that an earlier agent
//! followed, `diag` lists sockets and destroys them. `cgroup` and `netns` are the two kernel
//! objects that a pod is known by, `pids` says whose process ids are seen, `btf` finds fields
//! in the kernel's structures. `guard` keeps pods from connecting while no agent is there
//! yet, `agents` are those that have handed over.

mod agents;
mod btf;
mod cgroup;
mod container;
pub mod diag;
mod events;
mod guard;
mod inherit;
mod kept;
mod link;
mod maps;
mod netns;
mod observers;
pub mod pids;
mod pins;
mod ranges;
mod start;

pub use agents::AgentProcess;
pub use cgroup::{
    CgroupMount, PodDirs, Pods, PodsRoot, cgroup_mounts, find_pods_roots, id as cgroup_id,
    processes, started,
};
pub use container::read_in_pod;
pub use events::{Event, EventKind, Role, SocketLife, Task, decode, errno_name, text};
pub use guard::guard;
pub use maps::{ClientEntry, from_abi, monotonic, to_abi};
pub use netns::{Netns, addresses as netns_addresses, namespace_inode};
pub use observers::{Attached, Blind};
pub use pins::{Kernel, KernelError, cleanup, own_cgroup, shape};
pub use start::{Start, Types, kept};
