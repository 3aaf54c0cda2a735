//! A node of the cluster: its addresses, where it stands, what its pods are given.

use std::net::IpAddr;

use super::{manifest, table::parse};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// `topology.kubernetes.io/zone`.
    pub zone: Option<String>,
    /// InternalIP and ExternalIP: what NodePorts and host ports are dialled at.
    pub addresses: Vec<IpAddr>,
    /// `spec.podCIDRs`; empty where addresses are given out by something else.
    pub pod_cidrs: Vec<String>,
}

impl Node {
    pub fn new(object: &manifest::Node) -> Self {
        const ZONE: &str = "topology.kubernetes.io/zone";
        let spec = &object.spec;
        let mut pod_cidrs = spec.pod_cidrs.clone();
        if pod_cidrs.is_empty() {
            // The older field, for one family.
            pod_cidrs.extend(spec.pod_cidr.clone());
        }
        let mut node = Self {
            zone: object.metadata.labels.get(ZONE).cloned(),
            addresses: Vec::new(),
            pod_cidrs,
        };
        for address in &object.status.addresses {
            if matches!(address.r#type.as_str(), "InternalIP" | "ExternalIP") {
                node.add(parse(&address.address));
            }
        }
        node
    }

    /// Adds what a pod's `status.hostIPs` says of its node, for where there are no
    /// Node objects. Loopback would be every pod's own.
    pub fn add(&mut self, address: Option<IpAddr>) {
        let usable = |ip: &IpAddr| !ip.is_loopback() && !ip.is_unspecified();
        if let Some(address) = address.filter(usable)
            && !self.addresses.contains(&address)
        {
            self.addresses.push(address);
        }
    }
}
