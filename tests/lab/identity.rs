//! Certificates: whose they are, how long they last, and who is turned away.

use std::time::{Duration, Instant};

use anyhow::Result;
use postern_tests::{Capture, Lab, binary, count_bytes, output, text};

use crate::kit::{ECHO, at, authorization, echoes, pair};

#[test]
fn the_wrong_identity_at_the_right_address_gets_nothing() -> Result<()> {
    let mut lab = Lab::new(2)?;
    // Node 2 believes the server to be another service account than node 1 does.
    lab.nodes[1].options.manifests = "elsewhere".into();
    lab.manifest_in("elsewhere", "none", "# nothing yet\n")?;
    for node in &mut lab.nodes {
        node.start()?;
    }
    let server = lab.pod_with(
        2,
        "server",
        postern_tests::PodOptions {
            mesh: None,
            wait: false,
            ..Default::default()
        },
    )?;
    let enrolled = server
        .manifest()
        .replace("{app: server", "{app: server, postern.dev/mesh: enabled");
    lab.manifest("pod-server", &enrolled)?;
    let impostor = enrolled.replace("serviceAccountName: server", "serviceAccountName: impostor");
    lab.manifest_in("elsewhere", "pod-server", &impostor)?;
    let client = lab.pod_with(
        1,
        "client",
        postern_tests::PodOptions {
            wait: false,
            ..Default::default()
        },
    )?;
    lab.manifest_in("elsewhere", "pod-client", &client.manifest())?;
    postern_tests::eventually("node 2 has enrolled it", Duration::from_secs(5), || {
        lab.nodes[1]
            .status()
            .is_ok_and(|s| s["workloads"][0]["state"] == "enrolled")
    })?;
    std::thread::sleep(Duration::from_millis(300));
    let echo = server.serve("echo", ECHO)?;
    let seen = client.dial(&at(&server, ECHO), &["--send", "SECRET"])?;
    assert_eq!(seen["end"], "ECONNRESET", "{seen}");
    assert!(!echo.output().contains("accept"));
    let record = lab.nodes[0].record("it is on record", |r| r["verdict"] == "failed")?;
    let end = record["end"].as_str().unwrap_or_default();
    assert!(
        end.contains("sa/impostor") && end.contains("not spiffe://cluster.local/ns/shop/sa/server"),
        "{record}"
    );
    Ok(())
}

#[test]
fn another_trust_domain_or_root_is_turned_away() -> Result<()> {
    let mut lab = Lab::new(2)?;
    lab.nodes[1].options.trust_domain = "other.example".into();
    for node in &mut lab.nodes {
        node.start()?;
    }
    let (client, server, echo) = pair(&mut lab)?;
    assert!(!echoes(&client, &at(&server, ECHO))?);
    lab.nodes[0].record("the domain is on record", |r| {
        r["end"]
            .as_str()
            .is_some_and(|e| e.contains("other.example"))
    })?;
    lab.make_root("foreign", "cluster.local")?;
    lab.nodes[1].stop()?;
    lab.nodes[1].options.trust_domain = "cluster.local".into();
    lab.nodes[1].options.root = "foreign".into();
    lab.nodes[1].start()?;
    assert!(!echoes(&client, &at(&server, ECHO))?);
    lab.nodes[0].record("the root is on record", |r| {
        r["end"]
            .as_str()
            .is_some_and(|e| e.contains("UnknownIssuer"))
    })?;
    assert!(!echo.output().contains("accept"), "{}", echo.output());
    Ok(())
}

/// The server's own checks, by a client that speaks HBONE without our agent.
#[test]
fn the_server_checks_authority_domain_and_policy() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server, _echo) = pair(&mut lab)?;
    let root = lab.path().join("root");
    let outside = postern_tests::PodOptions {
        mesh: Some(false),
        ..Default::default()
    };
    let outside = lab.pod_with(1, "outside", outside)?;
    let ask = |id: &str, authority: &str| -> Result<String> {
        let mut hbone = outside.command(binary("probe")?)?;
        hbone.args([
            "hbone",
            &format!("{}:15008", server.ip),
            "--authority",
            authority,
            "--id",
            id,
        ]);
        hbone.arg("--root").arg(&root);
        Ok(text(&output(&mut hbone)?.stdout).trim().to_owned())
    };
    let friend = "spiffe://cluster.local/ns/shop/sa/friend";
    let here = at(&server, ECHO);
    assert_eq!(ask(friend, &here)?, "200");
    for elsewhere in [
        "10.0.2.200:9000",
        "127.0.0.1:9000",
        "example.com:80",
        &at(&client, ECHO),
    ] {
        assert_eq!(ask(friend, elsewhere)?, "400", "{elsewhere}");
    }
    for port in [15001, 15006, 15008] {
        assert_eq!(ask(friend, &at(&server, port))?, "400", "{port}");
    }
    assert_eq!(ask(friend, &at(&server, 9999))?, "503");
    assert_eq!(
        ask("spiffe://other.example/ns/shop/sa/friend", &here)?,
        "401"
    );
    for no_identity in [
        "spiffe://cluster.local/friend",
        "https://cluster.local/ns/shop/sa/friend",
    ] {
        assert!(
            ask(no_identity, &here)?.starts_with("error"),
            "{no_identity}"
        );
    }
    lab.policy(
        "p",
        &authorization(
            "p",
            "{rules: [{from: [{source: {serviceAccounts: [client]}}]}]}",
        ),
    )?;
    lab.policies(1)?;
    assert_eq!(ask(friend, &here)?, "403");
    assert_eq!(
        ask("spiffe://cluster.local/ns/shop/sa/client", &here)?,
        "200"
    );
    Ok(())
}

#[test]
fn certificates_are_renewed_under_load() -> Result<()> {
    let mut lab = Lab::new(2)?;
    let files = lab.path().display().to_string();
    for node in &mut lab.nodes {
        node.options.more = format!(
            "identity: {{leafLifetime: 4s, nodeLifetime: 60s, rootCertificate: {files}/root.pem, rootKey: {files}/root.key}}\n"
        );
        node.start()?;
    }
    let (client, server, _echo) = pair(&mut lab)?;
    let mut stay = client.command(binary("probe")?)?;
    let stay = client.start("stay", stay.args(["stay", &at(&server, ECHO)]))?;
    stay.says("beat 000001")?;
    let capture = Capture::start(&lab.nodes[0], lab.path().join("wire.pcap"))?;
    let end = Instant::now() + Duration::from_secs(10);
    let mut good = 0;
    while Instant::now() < end {
        assert!(
            echoes(&client, &at(&server, ECHO))?,
            "after {good}: {}",
            lab.nodes[0].log()
        );
        good += 1;
    }
    let renewals = lab.nodes[0].log().matches("certificate renewed").count();
    assert!(
        renewals >= 3,
        "{renewals} renewals while {good} connections were made"
    );
    // New certificates are used: more handshakes than the first one.
    let hellos = postern_tests::tshark(
        &capture.stop()?,
        "tls.handshake.type == 1",
        &["frame.number"],
    )?;
    assert!(hellos.len() >= 3, "{hellos:?}");
    // And the connection that was there all the time has not been lost.
    assert!(!stay.output().contains("ended"), "{}", stay.output());
    Ok(())
}

#[test]
fn a_root_is_rotated_by_a_bundle_of_both() -> Result<()> {
    let mut lab = Lab::new(2)?;
    lab.make_root("next", "cluster.local")?;
    let files = lab.path().display().to_string();
    std::fs::create_dir(lab.path().join("bundle"))?;
    let dir = lab.path().to_owned();
    let pem = |name: &str| std::fs::read_to_string(dir.join(format!("{name}.pem")));
    std::fs::write(lab.path().join("bundle/roots.pem"), pem("root")?)?;
    let identity = |root: &str| {
        format!(
            "identity: {{bundle: {files}/bundle/roots.pem, rootCertificate: {files}/{root}.pem, rootKey: {files}/{root}.key}}\n"
        )
    };
    for node in &mut lab.nodes {
        node.options.more = identity("root");
        node.start()?;
    }
    let (client, server, _echo) = pair(&mut lab)?;
    assert!(echoes(&client, &at(&server, ECHO))?);
    // 1. The new root is trusted everywhere. The file is replaced as it stands.
    std::fs::write(
        lab.path().join("bundle/roots.pem"),
        pem("root")? + &pem("next")?,
    )?;
    for node in &lab.nodes {
        postern_tests::eventually("both roots are trusted", Duration::from_secs(5), || {
            node.status().is_ok_and(|s| s["roots"] == 3)
        })?;
    }
    // 2. Node by node it signs; in between one node has each.
    lab.nodes[1].stop()?;
    lab.nodes[1].options.more = identity("next");
    lab.nodes[1].start()?;
    assert!(
        echoes(&client, &at(&server, ECHO))?,
        "{}",
        lab.nodes[0].log()
    );
    lab.nodes[0].stop()?;
    lab.nodes[0].options.more = identity("next");
    lab.nodes[0].start()?;
    assert!(echoes(&client, &at(&server, ECHO))?);
    Ok(())
}

#[test]
fn keys_reach_neither_logs_nor_records() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server, _echo) = pair(&mut lab)?;
    assert!(echoes(&client, &at(&server, ECHO))?);
    let pem = std::fs::read_to_string(lab.path().join("root.key"))?;
    let secret = pem.lines().nth(1).unwrap_or("no key").as_bytes().to_owned();
    let entries = [
        "node1/agent.log",
        "node1/audit/audit-00000000000000000001.jsonl",
        "node2/agent.log",
        "node2/audit/audit-00000000000000000001.jsonl",
    ];
    for file in entries {
        let path = lab.path().join(file);
        assert_eq!(count_bytes(&path, &secret)?, 0, "{file}");
        assert_eq!(count_bytes(&path, b"PRIVATE KEY")?, 0, "{file}");
    }
    let pid = lab.nodes[0].agent_pid().unwrap_or_default();
    // Not dumpable: no core file; /proc shows it as owned by root with no access.
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    assert!(status.contains("CoreDumping:\t0"));
    Ok(())
}
