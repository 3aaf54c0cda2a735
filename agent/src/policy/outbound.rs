//! OutboundToken, compiled: which requests of a workload get which token.

use std::{path::Path, sync::Arc};

use http::{HeaderName, header};

use super::{
    compile::{Reach, Wrong},
    evaluate::PolicyRef,
    pattern::Pattern,
    schema::{Actor, Application, Grant, OutboundToken, Subject},
};
use crate::{
    oauth::{self, ClientAuthentication, Server, SubjectKind, Wanted},
    request::Request,
};

/// Where Kubernetes is asked to project a token, unless it is said otherwise.
const TOKEN_PATH: &str = "/var/run/secrets/tokens/postern";
const TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);
const LONGEST_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(60);

/// A compiled OutboundToken.
#[derive(Debug)]
pub struct Outbound {
    pub policy: PolicyRef,
    hosts: Vec<Pattern>,
    /// Empty: all.
    ports: Vec<u16>,
    pub header: HeaderName,
    application: Application,
    /// The header that names the trace a user's token came with.
    pub on_behalf: Option<HeaderName>,
    pub wanted: Arc<Wanted>,
    /// It stands for an object that was refused.
    refused: bool,
}

/// Why it is not known what to do with a request.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unclear {
    #[error("{} and {} both name this request; one may", .0[0], .0[1])]
    Ambiguous(Box<[PolicyRef; 2]>),
    #[error("{0} names this request, and was refused")]
    Refused(Box<PolicyRef>),
}

impl Unclear {
    pub fn code(&self) -> &'static str {
        match self {
            Self::Ambiguous(_) => "ambiguous",
            Self::Refused(_) => "policyRefused",
        }
    }
}

impl Outbound {
    pub(super) fn new(
        policy: PolicyRef,
        spec: OutboundToken,
        secrets: &Path,
    ) -> Result<Self, Wrong> {
        let wrong = |field, message: &str| {
            Err(Wrong {
                field,
                message: message.to_owned(),
            })
        };
        let own = matches!(spec.grant, Grant::WorkloadIdentity);
        let inbound =
            matches!(&spec.grant, Grant::TokenExchange(e) if e.subject == Subject::Inbound);
        if own {
            if spec.audiences.0.len() != 1 {
                return wrong("spec.audiences", "workloadIdentity takes exactly one");
            }
            for (named, field) in [
                (spec.issuer.is_some(), "spec.issuer"),
                (spec.token_endpoint.is_some(), "spec.tokenEndpoint"),
                (spec.client_id.is_some(), "spec.clientId"),
                (
                    spec.client_authentication.is_some(),
                    "spec.clientAuthentication",
                ),
                (!spec.resources.0.is_empty(), "spec.resources"),
                (!spec.scopes.0.is_empty(), "spec.scopes"),
            ] {
                if named {
                    return wrong(field, "is for a server, and workloadIdentity asks none");
                }
            }
        }
        let server = match (spec.issuer, spec.token_endpoint) {
            (Some(issuer), None) => Some(Server::Issuer(issuer.0)),
            (None, Some(endpoint)) => Some(Server::Endpoint(endpoint.0)),
            (None, None) if own => None,
            (None, None) => return wrong("spec.issuer", "is missing; or name tokenEndpoint"),
            (Some(_), Some(_)) => {
                return wrong(
                    "spec.tokenEndpoint",
                    "the issuer tells it; name one of them",
                );
            }
        };
        let authentication = (spec.client_authentication)
            .unwrap_or(ClientAuthentication::PrivateKeyJwt { key_file: None })
            .below(secrets, &policy.namespace)
            .map_err(|message| Wrong {
                field: "spec.clientAuthentication",
                message,
            })?;
        let public = authentication == ClientAuthentication::None {};
        if public && spec.grant == Grant::ClientCredentials {
            let why = "clientCredentials are for clients that prove who they are (RFC 6749 4.4)";
            return wrong("spec.clientAuthentication", why);
        }
        let replaces = spec.application == Application::Replace;
        let on_behalf = spec.on_behalf_of.map(|on| on.trace_header);
        if on_behalf.is_some() && !inbound {
            return wrong(
                "spec.onBehalfOf",
                "is for tokenExchange with subject: inbound",
            );
        }
        if on_behalf.as_ref() == Some(&spec.header.name) {
            return wrong("spec.onBehalfOf.traceHeader", "is the token's own header");
        }
        if inbound && on_behalf.is_none() && !replaces && spec.header.name == header::AUTHORIZATION
        {
            let why = "keep would send the very token that is to be exchanged";
            return wrong("spec.application", why);
        }
        let timeout = spec.timeout.map_or(TIMEOUT, |span| span.0);
        if timeout > LONGEST_TIMEOUT {
            return wrong("spec.timeout", "is longer than 1m");
        }
        let grant = match spec.grant {
            Grant::ClientCredentials => oauth::Grant::ClientCredentials,
            Grant::WorkloadIdentity => oauth::Grant::WorkloadIdentity,
            Grant::TokenExchange(exchange) => {
                const FIELD: &str = "spec.grant.tokenExchange.serviceAccountTokenPath";
                let subject = match (exchange.subject, exchange.service_account_token_path) {
                    (Subject::Inbound, None) => SubjectKind::Inbound,
                    (Subject::Inbound, Some(_)) => {
                        return wrong(FIELD, "is for subject: serviceAccount");
                    }
                    (Subject::ServiceAccount, path) => {
                        let path = path.unwrap_or_else(|| TOKEN_PATH.into());
                        if !path.is_absolute() {
                            return wrong(FIELD, "is not absolute");
                        }
                        SubjectKind::ServiceAccount(path)
                    }
                };
                oauth::Grant::TokenExchange {
                    subject,
                    actor: exchange.actor == Actor::Workload,
                }
            }
        };
        Ok(Self {
            hosts: (spec.hosts.iter())
                .map(|host| Pattern::parse(&host.0))
                .collect(),
            ports: spec.ports.0.iter().map(|port| port.0).collect(),
            header: spec.header.name,
            application: spec.application,
            on_behalf,
            wanted: Arc::new(Wanted {
                object: format!("{}/{}", policy.namespace, policy.name),
                grant,
                server,
                client_id: spec.client_id.map(|id| id.0),
                authentication,
                audiences: spec.audiences.0.into_iter().map(|text| text.0).collect(),
                resources: spec.resources.0.into_iter().map(|uri| uri.0).collect(),
                scopes: spec.scopes.0.into_iter().map(|scope| scope.0).collect(),
                prefix: spec.header.prefix,
                timeout,
            }),
            policy,
            refused: false,
        })
    }

    /// In place of an object that was refused: what it names gets no token, and so does
    /// not go. Without hosts that could be read, it may have named any.
    pub(super) fn refused(policy: PolicyRef, hosts: Option<Vec<String>>) -> Self {
        let hosts = hosts.unwrap_or_else(|| vec!["*".into()]);
        Self {
            hosts: hosts.iter().map(|host| Pattern::parse(host)).collect(),
            ports: Vec::new(),
            header: header::AUTHORIZATION,
            application: Application::Replace,
            on_behalf: None,
            wanted: Arc::new(Wanted {
                object: format!("{}/{}", policy.namespace, policy.name),
                grant: oauth::Grant::WorkloadIdentity,
                server: None,
                client_id: None,
                authentication: ClientAuthentication::None {},
                audiences: Vec::new(),
                resources: Vec::new(),
                scopes: Vec::new(),
                prefix: String::new(),
                timeout: TIMEOUT,
            }),
            policy,
            refused: true,
        }
    }

    /// Whether requests on connections to this port may be meant.
    pub fn on_port(&self, port: u16) -> bool {
        self.ports.is_empty() || self.ports.contains(&port)
    }

    /// Whether the request is meant, whose `Host` this is.
    pub fn fits(&self, host: &str) -> bool {
        let host = bare(host).to_ascii_lowercase();
        self.hosts.iter().any(|pattern| pattern.fits(&host))
    }

    /// Whether the application's own header goes on in the token's stead.
    pub fn yields_to(&self, request: &Request<'_>) -> bool {
        self.application == Application::Keep
            && request
                .headers
                .iter()
                .any(|(name, _)| **name == self.header)
    }

    /// A host that both name, where they select by the same labels, on a port that
    /// both name: they could never do but collide.
    pub(super) fn collides(&self, other: &Self) -> Option<&Pattern> {
        let ports = self.ports.is_empty()
            || other.ports.is_empty()
            || self.ports.iter().any(|port| other.ports.contains(port));
        let mut hosts = self.hosts.iter();
        hosts.find(|host| ports && other.hosts.contains(host))
    }

    /// The one that says what to do with a request.
    pub(super) fn choose<'a>(
        all: &'a [Arc<Self>],
        port: u16,
        host: &str,
    ) -> Result<Option<&'a Arc<Self>>, Unclear> {
        let mut fitting = (all.iter()).filter(|one| one.on_port(port) && one.fits(host));
        match (fitting.next(), fitting.next()) {
            (Some(one), Some(other)) => {
                let both = [one.policy.clone(), other.policy.clone()];
                Err(Unclear::Ambiguous(Box::new(both)))
            }
            (Some(one), None) if one.refused => Err(Unclear::Refused(Box::new(one.policy.clone()))),
            (one, _) => Ok(one),
        }
    }
}

/// Without port, and without the dot of the root.
fn bare(host: &str) -> &str {
    let end = host.rfind(']').map_or(0, |at| at + 1);
    let name = host[end..].find(':').map_or(host, |at| &host[..end + at]);
    name.strip_suffix('.').unwrap_or(name)
}

/// Selects the same workloads, word for word.
pub(super) fn same_reach(one: &Reach, other: &Reach) -> bool {
    one.namespace == other.namespace && one.labels == other.labels
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_case_and_the_last_dot_do_not_count() {
        for (host, expected) in [
            ("back", "back"),
            ("back:8080", "back"),
            ("back.", "back"),
            ("back.:80", "back"),
            ("[::1]:80", "[::1]"),
            ("[::1]", "[::1]"),
            ("", ""),
        ] {
            assert_eq!(bare(host), expected);
        }
    }
}
