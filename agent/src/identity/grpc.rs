//! gRPC to those who sign: one call or one stream, bounded in time and size. What fails
//! is told with its cause, and without control characters: the text is a peer's.

use std::{path::PathBuf, time::Duration};

use http::uri::PathAndQuery;
use hyper_util::rt::TokioIo;
use prost::Message;
use tonic::{
    Code, Status, Streaming,
    client::Grpc,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;

use crate::fetch::causes;

/// Longest text of a refusal that is told, in characters.
const MAX_TEXT: usize = 300;

#[derive(Debug, thiserror::Error)]
pub enum GrpcError {
    #[error("{code:?}: {text}")]
    Refused { code: Code, text: String },
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("{0}")]
    Unreachable(String),
}

impl GrpcError {
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Refused { code, .. } => Some(*code),
            Self::Timeout(_) | Self::Unreachable(_) => None,
        }
    }
}

impl From<Status> for GrpcError {
    fn from(status: Status) -> Self {
        use std::error::Error as _;
        // A status that was made here, for want of a connection, has a cause.
        match status.source() {
            Some(source) => Self::Unreachable(readable(&causes(source))),
            None => Self::Refused {
                code: status.code(),
                text: readable(status.message()),
            },
        }
    }
}

/// A channel to a socket of this host, opened when it is used and again when it breaks.
/// Needs a runtime.
pub fn unix_channel(socket: PathBuf, limit: Duration) -> Channel {
    // No pings: servers in Go take frequent ones for an attack.
    Endpoint::from_static("http://localhost")
        .connect_timeout(limit)
        .connect_with_connector_lazy(tower::service_fn(move |_uri| {
            let socket = socket.clone();
            async move {
                let stream = tokio::net::UnixStream::connect(socket).await?;
                Ok::<_, std::io::Error>(TokioIo::new(stream))
            }
        }))
}

pub async fn call<Q, A>(
    channel: Channel,
    path: &'static str,
    request: tonic::Request<Q>,
    most: usize,
    limit: Duration,
) -> Result<A, GrpcError>
where
    Q: Message + Default + 'static,
    A: Message + Default + 'static,
{
    let mut grpc = Grpc::new(channel).max_decoding_message_size(most);
    let exchange = async {
        let ready = grpc.ready().await;
        ready.map_err(|e| GrpcError::Unreachable(readable(&causes(&e))))?;
        let codec: ProstCodec<Q, A> = ProstCodec::default();
        let answer = grpc.unary(request, PathAndQuery::from_static(path), codec);
        Ok(answer.await?.into_inner())
    };
    let answer = tokio::time::timeout(limit, exchange).await;
    answer.unwrap_or(Err(GrpcError::Timeout(limit)))
}

/// `limit` is for the stream to open; its messages come when they come.
pub async fn subscribe<Q, A>(
    channel: Channel,
    path: &'static str,
    request: Q,
    most: usize,
    limit: Duration,
) -> Result<Streaming<A>, GrpcError>
where
    Q: Message + Default + 'static,
    A: Message + Default + 'static,
{
    let mut grpc = Grpc::new(channel).max_decoding_message_size(most);
    let exchange = async {
        let ready = grpc.ready().await;
        ready.map_err(|e| GrpcError::Unreachable(readable(&causes(&e))))?;
        let codec: ProstCodec<Q, A> = ProstCodec::default();
        let path = PathAndQuery::from_static(path);
        let stream = grpc.server_streaming(tonic::Request::new(request), path, codec);
        Ok(stream.await?.into_inner())
    };
    let stream = tokio::time::timeout(limit, exchange).await;
    stream.unwrap_or(Err(GrpcError::Timeout(limit)))
}

fn readable(text: &str) -> String {
    let seen = text.chars().filter(|c| !c.is_control());
    seen.take(MAX_TEXT).collect()
}
