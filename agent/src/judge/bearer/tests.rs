//! Requests to protected resources, from the head that comes to what is answered.

use std::{collections::HashSet, path::Path, sync::atomic::Ordering::SeqCst, time::UNIX_EPOCH};

use aws_lc_rs::digest::{SHA256, digest};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use http::HeaderValue;
use serde_json::{Value, json};

use super::super::*;
use crate::{
    fetch::tests::{serve, serve_tls},
    identity::TrustDomain,
    introspect::tests::{Double, active},
    jwt::{Algorithm, SigningKey},
    objects::load_text,
    policy::{Mesh, PolicySet, Reading, Subject},
};

const ISSUER: &str = "https://as.example";
const NOW: u64 = 1_800_000_000;
const TARGET: &str = "https://api.example/orders/1";
const METADATA: &str = "https://api.example/.well-known/oauth-protected-resource/v1";

fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}

fn key() -> SigningKey {
    SigningKey::generate(Algorithm::Es256).expect("key")
}

fn claims(changes: Value) -> Value {
    let mut claims = json!({
        "iss": ISSUER, "sub": "alice", "aud": "api", "client_id": "web", "iat": NOW,
        "exp": NOW + 600, "jti": "id-1", "scope": "orders:read",
    });
    let members = claims.as_object_mut().expect("an object");
    for (name, value) in changes.as_object().expect("an object") {
        match value {
            Value::Null => members.remove(name),
            value => members.insert(name.clone(), value.clone()),
        };
    }
    claims
}

/// A judge, an issuer's key, and policies of one workload.
struct World {
    judge: Judge,
    issuer: SigningKey,
    selected: Selected,
}

const READERS: &str = "{rules: [{to: [{operation: {paths: ['/orders/*'], methods: [GET]}}], \
    from: [{source: {requestPrincipals: ['https://as.example/*']}}], \
    when: [{key: 'request.auth.claims[scope]', values: ['orders:read', 'orders:*']}]}, \
    {to: [{operation: {methods: [POST]}}], \
    when: [{key: 'request.auth.claims[scope]', values: ['orders:write']}]}, \
    {to: [{operation: {methods: [PUT]}}], \
    when: [{key: 'request.auth.claims[scope]', values: ['admin:*']}]}, \
    {to: [{operation: {methods: [PATCH]}}], \
    when: [{key: 'request.auth.claims[scp]', values: ['orders:patch']}]}]}";

fn object(kind: &str, spec: &str) -> String {
    let api = match kind {
        "ProtectedResource" => "postern.dev/v1alpha1",
        _ => "security.istio.io/v1",
    };
    format!(
        "---\napiVersion: {api}\nkind: {kind}\nmetadata: {{name: p, namespace: shop}}\nspec: {spec}\n"
    )
}

fn select(text: &str) -> Selected {
    let mesh = Mesh {
        root_namespace: "istio-system",
        trust_domain: &TrustDomain::default(),
        aliases: &[],
        secrets: Path::new("/"),
        requests: Reading::default(),
    };
    let objects = load_text(Path::new("p.yaml"), text).unwrap_or_else(|e| panic!("{e}: {text}"));
    let set = PolicySet::compile(objects, &mesh).unwrap_or_else(|e| panic!("{}: {text}", e[0]));
    set.select(&Subject {
        namespace: "shop".into(),
        ..Subject::default()
    })
}

impl World {
    /// With rules for the issuer's JWTs, and this ProtectedResource.
    fn new(resource: &str) -> Self {
        Self::with(Some(resource), READERS, &Config::default())
    }

    fn with(resource: Option<&str>, readers: &str, config: &Config) -> Self {
        let issuer = key();
        let keys = json!({"keys": [issuer.jwk()]});
        let mut text = object(
            "RequestAuthentication",
            &format!(
                "{{jwtRules: [{{issuer: '{ISSUER}', audiences: [api], jwks: '{keys}', \
                 outputPayloadToHeader: x-payload, outputClaimToHeaders: [{{header: x-sub, claim: sub}}]}}]}}"
            ),
        );
        text += &object("AuthorizationPolicy", readers);
        if let Some(resource) = resource {
            text += &object("ProtectedResource", resource);
        }
        Self {
            judge: Judge::new(config).expect("a judge"),
            selected: select(&text),
            issuer,
        }
    }

    fn token(&self, changes: Value) -> String {
        self.issuer.sign("at+jwt", &claims(changes)).expect("signs")
    }

    async fn judge(&self, call: &Call) -> Result<Allowed, Refused> {
        let facts = call.facts();
        let request = call.request();
        let own = Destination::default();
        let source = "10.0.0.1:999".parse().expect("address");
        (self.judge)
            .request(&self.selected, &facts, own, source, &request, at(call.now))
            .await
    }

    /// Status and challenges.
    async fn told(&self, call: &Call) -> (u16, String) {
        match self.judge(call).await {
            Ok(_) => (200, String::new()),
            Err(refused) => {
                let challenges: Vec<&str> = (refused.reply.headers.iter())
                    .filter(|(name, _)| *name == header::WWW_AUTHENTICATE)
                    .map(|(_, value)| value.to_str().expect("ASCII"))
                    .collect();
                (refused.reply.status.as_u16(), challenges.join(" | "))
            }
        }
    }

    async fn expect(&self, what: &str, call: &Call, status: u16, parts: &[&str]) {
        let (got, challenge) = self.told(call).await;
        assert_eq!(got, status, "{what}: {challenge}");
        for part in parts {
            assert!(
                challenge.contains(part),
                "{what}: {challenge:?} lacks {part:?}"
            );
        }
        if parts.is_empty() {
            assert_eq!(challenge, "", "{what}");
        }
    }
}

#[derive(Clone)]
struct Call {
    method: &'static str,
    path: String,
    host: &'static str,
    headers: Vec<(HeaderName, HeaderValue)>,
    certificate: Option<[u8; 32]>,
    now: u64,
}

impl Call {
    fn new() -> Self {
        Self {
            method: "GET",
            path: "/orders/1".into(),
            host: "orders.shop.svc:8080",
            headers: Vec::new(),
            certificate: None,
            now: NOW,
        }
    }

    fn header(mut self, name: &'static str, value: &str) -> Self {
        let value = HeaderValue::from_str(value).expect("a value");
        self.headers.push((HeaderName::from_static(name), value));
        self
    }

    fn bearer(self, token: &str) -> Self {
        self.header("authorization", &format!("Bearer {token}"))
    }

    fn dpop(self, token: &str, proof: &str) -> Self {
        self.header("authorization", &format!("DPoP {token}"))
            .header("dpop", proof)
    }

    fn facts(&self) -> Facts {
        let peer = "spiffe://cluster.local/ns/shop/sa/cart"
            .parse()
            .expect("id");
        let source = self.certificate.is_some().then_some(peer);
        let ip = "10.0.0.1".parse().expect("address");
        let mut facts = Facts::new(source, ip, "10.0.0.2:8080".parse().expect("address"));
        facts.certificate = self.certificate;
        facts
    }

    fn request(&self) -> Request<'_> {
        Request {
            method: self.method,
            path: &self.path,
            host: self.host,
            headers: self.headers.iter().map(|(n, v)| (n, v)).collect(),
        }
    }
}

/// A proof for a token.
fn proof(key: &SigningKey, token: &str, changes: Value) -> String {
    let hash = URL_SAFE_NO_PAD.encode(digest(&SHA256, token.as_bytes()));
    let mut claims = json!({"jti": "p-1", "htm": "GET", "htu": TARGET, "iat": NOW, "ath": hash});
    let members = claims.as_object_mut().expect("an object");
    members.extend(changes.as_object().expect("an object").clone());
    let more = serde_json::Map::from_iter([("jwk".to_owned(), key.jwk())]);
    key.sign_with("dpop+jwt", more, &claims).expect("signs")
}

const API: &str = "{resource: 'https://api.example/v1', authorizationServers: ['https://as.example'], \
    scopes: ['orders:read', 'orders:write']}";

#[tokio::test]
async fn metadata_is_told_to_anyone() {
    let world = World::new(API);
    for (method, path, expected) in [
        ("GET", "/.well-known/oauth-protected-resource/v1", 200),
        ("GET", "/.well-known/oauth-protected-resource", 200),
        (
            "GET",
            "/x/../.well-known/oauth-protected-resource/v1?a",
            200,
        ),
        ("HEAD", "/.well-known/oauth-protected-resource", 200),
        ("POST", "/.well-known/oauth-protected-resource", 401),
        ("GET", "/.well-known/oauth-protected-resource/", 401),
        ("GET", "/.well-known/oauth-protected-resource/v2", 401),
        ("GET", "/.well-known/oauth-authorization-server", 401),
    ] {
        let call = Call {
            method,
            path: path.into(),
            ..Call::new()
        };
        let refused = world.judge(&call).await.expect_err("nothing is allowed");
        assert_eq!(refused.reply.status, expected, "{method} {path}");
        let answered = matches!(refused.why, Why::Answered(_));
        assert_eq!(answered, expected == 200, "{method} {path}");
    }
    let call = Call {
        path: "/.well-known/oauth-protected-resource/v1".into(),
        ..Call::new()
    };
    // Also with a token that does not hold.
    let refused = world.judge(&call.bearer("x")).await.expect_err("answered");
    let document: Value = serde_json::from_str(&refused.reply.body).expect("JSON");
    assert_eq!(
        document,
        json!({
            "resource": "https://api.example/v1",
            "authorization_servers": ["https://as.example"],
            "scopes_supported": ["orders:read", "orders:write"],
            "bearer_methods_supported": ["header"],
            "dpop_signing_alg_values_supported": Algorithm::ALL.map(Algorithm::name),
            "dpop_bound_access_tokens_required": false,
            "tls_client_certificate_bound_access_tokens": true,
        })
    );
    // Without an identifier there is nothing to tell.
    let world = World::new("{tokens: {binding: dpop}}");
    let call = Call {
        path: "/.well-known/oauth-protected-resource".into(),
        ..Call::new()
    };
    world
        .expect("none", &call, 401, &["DPoP realm=\"http://orders"])
        .await;
}

#[tokio::test]
async fn challenges_say_what_would_help() {
    let world = World::new(API);
    let good = world.token(json!({}));
    let metadata = format!("resource_metadata=\"{METADATA}\"");
    let call = Call::new;
    let post = || Call {
        method: "POST",
        ..Call::new()
    };
    let put = || Call {
        method: "PUT",
        ..Call::new()
    };
    world.expect("good", &call().bearer(&good), 200, &[]).await;
    let lower = call().header("authorization", &format!("bearer  {good}"));
    world.expect("a scheme has no case", &lower, 200, &[]).await;
    let no_token = [
        "Bearer realm=\"https://api.example/v1\"",
        &metadata,
        "scope=\"orders:read\"",
    ];
    world.expect("none", &call(), 401, &no_token).await;
    assert!(!world.told(&call()).await.1.contains("error"));
    let basic = call().header("authorization", "Basic YTpi");
    world
        .expect("no token of ours", &basic, 401, &no_token)
        .await;
    world
        .expect("for writing", &post(), 401, &["scope=\"orders:write\""])
        .await;
    let own = "scope=\"orders:read orders:write\"";
    world.expect("no scope by name", &put(), 401, &[own]).await;
    let invalid = ["error=\"invalid_token\"", "error_description=\"", &metadata];
    for (what, changes) in [
        ("expired", json!({"exp": NOW - 61})),
        ("for another", json!({"aud": "bank"})),
        ("of another", json!({"iss": "https://evil.example"})),
    ] {
        let call = call().bearer(&world.token(changes));
        world.expect(what, &call, 401, &invalid).await;
    }
    let junk = call().bearer("opaque");
    world.expect("no JWT", &junk, 401, &invalid).await;
    let lacking = ["Bearer realm", "error=\"insufficient_scope\"", &metadata];
    let scope = |scope: &str| format!("scope=\"{scope}\"");
    let write = scope("orders:write");
    world
        .expect(
            "lacks",
            &post().bearer(&good),
            403,
            &[&lacking[..], &[&write]].concat(),
        )
        .await;
    world
        .expect(
            "lacks",
            &put().bearer(&good),
            403,
            &[&lacking[..], &[own]].concat(),
        )
        .await;
    // More scopes would not help here.
    let delete = Call {
        method: "DELETE",
        ..Call::new()
    };
    world
        .expect("nobody may", &delete.bearer(&good), 403, &[])
        .await;
    // Two tokens, or what cannot be read as one.
    let bad = ["error=\"invalid_request\"", &metadata];
    let mut twice = call().bearer(&good);
    twice.path = format!("/orders/1?access_token={good}");
    world.expect("also in the query", &twice, 400, &bad).await;
    twice.path = "/orders/1?access_token=x&access_token=y".into();
    twice.headers.clear();
    world.expect("twice in the query", &twice, 400, &bad).await;
    let twice = call().bearer(&good).bearer(&good);
    world.expect("two headers", &twice, 400, &bad).await;
    let twice = call().header("authorization", "Basic YTpi").bearer(&good);
    world.expect("two schemes", &twice, 400, &bad).await;
    for form in [
        "Bearer",
        "Bearer ",
        "Bearer a b",
        "Bearer \"a\"",
        "Bearer a,b",
        "bearer =",
        "DPoP",
    ] {
        let call = call().header("authorization", form);
        world
            .expect(form, &call, 400, &["error=\"invalid_request\""])
            .await;
    }
    let mut query = call();
    query.path = format!("/orders/1?access_token={good}");
    world
        .expect("in the query alone, as the rule has it", &query, 200, &[])
        .await;
}

#[tokio::test]
async fn without_a_resource_all_is_as_istio_has_it() {
    let world = World::with(None, READERS, &Config::default());
    let good = world.token(json!({}));
    world
        .expect("good", &Call::new().bearer(&good), 200, &[])
        .await;
    world.expect("none", &Call::new(), 403, &[]).await;
    let post = Call {
        method: "POST",
        ..Call::new()
    };
    world.expect("lacks", &post.bearer(&good), 403, &[]).await;
    let other = world.token(json!({"aud": "bank"}));
    let told = world.told(&Call::new().bearer(&other)).await;
    let challenge =
        "Bearer realm=\"http://orders.shop.svc:8080/orders/1\", error=\"invalid_token\"";
    assert_eq!(told, (403, challenge.to_owned()));
    let mut twice = Call::new().bearer(&good);
    twice.path = format!("/orders/1?access_token={good}");
    world.expect("twice the same", &twice, 200, &[]).await;
    let dpop = Call::new().header("authorization", &format!("DPoP {good}"));
    world.expect("no scheme of ours", &dpop, 403, &[]).await;
    let bound = world.token(json!({"cnf": {"jkt": "x"}}));
    world
        .expect("who bears it", &Call::new().bearer(&bound), 200, &[])
        .await;
}

#[tokio::test]
async fn access_tokens_only() {
    let world = World::new("{tokens: {type: at+jwt}}");
    let sign = |typ: &str, changes| world.issuer.sign(typ, &claims(changes)).expect("signs");
    for typ in [
        "at+jwt",
        "AT+JWT",
        "application/at+jwt",
        "application/AT+jwt",
    ] {
        let call = Call::new().bearer(&sign(typ, json!({})));
        world.expect(typ, &call, 200, &[]).await;
    }
    for typ in ["JWT", "jwt", "id_token+jwt", "at", "application/jwt", ""] {
        let call = Call::new().bearer(&sign(typ, json!({})));
        world
            .expect(typ, &call, 401, &["invalid_token", "no access token"])
            .await;
    }
    for name in ["iss", "exp", "aud", "sub", "client_id", "iat", "jti"] {
        let call = Call::new().bearer(&sign("at+jwt", json!({name: null})));
        world.expect(name, &call, 401, &["invalid_token"]).await;
    }
    // What another workload's rules took before is not taken here.
    let open = World {
        selected: select(&{
            let keys = json!({"keys": [world.issuer.jwk()]});
            let rule =
                format!("{{jwtRules: [{{issuer: '{ISSUER}', audiences: [api], jwks: '{keys}'}}]}}");
            object("RequestAuthentication", &rule) + &object("ProtectedResource", "{}")
        }),
        judge: Judge::new(&Config::default()).expect("a judge"),
        issuer: key(),
    };
    let token = sign("JWT", json!({}));
    open.expect("any token", &Call::new().bearer(&token), 200, &[])
        .await;
    let strict = World {
        selected: world.selected,
        ..open
    };
    strict
        .expect(
            "cached",
            &Call::new().bearer(&token),
            401,
            &["no access token"],
        )
        .await;
}

#[tokio::test]
async fn scp_is_a_list_like_scope() {
    let world = World::new("{}");
    let patch = || Call {
        method: "PATCH",
        ..Call::new()
    };
    for (scp, status) in [
        (json!("orders:patch"), 200),
        (json!("a orders:patch b"), 200),
        (json!(["a", "orders:patch"]), 200),
        (json!("orders:patching"), 403),
        (json!(["a orders:patch"]), 403),
        (json!(["orders:patch "]), 403),
        (json!({"orders:patch": true}), 403),
        (json!("orders:patch,b"), 403),
    ] {
        let token = world.token(json!({"scp": scp, "scope": null}));
        let (got, told) = world.told(&patch().bearer(&token)).await;
        assert_eq!(got, status, "{scp}: {told}");
        assert_eq!(
            told.contains("scope=\"orders:patch\""),
            status == 403,
            "{told}"
        );
    }
    // Without a ProtectedResource a string is one value (Istio).
    let plain = World::with(None, READERS, &Config::default());
    let token = plain.token(json!({"scp": "a orders:patch"}));
    plain
        .expect("one value", &patch().bearer(&token), 403, &[])
        .await;
}

#[tokio::test]
async fn a_token_of_a_key_takes_a_proof_for_each_request() {
    let world = World::new("{resource: 'https://api.example'}");
    let (own, other) = (key(), key());
    let bound = world.token(json!({"cnf": {"jkt": own.kid()}}));
    let free = world.token(json!({}));
    let allowed = world
        .judge(&Call::new().dpop(&bound, &proof(&own, &bound, json!({}))))
        .await;
    let edits = allowed.expect("proven").edits;
    for name in ["authorization", "dpop"] {
        assert!(
            !edits.keeps(&HeaderName::from_static(name)),
            "{name} is taken out"
        );
    }
    let again = Call::new().dpop(&bound, &proof(&own, &bound, json!({})));
    let invalid = "error=\"invalid_dpop_proof\"";
    world
        .expect(
            "again",
            &again,
            401,
            &["DPoP realm", invalid, "used before", "algs=\""],
        )
        .await;
    let next = |changes: Value| {
        let mut all = json!({"jti": changes.to_string()});
        let members = all.as_object_mut().expect("an object");
        members.extend(changes.as_object().expect("an object").clone());
        Call::new().dpop(&bound, &proof(&own, &bound, all))
    };
    for htu in [
        "https://api.example/orders/1",
        "HTTPS://API.example:443/orders/1?query#fragment",
        "https://api.example/x/../orders/%31",
    ] {
        world
            .expect(htu, &next(json!({"htu": htu})), 200, &[])
            .await;
    }
    for htu in [
        "http://api.example/orders/1",
        "https://api.example:8443/orders/1",
        "https://api.example:99999/orders/1",
        "https://api.example:443x/orders/1",
        "https://api.example:/orders/1",
        "https://api.example/orders/2",
        "https://api.example/orders/1/",
        "https://api.example",
        "https://orders.shop.svc:8080/orders/1",
        "https://api.example.evil.example/orders/1",
        "https://api.example@evil.example/orders/1",
        "https://user@api.example/orders/1",
        "//api.example/orders/1",
        "/orders/1",
        "https:\\\\api.example/orders/1",
        "https://api.example/orders/1 ",
        "ftp://api.example/orders/1",
        "",
    ] {
        world
            .expect(htu, &next(json!({"htu": htu})), 401, &[invalid])
            .await;
    }
    world
        .expect(
            "another method",
            &next(json!({"htm": "POST"})),
            401,
            &[invalid],
        )
        .await;
    world
        .expect("old", &next(json!({"iat": NOW - 61})), 401, &[invalid])
        .await;
    let two = next(json!({"a": 1})).header("dpop", "x");
    world
        .expect("two proofs", &two, 401, &[invalid, "more than one"])
        .await;
    let none = Call::new().header("authorization", &format!("DPoP {bound}"));
    world
        .expect("no proof", &none, 401, &[invalid, "missing"])
        .await;
    let stolen = Call::new().dpop(&bound, &proof(&other, &bound, json!({})));
    world
        .expect("another key", &stolen, 401, &["DPoP", "invalid_token"])
        .await;
    let bearer = Call::new().bearer(&bound);
    world
        .expect(
            "sent as bearer",
            &bearer,
            401,
            &["DPoP realm", "invalid_token"],
        )
        .await;
    let unbound = Call::new().dpop(&free, &proof(&own, &free, json!({})));
    world
        .expect(
            "a free token",
            &unbound,
            401,
            &["DPoP realm", "invalid_token"],
        )
        .await;
    let swapped = Call::new().dpop(&bound, &proof(&own, &free, json!({"jti": "x"})));
    world
        .expect("a proof for another token", &swapped, 401, &[invalid])
        .await;
    // A proof is used up by what it lets pass, not by what is refused.
    let post = |jti: &str| {
        let proof = proof(&own, &bound, json!({"htm": "POST", "jti": jti}));
        Call {
            method: "POST",
            ..Call::new().dpop(&bound, &proof)
        }
    };
    let lacking = ["DPoP realm", "insufficient_scope", "scope=\"orders:write\""];
    world.expect("lacks", &post("q"), 403, &lacking).await;
    world.expect("lacks again", &post("q"), 403, &lacking).await;
    // A request that runs is not asked for a new proof, but for one.
    let running = next(json!({"b": 1}));
    let allowed = world.judge(&running).await.expect("proven");
    let later = |call: &Call, now: u64| {
        let held = allowed.claims.as_ref();
        let (facts, request) = (call.facts(), call.request());
        (world.judge).no_longer(&world.selected, &facts, &request, held, at(now))
    };
    assert_eq!(later(&running, NOW + 300), None);
    assert!(later(&running, NOW + 661).is_some(), "expired");
    assert!(
        later(&Call::new().bearer(&bound), NOW).is_some(),
        "no proof"
    );
}

#[tokio::test]
async fn without_an_identifier_the_host_is_the_target() {
    let world = World::new("{}");
    let own = key();
    let bound = world.token(json!({"cnf": {"jkt": own.kid()}}));
    for (host, htu, status) in [
        ("orders:8080", "http://orders:8080/orders/1", 200),
        ("orders:8080", "https://ORDERS:8080/orders/1", 200),
        ("orders", "https://orders:443/orders/1", 200),
        ("orders:80", "http://orders/orders/1", 200),
        ("orders:80", "https://orders/orders/1", 401),
        ("orders:8080", "http://orders/orders/1", 401),
        ("orders:8080", TARGET, 401),
        ("", "http:///orders/1", 401),
        ("[fd00::1]:8080", "http://[fd00::1]:8080/orders/1", 200),
    ] {
        let proof = proof(
            &own,
            &bound,
            json!({"htu": htu, "jti": format!("{host} {htu}")}),
        );
        let call = Call {
            host,
            ..Call::new().dpop(&bound, &proof)
        };
        let told = world.told(&call).await;
        assert_eq!(told.0, status, "{host} {htu}: {}", told.1);
    }
}

#[tokio::test]
async fn nonces_are_asked_for() {
    let world =
        World::new("{resource: 'https://api.example', tokens: {binding: dpop, nonce: true}}");
    let own = key();
    let bound = world.token(json!({"cnf": {"jkt": own.kid()}}));
    let first = Call::new().dpop(&bound, &proof(&own, &bound, json!({})));
    let refused = world.judge(&first).await.expect_err("no nonce");
    let header = |name| {
        let found = refused.reply.headers.iter().find(|(n, _)| n == name);
        found.map(|(_, value)| value.to_str().expect("ASCII").to_owned())
    };
    assert_eq!(refused.reply.status, StatusCode::UNAUTHORIZED);
    let challenge = header("www-authenticate").expect("a challenge");
    assert!(
        challenge.contains("error=\"use_dpop_nonce\""),
        "{challenge}"
    );
    assert_eq!(header("cache-control").as_deref(), Some("no-store"));
    let nonce = header("dpop-nonce").expect("a nonce");
    let with = |nonce: &str, jti: &str, now: u64| Call {
        now,
        ..Call::new().dpop(
            &bound,
            &proof(
                &own,
                &bound,
                json!({"nonce": nonce, "jti": jti, "iat": now}),
            ),
        )
    };
    world
        .expect("with it", &with(&nonce, "a", NOW), 200, &[])
        .await;
    world
        .expect("a while later", &with(&nonce, "b", NOW + 59), 200, &[])
        .await;
    let asked = ["use_dpop_nonce"];
    world
        .expect("old", &with(&nonce, "c", NOW + 180), 401, &asked)
        .await;
    world
        .expect("made up", &with("AAAA", "d", NOW), 401, &asked)
        .await;
}

#[tokio::test]
async fn tokens_are_bound_as_they_must_be() {
    const MINE: [u8; 32] = [7; 32];
    let own = key();
    let x5t = |digest: [u8; 32]| URL_SAFE_NO_PAD.encode(digest);
    let (free, by_key) = (Value::Null, json!({"jkt": own.kid()}));
    let by_certificate = json!({"x5t#S256": x5t(MINE)});
    let both = json!({"jkt": own.kid(), "x5t#S256": x5t(MINE)});
    let others = json!({"x5t#S256": x5t([8; 32])});
    for (binding, cnf, dpop, certificate, status) in [
        ("any", &free, false, None, 200),
        ("any", &free, false, Some(MINE), 200),
        ("any", &by_key, true, None, 200),
        ("any", &by_key, false, Some(MINE), 401),
        ("any", &by_certificate, false, Some(MINE), 200),
        ("any", &by_certificate, false, None, 401),
        ("any", &by_certificate, false, Some([8; 32]), 401),
        ("any", &others, false, Some(MINE), 401),
        ("any", &both, true, Some(MINE), 200),
        ("any", &both, true, None, 401),
        ("any", &both, false, Some(MINE), 401),
        ("any", &json!({}), false, Some(MINE), 401),
        ("any", &json!("x"), false, Some(MINE), 401),
        ("any", &json!({"kid": "x"}), true, Some(MINE), 401),
        ("any", &json!({"jwk": own.jwk()}), true, Some(MINE), 401),
        ("any", &json!({"jkt": 7}), true, None, 401),
        ("any", &json!({"x5t#S256": "AAAA"}), false, Some(MINE), 401),
        ("dpop", &free, false, Some(MINE), 401),
        ("dpop", &by_key, true, None, 200),
        ("dpop", &by_certificate, false, Some(MINE), 401),
        ("dpop", &both, true, Some(MINE), 200),
        ("certificate", &free, false, Some(MINE), 401),
        ("certificate", &by_key, true, Some(MINE), 401),
        ("certificate", &by_certificate, false, Some(MINE), 200),
        ("certificate", &by_certificate, false, None, 401),
        ("bound", &free, false, Some(MINE), 401),
        ("bound", &by_key, true, None, 200),
        ("bound", &by_certificate, false, Some(MINE), 200),
    ] {
        let world = World::new(&format!(
            "{{resource: 'https://api.example', tokens: {{binding: {binding}}}}}"
        ));
        let token = world.token(json!({ "cnf": cnf }));
        let mut call = match dpop {
            true => Call::new().dpop(&token, &proof(&own, &token, json!({}))),
            false => Call::new().bearer(&token),
        };
        call.certificate = certificate;
        let told = world.told(&call).await;
        assert_eq!(
            told.0, status,
            "{binding} {cnf} {dpop} {certificate:?}: {}",
            told.1
        );
        let error = status == 200 || told.1.contains("error=\"invalid_token\"");
        assert!(error, "{binding} {cnf}: {}", told.1);
    }
    for (binding, schemes) in [
        ("any", "Bearer"),
        ("dpop", "DPoP"),
        ("bound", "DPoP Bearer"),
    ] {
        let world = World::new(&format!("{{tokens: {{binding: {binding}}}}}"));
        let (_, told) = world.told(&Call::new()).await;
        let named: Vec<&str> = (told.split(" | "))
            .filter_map(|c| c.split(' ').next())
            .collect();
        assert_eq!(named.join(" "), schemes);
    }
}

/// A world whose opaque tokens are asked about, and where that is.
async fn introspecting(more: &str) -> (World, Arc<Double>, tempfile::TempDir) {
    let mut answer = active();
    answer["scope"] = "orders:read".into();
    let double = Double::new(&answer.to_string());
    let directory = tempfile::tempdir().expect("a directory");
    let (base, roots) = serve_tls(double.routes(), directory.path()).await;
    let mut config = Config::default();
    config.jwt.roots = Some(roots);
    let resource = format!(
        "{{resource: 'https://api.example', introspection: {{endpoint: '{base}/introspect', issuer: '{ISSUER}', \
         clientId: orders, clientAuthentication: {{none: {{}}}}, audiences: ['https://api.example']{more}}}}}"
    );
    (
        World::with(Some(&resource), READERS, &config),
        double,
        directory,
    )
}

#[tokio::test]
async fn opaque_tokens_are_asked_about() {
    let (mut world, double, _directory) = introspecting("").await;
    let opaque = Call::new().bearer("opaque-1");
    let allowed = world.judge(&opaque).await.expect("active");
    let claims = allowed.claims.clone().expect("claims");
    assert_eq!(claims.principal(), Some((ISSUER, "alice")));
    assert_eq!(claims.checked().name(), "introspection");
    assert!(!allowed.edits.keeps(&header::AUTHORIZATION));
    let sub = HeaderName::from_static("x-sub");
    let set: Vec<_> = (allowed.edits.set.iter())
        .map(|(n, v)| (n.clone(), v.as_bytes()))
        .collect();
    assert_eq!(set, [(sub, &b"alice"[..])], "as a rule of that issuer says");
    assert_eq!(allowed.expires, Some(at(NOW + 660)));
    assert_eq!(double.asked(), 1);
    // Policy decides by the claims; nobody is asked again.
    let post = Call {
        method: "POST",
        ..opaque.clone()
    };
    world
        .expect("lacks", &post, 403, &["insufficient_scope", "orders:write"])
        .await;
    world
        .expect("none", &Call::new(), 401, &["Bearer realm"])
        .await;
    // A JWT of a rule is not asked about, and none of another either.
    let jwt = world.token(json!({}));
    world
        .expect("a JWT", &Call::new().bearer(&jwt), 200, &[])
        .await;
    let stale = world.token(json!({"exp": NOW - 61}));
    world
        .expect(
            "an old JWT",
            &Call::new().bearer(&stale),
            401,
            &["invalid_token"],
        )
        .await;
    assert_eq!(double.asked(), 1);
    // Three parts alone make no JWT.
    world
        .expect("dots", &Call::new().bearer("a.b.c"), 200, &[])
        .await;
    assert_eq!(double.asked(), 2);
    double.says(r#"{"active": false}"#);
    let other = Call::new().bearer("opaque-2");
    world
        .expect("inactive", &other, 401, &["invalid_token", "not active"])
        .await;
    // Two ways at once, one of which only introspection would look at.
    let mut twice = opaque.clone();
    twice.path = format!("/orders/1?access_token={jwt}");
    world
        .expect("twice", &twice, 400, &["invalid_request"])
        .await;
    *double.status.lock().expect("no panic") = StatusCode::INTERNAL_SERVER_ERROR;
    let refused = world
        .judge(&Call::new().bearer("opaque-3"))
        .await
        .expect_err("unavailable");
    assert_eq!(refused.reply.status, StatusCode::SERVICE_UNAVAILABLE);
    let why = refused.why.to_string();
    assert!(why.contains("introspection: answered 500"), "{why}");
    assert!(!why.contains("opaque-3"));
    // What runs goes on by what was told when it came.
    let later = |held: Option<&Arc<Claims>>, now| {
        let (facts, request) = (opaque.facts(), opaque.request());
        (world.judge).no_longer(&world.selected, &facts, &request, held, at(now))
    };
    let held = allowed.claims.as_ref();
    assert_eq!(later(held, NOW + 60), None);
    assert!(later(held, NOW + 661).is_some(), "expired");
    // Away from traffic nobody is asked.
    world.judge.introspector = None;
    let refused = world.judge(&opaque).await.expect_err("offline");
    assert_eq!(refused.reply.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(
        refused.why.to_string().contains("was not done"),
        "{}",
        refused.why
    );
}

#[tokio::test]
async fn revoked_jwts_are_refused_where_they_are_always_asked_about() {
    let (world, double, _directory) =
        introspecting(", always: true, forwardOriginalToken: true").await;
    let jwt = world.token(json!({}));
    let allowed = world
        .judge(&Call::new().bearer(&jwt))
        .await
        .expect("active");
    let claims = allowed.claims.expect("claims");
    // Its own claims, confirmed by the issuer.
    assert_eq!(claims.checked().name(), "introspection");
    assert_eq!(claims.id(), Some("id-1"));
    assert!(
        !allowed.edits.keeps(&header::AUTHORIZATION),
        "as its rule says"
    );
    let opaque = world
        .judge(&Call::new().bearer("opaque"))
        .await
        .expect("active");
    assert!(
        opaque.edits.keeps(&header::AUTHORIZATION),
        "as introspection says"
    );
    double.says(r#"{"active": false}"#);
    let revoked = world.token(json!({"jti": "other"}));
    world
        .expect(
            "revoked",
            &Call::new().bearer(&revoked),
            401,
            &["not active"],
        )
        .await;
    let asked = double.asked();
    // Nobody is asked about what does not hold anyway.
    let forged = format!("{}AAAA", &jwt[..jwt.len() - 4]);
    world
        .expect(
            "forged",
            &Call::new().bearer(&forged),
            401,
            &["invalid_token"],
        )
        .await;
    assert_eq!(double.asked(), asked);
}

#[tokio::test]
async fn introspected_tokens_are_bound_too() {
    let (world, double, _directory) = introspecting("").await;
    let own = key();
    let mut answer = active();
    answer["scope"] = "orders:read".into();
    answer["token_type"] = "DPoP".into();
    answer["cnf"] = json!({"jkt": own.kid()});
    double.says(&answer.to_string());
    let call = Call::new().dpop("opaque", &proof(&own, "opaque", json!({})));
    world.expect("proven", &call, 200, &[]).await;
    world.expect("again", &call, 401, &["used before"]).await;
    let bearer = Call::new().bearer("opaque");
    world
        .expect("as bearer", &bearer, 401, &["DPoP realm", "invalid_token"])
        .await;
    let asked = double.asked();
    // A proof that does not hold is no reason to ask.
    let call = Call::new().dpop("opaque-2", &proof(&own, "opaque", json!({"jti": "z"})));
    world
        .expect("for another token", &call, 401, &["invalid_dpop_proof"])
        .await;
    assert_eq!(double.asked(), asked);
}

/// Keys of one server, as they are at the moment, and how often they were asked for.
#[derive(Default)]
struct Keys {
    set: std::sync::Mutex<Option<String>>,
    asked: std::sync::atomic::AtomicUsize,
}

/// The keys cannot be had until the old ones are given up, and are others then: of
/// many requests at once one asks, and each gets the answer that is right.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_requests_with_a_new_key_after_a_long_outage() {
    use axum::{Router, extract::State, routing::get};
    async fn answer(State(keys): State<Arc<Keys>>) -> Result<String, StatusCode> {
        keys.asked.fetch_add(1, SeqCst);
        let set = keys.set.lock().expect("no panic").clone();
        // Long enough for all to come meanwhile.
        tokio::time::sleep(Duration::from_millis(100)).await;
        set.ok_or(StatusCode::SERVICE_UNAVAILABLE)
    }
    let (old, new, unknown) = (key(), key(), key());
    let set = |key: &SigningKey| Some(json!({"keys": [key.jwk()]}).to_string());
    let keys = Arc::new(Keys::default());
    *keys.set.lock().expect("no panic") = set(&old);
    let routes = Router::new()
        .route("/keys", get(answer))
        .with_state(keys.clone());
    let base = serve(routes).await;
    let mut config = Config::default();
    // An hour of each, in a shorter time: the set is too old before it can be had again.
    config.jwt.refresh = crate::config::Span::seconds(4);
    config.jwt.keep = crate::config::Span::seconds(5);
    let judge = Judge::new(&config).expect("a judge");
    let rule = format!("{{jwtRules: [{{issuer: '{ISSUER}', jwksUri: '{base}/keys'}}]}}");
    let from = RemoteKeys::Url {
        url: format!("{base}/keys"),
        timeout: Duration::from_secs(5),
    };
    judge.keys.want(HashSet::from([from.clone()]));
    let world = World {
        judge,
        selected: select(
            &(object("RequestAuthentication", &rule) + &object("ProtectedResource", "{}")),
        ),
        issuer: key(),
    };
    let sign = |key: &SigningKey, sub: usize| {
        let claims = claims(json!({"sub": sub.to_string()}));
        Call::new().bearer(&key.sign("at+jwt", &claims).expect("signs"))
    };
    world.expect("at first", &sign(&old, 0), 200, &[]).await;
    *keys.set.lock().expect("no panic") = None;
    let began = tokio::time::Instant::now();
    // Some attempts have failed, and none is under way.
    let waits = || {
        let counts = world.judge.keys.counts();
        let idle = keys.asked.load(SeqCst) as u64 == counts.attempts;
        idle && counts.failures >= 2 && world.judge.keys.get(&from).is_none()
    };
    while !waits() {
        assert!(began.elapsed() < Duration::from_secs(30));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    *keys.set.lock().expect("no panic") = set(&new);
    let (asked, refetches) = (keys.asked.load(SeqCst), world.judge.keys.counts().refetches);
    let calls: Vec<(Call, u16)> = (0..500)
        .map(|index| match index % 5 {
            0 => (sign(&old, index), 401),
            1 => (sign(&unknown, index), 401),
            _ => (sign(&new, index), 200),
        })
        .collect();
    let told = calls.iter().map(|(call, _)| world.told(call));
    let told = futures_util::future::join_all(told).await;
    assert_eq!(keys.asked.load(SeqCst) - asked, 1, "one fetch");
    // None where the next attempt was due just then.
    assert!(world.judge.keys.counts().refetches - refetches <= 1);
    for ((_, expected), (status, challenge)) in calls.iter().zip(told) {
        assert_eq!(status, *expected, "{challenge}");
    }
}
