//! Where a service's address leads, as kube-proxy has it.

use std::{collections::BTreeSet, time::Duration};

use anyhow::Result;
use postern_tests::{Lab, Pod, PodOptions, Running, eventually};

const PORT: u16 = 8080;

/// Two nodes, each with a client and a server whose page is its name, and a service
/// before the servers.
struct World {
    lab: Lab,
    clients: [Pod; 2],
    servers: [Pod; 2],
    _running: Vec<Running>,
}

impl World {
    fn new() -> Result<Self> {
        let mut lab = Lab::started()?;
        for (node, zone) in [(1, "a"), (2, "b")] {
            lab.manifest(
                &format!("node{node}"),
                &format!(
                    "apiVersion: v1\nkind: Node\nmetadata: {{name: node{node}, labels: {{topology.kubernetes.io/zone: {zone}}}}}\n\
                     status: {{addresses: [{{type: InternalIP, address: 192.0.2.{node}}}, {{type: InternalIP, address: 'fd00:2::{node}'}}]}}\n"
                ),
            )?;
        }
        let clients = [lab.pod(1, "client1")?, lab.pod(2, "client2")?];
        let options = PodOptions {
            ports: "{name: http, containerPort: 8080, hostPort: 8888}".into(),
            ..PodOptions::default()
        };
        let servers = [
            lab.pod_with(1, "server1", options.clone())?,
            lab.pod_with(2, "server2", options)?,
        ];
        let mut running = Vec::new();
        for server in &servers {
            running.push(server.nginx(PORT, &server.name)?);
        }
        Ok(Self {
            lab,
            clients,
            servers,
            _running: running,
        })
    }

    /// The service, with these further fields, and of each server what its endpoint
    /// says; empty: it is not listed.
    fn service(&self, spec: &str, endpoints: [&str; 2]) -> Result<()> {
        let mut text = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: shop}}\n\
             spec: {{type: NodePort, clusterIP: 10.96.0.7, clusterIPs: [10.96.0.7, 'fd00:96::7'], \
             externalIPs: [203.0.113.7], {spec} ports: [{{port: 80, nodePort: 30080}}]}}\n\
             status: {{loadBalancer: {{ingress: [{{ip: 203.0.113.8, ipMode: VIP}}]}}}}\n"
        );
        for family in ["IPv4", "IPv6"] {
            let mut listed = String::new();
            for (server, about) in self.servers.iter().zip(endpoints) {
                let ip = if family == "IPv4" {
                    &server.ip
                } else {
                    &server.ip6
                };
                if !about.is_empty() {
                    listed += &format!(
                        "{{addresses: ['{ip}'], nodeName: node{}, targetRef: {{kind: Pod, name: {}, namespace: shop, uid: {}}}, {about}}}, ",
                        server.node, server.name, server.uid
                    );
                }
            }
            text += &format!(
                "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: {family}\n\
                 metadata: {{name: web-{}, namespace: shop, labels: {{kubernetes.io/service-name: web}}}}\n\
                 ports: [{{name: '', port: {PORT}}}]\nendpoints: [{listed}]\n",
                family.to_lowercase()
            );
        }
        self.lab.manifest("service", &text)
    }

    /// Which servers answer a client at an address; of one that is refused, none.
    fn answering(&self, client: usize, address: &str) -> BTreeSet<usize> {
        let mut all = BTreeSet::new();
        for _ in 0..4 {
            let url = format!("http://{address}/");
            match self.clients[client].curl(&["-g", "-m", "5", &url]) {
                Ok((0, page)) => {
                    all.extend(
                        page.trim()
                            .strip_prefix("server")
                            .and_then(|n| n.parse::<usize>().ok()),
                    );
                }
                _refused => return BTreeSet::new(),
            }
        }
        all
    }

    /// Waits until this is what each client gets.
    fn leads(&self, address: &str, expected: [&[usize]; 2]) -> Result<()> {
        let expected = expected.map(|servers| servers.iter().copied().collect::<BTreeSet<_>>());
        let mut found = Default::default();
        let led = eventually(
            &format!("{address} leads to {expected:?}"),
            Duration::from_secs(10),
            || {
                found = [self.answering(0, address), self.answering(1, address)];
                found == expected
            },
        );
        led.map_err(|error| error.context(format!("{found:?}\n{}", self.lab.nodes[0].log())))
    }
}

const READY: &str = "conditions: {ready: true}";
const ENDING: &str = "conditions: {ready: false, serving: true, terminating: true}";
const GONE: &str = "conditions: {ready: false, serving: false}";
const CLUSTER: [&str; 2] = ["10.96.0.7", "[fd00:96::7]"];

#[test]
fn endpoints_are_picked_as_kube_proxy_picks_them() -> Result<()> {
    let world = World::new()?;
    let (both, none): (&[usize], &[usize]) = (&[1, 2], &[]);
    world.service("", [READY, READY])?;
    for address in CLUSTER.into_iter().chain(["203.0.113.7", "203.0.113.8"]) {
        world.leads(address, [both, both])?;
    }
    // Those that end are the last resort.
    world.service("", [READY, ENDING])?;
    world.leads(CLUSTER[0], [&[1], &[1]])?;
    world.service("", [GONE, ENDING])?;
    world.leads(CLUSTER[0], [&[2], &[2]])?;
    world.service("", [GONE, GONE])?;
    world.leads(CLUSTER[0], [none, none])?;
    // The node's own, or none.
    let local = "internalTrafficPolicy: Local,";
    world.service(local, [READY, READY])?;
    for address in CLUSTER {
        world.leads(address, [&[1], &[2]])?;
    }
    world.service(local, [READY, GONE])?;
    world.leads(CLUSTER[0], [&[1], none])?;
    world.leads("203.0.113.7", [&[1], &[1]])?;
    // Hints, if all have them.
    let hints = [
        "hints: {forZones: [{name: a}]}",
        "hints: {forZones: [{name: b}]}",
    ];
    world.service("trafficDistribution: PreferClose,", hints)?;
    world.leads(CLUSTER[0], [&[1], &[2]])?;
    world.service("trafficDistribution: PreferClose,", [hints[0], READY])?;
    world.leads(CLUSTER[0], [both, both])?;
    // One for each client, whatever the table does.
    world.service("sessionAffinity: ClientIP,", [READY, READY])?;
    let before = eventually("each has one", Duration::from_secs(10), || {
        (0..2).all(|client| world.answering(client, CLUSTER[0]).len() == 1)
    });
    before?;
    let had = [0, 1].map(|client| world.answering(client, CLUSTER[0]));
    world.lab.manifest(
        "another",
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: more}\n",
    )?;
    for _ in 0..3 {
        let has = [0, 1].map(|client| world.answering(client, CLUSTER[0]));
        assert_eq!(has, had);
        std::thread::sleep(Duration::from_millis(100));
    }
    let record = world.lab.nodes[0].record("it is on record", |r| r["service"] == "shop/web")?;
    assert_eq!(record["source"]["pod"], "client1");
    Ok(())
}

#[test]
fn ports_of_nodes_lead_to_services_and_pods() -> Result<()> {
    let mut world = World::new()?;
    let (both, none): (&[usize], &[usize]) = (&[1, 2], &[]);
    world.service("", [READY, READY])?;
    for address in ["192.0.2.1:30080", "192.0.2.2:30080", "[fd00:2::2]:30080"] {
        world.leads(address, [both, both])?;
    }
    let record = world.lab.nodes[1].record("within the mesh", |r| {
        r["reporter"] == "destination" && r["transport"] == "hbone"
    })?;
    assert_eq!(record["source"]["pod"], "client1", "{record}");
    // A node that has none drops what comes from others; its own pods come from inside.
    world.service("externalTrafficPolicy: Local,", [READY, GONE])?;
    world.leads("192.0.2.1:30080", [&[1], &[1]])?;
    world.leads("192.0.2.2:30080", [none, &[1]])?;
    // hostPort.
    for address in ["192.0.2.1:8888", "[fd00:2::1]:8888"] {
        world.leads(address, [&[1], &[1]])?;
    }
    world.leads("192.0.2.2:8888", [&[2], &[2]])?;
    // What else listens there is left alone, also on a steered address.
    let options = PodOptions {
        host_network: true,
        ..PodOptions::default()
    };
    let host = world.lab.pod_with(2, "host", options)?;
    let _nginx = host.nginx(8081, "server7")?;
    world.leads("192.0.2.2:8081", [&[7], &[7]])?;
    // Such a pod behind a service that has others in the mesh: listed by name.
    let slice = format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: mixed, namespace: shop}}\n\
         spec: {{clusterIP: 10.96.0.9, ports: [{{port: 80}}]}}\n---\n\
         apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
         metadata: {{name: mixed-1, namespace: shop, labels: {{kubernetes.io/service-name: mixed}}}}\n\
         ports: [{{name: '', port: 8081}}]\nendpoints: [\
         {{addresses: [192.0.2.2], targetRef: {{kind: Pod, name: host, namespace: shop, uid: {}}}}}, \
         {{addresses: [{}], conditions: {{ready: false}}, targetRef: {{kind: Pod, name: server1, namespace: shop}}}}]\n",
        host.uid, world.servers[0].ip
    );
    world.lab.manifest("mixed", &slice)?;
    world.leads("10.96.0.9", [&[7], &[7]])
}
