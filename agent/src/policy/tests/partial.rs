//! What is decided without all facts is what all facts decide.

use http::{HeaderName, HeaderValue};
use serde_json::json;

use super::{CART, facts, load, policy, select};
use crate::{
    jwt::Claims,
    policy::{Facts, Layer, Partial, RequestFacts, Selected, Token, Verdict},
    request::Request,
};

/// Each with a value that some call has, and its not-form.
const CONDITIONS: [&str; 12] = [
    "{key: 'request.headers[x-env]', values: [prod]}",
    "{key: 'request.headers[x-env]', notValues: [prod]}",
    "{key: 'request.headers[:method]', values: [GET]}",
    "{key: 'request.headers[:method]', notValues: [GET]}",
    "{key: 'request.auth.claims[scope]', values: [read]}",
    "{key: 'request.auth.claims[scope]', notValues: [read]}",
    "{key: 'request.auth.claims[groups]', values: [dev]}",
    "{key: 'request.auth.claims[groups]', notValues: [dev]}",
    "{key: request.auth.principal, values: ['https://issuer.example/*']}",
    "{key: source.principal, notValues: [prod.example/ns/shop/sa/cart]}",
    "{key: remote.ip, values: [192.0.2.0/24]}",
    "{key: connection.sni, notValues: [a.example]}",
];

/// Values of what a record does not tell.
#[derive(Clone, Copy, Debug)]
struct Hidden {
    header: Option<&'static str>,
    group: &'static str,
    remote: &'static str,
}

const HIDDEN: [Hidden; 4] = [
    Hidden {
        header: None,
        group: "dev",
        remote: "10.1.2.3",
    },
    Hidden {
        header: Some("prod"),
        group: "ops",
        remote: "192.0.2.7",
    },
    Hidden {
        header: Some("test"),
        group: "dev",
        remote: "192.0.2.7",
    },
    Hidden {
        header: Some("prod"),
        group: "dev",
        remote: "10.1.2.3",
    },
];

fn whole(selected: &Selected, facts: &Facts, method: &str, token: bool, hidden: Hidden) -> Verdict {
    let name = HeaderName::from_static("x-env");
    let value = hidden.header.map(HeaderValue::from_static);
    let claims = token.then(|| {
        let payload = json!({"iss": "https://issuer.example", "sub": "user-1",
            "scope": "read write", "groups": [hidden.group]});
        Claims::of_test(payload, &[])
    });
    let request = Request {
        method,
        path: "/",
        host: "h",
        headers: value.iter().map(|value| (&name, value)).collect(),
    };
    let about = RequestFacts {
        request: &request,
        path: "/",
        host: "h",
        remote_ip: hidden.remote.parse().expect("address"),
        claims: claims.as_ref(),
    };
    selected.decide(facts, Layer::Request(&about))
}

fn in_part(selected: &Selected, facts: &Facts, method: &str, token: bool) -> Option<Verdict> {
    let payload =
        json!({"iss": "https://issuer.example", "sub": "user-1", "scope": ["read", "write"]});
    let claims = token.then(|| Claims::of_test(payload, &[]));
    let request = Request {
        method,
        path: "/",
        host: "h",
        headers: Vec::new(),
    };
    let about = RequestFacts {
        request: &request,
        path: "/",
        host: "h",
        remote_ip: facts.source_ip,
        claims: claims.as_ref(),
    };
    let partial = Partial {
        sni: false,
        method: false,
        host: false,
        path: false,
        token: if token { Token::Recorded } else { Token::None },
        ..Partial::unread()
    };
    selected
        .decide_partly(facts, partial, Layer::Request(&about))
        .ok()
}

/// Every pair of conditions, in DENY and ALLOW, in one rule and in two.
#[test]
fn no_verdict_in_part_contradicts_one_on_all_facts() {
    let (mut certain, mut open) = (0, 0);
    for one in CONDITIONS {
        for other in CONDITIONS {
            let rules = |action: &str, rules: &str| {
                policy("shop", &format!("{{action: {action}, rules: [{rules}]}}"))
            };
            let both = format!("{{when: [{one}, {other}]}}");
            let either = format!("{{when: [{one}]}}, {{when: [{other}]}}");
            let deny = rules("DENY", &format!("{{when: [{one}]}}"));
            let allow =
                rules("ALLOW", &format!("{{when: [{other}]}}")).replace("name: p", "name: q");
            for text in [
                rules("ALLOW", &both),
                rules("DENY", &both),
                rules("ALLOW", &either),
                rules("DENY", &either),
                deny + &allow,
            ] {
                let set = load(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
                let selected = select(&set);
                let facts = facts(CART, "10.1.2.3");
                for (method, token) in
                    [("GET", true), ("PUT", true), ("GET", false), ("PUT", false)]
                {
                    let Some(verdict) = in_part(&selected, &facts, method, token) else {
                        open += 1;
                        continue;
                    };
                    certain += 1;
                    let allows = |verdict: &Verdict| matches!(verdict, Verdict::Allow(_));
                    for hidden in HIDDEN {
                        let real = whole(&selected, &facts, method, token, hidden);
                        assert_eq!(
                            allows(&verdict),
                            allows(&real),
                            "{text}{method} {token} {hidden:?}: {verdict:?}, {real:?}"
                        );
                    }
                }
            }
        }
    }
    // Neither is all of them.
    assert!(certain > 1000 && open > 500, "{certain} {open}");
}

#[test]
fn what_is_open_is_named() {
    let text = policy(
        "shop",
        "{action: DENY, rules: [{when: [{key: 'request.headers[x-env]', values: [prod]}]}]}",
    );
    let set = load(&text).expect("it loads");
    let about = RequestFacts {
        request: &Request {
            method: "GET",
            path: "/",
            host: "h",
            headers: Vec::new(),
        },
        path: "/",
        host: "h",
        remote_ip: "10.1.2.3".parse().expect("address"),
        claims: None,
    };
    let open = select(&set)
        .decide_partly(
            &facts(CART, "10.1.2.3"),
            Partial::unread(),
            Layer::Request(&about),
        )
        .expect_err("a header decides");
    assert_eq!(
        open.to_string(),
        "AuthorizationPolicy shop/p rule 0 asks for request.headers[x-env]"
    );
}
