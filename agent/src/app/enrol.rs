//! Keeps enrolment true: after every change of the table or the cgroup tree, and often
//! while a pod is expected.

use std::{
    collections::{BTreeSet, HashSet},
    io,
    net::IpAddr,
    os::fd::OwnedFd,
    sync::Arc,
    time::Duration,
};

use anyhow::{Result, bail};
use ipnet::IpNet;
use notify::{RecursiveMode, Watcher as _};
use postern_ebpf::{PODS_ROOTS, UNKNOWN_ALLOW, UNKNOWN_REFUSE};
use tokio::sync::{mpsc, oneshot, watch};

use super::{State, handover::Last, pages::unmap_program};
use crate::{
    audit::Record,
    config::Unknown,
    handover::Bound,
    kernel::{PodsRoot, cgroup_id, pids},
    lifecycle::Watcher,
    proxy::{Enroller, HBONE_PORT, OUTBOUND_PORT},
    workload::{Discovery, Table},
};

/// What enrolment is asked for.
pub enum Command {
    /// Another agent takes over: leave everything as it is, and say which listeners there
    /// are.
    Pause(oneshot::Sender<io::Result<Vec<(Bound, OwnedFd)>>>),
    /// It did not.
    Resume,
}

/// The task that enrols.
pub struct Work {
    pub enroller: Enroller,
    /// Whether table and policies are there.
    pub fed: watch::Receiver<bool>,
    pub wake: mpsc::Sender<()>,
    pub woken: mpsc::Receiver<()>,
    pub orders: mpsc::Receiver<Command>,
    /// Until this agent is in charge.
    pub last: Option<Last>,
}

impl Work {
    pub async fn run(mut self, state: Arc<State>, stop: Watcher) {
        const SOON: Duration = Duration::from_millis(20);
        const SOMETIME: Duration = Duration::from_secs(2);
        // Until table and policies are there, an earlier agent's hooks stay, and refuse.
        tokio::select! {
            _there = self.fed.wait_for(|there| *there) => {}
            () = stop.triggered() => return,
        }
        let mut watching: Vec<PodsRoot> = Vec::new();
        let mut _watcher = None;
        let mut rounds = Rounds {
            enroller: self.enroller,
            ranges: None,
            table: None,
            local: HashSet::new(),
        };
        let mut pause = SOON;
        loop {
            let pods = rounds.enroller.find_pods().roots.clone();
            if pods != watching {
                match watch_cgroups(&pods, self.wake.clone()) {
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
                    if let Some(last) = self.last.take() {
                        tokio::task::block_in_place(|| started(&state, &rounds.enroller, last));
                    }
                    waiting
                }
                Err(error) => {
                    tracing::error!(%error, "cannot tell the kernel about workloads");
                    state.problem("kernel", Some(error.to_string()));
                    false
                }
            };
            let unused = if waiting {
                0
            } else {
                state.proxy.inherited.clear()
            };
            if unused > 0 {
                tracing::warn!(unused, "listeners of the agent before were of no use");
            }
            let wait = if waiting { pause } else { SOMETIME };
            tokio::select! {
                _ = self.woken.recv() => pause = SOON,
                () = tokio::time::sleep(wait) => pause = (pause * 2).min(SOMETIME),
                Some(Command::Pause(reply)) = self.orders.recv() => {
                    let _it_is_gone = reply.send(rounds.enroller.sockets());
                    tokio::select! {
                        // Nobody left to say so: the other one is in charge.
                        resumed = self.orders.recv() => if resumed.is_none() { return },
                        () = stop.triggered() => return,
                    }
                    tokio::task::block_in_place(|| rounds.again(&state));
                }
                () = stop.triggered() => return,
            }
        }
    }
}

/// The kernel knows all that it should: this agent's hooks take over.
fn started(state: &State, enroller: &Enroller, last: Last) {
    let (taken, failed) = (last.taken.is_some(), last.failed.clone());
    if !taken {
        enroller.forget_strangers();
    }
    if let Err(error) = last.step(state) {
        let _it_ends_anyway = failed.try_send(error.context("cannot take over"));
        return;
    }
    if taken {
        enroller.forget_strangers();
    }
    state.problem("starting", None);
    let mut detail = format!("version {}", env!("CARGO_PKG_VERSION"));
    if taken {
        detail.push_str(", taken over");
    }
    state.proxy.audit.record(Record::Agent {
        event: "started",
        detail,
    });
    tracing::info!(node = state.proxy.audit.node(), "ready");
    unmap_program();
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
    /// Another agent was to be in charge, and is not: whatever it may have changed is put
    /// right with the next round.
    fn again(&mut self, state: &State) {
        (self.table, self.ranges) = (None, None);
        let kernel = &state.proxy.kernel;
        let restored = kernel.resume().and_then(|()| self.enroller.attach_again());
        if let Err(error) = restored {
            tracing::error!(%error, "another agent's hooks may be in the place of this one's");
        }
    }

    /// One round. The kernel learns of pods before it learns that they are in the
    /// mesh, and of both before it is put in charge. Says whether a pod is expected.
    fn round(&mut self, state: &State, roots: &[PodsRoot]) -> Result<bool> {
        let proxy = &state.proxy;
        proxy.kernel.draining();
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
            let nodes = table.mesh_node_ports();
            let outside = match proxy.discover {
                Some(_) => table.outside(),
                None => HashSet::new(),
            };
            (proxy.kernel).set_mesh(&table.mesh(), &local, &nodes, &outside)?;
            let before = self.table.as_ref().map(|table| table.ignored.as_slice());
            if before.unwrap_or_default() != table.ignored {
                for what in &table.ignored {
                    tracing::warn!("{what}");
                }
            }
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
            agent_tgid: pids::own(),
            observer: proxy.kernel.observer,
            unknown: match state.config.enrol.unknown {
                Unknown::Refuse => UNKNOWN_REFUSE,
                Unknown::Allow => UNKNOWN_ALLOW,
            },
            // Also while the kubelet has not made its directory yet.
            pods_by_netns_only: u32::from(v2.is_empty()),
            outbound_port: OUTBOUND_PORT.into(),
            hbone_port: HBONE_PORT.into(),
            more_agents: u32::from(!proxy.kernel.agents().is_empty()),
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
