//! The API server of the lab against clients that were not written with it: `kubectl`,
//! and `curl` for what goes over the wire.

use std::{path::PathBuf, process::Command, time::Duration};

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
fn lists_come_in_pages_of_one_moment() -> Result<()> {
    let world = World::new(Options::default())?;
    for number in 0..5 {
        world.server.apply(pod(&format!("p{number}"), "node1"))?;
    }
    let (_, first) = world.asks("/api/v1/pods?limit=2")?;
    world.server.delete("Pod", "shop", "p3");
    world.server.apply(pod("p9", "node1"))?;
    let token = first["metadata"]["continue"]
        .as_str()
        .context("there is more")?;
    let token = token
        .replace('=', "%3D")
        .replace('+', "%2B")
        .replace('/', "%2F");
    let (_, rest) = world.asks(&format!("/api/v1/pods?continue={token}"))?;
    let names = |list: &Value| -> Vec<String> {
        let items = list["items"].as_array().into_iter().flatten();
        items
            .filter_map(|i| i["metadata"]["name"].as_str().map(str::to_owned))
            .collect()
    };
    assert_eq!(
        (names(&first), names(&rest)),
        (
            vec!["p0".into(), "p1".into()],
            vec!["p2".into(), "p3".into(), "p4".into()],
        )
    );
    assert_eq!(
        first["metadata"]["resourceVersion"],
        rest["metadata"]["resourceVersion"]
    );
    let exact = first["metadata"]["resourceVersion"]
        .as_str()
        .unwrap_or_default();
    let path = format!("/api/v1/pods?resourceVersion={exact}&resourceVersionMatch=Exact");
    assert_eq!(names(&world.asks(&path)?.1).len(), 5);
    world.server.expire();
    for path in [path, format!("/api/v1/pods?continue={token}")] {
        let (code, status) = world.asks(&path)?;
        assert_eq!(
            (code, &status["reason"]),
            (410, &json!("Expired")),
            "{path}"
        );
    }
    assert_eq!(
        names(&world.asks("/api/v1/pods?resourceVersion=0")?.1).len(),
        5
    );
    let (code, _) = world.asks("/api/v1/pods?resourceVersion=999999999")?;
    assert_eq!(code, 504, "from the future");
    Ok(())
}

#[test]
fn a_watch_tells_what_comes_into_sight_and_leaves_it() -> Result<()> {
    let world = World::new(Options::default())?;
    world.server.apply(pod("a", "node1"))?;
    let since = world.revision()?;
    let watch = world.watch(
        "watch",
        &format!("/api/v1/namespaces/shop/pods?watch=true&fieldSelector=spec.nodeName%3Dnode1&resourceVersion={since}"),
    )?;
    world.server.apply(pod("b", "node2"))?;
    world.server.apply(pod("b", "node1"))?;
    world.server.apply(pod("a", "node2"))?;
    let mut b = pod("b", "node1");
    b["status"]["phase"] = json!("Failed");
    world.server.apply(b)?;
    world.server.delete("Pod", "shop", "b");
    watch.becomes(&["ADDED b", "DELETED a", "MODIFIED b", "DELETED b"])?;
    // From no version: what is there, then what changes.
    let watch = world.watch(
        "all",
        "/api/v1/pods?watch=true&timeoutSeconds=1&allowWatchBookmarks=true",
    )?;
    watch.becomes(&["ADDED a", "BOOKMARK -"])
}

#[test]
fn what_is_there_may_come_first() -> Result<()> {
    let path = "/api/v1/pods?watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true&timeoutSeconds=1";
    let world = World::new(Options::default())?;
    world.server.apply(pod("a", "node1"))?;
    let watch = world.watch("watch", path)?;
    watch.becomes(&["ADDED a", "BOOKMARK -", "BOOKMARK -"])?;
    assert_eq!(
        watch
            .0
            .output()
            .matches("k8s.io/initial-events-end")
            .count(),
        1
    );
    let old = World::new(Options {
        watch_list: false,
        ..Options::default()
    })?;
    let (code, status) = old.asks(path)?;
    assert_eq!((code, &status["reason"]), (422, &json!("Invalid")));
    Ok(())
}

#[test]
fn a_forgotten_past_is_told_in_both_ways() -> Result<()> {
    let world = World::new(Options::default())?;
    world.server.apply(pod("a", "node1"))?;
    let since = world.revision()?;
    let path = format!("/api/v1/pods?watch=true&resourceVersion={since}");
    let there = world.watch("there", &path)?;
    world.server.expire();
    let answers = [world.asks(&path)?, world.asks(&path)?];
    let by_code = answers
        .iter()
        .filter(|(code, status)| *code == 410 && status["reason"] == "Expired");
    let by_event = answers.iter().filter(|(code, event)| {
        *code == 200 && event["type"] == "ERROR" && event["object"]["code"] == 410
    });
    assert_eq!((by_code.count(), by_event.count()), (1, 1), "{answers:?}");
    // Who is up to date goes on.
    world.server.apply(pod("b", "node1"))?;
    there.becomes(&["ADDED b"])
}

#[test]
fn what_is_cut_off_is_cut_within_an_event() -> Result<()> {
    let world = World::new(Options::default())?;
    world.server.apply(pod("a", "node1"))?;
    let mut watch = world.watch("watch", "/api/v1/pods?watch=true")?;
    watch.becomes(&["ADDED a"])?;
    world.server.disconnect();
    let ended = watch.0.child.wait()?;
    assert!(!ended.success(), "it is no clean end");
    let output = watch.0.output();
    // What curl itself says of it stands in the same line.
    let cut = "\n{\"type\":\"MODIFIED\",\"objcurl: ";
    assert!(output.contains(cut), "{output}");
    let mut away = world.watch("away", "/api/v1/pods?watch=true")?;
    away.becomes(&["ADDED a"])?;
    world.server.away(true);
    assert!(!away.0.child.wait()?.success());
    eventually("nothing listens", Duration::from_secs(5), || {
        world
            .curl("/version", &[])
            .output()
            .is_ok_and(|o| o.status.code() == Some(7))
    })?;
    world.server.away(false);
    eventually("it is back", Duration::from_secs(5), || {
        world.asks("/version").is_ok_and(|(code, _)| code == 200)
    })
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

/// A client of few words: it lists, watches from there, and begins anew when told to.
fn follows(world: &World) -> Result<Vec<String>> {
    let script = "import json,subprocess,sys\n\
        url,token,ca=sys.argv[1:]\n\
        def ask(path):\n\
        \x20return subprocess.Popen(['curl','-sN','-m','20','--cacert',ca,'-H','Authorization: Bearer '+token,url+path],stdout=subprocess.PIPE,text=True)\n\
        objects,version={},None\n\
        while 'last' not in objects:\n\
        \x20if version is None:\n\
        \x20\x20try: page=json.loads(ask('/api/v1/pods').stdout.read())\n\
        \x20\x20except ValueError: continue\n\
        \x20\x20if page.get('kind')!='PodList': continue\n\
        \x20\x20objects={i['metadata']['name']:i['spec']['n'] for i in page['items']}\n\
        \x20\x20version=page['metadata']['resourceVersion']\n\
        \x20for line in ask('/api/v1/pods?watch=1&allowWatchBookmarks=true&resourceVersion='+version).stdout:\n\
        \x20\x20try: event=json.loads(line)\n\
        \x20\x20except ValueError: break\n\
        \x20\x20if event.get('code')==410 or event.get('type')=='ERROR': version=None; break\n\
        \x20\x20if 'type' not in event: break\n\
        \x20\x20o=event['object']; version=o['metadata']['resourceVersion']\n\
        \x20\x20if event['type']=='DELETED': objects.pop(o['metadata']['name'],None)\n\
        \x20\x20elif event['type']!='BOOKMARK': objects[o['metadata']['name']]=o['spec']['n']\n\
        \x20\x20if 'last' in objects: break\n\
        print(*sorted(f'{k}={v}' for k,v in objects.items()))\n";
    let mut python = Command::new("/usr/bin/python3");
    python.args(["-c", script, &world.server.url(), world.server.token()]);
    python.arg(world.path("ca.pem"));
    let out = text(&output(&mut python)?.stdout);
    Ok(out.split_whitespace().map(str::to_owned).collect())
}

#[test]
fn who_does_it_right_gets_through_chaos() -> Result<()> {
    let world = World::new(Options::default())?;
    world.server.chaos(6);
    let numbered = |name: &str, n: usize| {
        let mut pod = pod(name, "node1");
        pod["spec"]["n"] = json!(n);
        pod
    };
    std::thread::scope(|scope| -> Result<()> {
        let client = scope.spawn(|| follows(&world));
        for n in 0..40 {
            world.server.apply(numbered(&format!("p{}", n % 7), n))?;
            if n % 5 == 0 {
                world.server.delete("Pod", "shop", &format!("p{}", n % 3));
            }
            if n % 13 == 12 {
                world.server.expire();
                world.server.disconnect();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        world.server.apply(numbered("last", 99))?;
        let there: Vec<String> = world
            .server
            .list("Pod")
            .iter()
            .map(|pod| {
                format!(
                    "{}={}",
                    pod["metadata"]["name"].as_str().unwrap_or("-"),
                    pod["spec"]["n"]
                )
            })
            .collect();
        let mut seen = client
            .join()
            .map_err(|_| anyhow::anyhow!("the client panicked"))??;
        let mut there = there;
        (seen.sort(), there.sort());
        assert_eq!(seen, there);
        Ok(())
    })
}
