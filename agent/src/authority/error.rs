//! Errors as RFC 6749 5.2 has them, and the RFCs that add codes to it. Descriptions are
//! ours alone: nothing that was sent is repeated.

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use http::{HeaderValue, StatusCode, header};
use serde_json::json;

use super::{StoreError, keys::KeysError};
use crate::jwt::SigningKeyError;

/// Seconds after which a client may try again when the store is away.
const RETRY: u64 = 5;

/// Error codes, and what they mean here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    InvalidRequest,
    InvalidClient,
    InvalidGrant,
    UnauthorizedClient,
    UnsupportedGrantType,
    InvalidScope,
    /// RFC 8707 2.
    InvalidTarget,
    /// RFC 9449 5.
    InvalidDpopProof,
    /// RFC 6750 3.1.
    InvalidToken,
    InsufficientScope,
    /// Ours: the store is away, or there is too much to do.
    TemporarilyUnavailable,
    ServerError,
}

impl Code {
    pub fn name(self) -> &'static str {
        match self {
            Self::InvalidRequest => "invalid_request",
            Self::InvalidClient => "invalid_client",
            Self::InvalidGrant => "invalid_grant",
            Self::UnauthorizedClient => "unauthorized_client",
            Self::UnsupportedGrantType => "unsupported_grant_type",
            Self::InvalidScope => "invalid_scope",
            Self::InvalidTarget => "invalid_target",
            Self::InvalidDpopProof => "invalid_dpop_proof",
            Self::InvalidToken => "invalid_token",
            Self::InsufficientScope => "insufficient_scope",
            Self::TemporarilyUnavailable => "temporarily_unavailable",
            Self::ServerError => "server_error",
        }
    }
}

/// A refusal.
#[derive(Debug, thiserror::Error)]
#[error("{}: {description}", .code.name())]
pub struct OAuthError {
    pub code: Code,
    /// For the client.
    pub description: &'static str,
    /// For the audit log alone; empty: nothing beyond the description.
    pub detail: String,
    status: StatusCode,
    challenge: Option<&'static str>,
    retry_after: Option<u64>,
    /// It is a replay.
    pub reuse: bool,
    /// The registered client that it is about, if one was found.
    pub client: Option<String>,
}

impl OAuthError {
    pub fn new(code: Code, description: &'static str) -> Self {
        let status = match code {
            Code::InvalidClient | Code::InvalidToken => StatusCode::UNAUTHORIZED,
            Code::InsufficientScope => StatusCode::FORBIDDEN,
            Code::TemporarilyUnavailable => StatusCode::SERVICE_UNAVAILABLE,
            Code::ServerError => StatusCode::INTERNAL_SERVER_ERROR,
            _ => StatusCode::BAD_REQUEST,
        };
        Self {
            code,
            description,
            detail: String::new(),
            status,
            challenge: None,
            retry_after: (code == Code::TemporarilyUnavailable).then_some(RETRY),
            reuse: false,
            client: None,
        }
    }

    pub fn request(description: &'static str) -> Self {
        Self::new(Code::InvalidRequest, description)
    }

    pub fn grant(description: &'static str) -> Self {
        Self::new(Code::InvalidGrant, description)
    }

    /// The same sentence for every reason: who guesses learns nothing from it.
    pub fn client(detail: impl Into<String>) -> Self {
        Self {
            detail: detail.into(),
            ..Self::new(Code::InvalidClient, "client authentication failed")
        }
    }

    pub fn with_status(self, status: StatusCode) -> Self {
        Self { status, ..self }
    }

    pub fn with_detail(self, detail: impl Into<String>) -> Self {
        Self {
            detail: detail.into(),
            ..self
        }
    }

    /// `WWW-Authenticate`.
    pub fn with_challenge(self, challenge: &'static str) -> Self {
        Self {
            challenge: Some(challenge),
            ..self
        }
    }

    pub fn with_retry_after(self, seconds: u64) -> Self {
        Self {
            retry_after: Some(seconds),
            ..self
        }
    }

    pub fn of_client(self, client: Option<String>) -> Self {
        Self { client, ..self }
    }

    pub fn status(&self) -> StatusCode {
        self.status
    }

    pub fn of_reuse(self) -> Self {
        Self {
            reuse: true,
            ..self
        }
    }

    /// Why, for the operator.
    pub fn reason(&self) -> String {
        match self.detail.as_str() {
            "" => self.description.to_owned(),
            detail => format!("{}: {detail}", self.description),
        }
    }
}

impl From<StoreError> for OAuthError {
    fn from(error: StoreError) -> Self {
        tracing::warn!(%error, "the store does not answer");
        Self::new(Code::TemporarilyUnavailable, "try again later")
    }
}

impl From<SigningKeyError> for OAuthError {
    fn from(error: SigningKeyError) -> Self {
        tracing::error!(%error, "cannot sign");
        Self::new(Code::ServerError, "cannot sign")
    }
}

impl From<KeysError> for OAuthError {
    fn from(error: KeysError) -> Self {
        tracing::error!(%error, "signing keys");
        Self::new(Code::ServerError, "cannot sign")
    }
}

impl IntoResponse for OAuthError {
    fn into_response(self) -> Response {
        let body = json!({
            "error": self.code.name(),
            "error_description": self.description,
        });
        let mut response = (self.status, no_store(), Json(body)).into_response();
        let headers = response.headers_mut();
        if let Some(challenge) = self.challenge {
            let value = HeaderValue::from_static(challenge);
            headers.insert(header::WWW_AUTHENTICATE, value);
        }
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        response
    }
}

/// RFC 6749 5.1: nobody keeps an answer that holds a token.
pub fn no_store() -> [(header::HeaderName, &'static str); 2] {
    [
        (header::CACHE_CONTROL, "no-store"),
        (header::PRAGMA, "no-cache"),
    ]
}
