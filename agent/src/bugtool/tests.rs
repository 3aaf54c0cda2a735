use std::{collections::BTreeMap, io::Read as _, os::unix::fs::PermissionsExt as _};

use flate2::read::GzDecoder;
use serde_json::json;

use super::*;

/// Every secret has it, in whatever else it has.
const MARK: &str = "S3cr3tMarker";

fn entries(path: &Path) -> BTreeMap<String, String> {
    let file = std::fs::File::open(path).expect("an archive");
    let mut archive = tar::Archive::new(GzDecoder::new(file));
    let mut all = BTreeMap::new();
    for entry in archive.entries().expect("entries") {
        let mut entry = entry.expect("an entry");
        let name = entry.path().expect("a name").display().to_string();
        let mut text = String::new();
        entry.read_to_string(&mut text).expect("text");
        all.insert(name, text);
    }
    all
}

/// A configuration and files that have secrets wherever there can be any.
fn planted(dir: &Path) -> (Config, Wanted) {
    let put = |name: &str, text: String| {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().expect("below")).expect("directory");
        std::fs::write(&path, text).expect("written");
        path
    };
    let pem =
        format!("-----BEGIN PRIVATE KEY-----\n{MARK}AAAAAAAAAAAA\n-----END PRIVATE KEY-----\n");
    put("state/root.key", pem.clone());
    put("state/agent.pem", pem.clone());
    put("secrets/shop/client", format!("plain-{MARK}-of-a-client"));
    put(
        "policies/p.yaml",
        format!(
            "kind: TokenBinding\nmetadata: {{name: bind, namespace: shop}}\nspec: {{password: {MARK}}}\n"
        ),
    );
    put(
        "manifests/pod.yaml",
        format!("kind: Pod\nmetadata: {{name: cart, namespace: shop}}\nspec: {{env: {MARK}}}\n"),
    );
    let join = put("join", format!("join-{MARK}-token\n"));
    let mut lines = vec![
        format!("a file's own word plain-{MARK}-of-a-client in a line"),
        format!("join-{MARK}-token"),
        format!("GET https://user:{MARK}@host/path and postgres://{MARK}:x@db"),
        format!("Authorization: Bearer {MARK}"),
        format!("authorization: Basic {MARK}=="),
        format!("proxy-authorization: {MARK} and more {MARK}"),
        format!("Cookie: a={MARK}; b={MARK}"),
        format!("{{\"token\":\"{MARK}\",\"client_secret\": \"{MARK} {MARK}\"}}"),
        format!("callback?access_token={MARK}&x=1&client_secret={MARK}"),
        format!("password={MARK} api_key=\"{MARK}\" refreshToken='{MARK}'"),
        format!("bare eyJhbGciOiJFUzI1NiJ9.{MARK}.c2ln in text"),
        format!("DPoP {MARK}"),
        format!("x-api-key: {MARK}"),
        pem,
        format!("-----BEGIN EC PRIVATE KEY-----\n{MARK} that has no end"),
    ];
    lines.insert(
        0,
        "an innocent line about pods=3 and path /etc/postern".into(),
    );
    let log = put("agent.log", lines.join("\n"));
    let text = format!(
        "state: {0}/state\npolicies:\n  directory: {0}/policies\n  secrets: {0}/secrets\n  \
         extensionProviders:\n  - {{name: a, envoyExtAuthzHttp: {{service: x, port: 1, \
         includeAdditionalHeadersInCheck: {{x-key: {MARK}}}}}}}\n\
         workloads: {{directory: {0}/manifests}}\n\
         kernel: {{pin: {0}/pin}}\n\
         listen: {{admin: '127.0.0.1:1', metrics: '127.0.0.1:1'}}\n\
         identity: {{authority: {{url: 'https://u:{MARK}@a.example', joinTokenFile: {1}}}}}\n",
        dir.display(),
        join.display(),
    );
    let config: Config =
        crate::objects::parse_document(Path::new("a.yaml"), &text).expect("parses");
    let wanted = Wanted {
        audit: 100,
        log: Some(log),
    };
    (config, wanted)
}

#[test]
fn an_archive_says_much_and_no_secret() {
    let dir = tempfile::tempdir().expect("directory");
    let (config, wanted) = planted(dir.path());
    let settings = config.audit.settings(&config.state);
    let (audit, writer) = crate::audit::Audit::open("n", settings, 100).expect("a log");
    audit.record(crate::audit::Record::Agent {
        event: "refused",
        detail: format!("Authorization: Bearer {MARK} of https://u:{MARK}@h/?token={MARK}"),
    });
    drop(audit);
    writer.join().expect("no panic");
    let path = dir.path().join("out.tar.gz");
    write(&config, &wanted, &path).expect("written");
    let mode = std::fs::metadata(&path)
        .expect("there")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let all = entries(&path);
    for (name, text) in &all {
        assert!(!text.contains(MARK), "{name}: {text}");
    }
    let has = |name: &str, part: &str| {
        let text = &all[&format!("postern/{name}")];
        assert!(text.contains(part), "{name} lacks {part}: {text}");
    };
    has("version.txt", env!("CARGO_PKG_VERSION"));
    has("config.json", "joinTokenFile");
    has(
        "config.json",
        &dir.path().join("join").display().to_string(),
    );
    has("status.json", "no answer");
    has("objects.txt", "TokenBinding shop/bind");
    has("objects.txt", "Pod shop/cart");
    has(
        "agent.log",
        "an innocent line about pods=3 and path /etc/postern",
    );
    has("agent.log", "<removed>@host/path");
    has("audit.jsonl", "refused");
    has("doctor.txt", "Linux");
    has("mounts.txt", "/proc");
    // A file of that name is not written over, and the log goes in if it is asked for.
    assert!(write(&config, &wanted, &path).is_err());
    let without = dir.path().join("without.tar.gz");
    write(&config, &Wanted::default(), &without).expect("written");
    assert!(!entries(&without).contains_key("postern/audit.jsonl"));
}

#[test]
fn what_is_no_secret_stays() {
    let known = Known::default();
    for text in [
        "postern_token_fetches_total{result=\"ok\"} 3\n",
        "# HELP postern_tokens Tokens that are held.\n",
        "{\"joinTokenFile\":\"/etc/token\",\"tokens\":3,\"adminToken\":null}\n",
        "adminToken: /etc/postern/admin\n",
        "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n",
        "https://host:8443/a@b\n",
        "spiffe://cluster.local/ns/shop/sa/cart\n",
    ] {
        assert_eq!(known.clean(text), text);
    }
    let mut document = json!({"a": {"clientSecret": "x", "secretFile": "/x", "n": 1},
        "headers": {"x-y": ["z"]}, "tokens": [true, 3]});
    redact::document(&mut document);
    assert_eq!(
        document,
        json!({"a": {"clientSecret": redact::REMOVED, "secretFile": "/x", "n": 1},
            "headers": {"x-y": [redact::REMOVED]}, "tokens": [true, 3]})
    );
}

#[test]
fn a_part_that_does_not_end_is_left_behind() {
    let (hold, held) = mpsc::channel::<()>();
    let slow: parts::Gather = Box::new(move || {
        let _ended = held.recv();
        String::new()
    });
    assert!(within(Duration::from_millis(10), slow).contains("not there within"));
    drop(hold);
    let name = name("a/../b", SystemTime::UNIX_EPOCH);
    assert_eq!(name, Path::new("postern-a_.._b-0.tar.gz"));
}
