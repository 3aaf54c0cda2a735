//! What is measured: each load, between whom, and in which systems.

use clap::ValueEnum;

use crate::tokens::Algorithm;

/// What carries a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum System {
    Direct,
    Postern,
    EnvoyTcp,
    EnvoyHbone,
    EnvoyHttp,
    /// As `envoy-http`, and verified tokens are remembered
    EnvoyCache,
}

impl System {
    pub const ALL: [Self; 6] = [
        Self::Direct,
        Self::Postern,
        Self::EnvoyTcp,
        Self::EnvoyHbone,
        Self::EnvoyHttp,
        Self::EnvoyCache,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Postern => "postern",
            Self::EnvoyTcp => "envoy-tcp",
            Self::EnvoyHbone => "envoy-hbone",
            Self::EnvoyHttp => "envoy-http",
            Self::EnvoyCache => "envoy-cache",
        }
    }
}

/// Between whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scene {
    /// Pods on two nodes.
    Nodes,
    /// The same, and each request needs a token.
    Tokens,
    /// Pods on one node.
    OneNode,
    /// A pod in the mesh and one outside.
    Unmeshed,
    /// The proxies themselves.
    Proxies,
}

impl Scene {
    pub fn title(self) -> &'static str {
        match self {
            Self::Nodes => "Between two nodes",
            Self::Tokens => "Between two nodes, each request with a token and judged",
            Self::OneNode => "On one node",
            Self::Unmeshed => {
                "From a pod of the mesh to one outside (postern: its agents run, and let it pass)"
            }
            Self::Proxies => "The proxies, on the client's side and the server's",
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// wrk against nginx.
    Http { connections: u32, keep_alive: bool },
    /// The same with 64 connections, and tokens.
    Bearer {
        algorithm: Algorithm,
        distinct: bool,
    },
    /// Requests at a constant rate.
    Constant,
    /// iperf3; `back`: the server sends.
    Bulk { streams: u32, back: bool },
    /// wrk beside connections whose receivers do not read.
    Stalled,
    /// A new process, and its first connection.
    Start,
    /// The agent of a node that is new, too.
    FirstStart,
    /// Memory of a new process, idle and with open connections.
    Memory,
}

pub struct Load {
    /// By which it is chosen.
    pub key: &'static str,
    pub name: &'static str,
    pub scene: Scene,
    pub kind: Kind,
}

impl Load {
    /// Whether this is measured in a system.
    pub fn runs_in(&self, system: System) -> bool {
        use System::{Direct, EnvoyCache, EnvoyHbone, EnvoyHttp, EnvoyTcp, Postern};
        let requests = matches!(self.kind, Kind::Http { .. } | Kind::Constant);
        match (self.scene, system) {
            _ if matches!(self.kind, Kind::FirstStart) => system == Postern,
            (Scene::Nodes, EnvoyHttp) => requests,
            (Scene::Nodes, EnvoyCache) => false,
            (Scene::Nodes, _) => true,
            (Scene::Tokens, _) => !matches!(system, EnvoyTcp | EnvoyHbone),
            (Scene::OneNode | Scene::Unmeshed, _) => matches!(system, Direct | Postern),
            (Scene::Proxies, _) => matches!(system, Postern | EnvoyTcp | EnvoyHbone),
        }
    }
}

pub fn find(key: &str) -> Result<&'static Load, String> {
    LOADS.iter().find(|load| load.key == key).ok_or_else(|| {
        let all: Vec<&str> = LOADS.iter().map(|load| load.key).collect();
        format!("there are {}", all.join(", "))
    })
}

pub const LOADS: &[Load] = &[
    nodes("http-1", "HTTP, 1 connection", http(1)),
    nodes("http-64", "HTTP, 64 connections", http(64)),
    nodes("constant", "HTTP, 2,000 requests/s", Kind::Constant),
    nodes("fresh", "HTTP, a connection a request", FRESH),
    nodes("bulk-1", "TCP, 1 stream", bulk(1, false)),
    nodes("bulk-8", "TCP, 8 streams", bulk(8, false)),
    nodes("bulk-1-back", "TCP, 1 stream back", bulk(1, true)),
    nodes("bulk-8-back", "TCP, 8 streams back", bulk(8, true)),
    nodes("stalled", "HTTP, beside 8 stalled receivers", Kind::Stalled),
    tokens("rs256-one", "RS256, one token", Algorithm::Rs256, false),
    tokens("rs256-many", "RS256, 5,000 tokens", Algorithm::Rs256, true),
    tokens("es256-one", "ES256, one token", Algorithm::Es256, false),
    tokens("es256-many", "ES256, 5,000 tokens", Algorithm::Es256, true),
    near("near-http-64", "HTTP, 64 connections", http(64)),
    near("near-bulk-1", "TCP, 1 stream", bulk(1, false)),
    near("near-bulk-8", "TCP, 8 streams", bulk(8, false)),
    outside("outside-http-1", "HTTP, 1 connection", http(1)),
    outside("outside-http-64", "HTTP, 64 connections", http(64)),
    outside("outside-constant", "HTTP, 2,000 requests/s", Kind::Constant),
    outside("outside-fresh", "HTTP, a connection a request", FRESH),
    outside("outside-bulk-1", "TCP, 1 stream", bulk(1, false)),
    outside("outside-bulk-8", "TCP, 8 streams", bulk(8, false)),
    outside("outside-bulk-1-back", "TCP, 1 stream back", bulk(1, true)),
    outside("outside-bulk-8-back", "TCP, 8 streams back", bulk(8, true)),
    proxies("start", "a new process", Kind::Start),
    proxies("first-start", "an agent on a new node", Kind::FirstStart),
    proxies("memory", "memory, both together", Kind::Memory),
];

const FRESH: Kind = Kind::Http {
    connections: 16,
    keep_alive: false,
};

const fn http(connections: u32) -> Kind {
    Kind::Http {
        connections,
        keep_alive: true,
    }
}

const fn bulk(streams: u32, back: bool) -> Kind {
    Kind::Bulk { streams, back }
}

const fn load(key: &'static str, name: &'static str, scene: Scene, kind: Kind) -> Load {
    Load {
        key,
        name,
        scene,
        kind,
    }
}

const fn nodes(key: &'static str, name: &'static str, kind: Kind) -> Load {
    load(key, name, Scene::Nodes, kind)
}

const fn tokens(
    key: &'static str,
    name: &'static str,
    algorithm: Algorithm,
    distinct: bool,
) -> Load {
    let kind = Kind::Bearer {
        algorithm,
        distinct,
    };
    load(key, name, Scene::Tokens, kind)
}

const fn near(key: &'static str, name: &'static str, kind: Kind) -> Load {
    load(key, name, Scene::OneNode, kind)
}

const fn outside(key: &'static str, name: &'static str, kind: Kind) -> Load {
    load(key, name, Scene::Unmeshed, kind)
}

const fn proxies(key: &'static str, name: &'static str, kind: Kind) -> Load {
    load(key, name, Scene::Proxies, kind)
}
