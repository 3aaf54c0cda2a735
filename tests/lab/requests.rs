//! Policy on requests: tokens, HTTP/1.1, HTTP/2, gRPC, WebSocket, and what is none
//! of these.

use std::{process::Command, time::Duration};

use anyhow::{Context as _, Result};
use postern_tests::{Lab, Pod, PodOptions, Running, binary, eventually, output, text};
use serde_json::Value;

use crate::kit::{ECHO, at, authorization, echoes, peer_authentication};

pub const PYTHON: &str = "/usr/bin/python3";
const PORT: u16 = 8080;
/// What a pod's client account is.
const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";

/// Puts a script into a place where programs of the lab can read it.
pub fn script(lab: &Lab, name: &str, source: &str) -> Result<String> {
    let path = lab.path().join(name);
    std::fs::write(&path, source)?;
    Ok(path.display().to_string())
}

/// Keys and tokens of an issuer. The lapsing one lasts this many seconds more.
pub fn mint(lab: &Lab, lasts: u32) -> Result<Value> {
    let mint = script(lab, "mint.py", include_str!("requests/mint.py"))?;
    let mut python = Command::new(PYTHON);
    let minted = output(python.args([&mint, CLIENT, &lasts.to_string()]))?;
    serde_json::from_slice(&minted.stdout).context("what was minted")
}

pub fn authentication(name: &str, rule: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\n\
         metadata: {{name: {name}, namespace: shop}}\n\
         spec: {{selector: {{matchLabels: {{app: server}}}}, jwtRules: [{rule}]}}\n"
    )
}

/// A rule of the issuer with its keys written in, and `more` fields.
pub fn inline(minted: &Value, more: &str) -> String {
    let keys = minted["jwks"].to_string();
    format!("{{issuer: 'https://issuer.example', audiences: [shop], jwks: '{keys}'{more}}}")
}

/// A request by curl: the status, and the body.
pub fn get(client: &Pod, url: &str, headers: &[&str]) -> Result<(String, String)> {
    get_with(client, &[], url, headers)
}

fn get_with(
    client: &Pod,
    options: &[&str],
    url: &str,
    headers: &[&str],
) -> Result<(String, String)> {
    let mut arguments = vec!["--no-show-error", "-w", "\n%{http_code}", url];
    arguments.extend(options);
    for header in headers {
        arguments.extend(["-H", header]);
    }
    let (code, said) = client.curl(&arguments)?;
    let (body, status) = said.rsplit_once('\n').unwrap_or(("", &said));
    Ok((
        format!("{status}{}", if code == 0 { "" } else { "!" }),
        body.to_owned(),
    ))
}

pub fn bearer(minted: &Value, name: &str) -> String {
    let token = minted["tokens"][name].as_str().unwrap_or_default();
    format!("Authorization: Bearer {token}")
}

#[test]
fn tokens_decide_who_gets_what() -> Result<()> {
    let mut lab = Lab::started()?;
    let server = lab.pod(2, "server")?;
    let (client, near) = (lab.pod(1, "client")?, lab.pod(2, "near")?);
    let _nginx = server.nginx(PORT, "page")?;
    let minted = mint(&lab, 3600)?;
    let outputs = ", outputClaimToHeaders: [{header: x-sub, claim: sub}]";
    lab.policy(
        "tokens",
        &authentication("tokens", &inline(&minted, outputs)),
    )?;
    lab.policy(
        "alice",
        &authorization(
            "alice",
            "{rules: [{from: [{source: {requestPrincipals: ['https://issuer.example/alice']}}]}, \
             {to: [{operation: {paths: [/app/healthz]}}]}]}",
        ),
    )?;
    lab.policies(2)?;
    for client in [&client, &near] {
        let url = |path: &str| format!("http://{}{path}", at(&server, PORT));
        for (name, path, expected) in [
            ("none", "/app/x", "403"),
            ("good", "/app/x", "200"),
            ("elliptic", "/app/x", "200"),
            ("wrong_subject", "/app/x", "403"),
            ("unattached_issuer", "/app/x", "401"),
            ("wrong_audience", "/app/x", "403"),
            ("expired", "/app/x", "401"),
            ("foreign_key", "/app/x", "401"),
            ("none", "/app/healthz", "200"),
            ("none", "/app/./x/../healthz", "200"),
            ("expired", "/app/healthz", "401"),
        ] {
            let token = bearer(&minted, name);
            let headers: &[&str] = if name == "none" { &[] } else { &[&token] };
            let (status, body) = get(client, &url(path), headers)?;
            assert_eq!(
                status, expected,
                "{name} {path} from {}: {body}",
                client.name
            );
        }
        // The application gets the claim, not the token, and nobody else's word.
        let (_, body) = get(
            client,
            &url("/app/x"),
            &[&bearer(&minted, "good"), "x-sub: root", "x_sub: root"],
        )?;
        assert_eq!(body.trim(), "GET /app/x sub=alice auth=", "{body}");
        let (_, body) = get(client, &url("/app/healthz"), &["x-sub: root"])?;
        assert_eq!(body.trim(), "GET /app/healthz sub= auth=", "{body}");
        let challenge = client
            .curl(&["-i", &url("/app/x"), "-H", &bearer(&minted, "expired")])?
            .1;
        assert!(
            challenge
                .to_lowercase()
                .contains("www-authenticate: bearer realm="),
            "{challenge}"
        );
        assert!(challenge.contains("error=\"invalid_token\""), "{challenge}");
    }
    let record = lab.nodes[1].record("the request is recorded", |r| {
        r["kind"] == "request" && r["verdict"] == "allow" && r["token"]["sub"] == "alice"
    })?;
    assert_eq!(record["policy"]["name"], "alice");
    assert_eq!(record["source"]["identity"], CLIENT);
    assert_eq!(
        (&record["method"], &record["status"]),
        (&"GET".into(), &200.into())
    );
    let refusal = lab.nodes[1].record("and the refusal", |r| {
        r["kind"] == "request" && r["status"] == 401
    })?;
    assert_eq!(refusal["policy"]["kind"], "RequestAuthentication");
    let audit = lab.nodes[1].audit_text()?;
    let secret = minted["tokens"]["good"].as_str().unwrap_or_default();
    let signature = secret.rsplit('.').next().unwrap_or_default();
    assert!(!audit.contains(signature) && !lab.nodes[1].log().contains(signature));
    Ok(())
}

#[test]
fn a_refused_request_leaves_its_connection_alive() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server) = (lab.pod(1, "client")?, lab.pod(2, "server")?);
    let _nginx = server.nginx(PORT, "page")?;
    lab.policy(
        "get",
        &authorization(
            "get",
            "{rules: [{to: [{operation: {methods: [GET, POST], paths: ['/app/{*}', /]}}]}]}",
        ),
    )?;
    lab.policies(1)?;
    let base = format!("http://{}", at(&server, PORT));
    let (code, said) = client.curl(&[
        "-w",
        "%{http_code} %{num_connects}\n",
        "-o",
        "/dev/null",
        &format!("{base}/app/a"),
        "-o",
        "/dev/null",
        &format!("{base}/forbidden"),
        "-o",
        "/dev/null",
        &format!("{base}/app/b"),
        "-o",
        "/dev/null",
        "-d",
        "body",
        &format!("{base}/app/c"),
    ])?;
    assert_eq!((code, said.as_str()), (0, "200 1\n403 0\n200 0\n200 0\n"));
    let url = format!("{base}/forbidden");
    let (status, _) = get_with(&client, &["--http2-prior-knowledge"], &url, &[])?;
    assert_eq!(status, "403");
    let (_, said) = client.curl(&[
        "-X",
        "CONNECT",
        "-o",
        "/dev/null",
        "-w",
        "%{http_code}",
        &base,
    ])?;
    assert!(said.starts_with("405") || said.starts_with("400"), "{said}");
    Ok(())
}

#[test]
fn grpc_calls_are_judged_one_by_one() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server) = (lab.pod(1, "client")?, lab.pod(2, "server")?);
    let grpc = script(&lab, "grpc_peer.py", include_str!("requests/grpc_peer.py"))?;
    let mut serve = server.command(PYTHON)?;
    let _grpc = server.start("grpc", serve.args([&grpc, "serve", "50051"]))?;
    _grpc.says("listening")?;
    let minted = mint(&lab, 3600)?;
    lab.policy("tokens", &authentication("tokens", &inline(&minted, "")))?;
    lab.policy(
        "methods",
        &authorization(
            "methods",
            "{rules: [{to: [{operation: {paths: ['/shop.Cart/Get', /shop.Cart/Stream, /shop.Cart/Fail]}}]}, \
             {from: [{source: {requestPrincipals: ['*/alice']}}], to: [{operation: {paths: [/shop.Cart/Pay]}}]}]}",
        ),
    )?;
    lab.policies(2)?;
    let call = |arguments: &[&str]| -> Result<String> {
        let mut python = client.command(PYTHON)?;
        python
            .arg(&grpc)
            .arg(arguments[0])
            .arg(at(&server, 50051))
            .args(&arguments[1..]);
        Ok(text(&output(&mut python)?.stdout).trim().to_owned())
    };
    let good = minted["tokens"]["good"].as_str().unwrap_or_default();
    let expired = minted["tokens"]["expired"].as_str().unwrap_or_default();
    assert_eq!(call(&["call", "/shop.Cart/Get"])?, "OK echo hello kept");
    assert_eq!(call(&["call", "/shop.Cart/Fail"])?, "OUT_OF_RANGE as asked");
    assert_eq!(
        call(&["call", "/shop.Cart/Pay"])?,
        "PERMISSION_DENIED RBAC: access denied"
    );
    assert_eq!(
        call(&["call", "/shop.Cart/Pay", good])?,
        "OK echo hello kept"
    );
    assert!(call(&["call", "/shop.Cart/Get", expired])?.starts_with("UNAUTHENTICATED"));
    assert_eq!(call(&["many", "/shop.Cart/Stream"])?, "OK 1000 1000000");
    // On one channel: a refusal is of its call alone.
    let several = [
        "calls",
        "/shop.Cart/Get",
        "/shop.Cart/Pay",
        "/shop.Cart/Get",
    ];
    assert_eq!(call(&several)?, "OK PERMISSION_DENIED OK");
    Ok(())
}

/// An HTTP/2 server greets with its settings before it has heard a word, and is no
/// less HTTP for that: with tokens alone asked for, its calls are read.
#[test]
fn a_server_that_greets_with_settings_is_read() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, near) = (lab.pod(1, "client")?, lab.pod(2, "near")?);
    let server = lab.pod(2, "server")?;
    let grpc = script(&lab, "grpc_peer.py", include_str!("requests/grpc_peer.py"))?;
    let mut serve = server.command(PYTHON)?;
    let serving = server.start("grpc", serve.args([&grpc, "serve", "50051"]))?;
    serving.says("listening")?;
    let minted = mint(&lab, 3600)?;
    lab.policy("tokens", &authentication("tokens", &inline(&minted, "")))?;
    lab.policies(1)?;
    let token = |name: &str| {
        minted["tokens"][name]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    for client in [&client, &near] {
        for (token, expected) in [(token("good"), "OK"), (token("expired"), "UNAUTHENTICATED")] {
            let mut python = client.command(PYTHON)?;
            python.args([&grpc, "call", &at(&server, 50051), "/a.B/C", &token]);
            let said = text(&output(&mut python)?.stdout);
            assert!(said.starts_with(expected), "{} {said}", client.name);
        }
    }
    Ok(())
}

/// Policy sees the head that the application gets: a claim's header, not the client's.
#[test]
fn headers_that_are_made_up_decide_nothing() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server) = (lab.pod(1, "client")?, lab.pod(2, "server")?);
    let _nginx = server.nginx(PORT, "page")?;
    let minted = mint(&lab, 3600)?;
    let outputs = ", outputClaimToHeaders: [{header: x-sub, claim: sub}]";
    lab.policy(
        "tokens",
        &authentication("tokens", &inline(&minted, outputs)),
    )?;
    lab.policy(
        "alice",
        &authorization(
            "alice",
            "{rules: [{when: [{key: 'request.headers[x-sub]', values: [alice]}]}]}",
        ),
    )?;
    lab.policies(2)?;
    let url = format!("http://{}/app/x", at(&server, PORT));
    let made_up = "x-sub: alice";
    let status = |headers: &[&str]| Ok::<_, anyhow::Error>(get(&client, &url, headers)?.0);
    assert_eq!(status(&[made_up])?, "403");
    assert_eq!(
        status(&[made_up, &bearer(&minted, "wrong_subject")])?,
        "403"
    );
    assert_eq!(status(&[&bearer(&minted, "good")])?, "200");
    Ok(())
}

#[test]
fn a_websocket_lives_until_its_token_or_policy_ends_it() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server) = (lab.pod(1, "client")?, lab.pod(2, "server")?);
    let websocket = script(&lab, "websocket.py", include_str!("requests/websocket.py"))?;
    let mut serve = server.command(PYTHON)?;
    let serving = server.start("websocket", serve.args([&websocket, "serve", "8081"]))?;
    serving.says("listening")?;
    let minted = mint(&lab, 8)?;
    lab.policy("tokens", &authentication("tokens", &inline(&minted, "")))?;
    let paths = |paths: &str| {
        authorization(
            "paths",
            &format!("{{rules: [{{to: [{{operation: {{paths: [{paths}]}}}}]}}]}}"),
        )
    };
    lab.policy("paths", &paths("/chat, /news"))?;
    lab.policies(2)?;
    let talk = |name: &str, path: &str, token: Option<&str>| -> Result<Running> {
        let mut python = client.command(PYTHON)?;
        let url = format!("ws://{}{path}", at(&server, 8081));
        python.args([&websocket, "talk", &url]).args(token);
        client.start(name, &mut python)
    };
    talk("denied", "/secret", None)?.says("refused 403")?;
    let chat = talk("chat", "/chat", None)?;
    let news = talk("news", "/news", None)?;
    let lapsing = talk("lapsing", "/news", minted["tokens"]["lapsing"].as_str())?;
    for running in [&chat, &news, &lapsing] {
        running.says("heard word 3")?;
    }
    lab.policy("paths", &paths("/news"))?;
    chat.says("cut")?;
    lapsing.says("cut")?;
    std::thread::sleep(Duration::from_millis(200));
    assert!(!news.output().contains("cut"), "{}", news.output());
    lab.nodes[1].record("the token's end is on record", |r| {
        r["kind"] == "request"
            && r["reason"]
                .as_str()
                .is_some_and(|why| why.contains("expired"))
    })?;
    Ok(())
}

#[test]
fn what_is_not_http_meets_rules_that_ask_for_http() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server) = (lab.pod(1, "client")?, lab.pod(2, "server")?);
    let (_echo, _greet) = (server.serve("echo", ECHO)?, server.serve("greet", 9001)?);
    // Only tokens: bytes that are no HTTP pass, also where the server speaks first.
    let minted = mint(&lab, 3600)?;
    lab.policy("tokens", &authentication("tokens", &inline(&minted, "")))?;
    lab.policies(1)?;
    assert!(echoes(&client, &at(&server, ECHO))?);
    let greeted = client.dial(&at(&server, 9001), &["--half-close"])?;
    assert_eq!(greeted["end"], "eof", "{greeted}");
    // ALLOW by method does not match; DENY by method fails closed.
    for spec in [
        "{rules: [{to: [{operation: {methods: [GET]}}]}]}",
        "{action: DENY, rules: [{to: [{operation: {methods: [GET]}}]}]}",
    ] {
        lab.policy("p", &authorization("p", spec))?;
        lab.policies(2)?;
        eventually("the policy is in force", Duration::from_secs(5), || {
            client
                .dial(&at(&server, ECHO), &["--send", "ping", "--half-close"])
                .is_ok_and(|seen| seen["end"] == "ECONNRESET")
        })?;
        let denial = lab.nodes[1].record("the denial is recorded", |r| {
            r["kind"] == "connection" && r["verdict"] == "deny"
        })?;
        assert_eq!(denial["policy"]["name"], "p");
        lab.remove_policy("p")?;
        lab.policies(1)?;
    }
    // Another port's rule is no matter of this one, and its bytes are not read.
    lab.policy(
        "p",
        &authorization(
            "p",
            "{action: DENY, rules: [{to: [{operation: {methods: [GET], ports: ['80']}}]}]}",
        ),
    )?;
    lab.policies(2)?;
    assert!(echoes(&client, &at(&server, ECHO))?);
    Ok(())
}

#[test]
fn a_token_may_be_bound_to_its_presenter() -> Result<()> {
    let mut lab = Lab::started()?;
    let server = lab.pod(2, "server")?;
    let (client, other) = (lab.pod(1, "client")?, lab.pod(1, "other")?);
    let _nginx = server.nginx(PORT, "page")?;
    let minted = mint(&lab, 3600)?;
    lab.policy("tokens", &authentication("tokens", &inline(&minted, "")))?;
    lab.policy(
        "bound",
        "apiVersion: postern.dev/v1alpha1\nkind: TokenBinding\nmetadata: {name: bound, namespace: shop}\n\
         spec: {issuers: ['https://issuer.example'], presenter: [certificate, authorizedParty]}\n",
    )?;
    lab.policies(2)?;
    let url = format!("http://{}/app/x", at(&server, PORT));
    let status = |pod: &Pod, token: &str| {
        Ok::<_, anyhow::Error>(get(pod, &url, &[&bearer(&minted, token)])?.0)
    };
    assert_eq!(status(&client, "bound")?, "200");
    assert_eq!(status(&other, "bound")?, "401");
    assert_eq!(status(&client, "good")?, "401");
    assert_eq!(get(&client, &url, &[])?.0, "200");
    Ok(())
}

#[test]
fn a_process_may_be_kept_from_connecting() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server) = (lab.pod(1, "client")?, lab.pod(2, "server")?);
    let _nginx = server.nginx(PORT, "page")?;
    lab.policy(
        "no-curl",
        "apiVersion: postern.dev/v1alpha1\nkind: ConnectPolicy\nmetadata: {name: no-curl, namespace: shop}\n\
         spec: {selector: {matchLabels: {app: client}}, action: DENY, rules: [{executables: ['*/curl'], ports: ['8080']}]}\n",
    )?;
    lab.policies(1)?;
    let (code, said) = client.curl(&[&format!("http://{}/app/x", at(&server, PORT))])?;
    assert_ne!(code, 0, "{said}");
    let mut wget = client.command(PYTHON)?;
    let fetch = format!(
        "import urllib.request as u; print(u.urlopen('http://{}/app/x').status)",
        at(&server, PORT)
    );
    assert_eq!(
        text(&output(wget.args(["-c", &fetch]))?.stdout).trim(),
        "200"
    );
    let denial = lab.nodes[0].record("the process is on record", |r| r["verdict"] == "deny")?;
    assert_eq!(denial["policy"]["kind"], "ConnectPolicy");
    assert!(
        denial["source"]["process"]["exe"]
            .as_str()
            .is_some_and(|e| e.ends_with("curl")),
        "{denial}"
    );
    Ok(())
}

#[test]
fn keys_are_fetched_and_follow_their_rotation() -> Result<()> {
    let mut lab = Lab::new(2)?;
    lab.nodes[1].options.more = "jwt: {refetchInterval: 100ms}\n".into();
    for node in &mut lab.nodes {
        node.start()?;
    }
    let (client, server) = (lab.pod(1, "client")?, lab.pod(2, "server")?);
    let _nginx = server.nginx(PORT, "page")?;
    let minted = mint(&lab, 3600)?;
    let keys = lab.path().join("keys.json");
    std::fs::write(&keys, minted["jwks"].to_string())?;
    let issuer = script(&lab, "issuer.py", include_str!("requests/issuer.py"))?;
    let mut python = lab.nodes[1].command(PYTHON)?;
    let directory = lab.path().display().to_string();
    python.args([&issuer, "192.0.2.2", "8200", &directory]);
    let issuer = Running::start(&mut python, lab.path().join("issuer.log"))?;
    issuer.says("listening")?;
    let rule = "{issuer: 'https://issuer.example', jwksUri: 'http://192.0.2.2:8200/keys'}";
    lab.policy("tokens", &authentication("tokens", rule))?;
    lab.policies(1)?;
    // Before any token has come.
    issuer.says("fetched")?;
    let url = format!("http://{}/app/x", at(&server, PORT));
    let status =
        |token: &str| Ok::<_, anyhow::Error>(get(&client, &url, &[&bearer(&minted, token)])?.0);
    assert_eq!(status("good")?, "200");
    assert_eq!(status("foreign_key")?, "401");
    std::fs::write(&keys, minted["rotated"].to_string())?;
    eventually("the new key is known", Duration::from_secs(5), || {
        status("foreign_key").is_ok_and(|s| s == "200")
    })?;
    // What was verified with the old key is forgotten with it.
    assert_eq!(status("good")?, "401");
    drop(issuer);
    assert_eq!(status("foreign_key")?, "200", "the last good keys");
    Ok(())
}

#[test]
fn a_provider_may_decide_and_fails_closed() -> Result<()> {
    let mut lab = Lab::new(2)?;
    lab.nodes[1].options.policies = ", extensionProviders: [{name: tickets, envoyExtAuthzHttp: \
        {service: 192.0.2.2, port: 8200, pathPrefix: /check, includeRequestHeadersInCheck: [x-ticket], \
         headersToUpstreamOnAllow: [x-holder]}}]"
        .into();
    for node in &mut lab.nodes {
        node.start()?;
    }
    let (client, server) = (lab.pod(1, "client")?, lab.pod(2, "server")?);
    let _nginx = server.nginx(PORT, "page")?;
    let issuer = script(&lab, "issuer.py", include_str!("requests/issuer.py"))?;
    let mut python = lab.nodes[1].command(PYTHON)?;
    let directory = lab.path().display().to_string();
    python.args([&issuer, "192.0.2.2", "8200", &directory]);
    let provider = Running::start(&mut python, lab.path().join("provider.log"))?;
    provider.says("listening")?;
    lab.policy(
        "tickets",
        &authorization(
            "tickets",
            "{action: CUSTOM, provider: {name: tickets}, rules: [{to: [{operation: {paths: ['/app/show*']}}]}]}",
        ),
    )?;
    lab.policy(
        "nowhere",
        &authorization("nowhere", "{action: CUSTOM, provider: {name: nobody}, rules: [{to: [{operation: {paths: [/app/gone]}}]}]}"),
    )?;
    lab.policies(2)?;
    let url = |path: &str| format!("http://{}{path}", at(&server, PORT));
    assert_eq!(get(&client, &url("/app/show/1"), &[])?.0, "402");
    assert_eq!(
        get(&client, &url("/app/show/1"), &["x-ticket: yes"])?.0,
        "200"
    );
    assert_eq!(get(&client, &url("/app/other"), &[])?.0, "200");
    assert_eq!(get(&client, &url("/app/gone"), &[])?.0, "403");
    provider.says("asked /check/app/show/1 yes")?;
    drop(provider);
    assert_eq!(
        get(&client, &url("/app/show/1"), &["x-ticket: yes"])?.0,
        "403"
    );
    Ok(())
}

/// In both states one of two ALLOW policies allows everything; half of a change
/// would allow nothing.
#[test]
fn no_request_is_decided_by_half_of_a_change() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server) = (lab.pod(1, "client")?, lab.pod(2, "server")?);
    let _nginx = server.nginx(PORT, "page")?;
    let open = "{rules: [{to: [{operation: {methods: [GET]}}]}]}";
    let states = [(open, "{}"), ("{}", open)];
    let put = |turn: usize| {
        let (first, second) = states[turn % 2];
        lab.policy(
            "both",
            &format!(
                "{}---\n{}",
                authorization("first", first),
                authorization("second", second)
            ),
        )
    };
    put(0)?;
    lab.policies(2)?;
    let mut wrk = client.command("wrk")?;
    wrk.args([
        "-t2",
        "-c16",
        "-d6s",
        &format!("http://{}/", at(&server, PORT)),
    ]);
    let wrk = client.start("wrk", &mut wrk)?;
    for turn in 1..40 {
        put(turn)?;
        std::thread::sleep(Duration::from_millis(130));
        // New connections, too.
        assert_eq!(
            get(&client, &format!("http://{}/", at(&server, PORT)), &[])?.0,
            "200"
        );
    }
    wrk.says("Requests/sec")?;
    let said = wrk.output();
    assert!(
        !said.contains("Non-2xx") && !said.contains("Socket errors"),
        "{said}"
    );
    Ok(())
}

#[test]
fn strict_and_requests_mix() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server) = (lab.pod(1, "client")?, lab.pod(2, "server")?);
    let outside = PodOptions {
        mesh: Some(false),
        ..PodOptions::default()
    };
    let outside = lab.pod_with(1, "outside", outside)?;
    let _nginx = server.nginx(PORT, "page")?;
    lab.policy(
        "who",
        &authorization(
            "who",
            "{rules: [{from: [{source: {principals: ['cluster.local/ns/shop/sa/client']}}], to: [{operation: {methods: [GET]}}]}, \
             {from: [{source: {notPrincipals: ['*']}}], to: [{operation: {paths: [/app/open]}}]}]}",
        ),
    )?;
    lab.policies(1)?;
    let url = |path: &str| format!("http://{}{path}", at(&server, PORT));
    assert_eq!(get(&client, &url("/app/x"), &[])?.0, "200");
    assert_eq!(get(&outside, &url("/app/x"), &[])?.0, "403");
    assert_eq!(get(&outside, &url("/app/open"), &[])?.0, "200");
    lab.policy(
        "strict",
        &peer_authentication("strict", "shop", "{mtls: {mode: STRICT}}"),
    )?;
    lab.policies(2)?;
    assert_eq!(get(&client, &url("/app/x"), &[])?.0, "200");
    assert_eq!(get(&outside, &url("/app/open"), &[])?.0, "000!");
    Ok(())
}

#[test]
fn what_was_opened_unread_does_not_outlive_a_policy_on_requests() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server) = (lab.pod(1, "client")?, lab.pod(2, "server")?);
    let (_echo, _other) = (server.serve("echo", ECHO)?, server.serve("echo", 9001)?);
    let stay = |port: u16| -> Result<Running> {
        let mut probe = client.command(binary("probe")?)?;
        client.start(
            &format!("stay-{port}"),
            probe.args(["stay", &at(&server, port)]),
        )
    };
    let (watched, elsewhere) = (stay(ECHO)?, stay(9001)?);
    for running in [&watched, &elsewhere] {
        running.says("beat 000001")?;
    }
    // It would pass as what it is; but nobody has looked.
    lab.policy(
        "p",
        &authorization(
            "p",
            "{action: DENY, rules: [{from: [{source: {namespaces: [shop]}}], \
             to: [{operation: {methods: [POST], ports: ['9000']}}]}]}",
        ),
    )?;
    watched.says("ended: ECONNRESET")?;
    std::thread::sleep(Duration::from_millis(200));
    assert!(
        !elsewhere.output().contains("ended"),
        "{}",
        elsewhere.output()
    );
    let record = lab.nodes[1].record("why is on record", |r| {
        r["end"]
            .as_str()
            .is_some_and(|why| why.contains("asks for requests"))
    })?;
    assert_eq!(record["policy"]["name"], "p");
    Ok(())
}
