//! What several tests need.

use anyhow::Result;
use postern_tests::{Lab, Pod, Running};
use serde_json::Value;

pub const ECHO: u16 = 9000;

/// A client on node 1, a server with an echo service on node 2.
pub fn pair(lab: &mut Lab) -> Result<(Pod, Pod, Running)> {
    let server = lab.pod(2, "server")?;
    let client = lab.pod(1, "client")?;
    let echo = server.serve("echo", ECHO)?;
    Ok((client, server, echo))
}

pub fn at(pod: &Pod, port: u16) -> String {
    format!("{}:{port}", pod.ip)
}

pub fn at6(pod: &Pod, port: u16) -> String {
    format!("[{}]:{port}", pod.ip6)
}

/// Says a word and hears it again.
pub fn echoes(client: &Pod, address: &str) -> Result<bool> {
    let seen = client.dial(address, &["--send", "ping", "--half-close"])?;
    Ok(seen["text"] == "ping" && seen["end"] == "eof")
}

pub fn is_connection(record: &Value) -> bool {
    record["kind"] == "connection"
}

pub fn authorization(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {{name: {name}, namespace: shop}}\nspec: {spec}\n"
    )
}

pub fn peer_authentication(name: &str, namespace: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
         metadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
    )
}
