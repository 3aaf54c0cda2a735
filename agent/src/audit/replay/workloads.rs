//! The workloads that records name, as manifests describe them.

use super::Destination;
use crate::{policy::Subject, workload::Table};

/// Manifests, or none.
#[derive(Default)]
pub struct Workloads(Table);

impl Workloads {
    pub fn new(table: Table) -> Self {
        Self(table)
    }

    /// By the pod's name; where that pod is gone, by another of the same owner.
    pub(super) fn subject(&self, destination: &Destination) -> Option<Subject> {
        let of_namespace = || {
            let all = self.0.workloads.iter();
            all.filter(|w| w.namespace == destination.namespace)
        };
        let workload = of_namespace()
            .find(|w| w.name == destination.pod)
            .or_else(|| of_namespace().find(|w| w.owner == destination.workload))?;
        Some(Subject {
            namespace: workload.namespace.clone(),
            labels: workload.labels.clone(),
            services: self.0.services_of(workload),
        })
    }
}
