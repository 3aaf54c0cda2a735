//! What a large cluster costs the agent of one node: the same node and the same calls,
//! in a cluster of 500 pods and in one of 5,000, with discovery on demand and with all
//! pods known ahead.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use postern_apiserver::ApiServer;
use postern_tests::{Lab, Node, Pod, PodOptions, Running, Source};

use crate::{
    agents,
    population::Population,
    report::{Machine, Measure, ScaleReport},
};

const PORT: u16 = 9000;
/// Nodes whose pods the measured node's talk to, and that are more than names.
const PARTNERS: usize = 3;
/// What is open then has been listed and is quiet.
const REST: Duration = Duration::from_secs(1);

/// Clusters, as pods, services and nodes.
const SIZES: [Population; 2] = [
    Population {
        pods: 500,
        services: 50,
        nodes: 10,
    },
    Population {
        pods: 5_000,
        services: 500,
        nodes: 100,
    },
];

const DISCOVERIES: [&str; 2] = ["onDemand", "all"];

/// Of pods elsewhere.
#[derive(Clone, Copy)]
pub struct Churn {
    /// Changes in a second.
    pub rate: u32,
    pub seconds: u32,
}

pub fn bench(rounds: u32, churn: Churn) -> Result<ScaleReport> {
    let machine = Machine::here()?;
    println!("{machine}");
    let mut columns = Vec::new();
    for discovery in DISCOVERIES {
        for size in SIZES {
            columns.push((discovery, size, Vec::new()));
        }
    }
    for round in 0..rounds {
        println!("round {} of {rounds}", round + 1);
        for (discovery, size, measured) in &mut columns {
            measured.push(Site::new(*size, discovery)?.measure(churn)?);
        }
    }
    let columns = columns.into_iter();
    Ok(ScaleReport {
        machine,
        rounds,
        churn,
        columns: columns
            .map(|(discovery, size, measured)| (format!("{} {discovery}", size.pods), measured))
            .collect(),
    })
}

/// One cluster. In the order in which it is taken down.
struct Site {
    _servers: Vec<Running>,
    partners: Vec<Pod>,
    client: Pod,
    lab: Lab,
    api: Arc<ApiServer>,
    size: Population,
}

impl Site {
    fn new(size: Population, discovery: &str) -> Result<Self> {
        let mut lab = Lab::with(1 + PARTNERS, Source::Kubernetes)?;
        lab.nodes[0].options.kubernetes = format!(", discovery: {discovery}");
        let api = lab.api()?;
        size.fill(&api)?;
        // Without agents of their own, so that what the server sends is for one.
        let options = PodOptions {
            mesh: Some(false),
            ..PodOptions::default()
        };
        let mut servers = Vec::new();
        let mut partners = Vec::new();
        for node in 2..=1 + PARTNERS {
            let partner = lab.pod_with(node, &format!("partner-{node}"), options.clone())?;
            servers.push(partner.serve("echo", PORT)?);
            partners.push(partner);
        }
        let client = lab.pod(1, "client")?;
        Ok(Self {
            _servers: servers,
            partners,
            client,
            lab,
            api,
            size,
        })
    }

    fn measure(mut self, churn: Churn) -> Result<Measure> {
        let sent = self.api.bytes_sent();
        let began = Instant::now();
        self.lab.nodes[0].start()?;
        let start_ms = began.elapsed().as_secs_f64() * 1e3;
        // Its log tells every connection and every event.
        agents::set_log_level(&self.lab.nodes[0], "info")?;
        self.lab.known(&self.client)?;
        let start_cpu = self.cpu()?;
        let start_bytes = self.api.bytes_sent() - sent;
        for partner in &self.partners {
            let address = format!("{}:{PORT}", partner.ip);
            let seen = self
                .client
                .dial(&address, &["--send", "x", "--half-close"])?;
            ensure!(seen["text"] == "x", "{address} does not answer: {seen}");
        }
        std::thread::sleep(REST);
        let memory = agents::resident(self.node())?;
        let (cpu, sent) = (self.cpu()?, self.api.bytes_sent());
        self.churn(churn)?;
        let pods = |verb: &str| {
            let all = self.api.requests().into_iter();
            let of_pods = all.filter(|r| r.verb == verb && r.resource == "pods");
            of_pods.count() as f64
        };
        Ok(Measure {
            start_ms,
            start_cpu,
            start_mib: start_bytes as f64 / f64::from(1 << 20),
            memory,
            churn_cpu: 100.0 * (self.cpu()? - cpu) / f64::from(churn.seconds),
            churn_kib: (self.api.bytes_sent() - sent) as f64 / 1024.0 / f64::from(churn.seconds),
            watches: {
                let all = self.api.requests().into_iter();
                all.filter(|r| r.verb == "watch").count() as f64
            },
            lists: pods("list"),
        })
    }

    fn node(&self) -> &Node {
        &self.lab.nodes[0]
    }

    /// Seconds of CPU that the agent has used.
    fn cpu(&self) -> Result<f64> {
        /// `USER_HZ`, the same on all that this runs on.
        const TICKS: f64 = 100.0;
        let pid = self.node().agent_pid().context("the agent does not run")?;
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The name may hold anything; `utime` and `stime` are the 14th and 15th.
        let fields = stat.rsplit(") ").next().unwrap_or_default().split(' ');
        let times = fields.skip(11).take(2).map(str::parse::<f64>);
        let times: Vec<f64> = times.collect::<Result<_, _>>()?;
        Ok(times.iter().sum::<f64>() / TICKS)
    }

    /// Changes pods of nodes that the agent's pods do not talk to, one after another.
    fn churn(&self, churn: Churn) -> Result<()> {
        let began = Instant::now();
        for change in 0..churn.rate * churn.seconds {
            let due = Duration::from_secs(1) * change / churn.rate;
            std::thread::sleep(due.saturating_sub(began.elapsed()));
            self.size.change(&self.api, change as usize, 2 + PARTNERS)?;
        }
        let whole = Duration::from_secs(churn.seconds.into());
        let late = began.elapsed().saturating_sub(whole);
        ensure!(
            late < whole / 4,
            "the machine is too slow for so many changes: {late:?} late"
        );
        std::thread::sleep(whole.saturating_sub(began.elapsed()));
        Ok(())
    }
}
