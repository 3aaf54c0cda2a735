//! The Kubernetes cluster whose nodes the agents are on, asked itself: whether an agent's
//! token is good and of which node (TokenReview), and which service accounts have pods
//! there. Fails closed: what the API server does not answer in time is refused, and the
//! agent comes again.
//!
//! `roots` are written into a ConfigMap, where agents find what to trust this server by.

mod places;

use std::{collections::HashMap, path::PathBuf, time::Duration};

use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::{
    Api, Client,
    api::{ListParams, Patch, PatchParams},
    config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError},
};
use serde::Deserialize;
use serde_json::json;
use zeroize::Zeroizing;

use super::problem::Problem;
use crate::{
    authority::{Config, config::ClusterNodes},
    fetch::causes,
    identity::SpiffeId,
};
use places::Places;

/// For each question to the API server.
const LIMIT: Duration = Duration::from_secs(5);
/// Longest explanation of what went wrong, in characters.
const MAX_TEXT: usize = 300;

#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    #[error("nodes.cluster excludes nodes.{0}: the cluster is asked for all of it")]
    Excludes(&'static str),
    #[error("nodes.cluster.{0} must not be empty")]
    Empty(&'static str),
    #[error("nodes.cluster.kubeconfig: {path}: {source}")]
    Kubeconfig {
        path: PathBuf,
        source: Box<KubeconfigError>,
    },
    #[error("nodes.cluster.kubeconfig: {0}: the server must be an https URL, and verified")]
    Unsafe(PathBuf),
    #[error("nodes.cluster: no kubeconfig is named, and there is no service account of a pod: {0}")]
    InCluster(#[from] Box<InClusterError>),
    #[error("nodes.cluster: {0}")]
    Client(#[from] Box<kube::Error>),
}

pub struct Cluster {
    client: Client,
    nodes: ClusterNodes,
    audience: String,
    places: Places,
}

/// `TokenReview.status` (authentication.k8s.io/v1), as far as it is used.
#[derive(Deserialize)]
struct Review {
    #[serde(default)]
    status: Status,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Status {
    authenticated: bool,
    user: User,
    audiences: Vec<String>,
    error: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct User {
    username: String,
    extra: HashMap<String, Vec<String>>,
}

impl User {
    /// A value that stands alone.
    fn bound(&self, name: &str) -> Option<&str> {
        let name = format!("authentication.kubernetes.io/{name}");
        match self.extra.get(&name)?.as_slice() {
            [value] if !value.is_empty() => Some(value),
            _ => None,
        }
    }
}

impl Cluster {
    /// Needs a runtime. Nobody is asked yet. Token and CA of a pod's service account are
    /// read again as they change (kube does that).
    pub async fn open(config: &Config) -> Result<Option<Self>, ClusterError> {
        let Some(nodes) = &config.nodes.cluster else {
            return Ok(None);
        };
        if config.nodes.manifests.is_some() {
            return Err(ClusterError::Excludes("manifests"));
        }
        if config.nodes.kubernetes.is_some() {
            return Err(ClusterError::Excludes("kubernetes"));
        }
        for (name, value) in [
            ("namespace", &nodes.namespace),
            ("serviceAccount", &nodes.service_account),
        ] {
            if value.is_empty() {
                return Err(ClusterError::Empty(name));
            }
        }
        let mut way = match &nodes.kubeconfig {
            Some(path) => kubeconfig(path.clone()).await?,
            None => kube::Config::incluster().map_err(Box::new)?,
        };
        way.connect_timeout = Some(LIMIT);
        way.read_timeout = Some(LIMIT);
        way.write_timeout = Some(LIMIT);
        way.default_retry = false;
        let client = Client::try_from(way).map_err(Box::new)?;
        Ok(Some(Self {
            client,
            audience: nodes.audience.clone().unwrap_or(config.issuer.clone()),
            nodes: nodes.clone(),
            places: Places::default(),
        }))
    }

    /// Whether the token is of an agent's pod on this node.
    pub async fn verify(&self, token: &str, node: &str) -> Result<(), Problem> {
        let status = self.review(token).await.map_err(Problem::unavailable)?;
        let refused = |why: &str| Err(Problem::proof(why));
        if !status.authenticated {
            let why: String = status
                .error
                .chars()
                .filter(|c| !c.is_control())
                .take(MAX_TEXT)
                .collect();
            return refused(&format!("the cluster refuses the token: {why}"));
        }
        // Authenticators that know no audiences leave this empty.
        if !status.audiences.contains(&self.audience) {
            return refused("the token is for another audience");
        }
        let ClusterNodes {
            namespace,
            service_account,
            ..
        } = &self.nodes;
        let account = format!("system:serviceaccount:{namespace}:{service_account}");
        if status.user.username != account {
            return refused("the token is of another service account");
        }
        let (Some(pod), Some(uid)) = (status.user.bound("pod-name"), status.user.bound("pod-uid"))
        else {
            return refused("the token is not bound to a pod");
        };
        let of = match status.user.bound("node-name") {
            Some(of) => of.to_owned(),
            // Before Kubernetes 1.30 the token does not say: its pod does.
            None => match self.node_of(pod, uid).await.map_err(Problem::unavailable)? {
                Some(of) => of,
                None => return refused("the token's pod is gone, or on no node"),
            },
        };
        match of == node {
            true => Ok(()),
            false => refused(&format!("the token is of a pod on node {of}")),
        }
    }

    /// Whether a pod of this account runs on this node.
    pub async fn runs(&self, node: &str, id: &SpiffeId) -> Result<bool, String> {
        let account = (id.namespace.clone(), id.service_account.clone());
        self.places
            .runs(node, &account, || self.accounts(node))
            .await
    }

    /// Writes the roots for agents to find, where it is to.
    pub async fn publish_roots(&self, pem: &str) -> Result<(), String> {
        let Some(name) = &self.nodes.roots_config_map else {
            return Ok(());
        };
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), &self.nodes.namespace);
        let patch = Patch::Merge(json!({"data": {"roots.pem": pem}}));
        let params = PatchParams::default();
        let patched = maps.patch(name, &params, &patch);
        limited(patched).await.map(|_map| ())
    }

    /// The answer is read here: it holds the token, which no error may quote.
    async fn review(&self, token: &str) -> Result<Status, String> {
        let body = Zeroizing::new(
            json!({
                "apiVersion": "authentication.k8s.io/v1",
                "kind": "TokenReview",
                "spec": {"token": token, "audiences": [self.audience]},
            })
            .to_string(),
        );
        let request = http::Request::post("/apis/authentication.k8s.io/v1/tokenreviews")
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(body.as_bytes().to_vec())
            .map_err(|e| e.to_string())?;
        let answer = Zeroizing::new(limited(self.client.request_text(request)).await?);
        let review: Review = serde_json::from_str(&answer)
            .map_err(|_could_quote_it| "the API server's answer is no TokenReview")?;
        Ok(review.status)
    }

    /// Where the agent's pod is; listed by its name, so that `list` is all that the
    /// authority may.
    async fn node_of(&self, pod: &str, uid: &str) -> Result<Option<String>, String> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.nodes.namespace);
        let by_name = ListParams::default().fields(&format!("metadata.name={pod}"));
        let found = limited(pods.list(&by_name)).await?;
        let is_it = |found: &&Pod| {
            found.metadata.name.as_deref() == Some(pod)
                && found.metadata.uid.as_deref() == Some(uid)
        };
        let spec = found
            .items
            .iter()
            .find(is_it)
            .and_then(|pod| pod.spec.as_ref());
        let ours = spec.filter(|spec| {
            spec.service_account_name.as_deref() == Some(self.nodes.service_account.as_str())
        });
        Ok(ours.and_then(|spec| spec.node_name.clone()))
    }

    /// Namespace and service account of the pods on a node.
    async fn accounts(&self, node: &str) -> Result<places::Accounts, String> {
        /// A node has some hundred pods at the most.
        const PAGES: usize = 20;
        let pods: Api<Pod> = Api::all(self.client.clone());
        let mut page = ListParams::default().fields(&format!("spec.nodeName={node}"));
        page.limit = Some(500);
        let mut accounts = places::Accounts::new();
        for _ in 0..PAGES {
            let list = limited(pods.list(&page)).await?;
            accounts.extend(list.items.into_iter().filter_map(|pod| {
                let phase = pod
                    .status
                    .and_then(|status| status.phase)
                    .unwrap_or_default();
                let spec = pod.spec?;
                let ended = phase == "Succeeded" || phase == "Failed";
                if ended || spec.node_name.as_deref() != Some(node) {
                    return None;
                }
                let account = spec.service_account_name.filter(|name| !name.is_empty());
                let account = account.unwrap_or_else(|| "default".into());
                Some((pod.metadata.namespace?, account))
            }));
            match list.metadata.continue_.filter(|next| !next.is_empty()) {
                Some(next) => page.continue_token = Some(next),
                None => return Ok(accounts),
            }
        }
        Err(format!("node {node} has too many pods to list"))
    }
}

async fn kubeconfig(path: PathBuf) -> Result<kube::Config, ClusterError> {
    let wrong = |source| ClusterError::Kubeconfig {
        path: path.clone(),
        source: Box::new(source),
    };
    let file = Kubeconfig::read_from(&path).map_err(wrong)?;
    let config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await;
    let config = config.map_err(wrong)?;
    // Whoever can answer in its place decides who gets which identity.
    match config.cluster_url.scheme_str() == Some("https") && !config.accept_invalid_certs {
        true => Ok(config),
        false => Err(ClusterError::Unsafe(path)),
    }
}

/// An answer, or what went wrong, on one line.
async fn limited<T>(question: impl Future<Output = Result<T, kube::Error>>) -> Result<T, String> {
    let why = match tokio::time::timeout(LIMIT, question).await {
        Ok(Ok(answer)) => return Ok(answer),
        Ok(Err(kube::Error::Api(status))) => {
            format!("{} {}: {}", status.code, status.reason, status.message)
        }
        Ok(Err(error)) => causes(&error),
        Err(_elapsed) => format!("no answer within {LIMIT:?}"),
    };
    let why: String = why
        .chars()
        .filter(|c| !c.is_control())
        .take(MAX_TEXT)
        .collect();
    Err(format!("the API server: {why}"))
}
