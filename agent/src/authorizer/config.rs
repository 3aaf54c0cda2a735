//! Extension providers as Istio's mesh configuration writes them
//! (`MeshConfig.ExtensionProvider`), parsed into values that cannot be wrong.

use std::num::NonZeroU16;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, de};

use super::{
    headers::Pattern,
    values::{ErrorStatus, FixedHeaders, Host, PathPrefix},
};
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
