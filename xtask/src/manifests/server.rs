//! What `kubectl apply` makes of the manifests, with an API server for tests.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::kubectl;
use crate::{cmd, profile::Profile};

/// Kinds that others install, and that server does not serve.
const OTHERS: &str = "monitoring.coreos.com/";

/// A running server; it ends with this.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// Fails where `kubectl apply --dry-run=client` does not take an object of these files.
pub fn takes(out: &Path, files: &[(&Path, Vec<Value>)]) -> Result<()> {
    Profile::Quick.build()?;
    let kubeconfig = out.join("kubeconfig");
    let _server = start(&kubeconfig)?;
    for (file, objects) in files {
        let items: Vec<&Value> = (objects.iter())
            .filter(|one| {
                !one["apiVersion"]
                    .as_str()
                    .unwrap_or_default()
                    .starts_with(OTHERS)
            })
            .collect();
        let count = items.len();
        let list = out.join("applied.json");
        let text = json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string();
        fs::write(&list, text).with_context(|| list.display().to_string())?;
        let mut apply = kubectl();
        apply.env("KUBECONFIG", &kubeconfig);
        // Its schema is none: fields are judged by those that are published.
        apply.args([
            "apply",
            "--dry-run=client",
            "--validate=false",
            "--filename",
        ]);
        let told = cmd::output(apply.arg(&list)).with_context(|| file.display().to_string())?;
        let taken = told
            .lines()
            .filter(|line| line.ends_with("(dry run)"))
            .count();
        if taken != count {
            bail!(
                "{}: kubectl took {taken} of {count}: {told}",
                file.display()
            );
        }
    }
    Ok(())
}

fn start(kubeconfig: &PathBuf) -> Result<Server> {
    let _absent = fs::remove_file(kubeconfig);
    let mut server = cmd::in_root(cmd::target().join("quick/apiserver"));
    server
        .args(["--listen", "127.0.0.1:0", "--kubeconfig"])
        .arg(kubeconfig);
    let server = server
        .stdout(Stdio::null())
        .spawn()
        .context("the API server for tests")?;
    let mut server = Server(server);
    // Written once it listens.
    for _ in 0..200 {
        if fs::read_to_string(kubeconfig).is_ok_and(|text| text.contains("contexts")) {
            return Ok(server);
        }
        if let Some(status) = server.0.try_wait()? {
            bail!("the API server for tests ended: {status}");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    bail!("the API server for tests does not start")
}
