//! The authorization endpoint, through the routes.

use std::time::Duration;

use axum::body::Body;
use http::{Request, StatusCode};
use sqlx::Row as _;

use super::super::people::{
    self,
    kit::{ALICE, Answer, BOB, CHALLENGE, ISSUER, NOW, World, authorize},
};

fn is_login(page: &Answer) -> bool {
    page.body.contains("<h1>Log in</h1>")
}

fn is_consent(page: &Answer) -> bool {
    page.body.contains("<h1>Allow access?</h1>")
}

#[tokio::test]
async fn from_the_request_to_the_code() {
    let world = World::new().await;
    let mut browser = world.browser();
    let page = browser.get(&authorize(&[])).await;
    assert_eq!(page.status, StatusCode::OK);
    assert!(is_login(&page), "{}", page.body);
    let page = browser.log_in(&page, "alice", "wrong password").await;
    assert!(is_login(&page) && page.body.contains("role=\"alert\""));
    world.clock.advance(Duration::from_secs(7));
    let answer = browser.log_in(&page, "alice", ALICE).await;
    let to = answer.location().to_owned();
    assert!(to.starts_with("authorize?"), "{to}");
    world.clock.advance(Duration::from_secs(3));
    let page = browser.get(&to).await;
    assert!(is_consent(&page), "{}", page.body);
    for shown in [
        "know who you are",
        "<code>orders:read</code>",
        "alice",
        "https://api.example",
    ] {
        assert!(page.body.contains(shown), "{shown}");
    }
    let answer = browser.consent(&page, "allow").await;
    assert!(
        answer
            .location()
            .starts_with("https://app.example/cb?code=")
    );
    let parameters = answer.parameters();
    assert_eq!(parameters["state"], "s t&a=te");
    assert_eq!(parameters["iss"], ISSUER);
    assert_eq!(parameters.len(), 3);
    let code = &parameters["code"];
    assert_eq!(code.len(), 43);
    let row = sqlx::query::<sqlx::Any>("SELECT * FROM codes")
        .fetch_one(&world.server.store.pool)
        .await
        .expect("one code");
    let text = |name: &str| row.try_get::<String, _>(name).expect("text");
    let number = |name: &str| row.try_get::<i64, _>(name).expect("a number") as u64;
    assert_eq!(text("hash"), people::hash(code));
    assert_eq!(text("client"), "app");
    assert_eq!(text("redirect_uri"), "https://app.example/cb");
    assert_eq!(text("subject"), "alice-id");
    assert_eq!(text("scopes"), r#"["openid","orders:read"]"#);
    assert_eq!(text("audiences"), r#"["https://api.example"]"#);
    assert_eq!(text("nonce"), "n");
    assert_eq!(text("challenge"), CHALLENGE);
    assert_eq!(number("auth_time"), NOW + 7);
    assert_eq!(number("expires"), NOW + 10 + 60);
    // The second time nothing is asked.
    let again = browser.get(&authorize(&[])).await.parameters();
    assert_ne!(&again["code"], code);
    // More is.
    for more in [
        [("scope", "openid profile")],
        [("resource", "https://two.example")],
        [("prompt", "consent")],
    ] {
        let page = browser.get(&authorize(&more)).await;
        assert!(is_consent(&page), "{more:?}");
    }
    let records = world.audit(|all| all.iter().filter(|r| r["event"] == "code").count() == 2);
    let events: Vec<_> = records.iter().filter_map(|r| r["event"].as_str()).collect();
    assert_eq!(events, ["login", "login", "consent", "code", "code"]);
    assert!(
        records.iter().all(|r| r["subject"] == "alice-id"),
        "{records:?}"
    );
    assert!(!format!("{records:?}").contains(code));
}

#[tokio::test]
async fn without_a_sure_address_nobody_is_redirected() {
    let world = World::new().await;
    let mut browser = world.browser();
    browser.logged_in("alice", ALICE).await;
    for query in [
        authorize(&[("client_id", "")]),
        authorize(&[("client_id", "nobody")]),
        authorize(&[("client_id", "x\"><script>alert(1)</script>")]),
        authorize(&[]) + "&client_id=app",
        authorize(&[("redirect_uri", "")]),
        authorize(&[("redirect_uri", "https://evil.example/cb")]),
        authorize(&[("redirect_uri", "https://app.example/cb/../evil")]),
        authorize(&[("redirect_uri", "https://app.example/cb#x")]),
        authorize(&[("redirect_uri", "https://app.example@evil.example/cb")]),
        authorize(&[("redirect_uri", "//app.example/cb")]),
        authorize(&[("redirect_uri", "javascript:alert(1)")]),
        authorize(&[("redirect_uri", "https://app.example/cb\r\nx: y")]),
        authorize(&[]) + "&redirect_uri=https%3A%2F%2Fapp.example%2Fcb",
        authorize(&[]) + "&redirect_uri=https%3A%2F%2Fevil.example%2Fcb",
        authorize(&[("client_id", "native")]),
        authorize(&[
            ("client_id", "native"),
            ("redirect_uri", "http://localhost/cb"),
        ]),
        // Errors come later than that.
        authorize(&[
            ("response_type", "x"),
            ("redirect_uri", "https://evil.example/cb"),
        ]),
        authorize(&[
            ("prompt", "none"),
            ("redirect_uri", "https://evil.example/cb"),
        ]),
        authorize(&[("state", &"x".repeat(9 << 10))]),
        authorize(&[]) + &"&x=y".repeat(70),
        "/authorize".to_owned(),
    ] {
        let answer = browser.get(&query).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{query}");
        assert_eq!(answer.header("location"), "", "{query}");
        assert!(
            !answer.body.contains("evil") && !answer.body.contains("<script"),
            "{query}"
        );
    }
    assert_eq!(world.rows("codes").await, 0);
}

#[tokio::test]
async fn other_errors_are_told_to_the_client() {
    let world = World::new().await;
    let mut browser = world.browser();
    browser.logged_in("alice", ALICE).await;
    let invalid = "invalid_request";
    let long = "x".repeat(600);
    let cases: &[(&[(&str, &str)], &str)] = &[
        (&[("response_type", "token")], "unsupported_response_type"),
        (
            &[("response_type", "code id_token")],
            "unsupported_response_type",
        ),
        (&[("response_type", "")], invalid),
        (&[("response_mode", "fragment")], invalid),
        (&[("response_mode", "form_post")], invalid),
        (&[("scope", "")], "invalid_scope"),
        (&[("scope", "openid admin")], "invalid_scope"),
        (&[("code_challenge", "")], invalid),
        (&[("code_challenge_method", "")], invalid),
        (&[("code_challenge_method", "plain")], invalid),
        (&[("code_challenge_method", "s256")], invalid),
        (&[("code_challenge", &CHALLENGE[1..])], invalid),
        (&[("code_challenge", &format!("{CHALLENGE}x"))], invalid),
        (&[("code_challenge", &CHALLENGE.replace('-', "+"))], invalid),
        (&[("request", "eyJ")], "request_not_supported"),
        (
            &[("request_uri", "https://app.example/r")],
            "request_uri_not_supported",
        ),
        (&[("registration", "{}")], "registration_not_supported"),
        (&[("client_id", "machine")], "unauthorized_client"),
        (&[("resource", "https://else.example")], "invalid_target"),
        (&[("resource", "https://api.example#x")], "invalid_target"),
        (&[("prompt", "none login")], invalid),
        (&[("prompt", "create")], invalid),
        (&[("max_age", "-1")], invalid),
        (&[("max_age", "1e3")], invalid),
        (&[("max_age", "99999999999")], invalid),
        (&[("nonce", &long)], invalid),
        (&[("dpop_jkt", "short")], invalid),
        (&[("scope", "openid"), ("scope", "profile")], invalid),
        (&[("nonce", "a"), ("nonce", "a")], invalid),
        (&[("prompt", "none")], "consent_required"),
    ];
    for (changed, error) in cases {
        let answer = browser.get(&authorize(changed)).await;
        assert!(
            answer
                .location()
                .starts_with("https://app.example/cb?error=")
        );
        let parameters = answer.parameters();
        assert_eq!(&parameters["error"], error, "{changed:?}");
        assert_eq!(parameters["state"], "s t&a=te");
        assert_eq!(parameters["iss"], ISSUER);
        let described = &parameters["error_description"];
        assert!(described.bytes().all(|b| b == b' ' || b.is_ascii_graphic()));
        assert!(!described.contains(['"', '\\']));
    }
    // A state that cannot be told is not.
    for state in [
        &[("state", "a"), ("state", "b")][..],
        &[("state", &"x".repeat(2049))],
    ] {
        let parameters = browser.get(&authorize(state)).await.parameters();
        assert_eq!(parameters["error"], invalid);
        assert!(!parameters.contains_key("state"));
    }
    assert_eq!(world.rows("codes").await, 0);
    // What is not known is ignored, and a resource may be there more than once.
    let query = authorize(&[
        ("foo", "1"),
        ("foo", "2"),
        ("resource", "https://two.example"),
        ("resource", "https://api.example"),
    ]);
    let page = browser.get(&query).await;
    assert!(is_consent(&page));
    browser.consent(&page, "allow").await;
    let row = sqlx::query::<sqlx::Any>("SELECT audiences FROM codes")
        .fetch_one(&world.server.store.pool)
        .await
        .expect("one code");
    let audiences: String = row.try_get("audiences").expect("text");
    assert_eq!(
        audiences,
        r#"["https://two.example","https://api.example"]"#
    );
}

#[tokio::test]
async fn a_trusted_name_that_anybody_can_use_is_asked_for() {
    let world = World::with(|config| {
        for client in &mut config.clients {
            client.trusted |= client.id == "native";
        }
    })
    .await;
    let mut browser = world.browser();
    browser.logged_in("alice", ALICE).await;
    let native = [("client_id", "native")];
    for redirect in ["http://127.0.0.1:9/cb", "com.example.app:/cb"] {
        let query = authorize(&[&native[..], &[("redirect_uri", redirect)]].concat());
        assert!(is_consent(&browser.get(&query).await), "{redirect}");
    }
}

#[tokio::test]
async fn prompt_and_max_age() {
    let world = World::new().await;
    let mut browser = world.browser();
    let trusted = |more: &[(&str, &str)]| authorize(&[&[("client_id", "trusted")], more].concat());
    let none = trusted(&[("prompt", "none")]);
    assert_eq!(
        browser.get(&none).await.parameters()["error"],
        "login_required"
    );
    browser.logged_in("alice", ALICE).await;
    assert!(browser.get(&none).await.parameters().contains_key("code"));
    assert!(is_consent(
        &browser.get(&trusted(&[("prompt", "consent")])).await
    ));
    world.clock.advance(Duration::from_secs(100));
    for fresh_enough in ["100", "9999999999"] {
        let query = trusted(&[("max_age", fresh_enough)]);
        assert!(browser.get(&query).await.parameters().contains_key("code"));
    }
    let query = trusted(&[("max_age", "99"), ("prompt", "none")]);
    assert_eq!(
        browser.get(&query).await.parameters()["error"],
        "login_required"
    );
    // Each wants one login, and only one.
    for more in [
        [("max_age", "99")],
        [("max_age", "0")],
        [("prompt", "login")],
        [("prompt", "select_account")],
    ] {
        let page = browser.get(&trusted(&more)).await;
        assert!(is_login(&page), "{more:?}");
        let answer = browser.log_in(&page, "alice", ALICE).await;
        let to = answer.location().to_owned();
        let answer = browser.get(&to).await;
        assert!(answer.parameters().contains_key("code"), "{more:?}");
        world.clock.advance(Duration::from_secs(100));
    }
    let page = browser.get(&trusted(&[("prompt", "login consent")])).await;
    assert!(is_login(&page));
    let to = browser
        .log_in(&page, "alice", ALICE)
        .await
        .location()
        .to_owned();
    assert!(is_consent(&browser.get(&to).await));
    // The audience of a client that has none is this server.
    let row = sqlx::query::<sqlx::Any>("SELECT audiences FROM codes")
        .fetch_one(&world.server.store.pool)
        .await
        .expect("a code");
    let audiences: String = row.try_get("audiences").expect("text");
    assert_eq!(audiences, format!("[\"{ISSUER}\"]"));
}

#[tokio::test]
async fn denying() {
    let world = World::new().await;
    let mut browser = world.browser();
    browser.logged_in("alice", ALICE).await;
    let page = browser.get(&authorize(&[])).await;
    let answer = browser.consent(&page, "maybe").await;
    assert_eq!(answer.status, StatusCode::FORBIDDEN);
    let parameters = browser.consent(&page, "deny").await.parameters();
    assert_eq!(parameters["error"], "access_denied");
    assert_eq!(parameters["state"], "s t&a=te");
    assert_eq!(parameters["iss"], ISSUER);
    // What was said is said.
    let answer = browser.consent(&page, "allow").await;
    assert_eq!(answer.status, StatusCode::CONFLICT);
    assert_eq!(answer.header("location"), "");
    assert_eq!(
        (world.rows("codes").await, world.rows("consents").await),
        (0, 0)
    );
}

#[tokio::test]
async fn a_page_that_is_answered_twice_gives_one_code() {
    let world = World::new().await;
    let mut browser = world.browser();
    browser.logged_in("alice", ALICE).await;
    let page = browser.get(&authorize(&[])).await;
    let first = browser.consent(&page, "allow").await;
    let second = browser.consent(&page, "allow").await;
    assert_eq!(first.location(), second.location());
    assert_eq!(
        browser.consent(&page, "deny").await.status,
        StatusCode::CONFLICT
    );
    assert_eq!(world.rows("codes").await, 1);
    // At the same time too.
    let page = browser.get(&authorize(&[("prompt", "consent")])).await;
    let answers = (0..8).map(|_| {
        let (mut browser, page) = (browser.clone(), &page);
        async move { browser.consent(page, "allow").await }
    });
    let answers = futures_util::future::join_all(answers).await;
    let mut codes: Vec<_> = answers
        .iter()
        .filter(|answer| answer.status == StatusCode::SEE_OTHER)
        .map(|answer| answer.parameters()["code"].clone())
        .collect();
    codes.dedup();
    assert_eq!(codes.len(), 1);
    assert_eq!(world.rows("codes").await, 2);
    // A redeemed code is not told again.
    sqlx::query::<sqlx::Any>("UPDATE codes SET used = 1")
        .execute(&world.server.store.pool)
        .await
        .expect("the store");
    assert_eq!(
        browser.consent(&page, "allow").await.status,
        StatusCode::CONFLICT
    );
}

#[tokio::test]
async fn a_consent_form_is_of_one_person_and_one_request() {
    let world = World::new().await;
    let mut alice = world.browser();
    alice.logged_in("alice", ALICE).await;
    let mut bob = world.browser();
    bob.logged_in("bob", BOB).await;
    let page = alice.get(&authorize(&[])).await;
    assert_eq!(
        bob.consent(&page, "allow").await.status,
        StatusCode::FORBIDDEN
    );
    let hidden = page.hidden();
    let (request, token) = (hidden["request"].as_str(), hidden["token"].as_str());
    let other = authorize(&[("scope", "openid profile orders:read")]);
    let other = other.trim_start_matches("/authorize?");
    let same_origin = [("sec-fetch-site", "same-origin")];
    let elsewhere = [("origin", "https://app.example")];
    let login = alice.get(&authorize(&[("prompt", "login")])).await.hidden();
    for (request, token, headers) in [
        (other, token, &same_origin),
        (request, "", &same_origin),
        (request, token, &elsewhere),
        (&login["request"], &login["token"], &same_origin),
    ] {
        let fields = [("request", request), ("token", token), ("answer", "allow")];
        let answer = alice.post_with("/consent", &fields, headers).await;
        assert_eq!(answer.status, StatusCode::FORBIDDEN, "{request} {token}");
    }
    assert_eq!(world.rows("codes").await, 0);
    // Too old a page is shown anew; so is one whose login is over.
    world.clock.advance(Duration::from_secs(30 * 60));
    let answer = alice.consent(&page, "allow").await;
    let to = answer.location().to_owned();
    let page = alice.get(&to).await;
    assert!(is_consent(&page));
    let ended = world.server.store.set_disabled("alice-id", true).await;
    assert!(ended.expect("the store"));
    let answer = alice.consent(&page, "allow").await;
    let to = answer.location().to_owned();
    assert!(is_login(&alice.get(&to).await));
    assert_eq!(world.rows("codes").await, 0);
}

#[tokio::test]
async fn programs_of_the_device_are_asked_for_each_time() {
    let world = World::new().await;
    let mut browser = world.browser();
    browser.logged_in("alice", ALICE).await;
    for uri in ["http://127.0.0.1:51004/cb", "com.example.app:/cb"] {
        let query = authorize(&[("client_id", "native"), ("redirect_uri", uri)]);
        for _ in 0..2 {
            let page = browser.get(&query).await;
            assert!(is_consent(&page), "{}", page.body);
            let answer = browser.consent(&page, "allow").await;
            assert!(answer.location().starts_with(&format!("{uri}?code=")));
        }
        let parameters = browser.get(&(query + "&prompt=none")).await.parameters();
        assert_eq!(parameters["error"], "consent_required");
    }
}

#[tokio::test]
async fn a_request_may_be_posted() {
    let world = World::new().await;
    let mut browser = world.browser();
    let query = authorize(&[]);
    let (_, query) = query.split_once('?').expect("a query");
    let request = Request::post("/authorize")
        .header("origin", "https://app.example")
        .header("content-type", "application/x-www-form-urlencoded");
    let answer = browser.send(request, Body::from(query.to_owned())).await;
    assert_eq!(answer.location(), format!("authorize?{query}"));
    let to = answer.location().to_owned();
    assert!(is_login(&browser.get(&to).await));
    let long = format!("{query}&x={}", "y".repeat(9 << 10));
    let request =
        Request::post("/authorize").header("content-type", "application/x-www-form-urlencoded");
    let answer = browser.send(request, Body::from(long)).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn whatever_is_shown_is_escaped() {
    let world = World::with(|config| {
        config.users[0].username = "bob<img src=x>\"'".into();
    })
    .await;
    let mut browser = world.browser();
    let odd = [
        ("scope", "openid x<script>"),
        ("state", "\"><script>alert(1)</script>"),
        ("nonce", "'><script>"),
        ("login_hint", "\" autofocus onfocus=alert(1) x=\"<script>"),
        ("\"><script>", "<script>"),
    ];
    let clean = |page: &Answer| {
        for bad in [
            "<script",
            "<img",
            "<b>",
            "\" onfocus",
            "onfocus=alert(1) x=\"",
        ] {
            assert!(!page.body.contains(bad), "{bad} in {}", page.body);
        }
        assert!(
            page.body
                .contains("&#60;b&#62;A &#38; &#34;B&#34;&#60;/b&#62;")
        );
    };
    // As a client would send them that does not encode.
    let raw = "&ui_locales='";
    let path = authorize(&odd) + raw;
    let page = browser.get(&path).await;
    assert!(is_login(&page));
    clean(&page);
    // And they come through unharmed.
    let hidden = page.hidden();
    assert_eq!(
        Some(hidden["request"].as_str()),
        path.strip_prefix("/authorize?")
    );
    let page = browser.log_in(&page, "<script>\"'", "wrong password").await;
    assert!(is_login(&page));
    clean(&page);
    let answer = browser.log_in(&page, "bob<img src=x>\"'", BOB).await;
    let to = answer.location().to_owned();
    let page = browser.get(&to).await;
    assert!(is_consent(&page), "{}", page.body);
    clean(&page);
    assert!(page.body.contains("<code>x&#60;script&#62;</code>"));
    let answer = browser.consent(&page, "allow").await;
    assert!(!answer.location().contains(['<', '>', '"']));
    assert_eq!(answer.parameters()["state"], "\"><script>alert(1)</script>");
    let page = browser.get("/logout").await;
    assert!(!page.body.contains("<img"));
}

#[tokio::test]
async fn every_page_has_the_headers() {
    let world = World::with(|config| config.people.attempts_per_minute.0 = 3).await;
    let mut browser = world.browser();
    let check = |answer: &Answer, form_action: &str| {
        let policy = format!(
            "default-src 'none'; style-src 'self'; form-action {form_action}; \
             frame-ancestors 'none'; base-uri 'none'"
        );
        for (name, value) in [
            ("content-security-policy", policy.as_str()),
            ("x-frame-options", "DENY"),
            ("referrer-policy", "no-referrer"),
            ("cache-control", "no-store"),
            ("x-content-type-options", "nosniff"),
            ("strict-transport-security", "max-age=31536000"),
        ] {
            assert_eq!(answer.header(name), value, "{name} {}", answer.body);
        }
        assert!(answer.header("permissions-policy").contains("camera=()"));
        if answer.status == StatusCode::SEE_OTHER {
            return;
        }
        assert_eq!(answer.header("content-type"), "text/html; charset=utf-8");
        assert!(
            answer
                .body
                .starts_with("<!doctype html>\n<html lang=\"en\">")
        );
        assert_eq!(answer.body.matches("<h1>").count(), 1);
        for never in ["<script", "style=", " on", "http-equiv"] {
            let tags = answer.body.split('<').filter_map(|t| t.split('>').next());
            assert!(
                !format!("<{}", tags.collect::<String>()).contains(never),
                "{never}"
            );
        }
    };
    let client = "'self' https://app.example";
    let page = browser.get(&authorize(&[])).await;
    check(&page, client);
    check(&browser.get("/authorize").await, "'self'");
    check(
        &browser.get(&authorize(&[("response_type", "x")])).await,
        "'self'",
    );
    let wrong = browser.log_in(&page, "alice", "wrong password").await;
    check(&wrong, client);
    check(&browser.post("/login", &[]).await, "'self'");
    check(
        &browser
            .post_with("/login", &[], &[("origin", "null")])
            .await,
        "'self'",
    );
    check(&browser.log_in(&page, "alice", ALICE).await, "'self'");
    check(&browser.get(&authorize(&[])).await, client);
    check(&browser.post("/consent", &[]).await, "'self'");
    check(&browser.get("/logout").await, "'self'");
    check(&browser.post("/logout", &[]).await, "'self'");
    let native = [
        ("client_id", "native"),
        ("redirect_uri", "http://127.0.0.1:5000/cb"),
    ];
    check(
        &browser.get(&authorize(&native)).await,
        "'self' http://127.0.0.1:5000",
    );
    let mut other = world.browser();
    let page = other.get(&authorize(&[])).await;
    other.log_in(&page, "alice", "wrong password").await;
    let answer = other.log_in(&page, "alice", ALICE).await;
    assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS);
    check(&answer, "'self'");
    let style = browser.get("/style.css").await;
    assert_eq!(style.header("content-type"), "text/css; charset=utf-8");
    assert_eq!(style.header("x-content-type-options"), "nosniff");
    assert!(style.body.contains("prefers-color-scheme: dark"));
}
