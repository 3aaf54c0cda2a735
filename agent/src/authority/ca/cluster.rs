//! The authority in a Kubernetes cluster. Its API server says whose a service account
//! token is and of which node (TokenReview), and what runs on a node; agents learn by a
//! ConfigMap which roots to trust this server by. Whatever cannot be asked is refused
//! or, where agents come again anyway, an error that is theirs to wait out.

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use k8s_openapi::api::{
    authentication::v1::{TokenReview, TokenReviewSpec, UserInfo},
    core::v1::{ConfigMap, Pod},
};
use kube::{
    Api, Client,
    api::{ListParams, ObjectMeta, Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::json;

use super::{bundle, problem::Problem};
use crate::{
    authority::{Config, Server, config::ClusterNodes},
    identity::SpiffeId,
};

/// For each question.
const LIMIT: Duration = Duration::from_secs(5);
/// How long a node's accounts are known: one whose last pod is gone is served as long.
const KNOWN: Duration = Duration::from_secs(30);
/// How often a node's pods are asked for, at most: an agent that asks for what does not
/// run there is answered by what was told last.
const SPACING: Duration = Duration::from_secs(1);
/// Nodes that are kept in mind.
const MAX_NODES: usize = 16_384;
/// How often the roots are looked at; written when they have changed, and now and then
/// for the case that somebody else did.
const LOOK: Duration = Duration::from_secs(10);
const WRITE: Duration = Duration::from_secs(600);
/// What agents find them under.
const ROOTS: &str = "roots.pem";
/// From Kubernetes 1.30 on, of tokens that are bound to a pod.
const NODE: &str = "authentication.kubernetes.io/node-name";

#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    #[error("nodes.cluster stands for nodes.manifests and nodes.kubernetes; name it alone")]
    Beside,
    #[error("nodes.cluster.{0} must not be empty")]
    Empty(&'static str),
    #[error("nodes.cluster.kubeconfig: {path}: {why}")]
    Kubeconfig { path: PathBuf, why: String },
    #[error("nodes.cluster.kubeconfig is empty, and this is no pod with a service account: {0}")]
    NoPod(String),
    #[error("nodes.cluster: {0}")]
    Client(String),
}

/// Namespace and service account.
type Accounts = Arc<HashSet<(String, String)>>;

pub struct Cluster {
    client: Client,
    audience: String,
    namespace: String,
    service_account: String,
    roots: Option<String>,
    /// By node, and when they were told.
    known: Mutex<HashMap<String, (Instant, Accounts)>>,
}

impl Cluster {
    pub async fn open(config: &Config) -> Result<Option<Self>, ClusterError> {
        let Some(cluster) = &config.nodes.cluster else {
            return Ok(None);
        };
        if config.nodes.manifests.is_some() || config.nodes.kubernetes.is_some() {
            return Err(ClusterError::Beside);
        }
        for (name, value) in [
            ("namespace", &cluster.namespace),
            ("serviceAccount", &cluster.service_account),
        ] {
            if value.is_empty() {
                return Err(ClusterError::Empty(name));
            }
        }
        Ok(Some(Self {
            client: connect(cluster).await?,
            audience: cluster
                .audience
                .clone()
                .unwrap_or_else(|| config.issuer.clone()),
            namespace: cluster.namespace.clone(),
            service_account: cluster.service_account.clone(),
            roots: cluster.roots_config_map.clone(),
            known: Mutex::default(),
        }))
    }

    /// Whether the token is of an agent's pod on this node.
    pub async fn verify(&self, token: &str, node: &str) -> Result<(), Problem> {
        let review = TokenReview {
            metadata: ObjectMeta::default(),
            spec: TokenReviewSpec {
                token: Some(token.to_owned()),
                audiences: Some(vec![self.audience.clone()]),
            },
            status: None,
        };
        let api: Api<TokenReview> = Api::all(self.client.clone());
        let params = PostParams::default();
        let reviewed = asked("whose a token is", api.create(&params, &review)).await?;
        let status = reviewed.status.unwrap_or_default();
        // An API server that knows nothing of audiences names none.
        let audiences = status.audiences.unwrap_or_default();
        if status.authenticated != Some(true) || !audiences.contains(&self.audience) {
            let why = status.error.unwrap_or_else(|| "not authenticated".into());
            return Err(Problem::proof(format!(
                "the API server does not know the token: {why}"
            )));
        }
        self.check(&status.user.unwrap_or_default(), node)
            .map_err(Problem::proof)
    }

    fn check(&self, user: &UserInfo, node: &str) -> Result<(), String> {
        let wanted = format!(
            "system:serviceaccount:{}:{}",
            self.namespace, self.service_account
        );
        if user.username.as_ref() != Some(&wanted) {
            return Err("the token is of another service account".into());
        }
        let extra = user.extra.as_ref().and_then(|extra| extra.get(NODE));
        match extra.map(Vec::as_slice) {
            Some([of]) if of == node => Ok(()),
            Some([of]) => Err(format!("the token is of a pod on node {of}")),
            _ => Err("the token is not bound to a node".into()),
        }
    }

    /// Whether a pod of this account runs on this node.
    pub async fn runs(&self, node: &str, id: &SpiffeId) -> Result<bool, Problem> {
        let account = (id.namespace.clone(), id.service_account.clone());
        let known = self.known(node);
        if let Some((told, accounts)) = known {
            let age = told.elapsed();
            if age < KNOWN && accounts.contains(&account) {
                return Ok(true);
            }
            if age < SPACING {
                return Ok(false);
            }
        }
        let api: Api<Pod> = Api::all(self.client.clone());
        // An agent's node is part of a SPIFFE ID: no comma or blank is in it.
        let params = ListParams::default().fields(&format!("spec.nodeName={node}"));
        let pods = asked("what runs on a node", api.list(&params)).await?;
        let accounts: Accounts = Arc::new(pods.items.into_iter().filter_map(account_of).collect());
        let runs = accounts.contains(&account);
        self.keep(node, accounts);
        Ok(runs)
    }

    fn known(&self, node: &str) -> Option<(Instant, Accounts)> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(node).cloned()
    }

    fn keep(&self, node: &str, accounts: Accounts) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MAX_NODES {
            known.retain(|_, (told, _)| told.elapsed() < KNOWN);
        }
        // With that many agents at once, some are asked for more often.
        if known.len() < MAX_NODES {
            known.insert(node.to_owned(), (Instant::now(), accounts));
        }
    }

    /// Keeps the roots where agents look for them.
    pub async fn publish(&self, server: &Server) {
        let Some(name) = &self.roots else {
            return std::future::pending().await;
        };
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), &self.namespace);
        let mut written: Option<(Instant, String)> = None;
        loop {
            match bundle::roots(server) {
                Ok(roots) => {
                    let text = crate::identity::pem(&roots);
                    let due = written
                        .as_ref()
                        .is_none_or(|(at, last)| *last != text || at.elapsed() >= WRITE);
                    if due {
                        let patch = Patch::Merge(json!({"data": {ROOTS: text}}));
                        let params = PatchParams::default();
                        match asked("to take the roots", api.patch(name, &params, &patch)).await {
                            Ok(_there) => written = Some((Instant::now(), text)),
                            // Told by `asked`; tried again.
                            Err(_problem) => {}
                        }
                    }
                }
                Err(error) => tracing::error!(%error, "certificates.bundle"),
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// Of a pod that may have processes.
fn account_of(pod: Pod) -> Option<(String, String)> {
    let phase = pod.status.and_then(|status| status.phase);
    if matches!(phase.as_deref(), Some("Succeeded" | "Failed")) {
        return None;
    }
    let account = pod.spec.and_then(|spec| spec.service_account_name);
    Some((
        pod.metadata.namespace?,
        account.unwrap_or_else(|| "default".into()),
    ))
}

async fn connect(cluster: &ClusterNodes) -> Result<Client, ClusterError> {
    let mut config = match &cluster.kubeconfig {
        Some(path) => {
            let wrong = |why: &dyn std::fmt::Display| ClusterError::Kubeconfig {
                path: path.clone(),
                why: why.to_string(),
            };
            let file = Kubeconfig::read_from(path).map_err(|e| wrong(&e))?;
            let options = KubeConfigOptions::default();
            let config = kube::Config::from_custom_kubeconfig(file, &options).await;
            let config = config.map_err(|e| wrong(&e))?;
            // Whoever answers in the API server's place decides who gets which identity.
            if config.accept_invalid_certs || config.cluster_url.scheme_str() != Some("https") {
                return Err(wrong(
                    &"the server must be https, with a certificate that is checked",
                ));
            }
            config
        }
        None => kube::Config::incluster().map_err(|e| ClusterError::NoPod(e.to_string()))?,
    };
    config.connect_timeout = Some(LIMIT);
    config.read_timeout = Some(LIMIT);
    Client::try_from(config).map_err(|e| ClusterError::Client(e.to_string()))
}

/// An answer of the API server, in time, or an error that agents wait out.
async fn asked<T>(
    what: &'static str,
    question: impl Future<Output = kube::Result<T>>,
) -> Result<T, Problem> {
    match tokio::time::timeout(LIMIT, question).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(Problem::failed(format!(
            "the API server was asked {what}: {error}"
        ))),
        Err(_elapsed) => Err(Problem::failed(format!(
            "the API server was asked {what}, and did not answer within {} s",
            LIMIT.as_secs()
        ))),
    }
}
