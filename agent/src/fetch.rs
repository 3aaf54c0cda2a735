//! Small exchanges by HTTP and HTTPS: key sets and what leads to them, and forms
//! that authorization servers answer. Policy names the URLs, so an answer is never
//! followed elsewhere, and no name leads to a node's metadata service: what is
//! connected to is what was looked at.

mod address;
#[cfg(test)]
pub(crate) mod tests;

use std::{
    error::Error,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use rustls::{
    ClientConfig, RootCertStore,
    client::ResolvesClientCert,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, pem::PemObject as _},
};
use zeroize::Zeroizing;

use address::{RefusedAddress, Vetted, refused};

/// Largest document, bytes.
pub const MAX_BODY: usize = 1 << 20;
/// Largest head of an answer, bytes.
const MAX_HEAD: usize = 64 << 10;

/// Why the roots that servers are trusted under could not be read: configuration.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {message}")]
pub struct RootsError {
    pub path: PathBuf,
    pub message: String,
}

/// URLs in errors are without credentials and query, which may be secrets.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("{url}: {why}")]
    Url { url: String, why: &'static str },
    #[error("{url}: {address} is link-local, a metadata service or no host's address")]
    RefusedAddress { url: String, address: IpAddr },
    #[error("{url}: {message}")]
    Exchange { url: String, message: String },
    #[error("{url}: no answer within {limit:?}")]
    Timeout { url: String, limit: Duration },
    #[error("{url}: answered {status}, only 200 is taken")]
    Status { url: String, status: StatusCode },
    #[error("{url}: larger than {MAX_BODY} bytes")]
    TooLarge { url: String },
}

/// A document, and how long its server says that it holds.
#[derive(Clone, Debug)]
pub struct Fetched {
    pub body: Bytes,
    /// `Cache-Control: max-age` less `Age` (RFC 9111 4.2).
    pub lifetime: Option<Duration>,
}

/// An answer of any status.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

/// Made when it is first needed.
type Lazy<T> = LazyLock<T, Box<dyn FnOnce() -> T + Send>>;

type HttpsClient = Client<HttpsConnector<HttpConnector<Vetted>>, Full<Bytes>>;

/// One connection a request; clones share the roots.
#[derive(Clone, Debug)]
pub struct Fetcher {
    client: Arc<Lazy<HttpsClient>>,
}

impl Fetcher {
    /// Trusts the system's roots, or Mozilla's where the system has none, and
    /// those of a PEM file besides.
    pub fn new(more_roots: Option<&Path>) -> Result<Self, RootsError> {
        Ok(Self::build(
            &Trust::new(more_roots)?,
            None,
            Vetted::system(),
        ))
    }

    /// Trusts these roots, and has no certificate to show.
    pub fn with_trust(trust: &Trust) -> Self {
        Self::build(trust, None, Vetted::system())
    }

    /// Shows servers that ask for it this certificate (RFC 8705 2).
    pub fn with_certificate(trust: &Trust, certificate: Arc<dyn ResolvesClientCert>) -> Self {
        Self::build(trust, Some(certificate), Vetted::system())
    }

    #[cfg(test)]
    fn with_names(more_roots: Option<&Path>, names: Vetted) -> Result<Self, RootsError> {
        Ok(Self::build(&Trust::new(more_roots)?, None, names))
    }

    fn build(
        trust: &Trust,
        certificate: Option<Arc<dyn ResolvesClientCert>>,
        names: Vetted,
    ) -> Self {
        let trust = trust.clone();
        let make = move || client(&trust, certificate, names);
        Self {
            client: Arc::new(Lazy::new(Box::new(make))),
        }
    }

    /// Fetches one document; `limit` is for all of it, name lookup included.
    pub async fn get(&self, url: &str, limit: Duration) -> Result<Fetched, FetchError> {
        let request =
            http::Request::get(checked(url)?).header(header::ACCEPT, "application/json, */*;q=0.1");
        let answer = self.exchange(url, request, Bytes::new(), limit).await?;
        if answer.status != StatusCode::OK {
            return Err(FetchError::Status {
                url: shown(url),
                status: answer.status,
            });
        }
        Ok(Fetched {
            lifetime: lifetime(&answer.headers),
            body: answer.body,
        })
    }

    /// Sends a form (`application/x-www-form-urlencoded`), and gives any answer.
    pub async fn post_form(
        &self,
        url: &str,
        form: &[(&str, &str)],
        headers: &[(HeaderName, HeaderValue)],
        limit: Duration,
    ) -> Result<Answer, FetchError> {
        let body = form_urlencoded::Serializer::new(String::new())
            .extend_pairs(form)
            .finish();
        const FORM: &str = "application/x-www-form-urlencoded";
        // It may hold tokens and assertions.
        let body = Bytes::from_owner(Zeroizing::new(body.into_bytes()));
        self.post(url, FORM, body, headers, limit).await
    }

    pub async fn post(
        &self,
        url: &str,
        content_type: &'static str,
        body: Bytes,
        headers: &[(HeaderName, HeaderValue)],
        limit: Duration,
    ) -> Result<Answer, FetchError> {
        let mut request = http::Request::post(checked(url)?)
            .header(header::ACCEPT, "application/json")
            .header(header::CONTENT_TYPE, content_type);
        for (name, value) in headers {
            request = request.header(name, value);
        }
        self.exchange(url, request, body, limit).await
    }

    async fn exchange(
        &self,
        url: &str,
        request: http::request::Builder,
        body: Bytes,
        limit: Duration,
    ) -> Result<Answer, FetchError> {
        match tokio::time::timeout(limit, self.send(url, request, body)).await {
            Ok(result) => result,
            Err(_elapsed) => Err(FetchError::Timeout {
                url: shown(url),
                limit,
            }),
        }
    }

    async fn send(
        &self,
        url: &str,
        request: http::request::Builder,
        body: Bytes,
    ) -> Result<Answer, FetchError> {
        let failed = |error: &(dyn Error + 'static)| match refusal(error) {
            Some(&RefusedAddress(address)) => FetchError::RefusedAddress {
                url: shown(url),
                address,
            },
            None => FetchError::Exchange {
                url: shown(url),
                message: causes(error),
            },
        };
        let request = request
            .header(
                header::USER_AGENT,
                concat!("postern/", env!("CARGO_PKG_VERSION")),
            )
            .body(Full::new(body))
            .expect("its parts are valid");
        let answer = self.client.request(request).await.map_err(|e| failed(&e))?;
        let (head, body) = answer.into_parts();
        let body = Limited::new(body, MAX_BODY).collect().await.map_err(|e| {
            if e.is::<LengthLimitError>() {
                FetchError::TooLarge { url: shown(url) }
            } else {
                failed(&*e)
            }
        })?;
        Ok(Answer {
            status: head.status,
            headers: head.headers,
            body: body.to_bytes(),
        })
    }
}

fn client(
    trust: &Trust,
    certificate: Option<Arc<dyn ResolvesClientCert>>,
    names: Vetted,
) -> HttpsClient {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let tls = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("the provider has suites of both versions")
        .with_root_certificates(trust.roots());
    let tls = match certificate {
        Some(certificate) => tls.with_client_cert_resolver(certificate),
        None => tls.with_no_client_auth(),
    };
    let mut tcp = HttpConnector::new_with_resolver(names);
    tcp.enforce_http(false);
    let connector = HttpsConnectorBuilder::new()
        .with_tls_config(tls)
        .https_or_http()
        .enable_http1()
        .wrap_connector(tcp);
    // Minutes pass between two fetches: no connection is kept.
    Client::builder(TokioExecutor::new())
        .pool_max_idle_per_host(0)
        .http1_max_buf_size(MAX_HEAD)
        .build(connector)
}

/// The roots that servers are trusted under.
#[derive(Clone, Debug)]
pub struct Trust(Arc<Lazy<Arc<RootCertStore>>>);

impl Trust {
    /// The system's roots, or Mozilla's where the system has none, and those of a PEM
    /// file besides. The system's are read when they are first needed.
    pub fn new(more: Option<&Path>) -> Result<Self, RootsError> {
        let mut own = RootCertStore::empty();
        if let Some(path) = more {
            add_file(&mut own, path)?;
        }
        Ok(Self::made(move || {
            let mut store = system_roots();
            store.extend(own.roots.iter().cloned());
            store
        }))
    }

    /// Those of a PEM file and no others.
    pub fn only(path: &Path) -> Result<Self, RootsError> {
        let mut store = RootCertStore::empty();
        add_file(&mut store, path)?;
        Ok(Self::made(move || store))
    }

    fn made(make: impl FnOnce() -> RootCertStore + Send + 'static) -> Self {
        Self(Arc::new(Lazy::new(Box::new(|| Arc::new(make())))))
    }

    pub fn roots(&self) -> Arc<RootCertStore> {
        Arc::clone(&self.0)
    }
}

/// A URL as it may be told to people: without credentials, query and fragment.
pub fn shown(url: &str) -> String {
    let bare = url.split(['?', '#']).next().unwrap_or_default();
    let Some((scheme, rest)) = bare.split_once("://") else {
        return bare.to_owned();
    };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let host = authority
        .rsplit_once('@')
        .map_or(authority, |(_, host)| host);
    format!("{scheme}://{host}{path}")
}

/// The URL's parts, if it is one that can be fetched.
fn checked(url: &str) -> Result<Uri, FetchError> {
    let wrong = |why| FetchError::Url {
        url: shown(url),
        why,
    };
    let uri: Uri = url.parse().map_err(|_e| wrong("not a URL"))?;
    if !matches!(uri.scheme_str(), Some("http" | "https")) {
        return Err(wrong("neither an http nor an https URL"));
    }
    let authority = uri.authority().ok_or_else(|| wrong("names no host"))?;
    if authority.as_str().contains('@') {
        return Err(wrong("credentials in a URL are not sent"));
    }
    // The connector asks no resolver for these.
    let host = authority.host();
    let literal = host.trim_start_matches('[').trim_end_matches(']');
    match literal.parse() {
        Ok(address) if refused(address) => Err(FetchError::RefusedAddress {
            url: shown(url),
            address,
        }),
        _ if host.is_empty() => Err(wrong("names no host")),
        _ => Ok(uri),
    }
}

fn system_roots() -> RootCertStore {
    let mut store = RootCertStore::empty();
    let native = rustls_native_certs::load_native_certs();
    for error in native.errors {
        tracing::warn!(%error, "a root of the system cannot be read");
    }
    // Systems hold old roots that do not parse; the others serve.
    store.add_parsable_certificates(native.certs);
    if store.is_empty() {
        store.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    }
    store
}

/// Adds the certificates of a PEM file; at least one.
fn add_file(store: &mut RootCertStore, path: &Path) -> Result<(), RootsError> {
    let wrong = |message: String| RootsError {
        path: path.to_owned(),
        message,
    };
    let listed: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|e| wrong(e.to_string()))?;
    if listed.is_empty() {
        return Err(wrong("holds no PEM certificate".into()));
    }
    for der in listed {
        let usable = store.add(der);
        usable.map_err(|e| wrong(format!("not usable as a root: {e}")))?;
    }
    Ok(())
}

/// The refused address among an error's causes.
fn refusal<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a RefusedAddress> {
    std::iter::successors(Some(error), |&e| e.source()).find_map(|e| e.downcast_ref())
}

/// An error with all its causes: the last one says what happened.
pub(crate) fn causes(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    for cause in std::iter::successors(error.source(), |&e| e.source()) {
        let cause = cause.to_string();
        if !text.ends_with(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

/// How much longer the answer is fresh, where its server says so (RFC 9111 4.2).
fn lifetime(headers: &HeaderMap) -> Option<Duration> {
    let max_age = headers
        .get_all(header::CACHE_CONTROL)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .find_map(|directive| {
            let (name, value) = directive.trim().split_once('=')?;
            let seconds = value.trim().trim_matches('"').parse::<u64>().ok();
            seconds.filter(|_| name.eq_ignore_ascii_case("max-age"))
        })?;
    let age = headers
        .get(header::AGE)
        .and_then(|value| value.to_str().ok()?.trim().parse::<u64>().ok())
        .unwrap_or(0);
    Some(Duration::from_secs(max_age.saturating_sub(age)))
}
