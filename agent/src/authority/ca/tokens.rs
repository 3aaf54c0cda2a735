//! Join tokens: random, for one node, used once, short-lived. The store has their
//! SHA-256 alone. Also here: nodes whose certificates were revoked, and the numbers of
//! bundles.

use aws_lc_rs::digest as hash;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use sqlx::{Any, Row as _, any::AnyRow};
use zeroize::Zeroizing;

use super::problem::Problem;
use crate::authority::{Store, StoreError};

/// What they begin with, so that people and scanners know them.
pub const PREFIX: &str = "postern-join-";
/// How long those that can no longer be used are still listed, seconds.
const REMEMBERED: u64 = 30 * 24 * 3_600;

/// Times are seconds since 1970, 0 is never.
const TABLES: [&str; 3] = [
    "CREATE TABLE IF NOT EXISTS join_tokens (
        hash TEXT PRIMARY KEY, id TEXT NOT NULL UNIQUE, node TEXT NOT NULL,
        expires BIGINT NOT NULL, used BIGINT NOT NULL DEFAULT 0,
        revoked BIGINT NOT NULL DEFAULT 0)",
    "CREATE TABLE IF NOT EXISTS revoked_nodes (
        node TEXT PRIMARY KEY, revoked_at BIGINT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS bundles (
        digest TEXT PRIMARY KEY, sequence BIGINT NOT NULL)",
];

/// One that was made, as people are shown it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JoinToken {
    pub id: String,
    pub node: String,
    pub expires: u64,
    pub used: u64,
    pub revoked: u64,
}

impl JoinToken {
    pub fn state(&self, now: u64) -> &'static str {
        match self {
            Self { used: 1.., .. } => "used",
            Self { revoked: 1.., .. } => "revoked",
            Self { expires, .. } if *expires <= now => "expired",
            _ => "open",
        }
    }
}

pub async fn make_tables(store: &Store) -> Result<(), StoreError> {
    for table in TABLES {
        store.make(table).await?;
    }
    Ok(())
}

/// A new token for a node, and its id. `expires` in seconds since 1970.
pub async fn create(
    store: &Store,
    node: &str,
    now: u64,
    expires: u64,
) -> Result<(Zeroizing<String>, String), StoreError> {
    let mut secret = Zeroizing::new([0; 32]);
    aws_lc_rs::rand::fill(&mut *secret)
        .map_err(|_| StoreError::Config("the system has no randomness".into()))?;
    let mut token = Zeroizing::new(String::with_capacity(64));
    token.push_str(PREFIX);
    URL_SAFE_NO_PAD.encode_string(*secret, &mut token);
    let digest = digest(token.as_bytes());
    let id = hex(&digest[..6]);
    sqlx::query::<Any>("DELETE FROM join_tokens WHERE expires < $1")
        .bind(now.saturating_sub(REMEMBERED) as i64)
        .execute(&store.pool)
        .await?;
    sqlx::query::<Any>("INSERT INTO join_tokens (hash, id, node, expires) VALUES ($1, $2, $3, $4)")
        .bind(hex(&digest))
        .bind(id.clone())
        .bind(node.to_owned())
        .bind(expires as i64)
        .execute(&store.pool)
        .await?;
    Ok((token, id))
}

/// Takes a token for a node; its id. One statement changes one row or none: of many who
/// present it at once, one has it.
pub async fn take(store: &Store, token: &str, node: &str, now: u64) -> Result<String, Problem> {
    let digest = digest(token.as_bytes());
    let id = hex(&digest[..6]);
    let taken = sqlx::query::<Any>(
        "UPDATE join_tokens SET used = $1
         WHERE hash = $2 AND node = $3 AND used = 0 AND revoked = 0 AND expires > $4",
    )
    .bind(now.max(1) as i64)
    .bind(hex(&digest))
    .bind(node.to_owned())
    .bind(now as i64)
    .execute(&store.pool)
    .await
    .map_err(StoreError::from)?;
    if taken.rows_affected() == 1 {
        return Ok(id);
    }
    let known = sqlx::query::<Any>(
        "SELECT id, node, expires, used, revoked FROM join_tokens WHERE hash = $1",
    )
    .bind(hex(&digest))
    .fetch_optional(&store.pool)
    .await
    .map_err(StoreError::from)?;
    let known = known.map(|row| read(&row)).transpose()?;
    Err(Problem::proof(match known {
        None => "the join token is unknown".to_owned(),
        Some(known) if known.node != node => {
            format!("join token {id} is for node {}", known.node)
        }
        Some(known) => format!("join token {id} is {}", known.state(now)),
    }))
}

pub async fn list(store: &Store) -> Result<Vec<JoinToken>, StoreError> {
    let rows = sqlx::query::<Any>(
        "SELECT id, node, expires, used, revoked FROM join_tokens ORDER BY expires",
    )
    .fetch_all(&store.pool)
    .await?;
    rows.iter().map(read).collect()
}

fn read(row: &AnyRow) -> Result<JoinToken, StoreError> {
    let seconds = |name| row.try_get::<i64, _>(name).map(|n| n.max(0) as u64);
    Ok(JoinToken {
        id: row.try_get("id")?,
        node: row.try_get("node")?,
        expires: seconds("expires")?,
        used: seconds("used")?,
        revoked: seconds("revoked")?,
    })
}

/// Whether there was such a token that could still be used.
pub async fn revoke(store: &Store, id: &str, now: u64) -> Result<bool, StoreError> {
    let revoked = sqlx::query::<Any>(
        "UPDATE join_tokens SET revoked = $1 WHERE id = $2 AND used = 0 AND revoked = 0",
    )
    .bind(now as i64)
    .bind(id.to_owned())
    .execute(&store.pool)
    .await?;
    Ok(revoked.rows_affected() == 1)
}

/// What a node's agent was given up to now counts no more; nor do its open tokens.
pub async fn revoke_node(store: &Store, node: &str, now: u64) -> Result<(), StoreError> {
    sqlx::query::<Any>("UPDATE join_tokens SET revoked = $1 WHERE node = $2 AND revoked = 0")
        .bind(now as i64)
        .bind(node.to_owned())
        .execute(&store.pool)
        .await?;
    sqlx::query::<Any>(
        "INSERT INTO revoked_nodes (node, revoked_at) VALUES ($1, $2)
         ON CONFLICT (node) DO UPDATE SET revoked_at = excluded.revoked_at",
    )
    .bind(node.to_owned())
    .bind(now as i64)
    .execute(&store.pool)
    .await?;
    Ok(())
}

/// When the node's certificates were revoked last.
pub async fn revoked(store: &Store, node: &str) -> Result<Option<u64>, StoreError> {
    let row = sqlx::query::<Any>("SELECT revoked_at FROM revoked_nodes WHERE node = $1")
        .bind(node.to_owned())
        .fetch_optional(&store.pool)
        .await?;
    match row {
        Some(row) => Ok(Some(row.try_get::<i64, _>("revoked_at")?.max(0) as u64)),
        None => Ok(None),
    }
}

/// The number of a bundle: each new content gets a higher one, also after a restart.
pub async fn sequence(store: &Store, digest: &str) -> Result<u64, StoreError> {
    sqlx::query::<Any>(
        "INSERT INTO bundles (digest, sequence)
         SELECT $1, COALESCE(MAX(sequence), 0) + 1 FROM bundles WHERE true
         ON CONFLICT (digest) DO NOTHING",
    )
    .bind(digest.to_owned())
    .execute(&store.pool)
    .await?;
    let row = sqlx::query::<Any>("SELECT sequence FROM bundles WHERE digest = $1")
        .bind(digest.to_owned())
        .fetch_one(&store.pool)
        .await?;
    Ok(row.try_get::<i64, _>("sequence")?.max(0) as u64)
}

pub fn digest(bytes: &[u8]) -> [u8; 32] {
    let digest = hash::digest(&hash::SHA256, bytes);
    digest.as_ref().try_into().expect("SHA-256 has 32 bytes")
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
