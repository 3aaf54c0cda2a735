//! What a record says. Absent facts are left out, not invented.

use std::{net::SocketAddr, sync::Arc, time::SystemTime};

use aws_lc_rs::digest::{SHA256, digest};
use serde::Serialize;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::seen::{Flow, Process, ProcessEvent, Socket};
use crate::{
    identity::{Session, SpiffeId, hex},
    jwt::{Claims, Confirmation},
    policy::PolicyRef,
    workload::Workload,
};

#[derive(Debug, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Record {
    Connection(Box<Connection>),
    /// A request that policy had read.
    Request(Box<RequestRecord>),
    /// A token that the agent got for a workload, or failed to.
    Token(Box<GrantRecord>),
    /// What the kernel saw of an enrolled pod, and is none of the agent's business.
    Flow(Box<Flow>),
    /// What the kernel saw, and the agent should have carried.
    Bypass(Box<Flow>),
    /// A process of an enrolled pod.
    Process(Box<ProcessEvent>),
    /// Something is missing from this log.
    Gap {
        lost: Lost,
        count: u64,
        /// `ring`: it was full. `rate`: one pod caused more than it may.
        reason: &'static str,
    },
    /// What the authorization server granted, refused or changed.
    Authority(Box<AuthorityRecord>),
    /// The agent itself: started, policies changed, and so on.
    Agent {
        event: &'static str,
        detail: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Lost {
    /// Events that the kernel's ring did not take.
    KernelSocket,
    KernelExec,
    KernelExit,
    KernelUdp,
    KernelRaw,
    /// Connections of an agent that had handed over and was killed while it drained.
    Connections,
}

/// One connection, as the agent at one of its ends saw it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Connection {
    /// What records of its requests name it by; 0 where it was not judged here.
    #[serde(skip_serializing_if = "is_none")]
    pub id: u64,
    pub reporter: Reporter,
    pub transport: Transport,
    /// When it was accepted, RFC 3339.
    #[serde(serialize_with = "rfc3339")]
    pub started: SystemTime,
    pub duration_ms: u64,
    pub source: Peer,
    pub destination: Peer,
    /// The address that the application dialled.
    pub dialled: SocketAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// `http/1` or `http/2` where requests were read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol: Option<&'static str>,
    pub verdict: Verdict,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<PolicyRef>,
    /// As of requests, where the connection was not read.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub told: Vec<PolicyRef>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<Arc<Session>>,
    pub bytes: Bytes,
    #[serde(flatten)]
    pub requests: Requests,
    /// How it ended.
    pub end: String,
    /// Whose doing that was.
    pub fault: Fault,
}

/// Requests of a connection, where they were read.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Requests {
    #[serde(rename = "requests", skip_serializing_if = "is_none")]
    pub count: u64,
    /// Those that were refused.
    #[serde(skip_serializing_if = "is_none")]
    pub denied: u64,
    #[serde(flatten)]
    last: Option<Last>,
}

/// The last of them: where there was one only, the connection's record tells it all.
#[derive(Clone, Debug, Serialize)]
struct Last {
    request: Asked,
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<TokenRecord>,
    #[serde(skip_serializing_if = "Option::is_none")]
    trace: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
struct Asked {
    #[serde(skip_serializing_if = "Option::is_none")]
    method: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    host: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<u16>,
}

impl Requests {
    pub fn add(&mut self, record: &RequestRecord) {
        self.count += 1;
        self.denied += u64::from(record.verdict == Verdict::Deny);
        self.last = Some(Last {
            request: Asked {
                method: record.method.clone(),
                host: record.host.clone(),
                path: record.path.clone(),
                status: record.status,
            },
            token: record.token.clone(),
            trace: record.trace.clone(),
        });
    }
}

/// Whose doing an end was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Fault {
    /// It ended in order.
    None,
    Source,
    Destination,
    Policy,
    /// This agent's, or the one at the other end.
    Agent,
    /// What lies between the nodes.
    Network,
}

/// One HTTP request: as the destination's agent judged it, or as the source's agent
/// put a token on it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RequestRecord {
    /// The record of its connection has the same as `id`.
    pub connection: u64,
    pub reporter: Reporter,
    pub protocol: &'static str,
    #[serde(serialize_with = "rfc3339")]
    pub started: SystemTime,
    pub duration_ms: u64,
    pub source: Peer,
    pub destination: Peer,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Without query, and cut where it is very long.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// The application's, or the agent's own. Absent: it was broken off before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    pub verdict: Verdict,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<PolicyRef>,
    /// Policies without effect that had something to say: AUDIT, and dry runs that
    /// would have denied it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub told: Vec<PolicyRef>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token: Option<TokenRecord>,
    /// The W3C trace that it is of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace: Option<String>,
    /// The token that the source's agent put on it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outbound: Option<OutboundRecord>,
    /// Why it was refused or broken off.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

impl Default for RequestRecord {
    fn default() -> Self {
        Self {
            connection: 0,
            reporter: Reporter::Destination,
            protocol: "",
            started: SystemTime::UNIX_EPOCH,
            duration_ms: 0,
            source: Peer::default(),
            destination: Peer::default(),
            method: None,
            host: None,
            path: None,
            status: None,
            verdict: Verdict::Failed,
            policy: None,
            told: Vec::new(),
            token: None,
            trace: None,
            outbound: None,
            reason: String::new(),
        }
    }
}

/// Which token a request goes with: never the token itself.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OutboundRecord {
    /// `namespace/name` of the OutboundToken.
    pub object: String,
    pub grant: &'static str,
    /// Host of the authorization server.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub issuer: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub audiences: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub resources: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub scopes: Vec<String>,
    /// `inbound` or `serviceAccount`, where a token was exchanged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subject: Option<&'static str>,
    /// `sub` of the user whose request came in with the same trace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_behalf_of: Option<String>,
    /// `cached` or `fetched`; absent where there was none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// One grant: what a server was asked for, and whether it gave it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct GrantRecord {
    /// The workload that it is for.
    pub identity: SpiffeId,
    #[serde(flatten)]
    pub what: OutboundRecord,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_authentication: Option<&'static str>,
    /// Of the request that it was first needed for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace: Option<String>,
    pub duration_ms: u64,
    /// Seconds that the token is used at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lifetime: Option<u64>,
}

/// A grant, refusal, login, certificate or key change of `postern authority`. Names and
/// reasons, never a password, a code, a token or a key.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AuthorityRecord {
    /// `grant`, `refusal`, `login`, `lockout`, `logout`, `consent`, `code`, `revocation`,
    /// `introspection`, `reuse`, `certificate`, `join`, `token` (a JWT-SVID), `keys`,
    /// `client` or `user`.
    pub event: &'static str,
    /// Of the request: `authorization_code`, `refresh_token`, `client_credentials`,
    /// `urn:ietf:params:oauth:grant-type:token-exchange`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grant: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client: Option<String>,
    /// How the client proved who it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub authentication: Option<&'static str>,
    /// `sub`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    /// `act.sub` (RFC 8693 4.1).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub actor: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub audience: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub scope: Vec<String>,
    /// First half of the SHA-256 of the issued token's `jti`, hexadecimal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jti: Option<String>,
    /// The RFC's error code, where it was refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<&'static str>,
    /// Why, in words for the operator.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// Where the request came from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<std::net::IpAddr>,
    /// Trace id of the request's `traceparent` (W3C Trace Context).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace: Option<String>,
}

/// Scopes that are told of a token.
const MAX_SCOPES: usize = 64;

/// Whom a verified token was about: never the token itself.
#[derive(Clone, Debug, Serialize)]
pub struct TokenRecord {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iss: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sub: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub aud: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub azp: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_id: Option<String>,
    /// Who acts for the subject, the one who acts now first (RFC 8693 4.1).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub act: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub scope: Vec<String>,
    /// The same, where its issuer calls it so.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub scp: Vec<String>,
    /// SHA-256 of its `jti`, the first 16 hexadecimal digits: enough to find it by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jti: Option<String>,
    /// What it is bound to.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cnf: Vec<&'static str>,
    /// `jwt`: by its signature; `introspection`: its issuer was asked.
    pub checked: &'static str,
}

impl TokenRecord {
    pub fn new(claims: &Claims) -> Self {
        let own = |text: Option<&str>| text.map(str::to_owned);
        let scopes = claims.scopes().into_iter().take(MAX_SCOPES);
        let scopes: Vec<String> = scopes.map(str::to_owned).collect();
        let (scope, scp) = match claims.scope_claim() {
            "scope" => (scopes, Vec::new()),
            _ => (Vec::new(), scopes),
        };
        Self {
            iss: own(claims.issuer()),
            sub: own(claims.subject()),
            aud: claims.audiences().iter().map(|&a| a.to_owned()).collect(),
            azp: own(claims.presenter()),
            client_id: own(claims.client()),
            act: claims.actors().into_iter().map(str::to_owned).collect(),
            scope,
            scp,
            jti: claims
                .id()
                .map(|id| hex(&digest(&SHA256, id.as_bytes()).as_ref()[..8])),
            cnf: (claims.confirmations().iter())
                .map(|confirmation| match confirmation {
                    Confirmation::Certificate(_) => "x5t#S256",
                    Confirmation::Key(_) => "jkt",
                    Confirmation::Other => "other",
                })
                .collect(),
            checked: claims.checked().name(),
        }
    }
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
    /// That of the application on this node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process: Option<Arc<Process>>,
    /// Its socket, as the kernel saw it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<Socket>,
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
            ..Self::default()
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

#[derive(Serialize)]
struct Line<'a> {
    time: String,
    node: &'a str,
    #[serde(flatten)]
    record: &'a Record,
}

impl Record {
    pub fn gap(lost: Lost, count: u64, reason: &'static str) -> Self {
        Self::Gap {
            lost,
            count,
            reason,
        }
    }

    /// Writes the record as a JSON object, as it stands in the log but for what chains it.
    pub fn write(&self, node: &str, text: &mut Vec<u8>) {
        let line = Line {
            time: timestamp(SystemTime::now()),
            node,
            record: self,
        };
        serde_json::to_writer(text, &line).expect("records have string keys only");
    }
}

pub(super) fn timestamp(time: SystemTime) -> String {
    OffsetDateTime::from(time)
        .format(&Rfc3339)
        .expect("a time of this century")
}

fn is_none(id: &u64) -> bool {
    *id == 0
}

pub(super) fn is_zero(number: &u32) -> bool {
    *number == 0
}

pub(super) fn rfc3339<S: serde::Serializer>(time: &SystemTime, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&timestamp(*time))
}
