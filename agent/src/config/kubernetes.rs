//! The API server as a source of workloads and policies.

use std::path::PathBuf;

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where objects come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// Manifests in a directory, watched.
    #[default]
    Directory,
    /// The API server, watched; see `kubernetes`.
    Kubernetes,
}

/// The API server, where it is a source.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Kubernetes {
    /// File that says where it is and who this agent is. Empty: the service account of
    /// the pod that the agent runs in.
    pub kubeconfig: Option<PathBuf>,
    pub discovery: Discovery,
    /// Addresses of the cluster's pods, where `Node.spec.podCIDRs` says nothing of them.
    #[schemars(with = "Vec<String>")]
    pub pod_cidrs: Vec<IpNet>,
}

/// Which pods of other nodes are known before something dials them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Discovery {
    /// None: who dials one waits a moment, the first time.
    #[default]
    OnDemand,
    /// All: it costs memory, and a message for each change of any pod.
    All,
}
