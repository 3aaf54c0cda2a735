//! Enrolment: finds the pods of this node in the cgroup tree, opens listeners in
//! their network namespaces and tells the kernel programs about them; takes all of
//! it back when they go.
//!
//! The order fails closed: listeners stand before the kernel is told to steer, and
//! the kernel is told to stop before they go.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    Identities, LocalPod, LocalPods, Proxy,
    listen::{Serving, Tasks, outbound_listeners},
};
use crate::{
    handover::Bound,
    identity::IdentityError,
    kernel::{
        CgroupMount, KernelError, Netns, PodDirs, Pods, cgroup_id, find_pods_roots,
        namespace_inode, netns_addresses, processes, started,
    },
    lifecycle::Watcher,
    telemetry::LocalWorkload,
    workload::{Table, Workload},
};

#[derive(Debug, thiserror::Error)]
pub(super) enum EnrolError {
    #[error("no process of it is in a network namespace with its address yet")]
    NoNamespace,
    #[error("its cgroup is not there yet")]
    NoCgroup,
    #[error("it has no address yet")]
    NoAddress,
    #[error("host-network pods are told by their cgroup v2, and it is in cgroup v1 only")]
    HostNetworkOnV1,
    #[error("another pod says that it is the same: both have the cgroup of uid {0}")]
    SharedCgroup(String),
    #[error("cannot listen on {address} in its network namespace: {source}")]
    Listen {
        address: SocketAddr,
        source: io::Error,
    },
    #[error("its network namespace: {0}")]
    Netns(#[source] io::Error),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Fail closed: without an identity it takes no part.
    #[error("its certificate is not there yet{0}")]
    NoCertificate(String),
}

impl EnrolError {
    /// Whether time alone will help.
    fn passes(&self) -> bool {
        match self {
            Self::NoNamespace | Self::NoCgroup | Self::NoAddress | Self::NoCertificate(_) => true,
            // Listeners of the same pod under another identity are just being closed.
            Self::Listen { source, .. } => source.kind() == io::ErrorKind::AddrInUse,
            _ => false,
        }
    }
}

pub struct Enroller {
    proxy: Arc<Proxy>,
    identities: Arc<Identities>,
    mounts: Vec<CgroupMount>,
    below: Option<PathBuf>,
    node: Netns,
    pods: Pods,
    enrolled: HashMap<String, Enrolled>,
    /// Which pod an address of `LISTENERS` was entered for.
    owners: HashMap<IpAddr, String>,
    /// The listener that all host-network pods share.
    host: Option<Tasks>,
    drain: Watcher,
}

struct Enrolled {
    pod: Arc<LocalPod>,
    /// Pod-level cgroup id, on v2.
    cgroup: Option<u64>,
    /// `None` for host-network pods, whose inbound connections are not steered.
    serving: Option<Serving>,
    /// Whether the kernel hands its inbound connections over.
    attached: bool,
}

/// What a round of enrolment found.
pub struct Outcome {
    pub workloads: Vec<LocalWorkload>,
    /// Some pod is expected any moment.
    pub waiting: bool,
}

impl Enroller {
    pub fn new(
        proxy: Arc<Proxy>,
        identities: Arc<Identities>,
        mounts: Vec<CgroupMount>,
        below: Option<&Path>,
        drain: Watcher,
    ) -> io::Result<Self> {
        Ok(Self {
            proxy,
            identities,
            mounts,
            below: below.map(Path::to_owned),
            node: Netns::own()?,
            pods: Pods::default(),
            enrolled: HashMap::new(),
            owners: HashMap::new(),
            host: None,
            drain,
        })
    }

    pub fn node_netns(&self) -> u64 {
        self.node.cookie
    }

    /// Looks for the pods' directories again, and returns them.
    pub fn find_pods(&mut self) -> &Pods {
        self.pods = Pods {
            roots: find_pods_roots(&self.mounts, self.below.as_deref()),
        };
        &self.pods
    }

    /// Makes enrolment what the table and the cgroup tree say.
    pub fn reconcile(&mut self, table: &Table) -> Result<Outcome, KernelError> {
        let dirs = self.pods.scan();
        let (mut by_netns, mut by_cgroup) = (HashMap::new(), HashMap::new());
        let mut outcome = Outcome {
            workloads: Vec::new(),
            waiting: false,
        };
        let mut disabled = HashSet::new();
        let audit = self.proxy.audit.clone();
        let local = || table.workloads.iter().filter(|w| w.node == audit.node());
        let mut claims: HashMap<&str, usize> = HashMap::new();
        for workload in local() {
            *claims.entry(&workload.cgroup_uid).or_default() += 1;
        }
        for workload in local() {
            let dirs = dirs.get(&workload.cgroup_uid);
            let known = postern_ebpf::Workload {
                enrolled: u32::from(workload.enrolled),
                _pad: 0,
            };
            let result = if claims[workload.cgroup_uid.as_str()] > 1 {
                // A pod may claim to be a static one's mirror: neither is believed.
                Err(EnrolError::SharedCgroup(workload.cgroup_uid.clone()))
            } else if workload.enrolled {
                self.enrol(workload, dirs, table)
                    .map(|pod| pod.netns.cookie)
            } else {
                disabled.insert(workload.uid.clone());
                self.namespace(workload, dirs).map(|netns| netns.cookie)
            };
            let state = match result {
                Ok(cookie) => {
                    for (dir, _) in dirs.into_iter().flatten().filter(|(_, v2)| *v2) {
                        by_cgroup.extend(cgroup_id(dir).map(|id| (id, known)));
                    }
                    if !workload.host_network {
                        by_netns.insert(cookie, known);
                    }
                    if workload.enrolled {
                        "enrolled".to_owned()
                    } else {
                        "disabled".to_owned()
                    }
                }
                // Not made known: what it dials is refused, and what is handed over
                // stays handed over, until this passes.
                Err(error) => {
                    outcome.waiting |= error.passes();
                    if !error.passes() {
                        tracing::error!(pod = workload.name, %error, "cannot enrol");
                    }
                    error.to_string()
                }
            };
            outcome.workloads.push(LocalWorkload {
                pod: format!("{}/{}", workload.namespace, workload.name),
                identity: workload.identity(&self.proxy.trust_domains[0]).to_string(),
                addresses: workload.addresses.iter().map(ToString::to_string).collect(),
                state,
            });
        }
        // A pod leaves when it is told to or when it is gone. That its object is gone,
        // or cannot be used, does not open it.
        let gone = |e: &Enrolled| !dirs.contains_key(&e.pod.workload.load().cgroup_uid);
        let leaving: Vec<String> = self
            .enrolled
            .iter()
            .filter(|(uid, enrolled)| disabled.contains(*uid) || gone(enrolled))
            .map(|(uid, _)| uid.clone())
            .collect();
        // New pods are carried before the kernel steers them, and those that leave
        // until it no longer does.
        self.publish();
        self.proxy.kernel.set_workloads(&by_netns, &by_cgroup)?;
        for uid in leaving {
            if let Some(gone) = self.remove(&uid) {
                tracing::info!(pod = gone.workload.load().name, "left the mesh");
            }
        }
        self.publish();
        Ok(outcome)
    }

    /// Descriptors of all listeners, for the next agent.
    pub fn sockets(&self) -> io::Result<Vec<(Bound, OwnedFd)>> {
        let mut all = Vec::new();
        for serving in self.enrolled.values().flat_map(|e| &e.serving) {
            all.extend(serving.sockets()?);
        }
        if let Some(host) = &self.host {
            all.extend(host.sockets()?);
        }
        Ok(all)
    }

    /// Puts this agent's look-ups where another one may have put its own.
    pub fn attach_again(&self) -> Result<(), KernelError> {
        let all = self.enrolled.values().filter(|e| e.serving.is_some());
        for enrolled in all {
            self.proxy.kernel.attach_lookup(&enrolled.pod.netns)?;
        }
        Ok(())
    }

    fn publish(&self) {
        let pods = self.enrolled.values().map(|e| (e.pod.clone(), e.cgroup));
        let owns =
            |workload: &Workload, address: &IpAddr| self.owners.get(address) == Some(&workload.uid);
        let pods = LocalPods::new(pods, owns);
        self.proxy.pods.store(Arc::new(pods));
        self.proxy.metrics.enrolled.set(self.enrolled.len() as i64);
    }

    /// Gives a pod's inbound connections back to itself.
    fn remove(&mut self, uid: &str) -> Option<Arc<LocalPod>> {
        let gone = self.enrolled.remove(uid)?;
        self.proxy.kernel.detach_lookup(gone.pod.netns.cookie);
        for address in gone.serving.iter().flat_map(|serving| &serving.addresses) {
            // It may be another pod's by now.
            if self.owners.get(address).is_some_and(|owner| owner == uid) {
                self.owners.remove(address);
                self.proxy.kernel.remove_listener(*address);
            }
        }
        Some(gone.pod)
    }

    /// Removes the look-ups that an earlier agent left for pods that are gone. Those of
    /// pods that are there but could not be enrolled stay: they fail closed.
    pub fn forget_strangers(&self) {
        let mut cookies: Vec<u64> = self.enrolled.values().map(|e| e.pod.netns.cookie).collect();
        for pid in self
            .pods
            .scan()
            .values()
            .flatten()
            .flat_map(|(dir, _)| processes(dir))
        {
            cookies
                .extend(Netns::open(Path::new(&format!("/proc/{pid}/ns/net"))).map(|n| n.cookie));
        }
        self.proxy.kernel.keep_lookups(&cookies);
    }

    fn enrol(
        &mut self,
        workload: &Arc<Workload>,
        dirs: Option<&PodDirs>,
        table: &Table,
    ) -> Result<Arc<LocalPod>, EnrolError> {
        let cgroup = dirs
            .and_then(|dirs| dirs.iter().find(|(_, v2)| *v2))
            .and_then(|(dir, _)| cgroup_id(dir).ok());
        if workload.host_network && dirs.is_some() && cgroup.is_none() {
            return Err(EnrolError::HostNetworkOnV1);
        }
        let identity = workload.identity(&self.proxy.trust_domains[0]);
        let netns = self.namespace(workload, dirs)?;
        let same = self.enrolled.get(&workload.uid).is_some_and(|enrolled| {
            enrolled.pod.netns.inode == netns.inode
                && *enrolled.pod.identity() == identity
                && enrolled.serving.is_none() == workload.host_network
        });
        if !same {
            // Before the old one goes: until there are new ones, its pod is not open.
            let Some(credentials) = self.identities.get(&identity, &workload.uid)? else {
                let why = self.identities.why_not(&identity);
                let why = why.map(|why| format!(": {why}")).unwrap_or_default();
                return Err(EnrolError::NoCertificate(why));
            };
            // A restarted sandbox has a new namespace: another pod, to all effects.
            self.remove(&workload.uid);
            let pod = Arc::new(LocalPod::new(workload.clone(), netns.clone(), credentials));
            let serving = if workload.host_network {
                self.serve_host()?;
                None
            } else {
                Some(Serving::start(&self.proxy, &pod, &self.drain)?)
            };
            tracing::info!(pod = workload.name, namespace = workload.namespace, %identity, "in the mesh");
            self.enrolled.insert(
                workload.uid.clone(),
                Enrolled {
                    pod,
                    cgroup,
                    serving,
                    attached: false,
                },
            );
        }
        let enrolled = self
            .enrolled
            .get_mut(&workload.uid)
            .expect("inserted above");
        enrolled.cgroup = cgroup;
        enrolled.pod.workload.store(workload.clone());
        let dirs = dirs.into_iter().flatten().map(|(dir, _)| dir.clone());
        enrolled.pod.cgroups.store(Arc::new(dirs.collect()));
        if let Some(serving) = &mut enrolled.serving {
            serving.update_addresses(
                workload,
                &netns,
                table,
                &mut self.owners,
                &self.proxy.kernel,
            )?;
            // Also where that has failed the last time.
            if !enrolled.attached {
                self.proxy.kernel.attach_lookup(&netns)?;
                enrolled.attached = true;
            }
        }
        Ok(enrolled.pod.clone())
    }

    /// The pod's network namespace: that of any process in its cgroup which has one of
    /// the pod's addresses. (A process may sit in a namespace of its own making, or
    /// in another pod's.)
    fn namespace(
        &self,
        workload: &Workload,
        dirs: Option<&PodDirs>,
    ) -> Result<Arc<Netns>, EnrolError> {
        let dirs = dirs.ok_or(EnrolError::NoCgroup)?;
        let before = self.enrolled.get(&workload.uid).map(|e| &e.pod.netns);
        if workload.host_network {
            return match before {
                Some(netns) => Ok(netns.clone()),
                None => Netns::own().map(Arc::new).map_err(EnrolError::Netns),
            };
        }
        if workload.addresses.is_empty() {
            return Err(EnrolError::NoAddress);
        }
        let mut inodes: HashMap<u64, Vec<i32>> = HashMap::new();
        for pid in dirs.iter().flat_map(|(dir, _)| processes(dir)) {
            // A container's first process is in the node's namespace for a moment;
            // conmon of CRI-O, which may be in the pod's cgroup, stays there.
            if let Ok(inode) = namespace_inode(pid)
                && inode != self.node.inode
            {
                inodes.entry(inode).or_default().push(pid);
            }
        }
        if let Some(netns) = before
            && (inodes.is_empty() || inodes.contains_key(&netns.inode))
        {
            // Between two containers a pod may have no process.
            return Ok(netns.clone());
        }
        // The oldest first: the sandbox was there before what a container may have made
        // to look like it.
        let mut candidates: Vec<(u64, i32)> = inodes
            .into_values()
            .filter_map(|pids| pids.into_iter().map(|pid| (started(pid), pid)).min())
            .collect();
        candidates.sort_unstable();
        for (_, pid) in candidates {
            let Ok(netns) = Netns::open(Path::new(&format!("/proc/{pid}/ns/net"))) else {
                continue;
            };
            let Ok(Ok(addresses)) = netns.run(netns_addresses) else {
                continue;
            };
            if addresses
                .iter()
                .any(|address| workload.addresses.contains(address))
            {
                return Ok(Arc::new(netns));
            }
        }
        Err(EnrolError::NoNamespace)
    }

    fn serve_host(&mut self) -> Result<(), EnrolError> {
        if self.host.is_none() {
            self.host = Some(outbound_listeners(
                &self.proxy,
                &self.node,
                None,
                &self.drain,
            )?);
        }
        Ok(())
    }
}
