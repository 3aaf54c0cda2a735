//! The agent as a client of authorization servers: tokens that it got, and how they
//! come. One flight at a time for each, whose outcome all who wait share; a token that
//! nears its end is replaced while it still serves; after a failure there is a pause.
//! The agent reaches servers from its own network namespace: pods hold no secret, and
//! need no way there.

mod slot;
#[cfg(test)]
mod tests;

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use aws_lc_rs::digest::{SHA256, digest};
use bytes::Bytes;
use http::HeaderValue;
use moka::sync::Cache;
use tokio::{sync::Semaphore, time::timeout};
use zeroize::Zeroizing;

use self::slot::{Slot, Take};
use super::{
    Grant, GrantError, Prover, Server, SubjectKind, Wanted,
    endpoint::Endpoints,
    grant::{self, Given},
};
use crate::{
    fetch::{Fetcher, Trust},
    identity::{Credentials, IdentityError, JwtSvid, SpiffeId},
    trace::{TRACEPARENT, Trace},
};

/// Tokens that are kept at once. A user's token that is exchanged is one.
const SLOTS: u64 = 10_000;
/// One that nobody asks for goes.
const IDLE: Duration = Duration::from_secs(3_600);
/// Grants under way at once at one server: a slow one keeps no other waiting.
const FLIGHTS: usize = 32;
/// Grants of one workload that are under way or wait. What comes beyond is refused at
/// once: an application can make up subject tokens without end.
const WAITING: usize = 128;
/// What was exchanged for a user's token serves no longer: the user's may end earlier
/// than its server thought.
const FOR_A_USER: Duration = Duration::from_secs(300);

type Boxed<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Gives JWT-SVIDs: of whom, and for which audience.
pub type Svids =
    Box<dyn Fn(SpiffeId, String) -> Boxed<Result<JwtSvid, IdentityError>> + Send + Sync>;

/// Is told of each grant that was tried.
pub type Witness = Box<dyn Fn(&Report<'_>) + Send + Sync>;

/// Who needs a token, and for what.
#[derive(Clone)]
pub struct Call {
    pub wanted: Arc<Wanted>,
    pub credentials: Arc<Credentials>,
    pub subject: Subject,
    pub trace: Option<Trace>,
}

/// What is exchanged.
#[derive(Clone)]
pub enum Subject {
    None,
    /// A user's token, and the user's name for records.
    Token {
        token: Arc<Zeroizing<String>>,
        name: Option<String>,
    },
    /// Of the pod with this serial: read anew for each exchange.
    Pod(
        u64,
        Arc<dyn Fn() -> Boxed<Result<Zeroizing<String>, String>> + Send + Sync>,
    ),
}

/// A grant that was tried.
pub struct Report<'a> {
    pub call: &'a Call,
    pub took: Duration,
    /// How long the token holds.
    pub result: Result<Duration, &'a GrantError>,
}

/// Of what a token is: each has its own.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    wanted: Arc<Wanted>,
    workload: SpiffeId,
    /// SHA-256 of the certificate whose key the token may be bound to.
    certificate: Option<[u8; 32]>,
    /// SHA-256 of the user's token.
    user: Option<[u8; 32]>,
    pod: Option<u64>,
}

/// A token as it goes into a header.
pub struct Issued {
    /// With its prefix; marked as sensitive, and wiped with its last copy.
    pub value: HeaderValue,
    expires: Instant,
    refresh: Instant,
    /// It came after another that a destination had refused.
    second: bool,
}

/// A token for one request.
pub struct Got {
    pub issued: Arc<Issued>,
    /// It was at hand.
    pub cached: bool,
    slot: Arc<Slot>,
}

impl Got {
    /// The destination answered 401: it is not used again. Another that is refused in
    /// its stead stays until its time, so that nobody asks without end.
    pub fn refused(&self) {
        self.slot.refused(&self.issued);
    }
}

/// Never the token.
impl fmt::Debug for Got {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Got")
            .field("cached", &self.cached)
            .finish_non_exhaustive()
    }
}

pub struct TokenClient {
    trust: Trust,
    fetcher: Fetcher,
    endpoints: Endpoints,
    svids: Svids,
    witness: Witness,
    slots: Cache<Key, Arc<Slot>>,
    flights: Cache<Server, Arc<Semaphore>>,
    waiting: Cache<SpiffeId, Arc<Semaphore>>,
    now: Box<dyn Fn() -> Instant + Send + Sync>,
}

impl TokenClient {
    pub fn new(trust: Trust, svids: Svids, witness: Witness) -> Self {
        Self {
            fetcher: Fetcher::with_trust(&trust),
            trust,
            endpoints: Endpoints::new(),
            svids,
            witness,
            slots: Cache::builder()
                .max_capacity(SLOTS)
                .time_to_idle(IDLE)
                .build(),
            flights: Cache::new(SLOTS),
            waiting: Cache::new(SLOTS),
            now: Box::new(Instant::now),
        }
    }

    /// A token: the one at hand, or a new one. Waits no longer than the call's limit.
    pub async fn token(self: &Arc<Self>, call: Call) -> Result<Got, Arc<GrantError>> {
        let slot = self.slots.get_with(key(&call), Arc::default);
        let now = (self.now)();
        let flight = match slot.take(now, || self.start(&slot, call)) {
            Take::Token(issued) => {
                return Ok(Got {
                    issued,
                    cached: true,
                    slot,
                });
            }
            Take::Failed(error) => return Err(error),
            Take::Wait(flight) => flight,
        };
        let issued = slot.land(flight).await?;
        Ok(Got {
            issued,
            cached: false,
            slot,
        })
    }

    /// Wipes tokens whose time is over. To be called now and then.
    pub fn sweep(&self) {
        let now = (self.now)();
        for (_, slot) in &self.slots {
            slot.wipe(now);
        }
        self.slots.run_pending_tasks();
    }

    /// Sets out for a token, in a task of its own: it goes on when its caller leaves.
    fn start(self: &Arc<Self>, slot: &Arc<Slot>, call: Call) -> slot::Flight {
        let (land, flight) = tokio::sync::watch::channel(None);
        let (client, slot) = (self.clone(), slot.clone());
        tokio::spawn(async move {
            let began = Instant::now();
            let limit = call.wanted.timeout;
            let id = call.credentials.id.clone();
            let places = (client.waiting).get_with(id, || Arc::new(Semaphore::new(WAITING)));
            let given = match places.try_acquire() {
                Ok(_place) => match timeout(limit, client.fly(&call)).await {
                    Ok(given) => given,
                    Err(_elapsed) => Err(GrantError::Timeout(limit)),
                },
                Err(_full) => Err(GrantError::Busy),
            };
            (client.witness)(&Report {
                call: &call,
                took: began.elapsed(),
                result: given.as_ref().map(|given| given.life),
            });
            let prefix = &call.wanted.prefix;
            let now = (client.now)();
            let outcome = given.map(|given| (header(prefix, &given.token), given.life));
            let outcome = slot.store(outcome, now);
            let _nobody_waits = land.send(Some(outcome));
        });
        flight
    }

    async fn fly(&self, call: &Call) -> Result<Given, GrantError> {
        let Some(server) = &call.wanted.server else {
            return self.own(call).await;
        };
        // The pod's file system may be slow: that is its own time.
        let subject = match &call.subject {
            Subject::None => None,
            Subject::Token { token, .. } => Some(Zeroizing::clone(token)),
            Subject::Pod(_, read) => Some(read().await.map_err(GrantError::Subject)?),
        };
        let flights = (self.flights).get_with(server.clone(), || Arc::new(Semaphore::new(FLIGHTS)));
        let _one_of_few = flights.acquire().await.map_err(|_| GrantError::Ended)?;
        let result = self.ask(call, server, subject).await;
        if matches!(
            result,
            Err(GrantError::Fetch(_) | GrantError::Answer { .. })
        ) {
            self.endpoints.forget(server);
        }
        result
    }

    /// A JWT-SVID.
    async fn own(&self, call: &Call) -> Result<Given, GrantError> {
        let svid = self.svid(call, call.wanted.audiences.first()).await?;
        Ok(Given {
            life: (svid.expires)
                .duration_since(SystemTime::now())
                .unwrap_or_default(),
            token: svid.token,
        })
    }

    async fn svid(&self, call: &Call, audience: Option<&String>) -> Result<JwtSvid, GrantError> {
        let audience = audience.cloned().unwrap_or_default();
        Ok((self.svids)(call.credentials.id.clone(), audience).await?)
    }

    async fn ask(
        &self,
        call: &Call,
        server: &Server,
        subject: Option<Zeroizing<String>>,
    ) -> Result<Given, GrantError> {
        let Call {
            wanted,
            credentials,
            ..
        } = call;
        let limit = wanted.timeout;
        let endpoint = self.endpoints.of(server, &self.fetcher, limit).await?;
        let audience = &endpoint.audience;
        let actor = match wanted.grant {
            Grant::TokenExchange { actor: true, .. } => {
                Some(self.svid(call, Some(audience)).await?.token)
            }
            _ => None,
        };
        let svid = match wanted.authentication.needs_jwt_svid() {
            true => Some(self.svid(call, Some(audience)).await?),
            false => None,
        };
        let id = credentials.id.to_string();
        let prover = Prover {
            client_id: wanted.client_id.as_deref().unwrap_or(&id),
            audience,
            workload: Some(credentials),
            jwt_svid: svid.as_ref().map(|svid| svid.token.as_str()),
        };
        let mut prepared = wanted.authentication.prepare(&prover, SystemTime::now())?;
        if let Some(trace) = &call.trace {
            let pair = (TRACEPARENT, trace.value.clone());
            prepared.headers.push(pair);
        }
        let mut form = grant::form(wanted, subject, actor);
        form.append(&mut prepared.form);
        let form: Vec<(&str, &str)> = form.iter().map(|(n, v)| (*n, v.as_str())).collect();
        let answer = match prepared.with_certificate {
            false => {
                let url = &endpoint.url;
                let sent = self.fetcher.post_form(url, &form, &prepared.headers, limit);
                sent.await?
            }
            true => {
                let fetcher = Fetcher::with_certificate(&self.trust, credentials.certificate());
                let url = endpoint.mutual_tls.as_ref().unwrap_or(&endpoint.url);
                fetcher
                    .post_form(url, &form, &prepared.headers, limit)
                    .await?
            }
        };
        let mut given = grant::read(wanted, &answer)?;
        if matches!(
            wanted.grant,
            Grant::TokenExchange {
                subject: SubjectKind::Inbound,
                ..
            }
        ) {
            given.life = given.life.min(FOR_A_USER);
        }
        Ok(given)
    }
}

fn key(call: &Call) -> Key {
    let (user, pod) = match &call.subject {
        Subject::None => (None, None),
        Subject::Token { token, .. } => {
            let digest = digest(&SHA256, token.as_bytes());
            let digest = digest.as_ref().try_into();
            (Some(digest.expect("SHA-256 has 32 bytes")), None)
        }
        Subject::Pod(serial, _) => (None, Some(*serial)),
    };
    let bound = call.wanted.uses_workload_key();
    Key {
        wanted: call.wanted.clone(),
        workload: call.credentials.id.clone(),
        certificate: call.credentials.fingerprint().filter(|_| bound),
        user,
        pod,
    }
}

/// Copied once, into memory that is wiped.
fn header(prefix: &str, token: &str) -> HeaderValue {
    let bytes = Zeroizing::new([prefix.as_bytes(), token.as_bytes()].concat());
    let mut value =
        HeaderValue::from_maybe_shared(Bytes::from_owner(bytes)).expect("both are visible ASCII");
    value.set_sensitive(true);
    value
}
