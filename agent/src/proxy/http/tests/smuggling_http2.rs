//! As on HTTP/1.1: requests on HTTP/2 that must not reach an application, among them
//! those that would turn into something else on HTTP/1.1.

use super::{
    frames::{
        CONTINUATION, DATA, END_HEADERS, END_STREAM, Fate, HEADERS, PREFACE, SETTINGS, any_ends,
        block, fate, frame,
    },
    *,
};

type Fields = Vec<(Vec<u8>, Vec<u8>)>;

fn fields(list: &[(&str, &str)]) -> Fields {
    let bytes = |text: &str| text.as_bytes().to_vec();
    list.iter().map(|(n, v)| (bytes(n), bytes(v))).collect()
}

const GET: [(&str, &str); 4] = [
    (":method", "GET"),
    (":scheme", "http"),
    (":authority", "a.example"),
    (":path", "/a"),
];

/// A request with these headers, too.
fn with(more: &[(&str, &str)]) -> Fields {
    fields(&[&GET[..], more].concat())
}

/// With this pseudo-header instead.
fn but(name: &str, value: &str) -> Fields {
    let mut list = GET;
    for field in &mut list {
        if field.0 == name {
            *field = (name, value);
        }
    }
    fields(&list)
}

fn without(name: &str) -> Fields {
    let list: Vec<_> = GET.into_iter().filter(|(n, _)| *n != name).collect();
    fields(&list)
}

fn encoded(fields: &Fields) -> Vec<u8> {
    let list: Vec<_> = fields.iter().map(|(n, v)| (&n[..], &v[..])).collect();
    block(&list)
}

fn bodiless(fields: &Fields) -> Vec<u8> {
    frame(HEADERS, END_STREAM | END_HEADERS, 1, &encoded(fields))
}

/// With a body in these frames; the last one ends the stream.
fn bodied(fields: &Fields, data: &[&str]) -> Vec<u8> {
    let mut frames = frame(HEADERS, END_HEADERS, 1, &encoded(fields));
    for (n, data_) in data.iter().enumerate() {
        let flags = if n + 1 == data.len() { END_STREAM } else { 0 };
        frames.extend(frame(DATA, flags, 1, data_.as_bytes()));
    }
    frames
}

fn trailed(trailers: &[(&str, &str)]) -> Vec<u8> {
    let mut frames = bodied(&with(&[]), &["abc", ""]);
    frames.truncate(frames.len() - 9);
    frames.extend(frame(
        HEADERS,
        END_STREAM | END_HEADERS,
        1,
        &encoded(&fields(trailers)),
    ));
    frames
}

fn cases() -> Vec<(&'static str, Vec<u8>)> {
    let long = "a".repeat(17_000);
    let mut many = with(&[]);
    many.extend((0..65).map(|n| (format!("x-{n}").into_bytes(), b"b".to_vec())));
    vec![
        (
            "CR LF in a value",
            bodiless(&with(&[("x-a", "b\r\nx-b: c")])),
        ),
        (
            "a request in a value",
            bodiless(&with(&[(
                "x-a",
                "b\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: a",
            )])),
        ),
        ("LF in a value", bodiless(&with(&[("x-a", "b\nx-b: c")]))),
        ("CR in a value", bodiless(&with(&[("x-a", "b\rc")]))),
        ("NUL in a value", bodiless(&with(&[("x-a", "b\0c")]))),
        ("a blank before a value", bodiless(&with(&[("x-a", " b")]))),
        ("a tab after a value", bodiless(&with(&[("x-a", "b\t")]))),
        (
            "CR LF in a name",
            bodiless(&with(&[("x-a: b\r\nx-c", "d")])),
        ),
        ("a colon in a name", bodiless(&with(&[("x-a: b", "d")]))),
        ("a blank in a name", bodiless(&with(&[("x a", "d")]))),
        ("an empty name", bodiless(&with(&[("", "d")]))),
        ("an uppercase name", bodiless(&with(&[("X-A", "d")]))),
        (
            "an uppercase coding",
            bodiless(&with(&[("Transfer-Encoding", "chunked")])),
        ),
        (
            "transfer-encoding: chunked",
            bodied(&with(&[("transfer-encoding", "chunked")]), &["0\r\n\r\n"]),
        ),
        (
            "transfer-encoding: identity",
            bodiless(&with(&[("transfer-encoding", "identity")])),
        ),
        (
            "transfer_encoding",
            bodiless(&with(&[("transfer_encoding", "chunked")])),
        ),
        ("connection", bodiless(&with(&[("connection", "close")]))),
        (
            "connection names a header",
            bodiless(&with(&[("connection", "authorization")])),
        ),
        ("keep-alive", bodiless(&with(&[("keep-alive", "5")]))),
        (
            "proxy-connection",
            bodiless(&with(&[("proxy-connection", "close")])),
        ),
        ("upgrade", bodiless(&with(&[("upgrade", "websocket")]))),
        ("te: gzip", bodiless(&with(&[("te", "gzip")]))),
        (
            "te: trailers, gzip",
            bodiless(&with(&[("te", "trailers, gzip")])),
        ),
        (
            "length without body",
            bodiless(&with(&[("content-length", "4")])),
        ),
        (
            "body shorter than its length",
            bodied(&with(&[("content-length", "4")]), &["abc"]),
        ),
        (
            "body longer than its length",
            bodied(&with(&[("content-length", "4")]), &["abcde"]),
        ),
        (
            "length 0 with a body",
            bodied(
                &with(&[("content-length", "0")]),
                &["GET /smuggled HTTP/1.1\r\n\r\n"],
            ),
        ),
        (
            "two lengths",
            bodied(
                &with(&[("content-length", "4"), ("content-length", "5")]),
                &["abcd"],
            ),
        ),
        (
            "two equal lengths",
            bodied(
                &with(&[("content-length", "4"), ("content-length", "4")]),
                &["abcd"],
            ),
        ),
        (
            "a list of lengths",
            bodied(&with(&[("content-length", "4, 4")]), &["abcd"]),
        ),
        (
            "a length with a plus",
            bodied(&with(&[("content-length", "+4")]), &["abcd"]),
        ),
        (
            "an empty length",
            bodied(&with(&[("content-length", "")]), &["abcd"]),
        ),
        (
            "an endless length",
            bodied(
                &with(&[("content-length", "99999999999999999999")]),
                &["abcd"],
            ),
        ),
        (
            "content_length",
            bodied(&with(&[("content_length", "4")]), &["abcd"]),
        ),
        (
            "an expectation nobody knows",
            bodiless(&with(&[("expect", "x")])),
        ),
        ("no method", bodiless(&without(":method"))),
        ("an empty method", bodiless(&but(":method", ""))),
        (
            "a request in the method",
            bodiless(&but(":method", "GET / HTTP/1.1\r\nhost: a\r\n\r\nGET")),
        ),
        (
            "a method with a blank",
            bodiless(&but(":method", "GET /smuggled")),
        ),
        (
            "CONNECT",
            bodiless(&fields(&[
                (":method", "CONNECT"),
                (":authority", "a.example:80"),
            ])),
        ),
        ("CONNECT with a path", bodiless(&but(":method", "CONNECT"))),
        ("connect", bodiless(&but(":method", "connect"))),
        ("PRI", bodiless(&but(":method", "PRI"))),
        (
            "extended CONNECT",
            bodiless(&fields(&[
                (":method", "CONNECT"),
                (":protocol", "websocket"),
                (":scheme", "http"),
                (":authority", "a.example"),
                (":path", "/a"),
            ])),
        ),
        (
            ":protocol without CONNECT",
            bodiless(&[fields(&[(":protocol", "websocket")]), with(&[])].concat()),
        ),
        ("no path", bodiless(&without(":path"))),
        ("an empty path", bodiless(&but(":path", ""))),
        ("a path without slash", bodiless(&but(":path", "a"))),
        (
            "an absolute path",
            bodiless(&but(":path", "http://a.example/a")),
        ),
        ("an asterisk for GET", bodiless(&but(":path", "*"))),
        ("a query for a path", bodiless(&but(":path", "?a"))),
        (
            "a blank in the path",
            bodiless(&but(":path", "/a HTTP/1.1")),
        ),
        (
            "CR LF in the path",
            bodiless(&but(":path", "/a HTTP/1.1\r\nhost: b\r\n\r\n")),
        ),
        ("NUL in the path", bodiless(&but(":path", "/\0"))),
        (
            "a path that is not ASCII",
            bodiless(&but(":path", "/\u{e9}")),
        ),
        ("no scheme", bodiless(&without(":scheme"))),
        ("another scheme", bodiless(&but(":scheme", "ftp"))),
        (
            "a scheme with more in it",
            bodiless(&but(":scheme", "http://a.example/b?")),
        ),
        ("no authority", bodiless(&without(":authority"))),
        ("an empty authority", bodiless(&but(":authority", ""))),
        (
            "an authority with userinfo",
            bodiless(&but(":authority", "u@a.example")),
        ),
        (
            "an authority with a path",
            bodiless(&but(":authority", "a.example/b")),
        ),
        (
            "an authority with CR LF",
            bodiless(&but(":authority", "a\r\nx: y")),
        ),
        (
            "an authority with a blank",
            bodiless(&but(":authority", "a b")),
        ),
        (
            "an authority with a bad port",
            bodiless(&but(":authority", "a.example:b")),
        ),
        (
            "a percent-encoded authority",
            bodiless(&but(":authority", "%61.example")),
        ),
        (
            "host is not the authority",
            bodiless(&with(&[("host", "b.example")])),
        ),
        (
            "host has another port",
            bodiless(&with(&[("host", "a.example:81")])),
        ),
        (
            "two hosts",
            bodiless(&with(&[("host", "a.example"), ("host", "a.example")])),
        ),
        (
            "host with userinfo",
            bodiless(&[without(":authority"), fields(&[("host", "u@a")])].concat()),
        ),
        (
            "two methods",
            bodiless(&[fields(&[(":method", "POST")]), with(&[])].concat()),
        ),
        (
            "two paths",
            bodiless(&[fields(&[(":path", "/b")]), with(&[])].concat()),
        ),
        (
            "two authorities",
            bodiless(&[fields(&[(":authority", "b")]), with(&[])].concat()),
        ),
        (
            "two schemes",
            bodiless(&[fields(&[(":scheme", "http")]), with(&[])].concat()),
        ),
        (
            "a pseudo-header after a header",
            bodiless(&[fields(&[("x-a", "b")]), with(&[])].concat()),
        ),
        (
            "an unknown pseudo-header",
            bodiless(&[fields(&[(":x", "b")]), with(&[])].concat()),
        ),
        (
            "a response's pseudo-header",
            bodiless(&[fields(&[(":status", "200")]), with(&[])].concat()),
        ),
        ("a trailer frames", trailed(&[("content-length", "3")])),
        (
            "a trailer codes",
            trailed(&[("transfer-encoding", "chunked")]),
        ),
        (
            "a trailer has credentials",
            trailed(&[("authorization", "Bearer a")]),
        ),
        (
            "a trailer says who the client is",
            trailed(&[("x-forwarded-for", "1.2.3.4")]),
        ),
        ("a trailer with CR LF", trailed(&[("x-a", "b\r\nc: d")])),
        ("a trailer is uppercase", trailed(&[("X-A", "b")])),
        ("too many headers", bodiless(&many)),
        ("an endless value", bodiless_long(&long)),
        (
            "data before headers",
            frame(DATA, END_STREAM, 1, b"GET / HTTP/1.1\r\n\r\n"),
        ),
        (
            "an even stream",
            frame(HEADERS, END_STREAM | END_HEADERS, 2, &encoded(&with(&[]))),
        ),
        (
            "a continuation of nothing",
            frame(CONTINUATION, END_HEADERS, 1, &encoded(&with(&[]))),
        ),
        (
            "a data frame within a header block",
            [
                frame(HEADERS, 0, 1, &encoded(&with(&[]))),
                frame(DATA, END_STREAM, 1, b"abc"),
            ]
            .concat(),
        ),
        (
            "a header block that is no HPACK",
            frame(HEADERS, END_STREAM | END_HEADERS, 1, &[0xff; 12]),
        ),
    ]
}

/// In two frames: one is too small for it.
fn bodiless_long(value: &str) -> Vec<u8> {
    let block = encoded(&with(&[("x-a", value)]));
    let (first, rest) = block.split_at(16_000);
    let mut frames = frame(HEADERS, END_STREAM, 1, first);
    frames.extend(frame(CONTINUATION, END_HEADERS, 1, rest));
    frames
}

fn opening() -> Vec<u8> {
    [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()
}

#[tokio::test]
async fn refused_and_nothing_of_it_forwarded() {
    let cases = cases();
    assert!(cases.len() > 80);
    for (name, frames) in cases {
        let (address, heard) = recorder().await;
        let (mut client, agent) = Agent::start(Speaks::Http2, limits(), Some(address)).await;
        send(&mut client, [opening(), frames].concat()).await;
        let stream = if name == "an even stream" { 2 } else { 1 };
        match fate(&mut client, stream).await {
            Fate::Status(status) => assert!((400..500).contains(&status), "{name}: {status}"),
            Fate::Reset(0) | Fate::GoAway(0) => panic!("{name} is no error"),
            Fate::Reset(_) | Fate::GoAway(_) | Fate::Closed => {}
        }
        drop(client);
        let _ended = agent.ended().await;
        let heard = heard.lock().expect("no panic");
        // A trailer comes when all else is on its way: the stream is never completed.
        if name.contains("trailer") {
            assert!(!any_ends(&heard), "{name}");
        } else {
            assert_eq!(*heard, b"", "{name}");
        }
    }
}

/// The table's own check: what it builds on is served.
#[tokio::test]
async fn the_same_without_a_fault_is_forwarded() {
    for frames in [
        bodiless(&with(&[])),
        bodiless(&with(&[("te", "trailers"), ("host", "A.example")])),
        bodiless(&[without(":authority"), fields(&[("host", "a")])].concat()),
        bodied(&with(&[("content-length", "6")]), &["abc", "def"]),
        trailed(&[("x-sum", "1")]),
    ] {
        let (address, heard) = recorder().await;
        let (mut client, _agent) = Agent::start(Speaks::Http2, limits(), Some(address)).await;
        send(&mut client, [opening(), frames].concat()).await;
        timeout(PATIENCE, async {
            while !heard.lock().expect("no panic").starts_with(PREFACE) {
                tokio::task::yield_now().await;
            }
        })
        .await
        .expect("it is forwarded");
    }
}

/// One stream's fault is not another's.
#[tokio::test]
async fn a_refused_stream_leaves_the_connection() {
    let (mut client, _agent) = Agent::start(Speaks::Http2, limits(), None).await;
    send(
        &mut client,
        [opening(), bodiless(&with(&[("host", "b")]))].concat(),
    )
    .await;
    assert_eq!(fate(&mut client, 1).await, Fate::Status(400));
    let next = encoded(&but(":path", "/denied"));
    send(
        &mut client,
        frame(HEADERS, END_STREAM | END_HEADERS, 3, &next),
    )
    .await;
    assert_eq!(fate(&mut client, 3).await, Fate::Status(403));
}

/// CVE-2023-44487: opened and reset, over and over.
#[tokio::test]
async fn rapid_resets_end_the_connection() {
    let (address, _heard) = recorder().await;
    let (mut client, _agent) = Agent::start(Speaks::Http2, limits(), Some(address)).await;
    send(&mut client, opening()).await;
    let headers = encoded(&with(&[]));
    for n in 0..200u32 {
        let stream = 2 * n + 1;
        let mut frames = frame(HEADERS, END_STREAM | END_HEADERS, stream, &headers);
        frames.extend(frame(super::frames::RESET, 0, stream, &8u32.to_be_bytes()));
        if client.write_all(&frames).await.is_err() {
            break;
        }
        if n % 8 == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    let fate = fate(&mut client, u32::MAX).await;
    assert!(matches!(fate, Fate::GoAway(11) | Fate::Closed), "{fate:?}");
}

/// A header block that never ends.
#[tokio::test]
async fn a_slow_header_block() {
    for started in [
        PREFACE[..10].to_vec(),
        [
            opening(),
            frame(HEADERS, END_STREAM, 1, &encoded(&with(&[]))),
        ]
        .concat(),
        [opening(), bodiless(&with(&[]))[..20].to_vec()].concat(),
    ] {
        let limits = Limits {
            head_timeout: Duration::from_millis(100),
            ..limits()
        };
        let (mut client, agent) = Agent::start(Speaks::Http2, limits, None).await;
        send(&mut client, started).await;
        assert_eq!(fate(&mut client, 1).await, Fate::Closed);
        assert!(matches!(agent.ended().await, Err(HttpError::Client(_))));
    }
}
