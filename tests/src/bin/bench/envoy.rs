//! A pair of Envoys between a client and its server, one in each one's pod.

#[path = "envoy/config.rs"]
pub mod config;
#[path = "envoy/pki.rs"]
mod pki;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use postern_tests::{Pod, Running};
use serde_json::Value;

use crate::{ECHO, HTTP, IPERF, SOURCE, process};
use config::{Port, Tokens};
use pki::Pki;

/// Threads of an Envoy that carry traffic: one a CPU.
const CONCURRENCY: &str = "2";
const READY: Duration = Duration::from_secs(30);

/// What both Envoys do with what they carry.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Bytes, a TLS connection for each.
    Tcp,
    /// Bytes, in CONNECT requests of HTTP/2 over one TLS connection.
    Hbone,
    /// Requests, which they read; those to some ports need a token.
    Http,
}

/// What is added to a port to have it of another kind.
pub const VERIFIED: u16 = 1;
pub const CACHED: u16 = 2;

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Hbone => "hbone",
            Self::Http => "http",
        }
    }

    /// From a port of the server's to the one that stands for it at the client.
    pub fn offset(self) -> u16 {
        match self {
            Self::Tcp => 10_000,
            Self::Hbone => 13_000,
            Self::Http => 16_000,
        }
    }

    fn ports(self) -> Vec<Port> {
        let port = |server, more, tokens| Port {
            server,
            local: server + self.offset() + more,
            tokens,
        };
        match self {
            Self::Tcp | Self::Hbone => [HTTP, ECHO, SOURCE, IPERF]
                .map(|server| port(server, 0, Tokens::Unread))
                .into(),
            Self::Http => vec![
                port(HTTP, 0, Tokens::Unread),
                port(HTTP, VERIFIED, Tokens::Verified),
                port(HTTP, CACHED, Tokens::Cached),
            ],
        }
    }
}

pub struct Envoys {
    role: Role,
    program: PathBuf,
    configs: [PathBuf; 2],
    running: Option<[Running; 2]>,
}

impl Envoys {
    /// Writes what they are configured with, and starts both.
    pub fn new(role: Role, client: &Pod, server: &Pod, jwks: &str) -> Result<Self> {
        let program = program()?;
        let (pki, ports) = (Pki::new()?, role.ports());
        let write = |pod: &Pod, config: Value| -> Result<PathBuf> {
            let path = pod.dir().join(format!("envoy-{}.json", role.name()));
            std::fs::write(&path, config.to_string())?;
            Ok(path)
        };
        let near = config::client(role, &ports, &pki, &server.ip);
        let far = config::server(role, &ports, &pki, &server.ip, jwks);
        let mut envoys = Self {
            role,
            program,
            configs: [write(client, near)?, write(server, far)?],
            running: None,
        };
        envoys.restart(client, server)?;
        Ok(envoys)
    }

    /// New processes instead of those that run; milliseconds to ready of the client's.
    pub fn restart(&mut self, client: &Pod, server: &Pod) -> Result<f64> {
        self.running = None;
        let [near, far] = &self.configs;
        let (far, _) = self.start(server, far)?;
        let (near, ready) = self.start(client, near)?;
        self.running = Some([near, far]);
        Ok(ready)
    }

    fn start(&self, pod: &Pod, config: &PathBuf) -> Result<(Running, f64)> {
        let mut command = pod.command(&self.program)?;
        command.arg("--config-path").arg(config);
        command.args(["--disable-hot-restart", "--concurrency", CONCURRENCY]);
        command.args(["--log-level", "info"]);
        let name = format!("envoy-{}", self.role.name());
        let seen = process::size(&pod.dir().join(format!("{name}.log")));
        let began = Instant::now();
        let mut envoy = pod.start(&name, &mut command)?;
        // Its listeners are bound by then.
        process::says(&mut envoy, seen, "starting workers", READY)?;
        Ok((envoy, began.elapsed().as_secs_f64() * 1e3))
    }

    pub fn pids(&self) -> Vec<i32> {
        self.running.iter().flatten().map(Running::pid).collect()
    }
}

/// What `cargo xtask setup` put into `target/`, or another one that is named.
fn program() -> Result<PathBuf> {
    let path = std::env::var_os("POSTERN_ENVOY").map_or_else(
        || {
            let tests = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
            tests.join("../target/tools/envoy/envoy/_bin/envoy")
        },
        PathBuf::from,
    );
    ensure!(
        path.is_file(),
        "there is no Envoy at {}: run `cargo xtask setup --tier lab`",
        path.display()
    );
    Ok(path)
}
