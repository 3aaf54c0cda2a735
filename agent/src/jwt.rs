//! Bearer tokens (RFC 7519) as RequestAuthentication has them: where a token is looked
//! for, whose key signed it, and what the application is told of it. Pure: the clock
//! and the keys of issuers are handed in; `source` keeps those.
//!
//! `locate -> verify (keys, algorithm) -> claims`; `rules` joins them for one request,
//! `cache` remembers what was verified, `headers` tells the application.

mod algorithm;
mod cache;
mod claims;
mod dpop;
mod headers;
pub mod json;
mod keys;
mod locate;
mod original;
mod outcome;
mod rules;
mod sign;
mod source;
mod verify;

#[cfg(test)]
mod tests;

pub use algorithm::Algorithm;
pub use cache::{VerifiedTokens, Wanted};
pub use claims::{Checked, Claims, Confirmation};
pub use dpop::{MAX_PROOF, PROOF_WINDOW, Proof, ProofError};
pub use headers::may_be_output;
pub use keys::{EmbeddedKey, KeySet, KeySetError, SkipReason, Skipped};
pub use locate::Locations;
pub use original::original;
pub use outcome::{Outcome, Refusal, Verified, invalid_token, realm};
pub use rules::{
    Demands, KeySource, Rule, SCP, authenticate, authenticate_for, is_jwt, is_preflight, presented,
    put_out_introspected,
};
pub use sign::{SigningKey, SigningKeyError};
pub use source::{Counts, KeyStore, Options, Problem, RemoteKeys};
pub use verify::{Expected, LEEWAY, MAX_TOKEN, Token, TokenError};
