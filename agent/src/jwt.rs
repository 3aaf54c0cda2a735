//! Bearer tokens (RFC 7519) as RequestAuthentication has them: where a token is looked
//! for, whose key signed it, and what the application is told of it. Pure: the clock
//! and the keys of issuers are handed in; `source` keeps those.
//!
//! `locate -> verify (keys, algorithm) -> claims`; `rules` joins them for one request,
//! `cache` remembers what was verified, `headers` tells the application.

mod algorithm;
mod cache;
mod claims;
mod headers;
pub mod json;
mod keys;
mod locate;
mod outcome;
mod rules;
mod sign;
mod source;
mod verify;

#[cfg(test)]
mod tests;

pub use algorithm::Algorithm;
pub use cache::VerifiedTokens;
pub use claims::{Claims, Confirmation};
pub use headers::may_be_output;
pub use keys::{KeySet, KeySetError, SkipReason, Skipped};
pub use locate::Locations;
pub use outcome::{Outcome, Refusal, Verified, invalid_token};
pub use rules::{KeySource, Rule, authenticate};
pub use sign::{SigningKey, SigningKeyError};
pub use source::{Counts, KeyStore, Options, Problem, RemoteKeys};
pub use verify::{Expected, LEEWAY, MAX_TOKEN, Token, TokenError};
