//! The API server of the lab against clients that were not written with it: `kubectl`,
//! and `curl` for what goes over the wire.

mod wire;

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};
use postern_apiserver::{ApiServer, Claims, Options};
use postern_tests::{Running, eventually, output, text};
use serde_json::{Value, json};
use tempfile::TempDir;

struct World {
    server: ApiServer,
    dir: TempDir,
}

impl World {
    fn new(options: Options) -> Result<Self> {
        let dir = TempDir::new()?;
        std::fs::create_dir(dir.path().join("manifests"))?;
        let server = ApiServer::with(options)?;
        std::fs::write(dir.path().join("kubeconfig"), server.kubeconfig())?;
        std::fs::write(dir.path().join("ca.pem"), server.ca_pem())?;
        Ok(Self { server, dir })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn kubectl(&self, arguments: &[&str]) -> Command {
        let mut kubectl = Command::new(kubectl());
        // Its cache of what is served is the test's own.
        kubectl.env("HOME", self.dir.path()).arg("--kubeconfig");
        kubectl.arg(self.path("kubeconfig")).args(arguments);
        kubectl
    }

    fn says(&self, arguments: &[&str]) -> Result<String> {
        Ok(text(&output(&mut self.kubectl(arguments))?.stdout))
    }

    fn file(&self, name: &str, content: &str) -> Result<String> {
        std::fs::write(self.path(name), content)?;
        Ok(self.path(name).display().to_string())
    }

    fn curl(&self, path: &str, arguments: &[&str]) -> Command {
        self.curl_as(self.server.token(), path, arguments)
    }

    fn curl_as(&self, token: &str, path: &str, arguments: &[&str]) -> Command {
        let mut curl = Command::new("curl");
        curl.args(["-sS", "-N", "-m", "20", "--noproxy", "*", "--cacert"])
            .arg(self.path("ca.pem"))
            .args(["-H", &format!("Authorization: Bearer {token}")])
            .args(arguments)
            .arg(format!("{}{path}", self.server.url()));
        curl
    }

    /// The answer's code and object.
    fn asks(&self, path: &str) -> Result<(u64, Value)> {
        answered(&mut self.curl(path, &[]))
    }

    fn revision(&self) -> Result<String> {
        let (_, list) = self.asks("/api/v1/pods?limit=1")?;
        let revision = list["metadata"]["resourceVersion"].as_str();
        Ok(revision.context("a list has a version")?.to_owned())
    }

    /// A watch that has begun, until it ends.
    fn watch(&self, name: &str, path: &str) -> Result<Watch> {
        let before = self.server.requests().len();
        let log = self.path(name);
        let running = Running::start(&mut self.curl(path, &[]), log)?;
        eventually("it has begun", Duration::from_secs(10), || {
            self.server.requests().len() > before
        })?;
        Ok(Watch(running))
    }
}

struct Watch(Running);

impl Watch {
    /// `TYPE name` of what came whole.
    fn events(&self) -> Vec<String> {
        let output = self.0.output();
        let lines = output
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let one = |event: Value| {
            let name = event["object"]["metadata"]["name"].as_str().unwrap_or("-");
            format!("{} {name}", event["type"].as_str().unwrap_or("-"))
        };
        lines.map(one).collect()
    }

    fn becomes(&self, wanted: &[&str]) -> Result<()> {
        eventually(&format!("{wanted:?}"), Duration::from_secs(10), || {
            self.events() == wanted
        })
        .with_context(|| format!("{:?}", self.events()))
    }
}

/// The one that the manifests are checked with.
fn kubectl() -> PathBuf {
    let tools = std::env::var_os("POSTERN_TOOLS").unwrap_or_default();
    let ours = Path::new(&tools).join("kubernetes/programs/kubectl/kubectl");
    match ours.is_file() {
        true => ours,
        false => "kubectl".into(),
    }
}

fn answered(curl: &mut Command) -> Result<(u64, Value)> {
    let out = text(&output(curl.args(["-w", "\n%{http_code}"]))?.stdout);
    let (body, code) = out.rsplit_once('\n').context("a code")?;
    let first = body.lines().next().unwrap_or_default();
    Ok((
        code.parse()?,
        serde_json::from_str(first).unwrap_or_default(),
    ))
}

fn pod(name: &str, node: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "shop", "labels": {"app": name}},
        "spec": {"nodeName": node}, "status": {"phase": "Running"},
    })
}

fn service_account(name: &str) -> Claims {
    Claims {
        namespace: "shop".into(),
        service_account: name.into(),
        ..Claims::default()
    }
}

#[test]
fn kubectl_reads_writes_and_watches() -> Result<()> {
    let world = World::new(Options::default())?;
    world.server.apply(pod("a", "node1"))?;
    assert!(world.says(&["get", "ns"])?.contains("shop"));
    assert!(world.says(&["api-resources"])?.contains("endpointslices"));
    let watch = Running::start(
        &mut world.kubectl(&["get", "pods", "-n", "shop", "-w", "-o", "name"]),
        world.path("watch"),
    )?;
    watch.says("pod/a")?;
    let map = |value: &str| {
        format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: c}}\ndata: {{a: {value}}}\n")
    };
    let file = world.file("c.yaml", &map("one"))?;
    assert!(world.says(&["apply", "-f", &file])?.contains("created"));
    assert!(world.says(&["apply", "-f", &file])?.contains("unchanged"));
    world.file("c.yaml", &map("two"))?;
    assert!(world.says(&["apply", "-f", &file])?.contains("configured"));
    let value = ["get", "cm", "c", "-o", "jsonpath={.data.a}"];
    assert_eq!(world.says(&value)?, "two");
    world.file("c.yaml", &map("three"))?;
    let other = [
        "apply",
        "--server-side",
        "--field-manager",
        "other",
        "-f",
        &file,
    ];
    let refused = world.kubectl(&other).output()?;
    assert!(text(&refused.stderr).contains("conflict with \"kubectl-client-side-apply\""));
    world.says(&[&other[..], &["--force-conflicts"]].concat())?;
    assert_eq!(world.says(&value)?, "three");
    world.says(&["label", "cm", "c", "x=y"])?;
    world.says(&[
        "patch",
        "cm",
        "c",
        "--type",
        "json",
        "-p",
        r#"[{"op":"remove","path":"/data/a"}]"#,
    ])?;
    assert_eq!(world.says(&value)?, "");
    assert!(world.says(&["delete", "-f", &file])?.contains("deleted"));
    assert!(world.says(&["get", "cm"])?.is_empty());
    world.says(&["run", "b", "--image", "none", "-n", "shop"])?;
    watch.says("pod/b")?;
    world.says(&["delete", "pod", "b", "-n", "shop"])?;
    Ok(())
}

#[test]
fn events_of_both_groups_are_the_same_events() -> Result<()> {
    let world = World::new(Options::default())?;
    world.server.apply(pod("a", "node1"))?;
    let event = json!({
        "apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": {"generateName": "a."},
        "eventTime": "2026-01-02T03:04:05.000000Z", "type": "Warning", "reason": "NotEnrolled",
        "action": "Enrol", "note": "the map is full", "reportingController": "postern.dev/agent",
        "reportingInstance": "node1", "regarding": {"kind": "Pod", "namespace": "shop", "name": "a"},
    });
    let body = event.to_string();
    let post = [
        "-X",
        "POST",
        "-H",
        "content-type: application/json",
        "-d",
        &body,
    ];
    let (code, made) =
        answered(&mut world.curl("/apis/events.k8s.io/v1/namespaces/shop/events", &post))?;
    assert_eq!((code, &made["note"]), (201, &json!("the map is full")));
    let seen = world.says(&[
        "get",
        "events",
        "-n",
        "shop",
        "-o",
        "jsonpath={.items[0].message}",
    ])?;
    assert_eq!(seen, "the map is full");
    let nowhere =
        answered(&mut world.curl("/apis/events.k8s.io/v1/namespaces/none/events", &post))?;
    assert_eq!(nowhere.0, 404, "{}", nowhere.1);
    Ok(())
}

#[test]
fn a_status_is_another_thing_than_a_spec() -> Result<()> {
    let world = World::new(Options::default())?;
    let policy = |spec: Value| {
        json!({
            "apiVersion": "postern.dev/v1alpha1", "kind": "ConnectPolicy",
            "metadata": {"name": "p", "namespace": "shop"}, "spec": spec,
        })
    };
    world.server.apply(policy(json!({"a": 1})))?;
    let path = "/apis/postern.dev/v1alpha1/namespaces/shop/connectpolicies/p";
    let apply = |manager: &str, condition: &str| {
        let mut wanted = policy(json!({"a": 9}));
        wanted["status"] = json!({"conditions": [{"type": condition, "status": "True"}]});
        let body = wanted.to_string();
        let patch = [
            "-X",
            "PATCH",
            "-H",
            "content-type: application/apply-patch+yaml",
            "-d",
            &body,
        ];
        answered(&mut world.curl(&format!("{path}/status?fieldManager={manager}"), &patch))
    };
    assert_eq!(apply("one", "Accepted")?.0, 200);
    let (code, object) = apply("two", "Enforced")?;
    assert_eq!(code, 200, "{object}");
    assert_eq!(
        object["status"]["conditions"].as_array().map(Vec::len),
        Some(2)
    );
    assert_eq!(
        (&object["spec"]["a"], &object["metadata"]["generation"]),
        (&json!(1), &json!(1))
    );
    let merge = [
        "-X",
        "PATCH",
        "-H",
        "content-type: application/merge-patch+json",
        "-d",
        r#"{"spec":{"a":2},"status":null}"#,
    ];
    let (_, object) = answered(&mut world.curl(path, &merge))?;
    assert_eq!(object["metadata"]["generation"], 2);
    assert_eq!(
        object["status"]["conditions"].as_array().map(Vec::len),
        Some(2)
    );
    // A version that is no longer is in the way of a write.
    let stale = r#"{"metadata":{"resourceVersion":"1"},"spec":{"a":3}}"#;
    let merge = [
        "-X",
        "PATCH",
        "-H",
        "content-type: application/merge-patch+json",
        "-d",
        stale,
    ];
    assert_eq!(answered(&mut world.curl(path, &merge))?.0, 409);
    world.server.uninstall("postern.dev");
    assert_eq!(world.asks(path)?.0, 404);
    Ok(())
}

#[test]
fn a_directory_is_followed() -> Result<()> {
    let world = World::new(Options {
        endpoints: true,
        ..Options::default()
    })?;
    let manifests = world.path("manifests");
    let write = |name: &str, objects: &[Value]| -> Result<()> {
        let text: Vec<String> = objects.iter().map(Value::to_string).collect();
        let partial = manifests.join(format!("{name}.partial"));
        std::fs::write(&partial, text.join("\n---\n"))?;
        Ok(std::fs::rename(
            partial,
            manifests.join(format!("{name}.yaml")),
        )?)
    };
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"selector": {"app": "a"}, "ports": [{"port": 80}]},
    });
    let mut a = pod("a", "node1");
    a["status"]["podIPs"] = json!([{"ip": "10.0.0.1"}]);
    write("one", &[a, service])?;
    world.server.follow(&manifests)?;
    let slices = world.server.list("EndpointSlice");
    assert_eq!(
        slices[0]["endpoints"][0]["addresses"],
        json!(["10.0.0.1"]),
        "{slices:?}"
    );
    let uid = world
        .server
        .get("Pod", "shop", "a")
        .context("it is there")?["metadata"]["uid"]
        .clone();
    // A broken file changes nothing, an object of no kind is passed over alone.
    std::fs::write(manifests.join("one.yaml"), "a: [")?;
    write(
        "two",
        &[
            json!({"apiVersion": "v1", "kind": "Bod", "metadata": {"name": "x"}}),
            pod("b", "node1"),
        ],
    )?;
    eventually("b is there", Duration::from_secs(5), || {
        world.server.get("Pod", "shop", "b").is_some()
    })?;
    let still = world.server.get("Pod", "shop", "a").context("it stays")?;
    assert_eq!(still["metadata"]["uid"], uid);
    std::fs::remove_file(manifests.join("one.yaml"))?;
    eventually("a is gone", Duration::from_secs(5), || {
        world.server.get("Pod", "shop", "a").is_none()
    })?;
    assert!(world.server.list("EndpointSlice").is_empty());
    Ok(())
}

#[test]
fn who_may_do_what_is_by_roles() -> Result<()> {
    let world = World::new(Options {
        rbac: true,
        ..Options::default()
    })?;
    let file = world.file(
        "rbac.yaml",
        "\
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: reader}
rules: [{apiGroups: [''], resources: [pods], verbs: [list, watch]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: reader}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: reader}
subjects: [{kind: ServiceAccount, namespace: shop, name: agent}]
",
    )?;
    world.says(&["apply", "-f", &file])?;
    world.server.apply(pod("a", "node1"))?;
    let token = world.server.mint(service_account("agent"));
    let asks = |token: &str, path: &str| answered(&mut world.curl_as(token, path, &[]));
    assert_eq!(asks(&token, "/api/v1/pods")?.0, 200);
    let (code, status) = asks(&token, "/api/v1/namespaces/shop/pods/a")?;
    assert_eq!(code, 403);
    let message = status["message"].as_str().unwrap_or_default();
    assert!(
        message.contains("system:serviceaccount:shop:agent\" cannot get resource \"pods\""),
        "{message}"
    );
    assert_eq!(
        asks(&world.server.mint(service_account("other")), "/api/v1/pods")?.0,
        403
    );
    assert_eq!(asks("none", "/api/v1/pods")?.0, 401);
    world.server.revoke(&token);
    assert_eq!(asks(&token, "/api/v1/pods")?.0, 401);
    let requests = world.server.requests();
    let agent = requests.iter().filter(|r| r.user.ends_with(":agent"));
    let asked: Vec<_> = agent
        .map(|r| (r.verb.as_str(), r.resource.as_str()))
        .collect();
    assert_eq!(asked, [("list", "pods"), ("get", "pods")]);
    Ok(())
}

#[test]
fn a_token_is_reviewed_with_the_node_that_it_is_bound_to() -> Result<()> {
    let world = World::new(Options::default())?;
    world
        .server
        .apply(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node1"}}))?;
    world.server.apply(pod("agent-1", "node1"))?;
    let post = |path: &str, body: &Value| {
        let body = body.to_string();
        let post = [
            "-X",
            "POST",
            "-H",
            "content-type: application/json",
            "-d",
            &body,
        ];
        answered(&mut world.curl(path, &post))
    };
    let (_, request) = post(
        "/api/v1/namespaces/shop/serviceaccounts/agent/token",
        &json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
            "spec": {"audiences": ["postern"], "boundObjectRef": {"kind": "Pod", "name": "agent-1"}},
        }),
    )?;
    let review = |audience: &str| {
        post(
            "/apis/authentication.k8s.io/v1/tokenreviews",
            &json!({
                "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
                "spec": {"token": request["status"]["token"], "audiences": [audience]},
            }),
        )
    };
    let status = review("postern")?.1["status"].clone();
    assert_eq!(
        status["user"]["username"], "system:serviceaccount:shop:agent",
        "{status}"
    );
    assert_eq!(
        status["user"]["extra"]["authentication.kubernetes.io/node-name"],
        json!(["node1"])
    );
    assert_eq!(review("other")?.1["status"]["authenticated"], false);
    world.server.delete("Pod", "shop", "agent-1");
    assert_eq!(review("postern")?.1["status"]["authenticated"], false);
    Ok(())
}
