//! The same questions to `postern policy eval`.

use std::{fs, process::Command};

use anyhow::{Context as _, Result, bail};
use postern_tests::{binary, output, text};
use serde_json::{Map, Value, json};

use crate::cases::{Case, LABELS, NAMESPACE, ROOT_NAMESPACE, SERVICE_ACCOUNT, Set, TRUST_DOMAIN};

/// What Postern says to a request.
#[derive(Debug)]
pub struct Verdict {
    pub status: u16,
    pub reason: String,
    /// What the application would get.
    pub headers: Option<Map<String, Value>>,
}

/// Puts all cases of a set.
pub fn verdicts(set: &Set) -> Result<Vec<Verdict>> {
    let directory = tempfile::tempdir()?;
    let policies = directory.path().join("policies");
    fs::create_dir(&policies)?;
    for (index, policy) in set.policies.iter().enumerate() {
        // JSON is YAML.
        fs::write(policies.join(format!("{index}.yaml")), policy.to_string())?;
    }
    let workload = directory.path().join("workload.json");
    let labels: Map<String, Value> = (LABELS.iter())
        .map(|(name, value)| ((*name).to_owned(), (*value).into()))
        .collect();
    let described = json!({
        "namespace": NAMESPACE, "serviceAccount": SERVICE_ACCOUNT, "labels": labels,
    });
    fs::write(&workload, described.to_string())?;
    let requests = directory.path().join("requests.jsonl");
    let lines = set
        .requests
        .iter()
        .map(|case| question(case).to_string() + "\n");
    fs::write(&requests, lines.collect::<String>())?;

    let mut command = Command::new(binary("postern")?);
    command.args(["policy", "eval"]);
    command.arg("--policies").arg(&policies);
    command.arg("--workload").arg(&workload);
    command.arg("--requests").arg(&requests);
    command.args([
        "--root-namespace",
        ROOT_NAMESPACE,
        "--trust-domain",
        TRUST_DOMAIN,
    ]);
    command.args(["--path-normalization", &set.normalization]);
    command.args(["--trusted-proxies", &set.trusted_proxies.to_string()]);
    for alias in &set.aliases {
        command.args(["--trust-domain-alias", alias]);
    }
    let answers = text(&output(&mut command)?.stdout);
    let verdicts = answers.lines().map(verdict).collect::<Result<Vec<_>>>()?;
    if verdicts.len() != set.requests.len() {
        bail!(
            "{} answers to {} requests",
            verdicts.len(),
            set.requests.len()
        );
    }
    Ok(verdicts)
}

fn question(case: &Case) -> Value {
    let peer = case.peer.as_ref().map(|peer| format!("spiffe://{peer}"));
    let sni = case.peer.as_ref().and(case.sni.as_ref());
    json!({
        "connection": {
            "source_ip": case.from,
            "source_port": 40000,
            "destination_ip": case.destination(),
            "destination_port": case.port,
            "tls": peer.is_some(),
            "peer_identity": peer,
            "sni": sni,
        },
        "http": {
            "method": case.method,
            "path": case.path,
            "host": case.host,
            "headers": case.headers,
        },
    })
}

fn verdict(line: &str) -> Result<Verdict> {
    let mut answer: Value = serde_json::from_str(line)?;
    let status = match answer["decision"].as_str() {
        Some("allow") => 200,
        _ => answer["status"].as_u64().with_context(|| line.to_owned())?,
    };
    let headers = match answer["headers"].take() {
        Value::Object(headers) => Some(headers),
        _ => None,
    };
    Ok(Verdict {
        status: u16::try_from(status)?,
        reason: answer["reason"].as_str().unwrap_or_default().to_owned(),
        headers,
    })
}
