//! What HTTP/2 and gRPC must be able to do through the agent.

use ::h2::{
    Reason, RecvStream, SendStream, client,
    client::SendRequest,
    server::{self, SendResponse},
};
use ::http::{HeaderMap, Request, Response};
use bytes::Bytes;
use tokio::sync::mpsc;

use super::*;

/// An application that treats each request so.
async fn serving<F>(
    handle: impl Fn(Request<RecvStream>, SendResponse<Bytes>) -> F + Clone + Send + Sync + 'static,
) -> std::net::SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    let (address, _task) = application(move |stream| {
        let handle = handle.clone();
        async move {
            let mut connection = server::Builder::new()
                // What is not read of one stream is not to hold up the others.
                .initial_connection_window_size(1 << 20)
                .handshake(stream)
                .await
                .expect("HTTP/2");
            while let Some(Ok((request, respond))) = connection.accept().await {
                tokio::spawn(handle(request, respond));
            }
        }
    })
    .await;
    address
}

async fn connect(stream: TcpStream) -> SendRequest<Bytes> {
    let (sender, connection) = client::handshake(stream).await.expect("HTTP/2");
    tokio::spawn(connection);
    sender
}

/// A client, the agent, and an application that treats each request so.
async fn scripted<F>(
    handle: impl Fn(Request<RecvStream>, SendResponse<Bytes>) -> F + Clone + Send + Sync + 'static,
) -> (SendRequest<Bytes>, Agent)
where
    F: Future<Output = ()> + Send + 'static,
{
    let address = serving(handle).await;
    let (client, agent) = Agent::start(Speaks::Http2, limits(), Some(address)).await;
    (connect(client).await, agent)
}

fn get(path: &str) -> Request<()> {
    Request::get(format!("http://a.example{path}"))
        .body(())
        .expect("a request")
}

fn grpc(path: &str) -> Request<()> {
    Request::post(format!("http://a.example{path}"))
        .header("content-type", "application/grpc+proto")
        .header("te", "trailers")
        .body(())
        .expect("a request")
}

fn ok() -> Response<()> {
    Response::new(())
}

fn trailers(name: &'static str, value: &'static str) -> HeaderMap {
    [(
        HeaderName::from_static(name),
        HeaderValue::from_static(value),
    )]
    .into_iter()
    .collect()
}

/// Asks, with this body, and waits for the head of the answer.
async fn ask(
    sender: &SendRequest<Bytes>,
    request: Request<()>,
    body: Option<&'static str>,
) -> Result<Response<RecvStream>, ::h2::Error> {
    let mut sender = sender.clone().ready().await?;
    let (response, mut send) = sender.send_request(request, body.is_none())?;
    if let Some(body) = body {
        send.send_data(Bytes::from_static(body.as_bytes()), true)?;
    }
    timeout(PATIENCE, response).await.expect("in time")
}

async fn collect(body: &mut RecvStream) -> Result<Vec<u8>, ::h2::Error> {
    let mut all = Vec::new();
    let reading = async {
        while let Some(data) = body.data().await {
            let data = data?;
            body.flow_control().release_capacity(data.len())?;
            all.extend_from_slice(&data);
        }
        Ok::<_, ::h2::Error>(())
    };
    timeout(PATIENCE, reading).await.expect("in time")?;
    Ok(all)
}

/// Sends as the window allows.
async fn send_all(send: &mut SendStream<Bytes>, mut data: Bytes) -> Result<(), ::h2::Error> {
    while !data.is_empty() {
        send.reserve_capacity(data.len());
        let room = match send.capacity() {
            0 => std::future::poll_fn(|cx| send.poll_capacity(cx))
                .await
                .unwrap_or_else(|| Err(Reason::CANCEL.into()))?,
            room => room,
        };
        send.send_data(data.split_to(room.min(data.len())), false)?;
    }
    Ok(())
}

#[tokio::test]
async fn requests_and_answers() {
    let (sender, agent) = scripted(|request, mut respond| async move {
        let (parts, mut body) = request.into_parts();
        let body = collect(&mut body).await.expect("a body");
        let head = Response::builder()
            .status(201)
            .header("x-uri", parts.uri.to_string())
            .header("x-headers", format!("{:?}", parts.headers))
            .body(())
            .expect("a response");
        let mut send = respond.send_response(head, false).expect("sent");
        send.send_data(body.into(), true).expect("sent");
    })
    .await;
    let request = Request::put("http://A.example:80/edited?x")
        .header("host", "a.example:80")
        .header("x-secret", "mallory")
        .header("x-subject", "mallory")
        .header("x_subject", "mallory")
        .header("x-kept", "1")
        .body(())
        .expect("a request");
    let mut response = ask(&sender, request, Some("body")).await.expect("answered");
    assert_eq!(response.status(), 201);
    assert_eq!(response.headers()["x-uri"], "http://A.example:80/changed");
    assert_eq!(
        response.headers()["x-headers"],
        "{\"x-kept\": \"1\", \"x-subject\": \"alice\"}"
    );
    assert_eq!(collect(response.body_mut()).await.expect("a body"), b"body");
    assert_eq!(
        *agent.notes.judged.lock().expect("no panic"),
        ["PUT A.example:80 /edited?x"]
    );
    let notes = agent.notes.clone();
    drop((sender, response));
    agent.ended().await.expect("in order");
    assert_eq!(*notes.answered.lock().expect("no panic"), [201]);
    assert_eq!(notes.live.load(Ordering::SeqCst), 0);
    assert_eq!(notes.dials.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn many_streams_at_once() {
    let (sender, agent) = scripted(|request, mut respond| async move {
        tokio::task::yield_now().await;
        let path = request.uri().path().to_owned();
        let mut send = respond.send_response(ok(), false).expect("sent");
        send.send_data(path.into(), true).expect("sent");
    })
    .await;
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..500 {
        let sender = sender.clone();
        tasks.spawn(async move {
            let path = match n % 5 {
                0 => format!("/denied/{n}"),
                _ => format!("/{n}"),
            };
            let mut response = ask(&sender, get(&path), None).await.expect("answered");
            let body = collect(response.body_mut()).await.expect("a body");
            match n % 5 {
                0 => assert_eq!(response.status(), 403),
                _ => assert_eq!(body, path.as_bytes()),
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.expect("no panic");
    }
    assert_eq!(agent.notes.dials.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn trailers_both_ways() {
    let (sender, _agent) = scripted(|request, mut respond| async move {
        let mut body = request.into_body();
        assert_eq!(collect(&mut body).await.expect("a body"), b"abc");
        let got = body.trailers().await.expect("trailers").expect("some");
        assert_eq!(got, trailers("x-sum", "1"));
        let mut send = respond.send_response(ok(), false).expect("sent");
        send.send_data("def".into(), false).expect("sent");
        send.send_trailers(trailers("grpc-status", "0"))
            .expect("sent");
    })
    .await;
    let mut sender = sender.ready().await.expect("ready");
    let (response, mut send) = sender.send_request(get("/a"), false).expect("sent");
    send.send_data("abc".into(), false).expect("sent");
    send.send_trailers(trailers("x-sum", "1")).expect("sent");
    let mut body = response.await.expect("answered").into_body();
    assert_eq!(collect(&mut body).await.expect("a body"), b"def");
    let got = body.trailers().await.expect("trailers").expect("some");
    assert_eq!(got, trailers("grpc-status", "0"));
}

#[tokio::test]
async fn edited_trailers() {
    let (sender, _agent) = scripted(|request, mut respond| async move {
        let mut body = request.into_body();
        collect(&mut body).await.expect("a body");
        let got = body.trailers().await.expect("trailers").expect("some");
        assert_eq!(
            got,
            trailers("x-sum", "1"),
            "x-subject is the agent's to say"
        );
        respond.send_response(ok(), true).expect("sent");
    })
    .await;
    let mut sender = sender.ready().await.expect("ready");
    let (response, mut send) = sender.send_request(get("/edited"), false).expect("sent");
    let mut sent = trailers("x-sum", "1");
    sent.extend(trailers("x-subject", "mallory"));
    send.send_trailers(sent).expect("sent");
    assert_eq!(response.await.expect("answered").status(), 200);
}

#[tokio::test]
async fn streaming_while_both_are_open() {
    let (sender, _agent) = scripted(|request, mut respond| async move {
        let mut body = request.into_body();
        let mut send = respond.send_response(ok(), false).expect("sent");
        while let Some(Ok(data)) = body.data().await {
            body.flow_control()
                .release_capacity(data.len())
                .expect("read");
            send.send_data(data, false).expect("sent");
        }
        send.send_trailers(trailers("grpc-status", "0"))
            .expect("sent");
    })
    .await;
    let mut sender = sender.ready().await.expect("ready");
    let (response, mut send) = sender.send_request(grpc("/s/Echo"), false).expect("sent");
    let mut body = response.await.expect("answered").into_body();
    for message in ["one", "two", "three"] {
        send.send_data(message.into(), false).expect("sent");
        let data = timeout(PATIENCE, body.data()).await.expect("in time");
        assert_eq!(data.expect("data").expect("data"), message);
    }
    send.send_data(Bytes::new(), true).expect("sent");
    assert!(body.data().await.is_none());
    assert!(body.trailers().await.expect("trailers").is_some());
}

#[tokio::test]
async fn large_bodies_both_ways() {
    const SIZE: usize = 8 << 20;
    let (sender, _agent) = scripted(|request, mut respond| async move {
        let mut body = request.into_body();
        let mut send = respond.send_response(ok(), false).expect("sent");
        while let Some(Ok(data)) = body.data().await {
            let length = data.len();
            send_all(&mut send, data).await.expect("sent");
            body.flow_control().release_capacity(length).expect("read");
        }
        send.send_data(Bytes::new(), true).expect("sent");
    })
    .await;
    let mut sender = sender.ready().await.expect("ready");
    let (response, mut send) = sender.send_request(get("/a"), false).expect("sent");
    let sending = tokio::spawn(async move {
        for n in 0..SIZE >> 16 {
            let piece = Bytes::from(vec![n as u8; 1 << 16]);
            send_all(&mut send, piece).await.expect("sent");
        }
        send.send_data(Bytes::new(), true).expect("sent");
    });
    let mut body = response.await.expect("answered").into_body();
    let got = collect(&mut body).await.expect("a body");
    sending.await.expect("no panic");
    assert_eq!(got.len(), SIZE);
    assert!(got.iter().enumerate().all(|(n, b)| *b == (n >> 16) as u8));
}

/// A stream that is not read stops its sender, and nobody else.
#[tokio::test]
async fn a_stalled_response() {
    let sent = Arc::new(AtomicUsize::new(0));
    let count = sent.clone();
    let (sender, _agent) = scripted(move |request, mut respond| {
        let count = count.clone();
        async move {
            let endless = request.uri().path() == "/endless";
            let mut send = respond.send_response(ok(), !endless).expect("sent");
            while endless && send_all(&mut send, vec![0; 1000].into()).await.is_ok() {
                count.fetch_add(1000, Ordering::SeqCst);
            }
        }
    })
    .await;
    let mut stalled = Vec::new();
    for _ in 0..8 {
        // The window of the client's own connection is what 8 streams may fill.
        stalled.push(ask(&sender, get("/endless"), None).await.expect("answered"));
    }
    for _ in 0..50 {
        let response = ask(&sender, get("/a"), None).await.expect("answered");
        assert_eq!(response.status(), 200);
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    let sent = sent.load(Ordering::SeqCst);
    assert!(sent < 8 * 400_000, "{sent} bytes are kept somewhere");
}

/// Likewise a request that the application does not read.
#[tokio::test]
async fn a_stalled_request() {
    let (sender, _agent) = scripted(|request, mut respond| async move {
        if request.uri().path() == "/stalled" {
            tokio::time::sleep(PATIENCE).await;
        }
        let body = collect(&mut request.into_body()).await.expect("a body");
        let mut send = respond.send_response(ok(), false).expect("sent");
        send.send_data(body.len().to_string().into(), true)
            .expect("sent");
    })
    .await;
    let mut stalled = Vec::new();
    for _ in 0..4 {
        let mut sender = sender.clone().ready().await.expect("ready");
        let (response, mut send) = sender.send_request(get("/stalled"), false).expect("sent");
        let sending = send_all(&mut send, vec![0; 10 << 20].into());
        let filling = timeout(Duration::from_millis(100), sending);
        assert!(filling.await.is_err(), "ten megabytes went nowhere");
        stalled.push((response, send));
    }
    let mut response = ask(&sender, get("/a"), Some("abc"))
        .await
        .expect("answered");
    assert_eq!(collect(response.body_mut()).await.expect("a body"), b"3");
}

#[tokio::test]
async fn the_clients_reset_reaches_the_application() {
    let (told, mut resets) = mpsc::channel(2);
    let (sender, agent) = scripted(move |request, mut respond| {
        let told = told.clone();
        async move {
            if request.uri().path() == "/answered" {
                let mut send = respond.send_response(ok(), false).expect("sent");
                let reset = std::future::poll_fn(|cx| send.poll_reset(cx)).await;
                told.send(reset.expect("a reason")).await.expect("waits");
            } else {
                let reset = std::future::poll_fn(|cx| respond.poll_reset(cx)).await;
                told.send(reset.expect("a reason")).await.expect("waits");
            }
        }
    })
    .await;
    for (path, reason) in [
        ("/answered", Reason::CANCEL),
        ("/waits", Reason::CANCEL),
        ("/answered", Reason::INTERNAL_ERROR),
        ("/waits", Reason::from(1234)),
    ] {
        let mut sender = sender.clone().ready().await.expect("ready");
        let (response, mut send) = sender.send_request(get(path), false).expect("sent");
        let held = if path == "/answered" {
            Some(response.await.expect("answered"))
        } else {
            send.send_data("abc".into(), false).expect("sent");
            tokio::time::sleep(Duration::from_millis(50)).await;
            None
        };
        send.send_reset(reason);
        let got = timeout(PATIENCE, resets.recv()).await.expect("in time");
        assert_eq!(got, Some(reason), "{path}");
        drop(held);
    }
    assert_eq!(
        agent.notes.dials.load(Ordering::SeqCst),
        1,
        "the connection lives on"
    );
}

#[tokio::test]
async fn the_applications_reset_reaches_the_client() {
    let (sender, _agent) = scripted(|request, mut respond| async move {
        let reason = Reason::from(
            request
                .uri()
                .query()
                .and_then(|q| q.parse::<u32>().ok())
                .expect("a reason"),
        );
        match request.uri().path() {
            "/answered" => {
                let mut send = respond.send_response(ok(), false).expect("sent");
                send.send_data("abc".into(), false).expect("sent");
                send.send_reset(reason);
            }
            _ => respond.send_reset(reason),
        }
    })
    .await;
    for path in ["/answered?8", "/answered?2", "/no?7", "/no?8", "/no?11"] {
        let reason = path.split('?').nth(1).and_then(|r| r.parse::<u32>().ok());
        let error = match ask(&sender, get(path), None).await {
            Ok(mut response) => collect(response.body_mut()).await.expect_err("a reset"),
            Err(error) => error,
        };
        assert!(error.is_reset(), "{path}: {error}");
        assert_eq!(error.reason().map(u32::from), reason, "{path}");
    }
}

#[tokio::test]
async fn denials() {
    let (sender, agent) = scripted(|_request, mut respond| async move {
        respond.send_response(ok(), true).expect("sent");
    })
    .await;
    // A body that nobody reads does no harm.
    for body in [None, Some("abc")] {
        let mut response = ask(&sender, get("/denied"), body).await.expect("answered");
        assert_eq!(response.status(), 403);
        assert_eq!(response.headers()["x-why"], "policy");
        assert_eq!(response.headers()["content-length"], "25");
        let got = collect(response.body_mut()).await.expect("a body");
        assert_eq!(got, b"RBAC: access denied, 100%");

        let mut response = ask(&sender, grpc("/denied/Call"), body)
            .await
            .expect("answered");
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "application/grpc");
        assert_eq!(response.headers()["grpc-status"], "7");
        assert_eq!(
            response.headers()["grpc-message"],
            "RBAC: access denied, 100%25"
        );
        assert!(response.body_mut().is_end_stream());
    }
    let head = Request::head("http://a/denied")
        .body(())
        .expect("a request");
    let mut response = ask(&sender, head, None).await.expect("answered");
    assert_eq!(collect(response.body_mut()).await.expect("no body"), b"");
    assert_eq!(agent.notes.dials.load(Ordering::SeqCst), 0);
    let response = ask(&sender, get("/a"), None).await.expect("answered");
    assert_eq!(response.status(), 200, "the connection lives on");
}

#[tokio::test]
async fn revoked_streams_are_reset_and_no_others() {
    let (sender, agent) = scripted(|request, mut respond| async move {
        if request.uri().path() == "/answered" {
            let mut send = respond.send_response(ok(), false).expect("sent");
            std::future::poll_fn(|cx| send.poll_reset(cx))
                .await
                .expect("a reset");
        } else {
            std::future::poll_fn(|cx| respond.poll_reset(cx))
                .await
                .expect("a reset");
        }
    })
    .await;
    let mut answered = ask(&sender, get("/answered"), None)
        .await
        .expect("answered");
    let waits = tokio::spawn({
        let sender = sender.clone();
        async move { ask(&sender, get("/waits"), None).await }
    });
    let call = tokio::spawn({
        let sender = sender.clone();
        async move { ask(&sender, grpc("/waits"), None).await }
    });
    while agent.notes.live.load(Ordering::SeqCst) < 3 {
        tokio::task::yield_now().await;
    }
    agent.notes.revoked.send_replace(true);
    let error = collect(answered.body_mut()).await.expect_err("a reset");
    assert_eq!(error.reason(), Some(Reason::CANCEL));
    let error = waits.await.expect("no panic").expect_err("a reset");
    assert_eq!(error.reason(), Some(Reason::CANCEL));
    let call = call.await.expect("no panic").expect("a status");
    assert_eq!(call.headers()["grpc-status"], "7");
    agent.notes.revoked.send_replace(false);
    let response = ask(&sender, get("/denied"), None).await.expect("answered");
    assert_eq!(response.status(), 403, "the connection lives on");
}

#[tokio::test]
async fn an_unreachable_application() {
    let (client, agent) = Agent::start(Speaks::Http2, limits(), None).await;
    let sender = connect(client).await;
    let response = ask(&sender, get("/a"), Some("abc"))
        .await
        .expect("answered");
    assert_eq!(response.status(), 503);
    let response = ask(&sender, grpc("/a"), None).await.expect("answered");
    assert_eq!(response.headers()["grpc-status"], "14");
    assert_eq!(agent.notes.dials.load(Ordering::SeqCst), 2);
    assert_eq!(*agent.notes.answered.lock().expect("no panic"), [503, 503]);
}

#[tokio::test]
async fn an_application_that_dies_is_dialled_again() {
    let (address, _task) = application(|stream| async move {
        let mut connection = server::handshake(stream).await.expect("HTTP/2");
        let (request, mut respond) = connection.accept().await.expect("one").expect("one");
        let end = request.uri().path() != "/dies";
        let mut send = respond.send_response(ok(), end).expect("sent");
        if !end {
            send.send_data("abc".into(), false).expect("sent");
        }
        let more = timeout(Duration::from_millis(100), connection.accept());
        let _until_flushed = more.await;
    })
    .await;
    let (client, agent) = Agent::start(Speaks::Http2, limits(), Some(address)).await;
    let sender = connect(client).await;
    let mut response = ask(&sender, get("/dies"), None).await.expect("answered");
    let error = collect(response.body_mut()).await.expect_err("a reset");
    assert!(error.is_reset() || error.is_go_away(), "{error}");
    // The client was told to go; if it is not gone yet, it is served.
    if let Ok(response) = ask(&sender, get("/lives"), None).await {
        assert_eq!(response.status(), 200);
        assert_eq!(agent.notes.dials.load(Ordering::SeqCst), 2);
    }
}

#[tokio::test]
async fn an_application_that_leaves_in_order() {
    let (address, _task) = application(|stream| async move {
        let mut connection = server::handshake(stream).await.expect("HTTP/2");
        let (_request, mut respond) = connection.accept().await.expect("one").expect("one");
        connection.graceful_shutdown();
        let mut send = respond.send_response(ok(), false).expect("sent");
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(50)).await;
            send.send_data("abc".into(), true).expect("sent");
        });
        while connection.accept().await.is_some() {}
    })
    .await;
    let (client, agent) = Agent::start(Speaks::Http2, limits(), Some(address)).await;
    let (sender, connection) = client::handshake(client).await.expect("HTTP/2");
    let connection = tokio::spawn(connection);
    let mut response = ask(&sender, get("/a"), None).await.expect("answered");
    assert_eq!(
        collect(response.body_mut()).await.expect("all of it"),
        b"abc"
    );
    // The client is told to go, too.
    let ended = timeout(PATIENCE, connection).await.expect("in time");
    ended.expect("no panic").expect("in order");
    agent.ended().await.expect("in order");
    drop(sender);
}

#[tokio::test]
async fn interim_answers_pass() {
    let (sender, _agent) = scripted(|_request, mut respond| async move {
        let mut hints = ok();
        *hints.status_mut() = StatusCode::EARLY_HINTS;
        respond.send_informational(hints).expect("sent");
        tokio::time::sleep(Duration::from_millis(50)).await;
        respond.send_response(ok(), true).expect("sent");
    })
    .await;
    let mut sender = sender.ready().await.expect("ready");
    let (mut response, _send) = sender.send_request(get("/a"), true).expect("sent");
    let interim = std::future::poll_fn(|cx| response.poll_informational(cx)).await;
    assert_eq!(interim.expect("one").expect("one").status(), 103);
    assert_eq!(response.await.expect("answered").status(), 200);
}

#[tokio::test]
async fn an_early_answer() {
    let (sender, _agent) = scripted(|_request, mut respond| async move {
        let mut head = ok();
        *head.status_mut() = StatusCode::PAYLOAD_TOO_LARGE;
        // Dropping the body resets the stream with NO_ERROR.
        respond.send_response(head, true).expect("sent");
    })
    .await;
    let mut ready = sender.clone().ready().await.expect("ready");
    let (response, mut send) = ready.send_request(get("/a"), false).expect("sent");
    send.send_data(vec![0; 30_000].into(), false).expect("sent");
    assert_eq!(response.await.expect("answered").status(), 413);
    let reset = timeout(PATIENCE, std::future::poll_fn(|cx| send.poll_reset(cx)));
    assert_eq!(
        reset.await.expect("in time").expect("a reason"),
        Reason::NO_ERROR
    );
    assert_eq!(
        ask(&sender, get("/a"), None)
            .await
            .expect("answered")
            .status(),
        413
    );
}

/// A body that turns out shorter than was said, when the head is with the application
/// already: it sees a reset, never an end.
#[tokio::test]
async fn a_body_cut_short_is_never_complete() {
    let (told, mut ends) = mpsc::channel(1);
    let (sender, _agent) = scripted(move |request, respond| {
        let told = told.clone();
        async move {
            let result = collect(&mut request.into_body()).await;
            told.send(result.is_err()).await.expect("waits");
            drop(respond);
        }
    })
    .await;
    let mut sender = sender.ready().await.expect("ready");
    let request = Request::post("http://a/")
        .header("content-length", "6")
        .body(())
        .expect("a request");
    let (response, mut send) = sender.send_request(request, false).expect("sent");
    send.send_data("abc".into(), false).expect("sent");
    tokio::time::sleep(Duration::from_millis(50)).await;
    send.send_data(Bytes::new(), true).expect("sent");
    assert!(response.await.is_err());
    assert_eq!(
        timeout(PATIENCE, ends.recv()).await.expect("in time"),
        Some(true)
    );
}

#[tokio::test]
async fn a_client_that_breaks_breaks_its_streams() {
    let (told, mut resets) = mpsc::channel(1);
    let address = serving(move |request, respond| {
        let told = told.clone();
        async move {
            let result = collect(&mut request.into_body()).await;
            told.send(result.is_err()).await.expect("waits");
            drop(respond);
        }
    })
    .await;
    let (client, agent) = Agent::start(Speaks::Http2, limits(), Some(address)).await;
    let (mut sender, connection) = client::handshake(client).await.expect("HTTP/2");
    let connection = tokio::spawn(connection);
    let (_response, mut send) = sender.send_request(get("/a"), false).expect("sent");
    send.send_data("abc".into(), false).expect("sent");
    while agent.notes.live.load(Ordering::SeqCst) == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    connection.abort();
    assert_eq!(
        timeout(PATIENCE, resets.recv()).await.expect("in time"),
        Some(true)
    );
}
