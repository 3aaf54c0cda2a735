use std::{path::Path as FilePath, sync::Mutex};

use axum::body::{Body, to_bytes};
use serde_json::{Value, json};
use tower::ServiceExt as _;

use super::*;
use crate::{config::Config, telemetry::LocalWorkload};

/// An agent with one pod and a log.
struct Agent {
    config: Config,
    refused: Mutex<Vec<String>>,
    _state: tempfile::TempDir,
}

impl StatusSource for Agent {
    fn status(&self) -> Status {
        Status {
            version: "1".into(),
            node: "node1".into(),
            ready: true,
            problems: Vec::new(),
            workloads: vec![LocalWorkload {
                pod: "shop/web-0".into(),
                identity: "spiffe://cluster.local/ns/shop/sa/web".into(),
                addresses: vec!["10.0.1.10".into()],
                state: "enrolled".into(),
            }],
            known_workloads: 1,
            policies: 0,
            connections: 0,
            roots: 1,
        }
    }

    fn metrics(&self) -> String {
        "postern_audit_records_written_total 3\n".into()
    }

    fn config(&self) -> Config {
        self.config.clone()
    }

    fn policies(&self) -> Vec<crate::telemetry::Policy> {
        Vec::new()
    }

    fn jwks(&self) -> Option<Value> {
        None
    }

    fn certificates(&self) -> Vec<Certificate> {
        let id = "spiffe://cluster.local/ns/shop/sa/web".into();
        vec![Certificate::new(id, None, None, SystemTime::now())]
    }

    fn refused(&self, detail: String) {
        self.refused.lock().expect("a lock").push(detail);
    }
}

const HOSTILE: &str = "/<img src=x onerror=alert(1)>\u{202e}\"'&";

fn agent() -> Arc<Agent> {
    let state = tempfile::tempdir().expect("a directory");
    let config = Config {
        state: state.path().to_owned(),
        ..Config::default()
    };
    Arc::new(Agent {
        config,
        refused: Mutex::default(),
        _state: state,
    })
}

fn page(agent: &Arc<Agent>) -> Shared {
    let address = "127.0.0.1:15000".parse().expect("an address");
    let access = Access::new(address, None).expect("no files");
    Arc::new(Page::new(agent.clone(), access))
}

/// Appends records to the log's first segment.
fn write(directory: &FilePath, first: u64, records: &[Value]) {
    use std::io::Write as _;
    std::fs::create_dir_all(directory).expect("a directory");
    let path = directory.join(format!("audit-{:020}.jsonl", 1));
    let file = std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(path);
    let mut file = file.expect("a file");
    for (seq, record) in (first..).zip(records) {
        // `seq` is first in every line of the log.
        let (time, rest) = (At::now(), record.to_string());
        writeln!(file, "{{\"seq\":{seq},\"time\":\"{time}\",{}", &rest[1..]).expect("written");
    }
}

fn request(verdict: &str) -> Value {
    json!({"kind": "request", "reporter": "destination", "verdict": verdict, "status": 200,
        "source": {"namespace": "shop", "pod": "web-0", "workload": "web",
            "identity": "spiffe://cluster.local/ns/shop/sa/web"},
        "destination": {"namespace": "shop", "pod": "db-0", "workload": "db"},
        "method": "GET", "host": "db", "path": HOSTILE})
}

async fn get_with(
    routes: &Router,
    path: &str,
    tag: Option<&str>,
) -> (StatusCode, HeaderMap, String) {
    let mut request = Request::get(path).header("host", "localhost:15000");
    if let Some(tag) = tag {
        request = request.header(IF_NONE_MATCH, tag);
    }
    let request = request.body(Body::empty()).expect("a request");
    let answer = routes.clone().oneshot(request).await.expect("an answer");
    let (head, body) = answer.into_parts();
    let body = to_bytes(body, 1 << 20).await.expect("a body");
    let body = String::from_utf8(body.to_vec()).expect("text");
    (head.status, head.headers, body)
}

/// Asks until the answer is as wanted.
async fn until(routes: &Router, path: &str, fits: impl Fn(&Value) -> bool) -> Value {
    for _ in 0..200 {
        let (_, _, body) = get_with(routes, path, None).await;
        let value = serde_json::from_str(&body).expect("JSON");
        if fits(&value) {
            return value;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("{path} never answers as wanted");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_follows_the_log() {
    let agent = agent();
    let log = agent.config.state.join("audit");
    write(&log, 1, &[request("allow"), json!({"kind": "process"})]);
    let routes = routes(page(&agent), Router::new());
    let map = until(&routes, "/api/map", |map| map["log"]["current"] == true).await;
    assert_eq!(map["node"], "node1");
    assert_eq!(map["log"]["latest"], 2);
    assert_eq!(map["edges"][0]["source"], "shop/web");
    assert_eq!(map["edges"][0]["transport"], "hbone");
    assert_eq!(map["nodes"][1]["here"], true);
    write(&log, 3, &[request("deny")]);
    let found = until(&routes, "/api/decisions", |f| f["rows"][0]["seq"] == 3).await;
    assert_eq!(found["rows"][0]["verdict"], "deny");
    assert_eq!(found["rows"].as_array().map(Vec::len), Some(2));
    let what = found["rows"][0]["what"].as_str().expect("text");
    assert_eq!(what, format!("200 GET db {HOSTILE}"));
    let denied = until(&routes, "/api/decisions?verdict=deny&kind=request", |_| {
        true
    })
    .await;
    assert_eq!(denied["rows"].as_array().map(Vec::len), Some(1));

    let (status, headers, record) = get_with(&routes, "/api/decisions/3", None).await;
    assert_eq!(status, StatusCode::OK);
    // Whatever is in it, no browser takes it for a page.
    assert_eq!(headers[CONTENT_TYPE], "application/json");
    let record: Value = serde_json::from_str(&record).expect("JSON");
    assert_eq!(record["path"], HOSTILE);
    for (path, expected) in [
        ("/api/decisions/2", StatusCode::NOT_FOUND),
        ("/api/decisions/x", StatusCode::BAD_REQUEST),
        ("/api/decisions?since=noon", StatusCode::BAD_REQUEST),
        ("/api/decisions?colour=red", StatusCode::BAD_REQUEST),
        ("/api", StatusCode::NOT_FOUND),
        ("/app.js/", StatusCode::NOT_FOUND),
    ] {
        assert_eq!(get_with(&routes, path, None).await.0, expected, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_line_is_said_and_what_is_around_it_is_read() {
    let agent = agent();
    let log = agent.config.state.join("audit");
    write(&log, 1, &[request("allow")]);
    let path = log.join(format!("audit-{:020}.jsonl", 1));
    let whole = std::fs::read(&path).expect("the log");
    std::fs::write(&path, [&whole, &b"{no json\n"[..]].concat()).expect("written");
    write(&log, 2, &[request("deny")]);
    let routes = routes(page(&agent), Router::new());
    let broken = until(&routes, "/api/map", |map| map["log"]["latest"] == 2).await;
    let damage = broken["log"]["damage"].as_str().expect("text");
    assert!(damage.contains(".jsonl:2"), "{damage}");
    assert_eq!(broken["log"]["error"], Value::Null);
    assert_eq!(broken["edges"].as_array().map(Vec::len), Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_certificates() {
    let agent = agent();
    let routes = routes(page(&agent), Router::new());
    let health = until(&routes, "/api/health", |_| true).await;
    assert_eq!(health["status"]["workloads"][0]["pod"], "shop/web-0");
    assert_eq!(health["samples"][0]["value"], 3.0);
    assert_eq!(health["limits"]["MESH"], 131_072);
    assert_eq!(health["guarded"], false);
    assert!(
        health["started"]
            .as_str()
            .is_some_and(|at| At::parse(at).is_some())
    );
    let certificates = until(&routes, "/api/certificates", |_| true).await;
    assert_eq!(certificates[0]["state"], "missing");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_new_is_not_sent_again() {
    let routes = routes(page(&agent()), Router::new());
    let (_, headers, _) = get_with(&routes, "/api/certificates", None).await;
    let tag = headers[ETAG].to_str().expect("text").to_owned();
    let (status, _, body) = get_with(&routes, "/api/certificates", Some(&tag)).await;
    assert_eq!((status, body.as_str()), (StatusCode::NOT_MODIFIED, ""));
    let (status, ..) = get_with(&routes, "/api/certificates", Some("\"other\"")).await;
    assert_eq!(status, StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_has_the_headers() {
    let more = Router::new().route("/status", get(|| async { "status" }));
    let routes = routes(page(&agent()), more);
    for path in [
        "/",
        "/app.js",
        "/draw.js",
        "/style.css",
        "/icon.svg",
        "/login",
        "/status",
        "/api/map",
        "/api/decisions",
        "/api/decisions/1",
        "/api/certificates",
        "/api/health",
        "/nowhere",
    ] {
        let (_, headers, _) = get_with(&routes, path, None).await;
        let policy = headers[CONTENT_SECURITY_POLICY].to_str().expect("text");
        for part in [
            "default-src 'none'",
            "frame-ancestors 'none'",
            "base-uri 'none'",
        ] {
            assert!(policy.contains(part), "{path}: {policy}");
        }
        let form = if path == "/login" {
            "form-action 'self'"
        } else {
            "form-action 'none'"
        };
        assert!(policy.contains(form), "{path}: {policy}");
        assert!(!policy.contains("unsafe"), "{policy}");
        for (name, value) in [
            ("cache-control", "no-store"),
            ("referrer-policy", "no-referrer"),
            ("x-content-type-options", "nosniff"),
            ("x-frame-options", "DENY"),
            ("cross-origin-opener-policy", "same-origin"),
            ("cross-origin-resource-policy", "same-origin"),
        ] {
            assert_eq!(headers[name], value, "{path}: {name}");
        }
    }
    // Refusals, too.
    let request = Request::get("/api/map").header("host", "evil.example");
    let request = request.body(Body::empty()).expect("a request");
    let answer = routes.oneshot(request).await.expect("an answer");
    assert_eq!(answer.status(), StatusCode::MISDIRECTED_REQUEST);
    assert_eq!(answer.headers()[X_CONTENT_TYPE_OPTIONS], "nosniff");
}

#[tokio::test]
async fn a_flood_of_refusals_is_two_records_a_while() {
    let agent = agent();
    let access = Access::new("127.0.0.1:1".parse().expect("an address"), None);
    let mut page = Page::new(agent.clone(), access.expect("no files"));
    page.refusals = Duration::from_millis(1_000);
    let page = Arc::new(page);
    let from = "192.0.2.1".parse().expect("an address");
    let told = || agent.refused.lock().expect("a lock").clone();
    for _ in 0..1_000 {
        page.refused(from, "a token is wanted");
    }
    assert_eq!(told(), ["192.0.2.1: a token is wanted"]);
    while told().len() < 2 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(told()[1..], ["999 more within 1 seconds"]);
    page.refused(from, "a token is wanted");
    assert_eq!(told().len(), 3);
}

/// What records say is chosen by others: it may only become text.
#[test]
fn nothing_makes_markup_of_data() {
    for script in [APP, DRAW] {
        for way in [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "Function(",
            "createContextualFragment",
            "DOMParser",
            "srcdoc",
            ".href =",
            ".src =",
            "http://www.w3.org/1999",
        ] {
            assert!(!script.contains(way), "{way}");
        }
    }
    // No script and no style but the files: the policy would stop it, and the page break.
    for inline in [" style=", " onclick=", "<style", "javascript:"] {
        assert!(!INDEX.contains(inline), "{inline}");
    }
    for line in INDEX.lines().filter(|line| line.contains("<script")) {
        assert!(line.contains(" src=\"/"), "{line}");
    }
    // Nothing comes from anywhere else.
    for text in [INDEX, STYLE, APP] {
        assert!(!text.contains("http://") && !text.contains("https://"));
    }
}
