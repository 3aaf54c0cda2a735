//! A pod as the mesh knows it.

use std::{collections::BTreeMap, net::IpAddr, sync::OnceLock};

use super::{
    manifest::{Container, Pod, is_tcp},
    table::{MESH_LABEL, parse},
};
use crate::{
    config::Mesh,
    identity::{SpiffeId, TrustDomain},
};

/// A pod.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    pub uid: String,
    /// The uid that its cgroup directories bear: a static pod's is not its object's.
    pub cgroup_uid: String,
    pub namespace: String,
    pub name: String,
    pub service_account: String,
    pub node: String,
    pub addresses: Vec<IpAddr>,
    pub labels: BTreeMap<String, String>,
    /// Name of the controller that made it, or its own.
    pub owner: String,
    pub host_network: bool,
    pub enrolled: bool,
    /// Its condition `Ready`.
    pub ready: bool,
    pub terminating: bool,
    /// Named container ports of TCP.
    pub ports: Vec<(String, u16)>,
    /// Ports of its node that lead to its own (`hostPort`).
    pub host_ports: Vec<HostPort>,
    pub(super) known_as: KnownAs,
}

/// The identity that was asked for first: all connections share it. It follows from the rest.
#[derive(Debug, Default)]
pub(super) struct KnownAs(OnceLock<SpiffeId>);

/// A copy may be changed.
impl Clone for KnownAs {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl PartialEq for KnownAs {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct HostPort {
    /// `None`: all addresses of the node.
    pub address: Option<IpAddr>,
    pub port: u16,
    pub container_port: u16,
}

impl Workload {
    pub fn identity(&self, trust_domain: &TrustDomain) -> SpiffeId {
        let new = || {
            SpiffeId::new(
                trust_domain.clone(),
                self.namespace.clone(),
                self.service_account.clone(),
            )
        };
        let known = self.known_as.0.get_or_init(new);
        match known.trust_domain == *trust_domain {
            true => known.clone(),
            false => new(),
        }
    }

    /// Whether its inbound traffic goes through the agent of its node. A
    /// host-network pod shares the node's addresses, which are never steered.
    pub fn in_mesh(&self) -> bool {
        self.enrolled && !self.host_network
    }

    /// `app` label, or Kubernetes' recommended one: Istio's canonical name.
    pub fn app(&self) -> Option<&str> {
        [
            "service.istio.io/canonical-name",
            "app.kubernetes.io/name",
            "app",
        ]
        .iter()
        .find_map(|label| self.labels.get(*label))
        .map(String::as_str)
    }
}

pub fn label(labels: &BTreeMap<String, String>) -> Option<Mesh> {
    match labels.get(MESH_LABEL)?.as_str() {
        "enabled" => Some(Mesh::Enabled),
        "disabled" => Some(Mesh::Disabled),
        _ => None,
    }
}

/// `None` for a pod that has ended: its address may be another's by now.
pub fn workload(pod: &Pod, inherited: Mesh) -> Option<Workload> {
    let Pod {
        metadata: meta,
        spec,
        status,
    } = pod;
    if matches!(status.phase.as_str(), "Succeeded" | "Failed") {
        return None;
    }
    let listed = status.pod_ips.iter().map(|a| &a.ip).chain(&status.pod_ip);
    let mut addresses: Vec<IpAddr> = Vec::new();
    for address in listed.filter_map(|a| parse(a)) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    // Init containers with a restart policy run beside the others (KEP-753).
    let beside = |c: &&Container| c.restart_policy.as_deref() == Some("Always");
    let sidecars = spec.init_containers.iter().filter(beside);
    let (mut ports, mut host_ports) = (Vec::new(), Vec::new());
    let all = spec
        .containers
        .iter()
        .chain(sidecars)
        .flat_map(|c| &c.ports);
    for port in all.filter(|p| is_tcp(p.protocol.as_ref())) {
        if let Some(name) = &port.name {
            ports.push((name.clone(), port.container_port));
        }
        if port.host_port != 0 && !spec.host_network {
            host_ports.push(HostPort {
                address: parse(&port.host_ip).filter(|ip| !ip.is_unspecified()),
                port: port.host_port,
                container_port: port.container_port,
            });
        }
    }
    let condition = status.conditions.iter().find(|c| c.r#type == "Ready");
    Some(Workload {
        uid: meta.uid.clone(),
        cgroup_uid: static_uid(pod).unwrap_or(&meta.uid).to_owned(),
        namespace: meta.namespace().to_owned(),
        name: meta.name.clone(),
        service_account: spec
            .service_account_name
            .clone()
            .unwrap_or_else(|| "default".into()),
        node: spec.node_name.clone(),
        labels: meta.labels.clone(),
        owner: owner(pod).unwrap_or_else(|| meta.name.clone()),
        host_network: spec.host_network,
        enrolled: label(&meta.labels).unwrap_or(inherited) == Mesh::Enabled,
        ready: condition.is_none_or(|c| c.status == "True"),
        terminating: meta.deletion_timestamp.is_some(),
        addresses,
        ports,
        host_ports,
        known_as: KnownAs::default(),
    })
}

/// The uid that the kubelet gave a static pod: the hash of its manifest, 32 hex digits
/// (kubelet `pkg/kubelet/config/common.go`); the object at the API server is its mirror
/// and has a uid of its own. Whoever may create pods may write these annotations, so
/// the mirror must be owned by its node (as the NodeRestriction plugin makes sure for
/// the kubelet's), and what has dashes, as every other pod's uid, is not taken.
fn static_uid(pod: &Pod) -> Option<&String> {
    const MIRROR: &str = "kubernetes.io/config.mirror";
    const HASH: &str = "kubernetes.io/config.hash";
    let meta = &pod.metadata;
    let mirror = meta.annotations.get(MIRROR)?;
    let uid = meta.annotations.get(HASH).unwrap_or(mirror);
    let node = &pod.spec.node_name;
    let owned = (meta.owner_references.iter()).any(|o| o.kind == "Node" && o.name == *node);
    let hash = uid.len() == 32 && uid.bytes().all(|b| b.is_ascii_hexdigit());
    (owned && hash).then_some(uid)
}

/// The Deployment behind a ReplicaSet (whose name ends in the template's hash), or
/// whatever controls the pod.
fn owner(pod: &Pod) -> Option<String> {
    let controller = pod
        .metadata
        .owner_references
        .iter()
        .find(|o| o.controller)?;
    let hash = pod.metadata.labels.get("pod-template-hash");
    match hash.and_then(|hash| controller.name.strip_suffix(&format!("-{hash}"))) {
        Some(deployment) if controller.kind == "ReplicaSet" => Some(deployment.to_owned()),
        _ => Some(controller.name.clone()),
    }
}
