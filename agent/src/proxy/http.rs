//! HTTP in the agent, where policy asks for the request. `sniff` tells whether a
//! connection speaks HTTP, `h1` and `h2` carry it request by request, each judged
//! through a [`Gate`] before the application sees a byte of it.

pub mod chunked;
pub mod h1;
pub mod h2;
pub mod head;
mod hello;
mod io;
mod reply;
mod response;
mod rules;
mod sniff;
#[cfg(test)]
mod tests;

use std::{future::Future, time::Duration};

use crate::{
    audit::Fault,
    config::Http,
    request::{Edits, Reply, Request},
};
use ::http::StatusCode;

pub use hello::server_name;
pub use io::Io;
pub use rules::BadRequest;
pub use sniff::{Protocol, classify, sniff};

/// How long, and how far, a client is read that has been told the end: a close before
/// it has stopped sending would break the connection, and with it what it was told last
/// (RFC 9112 9.6).
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: usize = 1 << 20;

/// Why a connection ended otherwise than in order.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// Answered where there was somebody to answer, and closed.
    #[error("the client's request is malformed: {0}")]
    Malformed(#[from] BadRequest),
    #[error("the client: {0}")]
    Client(#[source] std::io::Error),
    #[error("the application: {0}")]
    Application(#[source] std::io::Error),
    #[error("the application's answer is malformed: {0}")]
    Response(&'static str),
    #[error("the permission ended while the request ran")]
    Revoked,
}

impl HttpError {
    /// Whose doing it was.
    pub fn fault(&self) -> Fault {
        match self {
            Self::Malformed(_) | Self::Client(_) => Fault::Source,
            Self::Application(_) | Self::Response(_) => Fault::Destination,
            Self::Revoked => Fault::Policy,
        }
    }
}

/// Bounds of what a client may ask of the agent.
#[derive(Clone, Debug)]
pub struct Limits {
    /// A request's head, bytes: request line and headers.
    pub head_bytes: usize,
    pub header_count: usize,
    /// From the first byte of a head to its last.
    pub head_timeout: Duration,
    /// HTTP/2 streams of a connection at once.
    pub streams: u32,
    /// HTTP/2 window of a stream, bytes.
    pub stream_window: u32,
    /// HTTP/2 streams of a connection that a client may reset before they are served.
    pub resets: usize,
}

impl From<&Http> for Limits {
    fn from(http: &Http) -> Self {
        Self {
            head_bytes: http.head_bytes.0 as usize,
            header_count: http.header_count.0 as usize,
            head_timeout: http.head_timeout.0,
            streams: http.streams.0,
            stream_window: http.stream_window.0,
            resets: http.resets.0 as usize,
        }
    }
}

/// Decides on the requests of one connection, and reaches its application.
pub trait Gate: Send + Sync + 'static {
    /// A request's permission while it runs; dropped at its end.
    type Held: Held;

    /// What takes a request to its application.
    type Permit: Send + Sync;

    /// Judges one request.
    fn judge(
        &self,
        request: &Request<'_>,
    ) -> impl Future<Output = Result<Pass<Self::Held, Self::Permit>, Reply>> + Send;

    /// Opens a connection to the application.
    fn dial(&self, permit: &Self::Permit) -> impl Future<Output = std::io::Result<Io>> + Send;

    /// Takes note of what was refused before it could be judged, and why.
    fn malformed(&self, status: StatusCode, why: &str);
}

/// A request that may go on.
pub struct Pass<H, P> {
    pub edits: Edits,
    pub permit: P,
    pub held: H,
}

pub trait Held: Send + 'static {
    /// Returns when the permission ends while the request still runs: its token has
    /// expired, or policy has changed. The request is to be broken off.
    fn revoked(&mut self) -> impl Future<Output = ()> + Send;

    /// The application's status, or the agent's own where it could not be reached.
    fn answered(&mut self, status: StatusCode);

    /// The answer is gRPC's, and says that the caller's credentials do not hold (status
    /// 16): what 401 is elsewhere.
    fn unauthenticated(&mut self) {}
}
