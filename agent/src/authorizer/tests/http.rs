use axum::{Router, body::Body, extract::Request as Asked, response::Response};

use super::*;
use crate::fetch::tests::serve;

/// A provider that tells what it is asked in `x-seen`, and answers as the
/// request's `x-want` says: status, then headers, `name=value` each.
async fn provider(fields: &str) -> Authorizers {
    async fn answer(asked: Asked) -> Response {
        let (head, _body) = asked.into_parts();
        let mut names: Vec<_> = head
            .headers
            .iter()
            .map(|(name, value)| format!("{name}={}", value.to_str().expect("text")))
            .collect();
        names.sort();
        let seen = format!("{} {} {}", head.method, head.uri, names.join(" "));
        let want = head.headers["x-want"].to_str().expect("text");
        let mut parts = want.split(' ');
        let status: u16 = parts.next().expect("a status").parse().expect("a number");
        let mut response = Response::builder().status(status).header("x-seen", seen);
        for (name, value) in parts.filter_map(|part| part.split_once('=')) {
            response = response.header(name, value);
        }
        let body = if want.contains("large") {
            " ".repeat(1 << 20)
        } else {
            "body".into()
        };
        response.body(Body::from(body)).expect("a response")
    }
    let base = serve(Router::new().fallback(answer)).await;
    let port = base.rsplit_once(':').expect("a port").1;
    authorizers(&format!(
        "name: a\nenvoyExtAuthzHttp:\n  service: 127.0.0.1\n  port: {port}\n  \
         includeRequestHeadersInCheck: [x-want, x-in-*]\n{fields}\n"
    ))
}

async fn check(all: &Authorizers, want: &'static str) -> Outcome {
    let headers = Headers::new(&[("x-want", want), ("x-user", "mallory")]);
    all.check("a", &call(Some(&headers.request("GET", "/"))))
        .await
}

#[tokio::test]
async fn asks_with_the_request_and_configured_headers_only() {
    let all = provider(
        "  pathPrefix: /check\n  includeAdditionalHeadersInCheck: {x-in-b: fixed}\n  headersToUpstreamOnAllow: [x-seen]",
    )
    .await;
    let headers = Headers::new(&[
        ("host", "app.example:80"),
        ("authorization", "Bearer t"),
        ("cookie", "secret"),
        ("x-want", "200"),
        ("x-in-a", "1"),
        ("x-in-a", "2"),
        ("x-in-b", "forged"),
        ("content-length", "17"),
        ("transfer-encoding", "chunked"),
    ]);
    let request = headers.request("POST", "/a/../b?c=%2F");
    let edits = allowed(all.check("a", &call(Some(&request))).await);
    let expected = "POST /check/a/../b?c=%2F authorization=Bearer t content-length=0 \
                    host=app.example:80 x-in-a=1 x-in-a=2 x-in-b=fixed x-want=200";
    assert_eq!(shown(&edits.set), [("x-seen", expected)]);
    // The same connection serves again.
    let headers = Headers::new(&[("x-want", "200")]);
    for method in ["HEAD", "QUERY"] {
        let request = headers.request(method, "/");
        let edits = allowed(all.check("a", &call(Some(&request))).await);
        assert!(shown(&edits.set)[0].1.starts_with(method));
    }
}

#[tokio::test]
async fn an_allowing_answer_changes_what_is_configured() {
    let all = provider("  headersToUpstreamOnAllow: [x-user, 'content-*', x-many]").await;
    let want = "200 x-user=alice x-other=no x-many=1 x-many=2 content-language=en \
                x-envoy-auth-headers-to-remove=cookie,:path,host";
    let edits = allowed(check(&all, want).await);
    let mut set = shown(&edits.set);
    set.sort();
    assert_eq!(
        set,
        [
            ("content-language", "en"),
            ("x-many", "1"),
            ("x-many", "2"),
            ("x-user", "alice")
        ]
    );
    assert_eq!(edits.remove, ["cookie"]);
    // By default nothing is changed.
    let none = allowed(check(&provider("").await, "200 x-user=alice").await);
    assert_eq!(none, Edits::default());
}

#[tokio::test]
async fn any_other_answer_goes_to_the_client() {
    let all = provider("").await;
    let outcome = check(&all, "302 location=/login set-cookie=a set-cookie=b").await;
    assert!(!outcome.failed && outcome.reason == "denied by extension provider `a`");
    let reply = denied(outcome);
    assert_eq!((reply.status.as_u16(), &*reply.body), (302, "body"));
    let headers = shown(&reply.headers);
    for expected in [
        ("location", "/login"),
        ("set-cookie", "a"),
        ("set-cookie", "b"),
    ] {
        assert!(headers.contains(&expected), "{headers:?}");
    }
    assert!(!headers.iter().any(|(name, _)| *name == "content-length"));
    for (want, status) in [("401", 401), ("204", 204), ("201", 201)] {
        assert_eq!(denied(check(&all, want).await).status, status);
    }
    let listed = provider("  headersToDownstreamOnDeny: [x-why]").await;
    let reply = denied(check(&listed, "401 www-authenticate=Basic x-why=no set-cookie=a").await);
    let mut headers = shown(&reply.headers);
    headers.sort();
    assert_eq!(headers, [("www-authenticate", "Basic"), ("x-why", "no")]);
}

#[tokio::test]
async fn large_bodies_are_left_out() {
    let reply = denied(check(&provider("").await, "403 x-size=large").await);
    assert_eq!((reply.status.as_u16(), &*reply.body), (403, ""));
}

#[tokio::test]
async fn server_errors_are_no_decision() {
    let outcome = check(&provider("  statusOnError: 429").await, "500").await;
    assert!(outcome.failed && outcome.reason.contains("500"));
    assert_eq!(denied(outcome).status, 429);
    let open = check(&provider("  failOpen: true").await, "503").await;
    assert_eq!(allowed(open), Edits::default());
}

#[tokio::test]
async fn what_the_client_makes_impossible_to_ask_is_refused() {
    let all = provider("  failOpen: true").await;
    let headers = Headers::new(&[("x-want", "200")]);
    for (method, path) in [
        ("GET", "*"),
        ("GET", "/a b"),
        ("GET", "/a#b"),
        ("GE T", "/"),
        ("CONNECT", "/"),
        ("GET", "http://elsewhere/"),
    ] {
        let request = headers.request(method, path);
        let outcome = all.check("a", &call(Some(&request))).await;
        assert_eq!(denied(outcome).status, 403, "{method} {path}");
    }
    let tcp = all.check("a", &call(None)).await;
    assert!(tcp.reason.contains("raw TCP"), "{}", tcp.reason);
    assert_eq!(denied(tcp).status, 403);
}
