use std::{
    collections::VecDeque,
    sync::{
        Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use axum::{
    Router,
    extract::State as Extract,
    http::{HeaderMap, StatusCode},
    routing::{get, post},
};
use tokio::sync::Notify;

use super::*;
use crate::{
    config::Config,
    fetch::tests::serve,
    identity::{Authority, Bundle},
    oauth::{ClientAuthentication, Server},
};

type Fields = Vec<(String, String)>;

/// An authorization server: what it was asked, and what it says next.
#[derive(Default)]
struct Double {
    asked: Mutex<Vec<(Fields, HeaderMap)>>,
    says: Mutex<VecDeque<(u16, String)>>,
    count: AtomicUsize,
    /// Answers wait for this while they are held.
    held: Mutex<Option<Arc<Notify>>>,
}

impl Double {
    fn say(&self, status: u16, body: &str) {
        let mut says = self.says.lock().expect("lock");
        says.push_back((status, body.to_owned()));
    }

    fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }
}

async fn token(
    Extract(double): Extract<Arc<Double>>,
    headers: HeaderMap,
    body: Bytes,
) -> (StatusCode, String) {
    let fields: Fields = form_urlencoded::parse(&body).into_owned().collect();
    let count = double.count.fetch_add(1, Ordering::SeqCst) + 1;
    (double.asked.lock().expect("lock")).push((fields, headers));
    let held = double.held.lock().expect("lock").clone();
    if let Some(held) = held {
        held.notified().await;
    }
    let next = double.says.lock().expect("lock").pop_front();
    let (status, body) = next.unwrap_or_else(|| {
        let body = format!(
            r#"{{"access_token": "token-{count}", "token_type": "Bearer", "expires_in": 1000,
                "issued_token_type": "urn:ietf:params:oauth:token-type:access_token"}}"#
        );
        (200, body)
    });
    (StatusCode::from_u16(status).expect("a status"), body)
}

/// A client whose clock is set by hand, and the server.
struct World {
    double: Arc<Double>,
    url: String,
    client: Arc<TokenClient>,
    clock: Arc<AtomicU64>,
    reports: Arc<Mutex<Vec<String>>>,
    credentials: Arc<Credentials>,
    _state: tempfile::TempDir,
}

async fn world() -> World {
    let double = Arc::new(Double::default());
    let routes = Router::new()
        .route("/token", post(token))
        .with_state(double.clone());
    let url = serve(routes).await;
    let state = tempfile::tempdir().expect("directory");
    let config = Config {
        state: state.path().to_owned(),
        ..Config::default()
    };
    let authority = Authority::open(&config, "n1").expect("opens");
    let bundle = Arc::new(
        Bundle::new(vec![authority.root().certificate().clone()], None).expect("a bundle"),
    );
    let id = "spiffe://cluster.local/ns/shop/sa/front"
        .parse()
        .expect("valid");
    let svid = authority.issue(&id, SystemTime::now()).expect("issued");
    let credentials = Arc::new(Credentials::new(svid, bundle).expect("usable"));
    let (clock, reports) = (
        Arc::new(AtomicU64::new(0)),
        Arc::new(Mutex::new(Vec::new())),
    );
    let (told, time, start) = (reports.clone(), clock.clone(), Instant::now());
    let mut client = TokenClient::new(
        Trust::new(None).expect("roots"),
        Box::new(|id, audience| {
            Box::pin(async move {
                Ok(JwtSvid {
                    token: Zeroizing::new(format!("svid.{}.{audience}", id.service_account)),
                    expires: SystemTime::now() + Duration::from_secs(300),
                })
            })
        }),
        Box::new(move |report| {
            let said = match &report.result {
                Ok(life) => format!("granted {}", life.as_secs()),
                Err(error) => error.to_string(),
            };
            told.lock().expect("lock").push(said);
        }),
    );
    client.now = Box::new(move || start + Duration::from_millis(time.load(Ordering::SeqCst)));
    World {
        double,
        url,
        client: Arc::new(client),
        clock,
        reports,
        credentials,
        _state: state,
    }
}

impl World {
    fn call(&self) -> Call {
        Call {
            wanted: Arc::new(Wanted {
                object: "shop/to-back".into(),
                grant: Grant::ClientCredentials,
                server: Some(Server::Endpoint(format!("{}/token", self.url))),
                client_id: Some("front".into()),
                authentication: ClientAuthentication::PrivateKeyJwt { key_file: None },
                audiences: Vec::new(),
                resources: Vec::new(),
                scopes: vec!["orders.read".into()],
                prefix: "Bearer ".into(),
                timeout: Duration::from_secs(10),
            }),
            credentials: self.credentials.clone(),
            subject: Subject::None,
            trace: None,
        }
    }

    /// For a user who came with this token.
    fn call_for(&self, token: &str) -> Call {
        let call = self.call();
        Call {
            wanted: Arc::new(Wanted {
                grant: Grant::TokenExchange {
                    subject: SubjectKind::Inbound,
                    actor: true,
                },
                ..Wanted::clone(&call.wanted)
            }),
            subject: Subject::Token {
                token: Arc::new(Zeroizing::new(token.to_owned())),
                name: Some("alice".into()),
            },
            ..call
        }
    }

    async fn get(&self, call: Call) -> Result<Got, String> {
        self.client.token(call).await.map_err(|e| e.to_string())
    }

    async fn value(&self, call: Call) -> String {
        let got = self.get(call).await.expect("a token");
        got.issued.value.to_str().expect("ASCII").to_owned()
    }

    /// Lets this many seconds pass.
    fn pass(&self, seconds: u64) {
        self.clock.fetch_add(seconds * 1_000, Ordering::SeqCst);
    }

    async fn until(&self, what: &str, so: impl Fn(&Self) -> bool) {
        let end = Instant::now() + Duration::from_secs(20);
        while !so(self) {
            assert!(Instant::now() < end, "not so: {what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

#[tokio::test]
async fn five_hundred_callers_share_one_grant() {
    let world = world().await;
    let held = Arc::new(Notify::new());
    *world.double.held.lock().expect("lock") = Some(held.clone());
    let callers: Vec<_> = (0..500)
        .map(|_| {
            tokio::spawn({
                let (client, call) = (world.client.clone(), world.call());
                async move {
                    client
                        .token(call)
                        .await
                        .expect("a token")
                        .issued
                        .value
                        .clone()
                }
            })
        })
        .collect();
    world.until("it was asked", |w| w.double.count() == 1).await;
    held.notify_one();
    for caller in callers {
        let value = caller.await.expect("no panic");
        assert_eq!(value, "Bearer token-1");
        assert!(value.is_sensitive());
    }
    assert_eq!(world.double.count(), 1);
    assert!(world.get(world.call()).await.expect("a token").cached);
    let asked = world.double.asked.lock().expect("lock")[0].0.clone();
    let has = |name: &str, value: &str| asked.iter().any(|(n, v)| n == name && v == value);
    assert!(has("grant_type", "client_credentials") && has("scope", "orders.read"));
    assert!(has("client_id", "front"), "{asked:?}");
    assert_eq!(*world.reports.lock().expect("lock"), ["granted 1000"]);
}

#[tokio::test]
async fn a_failure_is_shared_and_then_there_is_a_pause() {
    let world = world().await;
    world.double.say(401, r#"{"error": "invalid_client"}"#);
    let held = Arc::new(Notify::new());
    *world.double.held.lock().expect("lock") = Some(held.clone());
    let callers: Vec<_> = (0..50)
        .map(|_| {
            let (client, call) = (world.client.clone(), world.call());
            tokio::spawn(async move { client.token(call).await.expect_err("none").to_string() })
        })
        .collect();
    world.until("it was asked", |w| w.double.count() == 1).await;
    *world.double.held.lock().expect("lock") = None;
    held.notify_one();
    for caller in callers {
        assert!(caller.await.expect("no panic").contains("invalid_client"));
    }
    // Told again without asking, until the pause is over.
    assert!(
        world
            .get(world.call())
            .await
            .expect_err("none")
            .contains("invalid_client")
    );
    assert_eq!(world.double.count(), 1);
    world.pass(1);
    assert_eq!(world.value(world.call()).await, "Bearer token-2");
}

#[tokio::test]
async fn pauses_grow_and_end_with_success() {
    let world = world().await;
    for _ in 0..8 {
        world.double.say(503, "busy");
    }
    for _ in 0..8 {
        assert!(world.get(world.call()).await.is_err());
        world.pass(40);
    }
    assert_eq!(world.double.count(), 8);
    assert!(world.get(world.call()).await.is_ok());
    world.pass(2_000);
    world.double.say(503, "busy");
    assert!(world.get(world.call()).await.is_err());
    // The shortest again.
    world.pass(1);
    assert!(world.get(world.call()).await.is_ok());
}

#[tokio::test]
async fn it_is_replaced_ahead_of_its_end_while_it_still_serves() {
    let world = world().await;
    assert_eq!(world.value(world.call()).await, "Bearer token-1");
    // Of 990 seconds, at least three quarters.
    world.pass(740);
    assert_eq!(world.value(world.call()).await, "Bearer token-1");
    assert_eq!(world.double.count(), 1);
    world.pass(110);
    let held = Arc::new(Notify::new());
    *world.double.held.lock().expect("lock") = Some(held.clone());
    for _ in 0..10 {
        assert_eq!(world.value(world.call()).await, "Bearer token-1");
    }
    world
        .until("the next is asked for", |w| w.double.count() == 2)
        .await;
    held.notify_one();
    world
        .until("it is there", |w| {
            w.reports.lock().expect("lock").len() == 2
        })
        .await;
    *world.double.held.lock().expect("lock") = None;
    let got = world.get(world.call()).await.expect("a token");
    assert_eq!(got.issued.value, "Bearer token-2");
    assert_eq!(world.double.count(), 2);
    // And one that is over does not serve.
    world.pass(1_000);
    assert_eq!(world.value(world.call()).await, "Bearer token-3");
}

#[tokio::test]
async fn one_that_a_destination_refuses_goes_but_not_without_end() {
    let world = world().await;
    let first = world.get(world.call()).await.expect("a token");
    let also = world.get(world.call()).await.expect("a token");
    first.refused();
    also.refused();
    let second = world.get(world.call()).await.expect("a token");
    assert_eq!(second.issued.value, "Bearer token-2");
    // Late news of the first, and then of the second.
    first.refused();
    second.refused();
    let third = world.get(world.call()).await.expect("a token");
    assert_eq!(third.issued.value, "Bearer token-2");
    assert_eq!(world.double.count(), 2);
}

#[tokio::test]
async fn users_objects_and_pods_do_not_share_tokens() {
    let world = world().await;
    assert_eq!(world.value(world.call_for("alice")).await, "Bearer token-1");
    assert_eq!(world.value(world.call_for("bob")).await, "Bearer token-2");
    assert_eq!(world.value(world.call_for("alice")).await, "Bearer token-1");
    let mut other = world.call();
    other.wanted = Arc::new(Wanted {
        scopes: vec!["orders.write".into()],
        ..Wanted::clone(&other.wanted)
    });
    assert_eq!(world.value(other).await, "Bearer token-3");
    let pod = |serial| Call {
        subject: Subject::Pod(
            serial,
            Arc::new(move || {
                Box::pin(async move { Ok(Zeroizing::new(format!("of-pod-{serial}"))) })
            }),
        ),
        ..world.call_for("")
    };
    assert_eq!(world.value(pod(1)).await, "Bearer token-4");
    assert_eq!(world.value(pod(2)).await, "Bearer token-5");
    assert_eq!(world.value(pod(1)).await, "Bearer token-4");
    let asked = world.double.asked.lock().expect("lock").clone();
    let subject = |of: usize| {
        let fields = &asked[of].0;
        fields
            .iter()
            .find(|(n, _)| n == "subject_token")
            .map(|(_, v)| v.clone())
    };
    assert_eq!(subject(0).as_deref(), Some("alice"));
    assert_eq!(subject(3).as_deref(), Some("of-pod-1"));
    let actor = (asked[0].0.iter()).find(|(n, _)| n == "actor_token");
    let actor = actor.map(|(_, v)| v.clone()).expect("an actor");
    assert_eq!(actor, format!("svid.front.{}/token", world.url));
    // What a user's token was exchanged for is kept for minutes only.
    world.pass(301);
    assert_eq!(world.value(world.call_for("alice")).await, "Bearer token-6");
}

#[tokio::test]
async fn a_new_key_of_the_workload_brings_a_new_token() {
    let world = world().await;
    assert_eq!(world.value(world.call()).await, "Bearer token-1");
    let config = Config {
        state: world._state.path().to_owned(),
        ..Config::default()
    };
    let authority = Authority::open(&config, "n1").expect("opens");
    let svid = authority.issue(&world.credentials.id, SystemTime::now());
    (world.credentials.renew(svid.expect("issued"))).expect("renewed");
    assert_eq!(world.value(world.call()).await, "Bearer token-2");
}

#[tokio::test]
async fn the_trace_goes_along_and_limits_hold() {
    let world = world().await;
    let value = HeaderValue::from_static("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    let id = crate::trace::TraceId::parse(value.as_bytes()).expect("a trace");
    let mut call = world.call();
    call.trace = Some(Trace {
        id,
        value: value.clone(),
    });
    world.value(call).await;
    assert_eq!(
        world.double.asked.lock().expect("lock")[0]
            .1
            .get("traceparent"),
        Some(&value)
    );
    *world.double.held.lock().expect("lock") = Some(Arc::new(Notify::new()));
    let mut call = world.call();
    call.wanted = Arc::new(Wanted {
        timeout: Duration::from_millis(100),
        ..Wanted::clone(&call.wanted)
    });
    let error = world.get(call).await.expect_err("none");
    assert!(error.contains("100ms"), "{error}");
}

#[tokio::test]
async fn what_is_malformed_or_too_much_is_no_token() {
    for (status, body, expected) in [
        (200, "x".repeat(2 << 20), "larger than"),
        (200, " ".repeat(100 << 10), "too large"),
        (200, "{\"access_token\": \"t\"}".to_owned(), "token_type"),
        (200, "not json".to_owned(), "strict JSON"),
        (302, String::new(), "302"),
    ] {
        let world = world().await;
        world.double.say(status, &body);
        let error = world.get(world.call()).await.expect_err("none");
        assert!(error.contains(expected), "{error}");
        assert_eq!(*world.reports.lock().expect("lock"), [error]);
    }
}

#[tokio::test]
async fn own_identity_asks_nobody() {
    let world = world().await;
    let call = world.call();
    let own = Call {
        wanted: Arc::new(Wanted {
            grant: Grant::WorkloadIdentity,
            server: None,
            audiences: vec!["back".into()],
            prefix: String::new(),
            ..Wanted::clone(&call.wanted)
        }),
        ..call
    };
    assert_eq!(world.value(own.clone()).await, "svid.front.back");
    assert!(world.get(own).await.expect("a token").cached);
    assert_eq!(world.double.count(), 0);
}

#[tokio::test]
async fn the_issuer_tells_where_and_only_the_issuer() {
    let world = world().await;
    let metadata = |issuer: String| {
        let body = format!(
            r#"{{"issuer": "{issuer}", "token_endpoint": "{}/token"}}"#,
            world.url
        );
        get(move || async move { body })
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("binds");
    let base = format!("http://{}", listener.local_addr().expect("bound"));
    let routes = Router::new()
        .route(
            "/.well-known/oauth-authorization-server/a",
            metadata(format!("{base}/a")),
        )
        .route(
            "/b/.well-known/openid-configuration",
            metadata(format!("{base}/b")),
        )
        .route(
            "/.well-known/oauth-authorization-server/c",
            metadata(format!("{base}/a")),
        )
        // Not looked at: the first place has another's.
        .route(
            "/c/.well-known/openid-configuration",
            metadata(format!("{base}/c")),
        );
    tokio::spawn(axum::serve(listener, routes).into_future());
    for (path, expected) in [
        ("/a", "Bearer token-1"),
        ("/b", "Bearer token-2"),
        ("/c", "is of issuer"),
        ("/d", "404"),
    ] {
        let mut call = world.call();
        call.wanted = Arc::new(Wanted {
            server: Some(Server::Issuer(format!("{base}{path}"))),
            ..Wanted::clone(&call.wanted)
        });
        let said = match world.get(call).await {
            Ok(got) => got.issued.value.to_str().expect("ASCII").to_owned(),
            Err(error) => error,
        };
        assert!(said.contains(expected), "{said} for {path}");
    }
    // Assertions are for the issuer, not for its endpoint.
    let asked = world.double.asked.lock().expect("lock")[0].0.clone();
    let assertion = asked.iter().find(|(n, _)| n == "client_assertion");
    let payload = assertion.and_then(|(_, v)| v.split('.').nth(1).map(str::to_owned));
    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
    let payload = URL_SAFE_NO_PAD
        .decode(payload.expect("a payload"))
        .expect("base64url");
    let payload: serde_json::Value = serde_json::from_slice(&payload).expect("JSON");
    assert_eq!(payload["aud"], format!("{base}/a"));
    assert_eq!(payload["sub"], "front");
}

#[tokio::test]
async fn what_is_over_is_wiped() {
    let world = world().await;
    let got = world.get(world.call()).await.expect("a token");
    let weak = Arc::downgrade(&got.issued);
    drop(got);
    world.client.sweep();
    assert!(weak.upgrade().is_some());
    world.pass(1_000);
    world.client.sweep();
    assert!(weak.upgrade().is_none());
}
