//! A client and a server that tell exactly what they saw of a connection: which
//! peer, which bytes, which end. Run inside pods by the end-to-end tests.

#[path = "probe/hbone.rs"]
mod hbone;
#[path = "probe/load.rs"]
mod load;
#[path = "probe/storm.rs"]
mod storm;

use std::{
    hash::{DefaultHasher, Hasher as _},
    io::{self, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Barrier},
    thread,
    time::Duration,
};

use clap::{Parser, ValueEnum};
use serde_json::{Value, json};
use socket2::SockRef;

#[derive(Parser)]
enum Cli {
    /// Serve until killed; says what it saw of each connection, a line each.
    Serve {
        #[arg(long)]
        listen: SocketAddr,
        #[arg(long, value_enum)]
        mode: Mode,
    },
    /// One connection; prints what it saw as JSON.
    Dial(Dial),
    /// So many connections, all open at once, a word echoed on each.
    Many {
        address: SocketAddr,
        #[arg(long)]
        count: usize,
    },
    /// One HBONE request, as a foreign implementation would make it; prints the
    /// status of the answer, or `error: ...`.
    Hbone {
        gate: SocketAddr,
        #[arg(long)]
        authority: String,
        /// URI name of the client's certificate.
        #[arg(long)]
        id: String,
        /// Root certificate and key, without `.pem` and `.key`.
        #[arg(long)]
        root: std::path::PathBuf,
    },
    /// Many connections of one kind; prints what it counted, as JSON.
    Storm(storm::Storm),
    /// Requests at a pace until a file appears; prints what it counted, as JSON.
    Load(load::Load),
    /// Count UDP datagrams.
    Datagrams {
        #[arg(long)]
        listen: SocketAddr,
    },
    /// A connection that echoes a word every so often, until killed or broken.
    Stay {
        address: SocketAddr,
        #[arg(long, default_value_t = 50)]
        every: u64,
    },
}

#[derive(clap::Args)]
struct Dial {
    address: SocketAddr,
    /// Text to send.
    #[arg(long, default_value = "")]
    send: String,
    /// So many bytes of the test pattern to send.
    #[arg(long, default_value_t = 0)]
    pattern: u64,
    /// End the sending direction after that.
    #[arg(long)]
    half_close: bool,
    /// Break the connection after the first answer, instead of reading to the end.
    #[arg(long)]
    reset: bool,
    /// Close at once after sending, and read nothing.
    #[arg(long)]
    leave: bool,
    /// Wait so many milliseconds before sending.
    #[arg(long, default_value_t = 0)]
    wait: u64,
    /// Give up after so many seconds without a byte.
    #[arg(long, default_value_t = 20)]
    limit: u64,
}

#[derive(Clone, Copy, ValueEnum)]
enum Mode {
    /// Send back what comes; end when the peer ends.
    Echo,
    /// Speak first, then echo.
    Greet,
    /// Read to the end, then answer with length and hash.
    Sink,
    /// Send 1 GiB of the test pattern, then end; the peer's bytes are not read.
    Source,
    /// Read once, then break the connection.
    Reset,
    /// End the sending direction at once, go on reading, tell how much came.
    HalfClose,
}

const GIB: u64 = 1 << 30;
const CHUNK: usize = 64 << 10;

fn main() -> io::Result<()> {
    match Cli::parse() {
        Cli::Serve { listen, mode } => serve(listen, mode),
        Cli::Dial(wanted) => {
            let seen = dial(&wanted);
            println!(
                "{}",
                seen.unwrap_or_else(
                    |error| json!({ "connect": name(&error), "end": name(&error) })
                )
            );
            Ok(())
        }
        Cli::Many { address, count } => many(address, count),
        Cli::Hbone {
            gate,
            authority,
            id,
            root,
        } => {
            let asked = hbone::ask(gate, &authority, &id, &root);
            println!(
                "{}",
                asked.unwrap_or_else(|error| format!("error: {error:#}"))
            );
            Ok(())
        }
        Cli::Storm(wanted) => {
            println!("{}", storm::run(&wanted));
            Ok(())
        }
        Cli::Load(wanted) => {
            println!("{}", load::run(&wanted));
            Ok(())
        }
        Cli::Datagrams { listen } => storm::datagrams(listen),
        Cli::Stay { address, every } => stay(address, every),
    }
}

fn serve(listen: SocketAddr, mode: Mode) -> io::Result<()> {
    let socket = socket2::Socket::new(
        socket2::Domain::for_address(listen),
        socket2::Type::STREAM,
        None,
    )?;
    socket.set_reuse_address(true)?;
    if listen.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.bind(&listen.into())?;
    socket.listen(4096)?;
    let listener = TcpListener::from(socket);
    say("listening");
    loop {
        let (stream, peer) = listener.accept()?;
        thread::Builder::new()
            .stack_size(256 << 10)
            .spawn(move || {
                let named = stream
                    .peer_addr()
                    .map_or_else(|e| name(&e), |a| a.to_string());
                let local = stream
                    .local_addr()
                    .map_or_else(|e| name(&e), |a| a.to_string());
                say(&format!("accept={peer} peername={named} sockname={local}"));
                let end = match answer(stream, mode) {
                    Ok(bytes) => format!("end=eof bytes={bytes}"),
                    Err(error) => format!("end={}", name(&error)),
                };
                say(&format!("{end} peer={peer}"));
            })?;
    }
}

fn answer(mut stream: TcpStream, mode: Mode) -> io::Result<u64> {
    let mut buffer = vec![0; CHUNK];
    let mut bytes = 0;
    match mode {
        Mode::Greet => stream.write_all(b"hello from the server\n")?,
        Mode::Source => {
            let mut pattern = Pattern::default();
            while bytes < GIB {
                pattern.fill(&mut buffer);
                stream.write_all(&buffer)?;
                bytes += CHUNK as u64;
            }
            stream.shutdown(Shutdown::Write)?;
            return Ok(bytes);
        }
        Mode::Reset => {
            bytes = stream.read(&mut buffer)? as u64;
            SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
            return Ok(bytes);
        }
        Mode::HalfClose => {
            stream.write_all(b"my last word\n")?;
            stream.shutdown(Shutdown::Write)?;
        }
        Mode::Echo | Mode::Sink => {}
    }
    let mut hash = DefaultHasher::new();
    loop {
        let read = stream.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        bytes += read as u64;
        match mode {
            Mode::Sink => hash.write(&buffer[..read]),
            Mode::Echo | Mode::Greet => stream.write_all(&buffer[..read])?,
            _ => {}
        }
    }
    if matches!(mode, Mode::Sink) {
        // In one piece: the client may be gone, and answer the first with a break.
        stream.write_all(format!("{bytes} {:016x}\n", hash.finish()).as_bytes())?;
    }
    stream
        .shutdown(Shutdown::Write)
        .or_else(|e| match e.kind() {
            io::ErrorKind::NotConnected => Ok(()),
            _ => Err(e),
        })?;
    Ok(bytes)
}

fn dial(wanted: &Dial) -> io::Result<Value> {
    let limit = Duration::from_secs(wanted.limit);
    let mut stream = TcpStream::connect_timeout(&wanted.address, limit)?;
    if wanted.leave {
        stream.write_all(wanted.send.as_bytes())?;
        return Ok(json!({ "connect": "ok" }));
    }
    // It may be broken by now; the reading tells how.
    let peer = stream
        .peer_addr()
        .map_or_else(|e| name(&e), |a| a.to_string());
    let local = stream
        .local_addr()
        .map_or_else(|e| name(&e), |a| a.to_string());
    stream.set_read_timeout(Some(limit))?;
    thread::sleep(Duration::from_millis(wanted.wait));
    let mut sent = DefaultHasher::new();
    let written = stream.write_all(wanted.send.as_bytes()).and_then(|()| {
        let mut buffer = vec![0; CHUNK];
        let mut source = Pattern::default();
        let mut left = wanted.pattern;
        while left > 0 {
            source.fill(&mut buffer);
            let part = &buffer[..left.min(CHUNK as u64) as usize];
            stream.write_all(part)?;
            sent.write(part);
            left -= part.len() as u64;
        }
        if wanted.half_close {
            stream.shutdown(Shutdown::Write)
        } else {
            Ok(())
        }
    });
    let (mut received, mut text, mut hash) = (0_u64, Vec::new(), DefaultHasher::new());
    let mut buffer = vec![0; CHUNK];
    let end = loop {
        match stream.read(&mut buffer) {
            Ok(0) => break "eof".to_owned(),
            Ok(read) => {
                received += read as u64;
                hash.write(&buffer[..read]);
                let room = 4096_usize.saturating_sub(text.len());
                text.extend_from_slice(&buffer[..read.min(room)]);
                if wanted.reset {
                    SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
                    break "reset by me".to_owned();
                }
            }
            Err(error) => break name(&error),
        }
    };
    Ok(json!({
        "connect": "ok", "peer": peer, "local": local, "end": end, "received": received,
        "text": String::from_utf8_lossy(&text), "hash": format!("{:016x}", hash.finish()),
        "sent_hash": format!("{:016x}", sent.finish()),
        "write": written.map_or_else(|e| name(&e), |()| "ok".to_owned()),
    }))
}

fn many(address: SocketAddr, count: usize) -> io::Result<()> {
    let open = Arc::new(Barrier::new(count));
    let threads: Vec<_> = (0..count)
        .map(|number| {
            let open = open.clone();
            thread::Builder::new()
                .stack_size(128 << 10)
                .spawn(move || -> io::Result<bool> {
                    let limit = Some(Duration::from_secs(60));
                    let stream = TcpStream::connect(address);
                    let word = format!("word {number:06}");
                    let mut first = Vec::new();
                    if let Ok(stream) = &stream {
                        stream.set_read_timeout(limit)?;
                        first = echo(stream, &word).unwrap_or_default();
                    }
                    open.wait();
                    // All are open now; each must still work.
                    Ok(first == word.as_bytes() && echo(&stream?, &word)? == word.as_bytes())
                })
        })
        .collect::<io::Result<_>>()?;
    let results: Vec<_> = threads
        .into_iter()
        .map(|t| t.join().expect("no panic"))
        .collect();
    let good = results.iter().filter(|r| matches!(r, Ok(true))).count();
    let errors: Vec<String> = results
        .iter()
        .filter_map(|r| r.as_ref().err())
        .map(name)
        .take(5)
        .collect();
    println!("{}", json!({ "good": good, "errors": errors }));
    Ok(())
}

fn stay(address: SocketAddr, every: u64) -> io::Result<()> {
    let stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    say("connected");
    for number in 0.. {
        let word = format!("beat {number:06}");
        match echo(&stream, &word) {
            Ok(back) if back == word.as_bytes() => say(&word),
            Ok(_) => {
                say("garbled");
                break;
            }
            Err(error) => {
                say(&format!("ended: {}", name(&error)));
                break;
            }
        }
        thread::sleep(Duration::from_millis(every));
    }
    Ok(())
}

fn echo(mut stream: &TcpStream, word: &str) -> io::Result<Vec<u8>> {
    stream.write_all(word.as_bytes())?;
    let mut back = vec![0; word.len()];
    stream.read_exact(&mut back)?;
    Ok(back)
}

/// A long sequence without repetition (xorshift64).
struct Pattern(u64);

impl Default for Pattern {
    fn default() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }
}

impl Pattern {
    fn fill(&mut self, buffer: &mut [u8]) {
        for word in buffer.chunks_exact_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            word.copy_from_slice(&self.0.to_le_bytes());
        }
    }
}

fn say(line: &str) {
    let mut out = io::stdout().lock();
    let _nobody_reads = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// An error by its POSIX name.
fn name(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(1) => "EPERM".into(),
        Some(11) => "timeout".into(),
        Some(32) => "EPIPE".into(),
        Some(104) => "ECONNRESET".into(),
        Some(110) => "ETIMEDOUT".into(),
        Some(111) => "ECONNREFUSED".into(),
        Some(113) => "EHOSTUNREACH".into(),
        _ => format!("{error}"),
    }
}
