//! A token that policy wants, as it is asked for.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use url::Url;

use super::ClientAuthentication;

/// Equal ones are served by the same token, for the same workload.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Wanted {
    /// `namespace/name` of the object that wants it.
    pub object: String,
    pub grant: Grant,
    /// `None`: no server is asked, which only a JWT-SVID can do without.
    pub server: Option<Server>,
    /// `None`: the workload's SPIFFE ID.
    pub client_id: Option<String>,
    pub authentication: ClientAuthentication,
    /// Of a JWT-SVID exactly one.
    pub audiences: Vec<String>,
    pub resources: Vec<String>,
    pub scopes: Vec<String>,
    /// What stands before the token in its header.
    pub prefix: String,
    /// For all that has to be done.
    pub timeout: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Server {
    /// Its metadata tell where.
    Issuer(String),
    /// The token endpoint itself.
    Endpoint(String),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Grant {
    /// RFC 6749 4.4.
    ClientCredentials,
    /// RFC 8693. `actor`: the workload's JWT-SVID goes along as `actor_token`.
    TokenExchange { subject: SubjectKind, actor: bool },
    /// A JWT-SVID.
    WorkloadIdentity,
}

/// Whose token is exchanged.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SubjectKind {
    Inbound,
    /// A file within the pod.
    ServiceAccount(PathBuf),
}

impl Wanted {
    pub fn grant_name(&self) -> &'static str {
        match self.grant {
            Grant::ClientCredentials => "clientCredentials",
            Grant::TokenExchange { .. } => "tokenExchange",
            Grant::WorkloadIdentity => "workloadIdentity",
        }
    }

    pub fn subject_name(&self) -> Option<&'static str> {
        match &self.grant {
            Grant::TokenExchange { subject, .. } => Some(match subject {
                SubjectKind::Inbound => "inbound",
                SubjectKind::ServiceAccount(_) => "serviceAccount",
            }),
            _ => None,
        }
    }

    /// Who is asked, for people: the server's host, and its port where it has one.
    pub fn server_host(&self) -> Option<String> {
        let (Server::Issuer(url) | Server::Endpoint(url)) = self.server.as_ref()?;
        let url = Url::parse(url).ok()?;
        let host = url.host_str()?;
        Some(match url.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        })
    }

    /// Whether the token may be bound to the workload's key: then it goes with it.
    pub fn uses_workload_key(&self) -> bool {
        self.server.is_some()
            && matches!(
                self.authentication,
                ClientAuthentication::PrivateKeyJwt { key_file: None }
                    | ClientAuthentication::TlsClientAuth {}
            )
    }
}

/// Whether secrets may be sent there: `https`, or `http` on loopback. Says why not.
pub fn is_secret_safe(url: &str) -> Result<(), &'static str> {
    let url = Url::parse(url).map_err(|_| "is no URL")?;
    if !url.username().is_empty() || url.password().is_some() || url.fragment().is_some() {
        return Err("has credentials or a fragment, which are not sent");
    }
    let host = url.host_str().unwrap_or_default();
    let literal = host.trim_start_matches('[').trim_end_matches(']');
    let loopback =
        host == "localhost" || literal.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    match url.scheme() {
        "https" if !host.is_empty() => Ok(()),
        "http" if loopback => Ok(()),
        _ => Err("is not https; only on loopback secrets may go without"),
    }
}
