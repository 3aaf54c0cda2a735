use std::hash::BuildHasher as _;

use http::{HeaderName, HeaderValue};

use super::*;
use crate::request::{Edits, Request};

const OTHER: &str = "https://other.example";

/// A request to be borrowed from.
struct Sent {
    method: &'static str,
    path: String,
    headers: Vec<(HeaderName, HeaderValue)>,
}

fn get(path: &str, headers: &[(&str, &str)]) -> Sent {
    Sent {
        method: "GET",
        path: path.to_owned(),
        headers: headers
            .iter()
            .map(|(name, value)| {
                let name = HeaderName::from_bytes(name.as_bytes()).expect("a name");
                let value = HeaderValue::from_bytes(value.as_bytes()).expect("a value");
                (name, value)
            })
            .collect(),
    }
}

fn bearer(token: &str) -> Sent {
    get("/a", &[("authorization", &format!("Bearer {token}"))])
}

impl Sent {
    fn request(&self) -> Request<'_> {
        Request {
            method: self.method,
            path: &self.path,
            host: "shop.example",
            headers: self.headers.iter().map(|(n, v)| (n, v)).collect(),
        }
    }

    fn judge(&self, rules: &[Rule]) -> Outcome {
        authenticate(rules, &self.request(), now(), |_| None, None)
    }

    fn verified(&self, rules: &[Rule]) -> Verified {
        match self.judge(rules) {
            Outcome::Verified(verified) => verified,
            other => panic!("{}: {other:?}", self.path),
        }
    }

    fn refused(&self, rules: &[Rule]) -> Refusal {
        match self.judge(rules) {
            Outcome::Refused(refusal) => refusal,
            other => panic!("{}: {other:?}", self.path),
        }
    }

    fn anonymous(&self, rules: &[Rule]) -> Edits {
        match self.judge(rules) {
            Outcome::Anonymous(edits) => edits,
            other => panic!("{}: {other:?}", self.path),
        }
    }
}

fn rule(issuer: &str) -> Rule {
    Rule {
        wanted: Wanted::new(Some(issuer.to_owned()), Vec::new(), Vec::new()),
        locations: Locations::default(),
        forward_original: false,
        payload_to_header: None,
        claims_to_headers: Vec::new(),
        keys: KeySource::Inline(KEYS.clone()),
    }
}

fn strict() -> Rule {
    Rule {
        wanted: Wanted::new(
            Some(ISSUER.to_owned()),
            vec!["admin".to_owned()],
            Vec::new(),
        ),
        ..rule(ISSUER)
    }
}

fn nowhere() -> Locations {
    Locations {
        headers: Vec::new(),
        params: Vec::new(),
        cookies: Vec::new(),
    }
}

fn header_location(name: &'static str, prefix: &str) -> Locations {
    Locations {
        headers: vec![(HeaderName::from_static(name), prefix.to_owned())],
        ..nowhere()
    }
}

fn of(issuer: &str) -> String {
    P256.sign("ES256", &payload_with(json!({ "iss": issuer })))
}

fn names(edits: &Edits) -> Vec<&str> {
    edits.remove.iter().map(HeaderName::as_str).collect()
}

fn forged() -> String {
    let token = good();
    let (signed, _) = token.rsplit_once('.').expect("three parts");
    format!("{signed}.{}", b64([1; 64]))
}

#[test]
fn default_locations() {
    let rules = [rule(ISSUER)];
    let good = good();
    let verified = bearer(&good).verified(&rules);
    assert_eq!(names(&verified.edits), ["authorization"]);
    assert_eq!(verified.edits.path, None);
    assert_eq!(verified.claims.principal(), Some((ISSUER, "alice")));
    assert_eq!(verified.expires, Some(at(NOW + 600)));

    let verified = get(&format!("/a?x=1&access_token={good}&y=%41+b&&z"), &[]).verified(&rules);
    assert_eq!(verified.edits.path.as_deref(), Some("/a?x=1&y=%41+b&&z"));
    let verified = get(&format!("/a?access_token={good}"), &[]).verified(&rules);
    assert_eq!(verified.edits.path.as_deref(), Some("/a"));
    // The same name and value in other spelling.
    let encoded = good.replace('.', "%2E");
    let verified = get(&format!("/a?access%5Ftoken={encoded}&x"), &[]).verified(&rules);
    assert_eq!(verified.edits.path.as_deref(), Some("/a?x"));
}

#[test]
fn what_is_no_token_is_no_error() {
    let rules = [rule(ISSUER)];
    let good = good();
    for value in [
        "Basic YTpi",
        "Bearer",
        "Bearer ",
        "bearer x",
        "BEARER x",
        &good,
        &format!("Token Bearer {good}"),
        &format!("DPoP {good}"),
        "",
    ] {
        let edits = get("/a", &[("authorization", value)]).anonymous(&rules);
        assert_eq!(edits, Edits::default(), "{value}");
    }
    for path in [
        "/a",
        "/a?",
        "/a?x=1",
        "/a?ACCESS_TOKEN=x",
        "/access_token=x",
        "*",
    ] {
        assert_eq!(get(path, &[]).anonymous(&rules), Edits::default(), "{path}");
    }
    for path in ["/a?access_token", "/a?access_token="] {
        assert_eq!(get(path, &[]).anonymous(&rules), Edits::default(), "{path}");
    }
    assert_eq!(bearer("x").anonymous(&[]), Edits::default());
}

#[test]
fn tokens_that_are_bad_in_place() {
    let rules = [rule(ISSUER)];
    let good = good();
    let header = format!("Bearer {good}");
    let table = [
        ("no token", bearer("x")),
        ("comma", bearer(&format!("{good},{good}"))),
        ("behind it", bearer(&format!("{good} x"))),
        (
            "twice",
            get(
                "/a",
                &[("authorization", &header), ("authorization", &header)],
            ),
        ),
        (
            "behind Basic",
            get(
                "/a",
                &[("authorization", "Basic x"), ("authorization", &header)],
            ),
        ),
        (
            "before Basic",
            get(
                "/a",
                &[("authorization", &header), ("authorization", "Basic x")],
            ),
        ),
        (
            "parameter twice",
            get(&format!("/a?access_token={good}&access_token=x"), &[]),
        ),
        (
            "bad header, good parameter",
            get(
                &format!("/a?access_token={good}"),
                &[("authorization", "Bearer x")],
            ),
        ),
        (
            "good header, bad parameter",
            get("/a?access_token=x", &[("authorization", &header)]),
        ),
        ("not UTF-8", {
            let mut sent = bearer("x");
            sent.headers[0].1 = HeaderValue::from_bytes(b"Bearer \xff").expect("a value");
            sent
        }),
    ];
    for (kind, sent) in table {
        assert_eq!(sent.refused(&rules).error, TokenError::Form, "{kind}");
    }
}

#[test]
fn tokens_are_counted() {
    let rules = [rule(ISSUER)];
    let parameter = format!("&access_token={}", good());
    get(&format!("/a?{}", parameter.repeat(8)), &[]).verified(&rules);
    let refusal = get(&format!("/a?{}", parameter.repeat(9)), &[]).refused(&rules);
    assert_eq!(refusal.error, TokenError::TooMany);
}

#[test]
fn own_locations_replace_the_defaults() {
    let good = good();
    let mut own = rule(ISSUER);
    own.locations = Locations {
        params: vec!["jwt".to_owned()],
        cookies: vec!["session".to_owned()],
        ..header_location("x-token", "")
    };
    let rules = [own];
    bearer(&good).anonymous(&rules);
    get(&format!("/a?access_token={good}"), &[]).anonymous(&rules);

    let verified = get("/a", &[("X-Token", &good)]).verified(&rules);
    assert_eq!(names(&verified.edits), ["x-token"]);
    let verified = get(&format!("/a?jwt={good}"), &[]).verified(&rules);
    assert_eq!(verified.edits.path.as_deref(), Some("/a"));
    for cookie in [
        format!("session={good}"),
        format!("a=b; session={good}; c=d"),
        format!("a=b;session=\"{good}\""),
    ] {
        let verified = get("/a", &[("cookie", &cookie)]).verified(&rules);
        assert_eq!(verified.edits, Edits::default(), "cookies stay");
    }
    for (kind, cookie) in [
        ("other name", format!("Session={good}")),
        ("longer name", format!("xsession={good}")),
        ("in a value", format!("a=session={good}")),
        ("no value", "session".to_owned()),
    ] {
        let edits = get("/a", &[("cookie", &cookie)]).anonymous(&rules);
        assert_eq!(edits, Edits::default(), "{kind}");
    }
    let split = format!("session={good}");
    let sent = get("/a", &[("cookie", &split), ("cookie", "session=x")]);
    assert_eq!(sent.refused(&rules).error, TokenError::Form);
    get("/a", &[("x-token", &format!("Bearer {good}"))]).refused(&rules);
}

#[test]
fn prefixes_are_exact_and_first() {
    let good = good();
    let mut own = rule(ISSUER);
    own.locations = header_location("x-token", "Jwt:");
    let rules = [own];
    get("/a", &[("x-token", &format!("Jwt:{good}"))]).verified(&rules);
    get("/a", &[("x-token", &format!("Jwt: {good}"))]).verified(&rules);
    for value in [format!("jwt:{good}"), format!("a Jwt:{good}"), good] {
        get("/a", &[("x-token", &value)]).anonymous(&rules);
    }
}

#[test]
fn several_rules() {
    let strict = strict();
    let rules = [strict, rule(ISSUER), rule(OTHER)];
    assert_eq!(bearer(&good()).verified(&rules).rule, 1);
    assert_eq!(bearer(&of(OTHER)).verified(&rules).rule, 2);
    let unknown = bearer(&of("https://evil.example")).refused(&rules);
    assert_eq!((unknown.error, unknown.rule), (TokenError::Issuer, 0));
    // The audience is right for no rule but the second, which sees the bad signature.
    let refusal = bearer(&forged()).refused(&rules);
    assert_eq!((refusal.error, refusal.rule), (TokenError::Signature, 1));
    // "Unknown issuer" says least.
    let refusal = bearer(&good()).refused(&[rule(OTHER), rules[0].clone(), rule(OTHER)]);
    assert_eq!((refusal.error, refusal.rule), (TokenError::Audience, 1));

    let mut any = rule("");
    any.wanted = Wanted::new(None, Vec::new(), Vec::new());
    assert_eq!(bearer(&of("https://new.example")).verified(&[any]).rule, 0);
    let shared: [Arc<Rule>; 1] = [Arc::new(rule(ISSUER))];
    let sent = bearer(&good());
    let outcome = authenticate(&shared, &sent.request(), now(), |_| None, None);
    assert!(matches!(outcome, Outcome::Verified(_)));
}

#[test]
fn a_second_token_is_never_ignored() {
    let mut other = rule(OTHER);
    other.locations = header_location("x-token", "");
    let rules = [rule(ISSUER), other];
    let both = |first: &str, second: &str| {
        get(
            "/a",
            &[
                ("authorization", &format!("Bearer {first}")),
                ("x-token", second),
            ],
        )
    };
    let verified = both(&good(), &of(OTHER)).verified(&rules);
    assert_eq!(verified.rule, 0);
    assert_eq!(verified.claims.issuer(), Some(ISSUER));
    assert_eq!(names(&verified.edits), ["authorization", "x-token"]);

    let refusal = both(&good(), "x").refused(&rules);
    assert_eq!((refusal.error, refusal.rule), (TokenError::Form, 1));
    let refusal = both(&forged(), &of(OTHER)).refused(&rules);
    assert_eq!((refusal.error, refusal.rule), (TokenError::Signature, 0));
    let refusal = both(&good(), &good()).refused(&rules);
    assert_eq!((refusal.error, refusal.rule), (TokenError::Issuer, 1));

    // Two tokens of different issuers where both rules look: neither verifies both.
    let sent = get(
        &format!("/a?access_token={}", of(OTHER)),
        &[("authorization", &format!("Bearer {}", good()))],
    );
    let refusal = sent.refused(&[rule(ISSUER), rule(OTHER)]);
    assert_eq!(refusal.error, TokenError::Issuer);

    // Two good ones in one rule: the first counts, the shorter life holds.
    let short = P256.sign(
        "ES256",
        &payload_with(json!({"sub": "bob", "exp": NOW + 5})),
    );
    let sent = get(
        &format!("/a?access_token={short}"),
        &[("authorization", &format!("Bearer {}", good()))],
    );
    let verified = sent.verified(&[rule(ISSUER)]);
    assert_eq!(verified.claims.subject(), Some("alice"));
    assert_eq!(verified.expires, Some(at(NOW + 5)));
}

#[test]
fn rules_that_share_a_header_share_its_token() {
    let mut whole = rule(OTHER);
    whole.locations = header_location("authorization", "");
    let verified = bearer(&good()).verified(&[whole.clone(), rule(ISSUER)]);
    assert_eq!(verified.rule, 1);
    let rules = [whole, rule(ISSUER)];
    get("/a", &[("authorization", "Basic x")]).refused(&rules);
}

#[test]
fn forwarding() {
    let mut keep = rule(ISSUER);
    keep.forward_original = true;
    let good = good();
    let sent = bearer(&good);
    assert_eq!(sent.verified(&[keep.clone()]).edits, Edits::default());
    let parameter = get(&format!("/a?access_token={good}"), &[]);
    assert_eq!(parameter.verified(&[keep.clone()]).edits.path, None);
    // The rule that won decides, not another that could have.
    let rules = [keep, rule(ISSUER)];
    assert_eq!(sent.verified(&rules).edits, Edits::default());
    let rules = [rules[1].clone(), rules[0].clone()];
    assert_eq!(names(&sent.verified(&rules).edits), ["authorization"]);
}

fn with_outputs() -> Rule {
    let path = |path: &str| path.split('.').map(str::to_owned).collect::<Vec<_>>();
    let to = |name, claim: &str| (HeaderName::from_static(name), path(claim));
    Rule {
        payload_to_header: Some(HeaderName::from_static("x-payload")),
        claims_to_headers: vec![
            to("x-user", "sub"),
            to("x_team", "org.team"),
            to("x-level", "level"),
            to("x-whole", "whole"),
            to("x-admin", "admin"),
            to("x-groups", "groups"),
            to("x-absent", "absent"),
            to("x-evil", "evil"),
            to("x-spaced", "spaced"),
            to("content-length", "level"),
        ],
        ..rule(ISSUER)
    }
}

#[test]
fn outputs() {
    let payload = payload_with(json!({
        "org": {"team": "blue"}, "level": 5, "whole": 1e3, "admin": false,
        "groups": ["a"], "evil": "a\r\nx-admin: true", "spaced": " root",
    }));
    let token = P256.sign("ES256", &payload);
    let verified = bearer(&token).verified(&[with_outputs()]);
    let set: Vec<(&str, &str)> = verified
        .edits
        .set
        .iter()
        .map(|(name, value)| (name.as_str(), value.to_str().expect("ASCII")))
        .collect();
    assert_eq!(
        set,
        [
            ("x-payload", token.split('.').nth(1).expect("a payload")),
            ("x-user", "alice"),
            ("x_team", "blue"),
            ("x-level", "5"),
            ("x-whole", "1000"),
            ("x-admin", "false"),
        ]
    );
    let shown = format!("{verified:?}");
    assert!(!shown.contains("alice"), "{shown}");
}

#[test]
fn spoofed_outputs_are_taken_out() {
    let spoofed = [
        ("x-payload", "e30"),
        ("x-user", "root"),
        ("X_User", "root"),
        ("x-team", "red"),
        ("x_level", "9"),
        ("x-evil", "1"),
        ("x-users", "kept"),
        ("content-length", "0"),
    ];
    let gone = [
        "x-payload",
        "x-user",
        "X_User",
        "x-team",
        "x_level",
        "x-evil",
    ];
    let rules = [rule(OTHER), with_outputs()];
    let dropped = |edits: &Edits| -> Vec<&str> {
        let sent = spoofed.iter().map(|(name, _)| *name);
        sent.filter(|name| !edits.keeps(&HeaderName::try_from(*name).expect("a name")))
            .collect()
    };
    let anonymous = get("/a", &spoofed).anonymous(&rules);
    assert_eq!(dropped(&anonymous), gone);
    // Also what has not come yet: trailers may bring it.
    assert!(!anonymous.keeps(&HeaderName::from_static("x-absent")));

    // A token of another rule does not keep them either.
    let credentials = format!("Bearer {}", of(OTHER));
    let mut headers = spoofed.to_vec();
    headers.push(("authorization", &credentials));
    let verified = get("/a", &headers).verified(&rules);
    assert_eq!(dropped(&verified.edits), gone);
    assert!(verified.edits.set.is_empty());
}

#[test]
fn preflight() {
    let credentials = format!("Bearer {}", forged());
    let headers = [
        ("origin", "https://web.example"),
        ("access-control-request-method", "PUT"),
        ("authorization", credentials.as_str()),
        ("x-user", "root"),
    ];
    let rules = [with_outputs()];
    let mut sent = get("/a", &headers);
    sent.refused(&rules);
    sent.method = "OPTIONS";
    let kept = |name| sent.anonymous(&rules).keeps(&HeaderName::from_static(name));
    assert!(!kept("x-user") && kept("authorization"));
    for missing in [0, 1] {
        let mut headers = headers.to_vec();
        headers[missing].1 = "";
        let mut sent = get("/a", &headers);
        sent.method = "OPTIONS";
        sent.refused(&rules);
        headers.remove(missing);
        let mut sent = get("/a", &headers);
        sent.method = "OPTIONS";
        sent.refused(&rules);
    }
    sent.method = "options";
    sent.refused(&rules);
}

#[test]
fn refusals_are_told() {
    let sent = get("/a/\"b\\?access_token=x", &[]);
    let reply = sent.refused(&[rule(ISSUER)]).reply(&sent.request());
    assert_eq!(reply.status, 401);
    assert_eq!(reply.body, TokenError::Form.to_string());
    let challenge = &reply.headers[0];
    assert_eq!(challenge.0, "www-authenticate");
    assert_eq!(
        challenge.1,
        r#"Bearer realm="http://shop.example/a/b", error="invalid_token""#
    );

    let strict = strict();
    let sent = get(
        &format!("/{}", "é\u{7f}a".repeat(500)),
        &[("authorization", &format!("Bearer {}", good()))],
    );
    let reply = sent.refused(&[strict]).reply(&sent.request());
    assert_eq!(reply.status, 403);
    assert_eq!(reply.body, "Audiences in Jwt are not allowed");
    let challenge = reply.headers[0].1.to_str().expect("ASCII");
    let realm = challenge.split('"').nth(1).expect("a realm");
    assert_eq!(realm.len(), 256);
    assert!(realm.starts_with("http://shop.example/aaa"));
}

#[test]
fn remote_keys() {
    let remote = RemoteKeys::Discovery {
        issuer: ISSUER.to_owned(),
        timeout: Duration::from_secs(5),
    };
    let mut remote_rule = rule(ISSUER);
    remote_rule.keys = KeySource::Remote(remote.clone());
    let rules = [remote_rule];
    let token = good();
    let sent = bearer(&token);
    let judge = |known: Option<Arc<KeySet>>| {
        authenticate(&rules, &sent.request(), now(), |_| known.clone(), None)
    };
    let refused = |outcome| match outcome {
        Outcome::Refused(refusal) => refusal,
        other => panic!("{other:?}"),
    };
    let refusal = refused(judge(None));
    assert_eq!(refusal.error, TokenError::KeysUnavailable);
    assert_eq!(refusal.refetch, std::slice::from_ref(&remote));
    let refusal = refused(judge(Some(key_set(&[RSA.jwk()]))));
    assert_eq!(refusal.error, TokenError::UnknownKey);
    assert_eq!(refusal.refetch, [remote]);
    assert!(matches!(judge(Some(KEYS.clone())), Outcome::Verified(_)));

    // What would be refused with any keys is not worth a fetch.
    for token in [
        of(OTHER),
        "x".to_owned(),
        P256.sign("ES256", &payload_with(json!({"exp": 1}))),
    ] {
        assert!(bearer(&token).refused(&rules).refetch.is_empty());
    }
    let forged = bearer(&forged());
    let outcome = authenticate(
        &rules,
        &forged.request(),
        now(),
        |_| Some(KEYS.clone()),
        None,
    );
    assert!(refused(outcome).refetch.is_empty());
    // Without a token nothing is asked.
    get("/a", &[]).anonymous(&rules);
}

#[test]
fn the_cache_counts_for_what_verified_it() {
    let cache = VerifiedTokens::default();
    let token = good();
    let sent = bearer(&token);
    let judge = |rule: &Rule, now| match authenticate(
        &[rule],
        &sent.request(),
        now,
        |_| None,
        Some(&cache),
    ) {
        Outcome::Verified(verified) => Ok(verified.claims),
        Outcome::Refused(refusal) => Err(refusal.error),
        Outcome::Anonymous(_) => panic!("there is a token"),
    };
    let first = judge(&rule(ISSUER), now()).expect("good");
    let second = judge(&rule(ISSUER), now()).expect("good");
    assert!(Arc::ptr_eq(&first, &second));
    assert_eq!(cache.len(), 1);

    // Time goes on.
    assert!(judge(&rule(ISSUER), at(NOW + 660)).is_ok());
    assert_eq!(
        judge(&rule(ISSUER), at(NOW + 661)),
        Err(TokenError::Expired)
    );
    // Other demands.
    assert_eq!(judge(&rule(OTHER), now()), Err(TokenError::Issuer));
    let strict = strict();
    assert_eq!(judge(&strict, now()), Err(TokenError::Audience));
    // Another key set: the key was withdrawn.
    let mut rotated = rule(ISSUER);
    rotated.keys = KeySource::Inline(key_set(&[P384.jwk()]));
    assert_eq!(judge(&rotated, now()), Err(TokenError::UnknownKey));
    let mut gone = rule(ISSUER);
    gone.keys = KeySource::Remote(RemoteKeys::Url {
        url: "https://issuer.example/keys".to_owned(),
        timeout: Duration::from_secs(5),
    });
    assert_eq!(judge(&gone, now()), Err(TokenError::KeysUnavailable));
    assert_eq!(cache.len(), 1, "only what is good is kept");
    let mut listed = rule(ISSUER);
    listed.wanted = Wanted::new(None, Vec::new(), vec!["groups".to_owned()]);
    assert!(judge(&listed, now()).is_ok());
    assert_eq!(cache.len(), 2, "its claims are read in another way");

    // Another signature over the same words.
    let forged = bearer(&forged());
    let outcome = authenticate(
        &[rule(ISSUER)],
        &forged.request(),
        now(),
        |_| None,
        Some(&cache),
    );
    assert!(matches!(outcome, Outcome::Refused(_)));
}

/// By one hash for all, one that nobody asks for would stay for the sake of another.
#[test]
fn what_verified_a_token_is_part_of_its_hash() {
    let state = std::hash::RandomState::new();
    let hash = |wanted: &Wanted, scp, keys: &KeySet| {
        state.hash_one(super::cache::Fingerprint::new("token", wanted, scp, keys))
    };
    let (one, other) = (rule(ISSUER).wanted, strict().wanted);
    let all = [
        hash(&one, false, &KEYS),
        hash(&other, false, &KEYS),
        hash(&one, true, &KEYS),
        hash(&one, false, &key_set(&[P384.jwk()])),
    ];
    for (index, hash) in all.iter().enumerate() {
        assert!(!all[..index].contains(hash), "{index}");
    }
}

#[test]
fn the_cache_is_bounded() {
    let cache = VerifiedTokens::new(20_000);
    for index in 0..100 {
        let token = P256.sign("ES256", &payload_with(json!({ "jti": index.to_string() })));
        let sent = bearer(&token);
        authenticate(
            &[rule(ISSUER)],
            &sent.request(),
            now(),
            |_| None,
            Some(&cache),
        );
    }
    assert!((1..=30).contains(&cache.len()), "{}", cache.len());
}
