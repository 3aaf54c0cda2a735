//! One stream: a request and its response, both under way at once.

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream, client::ResponseFuture, server::SendResponse};
use http::{Request, Response, StatusCode, Uri, header, request::Parts, uri};
use tokio::select;

use super::{
    super::{BadRequest, Gate, Held, Limits, Pass, reply, rules},
    application::Application,
    check::check,
    forward::{Cut, Rest, Why, finish, forward, reset, why},
};
use crate::request::{Edits, Reply};

/// What all streams of a connection share.
pub(super) struct Shared<'a, G> {
    pub gate: Arc<G>,
    pub limits: &'a Limits,
    pub application: Application,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    Served,
    /// By the client, before it had an answer.
    Reset,
}

/// Why a stream is broken off.
enum Off {
    /// The client has reset its stream, or is gone.
    Client(Why),
    /// The application, likewise.
    Application(Why),
    Malformed(BadRequest),
    Revoked,
}

pub(super) async fn serve<G: Gate>(
    shared: &Shared<'_, G>,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) -> Ended {
    let (mut parts, mut body) = request.into_parts();
    let manner = Manner {
        grpc: false,
        to_head: parts.method == http::Method::HEAD,
    };
    let (path, host) = match check(&parts, shared.limits) {
        Ok(checked) => checked,
        Err(bad) => {
            shared.gate.malformed(bad.status, bad.why);
            return manner.refuse(&mut respond, &Reply::from(bad));
        }
    };
    let host = host.to_owned();
    let seen = crate::request::Request {
        method: parts.method.as_str(),
        path,
        host: &host,
        headers: parts.headers.iter().collect(),
    };
    let manner = Manner {
        grpc: seen.is_grpc(),
        ..manner
    };
    let judged = select! {
        biased;
        _reset = poll_fn(|cx| respond.poll_reset(cx)) => return Ended::Reset,
        judged = shared.gate.judge(&seen) => judged,
    };
    drop(seen);
    let Pass {
        edits,
        permit,
        mut held,
    } = match judged {
        Ok(pass) => pass,
        Err(reply) => return manner.refuse(&mut respond, &reply),
    };
    let asked = match rewrite(&mut parts, &host, &edits) {
        Ok(asked) => asked,
        Err(bad) => return manner.refuse(&mut respond, &Reply::from(bad)),
    };
    let opened = select! {
        biased;
        _reset = poll_fn(|cx| respond.poll_reset(cx)) => return Ended::Reset,
        opened = open(shared, &permit, asked, body.is_end_stream()) => opened,
    };
    let Ok((answer, mut send)) = opened else {
        held.answered(StatusCode::SERVICE_UNAVAILABLE);
        return manner.refuse(&mut respond, &reply::unreachable());
    };
    let mut answered = false;
    let exchange = Exchange {
        body: &mut body,
        respond: &mut respond,
        send: &mut send,
        edits: &edits,
        answered: &mut answered,
    };
    let Err(off) = exchange.run(answer, &mut held).await else {
        return Ended::Served;
    };
    let reply = match off {
        Off::Client(why) => {
            // An end without error must not pass for that of the body.
            let reason = why.filter(|reason| *reason != Reason::NO_ERROR);
            send.send_reset(reason.unwrap_or(Reason::CANCEL));
            respond.send_reset(Reason::CANCEL);
            return match answered {
                true => Ended::Served,
                false => Ended::Reset,
            };
        }
        Off::Application(why) if answered => {
            respond.send_reset(why.unwrap_or(Reason::INTERNAL_ERROR));
            return Ended::Served;
        }
        // What it says by that, the client shall hear: it may try again.
        Off::Application(Some(reason)) => {
            held.answered(StatusCode::BAD_GATEWAY);
            respond.send_reset(reason);
            return Ended::Served;
        }
        Off::Application(None) => reply::no_answer(),
        Off::Malformed(bad) => {
            shared.gate.malformed(bad.status, bad.why);
            send.send_reset(Reason::CANCEL);
            respond.send_reset(Reason::PROTOCOL_ERROR);
            return Ended::Served;
        }
        Off::Revoked => {
            send.send_reset(Reason::CANCEL);
            if answered || !manner.grpc {
                respond.send_reset(Reason::CANCEL);
                return Ended::Served;
            }
            reply::revoked()
        }
    };
    held.answered(reply.status);
    manner.refuse(&mut respond, &reply)
}

/// How the client is answered.
#[derive(Clone, Copy)]
struct Manner {
    grpc: bool,
    to_head: bool,
}

impl Manner {
    /// Answers in the application's stead. What the client still sends is not read
    /// (RFC 9113 8.1).
    fn refuse(self, respond: &mut SendResponse<Bytes>, reply: &Reply) -> Ended {
        // A client that has gone needs no answer.
        if self.grpc {
            let _gone = respond.send_response(reply::grpc(reply), true);
        } else {
            let (head, body) = reply::http2(reply, self.to_head);
            if let Ok(mut send) = respond.send_response(head, body.is_empty())
                && !body.is_empty()
            {
                let _gone = send.send_data(body, true);
            }
        }
        Ended::Served
    }
}

/// The request as the application gets it.
fn rewrite(parts: &mut Parts, host: &str, edits: &Edits) -> Result<Request<()>, BadRequest> {
    let mut headers = std::mem::take(&mut parts.headers);
    if !edits.remove.is_empty() || !edits.set.is_empty() {
        let gone: Vec<_> = headers
            .keys()
            .filter(|name| !rules::is_framing(name) && !edits.keeps(name))
            .cloned()
            .collect();
        for name in gone {
            headers.remove(name);
        }
    }
    // Said by `:authority`.
    headers.remove(header::HOST);
    headers.remove("http2-settings");
    for (name, value) in &edits.set {
        if !rules::is_framing(name) {
            headers.append(name.clone(), value.clone());
        }
    }
    let mut target = std::mem::take(&mut parts.uri).into_parts();
    target.scheme.get_or_insert(uri::Scheme::HTTP);
    const WRONG: BadRequest = rules::bad("the target is not one");
    if target.authority.is_none() {
        target.authority = Some(host.parse().map_err(|_| WRONG)?);
    }
    if let Some(path) = &edits.path {
        target.path_and_query = Some(path.parse().map_err(|_| WRONG)?);
    }
    let mut request = Request::new(());
    *request.method_mut() = parts.method.clone();
    *request.uri_mut() = Uri::from_parts(target).map_err(|_| WRONG)?;
    *request.version_mut() = http::Version::HTTP_2;
    *request.headers_mut() = headers;
    Ok(request)
}

async fn open<G: Gate>(
    shared: &Shared<'_, G>,
    permit: &G::Permit,
    request: Request<()>,
    end: bool,
) -> std::io::Result<(ResponseFuture, SendStream<Bytes>)> {
    let mut sender = shared.application.sender(&*shared.gate, permit).await?;
    sender
        .send_request(request, end)
        .map_err(crate::proxy::splice::from_h2)
}

struct Exchange<'a> {
    body: &'a mut RecvStream,
    respond: &'a mut SendResponse<Bytes>,
    /// To the application.
    send: &'a mut SendStream<Bytes>,
    edits: &'a Edits,
    /// The client has the head of a final response.
    answered: &'a mut bool,
}

impl Exchange<'_> {
    async fn run(self, mut answer: ResponseFuture, held: &mut impl Held) -> Result<(), Off> {
        let complete = self.body.is_end_stream();
        let upload = async {
            match complete {
                true => Ok(()),
                false => upload(self.body, self.send, self.edits).await,
            }
        };
        let mut upload = pin!(upload);
        let mut sending = !complete;
        let respond = self.respond;

        let response = loop {
            let hearing = poll_fn(|cx| {
                if let Poll::Ready(heard) = hear(&mut answer, cx) {
                    return Poll::Ready(heard.map_err(Off::Application));
                }
                // A break of the client is noticed while the application thinks.
                respond
                    .poll_reset(cx)
                    .map(|reason| Err(Off::Client(reset(reason))))
            });
            match alongside(hearing, upload.as_mut(), &mut sending, held).await? {
                Heard::Interim(interim) => respond
                    .send_informational(interim)
                    .map_err(|error| Off::Client(why(&error)))?,
                Heard::Final(response) => break response,
            }
        };
        held.answered(response.status());
        if is_unauthenticated(response.headers()) {
            held.unauthenticated();
        }
        let (head, mut from) = response.into_parts();
        *self.answered = true;
        let end = from.is_end_stream();
        let mut to = respond
            .send_response(Response::from_parts(head, ()), end)
            .map_err(|error| Off::Client(why(&error)))?;
        if !end {
            let download = async {
                let rest = match forward(&mut from, &mut to).await {
                    // So ends a complete response whose request nobody reads on (RFC
                    // 9113 8.1); the library has forgotten by then that it was.
                    Err(Cut::Source(Some(Reason::NO_ERROR))) => Rest::End,
                    Err(Cut::Source(why)) => return Err(Off::Application(why)),
                    Err(Cut::Sink(why)) => return Err(Off::Client(why)),
                    Ok(rest) => rest,
                };
                finish(&mut to, rest).map_err(Off::Client)
            };
            alongside(download, upload.as_mut(), &mut sending, held).await?;
        }
        // Answered early: the application reads the rest, or resets its stream.
        if sending {
            select! {
                biased;
                sent = upload => match sent {
                    Ok(()) | Err(Off::Application(_)) => {}
                    Err(off) => return Err(off),
                },
                () = held.revoked() => return Err(Off::Revoked),
            }
        }
        Ok(())
    }
}

/// gRPC tells an early refusal in the head of its answer ("Trailers-Only").
fn is_unauthenticated(headers: &http::HeaderMap) -> bool {
    let status = headers.get("grpc-status");
    status.is_some_and(|status| status.as_bytes() == b"16")
}

enum Heard {
    Interim(Response<()>),
    Final(Response<RecvStream>),
}

fn hear(answer: &mut ResponseFuture, cx: &mut std::task::Context<'_>) -> Poll<Result<Heard, Why>> {
    if let Poll::Ready(Some(interim)) = answer.poll_informational(cx) {
        return Poll::Ready(interim.map(Heard::Interim).map_err(|e| why(&e)));
    }
    Pin::new(answer)
        .poll(cx)
        .map(|response| response.map(Heard::Final).map_err(|e| why(&e)))
}

/// Runs `main` to its end while the request goes on being sent, for as long as the
/// permission holds.
async fn alongside<T>(
    main: impl Future<Output = Result<T, Off>>,
    mut upload: Pin<&mut impl Future<Output = Result<(), Off>>>,
    sending: &mut bool,
    held: &mut impl Held,
) -> Result<T, Off> {
    let mut main = pin!(main);
    let mut revoked = pin!(held.revoked());
    loop {
        select! {
            biased;
            // Before anything is sent: dialling may have taken its time.
            () = revoked.as_mut() => return Err(Off::Revoked),
            sent = upload.as_mut(), if *sending => {
                *sending = false;
                match sent {
                    // It may have answered nevertheless.
                    Ok(()) | Err(Off::Application(_)) => {}
                    Err(off) => return Err(off),
                }
            }
            result = main.as_mut() => return result,
        }
    }
}

async fn upload(
    body: &mut RecvStream,
    send: &mut SendStream<Bytes>,
    edits: &Edits,
) -> Result<(), Off> {
    let trailers = forward(body, send).await.map_err(|off| match off {
        Cut::Source(why) => Off::Client(why),
        Cut::Sink(why) => Off::Application(why),
    })?;
    let trailers = match trailers {
        Rest::Trailers(mut trailers) => {
            if trailers.keys().any(rules::forbidden_in_trailer) {
                let why = "a trailer carries what only a header may";
                return Err(Off::Malformed(rules::bad(why)));
            }
            let gone: Vec<_> = trailers
                .keys()
                .filter(|name| !edits.keeps(name))
                .cloned()
                .collect();
            for name in gone {
                trailers.remove(name);
            }
            Rest::Trailers(trailers)
        }
        rest => rest,
    };
    finish(send, trailers).map_err(Off::Application)
}
