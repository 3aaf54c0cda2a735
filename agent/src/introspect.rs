//! Asks authorization servers about tokens (RFC 7662): whether they are active, and
//! what they say. Fails closed: what cannot be found out is refused.
//!
//! An answer is kept for a bounded time, never beyond the token's own; requests with
//! the same token at the same time share one exchange. Nothing here is ever told of a
//! token but its SHA-256.

mod flights;
#[cfg(test)]
pub(crate) mod tests;

use std::{
    collections::HashMap,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use aws_lc_rs::digest::{Context, SHA256};
use http::StatusCode;
use serde_json::{Map, Value};
use tokio::{sync::Semaphore, time::Instant};

use crate::{
    fetch::{Answer, Fetcher, RootsError, Trust},
    identity::Credentials,
    jwt::{Claims, MAX_TOKEN, SCP, TokenError, json},
    oauth::{ClientAuthentication, Prover},
};
use flights::Flights;

/// Largest answer, bytes.
const MAX_ANSWER: usize = 64 << 10;
/// How long it is known that a token is not active. It may become so.
const INACTIVE: Duration = Duration::from_secs(5);
/// How long a server that gave no answer is left alone about a token.
const UNAVAILABLE: Duration = Duration::from_secs(1);
/// Exchanges with a server at the same time: anyone can make up tokens.
const MAX_EXCHANGES: usize = 64;

/// Whom to ask, and how.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    pub url: String,
    /// Whose tokens these are.
    pub issuer: String,
    pub client_id: String,
    pub authentication: ClientAuthentication,
    /// One of them must be in `aud`; empty: `aud` is not looked at.
    pub audiences: Vec<String>,
    /// How long an answer holds.
    pub cache: Duration,
    /// For all of an exchange, and for the wait before it.
    pub timeout: Duration,
}

/// Why a token is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IntrospectError {
    #[error("the token is not active")]
    Inactive,
    /// The answer is about a token that is not for us, or not for now.
    #[error("{0}")]
    Token(#[from] TokenError),
    #[error("the answer is about another kind of token")]
    Kind,
    /// Nobody can say.
    #[error("introspection: {0}")]
    Unavailable(Arc<str>),
}

impl IntrospectError {
    /// Whether it is the token that is at fault.
    pub fn is_of_token(&self) -> bool {
        !matches!(self, Self::Unavailable(_))
    }
}

pub type Introspected = Result<Arc<Claims>, IntrospectError>;

/// Asks, and remembers.
pub struct Introspector {
    trust: Trust,
    /// Shows no certificate.
    fetcher: Fetcher,
    flights: Flights,
    /// By URL, so that a slow server holds up nobody else's tokens.
    servers: Mutex<HashMap<String, Arc<Server>>>,
}

struct Server {
    exchanges: Semaphore,
    /// Whether its last exchange failed: that is told once.
    failing: AtomicBool,
}

/// SHA-256 of the token, of whom was asked, and by whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key([u8; 32]);

/// What came of an exchange.
#[derive(Clone, Debug)]
struct Told {
    result: Introspected,
    until: Instant,
    /// Bytes of the answer.
    size: usize,
}

impl Introspector {
    /// Trusts the roots that key sets are fetched under.
    pub fn new(more_roots: Option<&Path>) -> Result<Self, RootsError> {
        Ok(Self {
            trust: Trust::new(more_roots)?,
            fetcher: Fetcher::new(more_roots)?,
            flights: Flights::default(),
            servers: Mutex::default(),
        })
    }

    /// What the server says of a token, now or a short time ago. `workload` is on
    /// whose behalf it is asked.
    pub async fn ask(
        &self,
        endpoint: &Endpoint,
        workload: Option<&Arc<Credentials>>,
        token: &str,
        now: SystemTime,
    ) -> Introspected {
        if token.len() > MAX_TOKEN {
            return Err(TokenError::TooLarge.into());
        }
        let key = Key::new(endpoint, workload, token);
        let exchange = || self.exchange(endpoint, workload, token, now);
        // Who began an exchange may go away, and then it begins anew.
        let limit = endpoint.timeout.saturating_mul(2);
        let told = tokio::time::timeout(limit, self.flights.get(key, exchange)).await;
        let late = |_elapsed| Err(unavailable(&format!("no answer within {limit:?}")));
        let claims = told.unwrap_or_else(late)?;
        claims.check_time(now)?;
        Ok(claims)
    }

    fn server(&self, url: &str) -> Arc<Server> {
        let mut all = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || {
            Arc::new(Server {
                exchanges: Semaphore::new(MAX_EXCHANGES),
                failing: AtomicBool::new(false),
            })
        };
        all.entry(url.to_owned()).or_insert_with(new).clone()
    }

    async fn exchange(
        &self,
        endpoint: &Endpoint,
        workload: Option<&Arc<Credentials>>,
        token: &str,
        now: SystemTime,
    ) -> Told {
        let limit = endpoint.timeout;
        let server = self.server(&endpoint.url);
        let asked = tokio::time::timeout(limit, async {
            let free = server.exchanges.acquire().await;
            let _slot = free.map_err(|_closed| unavailable("the agent ends"))?;
            self.post(endpoint, workload, token, now).await
        });
        let answer = match asked.await {
            Ok(answer) => answer,
            Err(_elapsed) => Err(unavailable(&format!("no answer within {limit:?}"))),
        };
        let size = answer.as_ref().map_or(0, |answer| answer.body.len());
        let result = answer.and_then(|answer| read(endpoint, &answer, now));
        let holds = match &result {
            Ok(claims) => match claims.expires() {
                // Within its leeway it is taken, but not remembered.
                Some(expires) => expires.duration_since(now).unwrap_or_default(),
                None => Duration::MAX,
            },
            Err(error) if error.is_of_token() => INACTIVE,
            Err(_nobody_can_say) => UNAVAILABLE,
        };
        let failed = result.as_ref().err().filter(|error| !error.is_of_token());
        let before = server.failing.swap(failed.is_some(), Ordering::Relaxed);
        match failed {
            Some(error) if !before => {
                tracing::warn!(issuer = endpoint.issuer, %error, "tokens cannot be checked");
            }
            None if before => {
                tracing::info!(issuer = endpoint.issuer, "tokens can be checked again");
            }
            _ => {}
        }
        Told {
            result,
            until: Instant::now() + holds.min(endpoint.cache),
            size,
        }
    }

    async fn post(
        &self,
        endpoint: &Endpoint,
        workload: Option<&Arc<Credentials>>,
        token: &str,
        now: SystemTime,
    ) -> Result<Answer, IntrospectError> {
        let prover = Prover {
            client_id: &endpoint.client_id,
            audience: &endpoint.issuer,
            workload,
            jwt_svid: None,
        };
        let prepared = (endpoint.authentication)
            .prepare(&prover, now)
            .map_err(|e| unavailable(&e.to_string()))?;
        let mut form: Vec<(&str, &str)> =
            vec![("token", token), ("token_type_hint", "access_token")];
        form.extend(
            prepared
                .form
                .iter()
                .map(|(name, value)| (*name, value.as_str())),
        );
        let shown = (workload.filter(|_| prepared.with_certificate))
            .map(|workload| Fetcher::with_certificate(&self.trust, workload.certificate()));
        shown
            .as_ref()
            .unwrap_or(&self.fetcher)
            .post_form(&endpoint.url, &form, &prepared.headers, endpoint.timeout)
            .await
            .map_err(|e| unavailable(&e.to_string()))
    }
}

fn unavailable(why: &str) -> IntrospectError {
    IntrospectError::Unavailable(why.into())
}

fn read(endpoint: &Endpoint, answer: &Answer, now: SystemTime) -> Introspected {
    if answer.status != StatusCode::OK {
        return Err(unavailable(&format!(
            "answered {}, only 200 is taken",
            answer.status
        )));
    }
    if answer.body.len() > MAX_ANSWER {
        return Err(unavailable(&format!(
            "the answer is longer than {MAX_ANSWER} bytes"
        )));
    }
    let Ok(Value::Object(answer)) = json::parse(&answer.body) else {
        return Err(unavailable("the answer is not a strict JSON object"));
    };
    match answer.get("active") {
        Some(Value::Bool(true)) => {}
        Some(Value::Bool(false)) => return Err(IntrospectError::Inactive),
        _ => return Err(unavailable("the answer is without `active`")),
    }
    if !is_access_token(&answer) {
        return Err(IntrospectError::Kind);
    }
    let scp = [SCP.to_owned()];
    let claims = Claims::introspected(answer, &endpoint.issuer, &endpoint.audiences, &scp)?;
    claims.check_time(now)?;
    Ok(Arc::new(claims))
}

/// RFC 7662 4: a server may tell about refresh tokens, too, and no resource may take
/// one. Not all name the kind, and not all in the same member.
fn is_access_token(answer: &Map<String, Value>) -> bool {
    let names = ["token_type", "token_use", "typ"];
    let told = names.iter().filter_map(|name| answer.get(*name)?.as_str());
    !told
        .map(str::to_ascii_lowercase)
        .any(|kind| kind.starts_with("refresh") || matches!(&*kind, "id" | "id_token" | "idtoken"))
}

impl Key {
    /// Each part with its length before it, so that no two combinations read the same.
    fn new(endpoint: &Endpoint, workload: Option<&Arc<Credentials>>, token: &str) -> Self {
        let mut context = Context::new(&SHA256);
        let mut part = |bytes: &[u8]| {
            context.update(&(bytes.len() as u64).to_be_bytes());
            context.update(bytes);
        };
        let asked_by = workload.map(|workload| workload.id.to_string());
        // A change of how it asks, or how long answers hold, asks anew.
        let how = format!("{:?} {:?}", endpoint.authentication, endpoint.cache);
        for text in [
            &endpoint.url,
            &endpoint.issuer,
            &endpoint.client_id,
            &how,
            asked_by.as_deref().unwrap_or_default(),
            token,
        ] {
            part(text.as_bytes());
        }
        for audience in &endpoint.audiences {
            part(audience.as_bytes());
        }
        let digest = context.finish();
        Self(digest.as_ref().try_into().expect("SHA-256 has 32 bytes"))
    }
}
