//! `postern authority`: where there is no identity provider yet, Postern brings one.
//! An OAuth 2.0 and OpenID Connect authorization server for people and services, and
//! the trust domain's certificate authority for agents, so that no node holds the root.
//!
//! `config -> store, keys -> Server -> routes`; `serve` is TLS around them. Each module
//! with routes says which RFC it implements. All state that must outlive the process is
//! in the store; every write goes through [`Store`], and what was answered was committed
//! before.

pub mod admin;
mod authorize;
pub mod ca;
mod client_auth;
pub mod clients;
mod clock;
pub mod config;
mod dpop;
mod error;
mod introspect;
mod issue;
mod keys;
mod metadata;
mod pages;
pub mod people;
mod present;
mod request;
mod serve;
mod store;
mod token;
mod userinfo;

#[cfg(test)]
mod tests;

use std::{
    fs::Permissions,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use axum::{Router, routing::get};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    app::{self, Misconfigured},
    audit::{Audit, AuthorityRecord, Record, chain::OpenError},
    identity::Root,
};

use client_auth::Guard;
pub use clock::Clock;
pub use config::Config;
pub use keys::{Change, Keys, KeysError};
pub use serve::Peer;
pub use store::{Code, Store, StoreError, User};

/// How often keys are looked after...
const TEND: Duration = Duration::from_secs(10);
/// ... and what has expired is removed from the store.
const PURGE: Duration = Duration::from_secs(600);

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
    guard: Guard,
}

pub type Shared = Arc<Server>;

impl Server {
    /// Opens files and the store; everything that can be wrong with them is found here.
    pub async fn open(config: Config, clock: Clock, audit: Audit) -> Result<Self> {
        let misconfigured = |e: &dyn std::fmt::Display| Misconfigured(e.to_string());
        config.check().map_err(Misconfigured)?;
        make_state(&config)?;
        let root = Root::of(
            config.certificates.root_certificate.as_deref(),
            config.certificates.root_key.as_deref(),
            &config.state,
            &config.trust_domain,
        )
        .map_err(|e| misconfigured(&e))?;
        let store = Store::open(&config).await.map_err(|e| misconfigured(&e))?;
        let keys = Keys::open(&config, clock.clone()).map_err(|e| misconfigured(&e))?;
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
            guard: Guard::new(),
        })
    }

    /// A registered client: of the configuration, else of the store.
    pub async fn client(&self, id: &str) -> Result<Option<clients::Client>, StoreError> {
        match self.config.clients.iter().find(|c| c.id == id) {
            Some(client) => Ok(Some(client.clone())),
            None => self.store.client(id).await,
        }
    }

    /// Does what is due on the signing keys, and tells of it.
    pub fn tend_keys(&self) {
        match self.keys.tend() {
            Ok(changes) => changes.into_iter().for_each(|change| {
                let reason = match change {
                    Change::Published { kid, starts } => {
                        format!("published {kid}, which signs from {starts} on")
                    }
                    Change::Withdrawn { kid } => format!("withdrew {kid}"),
                };
                self.told(AuthorityRecord {
                    event: "keys",
                    reason,
                    ..AuthorityRecord::default()
                });
            }),
            // The keys that are held go on to sign.
            Err(error) => tracing::error!(%error, "signing keys"),
        }
    }

    /// Looks after keys and store for as long as it is polled.
    async fn keep(&self) {
        let mut tend = tokio::time::interval(TEND);
        let mut purge = tokio::time::interval(PURGE);
        loop {
            tokio::select! {
                _ = tend.tick() => self.tend_keys(),
                _ = purge.tick() => {
                    if let Err(error) = self.store.purge(self.clock.seconds()).await {
                        tracing::warn!(%error, "cannot remove what has expired");
                    }
                }
            }
        }
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
    let path = server.config.issuer_path();
    let all = Router::new()
        .route("/healthz", get(|| async { "ok" }))
        .merge(ca::routes())
        .merge(authorize::routes())
        .merge(people::routes())
        .merge(metadata::routes())
        .merge(token::routes())
        .merge(introspect::routes())
        .merge(userinfo::routes());
    let all = match path.as_str() {
        "" => all,
        path => Router::new().nest(path, all),
    };
    all.merge(metadata::at_the_host(&path)).with_state(server)
}

/// A log has one writer: of replicas that share a state directory, each has its own.
fn open_log(config: &Config) -> Result<(Audit, std::thread::JoinHandle<()>)> {
    const REPLICAS: u32 = 16;
    for number in 1..=REPLICAS {
        let mut log = config.audit_log();
        if number > 1 {
            log.directory = log.directory.with_added_extension(number.to_string());
            log.ledger = log.ledger.with_added_extension(number.to_string());
        }
        match Audit::open("authority", log, config.audit.queue.0) {
            Err(OpenError::Busy(_)) => {}
            opened => return opened.context("the audit log"),
        }
    }
    anyhow::bail!("{REPLICAS} servers have their audit logs in this state directory already")
}

/// Runs the server until SIGTERM or SIGINT.
pub async fn run(config: Config) -> Result<()> {
    // Keys live in this process's memory: no core file, no ptrace by others.
    nix::sys::prctl::set_dumpable(false).context("PR_SET_DUMPABLE")?;
    make_state(&config)?;
    let (audit, writer) = open_log(&config)?;
    let log = audit.clone();
    let server = Arc::new(Server::open(config, Clock::system(), audit).await?);
    let watching = tokio::spawn(ca::watch(server.clone()));
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    tokio::select! {
        served = serve::serve(server.clone(), routes(server.clone()), stop) => served?,
        () = server.keep() => unreachable!("it has no end"),
    }
    watching.abort();
    drop(server);
    // Connections that were cut hold the log, too; they end with the runtime.
    let _ = tokio::task::spawn_blocking(move || log.close(&writer, app::AUDIT_END)).await;
    Ok(())
}
