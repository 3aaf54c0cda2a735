//! The way to the API server. Its certificate is checked against the cluster's CA, and
//! nothing else; token and CA files are read again as they change (kube does that).

use std::{path::PathBuf, time::Duration};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Namespace;
use kube::{
    Api, Client, Config,
    api::ListParams,
    config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError},
};

use crate::config::Kubernetes;

#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("kubernetes.kubeconfig: {path}: {source}", path = path.display())]
    Kubeconfig {
        path: PathBuf,
        source: Box<KubeconfigError>,
    },
    #[error("kubernetes.kubeconfig: {path}: {what}", path = path.display())]
    Unsafe { path: PathBuf, what: &'static str },
    #[error(
        "kubernetes.kubeconfig: is empty, and there is no service account of a pod either: {0}; name a kubeconfig file"
    )]
    InCluster(#[source] Box<InClusterError>),
    #[error("kubernetes.kubeconfig: {0}")]
    Client(#[source] Box<kube::Error>),
    #[error(
        "kubernetes.podCidrs: {0} ranges are more than the 4096 that are kept; name wider ones"
    )]
    Ranges(usize),
    #[error("kubernetes.startupTaint: takes `workloads.source: kubernetes`, which knows the node")]
    Taint,
    #[error("kubernetes.podCidrs: {0} is not where pods are; name their ranges alone")]
    Wide(IpNet),
}

/// A client, and the namespace that it lives in.
pub async fn connect(config: &Kubernetes) -> Result<(Client, String), ConnectError> {
    let mut cluster = match &config.kubeconfig {
        Some(path) => kubeconfig(path.clone()).await?,
        None => Config::incluster().map_err(|e| ConnectError::InCluster(Box::new(e)))?,
    };
    cluster.connect_timeout = Some(Duration::from_secs(5));
    cluster.write_timeout = Some(Duration::from_secs(10));
    // Each watch waits by itself, longer each time.
    cluster.default_retry = false;
    let namespace = cluster.default_namespace.clone();
    let client = Client::try_from(cluster).map_err(|e| ConnectError::Client(Box::new(e)))?;
    Ok((client, namespace))
}

async fn kubeconfig(path: PathBuf) -> Result<Config, ConnectError> {
    let wrong = |source| ConnectError::Kubeconfig {
        path: path.clone(),
        source: Box::new(source),
    };
    let file = Kubeconfig::read_from(&path).map_err(wrong)?;
    let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await;
    let config = config.map_err(wrong)?;
    // Whoever can answer in the API server's place decides who gets in where.
    let what = match config.cluster_url.scheme_str() {
        Some("https") if config.accept_invalid_certs => "insecure-skip-tls-verify is refused",
        Some("https") => return Ok(config),
        _ => "server: must be an https URL",
    };
    Err(ConnectError::Unsafe { path, what })
}

/// What went wrong, with its causes, on one line of bounded length.
pub fn explain(error: &kube::Error) -> String {
    const LONGEST: usize = 300;
    let mut text = match error {
        kube::Error::Api(status) => {
            format!("{} {}: {}", status.code, status.reason, status.message)
        }
        error => {
            let mut text = String::new();
            let mut cause: Option<&dyn std::error::Error> = Some(error);
            while let Some(error) = cause {
                let own = error.to_string();
                // Some repeat their cause in their own words.
                if !text.contains(&own) {
                    if !text.is_empty() {
                        text.push_str(": ");
                    }
                    text.push_str(&own);
                }
                cause = error.source();
            }
            text
        }
    };
    text = text.replace(['\n', '\r'], " ");
    if let Some((at, _)) = text.char_indices().nth(LONGEST) {
        text.truncate(at);
    }
    text
}

/// For `postern doctor`, which has no runtime: the API server that answers, or why none
/// does. It takes what the agent takes first, the right to list namespaces.
pub fn examine(config: &Kubernetes) -> Result<String, String> {
    const LIMIT: Duration = Duration::from_secs(10);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| e.to_string())?;
    runtime.block_on(async {
        let (client, _) = connect(config).await.map_err(|e| e.to_string())?;
        let namespaces: Api<Namespace> = Api::all(client.clone());
        let params = ListParams::default().limit(1);
        let answer = tokio::time::timeout(LIMIT, namespaces.list(&params)).await;
        match answer {
            Ok(Ok(_)) => Ok("the API server answers".into()),
            Ok(Err(error)) => Err(format!("the API server: {}", explain(&error))),
            Err(_late) => Err(format!("the API server: no answer within {LIMIT:?}")),
        }
    })
}
