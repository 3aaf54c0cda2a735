//! Pods come and go.

use std::time::Duration;

use anyhow::Result;
use postern_tests::{Lab, Layout, NodeOptions, PodOptions, binary, eventually};

use crate::kit::{ECHO, at, echoes, pair};

#[test]
fn two_hundred_pods_come_and_go() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server, _echo) = pair(&mut lab)?;
    let pid = lab.nodes[0].agent_pid().unwrap_or_default();
    let files = || std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
    let round = |lab: &mut Lab, names: std::ops::Range<usize>| -> Result<()> {
        let pods = names
            .map(|number| lab.pod(1, &format!("churn{number}")))
            .collect::<Result<Vec<_>>>()?;
        let last = pods.last().map(|pod| echoes(pod, &at(&server, ECHO)));
        assert!(matches!(last, Some(Ok(true))), "{}", lab.nodes[0].log());
        for pod in pods {
            lab.remove_manifest(&format!("pod-{}", pod.name))?;
        }
        eventually("all have left", Duration::from_secs(10), || {
            lab.nodes[0]
                .status()
                .is_ok_and(|s| s["workloads"].as_array().is_some_and(|w| w.len() == 1))
        })
    };
    round(&mut lab, 0..20)?;
    eventually("connections have ended", Duration::from_secs(5), || {
        lab.nodes[0].status().is_ok_and(|s| s["connections"] == 0)
    })?;
    let before = files();
    for start in (20..200).step_by(20) {
        round(&mut lab, start..start + 20)?;
    }
    assert!(echoes(&client, &at(&server, ECHO))?);
    // Idle tunnels of pods that are gone may still be closing.
    eventually(
        &format!("{before} open files again"),
        Duration::from_secs(20),
        || files() <= before + 40,
    )?;
    let metrics = lab.nodes[0].metrics()?;
    for entry in [
        "postern_map_entries{name=\"WORKLOADS\"} 1",
        "postern_enrolled_workloads 1",
    ] {
        assert!(metrics.contains(entry), "{entry}\n{metrics}");
    }
    Ok(())
}

#[test]
fn a_connection_from_before_enrolment_goes_on() -> Result<()> {
    let mut lab = Lab::started()?;
    let (_client, server, _echo) = pair(&mut lab)?;
    let late = lab.pod_with(
        1,
        "late",
        PodOptions {
            mesh: Some(false),
            ..PodOptions::default()
        },
    )?;
    let mut stay = late.command(binary("probe")?)?;
    let stay = late.start("stay", stay.args(["stay", &at(&server, ECHO)]))?;
    stay.says("beat 000001")?;
    lab.manifest(
        "pod-late",
        &late.manifest().replace("mesh: disabled", "mesh: enabled"),
    )?;
    eventually("it is enrolled", Duration::from_secs(5), || {
        lab.nodes[0]
            .status()
            .is_ok_and(|s| !s["workloads"].to_string().contains("disabled"))
    })?;
    let identity = "spiffe://cluster.local/ns/shop/sa/late";
    assert!(echoes(&late, &at(&server, ECHO))?);
    lab.nodes[1].record("the new one has an identity", |r| {
        r["source"]["identity"] == identity
    })?;
    stay.says("beat 000020")?;
    assert!(!stay.output().contains("ended"));
    // And back: the next one is plaintext again.
    lab.manifest("pod-late", &late.manifest())?;
    eventually("it has left", Duration::from_secs(5), || {
        late.dial(&at(&server, ECHO), &["--send", "x", "--half-close"])
            .is_ok_and(|seen| {
                seen["local"]
                    .as_str()
                    .is_some_and(|l| l.starts_with(&late.ip))
            })
    })
}

#[test]
fn a_workload_that_is_not_known_is_refused_or_let_through() -> Result<()> {
    for (unknown, expected) in [("refuse", "EPERM"), ("allow", "ok")] {
        let mut lab = Lab::new(2)?;
        for node in &mut lab.nodes {
            node.options = NodeOptions {
                more: format!("enrol: {{unknown: {unknown}}}\n"),
                ..NodeOptions::default()
            };
            node.start()?;
        }
        let server = lab.pod(2, "server")?;
        let _echo = server.serve("echo", ECHO)?;
        let stranger = lab.pod_with(
            1,
            "stranger",
            PodOptions {
                mesh: Some(false),
                ..PodOptions::default()
            },
        )?;
        lab.remove_manifest("pod-stranger")?;
        eventually("it is not known", Duration::from_secs(5), || {
            lab.nodes[0]
                .status()
                .is_ok_and(|s| s["workloads"].as_array().is_some_and(Vec::is_empty))
        })?;
        let seen = stranger.dial(&at(&server, ECHO), &["--send", "x", "--half-close"])?;
        assert_eq!(seen["connect"], expected, "{unknown} {seen}");
        let refused = u8::from(unknown == "refuse");
        let counter =
            format!("postern_kernel_total{{name=\"refused_unknown_workload\"}} {refused}");
        assert!(lab.nodes[0].metrics()?.contains(&counter));
    }
    Ok(())
}

#[test]
fn host_network_pods_are_known_by_their_cgroup() -> Result<()> {
    let mut lab = Lab::started()?;
    let (_client, server, _echo) = pair(&mut lab)?;
    for (name, layout) in [
        ("cgroupfs", Layout::Cgroupfs),
        ("guaranteed", Layout::CgroupfsGuaranteed),
        ("systemd", Layout::Systemd),
    ] {
        let options = PodOptions {
            host_network: true,
            layout,
            ..PodOptions::default()
        };
        let host = lab.pod_with(1, name, options)?;
        assert!(
            echoes(&host, &at(&server, ECHO))?,
            "{name}: {}",
            lab.nodes[0].log()
        );
        let identity = format!("spiffe://cluster.local/ns/shop/sa/{name}");
        lab.nodes[1].record("its own identity", |r| r["source"]["identity"] == identity)?;
    }
    // The node's own processes share the namespace, not the identity.
    let mut probe = lab.nodes[0].command(binary("probe")?)?;
    probe.args(["dial", &at(&server, ECHO), "--send", "x", "--half-close"]);
    let seen: serde_json::Value = serde_json::from_slice(&probe.output()?.stdout)?;
    assert!(
        seen["local"]
            .as_str()
            .is_some_and(|l| l.starts_with("192.0.2.1:")),
        "{seen}"
    );
    Ok(())
}

#[test]
fn guaranteed_pods_and_namespace_labels() -> Result<()> {
    let mut lab = Lab::started()?;
    let (_client, server, _echo) = pair(&mut lab)?;
    lab.manifest("ns", "apiVersion: v1\nkind: Namespace\nmetadata: {name: team, labels: {postern.dev/mesh: enabled}}\n")?;
    let options = PodOptions {
        mesh: None,
        namespace: "team".into(),
        layout: Layout::CgroupfsGuaranteed,
        ..PodOptions::default()
    };
    let pod = lab.pod_with(1, "labelled", options)?;
    assert!(echoes(&pod, &at(&server, ECHO))?);
    lab.nodes[1].record("its identity", |r| {
        r["source"]["identity"] == "spiffe://cluster.local/ns/team/sa/labelled"
    })?;
    Ok(())
}

/// An address that moves to another pod at once must not keep the old identity.
#[test]
fn an_address_that_moves_has_its_new_owners_identity() -> Result<()> {
    let mut lab = Lab::started()?;
    let (_client, server, _echo) = pair(&mut lab)?;
    let first = lab.pod(1, "first")?;
    let ip = first.ip.clone();
    assert!(echoes(&first, &at(&server, ECHO))?);
    drop(first);
    lab.remove_manifest("pod-first")?;
    lab.reuse_address(1, &ip)?;
    let second = lab.pod(1, "second")?;
    assert_eq!(second.ip, ip);
    assert!(echoes(&second, &at(&server, ECHO))?);
    lab.nodes[1].record("the second's identity", |r| {
        r["source"]["identity"] == "spiffe://cluster.local/ns/shop/sa/second"
    })?;
    Ok(())
}
