//! Finding what is dialled: a service's EndpointSlices, or the node whose pod an address
//! is. Both are watched from then on, for as long as they are dialled now and then; so
//! what an agent costs follows what its pods talk to.
//!
//! The API server away, or slow: not known, and whoever dialled is refused.

use std::{
    collections::BTreeSet, future::Future, net::IpAddr, pin::Pin, sync::Arc,
    sync::atomic::Ordering, time::Duration,
};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, api::ListParams};
use tokio::time::timeout;

use super::{Cluster, Scope, explain};
use crate::workload::{Discover, Found};

/// Before it is tried again; well within what a connection waits (`workload::discover`).
const AGAIN: [Duration; 3] = [
    Duration::from_millis(100),
    Duration::from_millis(200),
    Duration::from_millis(400),
];

impl Discover for Cluster {
    fn ranges(&self) -> Arc<BTreeSet<IpNet>> {
        self.ranges.load_full()
    }

    fn discover<'a>(&'a self, address: IpAddr) -> Pin<Box<dyn Future<Output = Found> + Send + 'a>> {
        Box::pin(async move {
            self.counts.discovered.inc();
            match timeout(self.pace.answer, self.find_again(address)).await {
                Ok(Ok(true)) => Found::Known,
                Ok(Ok(false)) => Found::Foreign,
                Ok(Err(why)) => Found::Unknown(why),
                Err(_late) => Found::Unknown("the API server did not answer in time".into()),
            }
        })
    }

    fn used(&self, address: IpAddr) {
        if let Some(Some(used)) = self.index.load().known.get(&address) {
            used.store(self.now(), Ordering::Relaxed);
        }
    }
}

impl Cluster {
    /// As [`Self::find`], and again where it fails: one answer that is lost, or an API
    /// server that changes its leader, is no reason to refuse a connection.
    async fn find_again(&self, address: IpAddr) -> Result<bool, String> {
        for pause in AGAIN {
            match self.find(address).await {
                Err(_passing) => tokio::time::sleep(pause).await,
                found => return found,
            }
        }
        self.find(address).await
    }

    /// Whether it is in the table now.
    async fn find(&self, address: IpAddr) -> Result<bool, String> {
        let index = self.index.load_full();
        if index.known.contains_key(&address) {
            return Ok(true);
        }
        if let Some(service) = index.services.get(&address) {
            self.follow(Scope::Slices(Some(service.clone()))).await?;
            return Ok(true);
        }
        let mut nodes = Vec::new();
        match index.nodes.get(&address) {
            Some(node) => nodes.push(node.clone()),
            None => nodes.extend(self.ask(address).await?),
        }
        // The API server finds a pod by the first of its addresses only.
        if nodes.is_empty() {
            let of = index.cidrs.iter().filter(|(net, _)| net.contains(&address));
            nodes.extend(of.map(|(_, node)| node.clone()).take(1));
        }
        for node in nodes {
            self.follow(Scope::Pods(Some(node))).await?;
        }
        Ok(self.index.load().known.contains_key(&address))
    }

    /// Nodes of the pods that have this address.
    async fn ask(&self, address: IpAddr) -> Result<Vec<Arc<str>>, String> {
        let _turn = self.asking.acquire().await.map_err(|e| e.to_string())?;
        let pods: Api<Pod> = Api::all(self.client.clone());
        // Host-network pods of a node share an address; ended ones may have had it.
        let params = ListParams::default()
            .fields(&format!("status.podIP={address}"))
            .limit(50);
        let pods = pods.list(&params).await.map_err(|e| explain(&e))?;
        let nodes = pods.items.into_iter().filter_map(|pod| {
            let phase = pod.status.and_then(|status| status.phase);
            let spec = pod.spec?;
            let ended = matches!(phase.as_deref(), Some("Succeeded" | "Failed"));
            let shared = spec.host_network == Some(true);
            (!ended && !shared).then_some(spec.node_name).flatten()
        });
        let nodes: BTreeSet<String> = nodes.collect();
        Ok(nodes.into_iter().map(Arc::from).collect())
    }

    /// Watches it, and waits until the table has it.
    async fn follow(&self, scope: Scope) -> Result<(), String> {
        if !self.ensure(scope.clone(), false) {
            return Err("too much is watched already".into());
        }
        let mut changes = self.store.changes();
        let version = loop {
            changes.borrow_and_update();
            {
                let inner = self.store.lock();
                match inner.scopes.get(&scope) {
                    Some(kept) if kept.is_whole() => break inner.version,
                    Some(kept) => {
                        if let Some(failing) = &kept.failing {
                            return Err(failing.error.clone());
                        }
                    }
                    None => return Err("it is not watched any more".into()),
                }
            }
            changes.changed().await.map_err(|e| e.to_string())?;
        };
        let mut published = self.published.subscribe();
        let reached = published.wait_for(|now| *now >= version).await;
        reached.map(|_| ()).map_err(|e| e.to_string())
    }
}
