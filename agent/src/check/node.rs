//! This node: its kernel, what the agent may do on it, and who else is there.

use std::{
    collections::BTreeSet,
    fs,
    net::{SocketAddr, TcpListener},
    path::Path,
};

use nix::sys::{
    statfs::{BPF_FS_MAGIC, statfs},
    statvfs::statvfs,
};

use super::Report;
use crate::{
    config::Config,
    doctor,
    proxy::{HBONE_PORT, OUTBOUND_PORT},
    telemetry,
};

/// By bit (include/uapi/linux/capability.h), and what each is for.
const CAPABILITIES: [(u32, &str, &str); 6] = [
    (39, "CAP_BPF", "kernel programs and maps"),
    (38, "CAP_PERFMON", "programs that trace"),
    (
        12,
        "CAP_NET_ADMIN",
        "network hooks, and sockets with addresses of others",
    ),
    (21, "CAP_SYS_ADMIN", "network namespaces of pods, and bpffs"),
    (
        19,
        "CAP_SYS_PTRACE",
        "which namespace and executable a process has",
    ),
    (
        2,
        "CAP_DAC_READ_SEARCH",
        "tokens of pods that OutboundToken exchanges",
    ),
];

pub fn examine(config: &Config, report: &mut Report) {
    for finding in doctor::examine(config) {
        match (finding.ok, finding.required) {
            (true, _) => report.ok(finding.what, "the agent uses it"),
            (false, true) => report.fail(
                finding.what,
                "the agent cannot run without it",
                "give the node what is named: docs/operate.md, \"What a node needs\"",
            ),
            (false, false) => report.warn(
                finding.what,
                "the agent runs, and does without what is named",
                "nothing, if you can do without it as well",
            ),
        }
    }
    bpffs(report);
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    capabilities(&status, report);
    let runs = telemetry::ask(&config.listen.admin, "/status").is_ok();
    ports(config, runs, report);
    state(config, report);
    let programs = programs(Path::new("/proc"));
    neighbours(
        &programs,
        Path::new("/sys/fs/bpf"),
        Path::new("/etc/cni/net.d"),
        report,
    );
    clock(
        &programs,
        Path::new("/run/systemd/timesync/synchronized"),
        report,
    );
}

fn bpffs(report: &mut Report) {
    let why = "programs and maps are pinned there, so that they outlive the agent";
    let path = "/sys/fs/bpf";
    match statfs(path).map(|fs| fs.filesystem_type()) {
        Ok(BPF_FS_MAGIC) => report.ok(format!("{path} is a bpffs"), why),
        _ => report.warn(
            format!("{path} is no bpffs"),
            why,
            "`mount -t bpf bpf /sys/fs/bpf` on the host; the agent does it where it may",
        ),
    }
}

/// From the lines of `/proc/PID/status`.
pub(super) fn capabilities(status: &str, report: &mut Report) {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let held = line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    let Some(held) = held else {
        report.fail(
            "capabilities cannot be read from /proc/self/status",
            "what the agent may do is not known",
            "mount /proc into the container",
        );
        return;
    };
    let missing: Vec<_> = CAPABILITIES
        .iter()
        .filter(|(bit, ..)| held >> bit & 1 == 0)
        .collect();
    if missing.is_empty() {
        report.ok(
            "all capabilities that the agent needs",
            "it is not privileged otherwise",
        );
    }
    for (_, name, purpose) in missing {
        report.fail(
            format!("{name} is missing"),
            format!("the agent needs it for: {purpose}"),
            format!(
                "add {} to the container's capabilities, or run as root",
                &name[4..]
            ),
        );
    }
}

fn ports(config: &Config, runs: bool, report: &mut Report) {
    if runs {
        report.ok(
            format!("an agent answers at {}", config.listen.admin.address),
            "the ports are its own",
        );
        return;
    }
    let why = "the agent listens there, and does not start when it cannot";
    for (key, address) in [
        ("listen.admin", config.listen.admin.address),
        ("listen.metrics", config.listen.metrics),
        ("listen.ready", config.listen.ready),
    ] {
        match TcpListener::bind(address) {
            Ok(_closed_again) => report.ok(format!("{address} ({key}) is free"), why),
            Err(error) => report.fail(
                format!("{address} ({key}): {error}"),
                why,
                format!("stop who listens there, or set {key} to another"),
            ),
        }
    }
    for port in [HBONE_PORT, OUTBOUND_PORT] {
        let address = SocketAddr::from(([0, 0, 0, 0], port));
        match TcpListener::bind(address) {
            Ok(_closed_again) => report.ok(
                format!("port {port} of the node is free"),
                "host-network pods are served there",
            ),
            Err(error) => report.warn(
                format!("port {port} of the node: {error}"),
                "host-network pods cannot be enrolled while another has it",
                "see who listens there with `ss -lntp`; Istio's ztunnel uses 15008",
            ),
        }
    }
}

fn state(config: &Config, report: &mut Report) {
    let kept = config.audit.retain.bytes.map_or(0, |bytes| bytes.0);
    let present = config.state.ancestors().find(|path| path.exists());
    let place = present.unwrap_or(Path::new("/"));
    let why = "keys, the audit log and the last state of the cluster are kept there";
    let Ok(space) = statvfs(place) else {
        report.fail(
            format!("{} cannot be looked at", place.display()),
            why,
            "see that it is on a disk that can be read",
        );
        return;
    };
    let free = space.blocks_available() * space.fragment_size();
    if config.audit.enabled && free < kept {
        report.warn(
            format!("{} MiB are free at {}", free >> 20, place.display()),
            format!(
                "the audit log keeps up to {} MiB (audit.retain.bytes)",
                kept >> 20
            ),
            "make room, or keep less",
        );
    } else {
        report.ok(
            format!("{} MiB are free at {}", free >> 20, place.display()),
            why,
        );
    }
}

/// The names of all programs that run here.
fn programs(proc: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(proc).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| fs::read_to_string(entry.path().join("comm")).ok())
        .map(|name| name.trim().to_owned())
        .collect()
}

/// Meshes and networks that hook where Postern hooks.
pub(super) fn neighbours(
    programs: &BTreeSet<String>,
    bpffs: &Path,
    cni: &Path,
    report: &mut Report,
) {
    let configured = |part: &str| {
        let entries = fs::read_dir(cni).into_iter().flatten().flatten();
        let mut entries = entries;
        entries.any(|entry| {
            let named = entry.file_name().to_string_lossy().contains(part);
            named || fs::read_to_string(entry.path()).is_ok_and(|text| text.contains(part))
        })
    };
    let istio = programs.contains("ztunnel") || configured("istio-cni");
    if istio {
        report.warn(
            "Istio's ambient mode is on this node (ztunnel, istio-cni)",
            "a pod in both meshes would have its connections taken twice",
            "keep namespaces apart: no `istio.io/dataplane-mode: ambient` where \
             `postern.dev/mesh: enabled` is, nor the other way round",
        );
    }
    let cilium = programs.contains("cilium-agent") || bpffs.join("cilium").exists();
    if cilium {
        report.warn(
            "Cilium is on this node",
            "its socket load balancing rewrites a Service's address in `connect` before \
             Postern sees it: policies with targetRefs to Services, and their names in the \
             audit log, are lost",
            "set `socketLB.hostNamespaceOnly: true` in Cilium; its kube-proxy replacement \
             then serves pods below Postern",
        );
    }
    if !istio && !cilium {
        report.ok(
            "no other mesh, and no network that hooks sockets",
            "hooks have an order",
        );
    }
}

pub(super) fn clock(programs: &BTreeSet<String>, synchronized: &Path, report: &mut Report) {
    let why = "certificates live for hours: peers refuse those of a node whose clock is wrong";
    let keepers = ["chronyd", "ntpd", "systemd-timesyn", "ptp4l", "phc2sys"];
    let keeper = keepers.iter().find(|name| programs.contains(**name));
    match (synchronized.exists(), keeper) {
        (true, _) => report.ok("the clock is synchronized", why),
        (false, Some(name)) => report.ok(format!("{name} keeps the clock"), why),
        (false, None) => report.warn(
            "nothing on this node is seen to keep the clock",
            why,
            "run chrony or systemd-timesyncd, unless the hypervisor keeps it",
        ),
    }
}
