//! The pods of this node that are in the mesh, and their identities.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::sync::Notify;

use crate::{
    identity::{Authority, Bundle, Credentials, IdentityError, JwtIssuer, JwtSvid, SpiffeId},
    kernel::Netns,
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
            selected: ArcSwapOption::empty(),
        }
    }

    pub fn identity(&self) -> &SpiffeId {
        &self.credentials.id
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
    pub fn new(pods: impl IntoIterator<Item = (Arc<LocalPod>, Option<u64>)>) -> Self {
        let mut this = Self::default();
        for (pod, cgroup) in pods {
            let workload = pod.workload.load();
            if let Some(id) = cgroup {
                this.by_cgroup.insert(id, pod.clone());
            }
            if !workload.host_network {
                this.by_netns.insert(pod.netns.cookie, pod.clone());
                for address in &workload.addresses {
                    this.by_address.insert(*address, pod.clone());
                }
            }
            drop(workload);
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

/// Certificates of the service accounts on this node.
pub struct Identities {
    authority: Authority,
    jwt: JwtIssuer,
    pub bundle: Arc<Bundle>,
    issued: Mutex<HashMap<SpiffeId, Arc<Credentials>>>,
    /// Told when there is a new certificate to keep an eye on.
    pub added: Notify,
}

impl Identities {
    pub fn new(authority: Authority, jwt: JwtIssuer, bundle: Arc<Bundle>) -> Self {
        Self {
            authority,
            jwt,
            bundle,
            issued: Mutex::default(),
            added: Notify::new(),
        }
    }

    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// A JWT-SVID of an account of this node (SPIFFE JWT-SVID).
    pub async fn jwt_svid(&self, id: &SpiffeId, audience: &str) -> Result<JwtSvid, IdentityError> {
        self.jwt.issue(id, audience, SystemTime::now())
    }

    /// The account's credentials, made when they are first asked for.
    pub fn get(&self, id: &SpiffeId) -> Result<Arc<Credentials>, IdentityError> {
        let mut issued = self.issued.lock().expect("no panic while it is held");
        if let Some(credentials) = issued.get(id) {
            return Ok(credentials.clone());
        }
        let svid = self.authority.issue(id, SystemTime::now())?;
        let credentials = Arc::new(Credentials::new(svid, self.bundle.clone())?);
        issued.insert(id.clone(), credentials.clone());
        self.added.notify_one();
        Ok(credentials)
    }

    /// Renews what is due and forgets accounts that no pod uses any more. Returns
    /// when it should be called again, and what could not be renewed: such a
    /// certificate is used until it expires, and peers refuse it then.
    pub fn renew(&self, now: SystemTime) -> (Duration, Vec<(SpiffeId, IdentityError)>) {
        const SOONEST: Duration = Duration::from_millis(100);
        const LATEST: Duration = Duration::from_secs(60);
        let mut issued = self.issued.lock().expect("no panic while it is held");
        issued.retain(|_, credentials| Arc::strong_count(credentials) > 1);
        let mut failed = Vec::new();
        let mut next = LATEST;
        for (id, credentials) in issued.iter() {
            if credentials.renew_at() <= now {
                let renewed = self
                    .authority
                    .issue(id, now)
                    .and_then(|svid| credentials.renew(svid));
                match renewed {
                    Ok(()) => tracing::debug!(%id, "certificate renewed"),
                    Err(error) => failed.push((id.clone(), error)),
                }
            }
            let due = credentials
                .renew_at()
                .duration_since(now)
                .unwrap_or_default();
            next = next.min(due.max(SOONEST));
        }
        (next, failed)
    }
}
