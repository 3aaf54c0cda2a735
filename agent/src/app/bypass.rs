//! Looks for TCP connections of enrolled pods that no agent carries, because they are
//! older than the pod's place in the mesh: the hooks see new connections only. Each is
//! recorded once, and ended where `enforce.bypass` says so.
//!
//! Fails open: what cannot be listed is not ended, and the agent says so.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use super::observe::tell::{NOT_HANDED_OVER, NOT_STEERED, in_mesh};
use crate::{
    audit::{Direction, Flow, FlowEvent, FlowProtocol, Record, Socket},
    config::Bypass,
    kernel::diag::{TcpSocket, destroy, tcp_sockets},
    lifecycle::Watcher,
    proxy::{LocalPod, Proxy},
    workload::Table,
};

const INTERVAL: Duration = Duration::from_secs(2);
/// `include/net/tcp_states.h`.
const ESTABLISHED: u8 = 1;

pub async fn watch(proxy: Arc<Proxy>, agent_cgroup: u64, enforce: Bypass, mut stop: Watcher) {
    let mut known: HashMap<u64, HashSet<u64>> = HashMap::new();
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
        let pods = proxy.pods.load_full();
        known.retain(|serial, _| pods.all.iter().any(|pod| pod.serial == *serial));
        // It enters namespaces: not a thing for the runtime to wait on.
        tokio::task::block_in_place(|| {
            for pod in &pods.all {
                if !pod.workload.load().host_network {
                    let seen = known.entry(pod.serial).or_default();
                    look(&proxy, pod, agent_cgroup, enforce, seen);
                }
            }
        });
    }
}

fn look(
    proxy: &Proxy,
    pod: &LocalPod,
    agent_cgroup: u64,
    enforce: Bypass,
    seen: &mut HashSet<u64>,
) {
    let sockets = match tcp_sockets(&pod.netns) {
        Ok(sockets) => sockets,
        Err(error) => {
            let pod = &pod.workload.load().name;
            return tracing::warn!(pod, %error, "cannot list its sockets");
        }
    };
    let table = proxy.table.load();
    let mut open = HashSet::new();
    for socket in sockets.iter().filter(|s| s.cgroup != agent_cgroup) {
        let Some((direction, why)) = uncarried(&table, socket) else {
            continue;
        };
        open.insert(socket.cookie);
        if seen.contains(&socket.cookie) {
            continue;
        }
        let cut = enforce == Bypass::Cut
            && match destroy(&pod.netns, socket) {
                Ok(()) => true,
                Err(error) => {
                    tracing::warn!(local = %socket.local, remote = %socket.remote, %error,
                        "cannot end a connection that bypasses the agent");
                    false
                }
            };
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
}

/// Whether a socket's connection should be carried and is not.
fn uncarried(table: &Table, socket: &TcpSocket) -> Option<(Direction, &'static str)> {
    let (local, remote) = (socket.local, socket.remote);
    // The kernel says which sockets are whose; without that nothing is known.
    let foreign = socket.state == ESTABLISHED
        && socket.cgroup != 0
        && !remote.ip().is_loopback()
        && remote.ip() != local.ip();
    if !foreign {
        return None;
    }
    // Who dialled is not kept; a server's port is the lower one, as a rule.
    let dialled = local.port() > remote.port();
    match dialled {
        true if in_mesh(table, remote, false) => Some((Direction::Outbound, NOT_STEERED)),
        true => None,
        false => Some((Direction::Inbound, NOT_HANDED_OVER)),
    }
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
        let outside = socket("10.0.1.2:40000", "203.0.113.9:443");
        assert_eq!(uncarried(&table, &outside), None);
        let inbound = socket("10.0.1.2:80", "203.0.113.9:40000");
        assert_eq!(
            uncarried(&table, &inbound),
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
            assert_eq!(uncarried(&table, &not), None, "{not:?}");
        }
    }
}
