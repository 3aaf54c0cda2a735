//! The name of an agent itself: `spiffe://<trust domain>/postern/agent/<node>`. It is
//! a type of its own, and neither form parses as the other: an agent's certificate
//! never passes as a workload's, nor a workload's as an agent's.

use std::{fmt, str::FromStr};

use rustls::pki_types::CertificateDer;

use super::{SpiffeError, TrustDomain, spiffe::is_segment, tls::only_uri};

/// Longest node name (a DNS subdomain, RFC 1123).
const MAX_NODE: usize = 253;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AgentId {
    trust_domain: TrustDomain,
    node: String,
}

impl AgentId {
    /// `None` for a name that cannot stand in a SPIFFE ID (SPIFFE-ID 2.2).
    pub fn new(trust_domain: TrustDomain, node: &str) -> Option<Self> {
        (is_segment(node) && node.len() <= MAX_NODE).then(|| Self {
            trust_domain,
            node: node.to_owned(),
        })
    }

    /// Of a leaf whose only URI name is an agent's.
    pub fn of(leaf: &CertificateDer<'_>) -> Option<Self> {
        only_uri(leaf)?.parse().ok()
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    pub fn node(&self) -> &str {
        &self.node
    }
}

impl fmt::Display for AgentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "spiffe://{}/postern/agent/{}",
            self.trust_domain, self.node
        )
    }
}

impl FromStr for AgentId {
    type Err = SpiffeError;

    fn from_str(uri: &str) -> Result<Self, SpiffeError> {
        let form = || SpiffeError::AgentForm(uri.to_owned());
        let rest = uri.strip_prefix("spiffe://").ok_or_else(form)?;
        let parts: Vec<&str> = rest.split('/').collect();
        match parts[..] {
            [domain, "postern", "agent", node] => {
                Self::new(TrustDomain::try_from(domain.to_owned())?, node).ok_or_else(form)
            }
            _ => Err(form()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::SpiffeId;

    #[test]
    fn agents_and_workloads_have_names_apart() {
        let agent = "spiffe://cluster.local/postern/agent/node-1.example";
        let id: AgentId = agent.parse().expect("valid");
        assert_eq!(
            (id.to_string().as_str(), id.node()),
            (agent, "node-1.example")
        );
        assert!(agent.parse::<SpiffeId>().is_err());
        for bad in [
            "spiffe://cluster.local/ns/postern/sa/agent",
            "spiffe://cluster.local/postern/agent",
            "spiffe://cluster.local/postern/agent/",
            "spiffe://cluster.local/postern/agent/..",
            "spiffe://cluster.local/postern/agent/a/b",
            "spiffe://cluster.local/postern/agent/a%2fb",
            "https://cluster.local/postern/agent/a",
        ] {
            assert!(bad.parse::<AgentId>().is_err(), "{bad}");
        }
    }
}
