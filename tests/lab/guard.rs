//! From boot until the first agent is ready.

use anyhow::Result;
use postern_tests::{Lab, binary, eventually, output, text};

use crate::kit::{ECHO, at, at6, echoes, pair};

const SEND: [&str; 3] = ["--send", "ping", "--half-close"];

#[test]
fn before_the_first_agent_pods_are_refused() -> Result<()> {
    let mut lab = Lab::new(2)?;
    let (client, server, _echo) = pair(&mut lab)?;
    assert!(echoes(&client, &at(&server, ECHO))?, "nobody guards");
    for node in &lab.nodes {
        node.configure()?;
        let said = text(&output(&mut node.postern(&["guard"])?)?.stdout);
        assert!(said.contains("until an agent is ready"), "{said}");
        // Once more is as good as once.
        output(&mut node.postern(&["guard"])?)?;
    }
    for address in [
        at(&server, ECHO),
        at6(&server, ECHO),
        "198.51.100.1:80".into(),
    ] {
        let seen = client.dial(&address, &SEND)?;
        assert_eq!(seen["connect"], "EPERM", "{address}: {seen}");
    }
    // A pod's own business, and the node's: without that there would never be an agent.
    let _own = client.serve("echo", ECHO)?;
    assert!(echoes(&client, &format!("127.0.0.1:{ECHO}"))?);
    assert!(echoes(&client, &format!("[::1]:{ECHO}"))?);
    let mut node = lab.nodes[0].command(binary("probe")?)?;
    let node = output(node.args(["dial", &at(&server, ECHO)]).args(SEND))?;
    assert!(
        text(&node.stdout).contains("ping"),
        "{}",
        text(&node.stdout)
    );

    for node in &mut lab.nodes {
        node.start()?;
        for guard in ["postern_guard4", "postern_guard6"] {
            assert!(!node.pin().join("links").join(guard).exists());
        }
    }
    lab.known(&client)?;
    lab.known(&server)?;
    // The kernel lets go of a hook in its own time.
    eventually(
        "the mesh carries it",
        std::time::Duration::from_secs(5),
        || echoes(&client, &at(&server, ECHO)).unwrap_or(false),
    )?;
    lab.nodes[1].record("with its identity", |r| {
        r["source"]["identity"] == "spiffe://cluster.local/ns/shop/sa/client"
    })?;
    let said = text(&output(&mut lab.nodes[0].postern(&["guard"])?)?.stdout);
    assert!(said.contains("its hooks guard"), "{said}");
    assert!(echoes(&client, &at(&server, ECHO))?, "that changed nothing");
    Ok(())
}

#[test]
fn a_guard_without_an_agent_is_removed_by_cleanup() -> Result<()> {
    let mut lab = Lab::new(2)?;
    let (client, server, _echo) = pair(&mut lab)?;
    lab.nodes[0].configure()?;
    output(&mut lab.nodes[0].postern(&["guard"])?)?;
    assert!(!echoes(&client, &at(&server, ECHO))?);
    output(&mut lab.nodes[0].postern(&["cleanup"])?)?;
    assert!(!lab.nodes[0].pin().exists());
    eventually(
        "traffic is direct",
        std::time::Duration::from_secs(5),
        || echoes(&client, &at(&server, ECHO)).unwrap_or(false),
    )
}
