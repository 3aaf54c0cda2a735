//! The pods of this node that are in the mesh.

use std::{
    collections::HashMap,
    net::IpAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::sync::Semaphore;
use zeroize::Zeroizing;

use super::behalf::Behalf;
use crate::{
    identity::{Credentials, SpiffeId},
    jwt::MAX_TOKEN,
    kernel::{Netns, read_in_pod},
    oauth::is_token,
    policy::{PolicySet, Selected, Subject},
    workload::{Table, Workload},
};

/// A local pod whose connections are carried.
pub struct LocalPod {
    /// Never used twice, even if the pod leaves and comes back.
    pub serial: u64,
    /// Replaced when its labels or addresses change.
    pub workload: ArcSwap<Workload>,
    pub netns: Arc<Netns>,
    pub credentials: Arc<Credentials>,
    /// Users' tokens that came in, for calls on their behalf.
    pub behalf: Behalf,
    /// Its directories in the cgroup trees.
    pub cgroups: ArcSwap<Vec<PathBuf>>,
    /// A file of it may be read: one at a time, for its file system may never answer.
    reading: Arc<Semaphore>,
    selected: ArcSwapOption<Selection>,
}

/// The policies that select a pod, and what they were found from.
struct Selection {
    policies: Arc<PolicySet>,
    table: Arc<Table>,
    workload: Arc<Workload>,
    selected: Arc<Selected>,
}

impl LocalPod {
    pub fn new(workload: Arc<Workload>, netns: Arc<Netns>, credentials: Arc<Credentials>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let serial = NEXT.fetch_add(1, Ordering::Relaxed);
        Self {
            serial,
            workload: ArcSwap::new(workload),
            netns,
            credentials,
            behalf: Behalf::default(),
            cgroups: ArcSwap::default(),
            reading: Arc::new(Semaphore::new(1)),
            selected: ArcSwapOption::empty(),
        }
    }

    pub fn identity(&self) -> &SpiffeId {
        &self.credentials.id
    }

    /// A token in a file of the pod. To be called with a limit of time.
    pub async fn token(self: Arc<Self>, path: PathBuf) -> Result<Zeroizing<String>, String> {
        let turn = self.reading.clone().acquire_owned().await;
        let dirs = self.cgroups.load_full();
        let shown = path.display().to_string();
        let reading = tokio::task::spawn_blocking(move || {
            let _until_it_is_read = turn;
            read_in_pod(&dirs, &path, MAX_TOKEN as u64)
        });
        let content = match reading.await {
            Ok(Ok(content)) => content,
            Ok(Err(error)) => return Err(format!("{shown} in the pod: {error}")),
            Err(_ended) => return Err("the agent ends".into()),
        };
        let text = std::str::from_utf8(&content).unwrap_or_default().trim_end();
        match is_token(text) {
            true => Ok(Zeroizing::new(text.to_owned())),
            false => Err(format!("{shown} in the pod: is no token")),
        }
    }

    pub fn has_address(&self, ip: IpAddr) -> bool {
        self.workload.load().addresses.contains(&ip)
    }

    /// The pod's address of the same family.
    pub fn address_like(&self, ip: IpAddr) -> Option<IpAddr> {
        let workload = self.workload.load();
        workload
            .addresses
            .iter()
            .copied()
            .find(|own| own.is_ipv4() == ip.is_ipv4())
    }

    /// The policies that select it now; looked for again only when they, the pod or
    /// the services have changed.
    pub fn selected(&self, policies: &ArcSwap<PolicySet>, table: &ArcSwap<Table>) -> Arc<Selected> {
        let (policies, table) = (policies.load(), table.load());
        let workload = self.workload.load();
        if let Some(known) = &*self.selected.load()
            && Arc::ptr_eq(&known.policies, &policies)
            && Arc::ptr_eq(&known.table, &table)
            && Arc::ptr_eq(&known.workload, &workload)
        {
            return known.selected.clone();
        }
        let selected = Arc::new(policies.select(&Subject {
            namespace: workload.namespace.clone(),
            labels: workload.labels.clone(),
            services: table.services_of(&workload),
        }));
        self.selected.store(Some(Arc::new(Selection {
            policies: policies.clone(),
            table: table.clone(),
            workload: workload.clone(),
            selected: selected.clone(),
        })));
        selected
    }
}

/// Snapshot of all of them.
#[derive(Default)]
pub struct LocalPods {
    pub all: Vec<Arc<LocalPod>>,
    by_address: HashMap<IpAddr, Arc<LocalPod>>,
    by_cgroup: HashMap<u64, Arc<LocalPod>>,
    by_netns: HashMap<u64, Arc<LocalPod>>,
}

impl LocalPods {
    /// Each pod with its pod-level cgroup's id. `owns`: whether an address is the pod's;
    /// one that has ended may still be here when its address is another's.
    pub fn new(
        pods: impl IntoIterator<Item = (Arc<LocalPod>, Option<u64>)>,
        owns: impl Fn(&Workload, &IpAddr) -> bool,
    ) -> Self {
        let mut this = Self::default();
        for (pod, cgroup) in pods {
            let workload = pod.workload.load_full();
            if let Some(id) = cgroup {
                this.by_cgroup.insert(id, pod.clone());
            }
            if !workload.host_network {
                this.by_netns.insert(pod.netns.cookie, pod.clone());
                for address in workload.addresses.iter().filter(|a| owns(&workload, a)) {
                    this.by_address.insert(*address, pod.clone());
                }
            }
            this.all.push(pod);
        }
        this
    }

    pub fn at(&self, address: IpAddr) -> Option<&Arc<LocalPod>> {
        self.by_address.get(&address)
    }

    /// By pod-level cgroup id, which host-network pods are known by.
    pub fn in_cgroup(&self, id: u64) -> Option<&Arc<LocalPod>> {
        self.by_cgroup.get(&id)
    }

    pub fn in_netns(&self, cookie: u64) -> Option<&Arc<LocalPod>> {
        self.by_netns.get(&cookie)
    }

    pub fn addresses(&self) -> impl Iterator<Item = &IpAddr> {
        self.by_address.keys()
    }
}
