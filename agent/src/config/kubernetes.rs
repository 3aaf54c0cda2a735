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
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Kubernetes {
    /// File that says where it is and who this agent is. Empty: the service account of
    /// the pod that the agent runs in.
    pub kubeconfig: Option<PathBuf>,
    pub discovery: Discovery,
    /// Addresses of the cluster's pods, where `Node.spec.podCIDRs` says nothing of them.
    #[schemars(with = "Vec<String>")]
    pub pod_cidrs: Vec<IpNet>,
    /// Whether policies of `security.istio.io` are read.
    pub istio: bool,
    /// Key of a taint that is taken off this node when the agent is ready: it keeps pods
    /// away from a node that has no agent yet.
    pub startup_taint: Option<TaintKey>,
}

impl Default for Kubernetes {
    fn default() -> Self {
        Self {
            kubeconfig: None,
            discovery: Discovery::default(),
            pod_cidrs: Vec::new(),
            istio: true,
            startup_taint: None,
        }
    }
}

/// A taint's key: a name, after a DNS domain and a slash where it has one.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(try_from = "String")]
#[schemars(with = "String")]
pub struct TaintKey(String);

impl TryFrom<String> for TaintKey {
    type Error = String;

    fn try_from(key: String) -> Result<Self, String> {
        let (domain, name) = key.split_once('/').unwrap_or(("example.org", &key));
        let edge = |c: Option<u8>| c.is_some_and(|c| c.is_ascii_alphanumeric());
        let part = |part: &str, most: usize, inner: &[u8]| {
            let bytes = part.as_bytes();
            bytes.len() <= most
                && edge(bytes.first().copied())
                && edge(bytes.last().copied())
                && bytes
                    .iter()
                    .all(|c| c.is_ascii_alphanumeric() || inner.contains(c))
        };
        match part(domain, 253, b"-.") && part(name, 63, b"-._") {
            true => Ok(Self(key)),
            false => Err(format!("{key:?} is no key of a taint")),
        }
    }
}

impl From<TaintKey> for String {
    fn from(key: TaintKey) -> Self {
        key.0
    }
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
