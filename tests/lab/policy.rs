//! Who gets in: PeerAuthentication and AuthorizationPolicy on live traffic.

use std::time::Duration;

use anyhow::Result;
use postern_tests::{Lab, PodOptions, Source, binary, eventually};

use crate::kit::{ECHO, at, authorization, echoes, pair, peer_authentication};

#[test]
fn a_denied_peer_is_reset_and_both_ends_record_why() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server, echo) = pair(&mut lab)?;
    let other = lab.pod(1, "other")?;
    lab.policy("only-client", &authorization(
        "only-client",
        "{selector: {matchLabels: {app: server}}, rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/client]}}]}]}",
    ))?;
    lab.policies(1)?;
    assert!(echoes(&client, &at(&server, ECHO))?);
    let before = echo.output().matches("accept").count();
    let seen = other.dial(&at(&server, ECHO), &["--send", "let me in"])?;
    assert_eq!(seen["end"], "ECONNRESET", "{seen}");
    assert_eq!(echo.output().matches("accept").count(), before);
    let denial = lab.nodes[1].record("the destination records it", |r| r["verdict"] == "deny")?;
    assert_eq!(denial["policy"]["name"], "only-client");
    assert_eq!(
        denial["source"]["identity"],
        "spiffe://cluster.local/ns/shop/sa/other"
    );
    assert_eq!(denial["source"]["pod"], "other");
    let refusal = lab.nodes[0].record("so does the source", |r| r["verdict"] == "deny")?;
    assert!(
        refusal["source"]["process"]["exe"]
            .as_str()
            .is_some_and(|e| e.ends_with("/probe")),
        "{refusal}"
    );
    let allowed = lab.nodes[1].record("and what was allowed", |r| r["verdict"] == "allow")?;
    assert_eq!(allowed["policy"]["name"], "only-client");
    assert_eq!(allowed["policy"]["rule"], 0);
    Ok(())
}

#[test]
fn on_one_node_there_is_no_tls_and_the_same_policy() -> Result<()> {
    let mut lab = Lab::started()?;
    let server = lab.pod(2, "server")?;
    let (friend, other) = (lab.pod(2, "friend")?, lab.pod(2, "other")?);
    let _echo = server.serve("echo", ECHO)?;
    lab.policy("p", &authorization("p", "{action: DENY, rules: [{from: [{source: {serviceAccounts: [other]}}], to: [{operation: {ports: ['9000']}}]}]}"))?;
    lab.policies(1)?;
    assert!(echoes(&friend, &at(&server, ECHO))?);
    assert!(!echoes(&other, &at(&server, ECHO))?);
    let record = lab.nodes[1].record("allowed", |r| r["verdict"] == "allow")?;
    assert_eq!(record["transport"], "local");
    assert!(record["tls"].is_null());
    assert_eq!(
        record["source"]["identity"],
        "spiffe://cluster.local/ns/shop/sa/friend"
    );
    assert_eq!(
        record["destination"]["identity"],
        "spiffe://cluster.local/ns/shop/sa/server"
    );
    let denial = lab.nodes[1].record("denied", |r| r["verdict"] == "deny")?;
    assert_eq!(
        (&denial["policy"]["name"], &denial["policy"]["rule"]),
        (&"p".into(), &0.into())
    );
    Ok(())
}

#[test]
fn plaintext_is_judged_by_peer_authentication() -> Result<()> {
    let mut lab = Lab::started()?;
    let server = lab.pod(2, "server")?;
    let inside = lab.pod(1, "inside")?;
    let outside = lab.pod_with(
        1,
        "outside",
        PodOptions {
            mesh: Some(false),
            ..PodOptions::default()
        },
    )?;
    let (_echo, _second) = (server.serve("echo", ECHO)?, server.serve("echo", 9001)?);
    let reaches = |port| echoes(&outside, &at(&server, port));
    // Without any policy: both.
    assert!(reaches(ECHO)?);
    lab.policy(
        "mesh",
        &peer_authentication("mesh", "istio-system", "{mtls: {mode: STRICT}}"),
    )?;
    lab.policies(1)?;
    assert!(!reaches(ECHO)?);
    assert!(echoes(&inside, &at(&server, ECHO))?);
    let denial = lab.nodes[1].record("the policy is named", |r| r["verdict"] == "deny")?;
    assert_eq!(denial["policy"]["name"], "mesh");
    assert_eq!(denial["transport"], "plaintext");
    lab.policy(
        "namespace",
        &peer_authentication("namespace", "shop", "{mtls: {mode: PERMISSIVE}}"),
    )?;
    lab.policies(2)?;
    assert!(reaches(ECHO)?);
    let by_port = "{selector: {matchLabels: {app: server}}, mtls: {mode: STRICT}, portLevelMtls: {9001: {mode: DISABLE}}}";
    lab.policy(
        "workload",
        &peer_authentication("workload", "shop", by_port),
    )?;
    lab.policies(3)?;
    assert!(!reaches(ECHO)?);
    assert!(reaches(9001)?);
    Ok(())
}

#[test]
fn the_kubelets_probes_pass_under_strict_and_others_do_not() -> Result<()> {
    let mut lab = Lab::started()?;
    let server = lab.pod(2, "server")?;
    let _nginx = server.nginx(8080, "healthy")?;
    lab.policy(
        "mesh",
        &peer_authentication("mesh", "istio-system", "{mtls: {mode: STRICT}}"),
    )?;
    lab.policy("nobody", &authorization("nobody", "{}"))?;
    lab.policies(2)?;
    let probe = |node: usize, host: &str| -> Result<bool> {
        let mut curl = lab.nodes[node].command("curl")?;
        let url = format!("http://{host}:8080/");
        Ok(curl
            .args(["-gsS", "-m", "5", &url])
            .output()?
            .status
            .success())
    };
    assert!(
        probe(1, &server.ip)?,
        "the pod's own node, IPv4: {}",
        lab.nodes[1].log()
    );
    assert!(probe(1, &format!("[{}]", server.ip6))?, "IPv6");
    assert!(!probe(0, &server.ip)?, "another node");
    let record = lab.nodes[1].record("it is on record", |r| r["transport"] == "probe")?;
    assert_eq!(record["verdict"], "allow");
    // A host-network pod of the same node is not the kubelet.
    let host = PodOptions {
        mesh: Some(false),
        host_network: true,
        ..PodOptions::default()
    };
    let host = lab.pod_with(2, "host", host)?;
    eventually("the host pod is known", Duration::from_secs(5), || {
        lab.nodes[1]
            .status()
            .is_ok_and(|s| s["workloads"].as_array().is_some_and(|w| w.len() == 2))
    })?;
    let (code, body) = host.curl(&[&format!("http://{}:8080/", server.ip)])?;
    assert_ne!(code, 0, "{body}");
    Ok(())
}

#[test]
fn a_change_of_policy_ends_what_it_no_longer_allows() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server, _echo) = pair(&mut lab)?;
    let local = lab.pod(2, "local")?;
    let other = lab.pod(1, "other")?;
    let mut stays = Vec::new();
    for pod in [&client, &local, &other] {
        let mut stay = pod.command(binary("probe")?)?;
        let stay = pod.start("stay", stay.args(["stay", &at(&server, ECHO)]))?;
        stay.says("beat 000001")?;
        stays.push(stay);
    }
    lab.policy(
        "p",
        &authorization(
            "p",
            "{action: DENY, rules: [{from: [{source: {serviceAccounts: [client, local]}}]}]}",
        ),
    )?;
    for stay in &stays[..2] {
        stay.says("ended: ECONNRESET")?;
    }
    std::thread::sleep(Duration::from_millis(300));
    assert!(
        !stays[2].output().contains("ended"),
        "{}",
        stays[2].output()
    );
    let record = lab.nodes[1].record("the policy is named", |r| {
        r["verdict"] == "deny" && r["bytes"]["sent"].as_u64() > Some(0)
    })?;
    assert_eq!(record["policy"]["name"], "p");
    Ok(())
}

#[test]
fn a_bad_file_leaves_the_last_good_state() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server, _echo) = pair(&mut lab)?;
    lab.policy(
        "p",
        &authorization(
            "p",
            "{action: DENY, rules: [{from: [{source: {serviceAccounts: [client]}}]}]}",
        ),
    )?;
    lab.policies(1)?;
    assert!(!echoes(&client, &at(&server, ECHO))?);
    lab.policy("q", "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: q, namespace: shop}\nspec:\n  rules:\n  - to: [{operation: {metods: [GET]}}]\n")?;
    let wrong = |lab: &Lab| -> Option<String> {
        let status = lab.nodes[1].status().ok()?;
        Some(status["problems"].as_array()?.first()?.as_str()?.to_owned())
    };
    eventually(
        "the status says what is wrong",
        Duration::from_secs(5),
        || wrong(&lab).is_some(),
    )?;
    let problem = wrong(&lab).unwrap_or_default();
    let cluster = lab.nodes[1].source() == Source::Kubernetes;
    let place = if cluster { "shop/q" } else { "q.yaml:6" };
    assert!(
        problem.contains(place) && problem.contains("metods"),
        "{problem}"
    );
    assert!(!echoes(&client, &at(&server, ECHO))?);
    if cluster {
        // Of objects each is refused alone: the other is changed, and what the wrong one
        // guards stays denied.
        lab.remove_policy("p")?;
        std::thread::sleep(Duration::from_millis(500));
        assert!(!echoes(&client, &at(&server, ECHO))?);
        lab.remove_policy("q")?;
        eventually("all is well again", Duration::from_secs(5), || {
            wrong(&lab).is_none() && echoes(&client, &at(&server, ECHO)).unwrap_or(false)
        })?;
        return Ok(());
    }
    lab.manifest("broken", "apiVersion: v1\nkind: Pod\nspec: [\n")?;
    std::thread::sleep(Duration::from_millis(300));
    lab.remove_policy("q")?;
    lab.remove_policy("p")?;
    lab.policies(0)?;
    assert!(
        echoes(&client, &at(&server, ECHO))?,
        "the old table still stands"
    );
    assert!(wrong(&lab).is_some_and(|p| p.contains("broken.yaml")));
    lab.remove_manifest("broken")?;
    eventually("all is well again", Duration::from_secs(5), || {
        wrong(&lab).is_none()
    })?;
    assert!(
        lab.nodes[1]
            .metrics()?
            .contains("postern_reload_errors_total{name=\"policies\"}")
    );
    Ok(())
}
