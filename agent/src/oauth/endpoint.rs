//! Where an authorization server gives out tokens: its metadata (RFC 8414, or OIDC
//! Discovery 1.0), taken only from who is meant.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use http::StatusCode;
use moka::sync::Cache;
use serde_json::Value;

use super::{Server, wanted::is_secret_safe};
use crate::{
    fetch::{FetchError, Fetcher, shown},
    jwt::json,
};

/// How long metadata are believed.
const LIFETIME: Duration = Duration::from_secs(3_600);
const ISSUERS: u64 = 256;

#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error("{url}: {why}")]
    Metadata { url: String, why: &'static str },
    /// RFC 8414 3.3: another server's metadata, put in this one's place.
    #[error("{url}: is of issuer `{stated}`, not of `{issuer}`")]
    Issuer {
        url: String,
        stated: String,
        issuer: String,
    },
    #[error("{url}: token_endpoint `{endpoint}` is not https, as its issuer is")]
    Downgrade { url: String, endpoint: String },
}

/// A token endpoint.
#[derive(Clone, Debug)]
pub(super) struct Endpoint {
    pub url: String,
    /// For clients that show a certificate (RFC 8705 5).
    pub mutual_tls: Option<String>,
    /// Audience of what is signed for the server.
    pub audience: String,
}

/// Endpoints that were found, by issuer.
pub(super) struct Endpoints(Cache<String, (Instant, Arc<Endpoint>)>);

impl Endpoints {
    pub fn new() -> Self {
        Self(Cache::new(ISSUERS))
    }

    pub async fn of(
        &self,
        server: &Server,
        fetcher: &Fetcher,
        limit: Duration,
    ) -> Result<Arc<Endpoint>, EndpointError> {
        let issuer = match server {
            Server::Endpoint(url) => {
                return Ok(Arc::new(Endpoint {
                    url: url.clone(),
                    mutual_tls: None,
                    audience: url.clone(),
                }));
            }
            Server::Issuer(issuer) => issuer,
        };
        if let Some((at, known)) = self.0.get(issuer)
            && at.elapsed() < LIFETIME
        {
            return Ok(known);
        }
        let found = Arc::new(discover(issuer, fetcher, limit).await?);
        self.0
            .insert(issuer.clone(), (Instant::now(), found.clone()));
        Ok(found)
    }

    /// It may have moved.
    pub fn forget(&self, server: &Server) {
        if let Server::Issuer(issuer) = server {
            self.0.invalidate(issuer);
        }
    }
}

async fn discover(
    issuer: &str,
    fetcher: &Fetcher,
    limit: Duration,
) -> Result<Endpoint, EndpointError> {
    let mut last = None;
    for url in places(issuer) {
        match fetcher.get(&url, limit).await {
            Ok(document) => return read(issuer, &url, &document.body),
            // It is not there: it may be in the other place.
            Err(error @ FetchError::Status { status, .. })
                if status.is_client_error() && status != StatusCode::TOO_MANY_REQUESTS =>
            {
                last = Some(error);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Err(last.expect("there are two places").into())
}

/// RFC 8414 3.1: between host and path. OIDC Discovery 1.0, 4: behind the path.
fn places(issuer: &str) -> [String; 2] {
    let base = issuer.strip_suffix('/').unwrap_or(issuer);
    let host = base.find("://").map_or(0, |at| at + 3);
    let path = base[host..].find('/').map_or(base.len(), |at| host + at);
    let (authority, path) = base.split_at(path);
    [
        format!("{authority}/.well-known/oauth-authorization-server{path}"),
        format!("{base}/.well-known/openid-configuration"),
    ]
}

fn read(issuer: &str, url: &str, body: &[u8]) -> Result<Endpoint, EndpointError> {
    let wrong = |why| EndpointError::Metadata {
        url: shown(url),
        why,
    };
    let Ok(Value::Object(metadata)) = json::parse(body) else {
        return Err(wrong("is no strict JSON object"));
    };
    let text = |name: &str| metadata.get(name).and_then(Value::as_str);
    let stated = text("issuer").ok_or_else(|| wrong("names no issuer"))?;
    if stated != issuer {
        return Err(EndpointError::Issuer {
            url: shown(url),
            stated: stated.chars().take(200).collect(),
            issuer: issuer.to_owned(),
        });
    }
    let endpoint = text("token_endpoint").ok_or_else(|| wrong("names no token_endpoint"))?;
    let mutual_tls = metadata
        .get("mtls_endpoint_aliases")
        .and_then(|aliases| aliases.get("token_endpoint")?.as_str());
    for endpoint in [Some(endpoint), mutual_tls].into_iter().flatten() {
        // An issuer without TLS is on loopback, and so is what it names, or has TLS.
        let plain = endpoint.starts_with("http://") && !issuer.starts_with("https://");
        let fits = endpoint.starts_with("https://") || plain;
        if !fits || is_secret_safe(endpoint).is_err() {
            return Err(EndpointError::Downgrade {
                url: shown(url),
                endpoint: shown(endpoint).chars().take(200).collect(),
            });
        }
    }
    Ok(Endpoint {
        url: endpoint.to_owned(),
        mutual_tls: mutual_tls.map(str::to_owned),
        audience: issuer.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_are_where_the_rfcs_have_them() {
        for (issuer, expected) in [
            (
                "https://as.example",
                [
                    "https://as.example/.well-known/oauth-authorization-server",
                    "https://as.example/.well-known/openid-configuration",
                ],
            ),
            (
                "https://as.example/a/b/",
                [
                    "https://as.example/.well-known/oauth-authorization-server/a/b",
                    "https://as.example/a/b/.well-known/openid-configuration",
                ],
            ),
        ] {
            assert_eq!(places(issuer), expected);
        }
    }

    #[test]
    fn only_the_servers_own_metadata_are_taken() {
        let issuer = "https://as.example";
        for (body, expected) in [
            (
                r#"{"issuer": "https://as.example", "token_endpoint": "https://as.example/t"}"#,
                "https://as.example/t",
            ),
            (
                r#"{"issuer": "https://as.example/", "token_endpoint": "https://as.example/t"}"#,
                "is of issuer",
            ),
            (
                r#"{"issuer": "https://evil.example", "token_endpoint": "https://as.example/t"}"#,
                "is of issuer `https://evil.example`",
            ),
            (
                r#"{"issuer": "https://as.example", "token_endpoint": "http://as.example/t"}"#,
                "is not https",
            ),
            (
                r#"{"issuer": "https://as.example", "token_endpoint": "http://127.0.0.1/t"}"#,
                "is not https",
            ),
            (r#"{"issuer": "https://as.example"}"#, "no token_endpoint"),
            (
                r#"{"issuer": "https://evil.example", "issuer": "https://as.example", "token_endpoint": "https://e/"}"#,
                "no strict JSON",
            ),
            ("[]", "no strict JSON"),
        ] {
            let said = match read(issuer, "https://as.example/x", body.as_bytes()) {
                Ok(endpoint) => endpoint.url,
                Err(error) => error.to_string(),
            };
            assert!(said.contains(expected), "{said} for {body}");
        }
        let loopback = "http://127.0.0.1:9";
        let body = |endpoint: &str| {
            format!(r#"{{"issuer": "{loopback}", "token_endpoint": "{endpoint}"}}"#)
        };
        let taken = |endpoint: &str| read(loopback, loopback, body(endpoint).as_bytes()).is_ok();
        assert!(taken("http://127.0.0.1:9/t") && taken("https://as.example/t"));
        assert!(!taken("http://as.example/t"));
    }
}
