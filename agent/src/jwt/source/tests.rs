mod discovery;

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use axum::{Router, extract::State, http::StatusCode, response::IntoResponse, routing::get};

use super::*;
use crate::fetch::tests::serve;

const SOON: Duration = Duration::from_millis(50);
const LIMIT: Duration = Duration::from_secs(5);

const PACE: Pace = Pace {
    shortest: SOON,
    retry: SOON,
    longest_retry: SOON,
};

/// A server of one key set, as it is at the moment.
#[derive(Default)]
struct Server {
    set: Mutex<Option<String>>,
    cache: Mutex<&'static str>,
    delay: Mutex<Duration>,
    asked: AtomicU64,
}

impl Server {
    fn of(kids: &str) -> Arc<Self> {
        let server = Arc::new(Self::default());
        server.set(kids);
        server
    }

    fn set(&self, kids: &str) {
        *self.set.lock().expect("no panic") = Some(set(kids));
    }

    fn fail(&self) {
        *self.set.lock().expect("no panic") = None;
    }

    fn routes(self: &Arc<Self>) -> Router {
        async fn keys(State(server): State<Arc<Server>>) -> impl IntoResponse {
            server.asked.fetch_add(1, SeqCst);
            let delay = *server.delay.lock().expect("no panic");
            tokio::time::sleep(delay).await;
            let set = server.set.lock().expect("no panic").clone();
            let cache = *server.cache.lock().expect("no panic");
            match set {
                Some(set) => Ok(([("cache-control", cache)], set)),
                None => Err(StatusCode::SERVICE_UNAVAILABLE),
            }
        }
        Router::new()
            .route("/keys", get(keys))
            .with_state(self.clone())
    }

    async fn serve(self: &Arc<Self>) -> RemoteKeys {
        url(&serve(self.routes()).await)
    }
}

/// The public key of RFC 7517 A.1.
const X: &str = "MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4";
const Y: &str = "4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM";

/// A set with that key once for each letter.
fn set(kids: &str) -> String {
    let keys: Vec<_> = kids
        .chars()
        .map(|kid| serde_json::json!({"kty": "EC", "crv": "P-256", "kid": kid.to_string(), "x": X, "y": Y}))
        .collect();
    serde_json::json!({ "keys": keys }).to_string()
}

fn url(base: &str) -> RemoteKeys {
    RemoteKeys::Url {
        url: format!("{base}/keys"),
        timeout: LIMIT,
    }
}

fn store(options: Options, wanted: &[&RemoteKeys]) -> KeyStore {
    let store = KeyStore::with_pace(options, PACE).expect("roots");
    store.want(wanted.iter().map(|&from| from.clone()).collect());
    store
}

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < LIMIT, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn fetches_before_a_token_comes_and_ends_when_not_wanted() {
    let server = Server::of("a");
    let from = server.serve().await;
    let store = store(Options::default(), &[&from]);
    assert!(store.get(&from).is_none());
    assert!(store.ready(&from, LIMIT).await.is_some());
    assert!(store.get(&from).is_some());
    assert_eq!(store.problems(), []);
    // Wanted again: the same source, not fetched anew.
    store.want([from.clone()].into());
    let source = Arc::downgrade(&store.source(&from).expect("wanted").shared);
    assert_eq!(server.asked.load(SeqCst), 1);
    store.want(HashSet::new());
    assert!(store.get(&from).is_none());
    assert!(store.ready(&from, LIMIT).await.is_none());
    assert!(!store.refetch(&from).await);
    eventually("its task ends", || source.strong_count() == 0).await;
}

#[tokio::test]
async fn tasks_end_with_the_store() {
    let server = Server::of("a");
    *server.delay.lock().expect("no panic") = Duration::from_secs(60);
    let from = server.serve().await;
    for shutdown in [true, false] {
        let store = store(Options::default(), &[&from]);
        let shared = Arc::downgrade(&store.source(&from).expect("wanted").shared);
        let clone = store.clone();
        if shutdown {
            store.shutdown();
            clone.want([from.clone()].into());
        } else {
            drop(store);
            assert!(clone.source(&from).is_some());
            drop(clone);
        }
        eventually("its task ends", || shared.strong_count() == 0).await;
    }
}

#[tokio::test]
async fn refreshes_when_the_server_says_so() {
    let server = Server::of("a");
    *server.cache.lock().expect("no panic") = "max-age=0";
    let from = server.serve().await;
    let store = store(Options::default(), &[&from]);
    let first = store.ready(&from, LIMIT).await.expect("fetched");
    eventually("it is fetched again", || server.asked.load(SeqCst) > 2).await;
    let same = store.get(&from).expect("still there");
    assert!(Arc::ptr_eq(&first, &same), "an unchanged set is kept");
    server.set("ab");
    eventually("the new set is used", || {
        store
            .get(&from)
            .is_some_and(|set| !Arc::ptr_eq(&set, &first))
    })
    .await;
}

#[tokio::test]
async fn failures_keep_the_last_good_set_for_a_time() {
    let server = Server::of("a");
    let from = server.serve().await;
    let options = Options {
        refresh: SOON,
        keep: Duration::from_millis(600),
        ..Options::default()
    };
    let store = store(options, &[&from]);
    assert!(store.ready(&from, LIMIT).await.is_some());
    server.fail();
    eventually("it fails", || store.counts().failures > 1).await;
    let problem = &store.problems()[0];
    assert!(
        problem.usable && problem.error.contains("503"),
        "{problem:?}"
    );
    assert!(store.get(&from).is_some());
    eventually("the set expires", || store.get(&from).is_none()).await;
    assert!(!store.problems()[0].usable);
    server.set("a");
    eventually("it is back", || store.get(&from).is_some()).await;
    assert_eq!(store.problems(), []);
}

#[tokio::test]
async fn what_is_no_key_set_is_no_success() {
    let server = Server::of("a");
    *server.set.lock().expect("no panic") = Some("<html>".into());
    let from = server.serve().await;
    let store = store(Options::default(), &[&from]);
    assert!(store.ready(&from, LIMIT).await.is_none());
    assert!(!store.problems()[0].usable);
}

#[tokio::test]
async fn a_slow_server_does_not_hold_up_who_waits() {
    let server = Server::of("a");
    *server.delay.lock().expect("no panic") = LIMIT;
    let from = server.serve().await;
    let store = store(Options::default(), &[&from]);
    let begun = Instant::now();
    assert!(store.ready(&from, SOON).await.is_none());
    assert!(begun.elapsed() < LIMIT / 2);
}

#[tokio::test]
async fn refetches_together_and_not_too_often() {
    let server = Server::of("a");
    let from = server.serve().await;
    let interval = Duration::from_millis(500);
    let options = Options {
        refetch_interval: interval,
        ..Options::default()
    };
    let store = store(options, &[&from]);
    assert!(store.ready(&from, LIMIT).await.is_some());
    *server.delay.lock().expect("no panic") = SOON;
    server.set("ab");
    let asked = Instant::now();
    let all = futures_util::future::join_all((0..20).map(|_| store.refetch(&from))).await;
    assert!(all.iter().all(|changed| *changed), "{all:?}");
    assert_eq!(server.asked.load(SeqCst), 2);
    server.set("abc");
    assert!(!store.refetch(&from).await, "too soon");
    assert_eq!(server.asked.load(SeqCst), 2);
    tokio::time::sleep_until(asked + interval + SOON).await;
    assert!(store.refetch(&from).await);
    tokio::time::sleep(interval + SOON).await;
    assert!(!store.refetch(&from).await, "nothing has changed");
    let counts = store.counts();
    assert_eq!((counts.attempts, counts.refetches), (4, 3));
}
