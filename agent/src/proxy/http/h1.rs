//! Serves a client that speaks HTTP/1 (RFC 9112): reads its requests one by one, has
//! each judged, and exchanges it with the application over a connection of its own.
//! Requests sent ahead wait in the client's connection. Nothing of a request reaches
//! the application before its head is found well-formed and is permitted.

mod body;
mod exchange;

use std::{future::pending, sync::Arc};

use bytes::BytesMut;
use http::StatusCode;
use tokio::{
    select,
    time::{Instant, timeout, timeout_at},
};

use self::{body::Incoming, exchange::Outcome};
use super::{
    BadRequest, Gate, Held, HttpError, Io, LINGER, LINGER_BYTES, Limits, Pass,
    head::{self, Head},
    io::HEAD_CHUNK,
    reply,
};
use crate::{lifecycle::Watcher, request::Reply};

/// Body of a refused request that is read so that the connection can live on, bytes.
const DRAINED: u64 = 64 << 10;

/// Serves one connection to its end. `application` may be open already; else it is
/// dialled with the first request that is permitted. However it ends, both
/// connections are closed: in order, or broken where a message was not complete. With a
/// drain it ends in order behind the next response, which says so.
pub async fn serve<G: Gate>(
    client: Io,
    gate: Arc<G>,
    limits: &Limits,
    application: Option<Io>,
    drain: Watcher,
) -> Result<(), HttpError> {
    client.break_on_drop(true);
    let mut connection = Connection {
        client,
        application,
        gate,
        limits,
        drain,
        reused: false,
        out: BytesMut::new(),
    };
    let result = connection.run().await;
    // What is dropped without having been closed in order is broken.
    drop(connection);
    result
}

struct Connection<'a, G> {
    client: Io,
    application: Option<Io>,
    gate: Arc<G>,
    limits: &'a Limits,
    drain: Watcher,
    /// The application's connection has served a request.
    reused: bool,
    /// To be written; kept between requests.
    out: BytesMut,
}

enum Next {
    Head(Head),
    Refused(BadRequest),
    /// The client or the application has ended in order.
    Ended,
}

impl<G: Gate> Connection<'_, G> {
    async fn run(&mut self) -> Result<(), HttpError> {
        loop {
            match self.next().await? {
                Next::Head(head) => {
                    // What it takes is not to be kept while the connection idles.
                    if !Box::pin(self.request(head)).await? {
                        return self.close().await;
                    }
                }
                Next::Refused(bad) => return self.malformed(bad, false).await,
                Next::Ended => return self.close().await,
            }
        }
    }

    /// Reads the next head. Between requests a client may wait as long as it likes;
    /// once it has begun, not.
    async fn next(&mut self) -> Result<Next, HttpError> {
        let mut deadline = None;
        let mut unseen = 0;
        loop {
            let buffer = &mut self.client.buffer;
            // Without a new line's end there is nothing new to be seen.
            if buffer[unseen..].contains(&b'\n') || buffer.len() >= self.limits.head_bytes {
                match head::parse(buffer, self.limits) {
                    Ok(Some(head)) => return Ok(Next::Head(head)),
                    Ok(None) => {}
                    Err(bad) => return Ok(Next::Refused(bad)),
                }
            }
            unseen = buffer.len();
            if unseen > 0 && deadline.is_none() {
                deadline = Some(Instant::now() + self.limits.head_timeout);
            }
            let application = &mut self.application;
            let silent = async {
                match application {
                    Some(application) => application.fill(HEAD_CHUNK).await,
                    None => pending().await,
                }
            };
            let more = async {
                select! {
                    biased;
                    read = self.client.fill(HEAD_CHUNK) => match read {
                        Ok(0) => Ok(false),
                        Ok(_) => Ok(true),
                        Err(error) => Err(HttpError::Client(error)),
                    },
                    // It ends, or answers what nobody has asked: in neither case can
                    // the next request be given to it.
                    read = silent => match read {
                        Ok(_) => Ok(false),
                        Err(error) => Err(HttpError::Application(error)),
                    },
                }
            };
            let more = match deadline {
                None => more.await,
                Some(deadline) => match timeout_at(deadline, more).await {
                    Ok(more) => more,
                    Err(_elapsed) => {
                        return Ok(Next::Refused(BadRequest::new(
                            StatusCode::REQUEST_TIMEOUT,
                            "the head took too long",
                        )));
                    }
                },
            };
            if !more? {
                return Ok(Next::Ended);
            }
        }
    }

    /// Serves one request; says whether another may follow.
    async fn request(&mut self, head: Head) -> Result<bool, HttpError> {
        let mut body = Incoming::new(head.body, self.limits);
        let mut first = BytesMut::new();
        // A body that is found malformed now costs the application nothing.
        if let Err(bad) = body.take(&mut self.client.buffer, &mut first) {
            return self
                .malformed(bad, head.method() == "HEAD")
                .await
                .map(|()| false);
        }
        let mut pass = match self.gate.judge(&head.request()).await {
            Ok(pass) => pass,
            Err(reply) => return self.refuse(&head, body, &reply).await,
        };
        if self.application.is_none() {
            match self.gate.dial(&pass.permit).await {
                Ok(application) => self.application = Some(application),
                Err(_unreachable) => {
                    pass.held.answered(StatusCode::SERVICE_UNAVAILABLE);
                    drop(pass);
                    return self.refuse(&head, body, &reply::unreachable()).await;
                }
            }
            self.reused = false;
        }
        self.out.clear();
        head.write(&pass.edits, &mut self.out);
        self.out.extend_from_slice(&first);
        drop(first);
        self.exchange(&head, body, pass).await
    }

    async fn exchange(
        &mut self,
        head: &Head,
        body: Incoming,
        pass: Pass<G::Held, G::Permit>,
    ) -> Result<bool, HttpError> {
        let Pass {
            edits, mut held, ..
        } = pass;
        let application = self.application.as_mut().expect("it has been dialled");
        let to_head = head.method() == "HEAD";
        let ended = exchange::exchange(
            &mut self.client,
            application,
            exchange::Asked {
                head,
                body,
                edits: &edits,
                out: &self.out,
                drain: &self.drain,
            },
            self.limits,
            &mut held,
        )
        .await;
        let reused = std::mem::replace(&mut self.reused, true);
        match ended {
            Outcome::Answered { keep, sent } => {
                if !sent {
                    // It must not take what it has for all of the request.
                    self.application = None;
                }
                Ok(keep && head.keep_alive)
            }
            Outcome::Switched => {
                exchange::tunnel(&mut self.client, application, &mut held).await?;
                Ok(false)
            }
            // It may have closed its idle connection while the request was under way: so
            // the client will see it, and may try again (RFC 9112 9.3.1).
            Outcome::Unanswered(error @ HttpError::Application(_)) if reused => {
                self.application = None;
                self.close().await?;
                Err(error)
            }
            Outcome::Unanswered(error) => {
                // The application must not take what it has for all of the request.
                self.application = None;
                let reply = match &error {
                    HttpError::Malformed(bad) => {
                        self.gate.malformed(bad.status, bad.why);
                        Reply::from(*bad)
                    }
                    HttpError::Revoked => reply::revoked(),
                    HttpError::Client(_) => return Err(error),
                    HttpError::Application(_) | HttpError::Response(_) => reply::no_answer(),
                };
                held.answered(reply.status);
                self.answer(&reply, to_head, true).await?;
                self.close().await?;
                Err(error)
            }
            Outcome::Broken(error) => {
                if let HttpError::Malformed(bad) = &error {
                    self.gate.malformed(bad.status, bad.why);
                }
                Err(error)
            }
        }
    }

    /// Answers in the application's stead; says whether another request may follow.
    async fn refuse(
        &mut self,
        head: &Head,
        mut body: Incoming,
        reply: &Reply,
    ) -> Result<bool, HttpError> {
        // Who waits for 100 may send the body or not: what comes next is unknown.
        let readable = body.is_done() || !head.expect && body.left() <= DRAINED;
        let keep = head.keep_alive && readable && !self.drain.is_triggered();
        self.answer(reply, head.method() == "HEAD", !keep).await?;
        if !keep || body.is_done() {
            return Ok(keep);
        }
        let drained = timeout(
            self.limits.head_timeout,
            body.drain(&mut self.client, DRAINED),
        );
        match drained.await {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(HttpError::Malformed(bad))) => {
                self.gate.malformed(bad.status, bad.why);
                Ok(false)
            }
            Ok(Err(error)) => Err(error),
            Err(_elapsed) => Ok(false),
        }
    }

    /// Refuses what has no certain end, and all that follows it.
    async fn malformed(&mut self, bad: BadRequest, to_head: bool) -> Result<(), HttpError> {
        self.gate.malformed(bad.status, bad.why);
        self.answer(&Reply::from(bad), to_head, true).await?;
        self.close().await?;
        Err(HttpError::Malformed(bad))
    }

    async fn answer(&mut self, reply: &Reply, to_head: bool, close: bool) -> Result<(), HttpError> {
        self.out.clear();
        reply::write_http1(reply, to_head, close, &mut self.out);
        // A client that does not read must not hold the agent.
        match timeout(self.limits.head_timeout, self.client.write(&self.out)).await {
            Ok(result) => result.map_err(HttpError::Client),
            Err(_elapsed) => Err(HttpError::Client(std::io::ErrorKind::TimedOut.into())),
        }
    }

    /// Closes both connections in order. All that was asked has been answered.
    async fn close(&mut self) -> Result<(), HttpError> {
        let mut application = self.application.take();
        if let Some(application) = &mut application {
            // One that is gone already needs no end.
            let _gone = application.finish().await;
            application.break_on_drop(false);
        }
        self.client.finish().await.map_err(HttpError::Client)?;
        let client = &mut self.client;
        let leaving = async move {
            if let Some(mut application) = application {
                application.ended().await;
            }
        };
        let lingering = async {
            let mut left = LINGER_BYTES;
            while left > 0 {
                client.buffer.clear();
                match client.fill(HEAD_CHUNK).await {
                    Ok(0) | Err(_) => break,
                    Ok(read) => left = left.saturating_sub(read),
                }
            }
        };
        // It has had its time, and its answer.
        let both = async { tokio::join!(lingering, leaving) };
        let _lingered = timeout(LINGER, both).await;
        self.client.break_on_drop(false);
        Ok(())
    }
}
