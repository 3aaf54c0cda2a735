//! Looks for TCP connections of enrolled pods that no agent carries, because they are
//! older than the pod's place in the mesh: the hooks see new connections only. Each is
//! recorded once, and ended where `enforce.bypass` says so.
//!
//! Where the table does not hold the whole cluster, it is asked first who is at the other
//! end, and looked again.
//!
//! Fails open: what cannot be listed is not ended, and the agent says so.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use super::observe::tell::{NOT_HANDED_OVER, NOT_STEERED, in_mesh};
use crate::{
    audit::{Direction, Flow, FlowEvent, FlowProtocol, Record, Socket},
    config::Bypass,
    kernel::diag::{TcpSocket, destroy, tcp_connections, tcp_listeners},
    lifecycle::Watcher,
    proxy::{LocalPod, Proxy},
    workload::{Found, Table, Target},
};

/// Connections that were told, by cookie, and whether they were ended.
type Known = HashMap<u64, bool>;

const INTERVAL: Duration = Duration::from_secs(2);
/// Addresses that are asked about in one round, and how long an answer is good for.
const ASKS: usize = 16;
const ANSWERED: Duration = Duration::from_secs(60);
/// `include/net/tcp_states.h`.
const ESTABLISHED: u8 = 1;

/// Forgets sockets whose end nobody has seen.
pub async fn forget_missed(proxy: Arc<Proxy>, stop: Watcher) {
    const EVERY: Duration = Duration::from_secs(30);
    let mut tick = tokio::time::interval(EVERY);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = stop.triggered() => return,
        }
        let pods = proxy.pods.load_full();
        let own = pods.all.iter();
        let own = own.filter(|pod| !pod.workload.load().host_network);
        tokio::task::block_in_place(|| proxy.kernel.forget_missed(own.map(|pod| &*pod.netns)));
    }
}

pub async fn watch(proxy: Arc<Proxy>, enforce: Bypass, stop: Watcher) {
    let mut known: HashMap<u64, Known> = HashMap::new();
    let mut asked: HashMap<IpAddr, Instant> = HashMap::new();
    let mut tick = tokio::time::interval(INTERVAL);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = stop.triggered() => return,
        }
        // Where pods are in cgroup v1 only, the agent's sockets look like theirs.
        let configured = proxy.kernel.configured();
        if configured.agent_tgid == 0 || configured.pods_by_netns_only == 1 {
            continue;
        }
        // One that hands over has its sockets in a cgroup of its own.
        let agents = proxy.kernel.agent_cgroups();
        let pods = proxy.pods.load_full();
        known.retain(|serial, _| pods.all.iter().any(|pod| pod.serial == *serial));
        // It enters namespaces: not a thing for the runtime to wait on.
        let mut strangers = HashSet::new();
        tokio::task::block_in_place(|| {
            for pod in &pods.all {
                if !pod.workload.load().host_network {
                    let seen = known.entry(pod.serial).or_default();
                    strangers.extend(look(&proxy, pod, &agents, enforce, seen));
                }
            }
        });
        asked.retain(|_, at| at.elapsed() < ANSWERED);
        let Some(discover) = &proxy.discover else {
            continue;
        };
        strangers.retain(|address| !asked.contains_key(address));
        for address in strangers.into_iter().take(ASKS) {
            // What cannot be found out is asked again, and not told meanwhile.
            if !matches!(discover.ask(address).await, Found::Unknown(_)) {
                asked.insert(address, Instant::now());
            }
        }
    }
}

/// Tells, or ends, what bypasses the agent; returns addresses that may be in the mesh and
/// are not known.
fn look(
    proxy: &Proxy,
    pod: &LocalPod,
    agents: &HashSet<u64>,
    enforce: Bypass,
    seen: &mut Known,
) -> HashSet<IpAddr> {
    let mut strangers = HashSet::new();
    let listed = tcp_connections(&pod.netns).and_then(|s| Ok((s, tcp_listeners(&pod.netns)?)));
    let (sockets, listeners) = match listed {
        Ok(listed) => listed,
        Err(error) => {
            let pod = &pod.workload.load().name;
            tracing::warn!(pod, %error, "cannot list its sockets");
            return strangers;
        }
    };
    let table = proxy.table.load();
    let mut open = Known::new();
    for socket in sockets.iter().filter(|s| !agents.contains(&s.cgroup)) {
        let found = uncarried(&table, &listeners, socket);
        if is_foreign(socket)
            && !matches!(found, Some((Direction::Inbound, _)))
            && is_stranger(proxy, &table, socket)
        {
            strangers.insert(socket.remote.ip());
            continue;
        }
        let Some((direction, why)) = found else {
            continue;
        };
        let before = seen.get(&socket.cookie);
        let cut = enforce == Bypass::Cut
            && before != Some(&true)
            && match destroy(&pod.netns, socket) {
                Ok(()) => true,
                Err(error) => {
                    tracing::warn!(local = %socket.local, remote = %socket.remote, %error,
                        "cannot end a connection that bypasses the agent");
                    false
                }
            };
        open.insert(socket.cookie, cut);
        // Told once; one that could not be ended is tried again.
        if before.is_some() {
            continue;
        }
        let workload = pod.workload.load();
        let identity = pod.identity().clone();
        let mut flow = Flow::new(
            FlowEvent::Open,
            FlowProtocol::Tcp,
            Some(&workload),
            Some(identity),
        );
        flow.direction = direction;
        flow.local = Some(socket.local);
        flow.remote = Some(socket.remote);
        flow.socket = Some(Socket {
            cookie: socket.cookie,
            ..Socket::default()
        });
        flow.why = Some(why);
        flow.cut = Some(cut);
        proxy.audit.record(Record::Bypass(Box::new(flow)));
    }
    *seen = open;
    strangers
}

/// Whether the other end may be in the mesh, and nobody knows.
fn is_stranger(proxy: &Proxy, table: &Table, socket: &TcpSocket) -> bool {
    let Some(discover) = &proxy.discover else {
        return false;
    };
    match table.target(socket.remote) {
        Some(Target::Pod(_) | Target::HostPort(..)) => false,
        Some(Target::Service(port)) => !port.known,
        None => {
            let ranges = discover.ranges();
            ranges.iter().any(|r| r.contains(&socket.remote.ip()))
        }
    }
}

/// The kernel says which sockets are whose; without that nothing is known.
fn is_foreign(socket: &TcpSocket) -> bool {
    let (local, remote) = (socket.local, socket.remote);
    socket.state == ESTABLISHED
        && socket.cgroup != 0
        && !remote.ip().is_loopback()
        && remote.ip() != local.ip()
}

/// Whether a socket's connection should be carried and is not.
fn uncarried(
    table: &Table,
    listeners: &HashSet<u16>,
    socket: &TcpSocket,
) -> Option<(Direction, &'static str)> {
    let (local, remote) = (socket.local, socket.remote);
    if !is_foreign(socket) {
        return None;
    }
    // Who dialled is not kept: who comes to a port that is listened on did.
    if listeners.contains(&local.port()) {
        return Some((Direction::Inbound, NOT_HANDED_OVER));
    }
    in_mesh(table, remote, false).then_some((Direction::Outbound, NOT_STEERED))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::Mesh, workload::Table};

    #[test]
    fn only_what_should_be_carried_is_told() {
        let table = Table::build(&[], Mesh::Disabled);
        let socket = |local: &str, remote: &str| TcpSocket {
            local: local.parse().expect("an address"),
            remote: remote.parse().expect("an address"),
            state: ESTABLISHED,
            uid: 0,
            cookie: 1,
            cgroup: 7,
        };
        let listeners = HashSet::from([80, 50051]);
        let uncarried = |socket: &TcpSocket| super::uncarried(&table, &listeners, socket);
        for outside in ["203.0.113.9:443", "203.0.113.9:61616"] {
            assert_eq!(uncarried(&socket("10.0.1.2:40000", outside)), None);
        }
        let low = socket("10.0.1.2:50051", "203.0.113.9:40000");
        assert!(uncarried(&low).is_some());
        let inbound = socket("10.0.1.2:80", "203.0.113.9:40000");
        assert_eq!(
            uncarried(&inbound),
            Some((Direction::Inbound, NOT_HANDED_OVER))
        );
        for not in [
            socket("127.0.0.1:80", "127.0.0.1:40000"),
            socket("10.0.1.2:80", "10.0.1.2:40000"),
            TcpSocket {
                state: 6,
                ..inbound.clone()
            },
            TcpSocket {
                cgroup: 0,
                ..inbound.clone()
            },
        ] {
            assert_eq!(uncarried(&not), None, "{not:?}");
        }
    }
}
