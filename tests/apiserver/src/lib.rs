//! A Kubernetes API server for tests: what clients rely on of the real one, which is
//! lists and watches over versions, and what they must survive. Objects come from
//! tests, from directories of manifests, or from clients such as `kubectl`.
//!
//! It stands for the API alone. There is no scheduler, no kubelet, no controller and
//! no validation by schema: what is put is so.

mod access;
mod apply;
mod body;
mod chaos;
mod discovery;
mod follow;
pub mod kinds;
mod objects;
mod patch;
mod review;
mod route;
mod select;
mod serve;
mod slices;
mod status;
mod store;
mod tls;
mod watch;

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, Result};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use tokio::sync::watch as signal;

pub use access::Claims;
pub use status::Refusal;

use access::Tokens;
use chaos::Chaos;
use store::{Key, Store};

/// Makes the socket to listen at, as often as the server comes back.
pub type Bind = Arc<dyn Fn(SocketAddr) -> io::Result<TcpListener> + Send + Sync>;

#[derive(Clone)]
pub struct Options {
    pub address: SocketAddr,
    /// Further names that its certificate is for.
    pub names: Vec<String>,
    /// Writes that are remembered for watches to resume from.
    pub window: usize,
    /// Whether users may do only what roles say; else everyone may do everything.
    pub rbac: bool,
    /// Whether watches may begin with all that is there (`sendInitialEvents`); old
    /// servers refuse that.
    pub watch_list: bool,
    /// How often a quiet watch gets a bookmark.
    pub bookmarks: Duration,
    /// Whether endpoints of services follow their pods; else they are the tests' own.
    pub endpoints: bool,
    /// Groups of [`kinds::policies`] whose definitions are installed.
    pub policies: Vec<&'static str>,
    pub bind: Bind,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            address: (Ipv4Addr::LOCALHOST, 0).into(),
            names: Vec::new(),
            window: 10_000,
            rbac: false,
            watch_list: true,
            bookmarks: Duration::from_secs(2),
            endpoints: false,
            policies: vec![kinds::ISTIO, kinds::OURS],
            bind: Arc::new(TcpListener::bind::<SocketAddr>),
        }
    }
}

/// A request that came, as it was understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`; in small letters
    /// the method where it is no resource.
    pub verb: String,
    pub path: String,
    pub query: String,
    pub user: String,
    pub group: String,
    /// With its subresource: `pods/status`.
    pub resource: String,
}

/// What all parts of a running server share. Locked in this order: store, tokens.
pub(crate) struct Shared {
    options: Options,
    store: Mutex<Store>,
    tokens: Mutex<Tokens>,
    chaos: Mutex<Option<Chaos>>,
    delay: Mutex<Duration>,
    requests: Mutex<Vec<Request>>,
    forbidden: Mutex<Vec<String>>,
    bytes: AtomicU64,
    expired: AtomicU64,
    changed: signal::Sender<u64>,
    cut: signal::Sender<u64>,
    away: signal::Sender<bool>,
    stop: signal::Sender<bool>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A test that panicked has failed already.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn store(&self) -> MutexGuard<'_, Store> {
        lock(&self.store)
    }

    fn tokens(&self) -> MutexGuard<'_, Tokens> {
        lock(&self.tokens)
    }

    /// Lets watches see what was written.
    fn write<T>(&self, write: impl FnOnce(&mut Store) -> T) -> T {
        let mut store = self.store();
        let before = store.revision();
        let result = write(&mut store);
        let written = |resource| {
            store
                .since(resource, before)
                .is_ok_and(|all| !all.is_empty())
        };
        if self.options.endpoints && (written("pods") || written("services")) {
            slices::settle(&mut store);
        }
        self.changed.send_replace(store.revision());
        result
    }

    fn with_chaos<T>(&self, draw: impl FnOnce(&mut Chaos) -> T) -> Option<T> {
        lock(&self.chaos).as_mut().map(draw)
    }

    fn delay(&self) -> Duration {
        *lock(&self.delay)
    }

    fn sent(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// A running server. It ends when it is dropped.
pub struct ApiServer {
    shared: Arc<Shared>,
    address: SocketAddr,
    ca: String,
    token: String,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl ApiServer {
    /// As [`Self::with`], for those who wait for everything.
    pub async fn start(options: Options) -> Result<Self> {
        Self::with(options)
    }

    pub fn start_blocking(address: SocketAddr) -> Result<Self> {
        Self::with(Options {
            address,
            ..Options::default()
        })
    }

    /// A server on a thread of its own, listening when this returns.
    pub fn with(options: Options) -> Result<Self> {
        let listener = (options.bind)(options.address).context("a socket to listen at")?;
        let address = listener.local_addr()?;
        let authority = tls::Authority::new()?;
        let mut names = options.names.clone();
        names
            .extend(["localhost", "127.0.0.1", "::1", "kubernetes.default.svc"].map(str::to_owned));
        names.push(address.ip().to_string());
        let tls = authority.server(names)?;
        let mut served = kinds::built_in();
        served.extend(kinds::policies(&options.policies));
        let mut tokens = Tokens::default();
        let token = tokens.administrator();
        let shared = Arc::new(Shared {
            store: Mutex::new(Store::new(served, options.window)),
            options,
            tokens: Mutex::new(tokens),
            chaos: Mutex::default(),
            delay: Mutex::default(),
            requests: Mutex::default(),
            forbidden: Mutex::default(),
            bytes: AtomicU64::default(),
            expired: AtomicU64::default(),
            changed: signal::Sender::default(),
            cut: signal::Sender::default(),
            away: signal::Sender::default(),
            stop: signal::Sender::default(),
        });
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let serving = shared.clone();
        let thread = std::thread::Builder::new()
            .name("apiserver".into())
            .spawn(move || {
                runtime.block_on(serve::serve(serving, tls, listener, address));
            })?;
        let server = Self {
            shared,
            address,
            ca: authority.pem,
            token,
            threads: Mutex::new(vec![thread]),
        };
        for name in ["default", "kube-system"] {
            server.ensure_namespace(name);
        }
        Ok(server)
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    pub fn ca_pem(&self) -> &str {
        &self.ca
    }

    /// An administrator's.
    pub fn token(&self) -> &str {
        &self.token
    }

    pub fn kubeconfig(&self) -> String {
        self.kubeconfig_of(&self.token)
    }

    /// A kubeconfig of whom a token is, in the namespace that one lives in.
    pub fn kubeconfig_of(&self, token: &str) -> String {
        let tokens = self.shared.tokens();
        let namespace = tokens.namespace(token).unwrap_or("default");
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: double\n\
             clusters: [{{name: double, cluster: {{server: '{}', certificate-authority-data: {}}}}}]\n\
             users: [{{name: user, user: {{token: '{token}'}}}}]\n\
             contexts: [{{name: double, context: {{cluster: double, user: user, namespace: {namespace}}}}}]\n",
            self.url(),
            BASE64_STANDARD.encode(&self.ca),
        )
    }

    /// A token as a service account has one.
    pub fn mint(&self, claims: Claims) -> String {
        self.shared.tokens().mint(claims)
    }

    pub fn revoke(&self, token: &str) {
        self.shared.tokens().revoke(token);
    }

    /// Puts an object as it is, status and all. One of another uid is another object,
    /// which takes the old one's place. Its namespace is made where it is missing.
    pub fn apply(&self, object: Value) -> Result<Value, Refusal> {
        let key = self.key_of(&object)?;
        if !key.namespace.is_empty() {
            self.ensure_namespace(&key.namespace);
        }
        let object = self.shared.write(|store| follow::put(store, key, object));
        Ok(object)
    }

    /// Whether there was one. `namespace` is empty for what has none.
    pub fn delete(&self, kind: &str, namespace: &str, name: &str) -> bool {
        let Some(key) = self.key(kind, namespace, name) else {
            return false;
        };
        self.shared.write(|store| {
            let there = store.get(&key).is_some();
            objects::remove(store, &key);
            there
        })
    }

    pub fn get(&self, kind: &str, namespace: &str, name: &str) -> Option<Value> {
        let key = self.key(kind, namespace, name)?;
        self.shared
            .store()
            .get(&key)
            .map(|object| (**object).clone())
    }

    pub fn list(&self, kind: &str) -> Vec<Value> {
        let store = self.shared.store();
        let Some(resource) = store.kind_named(kind).map(kinds::Kind::resource) else {
            return Vec::new();
        };
        store
            .list(&resource)
            .map(|(_, object)| (**object).clone())
            .collect()
    }

    /// Keeps the objects as a directory of manifests has them, until the server ends.
    /// What is there is there when this returns.
    pub fn follow(&self, directory: impl AsRef<Path>) -> Result<()> {
        let thread = follow::start(self.shared.clone(), directory.as_ref().to_owned())?;
        lock(&self.threads).push(thread);
        Ok(())
    }

    /// Serves policy kinds of a group, as if their definitions were put.
    pub fn install(&self, group: &str) {
        self.shared.write(|store| {
            store.kinds.retain(|kind| kind.group != group);
            store.kinds.extend(kinds::policies(&[group]));
        });
    }

    /// No longer serves a group; its objects go with it.
    pub fn uninstall(&self, group: &str) {
        self.shared.write(|store| {
            let gone = |kind: &&kinds::Kind| kind.group == group;
            let resources: Vec<String> = store
                .kinds
                .iter()
                .filter(gone)
                .map(kinds::Kind::resource)
                .collect();
            for resource in resources {
                let keys: Vec<Key> = store.list(&resource).map(|(key, _)| key.clone()).collect();
                for key in keys {
                    store.remove(&key);
                }
            }
            store.kinds.retain(|kind| kind.group != group);
        });
    }

    /// Forgets the past: whoever goes on from an older version is told 410 Gone, by
    /// the answer's code and by an event, in turn.
    pub fn expire(&self) {
        self.shared.write(Store::expire);
    }

    /// Cuts all watches in the midst of an event.
    pub fn disconnect(&self) {
        self.shared.cut.send_modify(|cut| *cut += 1);
    }

    /// Whether it cannot be reached: what is connected is cut, nothing listens.
    pub fn away(&self, away: bool) {
        self.shared.away.send_replace(away);
    }

    /// How long every answer, and every event, takes.
    pub fn delay(&self, delay: Duration) {
        *lock(&self.shared.delay) = delay;
    }

    /// From now on all goes wrong that can, as the seed has it: slow, in pieces, cut
    /// off, refused, expired, each watch at a pace of its own.
    pub fn chaos(&self, seed: u64) {
        *lock(&self.shared.chaos) = Some(Chaos::new(seed));
    }

    pub fn calm(&self) {
        *lock(&self.shared.chaos) = None;
    }

    /// All that was asked so far.
    pub fn requests(&self) -> Vec<Request> {
        lock(&self.shared.requests).clone()
    }

    /// What roles did not allow, as clients were told.
    pub fn forbidden(&self) -> Vec<String> {
        lock(&self.shared.forbidden).clone()
    }

    /// Of bodies, before encryption.
    pub fn bytes_sent(&self) -> u64 {
        self.shared.bytes.load(Ordering::Relaxed)
    }

    fn key(&self, kind: &str, namespace: &str, name: &str) -> Option<Key> {
        let store = self.shared.store();
        Some(Key {
            resource: store.kind_named(kind)?.resource(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        })
    }

    fn key_of(&self, object: &Value) -> Result<Key, Refusal> {
        follow::key_of(&self.shared.store(), object)
    }

    fn ensure_namespace(&self, name: &str) {
        self.shared
            .write(|store| follow::ensure_namespace(store, name));
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.shared.stop.send_replace(true);
        for thread in lock(&self.threads).drain(..) {
            let _panicked = thread.join();
        }
    }
}

/// A namespace as every one is labelled.
fn namespace(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": name, "labels": {"kubernetes.io/metadata.name": name}},
        "spec": {"finalizers": ["kubernetes"]}, "status": {"phase": "Active"},
    })
}
