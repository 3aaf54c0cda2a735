//! Lists and watches over the wire: what a client must know how to take.

use std::{process::Command, time::Duration};

use anyhow::{Context as _, Result};
use postern_apiserver::Options;
use postern_tests::{eventually, output, text};
use serde_json::{Value, json};

use super::{World, pod};

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
        seen.sort();
        there.sort();
        assert_eq!(seen, there);
        Ok(())
    })
}
