//! Which service accounts have pods on which node, out of the same manifests that
//! agents read. What does not parse leaves the last good state standing.

use std::{collections::HashSet, path::PathBuf, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use notify::{RecursiveMode, Watcher as _};
use tokio::sync::mpsc;

use crate::{
    config::Mesh,
    identity::SpiffeId,
    objects::{LoadError, load_directory},
    workload::{Table, WorkloadObject},
};

/// Several files change together; they are read when no more come for this long.
const SETTLE: Duration = Duration::from_millis(50);
/// In case a change was not told: some network file systems tell none.
const ANYWAY: Duration = Duration::from_secs(30);

/// Node, namespace, service account.
type Place = (String, String, String);

pub struct Placement {
    /// `None`: nothing runs anywhere, and no agent gets anything.
    directory: Option<PathBuf>,
    places: ArcSwap<HashSet<Place>>,
}

impl Placement {
    pub fn open(directory: Option<PathBuf>) -> Result<Self, LoadError> {
        let this = Self {
            directory,
            places: ArcSwap::default(),
        };
        this.reload()?;
        Ok(this)
    }

    /// Whether a pod of this account runs on this node.
    pub fn runs(&self, node: &str, id: &SpiffeId) -> bool {
        let place = (
            node.to_owned(),
            id.namespace.clone(),
            id.service_account.clone(),
        );
        self.places.load().contains(&place)
    }

    pub fn reload(&self) -> Result<(), LoadError> {
        let Some(directory) = &self.directory else {
            return Ok(());
        };
        let objects: Vec<WorkloadObject> = load_directory(directory)?
            .into_iter()
            .map(|located| located.object)
            .collect();
        // Pods outside of the mesh count, too: what the mesh is, each agent says itself.
        let table = Table::build(&objects, Mesh::Disabled);
        let places = table.workloads.iter().map(|w| {
            (
                w.node.clone(),
                w.namespace.clone(),
                w.service_account.clone(),
            )
        });
        self.places.store(Arc::new(places.collect()));
        Ok(())
    }

    /// Reads again whenever something changes.
    pub async fn watch(&self) {
        let Some(directory) = &self.directory else {
            return;
        };
        let (changed, mut changes) = mpsc::channel(1);
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Our own reading is no change.
            if !event.is_ok_and(|event| event.kind.is_access()) {
                let _due = changed.try_send(());
            }
        });
        let watcher = watcher.and_then(|mut watcher| {
            watcher.watch(directory, RecursiveMode::NonRecursive)?;
            Ok(watcher)
        });
        if let Err(error) = &watcher {
            tracing::warn!(%error, "cannot watch nodes.manifests; reading every 30 s");
        }
        loop {
            tokio::select! {
                Some(()) = changes.recv() => {
                    tokio::time::sleep(SETTLE).await;
                    let _more_of_the_same = changes.try_recv();
                }
                () = tokio::time::sleep(ANYWAY) => {}
            }
            if let Err(error) = tokio::task::block_in_place(|| self.reload()) {
                tracing::error!(%error, "nodes.manifests refused; the last good state stands");
            }
        }
    }
}
