use std::path::Path;

use super::*;
use crate::fetch::tests::serve_tls;

fn discovery(issuer: &str) -> RemoteKeys {
    RemoteKeys::Discovery {
        issuer: issuer.to_owned(),
        timeout: LIMIT,
    }
}

/// Serves discovery with what `metadata` makes of the base URL, and the keys.
async fn issuer(metadata: impl FnOnce(&str) -> serde_json::Value) -> String {
    let document = Arc::new(Mutex::new(String::new()));
    let served = document.clone();
    let text = move || async move { served.lock().expect("no panic").clone() };
    let routes = Server::of("a")
        .routes()
        .route("/.well-known/openid-configuration", get(text));
    let base = serve(routes).await;
    *document.lock().expect("no panic") = metadata(&base).to_string();
    base
}

#[tokio::test]
async fn discovers_the_keys_of_an_issuer() {
    let base = issuer(|base| {
        serde_json::json!({"issuer": format!("{base}/"), "jwks_uri": format!("{base}/keys")})
    })
    .await;
    // The slash belongs to the issuer, not to the path of its metadata.
    let (right, wrong) = (discovery(&format!("{base}/")), discovery(&base));
    let store = store(Options::default(), &[&right, &wrong]);
    assert!(store.ready(&right, LIMIT).await.is_some());
    assert!(store.ready(&wrong, LIMIT).await.is_none());
    let problems = store.problems();
    assert_eq!(problems.len(), 1);
    assert!(problems[0].error.contains("not of"), "{problems:?}");
}

#[tokio::test]
async fn an_https_issuer_has_https_keys() {
    let directory = tempfile::tempdir().expect("a directory");
    let keys = Server::of("a");
    let plain = serve(keys.routes()).await;
    for (downgrade, expected) in [(false, true), (true, false)] {
        let document = Arc::new(Mutex::new(String::new()));
        let served = document.clone();
        let text = move || async move { served.lock().expect("no panic").clone() };
        let routes = keys
            .routes()
            .route("/.well-known/openid-configuration", get(text));
        let (base, roots) = serve_tls(routes, directory.path()).await;
        let target = if downgrade { &plain } else { &base };
        *document.lock().expect("no panic") =
            serde_json::json!({"issuer": base, "jwks_uri": format!("{target}/keys")}).to_string();
        let options = Options {
            roots: Some(roots),
            ..Options::default()
        };
        let from = discovery(&base);
        let store = store(options, &[&from]);
        let got = store.ready(&from, LIMIT).await;
        assert_eq!(got.is_some(), expected, "{:?}", store.problems());
        if downgrade {
            assert!(store.problems()[0].error.contains("not https"));
        }
    }
}

#[tokio::test]
async fn a_file_stands_in_for_discovery_and_is_watched() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("keys.json");
    let write = |to: &Path, kids: &str| std::fs::write(to, set(kids)).expect("writes");
    write(&path, "a");
    let from = discovery("testing@secure.istio.io");
    let options = Options {
        files: [("testing@secure.istio.io".to_owned(), path.clone())].into(),
        ..Options::default()
    };
    let store = store(options, &[&from]);
    let mut last = store.ready(&from, LIMIT).await.expect("read");
    let mut replaced = || {
        let set = store.get(&from).expect("the last good set serves");
        !Arc::ptr_eq(&std::mem::replace(&mut last, set.clone()), &set)
    };
    write(&path, "ab");
    eventually("a write is seen", &mut replaced).await;
    let next = directory.path().join("next");
    write(&next, "abc");
    std::fs::rename(&next, &path).expect("renames");
    eventually("a rename is seen", &mut replaced).await;
    std::fs::remove_file(&path).expect("removes");
    eventually("its absence is told", || !store.problems().is_empty()).await;
    assert!(!replaced());
    // Reading is no change: nothing reads it again and again.
    write(&path, "a");
    eventually("it is back", &mut replaced).await;
    tokio::time::sleep(4 * SOON).await;
    let before = store.counts().attempts;
    tokio::time::sleep(6 * SOON).await;
    assert_eq!(store.counts().attempts, before);
}
