//! What a record says. Absent facts are left out, not invented.

use std::{net::SocketAddr, time::SystemTime};

use serde::Serialize;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    identity::{Session, SpiffeId},
    kernel::{Event, EventKind},
    policy::PolicyRef,
    workload::Workload,
};

#[derive(Debug, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Record {
    Connection(Box<Connection>),
    /// What the kernel saw of an enrolled pod.
    Event(Box<KernelEvent>),
    /// Something is missing from this log.
    Gap {
        lost: Lost,
        count: u64,
    },
    /// The agent itself: started, policies changed, and so on.
    Agent {
        event: &'static str,
        detail: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Lost {
    /// Records that the queue or the disk did not take.
    Records,
    /// Events that the kernel's ring did not take.
    KernelSocket,
    KernelExec,
    KernelExit,
}

/// One connection, as the agent at one of its ends saw it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Connection {
    pub reporter: Reporter,
    pub transport: Transport,
    /// When it was accepted, RFC 3339.
    #[serde(serialize_with = "rfc3339")]
    pub started: SystemTime,
    pub duration_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process: Option<Process>,
    pub source: Peer,
    pub destination: Peer,
    /// The address that the application dialled.
    pub dialled: SocketAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    pub verdict: Verdict,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<PolicyRef>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<Session>,
    pub bytes: Bytes,
    /// How it ended, and whose doing that was.
    pub end: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Reporter {
    Source,
    Destination,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// HTTP/2 CONNECT over mutual TLS, between nodes.
    Hbone,
    /// Both ends on this node; the kernel vouches for them.
    Local,
    /// As the peer sent it.
    Plaintext,
    /// Opened by the node itself, as the kernel saw.
    Probe,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Allow,
    Deny,
    /// Neither: it failed before, or for another reason than policy.
    Failed,
}

/// The process that called `connect`.
#[derive(Clone, Debug, Serialize)]
pub struct Process {
    pub pid: u32,
    pub uid: u32,
    pub comm: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exe: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<String>,
}

#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Peer {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<SocketAddr>,
    /// Proven, not claimed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<SpiffeId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workload: Option<String>,
}

impl Peer {
    pub fn new(
        address: SocketAddr,
        identity: Option<SpiffeId>,
        workload: Option<&Workload>,
    ) -> Self {
        Self {
            address: Some(address),
            identity,
            pod: workload.map(|w| w.name.clone()),
            namespace: workload.map(|w| w.namespace.clone()),
            workload: workload.map(|w| w.owner.clone()),
        }
    }
}

/// Payload bytes as the application sees them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Bytes {
    /// From source to destination.
    pub sent: u64,
    /// From destination to source.
    pub received: u64,
}

#[derive(Debug, Serialize)]
pub struct KernelEvent {
    pub pod: String,
    pub namespace: String,
    /// 0 and empty where the kernel was not in the process's own context.
    #[serde(skip_serializing_if = "is_zero")]
    pub pid: u32,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub comm: String,
    #[serde(flatten)]
    what: What,
}

#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
enum What {
    Socket {
        cookie: u64,
        local: SocketAddr,
        remote: SocketAddr,
        old: &'static str,
        new: &'static str,
    },
    Exec {
        uid: u32,
        path: String,
    },
    Exit,
}

/// The record of a kernel event.
pub fn event(event: Event, workload: &Workload) -> Record {
    let what = match event.kind {
        EventKind::Socket {
            cookie,
            local,
            remote,
            old,
            new,
        } => What::Socket {
            cookie,
            local,
            remote,
            old,
            new,
        },
        EventKind::Exec { uid, path } => What::Exec { uid, path },
        EventKind::Exit => What::Exit,
    };
    Record::Event(Box::new(KernelEvent {
        pod: workload.name.clone(),
        namespace: workload.namespace.clone(),
        pid: event.pid,
        comm: event.comm,
        what,
    }))
}

#[derive(Serialize)]
struct Line<'a> {
    time: String,
    node: &'a str,
    #[serde(flatten)]
    record: &'a Record,
}

impl Record {
    pub fn gap(lost: Lost, count: u64) -> Self {
        Self::Gap { lost, count }
    }

    /// The record as it stands in the log, with its line end.
    pub fn line(&self, node: &str) -> String {
        let line = Line {
            time: timestamp(SystemTime::now()),
            node,
            record: self,
        };
        let mut text = serde_json::to_string(&line).expect("records have string keys only");
        text.push('\n');
        text
    }
}

fn timestamp(time: SystemTime) -> String {
    OffsetDateTime::from(time)
        .format(&Rfc3339)
        .expect("a time of this century")
}

fn is_zero(pid: &u32) -> bool {
    *pid == 0
}

fn rfc3339<S: serde::Serializer>(time: &SystemTime, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&timestamp(*time))
}
