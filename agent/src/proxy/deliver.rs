//! The destination's side of a connection, wherever it came from: registered,
//! judged, read where policy asks for requests, and carried to the application.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use h2::{RecvStream, server::SendResponse};
use http::{Response, StatusCode};
use tokio::{io::AsyncWriteExt as _, net::TcpStream, time::timeout};

use super::{
    LocalPod, Proxy,
    attach::Attacher,
    connections::{Registered, denied},
    fast::FastStream,
    gate::RequestGate,
    http::{Io, Limits, Protocol, h1, h2 as http2, server_name, sniff},
    last_hop,
    source::{Guard, Opened, Sending, Upstream},
    splice::{End, from_h2, splice},
    story::{Ending, Story},
};
use crate::{
    audit::Fault,
    kernel::ClientEntry,
    lifecycle::Watcher,
    policy::{Facts, Layer, Permitted, Selected, Verdict},
};

/// A connection that has come to its destination's agent.
pub enum Arrived {
    /// It stands already.
    Open(End),
    /// A CONNECT that is still to be answered.
    Asked {
        body: RecvStream,
        respond: SendResponse<Bytes>,
    },
    /// The same, on a lane.
    Offered(FastStream),
}

/// How long a client may keep a connection that nothing but a request can allow,
/// without sending one: browsers and pools open them early.
const PATIENCE: Duration = Duration::from_secs(60);

impl Arrived {
    /// Lets the other side begin.
    async fn open(self, limit: Duration) -> io::Result<End> {
        match self {
            Self::Open(end) => Ok(end),
            Self::Asked { body, mut respond } => Ok(End::Stream {
                send: respond
                    .send_response(Response::new(()), false)
                    .map_err(from_h2)?,
                recv: body,
            }),
            Self::Offered(mut stream) => {
                // A peer that takes no answer does not want the stream.
                timeout(limit, stream.accept()).await??;
                Ok(End::Fast(stream))
            }
        }
    }

    pub fn refuse(self, status: StatusCode) {
        match self {
            Self::Open(end) => end.reset(),
            Self::Asked { mut respond, .. } => answer(&mut respond, status),
            Self::Offered(stream) => stream.refuse(status),
        }
    }
}

fn answer(respond: &mut SendResponse<Bytes>, status: StatusCode) {
    let mut response = Response::new(());
    *response.status_mut() = status;
    // The peer may have gone; then nobody needs the answer.
    let _gone = respond.send_response(response, true);
}

/// One connection and all that it is judged and carried with.
pub struct Delivery<'a> {
    pub proxy: &'a Arc<Proxy>,
    pub pod: &'a Arc<LocalPod>,
    pub facts: Facts,
    /// The client's address as the application sees it.
    pub client: SocketAddr,
    pub story: &'a mut Story,
    /// The source is a pod of this node, whose requests may need a token.
    pub attacher: Option<Arc<Attacher>>,
    pub drain: Watcher,
}

/// What is left to do of a connection that was judged.
enum Next<'a> {
    Nothing(Box<Ending>),
    /// It is carried unread.
    Carry(Box<Carried>),
    /// Its requests may need tokens.
    Send(Box<(Delivery<'a>, Permitted, Carried)>),
    /// Its requests are judged.
    Read(Box<(Delivery<'a>, Arrived, Registered, Arc<Selected>)>),
}

/// A connection that stands at both ends.
struct Carried {
    source: End,
    application: TcpStream,
    client: ClientEntry,
    live: Registered,
}

impl<'a> Delivery<'a> {
    /// Judges it and carries it to its end.
    pub fn run(self, arrived: Arrived) -> impl Future<Output = Ending> {
        let (counters, drain) = (self.story.counters.clone(), self.drain.clone());
        // What judging and dialling take is not to be kept as long as the connection lasts.
        let opening = Box::pin(self.open(arrived));
        async move {
            match opening.await {
                Next::Nothing(ending) => *ending,
                Next::Carry(carried) => {
                    let Carried {
                        mut source,
                        application,
                        client: _client,
                        live,
                    } = *carried;
                    let (mut end, mut live) = (End::Tcp(application), Some(live));
                    let ending =
                        carry_bytes(&mut source, &mut end, &mut live, &counters, &drain).await;
                    finish(source, end, &ending);
                    ending
                }
                Next::Send(sent) => {
                    let (delivery, permitted, carried) = *sent;
                    Box::pin(delivery.send(permitted, carried)).await
                }
                Next::Read(read) => {
                    let (delivery, arrived, live, selected) = *read;
                    Box::pin(delivery.read(arrived, live, &selected)).await
                }
            }
        }
    }

    async fn open(self, arrived: Arrived) -> Next<'a> {
        let live = (self.proxy.connections).register(self.pod.clone(), &self.facts);
        self.story.id = live.id;
        let selected = self.proxy.selected(self.pod);
        if let Err(denial) = selected.transport(&self.facts) {
            arrived.refuse(StatusCode::FORBIDDEN);
            return Next::Nothing(Box::new(Ending::Denied(denial)));
        }
        let limit = self.proxy.transport.connect_timeout.0;
        if selected.needs_request(&self.facts).is_some() {
            live.reads_requests();
            return Next::Read(Box::new((self, arrived, live, selected)));
        }
        let identity = Some(self.pod.identity());
        self.story.told = selected.told(&self.facts, Layer::Opaque);
        let judged = (self.proxy.judge)
            .connection(&selected, &self.facts, identity, self.client)
            .await;
        let permitted = match judged {
            Ok(permitted) => permitted,
            Err(denial) => {
                arrived.refuse(StatusCode::FORBIDDEN);
                return Next::Nothing(Box::new(Ending::Denied(denial)));
            }
        };
        let (application, client) = match self.dial(&permitted).await {
            Ok(opened) => opened,
            Err(error) => {
                arrived.refuse(StatusCode::SERVICE_UNAVAILABLE);
                return Next::Nothing(Box::new(self.unreachable(&error)));
            }
        };
        let source = match arrived.open(limit).await {
            Ok(end) => end,
            Err(error) => {
                let why = format!("the tunnel: {error}");
                return Next::Nothing(Box::new(Ending::Failed(Fault::Network, why)));
            }
        };
        self.story.opened(permitted.by());
        let carried = Carried {
            source,
            application,
            client,
            live,
        };
        match self.attacher {
            Some(_) => Next::Send(Box::new((self, permitted, carried))),
            None => Next::Carry(Box::new(carried)),
        }
    }

    /// What no policy of the destination reads, and an OutboundToken of the source does.
    async fn send(self, permitted: Permitted, carried: Carried) -> Ending {
        let Carried {
            source,
            application,
            client,
            live,
        } = carried;
        let sending = Sending {
            upstream: Upstream::Application {
                proxy: self.proxy.clone(),
                pod: self.pod.clone(),
                permitted,
                address: self.facts.destination,
                client: self.client,
                ends: self.story.ends.clone(),
            },
            attacher: self.attacher.expect("looked at by the caller"),
            story: self.story,
            drain: self.drain,
            live: Some(live),
        };
        let opened = Opened {
            end: End::Tcp(application),
            session: None,
            guard: Guard::Client(client),
        };
        sending.carry(source, opened).await
    }

    /// A connection without policy: a probe of the node itself.
    pub async fn unjudged(mut self, end: End) -> Ending {
        let permitted = Permitted::probe();
        match self.dial(&permitted).await {
            Ok((stream, _client)) => self.carry(end, stream, &permitted, None).await,
            Err(error) => {
                end.reset();
                self.unreachable(&error)
            }
        }
    }

    /// Looks at the first bytes, and carries HTTP request by request. What is not
    /// HTTP is judged without a request.
    async fn read(mut self, arrived: Arrived, mut live: Registered, selected: &Selected) -> Ending {
        let limit = self.proxy.transport.connect_timeout.0;
        // What may pass unread may come from a server that speaks first.
        let mut early = None;
        if !selected.has_providers()
            && let Verdict::Allow(by) = selected.opaque(&self.facts)
            && let Ok(permitted) = Verdict::Allow(by).permit()
        {
            match self.dial(&permitted).await {
                Ok(opened) => early = Some((permitted, opened)),
                Err(error) => {
                    arrived.refuse(StatusCode::SERVICE_UNAVAILABLE);
                    return self.unreachable(&error);
                }
            }
        }
        let mut source = match arrived.open(limit).await {
            Ok(end) => Io::new(end, BytesMut::new()),
            Err(error) => return Ending::Failed(Fault::Network, format!("the tunnel: {error}")),
        };
        let limits = self.proxy.http.clone();
        let first = async {
            match &early {
                Some((_, (application, _))) => tokio::select! {
                    biased;
                    found = sniff(&mut source, &limits) => found,
                    spoken = speaks_first(application) => spoken.map(|()| Protocol::NotHttp),
                },
                None => {
                    let first = timeout(PATIENCE, sniff(&mut source, &limits)).await;
                    first.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
                }
            }
        };
        let protocol = tokio::select! {
            biased;
            denial = live.denied() => {
                source.reset();
                return Ending::Denied(denial);
            }
            () = self.drain.time_is_up() => {
                source.reset();
                return Ending::Drained;
            }
            protocol = first => protocol,
        };
        let protocol = match protocol {
            Ok(protocol) => protocol,
            Err(error) => {
                source.reset();
                return Ending::Failed(Fault::Source, format!("before its first request: {error}"));
            }
        };
        if protocol != Protocol::NotHttp {
            return self.serve(source, protocol, early, live, &limits).await;
        }
        let late = |_elapsed| Err(io::ErrorKind::TimedOut.into());
        let named = timeout(limits.head_timeout, server_name(&mut source)).await;
        match named.unwrap_or_else(late) {
            Ok(name) => self.facts.sni = name,
            // Nobody may choose not to be read.
            Err(error) if self.proxy.selected(self.pod).asks_for_sni() => {
                source.reset();
                return Ending::Failed(
                    Fault::Source,
                    format!("policy asks for its server's name: {error}"),
                );
            }
            Err(_) => {}
        }
        live.is_raw(&self.facts);
        let selected = self.proxy.selected(self.pod);
        let identity = Some(self.pod.identity());
        self.story.told = selected.told(&self.facts, Layer::Opaque);
        let judged = (self.proxy.judge)
            .connection(&selected, &self.facts, identity, self.client)
            .await;
        let permitted = match judged {
            Ok(permitted) => permitted,
            Err(denial) => {
                source.reset();
                return Ending::Denied(denial);
            }
        };
        let (mut application, _client) = match early {
            Some((_, opened)) => opened,
            None => match self.dial(&permitted).await {
                Ok(opened) => opened,
                Err(error) => {
                    source.reset();
                    return self.unreachable(&error);
                }
            },
        };
        let (end, prefix) = source.into_end();
        if let Err(error) = application.write_all(&prefix).await {
            end.reset();
            return Ending::Failed(Fault::Destination, format!("the application: {error}"));
        }
        self.story.counters.add_sent(prefix.len());
        self.carry(end, application, &permitted, Some(live)).await
    }

    async fn serve(
        self,
        source: Io,
        protocol: Protocol,
        early: Option<(Permitted, (TcpStream, ClientEntry))>,
        mut live: Registered,
        limits: &Limits,
    ) -> Ending {
        let Self {
            proxy,
            pod,
            story,
            drain,
            ..
        } = self;
        let source = source.counted(story.counters.clone());
        story.protocol = Some(match protocol {
            Protocol::Http2 => "http/2",
            _ => "http/1",
        });
        if let Some((permitted, _)) = &early {
            story.opened(permitted.by());
        }
        let dialled = early.is_some();
        let (application, entry) = match early {
            Some((_, (stream, entry))) => (Some(Io::upstream(End::Tcp(stream))), Some(entry)),
            None => (None, None),
        };
        let gate = Arc::new(RequestGate::new(
            proxy.clone(),
            pod.clone(),
            self.facts,
            self.client,
            story,
            self.attacher,
            entry,
        ));
        let (gate_of, leave) = (gate.clone(), drain.clone());
        let http = async {
            match protocol {
                Protocol::Http2 => http2::serve(source, gate_of, limits, application, leave).await,
                _ => h1::serve(source, gate_of, limits, application, leave).await,
            }
        };
        // A connection that nothing was permitted on is not kept for nothing.
        let idle = async {
            tokio::time::sleep(PATIENCE).await;
            if dialled || gate.passed().is_some() {
                std::future::pending().await
            }
        };
        let ending = tokio::select! {
            biased;
            denial = live.denied() => Ending::Denied(denial),
            () = drain.time_is_up() => Ending::Drained,
            () = idle => Ending::Refused(
                Fault::Policy,
                "no request was permitted for a minute".into(),
            ),
            done = http => match done {
                Ok(()) => Ending::Closed,
                Err(error) => Ending::Failed(error.fault(), error.to_string()),
            },
        };
        match gate.passed() {
            Some(by) if !dialled => story.opened(by.as_ref()),
            None if !dialled && matches!(ending, Ending::Closed) => {
                return Ending::Refused(Fault::Policy, "no request was permitted".into());
            }
            _ => {}
        }
        ending
    }

    async fn carry(
        &mut self,
        mut source: End,
        application: TcpStream,
        permitted: &Permitted,
        mut live: Option<Registered>,
    ) -> Ending {
        self.story.opened(permitted.by());
        let mut end = End::Tcp(application);
        let (counters, drain) = (&self.story.counters, &self.drain);
        let ending = carry_bytes(&mut source, &mut end, &mut live, counters, drain).await;
        finish(source, end, &ending);
        ending
    }

    async fn dial(&self, permitted: &Permitted) -> io::Result<(TcpStream, ClientEntry)> {
        let destination = self.facts.destination;
        last_hop(
            self.proxy,
            permitted,
            self.pod,
            &self.story.ends,
            destination,
            self.client,
        )
        .await
    }

    fn unreachable(&self, error: &io::Error) -> Ending {
        let destination = self.facts.destination;
        Ending::Failed(
            Fault::Destination,
            format!("the application at {destination}: {error}"),
        )
    }
}

/// Returns when an application has said something that no HTTP server says first.
/// HTTP/2 servers begin with their settings (RFC 9113 3.4), before they have heard
/// anything; and one that gives up says why, or nothing.
async fn speaks_first(application: &TcpStream) -> io::Result<()> {
    const FRAME_HEAD: usize = 9;
    const MOMENT: Duration = Duration::from_millis(20);
    let mut first = [0; FRAME_HEAD];
    for _ in 0..50 {
        application.readable().await?;
        let heard = match application.peek(&mut first).await? {
            0 => return Err(io::ErrorKind::ConnectionAborted.into()),
            heard => &first[..heard],
        };
        let settings = [0, 0];
        let is_settings = heard.len() == FRAME_HEAD
            && heard[3] == 4
            && heard[..2] == settings
            && heard[5..] == [0; 4];
        if is_settings || heard.starts_with(b"HTTP/") {
            return std::future::pending().await;
        }
        let partial = heard.len() < FRAME_HEAD
            && (b"HTTP/".starts_with(heard) || heard.starts_with(&settings));
        if !partial {
            return Ok(());
        }
        tokio::time::sleep(MOMENT).await;
    }
    Ok(())
}

/// Moves bytes until the connection ends by itself or by policy. A drain lets it go
/// on, until its time is up.
pub async fn carry_bytes(
    source: &mut End,
    destination: &mut End,
    live: &mut Option<Registered>,
    counters: &super::splice::Counters,
    drain: &Watcher,
) -> Ending {
    source.break_on_drop(true);
    destination.break_on_drop(true);
    tokio::select! {
        biased;
        denial = denied(live) => Ending::Denied(denial),
        () = drain.time_is_up() => Ending::Drained,
        done = splice(source, destination, counters) => match done {
            Ok(()) => Ending::Closed,
            Err(broken) => Ending::Broken(broken),
        },
    }
}

/// A connection that did not end in order is broken at both ends.
pub fn finish(source: End, destination: End, ending: &Ending) {
    if matches!(ending, Ending::Closed) {
        // What is written is still to be sent.
        source.break_on_drop(false);
        destination.break_on_drop(false);
    } else {
        source.reset();
        destination.reset();
    }
}
