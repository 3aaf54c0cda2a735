//! Pods where kubelets and runtimes put them, and how they come and go there.

use std::time::Duration;

use anyhow::Result;
use postern_tests::{Lab, Layout, NodeOptions, Pod, PodOptions, binary, eventually, output, text};

use crate::kit::{ECHO, at, at6, echoes, pair, peer_authentication};

const LAYOUTS: [Layout; 7] = [
    Layout::Cgroupfs,
    Layout::CgroupfsBestEffort,
    Layout::CgroupfsGuaranteed,
    Layout::Systemd,
    Layout::SystemdGuaranteed,
    Layout::Crio,
    Layout::Kind,
];

/// Pods of all layouts on node 1, in namespaces of their own or the host's: each is
/// carried under its own name.
fn all_are_enrolled(lab: &mut Lab, host_network: bool, from_file: bool) -> Result<()> {
    let target = lab.pod(2, "target")?;
    for layout in LAYOUTS {
        let name = format!("{layout:?}").to_lowercase();
        let options = PodOptions {
            layout,
            host_network,
            from_file,
            ..PodOptions::default()
        };
        let pod = lab.pod_with(1, &name, options)?;
        // Nobody listens there: how it is refused does not matter, but by whom.
        let _refused = pod.dial(&at(&target, ECHO), &["--send", "x"])?;
        let identity = format!("spiffe://cluster.local/ns/shop/sa/{name}");
        lab.nodes[1].record(&format!("{name} has its identity"), |r| {
            r["source"]["identity"] == identity
        })?;
        lab.remove_manifest(&format!("pod-{name}"))?;
    }
    Ok(())
}

#[test]
fn every_layout_is_enrolled() -> Result<()> {
    let mut lab = Lab::started()?;
    all_are_enrolled(&mut lab, false, false)
}

/// Static pods are known by another uid than the one in their cgroup's name.
#[test]
fn static_and_host_network_pods_are_known_in_every_layout() -> Result<()> {
    let mut lab = Lab::started()?;
    all_are_enrolled(&mut lab, true, true)?;
    let (client, server, _echo) = pair(&mut lab)?;
    let server = at(&server, ECHO);
    let options = PodOptions {
        host_network: true,
        from_file: true,
        layout: Layout::Systemd,
        ..PodOptions::default()
    };
    let proxy = lab.pod_with(1, "proxy", options)?;
    assert!(echoes(&proxy, &server)? && echoes(&client, &server)?);
    // Another pod says that it is this one's mirror, to be taken for it.
    let thief = PodOptions {
        host_network: true,
        wait: false,
        ..PodOptions::default()
    };
    let thief = lab.pod_with(1, "thief", thief)?;
    let mirror = proxy.manifest().replace(&proxy.uid, &thief.uid);
    lab.manifest("pod-thief", &mirror.replace(": proxy", ": thief"))?;
    eventually("neither is believed", Duration::from_secs(10), || {
        let told = lab.nodes[0].status().unwrap_or_default().to_string();
        told.matches("another pod says that it is the same").count() == 2
    })?;
    assert!(!echoes(&proxy, &server)? && !echoes(&thief, &server)?);
    assert!(echoes(&client, &server)?);
    Ok(())
}

/// kind: the agent sees the node's part of the cgroup tree, and not how deep it lies.
#[test]
fn a_node_may_be_a_container_itself() -> Result<()> {
    let mut lab = Lab::new(2)?;
    lab.nodes[0].options = NodeOptions {
        nested: true,
        ..NodeOptions::default()
    };
    for node in &mut lab.nodes {
        node.start()?;
    }
    all_are_enrolled(&mut lab, true, false)?;
    let (client, server, _echo) = pair(&mut lab)?;
    assert!(echoes(&client, &at(&server, ECHO))?);
    // What is a pod and not known is refused: the node's own processes are told apart.
    lab.remove_manifest("pod-client")?;
    eventually("it is not known", Duration::from_secs(5), || {
        let seen = client.dial(&at(&server, ECHO), &["--send", "x", "--half-close"]);
        seen.is_ok_and(|seen| seen["connect"] == "EPERM")
    })?;
    let mut node = lab.nodes[0].command(binary("probe")?)?;
    let seen = node.args(["dial", &at(&server, ECHO), "--send", "x", "--half-close"]);
    let seen: serde_json::Value = serde_json::from_slice(&output(seen)?.stdout)?;
    assert_eq!(seen["connect"], "ok", "{seen}");
    Ok(())
}

#[test]
fn a_restarted_sandbox_is_enrolled_anew() -> Result<()> {
    let mut lab = Lab::started()?;
    let mut server = lab.pod(2, "server")?;
    let (near, far) = (lab.pod(2, "near")?, lab.pod(1, "far")?);
    lab.policy(
        "strict",
        &peer_authentication("strict", "shop", "{mtls: {mode: STRICT}}"),
    )?;
    lab.policies(1)?;
    for _ in 0..2 {
        let echo = server.serve("echo", ECHO)?;
        for client in [&near, &far] {
            // The first on a tunnel that ended with the old sandbox breaks with it.
            for address in [at(&server, ECHO), at6(&server, ECHO)] {
                eventually("it is reached", Duration::from_secs(10), || {
                    echoes(client, &address).unwrap_or(false)
                })?;
                assert!(echoes(client, &address)?, "{} {address}", client.name);
            }
        }
        assert!(echoes(&server, &at(&server, ECHO))?, "itself");
        drop(echo);
        server.restart_sandbox()?;
    }
    Ok(())
}

/// A job has ended, its cgroup is still there, and the next pod has its address.
#[test]
fn an_address_may_be_the_next_pods_while_the_last_one_lingers() -> Result<()> {
    let mut lab = Lab::started()?;
    let (near, far) = (lab.pod(1, "near")?, lab.pod(2, "far")?);
    let mut lingering: Vec<Pod> = Vec::new();
    let mut ip: Option<String> = None;
    for name in ["job", "again", "next"] {
        if let Some(ip) = &ip {
            lab.reuse_address(1, ip)?;
        }
        let pod = lab.pod(1, name)?;
        let echo = pod.serve("echo", ECHO)?;
        for client in [&near, &far] {
            for _ in 0..3 {
                let log = || lab.nodes[client.node - 1].log();
                assert!(
                    echoes(client, &at(&pod, ECHO))?,
                    "{name} from {}: {}",
                    client.name,
                    log()
                );
            }
            let identity = format!("spiffe://cluster.local/ns/shop/sa/{name}");
            lab.nodes[client.node - 1].record(&format!("{name} was meant"), |r| {
                r["reporter"] == "source" && r["destination"]["identity"] == identity
            })?;
        }
        assert_eq!(
            echo.output().matches("accept").count(),
            6,
            "{}",
            echo.output()
        );
        // The runtime has taken its network, the kubelet not yet its cgroup.
        let ended = pod.manifest().replace("phase: Running", "phase: Succeeded");
        lab.manifest(&format!("ended-{name}"), &ended)?;
        lab.remove_manifest(&format!("pod-{name}"))?;
        let mut unlink = lab.nodes[0].command("ip")?;
        output(unlink.args(["-n", &pod.netns, "link", "del", "eth0"]))?;
        ip = Some(pod.ip.clone());
        lingering.push(pod);
    }
    assert_eq!(lingering.len(), 3);
    Ok(())
}

/// The kubelet's probes of every kind, and the runtime's own connects within a pod
/// (`kubectl port-forward`), under STRICT.
#[test]
fn probes_and_port_forwarding_pass_under_strict() -> Result<()> {
    let mut lab = Lab::started()?;
    let server = lab.pod(1, "server")?;
    let _nginx = server.nginx(8080, "page")?;
    let _echo = server.serve("echo", ECHO)?;
    lab.policy(
        "strict",
        &peer_authentication("strict", "shop", "{mtls: {mode: STRICT}}"),
    )?;
    lab.policies(1)?;
    for ip in [server.ip.clone(), format!("[{}]", server.ip6)] {
        // tcpSocket: it connects, and closes at once.
        let mut probe = lab.nodes[0].command(binary("probe")?)?;
        let seen = probe.args(["dial", &format!("{ip}:{ECHO}"), "--half-close"]);
        let seen: serde_json::Value = serde_json::from_slice(&output(seen)?.stdout)?;
        assert_eq!(
            (&seen["connect"], &seen["end"]),
            (&"ok".into(), &"eof".into()),
            "{seen}"
        );
        // httpGet, and grpc, which speaks HTTP/2 without TLS.
        for more in [&["-f"][..], &["--http2-prior-knowledge"]] {
            let mut curl = lab.nodes[0].command("curl")?;
            let url = format!("http://{ip}:8080/");
            let said = curl
                .args(["-sS", "-g", "-m", "10"])
                .args(more)
                .arg(&url)
                .output()?;
            // nginx answers HTTP/2 with a complaint: what counts is that it was asked.
            let (out, error) = (text(&said.stdout), text(&said.stderr));
            assert!(
                !error.contains("reset by peer"),
                "{url} {more:?} {out} {error}"
            );
            assert!(
                more != ["-f"] || out.trim() == "page",
                "{url} {out} {error}"
            );
        }
    }
    for loopback in ["127.0.0.1", "[::1]"] {
        // The runtime enters the pod's network namespace only.
        let mut curl = lab.nodes[0].command("ip")?;
        curl.args([
            "netns",
            "exec",
            &server.netns,
            "curl",
            "-sS",
            "-g",
            "-m",
            "10",
        ]);
        let said = output(curl.arg(format!("http://{loopback}:8080/peer")))?;
        let said = text(&said.stdout);
        assert!(
            said.contains("127.0.0.1:") || said.contains("::1"),
            "{said}"
        );
    }
    let steered = "postern_kernel_total{name=\"steered\"} 0";
    assert!(lab.nodes[0].metrics()?.contains(steered));
    let all = lab.nodes[0].audit()?;
    let carried = all.iter().filter(|r| crate::kit::is_connection(r));
    assert!(carried.clone().count() >= 6);
    for record in carried {
        assert_eq!(record["transport"], "probe", "{record}");
    }
    Ok(())
}
