//! gRPC servers for tests, on HTTP/2 alone: a call's bytes go to a function, which says
//! what goes back.

use std::{future::Future, pin::Pin, sync::Arc};

use bytes::{BufMut as _, Bytes, BytesMut};
use h2::server::SendResponse;
use http::{HeaderMap, HeaderValue, Request, Response};
use prost::Message;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
};

/// A call: its path, its metadata, and its message's bytes.
pub struct Call {
    pub path: String,
    pub headers: HeaderMap,
    pub message: Bytes,
}

/// Where answers go, as many as there are.
pub struct Answers(UnboundedSender<Vec<u8>>);

/// How a call ends: well, or with a code of gRPC's.
pub type Ending = Result<(), (i32, String)>;

pub type Serve =
    Arc<dyn Fn(Call, Answers) -> Pin<Box<dyn Future<Output = Ending> + Send>> + Send + Sync>;

impl Answers {
    pub fn send(&self, message: &impl Message) {
        let _gone = self.0.send(message.encode_to_vec());
    }
}

pub async fn connection(io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, serve: Serve) {
    let Ok(mut connection) = h2::server::handshake(io).await else {
        return;
    };
    while let Some(Ok((request, respond))) = connection.accept().await {
        tokio::spawn(answer(request, respond, serve.clone()));
    }
}

async fn answer(request: Request<h2::RecvStream>, respond: SendResponse<Bytes>, serve: Serve) {
    let (head, mut body) = request.into_parts();
    let mut message = BytesMut::new();
    while let Some(Ok(data)) = body.data().await {
        message.extend_from_slice(&data);
        let _freed = body.flow_control().release_capacity(data.len());
    }
    let call = Call {
        path: head.uri.path().to_owned(),
        headers: head.headers,
        // A flag and the length come first (gRPC over HTTP/2, Length-Prefixed-Message).
        message: message.freeze().slice(5..),
    };
    let (sender, receiver) = unbounded_channel();
    forward(receiver, respond, serve(call, Answers(sender))).await;
}

async fn forward(
    mut answers: UnboundedReceiver<Vec<u8>>,
    mut respond: SendResponse<Bytes>,
    serving: Pin<Box<dyn Future<Output = Ending> + Send>>,
) {
    let response = Response::builder().header("content-type", "application/grpc");
    let response = response.body(()).expect("a response");
    let Ok(mut stream) = respond.send_response(response, false) else {
        return;
    };
    let sending = async {
        while let Some(encoded) = answers.recv().await {
            let mut framed = BytesMut::new();
            framed.put_u8(0);
            framed.put_u32(encoded.len() as u32);
            framed.put_slice(&encoded);
            let _gone = stream.send_data(framed.freeze(), false);
        }
    };
    let (ending, ()) = tokio::join!(serving, sending);
    let (code, text) = ending.err().unwrap_or_default();
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from(code));
    trailers.insert("grpc-message", HeaderValue::from_str(&text).expect("ASCII"));
    let _sent = stream.send_trailers(trailers);
}

/// A root for tests, which signs what it is asked to.
pub struct Signer {
    pub certificate: rcgen::Certificate,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Signer {
    pub fn new(name: &str) -> Self {
        let key = rcgen::KeyPair::generate().expect("a key");
        let mut params = rcgen::CertificateParams::default();
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, name);
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&key).expect("signs");
        Self {
            certificate,
            issuer: rcgen::Issuer::new(params, key),
        }
    }

    /// A leaf for these names, good for so long from a minute ago on.
    pub fn sign(
        &self,
        key: &impl rcgen::PublicKeyData,
        names: Vec<rcgen::SanType>,
        life: std::time::Duration,
    ) -> rcgen::Certificate {
        let now = std::time::SystemTime::now();
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.subject_alt_names = names;
        params.not_before = (now - std::time::Duration::from_secs(60)).into();
        params.not_after = (now + life - std::time::Duration::from_secs(60)).into();
        params.signed_by(key, &self.issuer).expect("signs")
    }
}

pub fn uri(id: &str) -> Vec<rcgen::SanType> {
    vec![rcgen::SanType::URI(id.try_into().expect("ASCII"))]
}
