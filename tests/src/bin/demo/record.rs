//! Audit records, found and made short.

use anyhow::Result;
use postern_tests::Lab;
use serde_json::Value;

/// Which connection, as seen from which side, with which outcome.
pub struct Wanted {
    /// The node whose log has it, from 1.
    pub node: usize,
    pub reporter: &'static str,
    pub transport: &'static str,
    pub from: &'static str,
    pub to: &'static str,
    pub verdict: &'static str,
}

impl Wanted {
    /// The record; waits for it.
    pub fn find(&self, lab: &Lab) -> Result<Value> {
        let Self {
            node,
            transport,
            from,
            to,
            verdict,
            ..
        } = self;
        let what = format!("node{node} records {from} to {to}, {transport}: {verdict}");
        lab.nodes[node - 1].record(&what, |record| self.is(record))
    }

    fn is(&self, record: &Value) -> bool {
        record["kind"] == "connection"
            && record["reporter"] == self.reporter
            && record["transport"] == self.transport
            && record["source"]["pod"] == self.from
            && record["destination"]["pod"] == self.to
            && record["verdict"] == self.verdict
    }
}

/// Kind and name of the policy that decided.
pub fn policy(record: &Value) -> String {
    let policy = &record["policy"];
    let [kind, namespace, name] = ["kind", "namespace", "name"].map(|key| text(&policy[key]));
    if policy.is_null() {
        "none selects the pod".into()
    } else {
        format!("{kind} {namespace}/{name}")
    }
}

pub fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("-")
}

/// The facts of a record in a few lines.
pub fn short(record: &Value) -> String {
    let [node, reporter, transport, end] =
        ["node", "reporter", "transport", "end"].map(|key| text(&record[key]));
    let (source, destination) = (&record["source"], &record["destination"]);
    let (from, to) = (text(&source["pod"]), text(&destination["pod"]));
    let mut lines = vec![
        format!("{from} -> {to}, {transport}, as its {reporter} ({node}) saw it"),
        format!(
            "identities  {} -> {}",
            identity(source),
            identity(destination)
        ),
    ];
    let process = &record["source"]["process"];
    if !process.is_null() {
        let (name, exe) = (text(&process["comm"]), text(&process["exe"]));
        lines.push(format!(
            "process     {name}, pid {}, uid {}, {exe}",
            process["pid"], process["uid"]
        ));
        lines.push(format!(
            "cgroup      {}",
            pod_cgroup(text(&process["cgroup"]))
        ));
    }
    let (sent, received) = (&record["bytes"]["sent"], &record["bytes"]["received"]);
    lines.extend([
        format!("policy      {}", policy(record)),
        format!("tls         {}", tls(&record["tls"])),
        format!(
            "bytes       {sent} sent, {received} received in {} ms",
            record["durationMs"]
        ),
        format!("end         {end}"),
    ]);
    lines.join("\n")
}

fn identity(peer: &Value) -> &str {
    peer["identity"].as_str().unwrap_or("none proven")
}

/// The part of a cgroup path that a kubelet would give; before it stands the lab's.
fn pod_cgroup(path: &str) -> &str {
    path.find("/kubepods").map_or(path, |at| &path[at..])
}

fn tls(session: &Value) -> String {
    let [version, group, cipher] = ["version", "group", "cipher"].map(|key| text(&session[key]));
    if session.is_null() {
        "none".into()
    } else {
        format!("{version}, {group}, {cipher}")
    }
}
