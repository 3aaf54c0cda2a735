//! Events on pods of this node that could not be enrolled, where `kubectl describe pod`
//! shows them: once for each reason, and once more when it has passed. What passes by
//! itself while a pod starts is not told.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::time::{Instant, sleep, timeout};

use super::{Cluster, explain};
use crate::lifecycle::Watcher;

/// A pod must be kept out for so long before it is told, and for so long between two
/// reasons that are told.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    pub first: Duration,
    pub again: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            first: Duration::from_secs(15),
            again: Duration::from_secs(60),
        }
    }
}

/// Events of one round; the others come in the next.
const MOST: usize = 20;

/// A pod of this node.
#[derive(Clone, Debug)]
pub struct PodState {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    /// Why it should be in the mesh and is not.
    pub kept_out: Option<String>,
}

struct Known {
    since: Instant,
    told: Option<(String, Instant)>,
}

/// What was told of which pod.
#[derive(Default)]
pub struct Telling {
    known: HashMap<String, Known>,
}

impl Telling {
    /// What is to be told now: the reason, or that it has passed.
    pub fn due(&self, pod: &PodState, now: Instant, patience: Patience) -> Option<Option<String>> {
        let known = self.known.get(&pod.uid);
        match (&pod.kept_out, known) {
            (Some(why), Some(known)) => {
                let due = match &known.told {
                    None => now - known.since >= patience.first,
                    Some((told, at)) => told != why && now - *at >= patience.again,
                };
                due.then(|| Some(why.clone()))
            }
            (None, Some(known)) if known.told.is_some() => Some(None),
            _ => None,
        }
    }

    fn see(&mut self, pods: &[PodState], now: Instant) {
        let uids: HashSet<&str> = pods.iter().map(|pod| pod.uid.as_str()).collect();
        self.known.retain(|uid, _| uids.contains(uid.as_str()));
        for pod in pods {
            match pod.kept_out {
                Some(_) => {
                    let known = Known {
                        since: now,
                        told: None,
                    };
                    self.known.entry(pod.uid.clone()).or_insert(known);
                }
                // It is to be told that it has passed, if it was told that it was so.
                None if self.known.get(&pod.uid).is_some_and(|k| k.told.is_none()) => {
                    self.known.remove(&pod.uid);
                }
                None => {}
            }
        }
    }

    fn told(&mut self, pod: &PodState, what: Option<String>, now: Instant) {
        match what {
            Some(why) => {
                if let Some(known) = self.known.get_mut(&pod.uid) {
                    known.told = Some((why, now));
                }
            }
            None => {
                self.known.remove(&pod.uid);
            }
        }
    }
}

/// Looks at the pods every few seconds, until the agent ends.
pub async fn tell_pods(
    cluster: Arc<Cluster>,
    pods: impl Fn() -> Vec<PodState> + Send + Sync,
    stop: Watcher,
) {
    let reporter = Reporter {
        controller: "postern.dev/agent".into(),
        instance: Some(cluster.node.to_string()),
    };
    let recorder = Recorder::new(cluster.client.clone(), reporter);
    let mut telling = Telling::default();
    loop {
        tokio::select! {
            () = sleep(cluster.pace.pods) => {}
            () = stop.triggered() => return,
        }
        let now = Instant::now();
        let pods = pods();
        telling.see(&pods, now);
        let patience = cluster.pace.patience;
        let due = pods
            .iter()
            .filter_map(|pod| Some((pod, telling.due(pod, now, patience)?)));
        let due: Vec<_> = due.take(MOST).collect();
        for (pod, what) in due {
            let told = timeout(cluster.pace.answer, tell(&recorder, pod, what.as_deref()));
            match told.await {
                Ok(Ok(())) => {
                    cluster.counts.pod_events.inc();
                    telling.told(pod, what, now);
                }
                failed => {
                    let error = failed.map_or("no answer".into(), |sent| match sent {
                        Ok(()) => String::new(),
                        Err(error) => explain(&error),
                    });
                    cluster.counts.errors.inc();
                    tracing::debug!(pod = pod.name, error, "no event written");
                    // The others would meet the same.
                    break;
                }
            }
        }
    }
}

async fn tell(recorder: &Recorder, pod: &PodState, why: Option<&str>) -> kube::Result<()> {
    /// Longest note (events.k8s.io/v1).
    const LONGEST: usize = 1000;
    let (type_, reason, note) = match why {
        Some(why) => (
            EventType::Warning,
            "NotEnrolled",
            format!("not in the mesh: {why}"),
        ),
        None => (EventType::Normal, "Enrolled", "in the mesh".to_owned()),
    };
    let event = Event {
        type_,
        reason: reason.into(),
        note: Some(note.chars().take(LONGEST / 4).collect()),
        action: "Enrol".into(),
        secondary: None,
    };
    let reference = ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Pod".into()),
        namespace: Some(pod.namespace.clone()),
        name: Some(pod.name.clone()),
        uid: Some(pod.uid.clone()),
        ..ObjectReference::default()
    };
    recorder.publish(&event, &reference).await
}
