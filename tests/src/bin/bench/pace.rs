//! Requests at a constant rate, run of this program within a pod: when each is due is
//! settled beforehand, and its latency counts from then. A server that stalls is charged
//! with all that had to wait, and not only with the one that was on its way.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use serde_json::json;

#[derive(clap::Args)]
pub struct Pace {
    address: SocketAddr,
    /// Requests a second, over all connections.
    #[arg(long)]
    rate: u32,
    #[arg(long)]
    connections: u32,
    #[arg(long)]
    seconds: u32,
}

/// From a connection's opening, or from when its thread could be scheduled, to the first
/// request.
const AHEAD: Duration = Duration::from_millis(50);
const LIMIT: Duration = Duration::from_secs(10);

/// What one connection saw.
#[derive(Default)]
struct Seen {
    micros: Vec<u64>,
    errors: u64,
}

pub fn run(pace: &Pace) -> ExitCode {
    match measure(pace) {
        Ok(said) => {
            println!("{said}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(pace: &Pace) -> io::Result<serde_json::Value> {
    // Sleep ends when it should, not up to 50 us later; threads inherit that.
    nix::sys::prctl::set_timerslack(1)?;
    let clients = (0..pace.connections).map(|_| Client::open(pace.address));
    let clients: Vec<Client> = clients.collect::<io::Result<_>>()?;
    let start = Instant::now() + AHEAD;
    let seen = thread::scope(|scope| {
        let threads: Vec<_> = (0..)
            .zip(clients)
            .map(|(number, client)| scope.spawn(move || client.keep(pace, number, start)))
            .collect();
        let joined = threads.into_iter().map(|t| t.join().expect("no panic"));
        joined.collect::<io::Result<Vec<Seen>>>()
    })?;
    let errors: u64 = seen.iter().map(|seen| seen.errors).sum();
    let mut micros: Vec<u64> = seen.into_iter().flat_map(|seen| seen.micros).collect();
    micros.sort_unstable();
    let [p50, p99, p999] = [0.5, 0.99, 0.999].map(|q| quantile(&micros, q));
    Ok(json!({"requests": micros.len(), "errors": errors, "p50": p50, "p99": p99, "p999": p999}))
}

/// By nearest rank.
fn quantile(sorted: &[u64], q: f64) -> Option<u64> {
    let rank = (q * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied()
}

struct Client {
    address: SocketAddr,
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Client {
    fn open(address: SocketAddr) -> io::Result<Self> {
        let stream = connect(address)?;
        let mut client = Self {
            address,
            stream,
            buffer: Vec::new(),
        };
        client.request()?;
        Ok(client)
    }

    /// Makes the requests that fall to it, each when it is due.
    fn keep(mut self, pace: &Pace, number: u32, start: Instant) -> io::Result<Seen> {
        let mut seen = Seen::default();
        for index in (number..pace.rate * pace.seconds).step_by(pace.connections as usize) {
            let due = start + Duration::from_secs(1) * index / pace.rate;
            thread::sleep(due.saturating_duration_since(Instant::now()));
            match self.request() {
                Ok(()) => seen.micros.push(due.elapsed().as_micros() as u64),
                Err(_) => {
                    seen.errors += 1;
                    self.stream = connect(self.address)?;
                }
            }
        }
        Ok(seen)
    }

    fn request(&mut self) -> io::Result<()> {
        const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n";
        self.stream.write_all(REQUEST)?;
        self.buffer.clear();
        let mut chunk = [0; 4096];
        loop {
            match self.stream.read(&mut chunk)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => self.buffer.extend_from_slice(&chunk[..read]),
            }
            if let Some(length) = length(&self.buffer)?
                && self.buffer.len() >= length
            {
                return Ok(());
            }
        }
    }
}

fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(LIMIT))?;
    Ok(stream)
}

/// Of a response with its head, once that is there.
fn length(bytes: &[u8]) -> io::Result<Option<usize>> {
    const END: &[u8] = b"\r\n\r\n";
    let wrong = |what: &str| io::Error::other(what.to_owned());
    let Some(head) = bytes.windows(END.len()).position(|w| w == END) else {
        return Ok(None);
    };
    let text = String::from_utf8_lossy(&bytes[..head]).to_ascii_lowercase();
    if text.split(' ').nth(1) != Some("200") {
        return Err(wrong(&text));
    }
    let body = text
        .lines()
        .find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
    let body: usize = body.ok_or_else(|| wrong("no content-length"))?;
    Ok(Some(head + END.len() + body))
}
