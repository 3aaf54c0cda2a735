//! Three small HTTP servers: administration, metrics, readiness.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
};

use axum::{
    Json, Router,
    extract::{Query, State},
    http::{StatusCode, header},
    response::IntoResponse,
    routing::{get, post},
};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::{
    LogHandle, door,
    page::{self, Access, Certificate, Page},
};
use crate::{
    config::{self, Config},
    lifecycle::Watcher,
};

/// What `postern status` prints.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    pub version: String,
    pub node: String,
    pub ready: bool,
    /// What is wrong right now, in sentences; empty when nothing is.
    pub problems: Vec<String>,
    pub workloads: Vec<LocalWorkload>,
    pub known_workloads: usize,
    pub policies: usize,
    pub connections: usize,
    pub roots: usize,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LocalWorkload {
    pub pod: String,
    pub identity: String,
    pub addresses: Vec<String>,
    /// `enrolled`, or why it is not.
    pub state: String,
}

/// A policy of the API server: which, and what became of it. Nothing of what it says.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Policy {
    pub kind: String,
    pub namespace: String,
    pub name: String,
    pub generation: i64,
    pub accepted: bool,
    /// What is enforced instead of one that is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stands: Option<&'static str>,
}

/// Where the servers get what they show.
pub trait StatusSource: Send + Sync + 'static {
    fn status(&self) -> Status;
    fn metrics(&self) -> String;
    fn config(&self) -> Config;
    /// Policies of the API server, and whether they hold.
    fn policies(&self) -> Vec<Policy>;
    /// The keys that JWT-SVIDs of this node verify with, if they are the agent's own.
    fn jwks(&self) -> Option<serde_json::Value>;
    /// Certificates of the accounts on this node.
    fn certificates(&self) -> Vec<Certificate>;
    /// Somebody was refused at the admin address: for the audit log.
    fn refused(&self, detail: String);
}

pub struct Endpoints {
    admin: TcpListener,
    access: Access,
    /// Where administration is not for this machine alone.
    tls: Option<(TlsAcceptor, config::Guard)>,
    metrics: TcpListener,
    ready: TcpListener,
}

impl Endpoints {
    /// Takes the sockets that an earlier agent has left, of those that it names, and binds
    /// the others.
    pub async fn bind(
        config: &crate::config::Listen,
        inherited: impl Fn(SocketAddr) -> Option<OwnedFd>,
    ) -> Result<Self, String> {
        let one = async |key: &str, address: SocketAddr| {
            match inherited(address) {
                Some(fd) => TcpListener::from_std(fd.into()),
                None => TcpListener::bind(address).await,
            }
            .map_err(|e| format!("listen.{key} {address}: {e}"))
        };
        let admin = &config.admin;
        let tls = match &admin.guard {
            Some(guard) => Some((door::tls(guard)?, guard.clone())),
            None => None,
        };
        Ok(Self {
            admin: one("admin", admin.address).await?,
            access: Access::new(admin.address, admin.guard.as_ref())?,
            tls,
            metrics: one("metrics", config.metrics).await?,
            ready: one("ready", config.ready).await?,
        })
    }

    /// Descriptors of all listeners, for the next agent.
    pub fn sockets(&self) -> io::Result<Vec<(SocketAddr, OwnedFd)>> {
        let all = [&self.admin, &self.metrics, &self.ready];
        all.map(|l| Ok((l.local_addr()?, l.as_fd().try_clone_to_owned()?)))
            .into_iter()
            .collect()
    }
}

type Shared = (Arc<dyn StatusSource>, LogHandle);

/// Serves all three until told to stop.
pub fn serve(endpoints: Endpoints, source: Arc<dyn StatusSource>, log: LogHandle, stop: &Watcher) {
    let shared: Shared = (source.clone(), log);
    let page = Arc::new(Page::new(source, endpoints.access));
    let admin = Router::new()
        .route(
            "/status",
            get(|State(s): State<Shared>| async move { Json(s.0.status()) }),
        )
        .route(
            "/config",
            get(|State(s): State<Shared>| async move { Json(s.0.config()) }),
        )
        .route(
            "/policies",
            get(|State(s): State<Shared>| async move { Json(s.0.policies()) }),
        )
        .route(
            "/log",
            get(|State(s): State<Shared>| async move { s.1.get() }),
        )
        .route("/log", post(set_level))
        .with_state(shared.clone());
    let admin = page::routes(page, admin);
    let metrics = Router::new().route("/metrics", get(metrics));
    let ready = Router::new()
        // That the agent runs and answers; whether it should be restarted.
        .route("/live", get(|| async { "live\n" }))
        .route("/ready", get(ready))
        .route("/jwks.json", get(jwks))
        .route("/healthz/ready", get(ready));
    let mut plain = vec![
        (endpoints.metrics, metrics.with_state(shared.clone())),
        (endpoints.ready, ready.with_state(shared)),
    ];
    match endpoints.tls {
        None => plain.push((endpoints.admin, admin)),
        Some((acceptor, guard)) => {
            let served = door::serve(endpoints.admin, acceptor, guard, admin, stop.clone());
            tokio::spawn(served);
        }
    }
    for (listener, router) in plain {
        let stop = stop.clone();
        tokio::spawn(async move {
            let stopped = async move { stop.triggered().await };
            let served = axum::serve(listener, router)
                .with_graceful_shutdown(stopped)
                .await;
            if let Err(error) = served {
                tracing::error!(%error, "a server of the agent ended");
            }
        });
    }
}

#[derive(Deserialize)]
struct Level {
    level: String,
}

async fn set_level(State(shared): State<Shared>, Query(query): Query<Level>) -> impl IntoResponse {
    match shared.1.set(&query.level) {
        Ok(()) => {
            tracing::info!(level = query.level, "log level changed");
            (StatusCode::OK, shared.1.get())
        }
        Err(error) => (StatusCode::BAD_REQUEST, error),
    }
}

async fn metrics(State(shared): State<Shared>) -> impl IntoResponse {
    const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, OPEN_METRICS)], shared.0.metrics())
}

/// A key set (RFC 7517 5) is public.
async fn jwks(State(shared): State<Shared>) -> impl IntoResponse {
    const KEY_SET: &str = "application/jwk-set+json";
    match shared.0.jwks() {
        Some(jwks) => Ok(([(header::CONTENT_TYPE, KEY_SET)], jwks.to_string())),
        None => Err(StatusCode::NOT_FOUND),
    }
}

async fn ready(State(shared): State<Shared>) -> impl IntoResponse {
    let status = shared.0.status();
    if status.ready {
        (StatusCode::OK, "ready\n".to_owned())
    } else {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            status.problems.join("\n") + "\n",
        )
    }
}
