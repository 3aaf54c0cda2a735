//! What the kernel saw, as records say it: processes, sockets, and flows that the
//! agent did not carry.

use std::{net::SocketAddr, sync::Arc, time::SystemTime};

use serde::{Deserialize, Serialize};

use super::record::{is_zero, rfc3339};
use crate::{identity::SpiffeId, workload::Workload};

/// A process, as far as it is known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub pid: u32,
    pub uid: u32,
    pub comm: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exe: Option<String>,
    /// SHA-256 of its arguments as they lie in memory, each with its closing zero: the
    /// first 16 hexadecimal digits. The arguments themselves may be secrets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub argv: Option<String>,
    /// Path within the cgroup v2 tree.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<String>,
    /// Id of its container, where the cgroup's name tells it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<Parent>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parent {
    pub pid: u32,
    pub comm: String,
}

/// A TCP socket of an application, from its own point of view, at its end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Socket {
    /// `SO_COOKIE`: never used twice while the node runs.
    pub cookie: u64,
    /// Payload bytes, each once, whether acknowledged or not.
    pub sent: u64,
    /// Payload bytes that came in order, whether they were read or not.
    pub received: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub retransmits: u32,
    /// Smoothed round-trip time, microseconds.
    #[serde(skip_serializing_if = "is_zero")]
    pub srtt_us: u32,
    /// By which error it ended: `ECONNREFUSED` and so on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub errno: Option<&'static str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FlowProtocol {
    Tcp,
    Udp,
    /// IP packets of the application's own making (raw(7)).
    Raw,
    /// Frames (packet(7)).
    Packet,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FlowEvent {
    /// A TCP connection is over.
    Closed,
    /// A connect failed; `socket.errno` says how.
    Failed,
    /// A socket listens.
    Listen,
    /// The first packet of a UDP flow, or the first of a raw socket.
    First,
    /// A TCP connection was found that nobody carries.
    Open,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    Outbound,
    Inbound,
}

/// What the kernel saw of an enrolled pod and the agent did not carry. As a record it
/// is a `flow`, or a `bypass` where the agent should have carried it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Flow {
    pub event: FlowEvent,
    pub protocol: FlowProtocol,
    /// Of IP for a raw socket, of Ethernet for a packet socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol_number: Option<u16>,
    pub direction: Direction,
    /// Absent where the agent does not know the pod, and refused what it dialled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workload: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<SpiffeId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub local: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remote: Option<SocketAddr>,
    /// Where it was meant to go, when the agent was to carry it and was not there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dialled: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process: Option<Arc<Process>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<Socket>,
    #[serde(
        serialize_with = "maybe_rfc3339",
        skip_serializing_if = "Option::is_none"
    )]
    pub started: Option<SystemTime>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub duration_ms: Option<u64>,
    /// Of a bypass: why the agent did not carry it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<&'static str>,
    /// Of a bypass: whether it was ended (`enforce.bypass: cut`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cut: Option<bool>,
}

impl Flow {
    pub fn new(
        event: FlowEvent,
        protocol: FlowProtocol,
        workload: Option<&Workload>,
        identity: Option<SpiffeId>,
    ) -> Self {
        Self {
            event,
            protocol,
            protocol_number: None,
            direction: Direction::Outbound,
            pod: workload.map(|w| w.name.clone()),
            namespace: workload.map(|w| w.namespace.clone()),
            workload: workload.map(|w| w.owner.clone()),
            identity,
            local: None,
            remote: None,
            dialled: None,
            process: None,
            socket: None,
            started: None,
            duration_ms: None,
            why: None,
            cut: None,
        }
    }
}

/// A process of an enrolled pod began or ended.
#[derive(Clone, Debug, Serialize)]
pub struct ProcessEvent {
    /// `exec` or `exit`.
    pub event: &'static str,
    pub pod: String,
    pub namespace: String,
    pub workload: String,
    pub process: Arc<Process>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<u32>,
    /// The signal that ended it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signal: Option<u32>,
}

fn maybe_rfc3339<S: serde::Serializer>(
    time: &Option<SystemTime>,
    to: S,
) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => rfc3339(time, to),
        None => to.serialize_none(),
    }
}
