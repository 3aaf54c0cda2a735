//! Agents that hold no root: `postern authority` signs for them.

use std::{os::unix::fs::PermissionsExt as _, process::Command, time::Duration};

use anyhow::{Context as _, Result};
use postern_tests::{Lab, Running, audit_records, binary, eventually, output, text};
use serde_json::Value;

use crate::kit::{ECHO, at, echoes, pair};

const PORT: u16 = 8080;
const URL: &str = "https://192.0.2.1:8443";

/// Writes the authority's configuration; it will run on node 1.
fn configure(lab: &Lab, more: &str) -> Result<()> {
    let dir = lab.path().display();
    Ok(std::fs::write(
        lab.path().join("authority.yaml"),
        format!(
            "issuer: {URL}\nlisten: 192.0.2.1:8443\nstate: {dir}/authority\n\
             nodes: {{manifests: {dir}/manifests}}\naudit: {{directory: {dir}/authority-audit}}\n{more}\n"
        ),
    )?)
}

fn authority(lab: &Lab) -> Result<Running> {
    let log = lab.path().join("authority.log");
    let _gone = std::fs::remove_file(&log);
    let mut command = lab.nodes[0].command(binary("postern")?)?;
    command.args(["authority", "run", "--config"]);
    command.arg(lab.path().join("authority.yaml"));
    let running = Running::start(&mut command, log)?;
    running.says("ready")?;
    Ok(running)
}

/// Has every agent join with a token of its own, and starts it.
fn join(lab: &mut Lab) -> Result<()> {
    let dir = lab.path().display().to_string();
    for node in &mut lab.nodes {
        let mut create = Command::new(binary("postern")?);
        create.args(["authority", "join-token", "create", "--node", &node.name]);
        create.arg("--config").arg(format!("{dir}/authority.yaml"));
        let token = text(&output(&mut create)?.stdout);
        let file = format!("{dir}/{}.token", node.name);
        std::fs::write(&file, token)?;
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600))?;
        node.options.more = format!(
            "identity: {{authority: {{url: '{URL}', roots: {dir}/authority/root.pem, \
             joinTokenFile: {file}}}}}\n"
        );
        node.start()?;
    }
    Ok(())
}

fn audit(lab: &Lab) -> Result<Vec<Value>> {
    audit_records(&lab.path().join("authority-audit"))
}

#[test]
fn agents_join_and_an_absent_authority_fails_closed() -> Result<()> {
    let mut lab = Lab::new(2)?;
    configure(&lab, "")?;
    let running = authority(&lab)?;
    join(&mut lab)?;
    let (client, server) = (lab.pod(1, "client")?, lab.pod(2, "server")?);
    let _nginx = server.nginx(PORT, "page")?;
    let url = format!("http://{}/", at(&server, PORT));
    assert_eq!(client.curl(&[&url])?, (0, "page".into()));
    let record = lab.nodes[1].record("the server's side of it", |r| {
        r["kind"] == "connection" && r["reporter"] == "destination" && r["verdict"] == "allow"
    })?;
    assert_eq!(record["transport"], "hbone");
    assert_eq!(
        record["source"]["identity"],
        "spiffe://cluster.local/ns/shop/sa/client"
    );
    // No node has the root's key, and its own key is nobody else's.
    for node in &lab.nodes {
        let state = lab.path().join(&node.name).join("state");
        assert!(!state.join("root.key").exists());
        let mode = std::fs::metadata(state.join("agent.pem"))?
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    let records = audit(&lab)?;
    let told = |event: &str, node: &str, subject: Option<&str>| {
        let agent = format!("spiffe://cluster.local/postern/agent/{node}");
        let fits = |r: &&Value| {
            r["event"] == event && r["client"] == agent && r["subject"].as_str() == subject
        };
        records.iter().filter(fits).count()
    };
    for node in ["node1", "node2"] {
        assert_eq!(told("join", node, None), 1, "{records:?}");
    }
    let (near, far) = (
        "spiffe://cluster.local/ns/shop/sa/client",
        "spiffe://cluster.local/ns/shop/sa/server",
    );
    assert_eq!(told("certificate", "node1", Some(near)), 1, "{records:?}");
    assert_eq!(told("certificate", "node2", Some(far)), 1, "{records:?}");
    assert_eq!(told("certificate", "node1", Some(far)), 0, "{records:?}");

    // Without the authority what has certificates goes on.
    drop(running);
    assert_eq!(client.curl(&[&url])?, (0, "page".into()));
    // An agent that restarts then has its place, but its pods' keys were in memory.
    lab.nodes[0].stop()?;
    lab.nodes[0].start()?;
    eventually("node 1 says what is wrong", Duration::from_secs(20), || {
        lab.nodes[0].status().is_ok_and(|status| {
            let state = status["workloads"][0]["state"].as_str().unwrap_or_default();
            let problems = status["problems"].to_string();
            state.contains("certificate is not there yet") && problems.contains("certificates: ")
        })
    })
    .with_context(|| lab.nodes[0].log())?;
    assert_ne!(client.curl(&["-m", "3", &url])?.0, 0);
    let errors = lab.nodes[0].metrics()?;
    let counted = errors
        .lines()
        .find_map(|line| line.strip_prefix("postern_certificate_errors_total "));
    assert!(counted.is_some_and(|n| n != "0"), "{errors}");

    // It is back, and knows the agent without another token.
    let _running = authority(&lab)?;
    enrolled(&lab, 0)?;
    assert_eq!(client.curl(&[&url])?, (0, "page".into()));
    let joins = audit(&lab)?.iter().filter(|r| r["event"] == "join").count();
    assert_eq!(joins, 2);
    Ok(())
}

#[test]
fn certificates_are_renewed_and_refused_once_they_expire() -> Result<()> {
    let mut lab = Lab::new(2)?;
    configure(&lab, "certificates: {leafLifetime: 8s, agentLifetime: 30s}")?;
    let running = authority(&lab)?;
    join(&mut lab)?;
    let (client, server, _echo) = pair(&mut lab)?;
    let certificates = |lab: &Lab| -> Result<usize> {
        let fits = |r: &Value| {
            r["event"] == "certificate"
                && r["subject"] == "spiffe://cluster.local/ns/shop/sa/client"
        };
        Ok(audit(lab)?.into_iter().filter(fits).count())
    };
    eventually("it is renewed twice", Duration::from_secs(20), || {
        certificates(&lab).is_ok_and(|count| count >= 3)
    })
    .with_context(|| lab.nodes[0].log())?;
    assert!(
        echoes(&client, &at(&server, ECHO))?,
        "{}",
        lab.nodes[0].log()
    );
    drop(running);
    assert!(
        echoes(&client, &at(&server, ECHO))?,
        "{}",
        lab.nodes[0].log()
    );
    eventually(
        "the alarm, before it expires",
        Duration::from_secs(20),
        || {
            lab.nodes[0]
                .status()
                .is_ok_and(|status| status["problems"].to_string().contains("certificates: "))
        },
    )?;
    eventually("expired ones are refused", Duration::from_secs(30), || {
        echoes(&client, &at(&server, ECHO)).is_ok_and(|echoes| !echoes)
    })?;
    let _running = authority(&lab)?;
    eventually("new ones are taken", Duration::from_secs(60), || {
        echoes(&client, &at(&server, ECHO)).unwrap_or(false)
    })
    .with_context(|| lab.nodes[0].log())
}

fn enrolled(lab: &Lab, node: usize) -> Result<()> {
    eventually("its pods are enrolled", Duration::from_secs(60), || {
        lab.nodes[node].status().is_ok_and(|status| {
            let all = status["workloads"].as_array().cloned().unwrap_or_default();
            all.iter().all(|w| w["state"] == "enrolled")
                && status["problems"] == Value::Array(vec![])
        })
    })
    .with_context(|| lab.nodes[node].log())
}
