//! ProtectedResource, compiled: what is told to clients (`challenge`, metadata), and
//! what is asked of tokens beside the rules that verify them.

mod challenge;

use std::{path::Path, sync::Arc};

use http::{Method, Uri};
use serde_json::{Map, Value, json};

pub use challenge::Scheme;

use super::{
    compile::{Mesh, Wrong},
    evaluate::{Facts, PolicyRef},
    normalize::normalize,
    schema::{self, BoundTo},
    selected::Level,
};
use crate::{
    config::Normalization,
    introspect::Endpoint,
    jwt::{Algorithm, Claims, Confirmation, Demands},
    request::Request,
};

/// RFC 9728 3.
const WELL_KNOWN: &str = "/.well-known/oauth-protected-resource";
/// An answer of an authorization server holds no longer than this, in seconds.
const LONGEST_CACHE: u64 = 3600;
/// A request waits no longer than this for an authorization server, in seconds.
const LONGEST_TIMEOUT: u64 = 30;

/// A compiled ProtectedResource.
#[derive(Debug)]
pub struct ProtectedResource {
    pub policy: PolicyRef,
    pub(super) level: Level,
    identifier: Option<Identifier>,
    scopes: Vec<String>,
    access_tokens: bool,
    binding: BoundTo,
    pub nonce: bool,
    pub introspection: Option<Introspection>,
}

#[derive(Debug)]
pub struct Introspection {
    pub endpoint: Arc<Endpoint>,
    /// JWTs, too, once a rule has verified them.
    pub always: bool,
    pub forward_original: bool,
}

/// What follows from the resource identifier.
#[derive(Debug)]
struct Identifier {
    text: String,
    uri: Uri,
    /// Where clients find the metadata (RFC 9728 3.1).
    metadata_url: String,
    /// Paths, normalized, at which the agent tells it.
    metadata_paths: Vec<String>,
    metadata: String,
}

/// Why a token is not taken from this sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unproven {
    #[error("the token is bound to a key: send it with the DPoP scheme and a proof")]
    SentAsBearer,
    #[error("the token is not bound to the key of the DPoP proof")]
    OtherKey,
    #[error("the token is not bound to a key, and was sent with the DPoP scheme")]
    NoKey,
    #[error("the token is bound to another certificate than the peer's")]
    OtherCertificate,
    #[error("the token is bound in a way that is not known here")]
    Unknown,
    #[error("the token is not bound, and must be")]
    Unbound,
}

impl ProtectedResource {
    pub(super) fn new(
        policy: PolicyRef,
        level: Level,
        spec: schema::ProtectedResource,
        mesh: &Mesh<'_>,
    ) -> Result<Self, Wrong> {
        let scopes: Vec<String> = spec.scopes.0.into_iter().map(|scope| scope.0).collect();
        let servers: Vec<String> = (spec.authorization_servers.0.into_iter())
            .map(|url| url.0)
            .collect();
        let identifier = match spec.resource {
            Some(url) => Some(Identifier::new(
                url.0,
                &servers,
                &scopes,
                spec.tokens.binding,
                mesh.requests.normalization,
            )?),
            None if !servers.is_empty() => {
                return Err(Wrong {
                    field: "spec.resource",
                    message: "is missing: authorizationServers are told as its metadata".into(),
                });
            }
            None => None,
        };
        let asked = spec.introspection;
        let asked = asked.map(|asked| introspection(asked, mesh.secrets, &policy.namespace));
        let introspection = asked.transpose()?;
        Ok(Self {
            policy,
            level,
            identifier,
            scopes,
            access_tokens: spec.tokens.kind.is_some(),
            binding: spec.tokens.binding,
            nonce: spec.tokens.nonce,
            introspection,
        })
    }

    /// What rules that verify tokens have to heed.
    pub fn demands(&self) -> Demands {
        Demands {
            access_tokens: self.access_tokens,
            scp: true,
        }
    }

    /// Whether it takes every token that a rule verifies, however it is sent.
    pub fn takes_what_rules_take(&self) -> bool {
        !self.access_tokens && self.binding == BoundTo::Any && self.introspection.is_none()
    }

    /// The metadata document, where a request asks for it. The path is normalized.
    pub fn metadata(&self, method: &str, path: &str) -> Option<&str> {
        let identifier = self.identifier.as_ref()?;
        let asked = [Method::GET.as_str(), Method::HEAD.as_str()].contains(&method)
            && identifier.metadata_paths.iter().any(|own| own == path);
        asked.then_some(&identifier.metadata)
    }

    /// Whether this may be what the sender of a proof calls the target of a request
    /// (RFC 9449 4.3): scheme and authority are the resource identifier's, where it
    /// has one, for what is around the application may have changed the request's own.
    /// Otherwise the authority is the request's, and the scheme is not compared.
    pub fn is_target(
        &self,
        htu: &str,
        request: &Request<'_>,
        path: &str,
        normalization: Normalization,
    ) -> bool {
        if !htu.bytes().all(|b| b.is_ascii_graphic()) || htu.contains(['\\', '"']) {
            return false;
        }
        // Without its fragment; the parser drops that.
        let Ok(told) = htu.parse::<Uri>() else {
            return false;
        };
        let Some(authority) = Authority::of(&told) else {
            return false;
        };
        let own = match &self.identifier {
            Some(identifier) => {
                if told.scheme_str() != identifier.uri.scheme_str() {
                    return false;
                }
                Authority::of(&identifier.uri)
            }
            // The same scheme, so that a port that is left out means the same.
            None => format!("{}://{}/", authority.scheme, request.host)
                .parse::<Uri>()
                .ok()
                .and_then(|uri| Authority::of(&uri)),
        };
        let path_fits = normalize(told.path(), normalization).is_ok_and(|told| told.path == path);
        path_fits && own == Some(authority)
    }

    /// Whether the sender has proven what the token is bound to, and it is bound as it
    /// must be. `key` is the thumbprint of the key that the request was proven with.
    pub fn proven(
        &self,
        claims: &Claims,
        facts: &Facts,
        key: Option<[u8; 32]>,
    ) -> Result<(), Unproven> {
        let all = claims.confirmations();
        let has = |kind: fn(&Confirmation) -> bool| all.iter().any(kind);
        for one in &all {
            match one {
                Confirmation::Key(thumbprint) => match key {
                    None => return Err(Unproven::SentAsBearer),
                    Some(key) if key != *thumbprint => return Err(Unproven::OtherKey),
                    Some(_) => {}
                },
                Confirmation::Certificate(digest) if facts.certificate != Some(*digest) => {
                    return Err(Unproven::OtherCertificate);
                }
                Confirmation::Certificate(_) => {}
                Confirmation::Other => return Err(Unproven::Unknown),
            }
        }
        let by_key = has(|one| matches!(one, Confirmation::Key(_)));
        let by_certificate = has(|one| matches!(one, Confirmation::Certificate(_)));
        if key.is_some() && !by_key {
            return Err(Unproven::NoKey);
        }
        let fits = match self.binding {
            BoundTo::Any => true,
            BoundTo::Dpop => by_key,
            BoundTo::Certificate => by_certificate,
            BoundTo::Either => by_key || by_certificate,
        };
        match fits {
            true => Ok(()),
            false => Err(Unproven::Unbound),
        }
    }
}

/// An authority with the port that its scheme means.
#[derive(Debug, PartialEq, Eq)]
struct Authority {
    scheme: &'static str,
    host: String,
    port: u16,
}

impl Authority {
    /// `None`: not of http or https, or with credentials.
    fn of(uri: &Uri) -> Option<Self> {
        let (scheme, default) = match uri.scheme_str()? {
            "https" => ("https", 443),
            "http" => ("http", 80),
            _ => return None,
        };
        let authority = uri.authority()?;
        let host = authority.host();
        if authority.as_str().contains('@') || host.is_empty() {
            return None;
        }
        let port = match authority.port() {
            Some(port) => port.as_str().parse().ok()?,
            // Something may stand there that is no port.
            None if authority.as_str() == host => default,
            None => return None,
        };
        Some(Self {
            scheme,
            host: host.to_ascii_lowercase(),
            port,
        })
    }
}

impl Identifier {
    fn new(
        text: String,
        servers: &[String],
        scopes: &[String],
        binding: BoundTo,
        normalization: Normalization,
    ) -> Result<Self, Wrong> {
        let wrong = |message: String| Wrong {
            field: "spec.resource",
            message,
        };
        let uri: Uri = text.parse().map_err(|_| wrong("is no URL".into()))?;
        let authority = uri.authority().map_or("", |authority| authority.as_str());
        // RFC 9728 3.1: a slash that stands alone is left out.
        let path = Some(uri.path())
            .filter(|path| *path != "/")
            .unwrap_or_default();
        let inserted = format!("{WELL_KNOWN}{path}");
        let normal = normalize(&inserted, normalization).map_err(|e| wrong(e.to_string()))?;
        let mut metadata_paths = vec![normal.path.into_owned()];
        if !path.is_empty() {
            metadata_paths.push(WELL_KNOWN.to_owned());
        }
        let mut members = Map::new();
        let mut tell = |name: &str, value: Value| members.insert(name.to_owned(), value);
        tell("resource", json!(text));
        if !servers.is_empty() {
            tell("authorization_servers", json!(servers));
        }
        if !scopes.is_empty() {
            tell("scopes_supported", json!(scopes));
        }
        tell("bearer_methods_supported", json!(["header"]));
        let algorithms: Vec<&str> = Algorithm::ALL.iter().map(|a| a.name()).collect();
        tell("dpop_signing_alg_values_supported", json!(algorithms));
        tell(
            "dpop_bound_access_tokens_required",
            json!(binding == BoundTo::Dpop),
        );
        // RFC 9728 2: whether they are supported, not whether they are required.
        tell("tls_client_certificate_bound_access_tokens", json!(true));
        Ok(Self {
            metadata_url: format!("https://{authority}{inserted}"),
            metadata_paths,
            metadata: Value::Object(members).to_string(),
            text,
            uri,
        })
    }
}

fn introspection(
    spec: schema::Introspection,
    secrets: &Path,
    namespace: &str,
) -> Result<Introspection, Wrong> {
    let bounded = |field: &'static str, span: std::time::Duration, longest: u64| match span
        .as_secs_f64()
        <= longest as f64
    {
        true => Ok(span),
        false => Err(Wrong {
            field,
            message: format!("is longer than {longest}s"),
        }),
    };
    if spec.client_authentication.needs_jwt_svid() {
        return Err(Wrong {
            field: "spec.introspection.clientAuthentication",
            message: "spiffeJwt is for token requests; use privateKeyJwt, tlsClientAuth or clientSecretBasic".into(),
        });
    }
    Ok(Introspection {
        endpoint: Arc::new(Endpoint {
            url: spec.endpoint.0,
            issuer: spec.issuer.0,
            client_id: spec.client_id.0,
            authentication: (spec.client_authentication)
                .below(secrets, namespace)
                .map_err(|message| Wrong {
                    field: "spec.introspection.clientAuthentication",
                    message,
                })?,
            audiences: spec.audiences.0.into_iter().map(|text| text.0).collect(),
            cache: bounded("spec.introspection.cache", spec.cache.0, LONGEST_CACHE)?,
            timeout: bounded(
                "spec.introspection.timeout",
                spec.timeout.0,
                LONGEST_TIMEOUT,
            )?,
        }),
        always: spec.always,
        forward_original: spec.forward_original_token,
    })
}
