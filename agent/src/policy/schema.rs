//! `security.istio.io/v1` as it stands in files. Unknown fields are refused, and so
//! is, by name, every field that cannot be enforced in full: a rule that is
//! skipped or narrowed would change who gets in.

use std::collections::BTreeMap;

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, de::Error as _};

use crate::objects::{Head, Meta, Object};

#[derive(Clone, Debug)]
pub enum PolicyObject {
    AuthorizationPolicy(Box<Resource<AuthorizationPolicy>>),
    PeerAuthentication(Box<Resource<PeerAuthentication>>),
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

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct AuthorizationPolicy {
    pub selector: Option<Selector>,
    pub action: Action,
    pub rules: Vec<Rule>,
    #[serde(deserialize_with = "unsupported::<_, TargetRef>")]
    pub target_ref: (),
    #[serde(deserialize_with = "unsupported::<_, TargetRef>")]
    pub target_refs: (),
    #[serde(deserialize_with = "unsupported::<_, Provider>")]
    pub provider: (),
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Selector {
    pub match_labels: BTreeMap<String, String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Action {
    #[default]
    Allow,
    Deny,
}

impl<'de> Deserialize<'de> for Action {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        match String::deserialize(from)?.as_str() {
            "ALLOW" => Ok(Self::Allow),
            "DENY" => Ok(Self::Deny),
            other @ ("AUDIT" | "CUSTOM") => Err(D::Error::custom(format!(
                "action {other} is not supported yet"
            ))),
            other => Err(D::Error::custom(format!(
                "`{other}` is no action; use ALLOW or DENY"
            ))),
        }
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Rule {
    #[serde(deserialize_with = "some_entries")]
    pub from: Option<Vec<From>>,
    #[serde(deserialize_with = "some_entries")]
    pub to: Option<Vec<To>>,
    #[serde(deserialize_with = "unsupported::<_, When>")]
    pub when: (),
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct From {
    #[serde(deserialize_with = "not_empty")]
    pub source: Source,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct To {
    #[serde(deserialize_with = "not_empty")]
    pub operation: Operation,
}

/// What an entry says at all: an entry without a field is refused, as Istio does.
pub trait Fields {
    fn any(&self) -> bool;
}

macro_rules! matchers {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $ty:ty),* $(,)? } not_yet { $($later:ident),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq, Deserialize)]
        #[serde(default, deny_unknown_fields, rename_all = "camelCase")]
        pub struct $name {
            $(pub $field: List<$ty>,)*
            $(#[serde(deserialize_with = "unsupported::<_, Http>")] pub $later: (),)*
        }

        impl Fields for $name {
            fn any(&self) -> bool {
                $(!self.$field.0.is_empty())||*
            }
        }
    };
}

matchers! {
    /// Istio `Source`. Fields of one source are all required, values of a field
    /// are alternatives.
    Source {
        principals: Text,
        not_principals: Text,
        namespaces: Text,
        not_namespaces: Text,
        service_accounts: ServiceAccount,
        not_service_accounts: ServiceAccount,
        ip_blocks: Block,
        not_ip_blocks: Block,
    } not_yet {
        request_principals,
        not_request_principals,
        remote_ip_blocks,
        not_remote_ip_blocks,
        trust_domains,
        not_trust_domains,
    }
}

matchers! {
    /// Istio `Operation`.
    Operation {
        ports: Port,
        not_ports: Port,
    } not_yet {
        hosts,
        not_hosts,
        methods,
        not_methods,
        paths,
        not_paths,
    }
}

/// The values of a field; without the field, none.
#[derive(Clone, Debug, PartialEq)]
pub struct List<T>(pub Vec<T>);

impl<T> Default for List<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for List<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Vec::deserialize(from).map(Self)
    }
}

/// A non-empty string.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub struct Text(pub String);

impl TryFrom<String> for Text {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        if text.is_empty() {
            Err("an empty string matches nothing")
        } else {
            Ok(Self(text))
        }
    }
}

/// `namespace/account`, or `account` in the policy's own namespace.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub struct ServiceAccount {
    pub namespace: Option<String>,
    pub name: String,
}

impl TryFrom<String> for ServiceAccount {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let (namespace, name) = match text.split_once('/') {
            Some((namespace, name)) => (Some(namespace), name),
            None => (None, text.as_str()),
        };
        let bad = text.len() > 320
            || name.is_empty()
            || name.contains('/')
            || namespace.is_some_and(str::is_empty)
            || text.contains('*');
        if bad {
            return Err(format!(
                "`{text}` is no service account; use `namespace/name` or `name`, without `*`"
            ));
        }
        Ok(Self {
            namespace: namespace.map(str::to_owned),
            name: name.to_owned(),
        })
    }
}

/// An address or CIDR; host bits are masked.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub struct Block(pub IpNet);

impl TryFrom<String> for Block {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let net = text
            .parse::<IpNet>()
            .or_else(|_| text.parse::<std::net::IpAddr>().map(IpNet::from))
            .map_err(|_| {
                format!("`{text}` is no address or CIDR such as 10.0.0.0/8 or fd00::/8")
            })?;
        Ok(Self(net.trunc()))
    }
}

/// A decimal port, as a string (Istio's form).
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub struct Port(pub u16);

impl TryFrom<String> for Port {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        match text.parse() {
            Ok(port) if digits => Ok(Self(port)),
            _ => Err(format!(
                "`{text}` is no port; use a number from 0 to 65535, in quotes"
            )),
        }
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct PeerAuthentication {
    pub selector: Option<Selector>,
    pub mtls: MutualTls,
    pub port_level_mtls: BTreeMap<PortKey, MutualTls>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MutualTls {
    pub mode: MtlsMode,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum MtlsMode {
    #[default]
    Unset,
    Disable,
    Permissive,
    Strict,
}

/// A workload port as a mapping's key, 1 to 65535.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct PortKey(pub u16);

impl TryFrom<String> for PortKey {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.parse() {
            Ok(port) if port > 0 => Ok(Self(port)),
            _ => Err(format!(
                "`{text}` is no workload port; use a number from 1 to 65535"
            )),
        }
    }
}

impl Object for PolicyObject {
    fn read<'de, D: Deserializer<'de>>(head: &Head, from: D) -> Result<Option<Self>, D::Error> {
        let ours = head.api_version.starts_with("security.istio.io/");
        let version = matches!(
            head.api_version.as_str(),
            "security.istio.io/v1" | "security.istio.io/v1beta1"
        );
        if ours && !version {
            let message = format!(
                "{} is not served; use security.istio.io/v1",
                head.api_version
            );
            return Err(D::Error::custom(message));
        }
        match head.kind.as_str() {
            "AuthorizationPolicy" if ours => {
                Deserialize::deserialize(from).map(|p| Some(Self::AuthorizationPolicy(p)))
            }
            "PeerAuthentication" if ours => {
                Deserialize::deserialize(from).map(|p| Some(Self::PeerAuthentication(p)))
            }
            kind if ours || head.api_version.starts_with("postern.dev/") => Err(D::Error::custom(
                format!("kind {kind} is not supported yet"),
            )),
            // A policy under a misspelt apiVersion would be one that is not there.
            kind => {
                let version = &head.api_version;
                let message =
                    format!("{version} {kind} is no policy; this directory is for policies only");
                Err(D::Error::custom(message))
            }
        }
    }
}

/// Why a field of this group is refused.
pub trait Reason {
    const WHY: &'static str;
}

macro_rules! reasons {
    ($($name:ident = $why:literal),* $(,)?) => {
        $(#[derive(Debug)] pub struct $name; impl Reason for $name { const WHY: &'static str = $why; })*
    };
}

reasons! {
    Http = "this field is not supported yet: connections are judged by principals, namespaces, service accounts, ipBlocks and ports",
    When = "conditions (`when`) are not supported yet",
    TargetRef = "target references are not supported yet; use `selector`",
    Provider = "external authorization providers are not supported yet",
}

fn unsupported<'de, D: Deserializer<'de>, R: Reason>(_from: D) -> Result<(), D::Error> {
    Err(D::Error::custom(R::WHY))
}

fn some_entries<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    from: D,
) -> Result<Option<Vec<T>>, D::Error> {
    let entries = Vec::deserialize(from)?;
    if entries.is_empty() {
        return Err(D::Error::custom(
            "an empty list matches nothing; leave it out to match all",
        ));
    }
    Ok(Some(entries))
}

fn not_empty<'de, D: Deserializer<'de>, T: Deserialize<'de> + Fields>(
    from: D,
) -> Result<T, D::Error> {
    let entry = T::deserialize(from)?;
    if !entry.any() {
        return Err(D::Error::custom(
            "an entry without any field is ambiguous; leave it out",
        ));
    }
    Ok(entry)
}
