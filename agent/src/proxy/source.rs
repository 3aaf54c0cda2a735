//! The source's side of a connection whose requests may need a token: looked at, and
//! where it is HTTP, carried request by request. What is not HTTP, also where the
//! server speaks first, is carried as it is.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::BytesMut;
use http::StatusCode;
use tokio::time::{Instant, timeout_at};

use super::{
    LocalPod, Proxy,
    attach::{Attacher, Sent},
    connections::{Registered, denied},
    deliver::{carry_bytes, finish},
    dial, hbone,
    http::{Gate, Held, Io, Pass, Protocol, h1, h2 as http2, sniff},
    last_hop,
    splice::End,
    story::{Ending, Story},
};
use crate::{
    audit::{Ends, Fault},
    identity::{Session, SpiffeId},
    kernel::ClientEntry,
    lifecycle::Watcher,
    policy::Permitted,
    request::{Edits, Reply, Request},
};

/// Where a connection's requests go.
pub enum Upstream {
    /// To another node.
    Tunnel {
        proxy: Arc<Proxy>,
        pod: Arc<LocalPod>,
        address: SocketAddr,
        expected: SpiffeId,
        client: SocketAddr,
    },
    /// To a pod of this node.
    Application {
        proxy: Arc<Proxy>,
        pod: Arc<LocalPod>,
        permitted: Permitted,
        address: SocketAddr,
        client: SocketAddr,
        ends: Ends,
    },
    /// Out of the mesh.
    Direct {
        pod: Arc<LocalPod>,
        address: SocketAddr,
        limit: Duration,
    },
}

/// A connection to where requests go, and what has to stand as long as it does.
pub struct Opened {
    pub end: End,
    pub session: Option<Arc<Session>>,
    pub guard: Guard,
}

/// Held, not looked at.
pub enum Guard {
    Lease(#[expect(dead_code, reason = "it is what its drop does")] hbone::Lease),
    Client(#[expect(dead_code, reason = "it is what its drop does")] ClientEntry),
    None,
}

impl Upstream {
    /// `first`: bytes of the source that are sent on at once, to another node.
    pub async fn open(&self, first: Vec<u8>) -> Result<Opened, Ending> {
        match self {
            Self::Tunnel {
                proxy,
                pod,
                address,
                expected,
                client,
            } => match hbone::open(proxy, pod, *address, expected, *client, &first).await {
                Ok(hbone::Stream {
                    end,
                    session,
                    lease,
                }) => Ok(Opened {
                    end,
                    session: Some(session),
                    guard: Guard::Lease(lease),
                }),
                Err(error @ hbone::HboneError::Denied(_)) => {
                    Err(Ending::Refused(Fault::Policy, error.to_string()))
                }
                Err(error) => Err(Ending::Failed(error.fault(), error.to_string())),
            },
            Self::Application {
                proxy,
                pod,
                permitted,
                address,
                client,
                ends,
            } => match last_hop(proxy, permitted, pod, ends, *address, *client).await {
                Ok((stream, entry)) => Ok(Opened {
                    end: End::Tcp(stream),
                    session: None,
                    guard: Guard::Client(entry),
                }),
                Err(error) => Err(Ending::Failed(
                    Fault::Destination,
                    format!("{address}: {error}"),
                )),
            },
            Self::Direct {
                pod,
                address,
                limit,
            } => match dial(&pod.netns, None, *address, *limit).await {
                Ok(stream) => Ok(Opened {
                    end: End::Tcp(stream),
                    session: None,
                    guard: Guard::None,
                }),
                Err(error) => Err(Ending::Failed(
                    Fault::Destination,
                    format!("{address}: {error}"),
                )),
            },
        }
    }
}

/// A connection that stands at both ends, and whose requests may need a token.
pub struct Sending<'a> {
    pub upstream: Upstream,
    pub attacher: Arc<Attacher>,
    pub story: &'a mut Story,
    pub drain: Watcher,
    /// Where it was judged here, for its destination.
    pub live: Option<Registered>,
}

impl Sending<'_> {
    /// Carries it to its end.
    pub async fn carry(self, source: End, opened: Opened) -> Ending {
        let limits = self.story.proxy().http.clone();
        let Self {
            upstream,
            attacher,
            story,
            drain,
            mut live,
        } = self;
        let mut source = Io::new(source, BytesMut::new());
        let mut first = Io::upstream(opened.end);
        let looked = async {
            tokio::select! {
                biased;
                found = sniff(&mut source, &limits) => found,
                spoken = speaks_first(&mut first) => spoken.map(|()| Protocol::NotHttp),
            }
        };
        let protocol = tokio::select! {
            biased;
            denial = denied(&mut live) => Err(Ending::Denied(denial)),
            () = drain.time_is_up() => Err(Ending::Drained),
            found = looked => {
                found.map_err(|e| {
                    Ending::Failed(Fault::Source, format!("before its first request: {e}"))
                })
            }
        };
        let protocol = match protocol {
            Ok(protocol) => protocol,
            Err(ending) => {
                source.reset();
                first.reset();
                return ending;
            }
        };
        if protocol == Protocol::NotHttp {
            return opaque(source, first, live, story, drain, &limits).await;
        }
        story.protocol = Some(match protocol {
            Protocol::Http2 => "http/2",
            _ => "http/1",
        });
        attacher.begin(story);
        let source = source.counted(story.counters.clone());
        let gate = Arc::new(SourceGate {
            attacher,
            upstream,
            guards: Mutex::new(vec![opened.guard]),
        });
        let leave = drain.clone();
        let http = async {
            match protocol {
                Protocol::Http2 => http2::serve(source, gate, &limits, Some(first), leave).await,
                _ => h1::serve(source, gate, &limits, Some(first), leave).await,
            }
        };
        tokio::select! {
            biased;
            denial = denied(&mut live) => Ending::Denied(denial),
            () = drain.time_is_up() => Ending::Drained,
            done = http => match done {
                Ok(()) => Ending::Closed,
                Err(error) => Ending::Failed(error.fault(), error.to_string()),
            },
        }
    }
}

/// Passes on what was read already, and then whatever comes.
async fn opaque(
    source: Io,
    destination: Io,
    mut live: Option<Registered>,
    story: &mut Story,
    drain: Watcher,
    limits: &super::http::Limits,
) -> Ending {
    let ((mut source, sent), (mut destination, said)) = (source.into_end(), destination.into_end());
    let (asked, answered) = (sent.len(), said.len());
    let passing = async {
        // Of one side only: the other has said nothing yet.
        let mut to = Io::new(destination, BytesMut::new());
        to.write(&sent).await?;
        let mut back = Io::new(source, BytesMut::new());
        back.write(&said).await?;
        Ok::<_, io::Error>((back.into_end().0, to.into_end().0))
    };
    // Who does not take these few bytes must not hold the agent.
    let passed = tokio::time::timeout(limits.head_timeout, passing).await;
    (source, destination) = match passed {
        Ok(Ok(ends)) => ends,
        Ok(Err(error)) => return Ending::Failed(Fault::Network, error.to_string()),
        Err(_elapsed) => {
            return Ending::Failed(Fault::Network, "its first bytes were not taken".into());
        }
    };
    story.counters.add_sent(asked);
    story.counters.add_received(answered);
    let counters = &story.counters;
    let ending = carry_bytes(&mut source, &mut destination, &mut live, counters, &drain).await;
    finish(source, destination, &ending);
    ending
}

/// Returns when the other side has said something that no HTTP server says first, or
/// has ended; what it said stays in the buffer. HTTP/2 servers begin with their
/// settings (RFC 9113 3.4); one that gives up on a client says why.
async fn speaks_first(upstream: &mut Io) -> io::Result<()> {
    const FRAME_HEAD: usize = 9;
    const MOMENT: Duration = Duration::from_secs(1);
    const CHUNK: usize = 4096;
    if upstream.fill(CHUNK).await? == 0 {
        return Ok(());
    }
    let until = Instant::now() + MOMENT;
    loop {
        let heard = upstream.buffered();
        let settings = heard.len() >= FRAME_HEAD
            && heard[3] == 4
            && heard[..2] == [0, 0]
            && heard[5..FRAME_HEAD] == [0; 4];
        if settings || heard.starts_with(b"HTTP/") {
            return std::future::pending().await;
        }
        let partial = heard.len() < FRAME_HEAD
            && (b"HTTP/".starts_with(heard) || heard.starts_with(&[0, 0]) || heard == [0]);
        if !partial {
            return Ok(());
        }
        match timeout_at(until, upstream.fill(CHUNK)).await {
            Ok(Ok(1..)) => {}
            Ok(Err(error)) => return Err(error),
            Ok(Ok(0)) | Err(_) => return Ok(()),
        }
    }
}

/// Puts tokens on requests. Whether they are let in is the destination's to say.
struct SourceGate {
    attacher: Arc<Attacher>,
    upstream: Upstream,
    guards: Mutex<Vec<Guard>>,
}

/// A request that runs.
struct SourceHeld(Option<Sent>);

impl Gate for SourceGate {
    type Held = SourceHeld;
    type Permit = ();

    async fn judge(&self, request: &Request<'_>) -> Result<Pass<SourceHeld, ()>, Reply> {
        let (edits, sent) = match self.attacher.attach(request).await? {
            Some((edits, sent)) => (edits, Some(sent)),
            None => (Edits::default(), None),
        };
        Ok(Pass {
            edits,
            permit: (),
            held: SourceHeld(sent),
        })
    }

    async fn dial(&self, (): &()) -> io::Result<Io> {
        let opened = self.upstream.open(Vec::new()).await;
        let Opened { end, guard, .. } = opened.map_err(|ending| match ending {
            Ending::Refused(_, why) | Ending::Failed(_, why) => io::Error::other(why),
            _ => io::ErrorKind::ConnectionRefused.into(),
        })?;
        let mut guards = self.guards.lock().expect("no panic while it is held");
        // An earlier connection is gone, or about to go.
        let old = guards.len().saturating_sub(3);
        guards.drain(..old);
        guards.push(guard);
        Ok(Io::upstream(end))
    }

    fn malformed(&self, status: StatusCode, why: &str) {
        tracing::debug!(%status, why, "a request that a pod sent is malformed");
    }
}

impl Held for SourceHeld {
    async fn revoked(&mut self) {
        std::future::pending().await
    }

    fn answered(&mut self, status: StatusCode) {
        if let Some(sent) = &mut self.0 {
            sent.answered(status);
        }
    }

    fn unauthenticated(&mut self) {
        if let Some(sent) = &mut self.0 {
            sent.not_taken();
        }
    }
}
