//! What a decision costs, by `cargo xtask bench policy`: it must not grow with
//! policies that do not select the workload. Medians of many rounds, one thread.

use std::{
    fmt::Write as _,
    hint::black_box,
    path::Path,
    time::{Duration, Instant, SystemTime},
};

use aws_lc_rs::{
    encoding::AsDer as _,
    rand::SystemRandom,
    rsa::KeySize,
    signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _, RSA_PKCS1_SHA256, RsaKeyPair,
    },
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use http::{HeaderName, HeaderValue};
use postern::{
    identity::{SpiffeId, TrustDomain},
    jwt::{self, Outcome, VerifiedTokens},
    objects::load_text,
    policy::{
        Facts, Layer, Mesh, PolicyObject, PolicySet, Reading, RequestFacts, Selected, Subject,
    },
    request::Request,
};

fn main() {
    println!("{:<58} {:>12}", "policy", "median");
    for count in [10, 1_000, 10_000] {
        let set = load(&mostly_others(count));
        let what = format!("{count} policies, 4 select: find them");
        report(&what, || black_box(set.select(&subject())));
        let selected = set.select(&subject());
        report(&format!("{count} policies, 4 select: decide"), || {
            decide(&selected)
        });
    }
    let rules = load(&one_of_rules(1_000));
    let selected = rules.select(&subject());
    report("1 policy of 1,000 rules, the last matches: decide", || {
        decide(&selected)
    });
    tokens();
}

/// The median of rounds, each of enough calls to be measured.
fn report<T>(what: &str, call: impl Fn() -> T) {
    const ROUNDS: usize = 31;
    let mut calls = 1_u32;
    let time = |calls: u32| {
        let began = Instant::now();
        for _ in 0..calls {
            black_box(call());
        }
        began.elapsed()
    };
    while time(calls) < Duration::from_millis(5) {
        calls *= 2;
    }
    let mut rounds: Vec<Duration> = (0..ROUNDS).map(|_| time(calls) / calls).collect();
    rounds.sort();
    println!("{what:<58} {:>12.3?}", rounds[ROUNDS / 2]);
}

fn load(text: &str) -> PolicySet {
    let objects = load_text::<PolicyObject>(Path::new("bench.yaml"), text).expect("reads");
    let mesh = Mesh {
        root_namespace: "istio-system",
        trust_domain: &TrustDomain::default(),
        aliases: &[],
        secrets: std::path::Path::new("/"),
        requests: Reading::default(),
    };
    PolicySet::compile(objects, &mesh).expect("compiles")
}

fn subject() -> Subject {
    Subject {
        namespace: "shop".into(),
        labels: [("app".to_owned(), "web".to_owned())].into(),
        services: Vec::new(),
    }
}

fn policy(name: usize, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {{name: p{name}, namespace: shop}}\nspec: {spec}\n"
    )
}

const RULE: &str = "{from: [{source: {principals: ['cluster.local/ns/*']}}], \
     to: [{operation: {methods: [GET], paths: ['/api/*']}}], \
     when: [{key: 'request.headers[x-env]', values: [prod]}]}";

fn mostly_others(count: usize) -> String {
    let mut text = String::new();
    for name in 0..count {
        let app = if name % (count / 4).max(1) == 0 && name < count / 4 * 4 {
            "web".to_owned()
        } else {
            format!("other{name}")
        };
        text += &policy(
            name,
            &format!("{{selector: {{matchLabels: {{app: {app}}}}}, rules: [{RULE}]}}"),
        );
    }
    text
}

fn one_of_rules(count: usize) -> String {
    let mut rules = String::new();
    for index in 0..count {
        let _ = write!(
            rules,
            "{{to: [{{operation: {{paths: ['/none/{index}/*']}}}}]}}, "
        );
    }
    policy(0, &format!("{{rules: [{rules}{RULE}]}}"))
}

fn with_request<T>(authorization: Option<&str>, run: impl FnOnce(&Request<'_>) -> T) -> T {
    let env = (
        HeaderName::from_static("x-env"),
        HeaderValue::from_static("prod"),
    );
    let mut headers = vec![(&env.0, &env.1)];
    let token = authorization.map(|t| {
        let value = HeaderValue::try_from(format!("Bearer {t}")).expect("a header value");
        (http::header::AUTHORIZATION, value)
    });
    headers.extend(token.as_ref().map(|(name, value)| (name, value)));
    run(&Request {
        method: "GET",
        path: "/api/v1/items?q=1",
        host: "shop.example",
        headers,
    })
}

fn facts() -> Facts {
    let peer: SpiffeId = "spiffe://cluster.local/ns/shop/sa/cart"
        .parse()
        .expect("an ID");
    let destination = "10.0.0.2:80".parse().expect("an address");
    Facts::new(
        Some(peer),
        "10.0.0.1".parse().expect("an address"),
        destination,
    )
}

fn decide(selected: &Selected) {
    with_request(None, |request| {
        let facts = facts();
        let about = RequestFacts {
            request,
            path: "/api/v1/items",
            host: request.host,
            remote_ip: facts.source_ip,
            claims: None,
        };
        black_box(selected.decide(&facts, Layer::Request(&about)));
    });
}

/// Verification, cold and remembered.
fn tokens() {
    let random = SystemRandom::new();
    let rsa = RsaKeyPair::generate(KeySize::Rsa2048).expect("a key");
    let ec = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).expect("a key");
    let b64 = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    let (n, e) = (rsa.public_key().modulus(), rsa.public_key().exponent());
    let point = ec.public_key().as_ref();
    let keys = format!(
        r#"{{"keys":[{{"kty":"RSA","kid":"r","n":"{}","e":"{}"}},{{"kty":"EC","crv":"P-256","kid":"e","x":"{}","y":"{}"}}]}}"#,
        b64(n.big_endian_without_leading_zero()),
        b64(e.big_endian_without_leading_zero()),
        b64(&point[1..33]),
        b64(&point[33..]),
    );
    let _public = rsa.public_key().as_der();
    let text = policy(0, &format!("{{jwtRules: [{{issuer: i, jwks: '{keys}'}}]}}"))
        .replace("AuthorizationPolicy", "RequestAuthentication");
    let selected = load(&text).select(&subject());
    let sign = |algorithm: &str, kid: &str| {
        let header = format!(r#"{{"alg":"{algorithm}","kid":"{kid}"}}"#);
        let payload = r#"{"iss":"i","sub":"s","exp":4102444800}"#;
        let input = format!("{}.{}", b64(header.as_bytes()), b64(payload.as_bytes()));
        let signature = if kid == "r" {
            let mut signature = vec![0; rsa.public_modulus_len()];
            rsa.sign(&RSA_PKCS1_SHA256, &random, input.as_bytes(), &mut signature)
                .expect("signs");
            signature
        } else {
            let signed = ec.sign(&random, input.as_bytes()).expect("signs");
            signed.as_ref().to_vec()
        };
        format!("{input}.{}", b64(&signature))
    };
    for (algorithm, kid) in [("RS256", "r"), ("ES256", "e")] {
        let token = sign(algorithm, kid);
        let verify = |cache: Option<&VerifiedTokens>| {
            with_request(Some(&token), |request| {
                let now = SystemTime::now();
                let outcome = jwt::authenticate(selected.tokens(), request, now, |_| None, cache);
                assert!(matches!(outcome, Outcome::Verified(_)), "{outcome:?}");
            });
        };
        report(&format!("token, {algorithm}: verify cold"), || verify(None));
        let cache = VerifiedTokens::default();
        report(&format!("token, {algorithm}: remembered"), || {
            verify(Some(&cache))
        });
    }
}
