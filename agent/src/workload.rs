//! What runs where: the table of workloads and services that everything else
//! looks up. `manifest` reads Kubernetes objects, `table` is what they become, and
//! `discover` asks for what it lacks.

mod discover;
mod manifest;
mod table;
#[cfg(test)]
mod tests;

pub use discover::{Discover, Discovery, Found};
pub use manifest::WorkloadObject;
pub use table::{Endpoint, NamespacedName, Service, ServicePort, Table, Target, Workload};
