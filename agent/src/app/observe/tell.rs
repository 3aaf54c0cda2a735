//! What becomes of a kernel event: part of a connection's story, a record of its own,
//! or nothing, where a pod talks to itself.

use std::{
    collections::VecDeque,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use crate::{
    audit::{
        Direction, Exec, Flow, FlowEvent, FlowProtocol, Key, Process, ProcessEvent, Record, Seen,
        Socket,
    },
    kernel::{Event, EventKind, Role, SocketLife, Task, errno_name, monotonic},
    proxy::{LocalPod, Proxy},
    workload::{Table, Target},
};

/// How long a steered socket's end waits for the agent to accept the connection that it
/// was of: an application may dial and leave at once.
pub const EARLY: Duration = Duration::from_secs(5);
/// Ends that wait so at once.
const MOST: usize = 16_384;

/// What the kernel saw of a connection and no agent carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Beside {
    /// It never left the pod.
    Within,
    /// None of the agent's business.
    Outside,
    /// The agent should have carried it.
    Bypass(&'static str),
}

pub const NOT_STEERED: &str =
    "it was opened before its pod was in the mesh, or while the agent did not know the pod";
pub const NOT_HANDED_OVER: &str = "the application took it itself: it is older than its pod's \
     place in the mesh";
const UDP: &str = "UDP is not carried";
const RAW: &str = "a raw socket: what it sends is of the application's own making";

pub struct Teller {
    proxy: Arc<Proxy>,
    /// Steered sockets that ended before their connection was known.
    early: VecDeque<(Instant, Arc<LocalPod>, u64, SocketLife)>,
}

impl Teller {
    pub fn new(proxy: Arc<Proxy>) -> Self {
        Self {
            proxy,
            early: VecDeque::new(),
        }
    }

    pub fn tell(&mut self, event: Event) {
        let pods = self.proxy.pods.load();
        let pod = (pods.in_netns(event.netns)).or_else(|| pods.in_cgroup(event.cgroup));
        let pod = pod.cloned();
        drop(pods);
        if let EventKind::Failed {
            cookie,
            remote,
            task,
            errno,
        } = &event.kind
        {
            // Also of a pod that is not known yet: it was refused for that.
            return self.failed(pod.as_deref(), *cookie, *remote, task, *errno);
        }
        // A pod that has left since: nobody to attribute it to.
        let Some(pod) = pod else { return };
        let (at, netns) = (event.at, event.netns);
        match event.kind {
            EventKind::Closed(life) => self.closed(&pod, netns, at, life),
            EventKind::Failed { .. } => {}
            EventKind::Listen {
                cookie,
                local,
                task,
            } => {
                let mut flow = self.flow(&pod, FlowEvent::Listen, FlowProtocol::Tcp);
                flow.direction = Direction::Inbound;
                flow.local = Some(local);
                flow.process = task.as_ref().map(|task| self.process(task));
                flow.socket = Some(of_cookie(cookie));
                self.record(Record::Flow(Box::new(flow)));
            }
            EventKind::Datagram {
                cookie,
                local,
                remote,
                task,
            } => {
                let mut flow = self.flow(&pod, FlowEvent::First, FlowProtocol::Udp);
                flow.local = Some(local);
                flow.remote = Some(remote);
                flow.process = Some(self.process(&task));
                flow.socket = Some(of_cookie(cookie));
                flow.why = in_mesh(&self.proxy.table.load(), remote, true).then_some(UDP);
                self.told(flow);
            }
            EventKind::Raw {
                cookie,
                packet,
                protocol: number,
                task,
            } => {
                let protocol = match packet {
                    true => FlowProtocol::Packet,
                    false => FlowProtocol::Raw,
                };
                let mut flow = self.flow(&pod, FlowEvent::First, protocol);
                flow.process = Some(self.process(&task));
                flow.socket = Some(of_cookie(cookie));
                flow.protocol_number = Some(number);
                flow.why = Some(RAW);
                self.told(flow);
            }
            EventKind::Exec {
                task,
                parent,
                path,
                argv,
                ..
            } => {
                let dirs: Arc<Vec<PathBuf>> = pod.cgroups.load_full();
                let process = self.proxy.processes.exec(Exec {
                    pid: task.pid,
                    uid: task.uid,
                    comm: &task.comm,
                    path: &path,
                    argv: &argv,
                    parent,
                    cgroup: (self.proxy.processes).cgroup(task.cgroup, task.pid, &dirs),
                });
                self.record(Record::Process(Box::new(of_process(&pod, "exec", process))));
            }
            EventKind::Exit { task, code, signal } => {
                let known = self.proxy.processes.exit(task.pid);
                let process = known.unwrap_or_else(|| {
                    Arc::new(Process {
                        pid: task.pid,
                        uid: task.uid,
                        comm: task.comm,
                        ..Process::default()
                    })
                });
                let mut event = of_process(&pod, "exit", process);
                event.code = Some(code);
                event.signal = (signal != 0).then_some(signal);
                self.record(Record::Process(Box::new(event)));
            }
        }
    }

    /// Looks again for the connections of sockets that ended early.
    pub fn retry(&mut self, now: Instant) {
        for (until, pod, at, life) in std::mem::take(&mut self.early) {
            if self.joined(pod.netns.cookie, &life) {
                continue;
            }
            match until <= now {
                true => self.beside(&pod, at, &life),
                false => self.early.push_back((until, pod, at, life)),
            }
        }
    }

    fn closed(&mut self, pod: &Arc<LocalPod>, netns: u64, at: u64, life: SocketLife) {
        if self.joined(netns, &life) {
            return;
        }
        // An agent that drains may say a moment later that its last hop is one.
        let elders = life.remote.ip().is_loopback() && self.proxy.elders.any();
        if (life.dialled.is_some() || elders) && self.early.len() < MOST {
            let until = Instant::now() + EARLY;
            self.early.push_back((until, pod.clone(), at, life));
        } else {
            self.beside(pod, at, &life);
        }
    }

    /// Whether it is a socket of a connection that the agent carries.
    fn joined(&self, netns: u64, life: &SocketLife) -> bool {
        let key = match life.role {
            Role::Dialled => Key::Dialled(life.cookie),
            Role::Accepted => Key::Hop {
                netns,
                source: life.remote,
            },
        };
        let seen = || Seen {
            socket: of_life(life),
            process: life.task.as_ref().map(|task| self.process(task)),
        };
        self.proxy.join.socket(key, seen) || self.proxy.elders.socket(key, seen)
    }

    /// A connection that the agent did not carry.
    fn beside(&self, pod: &LocalPod, at: u64, life: &SocketLife) {
        let host = pod.workload.load().host_network;
        let why = match beside(&self.proxy.table.load(), host, life) {
            Beside::Within => return,
            Beside::Outside => None,
            Beside::Bypass(why) => Some(why),
        };
        let event = match life.established {
            true => FlowEvent::Closed,
            false => FlowEvent::Failed,
        };
        let mut flow = self.flow(pod, event, FlowProtocol::Tcp);
        flow.direction = match life.role {
            Role::Dialled => Direction::Outbound,
            Role::Accepted => Direction::Inbound,
        };
        flow.local = Some(life.local);
        flow.remote = Some(life.remote);
        flow.dialled = life.dialled;
        flow.process = life.task.as_ref().map(|task| self.process(task));
        flow.socket = Some(of_life(life));
        if life.opened != 0 {
            flow.started = Some(wall(life.opened));
            flow.duration_ms = Some(at.saturating_sub(life.opened) / 1_000_000);
        }
        flow.why = why;
        self.told(flow);
    }

    /// A connect that failed before anything was sent.
    fn failed(
        &self,
        pod: Option<&LocalPod>,
        cookie: u64,
        remote: SocketAddr,
        task: &Task,
        errno: u32,
    ) {
        let workload = pod.map(|pod| pod.workload.load_full());
        let identity = pod.map(|pod| pod.identity().clone());
        let (event, protocol) = (FlowEvent::Failed, FlowProtocol::Tcp);
        let mut flow = Flow::new(event, protocol, workload.as_deref(), identity);
        flow.remote = Some(remote);
        flow.process = Some(self.process(task));
        flow.socket = Some(Socket {
            cookie,
            errno: Some(errno_name(errno)),
            ..Socket::default()
        });
        self.record(Record::Flow(Box::new(flow)));
    }

    fn flow(&self, pod: &LocalPod, event: FlowEvent, protocol: FlowProtocol) -> Flow {
        let workload = pod.workload.load();
        let identity = pod.identity().clone();
        Flow::new(event, protocol, Some(&workload), Some(identity))
    }

    fn told(&self, mut flow: Flow) {
        let record = match flow.why {
            Some(_) => {
                flow.cut = Some(false);
                Record::Bypass(Box::new(flow))
            }
            None => Record::Flow(Box::new(flow)),
        };
        self.record(record);
    }

    fn record(&self, record: Record) {
        self.proxy.audit.record(record);
    }

    fn process(&self, task: &Task) -> Arc<Process> {
        self.proxy.processes.of(task.pid, task.uid, &task.comm)
    }
}

fn of_process(pod: &LocalPod, event: &'static str, process: Arc<Process>) -> ProcessEvent {
    let workload = pod.workload.load();
    ProcessEvent {
        event,
        pod: workload.name.clone(),
        namespace: workload.namespace.clone(),
        workload: workload.owner.clone(),
        process,
        code: None,
        signal: None,
    }
}

fn of_cookie(cookie: u64) -> Socket {
    Socket {
        cookie,
        ..Socket::default()
    }
}

fn of_life(life: &SocketLife) -> Socket {
    Socket {
        cookie: life.cookie,
        sent: life.sent,
        received: life.received,
        retransmits: life.retransmits,
        srtt_us: life.srtt_us,
        errno: (life.errno != 0).then(|| errno_name(life.errno)),
    }
}

/// The time of a kernel's clock reading.
fn wall(at: u64) -> SystemTime {
    let ago = Duration::from_nanos(monotonic().saturating_sub(at));
    SystemTime::now()
        .checked_sub(ago)
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

fn beside(table: &Table, host_network: bool, life: &SocketLife) -> Beside {
    if life.dialled.is_some() {
        // Steered, and no agent took it: it was refused, or ended with its agent.
        return Beside::Outside;
    }
    if life.remote.ip().is_loopback() || life.remote.ip() == life.local.ip() {
        return Beside::Within;
    }
    match life.role {
        // Inbound connections to the node's own addresses are not captured.
        Role::Accepted if host_network => Beside::Outside,
        Role::Accepted => Beside::Bypass(NOT_HANDED_OVER),
        Role::Dialled if in_mesh(table, life.remote, false) => Beside::Bypass(NOT_STEERED),
        Role::Dialled => Beside::Outside,
    }
}

/// Whether what is dialled is to be carried, as far as is known: what only may be in the
/// mesh, because nobody has looked behind a service yet, is none of what went around it.
/// `any_port`: of a service, too.
pub fn in_mesh(table: &Table, address: SocketAddr, any_port: bool) -> bool {
    match table.target(address) {
        Some(Target::Pod(workload) | Target::HostPort(workload, _)) => workload.in_mesh(),
        Some(Target::Service(port)) => port.known && port.in_mesh,
        None if any_port => service_in_mesh(table, address.ip()),
        None => false,
    }
}

fn service_in_mesh(table: &Table, ip: IpAddr) -> bool {
    let mut services = table.services();
    services.any(|(address, port)| address.ip() == ip && port.known && port.in_mesh)
}
