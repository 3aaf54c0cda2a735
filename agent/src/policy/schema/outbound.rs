//! `postern.dev/v1alpha1` OutboundToken: which token the agent puts on which call.

use std::path::PathBuf;

use http::{HeaderName, header};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer};
use url::Url;

use super::values::{List, Port, Selector, Span, Text, some_entries};
use crate::{
    jwt::may_be_output,
    oauth::{ClientAuthentication, is_secret_safe},
    trace::TRACEPARENT,
};

/// Which token the agent of a pod puts on which of its calls. The pod itself holds no
/// secret; without a token there is no call.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct OutboundToken {
    #[serde(default)]
    pub selector: Option<Selector>,
    /// The request's host, in the four string forms; its port and case do not count.
    #[serde(deserialize_with = "hosts")]
    #[schemars(length(min = 1))]
    pub hosts: Vec<Host>,
    /// Of the endpoint, after a service has been resolved; without it, all.
    #[serde(default)]
    pub ports: List<Port>,
    /// The authorization server, whose metadata tell the token endpoint (RFC 8414, or
    /// OIDC Discovery); or `tokenEndpoint`.
    #[serde(default)]
    pub issuer: Option<ServerUrl>,
    #[serde(default)]
    pub token_endpoint: Option<ServerUrl>,
    pub grant: Grant,
    /// Without it, the workload's SPIFFE ID.
    #[serde(default)]
    pub client_id: Option<ClientId>,
    /// Without it, `privateKeyJwt: {}`: the workload's own key.
    #[serde(default)]
    pub client_authentication: Option<ClientAuthentication>,
    /// `audience` (RFC 8693 2.1); of `workloadIdentity` the one audience.
    #[serde(default)]
    pub audiences: List<Text>,
    /// `resource` (RFC 8707).
    #[serde(default)]
    pub resources: List<ResourceUri>,
    #[serde(default)]
    pub scopes: List<Scope>,
    #[serde(default)]
    pub header: TokenHeader,
    #[serde(default)]
    pub application: Application,
    /// For all that has to be done to get a token.
    #[serde(default)]
    pub timeout: Option<Span>,
    #[serde(default)]
    pub on_behalf_of: Option<OnBehalfOf>,
}

fn hosts<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Host>, D::Error> {
    some_entries(from).map(Option::unwrap_or_default)
}

/// How a token is got: exactly one way.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(try_from = "RawGrant")]
pub enum Grant {
    /// RFC 6749 4.4.
    ClientCredentials,
    /// RFC 8693.
    TokenExchange(Exchange),
    /// A JWT-SVID of the workload itself; no server is asked.
    WorkloadIdentity,
}

#[derive(Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
#[schemars(extend("minProperties" = 1, "maxProperties" = 1))]
struct RawGrant {
    /// RFC 6749 4.4.
    client_credentials: Option<Nothing>,
    /// RFC 8693.
    token_exchange: Option<Exchange>,
    /// A JWT-SVID of the workload itself; no server is asked.
    workload_identity: Option<Nothing>,
}

#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Nothing {}

impl TryFrom<RawGrant> for Grant {
    type Error = String;

    fn try_from(raw: RawGrant) -> Result<Self, String> {
        let mut named: Vec<Self> = Vec::new();
        named.extend(raw.client_credentials.map(|_| Self::ClientCredentials));
        named.extend(raw.token_exchange.map(Self::TokenExchange));
        named.extend(raw.workload_identity.map(|_| Self::WorkloadIdentity));
        match (named.len(), named.pop()) {
            (1, Some(grant)) => Ok(grant),
            (count, _) => Err(format!(
                "names {count} grants; name one of clientCredentials, tokenExchange and workloadIdentity"
            )),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Exchange {
    /// Whose token is exchanged.
    pub subject: Subject,
    /// Within the pod; only with `subject: serviceAccount`.
    #[serde(default)]
    #[schemars(regex(pattern = "^/"))]
    pub service_account_token_path: Option<PathBuf>,
    /// Who acts for the subject (`actor_token`).
    #[serde(default)]
    pub actor: Actor,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Subject {
    /// A user's: what came in with the request that this one is made for.
    Inbound,
    /// The pod's own, projected by Kubernetes.
    ServiceAccount,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Actor {
    #[default]
    None,
    /// A JWT-SVID of the pod.
    Workload,
}

/// Which requests belong together is told by a header that the application passes on.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct OnBehalfOf {
    /// Its value is a W3C `traceparent`, whatever its name.
    #[serde(deserialize_with = "header_name")]
    #[schemars(with = "super::values::Header")]
    pub trace_header: HeaderName,
}

impl Default for OnBehalfOf {
    fn default() -> Self {
        Self {
            trace_header: TRACEPARENT,
        }
    }
}

fn header_name<'de, D: Deserializer<'de>>(from: D) -> Result<HeaderName, D::Error> {
    super::values::Header::deserialize(from).map(|header| header.0)
}

/// Whether a header of the application's own is kept, and no token put on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Application {
    Keep,
    #[default]
    Replace,
}

#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(try_from = "RawHeader")]
pub struct TokenHeader {
    #[schemars(with = "String")]
    pub name: HeaderName,
    /// Before the token.
    pub prefix: String,
}

impl Default for TokenHeader {
    fn default() -> Self {
        Self {
            name: header::AUTHORIZATION,
            prefix: "Bearer ".into(),
        }
    }
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawHeader {
    /// Without it, `Authorization`.
    #[serde(default)]
    #[schemars(regex(pattern = r"^[!#$%&'*+^_`|~0-9A-Za-z-]+$"))]
    name: Option<String>,
    /// Before the token; without it, `Bearer ` in `Authorization` and nothing elsewhere.
    #[serde(default)]
    #[schemars(regex(pattern = "^([!-~][ -~]*)?$"), length(max = 64))]
    prefix: Option<String>,
}

/// Headers that are for the next hop only, or that others go by (RFC 9110 7.6.1).
const OTHERS: [&str; 8] = [
    "expect",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "traceparent",
    "trailer",
];

impl TryFrom<RawHeader> for TokenHeader {
    type Error = String;

    fn try_from(raw: RawHeader) -> Result<Self, String> {
        let default = Self::default();
        let name = match raw.name {
            None => default.name,
            Some(text) => HeaderName::try_from(&text)
                .ok()
                .filter(|name| may_be_output(name) && !OTHERS.contains(&name.as_str()))
                .filter(|name| !name.as_str().contains('.'))
                .ok_or_else(|| {
                    format!("name: `{text}` is no header that a token can be in; it frames the message, is for one hop, or is none")
                })?,
        };
        // What stands before a token elsewhere is nobody's guess.
        let own = name == header::AUTHORIZATION;
        let prefix = match raw.prefix {
            Some(prefix) => prefix,
            None if own => default.prefix,
            None => String::new(),
        };
        let fits = |b: u8| matches!(b, b' '..=b'~');
        if prefix.len() > 64 || prefix.starts_with(' ') || !prefix.bytes().all(fits) {
            return Err(format!(
                "prefix: `{}` cannot begin a header's value; use visible ASCII, 64 characters at most",
                prefix.escape_debug()
            ));
        }
        Ok(Self { name, prefix })
    }
}

macro_rules! checked {
    ($($(#[$doc:meta])* $name:ident: $read:expr;)*) => {$(
        #[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
        #[serde(try_from = "String")]
        $(#[$doc])*
        pub struct $name(pub String);

        impl TryFrom<String> for $name {
            type Error = String;

            fn try_from(text: String) -> Result<Self, String> {
                let read: fn(String) -> Result<String, String> = $read;
                read(text).map(Self)
            }
        }
    )*};
}

checked! {
    /// A host in one of the string forms, in lower case.
    #[schemars(extend("pattern" = r"^\*?[0-9A-Za-z._~:\[\]-]*\*?$", "minLength" = 1))]
    Host: |text| {
        let inner = text.strip_prefix('*').or_else(|| text.strip_suffix('*')).unwrap_or(&text);
        let fits = |c: char| c.is_ascii_alphanumeric() || "-._~:[]".contains(c);
        let port = !inner.contains('[') && inner.contains(':');
        if text.is_empty() || inner.contains('*') || !inner.chars().all(fits) || port {
            return Err(format!("`{text}` is no host; use a name, `prefix*`, `*suffix` or `*`, without a port"));
        }
        Ok(text.to_ascii_lowercase())
    };

    /// `scope-token` (RFC 6749 3.3).
    #[schemars(extend("pattern" = r"^[!#-\[\]-~]+$"))]
    Scope: |text| {
        let fits = |b: u8| matches!(b, b'!' | b'#'..=b'[' | b']'..=b'~');
        match !text.is_empty() && text.bytes().all(fits) {
            true => Ok(text),
            false => Err(format!("`{}` is no scope: visible ASCII without quotes, backslashes and blanks (RFC 6749 3.3)", text.escape_debug())),
        }
    };

    /// `client-id` (RFC 6749 A.1).
    #[schemars(extend("pattern" = "^[ -~]+$"))]
    ClientId: |text| {
        match !text.is_empty() && text.bytes().all(|b| matches!(b, b' '..=b'~')) {
            true => Ok(text),
            false => Err(format!("`{}` is no client ID: visible ASCII (RFC 6749 A.1)", text.escape_debug())),
        }
    };

    /// An absolute URI without fragment (RFC 8707 2).
    #[schemars(extend("pattern" = "^[A-Za-z][A-Za-z0-9+.-]*:[^#]*$"))]
    ResourceUri: |text| match Url::parse(&text) {
        Ok(url) if url.fragment().is_none() => Ok(text),
        _ => Err(format!("`{text}` is no resource: an absolute URI without a fragment (RFC 8707)")),
    };

    /// Of an authorization server: `https`, or `http` on loopback.
    #[schemars(extend("pattern" = "^[Hh][Tt][Tt][Pp][Ss]?://[^#]+$"))]
    ServerUrl: |text| match is_secret_safe(&text) {
        Ok(()) => Ok(text),
        Err(why) => Err(format!("`{text}` {why}")),
    };
}
