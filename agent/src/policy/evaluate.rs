//! The decision. No I/O, no clock: facts in, verdict out.

use std::{collections::BTreeMap, fmt, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use serde::Serialize;

use super::schema::Action;
use crate::identity::SpiffeId;

/// What is known of a connection when it is judged, at its destination.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Proven by mutual TLS, or by the kernel on the same node. `None`: plaintext.
    pub source: Option<SpiffeId>,
    /// Source address of the packets.
    pub source_ip: IpAddr,
    pub destination_port: u16,
    pub namespace: String,
    pub labels: Arc<BTreeMap<String, String>>,
}

/// The policy, and the rule within it, that decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PolicyRef {
    pub kind: &'static str,
    pub namespace: String,
    pub name: String,
    /// Index of the rule that matched; `None` where the policy as a whole decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<usize>,
}

impl fmt::Display for PolicyRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}/{}", self.kind, self.namespace, self.name)?;
        match self.rule {
            Some(rule) => write!(f, " rule {rule}"),
            None => Ok(()),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// By the policy named, or because none selects the workload.
    Allow(Option<PolicyRef>),
    Deny(Denial),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Denial {
    /// A rule of this policy matched.
    Rule(PolicyRef),
    /// ALLOW policies select the workload and none matched; one of them is named.
    Implicit(PolicyRef),
    /// PeerAuthentication asks for mutual TLS.
    Plaintext(PolicyRef),
}

impl Denial {
    pub fn policy(&self) -> &PolicyRef {
        match self {
            Self::Rule(policy) | Self::Implicit(policy) | Self::Plaintext(policy) => policy,
        }
    }
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rule(policy) => write!(f, "denied by {policy}"),
            Self::Implicit(policy) => write!(f, "no ALLOW policy matched (such as {policy})"),
            Self::Plaintext(policy) => write!(f, "plaintext, and {policy} is STRICT"),
        }
    }
}

/// Proof that a connection was authorized: what dials the application takes one.
/// Only [`super::PolicySet::authorize`] makes it.
#[derive(Clone, Debug)]
pub struct Permitted {
    pub(super) by: Option<PolicyRef>,
}

impl Permitted {
    /// The policy that allowed it; `None` where none selects the workload.
    pub fn by(&self) -> Option<&PolicyRef> {
        self.by.as_ref()
    }
}

/// What a port accepts (Istio PeerAuthentication).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Plaintext and mutual TLS. Istio's ambient mode reads DISABLE so, too.
    Permissive,
    /// Mutual TLS only.
    Strict(PolicyRef),
}

/// A compiled AuthorizationPolicy.
#[derive(Clone, Debug)]
pub(super) struct Authorization {
    pub policy: PolicyRef,
    pub action: Action,
    pub reach: Reach,
    pub rules: Vec<Rule>,
}

/// The workloads that a policy selects.
#[derive(Clone, Debug)]
pub(super) struct Reach {
    /// `None`: every namespace, for policies of the root namespace.
    pub namespace: Option<String>,
    pub labels: BTreeMap<String, String>,
}

impl Reach {
    pub fn selects(&self, namespace: &str, labels: &BTreeMap<String, String>) -> bool {
        self.namespace.as_ref().is_none_or(|n| n == namespace)
            && self
                .labels
                .iter()
                .all(|(key, value)| labels.get(key) == Some(value))
    }
}

/// `from` and `to` are both required; entries of each are alternatives. `None`: all.
#[derive(Clone, Debug)]
pub(super) struct Rule {
    pub from: Option<Vec<Source>>,
    pub to: Option<Vec<Operation>>,
}

#[derive(Clone, Debug)]
pub(super) struct Source {
    pub principals: Match<Pattern>,
    pub namespaces: Match<Pattern>,
    pub service_accounts: Match<(String, String)>,
    pub ip_blocks: Match<IpNet>,
}

#[derive(Clone, Debug)]
pub(super) struct Operation {
    pub ports: Match<u16>,
}

/// Values of a field and of its `not` form.
#[derive(Clone, Debug)]
pub(super) struct Match<T> {
    pub any: Vec<T>,
    pub none: Vec<T>,
}

impl<T> Match<T> {
    /// An absent attribute fails every positive match and passes every negative one.
    fn accepts<V>(&self, value: Option<V>, fits: impl Fn(&T, &V) -> bool) -> bool {
        let hit = |list: &[T]| {
            value
                .as_ref()
                .is_some_and(|v| list.iter().any(|t| fits(t, v)))
        };
        (self.any.is_empty() || hit(&self.any)) && !hit(&self.none)
    }
}

/// Istio's string forms: exact, `prefix*`, `*suffix`, `*` (any non-empty value).
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Pattern {
    Any,
    Exact(String),
    Prefix(String),
    Suffix(String),
}

impl Pattern {
    pub fn parse(text: &str) -> Self {
        // A leading star is looked at first: `*x*` is a suffix with a literal star.
        if text == "*" {
            Self::Any
        } else if let Some(suffix) = text.strip_prefix('*') {
            Self::Suffix(suffix.to_owned())
        } else if let Some(prefix) = text.strip_suffix('*') {
            Self::Prefix(prefix.to_owned())
        } else {
            Self::Exact(text.to_owned())
        }
    }

    fn fits(&self, value: &str) -> bool {
        match self {
            Self::Any => !value.is_empty(),
            Self::Exact(exact) => value == exact,
            Self::Prefix(prefix) => value.starts_with(prefix),
            Self::Suffix(suffix) => value.ends_with(suffix),
        }
    }
}

impl Authorization {
    /// The first rule that matches.
    pub fn matching(&self, facts: &Facts) -> Option<PolicyRef> {
        let rule = self.rules.iter().position(|rule| rule.matches(facts))?;
        Some(PolicyRef {
            rule: Some(rule),
            ..self.policy.clone()
        })
    }
}

impl Rule {
    fn matches(&self, facts: &Facts) -> bool {
        let from = |sources: &Vec<Source>| sources.iter().any(|s| s.matches(facts));
        let to = |operations: &Vec<Operation>| operations.iter().any(|o| o.matches(facts));
        self.from.as_ref().is_none_or(from) && self.to.as_ref().is_none_or(to)
    }
}

impl Source {
    fn matches(&self, facts: &Facts) -> bool {
        let id = facts.source.as_ref();
        self.principals
            .accepts(id.map(SpiffeId::principal), |p, v| p.fits(v))
            && self
                .namespaces
                .accepts(id.map(|i| &i.namespace), |p, v| p.fits(v))
            && self.service_accounts.accepts(id, |(namespace, name), v| {
                *namespace == v.namespace && *name == v.service_account
            })
            && self
                .ip_blocks
                .accepts(Some(facts.source_ip), |net, ip| net.contains(ip))
    }
}

impl Operation {
    fn matches(&self, facts: &Facts) -> bool {
        self.ports
            .accepts(Some(facts.destination_port), |a, b| a == b)
    }
}
