use super::*;
use crate::{
    authority::config::KubernetesNodes,
    jwt::{Algorithm, SigningKey},
};

const ISSUER: &str = "https://kubernetes.default.svc";

async fn cluster() -> (Authority, SigningKey) {
    let key = SigningKey::generate(Algorithm::Es256).expect("a key");
    let jwks = json!({"keys": [key.jwk()]}).to_string();
    let authority = Authority::with(|config, dir| {
        let file = dir.join("cluster.json");
        std::fs::write(&file, jwks).expect("written");
        config.nodes.kubernetes = Some(KubernetesNodes {
            issuer: ISSUER.into(),
            audience: None,
            jwks_file: Some(file),
            jwks_uri: None,
            roots: None,
            namespace: "postern".into(),
            service_account: "agent".into(),
        });
    })
    .await;
    (authority, key)
}

/// As the API server makes them.
fn claims(now: u64) -> Value {
    json!({
        "iss": ISSUER,
        "aud": ["https://authority.example"],
        "sub": "system:serviceaccount:postern:agent",
        "iat": now,
        "nbf": now,
        "exp": now + 3600,
        "kubernetes.io": {
            "namespace": "postern",
            "serviceaccount": {"name": "agent", "uid": "2"},
            "pod": {"name": "agent-x", "uid": "3"},
            "node": {"name": "node1", "uid": "4"},
        },
    })
}

#[tokio::test]
async fn a_service_account_token_joins_the_node_that_it_is_bound_to() {
    let (authority, key) = cluster().await;
    let now = authority.server.clock.seconds();
    let token = key.sign("JWT", &claims(now)).expect("signs");
    for _ in 0..2 {
        let joined = authority.join("node1", &token, &csr().1).await;
        assert_eq!(joined.status, 200, "{:?}", joined.said);
    }
    assert_eq!(authority.join("node2", &token, &csr().1).await.status, 401);
    authority.advance(Duration::from_secs(3600 + 61)).await;
    assert_eq!(authority.join("node1", &token, &csr().1).await.status, 401);
    let records = authority.audit();
    assert_eq!(records[0]["authentication"], "kubernetes");
    assert_eq!(records[2]["reason"], "the token is of a pod on node node1");
    assert_eq!(records[3]["reason"], "Jwt is expired");
}

#[tokio::test]
async fn a_revoked_node_joins_by_a_newer_token_alone() {
    let (authority, key) = cluster().await;
    let now = authority.server.clock.seconds();
    let revoked = tokens::revoke_node(&authority.server.store, "node1", now).await;
    revoked.expect("the store");
    let mut undated = claims(now);
    undated.as_object_mut().expect("an object").remove("iat");
    for old in [claims(now), undated] {
        let token = key.sign("JWT", &old).expect("signs");
        assert_eq!(authority.join("node1", &token, &csr().1).await.status, 401);
    }
    authority.advance(Duration::from_secs(1)).await;
    let token = key.sign("JWT", &claims(now + 1)).expect("signs");
    assert_eq!(authority.join("node1", &token, &csr().1).await.status, 200);
}

#[tokio::test]
async fn other_tokens_of_the_cluster_do_not() {
    let (authority, key) = cluster().await;
    let now = authority.server.clock.seconds();
    let changed = |path: &str, value: Value| {
        let mut claims = claims(now);
        let parent = claims.pointer_mut(path.rsplit_once('/').expect("a path").0);
        let name = path.rsplit_once('/').expect("a path").1;
        let parent = parent.and_then(Value::as_object_mut).expect("an object");
        match value {
            Value::Null => parent.remove(name),
            value => parent.insert(name.to_owned(), value),
        };
        claims
    };
    let cases = [
        (changed("/iss", "https://other".into()), "issuer"),
        (changed("/aud", json!(["https://api"])), "another audience"),
        // Audiences are compared as they stand.
        (
            changed("/aud", json!(["authority.example"])),
            "another audience",
        ),
        (changed("/aud", Value::Null), "another audience"),
        (changed("/exp", Value::Null), "never expires"),
        (changed("/nbf", (now + 600).into()), "not valid yet"),
        (
            changed("/sub", "system:serviceaccount:postern:other".into()),
            "another service account",
        ),
        (
            changed("/kubernetes.io/namespace", "other".into()),
            "another service account",
        ),
        (
            changed("/kubernetes.io/serviceaccount", json!({"name": "other"})),
            "another service account",
        ),
        (
            changed("/kubernetes.io/node", Value::Null),
            "not bound to a node",
        ),
        (
            changed("/kubernetes.io/node", json!({"name": ["node1", "node2"]})),
            "not bound to a node",
        ),
        (
            changed("/kubernetes.io", Value::Null),
            "another service account",
        ),
    ];
    for (claims, why) in &cases {
        let token = key.sign("JWT", claims).expect("signs");
        let refused = authority.join("node1", &token, &csr().1).await;
        assert_eq!(refused.status, 401, "{why}");
    }
    let stranger = SigningKey::generate(Algorithm::Es256).expect("a key");
    let token = stranger.sign("JWT", &claims(now)).expect("signs");
    assert_eq!(authority.join("node1", &token, &csr().1).await.status, 401);
    let records = authority.audit();
    assert_eq!(records.len(), cases.len() + 1);
    for (record, (_, why)) in records.iter().zip(&cases) {
        let reason = record["reason"].as_str().unwrap_or_default();
        assert!(reason.contains(why), "{reason:?}, not {why:?}");
    }
}

#[tokio::test]
async fn without_a_cluster_no_such_token_counts() {
    let (_, key) = cluster().await;
    let authority = Authority::new().await;
    let token = key.sign("JWT", &claims(start())).expect("signs");
    let refused = authority.join("node1", &token, &csr().1).await;
    assert_eq!(refused.status, 401);
    assert!(refused.detail().contains("no proof"), "{:?}", refused.said);
}
