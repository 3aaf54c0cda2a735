//! `postern install-check`: whether a node, or a cluster, is fit for Postern, before it is
//! installed and after. Changes nothing. Each finding says what it is, why it matters and
//! what to do about it.

mod cluster;
mod node;
mod report;
mod rights;
#[cfg(test)]
mod tests;

use std::path::Path;

pub use report::{Finding, Level, Report};

use crate::config::Config;

/// What is looked at.
pub struct Scope<'a> {
    /// Of the cluster to ask, and of nothing else; `None`: the agent's, as configured.
    pub kubeconfig: Option<&'a Path>,
    /// Whose rights are looked at, `NAMESPACE/NAME`; `None`: the asker's own.
    pub service_account: Option<&'a str>,
}

/// With a kubeconfig the cluster alone is looked at: this host need not be one of its
/// nodes. Else the node, and its cluster as well where the agent would find that: in a
/// pod, or by `kubernetes.kubeconfig`.
pub async fn run(config: &Config, scope: &Scope<'_>) -> Report {
    let mut report = Report::default();
    let found = config.kubernetes.kubeconfig.is_some()
        || std::env::var_os("KUBERNETES_SERVICE_HOST").is_some();
    if scope.kubeconfig.is_none() {
        // A thread of its own: what `doctor` asks the API server has a runtime of its own.
        let examined = std::thread::scope(|scope| {
            let node = scope.spawn(|| node::examine(config, &mut report));
            node.join()
        });
        examined.expect("what looks at the node does not panic");
    }
    if scope.kubeconfig.is_some() || found {
        cluster::examine(config, scope, &mut report).await;
    }
    report
}
