//! A connection's story: gathered while it runs, told once at its end, to the
//! audit log and to the metrics.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Instant, SystemTime},
};

use postern_ebpf::Dial;

use super::{
    Proxy,
    splice::{Broken, Counters},
};
use crate::{
    audit::{Connection, Peer, Process, Record, Reporter, Transport, Verdict},
    identity::{Session, SpiffeId},
    kernel::text,
    policy::{Denial, PolicyRef},
    telemetry::ConnectionLabels,
    workload::{NamespacedName, Workload},
};

pub struct Story {
    proxy: Arc<Proxy>,
    began: Instant,
    started: SystemTime,
    pub reporter: Reporter,
    pub transport: Transport,
    pub process: Option<Process>,
    pub source: Party,
    pub destination: Party,
    pub dialled: SocketAddr,
    pub service: Option<NamespacedName>,
    /// Of the destination's side: what its requests' records name it by.
    pub id: u64,
    /// What was read of it.
    pub protocol: Option<&'static str>,
    pub verdict: Verdict,
    pub policy: Option<PolicyRef>,
    /// Policies without effect that had something to say.
    pub told: Vec<PolicyRef>,
    pub tls: Option<Session>,
    pub counters: Arc<Counters>,
    /// Whether `opened` was counted, so that `closed` is.
    open: Option<ConnectionLabels>,
}

/// One end, as far as it is known.
#[derive(Clone, Default)]
pub struct Party {
    pub address: Option<SocketAddr>,
    pub identity: Option<SpiffeId>,
    pub workload: Option<Arc<Workload>>,
}

impl Party {
    pub fn peer(&self) -> Peer {
        let workload = self.workload.as_deref();
        match self.address {
            Some(address) => Peer::new(address, self.identity.clone(), workload),
            None => Peer {
                identity: self.identity.clone(),
                ..Peer::default()
            },
        }
    }
}

/// How a connection ended.
pub enum Ending {
    /// Both sides closed in order.
    Closed,
    Broken(Broken),
    /// By policy, before or while it ran.
    Denied(Denial),
    /// The other agent refused it.
    Refused(String),
    /// It never came about.
    Failed(String),
    /// The agent shut down.
    Drained,
}

impl Story {
    pub fn new(
        proxy: &Arc<Proxy>,
        reporter: Reporter,
        transport: Transport,
        source: SocketAddr,
        dialled: SocketAddr,
    ) -> Self {
        Self {
            proxy: proxy.clone(),
            began: Instant::now(),
            started: SystemTime::now(),
            reporter,
            transport,
            process: None,
            source: Party {
                address: Some(source),
                ..Party::default()
            },
            destination: Party {
                address: Some(dialled),
                ..Party::default()
            },
            dialled,
            service: None,
            id: 0,
            protocol: None,
            verdict: Verdict::Failed,
            policy: None,
            told: Vec::new(),
            tls: None,
            counters: Arc::default(),
            open: None,
        }
    }

    pub fn proxy(&self) -> &Arc<Proxy> {
        &self.proxy
    }

    /// The connection stands: it is allowed and both ends are there.
    pub fn opened(&mut self, by: Option<&PolicyRef>) {
        self.verdict = Verdict::Allow;
        self.policy = by.cloned();
        let labels = self.labels(self.reporter, false);
        if self.transport == Transport::Local {
            let other = self.labels(Reporter::Destination, false);
            self.proxy.metrics.opened.get_or_create(&other).inc();
        }
        self.proxy.metrics.opened.get_or_create(&labels).inc();
        self.open = Some(labels);
    }

    pub fn finish(mut self, ending: Ending) {
        let end = match ending {
            Ending::Closed => "closed".to_owned(),
            Ending::Drained => "ended by the agent's shutdown".to_owned(),
            Ending::Broken(broken) => broken.to_string(),
            Ending::Failed(why) => why,
            Ending::Refused(why) => {
                self.verdict = Verdict::Deny;
                why
            }
            Ending::Denied(denial) => {
                self.verdict = Verdict::Deny;
                self.policy = Some(denial.policy().clone());
                denial.to_string()
            }
        };
        let bytes = self.counters.get();
        let metrics = &self.proxy.metrics;
        match self.open.take() {
            Some(labels) => {
                let both = (self.transport == Transport::Local)
                    .then(|| self.labels(Reporter::Destination, false));
                for labels in both.iter().chain([&labels]) {
                    metrics.closed.get_or_create(labels).inc();
                    metrics.received.get_or_create(labels).inc_by(bytes.sent);
                    metrics.sent.get_or_create(labels).inc_by(bytes.received);
                }
            }
            // Istio counts a refused connection as opened and closed, with a flag.
            None if self.verdict == Verdict::Deny => {
                let labels = self.labels(self.reporter, true);
                metrics.opened.get_or_create(&labels).inc();
                metrics.closed.get_or_create(&labels).inc();
            }
            None => {}
        }
        tracing::debug!(
            transport = ?self.transport, verdict = ?self.verdict, dialled = %self.dialled, end,
            "connection ended"
        );
        self.proxy
            .audit
            .record(Record::Connection(Box::new(Connection {
                id: self.id,
                protocol: self.protocol,
                reporter: self.reporter,
                transport: self.transport,
                started: self.started,
                duration_ms: self.began.elapsed().as_millis() as u64,
                process: self.process,
                source: self.source.peer(),
                destination: self.destination.peer(),
                dialled: self.dialled,
                service: self.service.map(|s| format!("{}/{}", s.namespace, s.name)),
                verdict: self.verdict,
                policy: self.policy,
                told: self.told,
                tls: self.tls,
                bytes,
                end,
            })));
    }

    fn labels(&self, reporter: Reporter, denied: bool) -> ConnectionLabels {
        let party = |p: &Party| (p.workload.clone(), p.identity.clone());
        let (source, destination) = (party(&self.source), party(&self.destination));
        ConnectionLabels::new(
            reporter,
            (source.0.as_deref(), source.1.as_ref()),
            (destination.0.as_deref(), destination.1.as_ref()),
            self.service.as_ref(),
            matches!(self.transport, Transport::Hbone | Transport::Local),
            denied,
        )
    }
}

/// Who called `connect`, as the kernel noted it and `/proc` still tells.
pub fn process(dial: &Dial) -> Process {
    let proc = |what: &str| format!("/proc/{}/{what}", dial.tgid);
    let exe = std::fs::read_link(proc("exe")).ok();
    let cgroups = std::fs::read_to_string(proc("cgroup")).unwrap_or_default();
    Process {
        pid: dial.tgid,
        uid: dial.uid,
        comm: text(&dial.comm),
        exe: exe.map(|path| path.to_string_lossy().into_owned()),
        // The v2 line begins with "0::" (cgroups(7)).
        cgroup: cgroups
            .lines()
            .find_map(|l| l.strip_prefix("0::"))
            .map(str::to_owned),
    }
}
