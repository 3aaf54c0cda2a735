//! External authorizers: the providers that AuthorizationPolicies with the action
//! CUSTOM name. A provider decides on one connection or request; where it cannot
//! be asked or understood, the request is refused unless its `failOpen` is set.

mod config;
mod grpc;
mod headers;
mod http;
mod proto;
#[cfg(test)]
mod tests;
mod values;

use std::{collections::HashMap, net::SocketAddr, time::Duration};

use ::http::StatusCode;

pub use config::{ExtensionProvider, GrpcProvider, HttpProvider, Kind};
pub use headers::Pattern;
pub use values::{ErrorStatus, FixedHeaders, Host, PathPrefix};

use crate::request::{Edits, Reply, Request};

/// What is asked about: a connection, or a request on it.
#[derive(Clone, Debug)]
pub struct Check<'a> {
    pub source: SocketAddr,
    /// SPIFFE ID of the peer, with its scheme.
    pub source_principal: Option<String>,
    pub destination: SocketAddr,
    /// SPIFFE ID of the workload, with its scheme.
    pub destination_principal: Option<String>,
    /// Server name that the client asked for by TLS.
    pub sni: Option<String>,
    /// `None` on raw TCP.
    pub request: Option<&'a Request<'a>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The request goes on, so changed.
    Allow(Edits),
    /// The client gets this; a raw connection is closed.
    Deny(Reply),
}

/// A decision, and what the log says of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub decision: Decision,
    pub reason: String,
    /// Whether the decision is not the provider's, as it could not be had.
    pub failed: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum AuthorizerError {
    #[error("extension provider `{name}` is there twice")]
    Twice { name: String },
}

/// Why there is no decision of the provider.
#[derive(Debug, thiserror::Error)]
enum CheckError {
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("cannot be asked: {0}")]
    Unreachable(String),
    #[error("answered {0}")]
    Status(StatusCode),
    #[error("its answer cannot be used: {0}")]
    Answer(String),
    /// The client's doing, so it is refused even where failures are let through.
    #[error("the request cannot be put to it: {0}")]
    Request(&'static str),
}

/// All providers, by name.
#[derive(Debug)]
pub struct Authorizers(HashMap<String, Authorizer>);

#[derive(Debug)]
struct Authorizer {
    name: String,
    client: Client,
    timeout: Duration,
    fail_open: bool,
    status_on_error: StatusCode,
}

#[derive(Debug)]
enum Client {
    Grpc(Box<grpc::Client>),
    Http(Box<http::Client>),
}

impl Authorizers {
    /// Connects to none of them yet.
    pub fn new(providers: Vec<ExtensionProvider>) -> Result<Self, AuthorizerError> {
        let mut all = HashMap::new();
        for provider in providers {
            let authorizer = Authorizer::new(provider);
            if let Some(other) = all.insert(authorizer.name.clone(), authorizer) {
                return Err(AuthorizerError::Twice { name: other.name });
            }
        }
        Ok(Self(all))
    }

    /// Whether policies may name this provider.
    pub fn has(&self, provider: &str) -> bool {
        self.0.contains_key(provider)
    }

    /// Asks a provider. An unknown one is a refusal, as in Istio.
    pub async fn check(&self, provider: &str, call: &Check<'_>) -> Outcome {
        match self.0.get(provider) {
            Some(authorizer) => authorizer.check(call).await,
            None => Outcome {
                decision: Decision::Deny(Reply::new(StatusCode::FORBIDDEN, "")),
                reason: format!("no extension provider `{provider}`"),
                failed: true,
            },
        }
    }
}

impl Authorizer {
    fn new(provider: ExtensionProvider) -> Self {
        let (timeout, fail_open, status) = match &provider.kind {
            Kind::Grpc(grpc) => (grpc.timeout, grpc.fail_open, grpc.status_on_error),
            Kind::Http(http) => (http.timeout, http.fail_open, http.status_on_error),
        };
        Self {
            name: provider.name,
            client: match provider.kind {
                Kind::Grpc(grpc) => Client::Grpc(Box::new(grpc::Client::new(&grpc))),
                Kind::Http(http) => Client::Http(Box::new(http::Client::new(http))),
            },
            timeout: timeout.0,
            fail_open,
            status_on_error: status.0,
        }
    }

    async fn check(&self, call: &Check<'_>) -> Outcome {
        let asked = async {
            match &self.client {
                Client::Grpc(client) => client.check(call).await,
                Client::Http(client) => client.check(call).await,
            }
        };
        let result = match tokio::time::timeout(self.timeout, asked).await {
            Ok(result) => result,
            Err(_elapsed) => Err(CheckError::Timeout(self.timeout)),
        };
        match result {
            Ok(decision) => {
                let verb = match &decision {
                    Decision::Allow(_) => "allowed",
                    Decision::Deny(_) => "denied",
                };
                Outcome {
                    decision,
                    reason: format!("{verb} by extension provider `{}`", self.name),
                    failed: false,
                }
            }
            Err(error) => self.failed(&error),
        }
    }

    /// Fail-closed, unless configured otherwise.
    fn failed(&self, error: &CheckError) -> Outcome {
        let let_through = self.fail_open && !matches!(error, CheckError::Request(_));
        let reply = || Reply::new(self.status_on_error, "");
        Outcome {
            decision: if let_through {
                Decision::Allow(Edits::default())
            } else {
                Decision::Deny(reply())
            },
            reason: format!("extension provider `{}`: {error}", self.name),
            failed: true,
        }
    }
}
