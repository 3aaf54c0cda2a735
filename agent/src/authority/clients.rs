//! OAuth 2.0 clients: registered in the configuration file or in the store.

use std::{path::PathBuf, time::Duration};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{config::Span, identity::SpiffeId};

/// Longest client id.
const MAX_ID: usize = 512;

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
    /// Names that it goes by as a receiver of tokens: whose tokens it may exchange (RFC
    /// 8693) and introspect (RFC 7662), by the token's audience. Its own id and SPIFFE
    /// ID always count.
    #[serde(default)]
    pub subject_audiences: Vec<String>,
    /// Without it people are asked for their consent. Those of a public client whose
    /// redirect is not https are asked in any case (RFC 8252 8.6).
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

impl Authentication {
    /// As the configuration names it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::None {} => "none",
            Self::ClientSecret { .. } => "clientSecret",
            Self::PrivateKeyJwt { .. } => "privateKeyJwt",
            Self::Workload { .. } => "workload",
            Self::TlsClientAuth { .. } => "tlsClientAuth",
            Self::SelfSignedTls { .. } => "selfSignedTls",
        }
    }
}

impl Client {
    /// What tokens call it: its SPIFFE ID where it has one, else its id.
    pub fn identity(&self) -> &str {
        match &self.authentication {
            Authentication::Workload { spiffe_id } => spiffe_id,
            _ => &self.id,
        }
    }

    /// Anybody can speak in its name (RFC 6749 2.1).
    pub fn is_public(&self) -> bool {
        matches!(self.authentication, Authentication::None {})
    }

    pub fn may(&self, grant: Grant) -> bool {
        self.grants.contains(&grant)
    }

    /// Whether a token of these audiences is for this client, or was made for it to pass
    /// on: it names its id, its SPIFFE ID or one of `subjectAudiences`.
    pub fn is_among<'a>(&self, audiences: impl IntoIterator<Item = &'a str>) -> bool {
        audiences.into_iter().any(|audience| {
            audience == self.id
                || audience == self.identity()
                || self.subject_audiences.iter().any(|own| own == audience)
        })
    }

    /// What is wrong with it, in words that name it.
    pub fn check(&self, overlap: Duration) -> Result<(), String> {
        let wrong = |what: String| Err(format!("client `{}`: {what}", self.id));
        let visible =
            |text: &str| !text.is_empty() && text.bytes().all(|b| (0x20..0x7f).contains(&b));
        if !visible(&self.id) || self.id.len() > MAX_ID {
            return wrong(format!("an id is 1 to {MAX_ID} printable ASCII characters"));
        }
        match &self.authentication {
            Authentication::Workload { spiffe_id } if spiffe_id.parse::<SpiffeId>().is_err() => {
                return wrong(format!(
                    "`{spiffe_id}` is no SPIFFE ID of a service account"
                ));
            }
            Authentication::TlsClientAuth { san_dns, san_uri }
                if san_dns.is_some() == san_uri.is_some() =>
            {
                return wrong("tlsClientAuth takes one of sanDns and sanUri".into());
            }
            Authentication::ClientSecret { secret_hash }
                if argon2::password_hash::phc::PasswordHash::new(secret_hash).is_err() =>
            {
                return wrong("secretHash is not in PHC form, as `client add` prints it".into());
            }
            Authentication::None {}
                if self.may(Grant::ClientCredentials) || self.may(Grant::TokenExchange) =>
            {
                let what = "a public client has neither client_credentials nor token_exchange";
                return wrong(what.into());
            }
            _ => {}
        }
        if self.may(Grant::AuthorizationCode) && self.redirect_uris.is_empty() {
            return wrong("authorization_code needs redirectUris".into());
        }
        if let Some(lifetime) = self.access_lifetime
            && lifetime.0 > overlap
        {
            return wrong("accessLifetime is longer than keys.overlap".into());
        }
        let word = |scope: &String| {
            let allowed = |b: u8| b.is_ascii_graphic() && b != b'"' && b != b'\\';
            !scope.is_empty() && scope.bytes().all(allowed)
        };
        if !self.scopes.iter().all(word) {
            return wrong("a scope has a character that none has (RFC 6749 3.3)".into());
        }
        Ok(())
    }
}
