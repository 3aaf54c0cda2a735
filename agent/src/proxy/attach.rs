//! Puts tokens on what a pod sends, as OutboundToken says: request by request, by
//! the policies of that moment. No request that should have a token goes without.

use std::{
    borrow::Cow,
    sync::{Arc, OnceLock},
    time::{Instant, SystemTime},
};

use http::{HeaderName, HeaderValue, StatusCode, header};
use zeroize::Zeroizing;

use super::{
    LocalPod, Proxy,
    story::{Story, Told},
};
use crate::{
    audit::{OutboundRecord, Peer, Record, Reporter, RequestRecord, Transport, Verdict},
    oauth::{Call, Got, Grant, Subject, SubjectKind, is_token},
    policy::Outbound,
    request::{Edits, Reply, Request},
    trace::{TRACEPARENT, Trace},
};

/// Says to the application which of the agent's refusals it met.
const REASON: HeaderName = HeaderName::from_static("x-postern-reason");

/// For one connection of a pod.
pub struct Attacher {
    proxy: Arc<Proxy>,
    pod: Arc<LocalPod>,
    /// At the endpoint.
    port: u16,
    /// The endpoint is outside of the mesh: nothing hides a token on its way there.
    bare: bool,
    source: Peer,
    destination: Peer,
    /// `None` where the destination's requests are counted.
    requests: Option<Told>,
    /// What records name the connection by, and what it speaks.
    begun: OnceLock<(u64, &'static str)>,
}

/// A request that is on its way with a token, or was refused one. Recorded at its end.
pub struct Sent {
    about: Arc<Attacher>,
    began: Instant,
    record: RequestRecord,
    got: Option<Got>,
}

/// Why a request has no token: a word for programs, and a sentence.
struct Lacking(&'static str, Cow<'static, str>);

impl Attacher {
    /// Of the workload, now: tokens that are put on may be bound to it (RFC 8705 3).
    pub fn certificate(&self) -> Option<[u8; 32]> {
        self.pod.credentials.fingerprint()
    }

    pub fn new(proxy: &Arc<Proxy>, pod: &Arc<LocalPod>, story: &Story, bare: bool) -> Self {
        let address = story.destination.address.unwrap_or(story.dialled);
        Self {
            proxy: proxy.clone(),
            pod: pod.clone(),
            port: address.port(),
            bare,
            source: story.source.peer(),
            destination: story.destination.peer(),
            requests: (story.transport != Transport::Local).then(|| story.requests.clone()),
            begun: OnceLock::new(),
        }
    }

    /// To be called before the first request.
    pub fn begin(&self, story: &Story) {
        let protocol = story.protocol.unwrap_or_default();
        let _once = self.begun.set((story.id, protocol));
    }

    /// What makes the request go with its token; `None`: it goes as it is.
    pub async fn attach(
        self: &Arc<Self>,
        request: &Request<'_>,
    ) -> Result<Option<(Edits, Sent)>, Reply> {
        let selected = self.proxy.selected(&self.pod);
        let outbound = match selected.outbound(self.port, request.host) {
            Ok(None) => return Ok(None),
            Ok(Some(outbound)) => outbound,
            Err(unclear) => {
                let sent = Sent::new(self.clone(), request, None);
                let why = unclear.to_string().into();
                return Err(sent.refuse(Lacking(unclear.code(), why)));
            }
        };
        if outbound.yields_to(request) {
            return Ok(None);
        }
        let mut sent = Sent::new(self.clone(), request, Some(outbound));
        match self.token(outbound, request, &mut sent).await {
            Ok(got) => {
                let value = got.issued.value.clone();
                let edits = Edits {
                    remove: vec![outbound.header.clone()],
                    set: vec![(outbound.header.clone(), value)],
                    path: None,
                };
                sent.got(got);
                Ok(Some((edits, sent)))
            }
            Err(lacking) => Err(sent.refuse(lacking)),
        }
    }

    async fn token(
        &self,
        outbound: &Outbound,
        request: &Request<'_>,
        sent: &mut Sent,
    ) -> Result<Got, Lacking> {
        if self.bare {
            return Err(Lacking(
                "plaintext",
                "the endpoint is outside of the mesh; the token would go in plaintext".into(),
            ));
        }
        let mut trace = Trace::of(request, &TRACEPARENT);
        let subject = match (&outbound.wanted.grant, &outbound.on_behalf) {
            (
                Grant::TokenExchange {
                    subject: SubjectKind::Inbound,
                    ..
                },
                Some(header),
            ) => {
                let own = Trace::of(request, header).ok_or_else(|| {
                    let why = format!("the request has no {header} that tells on whose behalf");
                    Lacking("no-subject", why.into())
                })?;
                let user = self.pod.behalf.find(own.id);
                let user = user.map_err(|e| Lacking("no-subject", e.to_string().into()))?;
                sent.on_behalf_of(user.subject.clone());
                trace.get_or_insert(own);
                Subject::Token {
                    token: user.token,
                    name: user.subject,
                }
            }
            (
                Grant::TokenExchange {
                    subject: SubjectKind::Inbound,
                    ..
                },
                None,
            ) => {
                let token = bearer(request).ok_or(Lacking(
                    "no-subject",
                    "the request has no bearer token to exchange".into(),
                ))?;
                Subject::Token {
                    token: Arc::new(token),
                    name: None,
                }
            }
            (
                Grant::TokenExchange {
                    subject: SubjectKind::ServiceAccount(path),
                    ..
                },
                _,
            ) => {
                let (pod, path) = (self.pod.clone(), path.clone());
                Subject::Pod(
                    self.pod.serial,
                    Arc::new(move || Box::pin(pod.clone().token(path.clone()))),
                )
            }
            (Grant::ClientCredentials | Grant::WorkloadIdentity, _) => Subject::None,
        };
        let call = Call {
            wanted: outbound.wanted.clone(),
            credentials: self.pod.credentials.clone(),
            subject,
            trace,
        };
        let got = self.proxy.tokens.token(call).await;
        got.map_err(|error| Lacking("no-token", error.told().into()))
    }
}

/// The application's own bearer token (RFC 6750 2.1), if it has one.
fn bearer(request: &Request<'_>) -> Option<Zeroizing<String>> {
    let mut values = request.values(&header::AUTHORIZATION);
    let (Some(value), None) = (values.next(), values.next()) else {
        return None;
    };
    let (scheme, token) = value.split_once(' ')?;
    let token = token.trim_start_matches(' ');
    let fits = scheme.eq_ignore_ascii_case("bearer") && is_token(token);
    fits.then(|| Zeroizing::new(token.to_owned()))
}

/// What a record says of the token that an object wants.
pub fn describe(wanted: &crate::oauth::Wanted) -> OutboundRecord {
    OutboundRecord {
        object: wanted.object.clone(),
        grant: wanted.grant_name(),
        issuer: wanted.server_host(),
        audiences: wanted.audiences.clone(),
        resources: wanted.resources.clone(),
        scopes: wanted.scopes.clone(),
        subject: wanted.subject_name(),
        ..OutboundRecord::default()
    }
}

impl Sent {
    fn new(about: Arc<Attacher>, request: &Request<'_>, outbound: Option<&Arc<Outbound>>) -> Self {
        const LONGEST: usize = 512;
        let cut = |text: &str| Some(text.chars().take(LONGEST).collect());
        let (connection, protocol) = about.begun.get().copied().unwrap_or_default();
        let path = request.path.split(['?', '#']).next().unwrap_or_default();
        let record = RequestRecord {
            connection,
            reporter: Reporter::Source,
            protocol,
            started: SystemTime::now(),
            source: about.source.clone(),
            destination: about.destination.clone(),
            method: cut(request.method),
            host: cut(request.host),
            path: cut(path),
            policy: outbound.map(|one| one.policy.clone()),
            trace: Trace::of(request, &TRACEPARENT).map(|trace| trace.id.to_string()),
            outbound: outbound.map(|one| describe(&one.wanted)),
            ..RequestRecord::default()
        };
        Self {
            about,
            began: Instant::now(),
            record,
            got: None,
        }
    }

    fn on_behalf_of(&mut self, user: Option<String>) {
        if let Some(outbound) = &mut self.record.outbound {
            outbound.on_behalf_of = user;
        }
    }

    fn got(&mut self, got: Got) {
        let from = if got.cached { "cached" } else { "fetched" };
        self.about.proxy.metrics.token(from);
        if let Some(outbound) = &mut self.record.outbound {
            outbound.from = Some(from);
        }
        self.record.verdict = Verdict::Allow;
        self.got = Some(got);
    }

    /// The application hears that it is not its peer who is to blame.
    fn refuse(mut self, Lacking(reason, why): Lacking) -> Reply {
        self.about.proxy.metrics.token("none");
        let body = format!("no token for this request: {why}");
        if let Some(outbound) = &mut self.record.outbound {
            outbound.error = Some(why.into_owned());
        }
        self.record.verdict = Verdict::Failed;
        self.record.reason = body.clone();
        let mut reply = Reply::new(StatusCode::SERVICE_UNAVAILABLE, body);
        reply
            .headers
            .push((REASON, HeaderValue::from_static(reason)));
        self.answered(reply.status);
        reply
    }

    /// What the destination answers.
    pub fn answered(&mut self, status: StatusCode) {
        self.record.status = Some(status.as_u16());
        if status == StatusCode::UNAUTHORIZED {
            self.not_taken();
        }
    }

    /// The destination does not take the token: another is got for the next request.
    pub fn not_taken(&self) {
        if let Some(got) = &self.got {
            got.refused();
        }
    }
}

impl Drop for Sent {
    fn drop(&mut self) {
        if self.record.status.is_none() && self.record.reason.is_empty() {
            self.record.reason = "broken off before it was answered".into();
        }
        self.record.duration_ms = self.began.elapsed().as_millis() as u64;
        let record = Box::new(std::mem::take(&mut self.record));
        if let Some(requests) = &self.about.requests {
            requests.add(&record);
        }
        self.about.proxy.audit.record(Record::Request(record));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_bearer_token_is_the_applications() {
        for (values, expected) in [
            (&["Bearer abc"][..], Some("abc")),
            (&["bearer  abc=="], Some("abc==")),
            (&["Bearer abc", "Bearer abc"], None),
            (&["Basic abc"], None),
            (&["Bearer"], None),
            (&["Bearer "], None),
            (&["Bearer a,b"], None),
            (&["Bearer a b"], None),
            (&[], None),
        ] {
            let name = header::AUTHORIZATION;
            let values: Vec<HeaderValue> = (values.iter())
                .map(|value| HeaderValue::from_static(value))
                .collect();
            let request = Request {
                method: "GET",
                path: "/",
                host: "h",
                headers: values.iter().map(|value| (&name, value)).collect(),
            };
            let found = bearer(&request);
            assert_eq!(found.as_deref().map(String::as_str), expected, "{values:?}");
        }
    }
}
