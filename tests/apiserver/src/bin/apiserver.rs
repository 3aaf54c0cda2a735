//! The server as a program: to be looked at with `kubectl`, or for tests of others.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::Result;
use clap::Parser;
use postern_apiserver::{ApiServer, Options};

/// A Kubernetes API server for tests
#[derive(Parser)]
struct Arguments {
    #[arg(long, default_value = "127.0.0.1:6443")]
    listen: SocketAddr,
    /// Further name that the certificate is for
    #[arg(long)]
    name: Vec<String>,
    /// Directory of manifests to serve, again when they change
    #[arg(long)]
    follow: Vec<PathBuf>,
    /// Where to write a kubeconfig of an administrator
    #[arg(long)]
    kubeconfig: PathBuf,
    /// Refuse what no role permits
    #[arg(long)]
    rbac: bool,
    /// Let go wrong what can, by this seed
    #[arg(long)]
    chaos: Option<u64>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let server = ApiServer::with(Options {
        address: arguments.listen,
        names: arguments.name,
        rbac: arguments.rbac,
        ..Options::default()
    })?;
    for directory in &arguments.follow {
        server.follow(directory)?;
    }
    if let Some(seed) = arguments.chaos {
        server.chaos(seed);
    }
    std::fs::write(&arguments.kubeconfig, server.kubeconfig())?;
    println!("listening at {}", server.url());
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}
