//! The agent's configuration: one YAML file, parsed once into types that cannot
//! be wrong. `config/agent.yaml` lists every key with its default.

mod kubernetes;
mod listen;
mod normalization;
mod values;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use kubernetes::{Discovery, Kubernetes, Source};
pub use listen::{Admin, Guard, Listen};
pub use normalization::Normalization;
pub use values::{Bytes, Count, DiskBytes, QueueLength, RingBytes, Span, SyncPolicy, Window};

use crate::{
    audit::{chain, send::config::Sinks},
    authorizer::ExtensionProvider,
    identity::TrustDomain,
    objects::{LoadError, parse_document},
};

/// The whole configuration. Keys that are left out have the defaults shown in
/// `config/agent.yaml`; unknown keys are refused.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Config {
    /// Name of this node, as pods name it in `spec.nodeName`. Empty: the host's name.
    pub node: String,
    /// SPIFFE trust domain of this mesh (SPIFFE-ID 2.1).
    pub trust_domain: TrustDomain,
    /// Further trust domains whose peers are accepted. They must be signed by a
    /// root of the bundle.
    pub trust_domain_aliases: Vec<TrustDomain>,
    /// Directory for what must outlive the agent, mode 0700.
    pub state: PathBuf,
    pub enrol: Enrol,
    pub enforce: Enforce,
    pub workloads: Workloads,
    pub policies: Policies,
    pub kubernetes: Kubernetes,
    pub identity: Identity,
    pub transport: Transport,
    pub http: Http,
    pub jwt: Jwt,
    pub listen: Listen,
    pub kernel: Kernel,
    pub audit: Audit,
    pub log: Log,
    pub drain: Drain,
}

/// Which pods are in the mesh.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Enrol {
    /// For pods whose label `postern.dev/mesh` and whose namespace's label say nothing.
    pub default: Mesh,
    /// What a connect into the mesh meets when its workload is not known yet.
    pub unknown: Unknown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Mesh {
    Enabled,
    Disabled,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Unknown {
    /// Fail closed: `connect` fails with EPERM.
    Refuse,
    /// Fail open: the connection goes out as the application made it.
    Allow,
}

/// What is done about what goes around the agent.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Enforce {
    /// A TCP connection of an enrolled pod that no agent carries, because it is older
    /// than the pod's place in the mesh.
    pub bypass: Bypass,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Bypass {
    /// It goes on, and is recorded.
    Record,
    /// It is ended: its application sees ECONNABORTED.
    Cut,
}

/// Where Pod, Service, EndpointSlice and Namespace objects come from.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Workloads {
    pub source: Source,
    /// Directory of manifests (`*.yaml`, `*.yml`, `*.json`), watched.
    pub directory: PathBuf,
}

/// Where policy objects come from, and how they are read.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Policies {
    pub source: Source,
    /// Directory of manifests, watched.
    pub directory: PathBuf,
    /// Namespace whose policies reach the whole mesh (Istio `rootNamespace`).
    pub root_namespace: String,
    /// How paths are normalized before they are matched and passed on (Istio
    /// `pathNormalization`): `NONE`, `BASE`, `MERGE_SLASHES` or
    /// `DECODE_AND_MERGE_SLASHES`.
    pub path_normalization: Normalization,
    /// Proxies before the mesh whose `X-Forwarded-For` is believed (Istio
    /// `numTrustedProxies`).
    pub num_trusted_proxies: usize,
    /// Directory of secrets that policies name (`secretFile`, `keyFile`): below it one
    /// for each namespace, whose policies can name files of no other.
    pub secrets: PathBuf,
    /// What CUSTOM policies may ask (Istio `extensionProviders`).
    pub extension_providers: Vec<ExtensionProvider>,
}

/// Bounds of HTTP where policy asks for requests.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Http {
    /// A request's head, bytes; larger ones get 431.
    pub head_bytes: Bytes,
    /// Headers of a request.
    pub header_count: Count,
    /// From a head's first byte to its last; slower ones get 408.
    pub head_timeout: Span,
    /// HTTP/2 streams of a connection at once.
    pub streams: Count,
    /// HTTP/2 window of a stream, bytes.
    pub stream_window: Window,
    /// HTTP/2 streams that a client may reset before they are served.
    pub resets: Count,
}

/// Keys of token issuers.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Jwt {
    /// How often a key set is fetched again, at most; its `max-age` may ask for more.
    pub refresh: Span,
    /// How long the last good key set is used when it cannot be fetched; then its
    /// tokens are refused.
    pub keep: Span,
    /// How often an unknown key may cause a fetch.
    pub refetch_interval: Span,
    /// Further roots for fetches (PEM), beside the system's.
    pub roots: Option<PathBuf>,
    /// Key sets from files, watched: path by issuer. They stand in for discovery.
    pub files: BTreeMap<String, PathBuf>,
}

/// Who signs for this node: the embedded issuer, `postern authority`, SPIRE or Istio's
/// CA; exactly one.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Identity {
    /// `postern authority`, so that this node holds no root. All three empty: the
    /// embedded issuer.
    pub authority: Option<RemoteAuthority>,
    /// The SPIRE agent of this node, by its Delegated Identity API.
    pub spire: Option<SpireAgent>,
    /// Istio's certificate authority.
    pub istio: Option<IstioCa>,
    /// Root certificate (PEM). Both empty: a root is made in the state directory.
    pub root_certificate: Option<PathBuf>,
    /// Its private key (PEM, PKCS #8), mode 0600.
    pub root_key: Option<PathBuf>,
    /// Further trusted roots (PEM, any number), watched: how a root is rotated.
    pub bundle: Option<PathBuf>,
    /// Lifetime of this node's intermediate certificate.
    pub node_lifetime: Span,
    /// Lifetime of a workload's certificate; it is renewed at half of that.
    pub leaf_lifetime: Span,
    /// `iss` of the embedded issuer's JWT-SVIDs. Empty: `spiffe://` and the trust domain.
    pub jwt_issuer: Option<String>,
}

/// Where `postern authority` is, and how this agent proves which node it is.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct RemoteAuthority {
    /// https URL.
    pub url: String,
    /// Roots (PEM) that its TLS certificate is trusted under, and no others. Empty: the
    /// system's.
    #[serde(default)]
    pub roots: Option<PathBuf>,
    /// File with a join token, mode 0600: needed once.
    #[serde(default)]
    pub join_token_file: Option<PathBuf>,
    /// File with a projected token of the agent's Kubernetes service account.
    #[serde(default)]
    pub service_account_token_file: Option<PathBuf>,
}

/// Where the SPIRE agent of this node answers delegates.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct SpireAgent {
    /// Its admin socket (`admin_socket_path`), not that of the Workload API.
    pub socket: PathBuf,
    /// Further trust domains whose peers are accepted: SPIRE federates with them, and
    /// each is verified by its own bundle alone.
    #[serde(default)]
    pub federated: Vec<TrustDomain>,
}

/// Where Istio's certificate authority is, and how this agent proves who it is.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct IstioCa {
    /// https URL, such as `https://istiod.istio-system.svc:15012`.
    pub address: String,
    /// Roots (PEM) of the mesh, watched: ConfigMap `istio-ca-root-cert`. istiod's TLS
    /// certificate and those of peers must end at one of them.
    pub roots: PathBuf,
    /// File with a projected token of the agent's service account, audience `istio-ca`.
    pub token_file: PathBuf,
    /// As istiod names the cluster.
    #[serde(default = "cluster_id")]
    pub cluster_id: String,
}

fn cluster_id() -> String {
    "Kubernetes".into()
}

/// Connections between nodes.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Transport {
    /// For TCP connect, TLS handshake and the answer to CONNECT, each.
    pub connect_timeout: Span,
    /// A tunnel without streams is closed after this time.
    pub idle_timeout: Span,
    /// How often an open tunnel is pinged.
    pub keepalive_interval: Span,
    /// A tunnel whose ping is not answered in this time is closed.
    pub keepalive_timeout: Span,
    /// Whether agents of this kind speak a transport of their own with each other (lanes),
    /// instead of HTTP/2.
    pub fast_path: bool,
    /// Streams on one tunnel: more open another, and a peer may open no more.
    pub streams_per_tunnel: Count,
    /// Window of a stream, bytes. A tunnel's is as large as all its streams' together in
    /// HTTP/2, and a lane has none, so that receivers that stop reading never stop the
    /// others. On a lane it grows eightfold for a receiver that keeps up.
    pub stream_window: Window,
}

/// Kernel programs and maps.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Kernel {
    /// Cgroup v2 directory that the hooks are attached to; it must hold the
    /// node's own processes and all pods. Empty: the root of the v2 mount.
    pub cgroup: Option<PathBuf>,
    /// Directory where programs, links and maps are pinned, on a bpffs.
    pub pin: PathBuf,
    /// Largest number of destinations in the mesh.
    pub max_destinations: u32,
    /// Largest number of local workloads.
    pub max_workloads: u32,
    /// Largest number of steered connections that are open at once.
    pub max_connections: u32,
    /// Size of the event ring, bytes; a power of two, at least one page.
    pub ring_bytes: RingBytes,
    /// How functions of the kernel are probed for the audit log.
    pub probes: Probes,
    /// Events of TCP sockets that one pod may cause each second; of four seconds at
    /// once. What is beyond is counted.
    pub sockets_per_second: Count,
    /// The same for each other kind of event: UDP flows, raw sockets, programs that
    /// start, processes that end.
    pub events_per_second: Count,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Probes {
    /// By fentry and fexit; by kprobes what cannot be probed so.
    Auto,
    Fentry,
    Kprobe,
}

/// The audit log.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Audit {
    /// Whether there is one. Without it nothing is recorded, and nothing is seen of pods
    /// beside what the agent carries.
    pub enabled: bool,
    /// Directory of the log, mode 0700. Empty: `audit` in the state directory.
    pub directory: Option<PathBuf>,
    /// Whether kernel events of enrolled pods are recorded.
    pub events: bool,
    /// Records waiting for the writer; what comes beyond is lost and counted.
    pub queue: QueueLength,
    /// When what is written is made to outlive a loss of power: `always`, `never`, or how
    /// often. The agent's own death it outlives anyway.
    pub sync: SyncPolicy,
    pub segment: AuditSegment,
    pub checkpoint: AuditCheckpoint,
    /// Whether segments are compressed (zstd) when they are full.
    pub compress: bool,
    pub retain: AuditRetain,
    /// Where the log is sent.
    pub sinks: Sinks,
}

/// When the log goes on in a new file.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct AuditSegment {
    pub bytes: DiskBytes,
    pub age: Span,
}

/// How often what was written is signed.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct AuditCheckpoint {
    /// After so many records,
    pub records: Count,
    /// ... or so long after one.
    pub every: Span,
}

/// How much is kept: beyond either, the oldest segments are removed.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct AuditRetain {
    /// On disk, compressed as they are. Empty: no bound.
    pub bytes: Option<DiskBytes>,
    /// Since a segment was written last. Empty: no bound.
    pub age: Option<Span>,
}

impl Audit {
    pub fn directory(&self, state: &Path) -> PathBuf {
        let own = self.directory.clone();
        own.unwrap_or_else(|| state.join("audit"))
    }

    pub fn settings(&self, state: &Path) -> chain::Settings {
        chain::Settings {
            sync: match self.sync {
                SyncPolicy::Always => chain::Sync::Always,
                SyncPolicy::Every(every) => chain::Sync::Every(every),
                SyncPolicy::Never => chain::Sync::Never,
            },
            segment_bytes: self.segment.bytes.0,
            segment_age: self.segment.age.0,
            compress: self.compress,
            checkpoint_records: self.checkpoint.records.0.into(),
            checkpoint_every: self.checkpoint.every.0,
            retain_bytes: self.retain.bytes.map(|bytes| bytes.0),
            retain_age: self.retain.age.map(|age| age.0),
            ..chain::Settings::new(self.directory(state), state)
        }
    }
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Log {
    /// `error`, `warn`, `info`, `debug`, `trace`, or directives such as
    /// `info,postern::proxy=debug`. Can be changed at run time.
    pub level: String,
    pub format: LogFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Drain {
    /// How long open connections may go on after SIGTERM.
    pub timeout: Span,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            node: String::new(),
            trust_domain: TrustDomain::default(),
            trust_domain_aliases: Vec::new(),
            state: "/var/lib/postern".into(),
            enrol: Enrol::default(),
            enforce: Enforce::default(),
            workloads: Workloads::default(),
            policies: Policies::default(),
            kubernetes: Kubernetes::default(),
            identity: Identity::default(),
            transport: Transport::default(),
            http: Http::default(),
            jwt: Jwt::default(),
            listen: Listen::default(),
            kernel: Kernel::default(),
            audit: Audit::default(),
            log: Log::default(),
            drain: Drain::default(),
        }
    }
}

impl Default for Enrol {
    fn default() -> Self {
        Self {
            default: Mesh::Disabled,
            unknown: Unknown::Refuse,
        }
    }
}

impl Default for Enforce {
    fn default() -> Self {
        Self {
            bypass: Bypass::Record,
        }
    }
}

impl Default for Workloads {
    fn default() -> Self {
        Self {
            source: Source::Directory,
            directory: "/etc/postern/manifests".into(),
        }
    }
}

impl Default for Policies {
    fn default() -> Self {
        Self {
            source: Source::Directory,
            directory: "/etc/postern/policies".into(),
            root_namespace: "istio-system".into(),
            path_normalization: Normalization::default(),
            num_trusted_proxies: 0,
            secrets: "/etc/postern/secrets".into(),
            extension_providers: Vec::new(),
        }
    }
}

impl Default for Http {
    fn default() -> Self {
        Self {
            head_bytes: Bytes(60 << 10),
            header_count: Count(100),
            head_timeout: Span::seconds(10),
            streams: Count(100),
            stream_window: Window(128 << 10),
            resets: Count(100),
        }
    }
}

impl Default for Jwt {
    fn default() -> Self {
        Self {
            refresh: Span::seconds(300),
            keep: Span::hours(1),
            refetch_interval: Span::seconds(10),
            roots: None,
            files: BTreeMap::new(),
        }
    }
}

impl Default for Identity {
    fn default() -> Self {
        Self {
            authority: None,
            spire: None,
            istio: None,
            root_certificate: None,
            root_key: None,
            bundle: None,
            node_lifetime: Span::hours(24 * 30),
            leaf_lifetime: Span::hours(24),
            jwt_issuer: None,
        }
    }
}

impl Default for Transport {
    fn default() -> Self {
        Self {
            connect_timeout: Span::seconds(10),
            idle_timeout: Span::seconds(90),
            keepalive_interval: Span::seconds(10),
            keepalive_timeout: Span::seconds(20),
            fast_path: true,
            streams_per_tunnel: Count(64),
            stream_window: Window(512 << 10),
        }
    }
}

impl Default for Kernel {
    fn default() -> Self {
        Self {
            cgroup: None,
            pin: "/sys/fs/bpf/postern".into(),
            max_destinations: 131_072,
            max_workloads: 4_096,
            max_connections: 131_072,
            ring_bytes: RingBytes(1 << 20),
            probes: Probes::Auto,
            sockets_per_second: Count(5_000),
            events_per_second: Count(1_000),
        }
    }
}

impl Default for Audit {
    fn default() -> Self {
        Self {
            enabled: true,
            directory: None,
            events: true,
            queue: QueueLength(16_384),
            sync: SyncPolicy::Every(std::time::Duration::from_secs(1)),
            segment: AuditSegment::default(),
            checkpoint: AuditCheckpoint::default(),
            compress: true,
            retain: AuditRetain::default(),
            sinks: Sinks::default(),
        }
    }
}

impl Default for AuditSegment {
    fn default() -> Self {
        Self {
            bytes: DiskBytes(64 << 20),
            age: Span::hours(24),
        }
    }
}

impl Default for AuditCheckpoint {
    fn default() -> Self {
        Self {
            records: Count(1_000),
            every: Span::seconds(60),
        }
    }
}

impl Default for AuditRetain {
    fn default() -> Self {
        Self {
            bytes: Some(DiskBytes(1 << 30)),
            age: Some(Span::hours(30 * 24)),
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self {
            level: "info".into(),
            format: LogFormat::Text,
        }
    }
}

impl Default for Drain {
    fn default() -> Self {
        Self {
            timeout: Span::seconds(30),
        }
    }
}

impl Config {
    /// Reads a file; the error names file, line and key.
    pub fn load(path: &Path) -> Result<Self, LoadError> {
        let text = std::fs::read_to_string(path).map_err(|source| LoadError::Read {
            path: path.to_owned(),
            source,
        })?;
        // An empty file means all defaults, and YAML's null is no mapping.
        if text
            .lines()
            .all(|line| line.trim().is_empty() || line.starts_with('#'))
        {
            return Ok(Self::default());
        }
        parse_document(path, &text)
    }

    /// Trust domains whose peers are accepted; the mesh's own is the first.
    pub fn trust_domains(&self) -> Vec<TrustDomain> {
        let federated = self.identity.spire.iter().flat_map(|s| &s.federated);
        let more = self.trust_domain_aliases.iter().chain(federated);
        std::iter::once(&self.trust_domain)
            .chain(more)
            .cloned()
            .collect()
    }

    /// `iss` of JWT-SVIDs that the embedded issuer signs.
    pub fn jwt_issuer(&self) -> String {
        let named = self.identity.jwt_issuer.clone();
        named.unwrap_or_else(|| format!("spiffe://{}", self.trust_domain))
    }

    /// Where it writes its public keys.
    pub fn jwks_file(&self) -> PathBuf {
        self.state.join("jwks.json")
    }

    /// The node's name, as configured or the host's.
    pub fn node_name(&self) -> String {
        if !self.node.is_empty() {
            return self.node.clone();
        }
        nix::unistd::gethostname()
            .ok()
            .and_then(|name| name.into_string().ok())
            .unwrap_or_else(|| "localhost".into())
    }
}

impl Transport {
    /// HTTP/2 window of a tunnel: all its streams' together (RFC 9113 6.9.1).
    pub fn tunnel_window(&self) -> u32 {
        self.streams_per_tunnel
            .0
            .saturating_mul(self.stream_window.0)
            .min(Window::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, LoadError> {
        parse_document(Path::new("agent.yaml"), text)
    }

    #[test]
    fn the_shipped_file_lists_every_default() {
        let text = include_str!("../../config/agent.yaml");
        assert_eq!(parse(text).expect("it parses"), Config::default());
        let shipped: serde_json::Value =
            parse_document(Path::new("agent.yaml"), text).expect("yaml");
        let full = serde_json::to_value(Config::default()).expect("json");
        assert_eq!(
            keys(&shipped),
            keys(&full),
            "a key is missing in config/agent.yaml"
        );
    }

    fn keys(value: &serde_json::Value) -> Vec<String> {
        let Some(map) = value.as_object() else {
            return Vec::new();
        };
        map.iter()
            .flat_map(|(key, value)| {
                let below = keys(value);
                if below.is_empty() {
                    return vec![key.clone()];
                }
                below.into_iter().map(|k| format!("{key}.{k}")).collect()
            })
            .collect()
    }

    #[test]
    fn errors_name_file_line_and_key() {
        for (text, expected) in [
            ("enrol:\n  defualt: enabled\n", ["agent.yaml:2", "defualt"]),
            (
                "transport:\n  idleTimeout: soon\n",
                ["transport.idleTimeout", "90s"],
            ),
            (
                "listen:\n  admin: 0.0.0.0:15000\n",
                ["listen.admin", "loopback"],
            ),
            (
                "kernel:\n  ringBytes: 5000\n",
                ["kernel.ringBytes", "power of two"],
            ),
            (
                "workloads:\n  source: etcd\n",
                ["workloads.source", "kubernetes"],
            ),
            (
                "kubernetes:\n  podCidrs: [10.0.0.0/33]\n",
                ["kubernetes.podCidrs", "agent.yaml:2"],
            ),
            (
                "kubernetes:\n  startupTaint: 'key=value:NoSchedule'\n",
                ["kubernetes.startupTaint", "no key of a taint"],
            ),
            (
                "kubernetes:\n  startupTaint: ''\n",
                ["kubernetes.startupTaint", "agent.yaml:2"],
            ),
            ("trustDomain: Not Valid\n", ["trustDomain", "agent.yaml:1"]),
        ] {
            let error = parse(text).expect_err(text).to_string();
            for part in expected {
                assert!(error.contains(part), "{error:?} lacks {part:?}");
            }
        }
    }
}
