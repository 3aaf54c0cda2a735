//! What one watch is about: a kind of object, and which of them.

use std::{fmt, sync::Arc};

use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, GroupVersionKind, ListParams, WatchParams},
};
use serde::{Deserialize, Serialize};

use crate::workload::NamespacedName;

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, Serialize)]
pub enum Scope {
    Namespaces,
    Nodes,
    Services,
    /// Of one node; `None`: all.
    Pods(Option<Arc<str>>),
    /// Of one service; `None`: all.
    Slices(Option<NamespacedName>),
    Policies(PolicyKind),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, Serialize)]
pub enum PolicyKind {
    AuthorizationPolicy,
    PeerAuthentication,
    RequestAuthentication,
    ConnectPolicy,
    TokenBinding,
    ProtectedResource,
    OutboundToken,
}

impl PolicyKind {
    pub const ALL: [Self; 7] = [
        Self::AuthorizationPolicy,
        Self::PeerAuthentication,
        Self::RequestAuthentication,
        Self::ConnectPolicy,
        Self::TokenBinding,
        Self::ProtectedResource,
        Self::OutboundToken,
    ];

    pub fn name(self) -> &'static str {
        self.names().0
    }

    fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::AuthorizationPolicy => ("AuthorizationPolicy", "authorizationpolicies"),
            Self::PeerAuthentication => ("PeerAuthentication", "peerauthentications"),
            Self::RequestAuthentication => ("RequestAuthentication", "requestauthentications"),
            Self::ConnectPolicy => ("ConnectPolicy", "connectpolicies"),
            Self::TokenBinding => ("TokenBinding", "tokenbindings"),
            Self::ProtectedResource => ("ProtectedResource", "protectedresources"),
            Self::OutboundToken => ("OutboundToken", "outboundtokens"),
        }
    }

    pub fn is_istio(self) -> bool {
        matches!(
            self,
            Self::AuthorizationPolicy | Self::PeerAuthentication | Self::RequestAuthentication
        )
    }

    /// Group and versions, the best first.
    fn served(self) -> (&'static str, &'static [&'static str]) {
        match self.is_istio() {
            true => ("security.istio.io", &["v1", "v1beta1"]),
            false => ("postern.dev", &["v1alpha1"]),
        }
    }
}

impl Scope {
    /// The resource in each version that it may be served in, the best first. A kind of a
    /// CustomResourceDefinition may be served in none.
    pub fn resources(&self) -> Vec<ApiResource> {
        let (group, versions): (_, &[&str]) = match self {
            Self::Slices(_) => ("discovery.k8s.io", &["v1"]),
            Self::Policies(kind) => kind.served(),
            _ => ("", &["v1"]),
        };
        let (kind, plural) = match self {
            Self::Namespaces => ("Namespace", "namespaces"),
            Self::Nodes => ("Node", "nodes"),
            Self::Services => ("Service", "services"),
            Self::Pods(_) => ("Pod", "pods"),
            Self::Slices(_) => ("EndpointSlice", "endpointslices"),
            Self::Policies(kind) => kind.names(),
        };
        let resource = |version: &&str| {
            let gvk = GroupVersionKind::gvk(group, version, kind);
            ApiResource::from_gvk_with_plural(&gvk, plural)
        };
        versions.iter().map(resource).collect()
    }

    /// Whether it may not be installed.
    pub fn is_optional(&self) -> bool {
        matches!(self, Self::Policies(_))
    }

    pub fn api(&self, client: Client, resource: &ApiResource) -> Api<DynamicObject> {
        match self {
            Self::Slices(Some(service)) => {
                Api::namespaced_with(client, &service.namespace, resource)
            }
            _ => Api::all_with(client, resource),
        }
    }

    fn selectors(&self) -> (Option<String>, Option<String>) {
        match self {
            Self::Pods(Some(node)) => (None, Some(format!("spec.nodeName={node}"))),
            Self::Slices(Some(service)) => {
                let label = format!("kubernetes.io/service-name={}", service.name);
                (Some(label), None)
            }
            _ => (None, None),
        }
    }

    pub fn list(&self, page: u32) -> ListParams {
        let (label_selector, field_selector) = self.selectors();
        ListParams {
            label_selector,
            field_selector,
            limit: Some(page),
            ..ListParams::default()
        }
    }

    pub fn watch(&self, seconds: u32) -> WatchParams {
        let (label_selector, field_selector) = self.selectors();
        WatchParams {
            label_selector,
            field_selector,
            timeout: Some(seconds),
            ..WatchParams::default()
        }
    }

    /// The resource's name, by which metrics tell watches apart.
    pub fn resource(&self) -> &'static str {
        match self {
            Self::Namespaces => "namespaces",
            Self::Nodes => "nodes",
            Self::Services => "services",
            Self::Pods(_) => "pods",
            Self::Slices(_) => "endpointslices",
            Self::Policies(kind) => kind.names().1,
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let resource = self.resource();
        match self {
            Self::Pods(Some(node)) => write!(f, "{resource} of {node}"),
            Self::Slices(Some(service)) => {
                write!(f, "{resource} of {}/{}", service.namespace, service.name)
            }
            _ => f.write_str(resource),
        }
    }
}
