//! Reads one source's document, wherever it is.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use serde::Deserialize;
use tokio::{io::AsyncReadExt as _, sync::mpsc};

use super::RemoteKeys;
use crate::{
    fetch::{FetchError, Fetched, Fetcher, MAX_BODY, shown},
    jwt::KeySetError,
};

/// Why a source gave no keys. All but `File` are its server's doing.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error("{path}: {source}")]
    File {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{url}: {source}")]
    Discovery {
        url: String,
        source: serde_json::Error,
    },
    #[error("{url}: is of issuer `{stated}`, not of `{issuer}`")]
    Issuer {
        url: String,
        stated: String,
        issuer: String,
    },
    #[error("{url}: jwks_uri `{jwks_uri}` is not https, as its issuer is")]
    Downgrade { url: String, jwks_uri: String },
    #[error("{0}")]
    Keys(#[from] KeySetError),
}

#[derive(Debug)]
pub enum Origin {
    Url { url: String, timeout: Duration },
    Discovery { issuer: String, timeout: Duration },
    File(PathBuf),
}

/// OpenID Provider Metadata (OIDC Discovery 1.0, section 3), as far as it is used.
#[derive(Deserialize)]
struct Metadata {
    issuer: String,
    jwks_uri: String,
}

impl Origin {
    pub fn new(from: &RemoteKeys, files: &HashMap<String, PathBuf>) -> Self {
        match from.clone() {
            RemoteKeys::Url { url, timeout } => Self::Url { url, timeout },
            RemoteKeys::Discovery { issuer, timeout } => match files.get(&issuer) {
                Some(path) => Self::File(path.clone()),
                None => Self::Discovery { issuer, timeout },
            },
        }
    }

    pub fn file(&self) -> Option<&Path> {
        match self {
            Self::File(path) => Some(path),
            Self::Url { .. } | Self::Discovery { .. } => None,
        }
    }

    pub async fn read(&self, fetcher: &Fetcher) -> Result<Fetched, SourceError> {
        match self {
            Self::Url { url, timeout } => Ok(fetcher.get(url, *timeout).await?),
            Self::Discovery { issuer, timeout } => {
                let url = discover(fetcher, issuer, *timeout).await?;
                Ok(fetcher.get(&url, *timeout).await?)
            }
            Self::File(path) => match read_file(path).await {
                Ok(body) => Ok(Fetched {
                    body,
                    lifetime: None,
                }),
                Err(source) => Err(SourceError::File {
                    path: path.clone(),
                    source,
                }),
            },
        }
    }
}

/// An issuer's `jwks_uri` (OIDC Discovery 1.0, 4.1 to 4.3).
async fn discover(
    fetcher: &Fetcher,
    issuer: &str,
    timeout: Duration,
) -> Result<String, SourceError> {
    let base = issuer.strip_suffix('/').unwrap_or(issuer);
    let url = format!("{base}/.well-known/openid-configuration");
    let document = fetcher.get(&url, timeout).await?;
    let url = shown(&url);
    let metadata: Metadata = match serde_json::from_slice(&document.body) {
        Ok(metadata) => metadata,
        Err(source) => return Err(SourceError::Discovery { url, source }),
    };
    if metadata.issuer != issuer {
        return Err(SourceError::Issuer {
            url,
            stated: metadata.issuer,
            issuer: issuer.to_owned(),
        });
    }
    let has_scheme = |text: &str, scheme: &str| {
        text.get(..scheme.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(scheme))
    };
    if !has_scheme(issuer, "http://") && !has_scheme(&metadata.jwks_uri, "https://") {
        return Err(SourceError::Downgrade {
            url,
            jwks_uri: shown(&metadata.jwks_uri),
        });
    }
    Ok(metadata.jwks_uri)
}

/// A file's content, as large as a fetched document may be.
async fn read_file(path: &Path) -> std::io::Result<Bytes> {
    let limit = MAX_BODY as u64;
    let file = tokio::fs::File::open(path).await?;
    let mut body = Vec::new();
    file.take(limit + 1).read_to_end(&mut body).await?;
    if body.len() > MAX_BODY {
        let why = format!("larger than the {MAX_BODY} bytes that are read");
        return Err(std::io::Error::other(why));
    }
    Ok(body.into())
}

/// Tells of changes in a file's directory: files are often replaced, not written.
pub fn watch(path: &Path, changed: mpsc::Sender<()>) -> notify::Result<RecommendedWatcher> {
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Our own reading is no change.
        if !event.is_ok_and(|event| event.kind.is_access()) {
            let _due = changed.try_send(());
        }
    })?;
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    watcher.watch(directory, RecursiveMode::NonRecursive)?;
    Ok(watcher)
}
