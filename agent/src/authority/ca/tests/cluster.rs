//! Against an API server that is asked itself.

use std::time::Instant;

use postern_apiserver::{ApiServer, Claims, Options};

use super::*;
use crate::authority::config::ClusterNodes;

const AUDIENCE: &str = "https://authority.example";

struct Asked {
    api: ApiServer,
    authority: Authority,
}

fn pod(namespace: &str, name: &str, account: &str, node: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"nodeName": node, "serviceAccountName": account, "containers": []},
        "status": {"phase": "Running"},
    })
}

async fn cluster() -> Asked {
    let api = ApiServer::start(Options::default()).await.expect("starts");
    let agents = [("agent-a", "node1"), ("agent-b", "node2")];
    for (name, node) in agents {
        api.apply(pod("postern", name, "agent", node))
            .expect("taken");
    }
    api.apply(pod("shop", "cart-1", "cart", "node1"))
        .expect("taken");
    let mut ended = pod("shop", "job", "job", "node1");
    ended["status"]["phase"] = "Succeeded".into();
    api.apply(ended).expect("taken");
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": "roots", "namespace": "postern"}});
    api.apply(map).expect("taken");
    let kubeconfig = api.kubeconfig();
    let authority = Authority::with(|config, dir| {
        let file = dir.join("kubeconfig");
        std::fs::write(&file, kubeconfig).expect("written");
        config.nodes.manifests = None;
        config.nodes.cluster = Some(ClusterNodes {
            kubeconfig: Some(file),
            namespace: "postern".into(),
            service_account: "agent".into(),
            audience: None,
            roots_config_map: Some("roots".into()),
        });
    })
    .await;
    Asked { api, authority }
}

impl Asked {
    /// As a kubelet has it projected into the agent's pod.
    fn claims(&self, pod: &str, node: Option<&str>) -> Claims {
        let object = self.api.get("Pod", "postern", pod).expect("a pod");
        let uid = object["metadata"]["uid"]
            .as_str()
            .expect("a uid")
            .to_owned();
        Claims {
            namespace: "postern".into(),
            service_account: "agent".into(),
            pod: Some((pod.into(), uid)),
            node: node.map(|name| (name.into(), "n".into())),
            audiences: vec![AUDIENCE.into()],
            lifetime: None,
        }
    }

    async fn status(&self, node: &str, claims: Claims) -> u16 {
        let token = self.api.mint(claims);
        self.authority.join(node, &token, &csr().1).await.status
    }
}

#[tokio::test]
async fn the_cluster_says_whose_a_token_is_and_of_which_node() {
    let asked = cluster().await;
    let good = asked.claims("agent-a", Some("node1"));
    assert_eq!(asked.status("node1", good.clone()).await, 200);
    assert_eq!(asked.status("node2", good.clone()).await, 401);
    // An older cluster's token does not name the node; its pod is looked at.
    let old = asked.claims("agent-b", None);
    assert_eq!(asked.status("node2", old.clone()).await, 200);
    assert_eq!(asked.status("node1", old).await, 401);
    let other = |change: fn(&mut Claims)| {
        let mut claims = good.clone();
        change(&mut claims);
        claims
    };
    for (claims, why) in [
        (
            other(|c| c.audiences = vec!["https://other".into()]),
            "refuses the token",
        ),
        (other(|c| c.audiences = vec![]), "refuses the token"),
        (
            other(|c| c.service_account = "cart".into()),
            "another service account",
        ),
        (other(|c| c.pod = None), "not bound to a pod"),
        (
            other(|c| c.lifetime = Some(Duration::ZERO)),
            "refuses the token",
        ),
    ] {
        assert_eq!(asked.status("node1", claims).await, 401, "{why}");
    }
    // A pod that was deleted takes its token with it.
    let token = asked.api.mint(good);
    assert!(asked.api.delete("Pod", "postern", "agent-a"));
    assert_eq!(
        asked.authority.join("node1", &token, &csr().1).await.status,
        401
    );
    let refused = asked
        .authority
        .join("node1", "no.such.token", &csr().1)
        .await;
    assert_eq!(refused.status, 401);
    assert!(!refused.said.to_string().contains("no.such.token"));
    let records = asked.authority.audit();
    let reasons: Vec<_> = records
        .iter()
        .map(|r| r["reason"].as_str().unwrap_or(""))
        .collect();
    for (at, why) in [
        (1, "on node node1"),
        (3, "on node node2"),
        (6, "another service"),
        (7, "not bound"),
    ] {
        assert!(reasons[at].contains(why), "{at}: {reasons:?}");
    }
    assert!(!format!("{records:?}").contains("no.such.token"));
}

#[tokio::test]
async fn only_what_runs_on_the_agents_node_is_signed_for() {
    let asked = cluster().await;
    let agent = |node: &'static str| asked.authority.agent(node);
    let (one, two) = (agent("node1").await, agent("node2").await);
    let certificate = async |agent: &Agent, account: &str| {
        let id = format!("spiffe://cluster.local/ns/shop/sa/{account}");
        asked
            .authority
            .certificate(agent, &id, &csr().1)
            .await
            .status
    };
    assert_eq!(certificate(&one, "cart").await, 200);
    assert_eq!(certificate(&two, "cart").await, 403);
    // It has ended, and needs none.
    assert_eq!(certificate(&one, "job").await, 403);
    let foreign = "spiffe://other.org/ns/shop/sa/cart";
    assert_eq!(
        asked
            .authority
            .certificate(&one, foreign, &csr().1)
            .await
            .status,
        403
    );
    // What is known holds for a moment: the API server is not asked for each.
    let lists = || {
        asked
            .api
            .requests()
            .iter()
            .filter(|r| r.verb == "list")
            .count()
    };
    let before = lists();
    for _ in 0..5 {
        assert_eq!(certificate(&one, "cart").await, 200);
    }
    assert_eq!(lists(), before);
    // A pod that has come since is found, soon.
    asked
        .api
        .apply(pod("shop", "pay-1", "pay", "node2"))
        .expect("taken");
    let end = Instant::now() + Duration::from_secs(10);
    while certificate(&two, "pay").await != 200 {
        assert!(Instant::now() < end, "it is not found");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn a_cluster_that_does_not_answer_is_no_permission() {
    let asked = cluster().await;
    let agent = asked.authority.agent("node2").await;
    let token = asked.api.mint(asked.claims("agent-a", Some("node1")));
    asked.api.away(true);
    let refused = asked.authority.join("node1", &token, &csr().1).await;
    assert_eq!(refused.status, 503, "{:?}", refused.said);
    assert!(!refused.said.to_string().contains("127.0.0.1"));
    let refused = asked.authority.certificate(&agent, CART, &csr().1).await;
    assert_eq!(refused.status, 503);
    asked.api.away(false);
    let end = Instant::now() + Duration::from_secs(10);
    while asked.authority.join("node1", &token, &csr().1).await.status != 200 {
        assert!(Instant::now() < end, "it is back");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn the_roots_are_written_where_agents_look_for_them() {
    let asked = cluster().await;
    let watching = tokio::spawn(super::super::watch(asked.authority.server.clone()));
    let pem = crate::identity::pem(&[asked.authority.server.root.certificate().clone()]);
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let map = asked
            .api
            .get("ConfigMap", "postern", "roots")
            .expect("a map");
        if map["data"]["roots.pem"] == pem {
            break;
        }
        assert!(Instant::now() < end, "{map}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    watching.abort();
}

#[tokio::test]
async fn a_mix_of_sources_is_refused_with_their_names() {
    let dir = tempfile::tempdir().expect("directory");
    for (more, expected) in [
        ("manifests: /nowhere", "nodes.manifests"),
        (
            "kubernetes: {issuer: a, namespace: b, serviceAccount: c}",
            "nodes.kubernetes",
        ),
    ] {
        let text = format!("nodes: {{cluster: {{namespace: a, serviceAccount: b}}, {more}}}");
        let config: Config = crate::objects::parse_document(dir.path(), &text).expect("parses");
        let error = super::super::cluster::Cluster::open(&config).await.err();
        let error = error.expect("refused").to_string();
        assert!(error.contains(expected), "{error}");
    }
}
