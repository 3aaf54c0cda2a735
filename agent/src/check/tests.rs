use std::{collections::BTreeSet, time::Duration};

use postern_apiserver::{ApiServer, Claims, Options};
use serde_json::Value;

use super::*;

fn levels(report: &Report, part: &str) -> Vec<Level> {
    let fits = report.findings.iter().filter(|f| f.what.contains(part));
    fits.map(|f| f.level).collect()
}

/// Every finding that is not well says why, and what to do.
fn whole(report: &Report) {
    for finding in &report.findings {
        assert!(
            !finding.what.is_empty() && !finding.why.is_empty(),
            "{finding:?}"
        );
        let remedy = finding.level == Level::Ok || !finding.remedy.is_empty();
        assert!(remedy, "{finding:?}");
    }
}

#[test]
fn missing_capabilities_are_named() {
    let mut report = Report::default();
    node::capabilities("CapEff:\t000001ffffffffff\n", &mut report);
    assert!(report.fit());
    let mut report = Report::default();
    // All but CAP_BPF.
    node::capabilities("CapEff:\t0000017fffffffff\n", &mut report);
    assert_eq!(levels(&report, "CAP_BPF"), [Level::Failure]);
    assert_eq!(report.findings.len(), 1);
    assert!(!report.fit());
    let mut report = Report::default();
    node::capabilities("", &mut report);
    assert!(!report.fit());
    whole(&report);
}

#[test]
fn neighbours_and_clocks_are_seen() {
    let dir = tempfile::tempdir().expect("directory");
    let names =
        |names: &[&str]| -> BTreeSet<String> { names.iter().map(|n| (*n).into()).collect() };
    let mut report = Report::default();
    node::neighbours(&names(&["sshd"]), dir.path(), dir.path(), &mut report);
    assert_eq!(report.findings[0].level, Level::Ok);
    std::fs::create_dir(dir.path().join("cilium")).expect("directory");
    std::fs::write(
        dir.path().join("10-x.conflist"),
        "{\"type\": \"istio-cni\"}",
    )
    .expect("written");
    node::neighbours(&names(&[]), dir.path(), dir.path(), &mut report);
    assert_eq!(levels(&report, "Cilium"), [Level::Warning]);
    assert_eq!(levels(&report, "ambient"), [Level::Warning]);
    node::clock(&names(&["chronyd"]), &dir.path().join("none"), &mut report);
    assert_eq!(levels(&report, "chronyd"), [Level::Ok]);
    node::clock(&names(&[]), &dir.path().join("none"), &mut report);
    assert_eq!(levels(&report, "keep the clock"), [Level::Warning]);
    for (seconds, level) in [(2, Level::Ok), (60, Level::Warning), (600, Level::Failure)] {
        let mut report = Report::default();
        cluster::skew(Duration::from_secs(seconds), &mut report);
        assert_eq!(report.findings[0].level, level);
        whole(&report);
    }
    let date = cluster::http_date("Sun, 06 Nov 1994 08:49:37 GMT").expect("a date");
    let since = date.duration_since(std::time::SystemTime::UNIX_EPOCH);
    assert_eq!(since.expect("later").as_secs(), 784_111_777);
    whole(&report);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_is_asked_for_rights_and_kinds() {
    let api = ApiServer::start(Options {
        rbac: true,
        ..Options::default()
    })
    .await
    .expect("starts");
    let dir = tempfile::tempdir().expect("directory");
    let file = dir.path().join("kubeconfig");
    std::fs::write(&file, api.kubeconfig()).expect("written");
    let config = Config::default();
    let scope = Scope {
        kubeconfig: Some(&file),
        service_account: None,
    };
    let report = run(&config, &scope).await;
    whole(&report);
    assert!(report.fit(), "{report}");
    assert_eq!(levels(&report, "may do all"), [Level::Ok]);
    assert_eq!(
        levels(&report, "postern.dev/v1alpha1 are installed"),
        [Level::Ok]
    );
    // The agent's account may nothing yet; then one thing is left out.
    let scope = Scope {
        service_account: Some("postern-system/postern-agent"),
        ..scope
    };
    let report = run(&config, &scope).await;
    assert!(!report.fit());
    assert_eq!(levels(&report, "not allowed: watch pods"), [Level::Failure]);
    for mut object in agents_rbac(BASE) {
        if object["kind"] == "ClusterRole" {
            // But one thing.
            for rule in object["rules"].as_array_mut().expect("rules") {
                let resources = rule["resources"].as_array_mut().expect("resources");
                resources.retain(|resource| resource != "outboundtokens");
            }
        }
        api.apply(object).expect("taken");
    }
    let report = run(&config, &scope).await;
    let denied: Vec<_> = report
        .findings
        .iter()
        .filter(|f| f.level == Level::Failure)
        .collect();
    assert_eq!(denied.len(), 2, "{report}");
    assert!(denied.iter().all(|f| f.what.contains("outboundtokens")));
    // By its own token it comes to the same.
    let token = api.mint(Claims {
        namespace: "postern-system".into(),
        service_account: "postern-agent".into(),
        ..Claims::default()
    });
    std::fs::write(&file, api.kubeconfig_of(&token)).expect("written");
    let own = Scope {
        kubeconfig: Some(&file),
        service_account: None,
    };
    let report = run(&config, &own).await;
    assert_eq!(
        levels(&report, "not allowed"),
        [Level::Failure; 2],
        "{report}"
    );
    // And so as the agent is configured.
    let mut configured = config.clone();
    configured.kubernetes.kubeconfig = Some(file.clone());
    let unnamed = Scope {
        kubeconfig: None,
        service_account: None,
    };
    let report = run(&configured, &unnamed).await;
    assert_eq!(
        levels(&report, "not allowed"),
        [Level::Failure; 2],
        "{report}"
    );
    api.uninstall("postern.dev");
    let report = run(&config, &own).await;
    assert_eq!(levels(&report, "v1alpha1 is not there"), [Level::Failure]);
    api.away(true);
    let report = run(&config, &own).await;
    assert_eq!(levels(&report, "does not answer"), [Level::Failure]);
    assert!(!report.to_string().contains(&token));
    whole(&report);
}

/// Manifests as the chart renders them.
const BASE: &str = "config/kubernetes/kustomize/base/postern.yaml";
const ALL: [&str; 4] = [
    BASE,
    "tests/manifests/golden/everything.yaml",
    "tests/manifests/golden/nothing.yaml",
    "tests/manifests/golden/custom.yaml",
];

fn manifest(path: &str) -> Vec<Value> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .join(path);
    let text = std::fs::read_to_string(&path).expect("rendered");
    serde_saphyr::from_multiple(&text).expect("YAML")
}

/// Roles and bindings of the agent.
fn agents_rbac(path: &str) -> Vec<Value> {
    let all = manifest(path).into_iter();
    all.filter(|object| {
        let version = object["apiVersion"].as_str().unwrap_or_default();
        version.starts_with("rbac.") && object["metadata"]["name"] == "postern-agent"
    })
    .collect()
}

#[test]
fn what_the_agent_asks_for_is_what_the_chart_allows_it() {
    let mut counts = BTreeSet::new();
    for path in ALL {
        let all = manifest(path);
        let config = all.iter().find(|object| {
            object["kind"] == "ConfigMap" && object["metadata"]["name"] == "postern-agent"
        });
        let text = config.expect("a configuration")["data"]["agent.yaml"].as_str();
        let config: Config = serde_saphyr::from_str(text.expect("text")).expect("valid");
        type One = (bool, String, String, String);
        let asked: BTreeSet<One> = rights::asked(&config)
            .flat_map(|right| {
                rights::each(right).map(move |(resource, verb)| {
                    (right.own, right.group.into(), resource.into(), verb.into())
                })
            })
            .collect();
        let mut allowed: BTreeSet<One> = BTreeSet::new();
        let texts = |list: &Value| -> Vec<String> {
            let list = list.as_array().expect("a list").iter();
            list.map(|one| one.as_str().expect("text").to_owned())
                .collect()
        };
        for role in agents_rbac(path) {
            let own = role["kind"] == "Role";
            for rule in role["rules"].as_array().into_iter().flatten() {
                assert!(rule["resourceNames"].is_null(), "{rule}");
                for group in texts(&rule["apiGroups"]) {
                    for resource in texts(&rule["resources"]) {
                        for verb in texts(&rule["verbs"]) {
                            allowed.insert((own, group.clone(), resource.clone(), verb));
                        }
                    }
                }
            }
        }
        assert_eq!(asked, allowed, "{path}");
        counts.insert(asked.len());
    }
    assert_eq!(
        counts.len(),
        3,
        "with and without what is asked for at times"
    );
}
