//! OutboundToken: what is refused, and which requests are meant.

use http::{HeaderName, HeaderValue};

use super::{load, policy, select};
use crate::request::Request;

fn object(name: &str, spec: &str) -> String {
    policy("shop", spec)
        .replace("AuthorizationPolicy", "OutboundToken")
        .replace("security.istio.io/v1", "postern.dev/v1alpha1")
        .replace("name: p,", &format!("name: {name},"))
}

/// With client credentials of an issuer, and `more` fields.
fn credentials(more: &str) -> String {
    let spec = format!(
        "{{hosts: [back], issuer: 'https://as.example', grant: {{clientCredentials: {{}}}}{more}}}"
    );
    object("p", &spec)
}

fn exchange(exchange: &str, more: &str) -> String {
    let spec = format!(
        "{{hosts: [back], issuer: 'https://as.example', grant: {{tokenExchange: {exchange}}}{more}}}"
    );
    object("p", &spec)
}

fn own(more: &str) -> String {
    object(
        "p",
        &format!("{{hosts: [back], grant: {{workloadIdentity: {{}}}}{more}}}"),
    )
}

#[test]
fn what_cannot_be_meant_is_refused_with_the_reason() {
    let issued = |issuer: &str| {
        object(
            "p",
            &format!("{{hosts: [back], {issuer}, grant: {{clientCredentials: {{}}}}}}"),
        )
    };
    let mut wrong = Vec::new();
    for (text, parts) in [
        (object("p", "null"), ["spec", "missing"]),
        (
            object("p", "{grant: {workloadIdentity: {}}, audiences: [a]}"),
            ["spec", "hosts"],
        ),
        (
            object(
                "p",
                "{hosts: [], grant: {workloadIdentity: {}}, audiences: [a]}",
            ),
            ["spec.hosts", "empty list"],
        ),
        (
            object("p", "{hosts: ['back:80'], grant: {workloadIdentity: {}}}"),
            ["hosts[0]", "without a port"],
        ),
        (
            object("p", "{hosts: ['a*b'], grant: {workloadIdentity: {}}}"),
            ["hosts[0]", "no host"],
        ),
        (
            object("p", "{hosts: ['a/b'], grant: {workloadIdentity: {}}}"),
            ["hosts[0]", "no host"],
        ),
        (object("p", "{hosts: [back]}"), ["spec", "grant"]),
        (
            object("p", "{hosts: [back], grant: {}}"),
            ["grant", "names 0 grants"],
        ),
        (
            object(
                "p",
                "{hosts: [back], grant: {clientCredentials: {}, workloadIdentity: {}}}",
            ),
            ["grant", "names 2 grants"],
        ),
        (
            object("p", "{hosts: [back], grant: {password: {}}}"),
            ["grant", "password"],
        ),
        (
            object(
                "p",
                "{hosts: [back], grant: {clientCredentials: {scope: a}}}",
            ),
            ["grant", "scope"],
        ),
        (credentials(", ports: ['x']"), ["ports[0]", "no port"]),
        (credentials(", scope: [a]"), ["p.yaml:5", "scope"]),
        (credentials(", scopes: ['a b']"), ["scopes[0]", "6749 3.3"]),
        (credentials(", scopes: ['a\"']"), ["scopes[0]", "6749 3.3"]),
        (credentials(", scopes: ['ä']"), ["scopes[0]", "6749 3.3"]),
        (credentials(", resources: [back]"), ["resources[0]", "8707"]),
        (
            credentials(", resources: ['https://back#x']"),
            ["resources[0]", "8707"],
        ),
        (credentials(", audiences: ['']"), ["audiences[0]", "empty"]),
        (credentials(", clientId: ''"), ["clientId", "client ID"]),
        (
            credentials(", clientAuthentication: {password: {}}"),
            ["clientAuthentication", "password"],
        ),
        (
            credentials(", clientAuthentication: {tlsClientAuth: {certificate: x}}"),
            ["clientAuthentication", "certificate"],
        ),
        (
            credentials(", clientAuthentication: {none: {}}"),
            ["clientAuthentication", "6749 4.4"],
        ),
        (
            credentials(", header: {name: Connection}"),
            ["header", "one hop"],
        ),
        (
            credentials(", header: {name: Transfer-Encoding}"),
            ["header", "frames"],
        ),
        (credentials(", header: {name: TE}"), ["header", "one hop"]),
        (
            credentials(", header: {name: Proxy-Authorization}"),
            ["header", "one hop"],
        ),
        (credentials(", header: {name: Host}"), ["header", "frames"]),
        (
            credentials(", header: {name: 'a b'}"),
            ["header", "is none"],
        ),
        (
            credentials(", header: {prefix: ' x'}"),
            ["header", "prefix"],
        ),
        (
            credentials(", header: {prefix: \"a\\r\\nb\"}"),
            ["header", "prefix"],
        ),
        (credentials(", application: lose"), ["application", "lose"]),
        (credentials(", timeout: 2m"), ["spec.timeout", "1m"]),
        (credentials(", timeout: 0s"), ["timeout", "1ms"]),
        (
            credentials(", onBehalfOf: {}"),
            ["onBehalfOf", "subject: inbound"],
        ),
        (
            credentials(", tokenEndpoint: 'https://as.example/t'"),
            ["tokenEndpoint", "name one"],
        ),
        (
            object("p", "{hosts: [back], grant: {clientCredentials: {}}}"),
            ["spec.issuer", "is missing"],
        ),
        (
            issued("issuer: 'http://as.example'"),
            ["issuer", "is not https"],
        ),
        (
            issued("tokenEndpoint: 'http://10.0.0.1/t'"),
            ["tokenEndpoint", "is not https"],
        ),
        (
            issued("issuer: 'https://u:p@as.example'"),
            ["issuer", "credentials"],
        ),
        (issued("issuer: as.example"), ["issuer", "no URL"]),
        (exchange("{}", ""), ["tokenExchange", "subject"]),
        (exchange("{subject: nobody}", ""), ["subject", "nobody"]),
        (
            exchange("{subject: inbound, serviceAccountTokenPath: /a}", ""),
            ["serviceAccountTokenPath", "subject: serviceAccount"],
        ),
        (
            exchange(
                "{subject: serviceAccount, serviceAccountTokenPath: a/b}",
                "",
            ),
            ["serviceAccountTokenPath", "absolute"],
        ),
        (
            exchange("{subject: serviceAccount}", ", onBehalfOf: {}"),
            ["onBehalfOf", "inbound"],
        ),
        (
            exchange("{subject: inbound}", ", application: keep"),
            ["application", "exchanged"],
        ),
        (
            exchange("{subject: inbound}", ", onBehalfOf: {traceHeader: 'a b'}"),
            ["traceHeader", "header name"],
        ),
        (
            exchange(
                "{subject: inbound}",
                ", header: {name: x-t}, onBehalfOf: {traceHeader: x-t}",
            ),
            ["traceHeader", "own header"],
        ),
        (own(""), ["audiences", "exactly one"]),
        (own(", audiences: [a, b]"), ["audiences", "exactly one"]),
        (
            own(", audiences: [a], issuer: 'https://as'"),
            ["spec.issuer", "asks none"],
        ),
        (
            own(", audiences: [a], clientId: x"),
            ["spec.clientId", "asks none"],
        ),
        (
            own(", audiences: [a], scopes: [x]"),
            ["spec.scopes", "asks none"],
        ),
        (
            own(", audiences: [a], resources: ['https://x']"),
            ["spec.resources", "asks none"],
        ),
        (
            own(", audiences: [a], clientAuthentication: {none: {}}"),
            ["spec.clientAuthentication", "asks none"],
        ),
        (
            credentials("") + &credentials("").replace("name: p,", "name: q,"),
            [
                "OutboundToken shop/q: spec.hosts",
                "`back` is OutboundToken shop/p's already",
            ],
        ),
    ] {
        let error = load(&text).expect_err(&text);
        let lacking = parts.iter().find(|part| !error.contains(**part));
        wrong.extend(lacking.map(|part| format!("{error:?} lacks {part:?} for {text}")));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_can_be_meant_is_taken() {
    for text in [
        credentials(
            ", ports: ['8080'], audiences: [back], resources: ['https://back', 'urn:x:y'], scopes: [orders.read]",
        ),
        credentials(", header: {name: x-token, prefix: ''}, application: keep, timeout: 500ms"),
        credentials(", clientAuthentication: {clientSecretBasic: {secretFile: s}}"),
        exchange("{subject: inbound, actor: workload}", ", onBehalfOf: {}"),
        exchange(
            "{subject: serviceAccount}",
            ", clientAuthentication: {none: {}}",
        ),
        own(", audiences: [back]"),
        object(
            "p",
            "{hosts: ['*'], tokenEndpoint: 'http://127.0.0.1:9/t', grant: {clientCredentials: {}}}",
        ),
        object(
            "p",
            "{hosts: ['[::1]'], issuer: 'http://[::1]:9', grant: {clientCredentials: {}}}",
        ),
        // The same host, on other ports.
        credentials(", ports: ['80']")
            + &credentials(", ports: ['81']").replace("name: p,", "name: q,"),
    ] {
        load(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    }
}

#[test]
fn a_request_is_meant_by_its_host_and_port() {
    let spec = |hosts: &str, ports: &str| {
        format!("{{hosts: [{hosts}]{ports}, grant: {{workloadIdentity: {{}}}}, audiences: [a]}}")
    };
    let text = object("names", &spec("back, Back.Shop.svc.cluster.local", ""))
        + &object("inner", &spec("'*.api.internal'", ", ports: ['8080']"))
        + &object("wide", &spec("'*.internal'", ", ports: ['8080', '9090']"));
    let selected = select(&load(&text).expect("it loads"));
    for (host, port, expected) in [
        ("back", 80, Some("names")),
        ("BACK:8080", 80, Some("names")),
        ("back.shop.svc.cluster.local.", 1, Some("names")),
        ("backs", 80, None),
        ("x.back", 80, None),
        ("", 80, None),
        ("a.api.internal", 9090, Some("wide")),
        ("a.api.internal", 80, None),
        ("api.internal", 8080, Some("wide")),
    ] {
        let found = selected.outbound(port, host).expect("one at most");
        assert_eq!(
            found.map(|one| &*one.policy.name),
            expected,
            "{host}:{port}"
        );
    }
    let two = selected.outbound(8080, "a.api.internal").expect_err("two");
    assert_eq!(
        two.to_string(),
        "OutboundToken shop/inner and OutboundToken shop/wide both name this request; one may"
    );
    assert!(selected.sends_tokens(80));
}

#[test]
fn only_the_workloads_selected_send_tokens() {
    let of = |more: &str, namespace: &str| {
        let text = credentials(more).replace("namespace: shop", &format!("namespace: {namespace}"));
        select(&load(&text).expect("it loads")).sends_tokens(80)
    };
    assert!(of("", "shop"));
    assert!(of("", "istio-system"), "the root namespace reaches all");
    assert!(!of("", "other"));
    assert!(of(", selector: {matchLabels: {app: web}}", "shop"));
    assert!(!of(", selector: {matchLabels: {app: db}}", "shop"));
    assert!(!of(", ports: ['81']", "shop"));
}

#[test]
fn the_applications_own_header_wins_where_it_may() {
    let (name, value) = (
        HeaderName::from_static("authorization"),
        HeaderValue::from_static("x"),
    );
    let request = Request {
        method: "GET",
        path: "/",
        host: "back",
        headers: vec![(&name, &value)],
    };
    for (application, yields) in [("keep", true), ("replace", false)] {
        let set = load(&credentials(&format!(", application: {application}"))).expect("it loads");
        let selected = select(&set);
        let one = selected.outbound(80, "back").expect("one").expect("one");
        assert_eq!(one.yields_to(&request), yields);
        let without = Request {
            headers: Vec::new(),
            ..request.clone()
        };
        assert!(!one.yields_to(&without));
    }
}
