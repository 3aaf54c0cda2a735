//! `postern.dev/v1alpha1` ProtectedResource: the application as an OAuth 2.0 resource
//! server, beyond what Istio's RequestAuthentication has words for.

use std::time::Duration;

use http::Uri;
use schemars::JsonSchema;
use serde::Deserialize;

use super::values::{List, Selector, Span, Text, checked};
use crate::oauth::ClientAuthentication;

/// What the workload is to clients and authorization servers, and what it asks of
/// tokens. Where several select a workload, the narrowest counts, and it alone.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct ProtectedResource {
    pub selector: Option<Selector>,
    /// Resource identifier (RFC 9728 1.2). With it, metadata is told to clients.
    pub resource: Option<ResourceUrl>,
    /// Issuer identifiers of the servers that give out its tokens.
    pub authorization_servers: List<HttpsUrl>,
    /// Told in metadata, and in challenges that no rule has a better word for.
    pub scopes: List<Scope>,
    pub tokens: TokenDemands,
    pub introspection: Option<Introspection>,
}

#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct TokenDemands {
    /// Absent: any JWT that a rule verifies, as Istio has it.
    #[serde(rename = "type")]
    pub kind: Option<TokenType>,
    pub binding: BoundTo,
    /// DPoP proofs must have a nonce of this agent (RFC 9449 9).
    pub nonce: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
pub enum TokenType {
    /// JWT access tokens (RFC 9068).
    #[serde(rename = "at+jwt")]
    AccessToken,
}

/// To what tokens must be bound. What a token is bound to is proven in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum BoundTo {
    #[default]
    Any,
    /// To a key, by DPoP (RFC 9449).
    Dpop,
    /// To the certificate of the peer in the mesh (RFC 8705 3).
    Certificate,
    /// To one of both.
    #[serde(rename = "bound")]
    Either,
}

/// Asks the authorization server about tokens (RFC 7662).
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Introspection {
    pub endpoint: HttpsUrl,
    /// Whose tokens it tells about: `iss` of its answers, and audience of assertions.
    pub issuer: Text,
    pub client_id: Text,
    pub client_authentication: ClientAuthentication,
    /// One of them must be in `aud`; without it, `aud` is not looked at.
    #[serde(default)]
    pub audiences: List<Text>,
    /// How long an answer holds: a token that was revoked is taken as long.
    #[serde(default = "cache")]
    pub cache: Span,
    #[serde(default = "timeout")]
    pub timeout: Span,
    /// Also asks about JWTs of the issuer that a rule verified.
    #[serde(default)]
    pub always: bool,
    /// Whether the application gets tokens that were introspected.
    #[serde(default)]
    pub forward_original_token: bool,
}

fn cache() -> Span {
    Span(Duration::from_secs(30))
}

fn timeout() -> Span {
    Span(Duration::from_secs(5))
}

checked! {
    /// A URL of scheme https, without credentials, query and fragment.
    #[schemars(extend("pattern" = r#"^[Hh][Tt][Tt][Pp][Ss]://[^\s?#@/\\"]+(/[^\s?#\\"]*)?$"#))]
    HttpsUrl(String): |text| match is_https(&text) {
        true => Ok(text),
        false => Err(format!("`{text}` is no URL to be used here; use https:// with a host, without credentials, query and fragment")),
    };

    /// The same, as RFC 9728 1.2 has resource identifiers.
    #[schemars(extend("pattern" = r#"^[Hh][Tt][Tt][Pp][Ss]://[^\s?#@/\\"]+(/[^\s?#\\"]*)?$"#))]
    ResourceUrl(String): |text| match is_https(&text) {
        true => Ok(text),
        false => Err(format!("`{text}` is no resource identifier; use an https:// URL without credentials, query and fragment (RFC 9728 1.2)")),
    };

    /// A scope-token (RFC 6749 3.3).
    #[schemars(extend("pattern" = r"^[!#-\[\]-~]+$"))]
    Scope(String): |text| {
        let fine = |b: u8| b == 0x21 || (0x23..=0x5b).contains(&b) || (0x5d..=0x7e).contains(&b);
        match !text.is_empty() && text.bytes().all(fine) {
            true => Ok(text),
            false => Err(format!("`{text}` is no scope; use visible ASCII without spaces, `\"` and `\\`")),
        }
    };
}

fn is_https(text: &str) -> bool {
    let plain = text.bytes().all(|b| b.is_ascii_graphic()) && !text.contains(['?', '#', '\\', '"']);
    let uri = text.parse::<Uri>().ok().filter(|_| plain);
    uri.is_some_and(|uri| {
        let authority = uri.authority().map_or("", |a| a.as_str());
        let port_fits = match uri.port() {
            Some(port) => port.as_str().parse::<u16>().is_ok_and(|port| port > 0),
            // Also where one stands there that is none.
            None => uri.host() == Some(authority),
        };
        uri.scheme_str() == Some("https")
            && uri.host().is_some_and(|host| !host.is_empty())
            && !authority.contains('@')
            && port_fits
    })
}
