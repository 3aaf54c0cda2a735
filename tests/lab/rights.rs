//! An agent with the rights of the chart, and no others.

use std::{collections::BTreeSet, path::Path, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use postern_apiserver::{ApiServer, Claims};
use postern_tests::{Lab, Source, eventually, text};
use serde_json::{Value, json};

use crate::kit::{ECHO, at, authorization, echoes, pair};

const BASE: &str = "config/kubernetes/kustomize/base/postern.yaml";
const EVERYTHING: &str = "tests/manifests/golden/everything.yaml";
const ACCOUNT: &str = "system:serviceaccount:postern-system:postern-agent";
const TAINT: &str = "postern.dev/agent-not-ready";

/// Roles and bindings of the agent, as the chart renders them.
fn rbac(path: &str) -> Result<Vec<Value>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let mut all: Vec<Value> = serde_saphyr::from_multiple(&text)?;
    all.retain(|object| {
        let version = object["apiVersion"].as_str().unwrap_or_default();
        version.starts_with("rbac.") && object["metadata"]["name"] == "postern-agent"
    });
    Ok(all)
}

/// Two nodes, whose agents are not started yet and will have these rights.
fn lab(rights: &str) -> Result<(Lab, Arc<ApiServer>)> {
    let mut lab = Lab::with(2, Source::Kubernetes)?;
    let api = lab.api()?;
    for object in rbac(rights)? {
        api.apply(object)?;
    }
    let token = api.mint(Claims {
        namespace: "postern-system".into(),
        service_account: "postern-agent".into(),
        ..Claims::default()
    });
    for node in &mut lab.nodes {
        node.options.token = Some(token.clone());
    }
    Ok((lab, api))
}

/// What is wrong with the rights, as `postern install-check` says.
fn denied(lab: &Lab) -> Result<Vec<String>> {
    let checked = lab.nodes[0].postern(&["install-check"])?.output()?;
    let said = text(&checked.stdout) + &text(&checked.stderr);
    let denied = said.lines().filter(|line| line.contains("not allowed"));
    let denied: Vec<String> = denied.map(|line| line.trim().to_owned()).collect();
    let whole = said.contains("may do all that the agent asks for");
    assert_eq!(whole, denied.is_empty(), "{said}");
    Ok(denied)
}

#[test]
fn the_agent_is_refused_nothing_that_it_asks() -> Result<()> {
    let (mut lab, api) = lab(BASE)?;
    for node in &mut lab.nodes {
        node.start()?;
    }
    let (client, server, _echo) = pair(&mut lab)?;
    let service = lab.service(
        "echo",
        9,
        &format!("selector: {{app: server}}, ports: [{{port: {ECHO}}}]"),
    )?;
    assert!(
        echoes(&client, &at(&server, ECHO))?,
        "{}",
        lab.nodes[0].log()
    );
    eventually("the service leads there", Duration::from_secs(30), || {
        echoes(&client, &format!("{service}:{ECHO}")).unwrap_or(false)
    })?;
    // A policy, which is told that it holds; and a pod, which is told that it is not here.
    let spec = "{selector: {matchLabels: {app: server}}, rules: [{}]}";
    lab.policy("p", &authorization("p", spec))?;
    api.apply(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "ghost", "namespace": "shop", "labels": {"postern.dev/mesh": "enabled"}},
        "spec": {"nodeName": "node1", "serviceAccountName": "ghost"},
        "status": {"phase": "Running", "podIP": "10.0.1.200", "podIPs": [{"ip": "10.0.1.200"}]},
    }))?;
    eventually("all is told", Duration::from_secs(120), || {
        let policy = api
            .get("AuthorizationPolicy", "shop", "p")
            .unwrap_or_default();
        policy["status"]["conditions"]
            .to_string()
            .contains("by 2 of 2 nodes")
            && !api.list("Event").is_empty()
    })
    .with_context(|| format!("{:?}\n{}", api.forbidden(), lab.nodes[0].log()))?;
    assert_eq!(api.forbidden(), [""; 0]);
    assert_eq!(denied(&lab)?, [""; 0]);
    // It also looks for neighbours, as far as the asker may.
    let refused = api.forbidden();
    assert!(
        refused.iter().all(|r| r.starts_with("daemonsets")),
        "{refused:?}"
    );
    // It was the account that asked, and for all kinds that the chart lets it ask for, but
    // the states of policies that there are none of.
    let asked: BTreeSet<String> = (api.requests().into_iter())
        .filter(|request| request.user == ACCOUNT)
        .map(|request| request.resource)
        .collect();
    for object in rbac(BASE)? {
        for rule in object["rules"].as_array().into_iter().flatten() {
            for resource in rule["resources"].as_array().context("resources")? {
                let resource = resource.as_str().unwrap_or_default();
                let none = resource.ends_with("/status") && !resource.starts_with("authoriz");
                assert!(none || asked.contains(resource), "{resource}: {asked:?}");
            }
        }
    }
    // Without one of them, it is named.
    for mut object in rbac(BASE)? {
        for rule in object["rules"].as_array_mut().into_iter().flatten() {
            let resources = rule["resources"].as_array_mut().context("resources")?;
            resources.retain(|r| r != "tokenbindings/status" && r != "leases");
        }
        api.apply(object)?;
    }
    assert_eq!(
        denied(&lab)?,
        [
            "FAIL    not allowed: patch tokenbindings/status.postern.dev".to_owned(),
            leases("get"),
            leases("list"),
            leases("create"),
            leases("patch"),
            leases("update"),
        ]
    );
    Ok(())
}

fn leases(verb: &str) -> String {
    format!("FAIL    not allowed: {verb} leases.coordination.k8s.io in postern-system")
}

#[test]
fn the_startup_taint_goes_once_there_is_an_agent() -> Result<()> {
    let (mut lab, api) = lab(BASE)?;
    let mut node = api.get("Node", "", "node1").context("a node")?;
    let other = json!({"key": "example.org/pool", "value": "a", "effect": "NoSchedule"});
    node["spec"]["taints"] = json!([{"key": TAINT, "effect": "NoSchedule"}, other]);
    api.apply(node)?;
    let taints = || api.get("Node", "", "node1").unwrap_or_default()["spec"]["taints"].clone();
    lab.nodes[0].options.kubernetes = format!(", startupTaint: {TAINT}");
    lab.nodes[0].start()?;
    // The right is not among those that agents have without the value.
    eventually("it is refused", Duration::from_secs(30), || {
        lab.nodes[0].log().contains("the taint stays on this node")
    })
    .with_context(|| lab.nodes[0].log())?;
    assert_eq!(
        denied(&lab)?,
        ["FAIL    not allowed: patch nodes".to_owned()]
    );
    assert_eq!(taints().as_array().map(Vec::len), Some(2));
    for object in rbac(EVERYTHING)? {
        api.apply(object)?;
    }
    eventually("it is gone", Duration::from_secs(30), || {
        taints() == json!([other])
    })
    .with_context(|| lab.nodes[0].log())?;
    assert_eq!(denied(&lab)?, [""; 0]);
    Ok(())
}
