use rustls::pki_types::pem::PemObject as _;
use webpki::KeyUsage;

use super::*;
use crate::{
    identity::{Bundle, Purpose, Root, TrustDomain, peer_identity},
    jwt::{Expected, KeySet, Token},
};

#[tokio::test]
async fn a_workload_of_the_node_gets_its_certificate_and_nothing_more() {
    let authority = Authority::new().await;
    let agent = authority.agent("node1").await;
    let (key, csr) = csr();
    let answer = authority.certificate(&agent, CART, &csr).await;
    assert_eq!(answer.status, 200, "{:?}", answer.said);
    let chain = answer.chain();
    assert_eq!(
        peer_identity(&chain[0]).map(|id| id.to_string()),
        Some(CART.into())
    );
    let roots = authority.server.root.certificate().clone();
    let bundle = Bundle::new(vec![roots], None).expect("a root");
    for usage in [KeyUsage::server_auth(), KeyUsage::client_auth()] {
        let now = authority.server.clock.now();
        bundle.verify(&chain, usage, now).expect("as agents verify");
    }
    let (_, leaf) = x509_parser::parse_x509_certificate(&chain[0]).expect("parses");
    assert!(!leaf.is_ca() && leaf.subject().iter().next().is_none());
    assert!(leaf.serial.bits() > 150);
    assert_eq!(chain.len(), 2);
    let (_, above) = x509_parser::parse_x509_certificate(&chain[1]).expect("parses");
    assert!(above.is_ca());
    use rcgen::PublicKeyData as _;
    assert_eq!(leaf.public_key().raw, key.subject_public_key_info());
    let records = authority.audit();
    let last = records.last().expect("a record");
    assert_eq!(last["event"], "certificate");
    assert_eq!(last["client"], "spiffe://cluster.local/postern/agent/node1");
    assert_eq!(last["subject"], CART);
}

#[tokio::test]
async fn only_what_runs_on_the_agents_node() {
    let authority = Authority::new().await;
    let (here, elsewhere) = (
        authority.agent("node1").await,
        authority.agent("node2").await,
    );
    for (agent, identity, expected) in [
        (&here, CART, 200),
        (&elsewhere, CART, 403),
        (&here, "spiffe://cluster.local/ns/shop/sa/default", 403),
        (&here, "spiffe://cluster.local/ns/other/sa/cart", 403),
        (&here, "spiffe://other.example/ns/shop/sa/cart", 403),
        (&here, "spiffe://cluster.local/postern/agent/node1", 400),
        (&here, "cart", 400),
    ] {
        let answer = authority.certificate(agent, identity, &csr().1).await;
        assert_eq!(answer.status, expected, "{identity}: {:?}", answer.said);
        let body = json!({"identity": identity, "audience": ["shop"]});
        let answer = authority.post("/v1/jwt-svids", &body, &agent.chain).await;
        assert_eq!(answer.status, expected, "{identity}: {:?}", answer.said);
    }
    // The pod moves: what was granted is no precedent.
    let manifests = authority.server.config.nodes.manifests.clone();
    let path = manifests.expect("set").join("pod.yaml");
    std::fs::write(&path, POD.replace("node1", "node2")).expect("written");
    authority.server.ca.placement.reload().expect("reads");
    assert_eq!(
        authority.certificate(&here, CART, &csr().1).await.status,
        403
    );
    assert_eq!(
        authority
            .certificate(&elsewhere, CART, &csr().1)
            .await
            .status,
        200
    );
    // What does not parse changes nothing.
    std::fs::write(&path, "kind: [").expect("written");
    authority.server.ca.placement.reload().expect_err("refused");
    assert_eq!(
        authority
            .certificate(&elsewhere, CART, &csr().1)
            .await
            .status,
        200
    );
    let records = authority.audit();
    let refusal = records
        .iter()
        .find(|r| r["event"] == "refusal")
        .expect("one");
    assert_eq!(refusal["error"], "access_denied");
    assert_eq!(refusal["subject"], CART);
}

#[tokio::test]
async fn who_is_no_agent_gets_nothing() {
    let authority = Authority::new().await;
    let agent = authority.agent("node1").await;
    let workload = authority.certificate(&agent, CART, &csr().1).await.chain();
    // A namesake under another root, whose domain has the same name.
    let other = tempfile::tempdir().expect("directory");
    let domain = TrustDomain::default();
    let root = Root::of(None, None, other.path(), &domain).expect("a root");
    let foreign = crate::identity::Intermediates::new("other".into(), Duration::from_secs(3600));
    let key = KeyPair::generate().expect("a key");
    let now = authority.server.clock.now();
    let lifetime = Duration::from_secs(600);
    let signed = |root, uri: &str, purpose| {
        let certified = foreign.certify(root, uri, &key, purpose, lifetime, now);
        certified.expect("signed").chain
    };
    let name = "spiffe://cluster.local/postern/agent/node1";
    let stranger = signed(&root, name, Purpose::Agent);
    let own = crate::identity::Intermediates::new("own".into(), Duration::from_secs(3600));
    let certified = own.certify(
        &authority.server.root,
        "spiffe://other.example/postern/agent/node1",
        &key,
        Purpose::Agent,
        lifetime,
        now,
    );
    let other_domain = certified.expect("signed").chain;
    // A leaf that was put over the intermediate of another.
    let mixed = vec![stranger[0].clone(), agent.chain[1].clone()];
    for (what, chain) in [
        ("nobody", vec![]),
        ("a workload", workload),
        ("another root's", stranger),
        ("another domain's", other_domain),
        ("a mixed chain", mixed),
        ("a leaf alone", vec![agent.chain[0].clone()]),
        (
            "the root",
            vec![authority.server.root.certificate().clone()],
        ),
    ] {
        let body = json!({"identity": CART, "csr": csr().1});
        let refused = authority.post("/v1/certificates", &body, &chain).await;
        assert_eq!(refused.status, 401, "{what}: {:?}", refused.said);
        let refused = authority
            .post("/v1/agents/renew", &json!({"csr": csr().1}), &chain)
            .await;
        assert_eq!(refused.status, 401, "{what}: {:?}", refused.said);
        let body = json!({"identity": CART, "audience": ["a"]});
        let refused = authority.post("/v1/jwt-svids", &body, &chain).await;
        assert_eq!(refused.status, 401, "{what}: {:?}", refused.said);
    }
    assert_eq!(
        authority.certificate(&agent, CART, &csr().1).await.status,
        200
    );
    authority.advance(Duration::from_secs(25 * 3_600)).await;
    let expired = authority.certificate(&agent, CART, &csr().1).await;
    assert_eq!(expired.status, 401, "{:?}", expired.said);
}

#[tokio::test]
async fn an_agent_that_asks_too_often_waits() {
    use crate::config::Count;
    let authority = Authority::with(|c, _| c.certificates.per_minute = Count(3)).await;
    let (agent, other) = (
        authority.agent("node1").await,
        authority.agent("node2").await,
    );
    let mut answers = Vec::new();
    for _ in 0..5 {
        answers.push(authority.certificate(&agent, CART, &csr().1).await.status);
    }
    assert_eq!(answers, [200, 200, 200, 429, 429]);
    assert_eq!(
        authority.certificate(&other, CART, &csr().1).await.status,
        403
    );
    authority.advance(Duration::from_secs(20)).await;
    assert_eq!(
        authority.certificate(&agent, CART, &csr().1).await.status,
        200
    );
}

#[tokio::test]
async fn a_jwt_svid_verifies_with_the_published_keys() {
    let authority = Authority::new().await;
    let agent = authority.agent("node1").await;
    let ask = |audience: Value| {
        let (authority, chain) = (&authority, &agent.chain);
        async move {
            let body = json!({"identity": CART, "audience": audience});
            authority.post("/v1/jwt-svids", &body, chain).await
        }
    };
    let answer = ask(json!(["shop", "other"])).await;
    assert_eq!(answer.status, 200);
    let now = authority.server.clock.now();
    let token = answer.said["token"].as_str().expect("a token").to_owned();
    let get = |path: &str| Request::get(path).body(Body::empty()).expect("a request");
    let bundle = authority.send(get("/v1/bundle"), &[]).await.said;
    let keys = bundle["keys"].as_array().expect("keys");
    let of = |purpose: &str| {
        keys.iter()
            .filter(|k| k["use"] == purpose)
            .collect::<Vec<_>>()
    };
    let (roots, signing) = (of("x509-svid"), of("jwt-svid"));
    assert_eq!((roots.len(), roots.len() + signing.len()), (1, keys.len()));
    assert_eq!(
        (&roots[0]["kty"], &roots[0]["crv"]),
        (&"EC".into(), &"P-384".into())
    );
    assert_eq!(
        roots[0]["x5c"][0],
        wire::encode(&[authority.server.root.certificate().clone()])[0]
    );
    assert_eq!(bundle["spiffe_sequence"], 1);
    assert!(bundle["spiffe_refresh_hint"].is_u64());
    // Verifiers take keys that are for signatures; the bundle says for whose.
    let mut signing: Vec<Value> = signing.into_iter().cloned().collect();
    for key in &mut signing {
        key["use"] = "sig".into();
    }
    let set = KeySet::parse(json!({"keys": signing}).to_string().as_bytes()).expect("a set");
    let claims = Token::parse(&token).expect("a token").verify(
        Expected {
            issuer: Some("https://authority.example"),
            audiences: &["shop".into()],
            space_delimited: &[],
        },
        Some(&set),
        now,
    );
    let claims = claims.expect("verifies");
    assert_eq!(claims.subject(), Some(CART));
    assert_eq!(claims.audiences(), ["shop", "other"]);
    assert_eq!(claims.expires(), Some(now + Duration::from_secs(300)));
    for wrong in [
        json!([]),
        json!([""]),
        json!(vec!["a"; 9]),
        json!(["a".repeat(2000)]),
    ] {
        assert_eq!(ask(wrong.clone()).await.status, 400, "{wrong}");
    }
    let pem = authority.send(get("/v1/roots.pem"), &[]).await.said;
    let pem = pem.as_str().expect("text").as_bytes().to_vec();
    let root = CertificateDer::from_pem_slice(&pem).expect("a certificate");
    assert_eq!(&root, authority.server.root.certificate());
    let records = authority.audit();
    let told = records
        .iter()
        .find(|r| r["event"] == "token")
        .expect("a record");
    assert_eq!(
        (&told["subject"], &told["audience"][0]),
        (&CART.into(), &"shop".into())
    );
    assert!(!records.iter().any(|r| r.to_string().contains(&token)));
}

#[tokio::test]
async fn a_bundle_with_another_root_has_a_higher_number() {
    let authority = Authority::with(|config, dir| {
        let further = dir.join("further");
        std::fs::create_dir(&further).expect("directory");
        Root::of(None, None, &further, &TrustDomain::default()).expect("a root");
        std::fs::write(
            dir.join("bundle.pem"),
            std::fs::read(further.join("root.pem")).expect("read"),
        )
        .expect("written");
        config.certificates.bundle = Some(dir.join("bundle.pem"));
    })
    .await;
    let bundle = || {
        let request = Request::get("/v1/bundle").body(Body::empty());
        authority.send(request.expect("a request"), &[])
    };
    let first = bundle().await.said;
    assert_eq!(first["spiffe_sequence"], 1);
    let file = authority.dir.path().join("bundle.pem");
    let other = authority.dir.path().join("other");
    std::fs::create_dir(&other).expect("directory");
    Root::of(None, None, &other, &TrustDomain::default()).expect("a root");
    std::fs::copy(other.join("root.pem"), &file).expect("copied");
    let second = bundle().await.said;
    assert_eq!(second["spiffe_sequence"], 2);
    assert_ne!(first["keys"][1], second["keys"][1]);
    assert_eq!(first["keys"][0], second["keys"][0]);
    assert_eq!(bundle().await.said, second);
    // Fail closed: a bundle that cannot be read is no bundle.
    std::fs::write(&file, "nothing").expect("written");
    assert_eq!(bundle().await.status, 500);
}
