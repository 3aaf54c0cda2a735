//! Against a double of istiod's CA: TLS, a token, and what it can get wrong.

use std::sync::{Arc, Mutex};

use prost::Message as _;
use rcgen::{CertificateSigningRequestParams, SanType};
use rustls::pki_types::PrivateKeyDer;

use super::*;
use crate::{
    config::Config,
    identity::double::{self, Answers, Call, Serve, Signer, uri},
    proxy::Identities,
};

const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";

/// What the double does.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Signs,
    ForAnother,
    OtherKey,
    Expired,
    Unknown,
    Empty,
    Garbage,
    Refuses(i32),
}

struct Double {
    address: String,
    way: Arc<Mutex<Way>>,
    root: Arc<Mutex<Arc<Signer>>>,
    seen: Arc<Mutex<Vec<(String, String, CertificateRequest)>>>,
    dir: tempfile::TempDir,
}

impl Double {
    async fn new() -> Self {
        let root = Arc::new(Signer::new("istio root"));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await;
        let listener = listener.expect("binds");
        let address = format!("https://{}", listener.local_addr().expect("bound"));
        let dir = tempfile::tempdir().expect("directory");
        std::fs::write(dir.path().join("token"), "first\n").expect("written");
        let this = Self {
            address,
            way: Arc::new(Mutex::new(Way::Signs)),
            root: Arc::new(Mutex::new(root)),
            seen: Arc::default(),
            dir,
        };
        this.write_roots(&[&this.root()]);
        let (way, root, seen) = (this.way.clone(), this.root.clone(), this.seen.clone());
        let serve: Serve = Arc::new(move |call, answers| {
            let (way, root) = (
                *way.lock().expect("no panic"),
                root.lock().expect("no panic").clone(),
            );
            let seen = seen.clone();
            Box::pin(async move { sign(way, &root, &seen, call, &answers) })
        });
        let root = this.root.clone();
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let tls = server(&root.lock().expect("no panic"));
                let serve = serve.clone();
                tokio::spawn(async move {
                    if let Ok(tls) = tokio_rustls::TlsAcceptor::from(tls).accept(tcp).await {
                        double::connection(tls, serve).await;
                    }
                });
            }
        });
        this
    }

    fn root(&self) -> Arc<Signer> {
        self.root.lock().expect("no panic").clone()
    }

    fn write_roots(&self, roots: &[&Signer]) {
        let pem: String = roots.iter().map(|root| root.certificate.pem()).collect();
        std::fs::write(self.dir.path().join("roots.pem"), pem).expect("written");
    }

    fn config(&self) -> Config {
        let mut config = Config::default();
        config.identity.istio = Some(IstioCa {
            address: self.address.clone(),
            roots: self.dir.path().join("roots.pem"),
            token_file: self.dir.path().join("token"),
            cluster_id: "c1".into(),
        });
        config
    }

    fn open(&self) -> Istio {
        let config = self.config();
        let ca = config.identity.istio.clone().expect("set");
        Istio::open(&config, &ca).expect("opens")
    }
}

/// A certificate for the address, as istiod has one for its service.
fn server(root: &Signer) -> Arc<rustls::ServerConfig> {
    let key = rcgen::KeyPair::generate().expect("a key");
    let names = vec![SanType::IpAddress([127, 0, 0, 1].into())];
    let leaf = root.sign(&key, names, Duration::from_secs(3600));
    let mut tls = rustls::ServerConfig::builder_with_provider(PROVIDER.clone())
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(
            vec![leaf.der().clone()],
            PrivateKeyDer::Pkcs8(key.serialize_der().into()),
        )
        .expect("a certificate");
    tls.alpn_protocols = vec![H2.to_vec()];
    Arc::new(tls)
}

fn sign(
    way: Way,
    root: &Signer,
    seen: &Mutex<Vec<(String, String, CertificateRequest)>>,
    call: Call,
    answers: &Answers,
) -> double::Ending {
    assert_eq!(call.path, CREATE);
    let header = |name: &str| call.headers[name].to_str().expect("ASCII").to_owned();
    let request = CertificateRequest::decode(call.message).expect("a request");
    let asked = request.metadata.as_ref().expect("metadata");
    let name = asked.fields["ImpersonatedIdentity"].string_value.clone();
    let name = name.expect("a name");
    let life = Duration::from_secs(request.validity_duration as u64);
    let csr = CertificateSigningRequestParams::from_pem(&request.csr).expect("a CSR");
    let entry = (header("authorization"), header("clusterid"), request);
    seen.lock().expect("no panic").push(entry);
    let pem = |leaf: rcgen::Certificate| vec![leaf.pem(), root.certificate.pem()];
    let other = rcgen::KeyPair::generate().expect("a key");
    let cert_chain = match way {
        Way::Refuses(code) => return Err((code, "as asked".into())),
        Way::Signs => pem(root.sign(&csr.public_key, uri(&name), life)),
        Way::ForAnother => {
            let another = uri("spiffe://cluster.local/ns/shop/sa/admin");
            pem(root.sign(&csr.public_key, another, life))
        }
        Way::OtherKey => pem(root.sign(&other, uri(&name), life)),
        Way::Expired => pem(root.sign(&csr.public_key, uri(&name), Duration::from_secs(30))),
        Way::Unknown => pem(Signer::new("nobody").sign(&csr.public_key, uri(&name), life)),
        Way::Empty => Vec::new(),
        Way::Garbage => {
            vec!["-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".into()]
        }
    };
    answers.send(&CertificateResponse { cert_chain });
    Ok(())
}

#[tokio::test]
async fn a_workload_gets_a_certificate_for_a_key_that_is_made_here() {
    let double = Double::new().await;
    let identities = Identities::open(&double.config(), "node1").expect("opens");
    let id: SpiffeId = CART.parse().expect("valid");
    assert!(identities.get(&id, "u1").expect("asked for").is_none());
    let round = identities.renew(SystemTime::now()).await;
    assert!(
        round.fresh && round.problem.is_none(),
        "{:?}",
        round.problem
    );
    let credentials = identities.get(&id, "u1").expect("asked").expect("there");
    let (key, chain) = credentials.signing();
    // The root is not sent to peers.
    assert_eq!((chain.len(), key.is_some()), (1, true));
    let day = Duration::from_secs(24 * 3600);
    let half = SystemTime::now() + day / 2;
    assert!(credentials.renew_at() < half && credentials.renew_at() > half - day / 8);
    {
        let seen = double.seen.lock().expect("no panic");
        let (bearer, cluster, request) = &seen[0];
        assert_eq!((bearer.as_str(), cluster.as_str()), ("Bearer first", "c1"));
        assert_eq!(request.validity_duration, 24 * 3600);
        assert!(!request.csr.contains("PRIVATE"));
    }
    // The kubelet replaces the token; the next call shows the new one.
    std::fs::write(double.dir.path().join("token"), "second").expect("written");
    let before = credentials.fingerprint();
    identities.renew(half + Duration::from_secs(1)).await;
    assert_ne!(credentials.fingerprint(), before);
    {
        let seen = double.seen.lock().expect("no panic");
        assert_eq!(seen[1].0, "Bearer second");
        assert_ne!(seen[1].2.csr, seen[0].2.csr);
    }
    let refused = identities.jwt_svid(&id, "shop").await.expect_err("none");
    assert!(refused.to_string().contains("no JWT-SVIDs"));
    assert!(identities.jwks().is_none());
}

#[tokio::test]
async fn what_cannot_be_used_is_refused_and_told() {
    let double = Double::new().await;
    let istio = double.open();
    let id: SpiffeId = CART.parse().expect("valid");
    for (way, expected) in [
        (Way::ForAnother, "sa/admin"),
        (Way::OtherKey, "another key"),
        (Way::Expired, "expired"),
        (Way::Unknown, "UnknownIssuer"),
        (Way::Empty, "no certificate"),
        (Way::Garbage, "cannot be used"),
        (Way::Refuses(16), "CA_TRUSTED_NODE_ACCOUNTS"),
        (Way::Refuses(7), "run on this node"),
        (Way::Refuses(14), "Unavailable"),
    ] {
        *double.way.lock().expect("no panic") = way;
        let refused = istio.issue(&id, SystemTime::now()).await.err();
        let refused = refused.unwrap_or_else(|| panic!("{way:?}")).to_string();
        assert!(refused.contains(expected), "{way:?}: {refused}");
        assert!(!refused.contains("first"), "{refused}");
    }
    *double.way.lock().expect("no panic") = Way::Signs;
    istio
        .issue(&id, SystemTime::now())
        .await
        .expect("signs again");
}

#[tokio::test]
async fn the_roots_are_followed_and_nobody_else_is_believed() {
    let double = Double::new().await;
    let istio = double.open();
    let id: SpiffeId = CART.parse().expect("valid");
    let old = double.root();
    let new = Arc::new(Signer::new("another root"));
    *double.root.lock().expect("no panic") = new.clone();
    let refused = istio
        .issue(&id, SystemTime::now())
        .await
        .err()
        .expect("refused");
    assert!(refused.to_string().contains("certificate"), "{refused}");
    assert!(
        double.seen.lock().expect("no panic").is_empty(),
        "no token was shown"
    );
    // Both, while the mesh goes from one to the other.
    double.write_roots(&[&old, &new]);
    istio.keep().expect("read");
    assert_eq!(istio.bundle().roots(), 2);
    istio.issue(&id, SystemTime::now()).await.expect("signs");
    // A file that holds none leaves the last good ones.
    double.write_roots(&[]);
    assert!(istio.keep().is_err());
    assert_eq!(istio.bundle().roots(), 2);
    istio.issue(&id, SystemTime::now()).await.expect("signs");
}

#[tokio::test]
async fn a_ca_that_is_away_leaves_what_there_is() {
    let double = Double::new().await;
    let mut config = double.config();
    let identities = Identities::open(&config, "node1").expect("opens");
    let id: SpiffeId = CART.parse().expect("valid");
    identities.get(&id, "u1").expect("asked for");
    identities.renew(SystemTime::now()).await;
    let credentials = identities.get(&id, "u1").expect("asked").expect("there");
    *double.way.lock().expect("no panic") = Way::Refuses(14);
    let before = credentials.fingerprint();
    let round = identities.renew(credentials.renew_at()).await;
    assert!(round.problem.is_some_and(|p| p.contains("Unavailable")));
    assert_eq!(credentials.fingerprint(), before);
    // Nothing listens at all.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("binds");
    let free = taken.local_addr().expect("bound");
    drop(taken);
    let ca = config.identity.istio.as_mut().expect("set");
    ca.address = format!("https://{free}");
    let ca = ca.clone();
    let away = Istio::open(&config, &ca).expect("opens");
    let refused = away
        .issue(&id, SystemTime::now())
        .await
        .err()
        .expect("away");
    assert!(refused.to_string().contains("refused"), "{refused}");
}

#[test]
fn what_is_configured_wrongly_is_named() {
    let dir = tempfile::tempdir().expect("directory");
    let root = Signer::new("root");
    let roots = dir.path().join("roots.pem");
    std::fs::write(&roots, root.certificate.pem()).expect("written");
    let good = IstioCa {
        address: "https://istiod.istio-system.svc:15012".into(),
        roots,
        token_file: "/nowhere".into(),
        cluster_id: "Kubernetes".into(),
    };
    let open = |ca: &IstioCa| Istio::open(&Config::default(), ca);
    let istio = open(&good).expect("opens");
    assert_eq!(
        (istio.host.as_str(), istio.port),
        ("istiod.istio-system.svc", 15012)
    );
    for (ca, expected) in [
        (
            IstioCa {
                address: "http://a:1".into(),
                ..good.clone()
            },
            "address",
        ),
        (
            IstioCa {
                address: "https://a:1/path".into(),
                ..good.clone()
            },
            "address",
        ),
        (
            IstioCa {
                roots: "/nowhere".into(),
                ..good.clone()
            },
            "/nowhere",
        ),
        (
            IstioCa {
                cluster_id: "\n".into(),
                ..good.clone()
            },
            "clusterId",
        ),
    ] {
        let error = open(&ca)
            .map(|_opened| ())
            .expect_err("refused")
            .to_string();
        assert!(
            error.contains("identity.istio") && error.contains(expected),
            "{error}"
        );
    }
    let mut config = Config::default();
    config.identity.istio = Some(good);
    config.identity.root_key = Some("/root.key".into());
    let error = Identities::open(&config, "n")
        .err()
        .expect("refused")
        .to_string();
    assert!(
        error.contains("identity.istio and identity.rootKey"),
        "{error}"
    );
}
