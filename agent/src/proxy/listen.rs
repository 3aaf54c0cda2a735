//! The agent's listeners in network namespaces, and the loops that accept on them.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd as _, OwnedFd},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use postern_ebpf::{LISTENER_HBONE, LISTENER_PLAINTEXT};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};

use super::{
    HBONE_PORT, INBOUND_PORT, LocalPod, OUTBOUND_PORT, Proxy, enrol::EnrolError, inbound, outbound,
};
use crate::{
    handover::{Bound, Sockets},
    kernel::{Kernel, Netns, netns_addresses},
    lifecycle::{Held, Watcher},
    workload::{Table, Workload},
};

const BACKLOG: i32 = 4_096;
/// How long accepting rests when it fails for want of something.
const PAUSE: Duration = Duration::from_millis(50);

/// Listening sockets that an earlier agent has handed over, until somebody wants them.
/// What is dialled waits in them.
#[derive(Default)]
pub struct Inherited(Mutex<Sockets>);

impl Inherited {
    pub fn fill(&self, sockets: Sockets) {
        *self.lock() = sockets;
    }

    pub fn take(&self, bound: &Bound) -> Option<OwnedFd> {
        self.lock().remove(bound)
    }

    /// Closes what nobody wants. Says how many.
    pub fn clear(&self) -> usize {
        std::mem::take(&mut *self.lock()).len()
    }

    fn lock(&self) -> MutexGuard<'_, Sockets> {
        self.0.lock().expect("no panic while it is held")
    }
}

/// The listeners in a pod's network namespace.
pub struct Serving {
    tasks: Tasks,
    /// Addresses that `LISTENERS` has entries for.
    pub addresses: HashSet<IpAddr>,
}

/// Listening sockets and their accept loops, which end when dropped.
#[derive(Default)]
pub struct Tasks(Vec<Listening>);

struct Listening {
    bound: Bound,
    socket: Socket,
    task: tokio::task::AbortHandle,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Tasks {
    /// Accepts on a socket until drained, while this agent is in charge. The kernel's map,
    /// this and the runtime each keep a descriptor of it. A connection that cannot be
    /// accepted for want of file descriptors waits in the backlog; the loop goes on.
    fn serve<F: Future<Output = ()> + Send + 'static>(
        &mut self,
        proxy: &Arc<Proxy>,
        (bound, socket): (Bound, Socket),
        drain: &Watcher,
        serve: impl Fn(TcpStream, SocketAddr, Watcher) -> F + Send + Sync + 'static,
    ) -> Result<(), EnrolError> {
        let copy = socket
            .as_fd()
            .try_clone_to_owned()
            .map_err(EnrolError::Netns)?;
        let drain = drain.clone();
        let mut in_charge = proxy.accepting.subscribe();
        let serve = Arc::new(serve);
        let at = proxy.clone();
        let worker = proxy.workers.next();
        let listener = {
            let _its_runtime = worker.enter();
            TcpListener::from_std(copy.into()).map_err(EnrolError::Netns)?
        };
        let task = worker.spawn(async move {
            let watcher = drain.clone();
            loop {
                tokio::select! {
                    yes = in_charge.wait_for(|yes| *yes) => if yes.is_err() { return },
                    () = drain.triggered() => return,
                }
                let accepted = tokio::select! {
                    accepted = listener.accept() => accepted,
                    // What comes from now on waits for the agent that is.
                    _ = in_charge.wait_for(|yes| !*yes) => continue,
                    () = drain.triggered() => return,
                };
                match accepted {
                    Ok((stream, client)) => {
                        carry(&at, stream, client, watcher.clone(), &serve);
                    }
                    Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                    Err(error) => {
                        tracing::error!(%error, "cannot accept");
                        tokio::time::sleep(PAUSE).await;
                    }
                }
            }
        });
        self.0.push(Listening {
            bound,
            socket,
            task: task.abort_handle(),
        });
        Ok(())
    }

    fn socket(&self, port: u16) -> Option<&Socket> {
        let of_port = |l: &&Listening| l.bound.address.port() == port;
        self.0
            .iter()
            .find(of_port)
            .map(|listening| &listening.socket)
    }

    /// Descriptors of all of them, for the next agent.
    pub fn sockets(&self) -> io::Result<Vec<(Bound, OwnedFd)>> {
        let all = self.0.iter();
        all.map(|l| Ok((l.bound, l.socket.as_fd().try_clone_to_owned()?)))
            .collect()
    }
}

/// Has a connection carried by this worker or another one. On the heap from the beginning:
/// it is large, and a task's future is moved about.
fn carry<F: Future<Output = ()> + Send + 'static>(
    proxy: &Proxy,
    stream: TcpStream,
    client: SocketAddr,
    drain: Watcher,
    serve: &Arc<impl Fn(TcpStream, SocketAddr, Watcher) -> F + Send + Sync + 'static>,
) {
    let (worker, load) = proxy.workers.choose();
    let Some(worker) = worker else {
        let held = (drain.clone(), load);
        tokio::spawn(Box::pin(Held::new(serve(stream, client, drain), held)));
        return;
    };
    // It leaves this thread's runtime for the other one's.
    let moved = stream.into_std().and_then(|stream| {
        let _its_runtime = worker.enter();
        TcpStream::from_std(stream)
    });
    match moved {
        Ok(stream) => {
            let held = (drain.clone(), load);
            worker.spawn(Box::pin(Held::new(serve(stream, client, drain), held)));
        }
        Err(error) => tracing::error!(%error, "cannot carry a connection"),
    }
}

/// Loopback listeners that the connect hooks steer to. `pod`: whose namespace it is;
/// `None` for the node's, which host-network pods share.
pub fn outbound_listeners(
    proxy: &Arc<Proxy>,
    netns: &Netns,
    pod: Option<&Arc<LocalPod>>,
    drain: &Watcher,
) -> Result<Tasks, EnrolError> {
    let mut tasks = Tasks::default();
    let cookie = netns.cookie;
    for ip in [
        IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(Ipv6Addr::LOCALHOST),
    ] {
        let address = SocketAddr::new(ip, OUTBOUND_PORT);
        let socket = match bind(proxy, netns, address) {
            Ok(socket) => socket,
            // No IPv6 in this namespace: nothing can be dialled by it either.
            Err(error) if ip.is_ipv6() && no_ipv6(&error) => continue,
            Err(source) => return Err(EnrolError::Listen { address, source }),
        };
        let (to, pod) = (proxy.clone(), pod.cloned());
        tasks.serve(proxy, socket, drain, move |stream, client, drain| {
            outbound::carry(to.clone(), cookie, pod.clone(), stream, client, drain)
        })?;
    }
    Ok(tasks)
}

impl Serving {
    pub fn start(
        proxy: &Arc<Proxy>,
        pod: &Arc<LocalPod>,
        drain: &Watcher,
    ) -> Result<Self, EnrolError> {
        let netns = &pod.netns;
        let mut tasks = outbound_listeners(proxy, netns, Some(pod), drain)?;
        let plain = listen(proxy, netns, INBOUND_PORT)?;
        let hbone = listen(proxy, netns, HBONE_PORT)?;
        let (to, at) = (pod.clone(), proxy.clone());
        tasks.serve(proxy, plain, drain, move |stream, client, drain| {
            inbound::plaintext(at.clone(), to.clone(), stream, client, drain)
        })?;
        let (to, at) = (pod.clone(), proxy.clone());
        tasks.serve(proxy, hbone, drain, move |stream, client, drain| {
            inbound::tunnel(at.clone(), to.clone(), stream, client, drain)
        })?;
        Ok(Self {
            tasks,
            addresses: HashSet::new(),
        })
    }

    pub fn sockets(&self) -> io::Result<Vec<(Bound, OwnedFd)>> {
        self.tasks.sockets()
    }

    /// Enters the pod's addresses: those of its object and all that its interfaces
    /// have (link-local, secondary networks). What is not entered is dropped. An
    /// address that belongs to another pod is not this one's, whatever its interfaces
    /// say: a pod may be allowed to change them.
    pub fn update_addresses(
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
        let not_anothers =
            |address: &IpAddr| table.pod(*address).is_none_or(|w| w.uid == workload.uid);
        let free = |address: &IpAddr| {
            let owner = owners.get(address);
            not_anothers(address) && owner.is_none_or(|owner| *owner == workload.uid)
        };
        let [plain, hbone] = [INBOUND_PORT, HBONE_PORT].map(|port| self.tasks.socket(port));
        let (Some(plain), Some(hbone)) = (plain, hbone) else {
            return Ok(());
        };
        let found: Vec<IpAddr> = found.into_iter().filter(free).collect();
        // A pod that is on its way out may still say that it has what the next one has.
        let own = workload.addresses.iter().copied().filter(not_anothers);
        for address in own.chain(found) {
            let owned = owners
                .get(&address)
                .is_some_and(|owner| *owner == workload.uid);
            if !owned || !self.addresses.contains(&address) {
                kernel.set_listener(address, LISTENER_PLAINTEXT, plain)?;
                kernel.set_listener(address, LISTENER_HBONE, hbone)?;
                owners.insert(address, workload.uid.clone());
                self.addresses.insert(address);
            }
        }
        Ok(())
    }
}

/// A listener for all addresses of the namespace, of both families where it has both.
fn listen(proxy: &Proxy, netns: &Netns, port: u16) -> Result<(Bound, Socket), EnrolError> {
    let any = [
        IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    ];
    let [dual, v4] = any.map(|ip| SocketAddr::new(ip, port));
    match bind(proxy, netns, dual) {
        Ok(socket) => Ok(socket),
        Err(error) if no_ipv6(&error) => {
            bind(proxy, netns, v4).map_err(|source| EnrolError::Listen {
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

/// The socket of the agent before, or a new one.
fn bind(proxy: &Proxy, netns: &Netns, address: SocketAddr) -> io::Result<(Bound, Socket)> {
    let bound = Bound {
        netns: netns.cookie,
        address,
    };
    if let Some(inherited) = proxy.inherited.take(&bound) {
        return Ok((bound, inherited.into()));
    }
    let domain = Domain::for_address(address);
    let socket = netns.run(|| Socket::new(domain, Type::STREAM, Some(Protocol::TCP)))??;
    if address.is_ipv6() {
        socket.set_only_v6(address.ip().is_loopback())?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok((bound, socket))
}

fn no_ipv6(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT)
    )
}
