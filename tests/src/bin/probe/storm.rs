//! Many connections of one kind, counted by whoever makes them.

use std::{
    io::{self, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream, UdpSocket},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Duration,
};

use clap::ValueEnum;
use serde_json::{Value, json};
use socket2::SockRef;

use super::name;

#[derive(clap::Args)]
pub struct Storm {
    address: SocketAddr,
    #[arg(long, value_enum)]
    kind: Kind,
    #[arg(long)]
    count: usize,
    /// At once.
    #[arg(long, default_value_t = 16)]
    threads: usize,
    /// How long each of `long` stays, milliseconds.
    #[arg(long, default_value_t = 3_000)]
    stay: u64,
    /// Of `http`: every so many requests go to /private instead of /.
    #[arg(long, default_value_t = 3)]
    private: usize,
}

#[derive(Clone, Copy, ValueEnum)]
enum Kind {
    /// Words echoed, then an orderly end.
    Short,
    /// As `short`, and open for a while.
    Long,
    /// A word echoed, then a break.
    Reset,
    /// Whatever policy does with it.
    Any,
    /// One HTTP/1.1 request.
    Http,
    /// UDP: a flow of three datagrams.
    Udp,
}

/// What one thread counted.
#[derive(Default)]
struct Tally {
    sent: u64,
    received: u64,
    outcomes: std::collections::BTreeMap<String, u64>,
}

pub fn run(storm: &Storm) -> Value {
    let next = AtomicUsize::new(0);
    let tallies: Vec<Tally> = thread::scope(|scope| {
        let threads: Vec<_> = (0..storm.threads)
            .map(|_| scope.spawn(|| work(storm, &next)))
            .collect();
        threads
            .into_iter()
            .map(|t| t.join().expect("no panic"))
            .collect()
    });
    let mut all = Tally::default();
    for tally in tallies {
        all.sent += tally.sent;
        all.received += tally.received;
        for (outcome, count) in tally.outcomes {
            *all.outcomes.entry(outcome).or_default() += count;
        }
    }
    json!({ "sent": all.sent, "received": all.received, "outcomes": all.outcomes })
}

fn work(storm: &Storm, next: &AtomicUsize) -> Tally {
    let mut tally = Tally::default();
    loop {
        let number = next.fetch_add(1, Ordering::Relaxed);
        if number >= storm.count {
            return tally;
        }
        let outcome = one(storm, number, &mut tally).unwrap_or_else(|error| name(&error));
        *tally.outcomes.entry(outcome).or_default() += 1;
    }
}

fn one(storm: &Storm, number: usize, tally: &mut Tally) -> io::Result<String> {
    if matches!(storm.kind, Kind::Udp) {
        // No port twice: that would be the same flow.
        let port = 10_000 + number as u16;
        let own = match storm.address {
            SocketAddr::V4(_) => SocketAddr::from(([0, 0, 0, 0], port)),
            SocketAddr::V6(_) => SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, port)),
        };
        let socket = UdpSocket::bind(own)?;
        for _ in 0..3 {
            tally.sent += socket.send_to(b"datagram", storm.address)? as u64;
        }
        return Ok("sent".into());
    }
    let mut stream = TcpStream::connect(storm.address)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let text = match storm.kind {
        Kind::Http => {
            let path = if number.is_multiple_of(storm.private) {
                "/private"
            } else {
                "/"
            };
            format!("GET {path} HTTP/1.1\r\nHost: storm\r\nConnection: close\r\n\r\n")
        }
        // Of many lengths, so that totals tell.
        _ => "word ".repeat(1 + number % 97),
    };
    stream.write_all(text.as_bytes())?;
    tally.sent += text.len() as u64;
    if matches!(storm.kind, Kind::Http) {
        let mut answer = Vec::new();
        tally.received += stream.read_to_end(&mut answer)? as u64;
        let status = String::from_utf8_lossy(&answer);
        let status = status.split(' ').nth(1).unwrap_or("none").to_owned();
        return Ok(status);
    }
    let mut back = vec![0; text.len()];
    stream.read_exact(&mut back)?;
    tally.received += back.len() as u64;
    match storm.kind {
        Kind::Reset => {
            SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
            return Ok("reset by me".into());
        }
        Kind::Long => thread::sleep(Duration::from_millis(storm.stay)),
        _ => {}
    }
    stream.shutdown(Shutdown::Write)?;
    match stream.read(&mut back)? {
        0 => Ok("eof".into()),
        more => Ok(format!("{more} bytes too many")),
    }
}

/// Takes datagrams until killed; says how many came, after each pause.
pub fn datagrams(listen: SocketAddr) -> io::Result<()> {
    let socket = UdpSocket::bind(listen)?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    super::say("listening");
    let (mut count, mut told) = (0_u64, 0);
    let mut buffer = [0; 64];
    loop {
        match socket.recv(&mut buffer) {
            Ok(_) => count += 1,
            Err(_nothing_came) if told != count => {
                told = count;
                super::say(&format!("datagrams={count}."));
            }
            Err(_nothing_came) => {}
        }
    }
}
