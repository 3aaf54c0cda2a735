mod double;
mod grpc;
mod http;

use std::path::Path;

use ::http::{HeaderName, HeaderValue};

use super::*;
use crate::objects::parse_document;

fn read(text: &str) -> Result<ExtensionProvider, String> {
    parse_document(Path::new("agent.yaml"), text).map_err(|e| e.to_string())
}

fn authorizers(text: &str) -> Authorizers {
    Authorizers::new(vec![read(text).expect(text)]).expect("one provider")
}

fn call<'a>(request: Option<&'a Request<'a>>) -> Check<'a> {
    Check {
        source: ([10, 0, 0, 1], 4321).into(),
        source_principal: Some("spiffe://cluster.local/ns/a/sa/b".into()),
        destination: "[2001:db8::1]:8080".parse().expect("an address"),
        destination_principal: None,
        sni: None,
        request,
    }
}

/// Names and values, owned.
struct Headers(Vec<(HeaderName, HeaderValue)>);

impl Headers {
    fn new(headers: &[(&'static str, &'static str)]) -> Self {
        let header = |&(name, value)| {
            let name = HeaderName::from_static(name);
            (name, HeaderValue::from_static(value))
        };
        Self(headers.iter().map(header).collect())
    }

    fn request<'a>(&'a self, method: &'a str, path: &'a str) -> Request<'a> {
        Request {
            method,
            path,
            host: "app.example:80",
            headers: self.0.iter().map(|(name, value)| (name, value)).collect(),
        }
    }
}

fn allowed(outcome: Outcome) -> Edits {
    match outcome.decision {
        Decision::Allow(edits) => edits,
        Decision::Deny(reply) => panic!("{}: {reply:?}", outcome.reason),
    }
}

fn denied(outcome: Outcome) -> Reply {
    match outcome.decision {
        Decision::Deny(reply) => reply,
        Decision::Allow(edits) => panic!("{}: {edits:?}", outcome.reason),
    }
}

fn shown(headers: &[(HeaderName, HeaderValue)]) -> Vec<(&str, &str)> {
    headers
        .iter()
        .map(|(name, value)| (name.as_str(), value.to_str().expect("text")))
        .collect()
}

#[test]
fn providers_are_read_and_written() {
    for text in [
        "{name: a, envoyExtAuthzGrpc: {service: a.b.svc.cluster.local, port: 9000}}",
        "{name: a, envoyExtAuthzGrpc: {service: 10.0.0.1, port: 1, timeout: 2s, failOpen: true, statusOnError: '503'}}",
        "{name: a, envoyExtAuthzHttp: {service: '[::1]', port: 80, statusOnError: 500, pathPrefix: /check,
          includeRequestHeadersInCheck: [Cookie, x-*], includeAdditionalHeadersInCheck: {X-A: b},
          headersToUpstreamOnAllow: ['*-user'], headersToDownstreamOnDeny: [set-cookie]}}",
    ] {
        let provider = read(text).expect(text);
        let again = serde_json::to_string(&provider).expect("writes");
        assert_eq!(read(&again).expect(&again), provider, "{again}");
    }
    let Kind::Grpc(grpc) = read("{name: a, envoyExtAuthzGrpc: {service: b, port: 1}}")
        .expect("reads")
        .kind
    else {
        panic!("another kind");
    };
    assert_eq!(grpc.timeout.0, Duration::from_secs(1));
    assert_eq!(grpc.status_on_error.0, StatusCode::FORBIDDEN);
    assert!(!grpc.fail_open);
}

#[test]
fn wrong_providers_are_refused_by_name() {
    let http = |fields: &str| {
        let all = format!("name: a\nenvoyExtAuthzHttp:\n  service: b\n  port: 1\n  {fields}\n");
        read(&all).expect_err(fields)
    };
    for (fields, part) in [
        (
            "includeRequestBodyInCheck: {maxRequestBytes: 1}",
            "includeRequestBodyInCheck is not",
        ),
        (
            "headersToDownstreamOnAllow: [a]",
            "headersToDownstreamOnAllow is not",
        ),
        ("clearRouteCache: true", "clearRouteCache"),
        ("statusOnError: '200'", "400 to 599"),
        ("statusOnError: Forbidden", "400 to 599"),
        ("timeout: 0s", "timeout"),
        ("pathPrefix: check", "pathPrefix"),
        ("pathPrefix: /check?path=", "pathPrefix"),
        (
            "includeRequestHeadersInCheck: ['*']",
            "includeRequestHeadersInCheck",
        ),
        (
            "headersToUpstreamOnAllow: ['a b']",
            "headersToUpstreamOnAllow",
        ),
        (
            "includeAdditionalHeadersInCheck: {Host: b}",
            "`Host` cannot be set",
        ),
        (
            "includeAdditionalHeadersInCheck: {'a b': c}",
            "no header name",
        ),
        (
            "includeAdditionalHeadersInCheck: {a: \"b\\nc\"}",
            "no header value",
        ),
    ] {
        let error = http(fields);
        assert!(error.contains(part), "{error}");
    }
    for (text, part) in [
        ("{name: a}", "needs one of"),
        (
            "{name: a, envoyExtAuthzGrpc: {service: b, port: 1}, envoyExtAuthzHttp: {service: b, port: 1}}",
            "needs one of",
        ),
        (
            "{name: '', envoyExtAuthzGrpc: {service: b, port: 1}}",
            "needs a name",
        ),
        (
            "{name: a, envoyOtelAls: {service: b, port: 1}}",
            "envoyOtelAls",
        ),
        (
            "{name: a, envoyExtAuthzGrpc: {service: b, port: 0}}",
            "port",
        ),
        (
            "{name: a, envoyExtAuthzGrpc: {service: 'b:1', port: 1}}",
            "neither a DNS name",
        ),
        (
            "{name: a, envoyExtAuthzGrpc: {service: ns/b, port: 1}}",
            "neither a DNS name",
        ),
        (
            "{name: a, envoyExtAuthzGrpc: {service: '', port: 1}}",
            "neither a DNS name",
        ),
        (
            "{name: a, envoyExtAuthzGrpc: {service: b, port: 1, pathPrefix: /}}",
            "pathPrefix",
        ),
        (
            "{name: a, envoyExtAuthzGrpc: {service: b, port: 1, includeRequestBodyInCheck: {}}}",
            "is not supported",
        ),
    ] {
        let error = read(text).expect_err(text);
        assert!(error.contains(part), "{error}");
    }
}

#[tokio::test]
async fn unknown_providers_refuse_and_names_are_unique() {
    let one = read("{name: a, envoyExtAuthzGrpc: {service: b, port: 1}}").expect("reads");
    let error = Authorizers::new(vec![one.clone(), one.clone()]).expect_err("twice");
    assert!(error.to_string().contains("`a`"));
    let all = Authorizers::new(vec![one]).expect("one");
    assert!(all.has("a") && !all.has("b"));
    let outcome = all.check("b", &call(None)).await;
    assert!(outcome.failed && outcome.reason.contains("`b`"));
    assert_eq!(denied(outcome).status, 403);
}

#[tokio::test]
async fn what_cannot_be_asked_fails_as_configured() {
    // A port that nothing listens on: it was bound a moment ago.
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("binds");
    let port = free.local_addr().expect("bound").port();
    drop(free);
    // And one that accepts, but never answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("binds");
    let silent = silent
        .local_addr()
        .map(|a| (a.port(), silent))
        .expect("bound");
    let headers = Headers::new(&[]);
    let request = headers.request("GET", "/");
    for kind in ["Grpc", "Http"] {
        for port in [port, silent.0] {
            let provider = |more: &str| {
                authorizers(&format!(
                    "{{name: a, envoyExtAuthz{kind}: {{service: 127.0.0.1, port: {port}, timeout: 200ms{more}}}}}"
                ))
            };
            let closed = provider("").check("a", &call(Some(&request))).await;
            assert!(closed.failed, "{closed:?}");
            assert_eq!(denied(closed).status, 403);
            let status = provider(", statusOnError: 503");
            let reply = denied(status.check("a", &call(Some(&request))).await);
            assert_eq!(reply, Reply::new(StatusCode::SERVICE_UNAVAILABLE, ""));
            let open = provider(", failOpen: true")
                .check("a", &call(Some(&request)))
                .await;
            assert!(open.failed && open.reason.contains("extension provider `a`"));
            assert_eq!(allowed(open), Edits::default());
        }
    }
}
