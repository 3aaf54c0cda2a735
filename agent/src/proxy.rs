//! Carries connections. `outbound` takes what pods dial, `inbound` what comes to
//! them; between nodes `hbone` is the tunnel, on one node there is none. `splice`
//! moves bytes, `look` says what is at an address, `deliver` is the destination's side of all of them: it judges, and
//! reads `http` where policy asks for requests. `connections` knows what is live and ends what policy no longer
//! allows, `enrol` follows pods as they come and go, `listen` opens their
//! listeners.

mod attach;
mod behalf;
mod choice;
mod connections;
mod deliver;
mod enrol;
mod fast;
mod gate;
mod hbone;
pub mod http;
mod identities;
mod inbound;
mod listen;
mod look;
mod outbound;
mod pods;
mod source;
mod splice;
mod story;
mod tls;
mod workers;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio::{
    net::{TcpSocket, TcpStream},
    sync::{Semaphore, watch},
};

use crate::{
    audit::{Audit, Ends, Join, Key, Processes},
    config::Transport,
    handover::Elders,
    identity::TrustDomain,
    judge::Judge,
    kernel::{ClientEntry, Kernel, Netns},
    oauth::TokenClient,
    policy::{Permitted, PolicySet, Selected},
    telemetry::Metrics,
    workload::{Discovery, Table},
};

pub use attach::describe;
pub use choice::Choices;
pub use connections::Connections;
pub use enrol::Enroller;
pub use hbone::{Tunnels, sweep};
pub use identities::Identities;
pub use listen::Inherited;
pub use pods::{LocalPod, LocalPods};
pub use workers::Workers;

/// Ports of the agent in each pod's network namespace.
pub const OUTBOUND_PORT: u16 = 15001;
pub const INBOUND_PORT: u16 = 15006;
pub const HBONE_PORT: u16 = 15008;

/// TLS handshakes of peers at once, over all pods.
pub const MAX_HANDSHAKES: usize = 512;

/// Whether no application can be meant by this port.
pub fn is_agent_port(port: u16) -> bool {
    matches!(port, OUTBOUND_PORT | INBOUND_PORT | HBONE_PORT)
}

/// What every connection needs; one for the whole agent.
pub struct Proxy {
    pub transport: Transport,
    /// The mesh's own trust domain first, then its aliases.
    pub trust_domains: Vec<TrustDomain>,
    pub kernel: Arc<Kernel>,
    pub table: ArcSwap<Table>,
    /// Where the table does not hold the whole cluster.
    pub discover: Option<Discovery>,
    pub policies: ArcSwap<PolicySet>,
    /// Told after policies, pods or services have changed.
    pub changed: watch::Sender<()>,
    pub judge: Judge,
    pub http: http::Limits,
    pub pods: ArcSwap<LocalPods>,
    /// Endpoints that clients of services stay with.
    pub choices: Choices,
    pub connections: Connections,
    pub tunnels: Tunnels,
    /// Where connections are carried.
    pub workers: Workers,
    pub tokens: Arc<TokenClient>,
    /// Whether this agent accepts connections: not before it is in charge, and no longer
    /// when another one is.
    pub accepting: watch::Sender<bool>,
    /// Listening sockets of the agent before, until they are used.
    pub inherited: Inherited,
    /// Agents that have handed over to this one, or to one before it, and drain.
    pub elders: Arc<Elders>,
    /// TLS handshakes that peers may have under way.
    pub handshakes: Semaphore,
    pub audit: Audit,
    /// Where stories of connections meet their applications' sockets.
    pub join: Arc<Join>,
    pub processes: Processes,
    pub metrics: Metrics,
}

impl Proxy {
    /// The policies that select a pod now.
    pub fn selected(&self, pod: &LocalPod) -> Arc<Selected> {
        pod.selected(&self.policies, &self.table)
    }

    /// To be called after policies, pods or services were published: what was let in
    /// before is judged anew. Says how many connections that ended.
    pub fn recheck(&self) -> usize {
        self.changed.send_replace(());
        self.connections.recheck(&self.policies, &self.table)
    }

    /// Lets what is dialled at an address pass for a while: no pod has it.
    fn foreign(&self, address: IpAddr) {
        self.kernel.set_foreign(address, look::FOREIGN_FOR);
        // It may have come into the table meanwhile, and been taken out of there.
        if self.table.load().pod(address).is_some() {
            self.kernel.forget_foreign(address);
        }
    }
}

/// Opens a TCP connection from within a namespace, from `source` if given.
async fn dial(
    netns: &Netns,
    source: Option<SocketAddr>,
    destination: SocketAddr,
    limit: Duration,
) -> io::Result<TcpStream> {
    let socket = socket(netns, source, destination)?;
    connect(socket, destination, limit).await
}

fn socket(
    netns: &Netns,
    source: Option<SocketAddr>,
    destination: SocketAddr,
) -> io::Result<TcpSocket> {
    let socket = netns.run(|| match destination {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    })??;
    socket.set_nodelay(true)?;
    if let Some(source) = source {
        socket.bind(source)?;
    }
    Ok(socket)
}

async fn connect(
    socket: TcpSocket,
    destination: SocketAddr,
    limit: Duration,
) -> io::Result<TcpStream> {
    match tokio::time::timeout(limit, socket.connect(destination)).await {
        Ok(result) => result,
        Err(_elapsed) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// The last hop: to the application, from loopback, by which `sk_lookup` knows the
/// agent, and with the real client shown to it. Takes the permission to do so.
async fn last_hop(
    proxy: &Proxy,
    _permitted: &Permitted,
    pod: &LocalPod,
    ends: &Ends,
    destination: SocketAddr,
    client: SocketAddr,
) -> io::Result<(TcpStream, ClientEntry)> {
    // Each from another address, so that ports in TIME_WAIT never run out. (IPv6 has
    // one loopback address only.)
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let source = match destination {
        SocketAddr::V4(_) => {
            let [_, b, c, d] = NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
            // 127.64.0.0/10: far from what applications use.
            SocketAddr::from(([127, 64 | b & 0x3f, c, d.max(1)], 0))
        }
        SocketAddr::V6(_) => SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, 0)),
    };
    let socket = socket(&pod.netns, Some(source), destination)?;
    // Before the connect: the application may look as soon as it accepts.
    let (netns, source) = (pod.netns.cookie, socket.local_addr()?);
    let entry = proxy
        .kernel
        .show_client(netns, source, client)
        .map_err(io::Error::other)?;
    let key = Key::Hop { netns, source };
    proxy.join.expect(ends, key);
    match connect(socket, destination, proxy.transport.connect_timeout.0).await {
        Ok(stream) => Ok((stream, entry)),
        Err(error) => {
            proxy.join.never_mind(ends, key);
            Err(error)
        }
    }
}

/// Closes with a reset, so that the peer cannot take it for an orderly end.
fn reset(stream: TcpStream) {
    let _best_effort = stream.set_zero_linger();
}
