//! The lab: nodes and pods out of network namespaces and cgroups, joined by a
//! switch, with the real agent on each node. Used by the end-to-end tests, the
//! demonstration and the benchmarks.
//!
//! Addresses are the same in every lab, for each lab is a world of its own: node
//! `n` is 192.0.2.`n`, its pods are 10.0.`n`.10 and on, and fd00:0:0:`n`::10 and on.
//! Everything is named after this process and removed when the lab is dropped;
//! what a killed one left behind is removed by the next.

mod audit;
mod capture;
mod cluster;
mod host;
mod node;
mod pod;
mod sweep;

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use postern_apiserver::ApiServer;

pub use audit::{audit_records, audit_text};
pub use capture::{Capture, count_bytes, tshark};
pub use cluster::{Cluster, Source};
pub use host::{Running, below_mount, binary, output, text};
pub use node::{Node, NodeOptions};
pub use pod::{Layout, Pod, PodOptions};
pub use sweep::sweep;

/// A mesh of nodes, all reading the same manifests and policies.
pub struct Lab {
    pub(crate) id: String,
    dir: tempfile::TempDir,
    cgroup: PathBuf,
    // Dropped in this order: pods' processes, agents, then the ground they stand on.
    pub nodes: Vec<Node>,
    cluster: Option<Arc<Cluster>>,
}

/// Waits for something to become true.
pub fn eventually(what: &str, limit: Duration, mut check: impl FnMut() -> bool) -> Result<()> {
    let end = Instant::now() + limit;
    while Instant::now() < end {
        if check() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    bail!("after {limit:?}, not so: {what}")
}

impl Lab {
    /// A lab of nodes whose agents are not started yet.
    pub fn new(nodes: usize) -> Result<Self> {
        Self::with(nodes, Source::here())
    }

    /// As [`Self::new`], with agents that have everything from there.
    pub fn with(nodes: usize, source: Source) -> Result<Self> {
        static SEQUENCE: AtomicU32 = AtomicU32::new(0);
        sweep::sweep_dead();
        let sequence = SEQUENCE.fetch_add(1, Ordering::Relaxed);
        let id = format!("{}{}-{sequence}", sweep::PREFIX, std::process::id());
        let cgroup = host::cgroup_mount()?.join(&id);
        std::fs::create_dir(&cgroup).with_context(|| format!("{}", cgroup.display()))?;
        let dir = tempfile::Builder::new().prefix(&id).tempdir_in("/tmp")?;
        for name in ["manifests", "policies", "secrets", "secrets/shop"] {
            std::fs::create_dir(dir.path().join(name))?;
        }
        let mut lab = Self {
            id,
            dir,
            cgroup,
            nodes: Vec::new(),
            cluster: None,
        };
        lab.make_root("root", "cluster.local")?;
        let switch = lab.switch();
        host::add_netns(&switch)?;
        host::ip(&switch, &["link add wire type bridge", "link set wire up"])?;
        if source != Source::Directory {
            let cluster = Cluster::new(lab.path(), &switch, nodes, source)?;
            lab.cluster = Some(Arc::new(cluster));
        }
        for number in 1..=nodes {
            let node = Node::new(&lab, number, &switch, nodes)?;
            lab.nodes.push(node);
        }
        Ok(lab)
    }

    /// A lab of two nodes with running agents.
    pub fn started() -> Result<Self> {
        let mut lab = Self::new(2)?;
        for node in &mut lab.nodes {
            node.start()?;
        }
        Ok(lab)
    }

    /// The API server that the agents ask, unless they are told to ask another.
    pub fn api(&self) -> Result<Arc<ApiServer>> {
        let cluster = self
            .cluster
            .as_ref()
            .context("the lab's source is a directory")?;
        cluster.server(&NodeOptions::default().manifests)
    }

    fn switch(&self) -> String {
        format!("{}-sw", self.id)
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// Makes a root certificate and key, `NAME.pem` and `NAME.key`.
    pub fn make_root(&self, name: &str, domain: &str) -> Result<()> {
        use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, KeyUsagePurpose};
        use std::os::unix::fs::OpenOptionsExt as _;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, format!("{name} of {domain}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&key)?;
        std::fs::write(self.path().join(format!("{name}.pem")), certificate.pem())?;
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(self.path().join(format!("{name}.key")))?;
        std::io::Write::write_all(&mut file, key.serialize_pem().as_bytes())?;
        Ok(())
    }

    /// Writes a manifest; the agents see it at once. Replaces one of the same name.
    pub fn manifest(&self, name: &str, yaml: &str) -> Result<()> {
        self.put("manifests", name, yaml)
    }

    /// As [`Self::manifest`], in another directory of manifests.
    pub fn manifest_in(&self, directory: &str, name: &str, yaml: &str) -> Result<()> {
        std::fs::create_dir_all(self.path().join(directory))?;
        self.put(directory, name, yaml)
    }

    pub fn policy(&self, name: &str, yaml: &str) -> Result<()> {
        self.put("policies", name, yaml)
    }

    /// Writes a secret that policies of the namespace `shop` may name.
    pub fn secret(&self, name: &str, content: &str) -> Result<()> {
        use std::os::unix::fs::PermissionsExt as _;
        let path = self.path().join("secrets/shop").join(name);
        std::fs::write(&path, content)?;
        let private = std::fs::Permissions::from_mode(0o600);
        Ok(std::fs::set_permissions(path, private)?)
    }

    pub fn remove_policy(&self, name: &str) -> Result<()> {
        Ok(std::fs::remove_file(
            self.path().join("policies").join(format!("{name}.yaml")),
        )?)
    }

    pub fn remove_manifest(&self, name: &str) -> Result<()> {
        Ok(std::fs::remove_file(
            self.path().join("manifests").join(format!("{name}.yaml")),
        )?)
    }

    /// Writes beside and renames, as tools that write configuration do.
    fn put(&self, dir: &str, name: &str, yaml: &str) -> Result<()> {
        let path = self.path().join(dir).join(format!("{name}.yaml"));
        let partial = path.with_extension("partial");
        std::fs::write(&partial, yaml)?;
        Ok(std::fs::rename(partial, path)?)
    }

    /// A pod in the mesh on node `node` (from 1), known to all agents and enrolled.
    pub fn pod(&mut self, node: usize, name: &str) -> Result<Pod> {
        self.pod_with(node, name, PodOptions::default())
    }

    pub fn pod_with(&mut self, node: usize, name: &str, options: PodOptions) -> Result<Pod> {
        let pod = Pod::new(self, node, name, options)?;
        self.manifest(&format!("pod-{name}"), &pod.manifest())?;
        if pod.wait() {
            self.known(&pod)?;
        }
        Ok(pod)
    }

    /// Waits until its own agent has enrolled a pod and all others know of it.
    pub fn known(&self, pod: &Pod) -> Result<()> {
        for node in self.nodes.iter().filter(|node| node.running()) {
            eventually(
                &format!("{} knows {}", node.name, pod.name),
                Duration::from_secs(10),
                || node.knows(pod).unwrap_or(false),
            )?;
        }
        Ok(())
    }

    /// Waits until all running agents have as many policies.
    pub fn policies(&self, count: u64) -> Result<()> {
        for node in self.nodes.iter().filter(|node| node.running()) {
            eventually(
                &format!("{} has {count} policies", node.name),
                Duration::from_secs(30),
                || node.status().is_ok_and(|s| s["policies"] == count),
            )?;
        }
        Ok(())
    }

    /// Makes a node give out this IPv4 address next, as a cluster's allocator may.
    pub fn reuse_address(&mut self, node: usize, ip: &str) -> Result<()> {
        self.nodes[node - 1].next_pod = ip.rsplit('.').next().context("an address")?.parse()?;
        Ok(())
    }

    /// A Service in front of pods by selector; returns its address.
    pub fn service(&self, name: &str, number: u8, spec: &str) -> Result<String> {
        let address = format!("10.96.0.{number}");
        self.manifest(
            &format!("service-{name}"),
            &format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n\
                 spec: {{clusterIP: {address}, clusterIPs: [{address}, 'fd00:96::{number}'], {spec}}}\n"
            ),
        )?;
        Ok(address)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.nodes.clear();
        sweep::remove(&self.id);
    }
}
