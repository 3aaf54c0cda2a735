//! What is answered: all at once, or bit by bit, as a watch.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use hyper::{
    Response,
    body::{Body as HttpBody, Frame, SizeHint},
};
use serde_json::Value;
use tokio::sync::mpsc;

use crate::status::Refusal;

pub enum Body {
    Whole(Option<Bytes>),
    /// An error cuts it off.
    Stream(mpsc::Receiver<io::Result<Bytes>>),
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        match &mut *self {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|b| Ok(Frame::data(b)))),
            Self::Stream(parts) => parts
                .poll_recv(context)
                .map(|part| part.map(|part| part.map(Frame::data))),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64))
            }
            Self::Stream(_) => SizeHint::default(),
        }
    }
}

pub fn json(code: u16, value: &Value) -> Response<Body> {
    let mut response = Response::new(Body::Whole(Some(value.to_string().into())));
    *response.status_mut() = hyper::StatusCode::from_u16(code).expect("a status code of ours");
    let json = hyper::header::HeaderValue::from_static("application/json");
    response.headers_mut().insert("content-type", json);
    response
}

pub fn refusal(refusal: &Refusal) -> Response<Body> {
    let mut response = json(refusal.code, &refusal.object());
    if let Some(seconds) = refusal.retry_after {
        response.headers_mut().insert("retry-after", seconds.into());
    }
    response
}
