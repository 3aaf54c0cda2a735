//! Which client asks, and how it proves that (RFC 6749 2.3, RFC 7523, RFC 8705,
//! draft-ietf-oauth-spiffe-client-auth).
//!
//! One request uses one method, and a client only those that it is registered for. All
//! refusals read the same. Fail-closed: a file that cannot be read, a store that is away
//! or a chain that does not verify refuses.

use std::{
    net::IpAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use argon2::{
    Argon2,
    password_hash::{PasswordHasher as _, PasswordVerifier as _, phc::PasswordHash},
};
use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use http::{StatusCode, header};
use moka::sync::Cache;
use rustls::{
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, UnixTime, pem::PemObject as _},
};
use serde_json::{Map, Value, json};
use tokio::sync::Semaphore;
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};
use x509_parser::extensions::GeneralName;
use zeroize::Zeroizing;

use super::{
    Server,
    clients::{Authentication, Client},
    error::{Code, OAuthError},
    keys::hash,
    request::{Asker, Form},
};
use crate::{
    identity::peer_identity,
    jwt::{Expected, KeySet, LEEWAY, Token, json as strict_json},
};

/// RFC 7523 2.2.
const JWT_BEARER: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";
/// draft-ietf-oauth-spiffe-client-auth.
const JWT_SPIFFE: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-spiffe";
/// Longest life of an assertion that is still ahead, seconds.
const ASSERTION: u64 = 600;
/// Most certificates of `x5c`.
const MAX_CHAIN: usize = 8;
/// Secrets that are verified at once: each takes memory and a core.
const VERIFYING: usize = 4;
/// Longest wait for a place among them.
const PLACE: Duration = Duration::from_secs(5);
/// Failures in a minute: of one client at one address...
const FAILURES: u32 = 10;
/// ... and of one address.
const ADDRESS_FAILURES: u32 = 100;
/// Most counters that are kept; the oldest go first.
const COUNTERS: u64 = 100_000;
/// How long a secret that was right is known without another argon2.
const REMEMBER: Duration = Duration::from_secs(60);

pub const METHODS: [&str; 7] = [
    "client_secret_basic",
    "client_secret_post",
    "private_key_jwt",
    "tls_client_auth",
    "self_signed_tls_client_auth",
    "spiffe_jwt",
    "none",
];

/// A client that proved who it is; a public one only said so.
#[derive(Debug)]
pub struct Authenticated {
    pub client: Client,
    pub method: &'static str,
}

/// Slows down who guesses. In memory, so each replica counts by itself.
pub struct Guard {
    verifying: Arc<Semaphore>,
    /// By the minute and a hash of whom.
    failures: Cache<(u64, String), Arc<AtomicU32>>,
    /// Hashes of a registered hash and a secret that fits.
    right: Cache<String, ()>,
    /// What secrets of unknown clients are compared with, so that they take as long.
    nobody: String,
}

impl Guard {
    pub fn new() -> Self {
        let nobody = hash_secret("no client has this one").expect("the system has randomness");
        Self {
            verifying: Arc::new(Semaphore::new(VERIFYING)),
            failures: Cache::builder()
                .max_capacity(COUNTERS)
                .time_to_live(Duration::from_secs(120))
                .build(),
            right: Cache::builder()
                .max_capacity(10_000)
                .time_to_live(REMEMBER)
                .build(),
            nobody,
        }
    }

    fn counters(&self, id: &str, address: Option<IpAddr>, now: u64) -> [(Arc<AtomicU32>, u32); 2] {
        let address = network(address);
        let of = |whom: String| {
            let key = (now / 60, hash(&whom));
            self.failures.get_with(key, Arc::default)
        };
        [
            (of(format!("client {address} {id}")), FAILURES),
            (of(format!("address {address}")), ADDRESS_FAILURES),
        ]
    }

    fn check(counters: &[(Arc<AtomicU32>, u32)], now: u64) -> Result<(), OAuthError> {
        match counters
            .iter()
            .any(|(count, most)| count.load(Ordering::Relaxed) >= *most)
        {
            false => Ok(()),
            true => Err(OAuthError::client("too many failures")
                .with_status(StatusCode::TOO_MANY_REQUESTS)
                .with_retry_after(60 - now % 60)),
        }
    }

    /// Whether a secret fits a registered hash; never without one.
    async fn fits(
        &self,
        registered: Option<&str>,
        secret: Zeroizing<String>,
        counters: &[(Arc<AtomicU32>, u32)],
        now: u64,
    ) -> Result<bool, OAuthError> {
        let known = registered.map(|registered| hash(&format!("{registered} {}", *secret)));
        if let Some(known) = &known
            && self.right.contains_key(known)
        {
            return Ok(true);
        }
        let place = tokio::time::timeout(PLACE, self.verifying.clone().acquire_owned()).await;
        let Ok(Ok(place)) = place else {
            let busy = OAuthError::new(Code::TemporarilyUnavailable, "try again later");
            return Err(busy.with_detail("too many secrets to verify"));
        };
        // Guesses that waited together are not all tried.
        Self::check(counters, now)?;
        let compared = registered.unwrap_or(&self.nobody).to_owned();
        let fits = tokio::task::spawn_blocking(move || {
            let _place = place;
            let parsed = PasswordHash::new(&compared).ok();
            parsed.is_some_and(|hash| {
                let verified = Argon2::default().verify_password(secret.as_bytes(), &hash);
                verified.is_ok()
            })
        })
        .await
        .unwrap_or(false);
        match known {
            Some(known) if fits => {
                self.right.insert(known, ());
                Ok(true)
            }
            _ => Ok(false),
        }
    }
}

impl Default for Guard {
    fn default() -> Self {
        Self::new()
    }
}

/// A proof that is being looked at. Dropped before anything else is said of it, it counts
/// as a failure: who hangs up meanwhile has guessed, too.
struct Attempt<'a> {
    counters: &'a [(Arc<AtomicU32>, u32)],
    counts: bool,
}

impl Attempt<'_> {
    /// It was right, or nothing was found out.
    fn spare(&mut self) {
        self.counts = false;
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        if self.counts {
            for (count, _most) in self.counters {
                count.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// An IPv6 address stands for its /64: that is what one customer has.
fn network(address: Option<IpAddr>) -> String {
    match address.map(|address| address.to_canonical()) {
        Some(IpAddr::V6(address)) => format!("{:x?}", &address.segments()[..4]),
        Some(address) => address.to_string(),
        None => String::new(),
    }
}

/// argon2id in PHC form, as the configuration and the store keep it.
pub fn hash_secret(secret: &str) -> Result<String, argon2::password_hash::Error> {
    let hash = Argon2::default().hash_password(secret.as_bytes())?;
    Ok(hash.to_string())
}

/// What a request brought.
enum Proof<'a> {
    Secret(Zeroizing<String>, &'static str),
    Assertion {
        jwt: &'a str,
        spiffe: bool,
    },
    /// Nothing in the request; perhaps a certificate.
    Connection,
}

/// The client of a request.
pub async fn authenticate(
    server: &Server,
    asker: &Asker,
    form: &Form,
) -> Result<Authenticated, OAuthError> {
    let header = asker.header(header::AUTHORIZATION)?;
    let refused = |error: OAuthError| match (header, error.code) {
        // RFC 6749 5.2: whoever used the header is told what it takes.
        (Some(_), Code::InvalidClient) => {
            error.with_challenge(r#"Basic realm="postern", charset="UTF-8""#)
        }
        _ => error,
    };
    let (id, proof) = read(header, form).map_err(refused)?;
    let now = server.clock.seconds();
    let counters = server.guard.counters(&id, asker.address, now);
    Guard::check(&counters, now).map_err(refused)?;
    let client = server.client(&id).await?;
    let mut attempt = Attempt {
        counters: &counters,
        counts: true,
    };
    match prove(server, asker, client.as_ref(), &proof, &counters).await {
        Ok(method) => {
            attempt.spare();
            match client {
                Some(client) => Ok(Authenticated { client, method }),
                None => Err(refused(OAuthError::client("unknown client"))),
            }
        }
        Err(error) => {
            if error.code != Code::InvalidClient || error.status() != StatusCode::UNAUTHORIZED {
                attempt.spare();
            }
            // Whoever is not registered is not named: it may be a secret.
            Err(refused(error.of_client(client.map(|client| client.id))))
        }
    }
}

/// Finds out who it says it is, and that it proves it in one way.
fn read<'a>(header: Option<&str>, form: &'a Form) -> Result<(String, Proof<'a>), OAuthError> {
    let secret = form.get("client_secret");
    let assertion = form.get("client_assertion");
    let kind = form.get("client_assertion_type");
    let named = form.get("client_id");
    let ways = [header.is_some(), secret.is_some(), assertion.is_some()];
    if ways.into_iter().filter(|used| *used).count() > 1 {
        return Err(OAuthError::request("more than one way to authenticate"));
    }
    if assertion.is_some() != kind.is_some() {
        let why = "client_assertion and client_assertion_type belong together";
        return Err(OAuthError::request(why));
    }
    let same = |id: &str| match named {
        Some(named) if named != id => Err(OAuthError::request("client_id is another client's")),
        _ => Ok(()),
    };
    if let Some(header) = header {
        let (id, secret) = basic(header).ok_or_else(|| OAuthError::client("malformed header"))?;
        same(&id)?;
        return Ok((id, Proof::Secret(secret, "client_secret_basic")));
    }
    if let Some(jwt) = assertion {
        let spiffe = match kind {
            Some(JWT_BEARER) => false,
            Some(JWT_SPIFFE) => true,
            _ => return Err(OAuthError::request("client_assertion_type is not known")),
        };
        // Unproven: it only says whose keys to look for.
        let claims = part(jwt, 1).ok_or_else(|| OAuthError::client("malformed assertion"))?;
        let subject = claims.get("sub").and_then(Value::as_str);
        let subject = subject.ok_or_else(|| OAuthError::client("assertion without sub"))?;
        let id = match (spiffe, named) {
            // A workload's client id may be another than its SPIFFE ID.
            (true, Some(named)) => named,
            _ => subject,
        };
        same(id)?;
        return Ok((id.to_owned(), Proof::Assertion { jwt, spiffe }));
    }
    let id = named.ok_or_else(|| OAuthError::client("no client_id"))?;
    let proof = match secret {
        Some(secret) => Proof::Secret(Zeroizing::new(secret.to_owned()), "client_secret_post"),
        None => Proof::Connection,
    };
    Ok((id.to_owned(), proof))
}

/// RFC 6749 2.3.1: both parts are form-encoded before they are joined.
fn basic(header: &str) -> Option<(String, Zeroizing<String>)> {
    let (scheme, encoded) = header.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("Basic") {
        return None;
    }
    let joined = Zeroizing::new(STANDARD.decode(encoded.trim()).ok()?);
    let joined = std::str::from_utf8(&joined).ok()?;
    let (id, secret) = joined.split_once(':')?;
    let decode = |text: &str| {
        let spaced = text.replace('+', " ");
        let decoded = percent_encoding::percent_decode_str(&spaced).decode_utf8();
        decoded.ok().map(|text| text.into_owned())
    };
    Some((decode(id)?, Zeroizing::new(decode(secret)?)))
}

/// The method's name, if it is one of the client's and proves it.
async fn prove(
    server: &Server,
    asker: &Asker,
    client: Option<&Client>,
    proof: &Proof<'_>,
    counters: &[(Arc<AtomicU32>, u32)],
) -> Result<&'static str, OAuthError> {
    let refused = |why: &str| Err(OAuthError::client(why));
    let way = client.map(|client| &client.authentication);
    match (proof, way) {
        (Proof::Secret(secret, method), way) => {
            let registered = match way {
                Some(Authentication::ClientSecret { secret_hash }) => Some(secret_hash.as_str()),
                _ => None,
            };
            let now = server.clock.seconds();
            let fits = server
                .guard
                .fits(registered, secret.clone(), counters, now)
                .await?;
            match (fits, registered) {
                (true, _) => Ok(method),
                (false, Some(_)) => refused("wrong secret"),
                (false, None) => refused("unknown client, or one without a secret"),
            }
        }
        (_, None) => refused("unknown client"),
        (
            Proof::Assertion { jwt, spiffe: false },
            Some(Authentication::PrivateKeyJwt { jwks_file }),
        ) => {
            let keys = key_set(jwks_file).await?;
            assertion(server, jwt, &keys, client.map_or("", |c| &c.id)).await?;
            Ok("private_key_jwt")
        }
        (Proof::Assertion { jwt, spiffe: false }, Some(Authentication::Workload { spiffe_id })) => {
            let keys = certified_keys(server, jwt, spiffe_id)?;
            assertion(server, jwt, &keys, client.map_or("", |c| &c.id)).await?;
            Ok("private_key_jwt")
        }
        (Proof::Assertion { jwt, spiffe: true }, Some(Authentication::Workload { spiffe_id })) => {
            svid(server, jwt, spiffe_id)?;
            Ok("spiffe_jwt")
        }
        (Proof::Connection, Some(Authentication::None {})) => Ok("none"),
        (Proof::Connection, Some(Authentication::Workload { spiffe_id })) => {
            let leaf = chain(server, &asker.certificates)?;
            match is_workload(leaf, spiffe_id) {
                true => Ok("tls_client_auth"),
                false => refused("the certificate is another workload's"),
            }
        }
        (Proof::Connection, Some(Authentication::TlsClientAuth { san_dns, san_uri })) => {
            let leaf = chain(server, &asker.certificates)?;
            match has_name(leaf, san_dns.as_deref(), san_uri.as_deref()) {
                true => Ok("tls_client_auth"),
                false => refused("the certificate has another name"),
            }
        }
        (Proof::Connection, Some(Authentication::SelfSignedTls { certificate_file })) => {
            let Some(leaf) = asker.certificates.first() else {
                return refused("no certificate");
            };
            let known = certificates(certificate_file).await?;
            match known.contains(leaf) {
                true => Ok("self_signed_tls_client_auth"),
                false => refused("the certificate is not registered"),
            }
        }
        _ => refused("not a method of this client"),
    }
}

/// RFC 7523 3, once its keys are known.
async fn assertion(
    server: &Server,
    jwt: &str,
    keys: &KeySet,
    client: &str,
) -> Result<(), OAuthError> {
    let refused = |why: &'static str| OAuthError::client(why);
    let token = Token::parse(jwt).map_err(|e| OAuthError::client(e.to_string()))?;
    let expected = Expected {
        issuer: Some(client),
        audiences: &[],
        space_delimited: &[],
    };
    let claims = token
        .verify(expected, Some(keys), server.clock.now())
        .map_err(|e| OAuthError::client(e.to_string()))?;
    let header = part(jwt, 0).ok_or_else(|| refused("malformed"))?;
    let payload = part(jwt, 1).ok_or_else(|| refused("malformed"))?;
    if !has_type(&header, &["jwt", "client-authentication+jwt"]) {
        return Err(refused("the assertion's typ is another token's"));
    }
    if claims.subject() != Some(client) {
        return Err(refused("the assertion's sub is not its iss"));
    }
    // For us and for nobody else: a server that it was also meant for could use it here.
    let ours = [
        server.config.issuer.clone(),
        server.config.endpoint("/token"),
    ];
    let audiences = claims.audiences();
    if audiences.is_empty()
        || !audiences
            .iter()
            .all(|aud| ours.iter().any(|own| own == aud))
    {
        return Err(refused("the assertion's aud is not this server alone"));
    }
    let now = server.clock.seconds();
    let number = |name: &str| payload.get(name).and_then(Value::as_f64).map(|n| n as u64);
    let expires = number("exp").ok_or_else(|| refused("assertion without exp"))?;
    if expires > now + ASSERTION + LEEWAY {
        return Err(refused("the assertion's exp is more than 10 minutes ahead"));
    }
    if number("iat").is_some_and(|issued| issued > now + LEEWAY) {
        return Err(refused("the assertion's iat is ahead"));
    }
    let id = payload.get("jti").and_then(Value::as_str);
    let id = id.ok_or_else(|| refused("assertion without jti"))?;
    let once = hash(&format!("assertion {client} {id}"));
    match server.store.use_id(&once, expires + LEEWAY + 1).await? {
        true => Ok(()),
        false => Err(refused("the assertion was used before").of_reuse()),
    }
}

/// A JWT-SVID that we signed for ourselves. It may be used again while it lasts: agents
/// keep one for all their requests.
fn svid(server: &Server, jwt: &str, spiffe_id: &str) -> Result<(), OAuthError> {
    let refused = |why: &str| OAuthError::client(why);
    let token = Token::parse(jwt).map_err(|e| OAuthError::client(e.to_string()))?;
    let expected = Expected {
        issuer: None,
        audiences: &[],
        space_delimited: &[],
    };
    let keys = server.keys.set();
    let claims = token
        .verify(expected, Some(&keys), server.clock.now())
        .map_err(|e| OAuthError::client(e.to_string()))?;
    let header = part(jwt, 0).ok_or_else(|| refused("malformed"))?;
    if !has_type(&header, &["jwt", "jose"]) || claims.expires().is_none() {
        return Err(refused("not a JWT-SVID"));
    }
    if claims.subject() != Some(spiffe_id) {
        return Err(refused("the JWT-SVID is another workload's"));
    }
    // Another server that it was also meant for could use it here.
    if claims.audiences() != [server.config.issuer.as_str()] {
        return Err(refused("the JWT-SVID is not for this server alone"));
    }
    Ok(())
}

/// A JSON part of a JWT: 0 the header, 1 the claims. Proves nothing.
pub fn part(jwt: &str, index: usize) -> Option<Map<String, Value>> {
    let bytes = URL_SAFE_NO_PAD.decode(jwt.split('.').nth(index)?).ok()?;
    match strict_json::parse(&bytes) {
        Ok(Value::Object(object)) => Some(object),
        _ => None,
    }
}

/// Whether `typ` (RFC 7515 4.1.9) is one of these; absent is `JWT`.
pub fn has_type(header: &Map<String, Value>, types: &[&str]) -> bool {
    let typ = match header.get("typ") {
        None => "jwt".to_owned(),
        Some(Value::String(typ)) => typ.to_ascii_lowercase(),
        Some(_) => return false,
    };
    types.contains(&typ.strip_prefix("application/").unwrap_or(&typ))
}

async fn key_set(path: &Path) -> Result<KeySet, OAuthError> {
    let unusable = |e: &dyn std::fmt::Display| {
        tracing::warn!(path = %path.display(), error = %e, "a client's key set");
        OAuthError::client("its key set cannot be used")
    };
    let text = tokio::fs::read(path).await.map_err(|e| unusable(&e))?;
    KeySet::parse(&text).map_err(|e| unusable(&e))
}

async fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, OAuthError> {
    let unusable = |e: &dyn std::fmt::Display| {
        tracing::warn!(path = %path.display(), error = %e, "a client's certificates");
        OAuthError::client("its certificates cannot be read")
    };
    let pem = tokio::fs::read(path).await.map_err(|e| unusable(&e))?;
    CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .map_err(|e| unusable(&e))
}

/// The key of the certificate in `x5c`, if it is this workload's.
fn certified_keys(server: &Server, jwt: &str, spiffe_id: &str) -> Result<KeySet, OAuthError> {
    let refused = |why: &str| OAuthError::client(why);
    let header = part(jwt, 0).ok_or_else(|| refused("malformed assertion"))?;
    let Some(Value::Array(listed)) = header.get("x5c") else {
        return Err(refused("assertion without x5c"));
    };
    if listed.len() > MAX_CHAIN {
        return Err(refused("too many certificates in x5c"));
    }
    let decode = |value: &Value| {
        let der = value.as_str().and_then(|text| STANDARD.decode(text).ok());
        der.map(CertificateDer::from)
    };
    let listed: Option<Vec<_>> = listed.iter().map(decode).collect();
    let listed = listed.ok_or_else(|| refused("x5c is not a list of certificates"))?;
    let leaf = chain(server, &listed)?;
    if !is_workload(leaf, spiffe_id) {
        return Err(refused("the certificate is another workload's"));
    }
    let jwk = public_key(leaf)
        .ok_or_else(|| refused("the certificate's key is no P-256 or Ed25519 one"))?;
    let set = json!({"keys": [jwk]}).to_string();
    KeySet::parse(set.as_bytes()).map_err(|_| refused("the certificate's key cannot be used"))
}

/// The leaf of a chain that ends at the trust domain's root, now, and is a client's.
fn chain<'a>(
    server: &Server,
    shown: &'a [CertificateDer<'static>],
) -> Result<&'a CertificateDer<'static>, OAuthError> {
    let Some((leaf, above)) = shown.split_first() else {
        return Err(OAuthError::client("no certificate"));
    };
    let refused = |e: webpki::Error| OAuthError::client(format!("certificate: {e}"));
    let anchor = anchor_from_trusted_cert(server.root.certificate()).map_err(refused)?;
    let algorithms = aws_lc_rs::default_provider().signature_verification_algorithms;
    let now = UnixTime::since_unix_epoch(Duration::from_secs(server.clock.seconds()));
    EndEntityCert::try_from(leaf)
        .and_then(|certificate| {
            let usage = KeyUsage::client_auth();
            let anchors = &[anchor];
            certificate
                .verify_for_usage(algorithms.all, anchors, above, now, usage, None, None)
                .map(|_path| ())
        })
        .map_err(refused)?;
    Ok(leaf)
}

fn is_workload(leaf: &CertificateDer<'_>, spiffe_id: &str) -> bool {
    peer_identity(leaf).is_some_and(|id| id.to_string() == spiffe_id)
}

/// RFC 8705 2.1.2. DNS names are compared without case.
fn has_name(leaf: &CertificateDer<'_>, dns: Option<&str>, uri: Option<&str>) -> bool {
    let Ok((_rest, certificate)) = x509_parser::parse_x509_certificate(leaf) else {
        return false;
    };
    let Ok(Some(names)) = certificate.subject_alternative_name() else {
        return false;
    };
    names.value.general_names.iter().any(|name| match name {
        GeneralName::DNSName(name) => dns.is_some_and(|dns| dns.eq_ignore_ascii_case(name)),
        GeneralName::URI(name) => uri == Some(*name),
        _ => false,
    })
}

/// The key of a certificate as a JWK.
fn public_key(certificate: &CertificateDer<'_>) -> Option<Value> {
    let (_rest, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let info = certificate.public_key();
    let bytes: &[u8] = &info.subject_public_key.data;
    let text = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    match info.algorithm.algorithm.to_id_string().as_str() {
        // RFC 8410 3: Ed25519.
        "1.3.101.112" => Some(json!({"kty": "OKP", "crv": "Ed25519", "x": text(bytes)})),
        // RFC 5480 2.1.1, with P-256; SEC 1 2.3.3: 4, then both coordinates.
        "1.2.840.10045.2.1" if bytes.len() == 65 && bytes[0] == 4 => Some(json!({
            "kty": "EC", "crv": "P-256", "x": text(&bytes[1..33]), "y": text(&bytes[33..]),
        })),
        _ => None,
    }
}
