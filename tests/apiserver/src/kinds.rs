//! The kinds that are served. Those of a custom resource are served while they are
//! installed, as with its definition.

use serde_json::{Value, json};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kind {
    pub group: String,
    /// Served versions, the preferred one first.
    pub versions: Vec<String>,
    pub kind: String,
    pub plural: String,
    pub namespaced: bool,
    /// Whether it has the subresource `status`.
    pub status: bool,
    pub custom: bool,
}

impl Kind {
    /// `pods`, `endpointslices.discovery.k8s.io`.
    pub fn resource(&self) -> String {
        match self.group.as_str() {
            // One storage behind two groups, as the real one has it.
            "" | "events.k8s.io" => self.plural.clone(),
            group => format!("{}.{group}", self.plural),
        }
    }

    pub fn api_version(&self, version: &str) -> String {
        match self.group.as_str() {
            "" => version.to_owned(),
            group => format!("{group}/{version}"),
        }
    }

    /// What a CustomResourceDefinition defines.
    pub fn defined(by: &Value) -> Option<Self> {
        let spec = &by["spec"];
        let versions = spec["versions"].as_array()?;
        let served = || versions.iter().filter(|v| v["served"] == json!(true));
        Some(Self {
            group: spec["group"].as_str()?.to_owned(),
            versions: served()
                .filter_map(|v| v["name"].as_str().map(str::to_owned))
                .collect(),
            kind: spec["names"]["kind"].as_str()?.to_owned(),
            plural: spec["names"]["plural"].as_str()?.to_owned(),
            namespaced: spec["scope"] == "Namespaced",
            status: served().any(|v| v["subresources"]["status"].is_object()),
            custom: true,
        })
    }
}

/// Group, version, kind, plural, whether it is namespaced, whether it has a status.
type Row = (
    &'static str,
    &'static str,
    &'static str,
    &'static str,
    bool,
    bool,
);

const BUILT_IN: &[Row] = &[
    ("", "v1", "Pod", "pods", true, true),
    ("", "v1", "Service", "services", true, true),
    ("", "v1", "Namespace", "namespaces", false, true),
    ("", "v1", "Node", "nodes", false, true),
    ("", "v1", "Event", "events", true, false),
    ("", "v1", "ConfigMap", "configmaps", true, false),
    ("", "v1", "Secret", "secrets", true, false),
    ("", "v1", "ServiceAccount", "serviceaccounts", true, false),
    ("", "v1", "Endpoints", "endpoints", true, false),
    ("events.k8s.io", "v1", "Event", "events", true, false),
    (
        "discovery.k8s.io",
        "v1",
        "EndpointSlice",
        "endpointslices",
        true,
        false,
    ),
    ("apps", "v1", "DaemonSet", "daemonsets", true, true),
    ("apps", "v1", "Deployment", "deployments", true, true),
    ("apps", "v1", "ReplicaSet", "replicasets", true, true),
    ("apps", "v1", "StatefulSet", "statefulsets", true, true),
    ("batch", "v1", "Job", "jobs", true, true),
    ("coordination.k8s.io", "v1", "Lease", "leases", true, false),
    (
        "policy",
        "v1",
        "PodDisruptionBudget",
        "poddisruptionbudgets",
        true,
        true,
    ),
    (
        "networking.k8s.io",
        "v1",
        "NetworkPolicy",
        "networkpolicies",
        true,
        false,
    ),
    (
        "scheduling.k8s.io",
        "v1",
        "PriorityClass",
        "priorityclasses",
        false,
        false,
    ),
    (
        "rbac.authorization.k8s.io",
        "v1",
        "Role",
        "roles",
        true,
        false,
    ),
    (
        "rbac.authorization.k8s.io",
        "v1",
        "RoleBinding",
        "rolebindings",
        true,
        false,
    ),
    (
        "rbac.authorization.k8s.io",
        "v1",
        "ClusterRole",
        "clusterroles",
        false,
        false,
    ),
    (
        "rbac.authorization.k8s.io",
        "v1",
        "ClusterRoleBinding",
        "clusterrolebindings",
        false,
        false,
    ),
    (
        "apiextensions.k8s.io",
        "v1",
        "CustomResourceDefinition",
        "customresourcedefinitions",
        false,
        true,
    ),
];

const CUSTOM: &[(&str, &[&str], &str, &str)] = &[
    (
        ISTIO,
        &["v1", "v1beta1"],
        "AuthorizationPolicy",
        "authorizationpolicies",
    ),
    (
        ISTIO,
        &["v1", "v1beta1"],
        "PeerAuthentication",
        "peerauthentications",
    ),
    (
        ISTIO,
        &["v1", "v1beta1"],
        "RequestAuthentication",
        "requestauthentications",
    ),
    (
        OURS,
        &["v1alpha1"],
        "ProtectedResource",
        "protectedresources",
    ),
    (OURS, &["v1alpha1"], "TokenBinding", "tokenbindings"),
    (OURS, &["v1alpha1"], "ConnectPolicy", "connectpolicies"),
    (OURS, &["v1alpha1"], "OutboundToken", "outboundtokens"),
];

pub const ISTIO: &str = "security.istio.io";
pub const OURS: &str = "postern.dev";

pub fn built_in() -> Vec<Kind> {
    let kind = |&(group, version, kind, plural, namespaced, status): &Row| Kind {
        group: group.into(),
        versions: vec![version.into()],
        kind: kind.into(),
        plural: plural.into(),
        namespaced,
        status,
        custom: false,
    };
    BUILT_IN.iter().map(kind).collect()
}

/// The policy kinds of these groups, as their definitions would install them.
pub fn policies(groups: &[&str]) -> Vec<Kind> {
    CUSTOM
        .iter()
        .filter(|(group, ..)| groups.contains(group))
        .map(|(group, versions, kind, plural)| Kind {
            group: (*group).into(),
            versions: versions.iter().map(|v| (*v).into()).collect(),
            kind: (*kind).into(),
            plural: (*plural).into(),
            namespaced: true,
            status: true,
            custom: true,
        })
        .collect()
}
