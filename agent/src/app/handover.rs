//! What taking over and handing over mean for the parts of an agent, in their order. An
//! agent that has stepped back can be in charge again until the other one has taken.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, anyhow, bail};
use tokio::sync::{mpsc, oneshot};

use super::{State, enrol, observe};
use crate::{
    audit::{
        Handed, HandedOver,
        send::{self, Senders},
    },
    config::Config,
    handover::{
        self, Bound, Doorkeeper, HandoverError, Link, LinkEnd, Own, Request, Taken, Taking, Yielded,
    },
    proxy::{Identities, Proxy},
    workload::Table,
};

/// How long receivers of the audit log may take for what they are sending.
const SEND: Duration = Duration::from_secs(2);
/// How long a part may take to step back.
const STEP: Duration = Duration::from_secs(5);
/// How long the audit log may take to reach the disk, which others may keep busy. With what
/// goes before, it is within what the other agent waits (`FINISH`).
const LOG: Duration = Duration::from_secs(15);
/// How long certificates are waited for before the agent in charge is asked to step back.
const CERTIFICATES: Duration = Duration::from_secs(60);
/// How long it may take until all that is to be recorded is in another agent's hands.
const TOLD: Duration = Duration::from_secs(30);
/// How long stories wait for their sockets at the end; a little longer than they do.
const STORIES: Duration = Duration::from_secs(6);

/// Goes to the agent in charge, if there is one. Where it hands nothing over, this agent
/// starts as if it had not asked: the other one has to end first.
pub async fn begin(config: &Config, own: &Own) -> Option<Taking> {
    let (door, own) = (handover::door(&config.state), own.clone());
    let begun = tokio::task::spawn_blocking(move || handover::begin(&door, &own)).await;
    match begun {
        Ok(Ok(taking)) => taking,
        Ok(Err(error)) => {
            tracing::warn!(%error, "cannot take over; the agent that runs has to end first");
            None
        }
        Err(_panicked) => None,
    }
}

/// Has all that takes long before the agent in charge steps back: certificates of the
/// pods of this node.
pub async fn prepare(config: &Config, table: &Table, node: &str, identities: &Identities) {
    let own = table
        .workloads
        .iter()
        .filter(|w| w.node == node && w.enrolled);
    let wanted: Vec<_> = own
        .map(|w| (w.identity(&config.trust_domain), &w.uid))
        .collect();
    let until = Instant::now() + CERTIFICATES;
    loop {
        let missing = wanted
            .iter()
            .filter(|(id, uid)| !matches!(identities.get(id, uid), Ok(Some(_))))
            .count();
        if missing == 0 {
            return;
        }
        if Instant::now() > until {
            // Their pods are refused until they are there, as after any start.
            return tracing::error!(
                missing,
                "certificates are not there yet; taking over without"
            );
        }
        let round = identities.renew(SystemTime::now()).await;
        let next = round.next.min(Duration::from_millis(200));
        tokio::time::sleep(next).await;
    }
}

/// Has the agent in charge step back. `None`: it is gone, or did not.
pub async fn commit(taking: Taking) -> Option<Taken> {
    let program = taking.program.clone();
    let taken = tokio::task::spawn_blocking(move || taking.commit()).await;
    match taken {
        Ok(Ok(taken)) => {
            tracing::info!(program, sockets = taken.sockets.len(), "taking over");
            Some(taken)
        }
        Ok(Err(error)) => {
            tracing::warn!(%error, "the agent in charge did not step back");
            None
        }
        Err(_panicked) => None,
    }
}

/// What is left to do once the maps say all that they should.
pub struct Last {
    /// `None`: nobody was in charge.
    pub taken: Option<Taken>,
    pub own: Own,
    pub requests: mpsc::Sender<Request>,
    /// Open as long as this agent is in charge.
    pub doorkeeper: Arc<Mutex<Option<Doorkeeper>>>,
    /// This agent cannot be in charge.
    pub failed: mpsc::Sender<anyhow::Error>,
}

impl Last {
    /// Puts this agent in charge. Not for the runtime's threads to wait on.
    pub fn step(self, state: &State) -> Result<()> {
        let proxy = &state.proxy;
        if let Err(error) = proxy.kernel.commit() {
            match self.taken {
                // It goes on where this one ends.
                Some(_) => return Err(error).context("hooks"),
                None => tracing::error!(%error, "an earlier agent's hooks stay beside this one's"),
            }
        }
        if let Some(taken) = self.taken.as_ref().filter(|t| t.shape != self.own.shape) {
            match taken.dials() {
                Ok(dials) => proxy.kernel.add_dials(&dials),
                Err(HandoverError::TooLate) => bail!(HandoverError::TooLate),
                Err(error) => tracing::warn!(%error, "what was just dialled is refused"),
            }
        }
        let door = Doorkeeper::open(
            &state.config.state,
            self.own,
            proxy.kernel.clone(),
            proxy.audit.clone(),
            proxy.elders.clone(),
            self.requests,
        );
        match door {
            Ok(door) => {
                let mut keeper = self.doorkeeper.lock().expect("no panic while it is held");
                *keeper = Some(door);
            }
            // Upgrades are for agents that end first, then.
            Err(error) => tracing::error!(%error, "no other agent can take over from this one"),
        }
        if let Some(taken) = self.taken {
            proxy.kernel.forget_kept();
            taken.finish()?;
        }
        proxy.kernel.remove_other_maps();
        proxy.accepting.send_replace(true);
        proxy.kernel.keep();
        Ok(())
    }
}

/// What an agent lets go of, and may get back.
pub struct Stage {
    pub state: Arc<State>,
    pub senders: Option<Senders>,
    pub enrol: mpsc::Sender<enrol::Command>,
    pub observer: Option<mpsc::Sender<observe::Command>>,
    /// Of the agent itself.
    pub sockets: Vec<(Bound, OwnedFd)>,
    pub over: Option<HandedOver>,
}

impl Stage {
    fn proxy(&self) -> &Arc<Proxy> {
        &self.state.proxy
    }

    /// Does what other agents ask. Returns when one is in charge, or when `stop` says so
    /// while none is just about to be.
    pub async fn serve(
        &mut self,
        requests: &mut mpsc::Receiver<Request>,
        stop: impl Future<Output = ()>,
    ) -> Served {
        tokio::pin!(stop);
        let mut stopped = false;
        let mut stepped_back = false;
        loop {
            let request = tokio::select! {
                request = requests.recv() => request,
                () = &mut stop, if !stopped => {
                    stopped = true;
                    None
                }
            };
            match request {
                Some(Request::Yield(reply)) => match self.step_back().await {
                    Ok(yielded) => {
                        stepped_back = true;
                        let _it_is_gone = reply.send(Ok(yielded));
                    }
                    Err(error) => {
                        tracing::error!(error = format!("{error:#}"), "cannot hand over");
                        let _it_is_gone = reply.send(Err(format!("{error:#}")));
                        self.be_in_charge().await;
                    }
                },
                Some(Request::Took) => return Served::HandedOver,
                Some(Request::Back) => {
                    self.be_in_charge().await;
                    stepped_back = false;
                }
                None => {}
            }
            if stopped && !stepped_back {
                return Served::Stopped;
            }
        }
    }

    /// Lets go of everything, one by one. Connections are accepted to the last.
    async fn step_back(&mut self) -> Result<Yielded> {
        // Receivers of the log go on where they are: what they did not get, the next agent
        // sends.
        if let Some(senders) = self.senders.take() {
            senders.finish(SEND).await;
        }
        let (reply, answer) = oneshot::channel();
        self.enrol
            .send(enrol::Command::Pause(reply))
            .await
            .map_err(|_| anyhow!("enrolment has ended"))?;
        let paused = tokio::time::timeout(STEP, answer).await;
        let mut sockets = paused.context("enrolment")??.context("listeners")?;
        for (bound, fd) in &self.sockets {
            sockets.push((*bound, fd.try_clone()?));
        }
        if let Some(observer) = &self.observer {
            let (done, is_done) = oneshot::channel();
            // One that has ended tells nothing more.
            if observer.send(observe::Command::Pause(done)).await.is_ok() {
                let paused = tokio::time::timeout(STEP, is_done).await;
                let _ended = paused.context("kernel events")?;
            }
        }
        let lock = self.proxy().kernel.lend_lock().context("the lock")?;
        let audit = self.proxy().audit.clone();
        let over = tokio::task::spawn_blocking(move || audit.hand_over(LOG)).await?;
        self.over = over.context("audit")?;
        let tell = self.over.as_ref().map(|over| over.tell.clone());
        let keys = self.proxy().join.set_other(tell);
        self.proxy().accepting.send_replace(false);
        let (left, _) = self.proxy().audit.counts_since();
        Ok(Yielded {
            sockets,
            keys,
            lock,
            left,
        })
    }

    /// Takes everything back that was let go of.
    async fn be_in_charge(&mut self) {
        let proxy = self.proxy().clone();
        proxy.join.set_other(None);
        if let Some(over) = self.over.take() {
            let audit = proxy.audit.clone();
            let back = tokio::task::spawn_blocking(move || audit.take_back(over, LOG)).await;
            if let Ok(Err(error)) = back {
                tracing::error!(%error, "the audit log is not this agent's again yet");
            }
        }
        if let Some(observer) = &self.observer {
            let _ended = observer.send(observe::Command::Resume).await;
        }
        let _ended = self.enrol.send(enrol::Command::Resume).await;
        if self.senders.is_none() && self.state.config.audit.enabled {
            let config = &self.state.config;
            let log = config.audit.directory(&config.state);
            match send::start(config, &log, proxy.audit.node()) {
                Ok(senders) => self.senders = Some(senders),
                Err(error) => {
                    tracing::error!(%error, "the audit log is sent after the next start");
                }
            }
        }
        proxy.accepting.send_replace(true);
    }
}

/// How serving others ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    Stopped,
    HandedOver,
}

/// What an agent says to the one in charge while it drains, and after.
pub struct Farewell {
    link: Link,
    proxy: Arc<Proxy>,
}

impl Farewell {
    pub fn begin(
        proxy: &Arc<Proxy>,
        own: Own,
        config: &Config,
        over: Option<HandedOver>,
    ) -> Result<Self> {
        proxy.kernel.set_lock(None);
        let handed = match over {
            Some(over) => over.handed,
            None => mpsc::channel::<Handed>(1).1,
        };
        let (audit, join) = (proxy.audit.clone(), proxy.join.clone());
        let link = Link::start(&config.state, own, audit, join, handed);
        Ok(Self {
            link: link.context("a thread")?,
            proxy: proxy.clone(),
        })
    }

    /// Waits for the sockets of the last connections, which the agent in charge sees.
    pub async fn stories(&self) {
        let until = Instant::now() + STORIES;
        while self.proxy.join.waits() > 0 && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until all is said. To be called when the audit log's writer has ended.
    pub async fn told(&mut self) {
        self.proxy.join.set_other(None);
        if !self.link.told(TOLD).await {
            tracing::warn!("not all that was to be recorded reached the agent in charge");
        }
    }

    /// Stays until told to stop: who started this agent would start it again, and it would
    /// take over from its successor. Without a successor it ends, to be started again.
    pub async fn linger(mut self, stop: impl Future<Output = ()>) {
        tokio::select! {
            () = stop => {}
            LinkEnd::Orphaned = self.link.end() => {
                tracing::error!("nobody is in charge of this node any more; ending, to be started again");
            }
        }
    }
}
