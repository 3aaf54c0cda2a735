//! The authority with an API server that permits what the manifests say, and no more.

use postern_apiserver::{ApiServer, Claims, Options};

use super::*;
use crate::authority::config::ClusterNodes;

const MANIFESTS: &str =
    include_str!("../../../../../config/kubernetes/kustomize/base/postern.yaml");
const AUDIENCE: &str = "https://authority.example";

/// Roles and bindings as they are installed, two pods, and the ConfigMap.
fn api_server() -> ApiServer {
    let server = ApiServer::with(Options {
        rbac: true,
        ..Options::default()
    });
    let server = server.expect("an API server");
    let objects: Vec<Value> = serde_saphyr::from_multiple(MANIFESTS).expect("YAML");
    for object in objects {
        let kind = object["kind"].as_str().unwrap_or_default();
        if kind.contains("Role") || object["metadata"]["name"] == "postern-roots" {
            server.apply(object).expect("applied");
        }
    }
    server.apply(pod("cart", "shop", "node1")).expect("applied");
    server
        .apply(pod("agent-1", "postern-system", "node1"))
        .expect("applied");
    server
}

fn pod(account: &str, namespace: &str, node: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": account, "namespace": namespace, "uid": format!("{account}-uid")},
        "spec": {"nodeName": node, "serviceAccountName": account, "containers": []},
        "status": {"phase": "Running"},
    })
}

async fn authority(server: &ApiServer) -> Authority {
    let own = server.mint(Claims {
        namespace: "postern-system".into(),
        service_account: "postern-authority".into(),
        ..Claims::default()
    });
    let kubeconfig = server.kubeconfig_of(&own);
    Authority::with(|config, dir| {
        let file = dir.join("kubeconfig");
        std::fs::write(&file, kubeconfig).expect("written");
        config.nodes.manifests = None;
        config.nodes.cluster = Some(ClusterNodes {
            kubeconfig: Some(file),
            namespace: "postern-system".into(),
            service_account: "postern-agent".into(),
            audience: None,
            roots_config_map: Some("postern-roots".into()),
        });
    })
    .await
}

fn agent_token(server: &ApiServer, change: impl FnOnce(&mut Claims)) -> String {
    let mut claims = Claims {
        namespace: "postern-system".into(),
        service_account: "postern-agent".into(),
        pod: Some(("agent-1".into(), "agent-1-uid".into())),
        node: Some(("node1".into(), "node1-uid".into())),
        audiences: vec![AUDIENCE.into()],
        lifetime: None,
    };
    change(&mut claims);
    server.mint(claims)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_joins_by_its_token_and_gets_what_runs_on_its_node() {
    let server = api_server();
    let authority = authority(&server).await;
    let token = agent_token(&server, |_| {});
    let (key, csr_pem) = csr();
    let joined = authority.join("node1", &token, &csr_pem).await;
    assert_eq!(joined.status, 200, "{:?}", joined.said);
    let agent = Agent {
        key,
        chain: joined.chain(),
    };
    let signed = authority.certificate(&agent, CART, &csr().1).await;
    assert_eq!(signed.status, 200, "{:?}", signed.said);
    let other = "spiffe://cluster.local/ns/shop/sa/other";
    let refused = authority.certificate(&agent, other, &csr().1).await;
    assert_eq!(refused.status, 403, "{:?}", refused.said);
    // On another node, or over.
    server
        .apply(pod("other", "shop", "node2"))
        .expect("applied");
    let mut over = pod("over", "shop", "node1");
    over["status"]["phase"] = "Succeeded".into();
    server.apply(over).expect("applied");
    tokio::time::sleep(Duration::from_millis(1100)).await;
    for account in ["other", "over"] {
        let id = format!("spiffe://cluster.local/ns/shop/sa/{account}");
        let refused = authority.certificate(&agent, &id, &csr().1).await;
        assert_eq!(refused.status, 403, "{account}: {:?}", refused.said);
    }
    let records = authority.audit();
    assert_eq!(records[0]["authentication"], "kubernetes");
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_that_are_not_of_an_agent_of_that_node_are_refused() {
    let server = api_server();
    let authority = authority(&server).await;
    let wrong: [(&str, &str, String); 6] = [
        ("node", "node2", agent_token(&server, |_| {})),
        (
            "audience",
            "node1",
            agent_token(&server, |c| c.audiences = vec!["https://other".into()]),
        ),
        (
            "account",
            "node1",
            agent_token(&server, |c| c.service_account = "default".into()),
        ),
        (
            "namespace",
            "node1",
            agent_token(&server, |c| c.namespace = "shop".into()),
        ),
        (
            "unbound",
            "node1",
            agent_token(&server, |c| (c.pod, c.node) = (None, None)),
        ),
        ("made up", "node1", "e30.e30.e30".into()),
    ];
    for (what, node, token) in &wrong {
        let refused = authority.join(node, token, &csr().1).await;
        assert_eq!(refused.status, 401, "{what}: {:?}", refused.said);
    }
    let good = agent_token(&server, |_| {});
    server.revoke(&good);
    assert_eq!(authority.join("node1", &good, &csr().1).await.status, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_api_server_nobody_joins() {
    let server = api_server();
    let authority = authority(&server).await;
    let token = agent_token(&server, |_| {});
    server.away(true);
    let answer = authority.join("node1", &token, &csr().1).await;
    assert_eq!(answer.status, 500, "{:?}", answer.said);
    server.away(false);
    let mut status = 0;
    for _ in 0..50 {
        status = authority.join("node1", &token, &csr().1).await.status;
        if status == 200 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_roots_are_told_to_the_cluster() {
    let server = api_server();
    let authority = authority(&server).await;
    let telling = tokio::spawn(super::super::watch(authority.server.clone()));
    let told = || {
        let map = server.get("ConfigMap", "postern-system", "postern-roots")?;
        map["data"]["roots.pem"].as_str().map(str::to_owned)
    };
    let mut text = None;
    for _ in 0..100 {
        text = told();
        if text.is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    telling.abort();
    let own = crate::identity::pem(&[authority.server.root.certificate().clone()]);
    assert_eq!(text, Some(own));
    // It may write nothing else.
    let asked = server.requests();
    let writes: Vec<_> = asked.iter().filter(|r| r.verb == "patch").collect();
    assert!(
        writes.iter().all(|r| r.resource == "configmaps"),
        "{writes:?}"
    );
}
