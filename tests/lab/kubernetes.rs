//! What only an API server can do to an agent: be away, forget, cut off; and what the
//! agent tells it. That the rest is as from a directory is proven by the same tests,
//! run with that source (`POSTERN_LAB_SOURCE`), where two hundred pods come and go too.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use postern_apiserver::ApiServer;
use postern_tests::{Lab, Node, PodOptions, Source, binary, eventually};
use serde_json::{Value, json};

use crate::kit::{ECHO, at, authorization, echoes, is_connection, pair};

fn started() -> Result<(Lab, Arc<ApiServer>)> {
    let mut lab = Lab::with(2, Source::Kubernetes)?;
    for node in &mut lab.nodes {
        node.start()?;
    }
    let api = lab.api()?;
    Ok((lab, api))
}

fn stale(node: &Node) -> bool {
    let status = node.status().unwrap_or_default();
    status["problems"].to_string().contains("stale since")
}

fn on_disk(node: &Node) -> String {
    let file: PathBuf = node.audit_path().with_file_name("state/kubernetes.json");
    std::fs::read_to_string(file).unwrap_or_default()
}

fn condition(policy: Option<Value>, kind: &str) -> Option<Value> {
    let policy = policy?;
    let all = policy["status"]["conditions"].as_array()?;
    all.iter().find(|c| c["type"] == kind).cloned()
}

#[test]
fn an_api_server_that_is_away_is_not_missed() -> Result<()> {
    let (mut lab, api) = started()?;
    let (client, server, _echo) = pair(&mut lab)?;
    assert!(echoes(&client, &at(&server, ECHO))?);
    eventually("what is known is on disk", Duration::from_secs(20), || {
        let text = on_disk(&lab.nodes[0]);
        text.contains(&client.uid) && text.contains(&server.uid)
    })?;
    api.away(true);
    assert!(echoes(&client, &at(&server, ECHO))?);
    eventually("it is marked as stale", Duration::from_secs(30), || {
        stale(&lab.nodes[0])
    })?;
    assert!(lab.nodes[0].status()?["ready"].as_bool().unwrap_or(false));
    assert!(echoes(&client, &at(&server, ECHO))?);
    // The next agent has nobody to ask, and begins with what the last one knew.
    lab.nodes[0].kill();
    lab.nodes[0].start()?;
    eventually("traffic goes on", Duration::from_secs(20), || {
        echoes(&client, &at(&server, ECHO)).unwrap_or(false)
    })
    .with_context(|| lab.nodes[0].log())?;
    assert!(stale(&lab.nodes[0]), "{}", lab.nodes[0].status()?);
    api.away(false);
    eventually("it is up to date again", Duration::from_secs(60), || {
        !stale(&lab.nodes[0])
    })?;
    let late = lab.pod(1, "late")?;
    assert!(echoes(&late, &at(&server, ECHO))?);
    Ok(())
}

#[test]
fn a_past_that_is_forgotten_again_and_again_costs_no_connection() -> Result<()> {
    let (mut lab, api) = started()?;
    let (client, server, _echo) = pair(&mut lab)?;
    let mut stay = client.command(binary("probe")?)?;
    let stay = client.start("stay", stay.args(["stay", &at(&server, ECHO)]))?;
    stay.says("beat 000001")?;
    for _ in 0..20 {
        api.expire();
        api.disconnect();
        assert!(
            echoes(&client, &at(&server, ECHO))?,
            "{}",
            lab.nodes[0].log()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    let late = lab.pod(1, "late")?;
    assert!(echoes(&late, &at(&server, ECHO))?);
    assert!(!stay.output().contains("ended"), "{}", stay.output());
    let metrics = lab.nodes[0].metrics()?;
    let expired = metrics
        .lines()
        .find_map(|line| line.strip_prefix("postern_kubernetes_total{name=\"expired_versions\"} "));
    assert!(expired.is_some_and(|count| count != "0"), "{metrics}");
    Ok(())
}

#[test]
fn whatever_goes_wrong_on_the_way_all_is_right_in_the_end() -> Result<()> {
    let (mut lab, api) = started()?;
    let (client, server, _echo) = pair(&mut lab)?;
    api.chaos(6);
    let names = |number: usize| format!("churn{number}");
    for round in 0..3 {
        let pods = (0..5)
            .map(|number| lab.pod(1, &names(round * 5 + number)))
            .collect::<Result<Vec<_>>>()?;
        for pod in &pods {
            assert!(echoes(pod, &at(&server, ECHO))?, "{}", lab.nodes[0].log());
        }
        for pod in pods {
            lab.remove_manifest(&format!("pod-{}", pod.name))?;
        }
    }
    eventually("all have left", Duration::from_secs(30), || {
        let status = lab.nodes[0].status().unwrap_or_default();
        status["workloads"]
            .as_array()
            .is_some_and(|all| all.len() == 1)
    })?;
    api.calm();
    assert!(echoes(&client, &at(&server, ECHO))?);
    Ok(())
}

#[test]
fn what_is_refused_is_told_where_it_was_written() -> Result<()> {
    let (mut lab, api) = started()?;
    let (client, server, _echo) = pair(&mut lab)?;
    // A pod that is said to be here, and is not.
    api.apply(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "ghost", "namespace": "shop", "labels": {"postern.dev/mesh": "enabled"}},
        "spec": {"nodeName": "node1", "serviceAccountName": "ghost"},
        "status": {"phase": "Running", "podIP": "10.0.1.200", "podIPs": [{"ip": "10.0.1.200"}]},
    }))?;
    assert!(echoes(&client, &at(&server, ECHO))?);
    let spec =
        "{selector: {matchLabels: {app: server}}, rules: [{to: [{operation: {metods: [GET]}}]}]}";
    lab.policy("p", &authorization("p", spec))?;
    let get = || api.get("AuthorizationPolicy", "shop", "p");
    eventually("it is said to be refused", Duration::from_secs(60), || {
        condition(get(), "Accepted").is_some_and(|c| c["status"] == "False")
    })
    .with_context(|| format!("{:?}", get()))?;
    let refused = condition(get(), "Accepted").context("a condition")?;
    assert_eq!(refused["reason"], "Invalid");
    assert!(
        refused["message"]
            .as_str()
            .is_some_and(|m| m.contains("metods")),
        "{refused}"
    );
    assert_eq!(get().context("it is there")?["metadata"]["generation"], 1);
    assert!(
        !echoes(&client, &at(&server, ECHO))?,
        "what it guarded is denied"
    );
    let good = "{selector: {matchLabels: {app: server}}, rules: [{from: [{source: {serviceAccounts: [client]}}]}]}";
    lab.policy("p", &authorization("p", good))?;
    eventually("it lets the client in", Duration::from_secs(10), || {
        echoes(&client, &at(&server, ECHO)).unwrap_or(false)
    })?;
    eventually("all nodes enforce it", Duration::from_secs(90), || {
        let accepted = condition(get(), "Accepted").is_some_and(|c| c["status"] == "True");
        accepted && condition(get(), "Enforced").is_some_and(|c| c["status"] == "True")
    })
    .with_context(|| format!("{:?}", get()))?;
    eventually("the ghost has an event", Duration::from_secs(60), || {
        api.list("Event").iter().any(|event| {
            event["reason"] == "NotEnrolled" && event["involvedObject"]["name"] == "ghost"
        })
    })
    .with_context(|| format!("{:?}", api.list("Event")))
}

#[test]
fn an_address_is_never_taken_for_the_pod_that_had_it() -> Result<()> {
    let (mut lab, api) = started()?;
    let (client, server, echo) = pair(&mut lab)?;
    assert!(echoes(&client, &at(&server, ECHO))?);
    let ip = server.ip.clone();
    // What node 1 hears of it, it hears late.
    api.delay(Duration::from_millis(300));
    drop(echo);
    drop(server);
    lab.remove_manifest("pod-server")?;
    lab.reuse_address(2, &ip)?;
    let waits = PodOptions {
        wait: false,
        ..PodOptions::default()
    };
    let other = lab.pod_with(2, "other", waits)?;
    assert_eq!(other.ip, ip);
    let _echo = other.serve("echo", ECHO)?;
    eventually("the other is reached", Duration::from_secs(20), || {
        echoes(&client, &at(&other, ECHO)).unwrap_or(false)
    })
    .with_context(|| format!("{}\n{}", lab.nodes[1].log(), lab.nodes[0].log()))?;
    let identity = "spiffe://cluster.local/ns/shop/sa/other";
    lab.nodes[0].record("as itself", |r| {
        is_connection(r) && r["verdict"] == "allow" && r["destination"]["identity"] == identity
    })?;
    // As the server only its one connection was carried, in TLS as all of them.
    let records = lab.nodes[0].audit()?;
    let carried = |r: &&Value| is_connection(r) && r["verdict"] == "allow";
    let before = records
        .iter()
        .filter(carried)
        .filter(|r| r["destination"]["identity"] == "spiffe://cluster.local/ns/shop/sa/server");
    assert_eq!(before.count(), 1, "{records:#?}");
    assert!(
        records
            .iter()
            .filter(carried)
            .all(|r| r["transport"] == "hbone"),
        "{records:#?}"
    );
    Ok(())
}

#[test]
fn pods_are_replaced_and_end() -> Result<()> {
    let (mut lab, _api) = started()?;
    let (client, server, echo) = pair(&mut lab)?;
    assert!(echoes(&client, &at(&server, ECHO))?);
    let old = server.uid.clone();
    drop(echo);
    drop(server);
    // Under the same name, at once, as a StatefulSet's.
    let server = lab.pod(2, "server")?;
    assert_ne!(server.uid, old);
    let _echo = server.serve("echo", ECHO)?;
    eventually("the new one is reached", Duration::from_secs(10), || {
        echoes(&client, &at(&server, ECHO)).unwrap_or(false)
    })
    .with_context(|| lab.nodes[0].log())?;
    let job = lab.pod(1, "job")?;
    assert!(echoes(&job, &at(&server, ECHO))?);
    for phase in ["Succeeded", "Failed"] {
        lab.manifest("pod-job", &job.manifest().replace("Running", phase))?;
        eventually("it has left", Duration::from_secs(10), || {
            lab.nodes[0].status().is_ok_and(|s| {
                s["workloads"]
                    .as_array()
                    .is_some_and(|all| all.iter().all(|w| w["pod"] != "shop/job"))
            })
        })?;
    }
    assert!(echoes(&client, &at(&server, ECHO))?);
    Ok(())
}
