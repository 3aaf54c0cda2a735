//! Requests on HTTP/1.1 that two readers could understand differently, or nobody.
//! Each is refused, with the connection, and the application hears nothing of it.

use super::*;

/// A head with this line in it, and then a request that must not become one.
fn with(line: &str) -> Vec<u8> {
    format!("POST /a HTTP/1.1\r\nHost: a.example\r\n{line}\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a.example\r\n\r\n").into_bytes()
}

/// A chunked body of these bytes.
fn chunks(body: &str) -> Vec<u8> {
    format!("POST /a HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n{body}")
        .into_bytes()
}

fn raw(text: &str) -> Vec<u8> {
    text.as_bytes().to_vec()
}

fn cases() -> Vec<(&'static str, Vec<u8>, u16)> {
    let host = "Host: a.example\r\n";
    let line = |line: &str| format!("{line}\r\n{host}\r\n").into_bytes();
    vec![
        // Two framings.
        (
            "length and chunked",
            with("Content-Length: 4\r\nTransfer-Encoding: chunked"),
            400,
        ),
        (
            "chunked and length",
            with("Transfer-Encoding: chunked\r\nContent-Length: 4"),
            400,
        ),
        (
            "length 0 and chunked",
            with("Content-Length: 0\r\nTransfer-Encoding: chunked"),
            400,
        ),
        (
            "two lengths, different",
            with("Content-Length: 4\r\nContent-Length: 5"),
            400,
        ),
        (
            "two lengths, equal",
            with("Content-Length: 4\r\nContent-Length: 4"),
            400,
        ),
        ("a list of lengths", with("Content-Length: 4, 4"), 400),
        (
            "a list of different lengths",
            with("Content-Length: 4,5"),
            400,
        ),
        ("an empty length", with("Content-Length:"), 400),
        ("a length with a plus", with("Content-Length: +4"), 400),
        ("a length with a minus", with("Content-Length: -4"), 400),
        ("a length in hexadecimal", with("Content-Length: 0x4"), 400),
        (
            "a length with a blank in it",
            with("Content-Length: 4 4"),
            400,
        ),
        (
            "a length with an underscore",
            with("Content-Length: 1_0"),
            400,
        ),
        ("a length with a point", with("Content-Length: 4.0"), 400),
        ("a length with a semicolon", with("Content-Length: 4;"), 400),
        ("a quoted length", with("Content-Length: \"4\""), 400),
        (
            "a length that overflows 64 bits",
            with("Content-Length: 18446744073709551620"),
            400,
        ),
        (
            "a length that overflows 63 bits",
            with("Content-Length: 9223372036854775808"),
            400,
        ),
        (
            "an endless length",
            with(&format!("Content-Length: {}", "9".repeat(400))),
            400,
        ),
        (
            "a length with a vertical tab",
            with("Content-Length: \u{b}4"),
            400,
        ),
        (
            "a length in full-width digits",
            with("Content-Length: \u{ff14}"),
            400,
        ),
        ("a length by underscores", with("Content_Length: 4"), 400),
        // Codings.
        ("identity", with("Transfer-Encoding: identity"), 400),
        ("xchunked", with("Transfer-Encoding: xchunked"), 400),
        (
            "chunked, chunked",
            with("Transfer-Encoding: chunked, chunked"),
            400,
        ),
        (
            "chunked, identity",
            with("Transfer-Encoding: chunked, identity"),
            400,
        ),
        (
            "chunked, gzip",
            with("Transfer-Encoding: chunked, gzip"),
            400,
        ),
        (
            "gzip, chunked",
            with("Transfer-Encoding: gzip, chunked"),
            501,
        ),
        ("gzip alone", with("Transfer-Encoding: gzip"), 400),
        (
            "two codings",
            with("Transfer-Encoding: chunked\r\nTransfer-Encoding: identity"),
            400,
        ),
        (
            "chunked twice",
            with("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"),
            400,
        ),
        ("an empty coding", with("Transfer-Encoding:"), 400),
        (
            "a coding with a comma",
            with("Transfer-Encoding: ,chunked"),
            400,
        ),
        (
            "a comma after the coding",
            with("Transfer-Encoding: chunked,"),
            400,
        ),
        (
            "a coding with a vertical tab",
            with("Transfer-Encoding: \u{b}chunked"),
            400,
        ),
        (
            "a coding with a form feed",
            with("Transfer-Encoding: chunked\u{c}"),
            400,
        ),
        (
            "a coding with NUL",
            with("Transfer-Encoding: chunked\0"),
            400,
        ),
        (
            "a coding with a parameter",
            with("Transfer-Encoding: chunked;q=1"),
            400,
        ),
        (
            "a quoted coding",
            with("Transfer-Encoding: \"chunked\""),
            400,
        ),
        (
            "a coding with a no-break space",
            with("Transfer-Encoding:\u{a0}chunked"),
            400,
        ),
        (
            "a coding with a bare CR",
            with("Transfer-Encoding: chun\rked"),
            400,
        ),
        (
            "a coding by underscores",
            with("Transfer_Encoding: chunked"),
            400,
        ),
        (
            "a coding in HTTP/1.0",
            raw(
                "POST / HTTP/1.0\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            ),
            400,
        ),
        // Header lines.
        (
            "a blank before the colon",
            with("Transfer-Encoding : chunked"),
            400,
        ),
        ("a tab before the colon", with("Content-Length\t: 4"), 400),
        ("a folded value", with("X-A: b\r\n chunked"), 400),
        (
            "a folded coding",
            with("Transfer-Encoding:\r\n chunked"),
            400,
        ),
        ("a folded value with a tab", with("X-A: b\r\n\tc"), 400),
        (
            "a blank before the first header",
            raw("GET / HTTP/1.1\r\n Host: a.example\r\n\r\n"),
            400,
        ),
        ("a header without colon", with("X-A"), 400),
        ("a header without name", with(": a"), 400),
        ("a name that is not ASCII", with("X-\u{e9}: a"), 400),
        ("a name with NUL", with("X\0: a"), 400),
        ("a name with a slash", with("X/A: a"), 400),
        ("a name in brackets", with("(X): a"), 400),
        ("a value with NUL", with("X-A: a\0b"), 400),
        ("a value with a bare CR", with("X-A: a\rX-B: b"), 400),
        ("a value with a bell", with("X-A: \u{7}"), 400),
        ("a value with DEL", with("X-A: \u{7f}"), 400),
        ("a value that ends with CR CR LF", with("X-A: a\r"), 400),
        // Lines' ends.
        (
            "bare LF after the request line",
            raw("GET / HTTP/1.1\nHost: a.example\r\n\r\n"),
            400,
        ),
        (
            "bare LF after a header",
            raw("GET / HTTP/1.1\r\nHost: a.example\n\r\n"),
            400,
        ),
        (
            "bare LF at the head's end",
            raw("GET / HTTP/1.1\r\nHost: a.example\r\n\n"),
            400,
        ),
        (
            "bare LF throughout",
            raw("GET / HTTP/1.1\nHost: a.example\n\n"),
            400,
        ),
        (
            "bare CR for a line's end",
            raw("GET / HTTP/1.1\rHost: a.example\r\n\r\n"),
            400,
        ),
        (
            "LF CR",
            raw("GET / HTTP/1.1\n\rHost: a.example\n\r\n\r"),
            400,
        ),
        (
            "an empty line before the request",
            raw("\r\nGET / HTTP/1.1\r\nHost: a.example\r\n\r\n"),
            400,
        ),
        (
            "a bare LF before the request",
            raw("\nGET / HTTP/1.1\r\nHost: a.example\r\n\r\n"),
            400,
        ),
        // Request line.
        (
            "two blanks in the request line",
            line("GET  / HTTP/1.1"),
            400,
        ),
        ("a tab in the request line", line("GET\t/ HTTP/1.1"), 400),
        ("a blank before the method", line(" GET / HTTP/1.1"), 400),
        ("a blank after the version", line("GET / HTTP/1.1 "), 400),
        ("a blank in the path", line("GET /a b HTTP/1.1"), 400),
        ("no version", line("GET /"), 400),
        ("HTTP/0.9", raw("GET /\r\n\r\n"), 400),
        ("HTTP/1.2", line("GET / HTTP/1.2"), 400),
        ("HTTP/2.0", line("GET / HTTP/2.0"), 400),
        ("HTTP/01.1", line("GET / HTTP/01.1"), 400),
        ("HTTP/1.10", line("GET / HTTP/1.10"), 400),
        ("http/1.1", line("GET / http/1.1"), 400),
        ("a method with a bracket", line("GE(T / HTTP/1.1"), 400),
        (
            "the preface, broken",
            raw("PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n"),
            400,
        ),
        ("a path without slash", line("GET a HTTP/1.1"), 400),
        (
            "a path that is not ASCII",
            line("GET /\u{e9} HTTP/1.1"),
            400,
        ),
        ("a path with NUL", line("GET /\0 HTTP/1.1"), 400),
        ("a path with DEL", line("GET /\u{7f} HTTP/1.1"), 400),
        ("an asterisk for GET", line("GET * HTTP/1.1"), 400),
        ("an asterisk and more", line("OPTIONS */a HTTP/1.1"), 400),
        ("authority form", line("GET a.example:80 HTTP/1.1"), 400),
        ("CONNECT", line("CONNECT a.example:80 HTTP/1.1"), 405),
        ("connect", line("connect a.example:80 HTTP/1.1"), 405),
        ("CONNECT with a path", line("CONNECT / HTTP/1.1"), 405),
        // Host.
        ("no Host", raw("GET / HTTP/1.1\r\n\r\n"), 400),
        ("two Hosts", with("Host: b.example"), 400),
        ("two equal Hosts", with("Host: a.example"), 400),
        (
            "two Hosts in HTTP/1.0",
            raw("GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n"),
            400,
        ),
        ("an empty Host", raw("GET / HTTP/1.1\r\nHost:\r\n\r\n"), 400),
        (
            "a Host with userinfo",
            raw("GET / HTTP/1.1\r\nHost: u@a.example\r\n\r\n"),
            400,
        ),
        (
            "a Host with a path",
            raw("GET / HTTP/1.1\r\nHost: a.example/b\r\n\r\n"),
            400,
        ),
        (
            "a Host with a blank",
            raw("GET / HTTP/1.1\r\nHost: a.example b\r\n\r\n"),
            400,
        ),
        (
            "a list of Hosts",
            raw("GET / HTTP/1.1\r\nHost: a.example, b.example\r\n\r\n"),
            400,
        ),
        (
            "a Host with a bad port",
            raw("GET / HTTP/1.1\r\nHost: a.example:8o\r\n\r\n"),
            400,
        ),
        (
            "a Host with two ports",
            raw("GET / HTTP/1.1\r\nHost: a.example:80:80\r\n\r\n"),
            400,
        ),
        (
            "a percent-encoded Host",
            raw("GET / HTTP/1.1\r\nHost: %61.example\r\n\r\n"),
            400,
        ),
        (
            "a Host in open brackets",
            raw("GET / HTTP/1.1\r\nHost: [::1\r\n\r\n"),
            400,
        ),
        (
            "a target of another host",
            line("GET http://b.example/ HTTP/1.1"),
            400,
        ),
        (
            "a target with userinfo",
            line("GET http://u@a.example/ HTTP/1.1"),
            400,
        ),
        (
            "a target with another port",
            line("GET http://a.example:81/ HTTP/1.1"),
            400,
        ),
        (
            "a target without authority",
            line("GET http:///a HTTP/1.1"),
            400,
        ),
        (
            "a target of another scheme",
            line("GET ftp://a.example/ HTTP/1.1"),
            400,
        ),
        (
            "a file as target",
            line("GET file:///etc/passwd HTTP/1.1"),
            400,
        ),
        // Connection.
        ("Connection names Host", with("Connection: host"), 400),
        (
            "Connection names the length",
            with("Connection: Content-Length"),
            400,
        ),
        (
            "Connection names the coding",
            with("Connection: close, transfer-encoding"),
            400,
        ),
        (
            "Connection names credentials",
            with("Connection: Authorization"),
            400,
        ),
        ("Connection names cookies", with("Connection: cookie"), 400),
        (
            "Connection names the client",
            with("Connection: X-Forwarded-For"),
            400,
        ),
        (
            "Connection names Forwarded",
            with("Connection: forwarded"),
            400,
        ),
        (
            "Connection names a pseudo-header",
            with("Connection: :path"),
            400,
        ),
        (
            "Connection is no list of tokens",
            with("Connection: a b"),
            400,
        ),
        ("an expectation nobody knows", with("Expect: 200-ok"), 417),
        ("two expectations", with("Expect: 100-continue, x"), 417),
        // Chunks.
        (
            "a chunk's size is empty",
            chunks("\r\nabc\r\n0\r\n\r\n"),
            400,
        ),
        (
            "a chunk's size is not a number",
            chunks("g\r\nabc\r\n0\r\n\r\n"),
            400,
        ),
        (
            "a chunk's size has a sign",
            chunks("+3\r\nabc\r\n0\r\n\r\n"),
            400,
        ),
        (
            "a chunk's size has a minus",
            chunks("-3\r\nabc\r\n0\r\n\r\n"),
            400,
        ),
        (
            "a chunk's size has 0x",
            chunks("0x3\r\nabc\r\n0\r\n\r\n"),
            400,
        ),
        (
            "a chunk's size overflows",
            chunks("10000000000000003\r\nabc\r\n0\r\n\r\n"),
            400,
        ),
        (
            "a chunk's size has seventeen digits",
            chunks("00000000000000003\r\nabc\r\n0\r\n\r\n"),
            400,
        ),
        (
            "a chunk's size is negative to some",
            chunks("ffffffffffffffff\r\nabc\r\n0\r\n\r\n"),
            400,
        ),
        (
            "a blank before a chunk's size",
            chunks(" 3\r\nabc\r\n0\r\n\r\n"),
            400,
        ),
        (
            "a blank after a chunk's size",
            chunks("3 \r\nabc\r\n0\r\n\r\n"),
            400,
        ),
        (
            "bare LF after a chunk's size",
            chunks("3\nabc\r\n0\r\n\r\n"),
            400,
        ),
        (
            "bare CR after a chunk's size",
            chunks("3\rabc\r\n0\r\n\r\n"),
            400,
        ),
        ("bare LF after a chunk", chunks("3\r\nabc\n0\r\n\r\n"), 400),
        (
            "a chunk is longer than it says",
            chunks("3\r\nabcd\r\n0\r\n\r\n"),
            400,
        ),
        (
            "a chunk is shorter than it says",
            chunks("5\r\nabc\r\n0\r\n\r\n"),
            400,
        ),
        (
            "bare LF in an extension",
            chunks("3;a\nb\r\nabc\r\n0\r\n\r\n"),
            400,
        ),
        (
            "bare CR in an extension",
            chunks("3;a\rb\r\nabc\r\n0\r\n\r\n"),
            400,
        ),
        (
            "bare LF in a quoted extension",
            chunks("3;a=\"\n\"\r\nabc\r\n0\r\n\r\n"),
            400,
        ),
        (
            "an extension without name",
            chunks("3;\r\nabc\r\n0\r\n\r\n"),
            400,
        ),
        (
            "an extension that is not ASCII",
            chunks("3;\u{e9}\r\nabc\r\n0\r\n\r\n"),
            400,
        ),
        (
            "an open quotation",
            chunks("3;a=\"b\r\nabc\r\n0\r\n\r\n"),
            400,
        ),
        (
            "endless extensions",
            chunks(&format!("3;{}\r\nabc\r\n0\r\n\r\n", "a".repeat(5000))),
            400,
        ),
        (
            "a trailer frames",
            chunks("0\r\nContent-Length: 4\r\n\r\n"),
            400,
        ),
        (
            "a trailer codes",
            chunks("0\r\nTransfer-Encoding: chunked\r\n\r\n"),
            400,
        ),
        (
            "a trailer names a host",
            chunks("0\r\nHost: b.example\r\n\r\n"),
            400,
        ),
        (
            "a trailer has credentials",
            chunks("0\r\nAuthorization: Bearer a\r\n\r\n"),
            400,
        ),
        (
            "a trailer has cookies",
            chunks("0\r\nCookie: a=b\r\n\r\n"),
            400,
        ),
        (
            "a trailer says who the client is",
            chunks("0\r\nX-Forwarded-For: 1.2.3.4\r\n\r\n"),
            400,
        ),
        (
            "a trailer is folded",
            chunks("0\r\nX-A: b\r\n c\r\n\r\n"),
            400,
        ),
        ("a trailer with bare LF", chunks("0\r\nX-A: b\n\r\n"), 400),
        ("bare LF for the last line", chunks("0\r\n\n"), 400),
        ("a trailer without colon", chunks("0\r\nX-A\r\n\r\n"), 400),
        (
            "too many trailers",
            chunks(&format!("0\r\n{}\r\n", "X-A: b\r\n".repeat(65))),
            431,
        ),
        // Sizes.
        (
            "an endless path",
            line(&format!("GET /{} HTTP/1.1", "a".repeat(17000))),
            414,
        ),
        (
            "an endless value",
            with(&format!("X-A: {}", "a".repeat(17000))),
            431,
        ),
        ("too many headers", with(&["X-A: b"; 64].join("\r\n")), 431),
    ]
}

#[tokio::test]
async fn refused_and_nothing_of_it_forwarded() {
    let cases = cases();
    assert!(cases.len() > 120);
    for (name, bytes, expected) in cases {
        let (address, heard) = recorder().await;
        let (mut client, agent) = Agent::start(Speaks::Http1, limits(), Some(address)).await;
        send(&mut client, &bytes).await;
        let (answer, orderly) = read_to_end(&mut client).await;
        assert_eq!(status(&answer), expected, "{name}");
        assert!(orderly, "{name}");
        let text = String::from_utf8_lossy(&answer).to_lowercase();
        assert_eq!(text.matches("content-type: ").count(), 1, "{name}: {text}");
        assert!(text.contains("\r\nconnection: close\r\n"), "{name}: {text}");
        drop(client);
        let notes = agent.notes.clone();
        assert!(
            matches!(agent.ended().await, Err(HttpError::Malformed(_))),
            "{name}"
        );
        assert_eq!(
            *notes.malformed.lock().expect("no panic"),
            [expected],
            "{name}"
        );
        assert_eq!(*heard.lock().expect("no panic"), b"", "{name}");
        assert_eq!(notes.dials.load(Ordering::SeqCst), 0, "{name}");
    }
}

/// Byte by byte they are refused as well: the verdict does not depend on how the
/// bytes are cut. (What is malformed within a body is known only after the head.)
#[tokio::test]
async fn refused_however_it_is_cut() {
    for (name, bytes, expected) in cases() {
        if bytes.len() > 1000 || bytes.windows(21).any(|w| w == b"coding: chunked\r\n\r\n") {
            continue;
        }
        let mut buffer = BytesMut::new();
        let refused = bytes.iter().find_map(|byte| {
            buffer.extend_from_slice(&[*byte]);
            super::super::head::parse(&mut buffer, &limits()).transpose()
        });
        match refused {
            Some(Err(bad)) => assert_eq!(bad.status.as_u16(), expected, "{name}"),
            Some(Ok(head)) => assert_eq!(head.body, super::super::head::Body::Chunked, "{name}"),
            None => panic!("{name} is not refused"),
        }
    }
}

/// What comes after a good request is refused as well, and its answer comes last.
#[tokio::test]
async fn a_malformed_request_behind_a_good_one() {
    let (address, _task) = application(|mut stream| async move {
        let head = read_head(&mut stream).await;
        assert!(head.starts_with("GET /good "));
        send(
            &mut stream,
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        )
        .await;
        let (rest, _) = read_to_end(&mut stream).await;
        assert_eq!(rest, b"");
    })
    .await;
    let (mut client, agent) = Agent::start(Speaks::Http1, limits(), Some(address)).await;
    send(
        &mut client,
        "GET /good HTTP/1.1\r\nHost: a\r\n\r\nGET /bad HTTP/1.1\nHost: a\n\n",
    )
    .await;
    let (answers, orderly) = read_to_end(&mut client).await;
    let answers = String::from_utf8(answers).expect("ASCII");
    assert!(answers.starts_with("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 400 "));
    assert!(orderly);
    drop(client);
    assert!(matches!(agent.ended().await, Err(HttpError::Malformed(_))));
}

/// A chunk that turns out bad after its request has begun: the application must not
/// take what it has for the whole.
#[tokio::test]
async fn a_bad_chunk_later_breaks_the_application() {
    let (told, mut end) = tokio::sync::mpsc::channel(1);
    let (address, _task) = application(move |mut stream| {
        let told = told.clone();
        async move {
            read_until(&mut stream, b"3\r\nabc\r\n").await;
            let (rest, orderly) = read_to_end(&mut stream).await;
            told.send((rest, orderly)).await.expect("the test waits");
        }
    })
    .await;
    let (mut client, agent) = Agent::start(Speaks::Http1, limits(), Some(address)).await;
    send(&mut client, chunks("3\r\nabc\r\n")).await;
    while agent.notes.live.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    send(&mut client, "zz\r\n0\r\n\r\n").await;
    assert_eq!(status(&read_to_end(&mut client).await.0), 400);
    assert_eq!(end.recv().await, Some((Vec::new(), false)));
}
