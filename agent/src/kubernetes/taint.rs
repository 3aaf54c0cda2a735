//! The startup taint, which keeps pods from a node that has no agent yet. Whoever
//! registers the node puts it there (docs/boot.md); the agent takes it off when it is
//! ready, and again where the node is registered anew.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Node;
use kube::{
    Api,
    api::{ListParams, Patch, PatchParams},
};
use serde_json::json;
use tokio::time::{sleep, timeout};

use super::{Cluster, Scope, explain, held::Held, status::MANAGER};
use crate::{lifecycle::Watcher, workload::WorkloadObject};

/// Looks at the own node every few seconds, until the agent ends.
pub async fn untaint(
    cluster: Arc<Cluster>,
    key: String,
    ready: impl Fn() -> bool + Send + Sync,
    stop: Watcher,
) {
    // What failed last, so that it is logged once.
    let mut failed = String::new();
    loop {
        tokio::select! {
            () = sleep(cluster.pace.taint) => {}
            () = stop.triggered() => return,
        }
        if !cluster.is_tainted(&key) || !ready() {
            continue;
        }
        let error = match timeout(cluster.pace.answer, cluster.take_off(&key)).await {
            Ok(Ok(())) => String::new(),
            Ok(Err(error)) => explain(&error),
            Err(_late) => "the API server did not answer in time".to_owned(),
        };
        if !error.is_empty() {
            cluster.counts.errors.inc();
            if error != failed {
                tracing::warn!(taint = key, error, "the taint stays on this node");
            }
        }
        failed = error;
    }
}

impl Cluster {
    fn is_tainted(&self, key: &str) -> bool {
        let inner = self.store.lock();
        let nodes = inner.scopes.get(&Scope::Nodes);
        let mut nodes = nodes.into_iter().flat_map(|kept| kept.objects.values());
        nodes.any(|held| match held {
            Held::Workload(object) => match &**object {
                WorkloadObject::Node(node) => {
                    node.metadata.name == *self.node
                        && node.spec.taints.iter().any(|t| t.key == key)
                }
                _ => false,
            },
            Held::Policy(_) => false,
        })
    }

    /// The list of taints is one value to the API server: it is written as it was read,
    /// but for those of this key, and only if nobody wrote the node meanwhile.
    async fn take_off(&self, key: &str) -> kube::Result<()> {
        let nodes: Api<Node> = Api::all(self.client.clone());
        // As a list: who watches may, and need not be allowed to get.
        let own = ListParams::default().fields(&format!("metadata.name={}", self.node));
        let Some(node) = nodes.list(&own).await?.items.pop() else {
            return Ok(());
        };
        let mut taints = node.spec.and_then(|spec| spec.taints).unwrap_or_default();
        let before = taints.len();
        taints.retain(|taint| taint.key != key);
        if taints.len() == before {
            return Ok(());
        }
        let patch = json!({
            "metadata": {"resourceVersion": node.metadata.resource_version},
            "spec": {"taints": taints},
        });
        let params = PatchParams {
            field_manager: Some(MANAGER.into()),
            ..PatchParams::default()
        };
        match nodes.patch(&self.node, &params, &Patch::Merge(patch)).await {
            Ok(_) => {
                tracing::info!(taint = key, "taken off this node: it has an agent");
                Ok(())
            }
            // Changed or gone meanwhile; it is looked at again.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
