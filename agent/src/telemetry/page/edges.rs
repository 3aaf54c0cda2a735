//! Who calls whom, as the records tell: one edge for each source, destination and way
//! of travel. A fixed number of edges is kept, the least recently used go first.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde::Serialize;
use serde_json::Value;

use super::record::{At, Verdict, cut, text};

const MOST: usize = 512;
/// Policies that are named with an edge.
const MOST_POLICIES: usize = 4;
/// Length of a slot of the rate, seconds, and how many make its minute.
const SLOT: i64 = 5;
const SLOTS: usize = 12;

#[derive(Default)]
pub struct Edges {
    edges: HashMap<Key, Edge>,
    /// Counts what was added: the clock of what was used last.
    added: u64,
    left_out: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Key {
    source: String,
    destination: String,
    transport: &'static str,
}

#[derive(Default)]
struct Edge {
    used: u64,
    last: At,
    connections: u64,
    /// As the source's agent tells, and the destination's: of one request both may.
    requests: [u64; 2],
    allowed: u64,
    denied: u64,
    errors: u64,
    sent: u64,
    received: u64,
    /// Which of them denied.
    policies: Vec<String>,
    ends: [End; 2],
    slots: [Slot; SLOTS],
}

#[derive(Clone, Copy, Default)]
struct Slot {
    number: i64,
    calls: [u32; 2],
}

/// One end of an edge.
#[derive(Clone, Default)]
struct End {
    name: String,
    namespace: Option<String>,
    identity: Option<String>,
    kind: NodeKind,
    here: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeKind {
    Workload,
    /// The machine that pods run on.
    Node,
    /// An address that no workload of the mesh has.
    #[default]
    Outside,
}

/// `GET /api/map`: the nodes by their `id`, and the edges between them.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Map {
    pub nodes: Vec<MapNode>,
    pub edges: Vec<MapEdge>,
    /// Edges that were forgotten for others.
    pub left_out: u64,
}

#[derive(Debug, Serialize)]
pub struct MapNode {
    /// `namespace/workload`, an address, or `node`.
    pub id: String,
    pub kind: NodeKind,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    pub name: String,
    /// SPIFFE ID, where it was proven.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
    /// Whether a pod of it is on this node.
    pub here: bool,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MapEdge {
    pub source: String,
    pub destination: String,
    /// `hbone` (mutual TLS between nodes), `local`, `plaintext`, `probe` or `bypass`.
    pub transport: &'static str,
    /// `allow`, `deny`, `mixed`, or `failed` where nothing was decided.
    pub verdict: &'static str,
    /// At their end.
    pub connections: u64,
    /// Where they were read.
    pub requests: u64,
    pub denied: u64,
    /// Failed, or answered with 500 and more.
    pub errors: u64,
    /// Requests, or connections whose requests were not read, per second of the last
    /// minute.
    pub rate: f64,
    /// Bytes from source to destination, and back.
    pub sent: u64,
    pub received: u64,
    /// RFC 3339.
    pub last: String,
    /// Policies that denied something here.
    pub policies: Vec<String>,
}

impl Edges {
    /// Adds what a record tells of who called whom; `here`: the pods of this node, as
    /// `namespace/name`.
    pub fn add(&mut self, record: &Value, at: At, here: &HashSet<String>) {
        let kind = text(record, "/kind");
        let [source, destination] = match kind {
            "connection" | "request" => [
                end(record, "/source", here),
                end(record, "/destination", here),
            ],
            "bypass" => bypassing(record, here),
            _ => return,
        };
        let transport = match (kind, text(record, "/transport")) {
            ("bypass", _) => "bypass",
            (_, "hbone") => "hbone",
            (_, "local") => "local",
            (_, "plaintext") => "plaintext",
            (_, "probe") => "probe",
            // A request's record does not say it; its connection's does, at its end, and
            // by the same rule.
            _ if source.identity.is_none() => "plaintext",
            _ if source.here && destination.here => "local",
            _ => "hbone",
        };
        let source = match transport {
            "probe" => End {
                name: "node".into(),
                kind: NodeKind::Node,
                here: true,
                ..End::default()
            },
            _ => source,
        };
        let key = Key {
            source: source.id(),
            destination: destination.id(),
            transport,
        };
        if !self.edges.contains_key(&key) && self.edges.len() >= MOST {
            let oldest = self.edges.iter().min_by_key(|(_, edge)| edge.used);
            if let Some(oldest) = oldest.map(|(key, _)| key.clone()) {
                self.edges.remove(&oldest);
                self.left_out += 1;
            }
        }
        self.added += 1;
        let edge = self.edges.entry(key).or_default();
        edge.used = self.added;
        edge.last = edge.last.max(at);
        edge.ends = [source, destination];
        edge.count(kind, record, at);
    }

    /// What there is now.
    pub fn map(&self, now: At) -> Map {
        let mut nodes: BTreeMap<String, MapNode> = BTreeMap::new();
        let mut edges: Vec<(&Key, &Edge)> = self.edges.iter().collect();
        // The latest tells best what a node is.
        edges.sort_by_key(|(_, edge)| edge.used);
        for end in edges.iter().flat_map(|(_, edge)| &edge.ends) {
            let node = nodes.entry(end.id()).or_insert_with(|| MapNode {
                id: end.id(),
                kind: end.kind,
                namespace: end.namespace.clone(),
                name: end.name.clone(),
                identity: None,
                here: false,
            });
            node.here |= end.here;
            if end.identity.is_some() {
                node.identity.clone_from(&end.identity);
            }
        }
        edges.sort_by_key(|(key, _)| *key);
        Map {
            nodes: nodes.into_values().collect(),
            edges: edges
                .into_iter()
                .map(|(key, edge)| edge.shown(key, now))
                .collect(),
            left_out: self.left_out,
        }
    }
}

impl Edge {
    fn count(&mut self, kind: &str, record: &Value, at: At) {
        let number = |pointer: &str| record.pointer(pointer).and_then(Value::as_u64);
        let by = usize::from(text(record, "/reporter") == "destination");
        let verdict = Verdict::of(record);
        // The verdicts on its requests have records of their own.
        let read = kind == "connection"
            && record.get("protocol").is_some()
            && number("/requests") != Some(0)
            && verdict == Some(Verdict::Allow);
        if kind == "connection" {
            self.connections += 1;
            self.sent += number("/bytes/sent").unwrap_or(0);
            self.received += number("/bytes/received").unwrap_or(0);
        } else if kind == "bypass" {
            self.connections += 1;
            self.sent += number("/socket/sent").unwrap_or(0);
            self.received += number("/socket/received").unwrap_or(0);
        } else {
            self.requests[by] += 1;
        }
        if read {
            return;
        }
        let slot = &mut self.slots[(at.seconds() / SLOT).rem_euclid(SLOTS as i64) as usize];
        if slot.number < at.seconds() / SLOT {
            *slot = Slot {
                number: at.seconds() / SLOT,
                calls: [0; 2],
            };
        }
        if slot.number == at.seconds() / SLOT {
            slot.calls[by] = slot.calls[by].saturating_add(1);
        }
        let broken = number("/status").is_some_and(|status| status >= 500);
        match verdict {
            Some(Verdict::Deny) => {
                self.denied += 1;
                let policy = super::record::policy(record);
                let known = policy.is_none_or(|policy| self.policies.contains(&policy));
                if !known && self.policies.len() < MOST_POLICIES {
                    self.policies.extend(super::record::policy(record));
                }
            }
            Some(Verdict::Failed) => self.errors += 1,
            _ => {
                self.allowed += 1;
                self.errors += u64::from(broken);
            }
        }
    }

    fn shown(&self, key: &Key, now: At) -> MapEdge {
        let now = now.seconds() / SLOT;
        let recent = (self.slots.iter()).filter(|slot| {
            let age = now - slot.number;
            (0..SLOTS as i64).contains(&age)
        });
        let calls = recent.fold([0_u64; 2], |sum, slot| {
            [0, 1].map(|by| sum[by] + u64::from(slot.calls[by]))
        });
        let minute = SLOTS as f64 * SLOT as f64;
        MapEdge {
            source: key.source.clone(),
            destination: key.destination.clone(),
            transport: key.transport,
            verdict: match (self.allowed, self.denied) {
                (0, 0) if self.errors > 0 => "failed",
                (_, 0) => "allow",
                (0, _) => "deny",
                _ => "mixed",
            },
            connections: self.connections,
            requests: self.requests[0].max(self.requests[1]),
            denied: self.denied,
            errors: self.errors,
            rate: calls[0].max(calls[1]) as f64 / minute,
            sent: self.sent,
            received: self.received,
            last: self.last.to_string(),
            policies: self.policies.clone(),
        }
    }
}

impl End {
    fn id(&self) -> String {
        match &self.namespace {
            Some(namespace) => format!("{namespace}/{}", self.name),
            None => self.name.clone(),
        }
    }
}

/// What stands at `pointer`: a workload, or an address without its port.
fn end(record: &Value, pointer: &str, here: &HashSet<String>) -> End {
    let peer = record.pointer(pointer).unwrap_or(&Value::Null);
    let field = |name: &str| peer.get(name).and_then(Value::as_str).map(cut);
    let identity = field("identity");
    let namespace = field("namespace");
    let name = field("workload").or_else(|| field("pod"));
    match (namespace, name) {
        (Some(namespace), Some(name)) => {
            let pod = format!("{namespace}/{}", field("pod").unwrap_or_default());
            End {
                name,
                namespace: Some(namespace),
                identity,
                kind: NodeKind::Workload,
                here: here.contains(&pod),
            }
        }
        _ => End {
            name: address(peer.get("address")),
            identity,
            ..End::default()
        },
    }
}

/// Traffic that went past the agent has a pod at one end and an address at the other.
fn bypassing(record: &Value, here: &HashSet<String>) -> [End; 2] {
    let pod = end(record, "", here);
    let other = End {
        name: address(record.get("remote")),
        ..End::default()
    };
    match text(record, "/direction") {
        "inbound" => [other, pod],
        _ => [pod, other],
    }
}

fn address(value: Option<&Value>) -> String {
    let address = value.and_then(Value::as_str).unwrap_or("unknown");
    match address.parse::<std::net::SocketAddr>() {
        Ok(address) => address.ip().to_string(),
        Err(_no_port) => cut(address),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn at(seconds: i64) -> At {
        At::from_seconds(1_000_000 + seconds)
    }

    fn peer(name: &str, identity: bool) -> Value {
        let mut peer = json!({"address": "10.0.1.10:4711", "namespace": "shop",
            "pod": format!("{name}-0"), "workload": name});
        if identity {
            peer["identity"] = format!("spiffe://cluster.local/ns/shop/sa/{name}").into();
        }
        peer
    }

    fn connection(transport: &str, verdict: &str) -> Value {
        json!({"kind": "connection", "reporter": "source", "transport": transport,
            "verdict": verdict, "source": peer("web", true), "destination": peer("db", true),
            "bytes": {"sent": 10, "received": 20},
            "policy": {"kind": "AuthorizationPolicy", "namespace": "shop", "name": "p"}})
    }

    fn map(records: &[Value], here: &[&str]) -> Map {
        let here = here.iter().map(|&pod| pod.to_owned()).collect();
        let mut edges = Edges::default();
        for record in records {
            edges.add(record, at(0), &here);
        }
        edges.map(at(1))
    }

    #[test]
    fn edges_say_how_and_whether() {
        for (records, transport, verdict, denied) in [
            (vec![connection("hbone", "allow")], "hbone", "allow", 0),
            (vec![connection("local", "deny")], "local", "deny", 1),
            (
                vec![connection("plaintext", "failed")],
                "plaintext",
                "failed",
                0,
            ),
            (
                vec![connection("hbone", "allow"), connection("hbone", "deny")],
                "hbone",
                "mixed",
                1,
            ),
        ] {
            let map = map(&records, &["shop/web-0"]);
            assert_eq!(map.edges.len(), 1);
            let edge = &map.edges[0];
            assert_eq!(
                (edge.source.as_str(), edge.destination.as_str()),
                ("shop/web", "shop/db")
            );
            assert_eq!(
                (edge.transport, edge.verdict, edge.denied),
                (transport, verdict, denied)
            );
            assert_eq!(edge.sent, 10 * records.len() as u64);
            let named: &[&str] = if denied > 0 {
                &["AuthorizationPolicy shop/p"]
            } else {
                &[]
            };
            assert_eq!(edge.policies, named);
            let here: Vec<_> = map.nodes.iter().map(|n| (n.id.as_str(), n.here)).collect();
            assert_eq!(here, [("shop/db", false), ("shop/web", true)]);
        }
    }

    #[test]
    fn a_request_travels_as_its_connection_does() {
        let request = |identity| {
            json!({"kind": "request", "reporter": "destination", "verdict": "allow", "status": 503,
                "source": peer("web", identity), "destination": peer("db", true)})
        };
        for (identity, here, expected) in [
            (true, vec!["shop/web-0", "shop/db-0"], "local"),
            (true, vec!["shop/db-0"], "hbone"),
            (false, vec!["shop/db-0"], "plaintext"),
        ] {
            let map = map(&[request(identity)], &here);
            let edge = &map.edges[0];
            assert_eq!(
                (edge.transport, edge.requests, edge.errors),
                (expected, 1, 1)
            );
        }
    }

    #[test]
    fn what_two_tell_of_is_counted_once() {
        let mut connection = connection("local", "allow");
        connection["protocol"] = "http/1".into();
        let request = |reporter: &str| {
            json!({"kind": "request", "reporter": reporter, "verdict": "allow",
                "source": peer("web", true), "destination": peer("db", true)})
        };
        let records = [request("source"), request("destination"), connection];
        let map = map(&records, &["shop/web-0", "shop/db-0"]);
        let edge = &map.edges[0];
        assert_eq!(
            (map.edges.len(), edge.requests, edge.connections),
            (1, 1, 1)
        );
        assert_eq!(edge.rate, 1.0 / 60.0);
    }

    #[test]
    fn addresses_and_the_node_itself_are_nodes_too() {
        let mut probe = connection("probe", "allow");
        probe["source"] = json!({"address": "10.0.1.1:99"});
        let mut outside = connection("plaintext", "deny");
        outside["source"] = json!({"address": "[2001:db8::1]:99"});
        let bypass = json!({"kind": "bypass", "direction": "outbound", "namespace": "shop",
            "pod": "web-0", "workload": "web", "remote": "198.51.100.7:443", "cut": true});
        let map = map(&[probe, outside, bypass], &[]);
        let edges: Vec<_> = (map.edges.iter())
            .map(|e| {
                (
                    e.source.as_str(),
                    e.destination.as_str(),
                    e.transport,
                    e.verdict,
                )
            })
            .collect();
        assert_eq!(
            edges,
            [
                ("2001:db8::1", "shop/db", "plaintext", "deny"),
                ("node", "shop/db", "probe", "allow"),
                ("shop/web", "198.51.100.7", "bypass", "deny"),
            ]
        );
        let kind = |id: &str| map.nodes.iter().find(|n| n.id == id).map(|n| n.kind);
        assert_eq!(kind("node"), Some(NodeKind::Node));
        assert_eq!(kind("198.51.100.7"), Some(NodeKind::Outside));
    }

    #[test]
    fn a_rate_is_of_the_last_minute() {
        let mut edges = Edges::default();
        for second in 0..120 {
            edges.add(&connection("hbone", "allow"), at(second), &HashSet::new());
        }
        let rate = |now: i64| edges.map(at(now)).edges[0].rate;
        assert_eq!((rate(119), rate(149), rate(180)), (1.0, 0.5, 0.0));
    }

    #[test]
    fn edges_are_bounded_and_the_least_used_go() {
        let mut edges = Edges::default();
        for number in 0..MOST + 10 {
            let mut record = connection("plaintext", "allow");
            record["source"] =
                json!({"address": format!("10.1.{}.{}:1", number / 250, number % 250)});
            edges.add(&record, at(0), &HashSet::new());
            record["source"] = json!({"address": "192.0.2.1:1"});
            edges.add(&record, at(0), &HashSet::new());
        }
        let map = edges.map(at(0));
        assert_eq!(map.edges.len(), MOST);
        assert_eq!(map.left_out, 11);
        assert!(map.nodes.iter().any(|node| node.id == "192.0.2.1"));
        assert!(!map.nodes.iter().any(|node| node.id == "10.1.0.0"));
    }
}
