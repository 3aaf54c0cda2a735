//! The agent in charge answers who comes: one that takes over, or one that has handed over
//! to it and still drains.

use std::{
    fs::File,
    io,
    os::fd::{BorrowedFd, OwnedFd},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::sync::{mpsc, oneshot};

use super::{
    Bound, Elders, FINISH, Hello, Own, PATIENCE, PREPARE, PROTOCOL, Purpose, ToNew, ToOld, Waiting,
    door, link,
    links::Links,
    wire::{Channel, Door},
};
use crate::{
    audit::{Audit, Key},
    kernel::{AgentProcess, Kernel},
};

/// Conversations at once.
const MOST: usize = 64;
/// Sockets, keys and dials of one message.
const SOCKETS: usize = 200;
const KEYS: usize = 800;
const DIALS: usize = 200;

/// How long those that drain may be answered before this agent goes on without them.
const DISMISS: Duration = Duration::from_secs(1);

const NO_FDS: [BorrowedFd<'static>; 0] = [];

/// What the agent is asked to do.
pub enum Request {
    /// Another agent is ready: step back, and say what there is.
    Yield(oneshot::Sender<Result<Yielded, String>>),
    /// It is in charge now.
    Took,
    /// It is not, and never will be.
    Back,
}

/// What an agent that has stepped back hands over.
pub struct Yielded {
    pub sockets: Vec<(Bound, OwnedFd)>,
    pub keys: Vec<Key>,
    pub lock: File,
    /// Connections that are still to be told.
    pub left: u64,
}

/// Opens to others, as long as it lives.
pub struct Doorkeeper(Arc<Keeper>);

struct Keeper {
    path: PathBuf,
    own: Own,
    kernel: Arc<Kernel>,
    audit: Audit,
    elders: Arc<Elders>,
    door: Mutex<Arc<Door>>,
    requests: mpsc::Sender<Request>,
    /// One that takes over, at a time.
    taking: Mutex<()>,
    talking: AtomicUsize,
    /// With agents that drain.
    links: Links,
}

impl Doorkeeper {
    /// Opens the door. The agent is asked over `requests`.
    pub fn open(
        state: &std::path::Path,
        own: Own,
        kernel: Arc<Kernel>,
        audit: Audit,
        elders: Arc<Elders>,
        requests: mpsc::Sender<Request>,
    ) -> io::Result<Self> {
        let path = door(state);
        let keeper = Arc::new(Keeper {
            door: Mutex::new(Arc::new(Door::open(&path)?)),
            path,
            own,
            kernel,
            audit,
            elders,
            requests,
            taking: Mutex::new(()),
            talking: AtomicUsize::new(0),
            links: Links::default(),
        });
        let at_door = keeper.clone();
        std::thread::Builder::new()
            .name("handover".into())
            .spawn(move || at_door.run())?;
        Ok(Self(keeper))
    }
}

impl Drop for Doorkeeper {
    fn drop(&mut self) {
        // Elders go to the next agent with what they have to say.
        self.0.links.dismiss(DISMISS);
        self.0.door().close();
    }
}

impl Keeper {
    fn door(&self) -> Arc<Door> {
        (self.door.lock().expect("no panic while it is held")).clone()
    }

    fn run(self: Arc<Self>) {
        loop {
            let channel = match self.door().next(PATIENCE) {
                Ok(channel) => channel,
                Err(_) if self.links.dismissed() => return,
                Err(error) => {
                    tracing::warn!(%error, "nobody can take over from this agent");
                    std::thread::sleep(Duration::from_millis(200));
                    continue;
                }
            };
            if self.talking.fetch_add(1, Ordering::SeqCst) >= MOST {
                self.talking.fetch_sub(1, Ordering::SeqCst);
                continue;
            }
            let keeper = self.clone();
            let talk = move || {
                if let Err(error) = keeper.talk(channel) {
                    tracing::debug!(%error, "another agent left");
                }
                keeper.talking.fetch_sub(1, Ordering::SeqCst);
            };
            let thread = std::thread::Builder::new().name("handover-peer".into());
            if thread.spawn(talk).is_err() {
                self.talking.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }

    fn talk(&self, channel: Channel) -> io::Result<()> {
        let pid = channel.peer()?;
        let hello: Hello = channel.receive()?.0;
        let refuse = |why: String| {
            tracing::warn!(program = hello.program, why, "another agent is turned away");
            channel.send(&ToNew::Refused { why }, &NO_FDS)
        };
        let own = &self.own;
        if hello.protocol != PROTOCOL {
            let theirs = hello.protocol;
            return refuse(format!(
                "it speaks version {PROTOCOL} of the protocol, and not {theirs}"
            ));
        }
        if hello.node != own.node || hello.pin != own.pin {
            let (node, pin) = (&own.node, own.pin.display());
            return refuse(format!("it is in charge of node {node}, pinned at {pin}"));
        }
        if hello.purpose == Purpose::Drain {
            let channel = Arc::new(channel);
            let Some(_admitted) = self.links.admit(&channel) else {
                return Ok(());
            };
            let handing_over = || self.links.dismissed();
            return link::serve(&channel, pid, &self.audit, &self.elders, handing_over);
        }
        let Ok(_one_at_a_time) = self.taking.try_lock() else {
            return refuse("another one is just taking over".into());
        };
        let mut before: Vec<AgentProcess> = self.kernel.agents();
        before.retain(|agent| *agent != own.process);
        let welcome = ToNew::Welcome {
            program: env!("CARGO_PKG_VERSION").into(),
            shape: own.shape.clone(),
            process: own.process,
            before,
        };
        channel.send(&welcome, &NO_FDS)?;
        channel.set_patience(Some(PREPARE))?;
        match channel.receive::<ToOld>()?.0 {
            ToOld::Commit => {}
            other => return Err(io::Error::other(format!("{other:?} before a commit"))),
        }
        let (reply, answer) = oneshot::channel();
        let asked = self.requests.blocking_send(Request::Yield(reply));
        let yielded = match (asked, answer.blocking_recv()) {
            (Ok(()), Ok(Ok(yielded))) => yielded,
            (_, Ok(Err(why))) => return refuse(why),
            _ => return refuse("it is just ending".into()),
        };
        tracing::info!(program = hello.program, pid, "another agent takes over");
        // It may have died meanwhile, or never be done.
        let took = self.give(&channel, yielded);
        if let Err(error) = &took {
            tracing::error!(%error, "the agent that was to take over did not: this one goes on");
            let why = "it took too long".to_owned();
            let _gone = channel.send(&ToNew::Refused { why }, &NO_FDS);
            if let Err(error) = self.open_again() {
                tracing::error!(%error, "no other agent can take over from this one");
            }
        }
        let request = match took {
            Ok(()) => Request::Took,
            Err(_) => Request::Back,
        };
        let _ending = self.requests.blocking_send(request);
        took
    }

    /// Gives all away, and waits until the other one has it.
    fn give(&self, channel: &Channel, yielded: Yielded) -> io::Result<()> {
        channel.set_patience(Some(FINISH))?;
        for some in yielded.sockets.chunks(SOCKETS) {
            let bound = some.iter().map(|(bound, _)| *bound).collect();
            let fds: Vec<&OwnedFd> = some.iter().map(|(_, fd)| fd).collect();
            channel.send(&ToNew::Sockets(bound), &fds)?;
        }
        for some in yielded.keys.chunks(KEYS) {
            channel.send(&ToNew::Keys(some.to_vec()), &NO_FDS)?;
        }
        let left = yielded.left;
        channel.send(&ToNew::Yielded { left }, &[&yielded.lock])?;
        loop {
            match channel.receive::<ToOld>()?.0 {
                ToOld::Dials => self.dials(channel)?,
                ToOld::Took => return channel.send(&ToNew::Farewell, &NO_FDS),
                ToOld::Commit => return Err(io::Error::other("it commits twice")),
            }
        }
    }

    fn dials(&self, channel: &Channel) -> io::Result<()> {
        let all: Vec<Waiting> = (self.kernel.waiting_dials().iter())
            .map(Waiting::of)
            .collect();
        for dials in all.chunks(DIALS) {
            let dials = dials.to_vec();
            channel.send(&ToNew::Dials { dials, more: true }, &NO_FDS)?;
        }
        let last = ToNew::Dials {
            dials: Vec::new(),
            more: false,
        };
        channel.send(&last, &NO_FDS)
    }

    /// The other one may have put its own in this one's place.
    fn open_again(&self) -> io::Result<()> {
        let fresh = Arc::new(Door::open(&self.path)?);
        let mut door = self.door.lock().expect("no panic while it is held");
        let old = std::mem::replace(&mut *door, fresh);
        drop(door);
        old.close();
        Ok(())
    }
}
