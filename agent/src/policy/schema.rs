//! `security.istio.io/v1` and `postern.dev/v1alpha1` as they stand in files. Unknown
//! fields are refused, and so is, by name, every field that cannot be enforced in
//! full: a rule that is skipped or narrowed would change who gets in.

mod authentication;
mod authorization;
mod extension;
mod outbound;
mod resource;
mod values;

use serde::{Deserialize, Deserializer, de::Error as _};

pub use authentication::{
    JwtRule, Keys, MtlsMode, MutualTls, PeerAuthentication, PortKey, RequestAuthentication,
};
pub use authorization::{
    Action, AuthorizationPolicy, Condition, Key, Operation, Rule, Source, Values,
};
pub use extension::{ConnectAction, ConnectPolicy, ConnectRule, Presenter, TokenBinding};
pub use outbound::{Actor, Application, Grant, OutboundToken, Subject};
pub use resource::{BoundTo, Introspection, ProtectedResource};
pub use values::{List, PathForm, Piece, Selector, ServiceAccount, TargetRef, Text};

use crate::objects::{Head, Meta, Object};

#[derive(Clone, Debug)]
pub enum PolicyObject {
    AuthorizationPolicy(Box<Resource<AuthorizationPolicy>>),
    PeerAuthentication(Box<Resource<PeerAuthentication>>),
    RequestAuthentication(Box<Resource<RequestAuthentication>>),
    ConnectPolicy(Box<Resource<ConnectPolicy>>),
    TokenBinding(Box<Resource<TokenBinding>>),
    ProtectedResource(Box<Resource<ProtectedResource>>),
    OutboundToken(Box<Resource<OutboundToken>>),
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Resource<T> {
    #[serde(rename = "apiVersion")]
    pub _api_version: String,
    #[serde(rename = "kind")]
    pub _kind: String,
    pub metadata: Meta,
    #[serde(default = "Option::default")]
    pub spec: Option<T>,
    #[serde(default, rename = "status")]
    pub _status: Option<serde_json::Value>,
}

impl PolicyObject {
    pub fn kind(&self) -> &'static str {
        match self {
            Self::AuthorizationPolicy(_) => "AuthorizationPolicy",
            Self::PeerAuthentication(_) => "PeerAuthentication",
            Self::RequestAuthentication(_) => "RequestAuthentication",
            Self::ConnectPolicy(_) => "ConnectPolicy",
            Self::TokenBinding(_) => "TokenBinding",
            Self::ProtectedResource(_) => "ProtectedResource",
            Self::OutboundToken(_) => "OutboundToken",
        }
    }

    pub fn metadata(&self) -> &Meta {
        match self {
            Self::AuthorizationPolicy(p) => &p.metadata,
            Self::PeerAuthentication(p) => &p.metadata,
            Self::RequestAuthentication(p) => &p.metadata,
            Self::ConnectPolicy(p) => &p.metadata,
            Self::TokenBinding(p) => &p.metadata,
            Self::ProtectedResource(p) => &p.metadata,
            Self::OutboundToken(p) => &p.metadata,
        }
    }
}

const ISTIO: &str = "security.istio.io/";
const POSTERN: &str = "postern.dev/";

impl Object for PolicyObject {
    fn read<'de, D: Deserializer<'de>>(head: &Head, from: D) -> Result<Option<Self>, D::Error> {
        let version = head.api_version.as_str();
        let istio = version.starts_with(ISTIO);
        let served = matches!(
            version,
            "security.istio.io/v1" | "security.istio.io/v1beta1" | "postern.dev/v1alpha1"
        );
        if (istio || version.starts_with(POSTERN)) && !served {
            return Err(D::Error::custom(format!(
                "{version} is not served; use security.istio.io/v1 or postern.dev/v1alpha1"
            )));
        }
        let object = match (head.kind.as_str(), istio) {
            ("AuthorizationPolicy", true) => {
                Self::AuthorizationPolicy(Deserialize::deserialize(from)?)
            }
            ("PeerAuthentication", true) => {
                Self::PeerAuthentication(Deserialize::deserialize(from)?)
            }
            ("RequestAuthentication", true) => {
                Self::RequestAuthentication(Deserialize::deserialize(from)?)
            }
            ("ConnectPolicy", false) if served => {
                Self::ConnectPolicy(Deserialize::deserialize(from)?)
            }
            ("TokenBinding", false) if served => {
                Self::TokenBinding(Deserialize::deserialize(from)?)
            }
            ("ProtectedResource", false) if served => {
                Self::ProtectedResource(Deserialize::deserialize(from)?)
            }
            ("OutboundToken", false) if served => {
                Self::OutboundToken(Deserialize::deserialize(from)?)
            }
            // A policy under a misspelt apiVersion would be one that is not there.
            (kind, _) => {
                return Err(D::Error::custom(format!(
                    "{version} {kind} is no policy; this directory is for policies only"
                )));
            }
        };
        Ok(Some(object))
    }
}
