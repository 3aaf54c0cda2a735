//! What operators are told, by status and events.

use std::sync::Mutex;

use super::{
    super::{PodState, tell_pods, tell_policies},
    *,
};
use crate::lifecycle::drain;

fn condition(server: &ApiServer, name: &str, kind: &str) -> Option<(String, String, String)> {
    let object = server.get("AuthorizationPolicy", "shop", name)?;
    let all = object["status"]["conditions"].as_array()?.clone();
    let one = all.into_iter().find(|one| one["type"] == kind)?;
    let text = |field: &str| one[field].as_str().unwrap_or_default().to_owned();
    Some((text("status"), text("reason"), text("message")))
}

#[tokio::test(flavor = "multi_thread")]
async fn policies_say_whether_they_are_taken_and_by_how_many_nodes() {
    let mut lab = Lab::new();
    lab.put(policy(
        "AuthorizationPolicy",
        "good",
        json!({"action": "DENY", "rules": [{}]}),
    ));
    lab.put(policy(
        "AuthorizationPolicy",
        "bad",
        json!({"action": "DENY", "rule": []}),
    ));
    let mut with_other = lab
        .server
        .get("AuthorizationPolicy", "shop", "good")
        .expect("there");
    with_other["status"] = json!({"conditions": [{"type": "Reconciled", "status": "True"}]});
    lab.put(with_other);
    let (_trigger, watcher) = drain();
    let first = lab.follow().await;
    tokio::spawn(tell_policies(first.cluster.clone(), watcher.clone()));
    let is = |name: &'static str, kind: &'static str, status: &'static str, part: &'static str| {
        let told = condition(&lab.server, name, kind);
        told.is_some_and(|(now, reason, message)| {
            now == status && (reason == part || message.contains(part))
        })
    };
    until("it is taken", || is("good", "Accepted", "True", "Accepted")).await;
    until("one node", || {
        is("good", "Enforced", "True", "by 1 of 1 node")
    })
    .await;
    until("it is refused", || is("bad", "Accepted", "False", "rule")).await;
    until("what stands", || {
        is("bad", "Enforced", "False", "is denied")
    })
    .await;
    assert!(
        is("good", "Reconciled", "True", ""),
        "others' conditions stay"
    );
    // Nothing changed, nothing is written.
    let writes = first.cluster.counts.statuses.get();
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(first.cluster.counts.statuses.get(), writes);

    lab.config.node = "n2".into();
    let second = lab.follow().await;
    tokio::spawn(tell_policies(second.cluster.clone(), watcher));
    let is = |part: &str| {
        let told = condition(&lab.server, "good", "Enforced");
        told.is_some_and(|(_, _, message)| message.contains(part))
    };
    until("two nodes", || is("by 2 of 2 nodes")).await;
    assert_eq!(
        second.cluster.counts.statuses.get(),
        0,
        "one writes for all"
    );
}

/// In the order in which they came.
fn events(server: &ApiServer) -> Vec<String> {
    let mut all: Vec<(String, String)> = (server.list("Event").into_iter())
        .map(|event| {
            assert_eq!(event["involvedObject"]["uid"], "uid-web", "{event}");
            let text = |field: &str| event[field].as_str().unwrap_or_default().to_owned();
            (
                text("eventTime"),
                format!("{}: {}", text("reason"), text("message")),
            )
        })
        .collect();
    all.sort();
    all.into_iter().map(|(_, text)| text).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_that_are_kept_out_are_told_once_and_when_they_are_in() {
    let lab = Lab::new();
    lab.put(pod("web", NODE, "10.0.0.1"));
    let cluster = lab.connect().await;
    let pod = PodState {
        namespace: "shop".into(),
        name: "web".into(),
        uid: "uid-web".into(),
        kept_out: Some("its certificate is not there yet".into()),
    };
    let pods = Arc::new(Mutex::new(vec![pod]));
    let seen = pods.clone();
    let (_trigger, watcher) = drain();
    let read = move || seen.lock().expect("no panic").clone();
    tokio::spawn(tell_pods(cluster.clone(), read, watcher));
    until("the event", || !events(&lab.server).is_empty()).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(events(&lab.server).len(), 1, "once");
    pods.lock().expect("no panic")[0].kept_out = None;
    until("that it is in", || events(&lab.server).len() == 2).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let told = events(&lab.server);
    assert_eq!(told.len(), 2, "once");
    assert!(
        told[0].starts_with("NotEnrolled: not in the mesh: its certificate"),
        "{told:?}"
    );
    assert!(told[1].starts_with("Enrolled"), "{told:?}");
}
