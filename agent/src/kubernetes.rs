//! The API server as the source of workloads and policies: the same types as from a
//! directory, and the same table and policies out of them (docs/discovery.md).
//!
//! `client` is the way there, `scope` what one watch is about, `watch` keeps one going,
//! `held` is what is kept of an object, `store` all of it; `index` and `discover` find
//! what is dialled, `policies` compiles what may be wrong in parts, `disk` outlives the
//! agent, `status` and `events` tell operators.
//!
//! Nothing here is on the way of a connection but `discover`, which is bounded in time.

mod client;
mod discover;
mod disk;
mod events;
mod held;
mod index;
mod policies;
mod scope;
mod status;
mod store;
mod taint;
#[cfg(test)]
mod tests;
mod watch;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use arc_swap::ArcSwap;
use ipnet::IpNet;
use kube::Client;
use prometheus_client::metrics::counter::Counter;
use tokio::{
    sync::{Semaphore, watch as channel},
    task::AbortHandle,
};

pub use client::{ConnectError, connect, examine, explain};
pub use disk::DiskError;
pub use events::{Patience, PodState, tell_pods};
pub use index::Index;
pub use policies::{Id, Refusal, Verdict};
pub use status::tell_policies;
pub use store::Standing;
pub use taint::untaint;

use self::{
    held::{Held, Stored},
    scope::{PolicyKind, Scope},
    store::Store,
    watch::Watch,
};
use crate::{
    config::{Config, Discovery, Mesh as Enrolment, Source},
    lifecycle::Watcher,
    policy::{Mesh, PolicySet},
    workload::{NamespacedName, Table, WorkloadObject},
};

/// How often things are done, and how long is waited for others.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// First wait after a failure; doubled up to the longest.
    pub first: Duration,
    pub longest: Duration,
    /// How often a kind that is not installed is asked for,
    pub absent: Duration,
    /// ... and how long it is missed before what it had is forgotten.
    pub forget: Duration,
    /// How long a watch may fail before what it brought is called stale: API servers are
    /// restarted, one after the other.
    pub grace: Duration,
    /// For an answer of the API server.
    pub answer: Duration,
    /// How long one watch request may last.
    pub watch: Duration,
    /// All is listed again so often, whatever was heard.
    pub resync: Duration,
    /// Objects of one page of a list.
    pub page: u32,
    /// How long what nobody dials any more is watched.
    pub unused: Duration,
    /// One round of telling what became of policies, of one agent alone.
    pub status: Duration,
    /// How often pods are looked at for events.
    pub pods: Duration,
    /// How often the own node is looked at for the startup taint.
    pub taint: Duration,
    pub patience: Patience,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            first: Duration::from_millis(250),
            longest: Duration::from_secs(30),
            absent: Duration::from_secs(30),
            forget: Duration::from_secs(60),
            grace: Duration::from_secs(10),
            answer: Duration::from_secs(10),
            watch: Duration::from_secs(240),
            resync: Duration::from_secs(3600),
            page: 250,
            unused: Duration::from_secs(600),
            status: Duration::from_secs(20),
            pods: Duration::from_secs(5),
            taint: Duration::from_secs(2),
            patience: Patience::default(),
        }
    }
}

/// Counted for the metrics.
#[derive(Debug, Default)]
pub struct Counts {
    pub lists: Counter,
    pub restarts: Counter,
    pub gone: Counter,
    pub events: Counter,
    pub objects: Counter,
    pub errors: Counter,
    pub unreadable: Counter,
    pub discovered: Counter,
    pub statuses: Counter,
    pub pod_events: Counter,
}

impl Counts {
    /// By what they count.
    pub fn all(&self) -> [(&'static str, u64); 10] {
        [
            ("lists", self.lists.get()),
            ("watch_restarts", self.restarts.get()),
            ("expired_versions", self.gone.get()),
            ("watch_events", self.events.get()),
            ("listed_objects", self.objects.get()),
            ("errors", self.errors.get()),
            ("unreadable_objects", self.unreadable.get()),
            ("discoveries", self.discovered.get()),
            ("status_writes", self.statuses.get()),
            ("pod_events", self.pod_events.get()),
        ]
    }
}

pub struct Cluster {
    client: Client,
    /// Where the agent itself lives.
    namespace: String,
    node: Arc<str>,
    workloads: bool,
    policies: bool,
    istio: bool,
    on_demand: bool,
    pod_cidrs: Vec<IpNet>,
    pace: Pace,
    file: PathBuf,
    began: Instant,
    store: Arc<Store>,
    pub counts: Arc<Counts>,
    watching: Mutex<HashMap<Scope, Watching>>,
    /// Version whose table is published.
    published: channel::Sender<u64>,
    index: ArcSwap<Index>,
    ranges: ArcSwap<BTreeSet<IpNet>>,
    /// Policies that are enforced, in the version that was taken last.
    good: Mutex<BTreeMap<Id, Stored>>,
    verdicts: channel::Sender<Arc<BTreeMap<Id, Verdict>>>,
    /// Lists that look for an address at once.
    asking: Semaphore,
}

struct Watching {
    task: AbortHandle,
    /// Seconds since the agent began when it was last dialled; none: it stays.
    used: Option<Arc<AtomicU64>>,
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What is published next.
pub struct View {
    pub version: u64,
    pub table: Table,
    index: Index,
    ranges: BTreeSet<IpNet>,
}

impl Cluster {
    /// `None` where nothing comes from the API server.
    pub async fn connect(config: &Config) -> Result<Option<Arc<Self>>, ConnectError> {
        Self::connect_with(config, Pace::default()).await
    }

    async fn connect_with(config: &Config, pace: Pace) -> Result<Option<Arc<Self>>, ConnectError> {
        const RANGES: usize = 4096;
        const ASKING: usize = 16;
        let workloads = config.workloads.source == Source::Kubernetes;
        let policies = config.policies.source == Source::Kubernetes;
        if config.kubernetes.startup_taint.is_some() && !workloads {
            return Err(ConnectError::Taint);
        }
        if !workloads && !policies {
            return Ok(None);
        }
        let pod_cidrs = config.kubernetes.pod_cidrs.clone();
        if pod_cidrs.len() > RANGES {
            return Err(ConnectError::Ranges(pod_cidrs.len()));
        }
        // Loopback is where the agent itself is dialled, and so is what it steers.
        let wide = |net: &&IpNet| net.prefix_len() == 0 || net.addr().is_loopback();
        if let Some(net) = pod_cidrs.iter().find(wide) {
            return Err(ConnectError::Wide(*net));
        }
        let (client, namespace) = client::connect(&config.kubernetes).await?;
        Ok(Some(Arc::new(Self {
            client,
            namespace,
            node: config.node_name().into(),
            workloads,
            policies,
            istio: config.kubernetes.istio,
            on_demand: config.kubernetes.discovery == Discovery::OnDemand,
            pod_cidrs,
            pace,
            file: disk::path(&config.state),
            began: Instant::now(),
            store: Arc::default(),
            counts: Arc::default(),
            watching: Mutex::default(),
            published: channel::Sender::new(0),
            index: ArcSwap::default(),
            ranges: ArcSwap::default(),
            good: Mutex::default(),
            verdicts: channel::Sender::default(),
            asking: Semaphore::new(ASKING),
        })))
    }

    pub fn has_workloads(&self) -> bool {
        self.workloads
    }

    pub fn has_policies(&self) -> bool {
        self.policies
    }

    /// Whether pods of other nodes are looked for when they are dialled.
    pub fn on_demand(&self) -> bool {
        self.workloads && self.on_demand
    }

    /// What is watched from the beginning to the end.
    fn base(&self) -> Vec<Scope> {
        let mut scopes = Vec::new();
        if self.workloads {
            let node = self.on_demand.then(|| self.node.clone());
            scopes.extend([
                Scope::Namespaces,
                Scope::Nodes,
                Scope::Services,
                Scope::Pods(node),
            ]);
            if !self.on_demand {
                scopes.push(Scope::Slices(None));
            }
        }
        if self.policies {
            let read = |kind: &PolicyKind| self.istio || !kind.is_istio();
            let kinds = PolicyKind::ALL.into_iter().filter(read);
            scopes.extend(kinds.map(Scope::Policies));
        }
        scopes
    }

    /// Begins to watch.
    pub fn start(self: &Arc<Self>) {
        for scope in self.base() {
            self.ensure(scope, true);
        }
    }

    /// Ends every watch.
    pub fn stop(&self) {
        self.watching().clear();
    }

    /// Watches, if it is not watched yet; says whether it may.
    fn ensure(&self, scope: Scope, stays: bool) -> bool {
        /// What one agent watches at most: pods can dial all nodes of a cluster.
        const MOST: usize = 4096;
        let mut watching = self.watching();
        if let Some(watching) = watching.get_mut(&scope) {
            match &watching.used {
                Some(_) if stays => watching.used = None,
                Some(used) => used.store(self.now(), Ordering::Relaxed),
                None => {}
            }
            return true;
        }
        if !stays && watching.len() >= MOST {
            return false;
        }
        self.store.begin(&scope);
        let watch = Watch {
            client: self.client.clone(),
            scope: scope.clone(),
            store: self.store.clone(),
            counts: self.counts.clone(),
            pace: self.pace,
        };
        let entry = Watching {
            task: tokio::spawn(watch.run()).abort_handle(),
            used: (!stays).then(|| Arc::new(AtomicU64::new(self.now()))),
        };
        watching.insert(scope, entry);
        true
    }

    /// Watches what cannot be found when it is dialled. Services without a selector say by
    /// EndpointSlices alone which pods are behind them, and policy that names such a
    /// service must find its pods. Pods of a node that does not say which addresses they
    /// have would be dialled as if they were outside the mesh. Says whether more is watched
    /// than before.
    pub fn pin(&self) -> bool {
        if !self.on_demand() {
            return false;
        }
        let wanted: HashSet<Scope> = {
            let inner = self.store.lock();
            let pinned = inner.workloads().filter_map(|object| match object {
                WorkloadObject::Service(service) if service.spec.selector.is_empty() => {
                    Some(Scope::Slices(Some(NamespacedName {
                        namespace: service.metadata.namespace().to_owned(),
                        name: service.metadata.name.clone(),
                    })))
                }
                WorkloadObject::Node(node) if self.pod_cidrs.is_empty() => index::is_silent(object)
                    .then(|| Scope::Pods(Some(node.metadata.name.as_str().into()))),
                _ => None,
            });
            pinned.collect()
        };
        let before = self.watches();
        for scope in &wanted {
            self.ensure(scope.clone(), true);
        }
        let more = self.watches() > before;
        // Those of services that are gone, or got a selector, go the way of unused ones, and
        // so do those of nodes.
        for (scope, watching) in self.watching().iter_mut() {
            let may_go = match scope {
                Scope::Slices(Some(_)) => true,
                Scope::Pods(Some(node)) => *node != self.node,
                _ => false,
            };
            if may_go && watching.used.is_none() && !wanted.contains(scope) {
                watching.used = Some(Arc::new(AtomicU64::new(self.now())));
            }
        }
        more
    }

    /// Ends the watches of what nobody dials any more.
    pub fn sweep(&self) {
        let unused = self.pace.unused.as_secs();
        let now = self.now();
        let mut ended = Vec::new();
        self.watching().retain(|scope, watching| {
            let used = watching.used.as_ref();
            let stays = used.is_none_or(|at| now - at.load(Ordering::Relaxed).min(now) <= unused);
            if !stays {
                ended.push(scope.clone());
            }
            stays
        });
        for scope in ended {
            tracing::debug!(%scope, "not dialled any more");
            self.store.end(&scope);
        }
    }

    fn now(&self) -> u64 {
        self.began.elapsed().as_secs()
    }

    fn watching(&self) -> MutexGuard<'_, HashMap<Scope, Watching>> {
        self.watching.lock().expect("no panic while it is held")
    }

    /// Versions of what is known, as they come.
    pub fn changes(&self) -> channel::Receiver<u64> {
        self.store.changes()
    }

    pub fn standing(&self) -> Standing {
        self.store.standing(self.pace.grace)
    }

    /// How many objects of each resource are kept.
    pub fn kept(&self) -> BTreeMap<&'static str, usize> {
        let mut kept = BTreeMap::new();
        for (scope, one) in &self.store.lock().scopes {
            *kept.entry(scope.resource()).or_default() += one.objects.len();
        }
        kept
    }

    pub fn watches(&self) -> usize {
        self.watching().len()
    }

    /// The table of what is known now.
    pub fn view(&self, default: Enrolment) -> View {
        let stamps: HashMap<Scope, Arc<AtomicU64>> = {
            let watching = self.watching();
            let dialled = watching.iter().filter_map(|(scope, watching)| {
                Some((scope.clone(), watching.used.as_ref()?.clone()))
            });
            dialled.collect()
        };
        let inner = self.store.lock();
        let table = if self.on_demand {
            let listed = inner.scopes.iter().filter_map(|(scope, kept)| match scope {
                Scope::Slices(Some(service)) if kept.is_whole() => Some(service.clone()),
                _ => None,
            });
            Table::partial(inner.workloads(), default, &listed.collect())
        } else {
            Table::build(inner.workloads(), default)
        };
        let ranges = index::ranges(&inner, &self.pod_cidrs);
        View {
            version: inner.version,
            table,
            index: Index::new(&inner, &stamps),
            ranges,
        }
    }

    /// The view's table is the agent's now. Says whether pods may have other addresses
    /// than before.
    pub fn published(&self, version: u64, index: Index, ranges: BTreeSet<IpNet>) -> bool {
        self.index.store(Arc::new(index));
        let other = **self.ranges.load() != ranges;
        if other {
            self.ranges.store(Arc::new(ranges));
        }
        self.published.send_replace(version);
        other
    }

    /// Version in which a policy last changed.
    pub fn policies_version(&self) -> u64 {
        self.store.lock().policies
    }

    /// The policies of now; what is wrong is closed, and told in the verdicts.
    pub fn compile(&self, mesh: &Mesh<'_>) -> PolicySet {
        let now: Vec<Stored> = self.store.lock().policies().cloned().collect();
        let mut good = self.good.lock().expect("no panic while it is held");
        let outcome = policies::compile(now, &good, mesh);
        *good = outcome.good;
        self.verdicts.send_replace(Arc::new(outcome.verdicts));
        outcome.set
    }

    pub fn verdicts(&self) -> Arc<BTreeMap<Id, Verdict>> {
        self.verdicts.borrow().clone()
    }

    /// Takes what is on disk for what could not be listed; says whether that is all.
    pub fn load(&self) -> Result<bool, DiskError> {
        let Some(loaded) = disk::load(&self.file, &self.node)? else {
            return Ok(false);
        };
        let has = |scope: &Scope| loaded.scopes.iter().any(|(other, _)| other == scope);
        if !self.base().iter().all(has) {
            // Of another configuration.
            return Ok(false);
        }
        let own = self.base();
        *self.good.lock().expect("no panic while it is held") = {
            let mut good = loaded.good;
            // What was taken is what is there, where no older version stands.
            for (_, objects) in &loaded.scopes {
                for held in objects.values() {
                    if let Held::Policy(stored) = held {
                        let id = policies::id(stored);
                        good.entry(id).or_insert_with(|| (**stored).clone());
                    }
                }
            }
            good
        };
        for (scope, objects) in loaded.scopes {
            let dialled = matches!(scope, Scope::Pods(Some(_)) | Scope::Slices(Some(_)));
            if own.contains(&scope)
                || (dialled && self.on_demand() && self.ensure(scope.clone(), false))
            {
                self.store.load(scope, objects, loaded.at);
            }
        }
        Ok(true)
    }

    /// Writes what is known, if there is something new; else says that it is still so.
    pub fn save(&self, saved: &mut u64) -> Result<(), DiskError> {
        if !self.standing().synced {
            return Ok(());
        }
        let version = self.store.lock().version;
        if *saved == version && version > 0 {
            return match self.standing().stale_since {
                None => disk::confirm(&self.file),
                Some(_) => Ok(()),
            };
        }
        let good = self.good.lock().expect("no panic while it is held").clone();
        let text = disk::text(&self.store, &good, &self.node);
        let text = text.map_err(|error| DiskError::Content {
            path: self.file.clone(),
            message: error.to_string(),
        })?;
        if let Some(text) = text {
            disk::save(&self.file, &text)?;
            *saved = version;
        }
        Ok(())
    }

    /// Keeps the file and the watches as they should be, until the agent ends.
    pub async fn keep(self: Arc<Self>, stop: Watcher) {
        const EVERY: Duration = Duration::from_secs(5);
        const CONFIRM: u32 = 12;
        let (mut saved, mut round) = (0, 0_u32);
        loop {
            tokio::select! {
                () = tokio::time::sleep(EVERY) => {}
                () = stop.triggered() => break,
            }
            self.sweep();
            round += 1;
            let due = self.store.lock().version != saved || round.is_multiple_of(CONFIRM);
            if due {
                let this = self.clone();
                let before = saved;
                let written = tokio::task::spawn_blocking(move || {
                    let mut saved = before;
                    this.save(&mut saved).map(|()| saved)
                });
                match written.await {
                    Ok(Ok(now)) => saved = now,
                    Ok(Err(error)) => {
                        self.counts.errors.inc();
                        tracing::error!(%error, "what is known of the cluster is not saved");
                    }
                    Err(_ended) => return,
                }
            }
        }
        self.stop();
    }
}

impl View {
    /// Taken apart, so that the table can be published before the rest is.
    pub fn parts(self) -> (u64, Table, Index, BTreeSet<IpNet>) {
        (self.version, self.table, self.index, self.ranges)
    }
}

/// How long ago, in whole seconds.
pub fn seconds_since(at: SystemTime) -> u64 {
    let age = SystemTime::now().duration_since(at);
    age.unwrap_or_default().as_secs()
}
