use std::sync::{Arc, Mutex};

use bytes::{BufMut as _, Bytes, BytesMut};
use prost::Message as _;
use tokio::net::TcpListener;

use super::{super::proto::*, *};

/// A server of the one method, which gives the same answer to all.
pub struct Double {
    port: u16,
    seen: Arc<Mutex<Vec<CheckRequest>>>,
}

impl Double {
    pub async fn new(answer: CheckResponse) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("binds");
        let port = listener.local_addr().expect("bound").port();
        let seen = Arc::<Mutex<Vec<CheckRequest>>>::default();
        let kept = seen.clone();
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let (answer, seen) = (answer.clone(), kept.clone());
                tokio::spawn(async move {
                    let mut connection = h2::server::handshake(tcp).await.expect("HTTP/2");
                    while let Some(Ok((request, respond))) = connection.accept().await {
                        tokio::spawn(serve(request, respond, answer.clone(), seen.clone()));
                    }
                });
            }
        });
        Self { port, seen }
    }

    pub fn authorizers(&self, more: &str) -> Authorizers {
        authorizers(&format!(
            "{{name: a, envoyExtAuthzGrpc: {{service: localhost, port: {}{more}}}}}",
            self.port
        ))
    }

    pub fn seen(&self) -> AttributeContext {
        let last = self.seen.lock().expect("no panic").pop();
        last.and_then(|request| request.attributes).expect("asked")
    }
}

async fn serve(
    request: ::http::Request<h2::RecvStream>,
    mut respond: h2::server::SendResponse<Bytes>,
    answer: CheckResponse,
    seen: Arc<Mutex<Vec<CheckRequest>>>,
) {
    assert_eq!(
        request.uri().path(),
        "/envoy.service.auth.v3.Authorization/Check"
    );
    let mut body = request.into_body();
    let mut message = BytesMut::new();
    while let Some(Ok(data)) = body.data().await {
        message.extend_from_slice(&data);
        let _freed = body.flow_control().release_capacity(data.len());
    }
    // A flag and the length come first (gRPC over HTTP/2, Length-Prefixed-Message).
    let question = CheckRequest::decode(&message[5..]).expect("a request");
    seen.lock().expect("no panic").push(question);
    let response = ::http::Response::builder().header("content-type", "application/grpc");
    let head = response.body(()).expect("a response");
    let mut stream = respond.send_response(head, false).expect("sends");
    let encoded = answer.encode_to_vec();
    let mut framed = BytesMut::new();
    framed.put_u8(0);
    framed.put_u32(encoded.len() as u32);
    framed.put_slice(&encoded);
    stream.send_data(framed.freeze(), false).expect("sends");
    let mut trailers = ::http::HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let _sent = stream.send_trailers(trailers);
}
