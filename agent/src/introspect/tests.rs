//! An authorization server of the test's own, and what is made of its answers.

use std::{
    os::unix::fs::PermissionsExt as _,
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
    time::UNIX_EPOCH,
};

use axum::{
    Router,
    extract::State,
    http::{HeaderMap, header},
    response::IntoResponse,
    routing::post,
};
use serde_json::json;

use super::*;
use crate::fetch::tests::serve;

const NOW: u64 = 1_800_000_000;
const LONG: Duration = Duration::from_secs(30);

fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(NOW)
}

/// Headers and form of a request.
type Asked = (HeaderMap, Vec<(String, String)>);

/// Says the same of every token.
pub(crate) struct Double {
    pub answer: Mutex<String>,
    pub status: Mutex<StatusCode>,
    pub delay: Mutex<Duration>,
    pub asked: AtomicUsize,
    pub last: Mutex<Option<Asked>>,
}

impl Double {
    pub fn new(answer: &str) -> Arc<Self> {
        Arc::new(Self {
            answer: Mutex::new(answer.to_owned()),
            status: Mutex::new(StatusCode::OK),
            delay: Mutex::default(),
            asked: AtomicUsize::new(0),
            last: Mutex::default(),
        })
    }

    pub fn says(&self, answer: &str) {
        *self.answer.lock().expect("no panic") = answer.to_owned();
    }

    pub fn asked(&self) -> usize {
        self.asked.load(SeqCst)
    }

    pub fn routes(self: &Arc<Self>) -> Router {
        async fn introspect(
            State(double): State<Arc<Double>>,
            headers: HeaderMap,
            body: String,
        ) -> impl IntoResponse {
            double.asked.fetch_add(1, SeqCst);
            let form = form_urlencoded::parse(body.as_bytes()).into_owned();
            *double.last.lock().expect("no panic") = Some((headers, form.collect()));
            let delay = *double.delay.lock().expect("no panic");
            tokio::time::sleep(delay).await;
            let answer = double.answer.lock().expect("no panic").clone();
            (*double.status.lock().expect("no panic"), answer)
        }
        Router::new()
            .route("/introspect", post(introspect))
            .with_state(self.clone())
    }

    async fn endpoint(self: &Arc<Self>) -> Endpoint {
        Endpoint {
            url: format!("{}/introspect", serve(self.routes()).await),
            issuer: "https://as.example".into(),
            client_id: "orders".into(),
            authentication: ClientAuthentication::None {},
            audiences: vec!["https://api.example".into()],
            cache: LONG,
            timeout: LONG,
        }
    }
}

fn introspector() -> Introspector {
    Introspector::new(None).expect("roots")
}

/// What is said of a token that is good.
pub(crate) fn active() -> serde_json::Value {
    json!({
        "active": true, "iss": "https://as.example", "sub": "alice", "client_id": "shop-web",
        "aud": ["https://api.example"], "scope": "read write", "exp": NOW + 600, "jti": "j-1",
        "act": {"sub": "cart", "act": {"sub": "web"}}, "token_type": "Bearer",
    })
}

fn with(changes: serde_json::Value) -> String {
    let mut answer = active();
    let members = answer.as_object_mut().expect("an object");
    for (name, value) in changes.as_object().expect("an object") {
        match value {
            serde_json::Value::Null => members.remove(name),
            value => members.insert(name.clone(), value.clone()),
        };
    }
    answer.to_string()
}

#[tokio::test]
async fn an_active_token_has_the_claims_of_the_answer() {
    let double = Double::new(&active().to_string());
    let (endpoint, introspector) = (double.endpoint().await, introspector());
    let claims = introspector.ask(&endpoint, None, "t-1", now()).await;
    let claims = claims.expect("active");
    assert_eq!(claims.principal(), Some(("https://as.example", "alice")));
    assert_eq!(claims.scopes(), ["read", "write"]);
    assert_eq!(claims.actors(), ["cart", "web"]);
    assert_eq!(claims.checked().name(), "introspection");
    assert_eq!(claims.values(&["active".to_owned()]), [""; 0]);
    // Of the server that was asked, where it does not say so.
    double.says(&with(json!({"iss": null})));
    let claims = introspector.ask(&endpoint, None, "t-2", now()).await;
    let issuer = claims.expect("active").issuer().map(str::to_owned);
    assert_eq!(issuer.as_deref(), Some("https://as.example"));
    let (headers, form) = double.last.lock().expect("no panic").take().expect("asked");
    let form: Vec<(&str, &str)> = form.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    assert_eq!(
        form,
        [
            ("token", "t-2"),
            ("token_type_hint", "access_token"),
            ("client_id", "orders")
        ]
    );
    assert_eq!(headers[header::ACCEPT], "application/json");
}

#[tokio::test]
async fn answers_that_refuse_the_token() {
    let double = Double::new("");
    let (endpoint, introspector) = (double.endpoint().await, introspector());
    for (index, (answer, expected)) in [
        (r#"{"active": false}"#.to_owned(), IntrospectError::Inactive),
        // Whatever else it says.
        (with(json!({"active": false})), IntrospectError::Inactive),
        (
            with(json!({"aud": "https://other.example"})),
            TokenError::Audience.into(),
        ),
        (with(json!({"aud": null})), TokenError::Audience.into()),
        (with(json!({"aud": 7})), TokenError::Claim("aud").into()),
        (
            with(json!({"iss": "https://evil.example"})),
            TokenError::Issuer.into(),
        ),
        (with(json!({"iss": 1})), TokenError::Claim("iss").into()),
        (with(json!({"exp": NOW - 61})), TokenError::Expired.into()),
        (
            with(json!({"exp": "soon"})),
            TokenError::Claim("exp").into(),
        ),
        (
            with(json!({"nbf": NOW + 61})),
            TokenError::NotYetValid.into(),
        ),
        (
            with(json!({"token_type": "refresh_token"})),
            IntrospectError::Kind,
        ),
        (with(json!({"token_use": "id"})), IntrospectError::Kind),
        (with(json!({"typ": "Refresh"})), IntrospectError::Kind),
    ]
    .into_iter()
    .enumerate()
    {
        double.says(&answer);
        let token = format!("t-{index}");
        let told = introspector.ask(&endpoint, None, &token, now()).await;
        let error = told.expect_err(&answer);
        assert_eq!(error, expected, "{answer}");
        assert!(error.is_of_token());
    }
}

#[tokio::test]
async fn answers_that_say_nothing_are_no_answers() {
    let double = Double::new("");
    let (endpoint, introspector) = (double.endpoint().await, introspector());
    for (index, (status, answer)) in [
        (200, String::new()),
        (200, "<html>".into()),
        (200, "[]".into()),
        (200, "true".into()),
        (200, "{}".into()),
        (200, r#"{"active": "true"}"#.into()),
        (200, r#"{"active": 1}"#.into()),
        (200, r#"{"active": false, "active": true}"#.into()),
        (200, format!("{} x", active())),
        (200, with(json!({"x": "x".repeat(MAX_ANSWER)}))),
        (200, with(json!({"x": "x".repeat(2 << 20)}))),
        (204, String::new()),
        (302, active().to_string()),
        (401, active().to_string()),
        (500, active().to_string()),
    ]
    .into_iter()
    .enumerate()
    {
        double.says(&answer);
        *double.status.lock().expect("no panic") = StatusCode::from_u16(status).expect("status");
        let token = format!("secret-token-{index}");
        let told = introspector.ask(&endpoint, None, &token, now()).await;
        let error = told.expect_err(&answer);
        assert!(!error.is_of_token(), "{status} {answer:.60}: {error}");
        assert!(!format!("{error} {error:?}").contains("secret"), "{error}");
    }
}

#[tokio::test]
async fn a_slow_server_and_none_at_all_are_not_waited_for() {
    let double = Double::new(&active().to_string());
    let mut endpoint = double.endpoint().await;
    endpoint.timeout = Duration::from_millis(50);
    *double.delay.lock().expect("no panic") = LONG;
    let introspector = introspector();
    let began = Instant::now();
    let told = introspector.ask(&endpoint, None, "t", now()).await;
    assert!(!told.expect_err("slow").is_of_token());
    endpoint.url = "http://127.0.0.1:1/".into();
    let told = introspector.ask(&endpoint, None, "t", now()).await;
    assert!(!told.expect_err("nobody is there").is_of_token());
    assert!(began.elapsed() < LONG / 2);
    // Nor is a token that could not be one.
    let long = "t".repeat(MAX_TOKEN + 1);
    let told = introspector.ask(&endpoint, None, &long, now()).await;
    assert_eq!(told.err(), Some(TokenError::TooLarge.into()));
}

#[tokio::test]
async fn answers_hold_for_a_time_and_for_whom_they_were_given() {
    let double = Double::new(&active().to_string());
    let (endpoint, introspector) = (double.endpoint().await, introspector());
    let ask = |endpoint: Endpoint, token: &'static str, now: SystemTime| {
        let introspector = &introspector;
        async move { introspector.ask(&endpoint, None, token, now).await }
    };
    for _ in 0..3 {
        ask(endpoint.clone(), "t", now()).await.expect("active");
    }
    assert_eq!(double.asked(), 1);
    // Another token, another client, another audience: each its own.
    ask(endpoint.clone(), "u", now()).await.expect("active");
    let other = Endpoint {
        client_id: "other".into(),
        ..endpoint.clone()
    };
    ask(other, "t", now()).await.expect("active");
    let other = Endpoint {
        audiences: vec!["https://other.example".into()],
        ..endpoint.clone()
    };
    let refused = ask(other, "t", now()).await.err();
    assert_eq!(refused, Some(TokenError::Audience.into()));
    assert_eq!(double.asked(), 4);
    // What is remembered has its end all the same.
    let late = now() + Duration::from_secs(661);
    let refused = ask(endpoint.clone(), "t", late).await.err();
    assert_eq!(refused, Some(TokenError::Expired.into()));
    // Told inactive, once it is asked again.
    let brief = Endpoint {
        cache: Duration::from_millis(1),
        ..endpoint.clone()
    };
    ask(brief.clone(), "t", now()).await.expect("active");
    double.says(r#"{"active": false}"#);
    let began = Instant::now();
    while ask(brief.clone(), "t", now()).await.is_ok() {
        assert!(began.elapsed() < LONG);
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn how_long_an_answer_holds() {
    let double = Double::new("");
    let (endpoint, introspector) = (double.endpoint().await, introspector());
    for (answer, longest) in [
        (active().to_string(), LONG),
        (with(json!({"exp": null})), LONG),
        (with(json!({"exp": NOW + 3})), Duration::from_secs(3)),
        // Taken within its leeway, and not remembered.
        (with(json!({"exp": NOW - 1})), Duration::ZERO),
        (r#"{"active": false}"#.to_owned(), INACTIVE),
        ("?".to_owned(), UNAVAILABLE),
    ] {
        double.says(&answer);
        let told = introspector.exchange(&endpoint, None, "t", now()).await;
        let holds = told.until.saturating_duration_since(Instant::now());
        let range = longest.saturating_sub(Duration::from_secs(1))..=longest;
        assert!(range.contains(&holds), "{answer}: {holds:?}");
    }
}

#[tokio::test]
async fn requests_at_the_same_time_share_one_exchange() {
    let double = Double::new(&active().to_string());
    *double.delay.lock().expect("no panic") = Duration::from_millis(100);
    let endpoint = double.endpoint().await;
    for answer in [
        active().to_string(),
        r#"{"active": false}"#.into(),
        "?".into(),
    ] {
        let introspector = introspector();
        double.says(&answer);
        let before = double.asked();
        let ask = || introspector.ask(&endpoint, None, "t", now());
        let all = futures_util::future::join_all((0..500).map(|_| ask())).await;
        assert_eq!(double.asked() - before, 1, "{answer}");
        assert!(all.iter().all(|told| told == &all[0]), "{answer}");
        assert_eq!(introspector.flights.under_way(), 0);
    }
}

#[tokio::test]
async fn who_waits_is_served_when_the_first_goes_away() {
    let double = Double::new(&active().to_string());
    *double.delay.lock().expect("no panic") = Duration::from_millis(50);
    let (endpoint, introspector) = (double.endpoint().await, introspector());
    let mut first = Box::pin(introspector.ask(&endpoint, None, "t", now()));
    let second = introspector.ask(&endpoint, None, "t", now());
    tokio::select! {
        biased;
        _ = &mut first => panic!("it takes longer"),
        () = std::future::ready(()) => {}
    }
    let told = tokio::join!(second, async move { drop(first) }).0;
    assert!(told.is_ok());
    // And with the last one the exchange is forgotten.
    let mut alone = Box::pin(introspector.ask(&endpoint, None, "u", now()));
    tokio::select! {
        biased;
        _ = &mut alone => panic!("it takes longer"),
        () = std::future::ready(()) => {}
    }
    assert_eq!(introspector.flights.under_way(), 1);
    drop(alone);
    assert_eq!(introspector.flights.under_way(), 0);
}

#[tokio::test]
async fn the_agent_shows_who_it_is() {
    let double = Double::new(&active().to_string());
    let mut endpoint = double.endpoint().await;
    let directory = tempfile::tempdir().expect("directory");
    let secret_file = directory.path().join("secret");
    std::fs::write(&secret_file, "s3cret").expect("written");
    let introspector = introspector();
    let mode = |mode| {
        let mode = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(&secret_file, mode).expect("chmod");
    };
    endpoint.authentication = ClientAuthentication::ClientSecretBasic {
        secret_file: secret_file.clone(),
    };
    mode(0o644);
    let told = introspector.ask(&endpoint, None, "t", now()).await;
    assert!(!told.expect_err("readable by others").is_of_token());
    assert_eq!(double.asked(), 0);
    mode(0o600);
    let told = introspector.ask(&endpoint, None, "u", now()).await;
    assert!(told.is_ok(), "{told:?}");
    let (headers, _) = double.last.lock().expect("no panic").take().expect("asked");
    // `orders:s3cret`.
    assert_eq!(headers[header::AUTHORIZATION], "Basic b3JkZXJzOnMzY3JldA==");
    // With nobody to speak for, there is no certificate to show.
    endpoint.authentication = ClientAuthentication::TlsClientAuth {};
    let told = introspector.ask(&endpoint, None, "v", now()).await;
    assert!(!told.expect_err("no workload").is_of_token());
}
