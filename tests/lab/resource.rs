//! Protected resources: opaque tokens, tokens that are bound to keys and to
//! certificates, what clients are told.

use std::time::Duration;

use anyhow::{Context as _, Result};
use postern_tests::{Lab, Pod, Running, eventually, output, text};
use serde_json::{Value, json};

use crate::kit::{at, authorization};

const PYTHON: &str = "/usr/bin/python3";
const PORT: u16 = 8080;
const ISSUER: &str = "https://as.example";
const API: &str = "https://api.example";

/// Two nodes, of which the second runs an authorization server that both trust.
struct World {
    lab: Lab,
    server: Running,
}

fn script(lab: &Lab, name: &str, source: &str) -> Result<String> {
    let path = lab.path().join(name);
    std::fs::write(&path, source)?;
    Ok(path.display().to_string())
}

impl World {
    fn new() -> Result<Self> {
        let mut lab = Lab::new(2)?;
        let server = script(&lab, "server.py", include_str!("resource/server.py"))?;
        let directory = lab.path().display().to_string();
        let mut make = std::process::Command::new(PYTHON);
        output(make.args([&server, "make", &directory, "192.0.2.2"]))?;
        lab.secret("orders", "s3cret")?;
        for node in &mut lab.nodes {
            node.options.more = format!("jwt: {{roots: {directory}/as.pem}}\n");
            node.start()?;
        }
        let mut python = lab.nodes[1].command(PYTHON)?;
        python.args([&server, "serve", &directory, "192.0.2.2", "8300"]);
        let server = Running::start(&mut python, lab.path().join("server.log"))?;
        server.says("listening")?;
        let world = Self { lab, server };
        world.tokens(json!({}))?;
        Ok(world)
    }

    /// What the authorization server says of tokens.
    fn tokens(&self, tokens: Value) -> Result<()> {
        let path = self.lab.path().join("tokens.json");
        let partial = path.with_extension("partial");
        std::fs::write(&partial, tokens.to_string())?;
        Ok(std::fs::rename(partial, path)?)
    }

    /// Makes `app` a resource that takes tokens of the server.
    fn protect(&self, app: &str, authentication: &str, tokens: &str) -> Result<()> {
        self.lab.policy(
            &format!("resource-{app}"),
            &format!(
                "apiVersion: postern.dev/v1alpha1\nkind: ProtectedResource\n\
                 metadata: {{name: {app}, namespace: shop}}\n\
                 spec:\n  selector: {{matchLabels: {{app: {app}}}}}\n  resource: {API}\n  \
                 authorizationServers: ['{ISSUER}']\n  scopes: [read, write]\n  tokens: {tokens}\n  \
                 introspection: {{endpoint: 'https://192.0.2.2:8300/introspect', issuer: '{ISSUER}', \
                 clientId: orders, clientAuthentication: {authentication}, audiences: ['{API}'], cache: 200ms}}\n"
            ),
        )
    }
}

const SECRET: &str = "{clientSecretBasic: {secretFile: orders}}";

/// What the server says of a good token.
fn active(more: Value) -> Value {
    let mut answer = json!({
        "active": true, "sub": "alice", "aud": API, "scope": "read", "client_id": "web",
        "exp": 4_000_000_000_u64, "jti": "of-the-token", "act": {"sub": "cart"},
    });
    if let (Some(all), Some(more)) = (answer.as_object_mut(), more.as_object()) {
        all.extend(more.clone());
    }
    answer
}

/// The head of an answer with its status, and the body.
fn ask(client: &Pod, url: &str, headers: &[&str]) -> Result<(String, String)> {
    let mut arguments = vec!["-i", url];
    for header in headers {
        arguments.extend(["-H", header]);
    }
    let (_, said) = client.curl(&arguments)?;
    let (head, body) = said.split_once("\r\n\r\n").unwrap_or((&said, ""));
    Ok((head.to_lowercase(), body.to_owned()))
}

fn status(client: &Pod, url: &str, headers: &[&str]) -> Result<String> {
    let (head, _) = ask(client, url, headers)?;
    let status = head.split(' ').nth(1).unwrap_or_default();
    Ok(status.lines().next().unwrap_or_default().to_owned())
}

const READERS: &str = "{rules: [{from: [{source: {requestPrincipals: ['https://as.example/*']}}], \
    to: [{operation: {methods: [GET]}}], when: [{key: 'request.auth.claims[scope]', values: [read]}]}, \
    {to: [{operation: {methods: [DELETE]}}], when: [{key: 'request.auth.claims[scope]', values: [write]}]}]}";

#[test]
fn opaque_tokens_are_asked_about_and_clients_are_told() -> Result<()> {
    let mut world = World::new()?;
    let server = world.lab.pod(2, "server")?;
    let (client, near) = (world.lab.pod(1, "client")?, world.lab.pod(2, "near")?);
    let _nginx = server.nginx(PORT, "page")?;
    world.tokens(json!({
        "good-token-1": active(json!({})),
        "other-audience": active(json!({"aud": "https://bank.example"})),
        "no-scope": active(json!({"scope": "nothing"})),
    }))?;
    world.protect("server", SECRET, "{}")?;
    world
        .lab
        .policy("readers", &authorization("readers", READERS))?;
    world.lab.policies(2)?;
    let url = |path: &str| format!("http://{}{path}", at(&server, PORT));
    let good = "Authorization: Bearer good-token-1";
    for client in [&client, &near] {
        let (head, body) = ask(client, &url("/app/x"), &[good])?;
        assert!(head.starts_with("http/1.1 200"), "{head}");
        assert_eq!(body.trim(), "GET /app/x sub= auth=", "the token stays here");
        for (token, expected) in [
            ("made-up", "401"),
            ("other-audience", "401"),
            ("no-scope", "403"),
        ] {
            let token = format!("Authorization: Bearer {token}");
            assert_eq!(
                status(client, &url("/app/x"), &[&token])?,
                expected,
                "{token}"
            );
        }
        let (head, body) = ask(client, &url("/.well-known/oauth-protected-resource"), &[])?;
        assert!(head.contains("content-type: application/json"), "{head}");
        let document: Value = serde_json::from_str(&body)?;
        assert_eq!(document["resource"], API);
        assert_eq!(document["authorization_servers"], json!([ISSUER]));
        // The client finds the metadata by the challenge, and the scope by the rule.
        let (head, _) = ask(client, &url("/app/x"), &[])?;
        assert!(head.starts_with("http/1.1 401"), "{head}");
        let metadata =
            "resource_metadata=\"https://api.example/.well-known/oauth-protected-resource\"";
        assert!(
            head.contains(metadata) && head.contains("scope=\"read\""),
            "{head}"
        );
        assert!(!head.contains("error="), "{head}");
        let (code, said) = client.curl(&["-i", "-X", "DELETE", &url("/app/x"), "-H", good])?;
        let lacking = "error=\"insufficient_scope\", scope=\"write\"";
        assert!(
            code == 0 && said.contains("403") && said.contains(lacking),
            "{said}"
        );
        let twice = status(client, &url("/app/x"), &[good, good])?;
        assert_eq!(twice, "400");
        let (_, http2) = client.curl(&["--http2-prior-knowledge", "-i", &url("/app/x")])?;
        let told = http2.starts_with("HTTP/2 401") && http2.contains("scope=\"read\"");
        assert!(told, "{http2}");
    }
    let record = world.lab.nodes[1].record("the request is recorded", |r| {
        r["kind"] == "request" && r["verdict"] == "allow" && r["token"]["sub"] == "alice"
    })?;
    let token = &record["token"];
    assert_eq!(token["iss"], ISSUER);
    assert_eq!(token["checked"], "introspection");
    assert_eq!(
        (&token["act"], &token["scope"]),
        (&json!(["cart"]), &json!(["read"]))
    );
    assert_eq!(token["jti"].as_str().map(str::len), Some(16));
    let answered = world.lab.nodes[1].record("and who asked for metadata", |r| {
        r["kind"] == "request" && r["path"] == "/.well-known/oauth-protected-resource"
    })?;
    assert_eq!(answered["verdict"], "allow");
    assert_eq!(answered["policy"]["kind"], "ProtectedResource");
    // Revoked: no longer than an answer holds.
    world.tokens(json!({"good-token-1": {"active": false}}))?;
    eventually(
        "the revoked token is refused",
        Duration::from_secs(10),
        || status(&client, &url("/app/x"), &[good]).is_ok_and(|status| status == "401"),
    )?;
    world.server.child.kill()?;
    world.server.child.wait()?;
    let unknown = ["Authorization: Bearer nobody-can-say"];
    assert_eq!(status(&client, &url("/app/x"), &unknown)?, "503");
    for node in &world.lab.nodes {
        let audit = node.audit_text().unwrap_or_default();
        for secret in ["good-token-1", "nobody-can-say", "s3cret", "of-the-token"] {
            assert!(
                !audit.contains(secret) && !node.log().contains(secret),
                "{secret}"
            );
        }
    }
    Ok(())
}

#[test]
fn a_token_of_a_key_takes_a_proof_for_each_request() -> Result<()> {
    let mut world = World::new()?;
    let server = world.lab.pod(2, "server")?;
    let (client, near) = (world.lab.pod(1, "client")?, world.lab.pod(2, "near")?);
    let _nginx = server.nginx(PORT, "page")?;
    let python = script(&world.lab, "client.py", include_str!("resource/client.py"))?;
    let key = world.lab.path().join("dpop.pem").display().to_string();
    let mut make = std::process::Command::new(PYTHON);
    let thumbprint = text(&output(make.args([&python, "key", &key]))?.stdout);
    let cnf = json!({"cnf": {"jkt": thumbprint.trim()}, "token_type": "DPoP"});
    world.tokens(json!({ "bound-token": active(cnf) }))?;
    world
        .lab
        .policy("readers", &authorization("readers", READERS))?;
    let url = format!("http://{}/app/x?y=z", at(&server, PORT));
    let htu = format!("{API}/app/x");
    for nonce in [false, true] {
        let tokens = format!("{{binding: dpop, nonce: {nonce}}}");
        world.protect("server", SECRET, &tokens)?;
        world.lab.policies(2)?;
        for client in [&client, &near] {
            let mut told = json!(null);
            eventually("the policy is in force", Duration::from_secs(10), || {
                told = client
                    .command(PYTHON)
                    .and_then(|mut get| {
                        output(get.args([&python, "get", &key, &url, &htu, "bound-token"]))
                    })
                    .ok()
                    .and_then(|out| serde_json::from_slice(&out.stdout).ok())
                    .unwrap_or_default();
                told["nonce"] == nonce
            })
            .with_context(|| told.to_string())?;
            assert_eq!(told["first"], 200, "{told}");
            let body = told["body"].as_str().map(str::trim);
            assert_eq!(body, Some("GET /app/x?y=z sub= auth="), "{told}");
            for name in ["again", "bearer", "unproven", "other_key", "other_target"] {
                assert_eq!(told[name], 401, "{name}: {told}");
            }
            let challenge = told["challenge"].as_str().unwrap_or_default();
            assert!(challenge.starts_with("DPoP "), "{told}");
            assert!(challenge.contains("error=\"invalid_dpop_proof\""), "{told}");
        }
    }
    let record = world.lab.nodes[1].record("what the token is bound to", |r| {
        r["kind"] == "request" && r["verdict"] == "allow"
    })?;
    assert_eq!(record["token"]["cnf"], json!(["jkt"]));
    Ok(())
}

#[test]
fn a_token_of_a_certificate_is_good_in_its_pod_only() -> Result<()> {
    let mut world = World::new()?;
    let (server, far) = (world.lab.pod(2, "server")?, world.lab.pod(1, "far")?);
    let (near, other) = (world.lab.pod(2, "near")?, world.lab.pod(1, "other")?);
    let _servers = [
        server.nginx(PORT, "page")?,
        far.nginx(PORT, "page")?,
        near.nginx(PORT, "page")?,
    ];
    // Their agents show the workloads' certificates to the authorization server, by
    // which the test learns of them.
    for app in ["far", "near"] {
        world.protect(app, "{tlsClientAuth: {}}", "{}")?;
    }
    world.protect("server", SECRET, "{binding: certificate}")?;
    world
        .lab
        .policy("readers", &authorization("readers", READERS))?;
    world.lab.policies(4)?;
    let shown = |pod: &Pod| -> Result<String> {
        let before = world.server.output().lines().count();
        let url = format!("http://{}/app/x", at(pod, PORT));
        let token = format!("Authorization: Bearer asks-{}", pod.name);
        eventually("it is asked", Duration::from_secs(10), || {
            let asked = status(&other, &url, &[&token]);
            asked.is_ok_and(|status| status == "401")
                && world.server.output().lines().count() > before
        })?;
        let said = world.server.output();
        let last = said.lines().rfind(|line| line.starts_with("shown "));
        let digest = last.and_then(|line| line.strip_prefix("shown "));
        Ok(digest
            .filter(|d| d.len() == 43)
            .context(said.clone())?
            .to_owned())
    };
    let (of_far, of_near) = (shown(&far)?, shown(&near)?);
    assert_ne!(of_far, of_near);
    world.tokens(json!({
        "of-far": active(json!({"cnf": {"x5t#S256": of_far}})),
        "of-near": active(json!({"cnf": {"x5t#S256": of_near}})),
        "of-nobody": active(json!({})),
    }))?;
    let url = format!("http://{}/app/x", at(&server, PORT));
    for (client, token, expected) in [
        (&far, "of-far", "200"),
        (&near, "of-near", "200"),
        (&far, "of-near", "401"),
        (&near, "of-far", "401"),
        (&other, "of-far", "401"),
        (&far, "of-nobody", "401"),
    ] {
        let header = format!("Authorization: Bearer {token}");
        let got = status(client, &url, &[&header])?;
        assert_eq!(got, expected, "{token} from {}", client.name);
    }
    // In plaintext there is no certificate: the node itself is outside of the mesh.
    let mut outside = world.lab.nodes[0].command("curl")?;
    outside.args(["-s", "-o", "/dev/null", "-w", "%{http_code}", "-m", "10"]);
    outside.args(["-H", "Authorization: Bearer of-far", &url]);
    assert_eq!(text(&output(&mut outside)?.stdout), "401");
    Ok(())
}
