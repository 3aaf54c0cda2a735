//! The agent's own standard output, for whoever collects what containers print.

use std::io::{self, Write as _};

use tokio::sync::oneshot;

use super::{
    config::Format,
    deliver::{Failure, Taken},
    follow::Entry,
};

pub async fn send(entries: &[Entry], format: Format) -> Result<Taken, Failure> {
    let mut text = String::new();
    for line in entries.iter().filter_map(|entry| entry.formatted(format)) {
        text.push_str(&line);
        text.push('\n');
    }
    let (sender, written) = oneshot::channel();
    // Whoever reads it may have stopped: a thread of the runtime that waits for ever
    // would keep the agent from ending.
    std::thread::Builder::new()
        .name("audit-stdout".into())
        .spawn(move || {
            let _agent_has_ended = sender.send(write(&text));
        })
        .map_err(Failure::later)?;
    match written.await {
        Ok(Ok(())) => Ok(Taken::default()),
        Ok(Err(error)) => Err(Failure::later(format!("standard output: {error}"))),
        Err(closed) => Err(Failure::later(closed)),
    }
}

fn write(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}
