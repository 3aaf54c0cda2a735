//! Names in an image that has no C library: `/etc/hosts`, and a DNS server by
//! `/etc/resolv.conf`.

use std::{
    net::{SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result};
use postern_tests::Lab;

use crate::{
    archive,
    engine::{Engine, Layout},
};

/// Policies whose keys are at a name: `policy eval` fetches them and says why it cannot.
const POLICY: &str = "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\n\
    metadata: {name: keys, namespace: shop}\nspec:\n  jwtRules:\n  \
    - {issuer: 'https://issuer.test', jwksUri: 'http://NAME:9/keys'}\n";

#[test]
fn names_are_resolved_without_a_c_library() -> Result<()> {
    let lab = Lab::new(1)?;
    let engine = Engine::new(lab.path(), Layout::Pure)?;
    let image = engine.load(&archive()?)?;
    let asked = dns(&lab)?;
    let dir = lab.path().join("eval");
    std::fs::create_dir_all(&dir)?;
    std::fs::write(
        dir.join("workload.yaml"),
        "{namespace: shop, serviceAccount: web}\n",
    )?;
    std::fs::write(dir.join("requests"), "")?;
    std::fs::write(
        dir.join("resolv.conf"),
        "nameserver 192.0.2.1\noptions timeout:2 attempts:2\n",
    )?;
    for (name, found) in [
        ("in-hosts.test", true),
        ("in-dns.test", true),
        ("nowhere.test", false),
    ] {
        let policies = dir.join(name);
        std::fs::create_dir_all(&policies)?;
        std::fs::write(policies.join("keys.yaml"), POLICY.replace("NAME", name))?;
        let at = |file: &str| dir.join(file).display().to_string();
        let options = [
            format!("--network=ns:/run/netns/{}", lab.nodes[0].netns),
            "--add-host=in-hosts.test:192.0.2.1".into(),
            format!("--volume={}:/etc/resolv.conf:ro", at("resolv.conf")),
            format!("--volume={0}:{0}:ro", dir.display()),
        ];
        let arguments = [
            "policy",
            "eval",
            "--policies",
            &at(name),
            "--workload",
            &at("workload.yaml"),
            "--requests",
            &at("requests"),
        ];
        let (_, said) = engine.once(&options, &image, &arguments)?;
        // Nobody listens at that address: a name that was found is a connection refused.
        assert_eq!(said.contains("refused"), found, "{name}: {said}");
    }
    let asked = asked.join().expect("the server ends")?;
    assert!(asked.iter().any(|name| name == "in-dns.test"), "{asked:?}");
    assert!(
        !asked.iter().any(|name| name == "in-hosts.test"),
        "{asked:?}"
    );
    Ok(())
}

/// Answers for one name (RFC 1035 4.1) on the node's address, until nobody asks for a
/// while; returns what was asked.
fn dns(lab: &Lab) -> Result<std::thread::JoinHandle<Result<Vec<String>>>> {
    let netns = std::fs::File::open(format!("/run/netns/{}", lab.nodes[0].netns))?;
    let (bound, when_bound) = std::sync::mpsc::channel();
    let server = std::thread::spawn(move || {
        nix::sched::setns(netns, nix::sched::CloneFlags::CLONE_NEWNET)?;
        let socket = UdpSocket::bind(SocketAddr::from(([192, 0, 2, 1], 53)))?;
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        bound.send(())?;
        let mut asked = Vec::new();
        let mut query = [0_u8; 512];
        while let Ok((length, client)) = socket.recv_from(&mut query) {
            let query = &query[..length];
            let (name, kind) = question(query).context("a query")?;
            socket.send_to(&answer(query, name == "in-dns.test", kind), client)?;
            asked.push(name);
        }
        Ok(asked)
    });
    when_bound.recv().context("the server listens")?;
    Ok(server)
}

const A: u16 = 1;

/// Name and type of the first question.
fn question(query: &[u8]) -> Option<(String, u16)> {
    let mut at = 12;
    let mut labels = Vec::new();
    loop {
        let length = usize::from(*query.get(at)?);
        at += 1;
        if length == 0 {
            break;
        }
        labels.push(String::from_utf8_lossy(query.get(at..at + length)?).into_owned());
        at += length;
    }
    let kind = u16::from_be_bytes(query.get(at..at + 2)?.try_into().ok()?);
    Some((labels.join("."), kind))
}

/// The question again, and the node's address where there is one.
fn answer(query: &[u8], known: bool, kind: u16) -> Vec<u8> {
    let end = query[12..]
        .iter()
        .position(|byte| *byte == 0)
        .map_or(query.len(), |at| 12 + at + 5);
    let found = known && kind == A;
    let mut answer = query[..2].to_vec();
    // A response, recursion available; NXDOMAIN where the name is none.
    answer.extend([
        0x81,
        if known { 0x80 } else { 0x83 },
        0,
        1,
        0,
        u8::from(found),
        0,
        0,
        0,
        0,
    ]);
    answer.extend(&query[12..end]);
    if found {
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 1]);
    }
    answer
}
