//! One HTTP connection's way to policy and to its application: each request is
//! judged by the policies of that moment, all of them or none, and told at its end.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, OnceLock},
    time::{Instant, SystemTime},
};

use http::{HeaderName, HeaderValue, StatusCode};
use tokio::sync::watch;

use super::{
    LocalPod, Proxy,
    attach::{Attacher, Sent},
    behalf::{Remembered, User},
    http::{Gate, Held, Io, Pass},
    last_hop,
    splice::End,
    story::{Story, Told as Requests},
};
use crate::{
    audit::{Ends, Peer, Record, RequestRecord, TokenRecord, Verdict as Told},
    judge::{Allowed, Destination, Why, merge},
    jwt::{self, Claims},
    kernel::ClientEntry,
    policy::{Denial, Facts, Permitted, PolicyRef, Selected},
    request::{Edits, Reply, Request},
    trace::{TRACEPARENT, Trace, mentioned},
};

pub struct RequestGate {
    about: Arc<About>,
    /// Of a pod of this node: what it does before the destination judges.
    attacher: Option<Arc<Attacher>>,
    /// The kernel shows the client to the application while these stand.
    shown: Mutex<Vec<ClientEntry>>,
    /// Set with the first request that may go on, to the policy that let it.
    passed: OnceLock<Option<PolicyRef>>,
}

/// What is the same for all requests of a connection.
struct About {
    proxy: Arc<Proxy>,
    pod: Arc<LocalPod>,
    facts: Facts,
    client: SocketAddr,
    connection: u64,
    protocol: &'static str,
    source: Peer,
    destination: Peer,
    ends: Ends,
    requests: Requests,
}

impl RequestGate {
    pub fn new(
        proxy: Arc<Proxy>,
        pod: Arc<LocalPod>,
        facts: Facts,
        client: SocketAddr,
        story: &Story,
        attacher: Option<Arc<Attacher>>,
        shown: Option<ClientEntry>,
    ) -> Self {
        if let Some(attacher) = &attacher {
            attacher.begin(story);
        }
        Self {
            attacher,
            about: Arc::new(About {
                proxy,
                pod,
                facts,
                client,
                connection: story.id,
                protocol: story.protocol.unwrap_or_default(),
                source: story.source.peer(),
                destination: story.destination.peer(),
                ends: story.ends.clone(),
                requests: story.requests.clone(),
            }),
            shown: Mutex::new(shown.into_iter().collect()),
            passed: OnceLock::new(),
        }
    }

    /// The policy that let the first request pass; `None` while none has.
    pub fn passed(&self) -> Option<&Option<PolicyRef>> {
        self.passed.get()
    }
}

impl Gate for RequestGate {
    type Held = HeldRequest;
    type Permit = Permitted;

    async fn judge(&self, request: &Request<'_>) -> Result<Pass<HeldRequest, Permitted>, Reply> {
        let about = &self.about;
        let attached = match &self.attacher {
            Some(attacher) => attacher.attach(request).await?,
            None => None,
        };
        let (mut attached, sent) = attached.map_or_else(Default::default, |(e, s)| (e, Some(s)));
        let request = &Request {
            headers: attached.headers(request),
            ..request.clone()
        };
        // Before the judgement: policy may change in between.
        let changed = about.proxy.changed.subscribe();
        let selected = about.proxy.selected(&about.pod);
        let mut facts = about.facts.clone();
        if let Some(attacher) = &self.attacher {
            // On this node no handshake says it once and for all.
            facts.certificate = attacher.certificate();
        }
        let mut held = HeldRequest::new(about.clone(), request, changed, sent);
        held.facts.clone_from(&facts);
        let destination = Destination {
            identity: Some(about.pod.identity()),
            credentials: Some(&about.pod.credentials),
        };
        let judged = (about.proxy.judge)
            .request(
                &selected,
                &facts,
                destination,
                about.client,
                request,
                SystemTime::now(),
            )
            .await;
        match judged {
            Ok(Allowed {
                permitted,
                edits,
                by_providers,
                claims,
                expires,
                told,
            }) => {
                held.record.verdict = Told::Allow;
                held.record.policy = permitted.by().cloned();
                held.record.told = told;
                held.record.token = claims.as_deref().map(TokenRecord::new);
                held.expires = expires;
                held.claims.clone_from(&claims);
                if by_providers != Edits::default() {
                    held.head.headers = own(&by_providers.headers(request));
                }
                // Judging may have waited for a provider or for keys.
                if held.changed.has_changed().unwrap_or(false)
                    && let Some(denial) = held.denial()
                {
                    let policy = denial.policy().clone();
                    held.revoke(denial.to_string(), Some(policy));
                    let reply = Reply::new(StatusCode::FORBIDDEN, "RBAC: access denied");
                    held.answered(reply.status);
                    return Err(reply);
                }
                held.remember(&selected, request, claims.as_deref());
                let _first = self.passed.set(permitted.by().cloned());
                merge(&mut attached, edits);
                Ok(Pass {
                    edits: attached,
                    permit: permitted,
                    held,
                })
            }
            Err(refused) => {
                held.record.token = refused.claims.as_deref().map(TokenRecord::new);
                held.record.reason = refused.why.to_string();
                held.record.verdict = Told::Deny;
                match &refused.why {
                    Why::Denied(denial) => held.record.policy = Some(denial.policy().clone()),
                    Why::Answered(policy) => {
                        held.record.verdict = Told::Allow;
                        held.record.policy = Some(policy.clone());
                        held.record.reason.clear();
                    }
                    Why::Malformed(_) => {}
                }
                held.answered(refused.reply.status);
                Err(refused.reply)
            }
        }
    }

    async fn dial(&self, permitted: &Permitted) -> io::Result<Io> {
        let About {
            proxy,
            pod,
            facts,
            client,
            ends,
            ..
        } = &*self.about;
        let (stream, entry) =
            last_hop(proxy, permitted, pod, ends, facts.destination, *client).await?;
        let mut shown = self.shown.lock().expect("no panic while it is held");
        // An earlier connection to the application is gone, or about to go.
        let old = shown.len().saturating_sub(3);
        shown.drain(..old);
        shown.push(entry);
        Ok(Io::upstream(End::Tcp(stream)))
    }

    fn malformed(&self, status: StatusCode, why: &str) {
        let mut record = self.about.record();
        record.status = Some(status.as_u16());
        record.verdict = Told::Deny;
        record.reason = why.to_owned();
        self.about.tell(record);
    }
}

impl About {
    fn record(&self) -> RequestRecord {
        RequestRecord {
            connection: self.connection,
            protocol: self.protocol,
            started: SystemTime::now(),
            source: self.source.clone(),
            destination: self.destination.clone(),
            // Until it is judged.
            verdict: Told::Failed,
            ..RequestRecord::default()
        }
    }

    fn tell(&self, record: RequestRecord) {
        self.proxy
            .metrics
            .request(self.protocol, record.verdict, record.status);
        self.requests.add(&record);
        self.proxy.audit.record(Record::Request(Box::new(record)));
    }
}

/// A request that runs.
pub struct HeldRequest {
    about: Arc<About>,
    began: Instant,
    record: RequestRecord,
    /// As it was judged, to be judged again.
    facts: Facts,
    head: OwnedHead,
    /// Those that it was allowed with.
    claims: Option<Arc<Claims>>,
    expires: Option<SystemTime>,
    changed: watch::Receiver<()>,
    /// With a token that this agent put on it.
    sent: Option<Sent>,
    /// On whose behalf the pod may call others for it.
    remembered: Vec<Remembered>,
}

fn own(headers: &[(&HeaderName, &HeaderValue)]) -> Vec<(HeaderName, HeaderValue)> {
    let own = |(name, value): &(&HeaderName, &HeaderValue)| ((*name).clone(), (*value).clone());
    headers.iter().map(own).collect()
}

struct OwnedHead {
    method: String,
    path: String,
    host: String,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl HeldRequest {
    fn new(
        about: Arc<About>,
        request: &Request<'_>,
        changed: watch::Receiver<()>,
        sent: Option<Sent>,
    ) -> Self {
        const LONGEST: usize = 512;
        let cut = |text: &str| Some(text.chars().take(LONGEST).collect());
        let mut record = about.record();
        let path = request.path.split(['?', '#']).next().unwrap_or_default();
        record.method = cut(request.method);
        record.host = cut(request.host);
        record.path = cut(path);
        record.trace = Trace::of(request, &TRACEPARENT).map(|trace| trace.id.to_string());
        Self {
            record,
            facts: about.facts.clone(),
            head: OwnedHead {
                method: request.method.to_owned(),
                path: request.path.to_owned(),
                host: request.host.to_owned(),
                headers: own(&request.headers),
            },
            about,
            began: Instant::now(),
            claims: None,
            expires: None,
            changed,
            sent,
            remembered: Vec::new(),
        }
    }

    /// Whose token it came with, where the pod calls others on users' behalf.
    fn remember(
        &mut self,
        selected: &Selected,
        request: &Request<'_>,
        claims: Option<&jwt::Claims>,
    ) {
        for header in selected.on_behalf() {
            let strict = Trace::of(request, header).map(|trace| trace.id);
            let mut user = claims.and_then(|claims| {
                let token = jwt::original(selected.tokens(), request, claims)?;
                Some(User::new(token, claims))
            });
            for trace in mentioned(request, header) {
                // Whoever comes with a trace and is not known makes it nobody's.
                let user = user.take_if(|_| strict == Some(trace));
                (self.remembered).extend(self.about.pod.behalf.remember(trace, user));
            }
        }
    }

    /// Whether policy denies it now.
    fn denial(&self) -> Option<Denial> {
        let About { proxy, pod, .. } = &*self.about;
        let OwnedHead {
            method,
            path,
            host,
            headers,
        } = &self.head;
        let request = Request {
            method,
            path,
            host,
            headers: headers.iter().map(|(name, value)| (name, value)).collect(),
        };
        let selected = proxy.selected(pod);
        let (claims, now) = (self.claims.as_ref(), SystemTime::now());
        (proxy.judge).no_longer(&selected, &self.facts, &request, claims, now)
    }

    fn revoke(&mut self, reason: String, policy: Option<PolicyRef>) {
        self.record.verdict = Told::Deny;
        self.record.reason = reason;
        self.record.policy = policy.or(self.record.policy.take());
    }
}

impl Held for HeldRequest {
    async fn revoked(&mut self) {
        loop {
            let left = self
                .expires
                .map(|at| at.duration_since(SystemTime::now()).unwrap_or_default());
            let expired = async {
                match left {
                    Some(left) => tokio::time::sleep(left).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = expired => return self.revoke("its token has expired".into(), None),
                changed = self.changed.changed() => match changed {
                    Ok(()) => if let Some(denial) = self.denial() {
                        let policy = denial.policy().clone();
                        return self.revoke(denial.to_string(), Some(policy));
                    },
                    Err(_agent_ends) => std::future::pending().await,
                },
            }
        }
    }

    fn answered(&mut self, status: StatusCode) {
        self.record.status = Some(status.as_u16());
        if let Some(sent) = &mut self.sent {
            sent.answered(status);
        }
    }

    fn unauthenticated(&mut self) {
        if let Some(sent) = &mut self.sent {
            sent.not_taken();
        }
    }
}

impl Drop for HeldRequest {
    fn drop(&mut self) {
        if self.record.status.is_none() && self.record.reason.is_empty() {
            self.record.reason = "broken off before it was answered".into();
        }
        self.record.duration_ms = self.began.elapsed().as_millis() as u64;
        let record = std::mem::take(&mut self.record);
        self.about.tell(record);
    }
}
