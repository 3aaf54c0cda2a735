//! Live connections and what is known of each, so that a change of policy can end
//! those that it no longer allows.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use tokio::sync::oneshot;

use crate::policy::{Denial, Facts, PolicySet, Verdict};

#[derive(Clone, Default)]
pub struct Connections(Arc<Mutex<Live>>);

#[derive(Default)]
struct Live {
    next: u64,
    open: HashMap<u64, (Facts, oneshot::Sender<Denial>)>,
}

/// A connection's place among the live ones; dropped at its end.
pub struct Registered {
    id: u64,
    all: Connections,
    ended: oneshot::Receiver<Denial>,
}

impl Connections {
    /// To be called before the connection is judged: policy may change in between.
    pub fn register(&self, facts: Facts) -> Registered {
        let (sender, ended) = oneshot::channel();
        let mut live = self.0.lock().expect("no panic while it is held");
        live.next += 1;
        let id = live.next;
        live.open.insert(id, (facts, sender));
        Registered { id, all: self.clone(), ended }
    }

    /// Judges all anew and ends those that are denied now; says how many.
    pub fn recheck(&self, policies: &PolicySet) -> usize {
        let mut live = self.0.lock().expect("no panic while it is held");
        let denied: Vec<(u64, Denial)> = live
            .open
            .iter()
            .filter_map(|(id, (facts, _))| match policies.evaluate(facts) {
                Verdict::Deny(denial) => Some((*id, denial)),
                Verdict::Allow(_) => None,
            })
            .collect();
        let count = denied.len();
        for (id, denial) in denied {
            if let Some((_, sender)) = live.open.remove(&id) {
                let _ended_by_itself = sender.send(denial);
            }
        }
        count
    }

    pub fn len(&self) -> usize {
        self.0.lock().expect("no panic while it is held").open.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Registered {
    /// Returns when policy ends the connection; never, otherwise.
    pub async fn denied(&mut self) -> Denial {
        match (&mut self.ended).await {
            Ok(denial) => denial,
            Err(_closed) => std::future::pending().await,
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.all.0.lock().expect("no panic while it is held").open.remove(&self.id);
    }
}
