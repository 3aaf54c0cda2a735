//! What the kernel saw of pods: sockets, datagrams, processes. Numbers are held against
//! what the programs themselves counted.

use std::time::Duration;

use anyhow::{Context as _, Result};
use postern::kernel::{Netns, diag};
use postern_tests::{Lab, Node, Pod, PodOptions, eventually, output, text};
use serde_json::Value;

use crate::kit::{ECHO, at, echoes, pair};

/// What a record tells of the kernel's events, as the events have it: a socket that
/// closed (also within a connection's record), a connect that failed before its SYN, and
/// so on.
fn told(record: &Value) -> Vec<Value> {
    let mut event = record.clone();
    event["task"] = record["process"].clone();
    let udp = record["protocol"] == "udp";
    let raw = record["protocol"] == "raw" || record["protocol"] == "packet";
    let name = match (record["kind"].as_str(), record["event"].as_str()) {
        (Some("flow" | "bypass"), Some("first")) if udp => "datagram",
        (Some("flow" | "bypass"), Some("first")) if raw => "raw",
        (Some("flow" | "bypass"), Some("listen")) => "listen",
        // One that sent a SYN has an address of its own.
        (Some("flow" | "bypass"), Some("failed")) if record["local"].is_null() => "failed",
        (Some("flow" | "bypass"), Some("failed" | "closed")) => {
            event["established"] = (record["event"] == "closed").into();
            "closed"
        }
        (Some("process"), Some("exec")) => "exec",
        (Some("process"), Some("exit")) => "exit",
        (Some("connection"), _) => return sockets(record),
        _ => return Vec::new(),
    };
    event["name"] = name.into();
    vec![event]
}

/// The applications' sockets of a connection.
fn sockets(record: &Value) -> Vec<Value> {
    let sides = ["source", "destination"].into_iter();
    let seen = sides.filter(|side| record[side]["socket"].is_object());
    let event = |side: &str| {
        let mut event = record[side].clone();
        event["name"] = "closed".into();
        event["task"] = record[side]["process"].clone();
        event["established"] = true.into();
        event["role"] = if side == "source" {
            "dialled"
        } else {
            "accepted"
        }
        .into();
        event["dialled"] = record["dialled"].clone();
        event
    };
    seen.map(event).collect()
}

fn event(node: &Node, name: &str, fits: impl Fn(&Value) -> bool) -> Result<Value> {
    let fits = |event: &Value| event["name"] == name && fits(event);
    let record = node.record(&format!("{name} event"), |r| told(r).iter().any(fits))?;
    told(&record).into_iter().find(fits).context("an event")
}

fn events(node: &Node, name: &str) -> Result<Vec<Value>> {
    let all = node.audit()?;
    let all = all.iter().flat_map(told);
    Ok(all.filter(|event| event["name"] == name).collect())
}

fn by(comm: &str) -> impl Fn(&Value) -> bool {
    let comm = comm.to_owned();
    move |event| event["task"]["comm"] == comm
}

/// Arguments as records tell them.
fn hashed(argv: &str) -> String {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, argv.as_bytes());
    let first = digest.as_ref().iter().take(8);
    first.map(|byte| format!("{byte:02x}")).collect()
}

/// A counter of the kernel programs, as the metrics have it.
fn counter(node: &Node, name: &str) -> Result<u64> {
    let metrics = node.metrics()?;
    let line = metrics
        .lines()
        .find_map(|l| l.strip_prefix(&format!("postern_kernel_total{{name=\"{name}\"}} ")));
    Ok(line.with_context(|| metrics.clone())?.trim().parse()?)
}

/// Whether this part of what is seen is to be had here: as the agent says itself.
fn lacks(node: &Node, without: &str) -> bool {
    node.log().contains(without)
}

/// A Python program in a pod; the process's name is `python3`.
fn python(pod: &Pod, program: &str) -> Result<String> {
    let mut command = pod.command("python3")?;
    Ok(text(&output(command.args(["-c", program]))?.stdout))
}

fn outside(lab: &mut Lab, node: usize) -> Result<Pod> {
    let options = PodOptions {
        mesh: Some(false),
        ..PodOptions::default()
    };
    lab.pod_with(node, "outside", options)
}

/// The only pod of its node, and its agent has forgotten it.
fn unknown(lab: &mut Lab, node: usize) -> Result<Pod> {
    let pod = outside(lab, node)?;
    lab.remove_manifest("pod-outside")?;
    eventually("it is not known", Duration::from_secs(5), || {
        let status = lab.nodes[node - 1].status();
        status.is_ok_and(|s| s["workloads"].as_array().is_some_and(Vec::is_empty))
    })?;
    Ok(pod)
}

#[test]
fn a_closed_socket_has_the_bytes_that_both_ends_counted() -> Result<()> {
    let mut lab = Lab::started()?;
    let server = lab.pod(2, "server")?;
    let client = lab.pod(1, "client")?;
    let sink = server.serve("sink", ECHO)?;
    const SENT: u64 = 3_000_000 / 8 * 8;
    let pattern = SENT.to_string();
    let address = at(&server, ECHO);
    let seen = client.dial(&address, &["--pattern", &pattern, "--half-close"])?;
    sink.says(&format!("end=eof bytes={SENT}"))?;
    let received = seen["received"].as_u64().context("received")?;

    let dialled = event(&lab.nodes[0], "closed", by("probe"))?;
    assert_eq!(dialled["role"], "dialled");
    assert_eq!(dialled["pod"], "client");
    assert_eq!(dialled["dialled"], address);
    let dialled = &dialled["socket"];
    assert_eq!(dialled["errno"], Value::Null);
    assert_eq!(
        (dialled["sent"].as_u64(), dialled["received"].as_u64()),
        (Some(SENT), Some(received))
    );
    assert!(dialled["srttUs"].as_u64() > Some(0), "{dialled}");
    let accepted = event(&lab.nodes[1], "closed", |r| r["role"] == "accepted")?;
    assert_eq!(accepted["pod"], "server");
    let socket = &accepted["socket"];
    assert_eq!(
        (socket["sent"].as_u64(), socket["received"].as_u64()),
        (Some(received), Some(SENT))
    );
    // The process that called accept, which asks for the peer's address, too.
    assert_eq!(accepted["task"]["comm"], "probe", "{accepted}");
    assert_eq!(accepted["task"]["pid"], sink.pid());
    let listen = event(&lab.nodes[1], "listen", by("probe"))?;
    assert!(
        listen["local"]
            .as_str()
            .is_some_and(|l| l.ends_with(":9000")),
        "{listen}"
    );
    assert_eq!(listen["task"]["pid"], sink.pid());

    // The agents' own sockets in the pods are not the pods'.
    for node in &lab.nodes {
        for record in node.audit()?.iter().flat_map(told) {
            assert_ne!(record["task"]["comm"], "postern", "{record}");
            assert_ne!(
                record["task"]["pid"],
                node.agent_pid().unwrap_or(0),
                "{record}"
            );
        }
        assert_eq!(events(node, "closed")?.len(), 1, "{:#?}", node.audit()?);
    }
    Ok(())
}

#[test]
fn connects_that_fail_are_told_once_with_their_errno() -> Result<()> {
    let mut lab = Lab::started()?;
    let client = lab.pod(1, "client")?;
    let outside = outside(&mut lab, 2)?;
    // Refused by the peer's kernel, after a SYN.
    let refused = format!("{}:9", outside.ip);
    assert_eq!(client.dial(&refused, &[])?["connect"], "ECONNREFUSED");
    let closed = event(&lab.nodes[0], "closed", |r| r["remote"] == refused)?;
    let socket = &closed["socket"];
    assert_eq!(socket["errno"], "ECONNREFUSED");
    assert_eq!(closed["established"], false);
    assert_eq!(closed["task"]["comm"], "probe");
    assert_eq!(
        (socket["sent"].as_u64(), socket["received"].as_u64()),
        (Some(0), Some(0))
    );
    // Without waiting: the error is fetched later, by SO_ERROR and by connect again.
    let twice = format!(
        "import socket,select\ns=socket.socket(); s.setblocking(False); a=('{}',9)\n\
         print(s.connect_ex(a)); select.select([],[s],[],5); print(s.connect_ex(a))",
        outside.ip
    );
    assert_eq!(python(&client, &twice)?, "115\n111\n");
    event(&lab.nodes[0], "closed", by("python3"))?;
    // Before a SYN: no route, and no port left.
    let before = "import socket,os\n\
         def go(s,a):\n  try: s.connect(a)\n  except OSError as e: print(e.errno)\n\
         s=socket.socket(socket.AF_INET6); go(s,('fe80::1',80,0,0))\n\
         s=socket.socket(); s.setsockopt(0,24,1); s.bind(('127.0.0.1',0)); go(s,('192.0.2.200',80))\n";
    let errors = python(&client, before)?;
    assert_eq!(errors, "22\n22\n");
    if !lacks(&lab.nodes[0], "of connects that fail before a SYN") {
        let failed = event(&lab.nodes[0], "failed", |r| r["remote"] == "192.0.2.200:80")?;
        assert_eq!(failed["socket"]["errno"], "EINVAL");
        assert_eq!(failed["task"]["comm"], "python3");
        let failed = event(&lab.nodes[0], "failed", |r| r["remote"] == "[fe80::1]:80")?;
        assert_eq!(failed["socket"]["errno"], "EINVAL");
        assert_eq!(events(&lab.nodes[0], "failed")?.len(), 2);
    }
    let told = events(&lab.nodes[0], "closed")?;
    assert_eq!(told.len(), 2, "{told:#?}");
    Ok(())
}

#[test]
fn what_the_hook_refuses_is_told_though_the_pod_is_not_known() -> Result<()> {
    let mut lab = Lab::started()?;
    let server = lab.pod(2, "server")?;
    let unknown = unknown(&mut lab, 1)?;
    let address = at(&server, ECHO);
    assert_eq!(unknown.dial(&address, &[])?["connect"], "EPERM");
    let failed = event(&lab.nodes[0], "failed", |r| r["remote"] == address)?;
    assert_eq!(failed["socket"]["errno"], "EPERM");
    assert_eq!(failed["task"]["comm"], "probe");
    assert_eq!(failed["pod"], Value::Null, "nobody knows it");
    // Not by the hook and by what returns from connect.
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(events(&lab.nodes[0], "failed")?.len(), 1);
    Ok(())
}

#[test]
fn a_udp_flow_is_told_once_for_many_packets() -> Result<()> {
    let mut lab = Lab::started()?;
    let client = lab.pod(1, "client")?;
    let server = lab.pod(2, "server")?;
    let program = format!(
        "import socket\n\
         s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\n\
         for i in range(50): s.sendto(b'x',('{ip}',5300))\n\
         s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.connect(('{ip}',5301))\n\
         for i in range(50):\n\
         \x20 try: s.send(b'x')\n\
         \x20 except ConnectionRefusedError: pass\n\
         s=socket.socket(socket.AF_INET6,socket.SOCK_DGRAM)\n\
         for i in range(50): s.sendto(b'x',('{ip6}',5302))\n\
         for i in range(50): s.sendto(b'x',('::ffff:{ip}',5303))\n\
         s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.sendto(b'x',('127.0.0.1',5304))\n\
         s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.connect(('{ip}',5305))\n",
        ip = server.ip,
        ip6 = server.ip6,
    );
    python(&client, &program)?;
    let node = &lab.nodes[0];
    let wanted = [
        format!("{}:5300", server.ip),
        format!("{}:5301", server.ip),
        format!("[{}]:5302", server.ip6),
        format!("{}:5303", server.ip),
    ];
    for remote in &wanted {
        let told = event(node, "datagram", |r| r["remote"] == *remote)?;
        assert_eq!(told["task"]["comm"], "python3");
        let local = told["local"].as_str().context("local")?;
        assert!(!local.ends_with(":0"), "{told}");
    }
    // All was sent in this order, and the last was told: nothing more comes of loopback,
    // nor of a connect without a packet.
    let told = events(node, "datagram")?;
    assert_eq!(told.len(), wanted.len(), "{told:#?}");
    Ok(())
}

#[test]
fn raw_and_packet_sockets_are_told_once() -> Result<()> {
    let mut lab = Lab::started()?;
    let client = lab.pod(1, "client")?;
    let program = "import socket\n\
         s=socket.socket(socket.AF_INET,socket.SOCK_RAW,socket.IPPROTO_ICMP)\n\
         for i in range(9): s.sendto(b'\\x08\\0\\xf7\\xff'+b'\\0'*4,('192.0.2.1',0))\n\
         s=socket.socket(socket.AF_INET6,socket.SOCK_RAW,socket.IPPROTO_ICMPV6)\n\
         for i in range(9): s.sendto(b'\\x80\\0\\0\\0'+b'\\0'*4,('fd00:2::1',0))\n\
         s=socket.socket(socket.AF_PACKET,socket.SOCK_RAW,socket.htons(0x88b5)); s.bind(('eth0',0x88b5))\n\
         for i in range(9): s.send(b'\\xff'*12+b'\\x88\\xb5'+b'\\0'*46)\n";
    python(&client, program)?;
    let node = &lab.nodes[0];
    for (packet, protocol) in [(false, 1), (false, 58), (true, 0x88b5)] {
        let told = event(node, "raw", |r| {
            (r["protocol"] == "packet") == packet && r["protocolNumber"] == protocol
        })?;
        assert_eq!(told["task"]["comm"], "python3");
    }
    let told = events(node, "raw")?;
    assert_eq!(told.len(), 3, "{told:#?}");
    Ok(())
}

#[test]
fn programs_have_arguments_and_parents_and_an_end() -> Result<()> {
    let mut lab = Lab::started()?;
    let client = lab.pod(1, "client")?;
    let mut shell = client.command("sh")?;
    let script = "env true one 'two words' ''; env sh -c 'exit 7'; env sh -c 'kill -9 $$'; true $(seq 2000); env true $(seq 2000); :";
    output(shell.args(["-c", script]))?;
    let node = &lab.nodes[0];
    let whole = |argv: &str| {
        let argv = hashed(argv);
        move |r: &Value| r["task"]["argv"] == argv
    };
    let told = event(node, "exec", whole("true\0one\0two words\0\0"))?;
    assert!(
        told["task"]["exe"]
            .as_str()
            .is_some_and(|p| p.ends_with("/true")),
        "{told}"
    );
    assert_eq!(told["task"]["comm"], "true");
    assert_eq!(told["task"]["uid"], 0);
    assert_eq!(told["task"]["parent"]["comm"], "sh");
    let cgroup = told["task"]["cgroup"].as_str().context("cgroup")?;
    assert!(client.cgroup().ends_with(&cgroup[1..]), "{told}");
    // Long ones are told by their beginning.
    let numbers: Vec<String> = (1..=2000).map(|n| format!("{n}\0")).collect();
    let long = format!("true\0{}", numbers.concat());
    event(node, "exec", whole(&long[..2048]))?;
    for (argv, code, signal) in [
        ("sh\0-c\0exit 7\0", 7, Value::Null),
        ("sh\0-c\0kill -9 $$\0", 0, 9.into()),
    ] {
        let exec = event(node, "exec", whole(argv))?;
        let pid = &exec["task"]["pid"];
        let exit = event(node, "exit", |r| r["task"]["pid"] == *pid)?;
        assert_eq!((&exit["code"], &exit["signal"]), (&code.into(), &signal));
    }
    Ok(())
}

#[test]
fn what_a_tiny_ring_loses_is_counted() -> Result<()> {
    let mut lab = Lab::new(1)?;
    lab.nodes[0].options.kernel += ", ringBytes: 4096, eventsPerSecond: 1000000";
    lab.nodes[0].start()?;
    let client = lab.pod(1, "client")?;
    let node = &lab.nodes[0];
    // While the agent is stopped nobody empties the ring.
    let agent = nix::unistd::Pid::from_raw(node.agent_pid().context("an agent")?);
    nix::sys::signal::kill(agent, nix::sys::signal::Signal::SIGSTOP)?;
    let mut shell = client.command("sh")?;
    let ran = output(shell.args(["-c", "for i in $(seq 200); do env true; done"]));
    nix::sys::signal::kill(agent, nix::sys::signal::Signal::SIGCONT)?;
    ran?;
    // `env` and `true` are each started, by 200 processes that end; the shell, and `seq`.
    let told = |name| -> Result<u64> {
        let all = events(node, name)?.into_iter();
        let mine = all.filter(|r| ["sh", "env", "true", "seq"].iter().any(|comm| by(comm)(r)));
        Ok(mine.count() as u64)
    };
    for (name, counted, all) in [
        ("exec", "lost_exec_events", 402),
        ("exit", "lost_exit_events", 202),
    ] {
        eventually("all are told or counted", Duration::from_secs(10), || {
            matches!((told(name), counter(node, counted)), (Ok(told), Ok(lost)) if told + lost == all)
        })
        .with_context(|| format!("{name}: {:?} {:?}", told(name), counter(node, counted)))?;
        assert!(counter(node, counted)? > 0);
    }
    eventually("the gap is told", Duration::from_secs(10), || {
        let told = node.audit().unwrap_or_default().into_iter();
        let gaps = told.filter(|r| r["kind"] == "gap" && r["lost"] == "kernelExec");
        let lost: u64 = gaps.filter_map(|r| r["count"].as_u64()).sum();
        counter(node, "lost_exec_events").is_ok_and(|counted| counted == lost)
    })?;
    Ok(())
}

#[test]
fn a_pod_that_does_too_much_is_limited_and_counted() -> Result<()> {
    let mut lab = Lab::new(1)?;
    lab.nodes[0].options.kernel += ", eventsPerSecond: 1";
    lab.nodes[0].start()?;
    let (noisy, quiet) = (lab.pod(1, "noisy")?, lab.pod(1, "quiet")?);
    let node = &lab.nodes[0];
    output(
        noisy
            .command("sh")?
            .args(["-c", "for i in $(seq 200); do env true; done"]),
    )?;
    output(quiet.command("sh")?.args(["-c", "env sh -c 'exit 3'; :"]))?;
    event(node, "exit", |r| r["pod"] == "quiet" && r["code"] == 3)?;
    let told = events(node, "exec")?;
    let told = told.iter().filter(|r| r["pod"] == "noisy").count() as u64;
    // Four seconds' at once, and what came due meanwhile; all that is not told is counted.
    assert!((4..402).contains(&told), "{told}");
    assert_eq!(told + counter(node, "limited_exec_events")?, 402);
    Ok(())
}

#[test]
fn sockets_are_followed_across_a_restart_of_the_agent() -> Result<()> {
    let mut lab = Lab::started()?;
    let client = lab.pod(1, "client")?;
    let outside = outside(&mut lab, 2)?;
    let _echo = outside.serve("echo", ECHO)?;
    let mut stay = client.command(postern_tests::binary("probe")?)?;
    stay.args(["stay", &at(&outside, ECHO)]);
    let stay = client.start("stay", &mut stay)?;
    let gone = client.start(
        "gone",
        client
            .command(postern_tests::binary("probe")?)?
            .args(["stay", &at(&outside, ECHO)]),
    )?;
    stay.says("beat 000001")?;
    gone.says("beat 000001")?;
    let followed = |node: &Node| -> Result<u64> {
        let metrics = node.metrics()?;
        let line = metrics
            .lines()
            .find_map(|l| l.strip_prefix("postern_map_entries{name=\"SOCKETS\"} "));
        Ok(line.with_context(|| metrics.clone())?.trim().parse()?)
    };
    assert_eq!(followed(&lab.nodes[0])?, 2);
    lab.nodes[0].kill();
    drop(gone);
    lab.nodes[0].start()?;
    lab.known(&client)?;
    eventually(
        "the closed one is forgotten",
        Duration::from_secs(10),
        || followed(&lab.nodes[0]).is_ok_and(|open| open == 1),
    )?;
    let pid = stay.pid();
    drop(stay);
    let closed = event(&lab.nodes[0], "closed", |r| r["task"]["pid"] == pid)?;
    assert!(closed["started"].is_string(), "{closed}");
    assert_eq!(closed["direction"], "outbound");
    Ok(())
}

#[test]
fn the_doctor_names_what_is_lacking() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server, _echo) = pair(&mut lab)?;
    assert!(echoes(&client, &at(&server, ECHO))?);
    let doctor = text(&lab.nodes[0].postern(&["doctor"])?.output()?.stdout);
    for part in ["sockets", "accept", "connect", "udp", "raw", "exec", "exit"] {
        let line = doctor
            .lines()
            .find(|l| l.contains(&format!("audit of {part}")));
        let line = line.with_context(|| doctor.clone())?;
        // As the running agent has it.
        let why = line
            .split_once(": ")
            .map(|(_, without)| without.split(':').next().unwrap_or(""));
        if let Some(without) = why {
            assert!(
                lacks(&lab.nodes[0], without),
                "{line}\n{}",
                lab.nodes[0].log()
            );
        } else {
            assert!(line.contains(" by "), "{line}");
        }
    }
    assert!(doctor.contains("SOCK_DESTROY"), "{doctor}");
    Ok(())
}

#[test]
fn sockets_are_listed_and_destroyed_by_their_cookie() -> Result<()> {
    let mut lab = Lab::started()?;
    let client = lab.pod(1, "client")?;
    let outside = outside(&mut lab, 2)?;
    let _echo = outside.serve("echo", ECHO)?;
    let mut stay = client.command(postern_tests::binary("probe")?)?;
    let stay = client.start("stay", stay.args(["stay", &at(&outside, ECHO)]))?;
    stay.says("beat 000001")?;
    let netns = Netns::open(&std::path::Path::new("/run/netns").join(&client.netns))?;
    let remote = at(&outside, ECHO).parse()?;
    let found = diag::tcp_sockets(&netns)?;
    let socket = found.iter().find(|socket| socket.remote == remote);
    let socket = socket.with_context(|| format!("{found:?}"))?.clone();
    let cgroup = std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(client.cgroup())?);
    assert_eq!((socket.state, socket.uid, socket.cgroup), (1, 0, cgroup));
    let wrong = diag::TcpSocket {
        cookie: socket.cookie + 1,
        ..socket.clone()
    };
    assert!(diag::destroy(&netns, &wrong).is_err());
    diag::destroy(&netns, &socket)?;
    stay.says("ended")?;
    let closed = event(&lab.nodes[0], "closed", |r| {
        r["remote"] == at(&outside, ECHO)
    })?;
    assert_eq!(closed["socket"]["cookie"], socket.cookie);
    assert_eq!(closed["local"], socket.local.to_string());
    assert_eq!(closed["socket"]["errno"], "ECONNABORTED");
    let again = diag::destroy(&netns, &socket).map_err(|e| e.kind());
    assert_eq!(again, Err(std::io::ErrorKind::NotFound));
    // The other end is an IPv6 socket with an IPv4 connection.
    let mut stay = client.command(postern_tests::binary("probe")?)?;
    let stay = client.start("again", stay.args(["stay", &at(&outside, ECHO)]))?;
    stay.says("beat 000001")?;
    let netns = Netns::open(&std::path::Path::new("/run/netns").join(&outside.netns))?;
    let found = diag::tcp_sockets(&netns)?;
    let socket = found.iter().find(|s| s.local == remote && s.state == 1);
    diag::destroy(&netns, socket.with_context(|| format!("{found:?}"))?)?;
    stay.says("ended")?;
    Ok(())
}
