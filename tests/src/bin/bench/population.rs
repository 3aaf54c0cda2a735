//! The objects of a cluster, as large as real ones are.

use anyhow::{Result, anyhow};
use postern_apiserver::ApiServer;
use serde_json::{Value, json};

/// The lab has its own pods from here down.
const FIRST: usize = 100;

#[derive(Clone, Copy)]
pub struct Population {
    pub pods: usize,
    pub services: usize,
    pub nodes: usize,
}

impl Population {
    /// Puts all of it. The nodes are named as the lab's are.
    pub fn fill(&self, api: &ApiServer) -> Result<()> {
        let put = |object| api.apply(object).map_err(|e| anyhow!("{e:?}"));
        for node in 1..=self.nodes {
            put(Self::node(node))?;
        }
        for index in 0..self.pods {
            put(self.pod(index, 0))?;
        }
        for index in 0..self.services {
            put(self.service(index))?;
            put(self.slice(index))?;
        }
        Ok(())
    }

    /// Changes a pod of the nodes from `first` on.
    pub fn change(&self, api: &ApiServer, change: usize, first: usize) -> Result<()> {
        let elsewhere = self.nodes + 1 - first;
        // One node after the other, and all of its pods in turn.
        let (node, pod) = (first - 2 + change % elsewhere, change / elsewhere);
        let others = self.nodes - 1;
        let index = node + pod % (self.pods / others) * others;
        let changed = self.pod(index, 1 + change);
        api.apply(changed).map_err(|e| anyhow!("{e:?}")).map(drop)
    }

    fn node(number: usize) -> Value {
        let images: Vec<_> = (0..30)
            .map(|n| {
                let digest = format!("{n:064x}");
                json!({"names": [format!("registry.example/team/image-{n}@sha256:{digest}")], "sizeBytes": 60_000_000 + n})
            })
            .collect();
        json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": format!("node{number}"), "labels": {"kubernetes.io/arch": "amd64"}},
            "spec": {"podCIDR": format!("10.0.{number}.0/24"),
                     "podCIDRs": [format!("10.0.{number}.0/24"), format!("fd00:0:0:{number}::/64")]},
            "status": {
                "addresses": [{"type": "InternalIP", "address": format!("192.0.2.{number}")}],
                "conditions": [{"type": "Ready", "status": "True"}], "images": images,
            },
        })
    }

    fn pod(&self, index: usize, revision: usize) -> Value {
        let (node, ip) = self.place(index);
        let (service, team) = (index % self.services, index % self.services % 10);
        let variables: Vec<_> = (0..12)
            .map(|n| json!({"name": format!("SETTING_{n}"), "value": format!("value-{n}-of-the-application")}))
            .collect();
        let managed: Vec<_> = ["kube-controller-manager", "kubelet"]
            .iter()
            .map(|manager| {
                json!({"manager": manager, "operation": "Update", "apiVersion": "v1", "fieldsType": "FieldsV1",
                       "fieldsV1": {"f:spec": {"f:containers": {"k:{\"name\":\"main\"}": variables.clone()}}}})
            })
            .collect();
        let conditions = ["Initialized", "Ready", "ContainersReady", "PodScheduled"].map(
            |name| json!({"type": name, "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}),
        );
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": format!("app-{service}-{index}"), "namespace": format!("team-{team}"),
                "uid": format!("00000000-0000-0000-0000-{index:012}"),
                "labels": {"app": format!("app-{service}"), "pod-template-hash": "abcdef",
                           "postern.dev/mesh": "enabled"},
                "annotations": {"revision": revision.to_string()},
                "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "controller": true,
                    "name": format!("app-{service}-abcdef"), "uid": format!("{service}")}],
                "managedFields": managed,
            },
            "spec": {
                "nodeName": format!("node{node}"), "serviceAccountName": format!("app-{service}"),
                "containers": [{
                    "name": "main", "image": "registry.example/team/app:1", "env": variables,
                    "ports": [{"name": "http", "containerPort": 8080}],
                    "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}},
                    "volumeMounts": [{"name": "token", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}],
                }],
                "volumes": [{"name": "token", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}}],
                "tolerations": [{"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute"}],
            },
            "status": {
                "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "hostIP": format!("192.0.2.{node}"),
                "conditions": conditions,
                "containerStatuses": [{"name": "main", "ready": true, "restartCount": 0,
                    "imageID": format!("registry.example/team/app@sha256:{index:064x}")}],
            },
        })
    }

    /// Node and address of a pod: none is on the first node, where pods are real.
    fn place(&self, index: usize) -> (usize, String) {
        let others = self.nodes - 1;
        let node = 2 + index % others;
        (node, format!("10.0.{node}.{}", FIRST + index / others))
    }

    fn address(index: usize) -> String {
        format!("10.96.{}.{}", index / 250, 1 + index % 250)
    }

    fn service(&self, index: usize) -> Value {
        let address = Self::address(index);
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": format!("app-{index}"), "namespace": format!("team-{}", index % 10)},
            "spec": {"clusterIP": address, "clusterIPs": [address], "selector": {"app": format!("app-{index}")},
                     "ports": [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}]},
        })
    }

    fn slice(&self, index: usize) -> Value {
        let behind = (index..self.pods).step_by(self.services);
        let endpoints: Vec<_> = behind
            .map(|pod| {
                let (node, ip) = self.place(pod);
                json!({
                    "addresses": [ip],
                    "conditions": {"ready": true, "serving": true}, "nodeName": format!("node{node}"),
                    "targetRef": {"kind": "Pod", "name": format!("app-{index}-{pod}")},
                })
            })
            .collect();
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": format!("app-{index}-x"), "namespace": format!("team-{}", index % 10),
                         "labels": {"kubernetes.io/service-name": format!("app-{index}")}},
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}], "endpoints": endpoints,
        })
    }
}
