//! OAuth 2.0 clients: registered in the configuration file or in the store.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::Span;

/// A client (RFC 6749 2), in the words of RFC 7591 where it has them.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Client {
    /// `client_id`. Of a workload: its SPIFFE ID, usually.
    pub id: String,
    /// What people read on the consent page. Default: the id.
    #[serde(default)]
    pub name: Option<String>,
    pub authentication: Authentication,
    /// Exact (RFC 9700 2.1); of a native client's loopback address the port is free
    /// (RFC 8252 7.3).
    #[serde(default)]
    pub redirect_uris: Vec<String>,
    pub grants: Vec<Grant>,
    /// Scopes that it may ask for.
    #[serde(default)]
    pub scopes: Vec<String>,
    /// Audiences that its tokens may be for (`resource`, RFC 8707; `audience`, RFC
    /// 8693). The first is what a token is for where it asks for none.
    #[serde(default)]
    pub audiences: Vec<String>,
    /// Token exchange: whose tokens it may exchange, by the token's audience. Its own
    /// id and SPIFFE ID always count.
    #[serde(default)]
    pub subject_audiences: Vec<String>,
    /// Without it people are asked for their consent.
    #[serde(default)]
    pub trusted: bool,
    /// Access tokens are bound to the client's certificate (RFC 8705 3).
    #[serde(default)]
    pub certificate_bound: bool,
    /// Only tokens bound by DPoP are issued (RFC 9449 5.2).
    #[serde(default)]
    pub dpop_bound: bool,
    #[serde(default)]
    pub token_format: TokenFormat,
    /// Lifetime of its access tokens. Default: that of all.
    #[serde(default)]
    pub access_lifetime: Option<Span>,
}

/// How a client proves who it is (RFC 7591 2, `token_endpoint_auth_method`).
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(
    rename_all = "camelCase",
    rename_all_fields = "camelCase",
    deny_unknown_fields
)]
pub enum Authentication {
    /// A public client; PKCE is what protects it.
    None {},
    /// `client_secret_basic` and `client_secret_post`. Of the secret only a hash is
    /// kept: argon2id in PHC form, as `postern authority client add` prints it.
    ClientSecret { secret_hash: String },
    /// `private_key_jwt`: keys of its own (a JWK set in a file)...
    PrivateKeyJwt { jwks_file: PathBuf },
    /// ... or those of a workload of the trust domain: `private_key_jwt` signed with
    /// the key of its certificate (`x5c`), `tls_client_auth` with the certificate, or
    /// its JWT-SVID.
    Workload { spiffe_id: String },
    /// `tls_client_auth` with a certificate of the trust domain's root that has this
    /// DNS name or URI (RFC 8705 2.1.2).
    TlsClientAuth {
        #[serde(default)]
        san_dns: Option<String>,
        #[serde(default)]
        san_uri: Option<String>,
    },
    /// `self_signed_tls_client_auth` (RFC 8705 2.2): certificates in a PEM file.
    SelfSignedTls { certificate_file: PathBuf },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Grant {
    AuthorizationCode,
    RefreshToken,
    ClientCredentials,
    /// RFC 8693.
    TokenExchange,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TokenFormat {
    /// RFC 9068.
    #[default]
    Jwt,
    /// Only introspection tells what it is good for.
    Opaque,
}
