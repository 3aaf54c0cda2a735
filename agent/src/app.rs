//! Builds the parts and joins them; the only one who knows all of them.

mod bypass;
mod cluster;
mod observe;
mod reload;
mod tokens;

use std::{
    collections::{BTreeSet, HashSet},
    fs::Permissions,
    net::IpAddr,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, bail};
use arc_swap::ArcSwap;
use ipnet::IpNet;
use notify::{RecursiveMode, Watcher as _};
use postern_ebpf::{Counter, PODS_ROOTS, UNKNOWN_ALLOW, UNKNOWN_REFUSE};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{Semaphore, mpsc, oneshot, watch},
};

use crate::{
    audit::{
        Audit, Join, Processes, Record,
        chain::OpenError,
        send::{self, Senders, Standings},
    },
    config::{Config, Source, Unknown},
    fetch::Trust,
    judge::Judge,
    kernel::{CgroupMount, Kernel, PodsRoot, cgroup_id, cgroup_mounts, own_cgroup},
    kubernetes::Cluster,
    lifecycle::{Watcher, drain},
    policy::PolicySet,
    proxy::{
        Connections, Enroller, HBONE_PORT, Identities, LocalPods, MAX_HANDSHAKES, OUTBOUND_PORT,
        Proxy, Tunnels,
    },
    telemetry::{
        Certificate, Endpoints, LocalWorkload, LogHandle, Metrics, Status, StatusSource, serve,
    },
    workload::{Discovery, Table},
};

/// How long receivers of the audit log may take for what is left at the end; the rest is
/// sent after the next start.
const SEND_AT_END: Duration = Duration::from_secs(5);

/// How long the audit log is waited for at the end, and how long who fills it.
pub const AUDIT_END: Duration = Duration::from_secs(5);

/// The agent is wrongly configured: exit code 2, and nothing was changed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Misconfigured(pub String);

/// Where the hooks go: the configured directory, or the root of the v2 mount.
pub fn hook_cgroup(config: &Config) -> Result<(PathBuf, Vec<CgroupMount>)> {
    let mounts = cgroup_mounts().context("/proc/self/mounts")?;
    let cgroup = match (&config.kernel.cgroup, mounts.first()) {
        (Some(path), _) => path.clone(),
        (None, Some(mount)) if mount.v2 => mount.path.clone(),
        _ => bail!("no cgroup v2 is mounted; mount one and name it in kernel.cgroup"),
    };
    Ok((cgroup, mounts))
}

/// Runs the agent until SIGTERM or SIGINT, then drains.
pub async fn run(config: Config, log: LogHandle) -> Result<()> {
    let misconfigured = |e: &dyn std::fmt::Display| Misconfigured(e.to_string());
    let node = config.node_name();
    // Keys live in this process's memory: no core file, no ptrace by others.
    nix::sys::prctl::set_dumpable(false).context("PR_SET_DUMPABLE")?;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&config.state)
        .and_then(|()| std::fs::set_permissions(&config.state, Permissions::from_mode(0o700)))
        .with_context(|| format!("{}", config.state.display()))?;

    // Whatever can be wrong with files is found before the kernel is touched.
    let cluster = Cluster::connect(&config)
        .await
        .map_err(|e| misconfigured(&e))?;
    let table = match config.workloads.source {
        Source::Directory => reload::table(&config).map_err(|e| misconfigured(&e))?,
        Source::Kubernetes => Table::default(),
    };
    let policies = match config.policies.source {
        Source::Directory => reload::policies(&config).map_err(|e| misconfigured(&e))?,
        Source::Kubernetes => PolicySet::default(),
    };
    let judge = Judge::new(&config).map_err(|e| misconfigured(&e))?;
    reload::warn(&PolicySet::default(), &policies, &judge);
    judge
        .keys
        .want(policies.remote_keys().iter().cloned().collect());
    let identities = Identities::open(&config, &node).map_err(|e| misconfigured(&e))?;
    let endpoints = Endpoints::bind(&config.listen)
        .await
        .map_err(|e| misconfigured(&e))?;
    let trust = Trust::new(config.jwt.roots.as_deref())
        .map_err(|e| Misconfigured(format!("jwt.roots: {e}")))?;
    let (audit, writer) = if config.audit.enabled {
        let log = config.audit.settings(&config.state);
        let opened = Audit::open(&node, log, config.audit.queue.0);
        let (audit, writer) = match opened {
            Err(OpenError::Busy(log)) => {
                bail!(
                    "{} is held by another agent; only one can run on a node",
                    log.display()
                )
            }
            opened => opened.map_err(|e| Misconfigured(format!("audit.directory: {e}")))?,
        };
        (audit, Some(writer))
    } else {
        (Audit::off(&node), None)
    };
    let observed = config.audit.enabled && config.audit.events;

    let senders = if config.audit.enabled {
        let log = config.audit.directory(&config.state);
        Some(send::start(&config, &log, &node).map_err(|e| misconfigured(&e))?)
    } else {
        None
    };

    let (cgroup, mounts) = hook_cgroup(&config)?;
    let (kernel, events) =
        Kernel::load(&config.kernel, &cgroup, &config.state, config.audit.events)?;
    let sees = observed && kernel.sees_sockets();
    let mut trust_domains = vec![config.trust_domain.clone()];
    trust_domains.extend(config.trust_domain_aliases.clone());
    let identities = Arc::new(identities);
    let metrics = Metrics::default();
    let tokens = Arc::new(tokens::client(trust, &identities, &audit, &metrics));
    let proxy = Arc::new(Proxy {
        transport: config.transport.clone(),
        trust_domains,
        kernel: kernel.clone(),
        table: ArcSwap::from_pointee(table),
        discover: (cluster.clone())
            .filter(|cluster| cluster.on_demand())
            .map(|cluster| Discovery::new(cluster)),
        policies: ArcSwap::from_pointee(policies),
        changed: watch::Sender::new(()),
        judge,
        http: (&config.http).into(),
        pods: ArcSwap::from_pointee(LocalPods::default()),
        connections: Connections::default(),
        tunnels: Tunnels::default(),
        tokens,
        handshakes: Semaphore::new(MAX_HANDSHAKES),
        audit: audit.clone(),
        join: Join::new(audit.clone(), sees),
        processes: Processes::default(),
        metrics,
    });
    let (trigger, watcher) = drain();
    let below = config.kernel.cgroup.as_deref();
    let enroller = Enroller::new(
        proxy.clone(),
        identities.clone(),
        mounts,
        below,
        watcher.clone(),
    )
    .context("the agent's own network namespace")?;
    let state = Arc::new(State {
        config: config.clone(),
        proxy: proxy.clone(),
        identities: identities.clone(),
        cluster: cluster.clone(),
        sinks: senders.as_ref().map(Senders::standings),
        agent_cgroup: own_cgroup(&cgroup),
        workloads: Mutex::default(),
        problems: Mutex::new(vec!["starting".into()]),
    });
    serve(endpoints, state.clone(), log, &watcher);
    for blind in &kernel.blind {
        tracing::warn!(blind.part, blind.why, "{}", blind.without);
    }
    let (seen_enough, enough) = oneshot::channel();
    let observer = observed.then(|| {
        let events = observe::kernel_events(proxy.clone(), events, enough);
        tokio::spawn(events)
    });
    tokio::spawn(bypass::watch(
        proxy.clone(),
        state.agent_cgroup,
        config.enforce.bypass,
        watcher.clone(),
    ));
    let (wake, woken) = mpsc::channel(1);
    let (feeding, fed) = watch::channel(cluster.is_none());
    if let Some(cluster) = &cluster {
        cluster::start(&state, cluster, wake.clone(), feeding, &watcher);
    }
    tokio::spawn(reload::watch(state.clone(), wake.clone(), watcher.clone()));
    tokio::spawn(renew(state.clone(), wake.clone(), watcher.clone()));
    tokio::spawn(enrol(
        state.clone(),
        enroller,
        fed,
        (wake, woken),
        watcher.clone(),
    ));
    tokio::spawn(keys_changed(proxy.clone(), watcher.clone()));
    tokio::spawn(tokens::sweep(proxy.clone(), watcher.clone()));
    drop((watcher, state, identities));

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!(connections = proxy.connections.len(), "draining");
    let limit = config.drain.timeout.0;
    if !trigger.drain(limit).await {
        tracing::warn!(left = proxy.connections.len(), "time to drain is up");
    }
    // The sockets of the last connections are still to be told of.
    let _no_observer = seen_enough.send(());
    if let Some(observer) = observer {
        let _late = tokio::time::timeout(AUDIT_END, observer).await;
    }
    audit.record(Record::Agent {
        event: "stopped",
        detail: String::new(),
    });
    // Connections that were cut hold the log, too: it ends all the same.
    if let Some(writer) = writer {
        let _ = tokio::task::spawn_blocking(move || audit.close(&writer, AUDIT_END)).await;
    }
    // Last, so that receivers get the log's last record, too.
    if let Some(senders) = senders {
        senders.finish(SEND_AT_END).await;
    }
    Ok(())
}

/// What the servers show of the agent.
pub(crate) struct State {
    config: Config,
    proxy: Arc<Proxy>,
    identities: Arc<Identities>,
    /// The API server, where something comes from it.
    cluster: Option<Arc<Cluster>>,
    /// Of the audit log's receivers.
    sinks: Option<Standings>,
    agent_cgroup: u64,
    workloads: Mutex<Vec<LocalWorkload>>,
    problems: Mutex<Vec<String>>,
}

impl State {
    /// Replaces what is wrong in one respect; `None`: nothing any more.
    fn problem(&self, about: &str, what: Option<String>) {
        let mut problems = self.problems.lock().expect("no panic while it is held");
        problems.retain(|p| !p.starts_with(about));
        problems.extend(what.map(|what| format!("{about}: {what}")));
    }
}

impl StatusSource for State {
    fn status(&self) -> Status {
        let mut problems = self
            .problems
            .lock()
            .expect("no panic while it is held")
            .clone();
        let keys = self.proxy.judge.keys.problems();
        problems.extend(
            keys.into_iter()
                .map(|p| format!("keys: {}: {}", p.source, p.error)),
        );
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            node: self.proxy.audit.node().into(),
            ready: !problems
                .iter()
                .any(|p| p == "starting" || p.starts_with("kernel")),
            problems,
            workloads: self
                .workloads
                .lock()
                .expect("no panic while it is held")
                .clone(),
            known_workloads: self.proxy.table.load().workloads.len(),
            policies: self.proxy.policies.load().len(),
            connections: self.proxy.connections.len(),
            roots: self.identities.bundle.roots(),
        }
    }

    fn metrics(&self) -> String {
        let Proxy {
            kernel,
            metrics,
            audit,
            ..
        } = &*self.proxy;
        for (name, entries) in kernel.fill() {
            metrics.set_map_entries(name, entries);
        }
        let counters = kernel.counters();
        for (name, counter) in [
            ("lost_socket_events", Counter::LostSocket),
            ("lost_exec_events", Counter::LostExec),
            ("lost_exit_events", Counter::LostExit),
            ("lost_datagram_events", Counter::LostDatagram),
            ("lost_raw_events", Counter::LostRaw),
            ("limited_socket_events", Counter::LimitedSocket),
            ("limited_exec_events", Counter::LimitedExec),
            ("limited_exit_events", Counter::LimitedExit),
            ("limited_datagram_events", Counter::LimitedDatagram),
            ("limited_raw_events", Counter::LimitedRaw),
            ("untracked_sockets", Counter::UntrackedSocket),
            ("steered", Counter::Steered),
            ("refused_unknown_workload", Counter::RefusedUnknown),
            ("refused_map_full", Counter::RefusedFull),
            ("refused_protocol", Counter::RefusedProtocol),
            ("dropped_without_listener", Counter::DroppedNoListener),
        ] {
            metrics.set_kernel(name, counters[counter as usize]);
        }
        metrics.set_audit(audit.written(), audit.lost());
        let (incomplete, _) = self.proxy.join.counts();
        metrics.set_incomplete(incomplete);
        if let Some(cluster) = &self.cluster {
            cluster::measure(self, cluster);
        }
        let sinks = self.sinks.as_ref().map(Standings::progress);
        for sink in sinks.into_iter().flatten() {
            metrics.set_sink(&sink);
        }
        metrics.text()
    }

    fn config(&self) -> Config {
        self.config.clone()
    }

    fn jwks(&self) -> Option<serde_json::Value> {
        self.identities.jwks()
    }

    fn certificates(&self) -> Vec<Certificate> {
        let now = SystemTime::now();
        let accounts = self.identities.list().into_iter();
        accounts
            .map(|(id, credentials, error)| {
                let chain = credentials.as_ref().map(|c| (c.signing().1, c.renew_at()));
                let leaf = chain
                    .as_ref()
                    .and_then(|(chain, at)| Some((chain.first()?, *at)));
                Certificate::new(id.to_string(), leaf, error, now)
            })
            .collect()
    }

    fn refused(&self, detail: String) {
        self.proxy.audit.record(Record::Agent {
            event: "adminRefused",
            detail,
        });
    }
}

/// What runs by a token is judged anew when its issuer's keys change.
async fn keys_changed(proxy: Arc<Proxy>, mut stop: Watcher) {
    let mut keys = proxy.judge.keys.changes();
    loop {
        tokio::select! {
            changed = keys.changed() => match changed {
                Ok(()) => { proxy.changed.send_replace(()); }
                Err(_closed) => return,
            },
            () = stop.triggered() => return,
        }
    }
}

/// Makes certificates that are asked for, and renews them when they are due.
async fn renew(state: Arc<State>, wake: mpsc::Sender<()>, mut stop: Watcher) {
    loop {
        let round = tokio::select! {
            round = state.identities.renew(SystemTime::now()) => round,
            () = stop.triggered() => return,
        };
        for (about, error) in &round.failed {
            state.proxy.metrics.certificate_errors.inc();
            tracing::error!(
                about,
                error,
                "no new certificate; an old one is used until it expires"
            );
        }
        state.problem("certificates", round.problem);
        if round.fresh {
            let _due = wake.try_send(());
        }
        tokio::select! {
            () = tokio::time::sleep(round.next) => {}
            () = state.identities.added.notified() => {}
            () = stop.triggered() => return,
        }
    }
}

/// Keeps enrolment true: after every change of the table or the cgroup tree, and
/// often while a pod is expected.
async fn enrol(
    state: Arc<State>,
    enroller: Enroller,
    mut fed: watch::Receiver<bool>,
    (wake, mut woken): (mpsc::Sender<()>, mpsc::Receiver<()>),
    mut stop: Watcher,
) {
    const SOON: Duration = Duration::from_millis(20);
    const SOMETIME: Duration = Duration::from_secs(2);
    // Until table and policies are there, an earlier agent's hooks stay, and refuse.
    tokio::select! {
        _there = fed.wait_for(|there| *there) => {}
        () = stop.triggered() => return,
    }
    let mut watching: Vec<PodsRoot> = Vec::new();
    let mut _watcher = None;
    let mut rounds = Rounds {
        enroller,
        ranges: None,
        table: None,
        local: HashSet::new(),
    };
    let mut first = true;
    let mut pause = SOON;
    loop {
        let pods = rounds.enroller.find_pods().roots.clone();
        if pods != watching {
            match watch_cgroups(&pods, wake.clone()) {
                Ok(watcher) => _watcher = Some(watcher),
                Err(error) => tracing::warn!(%error, "cannot watch cgroups; looking every 2 s"),
            }
            watching = pods;
        }
        // It enters namespaces and reads files: not a thing for the runtime to wait on.
        let result = tokio::task::block_in_place(|| rounds.round(&state, &watching));
        let waiting = match result {
            Ok(waiting) => {
                state.problem("kernel", None);
                if first {
                    first = false;
                    started(&state, &rounds.enroller);
                }
                waiting
            }
            Err(error) => {
                tracing::error!(%error, "cannot tell the kernel about workloads");
                state.problem("kernel", Some(error.to_string()));
                false
            }
        };
        let wait = if waiting { pause } else { SOMETIME };
        tokio::select! {
            _ = woken.recv() => pause = SOON,
            () = tokio::time::sleep(wait) => pause = (pause * 2).min(SOMETIME),
            () = stop.triggered() => return,
        }
    }
}

/// The kernel knows all that it should: this agent's hooks take over.
fn started(state: &State, enroller: &Enroller) {
    enroller.forget_strangers();
    if let Err(error) = state.proxy.kernel.commit() {
        tracing::error!(%error, "an earlier agent's hooks stay beside this one's");
    }
    state.problem("starting", None);
    let detail = format!("version {}", env!("CARGO_PKG_VERSION"));
    state.proxy.audit.record(Record::Agent {
        event: "started",
        detail,
    });
    tracing::info!(node = state.proxy.audit.node(), "ready");
}

/// What enrolment remembers from one round to the next.
struct Rounds {
    enroller: Enroller,
    /// The ranges that the kernel asks about.
    ranges: Option<Arc<BTreeSet<IpNet>>>,
    /// What the kernel's table of destinations was last made from.
    table: Option<Arc<Table>>,
    local: HashSet<IpAddr>,
}

impl Rounds {
    /// One round. The kernel learns of pods before it learns that they are in the
    /// mesh, and of both before it is put in charge. Says whether a pod is expected.
    fn round(&mut self, state: &State, roots: &[PodsRoot]) -> Result<bool> {
        let proxy = &state.proxy;
        let table = proxy.table.load_full();
        let outcome = self.enroller.reconcile(&table)?;
        let local: HashSet<IpAddr> = proxy.pods.load().addresses().copied().collect();
        let same = self
            .table
            .as_ref()
            .is_some_and(|before| Arc::ptr_eq(before, &table));
        let ranges = proxy.discover.as_ref().map(Discovery::ranges);
        let ranges = ranges.unwrap_or_default();
        if self.ranges.as_ref() != Some(&ranges) {
            proxy.kernel.set_ranges(&ranges)?;
            self.ranges = Some(ranges);
        }
        if !same || local != self.local {
            let outside = match proxy.discover {
                Some(_) => table.outside(),
                None => HashSet::new(),
            };
            proxy.kernel.set_mesh(&table.mesh(), &local, &outside)?;
            (self.table, self.local) = (Some(table), local);
            // Labels may have changed, and with them what selects a pod.
            proxy.recheck();
        }
        *state.workloads.lock().expect("no panic while it is held") = outcome.workloads;
        let v2: Vec<&PodsRoot> = roots.iter().filter(|root| root.v2).collect();
        if v2.len() > PODS_ROOTS {
            bail!(
                "{} directories hold pods; at most {PODS_ROOTS} can be told apart",
                v2.len()
            );
        }
        let (mut pods_cgroup, mut pods_level) = ([0; PODS_ROOTS], [0; PODS_ROOTS]);
        for (index, root) in v2.iter().enumerate() {
            pods_cgroup[index] = cgroup_id(&root.path)?;
            pods_level[index] = root.level;
        }
        let wanted = postern_ebpf::Config {
            node_netns: self.enroller.node_netns(),
            pods_cgroup,
            pods_level,
            agent_cgroup: state.agent_cgroup,
            agent_tgid: std::process::id(),
            unknown: match state.config.enrol.unknown {
                Unknown::Refuse => UNKNOWN_REFUSE,
                Unknown::Allow => UNKNOWN_ALLOW,
            },
            // Also while the kubelet has not made its directory yet.
            pods_by_netns_only: u32::from(v2.is_empty()),
            outbound_port: OUTBOUND_PORT.into(),
            hbone_port: HBONE_PORT.into(),
            _pad: 0,
        };
        if proxy.kernel.configured() != wanted {
            proxy.kernel.configure(wanted)?;
        }
        Ok(outcome.waiting)
    }
}

fn watch_cgroups(
    roots: &[PodsRoot],
    wake: mpsc::Sender<()>,
) -> notify::Result<notify::RecommendedWatcher> {
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Our own reading is no change. A full channel means that a round is due.
        if !event.is_ok_and(|event| event.kind.is_access()) {
            let _due = wake.try_send(());
        }
    })?;
    for root in roots {
        watcher.watch(&root.path, RecursiveMode::Recursive)?;
    }
    Ok(watcher)
}
