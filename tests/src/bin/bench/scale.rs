//! What a large cluster costs the agent of one node: the same node and the same calls,
//! in a cluster of 500 pods and in one of 5,000, with discovery on demand and with all
//! pods known ahead.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use postern_apiserver::ApiServer;
use postern_tests::{Lab, Pod, PodOptions, Running, Source};

use serde_json::{Value, json};

use crate::{
    agents,
    population::Population,
    process,
    report::{Machine, number},
    rows::median,
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
        agents::quieten(&self.lab.nodes[0])?;
        self.lab.known(&self.client)?;
        let start_cpu = process::cpu(self.agent()?)?;
        let start_bytes = self.api.bytes_sent() - sent;
        for partner in &self.partners {
            let address = format!("{}:{PORT}", partner.ip);
            let seen = self
                .client
                .dial(&address, &["--send", "x", "--half-close"])?;
            ensure!(seen["text"] == "x", "{address} does not answer: {seen}");
        }
        std::thread::sleep(REST);
        let memory = process::resident(self.agent()?)?;
        let (cpu, sent) = (process::cpu(self.agent()?)?, self.api.bytes_sent());
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
            churn_cpu: 100.0 * (process::cpu(self.agent()?)? - cpu) / f64::from(churn.seconds),
            churn_kib: (self.api.bytes_sent() - sent) as f64 / 1024.0 / f64::from(churn.seconds),
            watches: {
                let all = self.api.requests().into_iter();
                all.filter(|r| r.verb == "watch").count() as f64
            },
            lists: pods("list"),
        })
    }

    fn agent(&self) -> Result<i32> {
        self.lab.nodes[0]
            .agent_pid()
            .context("the agent does not run")
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

/// What one agent took in a cluster.
pub struct Measure {
    pub start_ms: f64,
    pub start_cpu: f64,
    pub start_mib: f64,
    pub memory: f64,
    pub churn_cpu: f64,
    pub churn_kib: f64,
    pub watches: f64,
    pub lists: f64,
}

type Quantity = (&'static str, &'static str, fn(&Measure) -> f64);

const QUANTITIES: [Quantity; 8] = [
    ("start to ready", "ms", |m| m.start_ms),
    ("CPU until then", "s", |m| m.start_cpu),
    ("from the API server until then", "MiB", |m| m.start_mib),
    ("memory, in use", "MiB", |m| m.memory),
    ("CPU while pods change", "%", |m| m.churn_cpu),
    ("from the API server meanwhile", "KiB/s", |m| m.churn_kib),
    ("watches", "", |m| m.watches),
    ("lists of pods", "", |m| m.lists),
];

/// What a large cluster costs one agent.
pub struct ScaleReport {
    pub machine: Machine,
    pub rounds: u32,
    pub churn: Churn,
    /// A value a round.
    pub columns: Vec<(String, Vec<Measure>)>,
}

impl ScaleReport {
    pub fn json(&self) -> Value {
        let columns = self.columns.iter().map(|(name, measured)| {
            let quantities = QUANTITIES.iter().map(|(what, unit, of)| {
                let values: Vec<f64> = measured.iter().map(of).collect();
                json!({ "what": what, "unit": unit, "median": median(&values), "rounds": values })
            });
            json!({ "cluster": name, "quantities": quantities.collect::<Vec<_>>() })
        });
        json!({
            "machine": self.machine.json(),
            "rounds": self.rounds,
            "changesPerSecond": self.churn.rate,
            "seconds": self.churn.seconds,
            "columns": columns.collect::<Vec<_>>(),
        })
    }
}

impl fmt::Display for ScaleReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\n{:32}{:8}", "pods in the cluster", "")?;
        for (name, _) in &self.columns {
            write!(f, "{name:>15}")?;
        }
        for (what, unit, of) in QUANTITIES {
            write!(f, "\n{what:32}{unit:8}")?;
            for (_, measured) in &self.columns {
                let values: Vec<f64> = measured.iter().map(of).collect();
                write!(f, "{:>15}", number(median(&values)))?;
            }
        }
        let Churn { rate, seconds } = self.churn;
        write!(
            f,
            "\nMedians. {rate} pods a second changed for {seconds} s on nodes that this one's pods do not talk to."
        )
    }
}
