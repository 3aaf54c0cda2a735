//! Refusals (problem details, RFC 9457), and how requests are read: bounded in size and
//! time, and strict.

use std::time::Duration;

use axum::{
    extract::Request,
    response::{IntoResponse, Response},
};
use http::{HeaderValue, StatusCode, header};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use serde_json::json;
use zeroize::Zeroizing;

use crate::authority::StoreError;

/// Largest request, bytes.
pub const MAX_BODY: usize = 64 << 10;
/// From a request's head to its end.
const BODY: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub struct Problem {
    status: StatusCode,
    /// For programs; an extension member (RFC 9457 3.2).
    pub code: &'static str,
    /// For whoever asked.
    detail: String,
    /// For the audit log: may say more.
    pub reason: String,
}

impl Problem {
    fn new(status: StatusCode, code: &'static str, detail: impl Into<String>) -> Self {
        let detail = detail.into();
        Self {
            status,
            code,
            reason: detail.clone(),
            detail,
        }
    }

    pub fn invalid(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request", detail)
    }

    /// Who asks is not known.
    pub fn unknown(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "invalid_agent", detail)
    }

    pub fn no_proof() -> Self {
        Self::new(
            StatusCode::UNAUTHORIZED,
            "invalid_token",
            "no proof of the node that counts here",
        )
    }

    /// The same words for every such token; why stands in the audit log alone.
    pub fn proof(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            ..Self::new(
                StatusCode::UNAUTHORIZED,
                "invalid_token",
                "the token is unknown, used, expired, or not for this node",
            )
        }
    }

    pub fn denied(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "access_denied", detail)
    }

    pub fn slow_down(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "slow_down", detail)
    }

    /// Who would have to be asked does not answer: the asker comes again.
    pub fn unavailable(reason: impl Into<String>) -> Self {
        let reason = reason.into();
        tracing::warn!(reason, "cannot answer an agent yet");
        Self {
            reason,
            ..Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "temporarily_unavailable",
                "the authority cannot ask the cluster; its log says why",
            )
        }
    }

    /// Ours to mend: the asker learns no more than that.
    pub fn failed(reason: impl Into<String>) -> Self {
        let reason = reason.into();
        tracing::error!(reason, "cannot answer an agent");
        Self {
            reason,
            ..Self::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "server_error",
                "the authority cannot answer; its log says why",
            )
        }
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        Self::failed(error.to_string())
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = json!({
            "title": self.status.canonical_reason().unwrap_or_default(),
            "status": self.status.as_u16(),
            "detail": self.detail,
            "code": self.code,
        });
        let mut response = (self.status, body.to_string()).into_response();
        let headers = response.headers_mut();
        let problem = HeaderValue::from_static("application/problem+json");
        headers.insert(header::CONTENT_TYPE, problem);
        match self.status {
            StatusCode::UNAUTHORIZED if self.code == "invalid_token" => {
                let challenge = HeaderValue::from_static("Bearer");
                headers.insert(header::WWW_AUTHENTICATE, challenge);
            }
            StatusCode::TOO_MANY_REQUESTS => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            _ => {}
        }
        response
    }
}

/// The credentials of `Authorization: Bearer` (RFC 6750 2.1); exactly one such field.
pub fn bearer(request: &Request) -> Result<Zeroizing<String>, Problem> {
    let mut fields = request.headers().get_all(header::AUTHORIZATION).iter();
    let (Some(field), None) = (fields.next(), fields.next()) else {
        return Err(Problem::no_proof());
    };
    let (scheme, token) = field
        .to_str()
        .ok()
        .and_then(|text| text.split_once(' '))
        .ok_or_else(Problem::no_proof)?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(Problem::no_proof());
    }
    Ok(Zeroizing::new(token.trim().to_owned()))
}

/// A JSON body with no member that is not known.
pub async fn read<T: DeserializeOwned>(request: Request) -> Result<T, Problem> {
    let json = request
        .headers()
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| {
            let media = value.split(';').next().unwrap_or_default().trim();
            media.eq_ignore_ascii_case("application/json")
        });
    if !json {
        return Err(Problem::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "invalid_request",
            "the content must be application/json",
        ));
    }
    let body = Limited::new(request.into_body(), MAX_BODY).collect();
    let body = match tokio::time::timeout(BODY, body).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            return Err(Problem::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "invalid_request",
                format!("the content is larger than {MAX_BODY} bytes"),
            ));
        }
        Ok(Err(_broken_off)) => return Err(Problem::invalid("the content broke off")),
        Err(_elapsed) => {
            return Err(Problem::new(
                StatusCode::REQUEST_TIMEOUT,
                "invalid_request",
                "the content took too long",
            ));
        }
    };
    serde_json::from_slice(&body).map_err(|e| {
        // It may quote what was sent.
        let why: String = e.to_string().chars().take(200).collect();
        Problem::invalid(format!("the content: {why}"))
    })
}
