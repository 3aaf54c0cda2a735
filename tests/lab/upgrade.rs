//! An agent takes over from one that runs: docs/upgrade.md.

mod killed;
mod requests;

use std::{
    io,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::Signal;
use postern_tests::{Lab, Node, Pod, PodOptions, Running, binary, eventually, output};
use serde_json::{Value, json};

use crate::{
    audit::verify,
    kit::{ECHO, at, echoes, is_connection, pair},
    requests::{PYTHON, script},
};

const PODS: usize = 50;
const UPGRADES: usize = 10;
/// Milliseconds between two requests of a pod, on new connections and on a kept one.
const EVERY: &str = "200";
const WEB: u16 = 8080;
const CALLS: u16 = 50051;
const SOCKET: u16 = 8081;
const LONG_DRAIN: &str = "drain: {timeout: 900s}\n";

/// Requests from a pod to an address, until `until` is there.
fn load(pod: &Pod, to: &str, until: &Path, more: &[&str]) -> Result<Running> {
    let mut probe = pod.command(binary("probe")?)?;
    probe.args(["load", to, "--until"]).arg(until);
    pod.start("load", probe.args(more))
}

/// What a load has counted, once it has ended.
fn counted(mut load: Running) -> Result<Value> {
    eventually("a load ends", Duration::from_secs(60), || {
        load.child.try_wait().is_ok_and(|status| status.is_some())
    })?;
    let said = load.output();
    serde_json::from_str(&said).with_context(|| said)
}

/// A new agent beside the one that runs; then the kubelet stops that one.
fn upgrade(node: &mut Node) -> Result<Running> {
    let old = node.start_beside()?;
    old.signal(Signal::SIGTERM)?;
    Ok(old)
}

fn ended(agent: &mut Running) -> Result<()> {
    eventually("an old agent ends", Duration::from_secs(60), || {
        agent.child.try_wait().is_ok_and(|status| status.is_some())
    })?;
    let status = agent.child.wait()?;
    if !status.success() {
        bail!("an old agent ended with {status}");
    }
    Ok(())
}

/// How connections ended that did not end in order.
fn broken(lab: &Lab) -> String {
    let all = lab
        .nodes
        .iter()
        .flat_map(|node| node.audit().unwrap_or_default());
    let ends = all.filter(|r| is_connection(r) && r["end"] != "closed");
    let ends = ends.map(|r| {
        format!(
            "{} {} {}: {}",
            r["node"], r["time"], r["reporter"], r["end"]
        )
    });
    ends.collect::<Vec<_>>().join("\n")
}

fn is_gap(record: &Value) -> bool {
    record["kind"] == "gap"
}

/// The log is a whole chain, lacks nothing, and has each connection to a port once, by who
/// told it.
fn log_is_whole(node: &Node, reporter: &str, port: u16, connections: u64) -> Result<()> {
    let to = format!(":{port}");
    let told = |record: &Value| {
        let dialled = record["dialled"].as_str().is_some_and(|d| d.ends_with(&to));
        is_connection(record) && record["reporter"] == reporter && dialled
    };
    let count = || {
        let all = node.audit().unwrap_or_default();
        all.iter().filter(|record| told(record)).count() as u64
    };
    let _all = eventually("all are told", Duration::from_secs(20), || {
        count() >= connections
    });
    let name = &node.name;
    assert_eq!(count(), connections, "{name} {reporter} {port}: each once");
    let gaps: Vec<Value> = node.audit()?.into_iter().filter(is_gap).collect();
    assert!(gaps.is_empty(), "{name}: {gaps:?}");
    let (code, said) = verify(&node.audit_path(), &[])?;
    assert_eq!(code, Some(0), "{said}");
    Ok(())
}

#[test]
fn ten_upgrades_under_load_and_nothing_fails() -> Result<()> {
    let mut lab = Lab::new(2)?;
    for node in &mut lab.nodes {
        node.options.more = LONG_DRAIN.into();
        node.start()?;
    }
    let options = PodOptions {
        wait: false,
        ..PodOptions::default()
    };
    let mut pods: Vec<Pod> = Vec::new();
    for number in 0..PODS {
        pods.push(lab.pod_with(1 + number % 2, &format!("pod{number}"), options.clone())?);
    }
    pods.iter().try_for_each(|pod| lab.known(pod))?;
    let _servers: Vec<Running> = pods
        .iter()
        .map(|pod| pod.serve("echo", ECHO))
        .collect::<Result<_>>()?;
    // What lasts over all upgrades.
    let (client, server) = (&pods[0], &pods[1]);
    let minutes = std::env::var_os("POSTERN_LONG").is_some();
    let seconds: usize = if minutes { 600 } else { 25 };
    let size = seconds * 500 * 1024;
    let _nginx = server.nginx(WEB, &"x".repeat(size))?;
    let mut curl = client.command("curl")?;
    let url = format!("http://{}/", at(server, WEB));
    curl.args([
        "-sS",
        "--noproxy",
        "*",
        "--limit-rate",
        "500k",
        "-o",
        "/dev/null",
    ]);
    curl.args(["-w", "%{http_code} %{size_download} %{exitcode}\n", &url]);
    let mut download = client.start("download", &mut curl)?;
    let grpc = script(&lab, "grpc_peer.py", include_str!("requests/grpc_peer.py"))?;
    let mut python = server.command(PYTHON)?;
    let calls = server.start("grpc", python.args([&grpc, "serve", &CALLS.to_string()]))?;
    calls.says("listening")?;
    let words = (seconds * 20).to_string();
    let mut python = client.command(PYTHON)?;
    let address = at(server, CALLS);
    let stream = client.start(
        "slow",
        python.args([&grpc, "slow", &address, "/a.B/Stream", &words]),
    )?;
    stream.says("heard 1")?;
    let websocket = script(&lab, "websocket.py", include_str!("requests/websocket.py"))?;
    let mut python = server.command(PYTHON)?;
    let sockets = server.start(
        "ws",
        python.args([&websocket, "serve", &SOCKET.to_string()]),
    )?;
    sockets.says("listening")?;
    let mut python = client.command(PYTHON)?;
    let url = format!("ws://{}/", at(server, SOCKET));
    let talk = client.start("talk", python.args([&websocket, "talk", &url]))?;
    talk.says("heard word 1")?;

    let stop = lab.path().join("stop");
    let loads: Vec<Running> = (0..PODS)
        .map(|number| {
            let to = at(&pods[number ^ 1], ECHO);
            load(&pods[number], &to, &stop, &["--every", EVERY, "--keep"])
        })
        .collect::<Result<_>>()?;
    let mut olds = Vec::new();
    for number in 0..UPGRADES {
        olds.push(upgrade(&mut lab.nodes[number % 2])?);
        std::thread::sleep(Duration::from_millis(300));
        assert!(
            !talk.output().contains("cut"),
            "upgrade {number}: {}",
            talk.output()
        );
    }
    std::fs::write(&stop, "")?;
    let counts: Vec<Value> = loads.into_iter().map(counted).collect::<Result<_>>()?;
    let sum = |what: &str, of: usize| -> u64 {
        let own = counts
            .iter()
            .enumerate()
            .filter(|(number, _)| number % 2 == of);
        own.filter_map(|(_, count)| count[what].as_u64()).sum()
    };
    for (number, count) in counts.iter().enumerate() {
        assert_eq!(
            count["failed"],
            json!({}),
            "pod{number}: {count}\n{}",
            lab.nodes[0].log()
        );
    }
    let requests = sum("requests", 0) + sum("requests", 1);
    println!(
        "{requests} requests, slowest {:?} ms",
        counts.iter().map(|c| c["slowest"].as_u64()).max()
    );
    assert!(requests > 3_000, "{requests} requests");

    // Streams that are shorter than the drain's limit go on to their end.
    assert!(!talk.output().contains("cut"), "{}", talk.output());
    talk.signal(Signal::SIGTERM)?;
    stream.says_within("OK", Duration::from_secs(60 + seconds as u64))?;
    assert!(
        stream.output().contains(&format!("OK {words}")),
        "{}",
        stream.output()
    );
    eventually(
        "the download ends",
        Duration::from_secs(60 + seconds as u64),
        || {
            download
                .child
                .try_wait()
                .is_ok_and(|status| status.is_some())
        },
    )?;
    assert_eq!(download.output(), format!("200 {size} 0\n"));
    drop(talk);
    for old in &mut olds {
        ended(old).with_context(|| lab.nodes[0].log())?;
    }
    for of in 0..2 {
        let connections = sum("connections", of);
        log_is_whole(&lab.nodes[of], "source", ECHO, connections)?;
        log_is_whole(&lab.nodes[1 - of], "destination", ECHO, connections)?;
    }
    for port in [WEB, CALLS, SOCKET] {
        log_is_whole(&lab.nodes[0], "source", port, 1)?;
        log_is_whole(&lab.nodes[1], "destination", port, 1)?;
    }
    Ok(())
}

/// One whose maps have another shape, as those of another version may.
#[test]
fn an_agent_with_other_maps_takes_over_and_back() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server, _echo) = pair(&mut lab)?;
    let stop = lab.path().join("stop");
    let there = load(
        &client,
        &at(&server, ECHO),
        &stop,
        &["--every", "20", "--keep"],
    )?;
    let kernel = lab.nodes[0].options.kernel.clone();
    let mut olds = Vec::new();
    for number in 0..4 {
        let other = format!("{kernel}, maxConnections: 100000");
        for node in &mut lab.nodes {
            node.options.kernel = if number % 2 == 0 {
                other.clone()
            } else {
                kernel.clone()
            };
            olds.push(upgrade(node)?);
        }
    }
    std::fs::write(&stop, "")?;
    let count = counted(there)?;
    assert_eq!(count["failed"], json!({}), "{count}\n{}", broken(&lab));
    for old in &mut olds {
        ended(old)?;
    }
    let connections = count["connections"].as_u64().unwrap_or_default();
    log_is_whole(&lab.nodes[0], "source", ECHO, connections)?;
    log_is_whole(&lab.nodes[1], "destination", ECHO, connections)
}

/// Whether traffic comes to flow.
fn works(client: &Pod, to: &str, seconds: u64) -> Result<bool> {
    let flows = || echoes(client, to).unwrap_or(false);
    Ok(eventually("traffic flows", Duration::from_secs(seconds), flows).is_ok())
}

/// An agent of another make at the door.
struct Guest(socket2::Socket);

impl Guest {
    fn come(node: &Node, protocol: u32) -> Result<Self> {
        use socket2::{Domain, SockAddr, Socket, Type};
        let socket = Socket::new(Domain::UNIX, Type::from(nix::libc::SOCK_SEQPACKET), None)?;
        socket.set_read_timeout(Some(Duration::from_secs(20)))?;
        socket.connect(&SockAddr::unix(node.door())?)?;
        let guest = Self(socket);
        guest.say(&json!({
            "protocol": protocol, "purpose": "take", "program": "99.0.0", "node": node.name,
            "pin": node.pin(), "process": {"tgid": 1, "cgroup": 1},
        }))?;
        Ok(guest)
    }

    fn say(&self, message: &Value) -> Result<()> {
        self.0.send(message.to_string().as_bytes())?;
        Ok(())
    }

    /// Descriptors that come with a message are closed by the kernel.
    fn hear(&self) -> Result<Value> {
        let mut buffer = vec![0_u8; 128 << 10];
        // SAFETY: the buffer is as long as stated.
        let got = unsafe {
            nix::libc::recv(
                self.0.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                0,
            )
        };
        let length = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
        Ok(serde_json::from_slice(&buffer[..length])?)
    }
}

#[test]
fn one_that_is_not_understood_or_leaves_changes_nothing() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server, _echo) = pair(&mut lab)?;
    let stop = lab.path().join("stop");
    let there = load(
        &client,
        &at(&server, ECHO),
        &stop,
        &["--every", "20", "--keep"],
    )?;
    let node = &lab.nodes[0];
    let refused = Guest::come(node, 99)?.hear()?;
    let why = refused["refused"]["why"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    assert!(why.contains("version 2 of the protocol"), "{refused}");

    // It leaves before it commits.
    let guest = Guest::come(node, 2)?;
    assert_eq!(
        guest.hear()?["welcome"]["process"]["tgid"],
        node.agent_pid().unwrap_or_default()
    );
    let busy = Guest::come(node, 2)?.hear()?;
    assert!(
        busy["refused"]["why"]
            .as_str()
            .is_some_and(|w| w.contains("taking over")),
        "{busy}"
    );
    drop(guest);

    // It leaves when everything is in its hands: the agent takes it all back.
    let guest = loop {
        let guest = Guest::come(node, 2)?;
        if guest.hear()?.get("welcome").is_some() {
            break guest;
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    guest.say(&json!("commit"))?;
    while guest.hear()?.get("yielded").is_none() {}
    drop(guest);
    assert!(works(&client, &at(&server, ECHO), 20)?, "{}", node.log());
    assert!(node.status()?["ready"].as_bool().unwrap_or(false));
    std::fs::write(&stop, "")?;
    let count = counted(there)?;
    assert_eq!(
        count["failed"],
        json!({}),
        "{count}\n{}",
        lab.nodes[0].log()
    );
    // And the next one can still take over.
    let mut old = upgrade(&mut lab.nodes[0])?;
    ended(&mut old)?;
    let node = &lab.nodes[0];
    assert!(works(&client, &at(&server, ECHO), 20)?, "{}", node.log());
    let gaps: Vec<Value> = node.audit()?.into_iter().filter(is_gap).collect();
    assert!(gaps.is_empty(), "{gaps:?}");
    let (code, said) = verify(&node.audit_path(), &[])?;
    assert_eq!(code, Some(0), "{said}");
    Ok(())
}

#[test]
fn cleanup_with_an_agent_running_leaves_traffic_direct() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server, echo) = pair(&mut lab)?;
    assert!(echoes(&client, &at(&server, ECHO))?);
    let pins: Vec<PathBuf> = lab.nodes.iter().map(|node| node.pin().to_owned()).collect();
    for node in &lab.nodes {
        output(&mut node.postern(&["cleanup"])?)?;
    }
    assert!(pins.iter().all(|pin| !pin.exists()));
    eventually("traffic is direct", Duration::from_secs(5), || {
        echoes(&client, &at(&server, ECHO)).unwrap_or(false)
            && echo
                .output()
                .contains(&format!("accept=[::ffff:{}]", client.ip))
    })
}
