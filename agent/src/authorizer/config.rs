//! Extension providers as Istio's mesh configuration writes them
//! (`MeshConfig.ExtensionProvider`), parsed into values that cannot be wrong.

use std::{collections::BTreeMap, net::IpAddr, num::NonZeroU16};

use http::{HeaderName, HeaderValue, StatusCode};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, de};

use super::headers::Pattern;
use crate::config::Span;

/// A service that AuthorizationPolicies with the action CUSTOM name.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(try_from = "Fields", into = "Fields")]
#[schemars(with = "Fields")]
pub struct ExtensionProvider {
    pub name: String,
    pub kind: Kind,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    Grpc(GrpcProvider),
    Http(HttpProvider),
}

/// As it is written: exactly one of the kinds.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Fields {
    /// Name that policies use (`provider.name`).
    name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    envoy_ext_authz_grpc: Option<GrpcProvider>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    envoy_ext_authz_http: Option<HttpProvider>,
}

/// A server of `envoy.service.auth.v3.Authorization`.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct GrpcProvider {
    pub service: Host,
    pub port: NonZeroU16,
    /// For the whole check. Istio's default of 600s would hold requests for minutes.
    #[serde(default = "default_timeout")]
    pub timeout: Span,
    /// Whether what cannot be checked is allowed: no answer, or none that can be read.
    #[serde(default)]
    pub fail_open: bool,
    /// What is answered instead, when it is not allowed.
    #[serde(default)]
    pub status_on_error: ErrorStatus,
    #[serde(default, skip_serializing, deserialize_with = "no_body")]
    #[schemars(skip)]
    pub include_request_body_in_check: (),
}

/// A server that is asked with the request's own method and path.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct HttpProvider {
    pub service: Host,
    pub port: NonZeroU16,
    /// For the whole check. Istio's default of 600s would hold requests for minutes.
    #[serde(default = "default_timeout")]
    pub timeout: Span,
    /// Whether what cannot be checked is allowed: no answer, or a status of 5xx.
    #[serde(default)]
    pub fail_open: bool,
    /// What is answered instead, when it is not allowed.
    #[serde(default)]
    pub status_on_error: ErrorStatus,
    /// Put before the request's path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_prefix: Option<PathPrefix>,
    /// The request's headers that are sent besides `Host` and `Authorization`:
    /// names, `prefix*` or `*suffix`.
    #[serde(default)]
    pub include_request_headers_in_check: Vec<Pattern>,
    /// Further headers of the check; they replace the request's.
    #[serde(default)]
    pub include_additional_headers_in_check: FixedHeaders,
    /// The answer's headers that replace the request's when it is allowed.
    #[serde(default)]
    pub headers_to_upstream_on_allow: Vec<Pattern>,
    /// The answer's headers that the client gets when it is denied; all if empty.
    #[serde(default)]
    pub headers_to_downstream_on_deny: Vec<Pattern>,
    #[serde(default, skip_serializing, deserialize_with = "no_headers_downstream")]
    #[schemars(skip)]
    pub headers_to_downstream_on_allow: (),
    #[serde(default, skip_serializing, deserialize_with = "no_body")]
    #[schemars(skip)]
    pub include_request_body_in_check: (),
}

fn default_timeout() -> Span {
    Span::seconds(1)
}

impl TryFrom<Fields> for ExtensionProvider {
    type Error = String;

    fn try_from(fields: Fields) -> Result<Self, String> {
        let name = fields.name;
        if name.is_empty() {
            return Err("a provider needs a name".into());
        }
        let kind = match (fields.envoy_ext_authz_grpc, fields.envoy_ext_authz_http) {
            (Some(grpc), None) => Kind::Grpc(grpc),
            (None, Some(http)) => Kind::Http(http),
            _ => {
                return Err(format!(
                    "provider `{name}` needs one of envoyExtAuthzGrpc and envoyExtAuthzHttp"
                ));
            }
        };
        Ok(Self { name, kind })
    }
}

impl From<ExtensionProvider> for Fields {
    fn from(provider: ExtensionProvider) -> Self {
        let mut fields = Self {
            name: provider.name,
            ..Self::default()
        };
        match provider.kind {
            Kind::Grpc(grpc) => fields.envoy_ext_authz_grpc = Some(grpc),
            Kind::Http(http) => fields.envoy_ext_authz_http = Some(http),
        }
        fields
    }
}

/// A field that is refused by name: left out, the check would see less than asked.
fn refuse<'de, D: Deserializer<'de>>(from: D, why: &str) -> Result<(), D::Error> {
    de::IgnoredAny::deserialize(from)?;
    Err(de::Error::custom(why))
}

fn no_body<'de, D: Deserializer<'de>>(from: D) -> Result<(), D::Error> {
    refuse(
        from,
        "includeRequestBodyInCheck is not supported: bodies are not held back for a check",
    )
}

fn no_headers_downstream<'de, D: Deserializer<'de>>(from: D) -> Result<(), D::Error> {
    refuse(
        from,
        "headersToDownstreamOnAllow is not supported: the application's answer is not changed",
    )
}

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
            if super::headers::framing(&parsed) {
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
