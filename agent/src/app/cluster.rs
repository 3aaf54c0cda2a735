//! The API server as a source: what came in is made into table and policies, many changes
//! at once, and published as what comes from a directory is. Before the first time, all
//! must have been read, or stand on the disk: the kernel is never told half of it.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, timeout},
};

use super::{State, reload};
use crate::{
    audit::Record,
    config::Config,
    kubernetes::{
        Cluster, PodState, Standing, Verdict, seconds_since, tell_pods, tell_policies, untaint,
    },
    lifecycle::Watcher,
    telemetry::StatusSource as _,
    workload::Table,
};

/// How long the API server is waited for at the start, where the disk has something.
const PATIENCE: Duration = Duration::from_secs(5);
/// Changes come together; they are taken when no more come for this long,
const SETTLE: Duration = Duration::from_millis(20);
/// ... or so long after the first.
const AT_MOST: Duration = Duration::from_millis(200);
/// How often it is looked at how old things are.
const LOOK: Duration = Duration::from_secs(2);

/// Begins to watch, and keeps table and policies as the cluster is. `fed` is told when
/// they are for the first time. An agent that drains still follows, and tells no more.
pub fn start(
    state: &Arc<State>,
    cluster: &Arc<Cluster>,
    wake: mpsc::Sender<()>,
    fed: watch::Sender<bool>,
    stop: &Watcher,
    drain: &Watcher,
) {
    cluster.start();
    tokio::spawn(cluster.clone().keep(stop.clone()));
    let follower = Follower {
        state: state.clone(),
        cluster: cluster.clone(),
        wake,
        fed,
        version: None,
        policies: None,
        told: String::new(),
    };
    tokio::spawn(follower.run(stop.clone()));
    if cluster.has_policies() {
        tokio::spawn(tell_policies(cluster.clone(), drain.clone()));
    }
    if cluster.has_workloads() {
        let state = state.clone();
        let pods = move || pods(&state);
        tokio::spawn(tell_pods(cluster.clone(), pods, drain.clone()));
    }
    if let Some(key) = state.config.kubernetes.startup_taint.clone() {
        let state = state.clone();
        let ready = move || state.status().ready;
        tokio::spawn(untaint(cluster.clone(), key.into(), ready, drain.clone()));
    }
}

/// What the cluster has, before this agent is in charge: while it is read, another one is.
pub async fn ahead(cluster: &Arc<Cluster>, config: &Config) -> Option<Table> {
    const OFTEN: Duration = Duration::from_millis(20);
    cluster.start();
    let end = Instant::now() + PATIENCE;
    while !cluster.standing().synced {
        if Instant::now() > end {
            return None;
        }
        sleep(OFTEN).await;
    }
    Some(cluster.view(config.enrol.default).table)
}

struct Follower {
    state: Arc<State>,
    cluster: Arc<Cluster>,
    wake: mpsc::Sender<()>,
    fed: watch::Sender<bool>,
    /// What was published last.
    version: Option<u64>,
    policies: Option<u64>,
    /// What was told of how things stand.
    told: String,
}

impl Follower {
    async fn run(mut self, stop: Watcher) {
        let mut changes = self.cluster.changes();
        let began = Instant::now();
        let mut disk = false;
        loop {
            tokio::select! {
                _changed = changes.changed() => {
                    let limit = Instant::now() + AT_MOST;
                    // A closed channel ends it, too; the watches live as long as the agent.
                    while Instant::now() < limit
                        && timeout(SETTLE, changes.changed()).await.is_ok_and(|more| more.is_ok())
                    {}
                    changes.borrow_and_update();
                }
                () = sleep(LOOK) => {}
                () = stop.triggered() => return,
            }
            let fed = *self.fed.borrow();
            // Whole is what is whole with all that it shows to be missing.
            let mut standing = self.cluster.standing();
            while self.cluster.pin() {
                standing = self.cluster.standing();
            }
            if !fed && !standing.whole && !disk && began.elapsed() >= PATIENCE {
                disk = true;
                self.load().await;
                standing = self.cluster.standing();
            }
            self.tell(&standing, fed || standing.whole);
            if !fed && !standing.whole {
                continue;
            }
            let version = *self.cluster.changes().borrow();
            if self.version == Some(version) {
                continue;
            }
            let (state, cluster, before) =
                (self.state.clone(), self.cluster.clone(), self.policies);
            // Compiling is not the runtime's business.
            let publish = move || publish(&state, &cluster, before);
            match tokio::task::spawn_blocking(publish).await {
                Ok((version, policies)) => {
                    (self.version, self.policies) = (Some(version), Some(policies));
                    self.fed.send_replace(true);
                    let _due = self.wake.try_send(());
                }
                Err(error) => tracing::error!(%error, "what the API server says is not taken"),
            }
        }
    }

    /// The API server is away: what the disk has is better than nothing.
    async fn load(&self) {
        let cluster = self.cluster.clone();
        match tokio::task::spawn_blocking(move || cluster.load()).await {
            Ok(Ok(true)) => tracing::warn!("the API server is away; using what was known last"),
            Ok(Ok(false)) => tracing::warn!("the API server is away, and nothing is known"),
            Ok(Err(error)) => tracing::error!(%error, "what was known last cannot be read"),
            Err(_ended) => {}
        }
    }

    fn tell(&mut self, standing: &Standing, runs: bool) {
        let errors = standing.errors.join("; ");
        let problem = match standing.stale_since {
            Some(since) if runs => {
                let since = OffsetDateTime::from(since).replace_nanosecond(0);
                let since = since.ok().and_then(|at| at.format(&Rfc3339).ok());
                Some(format!(
                    "stale since {}: {errors}",
                    since.unwrap_or_default()
                ))
            }
            _ if !runs => Some(format!("not all is read yet: {errors}")),
            _ => None,
        };
        // Each is logged once, whatever its reason becomes.
        let kind: String = problem.iter().flat_map(|p| p.chars().take(5)).collect();
        if kind != self.told {
            match &problem {
                Some(problem) => tracing::warn!(problem, "the API server"),
                None => tracing::info!("what is known is what the API server has"),
            }
            self.told = kind;
        }
        self.state.problem("kubernetes", problem);
    }
}

/// Publishes what is known; says of which versions it and its policies are.
fn publish(state: &State, cluster: &Cluster, before: Option<u64>) -> (u64, u64) {
    let policies = cluster.policies_version();
    // Policies first: a pod that comes with a policy is judged by it.
    if cluster.has_policies() && before != Some(policies) {
        let known = cluster.verdicts();
        let set = cluster.compile(&reload::mesh(&state.config));
        reload::publish_policies(state, set);
        tell_refused(state, &known, &cluster.verdicts());
    }
    if !cluster.has_workloads() {
        return (*cluster.changes().borrow(), policies);
    }
    let view = cluster.view(state.config.enrol.default);
    let (version, table, index, ranges) = view.parts();
    reload::publish_table(state, table);
    cluster.published(version, index, ranges);
    (version, policies)
}

type Verdicts = BTreeMap<crate::kubernetes::Id, Verdict>;

/// The agent's own status has them all; log and audit have each once.
fn tell_refused(state: &State, before: &Verdicts, now: &Verdicts) {
    const LISTED: usize = 10;
    let refused: Vec<String> = now
        .iter()
        .filter_map(|((kind, namespace, name), verdict)| {
            let refusal = verdict.refused.as_ref()?;
            let why = &refusal.why;
            Some(format!(
                "{kind} {namespace}/{name}: {why}; {}",
                refusal.stands
            ))
        })
        .collect();
    for (id, verdict) in now {
        let Some(refusal) = &verdict.refused else {
            continue;
        };
        if before.get(id).is_some_and(|known| known == verdict) {
            continue;
        }
        let policy = format!("{} {}/{}", id.0, id.1, id.2);
        tracing::error!(
            policy,
            error = refusal.why,
            stands = refusal.stands,
            "refused"
        );
        state.proxy.metrics.reload_error("policies");
        state.proxy.audit.record(Record::Agent {
            event: "refused",
            detail: format!("{policy}: {}; {}", refusal.why, refusal.stands),
        });
    }
    let problem = match refused.len() {
        0 => None,
        n if n > LISTED => {
            let first = refused[..LISTED].join("; ");
            Some(format!("{first}; and {} more", n - LISTED))
        }
        _ => Some(refused.join("; ")),
    };
    state.problem("policies", problem);
}

/// This node's pods, as enrolment left them.
fn pods(state: &State) -> Vec<PodState> {
    let table = state.proxy.table.load_full();
    let node = state.proxy.audit.node();
    let local = table.workloads.iter().filter(|w| w.node == node);
    let by_name: BTreeMap<String, _> = local
        .map(|w| (format!("{}/{}", w.namespace, w.name), w))
        .collect();
    let states = state
        .workloads
        .lock()
        .expect("no panic while it is held")
        .clone();
    let known = states.into_iter().filter_map(|local| {
        let workload = by_name.get(&local.pod)?;
        let fine = matches!(local.state.as_str(), "enrolled" | "disabled");
        Some(PodState {
            namespace: workload.namespace.clone(),
            name: workload.name.clone(),
            uid: workload.uid.clone(),
            kept_out: (!fine && workload.enrolled).then_some(local.state),
        })
    });
    known.collect()
}

/// What the metrics say of it.
pub fn measure(state: &State, cluster: &Cluster) {
    let metrics = &state.proxy.metrics;
    let stale = cluster.standing().stale_since.map_or(0, seconds_since);
    metrics.set_kubernetes(
        &cluster.counts.all(),
        cluster.kept(),
        cluster.watches(),
        stale,
    );
}
