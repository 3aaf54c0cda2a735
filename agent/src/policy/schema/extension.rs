//! `postern.dev/v1alpha1`: what Istio has no word for.

use schemars::JsonSchema;
use serde::Deserialize;

use super::values::{Block, List, Port, Selector, Text, some_entries};

/// Which processes of a pod may dial what, in the mesh. Judged by the agent of the
/// pod that dials, with what the kernel saw: DENY first; where an ALLOW policy
/// selects the pod, one must match.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct ConnectPolicy {
    pub selector: Option<Selector>,
    pub action: ConnectAction,
    pub rules: Vec<ConnectRule>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum ConnectAction {
    #[default]
    Allow,
    Deny,
}

/// All fields are required, the values of one are alternatives.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct ConnectRule {
    /// Path of the executable, in the four string forms.
    pub executables: List<Text>,
    pub not_executables: List<Text>,
    /// User ID as the node sees it.
    pub uids: List<Uid>,
    pub not_uids: List<Uid>,
    /// Where it dials: the endpoint, after a service has been resolved.
    pub ip_blocks: List<Block>,
    pub not_ip_blocks: List<Block>,
    pub ports: List<Port>,
    pub not_ports: List<Port>,
}

/// A decimal user ID, as a string like a port.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(try_from = "String")]
#[schemars(extend("pattern" = "^[0-9]+$"))]
pub struct Uid(pub u32);

impl TryFrom<String> for Uid {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.parse() {
            Ok(uid) if text.bytes().all(|b| b.is_ascii_digit()) => Ok(Self(uid)),
            _ => Err(format!("`{text}` is no user ID; use a number, in quotes")),
        }
    }
}

/// Tokens that only their owner may present: who shows one must be, by mutual TLS,
/// whom the token names.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct TokenBinding {
    #[serde(default)]
    pub selector: Option<Selector>,
    /// Tokens of these issuers; without it, of all.
    #[serde(default)]
    pub issuers: List<Text>,
    /// How the token names its owner; one of these must hold.
    #[serde(deserialize_with = "presenters")]
    #[schemars(length(min = 1))]
    pub presenter: Vec<Presenter>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Presenter {
    /// `cnf.x5t#S256` is the peer's certificate (RFC 8705 3.1).
    Certificate,
    /// `azp` is the peer's SPIFFE ID.
    AuthorizedParty,
    /// `act.sub` is the peer's SPIFFE ID (RFC 8693 4.1).
    Actor,
}

fn presenters<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Vec<Presenter>, D::Error> {
    some_entries(from).map(Option::unwrap_or_default)
}
