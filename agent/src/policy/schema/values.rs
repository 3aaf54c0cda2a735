//! Values of policy fields, checked while they are read, so that an error names
//! line and field.

use std::{borrow::Cow, collections::BTreeMap, net::IpAddr, time::Duration};

use http::{HeaderName, Uri};
use ipnet::IpNet;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Deserializer, de::Error as _};

use crate::jwt::may_be_output;

/// The values of a field; without the field, none. A list that is there and empty
/// is refused: in words it matches nothing, in Istio it would match everything.
#[derive(Clone, Debug, PartialEq)]
pub struct List<T>(pub Vec<T>);

impl<T> Default for List<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for List<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        some_entries(from).map(|list| Self(list.unwrap_or_default()))
    }
}

impl<T: JsonSchema> JsonSchema for List<T> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        Vec::<T>::schema_name()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let mut schema = Vec::<T>::json_schema(generator);
        schema.insert("minItems".into(), 1.into());
        schema
    }
}

pub fn some_entries<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    from: D,
) -> Result<Option<Vec<T>>, D::Error> {
    let entries = Vec::deserialize(from)?;
    if entries.is_empty() {
        return Err(D::Error::custom(
            "an empty list matches nothing; leave it out to match all",
        ));
    }
    Ok(Some(entries))
}

macro_rules! checked {
    ($($(#[$doc:meta])* $name:ident($inner:ty): $read:expr;)*) => {$(
        #[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
        #[serde(try_from = "String")]
        $(#[$doc])*
        pub struct $name(#[schemars(with = "String")] pub $inner);

        impl TryFrom<String> for $name {
            type Error = String;

            fn try_from(text: String) -> Result<Self, String> {
                let read: fn(String) -> Result<$inner, String> = $read;
                read(text).map(Self)
            }
        }
    )*};
}

pub(super) use checked;

checked! {
    /// A non-empty string.
    #[schemars(extend("minLength" = 1))]
    Text(String): |text| match text.is_empty() {
        true => Err("an empty string matches nothing".into()),
        false => Ok(text),
    };

    /// A trust domain, `prefix*`, `*suffix` or `*` (Istio `trustDomains`).
    Domain(String): |text| {
        let stars = text.matches('*').count();
        let inner = stars == 1 && !text.starts_with('*') && !text.ends_with('*');
        if text.is_empty() || text.contains('/') || stars > 1 || inner {
            return Err(format!("`{text}` is no trust domain; one `*` may stand at its begin or end, and no `/`"));
        }
        Ok(text)
    };

    /// An address or CIDR; host bits are masked.
    #[schemars(extend("pattern" = "^([0-9.]+|[0-9a-fA-F:.]+:[0-9a-fA-F:.]*)(/[0-9]{1,3})?$"))]
    Block(IpNet): |text| {
        let net = text
            .parse::<IpNet>()
            .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
            .map_err(|_| format!("`{text}` is no address or CIDR such as 10.0.0.0/8 or fd00::/8"))?;
        match net {
            IpNet::V6(six) if six.prefix_len() >= 96 && six.addr().to_ipv4_mapped().is_some() => {
                Err(format!("`{text}` is IPv4 in the form of IPv6; write it as IPv4"))
            }
            net => Ok(net.trunc()),
        }
    };

    /// A decimal port, as a string (Istio's form).
    #[schemars(extend("pattern" = "^0*([0-9]{1,4}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])$"))]
    Port(u16): |text| {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        match text.parse() {
            Ok(port) if digits => Ok(port),
            _ => Err(format!("`{text}` is no port; use a number from 0 to 65535, in quotes")),
        }
    };

    /// A name of a header that requests may carry.
    #[schemars(extend("pattern" = "^[!#$%&'*+.^_`|~0-9A-Za-z-]+$"))]
    Header(HeaderName): |text| {
        HeaderName::try_from(&text).map_err(|_| format!("`{text}` is no header name"))
    };

    /// A name of a header that the agent sets (Istio: letters, digits, `-`, `_`).
    OutputHeader(HeaderName): |text| {
        let ours = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        match HeaderName::try_from(&text) {
            Ok(name) if text.bytes().all(ours) && may_be_output(&name) => Ok(name),
            _ => Err(format!("`{text}` is no header that can be set; use letters, digits, `-` and `_`, and none that frames the message")),
        }
    };

    /// Where a key set is fetched from.
    KeysUrl(String): |text| {
        let uri = text.parse::<Uri>().ok();
        let fine = uri.is_some_and(|uri| {
            matches!(uri.scheme_str(), Some("http" | "https"))
                && uri.host().is_some_and(|h| !h.is_empty())
                && uri.authority().is_some_and(|a| a.port().is_some() == ends_with_port(a.as_str()) && !a.as_str().contains('@'))
                && uri.port().is_none_or(|p| p.as_str().parse::<u16>().is_ok_and(|p| p > 0))
        });
        match fine {
            true => Ok(text),
            false => Err(format!("`{text}` is no URL; use http:// or https:// with a host, and a port from 1 to 65535")),
        }
    };

    /// A time span such as `5s`, `500ms` or `1m30s`, at least 1 ms.
    #[schemars(extend("pattern" = "^(([0-9]+\\.?[0-9]*|\\.[0-9]+)(ns|us|µs|ms|s|m|h))+$"))]
    Span(Duration): |text| match span(&text) {
        Some(span) if span >= Duration::from_millis(1) => Ok(span),
        _ => Err(format!("`{text}` is no time span; use at least `1ms`, such as `5s`")),
    };
}

/// Whether something stands behind the last colon that is no part of an IPv6 address.
fn ends_with_port(authority: &str) -> bool {
    let host_end = authority.rfind(']').map_or(0, |at| at + 1);
    authority[host_end..].contains(':')
}

/// Go's `time.ParseDuration` without signs, which is what Istio's CRDs take.
fn span(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut total = Duration::ZERO;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, after) = rest.split_at(digits);
        let letters = after
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(after.len());
        let (unit, next) = after.split_at(letters);
        let seconds = match unit {
            "ns" => 1e-9,
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        let number: f64 = number.parse().ok()?;
        total = total.checked_add(Duration::try_from_secs_f64(number * seconds).ok()?)?;
        rest = next;
    }
    Some(total)
}

/// `namespace/account`, or `account` in the policy's own namespace.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub struct ServiceAccount {
    pub namespace: Option<String>,
    pub name: String,
}

impl TryFrom<String> for ServiceAccount {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let (namespace, name) = match text.split_once('/') {
            Some((namespace, name)) => (Some(namespace), name),
            None => (None, text.as_str()),
        };
        let bad = text.len() > 320
            || name.is_empty()
            || name.contains('/')
            || namespace.is_some_and(str::is_empty)
            || text.contains('*');
        if bad {
            return Err(format!(
                "`{text}` is no service account; use `namespace/name` or `name`, without `*`"
            ));
        }
        Ok(Self {
            namespace: namespace.map(str::to_owned),
            name: name.to_owned(),
        })
    }
}

/// A path in Istio's string forms, or a template with `{*}` and `{**}`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub enum PathForm {
    Text(String),
    Template(Vec<Piece>),
}

/// A piece of a path template.
#[derive(Clone, Debug, PartialEq)]
pub enum Piece {
    Literal(String),
    /// `{*}`: one segment, not empty.
    Segment,
    /// `{**}`: any characters, also none, also `/`.
    Rest,
}

impl TryFrom<String> for PathForm {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if text.is_empty() {
            return Err("an empty string matches nothing".into());
        }
        if !text.contains(['{', '}']) {
            return Ok(Self::Text(text));
        }
        let refuse = |why: &str| Err(format!("`{text}` is no path template: {why}"));
        let Some(inner) = text.strip_prefix('/') else {
            return refuse("it begins with `/`");
        };
        let mut pieces = vec![Piece::Literal(String::new())];
        let mut rest_seen = false;
        let mut segments = inner.split('/').peekable();
        while let Some(segment) = segments.next() {
            match pieces.last_mut() {
                Some(Piece::Literal(text)) => text.push('/'),
                _ => pieces.push(Piece::Literal("/".into())),
            }
            match segment {
                "{*}" | "{**}" if rest_seen => return refuse("`{**}` is its last operator"),
                "{*}" => pieces.push(Piece::Segment),
                "{**}" => {
                    rest_seen = true;
                    pieces.push(Piece::Rest);
                }
                "" if segments.peek().is_some() => return refuse("a segment is empty"),
                literal => {
                    let fine =
                        |b: u8| b.is_ascii_alphanumeric() || b"-._~%!$&'()+,;:@=".contains(&b);
                    if !literal.bytes().all(fine) {
                        return refuse(
                            "an operator is a whole segment, and `{`, `}` and `*` stand nowhere else",
                        );
                    }
                    if let Some(Piece::Literal(text)) = pieces.last_mut() {
                        text.push_str(literal);
                    }
                }
            }
        }
        Ok(Self::Template(pieces))
    }
}

/// Pairs that must all be among a workload's labels. Absent or empty: every workload.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Selector {
    #[serde(deserialize_with = "labels")]
    #[schemars(extend("additionalProperties" = {"type": "string", "pattern": "^[^*]*$"}))]
    pub match_labels: BTreeMap<String, String>,
}

fn labels<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<String, String>, D::Error> {
    let labels = Option::<BTreeMap<String, String>>::deserialize(from)?.unwrap_or_default();
    for (key, value) in &labels {
        if key.is_empty() || key.contains('*') || value.contains('*') {
            return Err(D::Error::custom(format!(
                "label `{key}: {value}`: labels are matched exactly, with a name and without `*`"
            )));
        }
    }
    Ok(labels)
}

/// What a policy is attached to instead of a selector. Postern stands where a
/// waypoint would: a Service means the workloads behind it. The other kinds are
/// for gateways, and no workload heeds them (Istio).
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(try_from = "RawTargetRef")]
pub struct TargetRef {
    /// The Service's name; `None`: for gateways.
    pub service: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawTargetRef {
    group: String,
    kind: String,
    name: String,
    namespace: String,
}

impl TryFrom<RawTargetRef> for TargetRef {
    type Error = String;

    fn try_from(raw: RawTargetRef) -> Result<Self, String> {
        if raw.name.is_empty() {
            return Err("name is missing".into());
        }
        if !raw.namespace.is_empty() {
            return Err("namespace must be left out: it is the policy's own".into());
        }
        match (raw.group.as_str(), raw.kind.as_str()) {
            ("" | "core", "Service") => Ok(Self {
                service: Some(raw.name),
            }),
            ("gateway.networking.k8s.io", "Gateway" | "GatewayClass")
            | ("networking.istio.io", "ServiceEntry") => Ok(Self { service: None }),
            (group, kind) => Err(format!(
                "`{group}/{kind}` is no target; use Service, or Gateway and GatewayClass of gateway.networking.k8s.io, or ServiceEntry of networking.istio.io"
            )),
        }
    }
}
