//! Endpoints of services that select pods, as the cluster's controller keeps them.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use serde_json::{Value, json};

use crate::store::{Key, Store};

const SLICES: &str = "endpointslices.discovery.k8s.io";
const OURS: &str = "endpointslice-controller.k8s.io";

/// Makes slices say what services and pods say.
pub fn settle(store: &mut Store) {
    let pods: Vec<Arc<Value>> = store.list("pods").map(|(_, pod)| pod.clone()).collect();
    let mut wanted = BTreeMap::new();
    for (key, service) in store.list("services") {
        slices(key, service, &pods, &mut wanted);
    }
    let managed = |slice: &Value| {
        slice["metadata"]["labels"]["endpointslice.kubernetes.io/managed-by"] == OURS
    };
    let old: Vec<Key> = store
        .list(SLICES)
        .filter(|(key, slice)| managed(slice) && !wanted.contains_key(*key))
        .map(|(key, _)| key.clone())
        .collect();
    for key in old {
        store.remove(&key);
    }
    for (key, slice) in wanted {
        store.put(key, slice);
    }
}

fn slices(key: &Key, service: &Value, pods: &[Arc<Value>], all: &mut BTreeMap<Key, Value>) {
    let spec = &service["spec"];
    let Some(selector) = spec["selector"].as_object().filter(|s| !s.is_empty()) else {
        return;
    };
    if spec["type"] == "ExternalName" {
        return;
    }
    let selected = |pod: &&Arc<Value>| {
        let meta = &pod["metadata"];
        meta["namespace"] == *key.namespace
            && selector
                .iter()
                .all(|(name, value)| meta["labels"][name] == *value)
            && !["Succeeded", "Failed"]
                .iter()
                .any(|phase| pod["status"]["phase"] == *phase)
    };
    let early = spec["publishNotReadyAddresses"] == json!(true);
    for family in families(spec) {
        for pod in pods.iter().filter(selected) {
            let Some(address) = address(pod, family) else {
                continue;
            };
            let ports = ports(spec, pod);
            let name = format!("{}-{family}-{:08x}", key.name, checksum(&ports));
            let slice = Key {
                resource: SLICES.into(),
                namespace: key.namespace.clone(),
                name: name.clone(),
            };
            let slice = all.entry(slice).or_insert_with(|| {
                json!({
                    "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                    "metadata": {"labels": {
                        "kubernetes.io/service-name": key.name,
                        "endpointslice.kubernetes.io/managed-by": OURS,
                    }, "ownerReferences": [{
                        "apiVersion": "v1", "kind": "Service", "name": key.name,
                        "uid": service["metadata"]["uid"], "controller": true,
                    }]},
                    "addressType": family, "ports": ports, "endpoints": [],
                })
            });
            if let Some(endpoints) = slice["endpoints"].as_array_mut() {
                endpoints.push(endpoint(pod, address, early));
            }
        }
    }
}

fn endpoint(pod: &Value, address: String, early: bool) -> Value {
    let meta = &pod["metadata"];
    let conditions = pod["status"]["conditions"].as_array();
    let said = conditions.and_then(|all| all.iter().find(|c| c["type"] == "Ready"));
    // Manifests of tests say nothing of it where a pod is well.
    let serving = said.is_none_or(|condition| condition["status"] == "True");
    let terminating = meta["deletionTimestamp"].is_string();
    json!({
        "addresses": [address],
        "conditions": {"ready": early || serving && !terminating, "serving": serving, "terminating": terminating},
        "nodeName": pod["spec"]["nodeName"],
        "targetRef": {"kind": "Pod", "namespace": meta["namespace"], "name": meta["name"], "uid": meta["uid"]},
    })
}

fn families(spec: &Value) -> Vec<&'static str> {
    let named = |family: &str| {
        let list = spec["ipFamilies"].as_array();
        list.is_none_or(|list| list.iter().any(|one| one == family))
    };
    ["IPv4", "IPv6"]
        .into_iter()
        .filter(|family| named(family))
        .collect()
}

fn address(pod: &Value, family: &str) -> Option<String> {
    let addresses = pod["status"]["podIPs"]
        .as_array()?
        .iter()
        .filter_map(|ip| ip["ip"].as_str());
    let fits = |text: &&str| match text.parse() {
        Ok(IpAddr::V4(_)) => family == "IPv4",
        Ok(IpAddr::V6(_)) => family == "IPv6",
        Err(_) => false,
    };
    addresses.into_iter().find(fits).map(str::to_owned)
}

/// A service's ports at this pod; one that the pod does not name is left out.
fn ports(spec: &Value, pod: &Value) -> Vec<Value> {
    let number = |port: &Value| match &port["targetPort"] {
        Value::String(name) => named_port(pod, name),
        Value::Number(number) => number.as_u64(),
        _ => port["port"].as_u64(),
    };
    let ports = spec["ports"].as_array().into_iter().flatten();
    ports
        .filter_map(|port| {
            let protocol = port["protocol"].as_str().unwrap_or("TCP");
            let mut entry = json!({
                "name": port["name"].as_str().unwrap_or(""), "port": number(port)?, "protocol": protocol,
            });
            if port["appProtocol"].is_string() {
                entry["appProtocol"] = port["appProtocol"].clone();
            }
            Some(entry)
        })
        .collect()
}

fn named_port(pod: &Value, name: &str) -> Option<u64> {
    let containers = ["containers", "initContainers"]
        .into_iter()
        .filter_map(|list| pod["spec"][list].as_array())
        .flatten();
    let ports = containers
        .filter_map(|container| container["ports"].as_array())
        .flatten();
    ports
        .filter(|port| port["name"] == name)
        .find_map(|port| port["containerPort"].as_u64())
}

/// FNV: the same for the same ports.
fn checksum(ports: &[Value]) -> u32 {
    let text = Value::from(ports.to_vec()).to_string();
    text.bytes().fold(0x811c_9dc5, |sum, byte| {
        (sum ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(store: &mut Store, resource: &str, name: &str, object: Value) {
        let key = Key {
            resource: resource.into(),
            namespace: "shop".into(),
            name: name.into(),
        };
        store.put(key, object);
    }

    #[test]
    fn slices_follow_pods() {
        let mut store = Store::new(Vec::new(), 100);
        let pod = |number: u8, port: u16| {
            json!({
                "metadata": {"labels": {"app": "web"}},
                "spec": {"nodeName": "n", "containers": [{"ports": [{"name": "http", "containerPort": port}]}]},
                "status": {"phase": "Running", "podIPs": [{"ip": format!("10.0.0.{number}")}, {"ip": format!("fd00::{number}")}]},
            })
        };
        put(&mut store, "pods", "a", pod(1, 80));
        put(&mut store, "pods", "b", pod(2, 80));
        put(&mut store, "pods", "c", pod(3, 81));
        let ports = json!([{"port": 8080, "targetPort": "http"}]);
        put(
            &mut store,
            "services",
            "web",
            json!({
                "metadata": {}, "spec": {"selector": {"app": "web"}, "ipFamilies": ["IPv4"], "ports": ports},
            }),
        );
        settle(&mut store);
        let seen = |store: &Store| -> Vec<(u64, usize)> {
            let of = |slice: &Value| {
                let endpoints = slice["endpoints"].as_array().map_or(0, Vec::len);
                (slice["ports"][0]["port"].as_u64().unwrap_or(0), endpoints)
            };
            let mut all: Vec<_> = store.list(SLICES).map(|(_, slice)| of(slice)).collect();
            all.sort_unstable();
            all
        };
        assert_eq!(seen(&store), [(80, 2), (81, 1)]);
        let mut failed = pod(3, 81);
        failed["status"]["phase"] = json!("Failed");
        put(&mut store, "pods", "c", failed);
        settle(&mut store);
        assert_eq!(seen(&store), [(80, 2)]);
        let before = store.revision();
        settle(&mut store);
        assert_eq!(store.revision(), before, "what is so is not written");
    }
}
