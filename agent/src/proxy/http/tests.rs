//! In-process tests: a gate that decides by path, clients and applications that speak
//! raw bytes, or HTTP/2 by its library.

mod drain;
mod frames;
mod h1;
mod h2;
mod parts;
mod smuggling_http1;
mod smuggling_http2;

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use ::http::{HeaderName, HeaderValue, StatusCode};
use bytes::BytesMut;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
    time::timeout,
};

use super::{Gate, Held, HttpError, Io, Limits, Pass};
use crate::{
    lifecycle::{Trigger, drain},
    proxy::splice::{Counters, End},
    request::{Edits, Reply, Request},
};

/// A test that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(20);

fn limits() -> Limits {
    Limits {
        head_bytes: 16 << 10,
        header_count: 64,
        head_timeout: Duration::from_secs(10),
        streams: 64,
        stream_window: 64 << 10,
        resets: 20,
    }
}

/// What has become known to the gate.
struct Notes {
    judged: Mutex<Vec<String>>,
    malformed: Mutex<Vec<u16>>,
    answered: Mutex<Vec<u16>>,
    dials: AtomicUsize,
    live: AtomicUsize,
    revoked: watch::Sender<bool>,
}

fn notes() -> Arc<Notes> {
    Arc::new(Notes {
        judged: Mutex::default(),
        malformed: Mutex::default(),
        answered: Mutex::default(),
        dials: AtomicUsize::new(0),
        live: AtomicUsize::new(0),
        revoked: watch::channel(false).0,
    })
}

/// Denies `/denied...`; edits `/edited...`; revokes on demand.
struct TestGate {
    /// `None`: it cannot be reached.
    application: Option<std::net::SocketAddr>,
    notes: Arc<Notes>,
}

struct TestHeld {
    notes: Arc<Notes>,
    revoked: watch::Receiver<bool>,
}

impl Gate for TestGate {
    type Held = TestHeld;
    type Permit = ();

    async fn judge(&self, request: &Request<'_>) -> Result<Pass<TestHeld, ()>, Reply> {
        let line = format!("{} {} {}", request.method, request.host, request.path);
        self.notes
            .judged
            .lock()
            .expect("no test panicked")
            .push(line);
        if request.path.starts_with("/denied") {
            let mut reply = Reply::new(StatusCode::FORBIDDEN, "RBAC: access denied, 100%");
            reply.headers.push((
                HeaderName::from_static("x-why"),
                HeaderValue::from_static("policy"),
            ));
            return Err(reply);
        }
        let mut edits = Edits::default();
        if request.path.starts_with("/edited") {
            edits.remove = vec![HeaderName::from_static("x-secret")];
            edits.set = vec![(
                HeaderName::from_static("x-subject"),
                HeaderValue::from_static("alice"),
            )];
            edits.path = Some("/changed".into());
        }
        self.notes.live.fetch_add(1, Ordering::SeqCst);
        Ok(Pass {
            edits,
            permit: (),
            held: TestHeld {
                notes: self.notes.clone(),
                revoked: self.notes.revoked.subscribe(),
            },
        })
    }

    async fn dial(&self, _permit: &()) -> io::Result<Io> {
        self.notes.dials.fetch_add(1, Ordering::SeqCst);
        let application = self.application.ok_or(io::ErrorKind::ConnectionRefused)?;
        let stream = TcpStream::connect(application).await?;
        stream.set_nodelay(true)?;
        Ok(Io::upstream(End::Tcp(stream)))
    }

    fn malformed(&self, status: StatusCode, _why: &str) {
        let mut malformed = self.notes.malformed.lock().expect("no test panicked");
        malformed.push(status.as_u16());
    }
}

impl Held for TestHeld {
    async fn revoked(&mut self) {
        let _gone = self.revoked.wait_for(|revoked| *revoked).await;
    }

    fn answered(&mut self, status: StatusCode) {
        let mut answered = self.notes.answered.lock().expect("no test panicked");
        answered.push(status.as_u16());
    }
}

impl Drop for TestHeld {
    fn drop(&mut self) {
        self.notes.live.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The agent between a client and an application.
struct Agent {
    notes: Arc<Notes>,
    counters: Arc<Counters>,
    drain: Trigger,
    task: JoinHandle<Result<(), HttpError>>,
}

#[derive(Clone, Copy)]
enum Speaks {
    Http1,
    Http2,
}

impl Agent {
    /// The client's connection, and what serves it.
    async fn start(
        speaks: Speaks,
        limits: Limits,
        application: Option<std::net::SocketAddr>,
    ) -> (TcpStream, Self) {
        let notes = notes();
        let gate = Arc::new(TestGate {
            application,
            notes: notes.clone(),
        });
        let counters = Arc::new(Counters::default());
        let (client, accepted) = pair().await;
        let io = Io::new(End::Tcp(accepted), BytesMut::new()).counted(counters.clone());
        let (drain, watcher) = drain();
        let task = tokio::spawn(async move {
            match speaks {
                Speaks::Http1 => super::h1::serve(io, gate, &limits, None, watcher).await,
                Speaks::Http2 => super::h2::serve(io, gate, &limits, None, watcher).await,
            }
        });
        let agent = Self {
            notes,
            counters,
            drain,
            task,
        };
        (client, agent)
    }

    /// Lets it end when it likes; whether it does, by itself and in order.
    async fn drained(self) -> bool {
        let drained = self.drain.drain(PATIENCE).await;
        drained && matches!(self.task.await, Ok(Ok(())))
    }

    async fn ended(self) -> Result<(), HttpError> {
        timeout(PATIENCE, self.task)
            .await
            .expect("the agent ends")
            .expect("the agent does not panic")
    }
}

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
    let (client, accepted) = (client.expect("connected"), accepted.expect("accepted").0);
    client.set_nodelay(true).expect("a socket");
    accepted.set_nodelay(true).expect("a socket");
    (client, accepted)
}

/// An application that only takes note of what it gets.
async fn recorder() -> (std::net::SocketAddr, Arc<Mutex<Vec<u8>>>) {
    let bytes = Arc::new(Mutex::new(Vec::new()));
    let heard = bytes.clone();
    let (address, _task) = application(move |mut stream| {
        let heard = heard.clone();
        async move {
            let mut buffer = [0; 4096];
            while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                heard
                    .lock()
                    .expect("no test panicked")
                    .extend_from_slice(&buffer[..read]);
            }
        }
    })
    .await;
    (address, bytes)
}

/// An application that treats each connection so.
async fn application<F>(
    handle: impl Fn(TcpStream) -> F + Send + 'static,
) -> (std::net::SocketAddr, JoinHandle<()>)
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let task = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            stream.set_nodelay(true).expect("a socket");
            tokio::spawn(handle(stream));
        }
    });
    (address, task)
}

/// Reads up to what ends with `end`.
async fn read_until(stream: &mut TcpStream, end: &[u8]) -> Vec<u8> {
    let mut read = Vec::new();
    let reading = async {
        while !read.ends_with(end) {
            match stream.read_u8().await {
                Ok(byte) => read.push(byte),
                Err(error) => panic!("{error} after {:?}", String::from_utf8_lossy(&read)),
            }
        }
    };
    if timeout(PATIENCE, reading).await.is_err() {
        panic!("waits after {:?}", String::from_utf8_lossy(&read));
    }
    read
}

/// Reads a request's or response's head.
async fn read_head(stream: &mut TcpStream) -> String {
    String::from_utf8(read_until(stream, b"\r\n\r\n").await).expect("ASCII")
}

async fn read_exact(stream: &mut TcpStream, count: usize) -> Vec<u8> {
    let mut read = vec![0; count];
    timeout(PATIENCE, stream.read_exact(&mut read))
        .await
        .expect("in time")
        .expect("so many bytes");
    read
}

/// Reads to the end; whether it was an orderly one.
async fn read_to_end(stream: &mut TcpStream) -> (Vec<u8>, bool) {
    let mut read = Vec::new();
    let result = timeout(PATIENCE, stream.read_to_end(&mut read)).await;
    (read, result.expect("in time").is_ok())
}

async fn send(stream: &mut TcpStream, bytes: impl AsRef<[u8]>) {
    stream.write_all(bytes.as_ref()).await.expect("it takes it");
}

fn status(response: &[u8]) -> u16 {
    let text = String::from_utf8_lossy(response);
    text.split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .unwrap_or_else(|| panic!("{text:?} has no status"))
}
