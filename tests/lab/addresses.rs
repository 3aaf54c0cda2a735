//! IPv4, IPv6, v4-mapped; services; and which address each side sees.

use std::collections::{HashMap, HashSet};

use anyhow::Result;
use postern_tests::{Lab, PodOptions};

use crate::kit::{ECHO, at, at6, echoes, pair};

#[test]
fn each_side_sees_the_address_that_it_means() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server, echo) = pair(&mut lab)?;
    let local = lab.pod(2, "local")?;
    let mapped = format!("[::ffff:{}]:{ECHO}", server.ip);
    for client in [&client, &local] {
        for (address, seen_as) in [
            (at(&server, ECHO), format!("[::ffff:{}]", client.ip)),
            (at6(&server, ECHO), format!("[{}]", client.ip6)),
            (mapped.clone(), format!("[::ffff:{}]", client.ip)),
        ] {
            let before = echo.output().len();
            let seen = client.dial(&address, &["--send", "x", "--half-close"])?;
            assert_eq!(seen["text"], "x", "{address} {seen}");
            // getpeername(2) at the client: the destination that it dialled.
            assert_eq!(seen["peer"], address.as_str());
            echo.says("end=eof")?;
            let log = echo.output()[before..].to_owned();
            // accept(2) and getpeername(2) at the server: the real client.
            assert!(
                log.contains(&format!("accept={seen_as}:")),
                "{address}: {log}"
            );
            assert!(
                log.contains(&format!("peername={seen_as}:")),
                "{address}: {log}"
            );
        }
    }
    Ok(())
}

#[test]
fn a_service_address_reaches_all_endpoints_evenly() -> Result<()> {
    let mut lab = Lab::started()?;
    let options = PodOptions {
        labels: "role: web".into(),
        ports: "{name: http, containerPort: 8081}".into(),
        ..PodOptions::default()
    };
    let (a, b) = (
        lab.pod_with(2, "a", options.clone())?,
        lab.pod_with(2, "b", options.clone())?,
    );
    let near = lab.pod_with(1, "near", options)?;
    let client = lab.pod(1, "client")?;
    let mut servers = Vec::new();
    for pod in [&a, &b, &near] {
        servers.push(pod.nginx(8081, &pod.name)?);
        servers.push(pod.nginx(8082, "other port")?);
    }
    let selector = "selector: {role: web}";
    let address = lab.service("web", 7, &format!(
        "{selector}, ports: [{{name: http, port: 80, targetPort: http}}, {{name: alt, port: 81, targetPort: 8082}}]"
    ))?;
    // The service may be known before all that is behind it.
    let mut known = HashSet::new();
    postern_tests::eventually(
        "all endpoints are known",
        std::time::Duration::from_secs(30),
        || {
            let answer = client.curl(&["-m", "5", &format!("http://{address}/")]);
            known.extend(answer.ok().filter(|(code, _)| *code == 0));
            known.len() == 3
        },
    )?;
    let mut counts: HashMap<String, usize> = HashMap::new();
    for _ in 0..30 {
        let (code, body) = client.curl(&[&format!("http://{address}/")])?;
        assert_eq!(code, 0, "{body}\n{}", lab.nodes[0].log());
        *counts.entry(body.trim().to_owned()).or_default() += 1;
    }
    assert_eq!(counts.len(), 3, "{counts:?}");
    assert!(counts.values().all(|n| *n == 10), "{counts:?}");
    let (_, body) = client.curl(&[&format!("http://{address}:81/")])?;
    assert_eq!(body.trim(), "other port");
    let (code, body) = client.curl(&["-g", "http://[fd00:96::7]/"])?;
    assert_eq!(code, 0, "{body}");
    let record = lab.nodes[0].record("the service is on record", |r| r["service"] == "shop/web")?;
    assert_eq!(record["dialled"], format!("{address}:80"));
    // Headless: clients dial the pods that the name resolves to.
    assert!(
        client
            .curl(&[&format!("http://{}:8081/", a.ip)])?
            .1
            .contains('a')
    );
    Ok(())
}

#[test]
fn an_unmeshed_destination_never_enters_the_agent() -> Result<()> {
    let mut lab = Lab::new(2)?;
    for node in &mut lab.nodes {
        // On demand its first connection would: that is how it is found out
        // (`discover`).
        node.options.kubernetes = ", discovery: all".into();
        node.start()?;
    }
    let client = lab.pod(1, "client")?;
    let outside = PodOptions {
        mesh: Some(false),
        ..PodOptions::default()
    };
    let server = lab.pod_with(2, "server", outside)?;
    let echo = server.serve("echo", ECHO)?;
    let seen = client.dial(&at(&server, ECHO), &["--send", "x", "--half-close"])?;
    // Its own socket, from its own address: nothing was steered.
    assert!(
        seen["local"]
            .as_str()
            .is_some_and(|l| l.starts_with(&client.ip)),
        "{seen}"
    );
    echo.says(&format!("accept=[::ffff:{}]", client.ip))?;
    assert!(
        lab.nodes[0]
            .metrics()?
            .contains("postern_kernel_total{name=\"steered\"} 0")
    );
    assert!(!lab.nodes[0].audit()?.iter().any(crate::kit::is_connection));
    let inside = lab.pod(2, "inside")?;
    let _echo = inside.serve("echo", ECHO)?;
    assert!(echoes(&client, &at(&inside, ECHO))?);
    assert!(
        lab.nodes[0]
            .metrics()?
            .contains("postern_kernel_total{name=\"steered\"} 1")
    );
    Ok(())
}

/// The agent's ports lead nowhere from inside: no recursion, no open proxy.
#[test]
fn a_stolen_dial_is_turned_away() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server, _echo) = pair(&mut lab)?;
    let own = client.ip.clone();
    for port in [15001, 15006, 15008] {
        for host in [
            "127.0.0.1",
            "[::1]",
            own.as_str(),
            server.ip.as_str(),
            "192.0.2.1",
        ] {
            let seen = client.dial(
                &format!("{host}:{port}"),
                &["--send", "GET / HTTP/1.1\r\n\r\n", "--limit", "15"],
            )?;
            let nothing = seen["connect"] != "ok" || seen["received"].as_u64() < Some(64);
            assert!(nothing && seen["end"] != "timeout", "{host}:{port} {seen}");
        }
    }
    assert!(echoes(&client, &at(&server, ECHO))?);
    Ok(())
}

#[test]
fn an_application_may_choose_its_source_address() -> Result<()> {
    let mut lab = Lab::started()?;
    let web = lab.pod(2, "web")?;
    let client = lab.pod(1, "client")?;
    let _nginx = web.nginx(8080, "page")?;
    let (code, body) = client.curl(&[
        "--interface",
        &client.ip,
        &format!("http://{}:8080/", web.ip),
    ])?;
    assert_eq!((code, body.trim()), (0, "page"), "{}", lab.nodes[0].log());
    Ok(())
}

/// A pod that may change its interfaces takes another's address there.
#[test]
fn a_stolen_address_gets_no_connections() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server, echo) = pair(&mut lab)?;
    let thief = lab.pod(2, "thief")?;
    let outside = lab.pod_with(
        1,
        "outside",
        PodOptions {
            mesh: Some(false),
            ..PodOptions::default()
        },
    )?;
    let booty = thief.serve("echo", ECHO)?;
    let mut steal = thief.command("sh")?;
    // Without answering ARP for it: what the wire does with that is not the question.
    steal.args([
        "-c",
        &format!(
            "echo 1 >/proc/sys/net/ipv4/conf/all/arp_ignore && ip address add {}/32 dev lo",
            server.ip
        ),
    ]);
    postern_tests::output(&mut steal)?;
    // The agent looks at interfaces every two seconds, and when pods come.
    let _another = lab.pod(2, "another")?;
    std::thread::sleep(std::time::Duration::from_millis(2500));
    assert!(echoes(&client, &at(&server, ECHO))?);
    assert!(echoes(&outside, &at(&server, ECHO))?);
    assert_eq!(echo.output().matches("accept").count(), 2);
    assert!(!booty.output().contains("accept"));
    Ok(())
}
