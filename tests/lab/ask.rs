//! Questions to the audit log: what others read of its files, and whether policies do
//! live what a replay says of them.

use std::{
    collections::BTreeMap,
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use postern_tests::{Lab, Pod, PodOptions, Running, binary, eventually, output, text};
use serde_json::Value;

use crate::{
    kit::{ECHO, at, authorization, echoes, is_connection, peer_authentication},
    requests::{authentication, bearer, get, inline, mint},
};

const PORT: u16 = 8080;

/// `postern audit` about a directory.
fn audit(directory: &Path, arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(binary("postern")?);
    command.arg("audit").args(arguments);
    command.arg("--directory").arg(directory);
    command.args(["--config", "/nonexistent"]);
    Ok(command)
}

fn json(directory: &Path, arguments: &[&str]) -> Result<Value> {
    let said = output(&mut audit(directory, arguments)?)?;
    serde_json::from_slice(&said.stdout).with_context(|| text(&said.stdout))
}

#[test]
fn files_are_read_by_others_and_sums_are_those_of_the_records() -> Result<()> {
    let mut lab = Lab::started()?;
    let (client, server) = (lab.pod(1, "client")?, lab.pod(2, "server")?);
    let _nginx = server.nginx(PORT, "page")?;
    let _echo = server.serve("echo", ECHO)?;
    lab.policy(
        "get",
        &authorization("get", "{rules: [{to: [{operation: {methods: [GET]}}]}]}"),
    )?;
    lab.policies(1)?;
    let url = format!("http://{}/app/x", at(&server, PORT));
    for _ in 0..5 {
        assert_eq!(get(&client, &url, &[])?.0, "200");
    }
    let (_, said) = client.curl(&["-X", "PUT", "-o", "/dev/null", "-w", "%{http_code}", &url])?;
    assert_eq!(said, "403");
    assert!(!echoes(&client, &at(&server, ECHO))?);
    lab.nodes[1].record("what is no HTTP", |r| {
        is_connection(r) && r["protocol"].is_null()
    })?;
    eventually("all have ended", Duration::from_secs(10), || {
        let all = lab.nodes[1].audit().unwrap_or_default();
        all.iter().filter(|r| is_connection(r)).count() == 7
    })?;
    let directory = lab.nodes[1].audit_path();

    // Byte for byte.
    lab.nodes[1].stop()?;
    let stands = lab.nodes[1].audit_text()?;
    let lines = output(&mut audit(&directory, &["query", "-o", "json"])?)?.stdout;
    assert_eq!(text(&lines), stands);
    let ocsf = output(&mut audit(&directory, &["query", "-o", "ocsf"])?)?.stdout;
    assert_eq!(text(&ocsf).lines().count(), stands.lines().count());
    for event in text(&ocsf).lines() {
        let event: Value = serde_json::from_str(event)?;
        assert_eq!(event["metadata"]["product"]["name"], "Postern", "{event}");
    }
    let records: Vec<Value> = stands
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?;

    let tools = std::env::var_os("POSTERN_TOOLS").context("POSTERN_TOOLS is not set")?;
    let packages = Path::new(&tools).join("pyarrow");
    ensure!(
        packages.join("pyarrow").is_dir(),
        "there is no pyarrow in {}: run `cargo xtask setup --tier lab`",
        packages.display()
    );
    let file = |name: &str| lab.path().join(name);
    std::fs::write(file("lines"), &lines)?;
    std::fs::write(file("compare.py"), include_str!("ask/compare.py"))?;
    let parquet = file("log.parquet").display().to_string();
    output(&mut audit(
        &directory,
        &["query", "-o", "parquet", "--file", &parquet],
    )?)?;
    // By redirection, as well.
    let arrow = output(&mut audit(&directory, &["query", "-o", "arrow"])?)?.stdout;
    std::fs::write(file("log.arrow"), arrow)?;
    let mut python = Command::new("/usr/bin/python3");
    python.arg(file("compare.py")).arg(&packages);
    python.args([file("lines"), file("log.parquet"), file("log.arrow")]);
    let said = text(&output(&mut python)?.stdout);
    assert_eq!(said.trim(), format!("{} alike", records.len()));

    let stats = json(&directory, &["stats", "-o", "json"])?;
    let count = |fits: &dyn Fn(&Value) -> bool| records.iter().filter(|r| fits(r)).count() as u64;
    assert_eq!(stats["records"], count(&|_| true));
    for (kind, sum) in stats["kinds"].as_object().context("kinds")? {
        assert_eq!(*sum, count(&|r| r["kind"] == **kind), "{kind}");
    }
    let pairs = stats["pairs"].as_array().context("pairs")?;
    for kind in ["connection", "request"] {
        let sum = |name: &str| -> u64 {
            let own = pairs.iter().filter(|pair| pair["kind"] == kind);
            own.filter_map(|pair| pair[name].as_u64()).sum()
        };
        assert_eq!(sum("calls"), count(&|r| r["kind"] == kind));
        assert_eq!(
            sum("denied"),
            count(&|r| r["kind"] == kind && r["verdict"] == "deny")
        );
    }
    let sent: u64 = records
        .iter()
        .filter_map(|r| r["bytes"]["sent"].as_u64())
        .sum();
    let told: u64 = pairs.iter().filter_map(|pair| pair["sent"].as_u64()).sum();
    assert_eq!((sent > 0, told), (true, sent));

    let table = text(&output(&mut audit(&directory, &["query", "--status", "403"])?)?.stdout);
    let rows: Vec<&str> = table.lines().collect();
    assert_eq!(rows.len(), 2, "{table}");
    assert!(
        rows[1].contains("PUT") && rows[1].contains("shop/client"),
        "{table}"
    );
    Ok(())
}

#[test]
fn a_log_is_followed_until_it_is_interrupted_or_nobody_reads() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let write = |first: u64, seq: u64| -> Result<()> {
        let path = directory.path().join(format!("audit-{first:020}.jsonl"));
        let mut file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(path)?;
        let record = format!(
            "{{\"seq\":{seq},\"time\":\"2026-01-31T11:00:00Z\",\"kind\":\"gap\",\"count\":{seq}}}"
        );
        Ok(writeln!(file, "{record}")?)
    };
    (1..=3).try_for_each(|seq| write(1, seq))?;
    let mut command = audit(directory.path(), &["tail", "-f", "-n", "1", "-o", "json"])?;
    let mut tail = Running::start(&mut command, directory.path().join("tail.out"))?;
    tail.says("\"count\":3")?;
    write(1, 4)?;
    tail.says("\"count\":4")?;
    write(5, 5)?;
    tail.says("\"count\":5")?;
    assert_eq!(tail.output().lines().count(), 3);
    tail.signal(Signal::SIGINT)?;
    eventually("it ends", Duration::from_secs(5), || {
        tail.child.try_wait().is_ok_and(|status| status.is_some())
    })?;
    assert!(tail.child.wait()?.success());
    // Whoever has seen enough is no error.
    let mut command = audit(directory.path(), &["tail", "-f", "-n", "0"])?;
    let mut unread = command.stdout(Stdio::piped()).spawn()?;
    drop(unread.stdout.take());
    let mut seq = 5;
    eventually("it ends", Duration::from_secs(10), || {
        seq += 1;
        write(5, seq).is_ok() && unread.try_wait().is_ok_and(|status| status.is_some())
    })?;
    assert!(unread.wait()?.success());
    // A line that is none is told, the rest is shown, and the exit code says so.
    let path = directory.path().join(format!("audit-{:020}.jsonl", 5));
    writeln!(
        std::fs::File::options().append(true).open(&path)?,
        "nonsense"
    )?;
    write(5, seq + 1)?;
    let said = audit(directory.path(), &["query", "-o", "json"])?.output()?;
    assert_eq!(said.status.code(), Some(1));
    assert_eq!(text(&said.stdout).lines().count() as u64, seq + 1);
    assert!(text(&said.stderr).contains(&format!("{}:{}: ", path.display(), seq - 3)));
    Ok(())
}

/// What is called, and by whom.
struct Call<'a> {
    pod: &'a Pod,
    what: What<'a>,
}

enum What<'a> {
    /// Method, path, headers.
    Http(&'static str, &'static str, &'a [&'a str]),
    Echo,
}

impl Call<'_> {
    /// Whether it is let in.
    fn made(&self, server: &Pod) -> Result<bool> {
        let What::Http(method, path, headers) = self.what else {
            return echoes(self.pod, &at(server, ECHO));
        };
        let url = format!("http://{}{path}", at(server, PORT));
        let mut arguments = vec!["-X", method, "-o", "/dev/null", "-w", "%{http_code}", &url];
        for header in headers {
            arguments.extend(["-H", header]);
        }
        let (code, said) = self.pod.curl(&arguments)?;
        Ok(code == 0 && !said.starts_with('4'))
    }

    /// As a replay names it.
    fn named(&self, form: &str) -> (String, String) {
        let source = match self.pod.name.as_str() {
            "outside" => self.pod.ip.clone(),
            name => format!("spiffe://cluster.local/ns/shop/sa/{name}"),
        };
        let call = match self.what {
            What::Http(method, ..) => format!("{method} {form}"),
            What::Echo => format!("port {ECHO}"),
        };
        (source, call)
    }
}

/// Calls are made and recorded under policies, replayed under others, and made again
/// when those are live.
#[test]
fn a_replay_says_what_the_policies_then_do() -> Result<()> {
    let mut lab = Lab::started()?;
    let server = lab.pod(2, "server")?;
    let (client, near) = (lab.pod(1, "client")?, lab.pod(2, "near")?);
    let plain = PodOptions {
        mesh: Some(false),
        ..PodOptions::default()
    };
    let outside = lab.pod_with(1, "outside", plain)?;
    let _nginx = server.nginx(PORT, "page")?;
    let _echo = server.serve("echo", ECHO)?;
    let minted = mint(&lab, 3600)?;
    let tokens = authentication("tokens", &inline(&minted, ""));
    let recorded_under = [
        ("tokens", tokens.clone()),
        (
            "rules",
            authorization(
                "rules",
                "{rules: [{to: [{operation: {methods: [GET, DELETE]}}]}, {to: [{operation: {ports: ['9000']}}]}]}",
            ),
        ),
    ];
    let candidate = [
        ("tokens", tokens),
        (
            "rules",
            authorization(
                "rules",
                "{rules: [{from: [{source: {requestPrincipals: ['*/alice']}}], \
                 to: [{operation: {methods: [GET], paths: ['/app/orders/*', /app/t]}}]}, \
                 {from: [{source: {serviceAccounts: [near]}}], to: [{operation: {methods: [PUT]}}]}, \
                 {from: [{source: {serviceAccounts: [client]}}], to: [{operation: {ports: ['9000']}}]}, \
                 {to: [{operation: {paths: [/app/header]}}], \
                 when: [{key: 'request.headers[x-env]', values: [prod]}]}]}",
            ),
        ),
        (
            "strict",
            peer_authentication("strict", "shop", "{mtls: {mode: STRICT}}"),
        ),
    ];
    let put = |directory: &str, policies: &[(&str, String)]| -> Result<String> {
        for (name, policy) in policies {
            lab.manifest_in(directory, name, policy)?;
        }
        Ok(lab.path().join(directory).display().to_string())
    };
    let (old, new) = (put("old", &recorded_under)?, put("new", &candidate)?);
    for (name, policy) in &recorded_under {
        lab.policy(name, policy)?;
    }
    lab.policies(2)?;

    let (good, other) = (bearer(&minted, "good"), bearer(&minted, "wrong_subject"));
    let (good, other) = ([good.as_str()], [other.as_str()]);
    let prod = ["x-env: prod"];
    let http = What::Http;
    // Who, what, the form of its path, how often.
    let rows = [
        (
            &client,
            http("GET", "/app/orders/17", &good),
            "/app/orders/{*}",
            2,
        ),
        (
            &client,
            http("GET", "/app/orders/../orders/18", &good),
            "/app/orders/../orders/{*}",
            1,
        ),
        (&client, http("GET", "/app/t", &other), "/app/t", 1),
        (&client, http("GET", "/app/free", &[]), "/app/free", 3),
        (&client, http("DELETE", "/app/t", &good), "/app/t", 1),
        (&near, http("GET", "/app/t", &good), "/app/t", 1),
        (&near, http("GET", "/app/free", &[]), "/app/free", 1),
        (&near, http("PUT", "/app/t", &[]), "/app/t", 2),
        (&client, http("PUT", "/app/t", &[]), "/app/t", 1),
        (&client, http("GET", "/app/header", &prod), "/app/header", 1),
        (&near, http("GET", "/app/header", &[]), "/app/header", 1),
        (&client, What::Echo, "", 1),
        (&near, What::Echo, "", 2),
        (&outside, What::Echo, "", 1),
        (
            &outside,
            http("GET", "/app/orders/1", &good),
            "/app/orders/{*}",
            1,
        ),
    ];
    let rows = rows.map(|(pod, what, form, times)| (Call { pod, what }, form, times));
    let all = || -> Result<Vec<bool>> {
        let mut outcomes = Vec::new();
        for (call, _, times) in &rows {
            let made: Vec<bool> = (0..*times)
                .map(|_| call.made(&server))
                .collect::<Result<_>>()?;
            assert!(made.windows(2).all(|two| two[0] == two[1]));
            outcomes.push(made[0]);
        }
        Ok(outcomes)
    };
    let before = all()?;
    let calls: usize = rows.iter().map(|(_, _, times)| *times as usize).sum();
    // A record for each request, and for each connection that is none of HTTP.
    eventually("all is recorded", Duration::from_secs(10), || {
        let records = lab.nodes[1].audit().unwrap_or_default();
        let judged =
            |r: &&Value| r["kind"] == "request" || (is_connection(r) && r["protocol"].is_null());
        records.iter().filter(judged).count() == calls
    })?;
    let directory = lab.nodes[1].audit_path();
    let manifests = lab.path().join("manifests").display().to_string();
    let replay = [
        "replay",
        "--manifests",
        &manifests,
        "--recorded-under",
        &old,
        "-o",
        "json",
    ];
    let with = |policies: &str, more: &[&str]| -> Result<std::process::Output> {
        let mut command = audit(&directory, &replay)?;
        Ok(command.args(["--policies", policies]).args(more).output()?)
    };
    let same = with(&old, &["--exit-code"])?;
    let same_said: Value = serde_json::from_slice(&same.stdout)?;
    assert_eq!(same_said["unchanged"], calls, "{same_said}");
    assert_eq!(same.status.code(), Some(0), "{same_said}");
    let said = with(&new, &["--exit-code"])?;
    assert_eq!(said.status.code(), Some(3), "{}", text(&said.stderr));
    let report: Value = serde_json::from_slice(&said.stdout)?;

    for (name, policy) in &candidate {
        lab.policy(name, policy)?;
    }
    lab.policies(3)?;
    let after = all()?;
    let mut expected: BTreeMap<(&str, String, String), u64> = BTreeMap::new();
    let mut unchanged = 0;
    for (((call, form, times), was), is) in rows.iter().zip(before).zip(after) {
        let section = match (*form, was, is) {
            // What headers it had is not recorded.
            ("/app/header", ..) => "undecidable",
            (_, true, false) => "newlyDenied",
            (_, false, true) => "newlyAllowed",
            _ => {
                unchanged += times;
                continue;
            }
        };
        let (source, call) = call.named(form);
        *expected.entry((section, source, call)).or_default() += times;
    }
    let mut told = BTreeMap::new();
    for section in ["newlyDenied", "newlyAllowed", "undecidable"] {
        for group in report[section].as_array().context("groups")? {
            let own = |name: &str| group[name].as_str().unwrap_or_default().to_owned();
            assert_eq!(own("destination"), "shop/server", "{report}");
            let calls = group["calls"].as_u64().context("calls")?;
            *told
                .entry((section, own("source"), own("call")))
                .or_default() += calls;
        }
    }
    assert_eq!(told, expected, "{report}");
    assert_eq!(report["unchanged"], unchanged, "{report}");
    // Not all of one sort.
    for section in ["newlyDenied", "newlyAllowed", "undecidable"] {
        assert!(told.keys().any(|(own, ..)| *own == section), "{report}");
    }
    assert!(unchanged > 0);
    let strict = report["newlyDenied"].as_array().context("groups")?.iter();
    let strict = strict.filter(|group| group["policy"] == "PeerAuthentication/shop/strict");
    assert_eq!(strict.count(), 2, "{report}");
    Ok(())
}
