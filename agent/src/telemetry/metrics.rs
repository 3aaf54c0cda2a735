//! Metrics in the OpenMetrics text format: Istio's TCP metrics by Istio's names and
//! labels, so that its dashboards work, and Postern's own with the prefix `postern_`.

use std::{collections::BTreeMap, sync::atomic::Ordering};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

use crate::{
    audit::{Reporter, Verdict, send::Progress},
    identity::SpiffeId,
    workload::{NamespacedName, Workload},
};

/// Istio's labels of `istio_tcp_*` (Istio standard metrics). What is not known is
/// `unknown`, as there.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ConnectionLabels {
    reporter: &'static str,
    source_workload: String,
    source_workload_namespace: String,
    source_principal: String,
    source_app: String,
    source_version: String,
    source_canonical_service: String,
    source_canonical_revision: String,
    source_cluster: &'static str,
    destination_service: String,
    destination_service_name: String,
    destination_service_namespace: String,
    destination_workload: String,
    destination_workload_namespace: String,
    destination_principal: String,
    destination_app: String,
    destination_version: String,
    destination_canonical_service: String,
    destination_canonical_revision: String,
    destination_cluster: &'static str,
    request_protocol: &'static str,
    response_flags: &'static str,
    connection_security_policy: &'static str,
}

const UNKNOWN: &str = "unknown";
/// Istio's name of a mesh's only cluster.
const CLUSTER: &str = "Kubernetes";

impl ConnectionLabels {
    pub fn new(
        reporter: Reporter,
        source: (Option<&Workload>, Option<&SpiffeId>),
        destination: (Option<&Workload>, Option<&SpiffeId>),
        service: Option<&NamespacedName>,
        mutual_tls: bool,
        denied: bool,
    ) -> Self {
        let owner = |w: Option<&Workload>| w.map_or(UNKNOWN.into(), |w| w.owner.clone());
        let namespace = |w: Option<&Workload>| w.map_or(UNKNOWN.into(), |w| w.namespace.clone());
        let label = |w: Option<&Workload>, name: &str| {
            w.and_then(|w| w.labels.get(name))
                .cloned()
                .unwrap_or_else(|| UNKNOWN.into())
        };
        let app = |w: Option<&Workload>| w.and_then(Workload::app).unwrap_or(UNKNOWN).to_owned();
        let revision = |w: Option<&Workload>| {
            let version = label(w, "version");
            if version == UNKNOWN {
                "latest".to_owned()
            } else {
                version
            }
        };
        let principal = |id: Option<&SpiffeId>| id.map_or(UNKNOWN.into(), SpiffeId::to_string);
        Self {
            reporter: match reporter {
                Reporter::Source => "source",
                Reporter::Destination => "destination",
            },
            source_workload: owner(source.0),
            source_workload_namespace: namespace(source.0),
            source_principal: principal(source.1),
            source_app: label(source.0, "app"),
            source_version: label(source.0, "version"),
            source_canonical_service: app(source.0),
            source_canonical_revision: revision(source.0),
            source_cluster: CLUSTER,
            destination_service: service.map_or(UNKNOWN.into(), |s| {
                format!("{}.{}.svc.cluster.local", s.name, s.namespace)
            }),
            destination_service_name: service.map_or(UNKNOWN.into(), |s| s.name.clone()),
            destination_service_namespace: service.map_or(UNKNOWN.into(), |s| s.namespace.clone()),
            destination_workload: owner(destination.0),
            destination_workload_namespace: namespace(destination.0),
            destination_principal: principal(destination.1),
            destination_app: label(destination.0, "app"),
            destination_version: label(destination.0, "version"),
            destination_canonical_service: app(destination.0),
            destination_canonical_revision: revision(destination.0),
            destination_cluster: CLUSTER,
            request_protocol: "tcp",
            response_flags: if denied { "RBAC" } else { "-" },
            connection_security_policy: if mutual_tls { "mutual_tls" } else { "unknown" },
        }
    }
}

/// What a connection is counted by.
pub struct Counted {
    pub opened: Counter,
    pub closed: Counter,
    pub sent: Counter,
    pub received: Counter,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct Name {
    pub name: &'static str,
}

/// A receiver of the audit log.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Sink {
    sink: String,
}

/// Of requests that policy had read.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RequestLabels {
    protocol: &'static str,
    verdict: &'static str,
    /// Empty where it was broken off before.
    code: String,
}

/// Of tokens that were asked for.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct GrantLabels {
    pub grant: &'static str,
    /// `granted` or `failed`.
    pub result: &'static str,
}

pub struct Metrics {
    registry: Registry,
    opened: Family<ConnectionLabels, Counter>,
    closed: Family<ConnectionLabels, Counter>,
    sent: Family<ConnectionLabels, Counter>,
    received: Family<ConnectionLabels, Counter>,
    requests: Family<RequestLabels, Counter>,
    pub grants: Family<GrantLabels, Counter>,
    /// Requests of pods by where their token came from: `cached`, `fetched`, `none`.
    pub tokens: Family<Name, Counter>,
    /// By `client`, `server`, and each's failures.
    pub handshakes: Family<Name, Counter>,
    pub handshake_seconds: Histogram,
    pub tunnels: Gauge,
    pub streams: Gauge,
    pub enrolled: Gauge,
    /// Connections that waited to learn what they dial: `known`, `foreign`, `unknown`.
    discoveries: Family<Name, Counter>,
    pub reload_errors: Family<Name, Counter>,
    pub map_entries: Family<Name, Gauge>,
    /// Counted elsewhere; set to what stands there.
    pub kernel: Family<Name, Counter>,
    pub audit_written: Counter,
    pub audit_lost: Counter,
    audit_incomplete: Counter,
    sinks: [(&'static str, Family<Sink, Gauge>); 4],
    /// The API server, counted elsewhere.
    kubernetes: Family<Name, Counter>,
    kubernetes_objects: Family<Name, Gauge>,
    kubernetes_watches: Gauge,
    kubernetes_stale: Gauge,
    pub certificate_errors: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::default();
        let mut metrics = Self {
            opened: Family::default(),
            closed: Family::default(),
            sent: Family::default(),
            received: Family::default(),
            requests: Family::default(),
            grants: Family::default(),
            tokens: Family::default(),
            handshakes: Family::default(),
            handshake_seconds: Histogram::new([
                0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5, 10.0,
            ]),
            tunnels: Gauge::default(),
            streams: Gauge::default(),
            enrolled: Gauge::default(),
            discoveries: Family::default(),
            reload_errors: Family::default(),
            map_entries: Family::default(),
            kernel: Family::default(),
            audit_written: Counter::default(),
            audit_lost: Counter::default(),
            audit_incomplete: Counter::default(),
            sinks: ["sent", "behind", "skipped", "rejected"].map(|what| (what, Family::default())),
            kubernetes: Family::default(),
            kubernetes_objects: Family::default(),
            kubernetes_watches: Gauge::default(),
            kubernetes_stale: Gauge::default(),
            certificate_errors: Counter::default(),
            registry: Registry::default(),
        };
        let m = &metrics;
        let istio = registry.sub_registry_with_prefix("istio_tcp");
        istio.register("connections_opened", "Connections opened", m.opened.clone());
        istio.register("connections_closed", "Connections closed", m.closed.clone());
        // Istio: "sent" is what the destination sends, its response.
        istio.register("sent_bytes", "Bytes sent in responses", m.sent.clone());
        istio.register(
            "received_bytes",
            "Bytes received in requests",
            m.received.clone(),
        );
        let own = registry.sub_registry_with_prefix("postern");
        own.register(
            "requests",
            "HTTP requests that policy had read",
            m.requests.clone(),
        );
        own.register(
            "token_grants",
            "Tokens asked for at authorization servers, and own ones",
            m.grants.clone(),
        );
        own.register(
            "outbound_tokens",
            "Requests of pods that a token was put on, or failed to",
            m.tokens.clone(),
        );
        own.register(
            "tls_handshakes",
            "TLS handshakes by side and outcome",
            m.handshakes.clone(),
        );
        own.register_with_unit(
            "tls_handshake_duration",
            "Time of a TLS handshake",
            Unit::Seconds,
            m.handshake_seconds.clone(),
        );
        own.register("tunnels", "Open outbound tunnels", m.tunnels.clone());
        own.register(
            "streams",
            "Open streams on outbound tunnels",
            m.streams.clone(),
        );
        own.register(
            "enrolled_workloads",
            "Local workloads in the mesh",
            m.enrolled.clone(),
        );
        own.register(
            "discoveries",
            "Connections that waited until it was asked what they dial",
            m.discoveries.clone(),
        );
        own.register(
            "reload_errors",
            "Reloads that left the last good state standing",
            m.reload_errors.clone(),
        );
        own.register(
            "map_entries",
            "Entries in a kernel map",
            m.map_entries.clone(),
        );
        own.register(
            "kernel",
            "Counted in the kernel since the maps were made",
            m.kernel.clone(),
        );
        own.register(
            "audit_records_written",
            "Audit records written",
            m.audit_written.clone(),
        );
        own.register(
            "audit_records_lost",
            "Audit records lost",
            m.audit_lost.clone(),
        );
        own.register(
            "audit_incomplete",
            "Records of connections without what the kernel saw of them",
            m.audit_incomplete.clone(),
        );
        for (what, family) in &m.sinks {
            own.register(
                format!("audit_sink_{what}"),
                "Audit records of this receiver",
                family.clone(),
            );
        }
        own.register(
            "kubernetes",
            "What the agent asked of the API server and heard from it",
            m.kubernetes.clone(),
        );
        own.register(
            "kubernetes_objects",
            "Objects of the API server that are kept, by resource",
            m.kubernetes_objects.clone(),
        );
        own.register(
            "kubernetes_watches",
            "Watches at the API server",
            m.kubernetes_watches.clone(),
        );
        own.register_with_unit(
            "kubernetes_stale",
            "Since when changes may be missed; 0: none are",
            Unit::Seconds,
            m.kubernetes_stale.clone(),
        );
        own.register(
            "certificate_errors",
            "Certificates that could not be renewed",
            m.certificate_errors.clone(),
        );
        metrics.registry = registry;
        metrics
    }
}

impl Metrics {
    pub fn text(&self) -> String {
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("writing to a string");
        text
    }

    pub fn request(&self, protocol: &'static str, verdict: Verdict, status: Option<u16>) {
        let labels = RequestLabels {
            protocol,
            verdict: match verdict {
                Verdict::Allow => "allow",
                Verdict::Deny => "deny",
                Verdict::Failed => "failed",
            },
            code: status.map(|s| s.to_string()).unwrap_or_default(),
        };
        self.requests.get_or_create(&labels).inc();
    }

    pub fn token(&self, name: &'static str) {
        self.tokens.get_or_create(&Name { name }).inc();
    }

    /// The counters of connections with these labels.
    pub fn connection(&self, labels: &ConnectionLabels) -> Counted {
        let of = |family: &Family<_, Counter>| family.get_or_create_owned(labels);
        Counted {
            opened: of(&self.opened),
            closed: of(&self.closed),
            sent: of(&self.sent),
            received: of(&self.received),
        }
    }

    pub fn handshake(&self, name: &'static str) {
        self.handshakes.get_or_create(&Name { name }).inc();
    }

    pub fn discovery(&self, name: &'static str) {
        self.discoveries.get_or_create(&Name { name }).inc();
    }

    pub fn reload_error(&self, name: &'static str) {
        self.reload_errors.get_or_create(&Name { name }).inc();
    }

    pub fn set_map_entries(&self, name: &'static str, entries: usize) {
        self.map_entries
            .get_or_create(&Name { name })
            .set(entries as i64);
    }

    pub fn set_kernel(&self, name: &'static str, count: u64) {
        set(&self.kernel.get_or_create(&Name { name }), count);
    }

    pub fn set_audit(&self, written: u64, lost: u64) {
        set(&self.audit_written, written);
        set(&self.audit_lost, lost);
    }

    pub fn set_incomplete(&self, count: u64) {
        set(&self.audit_incomplete, count);
    }

    pub fn set_kubernetes(
        &self,
        counts: &[(&'static str, u64)],
        kept: BTreeMap<&'static str, usize>,
        watches: usize,
        stale: u64,
    ) {
        for (name, count) in counts {
            set(&self.kubernetes.get_or_create(&Name { name }), *count);
        }
        for (name, objects) in kept {
            let gauge = self.kubernetes_objects.get_or_create(&Name { name });
            gauge.set(objects as i64);
        }
        self.kubernetes_watches.set(watches as i64);
        let stale = i64::try_from(stale).unwrap_or(i64::MAX);
        self.kubernetes_stale.set(stale);
    }

    pub fn set_sink(&self, progress: &Progress) {
        let Progress {
            name,
            sent,
            behind,
            skipped,
            rejected,
            ..
        } = progress;
        let label = Sink { sink: name.clone() };
        for ((_, family), count) in self.sinks.iter().zip([sent, behind, skipped, rejected]) {
            let gauge = family.get_or_create(&label);
            gauge.set(i64::try_from(*count).unwrap_or(i64::MAX));
        }
    }
}

fn set(counter: &Counter, count: u64) {
    counter.inner().store(count, Ordering::Relaxed);
}

#[cfg(test)]
mod tests;
