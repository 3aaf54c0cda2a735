//! Agents that prove their node by a projected token of their Kubernetes service
//! account: signed by the cluster, for this authority as audience, and bound to a pod
//! on a node (`kubernetes.io` claims; nodes are among them from Kubernetes 1.30 on).

use std::{
    collections::HashMap,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use super::problem::Problem;
use crate::{
    authority::Config,
    jwt::{Claims, Expected, KeyStore, Options, RemoteKeys, Token, TokenError},
};

/// For each document that leads to the cluster's keys.
const LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum KubernetesError {
    #[error("nodes.kubernetes: jwksFile and jwksUri exclude each other")]
    BothKeys,
    #[error("nodes.kubernetes.{0} must not be empty")]
    Empty(&'static str),
    #[error("nodes.kubernetes.roots: {0}")]
    Roots(#[from] crate::fetch::RootsError),
    #[error("nodes.kubernetes.jwksFile: {path}: {why}")]
    File { path: PathBuf, why: String },
}

pub struct Kubernetes {
    issuer: String,
    audience: String,
    namespace: String,
    service_account: String,
    keys: KeyStore,
    from: RemoteKeys,
}

impl Kubernetes {
    pub fn open(config: &Config) -> Result<Option<Self>, KubernetesError> {
        let Some(kubernetes) = &config.nodes.kubernetes else {
            return Ok(None);
        };
        for (name, value) in [
            ("issuer", &kubernetes.issuer),
            ("namespace", &kubernetes.namespace),
            ("serviceAccount", &kubernetes.service_account),
        ] {
            if value.is_empty() {
                return Err(KubernetesError::Empty(name));
            }
        }
        let issuer = kubernetes.issuer.clone();
        let mut files = HashMap::new();
        let from = match (&kubernetes.jwks_file, &kubernetes.jwks_uri) {
            (Some(_), Some(_)) => return Err(KubernetesError::BothKeys),
            (None, Some(url)) => RemoteKeys::Url {
                url: url.clone(),
                timeout: LIMIT,
            },
            (file, None) => {
                if let Some(path) = file {
                    // Later errors leave the last good keys; one at the start is told.
                    std::fs::metadata(path).map_err(|e| KubernetesError::File {
                        path: path.clone(),
                        why: e.to_string(),
                    })?;
                    files.insert(issuer.clone(), path.clone());
                }
                RemoteKeys::Discovery {
                    issuer: issuer.clone(),
                    timeout: LIMIT,
                }
            }
        };
        let keys = KeyStore::new(Options {
            roots: kubernetes.roots.clone(),
            files,
            ..Options::default()
        })?;
        keys.want([from.clone()].into());
        Ok(Some(Self {
            issuer,
            audience: kubernetes
                .audience
                .clone()
                .unwrap_or_else(|| config.issuer.clone()),
            namespace: kubernetes.namespace.clone(),
            service_account: kubernetes.service_account.clone(),
            keys,
            from,
        }))
    }

    /// Whether the token is of an agent's pod on this node.
    pub async fn verify(&self, token: &str, node: &str, now: SystemTime) -> Result<(), Problem> {
        let parsed = Token::parse(token).map_err(|e| Problem::proof(e.to_string()))?;
        let keys = self.keys.ready(&self.from, LIMIT).await;
        let verify = |keys: Option<&crate::jwt::KeySet>| {
            let expected = Expected {
                issuer: Some(&self.issuer),
                audiences: &[],
                space_delimited: &[],
            };
            parsed.verify(expected, keys, now)
        };
        let mut verified = verify(keys.as_deref());
        if verified
            .as_ref()
            .is_err_and(|e: &TokenError| e.may_be_stale())
            && self.keys.refetch(&self.from).await
        {
            verified = verify(self.keys.get(&self.from).as_deref());
        }
        let claims = verified.map_err(|e| Problem::proof(e.to_string()))?;
        self.check(&claims, node).map_err(Problem::proof)
    }

    fn check(&self, claims: &Claims, node: &str) -> Result<(), String> {
        // Exactly: the agent's own token for another service must not do.
        if !claims.audiences().contains(&self.audience.as_str()) {
            return Err("the token is for another audience".into());
        }
        // Tokens of the old kind never expire, and are bound to nothing.
        if claims.expires().is_none() {
            return Err("the token never expires".into());
        }
        let bound = |path: &[&str]| {
            let path: Vec<String> = std::iter::once(&"kubernetes.io")
                .chain(path)
                .map(|&name| name.to_owned())
                .collect();
            match claims.values(&path)[..] {
                [value] => Some(value.to_owned()),
                _ => None,
            }
        };
        let subject = format!(
            "system:serviceaccount:{}:{}",
            self.namespace, self.service_account
        );
        if claims.subject() != Some(&subject)
            || bound(&["namespace"]).as_ref() != Some(&self.namespace)
            || bound(&["serviceaccount", "name"]).as_ref() != Some(&self.service_account)
        {
            return Err("the token is of another service account".into());
        }
        match bound(&["node", "name"]) {
            Some(of) if of == node => Ok(()),
            Some(of) => Err(format!("the token is of a pod on node {of}")),
            None => Err("the token is not bound to a node".into()),
        }
    }
}
