//! The page of the admin address, and the JSON that it is made of. Everything is in the
//! binary: it asks no other host for anything.
//!
//! | path | answer |
//! |---|---|
//! | `/api/map` | [`Map`]: who calls whom, as the audit log tells |
//! | `/api/decisions` | [`Found`]: records, newest first; the query is [`Filter`] |
//! | `/api/decisions/{seq}` | one record, as it stands in the log |
//! | `/api/certificates` | [`Certificate`]s of this node's accounts |
//! | `/api/health` | [`Health`] |
//!
//! Each has an `ETag`; with `If-None-Match` the answer is 304 while nothing is new.

mod access;
mod certificates;
mod decisions;
mod edges;
mod live;
mod record;
mod samples;

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use askama::Template;
use aws_lc_rs::digest::{SHA256, digest};
use axum::{
    Extension, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, Path, Query, Request, State},
    middleware::Next,
    response::{IntoResponse, Redirect, Response},
    routing::{get, post},
};
use http::{
    HeaderMap, HeaderName, HeaderValue, StatusCode,
    header::{
        CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, IF_NONE_MATCH, REFERRER_POLICY,
        SET_COOKIE, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
    },
};
use serde::Serialize;
use zeroize::Zeroizing;

use self::{
    access::{Answer, Asked, Login},
    decisions::{Filter, Found},
    edges::Map,
    live::{Live, Log},
    record::At,
    samples::Sample,
};
use super::{Status, StatusSource};

pub use access::Access;
pub use certificates::Certificate;

const CONTENT_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
    img-src 'self' data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; \
    form-action 'none'";
/// Of the form, which works without script.
const LOGIN_POLICY: &str = "default-src 'none'; style-src 'self'; frame-ancestors 'none'; \
    base-uri 'none'; form-action 'self'";
/// Counting what is in the kernel's maps takes time: once in so long is enough.
const COUNTED: Duration = Duration::from_secs(5);
/// Refusals become a record at once, and then one for all of so long.
const REFUSALS: Duration = Duration::from_secs(60);

/// Who asks; an extension of requests that came over TLS.
#[derive(Clone, Copy)]
pub struct From(pub IpAddr);

/// What the routes share.
pub struct Page {
    source: Arc<dyn StatusSource>,
    live: Arc<Live>,
    access: Access,
    started: SystemTime,
    samples: Mutex<Option<(Instant, Vec<Sample>)>>,
    refused: AtomicU64,
    /// How long all further refusals become one record.
    refusals: Duration,
}

type Shared = Arc<Page>;

/// `GET /api/health`.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Health {
    status: Status,
    /// RFC 3339.
    started: String,
    /// How the reading of the audit log goes.
    log: Log,
    /// The agent's own metrics.
    samples: Vec<Sample>,
    /// How many entries a kernel map holds at most.
    limits: BTreeMap<&'static str, u32>,
    /// Whether people log in here.
    guarded: bool,
}

#[derive(Serialize)]
struct MapAnswer {
    #[serde(flatten)]
    map: Map,
    node: String,
    log: Log,
}

#[derive(Serialize)]
struct DecisionsAnswer<'a> {
    #[serde(flatten)]
    found: Found<'a>,
    log: &'a Log,
}

#[derive(Template)]
#[template(path = "admin-login.html")]
struct LoginPage<'a> {
    /// What was wrong; empty at first.
    wrong: &'a str,
}

impl Page {
    pub fn new(source: Arc<dyn StatusSource>, access: Access) -> Self {
        let config = source.config();
        let directory = config.audit.directory(&config.state);
        let pods = source.clone();
        let live = Live::new(directory, move || {
            let local = pods.status().workloads.into_iter();
            local.map(|workload| workload.pod).collect()
        });
        Self {
            source,
            live,
            access,
            started: SystemTime::now(),
            samples: Mutex::default(),
            refused: AtomicU64::new(0),
            refusals: REFUSALS,
        }
    }

    fn samples(&self) -> Vec<Sample> {
        let mut kept = self.samples.lock().expect("no panic while it is held");
        match &*kept {
            Some((at, samples)) if at.elapsed() < COUNTED => samples.clone(),
            _ => {
                let samples = samples::samples(&self.source.metrics());
                *kept = Some((Instant::now(), samples.clone()));
                samples
            }
        }
    }

    /// Tells the audit log, which a flood of refusals does not fill.
    fn refused(self: &Arc<Self>, from: IpAddr, why: &'static str) {
        if self.refused.fetch_add(1, Ordering::Relaxed) > 0 {
            return;
        }
        self.source.refused(format!("{from}: {why}"));
        let page = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(page.refusals).await;
            let more = page.refused.swap(0, Ordering::Relaxed) - 1;
            if more > 0 {
                let seconds = page.refusals.as_secs();
                page.source
                    .refused(format!("{more} more within {seconds} seconds"));
            }
        });
    }
}

/// The page, its API and `more`, all behind the same door.
pub fn routes(page: Shared, more: Router) -> Router {
    Router::new()
        .route("/", get(|| async { asset("text/html", INDEX) }))
        .route("/app.js", get(|| async { asset("text/javascript", APP) }))
        .route("/draw.js", get(|| async { asset("text/javascript", DRAW) }))
        .route("/style.css", get(|| async { asset("text/css", STYLE) }))
        .route("/icon.svg", get(|| async { asset("image/svg+xml", ICON) }))
        .route("/login", get(login_form).post(log_in))
        .route("/logout", post(log_out))
        .route("/api/map", get(map))
        .route("/api/decisions", get(decisions))
        .route("/api/decisions/{seq}", get(decision))
        .route("/api/certificates", get(certificates))
        .route("/api/health", get(health))
        .layer(DefaultBodyLimit::max(4 << 10))
        .with_state(page.clone())
        .merge(more)
        .layer(axum::middleware::from_fn_with_state(page, door))
        .layer(axum::middleware::map_response(secured))
}

const INDEX: &str = include_str!("../../assets/admin/index.html");
const APP: &str = include_str!("../../assets/admin/app.js");
const DRAW: &str = include_str!("../../assets/admin/draw.js");
const STYLE: &str = include_str!("../../assets/admin/style.css");
const ICON: &str = include_str!("../../assets/admin/icon.svg");

fn asset(kind: &str, content: &'static str) -> Response {
    ([(CONTENT_TYPE, format!("{kind}; charset=utf-8"))], content).into_response()
}

/// Lets through whoever may.
async fn door(State(page): State<Shared>, request: Request, next: Next) -> Response {
    let from = who(request.extensions().get());
    let asked = Asked {
        method: request.method(),
        path: request.uri().path(),
        headers: request.headers(),
        from,
        now: now(),
    };
    match page.access.judge(&asked) {
        Answer::Pass => next.run(request).await,
        Answer::LogIn => Redirect::to("/login").into_response(),
        Answer::Refused(status, why) => {
            page.refused(from, why);
            let mut response = (status, format!("{why}\n")).into_response();
            if status == StatusCode::UNAUTHORIZED {
                let scheme = HeaderValue::from_static("Bearer realm=\"postern\"");
                response.headers_mut().insert(WWW_AUTHENTICATE, scheme);
            }
            response
        }
    }
}

/// Adds what every answer has.
async fn secured(mut response: Response) -> Response {
    let headers = response.headers_mut();
    for (name, value) in [
        (CONTENT_SECURITY_POLICY, CONTENT_POLICY),
        (CACHE_CONTROL, "no-store"),
        (REFERRER_POLICY, "no-referrer"),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (X_FRAME_OPTIONS, "DENY"),
        (
            HeaderName::from_static("cross-origin-opener-policy"),
            "same-origin",
        ),
        (
            HeaderName::from_static("cross-origin-resource-policy"),
            "same-origin",
        ),
    ] {
        headers
            .entry(name)
            .or_insert(HeaderValue::from_static(value));
    }
    response
}

async fn map(State(page): State<Shared>, headers: HeaderMap) -> Response {
    let (map, log) = (page.live).look(|shown| (shown.edges.map(At::now()), shown.log.clone()));
    let node = page.source.status().node;
    answer(&headers, &MapAnswer { map, node, log })
}

async fn decisions(
    State(page): State<Shared>,
    headers: HeaderMap,
    Query(filter): Query<Filter>,
) -> Response {
    page.live.look(|shown| match shown.decisions.find(&filter) {
        Ok(found) => {
            let log = &shown.log;
            answer(&headers, &DecisionsAnswer { found, log })
        }
        Err(why) => (StatusCode::BAD_REQUEST, why).into_response(),
    })
}

async fn decision(State(page): State<Shared>, Path(seq): Path<u64>) -> Response {
    let line = (page.live).look(|shown| shown.decisions.line(seq).map(str::to_owned));
    match line {
        Some(line) => ([(CONTENT_TYPE, "application/json")], line).into_response(),
        None => (StatusCode::NOT_FOUND, "this record is not kept any more").into_response(),
    }
}

async fn certificates(State(page): State<Shared>, headers: HeaderMap) -> Response {
    answer(&headers, &page.source.certificates())
}

async fn health(State(page): State<Shared>, headers: HeaderMap) -> Response {
    let kernel = page.source.config().kernel;
    let health = Health {
        status: page.source.status(),
        started: humantime::format_rfc3339_seconds(page.started).to_string(),
        log: page.live.look(|shown| shown.log.clone()),
        // It walks the kernel's maps: not a thing for the runtime to wait on.
        samples: tokio::task::block_in_place(|| page.samples()),
        limits: BTreeMap::from([
            ("MESH", kernel.max_destinations),
            ("WORKLOADS", kernel.max_workloads),
            ("CGROUPS", kernel.max_workloads),
            ("DIALS", kernel.max_connections),
            ("FLOWS", kernel.max_connections),
            ("CLIENTS", kernel.max_connections),
        ]),
        guarded: page.access.guarded(),
    };
    answer(&headers, &health)
}

async fn login_form() -> Response {
    login_page(StatusCode::OK, "")
}

async fn log_in(
    State(page): State<Shared>,
    from: Option<Extension<From>>,
    body: Bytes,
) -> Response {
    let from = who(from.as_deref());
    let token = form_urlencoded::parse(&body).find(|(name, _)| name == "token");
    let token = token.map(|(_, token)| Zeroizing::new(token.into_owned()));
    match page.access.log_in(&token.unwrap_or_default(), from, now()) {
        Login::In(cookie) => ([(SET_COOKIE, cookie)], Redirect::to("/")).into_response(),
        Login::Wrong => {
            page.refused(from, "a wrong token in the form");
            login_page(StatusCode::UNAUTHORIZED, "The token is not right.")
        }
        Login::TooMany => {
            page.refused(from, "too many wrong tokens in the form");
            let why = "Too many wrong tokens. Try again in a minute.";
            login_page(StatusCode::TOO_MANY_REQUESTS, why)
        }
    }
}

async fn log_out(State(page): State<Shared>, headers: HeaderMap) -> Response {
    let cookie = page.access.log_out(&headers);
    ([(SET_COOKIE, cookie)], StatusCode::NO_CONTENT).into_response()
}

fn login_page(status: StatusCode, wrong: &str) -> Response {
    let Ok(text) = (LoginPage { wrong }).render() else {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    let headers = [
        (CONTENT_TYPE, "text/html; charset=utf-8"),
        (CONTENT_SECURITY_POLICY, LOGIN_POLICY),
    ];
    (status, headers, text).into_response()
}

/// JSON, or that nothing is new.
fn answer(headers: &HeaderMap, value: &impl Serialize) -> Response {
    let Ok(body) = serde_json::to_vec(value) else {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    let hash = digest(&SHA256, &body);
    let hex: String = (hash.as_ref()[..16].iter())
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let tag = format!("\"{hex}\"");
    if headers.get(IF_NONE_MATCH).is_some_and(|has| *has == tag) {
        return ([(ETAG, tag)], StatusCode::NOT_MODIFIED).into_response();
    }
    let headers = [(CONTENT_TYPE, "application/json".to_owned()), (ETAG, tag)];
    (headers, body).into_response()
}

/// Who asks. Without TLS it is somebody on this machine.
fn who(from: Option<&From>) -> IpAddr {
    from.map_or(Ipv4Addr::LOCALHOST.into(), |from| from.0)
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests;
