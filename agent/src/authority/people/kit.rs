//! A server with people and clients, and browsers that ask it, for tests.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, LazyLock},
    time::{Duration, Instant},
};

use axum::{Router, body::Body};
use http::{HeaderMap, Request, StatusCode};
use serde_json::{Value, json};
use tower::ServiceExt as _;

use super::{
    super::{Clock, Config, Peer, Server, Shared, User, routes},
    password,
};
use crate::audit::{Audit, chain};

/// Hash of a secret that no test has use for.
const NOBODYS: &str = "$argon2id$v=19$m=19456,t=2,p=1$bXQRmhxFbrVQkUj1RjQu2w$XyV/46fNJGQifVMFPf3VJoCrEoOCfHQzpT45ZTBTpeM";

pub const ISSUER: &str = "https://id.example";
pub const ALICE: &str = "correct horse battery";
pub const BOB: &str = "staple and staple";
pub const NOW: u64 = 1_800_000_000;
/// Of the verifier in RFC 7636 B.
pub const CHALLENGE: &str = "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM";
/// What a client may be called.
pub const ODD_NAME: &str = "<b>A & \"B\"</b>";

static HASHES: LazyLock<(String, String)> = LazyLock::new(|| {
    let hash = |password: &str| password::hash(password.as_bytes()).expect("hashes");
    (hash(ALICE), hash(BOB))
});

pub struct World {
    pub server: Shared,
    pub clock: Clock,
    pub router: Router,
    config: Config,
    dir: tempfile::TempDir,
}

pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: String,
}

fn config(dir: &std::path::Path) -> Config {
    let client = |id: &str, more: Value| {
        let mut client = json!({
            "id": id,
            "authentication": {"clientSecret": {"secretHash": NOBODYS}},
            "redirectUris": ["https://app.example/cb"],
            "grants": ["authorization_code"],
            "scopes": ["openid", "profile", "orders:read", "x<script>"],
            "audiences": ["https://api.example", "https://two.example"],
        });
        for (key, value) in more.as_object().expect("an object") {
            client[key] = value.clone();
        }
        client
    };
    let config = json!({
        "issuer": ISSUER,
        "state": dir.join("state"),
        "audit": {"directory": dir.join("audit")},
        "users": [{"id": "bob-id", "username": "bob", "passwordHash": HASHES.1}],
        "clients": [
            client("app", json!({"name": ODD_NAME})),
            client("native", json!({
                "authentication": {"none": {}},
                "redirectUris": ["http://127.0.0.1/cb", "com.example.app:/cb"],
            })),
            client("trusted", json!({"trusted": true, "audiences": []})),
            client("machine", json!({"grants": ["client_credentials"]})),
        ],
    });
    serde_json::from_value(config).expect("a configuration")
}

impl World {
    pub async fn new() -> Self {
        Self::with(|_| {}).await
    }

    pub async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let mut config = config(dir.path());
        change(&mut config);
        let clock = Clock::fixed(NOW);
        let server = open(&config, &clock).await;
        let alice = User {
            id: "alice-id".into(),
            username: "alice".into(),
            name: Some("Alice".into()),
            email: None,
            disabled: false,
        };
        let added = server.store.add_user(&alice, &HASHES.0).await;
        assert!(added.expect("the store"));
        Self {
            router: routes(server.clone()),
            server,
            clock,
            config,
            dir,
        }
    }

    /// The same as after a restart.
    pub async fn restarted(self) -> Self {
        let server = open(&self.config, &self.clock).await;
        Self {
            router: routes(server.clone()),
            server,
            ..self
        }
    }

    pub fn browser(&self) -> Browser<'_> {
        Browser {
            world: self,
            cookie: None,
            address: "192.0.2.7".parse().expect("an address"),
        }
    }

    /// How many rows a table of the store has.
    pub async fn rows(&self, table: &'static str) -> i64 {
        use sqlx::Row as _;
        let query = format!("SELECT COUNT(*) AS n FROM {table}");
        let row = sqlx::query::<sqlx::Any>(sqlx::AssertSqlSafe(query))
            .fetch_one(&self.server.store.pool)
            .await;
        row.expect("the store").try_get("n").expect("a number")
    }

    /// The audit log, as soon as this is true of it.
    pub fn audit(&self, enough: impl Fn(&[Value]) -> bool) -> Vec<Value> {
        let log = self.dir.path().join("audit");
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let records = chain::records_beside(&log);
            if enough(&records) {
                return records;
            }
            assert!(Instant::now() < end, "the audit log has {records:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

async fn open(config: &Config, clock: &Clock) -> Shared {
    std::fs::create_dir_all(&config.state).expect("a directory");
    let log = chain::beside(config.audit_log());
    let opened = Audit::open("authority", log, 1024);
    let (audit, _writer) = opened.expect("the audit log");
    let server = Server::open(config.clone(), clock.clone(), audit).await;
    Arc::new(server.expect("a server"))
}

/// Keeps our cookie as browsers do.
#[derive(Clone)]
pub struct Browser<'a> {
    pub world: &'a World,
    /// `name=value`.
    pub cookie: Option<String>,
    pub address: IpAddr,
}

impl Browser<'_> {
    /// Addresses in answers are relative to the issuer's path.
    pub async fn get(&mut self, path: &str) -> Answer {
        let path = format!("/{}", path.trim_start_matches('/'));
        self.send(Request::get(path), Body::empty()).await
    }

    /// As a browser sends a form of a page of ours.
    pub async fn post(&mut self, path: &str, fields: &[(&str, &str)]) -> Answer {
        let headers = [("sec-fetch-site", "same-origin"), ("origin", "null")];
        self.post_with(path, fields, &headers).await
    }

    pub async fn post_with(
        &mut self,
        path: &str,
        fields: &[(&str, &str)],
        headers: &[(&str, &str)],
    ) -> Answer {
        let mut body = form_urlencoded::Serializer::new(String::new());
        let body = body.extend_pairs(fields).finish();
        let mut request = Request::post(path);
        request = request.header("content-type", "application/x-www-form-urlencoded");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.send(request, body.into()).await
    }

    pub async fn send(&mut self, mut request: http::request::Builder, body: Body) -> Answer {
        if let Some(cookie) = &self.cookie {
            request = request.header("cookie", format!("other=1; {cookie}; more=2"));
        }
        let mut request = request.body(body).expect("a request");
        request.extensions_mut().insert(Peer {
            address: SocketAddr::new(self.address, 40_000),
            certificates: Arc::new([]),
        });
        let response = self.world.router.clone().oneshot(request).await;
        let (head, body) = response.expect("an answer").into_parts();
        let body = axum::body::to_bytes(body, 1 << 20).await.expect("a body");
        if let Some(set) = head.headers.get("set-cookie") {
            let pair = set.to_str().expect("text").split(';').next().unwrap_or("");
            self.cookie = Some(pair.to_owned()).filter(|pair| !pair.ends_with('='));
        }
        Answer {
            status: head.status,
            headers: head.headers,
            body: String::from_utf8(body.into()).expect("text"),
        }
    }

    /// Sends the login form of this page.
    pub async fn log_in(&mut self, page: &Answer, username: &str, password: &str) -> Answer {
        let hidden = page.hidden();
        let fields = [
            ("request", hidden["request"].as_str()),
            ("token", hidden["token"].as_str()),
            ("username", username),
            ("password", password),
        ];
        self.post("/login", &fields).await
    }

    /// Logs in with nothing else to do.
    pub async fn logged_in(&mut self, username: &str, password: &str) {
        let page = self.get(&authorize(&[])).await;
        let answer = self.log_in(&page, username, password).await;
        assert_eq!(answer.status, StatusCode::SEE_OTHER, "{}", answer.body);
    }

    pub async fn consent(&mut self, page: &Answer, answer: &str) -> Answer {
        let hidden = page.hidden();
        let fields = [
            ("request", hidden["request"].as_str()),
            ("token", hidden["token"].as_str()),
            ("answer", answer),
        ];
        self.post("/consent", &fields).await
    }
}

impl Answer {
    pub fn header(&self, name: &str) -> &str {
        let value = self.headers.get(name).map(|v| v.to_str().expect("text"));
        value.unwrap_or_default()
    }

    pub fn location(&self) -> &str {
        assert_eq!(self.status, StatusCode::SEE_OTHER, "{}", self.body);
        self.header("location")
    }

    /// The parameters of where it redirects to.
    pub fn parameters(&self) -> HashMap<String, String> {
        let url = url::Url::parse(self.location()).expect("a URL");
        url.query_pairs().into_owned().collect()
    }

    /// The hidden fields of its form.
    pub fn hidden(&self) -> HashMap<String, String> {
        let fields = self.body.split("<input type=\"hidden\" name=\"").skip(1);
        fields
            .map(|field| {
                let (name, rest) = field.split_once("\" value=\"").expect("a value");
                let value = rest.split('"').next().expect("an end");
                (name.to_owned(), unescaped(value))
            })
            .collect()
    }
}

fn unescaped(text: &str) -> String {
    let mut text = text.to_owned();
    for (escape, letter) in [
        ("&#60;", "<"),
        ("&#62;", ">"),
        ("&#34;", "\""),
        ("&#39;", "'"),
        ("&#38;", "&"),
    ] {
        text = text.replace(escape, letter);
    }
    text
}

/// A request of `app` with these parameters instead of the usual ones; an empty one is
/// left out.
pub fn authorize(changed: &[(&str, &str)]) -> String {
    let usual = [
        ("response_type", "code"),
        ("client_id", "app"),
        ("redirect_uri", "https://app.example/cb"),
        ("scope", "openid orders:read"),
        ("state", "s t&a=te"),
        ("nonce", "n"),
        ("code_challenge", CHALLENGE),
        ("code_challenge_method", "S256"),
    ];
    let mut query = form_urlencoded::Serializer::new(String::new());
    for (name, value) in usual {
        if changed.iter().all(|(other, _)| *other != name) {
            query.append_pair(name, value);
        }
    }
    for (name, value) in changed.iter().filter(|(_, value)| !value.is_empty()) {
        query.append_pair(name, value);
    }
    format!("/authorize?{}", query.finish())
}
