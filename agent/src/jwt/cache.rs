//! Tokens that were verified: clients send one many times, and RSA is slow.

use std::sync::Arc;

use aws_lc_rs::digest::{Context, SHA256};
use moka::sync::Cache;

use super::{claims::Claims, keys::KeySet, verify::Expected};

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

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Fingerprint([u8; 32]);

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
    /// Token, demands and keys, each with its length before it, so that no two
    /// combinations read the same.
    pub fn new(token: &str, expected: Expected<'_>, keys: &KeySet) -> Self {
        let mut context = Context::new(&SHA256);
        context.update(keys.digest());
        match expected.issuer {
            None => context.update(&[0]),
            Some(issuer) => {
                context.update(&[1]);
                field(&mut context, issuer);
            }
        }
        for list in [expected.audiences, expected.space_delimited] {
            context.update(&(list.len() as u64).to_be_bytes());
            for value in list {
                field(&mut context, value);
            }
        }
        field(&mut context, token);
        let digest = context.finish();
        Self(digest.as_ref().try_into().expect("SHA-256 has 32 bytes"))
    }
}

fn field(context: &mut Context, text: &str) {
    context.update(&(text.len() as u64).to_be_bytes());
    context.update(text.as_bytes());
}
