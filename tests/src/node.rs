//! A node: a network namespace with a bridge for its pods, a cgroup tree with the
//! node's own processes and the kubelet's, and the agent.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::Signal;

use crate::{
    Cluster, Lab, Pod, Source,
    audit::{audit_records, audit_text},
    eventually,
    host::{self, Running, binary},
    sweep::BPF,
};

pub struct Node {
    pub number: usize,
    pub name: String,
    pub netns: String,
    /// Where the agent's hooks go; `system` and `kubepods` are below it.
    pub cgroup: PathBuf,
    dir: PathBuf,
    lab_dir: PathBuf,
    pin: PathBuf,
    pub options: NodeOptions,
    agent: Option<Running>,
    cluster: Option<Arc<Cluster>>,
    pub(crate) next_pod: u8,
}

/// What differs from a node as it comes.
#[derive(Clone)]
pub struct NodeOptions {
    pub trust_domain: String,
    /// Names of root files in the lab's directory.
    pub root: String,
    /// Directory of manifests in the lab's directory.
    pub manifests: String,
    /// Further keys of `kubernetes`, where that is the source, as YAML flow pairs that
    /// begin with a comma.
    pub kubernetes: String,
    /// Whose rights the agent has at the API server; `None`: an administrator's.
    pub token: Option<String>,
    /// Further keys of `policies`, as YAML flow pairs that begin with a comma.
    pub policies: String,
    /// Further keys of `kernel`, as YAML flow pairs that begin with a comma.
    pub kernel: String,
    /// The same of `audit`.
    pub audit: String,
    /// Further configuration, as top-level YAML.
    pub more: String,
    /// The node is a container, as with kind: its agent sees the node's part of the
    /// cgroup tree only.
    pub nested: bool,
    /// Where the agent has the cgroup v2 tree; `None`: where this machine has it.
    pub cgroups: Option<PathBuf>,
}

impl Default for NodeOptions {
    fn default() -> Self {
        Self {
            trust_domain: "cluster.local".into(),
            root: "root".into(),
            manifests: "manifests".into(),
            kubernetes: String::new(),
            token: None,
            policies: String::new(),
            kernel: probes(),
            audit: String::new(),
            more: String::new(),
            nested: false,
            cgroups: None,
        }
    }
}

/// How agents carry connections, where a whole run asks for it (POSTERN_LAB_FAST_PATH):
/// by HBONE alone (`off`), or the second one so (`mixed`), as one would that is older.
fn fast_path(node: &str, more: &str) -> &'static str {
    let how = std::env::var("POSTERN_LAB_FAST_PATH").unwrap_or_default();
    match (how.as_str(), node) {
        _ if more.contains("transport:") => "",
        ("off", _) | ("mixed", "node2") => "transport: {fastPath: false}\n",
        _ => "",
    }
}

/// How agents probe the kernel, where the environment says.
fn probes() -> String {
    std::env::var("POSTERN_PROBES").map_or_else(|_| String::new(), |how| format!(", probes: {how}"))
}

impl Node {
    pub(crate) fn new(lab: &Lab, number: usize, switch: &str, nodes: usize) -> Result<Self> {
        let netns = format!("{}-n{number}", lab.id);
        let cgroup = lab.cgroup().join(format!("node{number}"));
        let dir = lab.path().join(format!("node{number}"));
        for path in [
            &dir,
            &cgroup.join("system"),
            &cgroup.join("kubepods/burstable"),
        ] {
            std::fs::create_dir_all(path).with_context(|| format!("{}", path.display()))?;
        }
        host::add_netns(&netns)?;
        let mut commands = vec![
            format!("link add wire type veth peer name port{number} netns {switch}"),
            format!("address add 192.0.2.{number}/24 dev wire"),
            format!("address add fd00:2::{number}/64 dev wire nodad"),
            "link set wire up".into(),
            "link add pods type bridge".into(),
            format!("address add 10.0.{number}.1/24 dev pods"),
            format!("address add fd00:0:0:{number}::1/64 dev pods nodad"),
            "link set pods up".into(),
        ];
        for other in (1..=nodes).filter(|other| *other != number) {
            commands.push(format!("route add 10.0.{other}.0/24 via 192.0.2.{other}"));
            commands.push(format!(
                "route add fd00:0:0:{other}::/64 via fd00:2::{other}"
            ));
        }
        host::ip(&netns, &commands)?;
        host::ip(
            switch,
            &[
                format!("link set port{number} master wire"),
                format!("link set port{number} up"),
            ],
        )?;
        let forward =
            "echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding";
        host::output(Command::new("ip").args(["netns", "exec", &netns, "sh", "-c", forward]))?;
        if let Some(cluster) = &lab.cluster {
            cluster.connect(&netns, number)?;
        }
        Ok(Self {
            number,
            name: format!("node{number}"),
            netns,
            cgroup,
            dir,
            lab_dir: lab.path().to_owned(),
            pin: Path::new(BPF).join(format!("{}-{number}", lab.id)),
            options: NodeOptions::default(),
            agent: None,
            cluster: lab.cluster.clone(),
            next_pod: 10,
        })
    }

    /// A program of the node itself, as the kubelet is one.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Result<Command> {
        let mut command = Command::new(program);
        host::place(&mut command, &self.cgroup.join("system"), &self.netns)?;
        Ok(command)
    }

    /// Of its state, its log and its configuration.
    pub fn directory(&self) -> &Path {
        &self.dir
    }

    pub fn config_path(&self) -> PathBuf {
        self.dir.join("agent.yaml")
    }

    /// Where the agent pins.
    pub fn pin(&self) -> &Path {
        &self.pin
    }

    /// Directory of the audit log.
    pub fn audit_path(&self) -> PathBuf {
        self.dir.join("audit")
    }

    pub fn audit_text(&self) -> Result<String> {
        audit_text(&self.audit_path())
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("agent.log")).unwrap_or_default()
    }

    /// Where its agent has pods and policies from.
    pub fn source(&self) -> Source {
        match self.cluster {
            Some(_) => Source::Kubernetes,
            None => Source::Directory,
        }
    }

    /// Writes what the agent is configured by.
    pub fn configure(&self) -> Result<()> {
        if let Some(cluster) = &self.cluster {
            let server = cluster.server(&self.options.manifests)?;
            let path = self.dir.join("kubeconfig");
            let text = match &self.options.token {
                Some(token) => server.kubeconfig_of(token),
                None => server.kubeconfig(),
            };
            std::fs::write(path, text)?;
        }
        Ok(std::fs::write(self.config_path(), self.config())?)
    }

    fn config(&self) -> String {
        let (lab, dir) = (self.lab_dir.display(), self.dir.display());
        let NodeOptions {
            trust_domain,
            root,
            manifests,
            kubernetes,
            token: _,
            policies,
            kernel,
            audit,
            more,
            nested,
            cgroups,
        } = &self.options;
        let (source, cluster) = match self.source() {
            Source::Directory => (String::new(), String::new()),
            Source::Kubernetes | Source::Api => (
                "source: kubernetes, ".to_owned(),
                format!("kubernetes: {{kubeconfig: {dir}/kubeconfig{kubernetes}}}\n"),
            ),
        };
        let hooks = match (nested, host::cgroup_mount(), cgroups) {
            (true, Ok(mount), _) => mount,
            (_, _, Some(tree)) => tree.join(host::below_mount(&self.cgroup)),
            _ => self.cgroup.clone(),
        };
        format!(
            "node: {}\ntrustDomain: {trust_domain}\nstate: {dir}/state\n\
             workloads: {{{source}directory: {lab}/{manifests}}}\npolicies: {{{source}directory: {lab}/policies, secrets: {lab}/secrets{policies}}}\n\
             kernel: {{cgroup: {}, pin: {}{kernel}}}\naudit: {{directory: {dir}/audit{audit}}}\n\
             log: {{level: 'info,postern=debug'}}\n{cluster}{}{}{more}",
            self.name,
            hooks.display(),
            self.pin.display(),
            fast_path(&self.name, more),
            if more.contains("identity:") {
                String::new()
            } else {
                format!(
                    "identity: {{rootCertificate: {lab}/{root}.pem, rootKey: {lab}/{root}.key}}\n"
                )
            },
        )
    }

    /// Starts the agent and waits until it is ready.
    pub fn start(&mut self) -> Result<()> {
        self.configure()?;
        let mut command = match self.options.nested {
            true => self.within()?,
            false => self.command(binary("postern")?)?,
        };
        command.arg("run").arg("--config").arg(self.config_path());
        let seen = self.log().len();
        let mut agent = Running::start(&mut command, self.dir.join("agent.log"))?;
        let mut ready = false;
        eventually(
            &format!("{} is ready, or ends", self.name),
            Duration::from_secs(60),
            || {
                ready = self
                    .log()
                    .get(seen..)
                    .is_some_and(|new| new.contains(" ready"));
                ready || agent.child.try_wait().is_ok_and(|status| status.is_some())
            },
        )
        .with_context(|| self.log())?;
        if !ready {
            bail!("the agent of {} ended: {}", self.name, self.log());
        }
        self.agent = Some(agent);
        Ok(())
    }

    /// The agent in a cgroup namespace that begins with the node.
    fn within(&self) -> Result<Command> {
        let mount = host::cgroup_mount()?;
        let mut command = Command::new("unshare");
        command.args(["--cgroup", "--mount", "sh", "-c"]).arg(format!(
            "echo $$ >{}/system/cgroup.procs && umount {1} && mount -t cgroup2 none {1} && exec {2} \"$@\"",
            self.cgroup.display(),
            mount.display(),
            binary("postern")?.display()
        ));
        command.arg("sh");
        host::place(&mut command, &self.cgroup, &self.netns)?;
        Ok(command)
    }

    /// As [`Self::start`], for a configuration that must be refused: its exit code.
    pub fn start_refused(&mut self) -> Result<Option<i32>> {
        self.configure()?;
        let mut command = self.command(binary("postern")?)?;
        command.arg("run").arg("--config").arg(self.config_path());
        let mut running = Running::start(&mut command, self.dir.join("agent.log"))?;
        eventually("the agent ends", Duration::from_secs(10), || {
            running
                .child
                .try_wait()
                .is_ok_and(|status| status.is_some())
        })?;
        Ok(running.child.wait()?.code())
    }

    pub fn running(&self) -> bool {
        self.agent.is_some()
    }

    pub fn agent_pid(&self) -> Option<i32> {
        self.agent.as_ref().map(Running::pid)
    }

    /// Starts another agent beside the one that runs, waits until it has taken over, and
    /// returns the other, which drains.
    pub fn start_beside(&mut self) -> Result<Running> {
        let old = self.agent.take().context("an agent runs")?;
        match self.start() {
            Ok(()) => Ok(old),
            Err(error) => {
                self.agent = Some(old);
                Err(error)
            }
        }
    }

    /// As [`Self::start_beside`], without waiting for it.
    pub fn launch(&self) -> Result<Running> {
        let mut command = self.command(binary("postern")?)?;
        command.arg("run").arg("--config").arg(self.config_path());
        Running::start(&mut command, self.dir.join("agent.log"))
    }

    /// The agent from now on; returns the one before.
    pub fn set_agent(&mut self, agent: Running) -> Option<Running> {
        self.agent.replace(agent)
    }

    /// The socket that other agents come to.
    pub fn door(&self) -> PathBuf {
        self.dir.join("state/handover.sock")
    }

    /// Kills the agent as `kill -9` does.
    pub fn kill(&mut self) {
        self.agent = None;
    }

    /// Stops it with SIGTERM and waits for its end.
    pub fn stop(&mut self) -> Result<()> {
        if let Some(mut agent) = self.agent.take() {
            agent.signal(Signal::SIGTERM)?;
            eventually("the agent ends", Duration::from_secs(40), || {
                agent.child.try_wait().is_ok_and(|status| status.is_some())
            })
            .with_context(|| self.log())?;
        }
        Ok(())
    }

    /// `postern` on this node, with its configuration.
    pub fn postern(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = self.command(binary("postern")?)?;
        command
            .args(arguments)
            .arg("--config")
            .arg(self.config_path());
        Ok(command)
    }

    pub fn status(&self) -> Result<serde_json::Value> {
        let output = self.postern(&["status", "--output", "json"])?.output()?;
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    pub fn metrics(&self) -> Result<String> {
        let mut curl = self.command("curl")?;
        curl.args(["-sS", "-m", "5", "http://127.0.0.1:15020/metrics"]);
        Ok(host::text(&host::output(&mut curl)?.stdout))
    }

    pub(crate) fn knows(&self, pod: &Pod) -> Result<bool> {
        let all = self.options.kubernetes.contains("discovery: all");
        if pod.node != self.number && self.source() == Source::Kubernetes && !all {
            // It asks when the pod is dialled.
            return Ok(true);
        }
        if pod.node != self.number {
            let dump = self.status()?;
            let files = std::fs::read_dir(self.lab_dir.join(&self.options.manifests))?;
            let pods = files
                .flatten()
                .filter(|f| f.file_name().to_string_lossy().starts_with("pod-"));
            return Ok(dump["knownWorkloads"].as_u64() >= Some(pods.count() as u64));
        }
        let wanted = format!("{}/{}", pod.namespace(), pod.name);
        let status = self.status()?;
        let all = status["workloads"].as_array().context("workloads")?;
        let settled = |w: &serde_json::Value| w["state"] == "enrolled" || w["state"] == "disabled";
        Ok(all.iter().any(|w| w["pod"] == wanted && settled(w)))
    }

    /// The audit log so far, a value a line. Every line must be whole.
    pub fn audit(&self) -> Result<Vec<serde_json::Value>> {
        audit_records(&self.audit_path())
    }

    /// The first record that fits; waits for it.
    pub fn record(
        &self,
        what: &str,
        fits: impl Fn(&serde_json::Value) -> bool,
    ) -> Result<serde_json::Value> {
        let mut found = None;
        let result = eventually(what, Duration::from_secs(10), || {
            found = self.audit().unwrap_or_default().into_iter().find(&fits);
            found.is_some()
        });
        if result.is_err() {
            let all = self.audit_text().unwrap_or_default();
            return result
                .map(|()| serde_json::Value::Null)
                .with_context(|| format!("{all}\n{}", self.log()));
        }
        found.context("a record")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.agent = None;
        // All of this node's processes, then what the agent left pinned.
        let _none_left = std::fs::write(self.cgroup.join("cgroup.kill"), "1");
        let _gone = std::fs::remove_dir_all(&self.pin);
    }
}
