//! The page of the admin address, in a real browser, with real traffic behind it.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use postern_tests::{Lab, Node, Pod, PodOptions, Running, output, text};
use rcgen::{CertificateParams, Issuer, KeyPair};
use serde_json::{Value, json};

use crate::{
    kit::{ECHO, at, authorization, echoes},
    login::{script, trusting},
};

const PYTHON: &str = "/usr/bin/python3";
const PORT: u16 = 8080;
const ADMIN: &str = "http://127.0.0.1:15000/";
const TOKEN: &str = "a-token-of-the-lab-that-is-long-enough";
/// What a program may be called, and a page must not run.
const HOSTILE: &str = "<img src=x onerror=hostile=1>";

/// axe-core, as `cargo xtask setup` installed it.
fn axe() -> Result<PathBuf> {
    let tools = std::env::var_os("POSTERN_TOOLS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools"),
        PathBuf::from,
    );
    let axe = tools.join("axe/node_modules/axe-core/axe.min.js");
    if !axe.is_file() {
        let path = axe.display();
        bail!("there is no {path}: run `cargo xtask setup --tier lab`");
    }
    Ok(axe)
}

/// Runs the browser on a node.
fn drive(
    lab: &Lab,
    node: &Node,
    home: &Path,
    what: &str,
    url: &str,
    more: &[&str],
) -> Result<Value> {
    let directory = lab.path().join(format!("browser-{what}"));
    std::fs::create_dir_all(&directory)?;
    script(
        &directory,
        "webdriver.py",
        include_str!("login/webdriver.py"),
    )?;
    let drive = script(&directory, "drive.py", include_str!("page/drive.py"))?;
    let mut python = node.command(PYTHON)?;
    python.arg(drive).args([what, url]).arg(home).args(more);
    let driven = output(&mut python).with_context(|| node.log())?;
    serde_json::from_slice(&driven.stdout).context("what was seen")
}

/// A small shop on two nodes, whose first node has all the ways of travel.
struct Shop {
    lab: Lab,
    _pods: [Pod; 6],
    _servers: Vec<Running>,
}

impl Shop {
    fn open() -> Result<Self> {
        let mut lab = Lab::started()?;
        let front = lab.pod(1, "front")?;
        let cart = lab.pod(1, "cart")?;
        let catalogue = lab.pod(2, "catalogue")?;
        let payments = lab.pod(2, "payments")?;
        let batch = lab.pod(2, "batch")?;
        let outside = PodOptions {
            mesh: Some(false),
            namespace: "ops".into(),
            ..PodOptions::default()
        };
        let monitor = lab.pod_with(2, "monitor", outside)?;
        let mut servers = Vec::new();
        for pod in [&front, &cart, &catalogue] {
            servers.push(pod.nginx(PORT, "page")?);
        }
        servers.push(payments.serve("echo", ECHO)?);
        lab.policy(
            "cart",
            &authorization(
                "only-the-front",
                "{selector: {matchLabels: {app: cart}}, rules: [{from: [{source: {principals: \
                 ['cluster.local/ns/shop/sa/front']}}], to: [{operation: {methods: [GET]}}]}]}",
            ),
        )?;
        lab.policies(1)?;
        let page = |pod: &Pod| format!("http://{}/", at(pod, PORT));
        for _ in 0..30 {
            assert_eq!(front.curl(&[&page(&catalogue)])?.0, 0);
            assert_eq!(front.curl(&[&page(&cart)])?.0, 0);
        }
        attack(&front, &cart)?;
        for _ in 0..3 {
            assert!(echoes(&cart, &at(&payments, ECHO))?);
            // No rule could allow it: its connection is refused.
            assert_ne!(batch.curl(&[&page(&cart)])?.0, 0);
            assert_eq!(monitor.curl(&[&page(&front)])?.0, 0);
            assert_eq!(front.curl(&["-X", "POST", &page(&cart)])?.0, 0);
        }
        let mut probe = lab.nodes[0].command("curl")?;
        output(probe.args(["-sS", "-m", "5", "--noproxy", "*", &page(&front)]))?;
        Ok(Self {
            lab,
            _pods: [front, cart, catalogue, payments, batch, monitor],
            _servers: servers,
        })
    }
}

/// Names, paths and hosts that a page must show and not run.
fn attack(front: &Pod, cart: &Pod) -> Result<()> {
    let program = front.dir().join(HOSTILE);
    std::fs::copy("/usr/bin/curl", &program)?;
    let url = |path: &str| format!("http://{}{path}", at(cart, PORT));
    for (url, header) in [
        (url("/app/'><svg/onload=hostile=2>"), "Accept: */*"),
        (url("/app/x"), "Host: '><script>hostile=3</script>"),
        (
            url("/app/%3Cimg%20src=x%20onerror=hostile=4%3E"),
            "Host: <b>",
        ),
    ] {
        let mut curl = front.command(&program)?;
        curl.args(["-sS", "-m", "5", "--noproxy", "*", "--path-as-is"]);
        curl.args(["-A", HOSTILE, "-H", header]);
        output(curl.arg(url))?;
    }
    Ok(())
}

fn edge<'a>(rows: &'a Value, from: &str, to: &str) -> Option<&'a Value> {
    let rows = rows.as_array()?;
    rows.iter().find(|row| row[0] == from && row[1] == to)
}

/// That axe-core has looked, and found nothing wrong.
fn clean(audit: &Value) {
    for scheme in ["light", "dark"] {
        let found = &audit[scheme];
        assert_eq!(found["violations"], json!([]), "{scheme}");
        assert!(found["passes"].as_u64() > Some(15), "{found}");
    }
}

#[test]
fn the_page_shows_what_happens_and_runs_nothing_of_it() -> Result<()> {
    let axe = axe()?;
    let shop = Shop::open()?;
    let node = &shop.lab.nodes[0];
    let mtls = "Encrypted (mTLS)";
    let front = "shop/front";
    let some = "! Some denied AuthorizationPolicy shop/only-the-front";
    let denied = "✕ Denied AuthorizationPolicy shop/only-the-front";
    let edges = [
        (front, "shop/cart", "Local", some),
        (front, "shop/catalogue", mtls, "✓ Allowed"),
        ("shop/batch", "shop/cart", mtls, denied),
        ("ops/monitor", front, "Plaintext", "✓ Allowed"),
        ("shop/cart", "shop/payments", mtls, "✓ Allowed"),
        ("node", front, "Probe", "✓ Allowed"),
    ];
    let expected: Vec<_> = edges
        .iter()
        .map(|(from, to, how, _)| [from, to, how])
        .collect();
    let expected = serde_json::to_string(&expected)?;
    let home = shop.lab.path().join("home");
    std::fs::create_dir_all(&home)?;
    let (axe, pid) = (
        axe.display().to_string(),
        node.agent_pid().context("it runs")?,
    );
    let more = [&axe as &str, &pid.to_string(), &expected];
    let seen = drive(&shop.lab, node, &home, "page", ADMIN, &more)?;

    let page = &seen["page"];
    assert_eq!(
        (&page["lang"], &page["title"]),
        (&"en".into(), &"Postern: node1".into())
    );
    assert_eq!(page["ready"], "✓ Ready");
    assert_eq!(page["tiles"]["Policies"], "1");
    assert_eq!(page["tiles"]["Workloads here"], "2");
    assert_eq!(page["tiles"]["Audit lost"], "0");
    for (from, to, how, verdict) in edges {
        let row = edge(&seen["edges"], from, to).with_context(|| seen["edges"].to_string())?;
        assert_eq!((&row[2], &row[3]), (&how.into(), &verdict.into()), "{row}");
        assert!(
            row[4].as_str().is_some_and(|rate| rate.ends_with("/s")),
            "{row}"
        );
        assert_ne!(row[7], "0", "{row}");
    }
    // 31 requests were allowed or failed beside these.
    let cart = edge(&seen["edges"], front, "shop/cart").context("it is there")?;
    assert!(
        cart[5].as_str().is_some_and(|denied| denied != "0"),
        "{cart}"
    );
    // The drawing says the same, in words and in the style of lines.
    assert_eq!(
        page["nodes"].as_array().map(Vec::len),
        Some(7),
        "{}",
        page["nodes"]
    );
    let labels = page["labels"].to_string();
    for label in [
        "mTLS · 0.5/s",
        "✕ 3 denied",
        "plaintext · ",
        "probe · ",
        "local · ",
    ] {
        assert!(labels.contains(label), "{label}: {labels}");
    }
    let lines = page["lines"].to_string();
    assert!(
        lines.contains("line hbone deny") && lines.contains("line plaintext"),
        "{lines}"
    );
    let mut dashes: Vec<_> = page["dashes"]
        .as_array()
        .context("styles")?
        .iter()
        .collect();
    dashes.dedup();
    assert_eq!(dashes.len(), 4, "{dashes:?}");

    let leaves = seen["leaves"].as_array().context("certificates")?;
    let names: Vec<_> = leaves.iter().map(|row| &row[0]).collect();
    let id = |name: &str| format!("spiffe://cluster.local/ns/shop/sa/{name}");
    assert_eq!(names, [&json!(id("cart")), &json!(id("front"))]);
    for row in leaves {
        assert_eq!(
            (&row[1], &row[5]),
            (&"✓ Valid".into(), &"CN=Postern node node1".into())
        );
        let fingerprint = row[6].as_str().and_then(|both| both.split(' ').nth(1));
        assert_eq!(fingerprint.map(str::len), Some(64), "{row}");
    }
    assert_eq!(seen["workloads"].as_array().map(Vec::len), Some(2));
    assert_eq!(seen["maps"].as_array().map(Vec::len), Some(9));

    clean(&seen["axe"]);
    clean(&seen["axe record"]);
    assert_eq!(seen["overflow"], json!([0, 0]));
    assert_eq!(
        seen["colours"],
        json!({"light": "#ffffff", "dark": "#1e2329"})
    );
    // The switch goes before the system.
    assert_eq!(seen["switched"], "#1e2329");

    assert_eq!(seen["first"], "Skip to the content");
    assert_eq!(
        (&seen["entered"], &seen["moved"]),
        (&"node".into(), &front.into())
    );
    assert_eq!(seen["outline"], "4px");
    assert_eq!(seen["kept"], front);
    assert_eq!(seen["said"], "Only what touches shop/front is shown.");
    let touching = seen["touching"].as_array().context("edges")?;
    assert_eq!(touching.len(), 4, "{touching:?}");
    assert!(
        touching
            .iter()
            .all(|row| row[0] == front || row[1] == front)
    );

    let filtered = |field: &str| seen["filtered"][field].as_array().context("rows");
    let batch = filtered("f-who")?;
    assert!(
        batch.len() == 3 && batch.iter().all(|row| row[3] == "shop/batch"),
        "{batch:?}"
    );
    let policy = filtered("f-policy")?;
    let named = |row: &Value| row[6] == "AuthorizationPolicy shop/only-the-front";
    assert!(policy.len() > 30 && policy.iter().all(named), "{policy:?}");
    let process = filtered("f-process")?;
    let hostile = |row: &Value| row[7].as_str().is_some_and(|name| name.contains(HOSTILE));
    assert!(
        process.len() >= 6 && process.iter().all(hostile),
        "{process:?}"
    );
    assert!(filtered("f-namespace")?.is_empty());
    assert_eq!(seen["none"], "No kept record fits these filters.");
    let record = seen["record"].as_str().context("text")?;
    for field in ["verdict", "deny", "reporter", "source", "shop"] {
        assert!(record.contains(field), "{field}: {record}");
    }
    assert_eq!((&seen["back"], &seen["paused"]), (&true.into(), &0.into()));

    // What others chose is text, and was not run.
    assert_eq!(seen["hostile"], json!([0, null]));
    let rows = seen["rows"].to_string();
    assert!(rows.contains("/app/'><svg/onload=hostile=2>"), "{rows}");
    assert_eq!(page["images"], 1);
    assert_eq!(seen["fetched"], json!([seen["origin"]]));
    assert_eq!(seen["console"], json!([]));

    let lost = seen["lost"].as_str().context("text")?;
    assert!(lost.contains("The agent does not answer since"), "{lost}");
    assert_eq!(seen["still"], 2);
    Ok(())
}

#[test]
fn a_page_of_another_site_drives_nothing() -> Result<()> {
    let mut lab = Lab::new(1)?;
    lab.nodes[0].start()?;
    let node = &lab.nodes[0];
    let served = lab.path().join("served");
    std::fs::create_dir_all(&served)?;
    std::fs::write(
        served.join("index.html"),
        "<!doctype html><title>evil</title>",
    )?;
    let mut python = node.command(PYTHON)?;
    python
        .args(["-u", "-m", "http.server", "8888"])
        .current_dir(&served);
    let server = Running::start(&mut python, lab.path().join("evil.log"))?;
    server.says("Serving HTTP")?;
    let home = lab.path().join("home");
    std::fs::create_dir_all(&home)?;
    // Another port is the same site, and another address another.
    for evil in ["http://127.0.0.1:8888/", "http://192.0.2.1:8888/"] {
        let tried = drive(&lab, node, &home, "foreign", ADMIN, &[evil])?;
        assert_eq!(tried["read"], "TypeError", "{evil}: {tried}");
        std::fs::remove_dir_all(lab.path().join("browser-foreign"))?;
    }
    let ask = |arguments: &[&str]| -> Result<String> {
        let mut curl = node.command("curl")?;
        curl.args(["-sS", "-m", "5", "-w", " %{http_code}"]);
        Ok(text(&output(curl.args(arguments))?.stdout))
    };
    let level = format!("{ADMIN}log");
    assert!(!ask(&[&level])?.starts_with("trace"));
    // As a name that an attacker's DNS server has made lead here.
    let answer = ask(&["-H", "Host: evil.example:15000", &format!("{ADMIN}config")])?;
    assert!(
        answer.ends_with(" 421") && !answer.contains("trustDomain"),
        "{answer}"
    );
    node.record("the refusal", |r| {
        r["kind"] == "agent" && r["event"] == "adminRefused"
    })?;
    Ok(())
}

#[test]
fn from_elsewhere_it_takes_a_token() -> Result<()> {
    let axe = axe()?;
    let mut lab = Lab::new(1)?;
    let (root, key) = (lab.path().join("root.pem"), lab.path().join("root.key"));
    let issuer = KeyPair::from_pem(&std::fs::read_to_string(key)?)?;
    let issuer = Issuer::from_ca_cert_pem(&std::fs::read_to_string(&root)?, issuer)?;
    let own = KeyPair::generate()?;
    let leaf = CertificateParams::new(["192.0.2.1".to_owned()])?.signed_by(&own, &issuer)?;
    let dir = lab.path().join("admin");
    std::fs::create_dir(&dir)?;
    let certificate = script(&dir, "admin.pem", &leaf.pem())?;
    let key = script(&dir, "admin.key", &own.serialize_pem())?;
    let token = script(&dir, "token", &format!("{TOKEN}\n"))?;
    let node = &mut lab.nodes[0];
    node.options.more = "listen: {admin: '192.0.2.1:15000'}\n".into();
    assert_eq!(node.start_refused()?, Some(2));
    assert!(node.log().contains("listen.adminToken"), "{}", node.log());
    let (certificate, key) = (certificate.display(), key.display());
    node.options.more = format!(
        "listen: {{admin: '192.0.2.1:15000', adminToken: {}, adminCertificate: {certificate}, adminKey: {key}}}\n",
        token.display()
    );
    node.start()?;
    // It has the token, and knows the certificate.
    let pod = lab.pod(1, "front")?;
    let node = &lab.nodes[0];
    assert_eq!(node.status()?["workloads"][0]["pod"], "shop/front");
    let home = trusting(lab.path(), &root)?;
    let url = "https://192.0.2.1:15000/";
    let seen = drive(
        &lab,
        node,
        &home,
        "login",
        url,
        &[&axe.display().to_string(), TOKEN],
    )?;
    assert_eq!(seen["at"], "https://192.0.2.1:15000/login");
    assert_eq!(
        (&seen["focus"], &seen["described"]),
        (&"token".into(), &"error".into())
    );
    assert_eq!(seen["alert"], "The token is not right.");
    clean(&seen["axe"]);
    assert_eq!(seen["overflow"], json!([0, 0]));
    let cookie = &seen["cookies"][0];
    assert_eq!(cookie["name"], "__Host-postern-admin");
    assert_eq!(
        (&cookie["httpOnly"], &cookie["secure"]),
        (&true.into(), &true.into())
    );
    assert_eq!(cookie["sameSite"], "Strict");
    assert_eq!(seen["page"]["ready"], "✓ Ready");
    let after = seen["after"].as_str().context("text")?;
    assert!(
        after.contains("Log in") && !after.contains("samples"),
        "{after}"
    );
    // From a pod: nothing without the token, all with it.
    let all = format!("{url}config");
    let root = root.display().to_string();
    let bare = pod
        .curl(&["--cacert", &root, "-w", "%{http_code}", &all])?
        .1;
    assert!(
        bare.ends_with("401") && !bare.contains("trustDomain"),
        "{bare}"
    );
    let bearer = format!("Authorization: Bearer {TOKEN}");
    assert!(
        pod.curl(&["--cacert", &root, "-H", &bearer, &all])?
            .1
            .contains("trustDomain")
    );
    assert_ne!(pod.curl(&[&all.replace("https", "http")])?.0, 0);
    let refused = node.record("the wrong token", |r| r["event"] == "adminRefused")?;
    assert!(
        refused["detail"]
            .as_str()
            .is_some_and(|why| why.contains("token")),
        "{refused}"
    );
    let cookie = cookie["value"].as_str().context("a cookie")?;
    let audit = node.audit_text()?;
    for secret in [TOKEN, "not the token", cookie] {
        assert!(!node.log().contains(secret) && !audit.contains(secret));
    }
    Ok(())
}
