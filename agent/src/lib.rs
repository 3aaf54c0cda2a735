//! Postern's node agent. A connection flows `kernel -> proxy::outbound -> workload
//! -> identity -> policy -> hbone => hbone -> proxy::inbound -> policy ->
//! application`; a kernel event flows `kernel -> audit`. Only `app` wires parts.

pub mod config;
pub mod identity;
pub mod objects;
pub mod policy;
pub mod workload;
pub mod kernel;
pub mod audit;
pub mod lifecycle;
pub mod telemetry;
pub mod proxy;
pub mod app;
pub mod doctor;
