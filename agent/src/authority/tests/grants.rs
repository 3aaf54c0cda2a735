//! Codes and refresh tokens: each once, each for its client.

use axum::{body::Body, extract::Request};
use http::{StatusCode, header};
use std::time::Duration;

use super::kit::{API, CALLBACK, ISSUER, Kit, PERSON, SECRET, claims, part, posted};
use crate::{
    authority::{StoreError, issue::random, keys::hash},
    jwt::{Expected, Token},
};

const ALL: &[&str] = &["openid", "profile", "email", "read"];

#[tokio::test]
async fn a_code_becomes_tokens_that_say_who_what_and_for_whom() {
    let kit = Kit::new().await;
    let answer = kit.login(ALL).await;
    assert_eq!(answer.headers[header::CACHE_CONTROL], "no-store");
    assert_eq!(answer.body["token_type"], "Bearer");
    assert_eq!(answer.body["expires_in"], 300);
    assert_eq!(answer.body["scope"], "openid profile email read");
    let now = kit.clock.seconds();
    let access = answer.text("access_token");
    assert_eq!(part(&access, 0)["typ"], "at+jwt");
    let said = claims(&access);
    assert_eq!(said["iss"], ISSUER);
    assert_eq!(said["sub"], PERSON);
    assert_eq!(said["aud"], serde_json::json!([API]));
    assert_eq!(
        (&said["client_id"], &said["azp"]),
        (&"app".into(), &"app".into())
    );
    assert_eq!(said["exp"], now + 300);
    assert_eq!(said["auth_time"], now - 10);
    assert_eq!(said["scope"], "openid profile email read");
    let identity = answer.text("id_token");
    let said = claims(&identity);
    assert_eq!(said["aud"], "app");
    assert_eq!(said["nonce"], "n-1");
    assert_eq!(said["name"], "Ada L");
    assert_eq!(said["preferred_username"], "ada");
    assert_eq!(said["email"], "ada@example.test");
    // Both verify with what is published.
    let set = kit.get("/jwks.json").await.ok();
    assert_eq!(set.headers[header::CACHE_CONTROL], "public, max-age=3600");
    let set = crate::jwt::KeySet::parse(set.body.to_string().as_bytes()).expect("a key set");
    assert!(!set.has_private());
    for token in [&access, &identity] {
        let expected = Expected {
            issuer: Some(ISSUER),
            audiences: &[],
            space_delimited: &[],
        };
        let parsed = Token::parse(token).expect("a token");
        let verified = parsed.verify(expected, Some(&set), kit.clock.now());
        verified.expect("verifies");
    }
}

#[tokio::test]
async fn a_code_is_good_once_and_its_replay_revokes_all_that_came_of_it() {
    let kit = Kit::new().await;
    let (code, verifier) = kit.code("app", &["read"]).await;
    let first = kit.redeem("app", &code, &verifier).await.ok();
    let (access, refresh) = (first.text("access_token"), first.text("refresh_token"));
    let second = kit.refresh(&refresh).await.ok();
    assert!(kit.active("app", &access).await);
    kit.redeem("app", &code, &verifier)
        .await
        .refused("invalid_grant");
    assert!(!kit.active("app", &access).await);
    assert!(!kit.active("app", &second.text("access_token")).await);
    let refused = kit.refresh(&second.text("refresh_token")).await;
    refused.refused("invalid_grant");
    let (_directory, log) = kit.close().await;
    let reuse: Vec<_> = log
        .lines()
        .filter(|l| l.contains(r#""event":"reuse""#))
        .collect();
    assert_eq!(reuse.len(), 1, "{log}");
    assert!(reuse[0].contains(r#""client":"app""#), "{reuse:?}");
    assert!(reuse[0].contains(r#""address":"192.0.2.7""#), "{reuse:?}");
}

#[tokio::test]
async fn a_code_of_another_kind_or_time_or_client_is_refused() {
    let kit = Kit::new().await;
    let (code, verifier) = kit.code("app", &["read"]).await;
    // Another client cannot even use it up.
    kit.redeem("other", &code, &verifier)
        .await
        .refused("invalid_grant");
    kit.redeem("app", &code, &verifier).await.ok();
    let (code, _verifier) = kit.code("app", &["read"]).await;
    let wrong = random().expect("random");
    kit.redeem("app", &code, &wrong)
        .await
        .refused("invalid_grant");
    let (code, verifier) = kit.code("app", &["read"]).await;
    let form = [
        ("grant_type", "authorization_code"),
        ("code", code.as_str()),
        ("redirect_uri", CALLBACK),
    ];
    kit.token(&form).await.refused("invalid_request");
    for uri in [
        "https://app.test/callback/",
        "https://app.test/CALLBACK",
        "https://evil.test",
    ] {
        let (code, verifier) = kit.code("app", &["read"]).await;
        let form = [
            ("grant_type", "authorization_code"),
            ("code", code.as_str()),
            ("redirect_uri", uri),
            ("code_verifier", verifier.as_str()),
        ];
        kit.token(&form).await.refused("invalid_grant");
    }
    kit.clock.advance(Duration::from_secs(60));
    kit.redeem("app", &code, &verifier)
        .await
        .refused("invalid_grant");
    // A challenge that is the verifier itself (`plain`) never fits.
    let plain = random().expect("random");
    let (code, _) = kit
        .code_with("app", &["read"], |code| code.challenge = plain.clone())
        .await;
    kit.redeem("app", &code, &plain)
        .await
        .refused("invalid_grant");
}

#[tokio::test]
async fn a_refresh_token_is_good_once_and_its_reuse_ends_the_family() {
    let kit = Kit::new().await;
    let first = kit.login(ALL).await;
    let old = first.text("refresh_token");
    let second = kit.refresh(&old).await.ok();
    assert_ne!(second.text("refresh_token"), old);
    assert!(claims(&second.text("id_token")).get("nonce").is_none());
    kit.refresh(&old).await.refused("invalid_grant");
    let refused = kit.refresh(&second.text("refresh_token")).await;
    refused.refused("invalid_grant");
    assert!(!kit.active("app", &second.text("access_token")).await);
    let (_directory, log) = kit.close().await;
    assert!(
        log.contains(
            r#""client":"app","error":"invalid_grant","event":"reuse","grant":"refresh_token""#
        ),
        "{log}"
    );
}

#[tokio::test]
async fn a_refresh_token_has_two_ends_and_one_client() {
    let kit = Kit::new().await;
    let first = kit.login(&["read", "write"]).await.text("refresh_token");
    let form = |token, name, value| {
        [
            ("grant_type", "refresh_token"),
            ("refresh_token", token),
            (name, value),
        ]
    };
    let of_other = form(&first, "scope", "read");
    kit.token_as("other", &of_other)
        .await
        .refused("invalid_grant");
    // Narrower, and back again: the grant is what was agreed to.
    let narrow = kit.token(&form(&first, "scope", "read")).await.ok();
    assert_eq!(narrow.body["scope"], "read");
    let second = narrow.text("refresh_token");
    let wider = form(&second, "scope", "read email");
    kit.token(&wider).await.refused("invalid_scope");
    let elsewhere = form(&second, "resource", "https://other.test");
    kit.token(&elsewhere).await.refused("invalid_target");
    let wide = kit.refresh(&second).await.ok();
    assert_eq!(wide.body["scope"], "read write");
    let mut token = wide.text("refresh_token");
    let idle = Duration::from_secs(7 * 24 * 3_600);
    for _ in 0..4 {
        kit.clock.advance(idle - Duration::from_secs(1));
        token = kit.refresh(&token).await.ok().text("refresh_token");
    }
    // Its absolute end, though it was used all the time.
    kit.clock.advance(idle - Duration::from_secs(1));
    kit.refresh(&token).await.refused("invalid_grant");
    let token = kit.login(&["read"]).await.text("refresh_token");
    kit.clock.advance(idle);
    kit.refresh(&token).await.refused("invalid_grant");
}

#[tokio::test]
async fn a_disabled_account_gets_nothing_more() {
    let kit = Kit::new().await;
    let answer = kit.login(ALL).await;
    let (code, verifier) = kit.code("app", ALL).await;
    sqlx::query::<sqlx::Any>("UPDATE users SET disabled = 1")
        .execute(&kit.store().pool)
        .await
        .expect("disabled");
    kit.refresh(&answer.text("refresh_token"))
        .await
        .refused("invalid_grant");
    kit.redeem("app", &code, &verifier)
        .await
        .refused("invalid_grant");
    assert!(!kit.active("app", &answer.text("access_token")).await);
}

#[tokio::test]
async fn a_public_client_names_itself_and_proves_the_verifier() {
    let kit = Kit::new().await;
    let (code, verifier) = kit.code("public", &["read"]).await;
    let form = [
        ("grant_type", "authorization_code"),
        ("client_id", "public"),
        ("code", code.as_str()),
        ("redirect_uri", CALLBACK),
        ("code_verifier", verifier.as_str()),
    ];
    let answer = kit.post("/token", &form).await.ok();
    let token = answer.text("refresh_token");
    let form = [
        ("grant_type", "refresh_token"),
        ("client_id", "public"),
        ("refresh_token", token.as_str()),
    ];
    kit.post("/token", &form).await.ok();
    // It has no secret, so with one it is nobody.
    let form = [form[0], form[1], form[2], ("client_secret", SECRET)];
    kit.post("/token", &form).await.refused("invalid_client");
    let form = [("client_id", "public"), ("token", token.as_str())];
    kit.post("/introspect", &form)
        .await
        .refused("invalid_client");
    kit.post("/revoke", &form).await.ok();
}

#[tokio::test]
async fn what_is_no_token_request_is_refused() {
    let kit = Kit::new().await;
    let answer = kit.get("/token").await;
    assert_eq!(answer.status, StatusCode::METHOD_NOT_ALLOWED);
    let credentials = ("grant_type", "client_credentials");
    let twice = [credentials, ("scope", "read"), ("scope", "read")];
    kit.token(&twice).await.refused("invalid_request");
    // Empty is as if it were not there (RFC 6749 3.1).
    kit.token(&[credentials, ("scope", "")]).await.ok();
    kit.token(&[]).await.refused("invalid_request");
    let unknown = [
        ("grant_type", "password"),
        ("username", "a"),
        ("password", "b"),
    ];
    kit.token(&unknown).await.refused("unsupported_grant_type");
    let many: Vec<(String, String)> = (0..101).map(|n| (format!("p{n}"), "x".into())).collect();
    let many: Vec<_> = many.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    kit.token(&many).await.refused("invalid_request");
    let large = "x".repeat(64 << 10);
    let answer = kit.token(&[credentials, ("x", &large)]).await;
    assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE);
    let json = Request::post("/token")
        .header(header::CONTENT_TYPE, "application/json")
        .body(Body::from(r#"{"grant_type":"client_credentials"}"#))
        .expect("a request");
    kit.send(json).await.refused("invalid_request");
    kit.token_as(
        "service",
        &[("grant_type", "refresh_token"), ("refresh_token", "x")],
    )
    .await
    .refused("unauthorized_client");
}

#[tokio::test]
async fn client_credentials_stay_within_the_registration() {
    let kit = Kit::new().await;
    let credentials = ("grant_type", "client_credentials");
    let answer = kit.token(&[credentials]).await.ok();
    // No person, so nothing of a person's.
    assert_eq!(answer.body["scope"], "profile email read write");
    assert!(answer.body.get("refresh_token").is_none());
    assert!(answer.body.get("id_token").is_none());
    let said = claims(&answer.text("access_token"));
    assert_eq!(said["sub"], "app");
    assert!(said.get("auth_time").is_none());
    kit.token(&[credentials, ("scope", "admin")])
        .await
        .refused("invalid_scope");
    kit.token(&[credentials, ("resource", "https://foreign.test")])
        .await
        .refused("invalid_target");
    let two = [
        credentials,
        ("resource", API),
        ("audience", "https://other.test"),
    ];
    let said = claims(&kit.token(&two).await.ok().text("access_token"));
    assert_eq!(said["aud"], serde_json::json!([API, "https://other.test"]));
}

#[tokio::test]
async fn a_store_that_is_away_is_said_to_be() {
    let kit = Kit::new().await;
    kit.store().pool.close().await;
    let answer = kit
        .token_as("unknown", &[("grant_type", "client_credentials")])
        .await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(answer.headers.contains_key(header::RETRY_AFTER));
    assert!(matches!(
        kit.store().user("x").await,
        Err(StoreError::Database(_))
    ));
}

#[tokio::test]
async fn what_has_expired_is_removed_and_a_replayed_code_is_still_known() {
    let kit = Kit::new().await;
    let (code, verifier) = kit.code("app", &["read"]).await;
    let answer = kit.redeem("app", &code, &verifier).await.ok();
    kit.clock.advance(Duration::from_secs(2 * 3_600));
    kit.store()
        .purge(kit.clock.seconds())
        .await
        .expect("purged");
    let count = |table: &'static str| {
        let pool = kit.store().pool.clone();
        async move {
            let row: (i64,) = sqlx::query_as::<sqlx::Any, _>(table)
                .fetch_one(&pool)
                .await
                .expect("counted");
            row.0
        }
    };
    assert_eq!(count("SELECT COUNT(*) FROM codes").await, 0);
    assert_eq!(count("SELECT COUNT(*) FROM access_tokens").await, 0);
    assert_eq!(count("SELECT COUNT(*) FROM families").await, 1);
    kit.redeem("app", &code, &verifier)
        .await
        .refused("invalid_grant");
    kit.refresh(&answer.text("refresh_token"))
        .await
        .refused("invalid_grant");
    kit.clock.advance(Duration::from_secs(31 * 24 * 3_600));
    kit.store()
        .purge(kit.clock.seconds())
        .await
        .expect("purged");
    assert_eq!(count("SELECT COUNT(*) FROM families").await, 0);
    assert_eq!(count("SELECT COUNT(*) FROM refresh_tokens").await, 0);
}

#[tokio::test]
async fn nothing_secret_is_written_down_and_a_trace_is() {
    let kit = Kit::new().await;
    let (code, verifier) = kit.code("app", ALL).await;
    let first = kit.redeem("app", &code, &verifier).await.ok();
    let second = kit.refresh(&first.text("refresh_token")).await.ok();
    kit.refresh(&first.text("refresh_token"))
        .await
        .refused("invalid_grant");
    let access = second.text("access_token");
    assert!(!kit.active("app", &access).await);
    kit.post_as("app", "/revoke", &[("token", &access)])
        .await
        .ok();
    let mut request = posted("/token", &[("grant_type", "client_credentials")]);
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let header = format!("00-{trace}-00f067aa0ba902b7-01");
    let headers = request.headers_mut();
    headers.insert("traceparent", header.parse().expect("a header"));
    let wrong = super::kit::basic("app", "wrong-secret-of-somebody");
    headers.insert(header::AUTHORIZATION, wrong.parse().expect("a header"));
    let refused = kit.send(request).await;
    refused.refused("invalid_client");
    let mut secrets = vec![code, verifier, SECRET.into(), "wrong-secret".into()];
    for answer in [&first, &second] {
        for name in ["access_token", "refresh_token", "id_token"] {
            secrets.push(answer.text(name));
        }
        let jti = claims(&answer.text("access_token"))["jti"].clone();
        secrets.push(jti.as_str().expect("a jti").to_owned());
    }
    let hashes: Vec<_> = secrets.iter().map(|secret| hash(secret)).collect();
    let (directory, log) = kit.close().await;
    assert!(log.contains(&format!(r#""trace":"{trace}""#)), "{log}");
    assert!(log.contains(r#""event":"grant""#) && log.contains(r#""event":"refusal""#));
    for secret in secrets.iter().chain(&hashes) {
        assert!(!log.contains(secret.as_str()), "{secret} is in {log}");
    }
    // Nor can any of them be read from the database.
    for file in ["authority.db", "authority.db-wal"] {
        let Ok(bytes) = std::fs::read(directory.path().join(file)) else {
            continue;
        };
        for secret in &secrets {
            let found = bytes.windows(secret.len()).any(|w| w == secret.as_bytes());
            assert!(!found, "{secret} is in {file}");
        }
    }
}
