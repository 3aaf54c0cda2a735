//! Conditions in the status of policies: `Accepted`, and `Enforced` by how many nodes.
//!
//! A hundred agents must not write one object. Each writes only a Lease of its own, which
//! says what it enforces (four bytes a policy), and only when that changed or the Lease
//! grows old. One of them, which holds the Lease `postern-status`, reads them all, and
//! writes the conditions that came to differ, a few at a time. Nobody watches the Leases:
//! a change of a policy costs a write for each node, and one for the policy.
//!
//! All of it waits on nobody and nobody waits on it: it fails, is counted, and is tried
//! again.

use std::{collections::BTreeMap, time::Duration};

use aws_lc_rs::digest::{SHA256, digest};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff::{SignedDuration, Timestamp},
};
use kube::{
    Api,
    api::{ListParams, ObjectMeta, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::{Cluster, Held, Id, Scope, Verdict, explain, held::Stored, watch::jittered};
use crate::{lifecycle::Watcher, workload::WorkloadObject};

const LOCK: &str = "postern-status";
const REPORT: &str = "postern.dev/report";
const ENFORCES: &str = "postern.dev/enforces";
/// Who writes, to the API server's bookkeeping.
pub const MANAGER: &str = "postern-agent";
/// Policies that one node reports at most; more are enforced, and not counted.
const MOST: usize = 8192;
/// Conditions that are written in one round.
const WRITES: usize = 50;
/// A Lease that is older is of a node that is gone, or has no agent.
const OLD: SignedDuration = SignedDuration::from_mins(15);
/// A Lease is renewed after this long, though nothing changed.
const RENEW: Duration = Duration::from_secs(300);
/// One page of Leases.
const PAGE: u32 = 500;

/// What one policy's hash is, of one of its generations.
pub fn mark(uid: &str, generation: i64) -> [u8; 4] {
    let hash = digest(&SHA256, format!("{uid}@{generation}").as_bytes());
    let mut mark = [0; 4];
    mark.copy_from_slice(&hash.as_ref()[..4]);
    mark
}

pub fn marks(verdicts: &BTreeMap<Id, Verdict>) -> String {
    let taken = verdicts
        .values()
        .filter(|verdict| verdict.refused.is_none());
    let mut all: Vec<[u8; 4]> = taken.map(|v| mark(&v.uid, v.generation)).collect();
    all.sort_unstable();
    all.truncate(MOST);
    STANDARD.encode(all.concat())
}

/// Nodes that report, and how many of them enforce a policy.
#[derive(Debug, Default)]
pub struct Census {
    pub nodes: usize,
    enforced: BTreeMap<[u8; 4], usize>,
}

impl Census {
    fn add(&mut self, lease: &Lease, now: Timestamp) {
        let renewed = lease
            .spec
            .as_ref()
            .and_then(|spec| spec.renew_time.as_ref());
        if renewed.is_none_or(|at| at.0 + OLD < now) {
            return;
        }
        self.nodes += 1;
        let annotations = lease.metadata.annotations.as_ref();
        let marks = annotations.and_then(|all| STANDARD.decode(all.get(ENFORCES)?).ok());
        for mark in marks.unwrap_or_default().as_chunks::<4>().0 {
            *self.enforced.entry(*mark).or_default() += 1;
        }
    }

    fn by(&self, verdict: &Verdict) -> usize {
        let mark = mark(&verdict.uid, verdict.generation);
        self.enforced.get(&mark).copied().unwrap_or_default()
    }
}

/// `(type, status, reason, message)` of both conditions.
pub fn conditions(
    verdict: &Verdict,
    census: &Census,
) -> [(&'static str, bool, &'static str, String); 2] {
    let nodes = |n: usize| {
        if n == 1 {
            "1 node".to_owned()
        } else {
            format!("{n} nodes")
        }
    };
    let by = census.by(verdict);
    let total = census.nodes.max(by);
    match &verdict.refused {
        None => {
            let (whole, reason) = match by == total {
                true => (true, "Enforced"),
                false => (false, "Partly"),
            };
            let message = format!("enforced by {by} of {}", nodes(total));
            [
                ("Accepted", true, "Accepted", "taken as it stands".into()),
                ("Enforced", whole, reason, message),
            ]
        }
        Some(refusal) => {
            let reason = if refusal.last_good {
                "LastGood"
            } else {
                "Refused"
            };
            [
                ("Accepted", false, "Invalid", refusal.why.clone()),
                ("Enforced", false, reason, refusal.stands.into()),
            ]
        }
    }
}

/// All conditions of an object as they should be, where they are not.
pub fn amended(
    stored: &Stored,
    verdict: &Verdict,
    census: &Census,
    now: Timestamp,
) -> Option<Vec<Value>> {
    let wanted = conditions(verdict, census);
    let mut amended = stored.conditions.clone();
    let mut changed = false;
    for (kind, status, reason, message) in wanted {
        let status = if status { "True" } else { "False" };
        // Conditions may not be longer (metav1.Condition).
        let message: String = message.chars().take(32_768 / 4).collect();
        let at = amended
            .iter()
            .position(|condition| condition["type"] == kind);
        let before = at.map(|at| &amended[at]);
        let same = before.is_some_and(|before| {
            before["status"] == status
                && before["reason"] == reason
                && before["message"] == message.as_str()
                && before["observedGeneration"] == verdict.generation
        });
        if same {
            continue;
        }
        changed = true;
        let since = before.filter(|before| before["status"] == status);
        let since = since.and_then(|before| before["lastTransitionTime"].as_str());
        let since = since.map_or_else(|| seconds(now), str::to_owned);
        let condition = json!({
            "type": kind, "status": status, "reason": reason, "message": message,
            "observedGeneration": verdict.generation, "lastTransitionTime": since,
        });
        match at {
            Some(at) => amended[at] = condition,
            None => amended.push(condition),
        }
    }
    changed.then_some(amended)
}

/// metav1.Time has no fractions.
fn seconds(at: Timestamp) -> String {
    let whole = Timestamp::from_second(at.as_second());
    whole.unwrap_or(at).to_string()
}

struct Teller<'a> {
    cluster: &'a Cluster,
    leases: Api<Lease>,
    /// What the own Lease says, and since when.
    reported: Option<(String, Instant)>,
    /// What failed last, so that it is logged once.
    failed: String,
}

/// Tells operators what became of policies, until the agent ends.
pub async fn tell_policies(cluster: std::sync::Arc<Cluster>, stop: Watcher) {
    let mut verdicts = cluster.verdicts.subscribe();
    let mut teller = Teller {
        leases: Api::namespaced(cluster.client.clone(), &cluster.namespace),
        cluster: &cluster,
        reported: None,
        failed: String::new(),
    };
    loop {
        let nodes = cluster.kept().get("nodes").copied().unwrap_or(1) as u32;
        // The more agents, the rarer each asks.
        let round = cluster.pace.status + cluster.pace.status * nodes.min(5000) / 100;
        let settle = cluster.pace.status / 10 + cluster.pace.status * nodes.min(5000) / 500;
        tokio::select! {
            changed = verdicts.changed() => {
                if changed.is_err() {
                    return;
                }
                sleep(jittered(settle)).await;
                verdicts.borrow_and_update();
            }
            () = sleep(jittered(round)) => {}
            () = stop.triggered() => return,
        }
        let told = tokio::select! {
            told = tokio::time::timeout(cluster.pace.answer * 3, teller.round(round)) => told,
            () = stop.triggered() => return,
        };
        let error = match told {
            Ok(Ok(())) => String::new(),
            Ok(Err(error)) => explain(&error),
            Err(_late) => "the API server did not answer in time".to_owned(),
        };
        if !error.is_empty() {
            cluster.counts.errors.inc();
            if error != teller.failed {
                tracing::warn!(error, "status of policies is not written");
            }
        }
        teller.failed = error;
    }
}

impl Teller<'_> {
    async fn round(&mut self, round: Duration) -> kube::Result<()> {
        let verdicts = self.cluster.verdicts();
        self.report(marks(&verdicts)).await?;
        if !self.leads(round).await? {
            return Ok(());
        }
        let census = self.census().await?;
        let stored: Vec<(Scope, Stored)> = {
            let inner = self.cluster.store.lock();
            let policies = inner.scopes.iter().flat_map(|(scope, kept)| {
                let held = kept.objects.values();
                held.filter_map(move |held| match held {
                    Held::Policy(stored) => Some((scope.clone(), (**stored).clone())),
                    Held::Workload(_) => None,
                })
            });
            policies.collect()
        };
        let now = Timestamp::now();
        let mut written = 0;
        for (scope, stored) in stored {
            let verdict = verdicts.get(&super::policies::id(&stored));
            // Of a version that was not judged yet, nothing is said.
            let verdict = verdict
                .filter(|verdict| verdict.uid == stored.uid)
                .filter(|verdict| verdict.generation == stored.generation);
            let Some(amended) = verdict.and_then(|v| amended(&stored, v, &census, now)) else {
                continue;
            };
            if written == WRITES {
                break;
            }
            written += 1;
            self.write(&scope, &stored, amended).await?;
        }
        Ok(())
    }

    async fn write(
        &self,
        scope: &Scope,
        stored: &Stored,
        conditions: Vec<Value>,
    ) -> kube::Result<()> {
        let api_version = stored.text("/apiVersion");
        let mut resources = scope.resources().into_iter();
        let Some(resource) = resources.find(|r| r.api_version == api_version) else {
            return Ok(());
        };
        let (namespace, name) = (
            stored.text("/metadata/namespace"),
            stored.text("/metadata/name"),
        );
        let api: Api<kube::api::DynamicObject> =
            Api::namespaced_with(self.cluster.client.clone(), namespace, &resource);
        let patch = json!({
            // Others write conditions, too: theirs must be those that were read.
            "metadata": {"resourceVersion": stored.version},
            "status": {"conditions": conditions},
        });
        let params = PatchParams {
            field_manager: Some(MANAGER.into()),
            ..PatchParams::default()
        };
        match api.patch_status(name, &params, &Patch::Merge(patch)).await {
            Ok(_) => {
                self.cluster.counts.statuses.inc();
                Ok(())
            }
            // Changed or gone meanwhile; or its kind has no status.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The own Lease says what this node enforces.
    async fn report(&mut self, marks: String) -> kube::Result<()> {
        if let Some((reported, at)) = &self.reported
            && *reported == marks
            && at.elapsed() < RENEW
        {
            return Ok(());
        }
        let node = &*self.cluster.node;
        let name = format!("postern-node-{node}");
        let mut lease = json!({
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
            "metadata": {
                "name": name,
                "labels": {REPORT: "node"},
                "annotations": {ENFORCES: marks},
            },
            "spec": {
                "holderIdentity": node,
                "leaseDurationSeconds": OLD.as_secs(),
                "renewTime": MicroTime(Timestamp::now()),
            },
        });
        // It goes with the node.
        if let Some(uid) = self.node_uid() {
            lease["metadata"]["ownerReferences"] =
                json!([{"apiVersion": "v1", "kind": "Node", "name": node, "uid": uid}]);
        }
        let params = PatchParams::apply(MANAGER).force();
        self.leases
            .patch(&name, &params, &Patch::Apply(lease))
            .await?;
        self.reported = Some((marks, Instant::now()));
        Ok(())
    }

    fn node_uid(&self) -> Option<String> {
        let inner = self.cluster.store.lock();
        inner.workloads().find_map(|object| match object {
            WorkloadObject::Node(node) if node.metadata.name == *self.cluster.node => {
                Some(node.metadata.uid.clone())
            }
            _ => None,
        })
    }

    /// Whether this agent is the one that writes conditions.
    async fn leads(&self, round: Duration) -> kube::Result<bool> {
        let now = Timestamp::now();
        let node = &*self.cluster.node;
        let before = self.leases.get_opt(LOCK).await?;
        let held = before.as_ref().and_then(|lease| lease.spec.as_ref());
        let expires = held.and_then(|spec| {
            let duration = SignedDuration::from_secs(spec.lease_duration_seconds?.into());
            Some(spec.renew_time.as_ref()?.0 + duration)
        });
        let own = held.is_some_and(|spec| spec.holder_identity.as_deref() == Some(node));
        if !own && expires.is_some_and(|at| at > now) {
            return Ok(false);
        }
        let spec = LeaseSpec {
            holder_identity: Some(node.to_owned()),
            // Three rounds, at their longest.
            lease_duration_seconds: Some((round.as_secs() as i32).max(1) * 4),
            renew_time: Some(MicroTime(now)),
            ..LeaseSpec::default()
        };
        let params = PostParams {
            field_manager: Some(MANAGER.into()),
            ..PostParams::default()
        };
        let written = match before {
            Some(mut lease) => {
                // With the version that was read: of two, one is refused.
                lease.spec = Some(spec);
                lease.metadata.managed_fields = None;
                self.leases.replace(LOCK, &params, &lease).await
            }
            None => {
                let metadata = ObjectMeta {
                    name: Some(LOCK.into()),
                    ..ObjectMeta::default()
                };
                let lease = Lease {
                    metadata,
                    spec: Some(spec),
                };
                self.leases.create(&params, &lease).await
            }
        };
        match written {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn census(&self) -> kube::Result<Census> {
        let mut params = ListParams::default()
            .labels(&format!("{REPORT}=node"))
            .limit(PAGE);
        let (mut census, now) = (Census::default(), Timestamp::now());
        loop {
            let page = self.leases.list(&params).await?;
            for lease in &page.items {
                census.add(lease, now);
            }
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params.continue_token = Some(token),
                None => return Ok(census),
            }
        }
    }
}
