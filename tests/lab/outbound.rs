//! Tokens that the source's agent puts on what a pod sends: HTTP/1.1, HTTP/2, gRPC,
//! WebSocket, and what is none of these; to this node, to another, and out of the
//! mesh.

use std::{os::unix::fs::PermissionsExt as _, process::Command, time::Duration};

use anyhow::{Context as _, Result};
use postern_tests::{Lab, Node, Pod, PodOptions, Running, binary, eventually, output, text};
use serde_json::Value;

use crate::kit::{ECHO, at, echoes};

const PYTHON: &str = "/usr/bin/python3";
const PORT: u16 = 8080;
const FRONT: &str = "spiffe://cluster.local/ns/shop/sa/front";
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

fn script(lab: &Lab, name: &str, source: &str) -> Result<String> {
    let path = lab.path().join(name);
    std::fs::write(&path, source)?;
    Ok(path.display().to_string())
}

fn traceparent(id: &str) -> String {
    format!("traceparent: 00-{id}-b7ad6b7169203331-01")
}

/// Two nodes; `front` on the first, whose agent has a token endpoint within reach;
/// applications near and far.
struct World {
    lab: Lab,
    front: Pod,
    near: Pod,
    far: Pod,
    authority: Running,
    apps: Vec<Running>,
}

impl World {
    fn new() -> Result<Self> {
        let mut lab = Lab::started()?;
        let (front, near, far) = (
            lab.pod(1, "front")?,
            lab.pod(1, "near")?,
            lab.pod(2, "far")?,
        );
        let authority = authority(&lab, &lab.nodes[0])?;
        let app = script(&lab, "app.py", include_str!("outbound/app.py"))?;
        let mut apps = Vec::new();
        for pod in [&near, &far] {
            let mut python = pod.command(PYTHON)?;
            let running = pod.start("app", python.args([&app, &PORT.to_string()]))?;
            running.says("listening")?;
            apps.push(running);
        }
        // Pods of other nodes are asked for when they are dialled, and not for long: on a
        // busy machine the first connection may be refused.
        for pod in [&near, &far] {
            eventually("front reaches it", Duration::from_secs(30), || {
                ask(&front, &at(pod, PORT), "none", &[]).is_ok_and(|(s, _)| s == "200")
            })?;
        }
        Ok(Self {
            lab,
            front,
            near,
            far,
            authority,
            apps,
        })
    }

    fn object(&self, name: &str, spec: &str) -> Result<()> {
        let yaml = format!(
            "apiVersion: postern.dev/v1alpha1\nkind: OutboundToken\n\
             metadata: {{name: {name}, namespace: shop}}\n\
             spec: {{selector: {{matchLabels: {{app: front}}}}, {spec}}}\n"
        );
        self.lab.policy(name, &yaml)
    }

    /// By client credentials, for requests to `back`.
    fn credentials(&self, more: &str) -> Result<()> {
        self.object("to-back", &credentials(more))
    }

    /// What pods with this label ask of who calls them: a token of the authority.
    fn authentication(&self, name: &str, app: &str, keys: &str) -> Result<()> {
        let yaml = format!(
            "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\n\
             metadata: {{name: {name}, namespace: shop}}\n\
             spec: {{selector: {{matchLabels: {{app: {app}}}}}, jwtRules: \
             [{{issuer: 'https://as.example', jwks: '{keys}', forwardOriginalToken: true}}]}}\n---\n\
             apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
             metadata: {{name: {name}, namespace: shop}}\n\
             spec: {{selector: {{matchLabels: {{app: {app}}}}}, rules: \
             [{{from: [{{source: {{requestPrincipals: ['https://as.example/*']}}}}]}}]}}\n"
        );
        self.lab.policy(name, &yaml)
    }

    fn keys(&self) -> Result<String> {
        Ok(std::fs::read_to_string(self.lab.path().join("as.jwks"))?)
    }

    fn user(&self, name: &str) -> Result<String> {
        let mut python = Command::new(PYTHON);
        python.arg(self.lab.path().join("authority.py"));
        python.arg("user").arg(self.lab.path()).arg(name);
        Ok(text(&output(&mut python)?.stdout).trim().to_owned())
    }

    fn mode(&self, mode: &str) -> Result<()> {
        Ok(std::fs::write(self.lab.path().join("mode"), mode)?)
    }

    /// How often the authority was asked.
    fn asked(&self) -> usize {
        self.authority.output().matches("asked ").count()
    }
}

fn credentials(more: &str) -> String {
    format!(
        "hosts: [back], tokenEndpoint: 'http://127.0.0.1:8300/token', \
         grant: {{clientCredentials: {{}}}}, audiences: [back], scopes: [orders.read]{more}"
    )
}

fn authority(lab: &Lab, node: &Node) -> Result<Running> {
    let path = script(lab, "authority.py", include_str!("outbound/authority.py"))?;
    let mut python = node.command(PYTHON)?;
    python.args([&path, "8300"]).arg(lab.path());
    let running = Running::start(&mut python, lab.path().join("authority.log"))?;
    running.says("listening")?;
    Ok(running)
}

/// curl to an application that it calls `host`: status and body.
fn ask(pod: &Pod, address: &str, host: &str, more: &[&str]) -> Result<(String, String)> {
    let host = format!("Host: {host}");
    let url = format!("http://{address}/x");
    let mut arguments = vec!["--no-show-error", "-w", "\n%{http_code}", &url, "-H", &host];
    arguments.extend(more);
    let (code, said) = pod.curl(&arguments)?;
    let (body, status) = said.rsplit_once('\n').unwrap_or(("", &said));
    let broken = if code == 0 { "" } else { "!" };
    Ok((format!("{status}{broken}"), body.to_owned()))
}

/// The `Authorization` headers that came, as the application tells.
fn authorizations(body: &str) -> Result<Vec<String>> {
    let told: Value = serde_json::from_str(body).with_context(|| body.to_owned())?;
    let headers = told["headers"]["authorization"].as_array();
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    Ok(headers.into_iter().flatten().map(text).collect())
}

fn claims(authorization: &str) -> Result<Value> {
    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
    let token = authorization
        .strip_prefix("Bearer ")
        .context("a bearer token")?;
    let payload = token.split('.').nth(1).context("a JWT")?;
    Ok(serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload)?)?)
}

#[test]
fn requests_get_tokens_wherever_they_go() -> Result<()> {
    let world = World::new()?;
    world.credentials("")?;
    world.lab.policies(1)?;
    for pod in [&world.near, &world.far] {
        let address = at(pod, PORT);
        let (status, body) = ask(&world.front, &address, "back", &[])?;
        assert_eq!(status, "200", "{body}");
        let came = authorizations(&body)?;
        assert_eq!(came.len(), 1, "{body}");
        let claims = claims(&came[0])?;
        assert_eq!(
            (&claims["sub"], &claims["aud"]),
            (&FRONT.into(), &"back".into())
        );
        assert_eq!(claims["scope"], "orders.read");
        // The application's own loses, in any spelling; another host gets none.
        let own = [
            "-H",
            "Authorization: Basic x",
            "-H",
            "AUTHORIZATION: Bearer y",
        ];
        let (_, body) = ask(&world.front, &address, "BACK:8080", &own)?;
        assert_eq!(authorizations(&body)?, came);
        let (_, body) = ask(&world.front, &address, "other", &own[..2])?;
        assert_eq!(authorizations(&body)?, ["Basic x"]);
        // Bodies, 100-continue, and a connection that lives on.
        let large = [
            "-H",
            "Expect: 100-continue",
            "--data-binary",
            "@/usr/bin/python3",
        ];
        let (status, body) = ask(&world.front, &address, "back", &large)?;
        assert!(
            status == "200" && body.ends_with(&came[0]),
            "{status} {body}"
        );
        let (_, said) = world.front.curl(&[
            "-H",
            "Host: back",
            "-w",
            "%{num_connects}\n",
            "-o",
            "/dev/null",
            "-o",
            "/dev/null",
            &format!("http://{address}/1"),
            &format!("http://{address}/2"),
        ])?;
        assert_eq!(said, "1\n0\n");
        // Who is not selected is left alone.
        let other = if pod.node == 1 {
            &world.far
        } else {
            &world.near
        };
        let (_, body) = ask(other, &address, "back", &[])?;
        assert_eq!(authorizations(&body)?, [""; 0]);
    }
    assert_eq!(world.asked(), 1, "{}", world.authority.output());
    let node = &world.lab.nodes[0];
    let record = node.record("a request with its token", |r| {
        r["kind"] == "request" && r["reporter"] == "source" && r["outbound"]["from"] == "cached"
    })?;
    assert_eq!(record["outbound"]["object"], "shop/to-back");
    assert_eq!(record["outbound"]["grant"], "clientCredentials");
    assert_eq!(record["outbound"]["issuer"], "127.0.0.1:8300");
    assert_eq!(
        (&record["status"], &record["verdict"]),
        (&200.into(), &"allow".into())
    );
    let connection = node.record("its connection", |r| {
        r["kind"] == "connection" && r["id"] == record["connection"]
    })?;
    assert_eq!(connection["reporter"], "source");
    let grant = node.record("the grant", |r| r["kind"] == "token")?;
    assert_eq!(
        (&grant["identity"], &grant["lifetime"]),
        (&FRONT.into(), &600.into())
    );
    let metrics = node.metrics()?;
    for line in [
        "postern_token_grants_total{grant=\"clientCredentials\",result=\"granted\"} 1",
        "postern_outbound_tokens_total{name=\"fetched\"} 1",
    ] {
        assert!(metrics.contains(line), "{metrics}");
    }
    // Tunnels end in order, too: nothing is broken where all was answered.
    let far = world.lab.nodes[1].record("the far end's connection", |r| {
        r["kind"] == "connection" && r["reporter"] == "destination"
    })?;
    assert_eq!(far["end"], "closed", "{far}");
    let broken = world.lab.nodes[1].audit()?;
    let broken = broken
        .iter()
        .find(|r| r["kind"] == "connection" && r["end"] != "closed");
    assert_eq!(broken, None);
    // The token itself is nowhere but on its way.
    let (_, body) = ask(&world.front, &at(&world.far, PORT), "back", &[])?;
    let token = authorizations(&body)?.remove(0);
    let signature = token.rsplit('.').next().unwrap_or_default();
    for node in &world.lab.nodes {
        let audit = node.audit_text()?;
        assert!(!audit.contains(signature) && !node.log().contains(signature));
    }
    Ok(())
}

#[test]
fn without_a_token_nothing_goes() -> Result<()> {
    let world = World::new()?;
    world.credentials(", timeout: 300ms")?;
    world.mode("fail")?;
    world.lab.policies(1)?;
    for (index, pod) in [&world.near, &world.far].into_iter().enumerate() {
        let before = world.apps[index].output().matches("came ").count();
        let (status, said) = ask(&world.front, &at(pod, PORT), "back", &["-i"])?;
        assert_eq!(status, "503", "{said}");
        assert!(
            said.to_lowercase().contains("x-postern-reason: no-token"),
            "{said}"
        );
        assert!(said.contains("invalid_scope"), "{said}");
        assert_eq!(ask(&world.front, &at(pod, PORT), "other", &[])?.0, "200");
        let came = world.apps[index].output();
        assert_eq!(came.matches("came ").count(), before + 1, "{came}");
    }
    world.mode("wait")?;
    eventually(
        "it waits no longer than it may",
        Duration::from_secs(20),
        || {
            ask(&world.front, &at(&world.far, PORT), "back", &[])
                .is_ok_and(|(status, said)| status == "503" && said.contains("in time"))
        },
    )?;
    let record = world.lab.nodes[0].record("why is on record", |r| {
        r["kind"] == "token" && r["error"].as_str().is_some_and(|e| e.contains("(as told)"))
    })?;
    assert_eq!(record["clientAuthentication"], "private_key_jwt");
    world.lab.nodes[0].record("and of the request", |r| {
        r["kind"] == "request" && r["status"] == 503 && r["outbound"]["error"].is_string()
    })?;
    world.mode("ok")?;
    eventually("it is asked again", Duration::from_secs(20), || {
        ask(&world.front, &at(&world.far, PORT), "back", &[]).is_ok_and(|(s, _)| s == "200")
    })
}

#[test]
fn the_applications_own_header_may_win_and_two_objects_may_not() -> Result<()> {
    let world = World::new()?;
    world.credentials(", application: keep")?;
    world.lab.policies(1)?;
    for pod in [&world.near, &world.far] {
        let own = ["-H", "Authorization: Bearer own"];
        let (_, body) = ask(&world.front, &at(pod, PORT), "back", &own)?;
        assert_eq!(authorizations(&body)?, ["Bearer own"]);
    }
    assert_eq!(world.asked(), 0);
    // A JWT-SVID in a header of its own, for one port, and another object beside it.
    world.object(
        "own",
        "hosts: ['*.internal'], ports: ['8080'], grant: {workloadIdentity: {}}, audiences: [back], \
         header: {name: x-identity}",
    )?;
    world.object("two", &credentials("").replacen("[back]", "['a.*']", 1))?;
    world.lab.policies(3)?;
    for pod in [&world.near, &world.far] {
        let (_, body) = ask(
            &world.front,
            &at(pod, PORT),
            "b.internal",
            &["-H", "x_identity: me"],
        )?;
        let told: Value = serde_json::from_str(&body)?;
        let svid = told["headers"]["x-identity"][0]
            .as_str()
            .context(body.clone())?;
        assert_eq!(claims(&format!("Bearer {svid}"))?["sub"], FRONT);
        assert!(told["headers"].get("x_identity").is_none(), "{body}");
        let (status, said) = ask(&world.front, &at(pod, PORT), "a.internal", &[])?;
        assert_eq!(status, "503");
        assert!(
            said.contains("shop/own") && said.contains("shop/two"),
            "{said}"
        );
    }
    Ok(())
}

#[test]
fn http2_and_grpc_calls_get_tokens_one_by_one() -> Result<()> {
    let world = World::new()?;
    let grpc = script(
        &world.lab,
        "grpc_tokens.py",
        include_str!("outbound/grpc_peer.py"),
    )?;
    let mut serving = Vec::new();
    for pod in [&world.near, &world.far] {
        let mut python = pod.command(PYTHON)?;
        let running = pod.start("grpc", python.args([&grpc, "serve", "50051"]))?;
        running.says("listening")?;
        serving.push(running);
    }
    world.credentials("")?;
    world.lab.policies(1)?;
    let call = |pod: &Pod, host: &str| -> Result<String> {
        let mut python = world.front.command(PYTHON)?;
        python.args([&grpc, "call", &at(pod, 50051), host, "/a.B/C", "/a.B/D"]);
        Ok(text(&output(&mut python)?.stdout))
    };
    // A message of gRPC, by hand: no compression, and no bytes.
    let empty = world.lab.path().join("message");
    std::fs::write(&empty, [0; 5])?;
    let data = format!("@{}", empty.display());
    for pod in [&world.near, &world.far] {
        let said = call(pod, "back")?;
        assert_eq!(said.matches("OK Bearer ey").count(), 2, "{said}");
        assert_eq!(call(pod, "other")?, "OK none\nOK none\n");
        let http2 = [
            "--http2-prior-knowledge",
            "-H",
            "content-type: application/grpc",
            "-H",
            "te: trailers",
            "--data-binary",
            &data,
        ];
        let (status, body) = ask(&world.front, &at(pod, 50051), "back", &http2)?;
        assert!(
            status == "200" && body.contains("Bearer ey"),
            "{status} {body}"
        );
    }
    assert_eq!(world.asked(), 1);
    // Other tokens, that cannot be had.
    world.mode("fail")?;
    world.credentials(", resources: ['https://back']")?;
    eventually("the object is in force", Duration::from_secs(10), || {
        call(&world.near, "back").is_ok_and(|said| said.starts_with("UNAVAILABLE"))
    })?;
    for (pod, serving) in [(&world.near, &serving[0]), (&world.far, &serving[1])] {
        let before = serving.output().matches("came").count();
        let said = call(pod, "back")?;
        assert_eq!(
            said.matches("UNAVAILABLE no token for this request")
                .count(),
            2,
            "{said}"
        );
        assert_eq!(serving.output().matches("came").count(), before);
    }
    Ok(())
}

#[test]
fn the_destination_verifies_and_what_it_refuses_is_not_used_again() -> Result<()> {
    let world = World::new()?;
    let keys = world.keys()?;
    world.authentication("near", "near", &keys)?;
    world.authentication("far", "far", &keys)?;
    world.credentials("")?;
    world.lab.policies(5)?;
    for pod in [&world.near, &world.far] {
        let (status, body) = ask(
            &world.front,
            &at(pod, PORT),
            "back",
            &["-H", &traceparent(TRACE)],
        )?;
        assert_eq!(status, "200", "{body}");
        assert_eq!(ask(&world.front, &at(pod, PORT), "other", &[])?.0, "403");
        let record = world.lab.nodes[pod.node - 1].record("who came", |r| {
            r["kind"] == "request" && r["reporter"] == "destination" && r["trace"] == TRACE
        })?;
        assert_eq!(record["token"]["sub"], FRONT);
    }
    assert_eq!(world.asked(), 1);
    assert!(
        world
            .authority
            .output()
            .contains(&format!("trace=00-{TRACE}-"))
    );
    // Keys of somebody else: two tokens are tried, and then no more.
    let other = foreign_keys()?;
    world.authentication("near", "near", &other)?;
    world.authentication("far", "far", &other)?;
    for pod in [&world.near, &world.far] {
        eventually("the keys are others", Duration::from_secs(30), || {
            ask(&world.front, &at(pod, PORT), "back", &[]).is_ok_and(|(s, _)| s == "401")
        })?;
    }
    for _ in 0..4 {
        assert_eq!(
            ask(&world.front, &at(&world.far, PORT), "back", &[])?.0,
            "401"
        );
    }
    assert_eq!(world.asked(), 2, "{}", world.authority.output());
    Ok(())
}

/// A key set that has signed nothing.
fn foreign_keys() -> Result<String> {
    let source = "import json; from cryptography.hazmat.primitives.asymmetric import ec\n\
        from jwt.algorithms import ECAlgorithm\n\
        key = ec.generate_private_key(ec.SECP256R1()).public_key()\n\
        print(json.dumps({'keys': [{**json.loads(ECAlgorithm.to_jwk(key)), 'kid': 'as'}]}))";
    Ok(
        text(&output(Command::new(PYTHON).args(["-c", source]))?.stdout)
            .trim()
            .to_owned(),
    )
}

#[test]
fn a_websocket_begins_with_a_token_and_other_protocols_do_as_ever() -> Result<()> {
    let mut world = World::new()?;
    let websocket = script(
        &world.lab,
        "websocket.py",
        include_str!("requests/websocket.py"),
    )?;
    world.object("all", &credentials("").replacen("[back]", "['*']", 1))?;
    world.lab.policies(1)?;
    let mut running = Vec::new();
    for pod in [&world.near, &world.far] {
        let mut serve = pod.command(PYTHON)?;
        let serving = pod.start("websocket", serve.args([&websocket, "serve", "8081"]))?;
        serving.says("listening")?;
        let mut python = world.front.command(PYTHON)?;
        python.args([&websocket, "talk", &format!("ws://{}/chat", at(pod, 8081))]);
        let talk = world
            .front
            .start(&format!("talk-{}", pod.name), &mut python)?;
        talk.says("heard word 3")?;
        // What is no HTTP, also where the server speaks first.
        running.extend([
            pod.serve("echo", ECHO)?,
            pod.serve("greet", 9001)?,
            serving,
            talk,
        ]);
        assert!(echoes(&world.front, &at(pod, ECHO))?);
        let greeted = world.front.dial(&at(pod, 9001), &["--half-close"])?;
        assert_eq!(greeted["end"], "eof", "{greeted}");
    }
    assert_eq!(world.asked(), 1);
    postgres(&mut world)
}

fn postgres(world: &mut World) -> Result<()> {
    let server = world.lab.pod(2, "postgres")?;
    let data = server.dir().join("data");
    let bin = std::fs::read_dir("/usr/lib/postgresql").context("package postgresql")?;
    let bin = bin
        .flatten()
        .map(|v| v.path())
        .max()
        .context("package postgresql")?;
    let bin = bin.join("bin").display().to_string();
    output(Command::new("chown").arg("postgres").arg(server.dir()))?;
    output(Command::new("chmod").args(["a+x"]).arg(world.lab.path()))?;
    let as_postgres = |program: &str| -> Result<Command> {
        let mut command = server.command("setpriv")?;
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]);
        command.arg(format!("{bin}/{program}")).arg("-D").arg(&data);
        Ok(command)
    };
    output(as_postgres("initdb")?.args(["-A", "trust", "--no-sync"]))?;
    let rule = format!("host all all {}/32 trust\n", world.front.ip);
    std::fs::write(data.join("pg_hba.conf"), rule)?;
    let mut run = as_postgres("postgres")?;
    run.args(["-c", "listen_addresses=*", "-c", "unix_socket_directories="]);
    let postgres = server.start("postgres", &mut run)?;
    postgres.says("ready to accept connections")?;
    let mut psql = world.front.command("psql")?;
    psql.args([
        "-h", &server.ip, "-U", "postgres", "-d", "postgres", "-At", "-c",
    ]);
    psql.arg("select count(*), inet_client_addr() from generate_series(1,50000)");
    let said = text(&output(&mut psql)?.stdout);
    assert!(
        said.contains(&format!("50000|{}", world.front.ip)),
        "{said}"
    );
    Ok(())
}

#[test]
fn what_was_opened_unread_does_not_outlive_an_outbound_token() -> Result<()> {
    let world = World::new()?;
    let mut running = Vec::new();
    for pod in [&world.near, &world.far] {
        running.push(pod.serve("echo", ECHO)?);
        let mut probe = world.front.command(binary("probe")?)?;
        probe.args(["stay", &at(pod, ECHO)]);
        let stay = world
            .front
            .start(&format!("stay-{}", pod.name), &mut probe)?;
        stay.says("beat 000001")?;
        running.push(stay);
    }
    world.credentials(", ports: ['8080']")?;
    world.lab.policies(1)?;
    let beats = running[1].output().lines().count();
    eventually("it goes on", Duration::from_secs(10), || {
        running[1].output().lines().count() > beats + 2
    })?;
    world.credentials(", ports: ['9000']")?;
    for stay in [&running[1], &running[3]] {
        stay.says("ended: ECONNRESET")?;
    }
    Ok(())
}

#[test]
fn no_token_leaves_the_mesh() -> Result<()> {
    let mut world = World::new()?;
    let outside = PodOptions {
        mesh: Some(false),
        ..PodOptions::default()
    };
    let outside = world.lab.pod_with(2, "outside", outside)?;
    let app = world.lab.path().join("app.py").display().to_string();
    let mut python = outside.command(PYTHON)?;
    let serving = outside.start("app", python.args([&app, "8080"]))?;
    serving.says("listening")?;
    // A service with an endpoint in the mesh, which is not ready, and one outside.
    let address = world
        .lab
        .service("mixed", 7, "ports: [{port: 80, targetPort: 8080}]")?;
    let endpoint = |pod: &Pod, ready: bool| {
        format!(
            "{{addresses: [{}], conditions: {{ready: {ready}}}, targetRef: {{kind: Pod, name: {}, namespace: shop, uid: {}}}}}",
            pod.ip, pod.name, pod.uid
        )
    };
    world.lab.manifest(
        "slice-mixed",
        &format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {{name: mixed-1, namespace: shop, labels: {{kubernetes.io/service-name: mixed}}}}\n\
             addressType: IPv4\nports: [{{port: 8080, protocol: TCP}}]\nendpoints: [{}, {}]\n",
            endpoint(&world.far, false),
            endpoint(&outside, true)
        ),
    )?;
    world.credentials("")?;
    world.lab.policies(1)?;
    eventually("the service is known", Duration::from_secs(10), || {
        ask(&world.front, &address, "other", &[]).is_ok_and(|(status, _)| status == "200")
    })?;
    let before = serving.output().matches("came").count();
    let (status, said) = ask(&world.front, &address, "back", &["-i"])?;
    assert_eq!(status, "503", "{said}");
    assert!(said.contains("plaintext"), "{said}");
    assert_eq!(serving.output().matches("came").count(), before);
    assert_eq!(world.asked(), 0);
    Ok(())
}

#[test]
fn a_pods_own_account_is_exchanged() -> Result<()> {
    let world = World::new()?;
    let path = world.front.dir().join("token");
    let write = |name: &str| -> Result<()> {
        std::fs::write(&path, world.user(name)? + "\n")?;
        Ok(std::fs::set_permissions(
            &path,
            std::fs::Permissions::from_mode(0o600),
        )?)
    };
    write("system:serviceaccount:shop:front")?;
    let exchange = |path: &str| {
        format!(
            "{{tokenExchange: {{subject: serviceAccount, serviceAccountTokenPath: {path}, actor: workload}}}}"
        )
    };
    let spec = credentials("").replace(
        "{clientCredentials: {}}",
        &exchange(&path.display().to_string()),
    );
    world.object("to-back", &spec)?;
    world.lab.policies(1)?;
    let (_, body) = ask(&world.front, &at(&world.far, PORT), "back", &[])?;
    let token = claims(&authorizations(&body)?.remove(0))?;
    assert_eq!(token["sub"], "system:serviceaccount:shop:front");
    assert_eq!(token["act"]["sub"], FRONT);
    // A pipe that nobody writes to: refused, not waited for.
    let pipe = world.front.dir().join("pipe");
    output(Command::new("mkfifo").arg(&pipe))?;
    let spec = credentials("").replace(
        "{clientCredentials: {}}",
        &exchange(&pipe.display().to_string()),
    );
    world.object("to-back", &spec)?;
    eventually("the object is in force", Duration::from_secs(10), || {
        ask(&world.front, &at(&world.far, PORT), "back", &[])
            .is_ok_and(|(status, said)| status == "503" && said.contains("no subject token"))
    })?;
    world.lab.nodes[0].record("why is on record", |r| {
        r["kind"] == "token"
            && r["error"]
                .as_str()
                .is_some_and(|e| e.contains("not a regular file"))
    })?;
    Ok(())
}

/// A user calls `front`, which calls another on the user's behalf; it passes on nothing
/// but the trace.
#[test]
fn calls_are_made_on_behalf_of_whoever_asked() -> Result<()> {
    let mut world = World::new()?;
    let user = world.lab.pod(2, "user")?;
    let app = world.lab.path().join("app.py").display().to_string();
    let mut python = world.front.command(PYTHON)?;
    let front = world
        .front
        .start("app", python.args([&app, &PORT.to_string()]))?;
    front.says("listening")?;
    world.authentication("front", "front", &world.keys()?)?;
    let spec = credentials(", onBehalfOf: {}").replace(
        "{clientCredentials: {}}",
        "{tokenExchange: {subject: inbound, actor: workload}}",
    );
    world.object("to-back", &spec)?;
    world.lab.policies(3)?;
    let call = |who: &str, to: &Pod, trace: Option<&str>| -> Result<(String, String)> {
        let url = format!(
            "http://{}/call?url=http://{}/x",
            at(&world.front, PORT),
            at(to, PORT)
        );
        let token = format!("Authorization: Bearer {}", world.user(who)?);
        let mut arguments = vec!["-w", "\n%{http_code}", &url, "-H", &token];
        let header = trace.map(traceparent).unwrap_or_default();
        if trace.is_some() {
            arguments.extend(["-H", &header]);
        }
        let (_, said) = user.curl(&arguments)?;
        let (body, status) = said.rsplit_once('\n').unwrap_or(("", &said));
        Ok((status.to_owned(), body.to_owned()))
    };
    let trace = |n: u32| format!("{n:032x}");
    for (n, who, to) in [(1, "alice", &world.near), (2, "bob", &world.far)] {
        let (status, body) = call(who, to, Some(&trace(n)))?;
        assert_eq!(status, "200", "{body}");
        let token = claims(&authorizations(&body)?.remove(0))?;
        assert_eq!(
            (&token["sub"], &token["act"]["sub"]),
            (&who.into(), &FRONT.into())
        );
        let node = &world.lab.nodes[0];
        let record = node.record("on whose behalf", |r| {
            r["kind"] == "request" && r["reporter"] == "source" && r["trace"] == trace(n)
        })?;
        assert_eq!(record["outbound"]["onBehalfOf"], who);
        assert_eq!(record["outbound"]["subject"], "inbound");
        let grant = node.record("the grant, too", |r| {
            r["kind"] == "token" && r["trace"] == trace(n)
        })?;
        assert_eq!(grant["onBehalfOf"], who);
    }
    // No trace, and one that nobody came with: nobody's token, never the workload's own.
    let (status, body) = call("alice", &world.far, None)?;
    assert!(
        status == "503" && body.contains("on whose behalf"),
        "{status} {body}"
    );
    let header = traceparent(&trace(9));
    let (status, body) = ask(
        &world.front,
        &at(&world.far, PORT),
        "back",
        &["-H", &header],
    )?;
    assert!(
        status == "503" && body.contains("no user's token"),
        "{status} {body}"
    );
    // Two users with one trace: neither is believed to be meant.
    let (status, body) = call("mallory", &world.far, Some(&trace(1)))?;
    assert!(
        status == "503" && body.contains("two users"),
        "{status} {body}"
    );
    let asked = world.authority.output();
    assert!(
        !asked.contains("mallory") && !asked.contains("client_credentials"),
        "{asked}"
    );
    Ok(())
}

/// The application passes the user's token on itself, and it is exchanged on the way.
#[test]
fn a_token_that_the_application_passes_on_is_exchanged() -> Result<()> {
    let world = World::new()?;
    let spec = credentials("").replace(
        "{clientCredentials: {}}",
        "{tokenExchange: {subject: inbound}}",
    );
    world.object("to-back", &spec)?;
    world.lab.policies(1)?;
    for pod in [&world.near, &world.far] {
        let own = format!("Authorization: Bearer {}", world.user("carol")?);
        let (_, body) = ask(&world.front, &at(pod, PORT), "back", &["-H", &own])?;
        let token = claims(&authorizations(&body)?.remove(0))?;
        assert_eq!(
            (&token["sub"], &token["aud"]),
            (&"carol".into(), &"back".into())
        );
        let (status, _) = ask(&world.front, &at(pod, PORT), "back", &[])?;
        assert_eq!(status, "503");
    }
    Ok(())
}
