//! Live connections and what is known of each, so that a change of policy can end
//! those that it no longer allows.

use std::{
    collections::HashMap,
    future::poll_fn,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, ready},
};

use arc_swap::ArcSwap;
use tokio::sync::oneshot;

use super::LocalPod;
use crate::{
    policy::{Denial, Facts, PolicySet, Verdict},
    workload::Table,
};

#[derive(Clone, Default)]
pub struct Connections(Arc<Mutex<Live>>);

#[derive(Default)]
struct Live {
    next: u64,
    /// Apart: half of the map may be empty.
    open: HashMap<u64, Box<Subject>>,
}

/// What a connection is judged by. The pod's labels are those that it has by then.
struct Subject {
    pod: Arc<LocalPod>,
    facts: Facts,
    carries: Carries,
    end: oneshot::Sender<Denial>,
}

/// What is known of a connection's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Carries {
    /// Nobody looked.
    Unread,
    /// Looked at, and not HTTP.
    Raw,
    /// HTTP, of which each request is judged by itself.
    Requests,
}

/// A connection's place among the live ones; dropped at its end.
pub struct Registered {
    pub id: u64,
    all: Connections,
    ended: oneshot::Receiver<Denial>,
}

impl Connections {
    /// To be called before the connection is judged: policy may change in between.
    pub fn register(&self, pod: Arc<LocalPod>, facts: &Facts) -> Registered {
        let (end, ended) = oneshot::channel();
        let subject = Subject {
            pod,
            facts: facts.clone(),
            carries: Carries::Unread,
            end,
        };
        let mut live = self.0.lock().expect("no panic while it is held");
        live.next += 1;
        let id = live.next;
        live.open.insert(id, Box::new(subject));
        Registered {
            id,
            all: self.clone(),
            ended,
        }
    }

    /// What records name a connection by that is judged elsewhere.
    pub fn number(&self) -> u64 {
        let mut live = self.0.lock().expect("no panic while it is held");
        live.next += 1;
        live.next
    }

    /// Judges all anew and ends those that are denied now; says how many. Providers
    /// of CUSTOM policies are not asked again.
    pub fn recheck(&self, policies: &ArcSwap<PolicySet>, table: &ArcSwap<Table>) -> usize {
        let mut live = self.0.lock().expect("no panic while it is held");
        let denied: Vec<(u64, Denial)> = live
            .open
            .iter()
            .filter_map(|(id, subject)| Some((*id, subject.denial(policies, table)?)))
            .collect();
        let count = denied.len();
        for (id, denial) in denied {
            if let Some(subject) = live.open.remove(&id) {
                let _ended_by_itself = subject.end.send(denial);
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

impl Subject {
    fn denial(&self, policies: &ArcSwap<PolicySet>, table: &ArcSwap<Table>) -> Option<Denial> {
        let selected = self.pod.selected(policies, table);
        match self.carries {
            Carries::Requests => selected.transport(&self.facts).err(),
            Carries::Unread if selected.needs_request(&self.facts).is_some() => {
                let policy = selected.needs_request(&self.facts)?;
                Some(Denial::Unread(policy.clone()))
            }
            Carries::Unread | Carries::Raw => match selected.opaque(&self.facts) {
                Verdict::Deny(denial) => Some(denial),
                Verdict::Allow(_) => None,
            },
        }
    }
}

impl Registered {
    /// Its requests will be judged one by one.
    pub fn reads_requests(&self) {
        self.learned(|subject| subject.carries = Carries::Requests);
    }

    /// It was looked at and is no HTTP; and more may be known of it.
    pub fn is_raw(&self, facts: &Facts) {
        self.learned(|subject| {
            subject.carries = Carries::Raw;
            subject.facts = facts.clone();
        });
    }

    fn learned(&self, change: impl FnOnce(&mut Subject)) {
        let mut live = self.all.0.lock().expect("no panic while it is held");
        if let Some(subject) = live.open.get_mut(&self.id) {
            change(subject);
        }
    }

    /// Returns when policy ends the connection; never, otherwise.
    pub fn denied(&mut self) -> impl Future<Output = Denial> {
        poll_fn(|cx| self.poll_denied(cx))
    }

    fn poll_denied(&mut self, cx: &mut Context<'_>) -> Poll<Denial> {
        if self.ended.is_terminated() {
            return Poll::Pending;
        }
        match ready!(Pin::new(&mut self.ended).poll(cx)) {
            Ok(denial) => Poll::Ready(denial),
            Err(_closed) => Poll::Pending,
        }
    }
}

/// As [`Registered::denied`], where it is registered.
pub fn denied(live: &mut Option<Registered>) -> impl Future<Output = Denial> {
    poll_fn(|cx| match live {
        Some(live) => live.poll_denied(cx),
        None => Poll::Pending,
    })
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
