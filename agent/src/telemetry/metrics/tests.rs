//! Alerts and dashboard ask for what there is.

use std::collections::BTreeSet;

use super::*;

/// Names as Prometheus has them, each metric with a value.
fn names() -> BTreeSet<String> {
    let metrics = Metrics::default();
    let labels = ConnectionLabels::new(
        Reporter::Source,
        (None, None),
        (None, None),
        None,
        false,
        false,
    );
    for family in [
        &metrics.opened,
        &metrics.closed,
        &metrics.sent,
        &metrics.received,
    ] {
        family.get_or_create(&labels).inc();
    }
    metrics.request("http1", Verdict::Allow, Some(200));
    metrics
        .grants
        .get_or_create(&GrantLabels {
            grant: "x",
            result: "granted",
        })
        .inc();
    metrics.token("none");
    metrics.handshake("client");
    metrics.reload_error("policies");
    metrics.set_map_entries("MESH", 1);
    metrics.set_kernel("steered", 1);
    for (_, family) in &metrics.sinks {
        family.get_or_create(&Sink { sink: "x".into() }).set(1);
    }
    let text = metrics.text();
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    let names = samples.filter_map(|line| line.split(['{', ' ']).next());
    names.map(str::to_owned).collect()
}

/// What looks like one of our names in a text.
fn mentioned(text: &str) -> BTreeSet<String> {
    let word = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
    text.split(word)
        .filter(|word| word.starts_with("postern_") || word.starts_with("istio_tcp_"))
        .map(str::to_owned)
        .collect()
}

#[test]
fn alerts_and_dashboard_name_metrics_that_are_there() {
    let there = names();
    assert!(there.contains("postern_tunnels"), "{there:?}");
    for (file, text) in [
        (
            "alerts.yaml",
            include_str!("../../../../config/kubernetes/chart/postern/files/alerts.yaml"),
        ),
        (
            "dashboard.json",
            include_str!("../../../../config/kubernetes/chart/postern/files/dashboard.json"),
        ),
    ] {
        let mentioned = mentioned(text);
        assert!(mentioned.len() > 5, "{file}: {mentioned:?}");
        let missing: Vec<_> = mentioned.difference(&there).collect();
        assert!(missing.is_empty(), "{file}: {missing:?} of {there:?}");
    }
}

#[test]
fn alerts_say_what_to_do() {
    let text = include_str!("../../../../config/kubernetes/chart/postern/files/alerts.yaml");
    let alerts: serde_json::Value = serde_saphyr::from_str(text).expect("YAML");
    let rules = alerts["groups"][0]["rules"].as_array().expect("rules");
    for rule in rules {
        let name = rule["alert"].as_str().expect("a name");
        assert!(name.starts_with("Postern"), "{name}");
        assert!(
            ["critical", "warning"].contains(&rule["labels"]["severity"].as_str().unwrap_or(""))
        );
        let said = rule["annotations"]["description"]
            .as_str()
            .unwrap_or_default();
        assert!(said.len() > 40, "{name} says nothing");
    }
}

#[test]
fn kernel_counters_of_alerts_are_told() {
    let told = include_str!("../../app.rs");
    for name in ["refused_map_full", "dropped_without_listener", "steered"] {
        assert!(told.contains(&format!("(\"{name}\", Counter::")), "{name}");
    }
}
