//! A pod: a network namespace on its node's bridge, and a cgroup in the kubelet's
//! layout with a process that holds both, as a sandbox's pause process does.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{
    Lab, eventually,
    host::{self, Running, binary},
};

pub struct Pod {
    pub name: String,
    pub uid: String,
    pub node: usize,
    node_name: String,
    pub netns: String,
    pub ip: String,
    pub ip6: String,
    options: PodOptions,
    pod_cgroup: PathBuf,
    container: PathBuf,
    dir: PathBuf,
    pause: Running,
}

#[derive(Clone)]
pub struct PodOptions {
    /// `None`: no label, so that the namespace or the default decides.
    pub mesh: Option<bool>,
    pub namespace: String,
    pub service_account: Option<String>,
    pub layout: Layout,
    pub host_network: bool,
    /// Further labels, as YAML flow pairs.
    pub labels: String,
    /// Container ports, as YAML flow entries.
    pub ports: String,
    /// Whether to wait until all agents know it.
    pub wait: bool,
}

impl Default for PodOptions {
    fn default() -> Self {
        Self {
            mesh: Some(true),
            namespace: "shop".into(),
            service_account: None,
            layout: Layout::Cgroupfs,
            host_network: false,
            labels: String::new(),
            ports: String::new(),
            wait: true,
        }
    }
}

/// How the kubelet's cgroup driver names a pod's directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    Cgroupfs,
    /// QoS class Guaranteed: one level less.
    CgroupfsGuaranteed,
    /// The systemd driver's slices.
    Systemd,
}

impl Pod {
    pub(crate) fn new(lab: &mut Lab, node: usize, name: &str, options: PodOptions) -> Result<Self> {
        static SEQUENCE: AtomicU32 = AtomicU32::new(1);
        let sequence = SEQUENCE.fetch_add(1, Ordering::Relaxed);
        let uid = format!("{sequence:08x}-0000-4000-8000-{:012x}", std::process::id());
        let lab_path = lab.path().to_owned();
        let (id, at) = (lab.id.clone(), &mut lab.nodes[node - 1]);
        let host = at.next_pod;
        at.next_pod = if host == 254 { 10 } else { host + 1 };
        let (netns, ip, ip6) = if options.host_network {
            (
                at.netns.clone(),
                format!("192.0.2.{node}"),
                format!("fd00:2::{node}"),
            )
        } else {
            let netns = format!("{id}-p{sequence}");
            let (ip, ip6) = (
                format!("10.0.{node}.{host}"),
                format!("fd00:0:0:{node}::{host}"),
            );
            host::add_netns(&netns)?;
            host::ip(
                &netns,
                &[
                    format!(
                        "link add eth0 type veth peer name v{sequence} netns {}",
                        at.netns
                    ),
                    format!("address add {ip}/24 dev eth0"),
                    format!("address add {ip6}/64 dev eth0 nodad"),
                    "link set eth0 up".into(),
                    format!("route add default via 10.0.{node}.1"),
                    format!("route add default via fd00:0:0:{node}::1"),
                ],
            )?;
            host::ip(
                &at.netns,
                &[
                    format!("link set v{sequence} master pods"),
                    format!("link set v{sequence} up"),
                ],
            )?;
            (netns, ip, ip6)
        };
        let pods = at.cgroup.join("kubepods");
        let pod_cgroup = match options.layout {
            Layout::Cgroupfs => pods.join("burstable").join(format!("pod{uid}")),
            Layout::CgroupfsGuaranteed => pods.join(format!("pod{uid}")),
            Layout::Systemd => at.cgroup.join(format!(
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{}.slice",
                uid.replace('-', "_")
            )),
        };
        let container = pod_cgroup.join("container");
        std::fs::create_dir_all(&container).with_context(|| format!("{}", container.display()))?;
        let dir = lab_path.join(format!("pod-{name}"));
        std::fs::create_dir_all(&dir)?;
        let mut pause = Command::new("sleep");
        pause.arg("infinity");
        host::place(&mut pause, &container, &netns)?;
        Ok(Self {
            pause: Running::start(&mut pause, dir.join("pause.log"))?,
            name: name.to_owned(),
            uid,
            node,
            node_name: at.name.clone(),
            netns,
            ip,
            ip6,
            options,
            pod_cgroup,
            container,
            dir,
        })
    }

    pub fn namespace(&self) -> &str {
        &self.options.namespace
    }

    pub fn wait(&self) -> bool {
        self.options.wait
    }

    pub fn service_account(&self) -> &str {
        self.options
            .service_account
            .as_deref()
            .unwrap_or(&self.name)
    }

    /// Its Pod object, as `kubectl get -o yaml` would print the parts that matter.
    pub fn manifest(&self) -> String {
        let Self {
            name,
            uid,
            node_name,
            ip,
            ip6,
            ..
        } = self;
        let PodOptions {
            mesh,
            namespace,
            labels,
            ports,
            host_network,
            ..
        } = &self.options;
        let mesh = match mesh {
            Some(true) => ", postern.dev/mesh: enabled",
            Some(false) => ", postern.dev/mesh: disabled",
            None => "",
        };
        let labels = if labels.is_empty() {
            String::new()
        } else {
            format!(", {labels}")
        };
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: {namespace}\n  uid: {uid}\n  \
             labels: {{app: {name}{mesh}{labels}}}\nspec:\n  nodeName: {node_name}\n  serviceAccountName: {}\n  \
             hostNetwork: {host_network}\n  containers: [{{name: main, image: none, ports: [{ports}]}}]\nstatus:\n  \
             phase: Running\n  podIP: {ip}\n  podIPs: [{{ip: {ip}}}, {{ip: '{ip6}'}}]\n",
            self.service_account(),
        )
    }

    /// A program in the pod.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Result<Command> {
        let mut command = Command::new(program);
        command.current_dir(&self.dir);
        host::place(&mut command, &self.container, &self.netns)?;
        Ok(command)
    }

    /// Runs a program in the pod until the pod is gone or the result is dropped.
    pub fn start(&self, log: &str, command: &mut Command) -> Result<Running> {
        Running::start(command, self.dir.join(format!("{log}.log")))
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A server of the project's own, in the given mode.
    pub fn serve(&self, mode: &str, port: u16) -> Result<Running> {
        let mut command = self.command(binary("probe")?)?;
        command.args(["serve", "--listen", &format!("[::]:{port}"), "--mode", mode]);
        let running = self.start(&format!("serve-{mode}-{port}"), &mut command)?;
        running.says("listening")?;
        Ok(running)
    }

    /// One connection by the project's own client; what it saw.
    pub fn dial(&self, address: &str, arguments: &[&str]) -> Result<serde_json::Value> {
        let mut command = self.command(binary("probe")?)?;
        command.args(["dial", address]).args(arguments);
        let output = host::output(&mut command)?;
        serde_json::from_slice(&output.stdout).with_context(|| host::text(&output.stdout))
    }

    /// nginx, serving a page and `extra` configuration within its server block.
    pub fn nginx(&self, port: u16, page: &str) -> Result<Running> {
        let dir = self.dir.join(format!("nginx-{port}"));
        std::fs::create_dir_all(&dir)?;
        std::fs::write(dir.join("index.html"), page)?;
        let root = dir.display();
        std::fs::write(
            dir.join("nginx.conf"),
            format!(
                "daemon off; master_process off; user root; pid {root}/pid; error_log stderr;\n\
             events {{ worker_connections 4096; }}\nhttp {{ access_log {root}/access.log;\n\
             client_body_temp_path {root}/b; proxy_temp_path {root}/p; fastcgi_temp_path {root}/f;\n\
             uwsgi_temp_path {root}/u; scgi_temp_path {root}/s; keepalive_requests 1000000;\n\
             server {{ listen [::]:{port} ipv6only=off; root {root};\n\
             location /app/ {{ return 200 \"$request_method $request_uri sub=$http_x_sub auth=$http_authorization\\n\"; }}\n\
             location = /peer {{ return 200 \"$remote_addr:$remote_port $server_addr:$server_port\\n\"; }} }} }}\n"
            ),
        )?;
        let mut command = self.command("/usr/sbin/nginx")?;
        command
            .arg("-p")
            .arg(&dir)
            .arg("-c")
            .arg(dir.join("nginx.conf"));
        let running = self.start(&format!("nginx-{port}"), &mut command)?;
        eventually("nginx listens", Duration::from_secs(20), || {
            self.listens(port)
        })
        .with_context(|| running.output())?;
        Ok(running)
    }

    /// Whether something listens on a port in the pod's namespace.
    pub fn listens(&self, port: u16) -> bool {
        let Ok(mut ss) = self.command("ss") else {
            return false;
        };
        ss.args(["-Hltn", &format!("sport = :{port}")]);
        ss.output().is_ok_and(|out| !out.stdout.is_empty())
    }

    /// curl in the pod: exit code and output.
    pub fn curl(&self, arguments: &[&str]) -> Result<(i32, String)> {
        let mut curl = self.command("curl")?;
        curl.args(["-sS", "-m", "20", "--noproxy", "*"])
            .args(arguments);
        let output = curl.output()?;
        Ok((
            output.status.code().unwrap_or(-1),
            host::text(&output.stdout) + &host::text(&output.stderr),
        ))
    }

    /// Ends the process that holds its namespace and its cgroup: others do.
    pub fn without_sandbox(&mut self) -> Result<()> {
        self.pause.child.kill()?;
        self.pause.child.wait()?;
        Ok(())
    }

    pub fn cgroup(&self) -> &Path {
        &self.container
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _none_left = std::fs::write(self.pod_cgroup.join("cgroup.kill"), "1");
        let _reaped = self.pause.child.wait();
        crate::sweep::remove_cgroup(&self.pod_cgroup);
        if !self.options.host_network {
            let _gone = Command::new("ip")
                .args(["netns", "del", &self.netns])
                .stderr(std::process::Stdio::null())
                .status();
        }
    }
}
