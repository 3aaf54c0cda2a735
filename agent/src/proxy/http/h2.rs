//! Serves a client that speaks HTTP/2 (RFC 9113) with prior knowledge: every stream
//! is a request, judged by itself, and carried over one HTTP/2 connection to the
//! application. Flow control goes from end to end: a window is opened again when
//! bytes have been written on. gRPC is HTTP/2, but for how it is refused.

mod application;
mod check;
mod forward;
mod stream;
mod watch;

use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt, stream::FuturesUnordered};
use h2::{Reason, server};
use tokio::select;

use self::{
    application::Application,
    stream::{Ended, Shared},
    watch::Watch,
};
use super::{Gate, HttpError, Io, Limits};
use crate::lifecycle::Watcher;

/// Greatest flow-control window (RFC 9113 6.9.1).
const MAX_WINDOW: u32 = (1 << 31) - 1;

/// Serves one connection to its end. `application` may be open already; else it is
/// dialled with the first request that is permitted, and again when it has gone.
/// Streams that are open when this is dropped are reset on both sides. With a drain the
/// client is told to go; what it has asked by then is served.
pub async fn serve<G: Gate>(
    client: Io,
    gate: Arc<G>,
    limits: &Limits,
    application: Option<Io>,
    drain: Watcher,
) -> Result<(), HttpError> {
    client.break_on_drop(true);
    let shared = Shared {
        gate,
        limits,
        application: Application::new(application, limits),
    };
    let resets = limits.resets;
    let mut connection = server::Builder::new()
        .initial_window_size(limits.stream_window)
        .initial_connection_window_size(connection_window(limits))
        .max_concurrent_streams(limits.streams)
        .max_header_list_size(u32::try_from(limits.head_bytes).unwrap_or(u32::MAX))
        .max_concurrent_reset_streams(resets)
        .max_pending_accept_reset_streams(resets)
        .max_local_error_reset_streams(Some(resets))
        .max_send_buffer_size(limits.stream_window as usize)
        .handshake::<_, Bytes>(Watch::new(client, limits.head_timeout))
        .await
        .map_err(broken)?;

    let mut streams = FuturesUnordered::new();
    // Streams that were reset before they were answered, less those that were served:
    // who resets as a habit only makes work (CVE-2023-44487).
    let mut rapid = 0usize;
    let mut leaving = false;
    let result = loop {
        select! {
            accepted = connection.accept() => match accepted {
                Some(Ok((request, respond))) => {
                    streams.push(stream::serve(&shared, request, respond));
                }
                Some(Err(error)) => break Err(broken(error)),
                None => break Ok(()),
            },
            Some(ended) = streams.next(), if !streams.is_empty() => {
                rapid = match ended {
                    Ended::Served => rapid.saturating_sub(1),
                    Ended::Reset => rapid + 1,
                };
                if rapid > resets {
                    connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
                }
            }
            // It may be about to leave: the client shall come again, and find another.
            () = shared.application.gone() => connection.graceful_shutdown(),
            () = drain.triggered(), if !leaving => {
                leaving = true;
                connection.graceful_shutdown();
            }
        }
    };
    drop((streams, connection));
    if result.is_ok() {
        shared.application.close().await;
    }
    result
}

/// As large as those of all streams: one that is not read holds up no other.
fn connection_window(limits: &Limits) -> u32 {
    limits
        .stream_window
        .saturating_mul(limits.streams)
        .clamp(limits.stream_window, MAX_WINDOW)
}

fn broken(error: h2::Error) -> HttpError {
    HttpError::Client(super::super::splice::from_h2(error))
}
