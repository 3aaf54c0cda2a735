//! What operators see: configuration, status, metrics, records, events.

use anyhow::Result;
use postern_tests::{Lab, Source, output, text};
use serde_json::Value;

use crate::kit::{ECHO, at, echoes, is_connection, pair};

#[test]
fn a_wrong_configuration_is_refused_with_code_2() -> Result<()> {
    let mut lab = Lab::new(1)?;
    let node = &mut lab.nodes[0];
    for (more, expected) in [
        ("enrol: {defualt: enabled}\n", "defualt"),
        ("transport: {idleTimeout: never}\n", "transport.idleTimeout"),
        ("identity: {rootKey: /nowhere}\n", "rootCertificate"),
    ] {
        node.options.more = more.into();
        assert_eq!(node.start_refused()?, Some(2), "{more}");
        assert!(node.log().contains(expected), "{more}: {}", node.log());
    }
    node.options.more.clear();
    if node.source() == Source::Kubernetes {
        // A cluster has no such kind, and one wrong object holds up no agent (`policy`).
        return Ok(());
    }
    lab.policy("bad", "apiVersion: security.istio.io/v1\nkind: RequestAuthorization\nmetadata: {name: r, namespace: shop}\n")?;
    assert_eq!(lab.nodes[0].start_refused()?, Some(2));
    let log = lab.nodes[0].log();
    assert!(log.contains("RequestAuthorization is no policy"), "{log}");
    Ok(())
}

#[test]
fn a_record_joins_process_identities_policy_and_bytes() -> Result<()> {
    let mut lab = Lab::started()?;
    let web = lab.pod(2, "web")?;
    let client = lab.pod(1, "client")?;
    let _nginx = web.nginx(8080, "page")?;
    assert_eq!(client.curl(&[&format!("http://{}:8080/", web.ip)])?.0, 0);
    let source = lab.nodes[0].record("the source's", is_connection)?;
    assert_eq!(source["node"], "node1");
    assert_eq!(source["reporter"], "source");
    assert_eq!(source["source"]["process"]["comm"], "curl");
    assert!(
        source["source"]["process"]["exe"]
            .as_str()
            .is_some_and(|exe| exe.ends_with("/curl"))
    );
    let cgroup = client.cgroup().display().to_string();
    let recorded = source["source"]["process"]["cgroup"]
        .as_str()
        .unwrap_or("none");
    assert!(cgroup.ends_with(recorded), "{recorded} in {cgroup}");
    let destination = lab.nodes[1].record("the destination's", is_connection)?;
    for record in [&source, &destination] {
        assert_eq!(record["transport"], "hbone");
        assert_eq!(record["verdict"], "allow");
        assert_eq!(record["dialled"], format!("{}:8080", web.ip));
        assert_eq!(
            record["source"]["identity"],
            "spiffe://cluster.local/ns/shop/sa/client"
        );
        assert_eq!(record["source"]["pod"], "client");
        assert_eq!(
            record["destination"]["identity"],
            "spiffe://cluster.local/ns/shop/sa/web"
        );
        assert_eq!(record["destination"]["pod"], "web");
        assert_eq!(record["tls"]["version"], "TLSv1.3");
        assert_eq!(record["tls"]["group"], "X25519MLKEM768");
        assert_eq!(record["end"], "closed");
    }
    assert_eq!(source["bytes"], destination["bytes"]);
    assert!(source["bytes"]["sent"].as_u64() > Some(50), "{source}");
    assert!(source["bytes"]["received"].as_u64() > Some(100), "{source}");
    Ok(())
}

#[test]
fn what_the_kernel_saw_stands_in_the_connections_record() -> Result<()> {
    let mut lab = Lab::started()?;
    let web = lab.pod(2, "web")?;
    let client = lab.pod(1, "client")?;
    let _nginx = web.nginx(8080, "page")?;
    assert_eq!(client.curl(&[&format!("http://{}:8080/", web.ip)])?.0, 0);
    let source = lab.nodes[0].record("the source's", is_connection)?;
    let destination = lab.nodes[1].record("the destination's", is_connection)?;
    let dialler = &source["source"];
    assert_eq!(
        dialler["socket"]["sent"], source["bytes"]["sent"],
        "{source}"
    );
    assert_eq!(dialler["socket"]["received"], source["bytes"]["received"]);
    assert!(
        dialler["process"]["argv"]
            .as_str()
            .is_some_and(|a| a.len() == 16)
    );
    assert!(dialler["process"]["parent"]["pid"].is_u64(), "{source}");
    let server = &destination["destination"];
    assert_eq!(server["process"]["comm"], "nginx", "{destination}");
    assert_eq!(server["socket"]["received"], destination["bytes"]["sent"]);
    assert_eq!(server["socket"]["sent"], destination["bytes"]["received"]);
    let certificate = |r: &Value| r["tls"]["peerCertificate"].as_str().map(str::len);
    assert_eq!(
        (certificate(&source), certificate(&destination)),
        (Some(64), Some(64))
    );
    assert_eq!(
        (&source["fault"], &destination["fault"]),
        (&"none".into(), &"none".into())
    );
    // Told once, and as no flow beside it.
    for node in &lab.nodes {
        let records = node.audit()?;
        assert_eq!(records.iter().filter(|r| is_connection(r)).count(), 1);
        let closed = |r: &&Value| r["event"] == "closed";
        assert_eq!(records.iter().filter(closed).count(), 0, "{records:?}");
    }
    Ok(())
}

#[test]
fn processes_and_flows_of_enrolled_pods_are_recorded() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server, _echo) = pair(&mut lab)?;
    let outside = postern_tests::PodOptions {
        mesh: Some(false),
        ..Default::default()
    };
    let outside = lab.pod_with(1, "outside", outside)?;
    assert_eq!(outside.curl(&["-V"])?.0, 0);
    assert_eq!(client.curl(&["-V"])?.0, 0);
    assert!(echoes(&client, &at(&server, ECHO))?);
    let event = |r: &Value, name: &str| r["kind"] == "process" && r["event"] == name;
    let exec = lab.nodes[0].record("an exec", |r| {
        event(r, "exec")
            && r["process"]["exe"]
                .as_str()
                .is_some_and(|p| p.ends_with("curl"))
    })?;
    assert_eq!(exec["pod"], "client");
    let pid = &exec["process"]["pid"];
    let exit = lab.nodes[0].record("its exit", |r| {
        event(r, "exit") && r["process"]["pid"] == *pid
    })?;
    assert_eq!(exit["code"], 0);
    assert_eq!(exit["process"]["argv"], exec["process"]["argv"]);
    lab.nodes[1].record("the server listens", |r| {
        let local = r["local"].as_str().unwrap_or_default();
        r["kind"] == "flow" && r["event"] == "listen" && local.ends_with(&format!(":{ECHO}"))
    })?;
    // Where nobody listens, the destination's agent cannot deliver.
    let refused = client.dial(&at(&server, 1), &[])?;
    assert_eq!(refused["end"], "ECONNRESET", "{refused}");
    let failed = lab.nodes[1].record("it could not be delivered", |r| {
        is_connection(r) && r["verdict"] == "failed"
    })?;
    assert_eq!(failed["fault"], "destination");
    // Out of the mesh nobody carries it, and the kernel says how it ended.
    let nobody = client.dial(&format!("{}:9", outside.ip), &[])?;
    assert_eq!(nobody["connect"], "ECONNREFUSED");
    let flow = lab.nodes[0].record("the failed connect", |r| {
        r["kind"] == "flow" && r["event"] == "failed"
    })?;
    assert_eq!(flow["socket"]["errno"], "ECONNREFUSED", "{flow}");
    assert_eq!(flow["process"]["comm"], "probe");
    assert_eq!(flow["remote"], format!("{}:9", outside.ip));
    assert!(!lab.nodes[0].audit()?.iter().any(|r| r["pod"] == "outside"));
    Ok(())
}

#[test]
fn metrics_have_istios_names_and_labels() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server, _echo) = pair(&mut lab)?;
    assert!(echoes(&client, &at(&server, ECHO))?);
    lab.nodes[1].record("it has ended", is_connection)?;
    for (node, reporter) in [(0, "source"), (1, "destination")] {
        let metrics = lab.nodes[node].metrics()?;
        for name in [
            "connections_opened_total",
            "connections_closed_total",
            "sent_bytes_total",
            "received_bytes_total",
        ] {
            let line = metrics
                .lines()
                .find(|l| l.starts_with(&format!("istio_tcp_{name}{{")));
            let line = line.unwrap_or_else(|| panic!("{name} is missing:\n{metrics}"));
            for label in [
                &format!("reporter=\"{reporter}\"") as &str,
                "source_principal=\"spiffe://cluster.local/ns/shop/sa/client\"",
                "destination_workload=\"server\"",
                "destination_workload_namespace=\"shop\"",
                "connection_security_policy=\"mutual_tls\"",
                "response_flags=\"-\"",
            ] {
                assert!(line.contains(label), "{label}: {line}");
            }
        }
        for own in [
            "postern_tls_handshakes_total",
            "postern_map_entries",
            "postern_kernel_total{name=\"lost_exec_events\"} 0",
            "postern_tunnels",
        ] {
            assert!(metrics.contains(own), "{own}");
        }
        assert!(metrics.ends_with("# EOF\n"));
    }
    Ok(())
}

#[test]
fn status_readiness_configuration_and_log_level() -> Result<()> {
    let mut lab = Lab::started()?;
    let _pod = lab.pod(1, "client")?;
    let node = &lab.nodes[0];
    let said = text(&output(&mut node.postern(&["status"])?)?.stdout);
    assert!(
        said.contains("shop/client") && said.contains("enrolled"),
        "{said}"
    );
    let ask = |arguments: &[&str]| -> Result<String> {
        let mut curl = node.command("curl")?;
        Ok(text(
            &output(
                curl.args(["-sS", "-m", "5", "-w", " %{http_code}"])
                    .args(arguments),
            )?
            .stdout,
        ))
    };
    assert!(ask(&["http://127.0.0.1:15021/ready"])?.ends_with("200"));
    assert!(ask(&["http://127.0.0.1:15000/config"])?.contains("\"trustDomain\":\"cluster.local\""));
    assert!(ask(&["-X", "POST", "http://127.0.0.1:15000/log?level=warn"])?.starts_with("warn"));
    assert!(ask(&["-X", "POST", "http://127.0.0.1:15000/log?level=a=b=c"])?.ends_with("400"));
    assert!(ask(&["http://127.0.0.1:15000/log"])?.starts_with("warn"));
    let doctor = text(&node.postern(&["doctor"])?.output()?.stdout);
    assert!(
        doctor.contains("cgroup v2 at") && !doctor.contains("FAIL"),
        "{doctor}"
    );
    Ok(())
}
