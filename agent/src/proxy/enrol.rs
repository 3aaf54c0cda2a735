//! Enrolment: finds the pods of this node in the cgroup tree, opens listeners in
//! their network namespaces and tells the kernel programs about them; takes all of
//! it back when they go.
//!
//! The order fails closed: listeners stand before the kernel is told to steer, and
//! the kernel is told to stop before they go.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use postern_ebpf::{LISTENER_HBONE, LISTENER_PLAINTEXT};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};

use super::{
    HBONE_PORT, INBOUND_PORT, Identities, LocalPod, LocalPods, OUTBOUND_PORT, Proxy, inbound,
    outbound,
};
use crate::{
    identity::IdentityError,
    kernel::{
        CgroupMount, Kernel, KernelError, Netns, PodDirs, Pods, cgroup_id, find_pods_roots,
        namespace_inode, netns_addresses, processes,
    },
    lifecycle::Watcher,
    telemetry::LocalWorkload,
    workload::{Table, Workload},
};

const BACKLOG: i32 = 4_096;

#[derive(Debug, thiserror::Error)]
enum EnrolError {
    #[error("no process of it is in a network namespace with its address yet")]
    NoNamespace,
    #[error("its cgroup is not there yet")]
    NoCgroup,
    #[error("it has no address yet")]
    NoAddress,
    #[error("host-network pods are told by their cgroup v2, and it is in cgroup v1 only")]
    HostNetworkOnV1,
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
}

impl EnrolError {
    /// Whether time alone will help.
    fn passes(&self) -> bool {
        match self {
            Self::NoNamespace | Self::NoCgroup | Self::NoAddress => true,
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
}

/// The listeners in a pod's network namespace.
struct Serving {
    _tasks: Tasks,
    plain: Socket,
    hbone: Socket,
    /// Addresses that `LISTENERS` has entries for.
    addresses: HashSet<IpAddr>,
}

/// Accept loops, ended when dropped.
struct Tasks(Vec<tokio::task::AbortHandle>);

impl Drop for Tasks {
    fn drop(&mut self) {
        for task in &self.0 {
            task.abort();
        }
    }
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
        for workload in table.workloads.iter().filter(|w| w.node == audit.node()) {
            let dirs = dirs.get(&workload.uid);
            let known = postern_ebpf::Workload {
                enrolled: u32::from(workload.enrolled),
                _pad: 0,
            };
            let result = if workload.enrolled {
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
        let leaving: Vec<String> = self
            .enrolled
            .keys()
            .filter(|uid| disabled.contains(*uid) || !dirs.contains_key(*uid))
            .cloned()
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

    fn publish(&self) {
        let pods = self.enrolled.values().map(|e| (e.pod.clone(), e.cgroup));
        self.proxy.pods.store(Arc::new(LocalPods::new(pods)));
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
            // A restarted sandbox has a new namespace: another pod, to all effects.
            self.remove(&workload.uid);
            let credentials = self.identities.get(&identity)?;
            let pod = Arc::new(LocalPod::new(workload.clone(), netns.clone(), credentials));
            let serving = if workload.host_network {
                self.serve_host()?;
                None
            } else {
                Some(self.serve(&pod)?)
            };
            tracing::info!(pod = workload.name, namespace = workload.namespace, %identity, "in the mesh");
            self.enrolled.insert(
                workload.uid.clone(),
                Enrolled {
                    pod,
                    cgroup,
                    serving,
                },
            );
        }
        let enrolled = self
            .enrolled
            .get_mut(&workload.uid)
            .expect("inserted above");
        enrolled.cgroup = cgroup;
        enrolled.pod.workload.store(workload.clone());
        if let Some(serving) = &mut enrolled.serving {
            serving.update_addresses(
                workload,
                &netns,
                table,
                &mut self.owners,
                &self.proxy.kernel,
            )?;
            if !same {
                self.proxy.kernel.attach_lookup(&netns)?;
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
        let mut inodes = HashMap::new();
        for pid in dirs.iter().flat_map(|(dir, _)| processes(dir)) {
            // A container's first process is in the node's namespace for a moment.
            if let Ok(inode) = namespace_inode(pid)
                && inode != self.node.inode
            {
                inodes.entry(inode).or_insert(pid);
            }
        }
        if let Some(netns) = before
            && (inodes.is_empty() || inodes.contains_key(&netns.inode))
        {
            // Between two containers a pod may have no process.
            return Ok(netns.clone());
        }
        for pid in inodes.values() {
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

    fn serve(&self, pod: &Arc<LocalPod>) -> Result<Serving, EnrolError> {
        let netns = &pod.netns;
        let mut tasks = Tasks(self.listen_outbound(netns)?);
        let plain = listen(netns, INBOUND_PORT)?;
        let hbone = listen(netns, HBONE_PORT)?;
        let (proxy, drain) = (self.proxy.clone(), self.drain.clone());
        let to = pod.clone();
        tasks.0.push(accept(
            async_listener(&plain)?,
            drain.clone(),
            move |stream, client, drain| {
                inbound::plaintext(proxy.clone(), to.clone(), stream, client, drain)
            },
        ));
        let (proxy, to) = (self.proxy.clone(), pod.clone());
        tasks.0.push(accept(
            async_listener(&hbone)?,
            drain,
            move |stream, client, drain| {
                inbound::tunnel(proxy.clone(), to.clone(), stream, client, drain)
            },
        ));
        Ok(Serving {
            _tasks: tasks,
            plain,
            hbone,
            addresses: HashSet::new(),
        })
    }

    fn serve_host(&mut self) -> Result<(), EnrolError> {
        if self.host.is_none() {
            self.host = Some(Tasks(self.listen_outbound(&self.node)?));
        }
        Ok(())
    }

    /// Loopback listeners that the connect hooks steer to.
    fn listen_outbound(&self, netns: &Netns) -> Result<Vec<tokio::task::AbortHandle>, EnrolError> {
        let mut tasks = Vec::new();
        let cookie = netns.cookie;
        for ip in [
            IpAddr::V4(Ipv4Addr::LOCALHOST),
            IpAddr::V6(Ipv6Addr::LOCALHOST),
        ] {
            let address = SocketAddr::new(ip, OUTBOUND_PORT);
            let socket = match bind(netns, address) {
                Ok(socket) => socket,
                // No IPv6 in this namespace: nothing can be dialled by it either.
                Err(source)
                    if ip.is_ipv6() && source.raw_os_error() == Some(libc::EADDRNOTAVAIL) =>
                {
                    continue;
                }
                Err(source) => return Err(EnrolError::Listen { address, source }),
            };
            let proxy = self.proxy.clone();
            let listener = async_listener(&socket)?;
            tasks.push(accept(
                listener,
                self.drain.clone(),
                move |stream, client, drain| {
                    outbound::carry(proxy.clone(), cookie, stream, client, drain)
                },
            ));
        }
        Ok(tasks)
    }
}

impl Serving {
    /// Enters the pod's addresses: those of its object and all that its interfaces
    /// have (link-local, secondary networks). What is not entered is dropped. An
    /// address that belongs to another pod is not this one's, whatever its interfaces
    /// say: a pod may be allowed to change them.
    fn update_addresses(
        &mut self,
        workload: &Workload,
        netns: &Netns,
        table: &Table,
        owners: &mut HashMap<IpAddr, String>,
        kernel: &Kernel,
    ) -> Result<(), EnrolError> {
        let found = netns
            .run(netns_addresses)
            .and_then(|r| r)
            .map_err(EnrolError::Netns)?;
        let free = |address: &IpAddr| {
            table.pod(*address).is_none_or(|w| w.uid == workload.uid)
                && owners
                    .get(address)
                    .is_none_or(|owner| *owner == workload.uid)
        };
        let found: Vec<IpAddr> = found.into_iter().filter(free).collect();
        for address in workload.addresses.iter().copied().chain(found) {
            let owned = owners
                .get(&address)
                .is_some_and(|owner| *owner == workload.uid);
            if !owned || !self.addresses.contains(&address) {
                kernel.set_listener(address, LISTENER_PLAINTEXT, &self.plain)?;
                kernel.set_listener(address, LISTENER_HBONE, &self.hbone)?;
                owners.insert(address, workload.uid.clone());
                self.addresses.insert(address);
            }
        }
        Ok(())
    }
}

/// A listener for all addresses of the namespace, of both families where it has both.
fn listen(netns: &Netns, port: u16) -> Result<Socket, EnrolError> {
    let any = [
        IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    ];
    let [dual, v4] = any.map(|ip| SocketAddr::new(ip, port));
    match bind(netns, dual) {
        Ok(socket) => Ok(socket),
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            bind(netns, v4).map_err(|source| EnrolError::Listen {
                address: v4,
                source,
            })
        }
        Err(source) => Err(EnrolError::Listen {
            address: dual,
            source,
        }),
    }
}

fn bind(netns: &Netns, address: SocketAddr) -> io::Result<Socket> {
    let domain = Domain::for_address(address);
    let socket = netns.run(|| Socket::new(domain, Type::STREAM, Some(Protocol::TCP)))??;
    if address.is_ipv6() {
        socket.set_only_v6(address.ip().is_loopback())?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

/// The kernel's map and the runtime each keep a descriptor of the same socket.
fn async_listener(socket: &Socket) -> Result<TcpListener, EnrolError> {
    let copy = socket
        .as_fd()
        .try_clone_to_owned()
        .map_err(EnrolError::Netns)?;
    TcpListener::from_std(copy.into()).map_err(EnrolError::Netns)
}

/// Accepts until drained. A connection that cannot be accepted for want of file
/// descriptors waits in the backlog; the loop goes on.
fn accept<F>(
    listener: TcpListener,
    mut drain: Watcher,
    serve: impl Fn(TcpStream, SocketAddr, Watcher) -> F + Send + 'static,
) -> tokio::task::AbortHandle
where
    F: Future<Output = ()> + Send + 'static,
{
    const PAUSE: Duration = Duration::from_millis(50);
    let task = tokio::spawn(async move {
        let watcher = drain.clone();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = drain.triggered() => return,
            };
            match accepted {
                Ok((stream, client)) => {
                    tokio::spawn(serve(stream, client, watcher.clone()));
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    tracing::error!(%error, "cannot accept");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    });
    task.abort_handle()
}
