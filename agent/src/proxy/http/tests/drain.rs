//! Clients of an agent that drains are sent to the next one.

use ::h2::{client, server};
use ::http::{Request, Response};
use bytes::Bytes;
use tokio::sync::Notify;

use super::{super::response::closing, *};

const GET: &str = "GET /a HTTP/1.1\r\nHost: a.example\r\n\r\n";

/// An HTTP/1 application that keeps its connections, and says so.
async fn keeping() -> std::net::SocketAddr {
    let (address, _task) = application(|mut stream| async move {
        loop {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                match stream.read_u8().await {
                    Ok(byte) => head.push(byte),
                    Err(_left) => return,
                }
            }
            let answer = "HTTP/1.1 200 OK\r\nConnection: Keep-Alive\r\nKeep-Alive: timeout=5\r\nContent-Length: 2\r\n\r\nok";
            send(&mut stream, answer).await;
        }
    })
    .await;
    address
}

#[test]
fn a_head_says_that_the_connection_ends() {
    for (head, expected) in [
        (
            "HTTP/1.1 200 OK\r\nA: b\r\n\r\n",
            "HTTP/1.1 200 OK\r\nA: b\r\nconnection: close\r\n\r\n",
        ),
        (
            "HTTP/1.1 200 OK: all\r\nKEEP-ALIVE: timeout=5\r\nconnection: Keep-Alive, X-Hop\r\nX-Hop: 1\r\nConnection:y,,close\r\n\r\n",
            "HTTP/1.1 200 OK: all\r\nX-Hop: 1\r\nconnection: close, X-Hop, y\r\n\r\n",
        ),
        (
            "\r\n\nHTTP/1.0 204 \nA: Connection: b\n\n",
            "HTTP/1.0 204 \nA: Connection: b\nconnection: close\r\n\r\n",
        ),
    ] {
        let told = closing(head.as_bytes());
        assert_eq!(String::from_utf8_lossy(&told), expected, "{head:?}");
    }
}

#[tokio::test]
async fn an_http1_client_is_told_with_the_next_answer() {
    for (path, status_wanted, body) in [("/a", 200, "ok"), ("/denied", 403, "100%")] {
        let (mut client, agent) =
            Agent::start(Speaks::Http1, limits(), Some(keeping().await)).await;
        send(&mut client, GET).await;
        let head = read_head(&mut client).await;
        assert!(head.contains("Connection: Keep-Alive\r\n"), "{head}");
        read_exact(&mut client, 2).await;
        let notes = agent.notes.clone();
        let asking = async {
            let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n");
            send(&mut client, request).await;
            let head = read_head(&mut client).await;
            let rest = read_to_end(&mut client).await;
            drop(client);
            (head, rest)
        };
        let (drained, (head, (rest, in_order))) = tokio::join!(agent.drained(), asking);
        assert!(drained && in_order, "{path}");
        assert_eq!(status(head.as_bytes()), status_wanted);
        assert!(head.contains("\r\nconnection: close\r\n"), "{head}");
        assert!(!head.to_ascii_lowercase().contains("keep-alive"), "{head}");
        assert!(String::from_utf8_lossy(&rest).ends_with(body), "{rest:?}");
        assert_eq!(notes.judged.lock().expect("no panic").len(), 2);
    }
}

/// An answer that has begun goes on to its end, and the one after it says the end.
#[tokio::test]
async fn an_http1_answer_that_runs_is_not_cut() {
    let go_on = Arc::new(Notify::new());
    let wait = go_on.clone();
    let (address, _task) = application(move |mut stream| {
        let wait = wait.clone();
        async move {
            read_head(&mut stream).await;
            send(
                &mut stream,
                "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nab",
            )
            .await;
            wait.notified().await;
            send(&mut stream, "cd").await;
            read_head(&mut stream).await;
            let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
            send(&mut stream, chunked).await;
            send(&mut stream, "2\r\nef\r\n0\r\n\r\n").await;
            read_to_end(&mut stream).await;
        }
    })
    .await;
    let (mut client, agent) = Agent::start(Speaks::Http1, limits(), Some(address)).await;
    send(&mut client, GET).await;
    assert!(!read_head(&mut client).await.contains("connection"));
    read_exact(&mut client, 2).await;
    let asking = async {
        go_on.notify_one();
        assert_eq!(read_exact(&mut client, 2).await, b"cd");
        send(&mut client, GET).await;
        let head = read_head(&mut client).await;
        assert!(head.contains("\r\nconnection: close\r\n"), "{head}");
        let (rest, in_order) = read_to_end(&mut client).await;
        assert_eq!((&rest[..], in_order), (&b"2\r\nef\r\n0\r\n\r\n"[..], true));
        drop(client);
    };
    let (drained, ()) = tokio::join!(agent.drained(), asking);
    assert!(drained);
}

#[tokio::test]
async fn an_http2_client_is_told_at_once_and_its_streams_go_on() {
    let go_on = Arc::new(Notify::new());
    let wait = go_on.clone();
    let (address, _task) = application(move |stream| {
        let wait = wait.clone();
        async move {
            let mut connection = server::handshake(stream).await.expect("HTTP/2");
            while let Some(Ok((_request, mut respond))) = connection.accept().await {
                let wait = wait.clone();
                tokio::spawn(async move {
                    let head = Response::new(());
                    let mut to = respond.send_response(head, false).expect("sent");
                    wait.notified().await;
                    let body = Bytes::from_static(b"whole");
                    to.send_data(body, true).expect("sent");
                });
            }
        }
    })
    .await;
    let (client, agent) = Agent::start(Speaks::Http2, limits(), Some(address)).await;
    let (sender, connection) = client::handshake(client).await.expect("HTTP/2");
    let connection = tokio::spawn(connection);
    let request = || {
        let request = Request::get("http://a.example/a").body(());
        request.expect("a request")
    };
    let mut ready = sender.clone().ready().await.expect("ready");
    let (response, _end) = ready.send_request(request(), true).expect("sent");
    let response = timeout(PATIENCE, response).await.expect("in time");
    let mut body = response.expect("answered").into_body();
    let asking = async {
        // It is told while its stream is open.
        let told = async {
            while sender.clone().ready().await.is_ok() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, told).await.expect("it is told");
        go_on.notify_one();
        let data = timeout(PATIENCE, body.data()).await.expect("in time");
        assert_eq!(data.expect("data").expect("whole"), "whole");
        drop((sender, ready, body));
    };
    let (drained, ()) = tokio::join!(agent.drained(), asking);
    assert!(drained);
    let ended = timeout(PATIENCE, connection).await.expect("in time");
    assert!(ended.expect("no panic").is_ok());
}
