//! Between the boot of a machine and its first agent nothing is pinned (a bpffs is
//! memory), and pods that the kubelet brings back would dial in plaintext. The guard is
//! attached and pinned before the kubelet starts, needs no process, and stays until an
//! agent's own hooks are in place.

use std::{
    fs::{self, File},
    path::Path,
};

use aya::{
    EbpfLoader,
    programs::{CgroupAttachMode, CgroupSockAddr, links::FdLink},
};

use super::{
    netns::Netns,
    pins::{KernelError, mount_bpffs, pin, replace_pin},
    start::{PROGRAMS, SOCK_ADDR, program},
};
use crate::config;

const GUARDS: [&str; 2] = ["postern_guard4", "postern_guard6"];

/// From now on, and until an agent is ready, what is not in the network namespace of the
/// caller cannot open TCP connections. Returns whether it is so: it is not where an agent
/// has been ready already, whose hooks stay when it dies.
pub fn guard(config: &config::Kernel, cgroup: &Path) -> Result<bool, KernelError> {
    mount_bpffs(&config.pin)?;
    let links = config.pin.join("links");
    if has_agent(&links) {
        return Ok(false);
    }
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| KernelError::Path { path, source }
    };
    fs::create_dir_all(&links).map_err(at(&links))?;
    let root = File::open(cgroup).map_err(at(cgroup))?;
    let node = Netns::own().map_err(at(Path::new("/proc/self/ns/net")))?;
    let mut ebpf = EbpfLoader::new()
        .override_global("NODE_NETNS", &node.cookie, true)
        .load(PROGRAMS)?;
    for name in GUARDS {
        let program: &mut CgroupSockAddr = program(&mut ebpf, name)?;
        let fail = |source| KernelError::Program { name, source };
        program.load().map_err(fail)?;
        // Links always stand beside others; they take no flags (bpf_link_create).
        let id = program
            .attach(&root, CgroupAttachMode::Single)
            .map_err(fail)?;
        let link = program.take_link(id).map_err(fail)?;
        let link = FdLink::try_from(link).map_err(|source| KernelError::Link { name, source })?;
        pin(name, &links, link)?;
        replace_pin(name, &links)?;
    }
    // An agent that became ready meanwhile has looked for guards before this one was
    // there: it pins its hooks first, then looks.
    let late = has_agent(&links);
    if late {
        lift(&links);
    }
    Ok(!late)
}

/// Whether an agent's hooks are in place, by the last that is put there.
fn has_agent(links: &Path) -> bool {
    SOCK_ADDR.iter().all(|(name, _)| links.join(name).exists())
}

/// An agent's hooks are in place: the guard ends.
pub(super) fn lift(links: &Path) {
    for name in GUARDS {
        let _absent = fs::remove_file(links.join(name));
    }
}
