//! The image itself, as a container engine runs it beside containers of applications:
//! with a root that cannot be written, and no capability but those of the DaemonSet.

mod engine;
mod names;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use engine::{Engine, Layout};
use postern_tests::{
    Capture, Lab, Node, Pod, PodOptions, below_mount, count_bytes, eventually, tshark,
};

const MARKER: &str = "THIS-IS-THE-APPLICATIONS-PAYLOAD";
/// What `config/kubernetes` adds; dropped is all else. (`SYS_RESOURCE`, which it adds to
/// raise the limit of open files, is not ours to give here.)
const CAPABILITIES: [&str; 5] = ["BPF", "NET_ADMIN", "PERFMON", "SYS_ADMIN", "SYS_PTRACE"];
const NGINX: &str = "daemon off; master_process off; user root; pid /tmp/pid; error_log stderr;\n\
    events {}\nhttp { access_log off; client_body_temp_path /tmp/b; proxy_temp_path /tmp/p;\n\
    fastcgi_temp_path /tmp/f; uwsgi_temp_path /tmp/u; scgi_temp_path /tmp/s;\n\
    server { listen 8080; return 200 'THIS-IS-THE-APPLICATIONS-PAYLOAD $remote_addr\\n'; } }\n";

#[test]
fn containers_on_a_v2_host_are_secured() -> Result<()> {
    secured(Layout::Pure)
}

#[test]
fn containers_on_a_hybrid_host_are_secured() -> Result<()> {
    secured(Layout::Hybrid)
}

/// The archive that is tested.
fn archive() -> Result<PathBuf> {
    let archive = std::env::var_os("POSTERN_IMAGE");
    archive
        .map(PathBuf::from)
        .context("POSTERN_IMAGE names no archive")
}

fn secured(layout: Layout) -> Result<()> {
    let mut lab = Lab::new(2)?;
    let engine = Engine::new(lab.path(), layout)?;
    let image = engine.load(&archive()?)?;
    let nginx = lab.path().join("nginx.conf");
    std::fs::write(&nginx, NGINX)?;
    engine.image_of(
        "apps",
        &["/usr/sbin/nginx", "/usr/bin/curl", "/bin/busybox"],
    )?;

    let (server, client) = (pod(&mut lab, 2, "web")?, pod(&mut lab, 1, "client")?);
    let mut options = within(&server);
    options.push(format!("--volume={}:/nginx.conf:ro", nginx.display()));
    options.push("--tmpfs=/tmp".into());
    let serve = ["/usr/sbin/nginx", "-p", "/tmp", "-c", "/nginx.conf"];
    let web = engine.start("web", &options, "apps", &serve)?;
    engine.start(
        "client",
        &within(&client),
        "apps",
        &["/bin/busybox", "sleep", "999"],
    )?;
    let url = format!("http://{}:8080/", server.ip);
    let curl = ["/usr/bin/curl", "-sS", "-m", "20", url.as_str()];
    let ask = || engine.once(&within(&client), "apps", &curl);
    eventually(
        "it is there, without the mesh",
        Duration::from_secs(20),
        || ask().is_ok_and(|(code, _)| code == 0),
    )
    .with_context(|| format!("{:?}\n{}", ask(), said_by(&web)))?;

    let mut logs = Vec::new();
    for node in &mut lab.nodes {
        node.options.cgroups = Some(engine.cgroups().into());
        node.configure()?;
    }
    for node in &lab.nodes {
        logs.push(agent(&engine, &lab, node, &image)?);
    }
    let said = || -> String { logs.iter().map(|log| said_by(log)).collect() };
    for log in &logs {
        let ready = || said_by(log).contains(" ready");
        eventually("the agent is ready", Duration::from_secs(60), ready).with_context(said)?;
    }
    for (node, pod) in [(0, "client"), (1, "web")] {
        let enrolled = || {
            lab.nodes[node].status().is_ok_and(|status| {
                let all = status["workloads"].as_array().cloned().unwrap_or_default();
                all.iter()
                    .any(|w| w["pod"] == format!("shop/{pod}") && w["state"] == "enrolled")
            })
        };
        eventually("the pod is enrolled", Duration::from_secs(20), enrolled).with_context(said)?;
    }

    let capture = Capture::start(&lab.nodes[0], lab.path().join("wire.pcap"))?;
    let (code, body) = ask()?;
    assert_eq!(code, 0, "{body}\n{}", said());
    // The application sees its real client.
    assert_eq!(body.trim(), format!("{MARKER} {}", client.ip), "{}", said());
    let file = capture.stop()?;
    assert_eq!(count_bytes(&file, MARKER.as_bytes())?, 0);
    let hellos = tshark(
        &file,
        "tls.handshake.type == 2",
        &["tls.handshake.extensions.supported_version"],
    )?;
    assert!(
        !hellos.is_empty() && hellos.iter().all(|h| h == "0x0304"),
        "{hellos:?}"
    );
    lab.nodes[1].record("both by their identities", |r| {
        r["source"]["identity"] == "spiffe://cluster.local/ns/shop/sa/client"
            && r["destination"]["identity"] == "spiffe://cluster.local/ns/shop/sa/web"
    })?;

    // A container that dies closes the door; the next one of it opens it again.
    engine.kill("agent-node1")?;
    let (code, body) = ask()?;
    assert_ne!(code, 0, "{body}");
    let log = agent(&engine, &lab, &lab.nodes[0], &image)?;
    eventually("traffic resumes", Duration::from_secs(60), || {
        ask().is_ok_and(|(code, _)| code == 0)
    })
    .with_context(|| said_by(&log))
}

fn said_by(log: &Path) -> String {
    std::fs::read_to_string(log).unwrap_or_default()
}

/// A pod whose only processes are its containers'.
fn pod(lab: &mut Lab, node: usize, name: &str) -> Result<Pod> {
    let options = PodOptions {
        wait: false,
        ..PodOptions::default()
    };
    let mut pod = lab.pod_with(node, name, options)?;
    pod.without_sandbox()?;
    Ok(pod)
}

/// The pod's network namespace, and its cgroup as the kubelet would name it to a runtime.
fn within(pod: &Pod) -> Vec<String> {
    let pod_cgroup = pod.cgroup().parent().unwrap_or(pod.cgroup());
    vec![
        format!("--network=ns:/run/netns/{}", pod.netns),
        format!("--cgroup-parent=/{}", below_mount(pod_cgroup).display()),
    ]
}

/// The agent of a node, as the DaemonSet has it.
fn agent(engine: &Engine, lab: &Lab, node: &Node, image: &str) -> Result<PathBuf> {
    let parent = node
        .cgroup
        .join("kubepods/pod00000000-0000-4000-8000-00000000a6e7");
    let lab_path = lab.path().display();
    let mut options = vec![
        format!("--network=ns:/run/netns/{}", node.netns),
        format!("--cgroup-parent=/{}", below_mount(&parent).display()),
        "--pid=host".into(),
        "--read-only".into(),
        "--read-only-tmpfs=false".into(),
        "--cap-drop=all".into(),
        format!("--volume={lab_path}:{lab_path}:ro"),
        format!("--volume={0}:{0}", node.directory().display()),
        "--volume=/sys/fs/cgroup:/sys/fs/cgroup:ro,rbind".into(),
        "--volume=/sys/fs/bpf:/sys/fs/bpf".into(),
    ];
    options.extend(CAPABILITIES.map(|capability| format!("--cap-add={capability}")));
    let config = node.config_path();
    let config = config.to_str().context("a path")?;
    let name = format!("agent-{}", node.name);
    engine.start(&name, &options, image, &["run", "--config", config])
}
