//! A connection's story: gathered while it runs, told once at its end, to the
//! audit log and to the metrics.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard},
    time::{Instant, SystemTime},
};

use super::{
    Proxy,
    splice::{Broken, Counters, Side},
};
use crate::{
    audit::{
        Connection, Ends, Fault, Peer, Process, Reporter, RequestRecord, Requests, Transport,
        Verdict,
    },
    identity::{Session, SpiffeId},
    policy::{Denial, PolicyRef},
    telemetry::{ConnectionLabels, Counted},
    workload::{NamespacedName, Workload},
};

pub struct Story {
    proxy: Arc<Proxy>,
    began: Instant,
    started: SystemTime,
    pub reporter: Reporter,
    pub transport: Transport,
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
    pub tls: Option<Arc<Session>>,
    pub counters: Arc<Counters>,
    /// Its applications' sockets, which the kernel tells of.
    pub ends: Ends,
    pub requests: Told,
    /// What it is counted by, once it was `opened`: it is counted as closed by the same.
    open: Vec<Counted>,
    /// It is told.
    ended: bool,
}

/// Also one whose task came to no end of its own.
impl Drop for Story {
    fn drop(&mut self) {
        if !self.ended {
            let why = "its task in the agent ended before it";
            self.end(Ending::Failed(Fault::Agent, why.into()));
        }
    }
}

/// One end, as far as it is known.
#[derive(Clone, Default)]
pub struct Party {
    pub address: Option<SocketAddr>,
    pub identity: Option<SpiffeId>,
    pub workload: Option<Arc<Workload>>,
    pub process: Option<Arc<Process>>,
}

/// Requests that were told, gathered for the record of their connection. Most have none.
#[derive(Clone, Default)]
pub struct Told(Arc<Mutex<Option<Box<Requests>>>>);

impl Told {
    pub fn add(&self, record: &RequestRecord) {
        self.lock().get_or_insert_default().add(record);
    }

    fn take(&self) -> Requests {
        *self.lock().take().unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Box<Requests>>> {
        self.0.lock().expect("no panic while it is held")
    }
}

impl Party {
    pub fn peer(&self) -> Peer {
        let workload = self.workload.as_deref();
        let peer = match self.address {
            Some(address) => Peer::new(address, self.identity.clone(), workload),
            None => Peer {
                identity: self.identity.clone(),
                ..Peer::default()
            },
        };
        Peer {
            process: self.process.clone(),
            ..peer
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
    /// The other agent refused it, or this one for what it is.
    Refused(Fault, String),
    /// It never came about, or went wrong.
    Failed(Fault, String),
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
        proxy.audit.opened();
        Self {
            proxy: proxy.clone(),
            began: Instant::now(),
            started: SystemTime::now(),
            reporter,
            transport,
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
            ends: Ends::default(),
            requests: Told::default(),
            open: Vec::new(),
            ended: false,
        }
    }

    pub fn proxy(&self) -> &Arc<Proxy> {
        &self.proxy
    }

    /// The connection stands: it is allowed and both ends are there.
    pub fn opened(&mut self, by: Option<&PolicyRef>) {
        self.verdict = Verdict::Allow;
        self.policy = by.cloned();
        let both = [self.reporter, Reporter::Destination];
        let sides = match self.transport {
            Transport::Local => &both[..],
            _ => &both[..1],
        };
        let counted = |&reporter: &_| {
            let counted = self.proxy.metrics.connection(&self.labels(reporter, false));
            counted.opened.inc();
            counted
        };
        self.open = sides.iter().map(counted).collect();
    }

    pub fn finish(mut self, ending: Ending) {
        self.end(ending);
    }

    fn end(&mut self, ending: Ending) {
        self.ended = true;
        let (fault, end) = match ending {
            Ending::Closed => (Fault::None, "closed".to_owned()),
            Ending::Drained => (Fault::Agent, "ended by the agent's shutdown".to_owned()),
            Ending::Broken(broken) => {
                let fault = match broken.side {
                    Side::Source => Fault::Source,
                    Side::Destination => Fault::Destination,
                };
                (fault, broken.to_string())
            }
            Ending::Failed(fault, why) => (fault, why),
            Ending::Refused(fault, why) => {
                self.verdict = Verdict::Deny;
                (fault, why)
            }
            Ending::Denied(denial) => {
                self.verdict = Verdict::Deny;
                self.policy = Some(denial.policy().clone());
                (Fault::Policy, denial.to_string())
            }
        };
        let bytes = self.counters.get();
        for counted in &self.open {
            counted.closed.inc();
            counted.received.inc_by(bytes.sent);
            counted.sent.inc_by(bytes.received);
        }
        // Istio counts a refused connection as opened and closed, with a flag.
        if self.open.is_empty() && self.verdict == Verdict::Deny {
            let counted = self
                .proxy
                .metrics
                .connection(&self.labels(self.reporter, true));
            counted.opened.inc();
            counted.closed.inc();
        }
        tracing::debug!(
            transport = ?self.transport, verdict = ?self.verdict, dialled = %self.dialled, end,
            "connection ended"
        );
        self.proxy.join.ended(
            &self.ends,
            Connection {
                id: self.id,
                protocol: self.protocol,
                reporter: self.reporter,
                transport: self.transport,
                started: self.started,
                duration_ms: self.began.elapsed().as_millis() as u64,
                source: self.source.peer(),
                destination: self.destination.peer(),
                dialled: self.dialled,
                service: self
                    .service
                    .take()
                    .map(|s| format!("{}/{}", s.namespace, s.name)),
                verdict: self.verdict,
                policy: self.policy.take(),
                told: std::mem::take(&mut self.told),
                tls: self.tls.take(),
                bytes,
                requests: self.requests.take(),
                end,
                fault,
            },
        );
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
