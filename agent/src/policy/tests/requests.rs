//! Fields that are about requests.

use std::net::IpAddr;

use http::{HeaderName, HeaderValue};
use serde_json::json;

use super::{CART, facts, load, load_with, peer, policy, select};
use crate::{
    config::Normalization,
    jwt::Claims,
    policy::{Denial, Facts, Layer, Normal, Reading, RequestFacts, Verdict, normalize},
    request::Request,
};

/// A request of user-1 to the pod, with these headers.
struct Call {
    method: &'static str,
    path: &'static str,
    host: &'static str,
    headers: Vec<(HeaderName, HeaderValue)>,
    claims: Option<Claims>,
    remote: IpAddr,
}

impl Default for Call {
    fn default() -> Self {
        let header = |name, value| {
            (
                HeaderName::from_static(name),
                HeaderValue::from_static(value),
            )
        };
        let claims = json!({
            "iss": "https://issuer.example", "sub": "user-1", "aud": ["web", "https://api/"],
            "azp": "cart", "scope": "read write", "permission": "p1 p2", "words": "one two",
            "groups": ["dev", "ops", 7], "level": 3, "admin": true, "nothing": null, "empty": "",
            "nested": {"role": "a.b", "x/y": ["p", "q"], "deep": {"er": "z"}},
            "objects": [{"a": "b"}], "https://ns.example/claim": "v",
        });
        Self {
            method: "GET",
            path: "/api/v1/items?q=1#f",
            host: "Shop.Example:8080",
            headers: vec![
                header("x-env", "prod"),
                header("x-empty", ""),
                header("x-list", "a"),
                header("x-list", "b"),
            ],
            claims: Some(Claims::of_test(claims, &["words"])),
            remote: "192.0.2.7".parse().expect("address"),
        }
    }
}

impl Call {
    fn judged(&self, text: &str, facts: &Facts) -> Verdict {
        let set = load(text).unwrap_or_else(|e| panic!("{text}: {e}"));
        let selected = select(&set);
        let normal: Normal<'_> =
            normalize(self.path, Normalization::Base).expect("a path that is a path");
        let request = Request {
            method: self.method,
            path: self.path,
            host: self.host,
            headers: self.headers.iter().map(|(n, v)| (n, v)).collect(),
        };
        let about = RequestFacts {
            request: &request,
            path: &normal.path,
            host: &self.host.to_lowercase(),
            remote_ip: self.remote,
            claims: self.claims.as_ref(),
        };
        selected.decide(facts, Layer::Request(&about))
    }

    fn allowed(&self, text: &str) -> bool {
        matches!(
            self.judged(text, &facts(CART, "10.1.2.3")),
            Verdict::Allow(_)
        )
    }
}

fn from(source: &str) -> String {
    let spec = format!("{{rules: [{{from: [{{source: {source}}}]}}]}}");
    policy("shop", &spec)
}

fn to(operation: &str) -> String {
    let spec = format!("{{rules: [{{to: [{{operation: {operation}}}]}}]}}");
    policy("shop", &spec)
}

fn when(condition: &str) -> String {
    policy("shop", &format!("{{rules: [{{when: [{condition}]}}]}}"))
}

#[test]
fn operations() {
    for (operation, expected) in [
        ("{methods: [GET]}", true),
        ("{methods: [get]}", false),
        ("{methods: ['G*']}", true),
        ("{methods: ['*ET']}", true),
        ("{methods: ['*']}", true),
        ("{methods: [POST, GET]}", true),
        ("{notMethods: [GET]}", false),
        ("{notMethods: [POST]}", true),
        ("{methods: ['*'], notMethods: [GET]}", false),
        ("{hosts: ['shop.example:8080']}", true),
        ("{hosts: ['SHOP.example:*']}", true),
        ("{hosts: [shop.example]}", false),
        ("{hosts: ['shop.*']}", true),
        ("{hosts: ['*.EXAMPLE:8080']}", true),
        ("{hosts: ['*']}", true),
        ("{notHosts: ['shop.*']}", false),
        ("{notHosts: ['other.*']}", true),
        ("{paths: [/api/v1/items]}", true),
        ("{paths: ['/api/v1/items?q=1']}", false),
        ("{paths: [/API/v1/items]}", false),
        ("{paths: ['/api/*']}", true),
        ("{paths: ['*/items']}", true),
        ("{paths: ['*']}", true),
        ("{paths: ['/api/{*}/items']}", true),
        ("{paths: ['/{*}/items']}", false),
        ("{paths: ['/{**}/items']}", true),
        ("{paths: ['/api/{**}']}", true),
        ("{paths: ['/api/v1/items/{**}']}", false),
        ("{paths: ['/{*}/{*}/{*}']}", true),
        ("{paths: ['/{*}/{*}/{*}/{*}']}", false),
        ("{notPaths: ['/api/*']}", false),
        ("{notPaths: ['/healthz']}", true),
        ("{notPaths: ['/api/{**}']}", false),
        ("{ports: ['80'], methods: [GET]}", true),
        ("{ports: ['81'], methods: [GET]}", false),
        ("{notPorts: ['80'], methods: [GET]}", false),
    ] {
        let text = to(operation);
        assert_eq!(Call::default().allowed(&text), expected, "{operation}");
    }
}

#[test]
fn path_templates() {
    for (template, path, expected) in [
        ("/a/{**}", "/a/", true),
        ("/a/{**}", "/a", false),
        ("/a/{**}", "/a/b/c", true),
        ("/a/{**}/b", "/a//b", true),
        ("/a/{**}/b", "/a/b", false),
        ("/a/{**}/b", "/a/x/y/b", true),
        ("/a/{**}/b", "/a/x/y/b/c", false),
        ("/a/{*}", "/a/", false),
        ("/a/{*}", "/a/b", true),
        ("/a/{*}", "/a/b/", false),
        ("/a/{*}/c/{**}", "/a/b/c/d/e", true),
        ("/{*}", "/x", true),
        ("/{**}", "/", true),
        ("/foo/{**}/", "/foo/bar/baz.txt", false),
    ] {
        let call = Call {
            path,
            ..Call::default()
        };
        let text = to(&format!("{{paths: ['{template}']}}"));
        assert_eq!(call.allowed(&text), expected, "{template} {path}");
    }
}

#[test]
fn star_forms_are_what_istio_makes_of_them() {
    for (pattern, path, expected) in [
        ("*x*", "/ax*", true),
        ("*x*", "/axb", false),
        ("/a*b", "/a*b", true),
        ("/a*b", "/axb", false),
        ("/x/**", "/x/*y", true),
        ("/x/**", "/x/y", false),
        ("/a*", "/a", true),
        ("*/a", "/a", true),
        ("/a.c", "/abc", false),
        ("/[a]", "/a", false),
    ] {
        let call = Call {
            path,
            ..Call::default()
        };
        let text = to(&format!("{{paths: ['{pattern}']}}"));
        assert_eq!(call.allowed(&text), expected, "{pattern} {path}");
    }
}

#[test]
fn request_principals() {
    for (value, expected) in [
        ("*", true),
        ("https://issuer.example/user-1", true),
        ("https://issuer.example/user-2", false),
        ("https://issuer.example/*", true),
        ("*/user-1", true),
        ("*/user-2", false),
        ("https://issuer.example/user*", true),
        ("*issuer.example/user-1", true),
        ("*other.example/user-1", false),
        ("https://issuer*", false),
        ("https*", true),
        ("*user-1", true),
        ("https", false),
        ("https://issuer.example", false),
    ] {
        let text = from(&format!("{{requestPrincipals: ['{value}']}}"));
        assert_eq!(Call::default().allowed(&text), expected, "{value}");
        let not = from(&format!("{{notRequestPrincipals: ['{value}']}}"));
        assert_eq!(Call::default().allowed(&not), !expected, "not {value}");
        let stranger = Call {
            claims: None,
            ..Call::default()
        };
        assert!(!stranger.allowed(&text), "{value} without a token");
        assert!(stranger.allowed(&not), "not {value} without a token");
    }
    let nobody = Call {
        claims: Some(Claims::of_test(
            json!({"iss": "https://issuer.example"}),
            &[],
        )),
        ..Call::default()
    };
    assert!(!nobody.allowed(&from("{requestPrincipals: ['*']}")));
}

#[test]
fn conditions() {
    for (condition, expected) in [
        ("{key: 'request.headers[X-Env]', values: [prod]}", true),
        ("{key: 'request.headers[x-env]', values: [Prod]}", false),
        ("{key: 'request.headers[x-env]', values: ['p*']}", true),
        ("{key: 'request.headers[x-env]', notValues: [prod]}", false),
        ("{key: 'request.headers[x-gone]', notValues: [prod]}", true),
        ("{key: 'request.headers[x-gone]', values: ['*']}", false),
        ("{key: 'request.headers[x-empty]', values: ['*']}", true),
        ("{key: 'request.headers[x-list]', values: ['a,b']}", true),
        ("{key: 'request.headers[x-list]', values: [a]}", false),
        ("{key: 'request.headers[:method]', values: [GET]}", true),
        (
            "{key: 'request.headers[:authority]', values: ['Shop.Example:8080']}",
            true,
        ),
        (
            "{key: 'request.headers[:authority]', values: ['shop.example:8080']}",
            false,
        ),
        (
            "{key: 'request.headers[Host]', values: ['Shop.Example:8080']}",
            true,
        ),
        ("{key: source.ip, values: [10.1.0.0/16]}", true),
        ("{key: source.ip, notValues: [10.1.0.0/16]}", false),
        ("{key: remote.ip, values: [192.0.2.0/24]}", true),
        ("{key: remote.ip, values: [10.1.0.0/16]}", false),
        ("{key: source.namespace, values: [shop]}", true),
        ("{key: source.namespace, values: ['s*']}", true),
        (
            "{key: source.principal, values: [cluster.local/ns/shop/sa/cart]}",
            true,
        ),
        ("{key: source.serviceAccount, values: [cart]}", true),
        (
            "{key: source.serviceAccount, notValues: [shop/cart]}",
            false,
        ),
        ("{key: source.trustDomain, values: [cluster.local]}", false),
        ("{key: source.trustDomain, values: [old.example]}", true),
        ("{key: source.trustDomain, values: [else.example]}", false),
        ("{key: request.auth.principal, values: ['*/user-1']}", true),
        ("{key: request.auth.audiences, values: [web]}", true),
        (
            "{key: request.auth.audiences, values: ['https://api']}",
            false,
        ),
        (
            "{key: request.auth.audiences, values: ['https://api/']}",
            true,
        ),
        ("{key: request.auth.audiences, notValues: [web]}", false),
        ("{key: request.auth.presenter, values: [cart]}", true),
        ("{key: 'request.auth.claims[scope]', values: [read]}", true),
        (
            "{key: 'request.auth.claims[scope]', values: ['read write']}",
            false,
        ),
        (
            "{key: 'request.auth.claims[permission]', values: [p2]}",
            true,
        ),
        ("{key: 'request.auth.claims[words]', values: [two]}", true),
        ("{key: 'request.auth.claims[groups]', values: [ops]}", true),
        ("{key: 'request.auth.claims[groups]', values: ['7']}", false),
        (
            "{key: 'request.auth.claims[groups]', notValues: [dev]}",
            false,
        ),
        ("{key: 'request.auth.claims[level]', values: ['3']}", false),
        (
            "{key: 'request.auth.claims[admin]', values: ['true']}",
            false,
        ),
        (
            "{key: 'request.auth.claims[admin]', notValues: ['true']}",
            true,
        ),
        (
            "{key: 'request.auth.claims[nothing]', values: ['*']}",
            false,
        ),
        ("{key: 'request.auth.claims[empty]', values: ['*']}", false),
        (
            "{key: 'request.auth.claims[nested][role]', values: [a.b]}",
            true,
        ),
        (
            "{key: 'request.auth.claims[nested][x/y]', values: [q]}",
            true,
        ),
        (
            "{key: 'request.auth.claims[nested][deep][er]', values: [z]}",
            true,
        ),
        (
            "{key: 'request.auth.claims[nested.role]', values: [a.b]}",
            false,
        ),
        ("{key: 'request.auth.claims[nested]', values: ['*']}", false),
        (
            "{key: 'request.auth.claims[objects][a]', values: [b]}",
            false,
        ),
        (
            "{key: 'request.auth.claims[https://ns.example/claim]', values: [v]}",
            true,
        ),
        ("{key: 'request.auth.claims[Scope]', values: [read]}", false),
        ("{key: destination.ip, values: [10.9.0.0/16]}", true),
        ("{key: destination.ip, values: ['fd00::/8']}", false),
        ("{key: destination.port, values: ['80']}", true),
        ("{key: destination.port, notValues: ['80', '81']}", false),
        ("{key: connection.sni, values: ['*']}", false),
        ("{key: connection.sni, notValues: [a.example]}", true),
    ] {
        let text = when(condition);
        assert_eq!(Call::default().allowed(&text), expected, "{condition}");
    }
    let mut hello = facts(CART, "10.1.2.3");
    hello.sni = Some("a.example".into());
    let text = when("{key: connection.sni, values: ['*.example']}");
    assert!(matches!(
        Call::default().judged(&text, &hello),
        Verdict::Allow(_)
    ));
}

/// None of several values can hide behind another, whichever way a rule asks.
#[test]
fn repeated_headers_are_read_the_safe_way() {
    // The call has `x-list: a` and `x-list: b`.
    let condition = |what: &str| format!("{{key: 'request.headers[x-list]', {what}}}");
    for (action, what, expected) in [
        ("ALLOW", "values: ['a,b']", true),
        ("ALLOW", "values: [a]", false),
        ("ALLOW", "notValues: [a]", false),
        ("ALLOW", "notValues: ['a,b']", false),
        ("ALLOW", "notValues: [c]", true),
        ("DENY", "values: [a]", false),
        ("DENY", "values: ['b*']", false),
        ("DENY", "values: ['a,b']", false),
        ("DENY", "values: [c]", true),
        ("DENY", "notValues: [a]", false),
        ("DENY", "notValues: ['a,b']", true),
    ] {
        let spec = format!(
            "{{action: {action}, rules: [{{when: [{}]}}]}}",
            condition(what)
        );
        let allowed = Call::default().allowed(&policy("shop", &spec));
        assert_eq!(allowed, expected, "{action} {what}");
    }
}

#[test]
fn remote_blocks_and_trust_domains() {
    for (source, expected) in [
        ("{remoteIpBlocks: [192.0.2.7]}", true),
        ("{remoteIpBlocks: [10.0.0.0/8]}", false),
        ("{notRemoteIpBlocks: [192.0.2.0/24]}", false),
        (
            "{ipBlocks: [10.0.0.0/8], notRemoteIpBlocks: [10.0.0.0/8]}",
            true,
        ),
        ("{trustDomains: [prod.example]}", true),
        ("{trustDomains: [old.example]}", true),
        ("{trustDomains: ['prod*']}", true),
        ("{trustDomains: ['*.example']}", true),
        ("{trustDomains: [else.example]}", false),
        ("{notTrustDomains: [old.example]}", false),
        ("{principals: ['*.example/ns/shop/sa/cart']}", true),
        ("{principals: ['*local/ns/shop/sa/cart']}", false),
        ("{principals: ['prod*/ns/shop/sa/cart']}", true),
        ("{principals: ['*/ns/shop/sa/cart']}", true),
        ("{principals: ['cluster.local/ns/*/sa/cart']}", false),
    ] {
        let text = from(source);
        assert_eq!(Call::default().allowed(&text), expected, "{source}");
    }
}

#[test]
fn rules_are_alternatives_and_parts_are_required() {
    let call = Call::default();
    for (spec, expected) in [
        (
            "{rules: [{to: [{operation: {methods: [POST]}}]}, {to: [{operation: {methods: [GET]}}]}]}",
            true,
        ),
        (
            "{rules: [{to: [{operation: {methods: [POST]}}, {operation: {paths: ['/api/*']}}]}]}",
            true,
        ),
        (
            "{rules: [{from: [{source: {namespaces: [other]}}], to: [{operation: {methods: [GET]}}]}]}",
            false,
        ),
        (
            "{rules: [{to: [{operation: {methods: [GET]}}], when: [{key: source.ip, values: [10.1.2.3]}, {key: remote.ip, values: [1.1.1.1]}]}]}",
            false,
        ),
        (
            "{action: DENY, rules: [{to: [{operation: {methods: [GET]}}]}]}",
            false,
        ),
        (
            "{action: DENY, rules: [{to: [{operation: {methods: [POST]}}]}]}",
            true,
        ),
        ("{action: AUDIT, rules: [{}]}", true),
        (
            "{targetRefs: [{kind: Service, name: front, group: ''}], rules: []}",
            false,
        ),
        (
            "{targetRefs: [{kind: Service, name: back, group: core}], rules: []}",
            true,
        ),
        (
            "{targetRef: {kind: Gateway, name: g, group: gateway.networking.k8s.io}, rules: []}",
            true,
        ),
    ] {
        assert_eq!(call.allowed(&policy("shop", spec)), expected, "{spec}");
    }
}

#[test]
fn dry_runs_are_told_and_not_enforced() {
    let dry = |action: &str, rules: &str, value: &str| {
        policy("shop", &format!("{{action: {action}, rules: {rules}}}")).replace(
            "metadata: {",
            &format!("metadata: {{annotations: {{istio.io/dry-run: '{value}'}}, "),
        )
    };
    let told = |text: &str| {
        let set = load(text).expect("loads");
        let facts = facts(CART, "10.1.2.3");
        select(&set).told(&facts, Layer::Opaque).len()
    };
    let call = Call::default();
    for (text, allowed, count) in [
        (dry("DENY", "[{}]", "true"), true, 1),
        (dry("DENY", "[{}]", "F"), false, 0),
        (dry("ALLOW", "[]", "T"), true, 1),
        (dry("ALLOW", "[{}]", "1"), true, 0),
        (policy("shop", "{action: AUDIT, rules: [{}]}"), true, 1),
    ] {
        assert_eq!(call.allowed(&text), allowed, "{text}");
        assert_eq!(told(&text), count, "{text}");
    }
}

#[test]
fn what_needs_a_request_is_closed_on_raw_tcp() {
    let http = "{to: [{operation: {methods: [GET], ports: ['80']}}]}";
    for (spec, expected) in [
        // ALLOW: the rule is void, and the policy still counts.
        (format!("{{rules: [{http}]}}"), false),
        (format!("{{rules: [{http}, {{}}]}}"), true),
        ("{rules: [{from: [{source: {namespaces: [shop]}}, {source: {requestPrincipals: ['*']}}]}]}".into(), false),
        ("{rules: [{when: [{key: 'request.headers[a]', notValues: [b]}]}]}".into(), false),
        // DENY: only the attribute is left out.
        (format!("{{action: DENY, rules: [{http}]}}"), false),
        ("{action: DENY, rules: [{to: [{operation: {methods: [GET], ports: ['81']}}]}]}".into(), true),
        ("{action: DENY, rules: [{to: [{operation: {methods: [GET]}}]}]}".into(), false),
        ("{action: DENY, rules: [{from: [{source: {namespaces: [other]}}], to: [{operation: {paths: [/x]}}]}]}".into(), true),
        ("{action: DENY, rules: [{from: [{source: {namespaces: [shop]}}], to: [{operation: {paths: [/x]}}]}]}".into(), false),
        ("{action: DENY, rules: [{from: [{source: {namespaces: [other], notRequestPrincipals: ['*']}}]}]}".into(), true),
        // Not about requests.
        ("{rules: [{from: [{source: {remoteIpBlocks: [10.0.0.0/8]}}]}]}".into(), true),
        ("{rules: [{when: [{key: source.serviceAccount, values: [cart]}]}]}".into(), true),
    ] {
        let set = load(&policy("shop", &spec)).expect("loads");
        let verdict = select(&set).opaque(&facts(CART, "10.1.2.3"));
        assert_eq!(matches!(verdict, Verdict::Allow(_)), expected, "{spec}");
    }
}

#[test]
fn requests_are_read_only_where_a_rule_may_match_the_connection() {
    let asks = |text: &str| {
        let set = load(text).unwrap_or_else(|e| panic!("{text}: {e}"));
        select(&set)
            .needs_request(&facts(CART, "10.1.2.3"))
            .is_some()
    };
    let ra = policy(
        "shop",
        "{jwtRules: [{issuer: i, jwksUri: 'https://keys.example/'}]}",
    )
    .replace("AuthorizationPolicy", "RequestAuthentication");
    for (text, expected) in [
        (String::new(), false),
        (to("{ports: ['80']}"), false),
        (to("{methods: [GET]}"), true),
        (to("{methods: [GET], ports: ['81']}"), false),
        (
            policy(
                "shop",
                "{rules: [{from: [{source: {namespaces: [other]}}], to: [{operation: {paths: [/x]}}]}]}",
            ),
            false,
        ),
        (
            policy("other", "{rules: [{to: [{operation: {methods: [GET]}}]}]}"),
            false,
        ),
        (from("{remoteIpBlocks: [10.0.0.0/8]}"), false),
        (when("{key: connection.sni, values: [a.example]}"), true),
        (
            policy(
                "shop",
                "{action: DENY, rules: [{when: [{key: connection.sni, values: [a.example]}]}]}",
            ),
            true,
        ),
        (
            policy(
                "shop",
                "{action: AUDIT, rules: [{to: [{operation: {methods: [GET]}}]}]}",
            ),
            false,
        ),
        (ra.clone(), true),
        (ra.replace("namespace: shop", "namespace: other"), false),
    ] {
        assert_eq!(asks(&text), expected, "{text}");
    }
    let proxied = Reading {
        trusted_proxies: 1,
        ..Reading::default()
    };
    let set = load_with(&from("{remoteIpBlocks: [10.0.0.0/8]}"), proxied).expect("loads");
    assert!(
        select(&set)
            .needs_request(&facts(CART, "10.1.2.3"))
            .is_some()
    );
    // The packets' source is a proxy's, and says nothing of the client.
    let deny = policy(
        "shop",
        "{action: DENY, rules: [{from: [{source: {remoteIpBlocks: [198.51.100.0/24]}}]}]}",
    );
    let set = load_with(&deny, proxied).expect("loads");
    assert!(
        select(&set)
            .needs_request(&facts(CART, "10.1.2.3"))
            .is_some()
    );
}

#[test]
fn custom_policies_name_their_provider_once() {
    let custom = |name: &str, to: &str| {
        policy(
            "shop",
            &format!("{{action: CUSTOM, provider: {{name: ext}}, rules: [{to}]}}"),
        )
        .replace("name: p,", &format!("name: {name},"))
    };
    let text = custom("a", "{to: [{operation: {ports: ['80']}}]}")
        + &custom("b", "{}")
        + &custom("c", "{to: [{operation: {ports: ['81']}}]}");
    let set = load(&text).expect("loads");
    let selected = select(&set);
    let asked = selected.providers(&facts(CART, "10.1.2.3"), Layer::Opaque);
    let named: Vec<_> = asked
        .iter()
        .map(|(name, policy)| (*name, policy.path()))
        .collect();
    assert_eq!(named, [("ext", "AuthorizationPolicy/shop/a".to_owned())]);
}

#[test]
fn strict_comes_before_everything() {
    let text = peer("shop", "s", "{mtls: {mode: STRICT}}") + &policy("shop", "{rules: [{}]}");
    let set = load(&text).expect("loads");
    let denial = select(&set).transport(&facts(None, "10.1.2.3"));
    assert!(matches!(denial, Err(Denial::Plaintext(_))));
}

/// Ten thousand policies of others do not select, and do not get in the way.
#[test]
fn many_policies_of_others() {
    let mut text = String::new();
    for i in 0..2_000 {
        text += &policy(
            "shop",
            &format!("{{selector: {{matchLabels: {{app: other{i}}}}}, rules: []}}"),
        )
        .replace("name: p,", &format!("name: p{i},"));
    }
    assert!(Call::default().allowed(&text));
    text += &policy("shop", "{selector: {matchLabels: {app: web}}}");
    assert!(!Call::default().allowed(&text));
}
