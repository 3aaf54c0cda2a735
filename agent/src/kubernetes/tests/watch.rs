//! Lists and watches, and what may befall them.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn what_is_there_comes_changes_and_goes() {
    let lab = Lab::new();
    for name in ["a", "b", "c", "d", "e"] {
        lab.put(pod(name, NODE, &format!("10.0.0.{}", name.as_bytes()[0])));
    }
    lab.put(pod("far", "n2", "10.0.1.1"));
    lab.put(service("front", "10.9.0.1", json!({"app": "a"})));
    let followed = lab.follow().await;
    followed.synced().await;
    // Of the own node alone, and page by page.
    assert_eq!(followed.pods(), ["a", "b", "c", "d", "e"]);
    let pages = lab.server.requests();
    let continued = pages.iter().filter(|r| r.query.contains("continue="));
    assert!(continued.count() >= 2, "{pages:?}");
    let table = followed.table();
    let front = table.service("10.9.0.1:80".parse().expect("address"));
    assert!(front.is_some_and(|front| !front.known), "not dialled yet");
    // What is not read is not kept.
    let kept = format!("{:?}", followed.cluster.store.lock().scopes);
    assert!(!kept.contains("last-applied"), "{kept}");

    let mut moved = pod("a", NODE, "10.0.0.200");
    moved["metadata"]["labels"] = json!({"app": "other"});
    lab.put(moved);
    lab.server.delete("Pod", "shop", "b");
    lab.put(pod("f", NODE, "10.0.0.201"));
    until("the changes", || {
        let table = followed.table();
        let moved = table.pod("10.0.0.200".parse().expect("address"));
        moved.is_some_and(|pod| pod.labels["app"] == "other")
            && followed.pods() == ["a", "c", "d", "e", "f"]
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn expired_versions_and_cut_watches_leave_no_moment_without_pods() {
    let lab = Lab::new();
    lab.put(pod("a", NODE, "10.0.0.1"));
    let followed = lab.follow().await;
    followed.synced().await;
    let mut changes = followed.cluster.changes();
    let seen = followed.cluster.clone();
    let least = tokio::spawn(async move {
        let mut least = usize::MAX;
        while changes.changed().await.is_ok() {
            least = least.min(seen.view(Enrolment::Enabled).parts().1.workloads.len());
            if least == 0 || seen.store.lock().workloads().count() > 30 {
                break;
            }
        }
        least
    });
    for round in 0..20 {
        lab.put(pod(&format!("p{round}"), NODE, &format!("10.0.2.{round}")));
        if round % 2 == 0 {
            lab.server.expire();
        }
        lab.server.disconnect();
        let expected = round + 2;
        until("the next pod", || followed.pods().len() == expected).await;
    }
    assert!(followed.cluster.counts.gone.get() > 0, "no version expired");
    assert!(
        followed.cluster.counts.restarts.get() > 0,
        "no watch was cut"
    );
    for more in 0..20 {
        lab.put(pod(&format!("q{more}"), NODE, &format!("10.0.3.{more}")));
    }
    assert!(least.await.expect("it ends") >= 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_does_all_that_can_go_wrong_is_followed_to_the_end() {
    let lab = Lab::new();
    let followed = lab.follow().await;
    lab.server.chaos(7);
    for round in 0..30 {
        lab.put(pod(
            &format!("p{}", round % 10),
            NODE,
            &format!("10.0.2.{round}"),
        ));
        if round % 7 == 0 {
            lab.server.delete("Pod", "shop", "p3");
            lab.server.expire();
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    lab.server.calm();
    let expected = lab.server.list("Pod").len();
    until("the same pods", || followed.pods().len() == expected).await;
    for object in lab.server.list("Pod") {
        let address = object["status"]["podIP"].as_str().expect("an address");
        let address = address.parse().expect("an address");
        until("its last address", || {
            followed.table().pod(address).is_some()
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_that_is_away_leaves_the_last_state_standing() {
    let lab = Lab::new();
    lab.put(pod("a", NODE, "10.0.0.1"));
    lab.put(policy(
        "AuthorizationPolicy",
        "deny",
        json!({"action": "DENY", "rules": [{}]}),
    ));
    let followed = lab.follow().await;
    followed.synced().await;
    let mut saved = 0;
    followed.cluster.save(&mut saved).expect("it is saved");
    assert_eq!(saved, followed.cluster.store.lock().version);

    lab.server.away(true);
    until("it is stale", || {
        followed.cluster.standing().stale_since.is_some()
    })
    .await;
    assert_eq!(followed.pods(), ["a"]);
    assert!(!followed.cluster.standing().errors.is_empty());
    lab.put(pod("b", NODE, "10.0.0.2"));
    lab.server.away(false);
    until("it is not stale", || {
        followed.cluster.standing().stale_since.is_none()
    })
    .await;
    until("what was missed", || followed.pods() == ["a", "b"]).await;

    // An agent that starts while it is away has what was saved, and says how old it is.
    lab.server.away(true);
    let next = lab.follow().await;
    until("it fails", || !next.cluster.standing().errors.is_empty()).await;
    assert!(!next.cluster.standing().whole);
    assert!(next.cluster.load().expect("it is read"));
    let standing = next.cluster.standing();
    assert!(standing.whole && !standing.synced && standing.stale_since.is_some());
    assert_eq!(next.pods(), ["a"]);
    assert_eq!(compile(&next.cluster).len(), 1);
    lab.server.away(false);
    next.synced().await;
    until("it is not stale", || {
        next.cluster.standing().stale_since.is_none()
    })
    .await;
    assert_eq!(next.pods(), ["a", "b"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_that_is_of_another_node_or_broken_is_not_used() {
    use std::os::unix::fs::PermissionsExt as _;
    let mut lab = Lab::new();
    lab.put(pod("a", NODE, "10.0.0.1"));
    let followed = lab.follow().await;
    followed.synced().await;
    followed.cluster.save(&mut 0).expect("it is saved");
    let mode = std::fs::metadata(lab.file())
        .expect("it is there")
        .permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);
    lab.server.away(true);
    // Nothing is missing for one of another configuration, or nothing is used.
    lab.config.kubernetes.discovery = Discovery::All;
    assert!(!lab.connect().await.load().expect("it is read"));
    lab.config.node = "n2".into();
    assert!(lab.connect().await.load().is_err());
    let text = std::fs::read(lab.file()).expect("it is there");
    std::fs::write(lab.file(), &text[..text.len() / 2]).expect("it is cut");
    lab.config.node = NODE.into();
    assert!(lab.connect().await.load().is_err());
    std::fs::remove_file(lab.file()).expect("it is removed");
    assert!(!lab.connect().await.load().expect("no file is no error"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kind_that_is_not_installed_is_no_error_and_is_seen_when_it_comes() {
    let lab = Lab::with(Options {
        policies: Vec::new(),
        ..Options::default()
    });
    let followed = lab.follow().await;
    followed.synced().await;
    assert_eq!(followed.cluster.counts.errors.get(), 0);
    assert!(compile(&followed.cluster).is_empty());
    lab.server.install("security.istio.io");
    lab.put(policy(
        "AuthorizationPolicy",
        "deny",
        json!({"action": "DENY", "rules": [{}]}),
    ));
    until("its policy", || compile(&followed.cluster).len() == 1).await;
    // Not at once, for a server that starts may deny it; but in the end.
    lab.server.uninstall("security.istio.io");
    lab.server.disconnect();
    until("it is gone", || compile(&followed.cluster).is_empty()).await;
}

#[tokio::test]
async fn errors_name_the_key() {
    let lab = Lab::new();
    let path = lab.config.kubernetes.kubeconfig.clone().expect("it is set");
    let text = std::fs::read_to_string(&path).expect("it is there");
    let (lax, plain) = (
        text.replace(
            "certificate-authority-data",
            "insecure-skip-tls-verify: true, certificate-authority-data",
        ),
        text.replace("https://", "http://"),
    );
    for (text, expected) in [
        ("clusters: 1\n", "kubeconfig"),
        (lax.as_str(), "insecure-skip-tls-verify"),
        (plain.as_str(), "https"),
    ] {
        std::fs::write(&path, text).expect("it is written");
        let error = Cluster::connect(&lab.config)
            .await
            .err()
            .expect(text)
            .to_string();
        assert!(error.starts_with("kubernetes.kubeconfig: "), "{error}");
        assert!(error.contains(expected), "{error}");
    }
    let mut config = lab.config.clone();
    config.kubernetes.kubeconfig = None;
    let error = Cluster::connect(&config)
        .await
        .err()
        .expect("no pod")
        .to_string();
    assert!(error.contains("service account"), "{error}");
    config.workloads.source = Source::Directory;
    config.policies.source = Source::Directory;
    assert!(
        Cluster::connect(&config)
            .await
            .expect("nothing to do")
            .is_none()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn istios_policies_are_not_asked_for_where_they_are_not_wanted() {
    let mut lab = Lab::new();
    lab.config.kubernetes.istio = false;
    lab.put(policy("AuthorizationPolicy", "p", json!({"rules": [{}]})));
    lab.put(policy("ConnectPolicy", "c", json!({"rules": [{}]})));
    let followed = lab.follow().await;
    followed.synced().await;
    assert_eq!(followed.cluster.kept().get("connectpolicies"), Some(&1));
    assert_eq!(followed.cluster.kept().get("authorizationpolicies"), None);
    let asked = lab.server.requests();
    assert!(
        asked.iter().all(|r| r.group != "security.istio.io"),
        "{asked:?}"
    );
}
