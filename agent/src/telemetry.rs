//! What operators see of the agent itself: logs, metrics, readiness, administration.

mod admin;
mod door;
mod log;
mod metrics;
mod page;

pub use admin::{Endpoints, LocalWorkload, Policy, Status, StatusSource, serve};
pub use door::ask;
pub use log::{LogHandle, start as start_log};
pub use metrics::{ConnectionLabels, Counted, GrantLabels, Metrics};
pub use page::Certificate;
