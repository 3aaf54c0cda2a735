//! Introspection, revocation, UserInfo, DPoP and metadata.

use aws_lc_rs::digest;
use axum::{body::Body, extract::Request};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use http::{StatusCode, header};
use serde_json::{Map, Value, json};
use std::time::Duration;

use super::kit::{
    Answer, CALLBACK, ISSUER, Kit, PERSON, claims, client, posted, secret_hash, with_secret,
};
use crate::{
    authority::{clients::Grant, issue::random},
    jwt::{Algorithm, SigningKey},
};

#[tokio::test]
async fn a_client_hears_of_its_own_tokens_and_of_those_for_it() {
    let kit = Kit::new().await;
    let login = kit.login(&["openid", "read"]).await;
    let (access, refresh) = (login.text("access_token"), login.text("refresh_token"));
    for reader in ["app", "api"] {
        let told = kit
            .post_as(reader, "/introspect", &[("token", &access)])
            .await
            .ok();
        assert_eq!(told.body["active"], true, "{reader}");
        assert_eq!(told.body["sub"], PERSON);
        assert_eq!(told.body["username"], "ada");
        assert_eq!(told.body["token_type"], "Bearer");
        assert_eq!(told.body["scope"], "openid read");
        assert_eq!(told.headers[header::CACHE_CONTROL], "no-store");
    }
    assert!(kit.active("app", &refresh).await);
    // Others, and of what never was, hear the same.
    for (reader, token) in [
        ("other", access.as_str()),
        ("api", &refresh),
        ("other", &refresh),
        ("app", "nothing"),
        ("app", "a.b.c"),
        ("app", &login.text("id_token")),
    ] {
        let told = kit
            .post_as(reader, "/introspect", &[("token", token)])
            .await
            .ok();
        assert_eq!(told.body, json!({"active": false}), "{reader}");
    }
    let answer = kit.post("/introspect", &[("token", &access)]).await;
    answer.refused("invalid_client");
    kit.post_as("app", "/introspect", &[])
        .await
        .refused("invalid_request");
    kit.clock.advance(Duration::from_secs(300));
    assert!(!kit.active("app", &access).await);
}

#[tokio::test]
async fn a_client_revokes_its_own() {
    let kit = Kit::new().await;
    let login = kit.login(&["read"]).await;
    let access = login.text("access_token");
    kit.post_as("other", "/revoke", &[("token", &access)])
        .await
        .refused("unauthorized_client");
    assert!(kit.active("app", &access).await);
    kit.post_as("app", "/revoke", &[("token", &access)])
        .await
        .ok();
    assert!(!kit.active("app", &access).await);
    // An access token by itself: the refresh token still works.
    let next = kit.refresh(&login.text("refresh_token")).await.ok();
    let (access, refresh) = (next.text("access_token"), next.text("refresh_token"));
    let other = kit
        .post_as("other", "/revoke", &[("token", &refresh)])
        .await;
    other.refused("unauthorized_client");
    let hinted = [
        ("token", refresh.as_str()),
        ("token_type_hint", "access_token"),
    ];
    kit.post_as("app", "/revoke", &hinted).await.ok();
    kit.refresh(&refresh).await.refused("invalid_grant");
    assert!(!kit.active("app", &access).await);
    kit.post_as("app", "/revoke", &[("token", "nothing")])
        .await
        .ok();
    kit.post_as("app", "/revoke", &[])
        .await
        .refused("invalid_request");
    // An opaque one, of no family.
    let form = [("grant_type", "client_credentials")];
    let opaque = kit
        .token_as("opaque", &form)
        .await
        .ok()
        .text("access_token");
    assert!(kit.active("opaque", &opaque).await);
    kit.post_as("opaque", "/revoke", &[("token", &opaque)])
        .await
        .ok();
    assert!(!kit.active("opaque", &opaque).await);
}

#[tokio::test]
async fn people_of_the_configuration_are_people() {
    let eve = json!({"id": "eve", "username": "eve", "passwordHash": secret_hash()});
    let eve = serde_json::from_value(eve).expect("a person");
    let kit = Kit::with(|config, _| config.users = vec![eve]).await;
    let to_eve = |code: &mut crate::authority::Code| code.subject = "eve".into();
    let (code, verifier) = kit.code_with("app", &["openid"], to_eve).await;
    let answer = kit.redeem("app", &code, &verifier).await.ok();
    let bearer = format!("Bearer {}", answer.text("access_token"));
    let told = userinfo(&kit, &[("authorization", &bearer)]).await.ok();
    assert_eq!(told.body["sub"], "eve");
}

#[tokio::test]
async fn tokens_of_a_person_who_is_gone_are_inactive() {
    let kit = Kit::new().await;
    let answer = kit.login(&["openid"]).await;
    let (access, refresh) = (answer.text("access_token"), answer.text("refresh_token"));
    assert!(kit.active("app", &access).await);
    sqlx::query::<sqlx::Any>("DELETE FROM users")
        .execute(&kit.store().pool)
        .await
        .expect("the store");
    assert!(!kit.active("app", &access).await);
    kit.refresh(&refresh).await.refused("invalid_grant");
}

#[tokio::test]
async fn a_new_password_or_a_disabled_account_ends_everything() {
    for disable in [false, true] {
        let kit = Kit::new().await;
        let refresh = kit.login(&["openid"]).await.text("refresh_token");
        let (code, verifier) = kit.code("app", &["openid"]).await;
        let store = kit.store();
        match disable {
            true => {
                assert!(store.set_disabled(PERSON, true).await.expect("the store"));
                assert!(store.set_disabled(PERSON, false).await.expect("the store"));
            }
            false => assert!(store.set_password(PERSON, "x").await.expect("the store")),
        }
        kit.refresh(&refresh).await.refused("invalid_grant");
        let late = kit.redeem("app", &code, &verifier).await;
        late.refused("invalid_grant");
    }
}

async fn userinfo(kit: &Kit, headers: &[(&str, &str)]) -> Answer {
    let mut request = Request::get("/userinfo");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    kit.send(request.body(Body::empty()).expect("a request"))
        .await
}

#[tokio::test]
async fn userinfo_tells_what_the_scopes_allow() {
    let kit = Kit::new().await;
    let token = kit.login(&["openid", "email"]).await.text("access_token");
    let bearer = format!("Bearer {token}");
    let told = userinfo(&kit, &[("authorization", &bearer)]).await.ok();
    assert_eq!(
        told.body,
        json!({"sub": PERSON, "email": "ada@example.test"})
    );
    let mut post = posted("/userinfo", &[]);
    post.headers_mut()
        .insert("authorization", bearer.parse().expect("a header"));
    kit.send(post).await.ok();
    let none = userinfo(&kit, &[]).await;
    assert_eq!(none.status, StatusCode::UNAUTHORIZED);
    assert_eq!(
        none.headers[header::WWW_AUTHENTICATE],
        r#"Bearer realm="postern""#
    );
    let without = kit.login(&["read"]).await.text("access_token");
    let without = userinfo(&kit, &[("authorization", &format!("Bearer {without}"))]).await;
    without.refused("insufficient_scope");
    assert_eq!(without.status, StatusCode::FORBIDDEN);
    for wrong in [
        "Bearer",
        "Bearer nothing",
        "Basic x",
        &format!("DPoP {token}"),
    ] {
        let answer = userinfo(&kit, &[("authorization", wrong)]).await;
        answer.refused("invalid_token");
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED);
        assert!(answer.headers.contains_key(header::WWW_AUTHENTICATE));
    }
    kit.post_as("app", "/revoke", &[("token", &token)])
        .await
        .ok();
    let revoked = userinfo(&kit, &[("authorization", &bearer)]).await;
    revoked.refused("invalid_token");
}

/// A proof, with some claims changed.
fn proof(key: &SigningKey, kit: &Kit, method: &str, path: &str, more: Value) -> String {
    proof_with(key, "dpop+jwt", key.jwk(), kit, method, path, more)
}

fn proof_with(
    key: &SigningKey,
    typ: &str,
    jwk: Value,
    kit: &Kit,
    method: &str,
    path: &str,
    more: Value,
) -> String {
    let mut claims = json!({
        "htm": method, "htu": format!("{ISSUER}{path}"), "iat": kit.clock.seconds(),
        "jti": random().expect("random"),
    });
    for (name, value) in more.as_object().expect("an object") {
        claims[name] = value.clone();
    }
    let header = Map::from_iter([("jwk".to_owned(), jwk)]);
    key.sign_with(typ, header, &claims).expect("signed")
}

async fn with_proof(kit: &Kit, form: &[(&str, &str)], proof: &str) -> Answer {
    let mut request = posted("/token", form);
    request
        .headers_mut()
        .insert("dpop", proof.parse().expect("a header"));
    kit.send(request).await
}

#[tokio::test]
async fn tokens_bound_by_dpop_are_good_with_their_key_alone() {
    let kit = Kit::new().await;
    let key = SigningKey::generate(Algorithm::Es256).expect("a key");
    let thief = SigningKey::generate(Algorithm::Es256).expect("a key");
    let (code, verifier) = kit
        .code_with("public", &["openid"], |code| {
            code.dpop_jkt = Some(key.kid().to_owned());
        })
        .await;
    let form = [
        ("grant_type", "authorization_code"),
        ("client_id", "public"),
        ("code", code.as_str()),
        ("redirect_uri", CALLBACK),
        ("code_verifier", verifier.as_str()),
    ];
    let now = kit.clock.seconds();
    let good = json!({});
    for wrong in [
        proof(&key, &kit, "GET", "/token", good.clone()),
        proof(&key, &kit, "POST", "/introspect", good.clone()),
        proof(&key, &kit, "POST", "/token", json!({"iat": now - 61})),
        proof(&key, &kit, "POST", "/token", json!({"iat": now + 61})),
        proof(&key, &kit, "POST", "/token", json!({"jti": ""})),
        proof_with(&key, "JWT", key.jwk(), &kit, "POST", "/token", good.clone()),
        proof_with(
            &key,
            "dpop+jwt",
            thief.jwk(),
            &kit,
            "POST",
            "/token",
            good.clone(),
        ),
        "x".into(),
    ] {
        with_proof(&kit, &form, &wrong)
            .await
            .refused("invalid_dpop_proof");
    }
    let proven = proof(&key, &kit, "POST", "/token", good.clone());
    let answer = with_proof(&kit, &form, &proven).await.ok();
    assert_eq!(answer.body["token_type"], "DPoP");
    let token = answer.text("access_token");
    // The kid of our keys is that thumbprint.
    assert_eq!(claims(&token)["cnf"]["jkt"], key.kid());
    let refresh = answer.text("refresh_token");
    let form = [
        ("grant_type", "refresh_token"),
        ("client_id", "public"),
        ("refresh_token", refresh.as_str()),
    ];
    // A proof is good once, and a public client's refresh token only with its key.
    with_proof(&kit, &form, &proven)
        .await
        .refused("invalid_dpop_proof");
    kit.post("/token", &form).await.refused("invalid_grant");
    let by_thief = proof(&thief, &kit, "POST", "/token", good.clone());
    with_proof(&kit, &form, &by_thief)
        .await
        .refused("invalid_grant");
    let again = proof(&key, &kit, "POST", "/token", good.clone());
    with_proof(&kit, &form, &again).await.ok();
    // At UserInfo: the key, the method, the URL and the token itself.
    let ath = URL_SAFE_NO_PAD.encode(digest::digest(&digest::SHA256, token.as_bytes()));
    let bound = json!({ "ath": ath });
    let scheme = format!("DPoP {token}");
    let proven = proof(&key, &kit, "GET", "/userinfo", bound.clone());
    userinfo(&kit, &[("authorization", &scheme), ("dpop", &proven)])
        .await
        .ok();
    for wrong in [
        proof(&thief, &kit, "GET", "/userinfo", bound.clone()),
        proof(&key, &kit, "GET", "/userinfo", good.clone()),
        proof(&key, &kit, "POST", "/userinfo", bound),
        proven,
    ] {
        let answer = userinfo(&kit, &[("authorization", &scheme), ("dpop", &wrong)]).await;
        assert!(answer.status.is_client_error(), "{answer:?}");
    }
    let bearer = format!("Bearer {token}");
    let as_bearer = userinfo(&kit, &[("authorization", &bearer)]).await;
    as_bearer.refused("invalid_token");
}

#[tokio::test]
async fn a_code_bound_to_a_key_needs_it() {
    let kit = Kit::with(|config, _| {
        let mut bound = client("bound", with_secret(), &[Grant::ClientCredentials]);
        bound.dpop_bound = true;
        config.clients.push(bound);
    })
    .await;
    let change = |code: &mut crate::authority::Code| code.dpop_jkt = Some("thumbprint".into());
    let (code, verifier) = kit.code_with("app", &["read"], change).await;
    kit.redeem("app", &code, &verifier)
        .await
        .refused("invalid_grant");
    let form = [("grant_type", "client_credentials")];
    kit.token_as("bound", &form)
        .await
        .refused("invalid_dpop_proof");
}

#[tokio::test]
async fn metadata_names_what_is_there() {
    let kit = Kit::new().await;
    let told = kit
        .get("/.well-known/oauth-authorization-server")
        .await
        .ok();
    assert_eq!(told.body["issuer"], ISSUER);
    assert_eq!(
        told.body,
        kit.get("/.well-known/openid-configuration").await.ok().body
    );
    for name in [
        "token_endpoint",
        "introspection_endpoint",
        "revocation_endpoint",
    ] {
        let path = told.text(name);
        let path = path.strip_prefix(ISSUER).expect("ours").to_owned();
        // A client is needed, and that is all that is wrong.
        let form = [("grant_type", "client_credentials"), ("token", "x")];
        kit.post(&path, &form).await.refused("invalid_client");
    }
    for name in ["jwks_uri", "userinfo_endpoint"] {
        let path = told.text(name);
        let path = path.strip_prefix(ISSUER).expect("ours").to_owned();
        assert_ne!(kit.get(&path).await.status, StatusCode::NOT_FOUND, "{path}");
    }
    assert_eq!(
        told.body["code_challenge_methods_supported"],
        json!(["S256"])
    );
    assert_eq!(
        told.body["authorization_response_iss_parameter_supported"],
        true
    );
    assert_eq!(
        told.body["id_token_signing_alg_values_supported"],
        json!(["ES256"])
    );
    let algorithms = told.body["dpop_signing_alg_values_supported"].to_string();
    assert!(!algorithms.contains("none") && !algorithms.contains("HS"));
}

#[tokio::test]
async fn an_issuer_with_a_path_is_found_at_both_places() {
    let issuer = "https://as.test/tenant/one";
    let kit = Kit::with(|config, _| config.issuer = issuer.into()).await;
    for path in [
        "/.well-known/oauth-authorization-server/tenant/one",
        "/.well-known/openid-configuration/tenant/one",
        "/tenant/one/.well-known/openid-configuration",
    ] {
        let told = kit.get(path).await.ok();
        assert_eq!(told.text("issuer"), issuer);
        assert_eq!(told.text("token_endpoint"), format!("{issuer}/token"));
    }
    kit.get("/tenant/one/jwks.json").await.ok();
    assert_eq!(kit.get("/jwks.json").await.status, StatusCode::NOT_FOUND);
    let form = [("grant_type", "client_credentials")];
    kit.post_as("app", "/tenant/one/token", &form).await.ok();
}
