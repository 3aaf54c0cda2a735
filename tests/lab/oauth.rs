//! Authentication from end to end: a person logs in at `postern authority`, a service
//! gets the person's token, and calls go on in the person's name from service to
//! service, none of which knows anything of it.

use std::{process::Command, time::Duration};

use anyhow::{Context as _, Result};
use postern_tests::{Lab, Running, audit_records, audit_text, binary, eventually, output};
use serde_json::Value;

use crate::{kit::at, login::trusting};

const PYTHON: &str = "/usr/bin/python3";
const PORT: u16 = 8080;
const ISSUER: &str = "https://192.0.2.1:8443";
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PASSWORD: &str = "correct horse battery staple";

fn spiffe(account: &str) -> String {
    format!("spiffe://cluster.local/ns/shop/sa/{account}")
}

/// A workload that may exchange tokens made for it for tokens made for another.
fn exchanger(account: &str, audience: &str) -> String {
    let id = spiffe(account);
    format!(
        "  - {{id: '{id}', authentication: {{workload: {{spiffeId: '{id}'}}}}, \
         grants: [token_exchange], scopes: [orders.read], audiences: [{audience}], \
         subjectAudiences: [{account}]}}\n"
    )
}

fn authority(lab: &Lab) -> Result<Running> {
    let dir = lab.path().display();
    let config = lab.path().join("authority.yaml");
    let text = format!(
        "issuer: {ISSUER}\nlisten: 192.0.2.1:8443\nstate: {dir}/authority\n\
         certificates: {{rootCertificate: {dir}/root.pem, rootKey: {dir}/root.key}}\n\
         audit: {{directory: {dir}/authority-audit}}\n\
         clients:\n  \
         - {{id: shop-web, name: The shop, authentication: {{none: {{}}}}, grants: [authorization_code], \
         redirectUris: ['https://10.0.1.10:{PORT}/callback'], scopes: [openid, profile, orders.read], \
         audiences: [front]}}\n{}{}",
        exchanger("front", "middle"),
        exchanger("middle", "back"),
    );
    std::fs::write(&config, text)?;
    let mut add = Command::new(binary("postern")?);
    add.args([
        "authority",
        "user",
        "add",
        "alice",
        "--name",
        "Alice",
        "--config",
    ]);
    with_input(add.arg(&config), PASSWORD)?;
    let mut command = lab.nodes[0].command(binary("postern")?)?;
    command.args(["authority", "run", "--config"]).arg(&config);
    let running = Running::start(&mut command, lab.path().join("authority.log"))?;
    running.says("ready")?;
    Ok(running)
}

fn with_input(command: &mut Command, input: &str) -> Result<()> {
    use std::{io::Write as _, process::Stdio};
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    writeln!(child.stdin.take().context("a pipe")?, "{input}")?;
    let done = child.wait_with_output()?;
    anyhow::ensure!(
        done.status.success(),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
    Ok(())
}

/// Files with a certificate under the lab's root, and its key.
fn certificate(lab: &Lab, host: &str) -> Result<[String; 2]> {
    use rcgen::{CertificateParams, Issuer, KeyPair};
    let read = |name: &str| std::fs::read_to_string(lab.path().join(name));
    let root =
        Issuer::from_ca_cert_pem(&read("root.pem")?, KeyPair::from_pem(&read("root.key")?)?)?;
    let key = KeyPair::generate()?;
    let leaf = CertificateParams::new([host.to_owned()])?.signed_by(&key, &root)?;
    let files = [
        ("front.pem", leaf.pem()),
        ("front.key", key.serialize_pem()),
    ];
    let mut paths = [String::new(), String::new()];
    for (path, (name, pem)) in paths.iter_mut().zip(files) {
        let file = lab.path().join(name);
        std::fs::write(&file, pem)?;
        *path = file.display().to_string();
    }
    Ok(paths)
}

fn exchange(account: &str, next: &str, host: &str, more: &str) -> String {
    format!(
        "apiVersion: postern.dev/v1alpha1\nkind: OutboundToken\n\
         metadata: {{name: {account}-to-{next}, namespace: shop}}\nspec:\n  \
         selector: {{matchLabels: {{app: {account}}}}}\n  hosts: ['{host}']\n  issuer: {ISSUER}\n  \
         grant: {{tokenExchange: {{subject: inbound}}}}\n  \
         clientAuthentication: {{privateKeyJwt: {{}}}}\n  \
         audiences: [{next}]\n  scopes: [orders.read]\n{more}"
    )
}

fn accepts(account: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\n\
         metadata: {{name: {account}, namespace: shop}}\n\
         spec: {{selector: {{matchLabels: {{app: {account}}}}}, \
         jwtRules: [{{issuer: '{ISSUER}', audiences: [{account}]}}]}}\n"
    )
}

fn admits(account: &str, when: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {{name: {account}, namespace: shop}}\nspec:\n  \
         selector: {{matchLabels: {{app: {account}}}}}\n  rules:\n  - when:\n{when}"
    )
}

fn claim(name: &str, value: &str) -> String {
    format!("    - {{key: 'request.auth.claims{name}', values: ['{value}']}}\n")
}

#[test]
fn a_person_logs_in_and_services_call_on_in_the_persons_name() -> Result<()> {
    let mut lab = Lab::new(2)?;
    let _authority = authority(&lab)?;
    let more = format!("jwt: {{roots: {}/root.pem}}\n", lab.path().display());
    for node in &mut lab.nodes {
        node.options.more.clone_from(&more);
        node.start()?;
    }
    // The front's address is known to the authority as its redirect.
    let front = lab.pod(1, "front")?;
    assert_eq!(front.ip, "10.0.1.10");
    let (middle, back) = (lab.pod(2, "middle")?, lab.pod(2, "back")?);
    let scripts = lab.path().join("oauth");
    std::fs::create_dir(&scripts)?;
    for (name, source) in [
        ("front.py", include_str!("oauth/front.py")),
        ("service.py", include_str!("oauth/service.py")),
        ("browser.py", include_str!("oauth/browser.py")),
        ("webdriver.py", include_str!("login/webdriver.py")),
    ] {
        std::fs::write(scripts.join(name), source)?;
    }
    let script = |name: &str| scripts.join(name).display().to_string();
    let roots = lab.path().join("root.pem").display().to_string();
    let mut python = front.command(PYTHON)?;
    python.args([
        &script("front.py"),
        ISSUER,
        &roots,
        "shop-web",
        &at(&middle, PORT),
    ]);
    python
        .arg(PORT.to_string())
        .args(certificate(&lab, &front.ip)?);
    let web = front.start("front", &mut python)?;
    let mut python = middle.command(PYTHON)?;
    python.args([
        &script("service.py"),
        "middle",
        &PORT.to_string(),
        &at(&back, PORT),
    ]);
    let between = middle.start("service", &mut python)?;
    let mut python = back.command(PYTHON)?;
    python.args([&script("service.py"), "back", &PORT.to_string()]);
    let last = back.start("service", &mut python)?;
    for service in [&web, &between, &last] {
        service.says("listening")?;
    }
    lab.policy("front-out", &exchange("front", "middle", &middle.ip, ""))?;
    let follow = "  onBehalfOf: {traceHeader: traceparent}\n";
    lab.policy("middle-out", &exchange("middle", "back", &back.ip, follow))?;
    for account in ["middle", "back"] {
        lab.policy(&format!("{account}-tokens"), &accepts(account))?;
    }
    // By the person, by who acts for the person, and by what was agreed to.
    let sub = person(&lab)?;
    let scope = claim("[scope]", "orders.read");
    let by_front = [
        claim("[sub]", &sub),
        claim("[act][sub]", &spiffe("front")),
        scope.clone(),
    ];
    lab.policy("middle-in", &admits("middle", &by_front.concat()))?;
    let by_both = [
        claim("[sub]", &sub),
        claim("[act][sub]", &spiffe("middle")),
        claim("[act][act][sub]", &spiffe("front")),
        scope,
    ];
    lab.policy("back-in", &admits("back", &by_both.concat()))?;
    lab.policies(6)?;

    // A browser that is no part of the mesh. It gives up on a page when an address of
    // its host changes, as those of new links do for a moment (RFC 4862 5.4).
    let settled = || -> Result<bool> {
        let mut tentative = lab.nodes[1].command("ip")?;
        tentative.args(["-6", "-oneline", "address", "show", "tentative"]);
        Ok(output(&mut tentative)?.stdout.is_empty())
    };
    eventually("addresses are settled", Duration::from_secs(10), || {
        settled().unwrap_or(false)
    })?;
    let mut browser = lab.nodes[1].command(PYTHON)?;
    let login = format!("https://{}/login", at(&front, PORT));
    let trace = format!("00-{TRACE}-00f067aa0ba902b7-01");
    let home = trusting(lab.path(), &lab.path().join("root.pem"))?;
    browser.arg(script("browser.py")).arg(home);
    browser.args([&login, "alice", PASSWORD, &trace]);
    let seen = output(&mut browser)?;
    let seen: Value = serde_json::from_slice(&seen.stdout).context("what the browser shows")?;
    let records = || -> Result<Vec<Value>> {
        let all = lab.nodes[1].audit()?;
        Ok(all
            .into_iter()
            .filter(|r| r["kind"] == "request" || r["kind"] == "token")
            .collect())
    };
    assert_eq!(seen["status"], 200, "{seen}\n{:#?}", records()?);
    let said: Value = serde_json::from_str(seen["body"].as_str().context("text")?)?;
    assert_eq!(said["next"]["name"], "back", "{said}");
    // No service was shown a token that it did not bring.
    assert_eq!(said["authorization"], false, "{said}");
    assert_eq!(said["next"]["authorization"], false, "{said}");

    // The person's own token opens neither.
    let token = std::fs::read_to_string(front.dir().join("token"))?;
    let bearer = format!("Authorization: Bearer {token}");
    for pod in [&middle, &back] {
        let mut stranger = lab.nodes[0].command("curl")?;
        stranger.args([
            "-sS",
            "-m",
            "20",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code}",
            "-H",
            &bearer,
        ]);
        stranger.arg(format!("http://{}/orders", at(pod, PORT)));
        let status = output(&mut stranger)?.stdout;
        assert_eq!(String::from_utf8_lossy(&status), "403", "{}", pod.name);
    }
    told(&lab)
}

/// One trace id tells the whole story.
fn told(lab: &Lab) -> Result<()> {
    let of_authority = || -> Vec<Value> {
        let records = audit_records(&lab.path().join("authority-audit")).unwrap_or_default();
        let of_trace = |r: &Value| r["trace"] == TRACE;
        records.into_iter().filter(of_trace).collect()
    };
    let has = |event: &str, fits: &dyn Fn(&Value) -> bool| -> Result<()> {
        let there = || {
            of_authority()
                .iter()
                .any(|r| r["event"] == event && fits(r))
        };
        eventually(
            &format!("{event} is recorded"),
            Duration::from_secs(5),
            there,
        )
        .with_context(|| format!("{:#?}", of_authority()))
    };
    has("login", &|r| r["error"].is_null())?;
    has("consent", &|r| r["client"] == "shop-web")?;
    has("grant", &|r| {
        r["client"] == "shop-web" && r["grant"] == "authorization_code"
    })?;
    has("grant", &|r| {
        r["actor"] == spiffe("front") && r["audience"][0] == "middle"
    })?;
    has("grant", &|r| {
        r["actor"] == spiffe("middle") && r["audience"][0] == "back"
    })?;
    for (node, destination, actor) in [(1, "middle", "front"), (1, "back", "middle")] {
        let record = lab.nodes[node].record(&format!("the call of {destination}"), |r| {
            r["kind"] == "request"
                && r["trace"] == TRACE
                && r["reporter"] == "destination"
                && r["destination"]["workload"] == destination
        })?;
        assert_eq!(record["verdict"], "allow", "{record}");
        assert_eq!(record["source"]["identity"], spiffe(actor), "{record}");
        assert_eq!(record["token"]["act"][0], spiffe(actor), "{record}");
    }
    for (node, source) in [(0, "front"), (1, "middle")] {
        lab.nodes[node].record(&format!("the token of {source}"), |r| {
            r["trace"] == TRACE && r["kind"] == "token"
        })?;
    }
    // None of it holds a token.
    for log in [
        lab.nodes[0].audit_path(),
        lab.nodes[1].audit_path(),
        lab.path().join("authority-audit"),
    ] {
        let text = audit_text(&log)?;
        assert!(!text.contains("eyJ"), "{text}");
    }
    Ok(())
}

/// The person's `sub`.
fn person(lab: &Lab) -> Result<String> {
    let mut list = Command::new(binary("postern")?);
    list.args(["authority", "user", "list", "--config"]);
    let listed = output(list.arg(lab.path().join("authority.yaml")))?;
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    let line = listed.lines().find(|line| line.contains("alice"));
    let id = line.and_then(|line| line.split_whitespace().nth(1));
    Ok(id.context(listed.clone())?.to_owned())
}
