//! Puts a load on one way from a client to its server, and reads what the load's program
//! says at its end.

use std::{
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use postern_tests::{Pod, Running, output, text};
use serde_json::Value;

use crate::{ECHO, HTTP, IPERF, SOURCE, load::Kind, process, tokens::Tokens};

/// One way from a client to the servers that it wants.
pub struct Way<'a> {
    pub client: &'a Pod,
    /// What the client dials.
    pub host: &'a str,
    /// What is added to a server's port to have the one that stands for it.
    pub offset: u16,
    /// Processes that carry it, of the client's side and of the server's.
    pub proxies: Vec<i32>,
}

impl Way<'_> {
    pub fn address(&self, port: u16) -> String {
        format!("{}:{}", self.host, port + self.offset)
    }
}

/// What one run measured, by unit.
pub type Sample = Vec<(&'static str, f64)>;

pub const REQUESTS: &str = "requests/s";
pub const P50: &str = "p50, us";
pub const P99: &str = "p99, us";
pub const P999: &str = "p99.9, us";
pub const ERRORS: &str = "errors";
pub const RATE: &str = "Gbit/s";
pub const CPU_REQUESTS: &str = "CPU s/100k";
pub const CPU_BYTES: &str = "CPU s/GB";
pub const P99_ALONE: &str = "p99 alone, us";
pub const GROWN: &str = "grown by, MiB";

/// Of the load at a constant rate.
const PACE: u32 = 2_000;
const PACE_CONNECTIONS: u32 = 64;
/// Connections with tokens.
const BEARERS: u32 = 64;
/// Connections whose receivers do not read, and those beside them.
pub const RECEIVERS: usize = 8;
const BESIDE: u32 = 16;
/// How long a test of iperf3 may take to end at the server, and how long it mostly takes.
const BUSY: Duration = Duration::from_secs(30);
const DRAINED: Duration = Duration::from_millis(300);
/// Each load runs unmeasured for so long before.
const WARM: u32 = 1;
/// How long the receivers' connections take to fill up.
const FILL: Duration = Duration::from_secs(1);

/// One run of a load that needs nothing but a way.
pub fn run(way: &Way, kind: Kind, tokens: &Tokens, seconds: u32) -> Result<Sample> {
    match kind {
        Kind::Http {
            connections,
            keep_alive,
        } => Wrk::new(connections, keep_alive, None).measure(way, seconds),
        Kind::Bearer {
            algorithm,
            distinct,
        } => {
            let file = tokens.file(algorithm, distinct);
            let sample = Wrk::new(BEARERS, true, Some(&file)).measure(way, seconds)?;
            let refused = sample.iter().find(|(unit, _)| *unit == ERRORS);
            ensure!(
                refused.is_some_and(|(_, n)| *n == 0.0),
                "refused: {sample:?}"
            );
            Ok(sample)
        }
        Kind::Constant => {
            pace(way, WARM)?;
            pace(way, seconds)
        }
        Kind::Bulk { streams, back } => {
            iperf(way, streams, back, WARM)?;
            std::thread::sleep(DRAINED);
            bulk(way, streams, back, seconds)
        }
        Kind::Stalled => stalled(way, seconds),
        Kind::Start | Kind::FirstStart | Kind::Memory => {
            unreachable!("what is done to processes is no load on a way")
        }
    }
}

/// Proxies' CPU seconds for each `share` of `amount`; none where there is no proxy.
fn cost(way: &Way, before: f64, unit: &'static str, share: f64) -> Result<Sample> {
    let used = process::sum(&way.proxies, process::cpu)? - before;
    Ok(match way.proxies.is_empty() {
        true => Vec::new(),
        false => vec![(unit, used / share)],
    })
}

/// Requests by wrk.
pub struct Wrk<'a> {
    connections: u32,
    keep_alive: bool,
    tokens: Option<&'a Path>,
}

/// What wrk reports at its end, as JSON; its own report is for people.
const WRK_REPORT: &str = r#"
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('\n{"requests":%d,"micros":%d,"p50":%d,"p99":%d,"errors":%d,"late":%d}\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    e.connect + e.read + e.write + e.status + e.timeout, e.timeout))
end
"#;

/// Requests with the tokens of a file in turns, put together beforehand.
const WRK_TOKENS: &str = r#"
local requests, last = {}, 0
init = function()
  for token in io.lines("TOKENS") do
    requests[#requests + 1] = wrk.format("GET", "/", {Authorization = "Bearer " .. token})
  end
end
request = function()
  last = last % #requests + 1
  return requests[last]
end
"#;

impl<'a> Wrk<'a> {
    pub fn new(connections: u32, keep_alive: bool, tokens: Option<&'a Path>) -> Self {
        Self {
            connections,
            keep_alive,
            tokens,
        }
    }

    /// A run that counts, after one that does not.
    fn measure(&self, way: &Way, seconds: u32) -> Result<Sample> {
        self.run(way, WARM)?;
        let before = process::sum(&way.proxies, process::cpu)?;
        let report = self.run(way, seconds)?;
        let [requests, micros, p50, p99, errors] =
            ["requests", "micros", "p50", "p99", "errors"].map(|key| number(&report, key));
        let requests = requests?;
        ensure!(requests > 0.0, "no request was answered: {report}");
        let mut sample = vec![
            (REQUESTS, requests / (micros? / 1e6)),
            (P50, p50?),
            (P99, p99?),
            (ERRORS, errors?),
        ];
        sample.extend(cost(way, before, CPU_REQUESTS, requests / 1e5)?);
        Ok(sample)
    }

    fn run(&self, way: &Way, seconds: u32) -> Result<Value> {
        last_json(&output(&mut self.command(way, seconds)?)?.stdout)
    }

    pub fn command(&self, way: &Way, seconds: u32) -> Result<Command> {
        let mut text = WRK_REPORT.to_owned();
        if let Some(tokens) = self.tokens {
            text += &WRK_TOKENS.replace("TOKENS", &tokens.display().to_string());
        }
        // Another may be about to read its own.
        let script = format!("wrk-{}-{}.lua", self.connections, self.keep_alive);
        let script = way.client.dir().join(script);
        std::fs::write(&script, text)?;
        let mut wrk = way.client.command("wrk")?;
        wrk.args(["-t", "1", "-c", &self.connections.to_string()]);
        wrk.args(["-d", &seconds.to_string()]).arg("-s").arg(script);
        if !self.keep_alive {
            wrk.args(["-H", "Connection: close"]);
        }
        wrk.arg(format!("http://{}/", way.address(HTTP)));
        Ok(wrk)
    }
}

/// Every program of a load reports with one line of JSON.
pub fn last_json(said: &[u8]) -> Result<Value> {
    let said = text(said);
    let report = said.lines().rev().find(|line| line.starts_with('{'));
    Ok(serde_json::from_str(report.with_context(|| said.clone())?)?)
}

fn number(report: &Value, key: &str) -> Result<f64> {
    report[key]
        .as_f64()
        .with_context(|| format!("{key}: {report}"))
}

fn pace(way: &Way, seconds: u32) -> Result<Sample> {
    let mut pace = way.client.command(std::env::current_exe()?)?;
    pace.args(["pace", &way.address(HTTP), "--rate", &PACE.to_string()]);
    pace.args(["--connections", &PACE_CONNECTIONS.to_string()]);
    pace.args(["--seconds", &seconds.to_string()]);
    let before = process::sum(&way.proxies, process::cpu)?;
    let report = last_json(&output(&mut pace)?.stdout)?;
    let mut sample = vec![
        (P50, number(&report, "p50")?),
        (P99, number(&report, "p99")?),
        (P999, number(&report, "p999")?),
        (ERRORS, number(&report, "errors")?),
    ];
    let requests = number(&report, "requests")?;
    sample.extend(cost(way, before, CPU_REQUESTS, requests / 1e5)?);
    Ok(sample)
}

fn bulk(way: &Way, streams: u32, back: bool, seconds: u32) -> Result<Sample> {
    let before = process::sum(&way.proxies, process::cpu)?;
    let report = iperf(way, streams, back, seconds)?;
    let received = &report["end"]["sum_received"];
    let mut sample = vec![(RATE, number(received, "bits_per_second")? / 1e9)];
    let gigabytes = number(received, "bytes")? / 1e9;
    sample.extend(cost(way, before, CPU_BYTES, gigabytes)?);
    Ok(sample)
}

fn iperf(way: &Way, streams: u32, back: bool, seconds: u32) -> Result<Value> {
    let port = (IPERF + way.offset).to_string();
    let mut iperf = way.client.command("iperf3")?;
    iperf.args(["--json", "--client", way.host, "--port", &port]);
    iperf.args(["--time", &seconds.to_string()]);
    iperf.args(["--parallel", &streams.to_string()]);
    if back {
        iperf.arg("--reverse");
    }
    // What its proxies hold of the test before may still be on its way to the server.
    let end = Instant::now() + BUSY;
    loop {
        let report: Value = serde_json::from_slice(&output(&mut iperf)?.stdout)?;
        match report["error"].as_str() {
            None => return Ok(report),
            Some(error) if error.contains("busy") && Instant::now() < end => {
                std::thread::sleep(DRAINED);
            }
            Some(error) => bail!("iperf3: {error}"),
        }
    }
}

/// Requests beside connections whose receivers do not read, and without those.
fn stalled(way: &Way, seconds: u32) -> Result<Sample> {
    let wrk = Wrk::new(BESIDE, true, None);
    wrk.run(way, WARM)?;
    let p99 = || number(&wrk.run(way, seconds)?, "p99");
    let alone = p99()?;
    let before = process::sum(&way.proxies, process::resident)?;
    let receivers = hold(way, "stall", SOURCE, RECEIVERS)?;
    std::thread::sleep(FILL);
    let beside = p99()?;
    let grown = process::sum(&way.proxies, process::resident)? - before;
    drop(receivers);
    let mut sample = vec![(P99_ALONE, alone), (P99, beside)];
    if !way.proxies.is_empty() {
        sample.push((GROWN, grown));
    }
    Ok(sample)
}

/// Connections that this program holds open in the client's pod.
fn hold(way: &Way, how: &str, port: u16, count: usize) -> Result<Running> {
    let mut hold = way.client.command(std::env::current_exe()?)?;
    hold.args([how, &way.address(port), &count.to_string()]);
    let name = format!("{how}-{count}");
    let seen = process::size(&way.client.dir().join(format!("{name}.log")));
    let mut holder = way.client.start(&name, &mut hold)?;
    process::says(&mut holder, seen, "open ", HOLD)?;
    Ok(holder)
}

/// How long so many connections may take to open.
const HOLD: Duration = Duration::from_secs(120);

/// Connections to the echo server, all of which work.
pub fn open(way: &Way, count: usize) -> Result<Running> {
    hold(way, "hold", ECHO, count)
}

/// Milliseconds that one connection takes until it has carried a byte both ways.
pub fn first(way: &Way) -> Result<f64> {
    let holder = open(way, 1)?;
    let said = holder.output();
    let micros = said.lines().rev().find_map(|l| l.strip_prefix("open "));
    let micros: f64 = micros.with_context(|| said.clone())?.parse()?;
    Ok(micros / 1e3)
}
