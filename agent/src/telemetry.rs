//! What operators see of the agent itself: logs, metrics, readiness, administration.

mod admin;
mod log;
mod metrics;

pub use admin::{Endpoints, LocalWorkload, Status, StatusSource, serve};
pub use log::{LogHandle, start as start_log};
pub use metrics::{ConnectionLabels, GrantLabels, Metrics};
