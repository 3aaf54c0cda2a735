//! What HTTP/1 must be able to do through the agent.

use super::*;

const GET: &str = "GET /a HTTP/1.1\r\nHost: a.example\r\n\r\n";

/// Answers each request with its own path, without looking at bodies.
async fn echo_path() -> std::net::SocketAddr {
    let (address, _task) = application(|mut stream| async move {
        let mut head = Vec::new();
        while let Ok(byte) = stream.read_u8().await {
            head.push(byte);
            if head.ends_with(b"\r\n\r\n") {
                let text = String::from_utf8_lossy(&head).into_owned();
                let path = text.split(' ').nth(1).expect("a path").to_owned();
                let length = path.len();
                let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{path}");
                send(&mut stream, answer).await;
                head.clear();
            }
        }
    })
    .await;
    address
}

/// Runs one connection of an application by a script.
async fn scripted<F>(script: impl Fn(TcpStream) -> F + Send + 'static) -> (TcpStream, Agent)
where
    F: Future<Output = ()> + Send + 'static,
{
    let (address, _task) = application(script).await;
    Agent::start(Speaks::Http1, limits(), Some(address)).await
}

#[tokio::test]
async fn keep_alive_on_one_connection() {
    let (mut client, agent) = Agent::start(Speaks::Http1, limits(), Some(echo_path().await)).await;
    for path in ["/1", "/2", "/3"] {
        send(
            &mut client,
            format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n"),
        )
        .await;
        let head = read_head(&mut client).await;
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"));
        assert_eq!(read_exact(&mut client, 2).await, path.as_bytes());
    }
    drop(client);
    let (notes, counters) = (agent.notes.clone(), agent.counters.clone());
    agent.ended().await.expect("in order");
    assert_eq!(notes.dials.load(Ordering::SeqCst), 1);
    assert_eq!(*notes.answered.lock().expect("no panic"), [200, 200, 200]);
    assert_eq!(notes.live.load(Ordering::SeqCst), 0);
    assert_eq!(counters.get().sent, 3 * 28);
    assert_eq!(counters.get().received, 3 * 40);
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let (mut client, _agent) = Agent::start(Speaks::Http1, limits(), Some(echo_path().await)).await;
    let mut all = String::new();
    for n in 0..20 {
        let path = if n % 3 == 0 { "denied" } else { "ok" };
        all += &format!("GET /{path}{n:02} HTTP/1.1\r\nHost: a\r\n\r\n");
    }
    send(&mut client, all).await;
    for n in 0..20 {
        let head = read_head(&mut client).await;
        if n % 3 == 0 {
            assert_eq!(status(head.as_bytes()), 403, "{n}");
            assert!(head.contains("\r\nx-why: policy\r\n"));
            assert!(!head.contains("connection"));
            read_until(&mut client, b"100%").await;
        } else {
            assert_eq!(status(head.as_bytes()), 200, "{n}");
            assert_eq!(
                read_exact(&mut client, 5).await,
                format!("/ok{n:02}").as_bytes()
            );
        }
    }
}

#[tokio::test]
async fn chunks_both_ways_with_trailers() {
    let (mut client, _agent) = scripted(|mut stream| async move {
        let head = read_head(&mut stream).await;
        assert!(head.contains("Transfer-Encoding: chunked\r\n"));
        assert_eq!(
            read_until(&mut stream, b"X-Sum: 1\r\n\r\n").await,
            b"5\r\nhello\r\n6\r\n world\r\n0\r\nX-Sum: 1\r\n\r\n"
        );
        send(
            &mut stream,
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        )
        .await;
        send(&mut stream, "3;x=y\r\nabc\r\n0\r\nX-T: 2\r\n\r\n").await;
        assert!(read_head(&mut stream).await.starts_with("GET /a "));
    })
    .await;
    send(
        &mut client,
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n",
    )
    .await;
    send(&mut client, "06\r\n world\r\n0\r\nX-Sum: 1\r\n\r\n").await;
    read_head(&mut client).await;
    assert_eq!(
        read_until(&mut client, b"X-T: 2\r\n\r\n").await,
        b"3;x=y\r\nabc\r\n0\r\nX-T: 2\r\n\r\n"
    );
    send(&mut client, GET).await;
    read_to_end(&mut client).await;
}

#[tokio::test]
async fn a_trailer_cannot_bring_back_what_is_edited() {
    let (mut client, _agent) = scripted(|mut stream| async move {
        let head = read_head(&mut stream).await;
        assert!(head.starts_with("POST /changed HTTP/1.1\r\n"));
        assert!(head.contains("x-subject: alice\r\n") && !head.contains("mallory"));
        assert_eq!(
            read_until(&mut stream, b"\r\n\r\n").await,
            b"0\r\nX-Sum: 1\r\n\r\n"
        );
        send(&mut stream, "HTTP/1.1 204 No Content\r\n\r\n").await;
        read_to_end(&mut stream).await;
    })
    .await;
    send(&mut client, "POST /edited HTTP/1.1\r\nHost: a\r\nX-Subject: mallory\r\nX-Secret: mallory\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Sum: 1\r\nX-Subject: mallory\r\nx_secret: mallory\r\n\r\n").await;
    assert_eq!(status(read_head(&mut client).await.as_bytes()), 204);
}

#[tokio::test]
async fn expect_is_end_to_end() {
    let (mut client, _agent) = scripted(|mut stream| async move {
        assert!(
            read_head(&mut stream)
                .await
                .contains("Expect: 100-continue\r\n")
        );
        send(
            &mut stream,
            "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n",
        )
        .await;
        send(&mut stream, "HTTP/1.1 100 Continue\r\n\r\n").await;
        assert_eq!(read_exact(&mut stream, 4).await, b"body");
        send(&mut stream, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
        read_to_end(&mut stream).await;
    })
    .await;
    send(
        &mut client,
        "PUT / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n",
    )
    .await;
    assert_eq!(status(read_head(&mut client).await.as_bytes()), 103);
    assert_eq!(status(read_head(&mut client).await.as_bytes()), 100);
    send(&mut client, "body").await;
    assert_eq!(status(read_head(&mut client).await.as_bytes()), 200);
}

#[tokio::test]
async fn expect_that_is_denied() {
    let (mut client, agent) = Agent::start(Speaks::Http1, limits(), None).await;
    send(
        &mut client,
        "PUT /denied HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n",
    )
    .await;
    let (answer, orderly) = read_to_end(&mut client).await;
    assert_eq!(status(&answer), 403);
    assert!(orderly && String::from_utf8_lossy(&answer).contains("connection: close"));
    drop(client);
    agent.ended().await.expect("in order");
}

#[tokio::test]
async fn upgrade_becomes_bytes() {
    let (mut client, agent) = scripted(|mut stream| async move {
        let head = read_head(&mut stream).await;
        assert!(head.contains("Upgrade: websocket\r\nConnection: Upgrade\r\n"));
        send(&mut stream, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nhi").await;
        let (heard, orderly) = read_to_end(&mut stream).await;
        assert!(orderly);
        send(&mut stream, heard).await;
    })
    .await;
    send(
        &mut client,
        "GET /ws HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nearly",
    )
    .await;
    assert_eq!(status(read_head(&mut client).await.as_bytes()), 101);
    assert_eq!(read_exact(&mut client, 2).await, b"hi");
    send(&mut client, " GET /x HTTP/1.1\r\n\r\n").await;
    client.shutdown().await.expect("a socket");
    let (echo, orderly) = read_to_end(&mut client).await;
    assert_eq!(echo, b"early GET /x HTTP/1.1\r\n\r\n", "half-close passes");
    assert!(orderly);
    agent.ended().await.expect("in order");
}

#[tokio::test]
async fn an_upgrade_that_is_refused_makes_no_tunnel() {
    let (mut client, agent) = scripted(|mut stream| async move {
        read_head(&mut stream).await;
        send(&mut stream, "HTTP/1.1 426 No\r\nContent-Length: 0\r\n\r\n").await;
        assert_eq!(read_to_end(&mut stream).await.0, b"");
    })
    .await;
    send(&mut client, "GET /ws HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nGET /denied HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert_eq!(status(read_head(&mut client).await.as_bytes()), 426);
    assert_eq!(status(read_head(&mut client).await.as_bytes()), 403);
    assert_eq!(agent.notes.judged.lock().expect("no panic").len(), 2);
}

#[tokio::test]
async fn an_upgrade_nobody_asked_for() {
    let (mut client, agent) = scripted(|mut stream| async move {
        read_head(&mut stream).await;
        send(
            &mut stream,
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n",
        )
        .await;
        read_to_end(&mut stream).await;
    })
    .await;
    send(&mut client, GET).await;
    assert_eq!(status(&read_to_end(&mut client).await.0), 502);
    drop(client);
    assert!(matches!(agent.ended().await, Err(HttpError::Response(_))));
}

#[tokio::test]
async fn an_upgrade_ends_when_it_is_revoked() {
    let (mut client, agent) = scripted(|mut stream| async move {
        read_head(&mut stream).await;
        send(&mut stream, "HTTP/1.1 101 Switching Protocols\r\n\r\n").await;
        assert!(!read_to_end(&mut stream).await.1, "it is broken");
    })
    .await;
    send(
        &mut client,
        "GET /ws HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    )
    .await;
    read_head(&mut client).await;
    agent.notes.revoked.send_replace(true);
    assert!(!read_to_end(&mut client).await.1, "it is broken");
    assert!(matches!(agent.ended().await, Err(HttpError::Revoked)));
}

#[tokio::test]
async fn responses_without_body() {
    let (mut client, _agent) = scripted(|mut stream| async move {
        for answer in [
            "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            "HTTP/1.1 204 No Content\r\n\r\n",
            "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        ] {
            read_head(&mut stream).await;
            send(&mut stream, answer).await;
        }
        read_to_end(&mut stream).await;
    })
    .await;
    for (method, expected) in [
        ("HEAD", 200),
        ("HEAD", 200),
        ("GET", 204),
        ("GET", 304),
        ("GET", 200),
    ] {
        send(
            &mut client,
            format!("{method} / HTTP/1.1\r\nHost: a\r\n\r\n"),
        )
        .await;
        let head = read_head(&mut client).await;
        assert_eq!(status(head.as_bytes()), expected, "{method}");
    }
}

#[tokio::test]
async fn a_denied_head_has_no_body() {
    let (mut client, _agent) = Agent::start(Speaks::Http1, limits(), None).await;
    for _ in 0..2 {
        send(&mut client, "HEAD /denied HTTP/1.1\r\nHost: a\r\n\r\n").await;
        let head = read_head(&mut client).await;
        assert_eq!(status(head.as_bytes()), 403);
        assert!(head.contains("content-length: 25\r\n"), "{head}");
    }
}

#[tokio::test]
async fn http_1_0() {
    for (sent, answer, keeps) in [
        ("", "HTTP/1.0 200 OK\r\n\r\nto the end", false),
        (
            "Connection: keep-alive\r\n",
            "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok",
            true,
        ),
        (
            "Connection: keep-alive\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
            false,
        ),
    ] {
        let (mut client, _agent) = scripted(move |mut stream| async move {
            assert!(
                read_head(&mut stream)
                    .await
                    .starts_with("GET /a HTTP/1.0\r\n")
            );
            send(&mut stream, answer).await;
            if keeps {
                assert!(read_head(&mut stream).await.starts_with("GET /b "));
            }
        })
        .await;
        send(&mut client, format!("GET /a HTTP/1.0\r\n{sent}\r\n")).await;
        if keeps {
            read_until(&mut client, b"ok").await;
            send(&mut client, "GET /b HTTP/1.0\r\n\r\n").await;
            read_to_end(&mut client).await;
        } else {
            let (got, orderly) = read_to_end(&mut client).await;
            assert_eq!(String::from_utf8(got).expect("ASCII"), answer);
            assert!(orderly);
        }
    }
}

#[tokio::test]
async fn close_is_said_and_done() {
    let (mut client, agent) = scripted(|mut stream| async move {
        assert!(
            read_head(&mut stream)
                .await
                .contains("\r\nConnection: close\r\n")
        );
        send(
            &mut stream,
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        )
        .await;
        assert!(read_to_end(&mut stream).await.1);
    })
    .await;
    send(
        &mut client,
        format!("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n{GET}"),
    )
    .await;
    let (answer, orderly) = read_to_end(&mut client).await;
    assert!(
        answer.ends_with(b"ok") && orderly,
        "the second request is not served"
    );
    drop(client);
    agent.ended().await.expect("in order");
}

#[tokio::test]
async fn large_bodies_both_ways() {
    const SIZE: usize = 24 << 20;
    let (client, agent) = scripted(|mut stream| async move {
        read_head(&mut stream).await;
        send(
            &mut stream,
            format!("HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\n\r\n"),
        )
        .await;
        let (mut from, mut to) = stream.split();
        tokio::io::copy(&mut from, &mut to).await.expect("echo");
    })
    .await;
    let (mut from, mut to) = client.into_split();
    let sending = tokio::spawn(async move {
        let head = format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {SIZE}\r\n\r\n");
        to.write_all(head.as_bytes()).await.expect("sent");
        for n in 0..SIZE >> 16 {
            to.write_all(&[n as u8; 1 << 16]).await.expect("sent");
        }
        to
    });
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(from.read_u8().await.expect("a head"));
    }
    let mut piece = vec![0; 1 << 16];
    for n in 0..SIZE >> 16 {
        from.read_exact(&mut piece).await.expect("a body");
        assert!(piece.iter().all(|b| *b == n as u8));
    }
    drop((sending.await.expect("no panic"), from));
    agent.ended().await.expect("in order");
}

/// Neither side's bytes pile up in the agent when the other does not take them.
#[tokio::test]
async fn backpressure() {
    let (told, mut stalled) = tokio::sync::mpsc::channel(1);
    let (mut client, agent) = scripted(move |mut stream| {
        let told = told.clone();
        async move {
            read_head(&mut stream).await;
            send(
                &mut stream,
                "HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n",
            )
            .await;
            let mut sent = 0;
            let piece = vec![0; 1 << 16];
            // Until nothing is taken for a while.
            while let Ok(Ok(())) =
                timeout(Duration::from_millis(500), stream.write_all(&piece)).await
            {
                sent += piece.len();
                if sent > 100 << 20 {
                    break;
                }
            }
            told.send(sent).await.expect("the test waits");
        }
    })
    .await;
    send(&mut client, GET).await;
    let sent = stalled.recv().await.expect("it tells");
    assert!(sent <= 100 << 20, "somebody keeps it all");
    // The application has given up, and so it is broken for the client, too.
    assert!(!read_to_end(&mut client).await.1);
    assert!(matches!(
        agent.ended().await,
        Err(HttpError::Application(_))
    ));
}

#[tokio::test]
async fn a_denied_body_is_drained_and_the_connection_lives_on() {
    let (mut client, agent) = Agent::start(Speaks::Http1, limits(), Some(echo_path().await)).await;
    for framing in [
        "Content-Length: 6\r\n\r\nabc",
        "Transfer-Encoding: chunked\r\n\r\n6\r\nabc",
    ] {
        send(
            &mut client,
            format!("POST /denied HTTP/1.1\r\nHost: a\r\n{framing}"),
        )
        .await;
        assert_eq!(status(read_head(&mut client).await.as_bytes()), 403);
        read_until(&mut client, b"100%").await;
        send(
            &mut client,
            match framing.starts_with('C') {
                true => "def",
                false => "def\r\n0\r\n\r\n",
            },
        )
        .await;
        send(&mut client, GET).await;
        assert_eq!(status(read_head(&mut client).await.as_bytes()), 200);
        assert_eq!(read_exact(&mut client, 2).await, b"/a");
    }
    assert_eq!(agent.notes.judged.lock().expect("no panic").len(), 4);
}

#[tokio::test]
async fn a_large_denied_body_ends_the_connection_in_order() {
    let (mut client, agent) = Agent::start(Speaks::Http1, limits(), None).await;
    send(
        &mut client,
        "POST /denied HTTP/1.1\r\nHost: a\r\nContent-Length: 500000\r\n\r\n",
    )
    .await;
    send(&mut client, vec![0; 500_000]).await;
    let (answer, orderly) = read_to_end(&mut client).await;
    assert_eq!(status(&answer), 403);
    assert!(orderly, "the answer is not lost in a reset");
    assert!(String::from_utf8_lossy(&answer).contains("connection: close"));
    drop(client);
    agent.ended().await.expect("in order");
}

#[tokio::test]
async fn an_early_answer() {
    // Kept: the rest of the body still goes to the application.
    let (mut client, _agent) = scripted(|mut stream| async move {
        read_head(&mut stream).await;
        send(
            &mut stream,
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        )
        .await;
        assert_eq!(read_exact(&mut stream, 6).await, b"abcdef");
        read_head(&mut stream).await;
        send(&mut stream, "HTTP/1.1 204 No Content\r\n\r\n").await;
        read_to_end(&mut stream).await;
    })
    .await;
    send(
        &mut client,
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\n\r\nabc",
    )
    .await;
    read_until(&mut client, b"ok").await;
    send(&mut client, format!("def{GET}")).await;
    assert_eq!(status(read_head(&mut client).await.as_bytes()), 204);

    // Closed, with most of the body on its way: the answer arrives nevertheless.
    let (mut client, agent) = scripted(|mut stream| async move {
        read_head(&mut stream).await;
        send(
            &mut stream,
            "HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 2\r\n\r\nno",
        )
        .await;
    })
    .await;
    send(
        &mut client,
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 900000\r\n\r\n",
    )
    .await;
    send(&mut client, vec![0; 500_000]).await;
    let (answer, orderly) = read_to_end(&mut client).await;
    assert_eq!(status(&answer), 413);
    assert!(answer.ends_with(b"no") && orderly);
    drop(client);
    agent.ended().await.expect("in order");
}

#[tokio::test]
async fn half_close_after_a_request() {
    let (mut client, agent) = scripted(|mut stream| async move {
        read_head(&mut stream).await;
        tokio::task::yield_now().await;
        send(
            &mut stream,
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        )
        .await;
        assert!(read_to_end(&mut stream).await.1);
    })
    .await;
    send(&mut client, GET).await;
    client.shutdown().await.expect("a socket");
    let (answer, orderly) = read_to_end(&mut client).await;
    assert!(answer.ends_with(b"ok") && orderly);
    agent.ended().await.expect("in order");
}

#[tokio::test]
async fn half_close_within_a_body_breaks_both() {
    let (mut client, agent) = scripted(|mut stream| async move {
        read_head(&mut stream).await;
        assert!(!read_to_end(&mut stream).await.1, "it is broken");
    })
    .await;
    send(
        &mut client,
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\n\r\nabc",
    )
    .await;
    client.shutdown().await.expect("a socket");
    assert!(!read_to_end(&mut client).await.1);
    assert!(matches!(agent.ended().await, Err(HttpError::Client(_))));
}

#[tokio::test]
async fn an_application_that_dies_within_a_body() {
    for (answer, reset) in [
        ("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", false),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
            false,
        ),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n",
            false,
        ),
        ("HTTP/1.1 200 OK\r\n\r\nabc", true),
    ] {
        let (mut client, agent) = scripted(move |mut stream| async move {
            read_head(&mut stream).await;
            send(&mut stream, answer).await;
            if reset {
                stream.set_zero_linger().expect("a socket");
            }
        })
        .await;
        send(&mut client, GET).await;
        let (_, orderly) = read_to_end(&mut client).await;
        assert!(!orderly, "{answer:?} must not pass for complete");
        assert!(matches!(
            agent.ended().await,
            Err(HttpError::Application(_))
        ));
    }
}

#[tokio::test]
async fn a_malformed_answer() {
    for answer in [
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\n",
        "what?\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-",
        "",
    ] {
        let (mut client, agent) = scripted(move |mut stream| async move {
            read_head(&mut stream).await;
            send(&mut stream, answer).await;
        })
        .await;
        send(&mut client, GET).await;
        let (got, orderly) = read_to_end(&mut client).await;
        assert_eq!(status(&got), 502, "{answer:?}");
        assert!(orderly);
        assert_eq!(*agent.notes.answered.lock().expect("no panic"), [502]);
    }
}

#[tokio::test]
async fn an_answer_nobody_asked_for_is_not_the_next_ones() {
    let (mut client, agent) = scripted(|mut stream| async move {
        read_head(&mut stream).await;
        send(
            &mut stream,
            "HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 200 OK\r\nX-Split: 1\r\n\r\n",
        )
        .await;
        assert_eq!(read_to_end(&mut stream).await.0, b"");
    })
    .await;
    send(&mut client, format!("{GET}{GET}")).await;
    let (got, _) = read_to_end(&mut client).await;
    assert_eq!(got, b"HTTP/1.1 204 No Content\r\n\r\n");
    drop(client);
    agent.ended().await.expect("in order");
}

#[tokio::test]
async fn an_idle_application_closes() {
    let (mut client, agent) = scripted(|mut stream| async move {
        read_head(&mut stream).await;
        send(&mut stream, "HTTP/1.1 204 No Content\r\n\r\n").await;
    })
    .await;
    send(&mut client, GET).await;
    let (got, orderly) = read_to_end(&mut client).await;
    assert!(orderly && got.ends_with(b"\r\n\r\n"));
    drop(client);
    agent.ended().await.expect("in order");
}

#[tokio::test]
async fn an_unreachable_application() {
    let (mut client, agent) = Agent::start(Speaks::Http1, limits(), None).await;
    for _ in 0..2 {
        send(&mut client, GET).await;
        let head = read_head(&mut client).await;
        assert_eq!(status(head.as_bytes()), 503);
        read_until(&mut client, b"reached").await;
    }
    assert_eq!(agent.notes.dials.load(Ordering::SeqCst), 2);
    assert_eq!(*agent.notes.answered.lock().expect("no panic"), [503, 503]);
}

#[tokio::test]
async fn revoked_before_and_after_the_answer_has_begun() {
    let (mut client, agent) = scripted(|mut stream| async move {
        read_head(&mut stream).await;
        assert!(!read_to_end(&mut stream).await.1, "it is broken");
    })
    .await;
    send(&mut client, GET).await;
    while agent.notes.live.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    agent.notes.revoked.send_replace(true);
    let (answer, orderly) = read_to_end(&mut client).await;
    assert_eq!(status(&answer), 403);
    assert!(orderly);
    drop(client);
    assert!(matches!(agent.ended().await, Err(HttpError::Revoked)));

    let (mut client, agent) = scripted(|mut stream| async move {
        read_head(&mut stream).await;
        send(
            &mut stream,
            "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc",
        )
        .await;
        assert!(!read_to_end(&mut stream).await.1, "it is broken");
    })
    .await;
    send(&mut client, GET).await;
    read_until(&mut client, b"abc").await;
    agent.notes.revoked.send_replace(true);
    assert!(!read_to_end(&mut client).await.1);
    assert!(matches!(agent.ended().await, Err(HttpError::Revoked)));
}

#[tokio::test]
async fn a_client_that_breaks_breaks_the_application() {
    let (told, mut broken) = tokio::sync::mpsc::channel(1);
    let (client, agent) = scripted(move |mut stream| {
        let told = told.clone();
        async move {
            read_head(&mut stream).await;
            let (_, orderly) = read_to_end(&mut stream).await;
            told.send(!orderly).await.expect("the test waits");
        }
    })
    .await;
    let mut client = client;
    send(&mut client, GET).await;
    while agent.notes.live.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    client.set_zero_linger().expect("a socket");
    drop(client);
    assert!(matches!(agent.ended().await, Err(HttpError::Client(_))));
    assert_eq!(broken.recv().await, Some(true));
}

#[tokio::test]
async fn a_slow_head() {
    let limits = Limits {
        head_timeout: Duration::from_millis(100),
        ..limits()
    };
    let (mut client, agent) = Agent::start(Speaks::Http1, limits, None).await;
    send(&mut client, "GET / HTTP/1.1\r\nHo").await;
    assert_eq!(status(&read_to_end(&mut client).await.0), 408);
    drop(client);
    assert!(matches!(agent.ended().await, Err(HttpError::Malformed(_))));
}

#[tokio::test]
async fn a_response_of_many_reads_is_followed() {
    let (mut client, _agent) = scripted(|mut stream| async move {
        read_head(&mut stream).await;
        for byte in b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
        {
            send(&mut stream, [*byte]).await;
            tokio::task::yield_now().await;
        }
        read_head(&mut stream).await;
        send(&mut stream, "HTTP/1.1 204 No Content\r\n\r\n").await;
        read_to_end(&mut stream).await;
    })
    .await;
    send(&mut client, format!("{GET}{GET}")).await;
    read_until(&mut client, b"hello\r\n0\r\n\r\n").await;
    assert_eq!(status(read_head(&mut client).await.as_bytes()), 204);
}

/// The client's connection is a stream of a tunnel.
#[tokio::test]
async fn within_a_tunnel() {
    let (address, _task) = application(|mut stream| async move {
        for _ in 0..2 {
            let head = read_head(&mut stream).await;
            let length: usize = head
                .split("Content-Length: ")
                .nth(1)
                .and_then(|rest| rest.split('\r').next()?.parse().ok())
                .expect("a length");
            let body = read_exact(&mut stream, length).await;
            send(
                &mut stream,
                format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n"),
            )
            .await;
            send(&mut stream, body).await;
        }
        read_to_end(&mut stream).await;
    })
    .await;
    let (outer, inner) = pair().await;
    let notes = notes();
    let gate = Arc::new(TestGate {
        application: Some(address),
        notes: notes.clone(),
    });
    let agent = tokio::spawn(async move {
        let mut tunnel = ::h2::server::handshake(inner).await.expect("a tunnel");
        let (request, mut respond) = tunnel.accept().await.expect("a stream").expect("one");
        tokio::spawn(async move { while tunnel.accept().await.is_some() {} });
        let (_drain, watcher) = drain();
        let end = End::Stream {
            send: respond
                .send_response(::http::Response::new(()), false)
                .expect("answered"),
            recv: request.into_body(),
        };
        super::super::h1::serve(
            Io::new(end, BytesMut::new()),
            gate,
            &limits(),
            None,
            watcher,
        )
        .await
    });
    let (mut sender, tunnel) = ::h2::client::handshake(outer).await.expect("a tunnel");
    tokio::spawn(tunnel);
    let request = ::http::Request::post("http://a/")
        .body(())
        .expect("a request");
    let (response, send) = sender.send_request(request, false).expect("sent");
    let recv = response.await.expect("answered").into_body();
    let mut io = Io::new(End::Stream { send, recv }, BytesMut::new());
    for size in [1usize, 300_000] {
        let head = format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\n\r\n");
        let mut got =
            vec![
                0;
                "HTTP/1.1 200 OK\r\nContent-Length: \r\n\r\n".len() + size.to_string().len() + size
            ];
        let (mut from, mut to) = tokio::io::split(&mut io);
        let (sent, read) = tokio::join!(
            async {
                to.write_all(head.as_bytes()).await?;
                to.write_all(&vec![b'x'; size]).await
            },
            timeout(PATIENCE, from.read_exact(&mut got)),
        );
        sent.expect("sent");
        read.expect("in time").expect("an answer");
        assert_eq!(status(&got[..64.min(got.len())]), 200);
    }
    io.shutdown().await.expect("an orderly end");
    let mut rest = Vec::new();
    io.read_to_end(&mut rest).await.expect("an orderly end");
    assert_eq!(rest, b"");
    agent.await.expect("no panic").expect("in order");
}
