//! `postern authority`: where there is no identity provider yet, Postern brings one.
//! An OAuth 2.0 and OpenID Connect authorization server for people and services, and
//! the trust domain's certificate authority for agents, so that no node holds the root.
//!
//! `config -> store, keys -> Server -> routes`; `serve` is TLS around them. Each module
//! with routes says which RFC it implements. All state that must outlive the process is
//! in the store; every write goes through [`Store`], and what was answered was committed
//! before.

mod authorize;
pub mod ca;
pub mod clients;
mod clock;
pub mod config;
mod keys;
mod pages;
pub mod people;
mod serve;
mod store;

use std::{
    fs::Permissions,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    sync::Arc,
};

use anyhow::{Context as _, Result};
use axum::{Router, routing::get};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    app::Misconfigured,
    audit::{Audit, AuthorityRecord, Record},
    identity::Root,
};

pub use clock::Clock;
pub use config::Config;
pub use keys::{Keys, KeysError};
pub use serve::Peer;
pub use store::{Code, Store, StoreError, User};

/// What every request needs; one for the whole process.
pub struct Server {
    pub config: Config,
    pub store: Store,
    pub keys: Keys,
    pub root: Root,
    pub ca: ca::Ca,
    pub clock: Clock,
    pub audit: Audit,
    pub people: people::People,
}

pub type Shared = Arc<Server>;

impl Server {
    /// Opens files and the store; everything that can be wrong with them is found here.
    pub async fn open(config: Config, clock: Clock, audit: Audit) -> Result<Self> {
        let misconfigured = |e: &dyn std::fmt::Display| Misconfigured(e.to_string());
        make_state(&config)?;
        let root = Root::of(
            config.certificates.root_certificate.as_deref(),
            config.certificates.root_key.as_deref(),
            &config.state,
            &config.trust_domain,
        )
        .map_err(|e| misconfigured(&e))?;
        let store = Store::open(&config).await.map_err(|e| misconfigured(&e))?;
        let keys = Keys::open(&config).map_err(|e| misconfigured(&e))?;
        let ca = ca::Ca::open(&config, &root, &store).await?;
        let people = people::People::new(&config).map_err(|e| misconfigured(&e))?;
        Ok(Self {
            config,
            store,
            keys,
            root,
            ca,
            clock,
            audit,
            people,
        })
    }

    /// A registered client.
    pub async fn client(&self, id: &str) -> Result<Option<clients::Client>, StoreError> {
        Ok(self.config.clients.iter().find(|c| c.id == id).cloned())
    }

    /// Writes a line of the audit log.
    pub fn told(&self, record: AuthorityRecord) {
        self.audit.record(Record::Authority(Box::new(record)));
    }
}

/// The state directory, mode 0700.
fn make_state(config: &Config) -> Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&config.state)
        .and_then(|()| std::fs::set_permissions(&config.state, Permissions::from_mode(0o700)))
        .with_context(|| format!("{}", config.state.display()))
}

/// All that is served.
pub fn routes(server: Shared) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok" }))
        .merge(ca::routes())
        .merge(authorize::routes())
        .merge(people::routes())
        .with_state(server)
}

/// Runs the server until SIGTERM or SIGINT.
pub async fn run(config: Config) -> Result<()> {
    // Keys live in this process's memory: no core file, no ptrace by others.
    nix::sys::prctl::set_dumpable(false).context("PR_SET_DUMPABLE")?;
    let (audit, _writer) = Audit::open(
        "authority",
        config.audit.file.as_deref(),
        config.audit.queue.0,
    )
    .with_context(|| format!("audit.file {:?}", config.audit.file))?;
    let server = Arc::new(Server::open(config, Clock::system(), audit).await?);
    tokio::spawn(ca::watch(server.clone()));
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    serve::serve(server.clone(), routes(server), stop).await
}
