//! Live connections and what is known of each, so that a change of policy can end
//! those that it no longer allows.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex},
};

use tokio::sync::oneshot;

use super::LocalPod;
use crate::{
    identity::SpiffeId,
    policy::{Denial, Facts, PolicySet, Verdict},
};

#[derive(Clone, Default)]
pub struct Connections(Arc<Mutex<Live>>);

#[derive(Default)]
struct Live {
    next: u64,
    open: HashMap<u64, (Subject, oneshot::Sender<Denial>)>,
}

/// What a connection is judged by. The pod's labels are those that it has by then.
struct Subject {
    pod: Arc<LocalPod>,
    source: Option<SpiffeId>,
    source_ip: IpAddr,
    port: u16,
}

impl Subject {
    fn facts(&self) -> Facts {
        self.pod
            .facts(self.source.clone(), self.source_ip, self.port)
    }
}

/// A connection's place among the live ones; dropped at its end.
pub struct Registered {
    id: u64,
    all: Connections,
    ended: oneshot::Receiver<Denial>,
}

impl Connections {
    /// To be called before the connection is judged: policy may change in between.
    pub fn register(&self, pod: Arc<LocalPod>, facts: &Facts) -> Registered {
        let subject = Subject {
            pod,
            source: facts.source.clone(),
            source_ip: facts.source_ip,
            port: facts.destination_port,
        };
        let (sender, ended) = oneshot::channel();
        let mut live = self.0.lock().expect("no panic while it is held");
        live.next += 1;
        let id = live.next;
        live.open.insert(id, (subject, sender));
        Registered {
            id,
            all: self.clone(),
            ended,
        }
    }

    /// Judges all anew and ends those that are denied now; says how many.
    pub fn recheck(&self, policies: &PolicySet) -> usize {
        let mut live = self.0.lock().expect("no panic while it is held");
        let denied: Vec<(u64, Denial)> = live
            .open
            .iter()
            .filter_map(
                |(id, (subject, _))| match policies.evaluate(&subject.facts()) {
                    Verdict::Deny(denial) => Some((*id, denial)),
                    Verdict::Allow(_) => None,
                },
            )
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
        self.all
            .0
            .lock()
            .expect("no panic while it is held")
            .open
            .remove(&self.id);
    }
}
