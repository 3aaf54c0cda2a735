//! Reads the directories, and reads them again when they change. A change that
//! does not parse leaves the last good state standing. What any source brings is
//! published here.

use std::{
    collections::{BTreeSet, HashSet},
    path::Path,
    sync::Arc,
    time::Duration,
};

use notify::{RecursiveMode, Watcher as _};
use tokio::sync::mpsc;

use super::State;
use crate::{
    audit::Record,
    config::{Config, Source},
    judge::Judge,
    jwt::RemoteKeys,
    lifecycle::Watcher,
    objects::{LoadError, load_directory},
    policy::{Mesh, PolicyError, PolicySet, Reading},
    workload::{Table, WorkloadObject},
};

#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Policies(Vec<PolicyError>),
}

pub fn table(config: &Config) -> Result<Table, ReloadError> {
    let objects: Vec<WorkloadObject> = load_directory(&config.workloads.directory)?
        .into_iter()
        .map(|located| located.object)
        .collect();
    Ok(Table::build(&objects, config.enrol.default))
}

/// What policies are read by.
pub fn mesh(config: &Config) -> Mesh<'_> {
    Mesh {
        root_namespace: &config.policies.root_namespace,
        trust_domain: &config.trust_domain,
        aliases: &config.trust_domain_aliases,
        secrets: &config.policies.secrets,
        requests: Reading {
            normalization: config.policies.path_normalization,
            trusted_proxies: config.policies.num_trusted_proxies,
        },
    }
}

pub fn policies(config: &Config) -> Result<PolicySet, ReloadError> {
    let objects = load_directory(&config.policies.directory)?;
    PolicySet::compile(objects, &mesh(config)).map_err(ReloadError::Policies)
}

/// Several files change together; they are read when no more come for this long.
const SETTLE: Duration = Duration::from_millis(50);
/// In case a change was not told: some network file systems tell none.
const ANYWAY: Duration = Duration::from_secs(30);

pub async fn watch(state: Arc<State>, wake: mpsc::Sender<()>, stop: Watcher) {
    let (changed, mut changes) = mpsc::channel(1);
    let _watcher = match watcher(&state.config, changed) {
        Ok(watcher) => Some(watcher),
        Err(error) => {
            tracing::warn!(%error, "cannot watch directories; reading every 30 s");
            None
        }
    };
    loop {
        tokio::select! {
            Some(()) = changes.recv() => {
                tokio::time::sleep(SETTLE).await;
                let _more_of_the_same = changes.try_recv();
            }
            () = tokio::time::sleep(ANYWAY) => {}
            () = stop.triggered() => return,
        }
        let again = state.clone();
        // Reading files and compiling is not the runtime's business.
        if tokio::task::spawn_blocking(move || reload(&again))
            .await
            .is_ok()
        {
            let _due = wake.try_send(());
        }
    }
}

fn reload(state: &State) {
    let config = &state.config;
    if config.workloads.source == Source::Directory {
        match table(config) {
            Ok(table) => {
                publish_table(state, table);
                state.problem("workloads", None);
            }
            Err(error) => refused(state, "workloads", &error.to_string()),
        }
    }
    if config.policies.source == Source::Directory {
        match policies(config) {
            Ok(policies) => {
                publish_policies(state, policies);
                state.problem("policies", None);
            }
            Err(error) => refused(state, "policies", &error.to_string()),
        }
    }
    match state.identities.bundle.reload() {
        Ok(()) => state.problem("bundle", None),
        Err(error) => refused(state, "bundle", &error.to_string()),
    }
}

/// What is looked up from now on; enrolment is to be woken.
pub fn publish_table(state: &State, table: Table) {
    table.continue_from(&state.proxy.table.load());
    state.proxy.table.store(Arc::new(table));
}

/// What connections and requests are judged by from now on, and those that are open.
pub fn publish_policies(state: &State, policies: PolicySet) {
    let proxy = &state.proxy;
    warn(&proxy.policies.load(), &policies, &proxy.judge);
    // Keys of old policies go after the policies.
    let wanted: HashSet<RemoteKeys> = policies.remote_keys().iter().cloned().collect();
    let before = proxy.policies.load_full();
    let both = before.remote_keys().iter().chain(&wanted).cloned();
    proxy.judge.keys.want(both.collect());
    proxy.policies.store(Arc::new(policies));
    proxy.judge.keys.want(wanted);
    // After the new set is published: what is accepted from now on is judged by it, and
    // what was accepted before is judged here.
    let ended = proxy.recheck();
    if ended > 0 {
        tracing::info!(ended, "connections ended by a change of policy");
    }
}

/// What is taken, and may not be meant.
fn warnings(policies: &PolicySet, judge: &Judge) -> BTreeSet<String> {
    let unknown = policies
        .provider_names()
        .filter(|name| !judge.authorizers.has(name));
    let unknown = unknown.map(|name| {
        format!("no extension provider `{name}`: what policies have it asked about is denied")
    });
    policies.warnings().iter().cloned().chain(unknown).collect()
}

/// Tells the warnings that were not there before.
pub fn warn(before: &PolicySet, now: &PolicySet, judge: &Judge) {
    for warning in warnings(now, judge).difference(&warnings(before, judge)) {
        tracing::warn!("{warning}");
    }
}

fn refused(state: &State, what: &'static str, error: &str) {
    tracing::error!(what, error, "refused; the last good state stands");
    state.proxy.metrics.reload_error(what);
    state.problem(what, Some(error.to_owned()));
    let detail = format!("{what}: {error}");
    state.proxy.audit.record(Record::Agent {
        event: "refused",
        detail,
    });
}

fn watcher(
    config: &Config,
    changed: mpsc::Sender<()>,
) -> notify::Result<notify::RecommendedWatcher> {
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Our own reading is no change.
        if !event.is_ok_and(|event| event.kind.is_access()) {
            let _due = changed.try_send(());
        }
    })?;
    let bundle = config.identity.bundle.as_deref().and_then(Path::parent);
    let directories = [
        (
            config.workloads.source,
            config.workloads.directory.as_path(),
        ),
        (config.policies.source, config.policies.directory.as_path()),
    ];
    let watched = directories
        .into_iter()
        .filter(|(source, _)| *source == Source::Directory);
    for directory in watched.map(|(_, directory)| directory).chain(bundle) {
        watcher.watch(directory, RecursiveMode::NonRecursive)?;
    }
    Ok(watcher)
}
