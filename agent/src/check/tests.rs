use std::{collections::BTreeSet, time::Duration};

use postern_apiserver::{ApiServer, Claims, Options};
use serde_json::json;

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
        service_account: Some("postern/postern-agent"),
        ..scope
    };
    let report = run(&config, &scope).await;
    assert!(!report.fit());
    assert_eq!(levels(&report, "not allowed: watch pods"), [Level::Failure]);
    let rule = |group: &str, resources: &[&str], verbs: &[&str]| json!({"apiGroups": [group], "resources": resources, "verbs": verbs});
    let watch = ["list", "watch"];
    api.apply(json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
        "metadata": {"name": "postern-agent"},
        "rules": [
            rule("", &["pods", "services", "namespaces", "nodes"], &watch),
            rule("discovery.k8s.io", &["endpointslices"], &watch),
            rule("security.istio.io", &["*"], &watch),
            rule("postern.dev", &["connectpolicies", "tokenbindings", "protectedresources"], &watch),
            rule("events.k8s.io", &["events"], &["create", "patch"]),
        ],
    }))
    .expect("taken");
    api.apply(json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
        "metadata": {"name": "postern-agent"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "postern-agent"},
        "subjects": [{"kind": "ServiceAccount", "name": "postern-agent", "namespace": "postern"}],
    }))
    .expect("taken");
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
        namespace: "postern".into(),
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
    api.uninstall("postern.dev");
    let report = run(&config, &own).await;
    assert_eq!(levels(&report, "v1alpha1 is not there"), [Level::Failure]);
    api.away(true);
    let report = run(&config, &own).await;
    assert_eq!(levels(&report, "does not answer"), [Level::Failure]);
    assert!(!report.to_string().contains(&token));
    whole(&report);
}
