//! What runs where: the table of workloads and services that everything else
//! looks up. `manifest` reads Kubernetes objects, `table` is what they become: `pod`s,
//! `node`s, and `service`s with their `endpoints`. `discover` asks for what it lacks.

mod discover;
mod endpoints;
mod manifest;
mod node;
mod pod;
mod service;
mod table;
#[cfg(test)]
mod tests;

pub use discover::{Discover, Discovery, Found};
pub use manifest::WorkloadObject;
pub use node::Node;
pub use pod::Workload;
pub use service::{Endpoint, NamespacedName, Service, ServicePort};
pub use table::{Table, Target};
