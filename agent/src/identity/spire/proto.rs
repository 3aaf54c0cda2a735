//! The messages of `spire.api.agent.delegatedidentity.v1` that are used
//! (spiffe/spire-api-sdk, delegatedidentity.proto, types/{selector,x509svid,jwtsvid,spiffeid}.proto).

use std::{collections::HashMap, fmt};

use prost::Message;

#[derive(Clone, PartialEq, Message)]
pub struct Selector {
    #[prost(string, tag = "1")]
    pub kind: String,
    #[prost(string, tag = "2")]
    pub value: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct SvidsRequest {
    #[prost(message, repeated, tag = "1")]
    pub selectors: Vec<Selector>,
}

#[derive(Clone, PartialEq, Message)]
pub struct SvidsResponse {
    #[prost(message, repeated, tag = "1")]
    pub x509_svids: Vec<SvidWithKey>,
}

/// Debug output without the key.
#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
pub struct SvidWithKey {
    #[prost(message, optional, tag = "1")]
    pub x509_svid: Option<X509Svid>,
    /// PKCS #8, DER.
    #[prost(bytes = "vec", tag = "2")]
    pub x509_svid_key: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub struct X509Svid {
    /// DER, leaf first.
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub cert_chain: Vec<Vec<u8>>,
    #[prost(message, optional, tag = "2")]
    pub id: Option<Id>,
    #[prost(int64, tag = "3")]
    pub expires_at: i64,
}

#[derive(Clone, PartialEq, Message)]
pub struct Id {
    #[prost(string, tag = "1")]
    pub trust_domain: String,
    /// With the slash that it begins with.
    #[prost(string, tag = "2")]
    pub path: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct BundlesRequest {}

#[derive(Clone, PartialEq, Message)]
pub struct BundlesResponse {
    /// Certificates in DER, one after the other, by trust domain.
    #[prost(map = "string, bytes", tag = "1")]
    pub ca_certificates: HashMap<String, Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
pub struct TokensRequest {
    #[prost(string, repeated, tag = "1")]
    pub audience: Vec<String>,
    #[prost(message, repeated, tag = "2")]
    pub selectors: Vec<Selector>,
}

#[derive(Clone, PartialEq, Message)]
pub struct TokensResponse {
    #[prost(message, repeated, tag = "1")]
    pub svids: Vec<Token>,
}

/// Debug output without the token.
#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
pub struct Token {
    #[prost(string, tag = "1")]
    pub token: String,
    #[prost(message, optional, tag = "2")]
    pub id: Option<Id>,
    #[prost(int64, tag = "3")]
    pub expires_at: i64,
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}{}", self.trust_domain, self.path)
    }
}

impl fmt::Debug for SvidWithKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let svid = self.x509_svid.as_ref();
        f.debug_struct("SvidWithKey")
            .field("id", &svid.and_then(|svid| svid.id.as_ref()))
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}
