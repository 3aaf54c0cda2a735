//! Logins, forms and sessions, through the routes.

use std::time::Duration;

use http::StatusCode;

use super::{
    kit::{ALICE, Answer, BOB, NOW, World, authorize},
    password,
};

/// Without what differs from page to page.
fn plain(answer: &Answer, username: &str) -> String {
    let hidden = answer.hidden();
    answer
        .body
        .replace(&hidden["token"], "TOKEN")
        .replace(&format!("value=\"{username}\""), "value=\"NAME\"")
}

#[tokio::test]
async fn nobody_learns_why_a_login_failed() {
    let world = World::new().await;
    let mut browser = world.browser();
    world
        .server
        .store
        .add_user(
            &super::super::User {
                id: "off-id".into(),
                username: "off".into(),
                name: None,
                email: None,
                disabled: true,
            },
            &password::hash(ALICE.as_bytes()).expect("hashes"),
        )
        .await
        .expect("the store");
    let page = browser.get(&authorize(&[])).await;
    let mut seen = Vec::new();
    // A length tells how long the name is that was typed.
    let told = |answer: &Answer, username: &str| {
        let mut headers = answer.headers.clone();
        headers.remove("content-length");
        (plain(answer, username), format!("{headers:?}"))
    };
    for (username, password) in [
        ("alice", "wrong password"),
        ("bob", ALICE),
        ("nobody", ALICE),
        ("off", ALICE),
        ("alice", ""),
    ] {
        let answer = browser.log_in(&page, username, password).await;
        assert_eq!(answer.status, StatusCode::FORBIDDEN, "{username}");
        assert_eq!(answer.header("set-cookie"), "");
        seen.push(told(&answer, username));
    }
    // And a locked account.
    for _ in 0..4 {
        browser.log_in(&page, "bob", "wrong password").await;
    }
    let answer = browser.log_in(&page, "bob", BOB).await;
    seen.push(told(&answer, "bob"));
    assert!(seen.iter().all(|one| one.0 == seen[0].0), "{seen:#?}");
    assert!(seen.iter().all(|one| one.1 == seen[0].1), "{seen:#?}");
    assert_eq!(world.rows("sessions").await, 0);
    let records = world.audit(|all| all.len() >= 11);
    let text = format!("{records:?}");
    assert!(
        !text.contains("nobody") && !text.contains(ALICE) && !text.contains("wrong password\\")
    );
    let reasons: Vec<_> = records
        .iter()
        .map(|r| {
            (
                r["event"].as_str(),
                r["subject"].as_str(),
                r["reason"].as_str(),
            )
        })
        .collect();
    for expected in [
        (Some("login"), Some("alice-id"), Some("wrong password")),
        (
            Some("login"),
            Some("off-id"),
            Some("the account is disabled"),
        ),
        (Some("login"), None, Some("no such user")),
        (Some("login"), Some("bob-id"), Some("the account is locked")),
        (
            Some("lockout"),
            Some("bob-id"),
            Some("5 wrong passwords in a row"),
        ),
    ] {
        assert!(reasons.contains(&expected), "{expected:?} in {reasons:#?}");
    }
}

#[tokio::test]
async fn a_form_of_another_site_is_refused() {
    let world = World::new().await;
    let mut victim = world.browser();
    let page = victim.get(&authorize(&[])).await;
    let hidden = page.hidden();
    let (request, token) = (hidden["request"].as_str(), hidden["token"].as_str());
    let mut attacker = world.browser();
    let theirs = attacker.get(&authorize(&[])).await.hidden();
    let own = [("sec-fetch-site", "same-origin")];
    let other = authorize(&[("client_id", "trusted")]);
    let other = other.trim_start_matches("/authorize?");
    type Headers<'a> = &'a [(&'a str, &'a str)];
    let cases: [(&str, &str, Headers<'_>); 9] = [
        (request, "", &own),
        (request, "x", &own),
        (request, &theirs["token"], &own),
        (other, token, &own),
        ("", token, &own),
        (request, token, &[("origin", "https://evil.example")]),
        (request, token, &[("origin", "null")]),
        (
            request,
            token,
            &[
                ("sec-fetch-site", "cross-site"),
                ("origin", "https://id.example"),
            ],
        ),
        (request, token, &[("sec-fetch-site", "same-site")]),
    ];
    for (request, token, headers) in cases {
        let fields = [
            ("request", request),
            ("token", token),
            ("username", "alice"),
            ("password", ALICE),
        ];
        let answer = victim.post_with("/login", &fields, headers).await;
        assert_eq!(answer.status, StatusCode::FORBIDDEN, "{token} {headers:?}");
        assert_eq!(answer.header("location"), "");
        assert_eq!(answer.header("set-cookie"), "");
    }
    // Without any cookie, with a token that was good for another browser.
    let mut bare = world.browser();
    let answer = bare.log_in(&page, "alice", ALICE).await;
    assert_eq!(answer.status, StatusCode::FORBIDDEN);
    assert_eq!(world.rows("sessions").await, 0);
    assert_eq!(world.rows("lockouts").await, 0);
    // And after all that the page is still good.
    let answer = victim.log_in(&page, "alice", ALICE).await;
    assert_eq!(answer.status, StatusCode::SEE_OTHER);
}

#[tokio::test]
async fn other_bodies_are_refused() {
    let world = World::new().await;
    let mut browser = world.browser();
    let page = browser.get(&authorize(&[])).await;
    let long = "x".repeat(33 << 10);
    let answer = browser.log_in(&page, "alice", &long).await;
    assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE);
    let long = "x".repeat(200);
    let answer = browser.log_in(&page, &long, ALICE).await;
    assert_eq!(answer.status, StatusCode::FORBIDDEN);
    assert!(!answer.body.contains(&long));
    for kind in ["text/plain", "multipart/form-data", "application/json"] {
        let request = http::Request::post("/login")
            .header("sec-fetch-site", "same-origin")
            .header("content-type", kind);
        let answer = browser.send(request, "a=b".into()).await;
        assert_eq!(answer.status, StatusCode::UNSUPPORTED_MEDIA_TYPE);
    }
}

#[tokio::test]
async fn a_login_makes_a_new_session() {
    let world = World::new().await;
    let mut browser = world.browser();
    let page = browser.get(&authorize(&[])).await;
    let set = page.header("set-cookie");
    assert!(set.starts_with("__Host-postern="), "{set}");
    assert!(
        set.ends_with("; Path=/; Secure; HttpOnly; SameSite=Lax"),
        "{set}"
    );
    let planted = browser.cookie.clone().expect("a cookie");
    let answer = browser.log_in(&page, "alice", ALICE).await;
    let set = answer.header("set-cookie");
    assert!(
        set.ends_with("; Path=/; Secure; HttpOnly; SameSite=Lax; Max-Age=43200"),
        "{set}"
    );
    let mine = browser.cookie.clone().expect("a cookie");
    assert_ne!(mine, planted);
    // Logged in is the new one alone.
    let mut thief = world.browser();
    thief.cookie = Some(planted);
    let page = thief.get(&authorize(&[])).await;
    assert!(page.body.contains("<h1>Log in</h1>"));
    let page = browser.get(&authorize(&[])).await;
    assert!(
        page.body.contains("<h1>Allow access?</h1>"),
        "{}",
        page.body
    );
    assert_eq!(page.header("set-cookie"), "");
    // A second login ends the first.
    let page = browser.get(&authorize(&[("prompt", "login")])).await;
    browser.log_in(&page, "bob", BOB).await;
    thief.cookie = Some(mine);
    let page = thief.get(&authorize(&[])).await;
    assert!(page.body.contains("<h1>Log in</h1>"));
    assert_eq!(world.rows("sessions").await, 1);
    // Of the cookie the store has nothing.
    let value = browser
        .cookie
        .as_deref()
        .and_then(|c| c.split_once('='))
        .expect("a value");
    let known = world.server.store.stored_session(value.1, NOW, 0).await;
    assert!(known.expect("the store").is_none());
    let known = world
        .server
        .store
        .stored_session(&super::hash(value.1), NOW, 0)
        .await;
    assert_eq!(
        known.expect("the store").expect("a session").subject,
        "bob-id"
    );
}

#[tokio::test]
async fn the_login_form_sent_twice_makes_one_session() {
    let world = World::new().await;
    let mut browser = world.browser();
    let page = browser.get(&authorize(&[])).await;
    let mut again = browser.clone();
    let first = browser.log_in(&page, "alice", ALICE).await;
    let second = again.log_in(&page, "alice", ALICE).await;
    assert_ne!(first.header("set-cookie"), "");
    assert_eq!(second.header("set-cookie"), "");
    assert!(second.location().starts_with("authorize?"));
    assert_eq!(world.rows("sessions").await, 1);
}

#[tokio::test]
async fn a_second_login_page_goes_on_with_the_first_login() {
    let world = World::new().await;
    let mut browser = world.browser();
    let first = browser.get(&authorize(&[])).await;
    let second = browser.get(&authorize(&[("state", "other")])).await;
    browser.log_in(&first, "alice", ALICE).await;
    // What is typed there is not looked at.
    let answer = browser.log_in(&second, "bob", BOB).await;
    let on = authorize(&[("state", "other")]);
    assert_eq!(answer.location(), on.trim_start_matches('/'));
    assert_eq!(answer.header("set-cookie"), "");
    assert_eq!(world.rows("sessions").await, 1);
}

#[tokio::test]
async fn a_session_ends() {
    let world = World::new().await;
    let mut browser = world.browser();
    let asks = async |browser: &mut super::kit::Browser<'_>| {
        let page = browser.get(&authorize(&[])).await;
        page.body.contains("<h1>Log in</h1>")
    };
    let hours = |n: u64| Duration::from_secs(3600 * n);
    browser.logged_in("alice", ALICE).await;
    // Used every hour it lasts for twelve.
    for _ in 0..11 {
        world.clock.advance(hours(1));
        assert!(!asks(&mut browser).await);
    }
    world.clock.advance(hours(1));
    assert!(asks(&mut browser).await);
    // Not used it ends before.
    browser.logged_in("alice", ALICE).await;
    world.clock.advance(hours(2));
    assert!(asks(&mut browser).await);
    // Who is disabled, or has a new password, is logged in no more.
    browser.logged_in("alice", ALICE).await;
    assert!(!asks(&mut browser).await);
    let store = &world.server.store;
    assert!(
        store
            .set_disabled("alice-id", true)
            .await
            .expect("the store")
    );
    assert!(asks(&mut browser).await);
    assert!(
        store
            .set_disabled("alice-id", false)
            .await
            .expect("the store")
    );
    assert!(asks(&mut browser).await);
    browser.logged_in("alice", ALICE).await;
    let hash = password::hash(b"another password").expect("hashes");
    assert!(
        store
            .set_password("alice-id", &hash)
            .await
            .expect("the store")
    );
    assert!(asks(&mut browser).await);
    browser.logged_in("alice", "another password").await;
    assert!(!asks(&mut browser).await);
}

#[tokio::test]
async fn an_account_is_locked_for_a_while() {
    let world = World::new().await;
    let mut browser = world.browser();
    let page = browser.get(&authorize(&[])).await;
    for _ in 0..4 {
        browser.log_in(&page, "bob", "wrong password").await;
    }
    // A right one in between starts the count anew.
    let answer = browser.clone().log_in(&page, "bob", BOB).await;
    assert_eq!(answer.status, StatusCode::SEE_OTHER);
    let page = browser.get(&authorize(&[])).await;
    for _ in 0..5 {
        browser.log_in(&page, "bob", "wrong password").await;
    }
    let answer = browser.log_in(&page, "bob", BOB).await;
    assert_eq!(answer.status, StatusCode::FORBIDDEN);
    // A restart does not help, and nor does another address.
    let world = world.restarted().await;
    let mut browser = world.browser();
    browser.address = "2001:db8::1".parse().expect("an address");
    let page = browser.get(&authorize(&[])).await;
    let answer = browser.log_in(&page, "bob", BOB).await;
    assert_eq!(answer.status, StatusCode::FORBIDDEN);
    let answer = browser.clone().log_in(&page, "alice", ALICE).await;
    assert_eq!(answer.status, StatusCode::SEE_OTHER);
    world.clock.advance(Duration::from_secs(15 * 60 - 1));
    let answer = browser.log_in(&page, "bob", BOB).await;
    assert_eq!(answer.status, StatusCode::FORBIDDEN);
    world.clock.advance(Duration::from_secs(1));
    // After the lock the count begins anew.
    let answer = browser.log_in(&page, "bob", "wrong password").await;
    assert_eq!(answer.status, StatusCode::FORBIDDEN);
    let answer = browser.log_in(&page, "bob", BOB).await;
    assert_eq!(answer.status, StatusCode::SEE_OTHER);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn parallel_guesses_have_no_more_tries() {
    let world = World::with(|config| config.people.attempts_per_minute.0 = 1000).await;
    let mut browser = world.browser();
    let page = browser.get(&authorize(&[])).await;
    let guesses = (0..50).map(|i| {
        let (mut browser, page) = (browser.clone(), &page);
        async move {
            let guess = format!("guess number {i}");
            loop {
                // On a busy machine some wait too long for their turn, and may come again.
                let status = browser.log_in(page, "alice", &guess).await.status;
                if status != StatusCode::SERVICE_UNAVAILABLE {
                    return status;
                }
            }
        }
    });
    let answers = futures_util::future::join_all(guesses).await;
    assert!(
        answers
            .iter()
            .all(|status| *status == StatusCode::FORBIDDEN),
        "{answers:?}"
    );
    let records = world.audit(|all| all.iter().filter(|r| r["event"] == "login").count() == 50);
    let tried = records
        .iter()
        .filter(|r| r["reason"] == "wrong password")
        .count();
    let locked = records
        .iter()
        .filter(|r| r["reason"] == "the account is locked")
        .count();
    assert_eq!((tried, locked), (5, 45));
    let answer = browser.log_in(&page, "alice", ALICE).await;
    assert_eq!(answer.status, StatusCode::FORBIDDEN);
}

#[tokio::test]
async fn an_address_has_so_many_attempts_a_minute() {
    let world = World::with(|config| config.people.attempts_per_minute.0 = 3).await;
    let mut browser = world.browser();
    let page = browser.get(&authorize(&[])).await;
    for _ in 0..3 {
        let answer = browser.log_in(&page, "nobody", ALICE).await;
        assert_eq!(answer.status, StatusCode::FORBIDDEN);
    }
    let answer = browser.log_in(&page, "alice", ALICE).await;
    assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS);
    let seconds: u64 = answer.header("retry-after").parse().expect("seconds");
    assert!((1..=60).contains(&seconds));
    let mut elsewhere = browser.clone();
    elsewhere.address = "192.0.2.8".parse().expect("an address");
    let answer = elsewhere.log_in(&page, "alice", ALICE).await;
    assert_eq!(answer.status, StatusCode::SEE_OTHER);
    world.clock.advance(Duration::from_secs(seconds));
    let page = browser.get(&authorize(&[])).await;
    let answer = browser.log_in(&page, "bob", BOB).await;
    assert_eq!(answer.status, StatusCode::SEE_OTHER);
}

#[tokio::test]
async fn a_weak_hash_is_replaced_at_login() {
    use argon2::{Algorithm, Argon2, Params, PasswordHasher as _, Version};
    let world = World::new().await;
    let params = Params::new(64, 1, 1, None).expect("params");
    let weak = Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
        .hash_password(ALICE.as_bytes())
        .expect("hashes")
        .to_string();
    let store = &world.server.store;
    store
        .set_password("alice-id", &weak)
        .await
        .expect("the store");
    world.browser().logged_in("alice", ALICE).await;
    let account = store
        .account("alice")
        .await
        .expect("the store")
        .expect("alice");
    assert!(!password::is_outdated(&account.password_hash));
    world.browser().logged_in("alice", ALICE).await;
}

#[tokio::test]
async fn logging_out_is_asked_first() {
    let world = World::new().await;
    let mut browser = world.browser();
    let page = browser.get("/logout").await;
    assert!(page.body.contains("<h1>Logged out</h1>"));
    browser.logged_in("alice", ALICE).await;
    let page = browser.get("/logout").await;
    assert!(page.body.contains("<h1>Log out?</h1>") && page.body.contains("alice"));
    let token = page.hidden()["token"].clone();
    let mut elsewhere = world.browser();
    elsewhere.logged_in("bob", BOB).await;
    for (browser, token, site) in [
        (&browser, "", "same-origin"),
        (&browser, token.as_str(), "cross-site"),
        (&elsewhere, token.as_str(), "same-origin"),
    ] {
        let mut browser = browser.clone();
        let headers = [("sec-fetch-site", site)];
        let answer = browser
            .post_with("/logout", &[("token", token)], &headers)
            .await;
        assert_eq!(answer.status, StatusCode::FORBIDDEN);
    }
    assert_eq!(world.rows("sessions").await, 2);
    let before = browser.clone();
    let answer = browser.post("/logout", &[("token", &token)]).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(
        answer.header("set-cookie"),
        "__Host-postern=; Path=/; Secure; HttpOnly; SameSite=Lax; Max-Age=0"
    );
    assert_eq!(world.rows("sessions").await, 1);
    // The cookie itself is void too.
    let page = before.clone().get(&authorize(&[])).await;
    assert!(page.body.contains("<h1>Log in</h1>"));
    world.audit(|all| {
        all.iter()
            .any(|r| r["event"] == "logout" && r["subject"] == "alice-id")
    });
}

#[tokio::test]
async fn people_are_found_in_both_places() {
    let world = World::new().await;
    let named = async |id: &str| {
        let user = world.server.user(id).await.expect("the store");
        user.map(|user| user.username)
    };
    assert_eq!(named("alice-id").await.as_deref(), Some("alice"));
    assert_eq!(named("bob-id").await.as_deref(), Some("bob"));
    assert_eq!(named("carol-id").await, None);
}

#[tokio::test]
async fn people_who_could_not_log_in_are_refused() {
    let world = World::new().await;
    let mut config = world.server.config.clone();
    config.users.push(config.users[0].clone());
    let refused = |config: &super::Config| super::People::new(config).err().expect("refused");
    assert_eq!(
        refused(&config),
        "users: `bob`: the id `bob-id` is another's too"
    );
    config.users[1].id = "other".into();
    assert_eq!(
        refused(&config),
        "users: `bob`: the username is another's too"
    );
    config.users[1].username = "carol".into();
    config.users[1].password_hash = "plain".into();
    let why = refused(&config);
    assert!(why.contains("`carol`") && why.contains("argon2id"), "{why}");
    assert!(!why.contains("plain"));
}
