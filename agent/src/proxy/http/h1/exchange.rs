//! One request with its response: both flow at once, each as fast as it is taken.

use std::{
    future::Future,
    io,
    pin::{Pin, pin},
};

use bytes::{Buf, BytesMut};
use http::{StatusCode, Version};
use tokio::select;

use super::{
    super::{
        Held, HttpError, Io, Limits,
        chunked::Decoder,
        head::Head,
        io::{BODY_CHUNK, HEAD_CHUNK, Reader, Writer},
        response::{self, Answer, Asker, Framing},
    },
    body::Incoming,
};
use crate::{lifecycle::Watcher, proxy::splice, request::Edits};

/// A request that is permitted.
pub(super) struct Asked<'a> {
    pub head: &'a Head,
    pub body: Incoming,
    pub edits: &'a Edits,
    /// Its head, and what has come of its body.
    pub out: &'a BytesMut,
    pub drain: &'a Watcher,
}

/// How an exchange ended.
pub(super) enum Outcome {
    /// `keep`: the client was not told that the connection ends, and the application has got
    /// all of the request. `sent`: it has got that.
    Answered { keep: bool, sent: bool },
    /// The application has changed to another protocol.
    Switched,
    /// The client has got nothing yet of a final response.
    Unanswered(HttpError),
    /// It has got a part of it.
    Broken(HttpError),
}

#[derive(PartialEq, Eq)]
enum Sending {
    Running,
    Done,
    /// The application no longer takes the body; it may have answered nevertheless.
    Refused,
}

pub(super) async fn exchange<H: Held>(
    client: &mut Io,
    application: &mut Io,
    asked: Asked<'_>,
    limits: &Limits,
    held: &mut H,
) -> Outcome {
    let (mut from_client, mut to_client) = client.split();
    let (mut from_application, mut to_application) = application.split();
    let Asked {
        head,
        body,
        edits,
        out,
        drain,
    } = asked;
    let upload = body.upload(edits, out, &mut from_client, &mut to_application);
    let mut upload = pin!(upload);
    let mut sending = Sending::Running;

    let asker = Asker {
        head: head.method() == "HEAD",
        http10: head.version == Version::HTTP_10,
    };
    let answer = loop {
        let reading = read_head(&mut from_application, &mut to_client, asker);
        let answer = match alongside(reading, upload.as_mut(), &mut sending, held).await {
            Ok(answer) => answer,
            Err(error) => return Outcome::Unanswered(error),
        };
        let interim = answer.status.is_informational();
        if answer.status == StatusCode::SWITCHING_PROTOCOLS && head.upgrade.is_none() {
            return Outcome::Unanswered(HttpError::Response("nobody asked for another protocol"));
        }
        if !interim || answer.status == StatusCode::SWITCHING_PROTOCOLS {
            held.answered(answer.status);
            break answer;
        }
        let passing = pass(&mut from_application, &mut to_client, answer.head);
        if let Err(error) = alongside(passing, upload.as_mut(), &mut sending, held).await {
            return Outcome::Broken(error);
        }
    };

    if answer.status == StatusCode::SWITCHING_PROTOCOLS {
        let passing = pass(&mut from_application, &mut to_client, answer.head);
        return match alongside(passing, upload.as_mut(), &mut sending, held).await {
            // The request has no body, but its head may still be on its way.
            Ok(()) if sending == Sending::Running => match upload.await {
                Ok(()) => Outcome::Switched,
                Err(error) => Outcome::Broken(error),
            },
            Ok(()) => Outcome::Switched,
            Err(error) => Outcome::Broken(error),
        };
    }
    let keep = answer.keep_alive && answer.framing != Framing::Close;
    let leaving = keep && drain.is_triggered();
    let downloading = async {
        let mut head = answer.head;
        if leaving {
            let told = response::closing(&from_application.buffer[..head]);
            to_client.write(&told).await.map_err(HttpError::Client)?;
            from_application.buffer.advance(head);
            head = 0;
        }
        let (from, to) = (&mut from_application, &mut to_client);
        download(from, to, head, answer.framing, limits).await
    };
    if let Err(error) = alongside(downloading, upload.as_mut(), &mut sending, held).await {
        return Outcome::Broken(error);
    }
    // Answered early. Who is kept waits for the rest: the application reads it, or
    // ends the connection.
    if keep && sending == Sending::Running {
        let mut ending = pin!(from_application.fill(HEAD_CHUNK));
        let rest = async {
            select! {
                biased;
                sent = upload.as_mut() => sent.map(|()| Sending::Done),
                _ended = ending.as_mut() => Ok(Sending::Refused),
            }
        };
        sending = select! {
            biased;
            rest = rest => match rest {
                Ok(sending) => sending,
                Err(HttpError::Application(_)) => Sending::Refused,
                Err(error) => return Outcome::Broken(error),
            },
            () = held.revoked() => return Outcome::Broken(HttpError::Revoked),
        };
    }
    let sent = sending == Sending::Done;
    // What nobody asked for must not become the next request's answer.
    Outcome::Answered {
        keep: keep && !leaving && sent && from_application.buffer.is_empty(),
        sent,
    }
}

/// Runs `main` to its end while the request goes on being sent, for as long as the
/// permission holds.
async fn alongside<T>(
    main: impl Future<Output = Result<T, HttpError>>,
    mut upload: Pin<&mut impl Future<Output = Result<(), HttpError>>>,
    sending: &mut Sending,
    held: &mut impl Held,
) -> Result<T, HttpError> {
    let mut main = pin!(main);
    let mut revoked = pin!(held.revoked());
    loop {
        select! {
            biased;
            // Before anything is sent: dialling may have taken its time.
            () = revoked.as_mut() => return Err(HttpError::Revoked),
            sent = upload.as_mut(), if *sending == Sending::Running => match sent {
                Ok(()) => *sending = Sending::Done,
                Err(HttpError::Application(_)) => *sending = Sending::Refused,
                Err(error) => return Err(error),
            },
            result = main.as_mut() => return result,
        }
    }
}

/// Reads on, and notices a client that breaks meanwhile.
async fn fill(
    from: &mut Reader<'_>,
    to: &mut Writer<'_>,
    chunk: usize,
) -> Result<usize, HttpError> {
    select! {
        biased;
        read = from.fill(chunk) => read.map_err(HttpError::Application),
        error = to.broken() => Err(HttpError::Client(error)),
    }
}

fn cut() -> HttpError {
    HttpError::Application(io::ErrorKind::UnexpectedEof.into())
}

async fn read_head(
    from: &mut Reader<'_>,
    to: &mut Writer<'_>,
    asker: Asker,
) -> Result<Answer, HttpError> {
    loop {
        if !from.buffer.is_empty()
            && let Some(answer) =
                response::parse(from.buffer, asker).map_err(HttpError::Response)?
        {
            return Ok(answer);
        }
        if fill(from, to, HEAD_CHUNK).await? == 0 {
            return Err(match from.buffer.is_empty() {
                true => cut(),
                false => HttpError::Response("its head is cut off"),
            });
        }
    }
}

/// Passes on the bytes that come next.
async fn pass(from: &mut Reader<'_>, to: &mut Writer<'_>, bytes: usize) -> Result<(), HttpError> {
    to.write(&from.buffer[..bytes])
        .await
        .map_err(HttpError::Client)?;
    from.buffer.advance(bytes);
    Ok(())
}

/// Passes on a response, byte by byte as it is, to where its framing says that it ends.
/// `head`: as long is the part of its head that is in the buffer.
async fn download(
    from: &mut Reader<'_>,
    to: &mut Writer<'_>,
    mut head: usize,
    framing: Framing,
    limits: &Limits,
) -> Result<(), HttpError> {
    let mut body = match framing {
        Framing::Length(length) => Outgoing::Length(length),
        Framing::Chunked => Outgoing::Chunked(Box::new(Decoder::response(limits))),
        Framing::Close => Outgoing::Close,
    };
    loop {
        let part = body.follow(&from.buffer[head..])?;
        pass(from, to, head + part).await?;
        head = 0;
        if body.is_done() {
            return Ok(());
        }
        if fill(from, to, BODY_CHUNK).await? == 0 {
            return match body {
                Outgoing::Close => Ok(()),
                _ => Err(cut()),
            };
        }
    }
}

enum Outgoing {
    Length(u64),
    Chunked(Box<Decoder>),
    Close,
}

impl Outgoing {
    /// How many of these bytes belong to the body.
    fn follow(&mut self, bytes: &[u8]) -> Result<usize, HttpError> {
        match self {
            Self::Length(left) => {
                let part = usize::try_from(*left).map_or(bytes.len(), |l| l.min(bytes.len()));
                *left -= part as u64;
                Ok(part)
            }
            Self::Chunked(decoder) => {
                let mut at = 0;
                while at < bytes.len() && !decoder.is_done() {
                    at += decoder
                        .decode(&bytes[at..])
                        .map_err(|bad| HttpError::Response(bad.why))?
                        .consumed;
                }
                Ok(at)
            }
            Self::Close => Ok(bytes.len()),
        }
    }

    fn is_done(&self) -> bool {
        match self {
            Self::Length(left) => *left == 0,
            Self::Chunked(decoder) => decoder.is_done(),
            Self::Close => false,
        }
    }
}

/// Carries what follows a change of protocol, until both sides have ended.
pub(super) async fn tunnel(
    client: &mut Io,
    application: &mut Io,
    held: &mut impl Held,
) -> Result<(), HttpError> {
    let counters = client.counters().unwrap_or_default();
    let carrying = async {
        let early = std::mem::take(&mut client.buffer);
        application
            .write(&early)
            .await
            .map_err(HttpError::Application)?;
        let early = std::mem::take(&mut application.buffer);
        client.write(&early).await.map_err(HttpError::Client)?;
        splice::splice(&mut client.end, &mut application.end, &counters)
            .await
            .map_err(|broken| match broken.side {
                splice::Side::Source => HttpError::Client(broken.error),
                splice::Side::Destination => HttpError::Application(broken.error),
            })
    };
    select! {
        biased;
        result = carrying => result,
        () = held.revoked() => Err(HttpError::Revoked),
    }
}
