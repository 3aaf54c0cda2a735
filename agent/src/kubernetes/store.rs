//! What is known of the cluster: the objects of each watch. A watch's objects are
//! replaced at once, when they have been listed to the end: nobody ever sees half of them.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard},
    time::{Duration, SystemTime},
};

use tokio::sync::watch;

use super::{Held, Scope, held::Stored};
use crate::workload::{NamespacedName, WorkloadObject};

#[derive(Debug, Default)]
pub struct Store {
    inner: Mutex<Inner>,
    /// Version of what is known.
    changed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
pub struct Inner {
    pub scopes: BTreeMap<Scope, Kept>,
    pub version: u64,
    /// Version in which a policy last changed.
    pub policies: u64,
}

#[derive(Debug, Default)]
pub struct Kept {
    pub objects: BTreeMap<NamespacedName, Held>,
    /// Listed by this agent.
    pub synced: bool,
    /// When the API server had it so, where it was read from the disk and not listed yet.
    pub from_disk: Option<SystemTime>,
    pub failing: Option<Failing>,
}

#[derive(Clone, Debug)]
pub struct Failing {
    pub since: SystemTime,
    pub error: String,
}

impl Kept {
    /// Whether nothing is missing, though it may be old.
    pub fn is_whole(&self) -> bool {
        self.synced || self.from_disk.is_some()
    }
}

/// How good what is known is.
#[derive(Clone, Debug, Default)]
pub struct Standing {
    /// Every watch has been listed.
    pub synced: bool,
    /// Nothing is missing: listed, or from the disk.
    pub whole: bool,
    /// Since when something may have changed without being known.
    pub stale_since: Option<SystemTime>,
    /// What fails, the longest first; a few.
    pub errors: Vec<String>,
}

impl Store {
    pub fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no panic while it is held")
    }

    /// Versions, as they come.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    pub fn begin(&self, scope: &Scope) {
        self.lock().scopes.entry(scope.clone()).or_default();
    }

    /// It is not watched any more.
    pub fn end(&self, scope: &Scope) {
        let mut inner = self.lock();
        if inner
            .scopes
            .remove(scope)
            .is_some_and(|kept| kept.is_whole())
        {
            self.bump(&mut inner, scope);
        }
    }

    /// What a disk had.
    pub fn load(&self, scope: Scope, objects: BTreeMap<NamespacedName, Held>, at: SystemTime) {
        let mut inner = self.lock();
        let kept = inner.scopes.entry(scope.clone()).or_default();
        if !kept.synced {
            kept.objects = objects;
            kept.from_disk = Some(at);
            self.bump(&mut inner, &scope);
        }
    }

    /// All that a watch is about, listed to the end.
    pub fn replace(&self, scope: &Scope, objects: BTreeMap<NamespacedName, Held>) {
        let mut inner = self.lock();
        let Some(kept) = inner.scopes.get_mut(scope) else {
            return;
        };
        let same = kept.is_whole()
            && kept.objects.len() == objects.len()
            && (kept.objects.iter().zip(&objects))
                .all(|((name, held), (other, now))| name == other && held.says_the_same(now));
        kept.objects = objects;
        let first = !std::mem::replace(&mut kept.synced, true);
        kept.from_disk = None;
        kept.failing = None;
        if !same || first {
            self.bump(&mut inner, scope);
        }
    }

    pub fn apply(&self, scope: &Scope, name: NamespacedName, held: Held) {
        let mut inner = self.lock();
        let Some(kept) = inner.scopes.get_mut(scope) else {
            return;
        };
        kept.failing = None;
        let before = kept.objects.get(&name);
        let same = before.is_some_and(|before| before.says_the_same(&held));
        kept.objects.insert(name, held);
        if !same {
            self.bump(&mut inner, scope);
        }
    }

    pub fn delete(&self, scope: &Scope, name: &NamespacedName) {
        let mut inner = self.lock();
        let removed = (inner.scopes.get_mut(scope)).and_then(|kept| kept.objects.remove(name));
        if removed.is_some() {
            self.bump(&mut inner, scope);
        }
    }

    pub fn failed(&self, scope: &Scope, error: String) {
        let mut inner = self.lock();
        if let Some(kept) = inner.scopes.get_mut(scope) {
            let since = kept.failing.as_ref().map(|failing| failing.since);
            let since = since.unwrap_or_else(SystemTime::now);
            kept.failing = Some(Failing { since, error });
        }
        // Who waits for it need not any longer.
        self.changed.send_replace(inner.version);
    }

    /// The watch stands.
    pub fn reached(&self, scope: &Scope) {
        if let Some(kept) = self.lock().scopes.get_mut(scope) {
            kept.failing = None;
        }
    }

    /// `grace`: so long a watch may fail before what it brought is called stale.
    pub fn standing(&self, grace: Duration) -> Standing {
        const ERRORS: usize = 3;
        let inner = self.lock();
        let now = SystemTime::now();
        let kept = || inner.scopes.values();
        let old = |failing: &&Failing| {
            let age = now.duration_since(failing.since);
            age.is_ok_and(|age| age > grace)
        };
        let mut failing: Vec<_> = inner
            .scopes
            .iter()
            .filter_map(|(scope, kept)| Some((kept.failing.as_ref()?, scope)))
            .collect();
        failing.sort_by_key(|(failing, _)| failing.since);
        Standing {
            synced: !inner.scopes.is_empty() && kept().all(|kept| kept.synced),
            whole: !inner.scopes.is_empty() && kept().all(Kept::is_whole),
            stale_since: kept()
                .filter_map(|kept| {
                    let failing = kept.failing.as_ref().filter(old).map(|f| f.since);
                    kept.from_disk.or(failing)
                })
                .min(),
            errors: failing
                .iter()
                .take(ERRORS)
                .map(|(failing, scope)| format!("{scope}: {}", failing.error))
                .collect(),
        }
    }

    fn bump(&self, inner: &mut Inner, scope: &Scope) {
        inner.version += 1;
        if matches!(scope, Scope::Policies(_)) {
            inner.policies = inner.version;
        }
        self.changed.send_replace(inner.version);
    }
}

impl Inner {
    pub fn workloads(&self) -> impl Iterator<Item = &WorkloadObject> {
        let held = self.scopes.values().flat_map(|kept| kept.objects.values());
        held.filter_map(|held| match held {
            Held::Workload(object) => Some(&**object),
            Held::Policy(_) => None,
        })
    }

    pub fn policies(&self) -> impl Iterator<Item = &Stored> {
        let held = self.scopes.values().flat_map(|kept| kept.objects.values());
        held.filter_map(|held| match held {
            Held::Policy(stored) => Some(&**stored),
            Held::Workload(_) => None,
        })
    }
}
