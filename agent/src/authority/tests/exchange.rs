//! Token exchange: who may exchange whose tokens, and that nothing grows by it.

use std::time::Duration;

use serde_json::json;

use super::kit::{
    ACCESS_TOKEN, API, Answer, EXCHANGE, ISSUER, JWT, Kit, PERSON, WORKLOAD, claims, unsigned,
};
use crate::jwt::{Algorithm, SigningKey};

async fn exchange(kit: &Kit, client: &str, token: &str, more: &[(&str, &str)]) -> Answer {
    let mut form = vec![
        ("grant_type", EXCHANGE),
        ("subject_token", token),
        ("subject_token_type", ACCESS_TOKEN),
    ];
    // What is given stands in for what is there.
    form.retain(|(name, _)| !more.iter().any(|(given, _)| given == name));
    form.extend(more);
    kit.token_as(client, &form).await
}

#[tokio::test]
async fn a_service_acts_for_a_person_and_says_so() {
    let kit = Kit::new().await;
    let first = kit.login(&["openid", "read"]).await.text("access_token");
    kit.clock.advance(Duration::from_secs(100));
    let more = [("audience", "https://other.test")];
    let answer = exchange(&kit, "api", &first, &more).await.ok();
    assert_eq!(answer.text("issued_token_type"), ACCESS_TOKEN);
    assert!(answer.body.get("refresh_token").is_none());
    // As long as the subject token, not longer.
    assert_eq!(answer.body["expires_in"], 200);
    let said = claims(&answer.text("access_token"));
    assert_eq!(said["sub"], PERSON);
    assert_eq!(said["client_id"], "api");
    assert_eq!(said["act"], json!({"sub": "api"}));
    assert_eq!(said["aud"], json!(["https://other.test"]));
    assert_eq!(said["scope"], "openid read");
    assert_eq!(said["auth_time"], claims(&first)["auth_time"]);
    // The next in the chain, by its SPIFFE name.
    let for_api = exchange(&kit, "api", &first, &[])
        .await
        .ok()
        .text("access_token");
    let opaque = exchange(&kit, "opaque", &for_api, &[("scope", "read")])
        .await
        .ok();
    let opaque = opaque.text("access_token");
    assert!(!opaque.contains('.'));
    let told = kit
        .post_as("opaque", "/introspect", &[("token", &opaque)])
        .await
        .ok();
    assert_eq!(
        told.body["act"],
        json!({"sub": "opaque", "act": {"sub": "api"}})
    );
    assert_eq!(told.body["scope"], "read");
    // Opaque subject tokens are as good. Four have acted then, a fifth may not.
    let third = exchange(&kit, "api", &opaque, &[])
        .await
        .ok()
        .text("access_token");
    let fourth = exchange(&kit, "api", &third, &[])
        .await
        .ok()
        .text("access_token");
    exchange(&kit, "api", &fourth, &[])
        .await
        .refused("invalid_request");
    // All of them end with the person's agreement.
    let family = claims(&fourth)["exp"].as_u64();
    assert_eq!(family, claims(&first)["exp"].as_u64());
}

#[tokio::test]
async fn what_came_of_an_agreement_ends_with_it() {
    let kit = Kit::new().await;
    let login = kit.login(&["read"]).await;
    let exchanged = exchange(&kit, "api", &login.text("access_token"), &[]).await;
    let exchanged = exchanged.ok().text("access_token");
    assert!(kit.active("api", &exchanged).await);
    let refresh = login.text("refresh_token");
    kit.post_as("app", "/revoke", &[("token", &refresh)])
        .await
        .ok();
    assert!(!kit.active("api", &exchanged).await);
    exchange(&kit, "api", &exchanged, &[])
        .await
        .refused("invalid_request");
}

#[tokio::test]
async fn nobody_exchanges_what_was_not_made_for_them_or_gets_more_by_it() {
    let kit = Kit::new().await;
    let login = kit.login(&["openid", "read"]).await;
    let token = login.text("access_token");
    // `other` has the grant, but the token is for somebody else.
    exchange(&kit, "other", &token, &[])
        .await
        .refused("invalid_request");
    exchange(&kit, "service", &token, &[])
        .await
        .refused("unauthorized_client");
    for (more, error) in [
        (("scope", "read write"), "invalid_scope"),
        (("scope", "admin"), "invalid_scope"),
        (("audience", "https://foreign.test"), "invalid_target"),
        (("resource", "https://foreign.test"), "invalid_target"),
        (
            (
                "subject_token_type",
                "urn:ietf:params:oauth:token-type:saml2",
            ),
            "invalid_request",
        ),
        (
            (
                "subject_token_type",
                "urn:ietf:params:oauth:token-type:refresh_token",
            ),
            "invalid_request",
        ),
        (
            (
                "requested_token_type",
                "urn:ietf:params:oauth:token-type:id_token",
            ),
            "invalid_request",
        ),
        (("actor_token", "x"), "invalid_request"),
    ] {
        let answer = exchange(&kit, "api", &token, &[more]).await;
        assert_eq!(answer.body["error"], error, "{more:?}");
    }
    let id_token = login.text("id_token");
    for wrong in [
        ("subject_token_type", JWT),
        ("subject_token_type", ACCESS_TOKEN),
    ] {
        let answer = exchange(&kit, "app", &id_token, &[wrong]).await;
        answer.refused("invalid_request");
    }
    let refresh = login.text("refresh_token");
    exchange(&kit, "app", &refresh, &[])
        .await
        .refused("invalid_request");
    kit.clock.advance(Duration::from_secs(300));
    exchange(&kit, "api", &token, &[])
        .await
        .refused("invalid_request");
}

#[tokio::test]
async fn only_our_own_tokens_are_exchanged() {
    let kit = Kit::new().await;
    let token = kit.login(&["read"]).await.text("access_token");
    let said = claims(&token);
    let foreign = SigningKey::generate(Algorithm::Es256).expect("a key");
    let forged = foreign.sign("at+jwt", &said).expect("signed");
    let header = json!({"alg": "none", "typ": "at+jwt"});
    let mut elsewhere = said.clone();
    elsewhere["iss"] = "https://another.test".into();
    let elsewhere = kit.server.keys.sign("at+jwt", &elsewhere).expect("signed");
    let mut ahead = said.clone();
    ahead["nbf"] = (kit.clock.seconds() + 120).into();
    let ahead = kit.server.keys.sign("at+jwt", &ahead).expect("signed");
    for wrong in [
        forged,
        format!("{}.", unsigned(&header, &said)),
        elsewhere,
        ahead,
        "nothing".into(),
    ] {
        exchange(&kit, "api", &wrong, &[])
            .await
            .refused("invalid_request");
    }
}

#[tokio::test]
async fn jwt_svids_are_subjects_and_actors() {
    let kit = Kit::new().await;
    let now = kit.clock.seconds();
    let svid = |sub: &str, aud: &str| {
        let claims = json!({"sub": sub, "aud": [aud], "iat": now, "exp": now + 120});
        kit.server.keys.sign("JWT", &claims).expect("signed")
    };
    let own = svid(WORKLOAD, API);
    let answer = exchange(&kit, "api", &own, &[("subject_token_type", JWT)])
        .await
        .ok();
    let said = claims(&answer.text("access_token"));
    assert_eq!(said["sub"], WORKLOAD);
    assert_eq!(said["exp"], now + 120);
    // A JWT-SVID has no scopes, so neither has what comes of it.
    assert!(said.get("scope").is_none());
    let more = [("subject_token_type", JWT), ("scope", "read")];
    exchange(&kit, "api", &own, &more)
        .await
        .refused("invalid_scope");
    let foreign = svid("spiffe://another.test/ns/a/sa/b", API);
    let more = [("subject_token_type", JWT)];
    exchange(&kit, "api", &foreign, &more)
        .await
        .refused("invalid_request");
    let for_another = svid(WORKLOAD, "https://another.test");
    exchange(&kit, "api", &for_another, &more)
        .await
        .refused("invalid_request");
    // An actor token says who authenticated, or the request is refused.
    let token = kit.login(&["read"]).await.text("access_token");
    for (sub, good) in [("api", true), (WORKLOAD, false)] {
        let claims =
            json!({"iss": ISSUER, "sub": sub, "aud": [ISSUER], "jti": sub, "exp": now + 60});
        let actor = kit.server.keys.sign("at+jwt", &claims).expect("signed");
        let more = [
            ("actor_token", actor.as_str()),
            ("actor_token_type", ACCESS_TOKEN),
        ];
        let answer = exchange(&kit, "api", &token, &more).await;
        match good {
            true => assert_eq!(answer.status, 200, "{answer:?}"),
            false => answer.refused("invalid_request"),
        }
    }
}
