//! The startup taint.

use std::sync::atomic::{AtomicBool, Ordering};

use super::{super::untaint, *};
use crate::lifecycle::drain;

const KEY: &str = "postern.dev/agent-not-ready";

fn node(name: &str, uid: &str, taints: Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "uid": uid},
        "spec": {"podCIDR": "10.0.0.0/24", "podCIDRs": ["10.0.0.0/24"], "taints": taints},
    })
}

fn taint(key: &str, effect: &str) -> Value {
    json!({"key": key, "effect": effect})
}

fn taints(lab: &Lab, node: &str) -> Value {
    let node = lab.server.get("Node", "", node).expect("there");
    node["spec"]["taints"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn it_goes_from_the_own_node_alone_once_the_agent_is_ready() {
    let lab = Lab::new();
    let other = taint("example.org/maintenance", "NoExecute");
    let both = json!([taint(KEY, "NoSchedule"), other, taint(KEY, "NoExecute")]);
    lab.put(node(NODE, "uid-1", both.clone()));
    lab.put(node("n2", "uid-2", both.clone()));
    let (_trigger, watcher) = drain();
    let followed = lab.follow().await;
    let ready = Arc::new(AtomicBool::new(false));
    let is_ready = ready.clone();
    let is_ready = move || is_ready.load(Ordering::SeqCst);
    tokio::spawn(untaint(
        followed.cluster.clone(),
        KEY.into(),
        is_ready,
        watcher,
    ));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(taints(&lab, NODE), both, "nobody is ready");
    ready.store(true, Ordering::SeqCst);
    until("it is gone", || taints(&lab, NODE) == json!([other])).await;
    assert_eq!(taints(&lab, "n2"), both, "another agent's");
    let written = lab.server.get("Node", "", NODE).expect("there");
    assert_eq!(
        written["spec"]["podCIDRs"],
        json!(["10.0.0.0/24"]),
        "{written}"
    );
    // Nothing more is written, until the node is registered anew.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let patches = || {
        let all = lab.server.requests().into_iter();
        all.filter(|r| r.verb == "patch" && r.resource == "nodes")
            .count()
    };
    assert_eq!(patches(), 1);
    lab.put(node(NODE, "uid-3", json!([taint(KEY, "NoSchedule")])));
    until("it is gone again", || taints(&lab, NODE) == json!([])).await;
}

#[tokio::test]
async fn it_takes_the_api_server_as_the_source_of_workloads() {
    let mut lab = Lab::new();
    lab.config.kubernetes.startup_taint = Some(KEY.to_owned().try_into().expect("a key"));
    lab.config.workloads.source = Source::Directory;
    for source in [Source::Kubernetes, Source::Directory] {
        lab.config.policies.source = source;
        let refused = Cluster::connect_with(&lab.config, pace()).await;
        let refused = refused.err().expect("refused").to_string();
        assert!(refused.starts_with("kubernetes.startupTaint"), "{refused}");
    }
}
