//! Who a client is: every method, and what each refuses.

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use http::{StatusCode, header};
use rustls::pki_types::CertificateDer;
use serde_json::{Map, Value, json};

use super::kit::{
    Answer, ISSUER, JWT_BEARER, Kit, SECRET, WORKLOAD, assertion, assertion_with, basic, claims,
    client, peer, posted, svid, unsigned, write_jwks, x5c,
};
use crate::{
    authority::clients::{Authentication, Grant},
    identity::fingerprint,
    jwt::{Algorithm, SigningKey},
};

const CREDENTIALS: (&str, &str) = ("grant_type", "client_credentials");
const JWT_SPIFFE: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-spiffe";

async fn asserted(kit: &Kit, kind: &str, assertion: &str) -> Answer {
    let form = [
        CREDENTIALS,
        ("client_assertion_type", kind),
        ("client_assertion", assertion),
    ];
    kit.post("/token", &form).await
}

async fn with_header(kit: &Kit, value: &str, form: &[(&str, &str)]) -> Answer {
    let mut request = posted("/token", form);
    let value = value.parse().expect("a header");
    request.headers_mut().insert(header::AUTHORIZATION, value);
    kit.send(request).await
}

async fn with_certificates(kit: &Kit, shown: &[CertificateDer<'static>], id: &str) -> Answer {
    let mut request = posted("/token", &[CREDENTIALS, ("client_id", id)]);
    request.extensions_mut().insert(peer(shown));
    kit.send(request).await
}

#[tokio::test]
async fn a_secret_in_the_header_or_in_the_body_and_nowhere_else() {
    let odd = "od d:id%";
    let kit = Kit::with(|config, _| {
        let grants = [Grant::ClientCredentials];
        config
            .clients
            .push(client(odd, super::kit::with_secret(), &grants));
    })
    .await;
    with_header(&kit, &basic(odd, SECRET), &[CREDENTIALS])
        .await
        .ok();
    let post = [CREDENTIALS, ("client_id", odd), ("client_secret", SECRET)];
    kit.post("/token", &post).await.ok();
    // The header's other forms.
    for header in ["Basic", "Basic !!!", "Bearer x", "Basic YWJj"] {
        let answer = with_header(&kit, header, &[CREDENTIALS]).await;
        answer.refused("invalid_client");
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED);
        let challenge = &answer.headers[header::WWW_AUTHENTICATE];
        assert!(challenge.as_bytes().starts_with(b"Basic "));
    }
    let answer = kit.post("/token", &[CREDENTIALS, ("client_id", odd)]).await;
    answer.refused("invalid_client");
    assert!(!answer.headers.contains_key(header::WWW_AUTHENTICATE));
    // One way, and one client.
    with_header(&kit, &basic(odd, SECRET), &post)
        .await
        .refused("invalid_request");
    let other = [CREDENTIALS, ("client_id", "app")];
    let answer = with_header(&kit, &basic(odd, SECRET), &other).await;
    answer.refused("invalid_request");
    kit.post("/token", &[CREDENTIALS])
        .await
        .refused("invalid_client");
    let answer = with_header(&kit, &basic("nobody", SECRET), &[CREDENTIALS]).await;
    let wrong = with_header(&kit, &basic(odd, "wrong"), &[CREDENTIALS]).await;
    assert_eq!(
        answer.body, wrong.body,
        "unknown clients are not told from wrong secrets"
    );
}

#[tokio::test]
async fn guessing_is_slowed_down_for_the_guesser_alone() {
    let kit = Kit::new().await;
    for n in 0..10 {
        let guess = basic("app", &format!("guess{n}"));
        with_header(&kit, &guess, &[CREDENTIALS])
            .await
            .refused("invalid_client");
    }
    let answer = kit.token(&[CREDENTIALS]).await;
    assert_eq!(
        answer.status,
        StatusCode::TOO_MANY_REQUESTS,
        "even the right one"
    );
    assert!(answer.headers.contains_key(header::RETRY_AFTER));
    // Another client at that address, and the same one elsewhere.
    kit.token_as("service", &[CREDENTIALS]).await.ok();
    let mut request = posted("/token", &[CREDENTIALS]);
    let mut elsewhere = peer(&[]);
    elsewhere.address = "198.51.100.1:1".parse().expect("an address");
    request.extensions_mut().insert(elsewhere);
    let right = basic("app", SECRET).parse().expect("a header");
    request.headers_mut().insert(header::AUTHORIZATION, right);
    kit.send(request).await.ok();
    kit.clock.advance(Duration::from_secs(60));
    kit.token(&[CREDENTIALS]).await.ok();
}

#[tokio::test]
async fn guesses_count_whose_answers_nobody_waits_for() {
    let kit = Kit::new().await;
    for n in 0..10 {
        let guess = basic("app", &format!("guess{n}"));
        let asked = with_header(&kit, &guess, &[CREDENTIALS]);
        let answered = tokio::time::timeout(Duration::ZERO, asked).await;
        assert!(answered.is_err(), "it hung up");
    }
    let answer = kit.token(&[CREDENTIALS]).await;
    assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS);
}

#[tokio::test]
async fn many_right_ones_at_once_are_not_guesses() {
    let kit = Kit::new().await;
    let asked = (0..30).map(|_| kit.token(&[CREDENTIALS]));
    for answer in futures_util::future::join_all(asked).await {
        answer.ok();
    }
}

#[tokio::test]
async fn private_key_jwt_proves_the_key_once_and_for_this_server() {
    let key = SigningKey::generate(Algorithm::Es256).expect("a key");
    let kit = Kit::with(|config, directory| {
        let way = Authentication::PrivateKeyJwt {
            jwks_file: write_jwks(directory, &key),
        };
        config
            .clients
            .push(client("keyed", way, &[Grant::ClientCredentials]));
    })
    .await;
    let make = |more: Value| assertion(&key, "keyed", &kit.clock, more);
    let good = make(json!({}));
    asserted(&kit, JWT_BEARER, &good).await.ok();
    asserted(&kit, JWT_BEARER, &good)
        .await
        .refused("invalid_client");
    let endpoint = make(json!({"aud": [format!("{ISSUER}/token")]}));
    asserted(&kit, JWT_BEARER, &endpoint).await.ok();
    let now = kit.clock.seconds();
    for wrong in [
        json!({"aud": "https://another.test"}),
        json!({"aud": [ISSUER, "https://another.test"]}),
        json!({"aud": "http://as.test"}),
        json!({"aud": format!("{ISSUER}/")}),
        json!({"aud": null}),
        json!({"iss": "app"}),
        json!({"sub": "app"}),
        json!({"jti": null}),
        json!({"exp": null}),
        json!({"exp": now - 61}),
        json!({"exp": now + 700}),
        json!({"iat": now + 120}),
        json!({"nbf": now + 120}),
    ] {
        let answer = asserted(&kit, JWT_BEARER, &make(wrong.clone())).await;
        assert_eq!(answer.body["error"], "invalid_client", "{wrong}");
        // Guesses are counted: go on in another minute.
        kit.clock.advance(Duration::from_secs(1));
    }
    kit.clock.advance(Duration::from_secs(60));
    let mut both = vec![
        CREDENTIALS,
        ("client_assertion_type", JWT_BEARER),
        ("client_secret", SECRET),
    ];
    let good = make(json!({}));
    both.push(("client_assertion", &good));
    kit.post("/token", &both).await.refused("invalid_request");
    let half = [CREDENTIALS, ("client_assertion", good.as_str())];
    kit.post("/token", &half).await.refused("invalid_request");
    let named = [both[0], both[1], both[3], ("client_id", "app")];
    kit.post("/token", &named).await.refused("invalid_request");
    // It has no secret to be known by.
    let secret = basic("keyed", SECRET);
    with_header(&kit, &secret, &[CREDENTIALS])
        .await
        .refused("invalid_client");
}

#[tokio::test]
async fn algorithms_are_the_keys_and_not_the_senders() {
    let key = SigningKey::generate(Algorithm::Es256).expect("a key");
    let other = SigningKey::generate(Algorithm::EdDsa).expect("a key");
    let kit = Kit::with(|config, directory| {
        let way = Authentication::PrivateKeyJwt {
            jwks_file: write_jwks(directory, &key),
        };
        config
            .clients
            .push(client("keyed", way, &[Grant::ClientCredentials]));
    })
    .await;
    let now = kit.clock.seconds();
    let said = json!({"iss": "keyed", "sub": "keyed", "aud": ISSUER, "jti": "1", "exp": now + 60});
    let none = unsigned(&json!({"alg": "none"}), &said);
    let shared = unsigned(&json!({"alg": "HS256", "kid": key.kid()}), &said);
    let jwk = key.jwk().to_string();
    let mac = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, jwk.as_bytes());
    let mac = aws_lc_rs::hmac::sign(&mac, shared.as_bytes());
    let shared = format!("{shared}.{}", URL_SAFE_NO_PAD.encode(mac));
    // Another's key under this one's name.
    let header = json!({"alg": "EdDSA", "kid": key.kid(), "typ": "JWT"});
    let body = unsigned(&header, &said);
    let signature = other.sign("JWT", &said).expect("signed");
    let signature = signature
        .rsplit('.')
        .next()
        .expect("a signature")
        .to_owned();
    let stolen_name = format!("{body}.{signature}");
    let own_key = Map::from_iter([("jwk".to_owned(), other.jwk())]);
    for wrong in [
        format!("{none}."),
        format!("{none}.AA"),
        shared,
        stolen_name,
        assertion(&other, "keyed", &kit.clock, json!({})),
        assertion_with(&other, own_key, "keyed", &kit.clock, json!({})),
        "x.y.z".into(),
        "..".into(),
    ] {
        let answer = asserted(&kit, JWT_BEARER, &wrong).await;
        assert_eq!(answer.body["error"], "invalid_client", "{wrong}");
    }
    // An access token of ours is no assertion.
    let token = kit.token(&[CREDENTIALS]).await.ok().text("access_token");
    asserted(&kit, JWT_BEARER, &token)
        .await
        .refused("invalid_client");
}

#[tokio::test]
async fn a_workload_proves_itself_by_chain_by_connection_and_by_jwt_svid() {
    let kit = Kit::new().await;
    let own = kit.svid(WORKLOAD);
    let (key, header) = x5c(&own);
    let make = |key: &SigningKey, header: &Map<String, Value>| {
        assertion_with(key, header.clone(), WORKLOAD, &kit.clock, json!({}))
    };
    let answer = asserted(&kit, JWT_BEARER, &make(&key, &header)).await.ok();
    assert_eq!(claims(&answer.text("access_token"))["sub"], WORKLOAD);
    with_certificates(&kit, &own.chain, WORKLOAD).await.ok();
    let now = kit.clock.seconds();
    let jwt_svid = |sub: &str, aud: &str, typ: &str| {
        let claims = json!({"sub": sub, "aud": [aud], "iat": now, "exp": now + 300});
        kit.server.keys.sign(typ, &claims).expect("signed")
    };
    let good = jwt_svid(WORKLOAD, ISSUER, "JWT");
    asserted(&kit, JWT_SPIFFE, &good).await.ok();
    asserted(&kit, JWT_SPIFFE, &good).await.ok();
    // Others: another workload, another root, a key without its chain.
    let neighbour = kit.svid("spiffe://cluster.local/ns/shop/sa/till");
    let (its_key, its_header) = x5c(&neighbour);
    let elsewhere = tempfile::tempdir().expect("directory");
    let foreign = svid(elsewhere.path(), WORKLOAD, &kit.clock);
    let (foreign_key, foreign_header) = x5c(&foreign);
    for wrong in [
        make(&its_key, &its_header),
        make(&its_key, &header),
        make(&foreign_key, &foreign_header),
        make(&key, &Map::new()),
        make(&key, &Map::from_iter([("x5c".to_owned(), json!([]))])),
        make(&key, &Map::from_iter([("x5c".to_owned(), json!(["AAAA"]))])),
    ] {
        asserted(&kit, JWT_BEARER, &wrong)
            .await
            .refused("invalid_client");
    }
    kit.clock.advance(Duration::from_secs(60));
    for wrong in [&neighbour.chain[..], &foreign.chain, &own.chain[..1], &[]] {
        with_certificates(&kit, wrong, WORKLOAD)
            .await
            .refused("invalid_client");
    }
    let claims = json!({
        "sub": WORKLOAD, "aud": [ISSUER, "https://another.test"], "exp": now + 300,
    });
    let wide = kit.server.keys.sign("JWT", &claims).expect("signed");
    for wrong in [
        wide,
        jwt_svid(WORKLOAD, "https://another.test", "JWT"),
        jwt_svid("spiffe://cluster.local/ns/shop/sa/till", ISSUER, "JWT"),
        jwt_svid(WORKLOAD, ISSUER, "at+jwt"),
    ] {
        let form = [
            CREDENTIALS,
            ("client_id", WORKLOAD),
            ("client_assertion_type", JWT_SPIFFE),
            ("client_assertion", wrong.as_str()),
        ];
        kit.post("/token", &form).await.refused("invalid_client");
    }
    // Certificates end.
    kit.clock.advance(Duration::from_secs(25 * 3_600));
    with_certificates(&kit, &own.chain, WORKLOAD)
        .await
        .refused("invalid_client");
    asserted(&kit, JWT_BEARER, &make(&key, &header))
        .await
        .refused("invalid_client");
}

#[tokio::test]
async fn certificates_by_name_by_file_and_bound_to_tokens() {
    let other = tempfile::tempdir().expect("directory");
    let clock = crate::authority::Clock::system();
    // Signed by nobody that we know: only the file counts.
    let pinned = svid(other.path(), "spiffe://cluster.local/ns/a/sa/b", &clock);
    let kit = Kit::with(|config, directory| {
        let path = directory.join("pinned.pem");
        let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
        use base64::engine::general_purpose::STANDARD;
        pem.push_str(&STANDARD.encode(&pinned.chain[0]));
        pem.push_str("\n-----END CERTIFICATE-----\n");
        std::fs::write(&path, pem).expect("written");
        let grants = [Grant::ClientCredentials];
        let by_file = Authentication::SelfSignedTls {
            certificate_file: path,
        };
        let mut bound = client("pinned", by_file, &grants);
        bound.certificate_bound = true;
        config.clients.push(bound);
        let by_name = Authentication::TlsClientAuth {
            san_dns: None,
            san_uri: Some(WORKLOAD.into()),
        };
        config.clients.push(client("named", by_name, &grants));
        let by_name = Authentication::TlsClientAuth {
            san_dns: Some("client.test".into()),
            san_uri: None,
        };
        config.clients.push(client("host", by_name, &grants));
    })
    .await;
    // Of the root, with the right name, but a server's.
    let root = &kit.server.root;
    let (of_server, _key) = root
        .server_certificate("client.test", kit.clock.now())
        .expect("made");
    with_certificates(&kit, &of_server, "host")
        .await
        .refused("invalid_client");
    let own = kit.svid(WORKLOAD);
    with_certificates(&kit, &own.chain, "named").await.ok();
    with_certificates(&kit, &pinned.chain, "named")
        .await
        .refused("invalid_client");
    with_certificates(&kit, &own.chain, "pinned")
        .await
        .refused("invalid_client");
    let answer = with_certificates(&kit, &pinned.chain, "pinned").await.ok();
    let said = claims(&answer.text("access_token"));
    let thumbprint = URL_SAFE_NO_PAD.encode(fingerprint(&pinned.chain[0]));
    assert_eq!(said["cnf"]["x5t#S256"], thumbprint.as_str());
}

#[tokio::test]
async fn clients_of_the_store_come_and_go() {
    let kit = Kit::new().await;
    let stored = client(
        "stored",
        super::kit::with_secret(),
        &[Grant::ClientCredentials],
    );
    assert!(kit.store().add_client(&stored).await.expect("added"));
    assert!(!kit.store().add_client(&stored).await.expect("taken"));
    let listed = kit.store().clients().await.expect("listed");
    assert_eq!(listed, std::slice::from_ref(&stored));
    kit.token_as("stored", &[CREDENTIALS]).await.ok();
    let (code, _verifier) = kit.code("stored", &["read"]).await;
    let agreed = (vec!["https://api.test".to_owned()], vec!["read".to_owned()]);
    let add = kit
        .store()
        .add_consent("ada", "stored", &agreed.0, &agreed.1);
    add.await.expect("added");
    assert!(kit.store().remove_client("stored").await.expect("removed"));
    let code = super::super::keys::hash(&code);
    assert!(!kit.store().has_code(&code).await.expect("asked"));
    let left = kit
        .store()
        .has_consent("ada", "stored", &agreed.0, &agreed.1);
    assert!(!left.await.expect("asked"));
    assert!(!kit.store().remove_client("stored").await.expect("gone"));
    kit.token_as("stored", &[CREDENTIALS])
        .await
        .refused("invalid_client");
}

#[tokio::test]
async fn no_client_has_the_name_of_a_person() {
    let kit = Kit::with(|config, _| {
        let way = super::kit::with_secret();
        let person = client(super::kit::PERSON, way, &[Grant::ClientCredentials]);
        config.clients.push(person);
    })
    .await;
    let answer = kit.token_as(super::kit::PERSON, &[CREDENTIALS]).await;
    answer.refused("unauthorized_client");
}
