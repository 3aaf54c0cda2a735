//! Certificates of others than Postern: Istio's CA, and the SPIRE agent of a node. Both
//! are doubles in Python, which share nothing with the agent.

use std::{os::unix::fs::PermissionsExt as _, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result};
use postern_tests::{Lab, Running, eventually};

use crate::kit::at;

const PORT: u16 = 8080;
const CA: &str = "192.0.2.1";
const CA_PORT: u16 = 15012;

/// A double; it says when it listens.
fn double(lab: &Lab, command: &mut Command, name: &str, rest: &[&str]) -> Result<Running> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("lab/sources/{name}.py"));
    command.arg(script).args(rest);
    let running = Running::start(command, lab.path().join(format!("{name}.log")))?;
    running.says("listening")?;
    Ok(running)
}

fn istio(lab: &Lab) -> Result<Running> {
    let mut python = lab.nodes[0].command("/usr/bin/python3")?;
    let dir = lab.path().display().to_string();
    double(lab, &mut python, "istio", &[CA, &CA_PORT.to_string(), &dir])
}

fn by_istio(lab: &Lab) -> Result<String> {
    let dir = lab.path().display();
    std::fs::write(lab.path().join("token"), "of-the-agent")?;
    Ok(format!(
        "identity: {{istio: {{address: 'https://{CA}:{CA_PORT}', roots: {dir}/root.pem, \
         tokenFile: {dir}/token}}}}\n"
    ))
}

#[test]
fn agents_are_in_the_mesh_of_istios_ca_and_of_spire() -> Result<()> {
    let mut lab = Lab::new(3)?;
    let _istio = istio(&lab)?;
    let dir = lab.path().display().to_string();
    let socket = format!("{dir}/admin.sock");
    let mut python = lab.nodes[2].command("/usr/bin/python3")?;
    let spire = double(&lab, &mut python, "spire", &[&socket, &dir])?;
    let more = by_istio(&lab)?;
    for node in &mut lab.nodes[..2] {
        node.options.more.clone_from(&more);
        node.start()?;
    }
    lab.nodes[2].options.more = format!("identity: {{spire: {{socket: {socket}}}}}\n");
    lab.nodes[2].start()?;
    let client = lab.pod(1, "client")?;
    let (server, third) = (lab.pod(2, "server")?, lab.pod(3, "third")?);
    let (_page, _other) = (server.nginx(PORT, "page")?, third.nginx(PORT, "third")?);
    let url = |pod| format!("http://{}/", at(pod, PORT));
    // Between two that Istio's CA signs for, and to and from one of SPIRE's: the root is
    // the same, and it is one mesh.
    for (from, to, page) in [
        (&client, &server, "page"),
        (&client, &third, "third"),
        (&third, &server, "page"),
    ] {
        let seen = from.curl(&[&url(to)])?;
        assert_eq!(seen, (0, page.into()), "{}", lab.nodes[2].log());
    }
    let record = lab.nodes[1].record("the third's call", |r| {
        r["kind"] == "connection"
            && r["reporter"] == "destination"
            && r["source"]["identity"] == "spiffe://cluster.local/ns/shop/sa/third"
    })?;
    assert_eq!(record["transport"], "hbone");
    for (double, said) in [
        ("istio", "signed spiffe://cluster.local/ns/shop/sa/client"),
        ("istio", "signed spiffe://cluster.local/ns/shop/sa/server"),
        ("spire", "gave /ns/shop/sa/third"),
    ] {
        let log = std::fs::read_to_string(lab.path().join(format!("{double}.log")))?;
        assert!(log.contains(said), "{log}");
    }
    // Nodes hold no root, and no key of a workload is on a disk.
    for node in &lab.nodes {
        let state = lab.path().join(&node.name).join("state");
        assert!(!state.join("root.key").exists());
    }
    // SPIRE's agent goes: what there is goes on, and it is told.
    drop(spire);
    eventually("it is told", Duration::from_secs(20), || {
        lab.nodes[2]
            .status()
            .is_ok_and(|status| status["problems"].to_string().contains("SPIRE"))
    })
    .with_context(|| lab.nodes[2].log())?;
    assert_eq!(client.curl(&[&url(&third)])?, (0, "third".into()));
    // An archive of a node that runs, without what is secret there.
    let archive = lab.path().join("bug.tar.gz");
    let path = archive.display().to_string();
    let mut bugtool = lab.nodes[0].postern(&["bugtool", "--audit", "100", "--output", &path])?;
    let output = bugtool.output()?;
    assert!(output.status.success(), "{output:?}");
    let mode = std::fs::metadata(&archive)?.permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let all = Command::new("tar").args(["-xzOf"]).arg(&archive).output()?;
    let all = String::from_utf8_lossy(&all.stdout).into_owned();
    assert!(!all.contains("of-the-agent") && !all.contains("PRIVATE KEY"));
    for part in [
        "\"ready\":true",
        "postern_certificate_errors_total",
        "\"kind\":\"connection\"",
        "tokenFile",
    ] {
        assert!(all.contains(part), "no {part}");
    }
    Ok(())
}
