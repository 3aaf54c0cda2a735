//! An agent takes over from one that runs, without a dropped connection: docs/upgrade.md.
//!
//! The agent in charge has a socket in its state directory. `give` answers there, `take` is
//! the side of the agent that comes, `link` is between the two while the old one drains:
//! what it still has to record goes one way, what the kernel sees of its sockets the other;
//! `links` are all such conversations of one agent. `wire` carries messages.
//!
//! Whatever goes wrong before the new agent says that it has taken, the old one goes on.

mod elders;
mod give;
mod link;
mod links;
mod take;
mod wire;

use std::{
    collections::HashMap,
    fs::File,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use postern_ebpf::{Dial, Endpoint};
use serde::{Deserialize, Serialize};

use crate::{
    audit::{Key, Process, Seen, Socket},
    kernel::{AgentProcess, errno_name, from_abi, to_abi},
};

pub use elders::Elders;
pub use give::{Doorkeeper, Request, Yielded};
pub use link::{Link, LinkEnd};
pub use take::{Taken, Taking, begin, remove};

/// Changes with the meaning of any message.
pub const PROTOCOL: u32 = 2;

/// How long an agent waits for a message of which the other one has all that it takes.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long one that takes over may prepare, and how long it may then take.
const PREPARE: Duration = Duration::from_secs(120);
const FINISH: Duration = Duration::from_secs(30);

/// Where the agent in charge listens.
pub fn door(state: &Path) -> PathBuf {
    state.join("handover.sock")
}

/// A listening socket, by where it is bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Bound {
    /// Cookie of its network namespace.
    pub netns: u64,
    pub address: SocketAddr,
}

pub type Sockets = HashMap<Bound, OwnedFd>;

/// What an agent comes for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Purpose {
    /// To be in charge.
    Take,
    /// To remove all that is pinned.
    Remove,
    /// It has handed over, and has something to say.
    Drain,
}

/// The first message of who comes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hello {
    protocol: u32,
    purpose: Purpose,
    /// For logs.
    program: String,
    node: String,
    pin: PathBuf,
    process: AgentProcess,
}

/// What makes two agents those of one node.
#[derive(Clone, Debug)]
pub struct Own {
    pub node: String,
    pub pin: PathBuf,
    /// Name of the directory of its maps.
    pub shape: String,
    pub process: AgentProcess,
}

impl Own {
    fn hello(&self, purpose: Purpose) -> Hello {
        Hello {
            protocol: PROTOCOL,
            purpose,
            program: env!("CARGO_PKG_VERSION").into(),
            node: self.node.clone(),
            pin: self.pin.clone(),
            process: self.process,
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum ToNew {
    Refused {
        why: String,
    },
    Welcome {
        program: String,
        shape: String,
        process: AgentProcess,
        /// Agents before, of which sockets may be left.
        before: Vec<AgentProcess>,
    },
    /// As many descriptors come with it.
    Sockets(Vec<Bound>),
    /// Sockets of applications that the old agent's connections are still to be told with.
    Keys(Vec<Key>),
    /// The lock comes with it. Nothing is decided by the old agent any more.
    Yielded {
        /// Connections that are still to be told.
        left: u64,
    },
    Dials {
        dials: Vec<Waiting>,
        more: bool,
    },
    Farewell,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum ToOld {
    /// All is prepared.
    Commit,
    /// What was dialled by way of the old agent's maps, and not accepted.
    Dials,
    /// The new agent is in charge.
    Took,
}

#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    #[error("the agent in charge hands nothing over: {0}")]
    Refused(String),
    #[error("{path}: {source}")]
    Path { path: PathBuf, source: io::Error },
    #[error("the other agent: {0}")]
    Io(#[from] io::Error),
    #[error("the other agent said what it should not have said: {0}")]
    Unexpected(String),
    #[error("the agent in charge waited too long for this one, and goes on")]
    TooLate,
}

/// A dial that nobody has accepted yet, as any two agents understand it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Waiting {
    netns: u64,
    source: SocketAddr,
    destination: SocketAddr,
    cgroup: u64,
    at: u64,
    cookie: u64,
    tgid: u32,
    uid: u32,
    comm: [u8; 16],
}

impl Waiting {
    pub fn of(entry: &(Endpoint, Dial)) -> Self {
        let (flow, dial) = entry;
        let address = |words, port| SocketAddr::new(from_abi(words), port as u16);
        Self {
            netns: flow.netns,
            source: address(flow.address, flow.port),
            destination: address(dial.destination, dial.destination_port),
            cgroup: dial.cgroup,
            at: dial.at,
            cookie: dial.cookie,
            tgid: dial.tgid,
            uid: dial.uid,
            comm: dial.comm,
        }
    }

    pub fn entry(&self) -> (Endpoint, Dial) {
        let words = |ip: IpAddr| to_abi(ip);
        let (source, port) = (words(self.source.ip()), self.source.port().into());
        let flow = Endpoint {
            netns: self.netns,
            address: source,
            port,
            _pad: 0,
        };
        let dial = Dial {
            destination: words(self.destination.ip()),
            source,
            netns: self.netns,
            cgroup: self.cgroup,
            at: self.at,
            cookie: self.cookie,
            destination_port: self.destination.port().into(),
            source_port: port,
            tgid: self.tgid,
            uid: self.uid,
            comm: self.comm,
        };
        (flow, dial)
    }
}

/// What the kernel saw of a socket, for the agent whose connection it is of.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Told {
    key: Key,
    cookie: u64,
    sent: u64,
    received: u64,
    retransmits: u32,
    srtt_us: u32,
    errno: Option<String>,
    process: Option<Arc<Process>>,
}

impl Told {
    fn of(key: Key, seen: Seen) -> Self {
        let Socket {
            cookie,
            sent,
            received,
            retransmits,
            srtt_us,
            errno,
        } = seen.socket;
        Self {
            key,
            cookie,
            sent,
            received,
            retransmits,
            srtt_us,
            errno: errno.map(str::to_owned),
            process: seen.process,
        }
    }

    fn seen(self) -> (Key, Seen) {
        // Names are the same constants everywhere.
        let name = |said: String| (1..=MOST_ERRNO).map(errno_name).find(|name| *name == said);
        let socket = Socket {
            cookie: self.cookie,
            sent: self.sent,
            received: self.received,
            retransmits: self.retransmits,
            srtt_us: self.srtt_us,
            errno: self.errno.and_then(name),
        };
        let seen = Seen {
            socket,
            process: self.process,
        };
        (self.key, seen)
    }
}

/// `include/uapi/asm-generic/errno.h` ends with this.
const MOST_ERRNO: u32 = 133;

/// A file that came over a socket.
fn file(fd: OwnedFd) -> File {
    File::from(fd)
}

#[cfg(test)]
mod tests;
