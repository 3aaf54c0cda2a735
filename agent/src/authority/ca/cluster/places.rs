//! What runs on which node, as the API server said a moment ago. A node that is asked
//! about is listed once at a time, however many ask.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

/// How long an account that was there counts as there.
const KEEP: Duration = Duration::from_secs(10);
/// How soon is asked again for one that was not: a pod may have come since.
const AGAIN: Duration = Duration::from_secs(1);
/// Nodes that are remembered; those that were not asked about lately go when there are
/// more.
const MOST: usize = 10_000;

/// Namespace and service account.
pub type Accounts = HashSet<(String, String)>;

#[derive(Default)]
pub struct Places(Mutex<HashMap<String, Arc<Slot>>>);

type Slot = tokio::sync::Mutex<Option<(Accounts, Instant)>>;

impl Places {
    pub async fn runs(
        &self,
        node: &str,
        account: &(String, String),
        list: impl AsyncFnOnce() -> Result<Accounts, String>,
    ) -> Result<bool, String> {
        let slot = self.slot(node);
        let mut held = slot.lock().await;
        if let Some((accounts, at)) = held.as_ref() {
            let there = accounts.contains(account);
            if at.elapsed() < if there { KEEP } else { AGAIN } {
                return Ok(there);
            }
        }
        // What was known before is no answer when there is none now.
        *held = None;
        let accounts = list().await?;
        let there = accounts.contains(account);
        *held = Some((accounts, Instant::now()));
        Ok(there)
    }

    fn slot(&self, node: &str) -> Arc<Slot> {
        let mut slots = self.0.lock().expect("no panic while it is held");
        if slots.len() >= MOST && !slots.contains_key(node) {
            slots.retain(|_, slot| match slot.try_lock() {
                Ok(held) => held.as_ref().is_some_and(|(_, at)| at.elapsed() < KEEP),
                Err(_in_use) => true,
            });
        }
        slots.entry(node.to_owned()).or_default().clone()
    }
}
