//! What token validation makes of a request.

use std::{sync::Arc, time::SystemTime};

use http::{HeaderValue, StatusCode, header};

use super::{claims::Claims, source::RemoteKeys, verify::TokenError};
use crate::request::{Edits, Reply, Request};

/// Longest realm in characters.
const MAX_REALM: usize = 256;

/// The edits must be made in any case: the application trusts the headers that rules
/// put out, whoever sent them.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// No rule found a token: there is no principal, and that alone is no error.
    Anonymous(Edits),
    Verified(Verified),
    Refused(Refusal),
}

#[derive(Clone, Debug)]
pub struct Verified {
    /// Of the first token of the rule that won.
    pub claims: Arc<Claims>,
    /// Index of that rule.
    pub rule: usize,
    /// When the first of that rule's tokens expires.
    pub expires: Option<SystemTime>,
    pub edits: Edits,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub error: TokenError,
    /// Index of the rule that said so.
    pub rule: usize,
    /// Key sets that lack the token's key. If the caller can get newer ones, it may ask
    /// once more; a sender can make up key ids, so fetches must be limited.
    pub refetch: Vec<RemoteKeys>,
}

impl Refusal {
    /// The reason as text, and a challenge (RFC 6750 3).
    pub fn reply(&self, request: &Request<'_>) -> Reply {
        invalid_token(request, self.error.status(), self.error.to_string())
    }
}

/// An answer to a token that does not hold.
pub fn invalid_token(request: &Request<'_>, status: StatusCode, reason: String) -> Reply {
    let mut reply = Reply::new(status, reason);
    let challenge = format!(
        "Bearer realm=\"{}\", error=\"invalid_token\"",
        realm(request)
    );
    let challenge = HeaderValue::from_str(&challenge).expect("the realm is printable ASCII only");
    reply.headers.push((header::WWW_AUTHENTICATE, challenge));
    reply
}

/// The request's address without its query. What would end or escape the quotes is left
/// out: the client chose it.
pub fn realm(request: &Request<'_>) -> String {
    let (path, _) = request.path.split_once('?').unwrap_or((request.path, ""));
    // The application is spoken to in plaintext, whatever is around it.
    ["http://", request.host, path]
        .iter()
        .flat_map(|part| part.chars())
        .filter(|c| matches!(c, ' '..='~') && !matches!(c, '"' | '\\'))
        .take(MAX_REALM)
        .collect()
}
