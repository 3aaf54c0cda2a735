//! Kubernetes objects as `kubectl get -o yaml` prints them: the fields that Postern
//! uses, by their names in the Kubernetes API reference (v1.33). All others are
//! passed over; their meaning is Kubernetes' business.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

use crate::objects::{Head, Meta, Object, ignore, or_default};

#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum WorkloadObject {
    Pod(Box<Pod>),
    Service(Box<Service>),
    EndpointSlice(Box<EndpointSlice>),
    Namespace(Box<Namespace>),
    Node(Box<Node>),
}

macro_rules! manifest {
    ($($(#[$doc:meta])* $name:ident { $($(#[$attribute:meta])* $field:ident: $ty:ty),* $(,)? })*) => {
        $($(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
        #[serde(default, rename_all = "camelCase")]
        pub struct $name {
            // `null` stands for an absent field in Kubernetes.
            $($(#[$attribute])* #[serde(deserialize_with = "or_default")] pub $field: $ty,)*
        })*
    };
}

manifest! {
    /// core/v1 Pod.
    Pod { metadata: Meta, spec: PodSpec, status: PodStatus }
    PodSpec {
        node_name: String,
        service_account_name: Option<String>,
        host_network: bool,
        containers: Vec<Container>,
        init_containers: Vec<Container>,
    }
    Container { ports: Vec<ContainerPort>, restart_policy: Option<String> }
    ContainerPort {
        name: Option<String>,
        container_port: u16,
        host_port: u16,
        #[serde(rename = "hostIP")]
        host_ip: String,
        protocol: Option<String>,
    }
    PodStatus {
        phase: String,
        #[serde(rename = "hostIP")]
        host_ip: Option<String>,
        #[serde(rename = "hostIPs")]
        host_ips: Vec<PodIp>,
        #[serde(rename = "podIP")]
        pod_ip: Option<String>,
        #[serde(rename = "podIPs")]
        pod_ips: Vec<PodIp>,
        conditions: Vec<Condition>,
    }
    PodIp { ip: String }
    Condition { r#type: String, status: String }

    /// core/v1 Service.
    Service { metadata: Meta, spec: ServiceSpec, status: ServiceStatus }
    ServiceStatus { load_balancer: LoadBalancerStatus }
    LoadBalancerStatus { ingress: Vec<Ingress> }
    Ingress { ip: String, ip_mode: Option<String> }
    ServiceSpec {
        r#type: String,
        #[serde(rename = "clusterIP")]
        cluster_ip: Option<String>,
        #[serde(rename = "clusterIPs")]
        cluster_ips: Vec<String>,
        #[serde(rename = "externalIPs")]
        external_ips: Vec<String>,
        selector: BTreeMap<String, String>,
        ports: Vec<ServicePort>,
        session_affinity: String,
        session_affinity_config: SessionAffinityConfig,
        internal_traffic_policy: String,
        external_traffic_policy: String,
        traffic_distribution: String,
        publish_not_ready_addresses: bool,
    }
    SessionAffinityConfig {
        #[serde(rename = "clientIP")]
        client_ip: ClientIpConfig,
    }
    ClientIpConfig { timeout_seconds: Option<u32> }
    ServicePort {
        name: String,
        protocol: Option<String>,
        port: u16,
        target_port: Option<PortOrName>,
        node_port: u16,
    }

    /// discovery.k8s.io/v1 EndpointSlice.
    EndpointSlice {
        metadata: Meta,
        address_type: String,
        endpoints: Vec<Endpoint>,
        ports: Vec<EndpointPort>,
    }
    Endpoint {
        addresses: Vec<String>,
        conditions: EndpointConditions,
        hints: EndpointHints,
        node_name: Option<String>,
        target_ref: ObjectReference,
    }
    ObjectReference { kind: String, namespace: String, name: String, uid: String }
    EndpointConditions {
        ready: Option<bool>,
        serving: Option<bool>,
        terminating: Option<bool>,
    }
    EndpointHints { for_zones: Vec<Hint>, for_nodes: Vec<Hint> }
    Hint { name: String }
    EndpointPort { name: String, port: Option<u16>, protocol: Option<String> }

    /// core/v1 Namespace.
    Namespace { metadata: Meta }

    /// core/v1 Node.
    Node { metadata: Meta, spec: NodeSpec, status: NodeStatus }
    NodeSpec {
        #[serde(rename = "podCIDR")]
        pod_cidr: Option<String>,
        #[serde(rename = "podCIDRs")]
        pod_cidrs: Vec<String>,
        taints: Vec<Taint>,
    }
    Taint { key: String }
    NodeStatus { addresses: Vec<NodeAddress> }
    NodeAddress { r#type: String, address: String }
}

/// Absent means TCP, in every object that has it.
pub fn is_tcp(protocol: Option<&String>) -> bool {
    protocol.is_none_or(|protocol| protocol == "TCP")
}

/// IntOrString of the API.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(untagged)]
pub enum PortOrName {
    Port(u16),
    Name(String),
}

impl Object for WorkloadObject {
    fn read<'de, D: Deserializer<'de>>(head: &Head, from: D) -> Result<Option<Self>, D::Error> {
        Ok(Some(
            match (head.api_version.as_str(), head.kind.as_str()) {
                ("v1", "Pod") => Self::Pod(Deserialize::deserialize(from)?),
                ("v1", "Service") => Self::Service(Deserialize::deserialize(from)?),
                ("v1", "Namespace") => Self::Namespace(Deserialize::deserialize(from)?),
                ("v1", "Node") => Self::Node(Deserialize::deserialize(from)?),
                ("discovery.k8s.io/v1", "EndpointSlice") => {
                    Self::EndpointSlice(Deserialize::deserialize(from)?)
                }
                // Other kinds say nothing about what runs where.
                _ => {
                    ignore(from)?;
                    return Ok(None);
                }
            },
        ))
    }
}
