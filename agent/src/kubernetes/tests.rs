//! The source against an API server that does all that a real one may do.

mod discover;
mod policies;
mod taint;
mod tell;
mod watch;

use std::{path::PathBuf, sync::Arc, time::Duration};

use postern_apiserver::{ApiServer, Options};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{task::JoinHandle, time::Instant};

use super::{Cluster, Pace, Patience};
use crate::{
    config::{Config, Discovery, Mesh as Enrolment, Source},
    identity::TrustDomain,
    policy::{Mesh, Reading},
    workload::Table,
};

const NODE: &str = "n1";

/// As it is, but nobody has to wait.
fn pace() -> Pace {
    Pace {
        first: Duration::from_millis(10),
        longest: Duration::from_millis(200),
        absent: Duration::from_millis(50),
        forget: Duration::from_millis(300),
        grace: Duration::from_millis(300),
        page: 2,
        status: Duration::from_millis(100),
        pods: Duration::from_millis(20),
        taint: Duration::from_millis(20),
        patience: Patience {
            first: Duration::from_millis(50),
            again: Duration::from_millis(50),
        },
        ..Pace::default()
    }
}

struct Lab {
    server: ApiServer,
    state: TempDir,
    config: Config,
}

impl Lab {
    fn new() -> Self {
        Self::with(Options::default())
    }

    fn with(options: Options) -> Self {
        let server = ApiServer::with(options).expect("it starts");
        let state = tempfile::tempdir().expect("a directory");
        let kubeconfig = state.path().join("kubeconfig");
        std::fs::write(&kubeconfig, server.kubeconfig()).expect("it is written");
        let mut config = Config {
            node: NODE.into(),
            state: state.path().to_owned(),
            ..Config::default()
        };
        config.workloads.source = Source::Kubernetes;
        config.policies.source = Source::Kubernetes;
        config.kubernetes.kubeconfig = Some(kubeconfig);
        Self {
            server,
            state,
            config,
        }
    }

    fn put(&self, object: Value) {
        let named = object["metadata"]["name"].to_string();
        self.server
            .apply(object)
            .unwrap_or_else(|_| panic!("{named} is put"));
    }

    async fn connect(&self) -> Arc<Cluster> {
        let cluster = Cluster::connect_with(&self.config, pace()).await;
        cluster.expect("it connects").expect("it is a source")
    }

    /// One that is started, and whose table follows it as an agent's does.
    async fn follow(&self) -> Followed {
        Followed::start(self.connect().await)
    }

    fn file(&self) -> PathBuf {
        self.state.path().join("kubernetes.json")
    }
}

struct Followed {
    cluster: Arc<Cluster>,
    publisher: JoinHandle<()>,
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.publisher.abort();
        self.cluster.stop();
    }
}

impl Followed {
    fn start(cluster: Arc<Cluster>) -> Self {
        cluster.start();
        let followed = cluster.clone();
        let publisher = tokio::spawn(async move {
            let mut changes = followed.changes();
            loop {
                followed.pin();
                if followed.standing().whole {
                    compile(&followed);
                }
                let (version, _, index, ranges) = followed.view(Enrolment::Enabled).parts();
                followed.published(version, index, ranges);
                if changes.changed().await.is_err() {
                    return;
                }
            }
        });
        Self { cluster, publisher }
    }

    fn table(&self) -> Table {
        self.cluster.view(Enrolment::Enabled).parts().1
    }

    fn pods(&self) -> Vec<String> {
        let mut names: Vec<String> = (self.table().workloads.iter())
            .map(|workload| workload.name.clone())
            .collect();
        names.sort();
        names
    }

    async fn synced(&self) {
        until("all is listed", || self.cluster.standing().synced).await;
    }
}

fn compile(cluster: &Cluster) -> crate::policy::PolicySet {
    let domain = TrustDomain::default();
    cluster.compile(&mesh(&domain))
}

fn mesh(domain: &TrustDomain) -> Mesh<'_> {
    Mesh {
        root_namespace: "istio-system",
        trust_domain: domain,
        aliases: &[],
        secrets: "/secrets".as_ref(),
        requests: Reading::default(),
    }
}

/// Waits for what has to come; a machine may be slow.
async fn until(what: &str, mut there: impl FnMut() -> bool) {
    let limit = Instant::now() + Duration::from_secs(30);
    while !there() {
        assert!(Instant::now() < limit, "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn pod(name: &str, node: &str, address: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": name, "namespace": "shop", "uid": format!("uid-{name}"),
            "labels": {"app": name},
            "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "long"},
        },
        "spec": {"nodeName": node, "containers": [{"name": "main", "image": "web"}]},
        "status": {
            "phase": "Running", "podIP": address, "podIPs": [{"ip": address}],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    })
}

fn service(name: &str, address: &str, selector: Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {
            "clusterIP": address, "clusterIPs": [address], "selector": selector,
            "ports": [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}],
        },
    })
}

fn slice(service: &str, node: &str, address: &str) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {
            "name": format!("{service}-1"), "namespace": "shop",
            "labels": {"kubernetes.io/service-name": service},
        },
        "endpoints": [{
            "addresses": [address], "conditions": {"ready": true}, "nodeName": node,
            "targetRef": {"kind": "Pod", "namespace": "shop", "name": "x"},
        }],
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    })
}

fn policy(kind: &str, name: &str, spec: Value) -> Value {
    let group = match kind {
        "AuthorizationPolicy" | "PeerAuthentication" | "RequestAuthentication" => {
            "security.istio.io/v1"
        }
        _ => "postern.dev/v1alpha1",
    };
    json!({
        "apiVersion": group, "kind": kind,
        "metadata": {"name": name, "namespace": "shop", "uid": format!("uid-{name}"), "generation": 1},
        "spec": spec,
    })
}
