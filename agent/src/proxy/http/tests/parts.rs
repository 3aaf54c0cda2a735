//! Tables for what has no I/O: sniffing, heads, chunks.

use super::{
    super::{Protocol, chunked::Decoder, classify, head},
    *,
};

#[test]
fn sniffing() {
    use Protocol::{Http1, Http2, NotHttp};
    let long = "a".repeat(200);
    for (bytes, expected) in [
        ("", None),
        ("P", None),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r", None),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Some(Http2)),
        ("PRI * HTTP/2.0\r\n\r\nXX", Some(Http1)),
        ("PRX", None),
        ("GET", None),
        ("GET / HTTP/1.1\r\n", Some(Http1)),
        ("GET /", Some(Http1)),
        ("get\t/", Some(Http1)),
        ("\r\n \tGET /", Some(Http1)),
        ("GET /a\r\n", Some(Http1)),
        ("OPTIONS *", Some(Http1)),
        ("GET http://a/", Some(Http1)),
        ("CONNECT a:80 HTTP/1.1\r\n", Some(Http1)),
        ("CONNECT a:80 hTTp/1.1", Some(Http1)),
        ("GET a", None),
        ("GET a b c\r\n", Some(NotHttp)),
        ("SET key 0 0 3\r\n", Some(NotHttp)),
        ("EHLO a.example\r\n", Some(NotHttp)),
        ("PING\r\n", Some(NotHttp)),
        ("*3\r\n$3\r\nSET\r\n", Some(NotHttp)),
        ("\x16\x03\x01\x02\0", Some(NotHttp)),
        ("\0\0\0\x08\x04\u{d2}\x16/", Some(NotHttp)),
        ("SSH-2.0-OpenSSH_9.6\r\n", Some(NotHttp)),
        ("{\"a\": 1}", Some(NotHttp)),
        (long.as_str(), Some(Http1)),
    ] {
        assert_eq!(classify(bytes.as_bytes(), 100), expected, "{bytes:?}");
    }
}

#[tokio::test]
async fn sniffing_a_connection() {
    for (bytes, expected) in [
        ("GET / HTTP/1.1\r\n", Protocol::Http1),
        ("GET a", Protocol::NotHttp),
        ("PRI * HT", Protocol::Http1),
        ("", Protocol::NotHttp),
    ] {
        let (mut client, accepted) = pair().await;
        send(&mut client, bytes).await;
        client.shutdown().await.expect("a socket");
        let mut io = Io::new(End::Tcp(accepted), BytesMut::new());
        let sniffed = super::super::sniff(&mut io, &limits()).await;
        assert_eq!(sniffed.expect("no error"), expected, "{bytes:?}");
        assert_eq!(io.into_end().1, bytes, "nothing is lost");
    }
}

/// What the application gets of a head.
fn forwarded(text: &str, edits: &Edits) -> String {
    let mut buffer = BytesMut::from(text);
    let head = head::parse(&mut buffer, &limits())
        .unwrap_or_else(|bad| panic!("{text:?}: {bad}"))
        .expect("it is complete");
    assert_eq!(buffer, "", "{text:?}");
    let mut out = BytesMut::new();
    head.write(edits, &mut out);
    String::from_utf8(out.to_vec()).expect("ASCII")
}

#[test]
fn heads_as_the_application_gets_them() {
    for (sent, got) in [
        // As it is, in the client's spelling.
        (
            "GET /a?b=%20 HTTP/1.1\r\nhOSt: A.example:80\r\nX-a:  b c\t\r\nX-Empty:\r\nAccept: */*\r\n\r\n",
            "GET /a?b=%20 HTTP/1.1\r\nhOSt: A.example:80\r\nX-a: b c\r\nX-Empty: \r\nAccept: */*\r\n\r\n",
        ),
        // Absolute form becomes origin form.
        (
            "GET HTTP://a.example/x HTTP/1.1\r\nHost: A.EXAMPLE\r\n\r\n",
            "GET /x HTTP/1.1\r\nHost: A.EXAMPLE\r\n\r\n",
        ),
        (
            "GET http://a?x HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET /?x HTTP/1.1\r\nHost: a\r\n\r\n",
        ),
        (
            "GET https://a HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        ),
        (
            "OPTIONS http://a HTTP/1.1\r\nHost: a\r\n\r\n",
            "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
        ),
        (
            "OPTIONS * HTTP/1.1\r\nHost: [::1]:80\r\n\r\n",
            "OPTIONS * HTTP/1.1\r\nHost: [::1]:80\r\n\r\n",
        ),
        // Between client and agent only.
        (
            "GET / HTTP/1.1\r\nHost: a\r\nConnection: close, X-Hop\r\nX-Hop: 1\r\nX-End: 2\r\nKeep-Alive: 5\r\nProxy-Connection: x\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nX-End: 2\r\nConnection: close\r\n\r\n",
        ),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nTE: gzip, trailers\r\nConnection: TE\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nConnection: TE\r\n\r\n",
        ),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nTE: gzip\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        ),
        // An upgrade passes, but none to what carries requests.
        (
            "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        ),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\nHTTP2-Settings: AAA\r\nConnection: Upgrade, HTTP2-Settings\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        ),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: HTTP/2.0, foo/1, TLS/1.2\r\nConnection: upgrade\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: foo/1\r\nConnection: Upgrade\r\n\r\n",
        ),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        ),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: upgrade\r\nContent-Length: 1\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n",
        ),
        // HTTP/1.0.
        ("GET / HTTP/1.0\r\n\r\n", "GET / HTTP/1.0\r\n\r\n"),
        (
            "GET / HTTP/1.0\r\nHost: a\r\nConnection: Keep-Alive\r\nExpect: 100-continue\r\n\r\n",
            "GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n",
        ),
    ] {
        assert_eq!(forwarded(sent, &Edits::default()), got, "{sent:?}");
    }
}

#[test]
fn edits() {
    let name = HeaderName::from_static;
    let edits = Edits {
        remove: vec![name("x-a"), name("content-length")],
        set: vec![
            (name("x-b"), HeaderValue::from_static("new")),
            (name("transfer-encoding"), HeaderValue::from_static("x")),
        ],
        path: Some("/new".into()),
    };
    assert_eq!(
        forwarded(
            "PUT /old HTTP/1.1\r\nHost: a\r\nX-A: 1\r\nX_A: 2\r\nX-B: 3\r\nx_b: 4\r\nX-C: 5\r\nContent-Length: 1\r\n\r\n",
            &edits
        ),
        "PUT /new HTTP/1.1\r\nHost: a\r\nX-C: 5\r\nContent-Length: 1\r\nx-b: new\r\n\r\n",
        "framing is not edited, and what is edited cannot be spelled with underscores"
    );
}

#[test]
fn chunks_however_they_are_cut() {
    let body = b"4\r\nWiki\r\n0005;a=b;c=\"d;\\\" e\"\r\npedia\r\nE\r\n in\r\n\r\nchunks.\r\n0\r\nX-Sum: 1\r\n\r\nrest";
    for step in 1..body.len() {
        let mut decoder = Decoder::request(&limits());
        let (mut data, mut at) = (Vec::new(), 0);
        while !decoder.is_done() {
            let input = &body[at..body.len().min(at + step)];
            let read = decoder.decode(input).expect("it is well-formed");
            data.extend_from_slice(&input[read.data]);
            at += read.consumed;
        }
        assert_eq!(data, b"Wikipedia in\r\n\r\nchunks.");
        assert_eq!(&body[at..], b"rest");
        assert_eq!(decoder.trailers().len(), 1);
        assert_eq!(decoder.trailers()[0].value, "1");
    }
}

#[test]
fn bounds_of_a_chunked_body() {
    let limits = limits();
    let trailer = format!("0\r\nX-A: {}\r\n\r\n", "a".repeat(limits.head_bytes));
    let bad = Decoder::response(&limits).decode(trailer.as_bytes());
    assert_eq!(bad.expect_err("it is too long").status, 431);
    // Extensions of all chunks together.
    let mut decoder = Decoder::request(&limits);
    let refused = (0..5000).position(|_| {
        let mut rest: &[u8] = b"1;a=b\r\nx\r\n";
        while !rest.is_empty() {
            match decoder.decode(rest) {
                Ok(step) => rest = &rest[step.consumed..],
                Err(_) => return true,
            }
        }
        false
    });
    assert_eq!(refused, Some(1024));
}
