//! A request every so often, on a connection of its own and on one that is kept, until a
//! file appears; counts what failed and how.

use std::{
    collections::BTreeMap,
    io::{self, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::name;

#[derive(clap::Args)]
pub struct Load {
    address: SocketAddr,
    /// Milliseconds from one request to the next.
    #[arg(long)]
    every: u64,
    /// Ends when this file is there.
    #[arg(long)]
    until: PathBuf,
    /// A kept connection beside those of one request each.
    #[arg(long)]
    keep: bool,
    /// What is said.
    #[arg(long, default_value = "request")]
    word: String,
}

#[derive(Default)]
struct Tally {
    requests: u64,
    connections: u64,
    failed: BTreeMap<String, u64>,
    /// The longest answer, milliseconds.
    slowest: u128,
}

pub fn run(load: &Load) -> Value {
    let [mut fresh, kept] = thread::scope(|scope| {
        let fresh = scope.spawn(|| work(load, false));
        let kept = load.keep.then(|| scope.spawn(|| work(load, true)));
        let kept = kept.map(|thread| thread.join().expect("no panic"));
        [fresh.join().expect("no panic"), kept.unwrap_or_default()]
    });
    for (why, count) in kept.failed {
        *fresh.failed.entry(format!("kept: {why}")).or_default() += count;
    }
    json!({
        "requests": fresh.requests + kept.requests,
        "connections": fresh.connections + kept.connections,
        "failed": fresh.failed,
        "slowest": fresh.slowest.max(kept.slowest) as u64,
    })
}

fn work(load: &Load, keep: bool) -> Tally {
    let mut tally = Tally::default();
    let mut kept = None;
    let mut next = Instant::now();
    while !load.until.exists() {
        next += Duration::from_millis(load.every);
        let began = Instant::now();
        match one(load, keep, &mut kept, &mut tally) {
            Ok(()) => tally.requests += 1,
            Err((step, error)) => {
                kept = None;
                let why = format!("{step}: {}", name(&error));
                *tally.failed.entry(why).or_default() += 1;
            }
        }
        tally.slowest = tally.slowest.max(began.elapsed().as_millis());
        match next.checked_duration_since(Instant::now()) {
            Some(rest) => thread::sleep(rest),
            // A machine that cannot keep up makes fewer, not all at once.
            None => next = Instant::now(),
        }
    }
    if let Some(mut stream) = kept {
        let _failed = end(&mut stream);
    }
    tally
}

fn one(
    load: &Load,
    keep: bool,
    kept: &mut Option<TcpStream>,
    tally: &mut Tally,
) -> Result<(), (&'static str, io::Error)> {
    let at = |step| move |error| (step, error);
    let mut stream = match kept.take() {
        Some(stream) => stream,
        None => {
            let stream = TcpStream::connect(load.address).map_err(at("connect"))?;
            tally.connections += 1;
            let limit = Some(Duration::from_secs(30));
            stream.set_read_timeout(limit).map_err(at("connect"))?;
            stream.set_nodelay(true).map_err(at("connect"))?;
            stream
        }
    };
    stream
        .write_all(load.word.as_bytes())
        .map_err(at("write"))?;
    let mut back = vec![0; load.word.len()];
    stream.read_exact(&mut back).map_err(at("read"))?;
    if back != load.word.as_bytes() {
        return Err(("read", io::Error::other("garbled")));
    }
    match keep {
        true => *kept = Some(stream),
        false => end(&mut stream).map_err(at("end"))?,
    }
    Ok(())
}

fn end(stream: &mut TcpStream) -> io::Result<()> {
    stream.shutdown(Shutdown::Write)?;
    match stream.read(&mut [0; 8])? {
        0 => Ok(()),
        _ => Err(io::Error::other("bytes too many")),
    }
}
