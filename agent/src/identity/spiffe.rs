//! SPIFFE IDs (SPIFFE-ID standard, section 2) of the form that Kubernetes meshes
//! use: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.

use std::{fmt, ops::Deref, str::FromStr, sync::Arc};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A trust domain: lower-case letters, digits, `.`, `-`, `_` (SPIFFE-ID 2.1).
#[derive(
    Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, Serialize, JsonSchema,
)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct TrustDomain(String);

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpiffeError {
    #[error(
        "`{0}` is not a trust domain: lower-case letters, digits, `.`, `-` and `_` only, at most 255"
    )]
    TrustDomain(String),
    #[error("`{0}` is not of the form spiffe://<trust domain>/ns/<namespace>/sa/<service account>")]
    Form(String),
    #[error("`{0}` is not of the form spiffe://<trust domain>/postern/agent/<node>")]
    AgentForm(String),
}

impl TrustDomain {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for TrustDomain {
    fn default() -> Self {
        Self("cluster.local".into())
    }
}

impl TryFrom<String> for TrustDomain {
    type Error = SpiffeError;

    fn try_from(name: String) -> Result<Self, SpiffeError> {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-_".contains(&b);
        if !name.is_empty() && name.len() <= 255 && name.bytes().all(allowed) {
            Ok(Self(name))
        } else {
            Err(SpiffeError::TrustDomain(name))
        }
    }
}

impl From<TrustDomain> for String {
    fn from(domain: TrustDomain) -> Self {
        domain.0
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The identity of a workload: its service account in a trust domain. Cheap to clone: each
/// connection is known by two of them.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId(Arc<Parts>);

#[derive(Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Parts {
    pub trust_domain: TrustDomain,
    pub namespace: String,
    pub service_account: String,
    /// All of it.
    uri: String,
}

const SCHEME: &str = "spiffe://";

impl SpiffeId {
    pub fn new(trust_domain: TrustDomain, namespace: String, service_account: String) -> Self {
        let uri = format!("{SCHEME}{trust_domain}/ns/{namespace}/sa/{service_account}");
        Self(Arc::new(Parts {
            trust_domain,
            namespace,
            service_account,
            uri,
        }))
    }

    /// The ID without its scheme: what Istio calls a principal.
    pub fn principal(&self) -> &str {
        &self.0.uri[SCHEME.len()..]
    }
}

impl Deref for SpiffeId {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.0
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.uri)
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeError;

    fn from_str(uri: &str) -> Result<Self, SpiffeError> {
        let form = || SpiffeError::Form(uri.to_owned());
        let rest = uri.strip_prefix(SCHEME).ok_or_else(form)?;
        let parts: Vec<&str> = rest.split('/').collect();
        match parts[..] {
            [domain, "ns", namespace, "sa", account]
                if is_segment(namespace) && is_segment(account) =>
            {
                let trust_domain = TrustDomain::try_from(domain.to_owned())?;
                Ok(Self::new(
                    trust_domain,
                    namespace.to_owned(),
                    account.to_owned(),
                ))
            }
            _ => Err(form()),
        }
    }
}

/// A segment of a path (SPIFFE-ID 2.2).
pub(super) fn is_segment(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b".-_".contains(&b);
    !text.is_empty() && text != "." && text != ".." && text.bytes().all(allowed)
}

impl Serialize for SpiffeId {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_survive_a_round_trip() {
        let text = "spiffe://cluster.local/ns/shop/sa/cart";
        let id: SpiffeId = text.parse().expect("valid");
        assert_eq!(id.to_string(), text);
        assert_eq!(id.principal(), "cluster.local/ns/shop/sa/cart");
    }

    #[test]
    fn other_forms_are_refused() {
        for bad in [
            "",
            "cluster.local/ns/a/sa/b",
            "https://cluster.local/ns/a/sa/b",
            "spiffe://cluster.local",
            "spiffe:///ns/a/sa/b",
            "spiffe://Cluster.Local/ns/a/sa/b",
            "spiffe://cluster.local/ns/a/sa/b/",
            "spiffe://cluster.local/ns/a/sa/b/c",
            "spiffe://cluster.local/ns//sa/b",
            "spiffe://cluster.local/ns/../sa/b",
            "spiffe://cluster.local/ns/a/sa/b?x",
            "spiffe://cluster.local/ns/a%2f/sa/b",
            "spiffe://cluster.local:80/ns/a/sa/b",
        ] {
            assert!(bad.parse::<SpiffeId>().is_err(), "{bad}");
        }
    }
}
