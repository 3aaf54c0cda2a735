use rcgen::{BasicConstraints, ExtendedKeyUsagePurpose, IsCa, SanType};

use super::*;
use crate::identity::{AgentId, peer_identity};

#[tokio::test]
async fn a_join_token_makes_one_agent_of_one_node() {
    let authority = Authority::new().await;
    let token = authority.token("node1").await;
    let (_, csr) = csr();
    let other = authority.join("node2", &token, &csr).await;
    assert_eq!(other.status, 401);
    let joined = authority.join("node1", &token, &csr).await;
    assert_eq!(joined.status, 200);
    let chain = joined.chain();
    let id = AgentId::of(&chain[0]).expect("an agent's");
    assert_eq!(id.to_string(), "spiffe://cluster.local/postern/agent/node1");
    assert_eq!(peer_identity(&chain[0]), None, "never a workload");
    assert_eq!(joined.said["roots"].as_array().map(Vec::len), Some(1));
    let again = authority.join("node1", &token, &csr).await;
    // The same words for all of these.
    assert_eq!((again.status, again.detail()), (401, other.detail()));
    let store = std::fs::read(authority.server.config.state.join("authority.db-wal"));
    let secret = token.trim_start_matches(tokens::PREFIX).to_owned();
    let holds = |bytes: &[u8], text: &str| bytes.windows(text.len()).any(|w| w == text.as_bytes());
    assert!(!holds(&store.expect("a log of writes"), &secret));
    let records = authority.audit();
    let told: Vec<_> = records
        .iter()
        .map(|r| {
            (
                r["event"].as_str().unwrap_or_default(),
                r["reason"].as_str().unwrap_or_default(),
            )
        })
        .collect();
    assert_eq!(told.len(), 3, "{told:?}");
    assert!(
        told[0].0 == "refusal" && told[0].1.ends_with("is for node node1"),
        "{told:?}"
    );
    assert_eq!(told[1].0, "join");
    assert!(
        told[2].0 == "refusal" && told[2].1.ends_with("is used"),
        "{told:?}"
    );
    assert_eq!(records[1]["client"], id.to_string());
    assert_eq!(records[1]["address"], "192.0.2.1");
    assert!(!records.iter().any(|r| r.to_string().contains(&secret)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_many_with_one_token_exactly_one_joins() {
    let authority = Arc::new(Authority::new().await);
    let token = authority.token("node1").await;
    let tries: Vec<_> = (0..20)
        .map(|_| {
            let (authority, token) = (authority.clone(), token.clone());
            tokio::spawn(async move { authority.join("node1", &token, &csr().1).await.status })
        })
        .collect();
    let mut joined = 0;
    for attempt in tries {
        match attempt.await.expect("no panic") {
            200 => joined += 1,
            status => assert_eq!(status, 401),
        }
    }
    assert_eq!(joined, 1);
}

#[tokio::test]
async fn tokens_that_are_wrong_expired_or_revoked_are_refused() {
    let authority = Authority::new().await;
    let (_, csr) = csr();
    for wrong in ["postern-join-AAAA", "something else", ""] {
        assert_eq!(
            authority.join("node1", wrong, &csr).await.status,
            401,
            "{wrong}"
        );
    }
    let none = post("/v1/agents/join", &json!({"node": "node1", "csr": csr}));
    assert_eq!(authority.send(none, &[]).await.status, 401);
    let token = authority.token("node1").await;
    authority.advance(Duration::from_secs(60)).await;
    assert_eq!(authority.join("node1", &token, &csr).await.status, 401);
    let token = authority.token("node1").await;
    let (store, now) = (&authority.server.store, authority.server.clock.seconds());
    let listed = tokens::list(store).await.expect("a list");
    let states: Vec<_> = listed.iter().map(|t| t.state(now)).collect();
    assert_eq!(states, ["expired", "open"]);
    assert!(
        tokens::revoke(store, &listed[1].id, now)
            .await
            .expect("done")
    );
    assert!(
        !tokens::revoke(store, &listed[1].id, now)
            .await
            .expect("done")
    );
    assert_eq!(authority.join("node1", &token, &csr).await.status, 401);
}

#[tokio::test]
async fn a_wrong_request_does_not_use_the_token_up() {
    let authority = Authority::new().await;
    let token = authority.token("node1").await;
    let (key, good) = csr();
    let ca = csr_of(&key, |p| {
        p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)
    });
    let name = csr_of(&key, |p| {
        p.subject_alt_names = vec![SanType::URI(CART.try_into().expect("ASCII"))];
    });
    let usage = csr_of(&key, |p| {
        p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    });
    let rsa = include_str!("rsa.csr.pem").to_owned();
    // The last byte is of the signature.
    let mut forged = pem_bytes(&good);
    *forged.last_mut().expect("bytes") ^= 1;
    let mut longer = pem_bytes(&good);
    longer.push(0);
    for (csr, expected) in [
        (ca, "extensions"),
        (name, "extensions"),
        (usage, "extensions"),
        (rsa, "another key"),
        (base64(&forged), "not signed"),
        (base64(&longer), "behind its end"),
        ("AAAA".into(), "no certificate request"),
        ("?".into(), "neither PEM"),
        ("-----BEGIN NOTHING-----".into(), "no PEM"),
    ] {
        let refused = authority.join("node1", &token, &csr).await;
        assert_eq!(refused.status, 400, "{csr}");
        assert!(refused.detail().contains(expected), "{:?}", refused.said);
    }
    for node in ["", "..", "a/b", "a b"] {
        assert_eq!(
            authority.join(node, &token, &good).await.status,
            400,
            "{node}"
        );
    }
    let unknown = json!({"node": "node1", "csr": good, "uri": CART});
    let mut request = post("/v1/agents/join", &unknown);
    let bearer = format!("Bearer {token}").parse().expect("a header");
    request.headers_mut().insert("authorization", bearer);
    let refused = authority.send(request, &[]).await;
    assert_eq!(refused.status, 400);
    assert!(refused.detail().contains("uri"), "{:?}", refused.said);
    let oversized = authority.join("node1", &token, &"A".repeat(70_000)).await;
    assert_eq!(oversized.status, 413);
    let der = base64(&pem_bytes(&good));
    assert_eq!(authority.join("node1", &token, &der).await.status, 200);
}

#[tokio::test]
async fn keys_of_all_accepted_kinds() {
    let authority = Authority::new().await;
    for kind in [
        &rcgen::PKCS_ECDSA_P256_SHA256,
        &rcgen::PKCS_ECDSA_P384_SHA384,
        &rcgen::PKCS_ED25519,
    ] {
        use rcgen::PublicKeyData as _;
        let key = KeyPair::generate_for(kind).expect("a key");
        let token = authority.token("node1").await;
        let answer = authority.join("node1", &token, &csr_of(&key, |_| {})).await;
        let chain = answer.chain();
        let (_, leaf) = x509_parser::parse_x509_certificate(&chain[0]).expect("parses");
        assert_eq!(leaf.public_key().raw, key.subject_public_key_info());
    }
}

#[tokio::test]
async fn an_agent_renews_with_a_new_key_until_its_node_is_revoked() {
    let authority = Authority::new().await;
    let agent = authority.agent("node1").await;
    let renew = |csr: String, chain: Vec<CertificateDer<'static>>| {
        let authority = &authority;
        async move {
            let body = json!({ "csr": csr });
            authority.post("/v1/agents/renew", &body, &chain).await
        }
    };
    let same = renew(csr_of(&agent.key, |_| {}), agent.chain.clone()).await;
    assert_eq!(
        (same.status, same.detail()),
        (400, "a renewal is for a new key")
    );
    authority.advance(Duration::from_secs(12 * 3_600)).await;
    let renewed = renew(csr().1, agent.chain.clone()).await;
    assert_eq!(renewed.status, 200);
    let chain = renewed.chain();
    assert_eq!(AgentId::of(&chain[0]), AgentId::of(&agent.chain[0]));
    // The first one expires, the second does not yet.
    authority.advance(Duration::from_secs(13 * 3_600)).await;
    let late = renew(csr().1, agent.chain.clone()).await;
    assert_eq!(late.status, 401);
    assert!(late.detail().contains("xpired"), "{:?}", late.said);
    assert_eq!(renew(csr().1, chain.clone()).await.status, 200);
    let now = authority.server.clock.seconds();
    let revoked = tokens::revoke_node(&authority.server.store, "node1", now).await;
    revoked.expect("done");
    let refused = renew(csr().1, chain).await;
    assert_eq!(refused.status, 401);
    assert!(refused.detail().contains("revoked"), "{:?}", refused.said);
    // A new token is a new beginning.
    authority.advance(Duration::from_secs(1)).await;
    let again = authority.agent("node1").await;
    assert_eq!(renew(csr().1, again.chain).await.status, 200);
}

fn pem_bytes(pem: &str) -> Vec<u8> {
    use rustls::pki_types::{CertificateSigningRequestDer, pem::PemObject as _};
    let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes());
    der.expect("PEM").to_vec()
}

fn base64(bytes: &[u8]) -> String {
    use ::base64::{Engine as _, engine::general_purpose::STANDARD};
    STANDARD.encode(bytes)
}
