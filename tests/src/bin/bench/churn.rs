//! Clients that come and go, run of this program within a pod: half of them end their
//! connections in order after a while, the other half break theirs in the middle.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    process::ExitCode,
    thread,
    time::Duration,
};

use socket2::SockRef;

/// How long those stay that do nothing: one after the other of these.
const IDLE: [u64; 5] = [100, 1_000, 2_500, 400, 5_000];
const BROKEN_AFTER: Duration = Duration::from_millis(20);
const LIMIT: Duration = Duration::from_secs(20);

/// Until killed; ends with what went wrong, if anything does.
pub fn run(address: SocketAddr, clients: usize) -> ExitCode {
    let (failed, failures) = std::sync::mpsc::channel();
    for client in 0..clients {
        let failed = failed.clone();
        thread::spawn(move || {
            let error = come_and_go(address, client).err();
            let _ended = failed.send(error);
        });
    }
    println!("open");
    if let Ok(Some(error)) = failures.recv() {
        eprintln!("{error}");
    }
    ExitCode::FAILURE
}

fn come_and_go(address: SocketAddr, client: usize) -> io::Result<()> {
    for turn in client.. {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.write_all(b"?")?;
        stream.read_exact(&mut [0])?;
        if client.is_multiple_of(2) {
            thread::sleep(Duration::from_millis(IDLE[turn % IDLE.len()]));
        } else {
            // Both directions have something under way.
            stream.write_all(&[b'x'; 4096])?;
            thread::sleep(BROKEN_AFTER);
            SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        }
    }
    Ok(())
}
