//! Against a double of the SPIRE agent's admin socket.

use std::sync::atomic::{AtomicUsize, Ordering};

use prost::Message as _;
use rustls::pki_types::PrivateKeyDer;
use tokio::sync::watch as signal;
use webpki::KeyUsage;

use super::{
    proto::{
        BundlesRequest, BundlesResponse, Id, SvidWithKey, SvidsRequest, SvidsResponse, Token,
        X509Svid,
    },
    *,
};
use crate::{
    config::Config,
    identity::double::{self, Answers, Call, Serve, Signer, uri},
    proxy::Identities,
};

const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";

/// What the double knows; streams say it again whenever it changes.
#[derive(Clone, Default)]
struct Known {
    svids: Vec<SvidWithKey>,
    bundles: HashMap<String, Vec<u8>>,
    /// The code that all calls end with at once.
    refuses: Option<i32>,
    /// Streams end.
    cut: usize,
}

struct Double {
    known: signal::Sender<Known>,
    seen: Arc<Mutex<Vec<Vec<Selector>>>>,
    tokens: Arc<AtomicUsize>,
    root: Signer,
    dir: tempfile::TempDir,
}

impl Double {
    fn new() -> Self {
        let root = Signer::new("spire root");
        let bundle = root.certificate.der().to_vec();
        let known = signal::Sender::new(Known {
            bundles: [("spiffe://cluster.local".to_owned(), bundle)].into(),
            ..Known::default()
        });
        let dir = tempfile::tempdir().expect("directory");
        let this = Self {
            known,
            seen: Arc::default(),
            tokens: Arc::default(),
            root,
            dir,
        };
        this.listen();
        this
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("admin.sock")
    }

    fn listen(&self) {
        let listener = tokio::net::UnixListener::bind(self.socket()).expect("binds");
        let (known, seen, tokens) = (self.known.clone(), self.seen.clone(), self.tokens.clone());
        let serve: Serve = Arc::new(move |call, answers| {
            let (known, seen, tokens) = (known.subscribe(), seen.clone(), tokens.clone());
            Box::pin(answer(call, answers, known, seen, tokens))
        });
        tokio::spawn(async move {
            while let Ok((io, _)) = listener.accept().await {
                tokio::spawn(double::connection(io, serve.clone()));
            }
        });
    }

    fn config(&self) -> Config {
        let mut config = Config::default();
        config.identity.spire = Some(SpireAgent {
            socket: self.socket(),
            federated: vec!["partner.org".to_owned().try_into().expect("valid")],
        });
        config
    }

    fn svid(&self, id: &str, life: Duration) -> SvidWithKey {
        svid(&self.root, id, life)
    }

    fn gives(&self, svids: Vec<SvidWithKey>) {
        self.known.send_modify(|known| known.svids = svids);
    }
}

fn svid(root: &Signer, id: &str, life: Duration) -> SvidWithKey {
    let key = rcgen::KeyPair::generate().expect("a key");
    let leaf = root.sign(&key, uri(id), life);
    let (domain, path) = id["spiffe://".len()..].split_once('/').expect("a path");
    SvidWithKey {
        x509_svid: Some(X509Svid {
            cert_chain: vec![leaf.der().to_vec()],
            id: Some(Id {
                trust_domain: domain.into(),
                path: format!("/{path}"),
            }),
            expires_at: life.as_secs() as i64,
        }),
        x509_svid_key: key.serialize_der(),
    }
}

async fn answer(
    call: Call,
    answers: Answers,
    mut known: signal::Receiver<Known>,
    seen: Arc<Mutex<Vec<Vec<Selector>>>>,
    tokens: Arc<AtomicUsize>,
) -> double::Ending {
    let service = "/spire.api.agent.delegatedidentity.v1.DelegatedIdentity/";
    let method = call.path.strip_prefix(service).expect("the service");
    let cut = known.borrow_and_update().cut;
    loop {
        let now = known.borrow_and_update().clone();
        if let Some(code) = now.refuses {
            return Err((code, "as asked".into()));
        }
        if now.cut != cut {
            return Ok(());
        }
        match method {
            "SubscribeToX509SVIDs" => {
                let request = SvidsRequest::decode(call.message.clone()).expect("a request");
                seen.lock().expect("no panic").push(request.selectors);
                answers.send(&SvidsResponse {
                    x509_svids: now.svids,
                });
            }
            "SubscribeToX509Bundles" => {
                BundlesRequest::decode(call.message.clone()).expect("a request");
                answers.send(&BundlesResponse {
                    ca_certificates: now.bundles,
                });
            }
            "FetchJWTSVIDs" => {
                let request = TokensRequest::decode(call.message.clone()).expect("a request");
                let count = tokens.fetch_add(1, Ordering::Relaxed);
                let soon = SystemTime::now().duration_since(UNIX_EPOCH).expect("later");
                let token = |path: &str| Token {
                    token: format!("{path} {} {count}", request.audience[0]),
                    id: Some(Id {
                        trust_domain: "cluster.local".into(),
                        path: path.into(),
                    }),
                    expires_at: soon.as_secs() as i64 + 300,
                };
                answers.send(&TokensResponse {
                    svids: vec![token("/other"), token("/ns/shop/sa/cart")],
                });
                return Ok(());
            }
            other => return Err((12, format!("no {other}"))),
        }
        if known.changed().await.is_err() {
            return Ok(());
        }
    }
}

const HOUR: Duration = Duration::from_secs(3600);

fn cart() -> SpiffeId {
    CART.parse().expect("valid")
}

/// Rounds, as the agent makes them, until there is something.
async fn until(identities: &Identities, what: &str, mut done: impl FnMut(Option<&str>) -> bool) {
    let end = std::time::Instant::now() + Duration::from_secs(20);
    loop {
        let round = identities.renew(SystemTime::now()).await;
        if done(round.problem.as_deref()) {
            return;
        }
        assert!(
            std::time::Instant::now() < end,
            "{what}: {:?}",
            round.problem
        );
        let wait = round.next.min(Duration::from_millis(200));
        let _told = tokio::time::timeout(wait, identities.added.notified()).await;
    }
}

#[tokio::test]
async fn a_workload_gets_what_spire_gives_and_each_newer_one() {
    let double = Double::new();
    double.gives(vec![
        double.svid("spiffe://cluster.local/special", HOUR),
        double.svid(CART, HOUR),
    ]);
    let identities = Identities::open(&double.config(), "node1").expect("opens");
    assert!(identities.get(&cart(), "pod-1").expect("asked").is_none());
    until(&identities, "the first", |p| p.is_none()).await;
    let credentials = identities
        .get(&cart(), "pod-1")
        .expect("asked")
        .expect("there");
    assert_eq!(identities.bundle.roots(), 1);
    {
        let seen = double.seen.lock().expect("no panic");
        let said: Vec<_> = seen[0]
            .iter()
            .map(|s| format!("{}:{}", s.kind, s.value))
            .collect();
        assert_eq!(said, ["k8s:ns:shop", "k8s:sa:cart", "k8s:pod-uid:pod-1"]);
    }
    // SPIRE renews by itself, and says so.
    let before = credentials.fingerprint();
    double.gives(vec![double.svid(CART, HOUR)]);
    until(&identities, "the next", |_| {
        credentials.fingerprint() != before
    })
    .await;
    // Another pod of the account: asked for by both.
    identities.get(&cart(), "pod-2").expect("asked");
    until(&identities, "both pods", |_| {
        let seen = double.seen.lock().expect("no panic");
        seen.last().is_some_and(|selectors| selectors.len() == 4)
    })
    .await;
    // The streams break, and come again.
    let before = credentials.fingerprint();
    double.known.send_modify(|known| known.cut += 1);
    double.gives(vec![double.svid(CART, HOUR)]);
    until(&identities, "after a break", |p| {
        p.is_none() && credentials.fingerprint() != before
    })
    .await;
}

#[tokio::test]
async fn another_identity_is_not_taken_and_the_last_good_is_kept() {
    let double = Double::new();
    double.gives(vec![double.svid("spiffe://cluster.local/special", HOUR)]);
    let identities = Identities::open(&double.config(), "node1").expect("opens");
    identities.get(&cart(), "pod-1").expect("asked");
    until(&identities, "it is told", |p| {
        p.is_some_and(|p| p.contains("expects") && p.contains("cluster.local/special"))
    })
    .await;
    double.gives(Vec::new());
    let why = |part: &'static str| move |p: Option<&str>| p.is_some_and(|p| p.contains(part));
    until(&identities, "no entry", why("no registration entry")).await;
    // The name in the certificate counts, not the one beside it.
    let mut lies = double.svid("spiffe://cluster.local/ns/shop/sa/admin", HOUR);
    let id = lies.x509_svid.as_mut().and_then(|svid| svid.id.as_mut());
    id.expect("one").path = "/ns/shop/sa/cart".into();
    double.gives(vec![lies]);
    until(&identities, "a lie", why("sa/admin")).await;
    let mut swapped = double.svid(CART, HOUR);
    swapped.x509_svid_key = double.svid(CART, HOUR).x509_svid_key;
    double.gives(vec![swapped]);
    until(&identities, "another key", why("another key")).await;
    double.gives(vec![double.svid(CART, Duration::from_secs(30))]);
    until(&identities, "an expired one", why("expired")).await;
    double.gives(vec![svid(&Signer::new("nobody"), CART, HOUR)]);
    until(&identities, "of nobody", why("UnknownIssuer")).await;
    assert!(identities.get(&cart(), "pod-1").expect("asked").is_none());
    double.gives(vec![double.svid(CART, HOUR)]);
    until(&identities, "a good one", |p| p.is_none()).await;
    let credentials = identities
        .get(&cart(), "pod-1")
        .expect("asked")
        .expect("there");
    // Withdrawn: what there is goes on until it expires, and that is told once SPIRE
    // should have renewed it.
    let before = credentials.fingerprint();
    double.gives(Vec::new());
    let round = identities
        .renew(credentials.renew_at() + Duration::from_secs(1))
        .await;
    assert!(round.problem.is_some(), "an alarm");
    assert_eq!(credentials.fingerprint(), before);
}

#[tokio::test]
async fn without_spire_nobody_is_trusted_and_it_is_told() {
    let double = Double::new();
    double.known.send_modify(|known| known.refuses = Some(7));
    double.gives(vec![double.svid(CART, HOUR)]);
    let identities = Identities::open(&double.config(), "node1").expect("opens");
    identities.get(&cart(), "pod-1").expect("asked");
    until(&identities, "refused", |p| {
        p.is_some_and(|p| p.contains("PermissionDenied"))
    })
    .await;
    assert_eq!(identities.bundle.roots(), 0);
    assert!(identities.get(&cart(), "pod-1").expect("asked").is_none());
    double.known.send_modify(|known| known.refuses = None);
    until(&identities, "it answers", |p| p.is_none()).await;
    assert!(identities.get(&cart(), "pod-1").expect("asked").is_some());
    let mut config = double.config();
    config.identity.spire.as_mut().expect("set").socket = "/nowhere/admin.sock".into();
    let away = Identities::open(&config, "node1").expect("opens");
    let round = away.renew(SystemTime::now()).await;
    let problem = round.problem.expect("told");
    assert!(problem.contains("/nowhere/admin.sock"), "{problem}");
}

#[tokio::test]
async fn bundles_are_followed_and_each_trust_domain_has_its_own() {
    let double = Double::new();
    let partner = Signer::new("partner root");
    double.known.send_modify(|known| {
        let bundle = partner.certificate.der().to_vec();
        known.bundles.insert("partner.org".into(), bundle.clone());
        known.bundles.insert("spiffe://stranger.org".into(), bundle);
    });
    let identities = Identities::open(&double.config(), "node1").expect("opens");
    until(&identities, "bundles", |p| p.is_none()).await;
    assert_eq!(identities.bundle.roots(), 2);
    let verifies = |root: &Signer, id: &str| {
        let key = rcgen::KeyPair::generate().expect("a key");
        let leaf = root.sign(&key, uri(id), HOUR).der().clone();
        let chain = [leaf];
        let verified = identities
            .bundle
            .verify(&chain, KeyUsage::client_auth(), SystemTime::now());
        verified.is_ok()
    };
    let theirs = "spiffe://partner.org/ns/a/sa/b";
    assert!(verifies(&double.root, CART));
    assert!(verifies(&partner, theirs));
    // No root signs for another's trust domain.
    assert!(!verifies(&partner, CART));
    assert!(!verifies(&double.root, theirs));
    assert!(!verifies(&partner, "spiffe://stranger.org/ns/a/sa/b"));
    // A root is replaced, and both count in between.
    let next = Signer::new("next root");
    double.known.send_modify(|known| {
        let both = [
            double.root.certificate.der().as_ref(),
            next.certificate.der(),
        ]
        .concat();
        known.bundles.insert("spiffe://cluster.local".into(), both);
    });
    until(&identities, "both", |_| identities.bundle.roots() == 3).await;
    assert!(verifies(&double.root, CART) && verifies(&next, CART));
    // Without its own, it falls to nobody else's.
    double.known.send_modify(|known| {
        known.bundles.remove("partner.org");
    });
    until(&identities, "without", |_| identities.bundle.roots() == 2).await;
    assert!(!verifies(&partner, theirs) && !verifies(&next, theirs));
    // Nothing at all is a mistake: the last good stays.
    double.known.send_modify(|known| known.bundles.clear());
    until(&identities, "told", |p| {
        p.is_some_and(|p| p.contains("none of cluster.local"))
    })
    .await;
    assert!(verifies(&next, CART));
}

#[tokio::test]
async fn jwt_svids_are_fetched_once_and_kept() {
    let double = Double::new();
    let identities = Identities::open(&double.config(), "node1").expect("opens");
    let none = identities.jwt_svid(&cart(), "books").await.err();
    assert!(none.expect("no pod").to_string().contains("no pod"));
    identities.get(&cart(), "pod-1").expect("asked");
    let end = std::time::Instant::now() + Duration::from_secs(10);
    let first = loop {
        match identities.jwt_svid(&cart(), "books").await {
            Ok(token) => break token,
            Err(error) => assert!(std::time::Instant::now() < end, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    assert_eq!(first.token.as_str(), "/ns/shop/sa/cart books 0");
    let again = identities.jwt_svid(&cart(), "books").await.expect("kept");
    assert_eq!(again.token, first.token);
    assert_eq!(double.tokens.load(Ordering::Relaxed), 1);
}

#[test]
fn secrets_are_in_no_debug_output() {
    let key = PrivateKeyDer::Pkcs8(b"SECRET".to_vec().into());
    let shown = format!(
        "{:?} {:?}",
        SvidWithKey {
            x509_svid: None,
            x509_svid_key: key.secret_der().to_vec()
        },
        Token {
            token: "SECRET".into(),
            id: None,
            expires_at: 0
        },
    );
    assert!(
        !shown.contains("SECRET") && !shown.contains("83, 69"),
        "{shown}"
    );
}

#[test]
fn a_wrong_mix_is_refused_with_the_keys_named() {
    let mut config = Config::default();
    let open = |config: &Config| {
        Identities::open(config, "n")
            .err()
            .expect("refused")
            .to_string()
    };
    config.identity.spire = Some(SpireAgent {
        socket: "admin.sock".into(),
        federated: Vec::new(),
    });
    assert!(open(&config).contains("identity.spire: socket"));
    config.identity.root_certificate = Some("/root.pem".into());
    let error = open(&config);
    assert!(
        error.contains("identity.spire and identity.rootCertificate"),
        "{error}"
    );
}
