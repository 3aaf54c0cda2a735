//! Tokens that were verified: clients send one many times, and RSA is slow.

use std::{
    hash::{Hash, Hasher},
    sync::Arc,
};

use aws_lc_rs::digest::{Context, SHA256, digest};
use moka::sync::Cache;

use super::{claims::Claims, keys::KeySet};

/// About ten thousand tokens of a usual size.
const DEFAULT_BYTES: u64 = 16 << 20;
/// Roughly what an entry costs beside the text of its token.
const ENTRY_BYTES: usize = 512;

/// Bounded by the bytes of tokens, least used go first. An entry counts only for what
/// verified it: the same demands and the same key set. A key that an issuer withdraws
/// takes its tokens along, for the set's digest is another.
#[derive(Clone, Debug)]
pub struct VerifiedTokens {
    entries: Cache<Fingerprint, Entry>,
}

/// A token, and what verified it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fingerprint {
    token: [u8; 32],
    wanted: [u8; 32],
    scp: bool,
    keys: [u8; 32],
}

#[derive(Clone, Debug)]
struct Entry {
    claims: Arc<Claims>,
    weight: u32,
}

impl VerifiedTokens {
    pub fn new(max_bytes: u64) -> Self {
        Self {
            entries: Cache::builder()
                .max_capacity(max_bytes)
                .weigher(|_, entry: &Entry| entry.weight)
                .build(),
        }
    }

    /// Claims of a token that was good when it was put in. Its time is still to be
    /// checked.
    pub(super) fn get(&self, fingerprint: &Fingerprint) -> Option<Arc<Claims>> {
        self.entries.get(fingerprint).map(|entry| entry.claims)
    }

    pub(super) fn put(&self, fingerprint: Fingerprint, token: &str, claims: Arc<Claims>) {
        let weight = u32::try_from(token.len() + ENTRY_BYTES).unwrap_or(u32::MAX);
        self.entries.insert(fingerprint, Entry { claims, weight });
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> u64 {
        self.entries.run_pending_tasks();
        self.entries.entry_count()
    }
}

impl Default for VerifiedTokens {
    fn default() -> Self {
        Self::new(DEFAULT_BYTES)
    }
}

impl Fingerprint {
    /// `scp`: whether that claim is a list, too.
    pub fn new(token: &str, wanted: &Wanted, scp: bool, keys: &KeySet) -> Self {
        let digest = digest(&SHA256, token.as_bytes());
        Self {
            token: digest.as_ref().try_into().expect("SHA-256 has 32 bytes"),
            wanted: wanted.digest,
            scp,
            keys: *keys.digest(),
        }
    }
}

/// Of digests the first words say as much as all, and of each: the cache counts by this
/// hash how often something is asked for.
impl Hash for Fingerprint {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(&self.token);
        state.write(&self.wanted[..8]);
        state.write(&self.keys[..8]);
        self.scp.hash(state);
    }
}

/// What a rule wants of tokens: of this the cache has to know by what it was verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    issuer: Option<String>,
    audiences: Vec<String>,
    space_delimited: Vec<String>,
    digest: [u8; 32],
}

impl Wanted {
    pub fn new(
        issuer: Option<String>,
        audiences: Vec<String>,
        space_delimited: Vec<String>,
    ) -> Self {
        let mut context = Context::new(&SHA256);
        // Each text with its length before it, so that no two combinations read the same.
        let mut list = |texts: &[String]| {
            context.update(&(texts.len() as u64).to_be_bytes());
            for text in texts {
                context.update(&(text.len() as u64).to_be_bytes());
                context.update(text.as_bytes());
            }
        };
        list(issuer.as_slice());
        list(&audiences);
        list(&space_delimited);
        let digest = context.finish();
        Self {
            issuer,
            audiences,
            space_delimited,
            digest: digest.as_ref().try_into().expect("SHA-256 has 32 bytes"),
        }
    }

    /// `None`: tokens of any issuer, as long as the keys fit.
    pub fn issuer(&self) -> Option<&str> {
        self.issuer.as_deref()
    }

    /// One of them must be a token's; empty: any is good.
    pub fn audiences(&self) -> &[String] {
        &self.audiences
    }

    /// Claims that are lists written as one string.
    pub fn space_delimited(&self) -> &[String] {
        &self.space_delimited
    }
}
