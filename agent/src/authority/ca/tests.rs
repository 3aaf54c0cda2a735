//! The authority as agents see it, through its routes; the clock is a simulated one.

mod agents;
mod cluster;
mod joining;
mod kubernetes;
mod signing;

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use axum::body::Body;
use http::Request;
use http_body_util::BodyExt as _;
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::CertificateDer;
use serde_json::{Value, json};
use tower::ServiceExt as _;

use super::{Config, Peer, Server, Shared, tokens};
use crate::{
    audit::{Audit, chain},
    authority::{Clock, routes},
    identity::wire,
};

/// Around now: certificates of other authorities are made by the system's clock.
fn start() -> u64 {
    Clock::system().seconds()
}

const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: cart, namespace: shop, uid: u1}\n\
                   spec: {nodeName: node1, serviceAccountName: cart}\n";
const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";

struct Authority {
    server: Shared,
    dir: tempfile::TempDir,
    writer: std::thread::JoinHandle<()>,
}

/// An agent: its key, and the chain that it shows.
struct Agent {
    key: KeyPair,
    chain: Vec<CertificateDer<'static>>,
}

impl Authority {
    async fn new() -> Self {
        Self::with(|_, _| {}).await
    }

    async fn with(change: impl FnOnce(&mut Config, &Path)) -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let manifests = dir.path().join("manifests");
        std::fs::create_dir(&manifests).expect("directory");
        std::fs::write(manifests.join("pod.yaml"), POD).expect("written");
        let mut config = Config {
            state: dir.path().join("state"),
            issuer: "https://authority.example".into(),
            ..Config::default()
        };
        config.nodes.manifests = Some(manifests);
        change(&mut config, dir.path());
        std::fs::create_dir_all(&config.state).expect("a directory");
        let opened = Audit::open("authority", config.audit_log(), 1000);
        let (audit, writer) = opened.expect("an audit log");
        let server = Server::open(config, Clock::fixed(start()), audit).await;
        Self {
            server: Arc::new(server.expect("opens")),
            dir,
            writer,
        }
    }

    async fn token(&self, node: &str) -> String {
        let now = self.server.clock.seconds();
        let made = tokens::create(&self.server.store, node, now, now + 60).await;
        made.expect("made").0.to_string()
    }

    async fn send(&self, request: Request<Body>, chain: &[CertificateDer<'static>]) -> Answer {
        let mut request = request;
        request.extensions_mut().insert(Peer {
            address: SocketAddr::from(([192, 0, 2, 1], 1234)),
            certificates: chain.into(),
        });
        let response = routes(self.server.clone()).oneshot(request).await;
        let response = response.expect("infallible");
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.expect("a body");
        let body = body.to_bytes();
        let said = serde_json::from_slice(&body)
            .unwrap_or_else(|_| Value::from(String::from_utf8_lossy(&body).into_owned()));
        Answer { status, said }
    }

    /// Shows these certificates.
    async fn post(&self, path: &str, body: &Value, chain: &[CertificateDer<'static>]) -> Answer {
        self.send(post(path, body), chain).await
    }

    async fn join(&self, node: &str, token: &str, csr: &str) -> Answer {
        let mut request = post("/v1/agents/join", &json!({"node": node, "csr": csr}));
        let bearer = format!("Bearer {token}").parse().expect("a header");
        request.headers_mut().insert("authorization", bearer);
        self.send(request, &[]).await
    }

    async fn agent(&self, node: &str) -> Agent {
        let (key, csr) = csr();
        let token = self.token(node).await;
        let answer = self.join(node, &token, &csr).await;
        assert_eq!(answer.status, 200, "{:?}", answer.said);
        Agent {
            key,
            chain: answer.chain(),
        }
    }

    async fn certificate(&self, agent: &Agent, identity: &str, csr: &str) -> Answer {
        let body = json!({"identity": identity, "csr": csr});
        self.post("/v1/certificates", &body, &agent.chain).await
    }

    async fn advance(&self, by: Duration) {
        self.server.clock.advance(by);
    }

    /// Records of a kind so far; the writer may still have some to write.
    fn audit_now(&self, event: &str) -> usize {
        let records = chain::records(&self.dir.path().join("state/audit"));
        records.iter().filter(|r| r["event"] == event).count()
    }

    /// The audit log, once all is written.
    fn audit(self) -> Vec<Value> {
        let Self {
            server,
            dir,
            writer,
        } = self;
        drop(server);
        writer.join().expect("no panic");
        chain::records(&dir.path().join("state/audit"))
    }
}

struct Answer {
    status: u16,
    said: Value,
}

impl Answer {
    fn chain(&self) -> Vec<CertificateDer<'static>> {
        let answer: wire::CertificateAnswer =
            serde_json::from_value(self.said.clone()).expect("an answer");
        wire::decode(&answer.chain).expect("base64")
    }

    fn detail(&self) -> &str {
        self.said["detail"].as_str().unwrap_or_default()
    }
}

fn post(path: &str, body: &Value) -> Request<Body> {
    Request::post(path)
        .header("content-type", "application/json")
        .body(Body::from(body.to_string()))
        .expect("a request")
}

/// A new key, and a request for it alone.
fn csr() -> (KeyPair, String) {
    let key = KeyPair::generate().expect("a key");
    let csr = csr_of(&key, |_| {});
    (key, csr)
}

fn csr_of(key: &KeyPair, change: impl FnOnce(&mut CertificateParams)) -> String {
    let mut params = CertificateParams::default();
    change(&mut params);
    let request = params.serialize_request(key).expect("a request");
    request.pem().expect("PEM")
}
