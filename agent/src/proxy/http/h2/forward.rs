//! Moves one direction of a stream: data, trailers, the end.

use std::future::poll_fn;

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use http::HeaderMap;
use tokio::select;

/// What follows the data.
pub(super) enum Rest {
    /// The end has been sent with the data.
    Nothing,
    End,
    Trailers(HeaderMap),
}

pub(super) enum Cut {
    Source(Why),
    Sink(Why),
}

/// Passes data on as it is taken; what is taken is what makes room for more.
pub(super) async fn forward(
    from: &mut RecvStream,
    to: &mut SendStream<Bytes>,
) -> Result<Rest, Cut> {
    let source = |error: h2::Error| Cut::Source(why(&error));
    let sink = |error: h2::Error| Cut::Sink(why(&error));
    loop {
        let data = select! {
            biased;
            data = from.data() => data.transpose().map_err(source)?,
            reason = poll_fn(|cx| to.poll_reset(cx)) => return Err(Cut::Sink(reset(reason))),
        };
        let Some(mut data) = data else {
            break;
        };
        let length = data.len();
        let last = from.is_end_stream();
        while !data.is_empty() {
            to.reserve_capacity(data.len());
            let room = match to.capacity() {
                0 => poll_fn(|cx| to.poll_capacity(cx))
                    .await
                    .unwrap_or_else(|| Err(Reason::STREAM_CLOSED.into()))
                    .map_err(sink)?,
                room => room,
            };
            let part = data.split_to(room.min(data.len()));
            to.send_data(part, last && data.is_empty()).map_err(sink)?;
        }
        from.flow_control()
            .release_capacity(length)
            .map_err(source)?;
        if last {
            if length == 0 {
                to.send_data(Bytes::new(), true).map_err(sink)?;
            }
            return Ok(Rest::Nothing);
        }
    }
    match from.trailers().await.map_err(source)? {
        Some(trailers) => Ok(Rest::Trailers(trailers)),
        None => Ok(Rest::End),
    }
}

pub(super) fn finish(to: &mut SendStream<Bytes>, rest: Rest) -> Result<(), Why> {
    match rest {
        Rest::Nothing => Ok(()),
        Rest::End => to.send_data(Bytes::new(), true),
        Rest::Trailers(trailers) => to.send_trailers(trailers),
    }
    .map_err(|error| why(&error))
}

/// The reason for a stream's reset; `None` where the connection below has broken.
pub(super) type Why = Option<Reason>;

pub(super) fn why(error: &h2::Error) -> Why {
    error.reason().filter(|_| error.is_reset())
}

/// What is known of a stream that has been reset.
pub(super) fn reset(reason: Result<Reason, h2::Error>) -> Why {
    reason.map_or_else(|error| why(&error), Some)
}
