//! What an operator does beside the running server, on the same store.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::tokens;
pub use super::tokens::JoinToken;
use crate::{
    app::Misconfigured,
    authority::{Clock, Config, Store, make_state},
    identity::AgentId,
};
use zeroize::Zeroizing;

/// Longest time that a join token may be used.
const LONGEST: Duration = Duration::from_secs(30 * 24 * 3_600);

async fn open(config: &Config) -> Result<Store> {
    make_state(config)?;
    let wrong = |e: crate::authority::StoreError| Misconfigured(e.to_string());
    let store = Store::open(config).await.map_err(wrong)?;
    tokens::make_tables(&store).await?;
    Ok(store)
}

/// A token with which the agent of one node can join once.
pub async fn create_join_token(
    config: &Config,
    node: &str,
    ttl: Duration,
) -> Result<Zeroizing<String>> {
    AgentId::new(config.trust_domain.clone(), node).context(format!(
        "`{node}` is no node's name: letters, digits, `.`, `-` and `_`"
    ))?;
    if ttl.is_zero() || ttl > LONGEST {
        bail!("a join token can be used for a second to 30 days");
    }
    let now = Clock::system().seconds();
    let store = open(config).await?;
    let (token, _id) = tokens::create(&store, node, now, now + ttl.as_secs()).await?;
    Ok(token)
}

/// All that were made in the last time, with their state.
pub async fn join_tokens(config: &Config) -> Result<Vec<(JoinToken, &'static str)>> {
    let now = Clock::system().seconds();
    let tokens = tokens::list(&open(config).await?).await?;
    let with_state = |token: JoinToken| {
        let state = token.state(now);
        (token, state)
    };
    Ok(tokens.into_iter().map(with_state).collect())
}

pub async fn revoke_join_token(config: &Config, id: &str) -> Result<()> {
    let now = Clock::system().seconds();
    if !tokens::revoke(&open(config).await?, id, now).await? {
        bail!("no join token {id} that could still be used");
    }
    Ok(())
}

/// The certificates that the node's agent has up to now are refused by the authority.
pub async fn revoke_node(config: &Config, node: &str) -> Result<()> {
    let now = Clock::system().seconds();
    Ok(tokens::revoke_node(&open(config).await?, node, now).await?)
}
