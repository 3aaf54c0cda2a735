//! Clients that keep connections open, run of this program within a pod.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    process::ExitCode,
    time::{Duration, Instant},
};

/// Opens connections to an echo server, makes sure that each carries a byte both
/// ways, says how many microseconds the first took, and holds them.
pub fn echoing(address: SocketAddr, count: usize) -> ExitCode {
    let began = Instant::now();
    hold(|| {
        let first = echo(address)?;
        let took = began.elapsed().as_micros();
        let mut held = vec![first];
        for _ in 1..count {
            held.push(echo(address)?);
        }
        Ok((held, took))
    })
}

/// Opens connections to a server that sends without end, and reads nothing.
pub fn stalled(address: SocketAddr, count: usize) -> ExitCode {
    let began = Instant::now();
    hold(|| {
        let held = (0..count).map(|_| TcpStream::connect(address));
        Ok((
            held.collect::<io::Result<_>>()?,
            began.elapsed().as_micros(),
        ))
    })
}

fn hold(open: impl FnOnce() -> io::Result<(Vec<TcpStream>, u128)>) -> ExitCode {
    match open() {
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
        Ok((_held, took)) => {
            println!("open {took}");
            loop {
                std::thread::park();
            }
        }
    }
}

fn echo(address: SocketAddr) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"?")?;
    stream.read_exact(&mut [0])?;
    Ok(stream)
}
