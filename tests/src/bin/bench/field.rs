//! Where the loads run: pods on two nodes without agents, for what is direct and for
//! Envoy, and pods made alike on two nodes with agents. No hook of Postern's is on the
//! first nodes' cgroups.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use postern_tests::{Capture, Lab, Pod, PodOptions, Running, count_bytes, eventually};
use serde_json::Value;

use crate::{
    ECHO, HTTP, IPERF, PAGE, SOURCE, agents,
    drive::{self, Sample, Way},
    envoy::{CACHED, Envoys, Role, VERIFIED},
    load::{Kind, Load, Scene, System},
    process,
    tokens::{Algorithm, ISSUER, Tokens},
};

/// Open connections for the measures of memory.
pub const OPEN: [(usize, &str, &str); 2] = [
    (1_000, "MiB, 1,000 open", "KiB each of 1,000"),
    (5_000, "MiB, 5,000 open", "KiB each of 5,000"),
];
pub const READY: &str = "ready, ms";
pub const FIRST: &str = "first byte, ms";
pub const IDLE: &str = "MiB, idle, the larger";
const ANONYMOUS: &str = "MiB, of that no file's";
/// Processes at rest: allocations of what just happened are over.
const REST: Duration = Duration::from_secs(1);
/// What a proxy has open that carries nothing: Postern keeps 64 connections for the next
/// streams on each thread.
const QUIET: usize = 400;

/// A client, one beside the server, and the server. In the order in which it is taken
/// down.
pub struct Ground {
    pub client: Pod,
    near: Pod,
    pub server: Pod,
    _servers: Vec<Running>,
    pub lab: Lab,
}

impl Ground {
    pub fn new(mut lab: Lab, mesh: bool) -> Result<Self> {
        let mut pod = |node, name: &str| pod(&mut lab, node, name, mesh);
        let (client, near, server) = (pod(1, "client")?, pod(2, "near")?, pod(2, "server")?);
        Ok(Self {
            _servers: serve(&server)?,
            client,
            near,
            server,
            lab,
        })
    }

    /// Through the agents of its nodes, if they run.
    pub fn way(&self) -> Way<'_> {
        Way {
            client: &self.client,
            host: &self.server.ip,
            offset: 0,
            proxies: self
                .lab
                .nodes
                .iter()
                .filter_map(|n| n.agent_pid())
                .collect(),
        }
    }
}

fn pod(lab: &mut Lab, node: usize, name: &str, mesh: bool) -> Result<Pod> {
    let options = PodOptions {
        mesh: Some(mesh),
        ..PodOptions::default()
    };
    lab.pod_with(node, name, options)
}

/// All servers that loads want.
fn serve(pod: &Pod) -> Result<Vec<Running>> {
    let mut iperf = pod.command("iperf3")?;
    iperf.args(["--server", "--forceflush", "--port", &IPERF.to_string()]);
    let iperf = pod.start("iperf3", &mut iperf)?;
    iperf.says("listening")?;
    Ok(vec![
        pod.nginx(HTTP, &"x".repeat(PAGE))?,
        pod.serve("echo", ECHO)?,
        pod.serve("source", SOURCE)?,
        iperf,
    ])
}

/// In the order in which it is taken down.
pub struct Field {
    envoys: Vec<(Role, Envoys)>,
    outside: Pod,
    judged: Pod,
    _servers: Vec<Running>,
    bare: Ground,
    mesh: Ground,
    tokens: Tokens,
    seconds: u32,
}

impl Field {
    pub fn new(systems: &[System], seconds: u32) -> Result<Self> {
        let bare = Ground::new(Lab::new(2)?, false)?;
        let mut mesh = Ground::new(Lab::started()?, true)?;
        agents::quiet(&mesh.lab)?;
        let outside = pod(&mut mesh.lab, 2, "outside", false)?;
        let judged = pod(&mut mesh.lab, 2, "judged", true)?;
        let mut servers = serve(&outside)?;
        servers.push(judged.nginx(HTTP, &"x".repeat(PAGE))?);
        let tokens = Tokens::mint(bare.lab.path())?;
        mesh.lab.policy("judged", &policy(&tokens.jwks))?;
        mesh.lab.policies(2)?;
        let mut field = Self {
            envoys: Vec::new(),
            outside,
            judged,
            _servers: servers,
            bare,
            mesh,
            tokens,
            seconds,
        };
        for role in [Role::Tcp, Role::Hbone, Role::Http] {
            if systems.iter().any(|system| role_of(*system) == Some(role)) {
                let Ground { client, server, .. } = &field.bare;
                let envoys = Envoys::new(role, client, server, &field.tokens.jwks)?;
                field.envoys.push((role, envoys));
            }
        }
        Ok(field)
    }

    fn way(&self, scene: Scene, system: System) -> Result<Way<'_>> {
        let through = |ground| -> Way<'_> { Ground::way(ground) };
        let mut way = match (system, scene) {
            (System::Direct, _) => through(&self.bare),
            (System::Postern, _) => through(&self.mesh),
            _ => {
                let role = role_of(system).context("a role of Envoy")?;
                let mut all = self.envoys.iter();
                let (_, envoys) = all.find(|(r, _)| *r == role).context("it runs")?;
                Way {
                    host: "127.0.0.1",
                    offset: role.offset(),
                    proxies: envoys.pids(),
                    ..through(&self.bare)
                }
            }
        };
        match (scene, system) {
            (Scene::OneNode, System::Direct) => way.client = &self.bare.near,
            (Scene::OneNode, System::Postern) => way.client = &self.mesh.near,
            (Scene::Unmeshed, System::Postern) => way.host = &self.outside.ip,
            (Scene::Tokens, System::Postern) => way.host = &self.judged.ip,
            (Scene::Tokens, System::EnvoyHttp) => way.offset += VERIFIED,
            (Scene::Tokens, System::EnvoyCache) => way.offset += CACHED,
            _ => {}
        }
        Ok(way)
    }

    pub fn measure(&mut self, load: &Load, system: System) -> Result<Sample> {
        match load.kind {
            Kind::FirstStart => {
                let mut lab = Lab::new(1)?;
                let ready = agents::start(&mut lab.nodes[0])?;
                let agents: Vec<i32> = lab.nodes.iter().filter_map(|n| n.agent_pid()).collect();
                let mut sample = idle(&agents)?;
                sample.insert(0, (READY, ready));
                Ok(sample)
            }
            Kind::Start => {
                let ready = self.restart(system)?;
                let first = drive::first(&self.way(load.scene, system)?)?;
                Ok(vec![(READY, ready), (FIRST, first)])
            }
            Kind::Memory => {
                self.restart(system)?;
                memory(&self.way(load.scene, system)?)
            }
            // What is to show no difference at all is many loads.
            _ if load.scene == Scene::Unmeshed => self.load(load, system, self.seconds.div_ceil(2)),
            _ => self.load(load, system, self.seconds),
        }
    }

    fn load(&self, load: &Load, system: System, seconds: u32) -> Result<Sample> {
        let way = self.way(load.scene, system)?;
        drive::run(&way, load.kind, &self.tokens, seconds)
    }

    /// New processes for old; milliseconds to ready of the client's.
    fn restart(&mut self, system: System) -> Result<f64> {
        if let Some(role) = role_of(system) {
            let mut all = self.envoys.iter_mut();
            let (_, envoys) = all.find(|(r, _)| *r == role).context("it runs")?;
            return envoys.restart(&self.bare.client, &self.bare.server);
        }
        let lab = &mut self.mesh.lab;
        let mut ready = 0.0;
        for node in lab.nodes.iter_mut().rev() {
            node.kill();
            ready = agents::start(node)?;
        }
        agents::quiet(lab)?;
        for pod in [&self.mesh.client, &self.mesh.server] {
            self.mesh.lab.known(pod)?;
        }
        Ok(ready)
    }

    /// Processes that carry Postern's loads.
    pub fn agents(&self) -> Vec<i32> {
        self.mesh.way().proxies
    }

    /// Holds every way to what it is measured as: one request goes through, its words are
    /// on the wire only where nothing encrypts them, and who has no token or no
    /// certificate is refused.
    pub fn check(&self, loads: &[&'static Load], systems: &[System]) -> Result<()> {
        for scene in [Scene::Nodes, Scene::Tokens, Scene::OneNode, Scene::Unmeshed] {
            for system in systems {
                let in_scene = |load: &&&Load| load.scene == scene && load.runs_in(*system);
                if loads.iter().find(in_scene).is_some() {
                    self.check_way(scene, *system)
                        .with_context(|| format!("{scene:?}, {}", system.name()))?;
                }
            }
        }
        for (role, _) in &self.envoys {
            let port = match role {
                Role::Hbone => 15008,
                _ => HTTP + role.offset(),
            };
            let url = format!("https://{}:{port}/", self.bare.server.ip);
            let (code, said) = self.bare.client.curl(&["-k", "--http1.1", &url])?;
            // The connection stood and was ended: in the handshake, or as TLS 1.3 has it,
            // before an answer.
            let ended = matches!(code, 35 | 52 | 55 | 56);
            ensure!(ended, "a stranger at {url}: {code}, {said}");
        }
        Ok(())
    }

    fn check_way(&self, scene: Scene, system: System) -> Result<()> {
        let way = self.way(scene, system)?;
        let lab = match system {
            System::Postern => &self.mesh.lab,
            _ => &self.bare.lab,
        };
        let marker = format!("marker-of-{}", system.name());
        let url = format!("http://{}/", way.address(HTTP));
        let token = self.tokens.one(Algorithm::Rs256)?;
        let bearer = format!("Authorization: Bearer {token}");
        let mark = format!("X-Marker: {marker}");
        let path = lab.path().join(format!("{system:?}-{scene:?}.pcap"));
        let capture = Capture::start(&lab.nodes[0], path)?;
        let (code, body) = way.client.curl(&["-H", &mark, "-H", &bearer, &url])?;
        let path = capture.stop()?;
        ensure!(code == 0 && body == "x".repeat(PAGE), "{code}: {body}");
        let seen = count_bytes(&path, marker.as_bytes())?;
        let bytes = process::size(&path);
        std::fs::remove_file(&path)?;
        let plain = system == System::Direct || scene == Scene::Unmeshed;
        match scene {
            Scene::OneNode => ensure!(seen == 0, "what stays on one node crossed the wire"),
            _ if plain => ensure!(seen > 0, "what is not encrypted was not seen"),
            // Nor is it nothing: a request and its answer are more than a capture's head.
            _ => ensure!(seen == 0 && bytes > 500, "{seen} times in the clear"),
        }
        if scene == Scene::Tokens && system != System::Direct {
            let status = ["-o", "/dev/null", "-w", "%{http_code}", &url];
            let (_, said) = way.client.curl(&status)?;
            ensure!(said == "401" || said == "403", "without a token: {said}");
        }
        if system == System::Postern {
            self.recorded(scene, way.client)?;
        }
        Ok(())
    }

    /// Postern carries, and writes down, what it should and nothing else.
    fn recorded(&self, scene: Scene, client: &Pod) -> Result<()> {
        let node = &self.mesh.lab.nodes[client.node - 1];
        let own = |record: &Value, port: u16| {
            record["kind"] == "connection"
                && record["source"]["pod"] == client.name
                && record["dialled"]
                    .as_str()
                    .is_some_and(|d| d.ends_with(&format!(":{port}")))
        };
        if scene == Scene::Unmeshed {
            let to = format!("{}:{HTTP}", self.outside.ip);
            let strays = node.audit()?;
            let strays = strays
                .iter()
                .filter(|r| own(r, HTTP) && r["dialled"] == *to);
            ensure!(strays.count() == 0, "the agent carried what goes outside");
            return Ok(());
        }
        node.record("a connection through Postern is on record", |r| {
            own(r, HTTP)
        })?;
        Ok(())
    }
}

fn role_of(system: System) -> Option<Role> {
    match system {
        System::Direct | System::Postern => None,
        System::EnvoyTcp => Some(Role::Tcp),
        System::EnvoyHbone => Some(Role::Hbone),
        System::EnvoyHttp | System::EnvoyCache => Some(Role::Http),
    }
}

/// Requests to one pod need a token of the issuer, and come from one workload.
fn policy(jwks: &str) -> String {
    let select = "selector: {matchLabels: {app: judged}}";
    format!(
        "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\n\
         metadata: {{name: judged, namespace: shop}}\n\
         spec: {{{select}, jwtRules: [{{issuer: '{ISSUER}', audiences: [shop], jwks: '{jwks}'}}]}}\n\
         ---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {{name: judged, namespace: shop}}\n\
         spec: {{{select}, rules: [{{from: [{{source: {{principals: [cluster.local/ns/shop/sa/client], \
         requestPrincipals: ['{ISSUER}/*']}}}}], to: [{{operation: {{methods: [GET]}}}}]}}]}}\n"
    )
}

/// Memory of new processes at rest.
fn idle(pids: &[i32]) -> Result<Sample> {
    std::thread::sleep(REST);
    let larger = |of: fn(i32) -> Result<f64>| -> Result<f64> {
        let each = pids.iter().map(|pid| of(*pid));
        let each = each.collect::<Result<Vec<_>>>()?;
        Ok(each.into_iter().fold(0.0, f64::max))
    };
    Ok(vec![
        (IDLE, larger(process::resident)?),
        (ANONYMOUS, larger(process::anonymous)?),
    ])
}

/// The same, and with connections open.
fn memory(way: &Way) -> Result<Sample> {
    let mut sample = idle(&way.proxies)?;
    let total = |of: fn(i32) -> Result<f64>| process::sum(&way.proxies, of);
    let idle = total(process::anonymous)?;
    let mut holders = Vec::new();
    let mut held = 0;
    for (count, whole, each) in OPEN {
        holders.push(drive::open(way, count - held)?);
        held = count;
        std::thread::sleep(REST);
        sample.push((whole, total(process::resident)?));
        // Not what of the program is mapped meanwhile, because it runs for the first time.
        let grown = total(process::anonymous)? - idle;
        sample.push((each, grown * 1024.0 / count as f64));
    }
    drop(holders);
    eventually(
        "all connections are closed",
        Duration::from_secs(60),
        || {
            let mut open = way.proxies.iter().map(|pid| process::descriptors(*pid));
            open.all(|open| open.is_ok_and(|open| open < QUIET))
        },
    )?;
    Ok(sample)
}
