//! Values of a provider's configuration, each checked where it is parsed.

use std::{collections::BTreeMap, net::IpAddr, num::NonZeroU16};

use http::{HeaderName, HeaderValue, StatusCode};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::headers::framing;

/// A DNS name or an IP address.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Host(String);

impl Host {
    /// `host:port` as a URL has it.
    pub fn authority(&self, port: NonZeroU16) -> String {
        if self.0.contains(':') {
            format!("[{}]:{port}", self.0)
        } else {
            format!("{}:{port}", self.0)
        }
    }
}

impl TryFrom<String> for Host {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let literal = text.strip_prefix('[').and_then(|t| t.strip_suffix(']'));
        if let Ok(address) = literal.unwrap_or(&text).parse::<IpAddr>() {
            return Ok(Self(address.to_string()));
        }
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && label
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        };
        let name = text.strip_suffix('.').unwrap_or(&text);
        if name.len() <= 253 && name.split('.').all(label) {
            return Ok(Self(text));
        }
        Err(format!(
            "`{text}` is neither a DNS name nor an IP address; namespaces and ports are not part of it"
        ))
    }
}

impl From<Host> for String {
    fn from(host: Host) -> Self {
        host.0
    }
}

/// The status of refusals that are no decision of the provider: 400 to 599.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(try_from = "StatusText", into = "String")]
#[schemars(with = "String")]
pub struct ErrorStatus(pub StatusCode);

impl Default for ErrorStatus {
    fn default() -> Self {
        Self(StatusCode::FORBIDDEN)
    }
}

/// Istio writes it as a string; YAML without quotes makes it a number.
#[derive(Deserialize)]
#[serde(untagged)]
enum StatusText {
    Number(u16),
    Text(String),
}

impl TryFrom<StatusText> for ErrorStatus {
    type Error = String;

    fn try_from(text: StatusText) -> Result<Self, String> {
        let number = match &text {
            StatusText::Number(number) => Some(*number),
            StatusText::Text(text) => text.parse().ok(),
        };
        match number.map(StatusCode::from_u16) {
            Some(Ok(status)) if status.is_client_error() || status.is_server_error() => {
                Ok(Self(status))
            }
            _ => Err("must be an HTTP status from 400 to 599".into()),
        }
    }
}

impl From<ErrorStatus> for String {
    fn from(status: ErrorStatus) -> Self {
        status.0.as_str().to_owned()
    }
}

/// A path that others are put behind.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct PathPrefix(String);

impl PathPrefix {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for PathPrefix {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let parsed = text.parse::<http::uri::PathAndQuery>();
        // A query would swallow the path behind it.
        if text.starts_with('/') && parsed.is_ok_and(|p| p.path() == text) {
            return Ok(Self(text));
        }
        Err(format!("`{text}` is not a path such as /check"))
    }
}

impl From<PathPrefix> for String {
    fn from(prefix: PathPrefix) -> Self {
        prefix.0
    }
}

/// Headers with values that are always the same.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(
    try_from = "BTreeMap<String, String>",
    into = "BTreeMap<String, String>"
)]
#[schemars(with = "BTreeMap<String, String>")]
pub struct FixedHeaders(pub Vec<(HeaderName, HeaderValue)>);

impl TryFrom<BTreeMap<String, String>> for FixedHeaders {
    type Error = String;

    fn try_from(map: BTreeMap<String, String>) -> Result<Self, String> {
        let header = |(name, value): (String, String)| {
            let parsed =
                HeaderName::try_from(&name).map_err(|_e| format!("`{name}` is no header name"))?;
            if framing(&parsed) {
                return Err(format!("`{name}` cannot be set"));
            }
            match HeaderValue::try_from(value) {
                Ok(value) => Ok((parsed, value)),
                Err(_) => Err(format!("the value of `{name}` is no header value")),
            }
        };
        map.into_iter()
            .map(header)
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

impl From<FixedHeaders> for BTreeMap<String, String> {
    fn from(headers: FixedHeaders) -> Self {
        headers
            .0
            .into_iter()
            .map(|(name, value)| {
                let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
                (name.to_string(), value)
            })
            .collect()
    }
}
