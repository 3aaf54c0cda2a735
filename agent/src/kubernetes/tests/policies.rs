//! Policies of which some are wrong: the others are taken, and what the wrong ones
//! guarded is closed.

use std::collections::BTreeMap;

use super::{
    super::{held::Stored, policies},
    *,
};
use crate::policy::{Caller, Facts, Selected, Subject, Verdict};

fn stored(object: Value) -> Stored {
    Stored {
        uid: object["metadata"]["uid"]
            .as_str()
            .unwrap_or_default()
            .into(),
        generation: object["metadata"]["generation"]
            .as_i64()
            .unwrap_or_default(),
        version: "1".into(),
        conditions: Vec::new(),
        object,
    }
}

fn compile(objects: &[Value], good: &BTreeMap<policies::Id, Stored>) -> policies::Outcome {
    let domain = TrustDomain::default();
    let now = objects.iter().cloned().map(stored).collect();
    policies::compile(now, good, &mesh(&domain))
}

fn of(outcome: &policies::Outcome, namespace: &str, app: &str) -> Selected {
    outcome.set.select(&Subject {
        namespace: namespace.into(),
        labels: [("app".to_owned(), app.to_owned())].into(),
        services: vec!["front".into()],
    })
}

/// A connection by mutual TLS.
fn facts(source: Option<&str>) -> Facts {
    let source = source.map(|id| id.parse().expect("SPIFFE ID"));
    Facts::new(
        source,
        "10.0.0.9".parse().expect("address"),
        "10.9.9.9:80".parse().expect("address"),
    )
}

fn lets_in(selected: &Selected) -> bool {
    let someone = facts(Some("spiffe://cluster.local/ns/shop/sa/cart"));
    matches!(selected.opaque(&someone), Verdict::Allow(_))
}

fn dials(selected: &Selected) -> bool {
    let caller = Caller {
        executable: None,
        uid: 0,
        destination: "10.0.0.1:80".parse().expect("address"),
    };
    selected.connect(&caller).is_ok()
}

#[test]
fn what_a_refused_policy_guarded_is_closed_and_no_more() {
    let web = json!({"matchLabels": {"app": "web"}});
    let wrong = |kind: &str, mut spec: Value| {
        spec["nonsense"] = json!(1);
        policy(kind, "bad", spec)
    };
    for kind in [
        "AuthorizationPolicy",
        "RequestAuthentication",
        "TokenBinding",
        "ProtectedResource",
    ] {
        let object = wrong(kind, json!({"selector": web}));
        let outcome = compile(&[object], &BTreeMap::new());
        assert!(!lets_in(&of(&outcome, "shop", "web")), "{kind} lets in");
        assert!(
            lets_in(&of(&outcome, "shop", "other")),
            "{kind} closes too much"
        );
        assert!(
            lets_in(&of(&outcome, "bank", "web")),
            "{kind} closes too much"
        );
    }
    // What cannot be read of what it selects selects all that it could.
    for selector in [
        json!("web"),
        json!({"matchLabels": {"app": 1}}),
        json!({"matchLabel": {}}),
    ] {
        let outcome = compile(
            &[wrong("AuthorizationPolicy", json!({"selector": selector}))],
            &BTreeMap::new(),
        );
        assert!(!lets_in(&of(&outcome, "shop", "other")), "{selector}");
        assert!(lets_in(&of(&outcome, "bank", "web")), "{selector}");
    }
    for (spec, closed) in [
        (
            json!({"targetRefs": [{"kind": "Service", "group": "", "name": "front"}]}),
            true,
        ),
        (
            json!({"targetRefs": [{"kind": "Service", "group": "", "name": "back"}]}),
            false,
        ),
        (json!({"targetRef": {"kind": "Service"}}), true),
        (json!({"action": "AUDIT"}), false),
    ] {
        let outcome = compile(
            &[wrong("AuthorizationPolicy", spec.clone())],
            &BTreeMap::new(),
        );
        assert_eq!(lets_in(&of(&outcome, "shop", "web")), !closed, "{spec}");
        let verdict = outcome.verdicts.values().next().expect("a verdict");
        let refusal = verdict.refused.as_ref().expect("it is refused");
        assert!(refusal.why.contains("nonsense"), "{}", refusal.why);
    }
    let mut tried = wrong("AuthorizationPolicy", json!({}));
    tried["metadata"]["annotations"] = json!({"istio.io/dry-run": "true"});
    assert!(lets_in(&of(
        &compile(&[tried], &BTreeMap::new()),
        "shop",
        "web"
    )));

    let outcome = compile(
        &[wrong("PeerAuthentication", json!({"selector": web}))],
        &BTreeMap::new(),
    );
    assert!(of(&outcome, "shop", "web").transport(&facts(None)).is_err());
    assert!(
        of(&outcome, "shop", "other")
            .transport(&facts(None))
            .is_ok()
    );

    let outcome = compile(
        &[wrong("ConnectPolicy", json!({"selector": web}))],
        &BTreeMap::new(),
    );
    assert!(!dials(&of(&outcome, "shop", "web")));
    assert!(dials(&of(&outcome, "shop", "other")));
    assert!(lets_in(&of(&outcome, "shop", "web")));

    let outcome = compile(
        &[wrong(
            "OutboundToken",
            json!({"selector": web, "hosts": ["api.example"]}),
        )],
        &BTreeMap::new(),
    );
    let selected = of(&outcome, "shop", "web");
    let error = selected.outbound(80, "api.example").expect_err("no token");
    assert_eq!(error.code(), "policyRefused");
    assert!(
        selected
            .outbound(80, "other.example")
            .expect("no other")
            .is_none()
    );
    assert!(
        of(&outcome, "shop", "other")
            .outbound(80, "api.example")
            .expect("no other")
            .is_none()
    );
}

#[test]
fn the_others_are_taken_and_the_last_good_version_stands() {
    let fine = policy(
        "AuthorizationPolicy",
        "fine",
        json!({"action": "DENY", "rules": [{}], "selector": {"matchLabels": {"app": "other"}}}),
    );
    let good = policy(
        "AuthorizationPolicy",
        "p",
        json!({
            "selector": {"matchLabels": {"app": "web"}},
            "rules": [{"from": [{"source": {"namespaces": ["shop"]}}]}],
        }),
    );
    let mut bad = policy("AuthorizationPolicy", "p", json!({"rules": [{"form": []}]}));
    bad["metadata"]["generation"] = json!(2);
    let first = compile(&[fine.clone(), good], &BTreeMap::new());
    assert!(
        first
            .verdicts
            .values()
            .all(|verdict| verdict.refused.is_none())
    );
    let second = compile(&[fine.clone(), bad.clone()], &first.good);
    assert!(lets_in(&of(&second, "shop", "web")));
    assert!(!lets_in(&of(&second, "shop", "other")));
    let id = ("AuthorizationPolicy".into(), "shop".into(), "p".into());
    let refusal = second.verdicts[&id]
        .refused
        .as_ref()
        .expect("it is refused");
    assert!(
        refusal.last_good && refusal.why.contains("form"),
        "{refusal:?}"
    );
    assert_eq!(second.verdicts[&id].generation, 2);
    // And so it goes on, until it is right or gone.
    let third = compile(&[fine.clone(), bad.clone()], &second.good);
    assert!(lets_in(&of(&third, "shop", "web")));
    assert!(!third.good.is_empty());
    let gone = compile(&[fine], &third.good);
    assert!(!gone.good.contains_key(&id));
    // Another object of the same name has no past.
    bad["metadata"]["uid"] = json!("another");
    let other = compile(&[bad], &third.good);
    assert!(!lets_in(&of(&other, "shop", "web")));
}

#[test]
fn of_two_that_exclude_each_other_the_older_one_is_taken() {
    let resource = |name: &str, at: &str| {
        let mut object = policy(
            "ProtectedResource",
            name,
            json!({"selector": {"matchLabels": {"app": "web"}}}),
        );
        object["metadata"]["creationTimestamp"] = json!(at);
        object
    };
    let old = resource("b", "2026-01-01T00:00:00Z");
    let new = resource("a", "2026-01-02T00:00:00Z");
    let outcome = compile(&[new, old], &BTreeMap::new());
    let refused: Vec<&str> = (outcome.verdicts.iter())
        .filter(|(_, verdict)| verdict.refused.is_some())
        .map(|(id, _)| id.2.as_str())
        .collect();
    assert_eq!(refused, ["a"]);
    assert!(!lets_in(&of(&outcome, "shop", "web")));
}
