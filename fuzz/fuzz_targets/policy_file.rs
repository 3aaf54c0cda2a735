//! Policy files: what is wrong with one is said, in a line that it has; what is taken
//! can be asked about any connection and request.

#![no_main]

use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::LazyLock,
    time::UNIX_EPOCH,
};

use http::{HeaderName, HeaderValue};
use libfuzzer_sys::fuzz_target;
use postern::{
    config::Normalization,
    identity::{SpiffeId, TrustDomain},
    jwt::{Claims, Expected, KeySet, Token},
    objects::{LoadError, load_text},
    policy::{
        Caller, Facts, Layer, Mesh, PolicyObject, PolicySet, Reading, RequestFacts, Selected,
        Subject, Verdict, normalize,
    },
    request::Request,
};

fuzz_target!(|text: &str| {
    let objects = match load_text::<PolicyObject>(Path::new("policy.yaml"), text) {
        Ok(objects) => objects,
        Err(error) => return told(&error, text),
    };
    let count = objects.len();
    let mesh = Mesh {
        root_namespace: "istio-system",
        trust_domain: &LOCAL,
        aliases: std::slice::from_ref(&*ALIAS),
        secrets: std::path::Path::new("/secrets"),
        requests: Reading {
            normalization: Normalization::DecodeAndMergeSlashes,
            trusted_proxies: 1,
        },
    };
    match PolicySet::compile(objects, &mesh) {
        Ok(set) => {
            assert_eq!(set.len(), count, "a policy was skipped");
            ask(&set);
        }
        Err(errors) => errors.iter().for_each(|error| drop(error.to_string())),
    }
});

static LOCAL: LazyLock<TrustDomain> = LazyLock::new(|| domain("prod.example"));
static ALIAS: LazyLock<TrustDomain> = LazyLock::new(|| domain("old.example"));

/// Of a token that was really signed.
static CLAIMS: LazyLock<Claims> = LazyLock::new(|| {
    let keys = KeySet::parse(include_bytes!("../corpus/key_set/issuer.json"));
    let token = Token::parse(include_str!("../corpus/token/es384.jwt"));
    let anybody = Expected {
        issuer: None,
        audiences: &[],
        space_delimited: &[],
    };
    let claims = token.and_then(|t| t.verify(anybody, keys.as_ref().ok(), UNIX_EPOCH));
    claims.expect("it is signed")
});

static HEADERS: LazyLock<Vec<(HeaderName, HeaderValue)>> = LazyLock::new(|| {
    [
        ("host", "Shop.example:8080"),
        ("x-forwarded-for", "192.0.2.7, 10.0.0.9"),
        ("x-token", "a"),
        ("x-token", "b"),
    ]
    .map(|(name, value)| {
        (
            HeaderName::from_static(name),
            HeaderValue::from_static(value),
        )
    })
    .into()
});

fn domain(name: &str) -> TrustDomain {
    TrustDomain::try_from(name.to_owned()).expect("a trust domain")
}

fn told(error: &LoadError, text: &str) {
    drop(error.to_string());
    if let LoadError::Parse { line, .. } = error {
        // YAML ends lines with a lone CR, too.
        let lines = text.split(['\n', '\r']).count() as u64;
        assert!((1..=lines + 1).contains(line), "{error}: there are {lines}");
    }
}

/// Asks about a pod `app: web` of the namespace `shop`, behind the service `front`.
fn ask(set: &PolicySet) {
    let selected = set.select(&Subject {
        namespace: "shop".into(),
        labels: [("app".to_owned(), "web".to_owned())].into(),
        services: vec!["front".into()],
    });
    let destination: SocketAddr = "10.9.9.9:80".parse().expect("an address");
    let source: IpAddr = "10.1.2.3".parse().expect("an address");
    let cart: SpiffeId = "spiffe://prod.example/ns/shop/sa/cart"
        .parse()
        .expect("a SPIFFE ID");
    let path = normalize("/a/%62/../c?x=1", selected.reading.normalization).expect("a path");
    let request = Request {
        method: "GET",
        path: &path.target(),
        host: "Shop.example:8080",
        headers: HEADERS.iter().map(|(n, v)| (n, v)).collect(),
    };
    for identity in [None, Some(cart)] {
        let facts = Facts::new(identity, source, destination);
        drop(selected.opaque(&facts));
        let _ = selected.needs_request(&facts);
        drop(selected.presenter(&facts, &CLAIMS));
        judge(&selected, &facts, Layer::Opaque);
        for claims in [None, Some(&*CLAIMS)] {
            let about = RequestFacts {
                request: &request,
                path: &path.path,
                host: "shop.example:8080",
                remote_ip: source,
                claims,
            };
            judge(&selected, &facts, Layer::Request(&about));
        }
    }
    for executable in [None, Some("/usr/bin/curl")] {
        drop(selected.connect(&Caller {
            executable,
            uid: 1000,
            destination,
        }));
    }
}

/// The verdict, and whether what explains it agrees.
fn judge(selected: &Selected, facts: &Facts, layer: Layer<'_>) {
    drop(selected.providers(facts, layer));
    drop(selected.told(facts, layer));
    let by = match selected.decide(facts, layer) {
        Verdict::Allow(by) => by,
        Verdict::Deny(denial) => Some(denial.policy().clone()),
    };
    for authorization in selected.authorizations() {
        for (index, rule) in authorization.rules.iter().enumerate() {
            let unmatched = authorization.outcome(rule, facts, layer);
            let decided = by.as_ref() == Some(&authorization.policy.at(index));
            assert!(!decided || unmatched.is_none(), "{unmatched:?}");
        }
    }
}
