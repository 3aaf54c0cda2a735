//! The loads: what drives them and what is read from their output.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use postern_tests::{Lab, output, text};
use serde_json::Value;

use crate::{HTTP, IPERF, Pair, report::Series};

pub enum Load {
    /// wrk against nginx.
    Http {
        name: &'static str,
        connections: u32,
        keep_alive: bool,
    },
    /// iperf3, from client to server.
    Stream { name: &'static str, streams: u32 },
}

pub const LOADS: [Load; 5] = [
    Load::Http {
        name: "HTTP, 1 connection",
        connections: 1,
        keep_alive: true,
    },
    Load::Http {
        name: "HTTP, 64 connections",
        connections: 64,
        keep_alive: true,
    },
    Load::Http {
        name: "HTTP, a connection a request",
        connections: 16,
        keep_alive: false,
    },
    Load::Stream {
        name: "TCP, 1 stream",
        streams: 1,
    },
    Load::Stream {
        name: "TCP, 8 streams",
        streams: 8,
    },
];

/// What wrk reports at its end, as JSON; its own report is for people.
const WRK_REPORT: &str = r#"
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('\n{"requests":%d,"micros":%d,"p50":%d,"p99":%d,"errors":%d}\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    e.connect + e.read + e.write + e.status + e.timeout))
end
"#;

impl Load {
    /// Empty series for what one run of it measures.
    pub fn series(&self) -> Vec<Series> {
        match self {
            Self::Http { name, .. } => vec![
                Series::new(name, "requests/s"),
                Series::new(name, "p50, us"),
                Series::new(name, "p99, us"),
                Series::new(name, "errors"),
            ],
            Self::Stream { name, .. } => vec![Series::new(name, "Gbit/s")],
        }
    }

    /// One run; a value for each series.
    pub fn run(&self, pair: &Pair, lab: &Lab, seconds: u32) -> Result<Vec<f64>> {
        match *self {
            Self::Http {
                connections,
                keep_alive,
                ..
            } => wrk(pair, lab, connections, keep_alive, seconds),
            Self::Stream { streams, .. } => Ok(vec![iperf(pair, streams, seconds)?]),
        }
    }
}

fn wrk(
    pair: &Pair,
    lab: &Lab,
    connections: u32,
    keep_alive: bool,
    seconds: u32,
) -> Result<Vec<f64>> {
    let script = lab.path().join("report.lua");
    std::fs::write(&script, WRK_REPORT)?;
    let mut wrk = pair.client.command("wrk")?;
    wrk.args([
        "-t",
        "1",
        "-c",
        &connections.to_string(),
        "-d",
        &seconds.to_string(),
    ]);
    wrk.arg("-s").arg(script);
    if !keep_alive {
        wrk.args(["-H", "Connection: close"]);
    }
    wrk.arg(format!("http://{}:{HTTP}/", pair.server.ip));
    let said = text(&output(&mut wrk)?.stdout);
    let report = said
        .lines()
        .find(|line| line.starts_with('{'))
        .with_context(|| said.clone())?;
    let report: Value = serde_json::from_str(report)?;
    let number = |key: &str| {
        report[key]
            .as_f64()
            .with_context(|| format!("{key}: {report}"))
    };
    ensure!(
        number("requests")? > 0.0,
        "no request was answered: {report}"
    );
    let rate = number("requests")? / (number("micros")? / 1e6);
    Ok(vec![
        rate,
        number("p50")?,
        number("p99")?,
        number("errors")?,
    ])
}

fn iperf(pair: &Pair, streams: u32, seconds: u32) -> Result<f64> {
    let mut iperf = pair.client.command("iperf3")?;
    iperf.args([
        "--json",
        "--client",
        &pair.server.ip,
        "--port",
        &IPERF.to_string(),
    ]);
    iperf.args([
        "--time",
        &seconds.to_string(),
        "--parallel",
        &streams.to_string(),
    ]);
    let report: Value = serde_json::from_slice(&output(&mut iperf)?.stdout)?;
    let rate = report["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(rate.with_context(|| report.to_string())? / 1e9)
}

/// Opens connections to an echo server, makes sure that each carries a byte both
/// ways, says so, and holds them.
pub fn hold(address: SocketAddr, count: usize) -> ExitCode {
    let open: io::Result<Vec<TcpStream>> = (0..count).map(|_| echoing(address)).collect();
    match open {
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
        Ok(_held) => {
            println!("open");
            loop {
                std::thread::park();
            }
        }
    }
}

fn echoing(address: SocketAddr) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"?")?;
    stream.read_exact(&mut [0])?;
    Ok(stream)
}
