//! What clients are told when a request is refused: RFC 6750 3, RFC 9449 7.1, RFC 9728
//! 5.1.

use http::{HeaderName, HeaderValue, StatusCode, header};

use super::ProtectedResource;
use crate::{
    jwt::{Algorithm, ProofError, realm},
    policy::schema::BoundTo,
    request::{Reply, Request},
};

/// How a token was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    Bearer,
    Dpop,
}

/// Parameters of a challenge, in order.
type Parameters<'a> = Vec<(&'static str, &'a str)>;

impl ProtectedResource {
    /// There is no token, and it takes one. `scopes`: those that a rule asks for.
    pub fn unauthenticated(&self, request: &Request<'_>, scopes: &[String]) -> Reply {
        let scope = self.scope(scopes);
        let mut reply = Reply::new(StatusCode::UNAUTHORIZED, "a token is required");
        let schemes: &[Scheme] = match self.binding {
            BoundTo::Any | BoundTo::Certificate => &[Scheme::Bearer],
            BoundTo::Dpop => &[Scheme::Dpop],
            BoundTo::Either => &[Scheme::Dpop, Scheme::Bearer],
        };
        for scheme in schemes {
            self.challenge(&mut reply, request, *scheme, vec![("scope", &scope)]);
        }
        reply
    }

    /// The token does not hold.
    pub fn invalid_token(&self, request: &Request<'_>, scheme: Scheme, why: &str) -> Reply {
        self.refused(
            request,
            StatusCode::UNAUTHORIZED,
            scheme,
            "invalid_token",
            why,
        )
    }

    /// The request cannot be understood, such as with two tokens.
    pub fn invalid_request(&self, request: &Request<'_>, scheme: Scheme, why: &str) -> Reply {
        self.refused(
            request,
            StatusCode::BAD_REQUEST,
            scheme,
            "invalid_request",
            why,
        )
    }

    /// The token holds, and is not good for this.
    pub fn insufficient_scope(
        &self,
        request: &Request<'_>,
        scheme: Scheme,
        scopes: &[String],
    ) -> Reply {
        let scope = self.scope(scopes);
        let mut reply = Reply::new(StatusCode::FORBIDDEN, "the token lacks a scope");
        let parameters = vec![("error", "insufficient_scope"), ("scope", &scope)];
        self.challenge(&mut reply, request, scheme, parameters);
        reply
    }

    /// The DPoP proof does not hold. `nonce`: one to be used next, where one is asked
    /// for (RFC 9449 9).
    pub fn invalid_proof(
        &self,
        request: &Request<'_>,
        error: &ProofError,
        nonce: Option<HeaderValue>,
    ) -> Reply {
        const NONCE: HeaderName = HeaderName::from_static("dpop-nonce");
        let status = match error {
            ProofError::TooMany => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::UNAUTHORIZED,
        };
        let code = match error {
            ProofError::Nonce => "use_dpop_nonce",
            _ => "invalid_dpop_proof",
        };
        let mut reply = match error {
            ProofError::TooMany => Reply::new(status, error.to_string()),
            _ => self.refused(request, status, Scheme::Dpop, code, &error.to_string()),
        };
        if let Some(nonce) = nonce {
            reply.headers.push((NONCE, nonce));
            let no_store = HeaderValue::from_static("no-store");
            reply.headers.push((header::CACHE_CONTROL, no_store));
        }
        reply
    }

    /// Nobody can say now whether the token holds. Fails closed, and is not the
    /// sender's fault.
    pub fn unavailable(&self) -> Reply {
        Reply::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "the token cannot be checked now",
        )
    }

    fn refused(
        &self,
        request: &Request<'_>,
        status: StatusCode,
        scheme: Scheme,
        code: &str,
        why: &str,
    ) -> Reply {
        let mut reply = Reply::new(status, why.to_owned());
        let parameters = vec![("error", code), ("error_description", why)];
        self.challenge(&mut reply, request, scheme, parameters);
        reply
    }

    fn challenge(
        &self,
        reply: &mut Reply,
        request: &Request<'_>,
        scheme: Scheme,
        parameters: Parameters<'_>,
    ) {
        let realm = match &self.identifier {
            Some(identifier) => identifier.text.clone(),
            None => realm(request),
        };
        let mut all: Parameters<'_> = vec![("realm", &realm)];
        all.extend(
            parameters
                .into_iter()
                .filter(|(_, value)| !value.is_empty()),
        );
        let algorithms: Vec<&str> = Algorithm::ALL.iter().map(|a| a.name()).collect();
        let algorithms = algorithms.join(" ");
        let name = match scheme {
            Scheme::Bearer => "Bearer",
            Scheme::Dpop => {
                all.push(("algs", &algorithms));
                "DPoP"
            }
        };
        if let Some(identifier) = &self.identifier {
            all.push(("resource_metadata", &identifier.metadata_url));
        }
        let all: Vec<String> = (all.into_iter())
            .map(|(name, value)| format!("{name}=\"{}\"", quotable(value)))
            .collect();
        let value = HeaderValue::try_from(format!("{name} {}", all.join(", ")));
        let value = value.expect("names and values are printable ASCII");
        reply.headers.push((header::WWW_AUTHENTICATE, value));
    }

    /// As RFC 6749 3.3 writes lists.
    fn scope(&self, scopes: &[String]) -> String {
        match scopes {
            [] => self.scopes.join(" "),
            scopes => scopes.join(" "),
        }
    }
}

/// What would end or escape the quotes is left out.
fn quotable(text: &str) -> String {
    text.chars()
        .filter(|c| matches!(c, ' '..='~') && !matches!(c, '"' | '\\'))
        .collect()
}
