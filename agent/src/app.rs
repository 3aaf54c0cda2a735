//! Builds the parts and joins them; the only one who knows all of them.

mod bypass;
mod cluster;
mod enrol;
mod handover;
mod observe;
mod pages;
mod reload;
mod tokens;

use std::{
    fs::Permissions,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::PathBuf,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, bail};
use arc_swap::ArcSwap;
use futures_util::FutureExt as _;
use postern_ebpf::Counter;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{Semaphore, mpsc, watch},
};

use crate::{
    audit::{
        Audit, Join, Processes, Record,
        chain::OpenError,
        send::{self, Senders, Standings},
    },
    config::{Config, Source},
    fetch::Trust,
    handover::{Bound, Elders, Own},
    judge::Judge,
    kernel::{
        self, AgentProcess, CgroupMount, Kernel, Netns, Start, cgroup_mounts, own_cgroup, pids,
    },
    kubernetes::Cluster,
    lifecycle::{Watcher, drain},
    policy::PolicySet,
    proxy::{
        Choices, Connections, Enroller, Identities, Inherited, LocalPods, MAX_HANDSHAKES, Proxy,
        Tunnels, Workers, sweep,
    },
    telemetry::{
        Certificate, Endpoints, LocalWorkload, LogHandle, Metrics, Policy, Status, StatusSource,
        serve,
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

/// Runs the agent until SIGTERM or SIGINT, or until another one has taken over; then
/// drains.
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

    // Meanwhile the rest begins.
    let kept = kernel::kept(&config.kernel, &config.state, config.audit.events);
    let mut reading = (!kept).then(|| thread::spawn(kernel::Types::read));
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
    let trust = Trust::new(config.jwt.roots.as_deref())
        .map_err(|e| Misconfigured(format!("jwt.roots: {e}")))?;
    let (cgroup, mounts) = hook_cgroup(&config)?;
    let own_cgroup = own_cgroup(&cgroup);
    if own_cgroup == 0 {
        // Its own connections would be taken for a pod's, again and again.
        bail!(
            "the agent's own cgroup is not found in the tree of {}: it needs the node's \
             process ids (hostPID) and its cgroups",
            cgroup.display()
        );
    }
    let observed = config.audit.enabled && config.audit.events;
    let own = Own {
        node: node.clone(),
        pin: config.kernel.pin.clone(),
        shape: kernel::shape(&config.kernel),
        process: AgentProcess {
            tgid: pids::own(),
            cgroup: own_cgroup,
        },
    };

    // Beside an agent that runs, all is prepared before that one steps back.
    let mut load = |start| {
        let types = || match reading.take() {
            Some(reading) => reading.join().expect("it does not panic"),
            None => kernel::Types::read(),
        };
        let (state, events) = (&config.state, config.audit.events);
        Kernel::load(&config.kernel, &cgroup, state, events, start, types)
    };
    let (mut beside, mut taken) = (None, None);
    if let Some(taking) = handover::begin(&config, &own).await {
        beside = Some(load(Start::Beside)?);
        let known = match &cluster {
            Some(cluster) if cluster.has_workloads() => cluster::ahead(cluster, &config).await,
            _ => None,
        };
        let table = known.as_ref().unwrap_or(&table);
        handover::prepare(&config, table, &node, &identities).await;
        taken = handover::commit(taking).await;
    }
    let mut taken = match taken {
        Some(taken) => Some(taken),
        // It died, or ends: this one starts alone.
        None => {
            beside = None;
            None
        }
    };
    let own_netns = Netns::own().context("the agent's own network namespace")?;
    let inherited = Inherited::default();
    if let Some(taken) = &mut taken {
        inherited.fill(std::mem::take(&mut taken.sockets));
    }
    let bound = |address| Bound {
        netns: own_netns.cookie,
        address,
    };
    let endpoints = Endpoints::bind(&config.listen, |address| inherited.take(&bound(address)))
        .await
        .map_err(|e| misconfigured(&e))?;
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

    let senders = if config.audit.enabled {
        let log = config.audit.directory(&config.state);
        Some(send::start(&config, &log, &node).map_err(|e| misconfigured(&e))?)
    } else {
        None
    };

    let kernel = match beside {
        Some(kernel) => kernel,
        None => load(Start::Alone)?,
    };
    let elders = Arc::new(Elders::default());
    if let Some(taken) = &mut taken {
        for agent in &taken.agents {
            kernel.add_agent(*agent)?;
        }
        kernel.set_lock(Some(taken.lock.try_clone()?));
        elders.expect(taken.pid, std::mem::take(&mut taken.keys));
    }
    let sees = observed && kernel.sees_sockets();
    let identities = Arc::new(identities);
    let metrics = Metrics::default();
    let tokens = Arc::new(tokens::client(trust, &identities, &audit, &metrics));
    let proxy = Arc::new(Proxy {
        transport: config.transport.clone(),
        trust_domains: config.trust_domains(),
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
        choices: Choices::default(),
        connections: Connections::default(),
        tunnels: Tunnels::default(),
        workers: Workers::start().context("threads that carry connections")?,
        tokens,
        accepting: watch::Sender::new(false),
        inherited,
        elders,
        handshakes: Semaphore::new(MAX_HANDSHAKES),
        audit: audit.clone(),
        join: Arc::new(Join::new(audit.clone(), sees)),
        processes: Processes::default(),
        metrics,
    });
    tokio::spawn(sweep(proxy.clone()));
    // What carries connections drains; what keeps decisions true goes on as long as any is
    // carried.
    let (trigger, watcher) = drain();
    let (_until_the_end, following) = drain();
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
        agent_cgroup: own.process.cgroup,
        workloads: Mutex::default(),
        problems: Mutex::new(vec!["starting".into()]),
    });
    let sockets = endpoints.sockets()?.into_iter();
    let sockets = sockets.map(|(address, fd)| (bound(address), fd)).collect();
    serve(endpoints, state.clone(), log, &watcher);
    for blind in &kernel.blind {
        tracing::warn!(blind.part, blind.why, "{}", blind.without);
    }
    let (observer, commands) = mpsc::channel(1);
    let observer = observed.then(|| {
        let events = observe::kernel_events(proxy.clone(), commands);
        (observer, tokio::spawn(events))
    });
    tokio::spawn(bypass::forget_missed(proxy.clone(), watcher.clone()));
    tokio::spawn(bypass::watch(
        proxy.clone(),
        config.enforce.bypass,
        watcher.clone(),
    ));
    let (wake, woken) = mpsc::channel(1);
    let (feeding, fed) = watch::channel(cluster.is_none());
    if let Some(cluster) = &cluster {
        cluster::start(&state, cluster, wake.clone(), feeding, &following, &watcher);
    }
    tokio::spawn(reload::watch(
        state.clone(),
        wake.clone(),
        following.clone(),
    ));
    tokio::spawn(renew(state.clone(), wake.clone(), following.clone()));
    tokio::spawn(keys_changed(proxy.clone(), following.clone()));
    tokio::spawn(tokens::sweep(proxy.clone(), following));
    let (requests, mut asked) = mpsc::channel(1);
    let (failed, mut failures) = mpsc::channel(1);
    let doorkeeper = Arc::new(Mutex::new(None));
    let last = handover::Last {
        taken,
        own: own.clone(),
        requests,
        doorkeeper: doorkeeper.clone(),
        failed,
    };
    let (enrol, orders) = mpsc::channel(1);
    let work = enrol::Work {
        enroller,
        fed,
        wake,
        woken,
        orders,
        last: Some(last),
    };
    tokio::spawn(work.run(state.clone(), watcher.clone()));
    let mut stage = handover::Stage {
        state,
        senders,
        enrol,
        observer: observer.as_ref().map(|(commands, _)| commands.clone()),
        sockets,
        over: None,
    };
    drop((watcher, identities));

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    // Whoever is told while another agent takes over is not told again.
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    }
    .shared();
    let served = tokio::select! {
        served = stage.serve(&mut asked, stop.clone()) => served,
        Some(error) = failures.recv() => return Err(error),
    };
    // Whoever comes from now on comes to another agent, or to none.
    let door = doorkeeper.lock().expect("no panic while it is held").take();
    drop((door, asked));
    let (senders, over) = (stage.senders.take(), stage.over.take());
    drop(stage);
    let mut farewell = None;
    if served == handover::Served::HandedOver {
        farewell = Some(handover::Farewell::begin(&proxy, own, &config, over)?);
    }
    tracing::info!(connections = proxy.connections.len(), "draining");
    let limit = config.drain.timeout.0;
    if !trigger.drain(limit).await {
        tracing::warn!(left = proxy.connections.len(), "time to drain is up");
    }
    // The sockets of the last connections are still to be told of.
    if let Some(farewell) = &farewell {
        farewell.stories().await;
    }
    if let Some((commands, observer)) = observer {
        let _ended = commands.send(observe::Command::Enough).await;
        let _late = tokio::time::timeout(AUDIT_END, observer).await;
    }
    audit.record(Record::Agent {
        event: "stopped",
        detail: farewell
            .as_ref()
            .map_or("", |_| "after handing over")
            .into(),
    });
    // Connections that were cut hold the log, too: it ends all the same.
    if let Some(writer) = writer {
        let _ = tokio::task::spawn_blocking(move || audit.close(&writer, AUDIT_END)).await;
    }
    if let Some(mut farewell) = farewell {
        farewell.told().await;
        tracing::info!("all is handed over; waiting to be stopped");
        farewell.linger(stop).await;
    }
    // Last, so that receivers get the log's last record, too.
    if let Some(senders) = senders {
        senders.finish(SEND_AT_END).await;
    }
    Ok(())
}

/// Removes all that is pinned, so that traffic is direct. An agent that runs steps back for
/// good, and drains.
pub fn cleanup(config: &Config) -> Result<Vec<PathBuf>> {
    let own = Own {
        node: config.node_name(),
        pin: config.kernel.pin.clone(),
        shape: String::new(),
        process: AgentProcess {
            tgid: std::process::id(),
            cgroup: 0,
        },
    };
    let taking = crate::handover::remove(&crate::handover::door(&config.state), &own)?;
    let taken = taking.map(crate::handover::Taking::commit).transpose()?;
    let lock = taken.as_ref().map(|taken| taken.lock.try_clone());
    let removed = kernel::cleanup(&config.kernel.pin, &config.state, lock.transpose()?)?;
    if let Some(taken) = taken {
        taken.finish()?;
    }
    Ok(removed)
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

    fn policies(&self) -> Vec<Policy> {
        let verdicts = self.cluster.iter().map(|cluster| cluster.verdicts());
        let told = verdicts.flat_map(|all| (*all).clone());
        let told = told.map(|((kind, namespace, name), verdict)| Policy {
            kind,
            namespace,
            name,
            generation: verdict.generation,
            accepted: verdict.refused.is_none(),
            stands: verdict.refused.map(|refusal| refusal.stands),
        });
        told.collect()
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
async fn keys_changed(proxy: Arc<Proxy>, stop: Watcher) {
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
async fn renew(state: Arc<State>, wake: mpsc::Sender<()>, stop: Watcher) {
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
