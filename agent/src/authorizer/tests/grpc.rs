use super::{super::proto::*, double::Double, *};

fn status(code: i32) -> Option<Status> {
    Some(Status {
        code,
        message: String::new(),
    })
}

fn option(key: &str, value: &str) -> HeaderValueOption {
    HeaderValueOption {
        header: Some(HeaderField {
            key: key.into(),
            value: value.into(),
            raw_value: Vec::new(),
        }),
        append: None,
        append_action: 0,
    }
}

fn action(key: &str, append_action: i32) -> HeaderValueOption {
    HeaderValueOption {
        append_action,
        ..option(key, "set")
    }
}

fn ok(response: OkHttpResponse) -> CheckResponse {
    CheckResponse {
        status: status(0),
        denied_response: None,
        ok_response: Some(response),
    }
}

async fn answered(answer: CheckResponse, more: &str) -> Outcome {
    let double = Double::new(answer).await;
    let headers = Headers::new(&[("x-there", "sent"), ("x-gone", "secret")]);
    let request = headers.request("GET", "/");
    double
        .authorizers(more)
        .check("a", &call(Some(&request)))
        .await
}

#[tokio::test]
async fn tells_the_provider_what_is_known() {
    let double = Double::new(ok(OkHttpResponse::default())).await;
    let all = double.authorizers("");
    let headers = Headers::new(&[
        ("x-request-id", "7"),
        ("cookie", "a"),
        ("cookie", "b"),
        ("x-a", "1"),
        ("x-a", "2"),
        ("content-length", "17"),
    ]);
    let request = headers.request("POST", "/a?b");
    let mut check = call(Some(&request));
    check.sni = Some("app.example".into());
    allowed(all.check("a", &check).await);
    let seen = double.seen();
    let (source, destination) = (seen.source.expect("one"), seen.destination.expect("one"));
    assert_eq!(source.principal, "spiffe://cluster.local/ns/a/sa/b");
    assert_eq!(destination.principal, "");
    let socket = |peer: Peer| {
        let address = peer.address.and_then(|a| a.socket_address).expect("one");
        (address.address, address.port_value)
    };
    assert_eq!(socket(source), ("10.0.0.1".into(), Some(4321)));
    assert_eq!(socket(destination), ("2001:db8::1".into(), Some(8080)));
    assert_eq!(seen.tls_session.expect("SNI").sni, "app.example");
    let request = seen.request.expect("a request");
    assert!(request.time.expect("a time").seconds > 1_700_000_000);
    let http = request.http.expect("HTTP");
    assert_eq!(
        (&*http.id, &*http.method, &*http.path),
        ("7", "POST", "/a?b")
    );
    assert_eq!((&*http.host, http.size), ("app.example:80", 17));
    for (name, value) in [("cookie", "a; b"), ("x-a", "1,2"), (":path", "/a?b")] {
        assert_eq!(http.headers[name], value);
    }
}

#[tokio::test]
async fn raw_connections_are_checked_without_a_request() {
    let answer = ok(OkHttpResponse {
        headers: vec![option("x-a", "b")],
        ..OkHttpResponse::default()
    });
    let double = Double::new(answer).await;
    let all = double.authorizers("");
    assert_eq!(allowed(all.check("a", &call(None)).await), Edits::default());
    let seen = double.seen();
    assert_eq!((seen.request, seen.tls_session), (None, None));
    assert!(seen.source.is_some());
}

#[tokio::test]
async fn an_allowing_answer_changes_headers() {
    let appended = HeaderValueOption {
        append: Some(true),
        ..option("x-there", "more")
    };
    let answer = ok(OkHttpResponse {
        headers: vec![
            option("X-Set", "1"),
            option("x-set", "2"),
            appended,
            action("x-there", 1),
            action("x-absent", 1),
            action("x-other", 3),
            option("x-removed", "after all"),
        ],
        headers_to_remove: ["x-gone", "x-removed", ":path", "host"]
            .map(Into::into)
            .into(),
        response_headers_to_add: vec![option("x-ignored", "1")],
        ..OkHttpResponse::default()
    });
    let edits = allowed(answered(answer, "").await);
    assert_eq!(
        shown(&edits.set),
        [
            ("x-set", "2"),
            ("x-there", "sent"),
            ("x-there", "more"),
            ("x-absent", "set")
        ]
    );
    assert_eq!(edits.remove, ["x-gone", "x-removed"]);
}

#[tokio::test]
async fn a_denial_brings_its_own_answer() {
    let denied_with = |code, headers| CheckResponse {
        status: status(7),
        denied_response: Some(DeniedHttpResponse {
            status: Some(HttpStatus { code }),
            headers,
            body: "no".into(),
        }),
        ok_response: None,
    };
    let headers = vec![
        option("Location", "/login"),
        option("set-cookie", "a"),
        option("set-cookie", "b"),
        option("content-length", "99"),
        option("x-bad", "a\r\nb"),
        option("x bad", "a"),
    ];
    let outcome = answered(denied_with(302, headers), "").await;
    assert!(!outcome.failed);
    let reply = denied(outcome);
    assert_eq!((reply.status.as_u16(), &*reply.body), (302, "no"));
    assert_eq!(
        shown(&reply.headers),
        [
            ("location", "/login"),
            ("set-cookie", "a"),
            ("set-cookie", "b")
        ]
    );
    for code in [0, 101, 600, -1] {
        let reply = denied(answered(denied_with(code, Vec::new()), "").await);
        assert_eq!(reply.status, 403, "{code}");
    }
}

#[tokio::test]
async fn only_what_allows_without_doubt_allows() {
    let bare = |code| CheckResponse {
        status: code,
        ..CheckResponse::default()
    };
    assert_eq!(
        allowed(answered(bare(status(0)), "").await),
        Edits::default()
    );
    assert_eq!(denied(answered(bare(status(16)), "").await).status, 403);
    let open = ", failOpen: true";
    for (code, denied_response, ok_response) in [
        (7, None, Some(OkHttpResponse::default())),
        (0, Some(DeniedHttpResponse::default()), None),
    ] {
        let answer = CheckResponse {
            status: status(code),
            denied_response,
            ok_response,
        };
        assert_eq!(denied(answered(answer, open).await).status, 403);
    }
    let silent = answered(bare(None), "").await;
    assert!(silent.failed && silent.reason.contains("no status"));
    assert_eq!(denied(silent).status, 403);
}

#[tokio::test]
async fn changes_that_cannot_be_made_are_failures() {
    let set = |header| OkHttpResponse {
        headers: vec![header],
        ..OkHttpResponse::default()
    };
    for response in [
        set(option(":path", "/admin")),
        set(option("host", "elsewhere")),
        set(option("transfer-encoding", "chunked")),
        set(option("x-a", "a\nb")),
        set(action("x-a", 9)),
        set(HeaderValueOption::default()),
        OkHttpResponse {
            headers_to_remove: vec!["x y".into()],
            ..OkHttpResponse::default()
        },
        OkHttpResponse {
            query_parameters_to_remove: vec!["token".into()],
            ..OkHttpResponse::default()
        },
    ] {
        let outcome = answered(ok(response.clone()), ", statusOnError: 500").await;
        assert!(outcome.failed, "{response:?}");
        assert_eq!(denied(outcome).status, 500);
    }
}

#[tokio::test]
async fn answers_are_bounded() {
    let answer = CheckResponse {
        status: status(0),
        denied_response: Some(DeniedHttpResponse {
            body: "x".repeat(1 << 20),
            ..DeniedHttpResponse::default()
        }),
        ok_response: None,
    };
    assert!(answered(answer, "").await.failed);
}
