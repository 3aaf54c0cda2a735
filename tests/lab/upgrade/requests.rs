//! Clients that keep their connections, and whose requests are read.

use std::time::Duration;

use anyhow::{Context as _, Result};
use postern_tests::{Lab, Running, eventually};

use super::{CALLS, LONG_DRAIN, WEB, ended, upgrade};
use crate::{
    kit::{at, authorization},
    requests::{PYTHON, script},
};

/// Whole lines that it has said.
fn said(client: &Running) -> Vec<String> {
    let output = client.output();
    let whole = output.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().map(str::to_owned).collect()
}

fn says_more(client: &Running, count: usize) -> Result<()> {
    let before = said(client).len();
    eventually("it says more", Duration::from_secs(30), || {
        said(client).len() >= before + count
    })
    .with_context(|| client.output())
}

/// The old agent tells them to leave, and has nothing left long before its drain is over.
#[test]
fn clients_that_keep_connections_are_sent_to_the_next_agent() -> Result<()> {
    let mut lab = Lab::new(2)?;
    for node in &mut lab.nodes {
        node.options.more = LONG_DRAIN.into();
        node.start()?;
    }
    let (server, client) = (lab.pod(2, "server")?, lab.pod(1, "client")?);
    let _nginx = server.nginx(WEB, "page")?;
    let grpc = script(
        &lab,
        "grpc_peer.py",
        include_str!("../requests/grpc_peer.py"),
    )?;
    let mut python = server.command(PYTHON)?;
    let calls = server.start("grpc", python.args([&grpc, "serve", &CALLS.to_string()]))?;
    calls.says("listening")?;
    let paths = "{rules: [{to: [{operation: {paths: ['/app/*', '/a.B/*']}}]}]}";
    lab.policy("paths", &authorization("paths", paths))?;
    lab.policies(1)?;

    let mut curl = client.command("curl")?;
    curl.args(["-sS", "--noproxy", "*", "--rate", "20/s", "-o", "/dev/null"]);
    curl.args(["-w", "%{stderr}%{http_code} %{num_connects}\n"]);
    let web = client.start(
        "curl",
        curl.arg(format!("http://{}/app/[1-100000]", at(&server, WEB))),
    )?;
    let mut python = client.command(PYTHON)?;
    let address = at(&server, CALLS);
    let steady = client.start(
        "steady",
        python.args([&grpc, "steady", &address, "/a.B/Call"]),
    )?;
    says_more(&web, 5)?;
    says_more(&steady, 5)?;
    for upgrades in 1..=2 {
        let mut old = upgrade(&mut lab.nodes[1])?;
        ended(&mut old).with_context(|| lab.nodes[1].log())?;
        says_more(&web, 5)?;
        says_more(&steady, 5)?;
        // Nothing failed, and each client came once to each agent.
        let (asked, called) = (said(&web), said(&steady));
        let connects = asked.iter().map(|line| match line.split_once(' ') {
            Some(("200", connects)) => connects.parse().unwrap_or(usize::MAX),
            _ => panic!("{asked:?}"),
        });
        assert_eq!(connects.sum::<usize>(), upgrades + 1, "{asked:?}");
        let failed: Vec<&String> = called.iter().filter(|line| *line != "OK ").collect();
        assert!(failed.is_empty(), "{failed:?}\n{}", lab.nodes[1].log());
    }
    Ok(())
}
