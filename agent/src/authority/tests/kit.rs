//! A server in a directory of its own, and what tests send to it.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    thread::JoinHandle,
};

use aws_lc_rs::digest;
use axum::{Router, body::Body, extract::Request};
use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use http::{HeaderMap, StatusCode, header};
use rustls::pki_types::CertificateDer;
use serde_json::{Map, Value, json};
use sqlx::Any;
use tempfile::TempDir;
use tower::ServiceExt as _;

use crate::{
    audit::{Audit, chain},
    authority::{
        Clock, Code, Config, Peer, Server, Shared, Store,
        client_auth::hash_secret,
        clients::{Authentication, Client, Grant, TokenFormat},
        issue::random,
        keys::hash,
        routes,
    },
    identity::{self, Svid},
    jwt::SigningKey,
};

pub const ISSUER: &str = "https://as.test";
pub const API: &str = "https://api.test";
pub const CALLBACK: &str = "https://app.test/callback";
pub const PERSON: &str = "u-1";
pub const SECRET: &str = "not-a-word-of-any-other-file";
pub const WORKLOAD: &str = "spiffe://cluster.local/ns/shop/sa/cart";
pub const EXCHANGE: &str = "urn:ietf:params:oauth:grant-type:token-exchange";
pub const ACCESS_TOKEN: &str = "urn:ietf:params:oauth:token-type:access_token";
pub const JWT: &str = "urn:ietf:params:oauth:token-type:jwt";
pub const JWT_BEARER: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";

pub struct Kit {
    pub directory: Arc<TempDir>,
    pub clock: Clock,
    pub server: Shared,
    router: Router,
    writer: JoinHandle<()>,
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Value,
}

impl Answer {
    /// The member, which has to be there and a string.
    pub fn text(&self, name: &str) -> String {
        let value = self.body[name].as_str();
        value
            .unwrap_or_else(|| panic!("no {name}: {self:?}"))
            .to_owned()
    }

    pub fn ok(self) -> Self {
        assert_eq!(self.status, StatusCode::OK, "{self:?}");
        self
    }

    /// Refused with this code, and as RFC 6749 5.2 has it.
    pub fn refused(&self, error: &str) {
        assert!(self.status.is_client_error(), "{self:?}");
        assert_eq!(self.body["error"], error, "{self:?}");
        assert!(self.body["error_description"].is_string(), "{self:?}");
        assert_eq!(self.headers[header::CACHE_CONTROL], "no-store", "{self:?}");
    }
}

pub fn secret_hash() -> String {
    static HASH: OnceLock<String> = OnceLock::new();
    HASH.get_or_init(|| hash_secret(SECRET).expect("hashed"))
        .clone()
}

pub fn client(id: &str, authentication: Authentication, grants: &[Grant]) -> Client {
    Client {
        id: id.into(),
        name: None,
        authentication,
        redirect_uris: vec![CALLBACK.into()],
        grants: grants.to_vec(),
        scopes: [
            "openid",
            "profile",
            "email",
            "offline_access",
            "read",
            "write",
        ]
        .map(Into::into)
        .to_vec(),
        audiences: vec![API.into(), "https://other.test".into()],
        subject_audiences: Vec::new(),
        trusted: false,
        certificate_bound: false,
        dpop_bound: false,
        token_format: TokenFormat::Jwt,
        access_lifetime: None,
    }
}

pub fn with_secret() -> Authentication {
    Authentication::ClientSecret {
        secret_hash: secret_hash(),
    }
}

/// A person's application, a public one, a service, one with opaque tokens, and a workload.
pub fn clients() -> Vec<Client> {
    use Grant::{AuthorizationCode, ClientCredentials, RefreshToken, TokenExchange};
    let all = [
        AuthorizationCode,
        RefreshToken,
        ClientCredentials,
        TokenExchange,
    ];
    let person = [AuthorizationCode, RefreshToken];
    let workload = Authentication::Workload {
        spiffe_id: WORKLOAD.into(),
    };
    vec![
        client("app", with_secret(), &all),
        client("other", with_secret(), &all),
        client("public", Authentication::None {}, &person),
        client("service", with_secret(), &[ClientCredentials]),
        Client {
            subject_audiences: vec![API.into()],
            ..client("api", with_secret(), &[TokenExchange])
        },
        Client {
            token_format: TokenFormat::Opaque,
            subject_audiences: vec![API.into()],
            ..client("opaque", with_secret(), &all)
        },
        client(WORKLOAD, workload, &all),
    ]
}

impl Kit {
    pub async fn new() -> Self {
        Self::with(|_config, _directory| ()).await
    }

    pub async fn with(change: impl FnOnce(&mut Config, &Path)) -> Self {
        let directory = Arc::new(tempfile::tempdir().expect("directory"));
        let clock = Clock::fixed(Clock::system().seconds());
        Self::at(directory, clock, change, None).await
    }

    /// One in a directory that may have been used before. With `fault`, its store stops
    /// before the point of that number.
    pub async fn at(
        directory: Arc<TempDir>,
        clock: Clock,
        change: impl FnOnce(&mut Config, &Path),
        fault: Option<usize>,
    ) -> Self {
        let mut config = Config {
            issuer: ISSUER.into(),
            state: directory.path().to_owned(),
            clients: clients(),
            ..Config::default()
        };
        change(&mut config, directory.path());
        std::fs::create_dir_all(&config.state).expect("a directory");
        let opened = Audit::open("authority", chain::beside(config.audit_log()), 4096);
        let (audit, writer) = opened.expect("an audit log");
        let server = Server::open(config, clock.clone(), audit).await;
        let mut server = server.expect("opens");
        sqlx::query::<Any>(
            "INSERT INTO users (id, username, password_hash, name, email)
             VALUES ($1, 'ada', '', 'Ada L', 'ada@example.test') ON CONFLICT (id) DO NOTHING",
        )
        .bind(PERSON)
        .execute(&server.store.pool)
        .await
        .expect("a person");
        if let Some(at) = fault {
            let count = std::sync::atomic::AtomicUsize::new(0);
            server.store = server
                .store
                .clone()
                .with_fault(move || count.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == at);
        }
        let server = Arc::new(server);
        Self {
            directory,
            clock,
            router: routes(server.clone()),
            server,
            writer,
        }
    }

    /// Ends it, and waits until the audit log and the database are on disk.
    pub async fn close(self) -> (Arc<TempDir>, String) {
        self.server.store.pool.close().await;
        drop((self.router, self.server));
        self.writer.join().expect("the audit writer");
        let log = chain::records_beside(&self.directory.path().join("audit"));
        let lines: Vec<String> = log.iter().map(ToString::to_string).collect();
        (self.directory, lines.join("\n"))
    }

    pub fn store(&self) -> &Store {
        &self.server.store
    }

    pub async fn send(&self, request: Request) -> Answer {
        let response = self.router.clone().oneshot(request).await;
        let response = response.expect("infallible");
        let (head, body) = response.into_parts();
        let body = axum::body::to_bytes(body, 1 << 20).await.expect("a body");
        Answer {
            status: head.status,
            headers: head.headers,
            body: serde_json::from_slice(&body).unwrap_or(Value::Null),
        }
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path).body(Body::empty()).expect("a request"))
            .await
    }

    pub async fn post(&self, path: &str, form: &[(&str, &str)]) -> Answer {
        self.send(posted(path, form)).await
    }

    /// To the token endpoint, by `app` with its secret.
    pub async fn token(&self, form: &[(&str, &str)]) -> Answer {
        self.token_as("app", form).await
    }

    pub async fn token_as(&self, client: &str, form: &[(&str, &str)]) -> Answer {
        self.post_as(client, "/token", form).await
    }

    pub async fn post_as(&self, client: &str, path: &str, form: &[(&str, &str)]) -> Answer {
        let mut request = posted(path, form);
        let value = basic(client, SECRET).parse().expect("a header");
        request.headers_mut().insert(header::AUTHORIZATION, value);
        self.send(request).await
    }

    /// A code that `client` may exchange, and its verifier.
    pub async fn code(&self, client: &str, scopes: &[&str]) -> (String, String) {
        self.code_with(client, scopes, |_code| ()).await
    }

    pub async fn code_with(
        &self,
        client: &str,
        scopes: &[&str],
        change: impl FnOnce(&mut Code),
    ) -> (String, String) {
        let (code, verifier) = (random().expect("random"), random().expect("random"));
        let challenge = digest::digest(&digest::SHA256, verifier.as_bytes());
        let now = self.clock.seconds();
        let mut kept = Code {
            client: client.into(),
            redirect_uri: CALLBACK.into(),
            subject: PERSON.into(),
            scopes: scopes.iter().map(|&scope| scope.to_owned()).collect(),
            audiences: vec![API.into()],
            nonce: Some("n-1".into()),
            challenge: URL_SAFE_NO_PAD.encode(challenge),
            auth_time: now - 10,
            dpop_jkt: None,
            expires: now + 60,
        };
        change(&mut kept);
        self.store()
            .add_code(&hash(&code), &kept)
            .await
            .expect("kept");
        (code, verifier)
    }

    pub async fn redeem(&self, client: &str, code: &str, verifier: &str) -> Answer {
        let form = [
            ("grant_type", "authorization_code"),
            ("code", code),
            ("redirect_uri", CALLBACK),
            ("code_verifier", verifier),
        ];
        self.token_as(client, &form).await
    }

    /// What a login of `app` ends with.
    pub async fn login(&self, scopes: &[&str]) -> Answer {
        let (code, verifier) = self.code("app", scopes).await;
        self.redeem("app", &code, &verifier).await.ok()
    }

    pub async fn refresh(&self, token: &str) -> Answer {
        let form = [("grant_type", "refresh_token"), ("refresh_token", token)];
        self.token(&form).await
    }

    /// Whether `client` hears that a token is good.
    pub async fn active(&self, client: &str, token: &str) -> bool {
        let answer = self
            .post_as(client, "/introspect", &[("token", token)])
            .await;
        answer.ok().body["active"].as_bool().expect("a boolean")
    }

    /// A certificate of a workload, under this server's root.
    pub fn svid(&self, id: &str) -> Svid {
        svid(self.directory.path(), id, &self.clock)
    }
}

pub fn svid(state: &Path, id: &str, clock: &Clock) -> Svid {
    let config = crate::config::Config {
        state: state.to_owned(),
        ..crate::config::Config::default()
    };
    let authority = identity::Authority::open(&config, "n1").expect("opens");
    let id = id.parse().expect("a SPIFFE ID");
    authority.issue(&id, clock.now()).expect("issued")
}

pub fn posted(path: &str, form: &[(&str, &str)]) -> Request {
    let body: String = form_urlencoded::Serializer::new(String::new())
        .extend_pairs(form)
        .finish();
    let mut request = Request::post(path)
        .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
        .body(Body::from(body))
        .expect("a request");
    request.extensions_mut().insert(peer(&[]));
    request
}

pub fn peer(certificates: &[CertificateDer<'static>]) -> Peer {
    Peer {
        address: SocketAddr::from(([192, 0, 2, 7], 4711)),
        certificates: certificates.to_vec().into(),
    }
}

pub fn basic(id: &str, secret: &str) -> String {
    let encode = |text: &str| form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>();
    format!(
        "Basic {}",
        STANDARD.encode(format!("{}:{}", encode(id), encode(secret)))
    )
}

/// The claims of a JWT, unproven.
pub fn claims(jwt: &str) -> Value {
    part(jwt, 1)
}

pub fn part(jwt: &str, index: usize) -> Value {
    let part = jwt.split('.').nth(index).expect("a JWT");
    let bytes = URL_SAFE_NO_PAD.decode(part).expect("base64url");
    serde_json::from_slice(&bytes).expect("JSON")
}

pub fn unsigned(header: &Value, claims: &Value) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    format!("{}.{}", part(header), part(claims))
}

/// A client's assertion, with some claims changed; null takes one out.
pub fn assertion(key: &SigningKey, id: &str, clock: &Clock, more: Value) -> String {
    assertion_with(key, Map::new(), id, clock, more)
}

pub fn assertion_with(
    key: &SigningKey,
    header: Map<String, Value>,
    id: &str,
    clock: &Clock,
    more: Value,
) -> String {
    let now = clock.seconds();
    let mut claims = json!({
        "iss": id, "sub": id, "aud": ISSUER, "jti": random().expect("random"),
        "iat": now, "exp": now + 60,
    });
    for (name, value) in more.as_object().expect("an object") {
        claims[name] = value.clone();
    }
    let claims = claims.as_object().expect("an object").clone();
    let claims: Map<_, _> = claims.into_iter().filter(|(_, v)| !v.is_null()).collect();
    key.sign_with("JWT", header, &Value::Object(claims))
        .expect("signed")
}

pub fn x5c(svid: &Svid) -> (SigningKey, Map<String, Value>) {
    let key = SigningKey::from_pkcs8(svid.key.secret_der()).expect("a key");
    let chain: Vec<_> = svid.chain.iter().map(|der| STANDARD.encode(der)).collect();
    (key, Map::from_iter([("x5c".to_owned(), json!(chain))]))
}

pub fn write_jwks(directory: &Path, key: &SigningKey) -> PathBuf {
    let path = directory.join("client.jwks");
    std::fs::write(&path, json!({"keys": [key.jwk()]}).to_string()).expect("written");
    path
}
