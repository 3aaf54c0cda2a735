//! Postern's node agent. A connection flows `kernel -> proxy::outbound -> workload
//! -> identity -> policy -> hbone => hbone -> proxy::inbound -> policy (-> http -> jwt
//! -> policy) -> application`; a kernel event flows `kernel -> audit`. Only `app`
//! wires parts.

pub mod app;
pub mod audit;
pub mod authority;
pub mod authorizer;
pub mod boot;
pub mod bugtool;
pub mod check;
pub mod config;
pub mod crds;
pub mod doctor;
pub mod fetch;
pub mod handover;
pub mod identity;
pub mod inspect;
pub mod introspect;
pub mod judge;
pub mod jwt;
pub mod kernel;
pub mod kubernetes;
pub mod lifecycle;
pub mod oauth;
pub mod objects;
pub mod policy;
pub mod proxy;
pub mod request;
pub mod telemetry;
pub mod trace;
pub mod workload;
