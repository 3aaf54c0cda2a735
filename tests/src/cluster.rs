//! The cluster of a lab: an API server that says what the lab's directories say, at a
//! network of its own, so that what is captured between nodes is theirs alone.

use std::{
    collections::BTreeMap,
    io,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, setns};
use postern_apiserver::{ApiServer, Options};
use serde_json::json;

use crate::host;

/// Where agents have pods and policies from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Source {
    #[default]
    Directory,
    Kubernetes,
    /// The same, without controllers: endpoints are the test's own.
    Api,
}

impl Source {
    /// As the environment says, for the same tests are run with both.
    pub fn here() -> Self {
        match std::env::var("POSTERN_LAB_SOURCE").as_deref() {
            Ok("kubernetes") => Self::Kubernetes,
            _ => Self::Directory,
        }
    }
}

pub struct Cluster {
    netns: String,
    lab: PathBuf,
    nodes: usize,
    controllers: bool,
    /// By the directory of manifests that each follows.
    servers: Mutex<BTreeMap<String, Arc<ApiServer>>>,
}

impl Cluster {
    pub(crate) fn new(lab: &Path, netns: &str, nodes: usize, source: Source) -> Result<Self> {
        host::ip(
            netns,
            &[
                "link add control type bridge",
                "address add 198.51.100.254/24 dev control",
                "link set control up",
            ],
        )?;
        Ok(Self {
            netns: netns.to_owned(),
            lab: lab.to_owned(),
            nodes,
            controllers: source == Source::Kubernetes,
            servers: Mutex::default(),
        })
    }

    /// Commands that connect a node, there and here.
    pub(crate) fn connect(&self, node: &str, number: usize) -> Result<()> {
        let switch = &self.netns;
        host::ip(
            node,
            &[
                format!("link add control type veth peer name control{number} netns {switch}"),
                format!("address add 198.51.100.{number}/24 dev control"),
                "link set control up".into(),
            ],
        )?;
        host::ip(
            switch,
            &[
                format!("link set control{number} master control"),
                format!("link set control{number} up"),
            ],
        )
    }

    /// The server that follows a directory of manifests, and the lab's policies.
    pub fn server(&self, manifests: &str) -> Result<Arc<ApiServer>> {
        let mut servers = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(server) = servers.get(manifests) {
            return Ok(server.clone());
        }
        let netns = host::netns_path(&self.netns);
        let port = 6443 + servers.len() as u16;
        let server = ApiServer::with(Options {
            address: SocketAddr::from(([198, 51, 100, 254], port)),
            endpoints: self.controllers,
            rbac: true,
            bind: Arc::new(move |address| bind(&netns, address)),
            ..Options::default()
        })?;
        for number in 1..=self.nodes {
            let ranges = [
                format!("10.0.{number}.0/24"),
                format!("fd00:0:0:{number}::/64"),
            ];
            let addresses = [format!("192.0.2.{number}"), format!("fd00:2::{number}")];
            let address = |a: &String| json!({"type": "InternalIP", "address": a});
            let addresses: Vec<_> = addresses.iter().map(address).collect();
            server.apply(json!({
                "apiVersion": "v1", "kind": "Node", "metadata": {"name": format!("node{number}")},
                "spec": {"podCIDR": ranges[0], "podCIDRs": ranges},
                "status": {"addresses": addresses, "conditions": [{"type": "Ready", "status": "True"}]},
            }))?;
        }
        server.follow(self.lab.join(manifests))?;
        server.follow(self.lab.join("policies"))?;
        if let Ok(seed) = std::env::var("POSTERN_LAB_CHAOS") {
            server.chaos(seed.parse().context("POSTERN_LAB_CHAOS")?);
        }
        let server = Arc::new(server);
        servers.insert(manifests.to_owned(), server.clone());
        Ok(server)
    }
}

/// A socket of another network namespace, which a thread enters that ends there.
fn bind(netns: &Path, address: SocketAddr) -> io::Result<TcpListener> {
    let namespace = std::fs::File::open(netns)?;
    let enter = move || {
        setns(&namespace, CloneFlags::CLONE_NEWNET)?;
        TcpListener::bind(address)
    };
    std::thread::scope(|scope| {
        let joined = scope.spawn(enter).join();
        joined.unwrap_or_else(|_| Err(io::Error::other("binding panicked")))
    })
}
