//! `postern doctor`: what this kernel and host offer, and what the agent does
//! without it. Changes nothing.

use std::path::Path;

use crate::{
    app::hook_cgroup,
    config::{Config, Source},
    kernel::{Attached, Kernel, cgroup_mounts, diag, find_pods_roots},
    kubernetes,
};

/// One finding.
pub struct Finding {
    pub ok: bool,
    /// Whether the agent cannot run without it.
    pub required: bool,
    pub what: String,
}

pub fn examine(config: &Config) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut find = |ok: bool, required: bool, what: String| {
        findings.push(Finding { ok, required, what });
    };
    let release = nix::sys::utsname::uname()
        .map(|u| u.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    let mut numbers = release
        .split(['.', '-'])
        .map(|n| n.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    find(
        version >= (6, 1),
        true,
        format!("Linux {release} (6.1 or later is supported)"),
    );
    find(
        nix::unistd::geteuid().is_root(),
        true,
        "running as root".into(),
    );
    match cgroup_mounts() {
        Ok(mounts) => {
            let v2 = mounts.iter().find(|m| m.v2);
            find(
                v2.is_some(),
                true,
                match v2 {
                    Some(mount) => format!("cgroup v2 at {}", mount.path.display()),
                    None => "cgroup v2 is not mounted: no hook can be attached".into(),
                },
            );
            let roots = find_pods_roots(&mounts, config.kernel.cgroup.as_deref());
            find(
                !roots.is_empty(),
                false,
                match roots.first() {
                    Some(root) => format!("pods below {}", root.path.display()),
                    None => "no kubepods cgroup yet: pods are looked for every 2 s".into(),
                },
            );
            if !roots.is_empty() && roots.iter().all(|root| !root.v2) {
                find(false, false, "pods are in cgroup v1 only: they are told by network namespace, \
                    host-network pods cannot be enrolled, and their connects count as the node's own".into());
            }
        }
        Err(error) => find(false, true, format!("/proc/self/mounts: {error}")),
    }
    let observers = hook_cgroup(config)
        .map_err(|error| error.to_string())
        .and_then(|(cgroup, _)| {
            Kernel::try_observers(&config.kernel, &cgroup).map_err(|error| error.to_string())
        });
    match observers {
        Ok(parts) => {
            for Attached { part, way, blind } in parts {
                let by = way.map(|way| format!(" by {way}")).unwrap_or_default();
                let what = match &blind {
                    None => format!("audit of {part}{by}"),
                    Some(blind) => format!("audit of {part}{by}: {}: {}", blind.without, blind.why),
                };
                find(blind.is_none(), false, what);
            }
        }
        Err(why) => find(
            false,
            false,
            format!("{why}: no kernel events in the audit log"),
        ),
    }
    match diag::can_destroy() {
        Ok(()) => find(
            true,
            false,
            "sockets can be destroyed (SOCK_DESTROY)".into(),
        ),
        Err(error) => find(
            false,
            false,
            format!("SOCK_DESTROY: {error}: connections that are not to be cannot be cut"),
        ),
    }
    let sources = [config.workloads.source, config.policies.source];
    if sources.contains(&Source::Kubernetes) {
        // Without it the agent runs on what it knew last.
        match kubernetes::examine(&config.kubernetes) {
            Ok(what) => find(true, false, what),
            Err(why) => find(false, false, why),
        }
    }
    let bpffs = Path::new("/sys/fs/bpf").is_dir();
    find(
        bpffs,
        true,
        "/sys/fs/bpf (mounted by the agent if it is not)".into(),
    );
    let kprobes = Path::new("/sys/bus/event_source/devices/kprobe").exists();
    find(
        kprobes,
        false,
        if kprobes {
            "kprobes"
        } else {
            "no kprobes: see above for what is used instead"
        }
        .into(),
    );
    let lsm = std::fs::read_to_string("/sys/kernel/security/lsm").unwrap_or_default();
    let bpf_lsm = lsm.split(',').any(|name| name.trim() == "bpf");
    find(
        bpf_lsm,
        false,
        if bpf_lsm {
            "BPF LSM"
        } else {
            "no BPF LSM: not used so far"
        }
        .into(),
    );
    let files = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE);
    let (soft, _hard) = files.unwrap_or_default();
    let most = u64::from(config.kernel.max_connections) * 2;
    find(
        soft >= most,
        false,
        format!("{soft} open files: about {} connections at once", soft / 2),
    );
    // PROC_PID_INIT_INO, include/linux/proc_ns.h.
    const INITIAL: u64 = 0xeffffffc;
    let own =
        std::fs::metadata("/proc/self/ns/pid").map(|m| std::os::unix::fs::MetadataExt::ino(&m));
    find(
        own.is_ok_and(|ino| ino == INITIAL),
        true,
        "in the host's PID namespace (hostPID)".into(),
    );
    findings
}
