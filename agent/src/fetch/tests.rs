use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{Router, body::Body, response::Redirect, routing::get};
use rcgen::{CertificateParams, KeyPair};
use rustls::{ServerConfig, pki_types::PrivateKeyDer};
use tokio::net::{TcpListener, TcpStream};

use super::{address::Vetted, *};

const LIMIT: Duration = Duration::from_secs(5);

/// Serves HTTP on a port of its own; gives its base URL.
pub(crate) async fn serve(routes: Router) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("binds");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(axum::serve(listener, routes).into_future());
    format!("http://{address}")
}

/// A listener that speaks TLS first.
struct Tls {
    tcp: TcpListener,
    acceptor: tokio_rustls::TlsAcceptor,
}

impl axum::serve::Listener for Tls {
    type Io = tokio_rustls::server::TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, SocketAddr) {
        loop {
            let (tcp, address) = self.tcp.accept().await.expect("accepts");
            if let Ok(tls) = self.acceptor.accept(tcp).await {
                return (tls, address);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.tcp.local_addr()
    }
}

/// Serves HTTPS as `localhost`; gives its base URL and writes its root into a file.
pub(crate) async fn serve_tls(routes: Router, directory: &Path) -> (String, PathBuf) {
    let key = KeyPair::generate().expect("a key");
    let params = CertificateParams::new(vec!["localhost".to_owned()]).expect("a name");
    let certificate = params.self_signed(&key).expect("signs");
    let roots = directory.join("roots.pem");
    std::fs::write(&roots, certificate.pem()).expect("writes");
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::try_from(key.serialize_der()).expect("PKCS #8"),
        )
        .expect("a certificate");
    let tcp = TcpListener::bind("127.0.0.1:0").await.expect("binds");
    let port = tcp.local_addr().expect("bound").port();
    let acceptor = Arc::new(config).into();
    tokio::spawn(axum::serve(Tls { tcp, acceptor }, routes).into_future());
    (format!("https://localhost:{port}"), roots)
}

fn fetcher() -> Fetcher {
    Fetcher::new(None).expect("no file to read")
}

#[tokio::test]
async fn gets_the_document_and_its_lifetime() {
    let headers = [("cache-control", "public, Max-Age=90"), ("age", "30")];
    let base = serve(Router::new().route("/keys", get(move || async move { (headers, "{}") })));
    let got = fetcher()
        .get(&format!("{}/keys?a=b", base.await), LIMIT)
        .await;
    let got = got.expect("fetches");
    assert_eq!(&got.body[..], b"{}");
    assert_eq!(got.lifetime, Some(Duration::from_secs(60)));
}

#[tokio::test]
async fn trusts_the_roots_of_the_file_only_if_given() {
    let directory = tempfile::tempdir().expect("a directory");
    let routes = Router::new().route("/", get(|| async { "{}" }));
    let (url, roots) = serve_tls(routes, directory.path()).await;
    let trusting = Fetcher::new(Some(&roots)).expect("reads");
    let got = trusting.get(&url, LIMIT).await.expect("fetches");
    assert_eq!((&got.body[..], got.lifetime), (&b"{}"[..], None));
    // The certificate is for another name than this one.
    let other = url.replace("localhost", "127.0.0.1");
    assert!(trusting.get(&other, LIMIT).await.is_err());
    let error = fetcher()
        .get(&url, LIMIT)
        .await
        .expect_err("unknown issuer");
    assert!(error.to_string().contains("certificate"), "{error}");
}

#[test]
fn a_file_without_roots_is_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("roots.pem");
    for text in [
        None,
        Some("nothing"),
        Some("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
    ] {
        if let Some(text) = text {
            std::fs::write(&path, text).expect("writes");
        }
        let error = Fetcher::new(Some(&path)).expect_err("no roots").to_string();
        assert!(error.contains("roots.pem"), "{error}");
    }
}

#[tokio::test]
async fn takes_no_redirect_no_error_and_nothing_large() {
    let large = || async { Body::from(vec![b' '; MAX_BODY + 1]) };
    let routes = Router::new()
        .route("/moved", get(|| async { Redirect::temporary("/full") }))
        .route("/full", get(|| async { Body::from(vec![b' '; MAX_BODY]) }))
        .route("/large", get(large));
    let base = serve(routes).await;
    let get = async |path: &str| fetcher().get(&format!("{base}{path}"), LIMIT).await;
    let moved = get("/moved").await.expect_err("a redirect");
    assert!(matches!(moved, FetchError::Status { status, .. } if status == 307));
    let none = get("/none?secret").await.expect_err("404").to_string();
    assert!(none.contains("/none: answered 404") && !none.contains("secret"));
    assert!(matches!(
        get("/large").await,
        Err(FetchError::TooLarge { .. })
    ));
    assert_eq!(get("/full").await.expect("fits").body.len(), MAX_BODY);
}

#[tokio::test]
async fn the_limit_is_for_head_and_body() {
    let stalled = || async {
        let chunks = futures_util::stream::once(async { Ok::<_, std::io::Error>("{") });
        let never = futures_util::stream::pending();
        Body::from_stream(futures_util::StreamExt::chain(chunks, never))
    };
    let routes = Router::new()
        .route("/head", get(std::future::pending::<&'static str>))
        .route("/body", get(stalled));
    let base = serve(routes).await;
    for path in ["/head", "/body"] {
        let begun = Instant::now();
        let limit = Duration::from_millis(100);
        let error = fetcher().get(&format!("{base}{path}"), limit).await;
        assert!(matches!(error, Err(FetchError::Timeout { .. })), "{path}");
        assert!(begun.elapsed() < LIMIT, "{path}");
    }
}

#[tokio::test]
async fn wrong_urls_are_named_without_secrets() {
    for (url, shown, why) in [
        ("ftp://a/b?s3cret", "ftp://a/b: ", "neither"),
        ("/b?s3cret", "/b: ", "neither"),
        ("https://u:s3cret@a/b", "https://a/b: ", "credentials"),
        ("https://a b/", "https://a b/: ", "not a URL"),
        (
            "testing@secure.istio.io",
            "testing@secure.istio.io: ",
            "neither",
        ),
    ] {
        let error = fetcher().get(url, LIMIT).await.expect_err(url).to_string();
        assert!(error.starts_with(shown) && error.contains(why), "{error}");
        assert!(!error.contains("s3cret"), "{error}");
    }
}

#[tokio::test]
async fn refused_addresses_are_not_connected_to() {
    for host in [
        "169.254.169.254",
        "0.0.0.0",
        "224.0.0.1",
        "100.100.100.200",
        "[fe80::1]",
        "[::]",
        "[ff02::1]",
        "[fd00:ec2::254]",
        "[::ffff:169.254.169.254]",
        "[64:ff9b::169.254.169.254]",
    ] {
        let url = format!("http://{host}/latest?token");
        let error = fetcher().get(&url, LIMIT).await.expect_err(host);
        assert!(
            matches!(error, FetchError::RefusedAddress { .. }),
            "{error}"
        );
    }
    // Forms that only the resolver reads: inet_aton's.
    for host in ["0xa9fea9fe", "2852039166"] {
        let error = fetcher().get(&format!("http://{host}/"), LIMIT).await;
        assert!(
            matches!(error, Err(FetchError::RefusedAddress { .. })),
            "{host}: {error:?}"
        );
    }
}

#[tokio::test]
async fn names_of_refused_addresses_are_not_connected_to() {
    let base = serve(Router::new().route("/", get(|| async { "{}" }))).await;
    let port = base.rsplit_once(':').expect("a port").1;
    let named = format!("http://keys.example:{port}/");
    let link_local: SocketAddr = ([169, 254, 169, 254], 0).into();
    let local: SocketAddr = ([127, 0, 0, 1], 0).into();
    let fetcher = |addresses| Fetcher::with_names(None, Vetted::fixed(addresses)).expect("roots");
    let error = fetcher(vec![link_local]).get(&named, LIMIT).await;
    let error = error.expect_err("link-local");
    assert!(
        matches!(error, FetchError::RefusedAddress { address, .. } if address == link_local.ip()),
        "{error}"
    );
    let mixed = fetcher(vec![link_local, local]).get(&named, LIMIT).await;
    assert_eq!(&mixed.expect("the other one").body[..], b"{}");
}

#[test]
fn ordinary_addresses_are_not_refused() {
    for text in [
        "10.0.0.1",
        "127.0.0.1",
        "::1",
        "2001:db8::1",
        "fd00::1",
        "64:ff9b::8.8.8.8",
    ] {
        assert!(!refused(text.parse().expect("an address")), "{text}");
    }
}
