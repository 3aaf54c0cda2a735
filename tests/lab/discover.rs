//! Pods of other nodes are found when they are dialled: what nobody talks to costs
//! nothing, what is outside the mesh passes, what cannot be found out is refused.

use std::time::Duration;

use anyhow::{Context as _, Result};
use postern_tests::{Lab, Node, Pod, PodOptions, Running, Source, binary, eventually};
use serde_json::Value;

use crate::kit::{ECHO, at, at6, echoes, is_connection, pair};

/// Three nodes, of which two have an agent.
fn started() -> Result<Lab> {
    let mut lab = Lab::with(3, Source::Kubernetes)?;
    for node in &mut lab.nodes[..2] {
        node.start()?;
    }
    Ok(lab)
}

/// What was asked of a kind so far.
fn asked(lab: &Lab, resource: &str) -> Result<Vec<String>> {
    let all = lab.api()?.requests().into_iter();
    let of_it = all.filter(|r| r.resource == resource);
    Ok(of_it.map(|r| r.query.replace("%3D", "=")).collect())
}

fn told(node: &Node, to: &str) -> Result<Vec<Value>> {
    let mut records = node.audit()?;
    records.retain(|r| is_connection(r) && r["dialled"] == to && r["reporter"] == "source");
    Ok(records)
}

fn metric(node: &Node, name: &str) -> Result<u64> {
    let metrics = node.metrics()?;
    let line = metrics.lines().find_map(|line| line.strip_prefix(name));
    line.map_or(Ok(0), |value| {
        value.trim().parse().with_context(|| value.to_owned())
    })
}

fn steered(node: &Node) -> Result<u64> {
    metric(node, "postern_kernel_total{name=\"steered\"}")
}

#[test]
fn pods_that_nobody_talks_to_are_not_asked_for() -> Result<()> {
    let mut lab = started()?;
    let stranger = lab.pod(3, "stranger")?;
    let (client, server, _echo) = pair(&mut lab)?;
    let behind = |port: u16, role: &str| {
        format!("selector: {{app: {role}}}, ports: [{{port: 80, targetPort: {port}}}]")
    };
    let service = lab.service("web", 7, &behind(ECHO, "server"))?;
    lab.service("unused", 8, &behind(80, "stranger"))?;
    for address in [at(&server, ECHO), at6(&server, ECHO), at(&server, ECHO)] {
        assert!(echoes(&client, &address)?, "{}", lab.nodes[0].log());
    }
    let service = format!("{service}:80");
    eventually("the service is known", Duration::from_secs(5), || {
        echoes(&client, &service).unwrap_or(false)
    })?;
    // As if all were known ahead, in the records of both sides.
    for (node, reporter) in [(0, "source"), (1, "destination")] {
        let record = lab.nodes[node].record("of the call", |r| {
            is_connection(r) && r["reporter"] == reporter && r["source"]["pod"] == client.name
        })?;
        assert_eq!(record["tls"]["version"], "TLSv1.3", "{record}");
        assert_eq!(record["destination"]["pod"], server.name, "{record}");
    }
    // Two agents, and each has its own node's pods and those of the other's.
    let pods = asked(&lab, "pods")?;
    let elsewhere = |query: &&String| {
        let of_a_node = query.contains("spec.nodeName=node1") || query.contains("node2");
        !(of_a_node || query.contains("status.podIP=10.0.") && !query.contains(&stranger.ip))
    };
    assert_eq!(pods.iter().find(elsewhere), None, "{pods:#?}");
    let slices = asked(&lab, "endpointslices.discovery.k8s.io")?;
    let unused = |query: &&String| !query.contains("service-name=web");
    assert_eq!(slices.iter().find(unused), None, "{slices:#?}");
    // One question for the node, and one for the service.
    let waited = "postern_discoveries_total{name=\"known\"}";
    assert!(metric(&lab.nodes[0], waited)? <= 2);
    Ok(())
}

/// An echo service of the node itself, at an address that its pods' range has.
fn host_service(node: &Node, address: &str) -> Result<Running> {
    let mut command = node.command(binary("probe")?)?;
    command.args(["serve", "--listen", address, "--mode", "echo"]);
    let running = Running::start(&mut command, node.audit_path().with_file_name("host.log"))?;
    running.says("listening")?;
    Ok(running)
}

#[test]
fn what_is_outside_the_mesh_is_carried_once_and_passes_from_then_on() -> Result<()> {
    let mut lab = started()?;
    let (client, server, _echo) = pair(&mut lab)?;
    let options = PodOptions {
        mesh: Some(false),
        ..PodOptions::default()
    };
    let plain = lab.pod_with(2, "plain", options)?;
    let _plain_echo = plain.serve("echo", ECHO)?;
    let gateway = "10.0.2.1:9000";
    let _host_echo = host_service(&lab.nodes[1], gateway)?;
    // It says who may dial what in the mesh, and no more.
    lab.policy(
        "nobody",
        "apiVersion: postern.dev/v1alpha1\nkind: ConnectPolicy\nmetadata: {name: nobody, namespace: shop}\n\
         spec: {selector: {matchLabels: {app: client}}, action: DENY, rules: [{ports: ['9000']}]}\n",
    )?;
    lab.policies(1)?;
    for (address, pod) in [(at(&plain, ECHO), Some("plain")), (gateway.into(), None)] {
        assert!(echoes(&client, &address)?, "{}", lab.nodes[0].log());
        let record = lab.nodes[0].record("of the first connection", |r| {
            is_connection(r) && r["dialled"] == address
        })?;
        assert_eq!(record["transport"], "plaintext", "{record}");
        assert_eq!(record["verdict"], "allow", "{record}");
        assert_eq!(record["destination"]["pod"].as_str(), pod, "{record}");
        assert_eq!(record["destination"]["identity"], Value::Null, "{record}");
        eventually("the kernel lets it pass", Duration::from_secs(5), || {
            let before = steered(&lab.nodes[0]).unwrap_or(0);
            let echoed = echoes(&client, &address).unwrap_or(false);
            echoed && steered(&lab.nodes[0]).is_ok_and(|now| now == before)
        })?;
    }
    assert!(!echoes(&client, &at(&server, ECHO))?);
    Ok(())
}

/// Never in plaintext: all that went there through the agent and all that did not.
fn only_secured(node: &Node, to: &Pod) -> Result<()> {
    for record in told(node, &at(to, ECHO))? {
        let secured = record["transport"] == "hbone" || record["verdict"] != "allow";
        assert!(secured, "{record}");
    }
    Ok(())
}

#[test]
fn what_cannot_be_found_out_is_refused_and_what_comes_later_is_found() -> Result<()> {
    let mut lab = started()?;
    let (client, server, _echo) = pair(&mut lab)?;
    let address = at(&server, ECHO);
    let api = lab.api()?;
    api.away(true);
    assert!(!echoes(&client, &address)?);
    let record = lab.nodes[0].record("of what was refused", |r| {
        is_connection(r) && r["dialled"] == address
    })?;
    assert_eq!(record["fault"], "agent", "{record}");
    let why = record["end"].as_str().unwrap_or_default();
    assert!(why.contains("could not be found out"), "{why}");
    api.away(false);
    eventually("the server is found", Duration::from_secs(20), || {
        echoes(&client, &address).unwrap_or(false)
    })?;
    // What is known is dialled while nobody can be asked.
    api.away(true);
    assert!(echoes(&client, &address)?);
    api.away(false);
    // Nobody is there, and then somebody is.
    let nobody = format!("10.0.2.200:{ECHO}");
    let dialled = client.dial(&nobody, &["--send", "x", "--half-close"]);
    assert!(dialled.is_ok_and(|seen| seen["text"] != "x"));
    lab.reuse_address(2, "10.0.2.200")?;
    let late = lab.pod(2, "late")?;
    let _late_echo = late.serve("echo", ECHO)?;
    eventually("the new pod is found", Duration::from_secs(5), || {
        echoes(&client, &at(&late, ECHO)).unwrap_or(false)
    })?;
    for pod in [&server, &late] {
        only_secured(&lab.nodes[0], pod)?;
    }
    let flows = lab.nodes[0].audit()?;
    let direct = |r: &&Value| r["kind"] == "flow" && r["remote"] == at(&late, ECHO).as_str();
    assert_eq!(flows.iter().find(direct), None);
    Ok(())
}
