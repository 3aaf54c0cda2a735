//! AuthorizationPolicy.

use std::fmt;

use http::HeaderName;
use ipnet::IpNet;
use serde::{Deserialize, Deserializer, de::Error as _};

use super::values::{
    Block, Domain, List, PathForm, Port, Selector, ServiceAccount, TargetRef, Text, some_entries,
};

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(try_from = "RawPolicy")]
pub struct AuthorizationPolicy {
    pub selector: Option<Selector>,
    pub targets: Option<Vec<TargetRef>>,
    pub action: Action,
    pub rules: Vec<Rule>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct RawPolicy {
    selector: Option<Selector>,
    target_ref: Option<TargetRef>,
    #[serde(deserialize_with = "some_entries")]
    target_refs: Option<Vec<TargetRef>>,
    action: RawAction,
    rules: Vec<Rule>,
    provider: Option<Provider>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Provider {
    name: String,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum RawAction {
    #[default]
    Allow,
    Deny,
    Audit,
    Custom,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Action {
    #[default]
    Allow,
    Deny,
    Audit,
    /// The provider that decides.
    Custom(String),
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allow => f.write_str("ALLOW"),
            Self::Deny => f.write_str("DENY"),
            Self::Audit => f.write_str("AUDIT"),
            Self::Custom(provider) => write!(f, "CUSTOM by {provider}"),
        }
    }
}

/// `targetRef`, `targetRefs` and `selector` exclude each other (Istio).
pub fn targets(
    selector: Option<&Selector>,
    one: Option<TargetRef>,
    many: Option<Vec<TargetRef>>,
) -> Result<Option<Vec<TargetRef>>, String> {
    let targets = match (one, many) {
        (Some(_), Some(_)) => return Err("use targetRefs alone, without targetRef".into()),
        (Some(one), None) => Some(vec![one]),
        (None, many) => many,
    };
    if targets.is_some() && selector.is_some() {
        return Err("use either selector or targetRefs".into());
    }
    Ok(targets)
}

impl TryFrom<RawPolicy> for AuthorizationPolicy {
    type Error = String;

    fn try_from(raw: RawPolicy) -> Result<Self, String> {
        let provider = raw.provider.map(|p| p.name);
        let action = match (raw.action, provider) {
            (RawAction::Custom, Some(name)) if !name.is_empty() => Action::Custom(name),
            (RawAction::Custom, _) => return Err("CUSTOM needs provider.name".into()),
            (_, Some(_)) => return Err("a provider is for action CUSTOM only".into()),
            (RawAction::Allow, None) => Action::Allow,
            (RawAction::Deny, None) => Action::Deny,
            (RawAction::Audit, None) => Action::Audit,
        };
        match &action {
            Action::Deny if raw.rules.is_empty() => {
                return Err(
                    "rules: DENY without rules never denies; `rules: [{}]` denies everything"
                        .into(),
                );
            }
            Action::Custom(_) => {
                if raw.rules.is_empty() {
                    return Err("rules: CUSTOM without rules never asks its provider".into());
                }
                if let Some(field) = raw.rules.iter().find_map(Rule::after_custom) {
                    return Err(format!(
                        "rules: {field} cannot stand in a CUSTOM policy: its provider is asked first (Istio)"
                    ));
                }
            }
            _ => {}
        }
        Ok(Self {
            targets: targets(raw.selector.as_ref(), raw.target_ref, raw.target_refs)?,
            selector: raw.selector,
            action,
            rules: raw.rules,
        })
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Rule {
    #[serde(deserialize_with = "some_entries")]
    pub from: Option<Vec<From>>,
    #[serde(deserialize_with = "some_entries")]
    pub to: Option<Vec<To>>,
    #[serde(deserialize_with = "some_entries")]
    pub when: Option<Vec<Condition>>,
}

impl Rule {
    /// A field that Istio refuses under CUSTOM.
    fn after_custom(&self) -> Option<String> {
        let from = self.from.iter().flatten().find_map(|f| f.source.identity());
        let when = self.when.iter().flatten().find_map(|c| {
            use Key::*;
            let identity = matches!(
                c.key,
                SourcePrincipal
                    | SourceNamespace
                    | SourceServiceAccount
                    | SourceTrustDomain
                    | RequestPrincipal
                    | Audiences
                    | Presenter
                    | Claim(_)
            );
            identity.then(|| c.name.clone())
        });
        from.map(str::to_owned).or(when)
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct From {
    pub source: Source,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct To {
    pub operation: Operation,
}

/// Fields of a source or an operation: all are required, the values of one are
/// alternatives, and an entry without any is refused, as Istio does.
macro_rules! fields {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $ty:ty),* $(,)? } check $check:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq)]
        pub struct $name {
            $(pub $field: List<$ty>,)*
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                #[derive(Default, Deserialize)]
                #[serde(default, deny_unknown_fields, rename_all = "camelCase")]
                struct Raw {
                    $($field: List<$ty>,)*
                }
                let raw = Raw::deserialize(from)?;
                if true $(&& raw.$field.0.is_empty())* {
                    return Err(D::Error::custom(
                        "an entry without any field is ambiguous; leave it out",
                    ));
                }
                let this = Self { $($field: raw.$field,)* };
                let check: fn(&Self) -> Result<(), &'static str> = $check;
                check(&this).map_err(D::Error::custom)?;
                Ok(this)
            }
        }
    };
}

fields! {
    /// Istio `Source`.
    Source {
        principals: Text,
        not_principals: Text,
        request_principals: Text,
        not_request_principals: Text,
        namespaces: Text,
        not_namespaces: Text,
        service_accounts: ServiceAccount,
        not_service_accounts: ServiceAccount,
        trust_domains: Domain,
        not_trust_domains: Domain,
        ip_blocks: Block,
        not_ip_blocks: Block,
        remote_ip_blocks: Block,
        not_remote_ip_blocks: Block,
    }
    check |source| {
        let accounts = [&source.service_accounts, &source.not_service_accounts];
        let others = [
            &source.principals,
            &source.not_principals,
            &source.namespaces,
            &source.not_namespaces,
        ];
        if accounts.iter().any(|list| !list.0.is_empty()) && others.iter().any(|l| !l.0.is_empty()) {
            return Err("serviceAccounts cannot stand beside principals or namespaces");
        }
        if accounts.iter().any(|list| list.0.len() > 16) {
            return Err("at most 16 serviceAccounts");
        }
        Ok(())
    }
}

impl Source {
    /// A field that says who the peer or the user is.
    fn identity(&self) -> Option<&'static str> {
        [
            (
                "principals",
                self.principals.0.len() + self.not_principals.0.len(),
            ),
            (
                "namespaces",
                self.namespaces.0.len() + self.not_namespaces.0.len(),
            ),
            (
                "serviceAccounts",
                self.service_accounts.0.len() + self.not_service_accounts.0.len(),
            ),
            (
                "trustDomains",
                self.trust_domains.0.len() + self.not_trust_domains.0.len(),
            ),
            (
                "requestPrincipals",
                self.request_principals.0.len() + self.not_request_principals.0.len(),
            ),
        ]
        .into_iter()
        .find_map(|(name, values)| (values > 0).then_some(name))
    }
}

fields! {
    /// Istio `Operation`.
    Operation {
        hosts: Text,
        not_hosts: Text,
        ports: Port,
        not_ports: Port,
        methods: Text,
        not_methods: Text,
        paths: PathForm,
        not_paths: PathForm,
    }
    check |_| Ok(())
}

/// One `when`: an attribute and the values it may or may not have.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(try_from = "RawCondition")]
pub struct Condition {
    pub key: Key,
    /// The key as it is written.
    pub name: String,
    pub values: Values,
    pub not_values: Values,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawCondition {
    key: String,
    #[serde(default)]
    values: List<Text>,
    #[serde(default)]
    not_values: List<Text>,
}

/// The attributes that Istio documents for conditions.
#[derive(Clone, Debug, PartialEq)]
pub enum Key {
    Header(HeaderName),
    Authority,
    Method,
    SourceIp,
    RemoteIp,
    SourceNamespace,
    SourcePrincipal,
    SourceServiceAccount,
    SourceTrustDomain,
    RequestPrincipal,
    Audiences,
    Presenter,
    Claim(Vec<String>),
    DestinationIp,
    DestinationPort,
    Sni,
}

/// The values of a condition, as its key takes them.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    Text(Vec<String>),
    Blocks(Vec<IpNet>),
    Ports(Vec<u16>),
    Accounts(Vec<ServiceAccount>),
}

impl TryFrom<RawCondition> for Condition {
    type Error = String;

    fn try_from(raw: RawCondition) -> Result<Self, String> {
        let key = Key::try_from(raw.key.as_str())?;
        if raw.values.0.is_empty() && raw.not_values.0.is_empty() {
            return Err(format!("{}: values or notValues are missing", raw.key));
        }
        let most = raw.values.0.len().max(raw.not_values.0.len());
        if key == Key::SourceServiceAccount && most > 16 {
            return Err(format!("{}: at most 16 service accounts", raw.key));
        }
        let typed =
            |list: List<Text>| Values::new(&key, list).map_err(|e| format!("{}: {e}", raw.key));
        Ok(Self {
            values: typed(raw.values)?,
            not_values: typed(raw.not_values)?,
            name: raw.key,
            key,
        })
    }
}

impl Values {
    fn new(key: &Key, list: List<Text>) -> Result<Self, String> {
        fn all<T: TryFrom<String, Error = String>, U>(
            list: List<Text>,
            value: fn(T) -> U,
        ) -> Result<Vec<U>, String> {
            let each = |text: Text| T::try_from(text.0).map(value);
            list.0.into_iter().map(each).collect()
        }
        Ok(match key {
            Key::SourceIp | Key::RemoteIp | Key::DestinationIp => {
                Self::Blocks(all(list, |block: Block| block.0)?)
            }
            Key::DestinationPort => Self::Ports(all(list, |port: Port| port.0)?),
            Key::SourceServiceAccount => Self::Accounts(all(list, |account| account)?),
            Key::SourceTrustDomain => Self::Text(all(list, |domain: Domain| domain.0)?),
            _ => Self::Text(list.0.into_iter().map(|text| text.0).collect()),
        })
    }
}

impl TryFrom<&str> for Key {
    type Error = String;

    fn try_from(key: &str) -> Result<Self, String> {
        Ok(match key {
            "source.ip" => Self::SourceIp,
            "remote.ip" => Self::RemoteIp,
            "source.namespace" => Self::SourceNamespace,
            "source.principal" => Self::SourcePrincipal,
            "source.serviceAccount" => Self::SourceServiceAccount,
            "source.trustDomain" => Self::SourceTrustDomain,
            "request.auth.principal" => Self::RequestPrincipal,
            "request.auth.audiences" => Self::Audiences,
            "request.auth.presenter" => Self::Presenter,
            "destination.ip" => Self::DestinationIp,
            "destination.port" => Self::DestinationPort,
            "connection.sni" => Self::Sni,
            _ => return Self::of_map(key),
        })
    }
}

impl Key {
    /// A key with brackets.
    fn of_map(key: &str) -> Result<Self, String> {
        if let Some(rest) = key.strip_prefix("request.headers") {
            let name = rest.strip_prefix('[').and_then(|r| r.strip_suffix(']'));
            return match name {
                Some(":authority") => Ok(Self::Authority),
                Some(":method") => Ok(Self::Method),
                // HTTP/2 has it under another name (RFC 9113 8.3.1).
                Some(name) if name.eq_ignore_ascii_case("host") => Ok(Self::Authority),
                Some(":path") => Err(format!(
                    "`{key}` is not supported; use paths of an operation"
                )),
                Some(name) => HeaderName::try_from(name)
                    .map(Self::Header)
                    .map_err(|_| format!("`{key}` names no header")),
                None => Err(format!(
                    "`{key}` lacks its header: use request.headers[name]"
                )),
            };
        }
        if let Some(rest) = key.strip_prefix("request.auth.claims") {
            return claim_path(rest).map(Self::Claim).ok_or_else(|| {
                format!(
                    "`{key}` is no claim: use request.auth.claims[name], or [a][b] for a nested one"
                )
            });
        }
        if key.starts_with("experimental.envoy.filters.") {
            return Err(format!(
                "`{key}` is about Envoy's filters, which are not here"
            ));
        }
        Err(format!(
            "`{key}` is no attribute of a condition; use one that Istio documents, such as source.ip or request.headers[name]"
        ))
    }
}

/// `[a][b]`: names without brackets, at least one.
fn claim_path(text: &str) -> Option<Vec<String>> {
    let inner = text.strip_prefix('[')?.strip_suffix(']')?;
    let names: Vec<String> = inner.split("][").map(str::to_owned).collect();
    names
        .iter()
        .all(|name| !name.is_empty() && !name.contains(['[', ']']))
        .then_some(names)
}
