//! Names in an image that has no C library: `/etc/hosts`, and a DNS server by
//! `/etc/resolv.conf`.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpListener, UdpSocket},
    sync::{Arc, Mutex, mpsc},
};

use anyhow::{Context as _, Result};
use postern_tests::Lab;

use crate::{
    archive,
    engine::{Engine, Layout},
};

/// Policies whose keys are at a name: `policy eval` fetches them.
const POLICY: &str = "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\n\
    metadata: {name: keys, namespace: shop}\nspec:\n  jwtRules:\n  \
    - {issuer: 'https://issuer.test', jwksUri: 'http://NAME:9080/keys'}\n";

#[test]
fn names_are_resolved_without_a_c_library() -> Result<()> {
    let lab = Lab::new(1)?;
    let engine = Engine::new(lab.path(), Layout::Pure)?;
    let image = engine.load(&archive()?)?;
    let (asked, hosts) = servers(&lab)?;
    let dir = lab.path().join("eval");
    std::fs::create_dir_all(&dir)?;
    let at = |file: &str| dir.join(file).display().to_string();
    std::fs::write(at("workload"), "{namespace: shop, serviceAccount: web}\n")?;
    std::fs::write(at("requests"), "")?;
    std::fs::write(
        at("resolv.conf"),
        "nameserver 192.0.2.1\noptions timeout:2 attempts:2\n",
    )?;
    for name in ["in-hosts.test", "in-dns.test", "nowhere.test"] {
        std::fs::create_dir_all(at(name))?;
        std::fs::write(
            dir.join(name).join("keys.yaml"),
            POLICY.replace("NAME", name),
        )?;
        let options = [
            format!("--network=ns:/run/netns/{}", lab.nodes[0].netns),
            "--add-host=in-hosts.test:192.0.2.1".into(),
            format!("--volume={}:/etc/resolv.conf:ro", at("resolv.conf")),
            format!("--volume={0}:{0}:ro", dir.display()),
        ];
        let (policies, workload, requests) = (at(name), at("workload"), at("requests"));
        let mut arguments = vec!["policy", "eval", "--policies", &policies];
        arguments.extend(["--workload", &workload, "--requests", &requests]);
        let (code, said) = engine.once(&options, &image, &arguments)?;
        assert_eq!(code, 0, "{said}");
    }
    let hosts = hosts.lock().expect("no server panicked").clone();
    for (name, found) in [("in-hosts", true), ("in-dns", true), ("nowhere", false)] {
        let name = format!("{name}.test:9080");
        assert_eq!(hosts.contains(&name), found, "{name}: {hosts:?}");
    }
    let asked = asked.lock().expect("no server panicked").clone();
    assert!(asked.iter().any(|name| name == "nowhere.test"), "{asked:?}");
    assert!(
        !asked.iter().any(|name| name == "in-hosts.test"),
        "{asked:?}"
    );
    Ok(())
}

type Seen = Arc<Mutex<Vec<String>>>;

/// A DNS server that knows one name (RFC 1035 4.1), and a web server, on the node's
/// address: the names that were asked for, and the hosts. They end with the test.
fn servers(lab: &Lab) -> Result<(Seen, Seen)> {
    let netns = std::fs::File::open(format!("/run/netns/{}", lab.nodes[0].netns))?;
    let (send, bound) = mpsc::channel();
    std::thread::spawn(move || {
        let bind = || -> Result<(UdpSocket, TcpListener)> {
            nix::sched::setns(netns, nix::sched::CloneFlags::CLONE_NEWNET)?;
            let at = |port: u16| SocketAddr::from(([192, 0, 2, 1], port));
            Ok((UdpSocket::bind(at(53))?, TcpListener::bind(at(9080))?))
        };
        send.send(bind())
    });
    let (dns, web) = bound.recv().context("the sockets")??;
    let (asked, hosts) = (Seen::default(), Seen::default());
    let (names, served) = (asked.clone(), hosts.clone());
    std::thread::spawn(move || {
        let mut query = [0_u8; 512];
        while let Ok((length, client)) = dns.recv_from(&mut query) {
            let query = &query[..length];
            if let Some((name, kind)) = question(query) {
                let _unheard = dns.send_to(&answer(query, name == "in-dns.test", kind), client);
                names.lock().expect("no panic while it is held").push(name);
            }
        }
    });
    std::thread::spawn(move || {
        for mut stream in web.incoming().flatten() {
            let head = BufReader::new(&stream).lines().map_while(Result::ok);
            let mut head = head.take_while(|line| !line.is_empty());
            let host =
                head.find_map(|line| Some(line.to_lowercase().strip_prefix("host: ")?.to_owned()));
            served
                .lock()
                .expect("no panic while it is held")
                .extend(host);
            let _gone = stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n");
        }
    });
    Ok((asked, hosts))
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
