//! The HTTP/2 connection to the application: one for all streams of a client.

use std::{io, time::Duration};

use bytes::Bytes;
use h2::client::{self, SendRequest};
use std::sync::Arc;
use tokio::{
    sync::{Mutex, Notify},
    task::{AbortHandle, JoinSet},
    time::timeout,
};

use super::{
    super::{Gate, Io, Limits},
    connection_window,
};
use crate::proxy::splice::from_h2;

/// Of a response's head, bytes.
const HEAD_BYTES: u32 = 256 << 10;

/// For the application to take note of an orderly end.
const LEAVE: Duration = Duration::from_secs(1);

pub(super) struct Application {
    builder: client::Builder,
    state: Mutex<State>,
    gone: Arc<Notify>,
}

struct State {
    /// Open, and not used yet.
    ready: Option<Io>,
    live: Option<(SendRequest<Bytes>, AbortHandle)>,
    /// Those that carry streams, old ones among them. Broken when dropped.
    drivers: JoinSet<()>,
}

impl Application {
    pub fn new(ready: Option<Io>, limits: &Limits) -> Self {
        let mut builder = client::Builder::new();
        builder
            .enable_push(false)
            .initial_window_size(limits.stream_window)
            .initial_connection_window_size(connection_window(limits))
            .max_header_list_size(HEAD_BYTES)
            .max_concurrent_reset_streams(limits.resets.max(limits.streams as usize))
            .max_send_buffer_size(limits.stream_window as usize);
        Self {
            builder,
            state: Mutex::new(State {
                ready,
                live: None,
                drivers: JoinSet::new(),
            }),
            gone: Arc::new(Notify::new()),
        }
    }

    /// Ready to take a request.
    pub async fn sender<G: Gate>(
        &self,
        gate: &G,
        permit: &G::Permit,
    ) -> io::Result<SendRequest<Bytes>> {
        let (sender, fresh) = self.connected(gate, permit, false).await?;
        match sender.ready().await {
            Ok(sender) => Ok(sender),
            Err(error) if fresh => Err(from_h2(error)),
            // It no longer takes any; those that it has go on.
            Err(_leaving) => {
                let (sender, _) = self.connected(gate, permit, true).await?;
                sender.ready().await.map_err(from_h2)
            }
        }
    }

    async fn connected<G: Gate>(
        &self,
        gate: &G,
        permit: &G::Permit,
        anew: bool,
    ) -> io::Result<(SendRequest<Bytes>, bool)> {
        let mut state = self.state.lock().await;
        if let Some((sender, driver)) = &state.live
            && !anew
            && !driver.is_finished()
        {
            return Ok((sender.clone(), false));
        }
        state.live = None;
        let stream = match state.ready.take() {
            Some(stream) => stream,
            None => gate.dial(permit).await?,
        };
        let handshake = self.builder.handshake(stream);
        let (sender, connection) = handshake.await.map_err(from_h2)?;
        let gone = self.gone.clone();
        let driver = state.drivers.spawn(async move {
            // Each stream learns of an error by itself.
            let _ended = connection.await;
            gone.notify_one();
        });
        state.live = Some((sender.clone(), driver));
        Ok((sender, true))
    }

    /// Returns when a connection has ended.
    pub async fn gone(&self) {
        self.gone.notified().await;
    }

    /// Ends in order. No stream is left.
    pub async fn close(self) {
        let mut state = self.state.into_inner();
        // Without one who could send, the connection ends itself.
        state.live = None;
        let all = async { while state.drivers.join_next().await.is_some() {} };
        let _in_time = timeout(LEAVE, all).await;
    }
}
