//! What goes around the agent is seen, and ended where that is asked for.

use std::time::Duration;

use anyhow::Result;
use postern_tests::{Lab, NodeOptions, Pod, PodOptions, Running, binary, eventually, output};
use serde_json::Value;

use crate::{
    kit::{ECHO, at, echoes, pair},
    requests::PYTHON,
};

fn started(more: &str) -> Result<Lab> {
    let mut lab = Lab::new(2)?;
    for node in &mut lab.nodes {
        node.options = NodeOptions {
            more: more.into(),
            ..NodeOptions::default()
        };
        node.start()?;
    }
    Ok(lab)
}

/// A pod that is outside of the mesh, and talks to the server.
fn late(lab: &mut Lab, server: &Pod) -> Result<(Pod, Running)> {
    let options = PodOptions {
        mesh: Some(false),
        ..PodOptions::default()
    };
    let late = lab.pod_with(1, "late", options)?;
    let mut stay = late.command(binary("probe")?)?;
    let stay = late.start("stay", stay.args(["stay", &at(server, ECHO)]))?;
    stay.says("beat 000001")?;
    Ok((late, stay))
}

fn enrol(lab: &Lab, pod: &Pod) -> Result<()> {
    lab.manifest(
        "pod-late",
        &pod.manifest().replace("mesh: disabled", "mesh: enabled"),
    )
}

fn is_bypass(record: &Value, event: &str) -> bool {
    record["kind"] == "bypass" && record["event"] == event
}

#[test]
fn a_connection_from_before_enrolment_is_recorded_as_a_bypass() -> Result<()> {
    let mut lab = Lab::started()?;
    let (_client, server, _echo) = pair(&mut lab)?;
    let (late, stay) = late(&mut lab, &server)?;
    enrol(&lab, &late)?;
    let open = lab.nodes[0].record("the bypass", |r| is_bypass(r, "open"))?;
    assert_eq!(open["remote"], at(&server, ECHO), "{open}");
    assert_eq!(open["direction"], "outbound");
    assert_eq!(open["identity"], "spiffe://cluster.local/ns/shop/sa/late");
    assert_eq!(open["cut"], false);
    assert!(!stay.output().contains("ended"), "it goes on");
    // New ones are carried, and no bypass.
    assert!(echoes(&late, &at(&server, ECHO))?);
    drop(stay);
    let closed = lab.nodes[0].record("its end", |r| is_bypass(r, "closed"))?;
    assert_eq!(closed["socket"]["cookie"], open["socket"]["cookie"]);
    assert!(closed["socket"]["sent"].as_u64() > Some(20), "{closed}");
    let all = lab.nodes[0].audit()?;
    assert_eq!(
        all.iter().filter(|r| r["kind"] == "bypass").count(),
        2,
        "{all:?}"
    );
    Ok(())
}

#[test]
fn a_bypass_is_ended_where_that_is_asked_for() -> Result<()> {
    let mut lab = started("enforce: {bypass: cut}\n")?;
    let (_client, server, _echo) = pair(&mut lab)?;
    let (late, stay) = late(&mut lab, &server)?;
    enrol(&lab, &late)?;
    let open = lab.nodes[0].record("the bypass", |r| is_bypass(r, "open"))?;
    assert_eq!(open["cut"], true, "{open}");
    eventually("it is ended", Duration::from_secs(5), || {
        stay.output().contains("ended: ")
    })?;
    assert!(echoes(&late, &at(&server, ECHO))?, "new ones are carried");
    Ok(())
}

#[test]
fn udp_and_raw_sockets_of_a_pod_are_bypasses() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server, _echo) = pair(&mut lab)?;
    let outside = lab.pod_with(
        2,
        "outside",
        PodOptions {
            mesh: Some(false),
            ..PodOptions::default()
        },
    )?;
    let send = |to: &Pod| -> Result<()> {
        let script = format!(
            "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
             for _ in range(5): s.sendto(b'x', ('{}', 5300))\n",
            to.ip
        );
        output(client.command(PYTHON)?.args(["-c", &script])).map(drop)
    };
    send(&server)?;
    send(&outside)?;
    let udp = |r: &Value, to: &Pod| r["protocol"] == "udp" && r["remote"] == at(to, 5300);
    let bypass = lab.nodes[0].record("the datagrams in the mesh", |r| udp(r, &server))?;
    assert_eq!(bypass["kind"], "bypass", "{bypass}");
    assert_eq!(bypass["process"]["comm"], "python3");
    let flow = lab.nodes[0].record("those out of it", |r| udp(r, &outside))?;
    assert_eq!(flow["kind"], "flow", "{flow}");
    let raw = "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_RAW, 1)\\
               .sendto(b'\\x08\\x00\\xf7\\xff' + bytes(4), ('127.0.0.1', 0))\n";
    output(client.command(PYTHON)?.args(["-c", raw]))?;
    let raw = lab.nodes[0].record("the raw socket", |r| r["protocol"] == "raw")?;
    assert_eq!(raw["kind"], "bypass", "{raw}");
    assert_eq!(raw["pod"], "client");
    let all = lab.nodes[0].audit()?;
    assert_eq!(
        all.iter().filter(|r| udp(r, &server)).count(),
        1,
        "a flow, once"
    );
    Ok(())
}
