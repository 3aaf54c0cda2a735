//! One watch: list to the end, then follow from there; after a disconnect follow on,
//! after 410 Gone list again. What was known stands until the new list is whole.
//!
//! kube's own `watcher` is not used: it asks for an expired version again and again where
//! a server answers the request itself with 410 Gone, and does not say when a watch
//! stands again, without which nobody could tell whether what is known is stale.

use std::{collections::BTreeMap, hash::BuildHasher as _, time::Duration};

use futures_util::{StreamExt as _, TryStreamExt as _};
use kube::{
    Client,
    api::{ApiResource, DynamicObject, WatchEvent},
};
use tokio::time::{Instant, sleep, timeout};

use super::{
    Counts, Pace, Scope, Store, explain,
    held::{hold, name_of},
};

/// Why a watch ended.
enum End {
    /// In order, or its connection broke; it can go on where it was.
    Again(String),
    /// What it went on from is not kept any more, or it is time to list again.
    List,
    Failed(Failure),
}

enum Failure {
    /// The kind is not installed.
    Absent,
    Error(String),
}

impl From<kube::Error> for Failure {
    fn from(error: kube::Error) -> Self {
        match &error {
            kube::Error::Api(status) if status.code == 404 => Self::Absent,
            _ => Self::Error(explain(&error)),
        }
    }
}

/// One watch. Runs until it is dropped.
pub struct Watch {
    pub client: Client,
    pub scope: Scope,
    pub store: std::sync::Arc<Store>,
    pub counts: std::sync::Arc<Counts>,
    pub pace: Pace,
}

impl Watch {
    pub async fn run(self) {
        let mut wait = self.pace.first;
        // Since when the kind is said not to be installed.
        let mut absent: Option<Instant> = None;
        loop {
            let began = Instant::now();
            match self.once().await {
                Failure::Absent if self.scope.is_optional() => {
                    let since = *absent.get_or_insert_with(Instant::now);
                    // An API server that starts may deny kinds that it has.
                    let knows = {
                        let inner = self.store.lock();
                        let kept = inner.scopes.get(&self.scope);
                        kept.is_some_and(|kept| !kept.objects.is_empty())
                    };
                    if !knows || since.elapsed() >= self.pace.forget {
                        self.store.replace(&self.scope, BTreeMap::new());
                    } else {
                        let error = "the kind is not installed any more".to_owned();
                        self.store.failed(&self.scope, error);
                    }
                    sleep(jittered(self.pace.absent)).await;
                }
                failure => {
                    let error = match failure {
                        Failure::Error(error) => error,
                        Failure::Absent => "404: the API server does not serve it".into(),
                    };
                    absent = None;
                    if began.elapsed() > self.pace.longest {
                        wait = self.pace.first;
                    }
                    self.tell(error);
                    sleep(jittered(wait)).await;
                    wait = (wait * 2).min(self.pace.longest);
                }
            }
        }
    }

    /// Lists and follows until that fails.
    async fn once(&self) -> Failure {
        loop {
            let (resource, mut version) = match self.list().await {
                Ok(listed) => listed,
                Err(failure) => return failure,
            };
            let relist = Instant::now() + jittered(self.pace.resync);
            let mut wait = self.pace.first;
            loop {
                let began = Instant::now();
                match self.follow(&resource, &mut version, relist).await {
                    End::List => break,
                    End::Failed(Failure::Absent) => return Failure::Absent,
                    // All agents would list at once when an API server comes back.
                    End::Failed(Failure::Error(error)) => self.tell(error),
                    End::Again(why) => {
                        self.counts.restarts.inc();
                        tracing::debug!(scope = %self.scope, why, "watching on");
                    }
                }
                // One that ends at once would be asked for without end.
                if began.elapsed() > self.pace.longest {
                    wait = self.pace.first;
                }
                sleep(jittered(wait)).await;
                wait = (wait * 2).min(self.pace.longest);
            }
        }
    }

    /// All objects, page by page, in the best version that is served.
    async fn list(&self) -> Result<(ApiResource, String), Failure> {
        let mut failure = Failure::Absent;
        for resource in self.scope.resources() {
            match self.list_as(&resource).await {
                Ok(version) => return Ok((resource, version)),
                Err(Failure::Absent) => {}
                Err(error) => {
                    failure = error;
                    break;
                }
            }
        }
        Err(failure)
    }

    async fn list_as(&self, resource: &ApiResource) -> Result<String, Failure> {
        let api = self.scope.api(self.client.clone(), resource);
        let mut params = self.scope.list(self.pace.page);
        let mut objects = BTreeMap::new();
        self.counts.lists.inc();
        loop {
            let page = timeout(self.pace.answer, api.list(&params));
            let page = page.await.map_err(|_late| {
                Failure::Error(format!("no list within {:?}", self.pace.answer))
            })??;
            for object in page.items {
                self.counts.objects.inc();
                let name = name_of(&object);
                match hold(&self.scope, resource, object) {
                    Ok(held) => {
                        objects.insert(name, held);
                    }
                    Err(error) => self.unreadable(&name, &error),
                }
            }
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params.continue_token = Some(token),
                None => {
                    let version = page.metadata.resource_version.unwrap_or_default();
                    self.store.replace(&self.scope, objects);
                    return Ok(version);
                }
            }
        }
    }

    /// Follows from a version on, which goes on with what comes.
    async fn follow(&self, resource: &ApiResource, version: &mut String, relist: Instant) -> End {
        let api = self.scope.api(self.client.clone(), resource);
        // Not all agents at the same moment.
        let seconds = jittered(self.pace.watch);
        let params = self.scope.watch(seconds.as_secs().max(1) as u32);
        let opened = timeout(self.pace.answer, api.watch(&params, version)).await;
        let mut events = match opened {
            Err(_late) => {
                let error = format!("no watch within {:?}", self.pace.answer);
                return End::Failed(Failure::Error(error));
            }
            Ok(Err(kube::Error::Api(status))) if status.code == 410 => {
                self.counts.gone.inc();
                return End::List;
            }
            Ok(Err(error)) => return End::Failed(error.into()),
            Ok(Ok(events)) => events.boxed(),
        };
        self.store.reached(&self.scope);
        // A server that ends it does so in time; else its connection is dead.
        let silence = seconds + self.pace.answer;
        loop {
            let event = tokio::select! {
                event = timeout(silence, events.try_next()) => event,
                () = tokio::time::sleep_until(relist) => return End::List,
            };
            let event = match event {
                Err(_silent) => return End::Again("nothing was heard".into()),
                Ok(Err(error)) => return End::Again(explain(&error)),
                Ok(Ok(None)) => return End::Again("ended".into()),
                Ok(Ok(Some(event))) => event,
            };
            match event {
                WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                    self.counts.events.inc();
                    advance(version, &object);
                    let name = name_of(&object);
                    match hold(&self.scope, resource, object) {
                        Ok(held) => self.store.apply(&self.scope, name, held),
                        Err(error) => self.unreadable(&name, &error),
                    }
                }
                WatchEvent::Deleted(object) => {
                    self.counts.events.inc();
                    advance(version, &object);
                    self.store.delete(&self.scope, &name_of(&object));
                }
                WatchEvent::Bookmark(mark) => *version = mark.metadata.resource_version,
                WatchEvent::Error(status) if status.code == 410 => {
                    self.counts.gone.inc();
                    return End::List;
                }
                WatchEvent::Error(status) => {
                    return End::Failed(kube::Error::Api(status).into());
                }
            }
        }
    }

    fn tell(&self, error: String) {
        self.counts.errors.inc();
        tracing::warn!(scope = %self.scope, error, "cannot watch; trying again");
        self.store.failed(&self.scope, error);
    }

    /// It is as if it were not there, which for a pod means that it is not let in.
    fn unreadable(&self, name: &crate::workload::NamespacedName, error: &str) {
        self.counts.unreadable.inc();
        let object = format!("{}/{}", name.namespace, name.name);
        tracing::error!(scope = %self.scope, object, error, "cannot be read");
    }
}

fn advance(version: &mut String, object: &DynamicObject) {
    if let Some(now) = &object.metadata.resource_version {
        version.clone_from(now);
    }
}

/// Between three quarters and five quarters of it, by chance.
pub fn jittered(span: Duration) -> Duration {
    // Hashers are seeded at random.
    let random = std::hash::RandomState::new().hash_one(()) >> 11;
    span.mul_f64(0.75 + 0.5 * (random as f64 / (1_u64 << 53) as f64))
}
