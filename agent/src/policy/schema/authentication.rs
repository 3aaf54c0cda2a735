//! PeerAuthentication and RequestAuthentication.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use http::HeaderName;
use serde::{Deserialize, Deserializer, de::Error as _};

use super::{
    authorization::targets,
    values::{Header, KeysUrl, List, OutputHeader, Selector, Span, TargetRef, Text, some_entries},
};
use crate::jwt::KeySet;

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(try_from = "RawPeer")]
pub struct PeerAuthentication {
    pub selector: Option<Selector>,
    pub mtls: MutualTls,
    pub port_level_mtls: BTreeMap<PortKey, MutualTls>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct RawPeer {
    selector: Option<Selector>,
    mtls: Option<MutualTls>,
    port_level_mtls: Option<BTreeMap<PortKey, Option<MutualTls>>>,
}

impl TryFrom<RawPeer> for PeerAuthentication {
    type Error = &'static str;

    fn try_from(raw: RawPeer) -> Result<Self, Self::Error> {
        let labelled = raw
            .selector
            .as_ref()
            .is_some_and(|s| !s.match_labels.is_empty());
        match &raw.port_level_mtls {
            Some(_) if !labelled => return Err("portLevelMtls needs a selector with labels"),
            Some(ports) if ports.is_empty() => {
                return Err("portLevelMtls is empty; name a port or leave it out");
            }
            _ => {}
        }
        let ports = raw.port_level_mtls.unwrap_or_default();
        Ok(Self {
            selector: raw.selector,
            mtls: raw.mtls.unwrap_or_default(),
            port_level_mtls: ports
                .into_iter()
                .map(|(port, mtls)| (port, mtls.unwrap_or_default()))
                .collect(),
        })
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MutualTls {
    pub mode: MtlsMode,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum MtlsMode {
    #[default]
    Unset,
    Disable,
    Permissive,
    Strict,
}

/// A workload port as a mapping's key, 1 to 65535.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct PortKey(pub u16);

impl TryFrom<String> for PortKey {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.parse() {
            Ok(port) if port > 0 && text.bytes().all(|b| b.is_ascii_digit()) => Ok(Self(port)),
            _ => Err(format!(
                "`{text}` is no workload port; use a number from 1 to 65535"
            )),
        }
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(try_from = "RawRequest")]
pub struct RequestAuthentication {
    pub selector: Option<Selector>,
    pub targets: Option<Vec<TargetRef>>,
    pub jwt_rules: Vec<JwtRule>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct RawRequest {
    selector: Option<Selector>,
    target_ref: Option<TargetRef>,
    #[serde(deserialize_with = "some_entries")]
    target_refs: Option<Vec<TargetRef>>,
    jwt_rules: Vec<JwtRule>,
}

impl TryFrom<RawRequest> for RequestAuthentication {
    type Error = String;

    fn try_from(raw: RawRequest) -> Result<Self, String> {
        Ok(Self {
            targets: targets(raw.selector.as_ref(), raw.target_ref, raw.target_refs)?,
            selector: raw.selector,
            jwt_rules: raw.jwt_rules,
        })
    }
}

/// How tokens of one issuer are checked (Istio `JWTRule`).
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "RawJwtRule")]
pub struct JwtRule {
    pub issuer: Option<String>,
    pub audiences: Vec<String>,
    pub keys: Keys,
    pub from_headers: Vec<(HeaderName, String)>,
    pub from_params: Vec<String>,
    pub from_cookies: Vec<String>,
    pub forward_original_token: bool,
    pub output_payload_to_header: Option<HeaderName>,
    pub output_claim_to_headers: Vec<(HeaderName, Vec<String>)>,
    pub space_delimited_claims: Vec<String>,
    /// Limit of a key fetch.
    pub timeout: Duration,
}

/// Where the keys of an issuer come from.
#[derive(Clone, Debug)]
pub enum Keys {
    Inline(Arc<KeySet>),
    Url(String),
    /// OpenID Connect Discovery at the issuer.
    Discovery,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawJwtRule {
    issuer: Option<Text>,
    #[serde(default)]
    audiences: List<Text>,
    /// The CRD has both spellings.
    #[serde(alias = "jwks_uri")]
    jwks_uri: Option<KeysUrl>,
    jwks: Option<Inline>,
    #[serde(default)]
    from_headers: List<FromHeader>,
    #[serde(default)]
    from_params: List<Text>,
    #[serde(default)]
    from_cookies: List<Text>,
    #[serde(default)]
    forward_original_token: bool,
    output_payload_to_header: Option<OutputHeader>,
    #[serde(default)]
    output_claim_to_headers: List<ClaimToHeader>,
    #[serde(default)]
    space_delimited_claims: List<Text>,
    timeout: Option<Span>,
    #[serde(default, rename = "presence")]
    _presence: Presence,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FromHeader {
    name: Header,
    #[serde(default)]
    prefix: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ClaimToHeader {
    header: OutputHeader,
    claim: Text,
}

/// A JSON Web Key Set within the policy.
#[derive(Deserialize)]
#[serde(try_from = "String")]
struct Inline(Arc<KeySet>);

impl TryFrom<String> for Inline {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let keys =
            KeySet::parse(text.as_bytes()).map_err(|e| format!("no JSON Web Key Set: {e}"))?;
        Ok(Self(Arc::new(keys)))
    }
}

/// In Istio's newest CRD, and without a meaning in its code yet.
#[derive(Default)]
struct Presence;

impl<'de> Deserialize<'de> for Presence {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        match String::deserialize(from)?.as_str() {
            "OPTIONAL" => Ok(Self),
            other => Err(D::Error::custom(format!(
                "`{other}` is not supported; leave it out and require a token by an AuthorizationPolicy with requestPrincipals"
            ))),
        }
    }
}

/// Istio's default limit of a fetch.
const FETCH: Duration = Duration::from_secs(5);

impl TryFrom<RawJwtRule> for JwtRule {
    type Error = &'static str;

    fn try_from(raw: RawJwtRule) -> Result<Self, Self::Error> {
        let texts = |list: List<Text>| list.0.into_iter().map(|text| text.0).collect();
        let keys = match (raw.jwks, raw.jwks_uri) {
            (Some(_), Some(_)) => return Err("use either jwks or jwksUri"),
            (Some(inline), None) => Keys::Inline(inline.0),
            (None, Some(url)) => Keys::Url(url.0),
            (None, None) if raw.issuer.is_some() => Keys::Discovery,
            (None, None) => return Err("issuer is missing, and there is no jwksUri"),
        };
        if raw.issuer.is_none() && matches!(keys, Keys::Inline(_)) {
            return Err("issuer is missing: only a rule with jwksUri may leave it out");
        }
        let claim = |path: &str| path.split('.').map(str::to_owned).collect();
        Ok(Self {
            issuer: raw.issuer.map(|issuer| issuer.0),
            audiences: texts(raw.audiences),
            keys,
            from_headers: (raw.from_headers.0.into_iter())
                .map(|h| (h.name.0, h.prefix))
                .collect(),
            from_params: texts(raw.from_params),
            from_cookies: texts(raw.from_cookies),
            forward_original_token: raw.forward_original_token,
            output_payload_to_header: raw.output_payload_to_header.map(|header| header.0),
            output_claim_to_headers: (raw.output_claim_to_headers.0.into_iter())
                .map(|o| (o.header.0, claim(&o.claim.0)))
                .collect(),
            space_delimited_claims: texts(raw.space_delimited_claims),
            timeout: raw.timeout.map_or(FETCH, |span| span.0),
        })
    }
}
