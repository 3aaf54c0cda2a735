//! `audit.sinks`: where the log is sent, parsed into values that cannot be wrong.

use std::{collections::BTreeMap, path::PathBuf};

use http::{HeaderMap, HeaderName, HeaderValue};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use url::Url;

use crate::config::{Bytes, Span};

/// All sinks; no two have a name in common.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(try_from = "Vec<Sink>", into = "Vec<Sink>")]
#[schemars(with = "Vec<Sink>")]
pub struct Sinks(Vec<Sink>);

/// One receiver of the log.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(try_from = "Fields", into = "Fields")]
#[schemars(with = "Fields")]
pub struct Sink {
    pub name: String,
    pub from: Begin,
    pub format: Format,
    pub filter: Filter,
    pub to: To,
}

#[derive(Clone, Debug, PartialEq)]
pub enum To {
    Otlp(Box<Otlp>),
    Stdout(Stdout),
    Syslog(Box<Syslog>),
}

/// As it is written: exactly one of `otlp`, `stdout` and `syslog`.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Fields {
    /// Lower-case letters, digits and `-`; how far it got is kept under this name.
    name: String,
    #[serde(default)]
    from: Begin,
    #[serde(default)]
    format: Format,
    #[serde(default)]
    filter: Filter,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    otlp: Option<Otlp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    stdout: Option<Stdout>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    syslog: Option<Syslog>,
}

/// Where a sink begins that has sent nothing yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Begin {
    /// With the next record: a new sink does not get months of old ones at once.
    #[default]
    Now,
    /// With the oldest record that is kept.
    Beginning,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The line as it stands in the log.
    #[default]
    Postern,
    /// An event of the Open Cybersecurity Schema Framework.
    Ocsf,
}

/// Which records are sent.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Filter {
    /// Kinds of records; none: all.
    pub kinds: Vec<Kind>,
}

/// What a record's `kind` can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Connection,
    Request,
    Flow,
    Bypass,
    Process,
    Token,
    Authority,
    Agent,
    Gap,
    Checkpoint,
    Retention,
    Reopened,
}

/// The OpenTelemetry protocol, logs.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Otlp {
    /// `http` or `https` URL; `v1/logs` is added to its path when the protocol is `http`.
    pub endpoint: Endpoint,
    #[serde(default)]
    pub protocol: Protocol,
    /// Sent with each request. No secrets: the configuration is shown to operators.
    #[serde(default)]
    pub headers: Headers,
    /// File of further headers, `name: value` lines, mode 0600; read for each request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub headers_file: Option<PathBuf>,
    #[serde(default)]
    pub compression: Compression,
    /// For one batch, from the connect to the answer.
    #[serde(default = "default_timeout")]
    pub timeout: Span,
    /// Roots (PEM) that the receiver's certificate is trusted under, and no others.
    /// Empty: the system's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub roots: Option<PathBuf>,
    /// Certificate chain (PEM) that is shown to the receiver.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<PathBuf>,
    /// Its private key (PEM), mode 0600.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    #[default]
    Grpc,
    /// Protobuf by POST.
    Http,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    #[default]
    None,
    Gzip,
}

/// The agent's own standard output, one JSON object a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Stdout {}

/// Syslog as of RFC 5424.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Syslog {
    /// `host:port`, or the path of a socket where the transport is `unix`.
    pub address: String,
    #[serde(default)]
    pub transport: Transport,
    #[serde(default)]
    pub facility: Facility,
    /// Longer messages are cut, and their structured data says so.
    #[serde(default = "default_message")]
    pub message_bytes: Bytes,
    /// For one batch, from the connect on.
    #[serde(default = "default_timeout")]
    pub timeout: Span,
    /// Roots (PEM) that the receiver's certificate is trusted under, and no others.
    /// Empty: the system's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub roots: Option<PathBuf>,
    /// Certificate chain (PEM) that is shown to the receiver.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<PathBuf>,
    /// Its private key (PEM), mode 0600.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// With octet counting (RFC 6587 3.4.1).
    #[default]
    Tcp,
    /// RFC 5425.
    Tls,
    /// RFC 5426: one datagram a record, and no word of those that are lost.
    Udp,
    /// Datagrams to a socket of this machine, such as `/dev/log`.
    Unix,
}

/// A facility of RFC 5424 6.2.1; 13 is "log audit".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(try_from = "u8", into = "u8")]
#[schemars(with = "u8")]
pub struct Facility(pub u8);

/// Headers without secrets.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(
    try_from = "BTreeMap<String, String>",
    into = "BTreeMap<String, String>"
)]
#[schemars(with = "BTreeMap<String, String>")]
pub struct Headers(pub HeaderMap);

/// Where OTLP is spoken.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Endpoint(pub Url);

impl Sinks {
    pub fn iter(&self) -> impl Iterator<Item = &Sink> {
        self.0.iter()
    }
}

impl TryFrom<Vec<Sink>> for Sinks {
    type Error = String;

    fn try_from(sinks: Vec<Sink>) -> Result<Self, String> {
        for (index, sink) in sinks.iter().enumerate() {
            if sinks[..index].iter().any(|other| other.name == sink.name) {
                return Err(format!("two sinks have the name `{}`", sink.name));
            }
        }
        Ok(Self(sinks))
    }
}

impl From<Sinks> for Vec<Sink> {
    fn from(sinks: Sinks) -> Self {
        sinks.0
    }
}

impl TryFrom<Fields> for Sink {
    type Error = String;

    fn try_from(fields: Fields) -> Result<Self, String> {
        let name = fields.name;
        let fine = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if name.is_empty() || name.len() > 63 || !name.bytes().all(fine) {
            return Err(format!(
                "`{name}` is no name of a sink: 1 to 63 of a-z, 0-9 and `-`"
            ));
        }
        let to = match (fields.otlp, fields.stdout, fields.syslog) {
            (Some(otlp), None, None) => To::Otlp(Box::new(otlp)),
            (None, Some(stdout), None) => To::Stdout(stdout),
            (None, None, Some(syslog)) => To::Syslog(Box::new(syslog)),
            _ => {
                return Err(format!(
                    "sink `{name}` needs one of otlp, stdout and syslog"
                ));
            }
        };
        let wrong = |what: &str| Err(format!("sink `{name}`: {what}"));
        match &to {
            To::Otlp(otlp) if otlp.certificate.is_some() != otlp.key.is_some() => {
                return wrong("certificate and key go together");
            }
            To::Otlp(otlp) if !otlp.encrypted() && otlp.roots.is_some() => {
                return wrong("roots are for an https endpoint");
            }
            To::Syslog(syslog) if syslog.certificate.is_some() != syslog.key.is_some() => {
                return wrong("certificate and key go together");
            }
            To::Syslog(syslog) if syslog.transport != Transport::Tls && syslog.roots.is_some() => {
                return wrong("roots are for the transport tls");
            }
            To::Syslog(syslog) => {
                let path = syslog.address.starts_with('/');
                if path != (syslog.transport == Transport::Unix) {
                    return wrong("the address is a path for the transport unix, else host:port");
                }
                if !path && syslog.host_and_port().is_none() {
                    return wrong("the address is not host:port");
                }
            }
            To::Otlp(_) | To::Stdout(_) => {}
        }
        Ok(Self {
            name,
            from: fields.from,
            format: fields.format,
            filter: fields.filter,
            to,
        })
    }
}

impl From<Sink> for Fields {
    fn from(sink: Sink) -> Self {
        let (mut otlp, mut stdout, mut syslog) = (None, None, None);
        match sink.to {
            To::Otlp(to) => otlp = Some(*to),
            To::Stdout(to) => stdout = Some(to),
            To::Syslog(to) => syslog = Some(*to),
        }
        Self {
            name: sink.name,
            from: sink.from,
            format: sink.format,
            filter: sink.filter,
            otlp,
            stdout,
            syslog,
        }
    }
}

impl Filter {
    pub fn takes(&self, kind: &str) -> bool {
        self.kinds.is_empty() || self.kinds.iter().any(|k| k.name() == kind)
    }
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Connection => "connection",
            Self::Request => "request",
            Self::Flow => "flow",
            Self::Bypass => "bypass",
            Self::Process => "process",
            Self::Token => "token",
            Self::Authority => "authority",
            Self::Agent => "agent",
            Self::Gap => "gap",
            Self::Checkpoint => "checkpoint",
            Self::Retention => "retention",
            Self::Reopened => "reopened",
        }
    }
}

impl Otlp {
    pub fn encrypted(&self) -> bool {
        self.endpoint.0.scheme() == "https"
    }
}

impl Syslog {
    /// A host without the brackets of IPv6.
    pub fn host_and_port(&self) -> Option<(&str, u16)> {
        let (host, port) = self.address.rsplit_once(':')?;
        let host = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(host);
        Some((host, port.parse().ok()?)).filter(|(host, _)| !host.is_empty())
    }
}

impl Default for Facility {
    fn default() -> Self {
        Self(13)
    }
}

impl TryFrom<u8> for Facility {
    type Error = String;

    fn try_from(facility: u8) -> Result<Self, String> {
        match facility {
            0..=23 => Ok(Self(facility)),
            _ => Err(format!("{facility} is no facility; they are 0 to 23")),
        }
    }
}

impl From<Facility> for u8 {
    fn from(facility: Facility) -> Self {
        facility.0
    }
}

impl TryFrom<BTreeMap<String, String>> for Headers {
    type Error = String;

    fn try_from(fields: BTreeMap<String, String>) -> Result<Self, String> {
        let mut headers = HeaderMap::new();
        for (name, value) in &fields {
            let (name, value) = header(name, value)?;
            if is_secret(name.as_str()) {
                return Err(format!("`{name}` is a secret: put it into headersFile"));
            }
            headers.insert(name, value);
        }
        Ok(Self(headers))
    }
}

impl From<Headers> for BTreeMap<String, String> {
    fn from(headers: Headers) -> Self {
        let text = |v: &HeaderValue| String::from_utf8_lossy(v.as_bytes()).into_owned();
        (headers.0.iter())
            .map(|(name, value)| (name.to_string(), text(value)))
            .collect()
    }
}

/// A header as configuration or a file of headers has it. An error does not show its
/// value.
pub fn header(name: &str, value: &str) -> Result<(HeaderName, HeaderValue), String> {
    // The exchange's own, and those that say how to read it.
    const OWN: [&str; 8] = [
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "host",
        "te",
        "transfer-encoding",
        "user-agent",
    ];
    let name: HeaderName = (name.parse()).map_err(|_e| format!("`{name}` is no header name"))?;
    if OWN.contains(&name.as_str()) || name.as_str().starts_with("grpc-") {
        return Err(format!("`{name}` cannot be set"));
    }
    // gRPC has no others (PROTOCOL-HTTP2, ASCII-Value).
    let visible = !value.is_empty() && value.bytes().all(|b| (0x20..=0x7e).contains(&b));
    match HeaderValue::from_str(value) {
        Ok(value) if visible => Ok((name, value)),
        _ => Err(format!("the value of `{name}` is not visible ASCII")),
    }
}

fn is_secret(name: &str) -> bool {
    ["auth", "cookie", "key", "password", "secret", "token"]
        .iter()
        .any(|part| name.contains(part))
}

impl TryFrom<String> for Endpoint {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        // Its text may hold a password: it is not told.
        let url = Url::parse(&text).map_err(|e| format!("the endpoint is no URL: {e}"))?;
        match () {
            () if !matches!(url.scheme(), "http" | "https") => {
                Err("the endpoint is neither an http nor an https URL".into())
            }
            () if url.has_authority() && !url.username().is_empty() || url.password().is_some() => {
                Err("the endpoint holds credentials: put them into headersFile".into())
            }
            () if url.query().is_some() || url.fragment().is_some() => {
                Err("the endpoint has a query or a fragment".into())
            }
            () => Ok(Self(url)),
        }
    }
}

impl From<Endpoint> for String {
    fn from(endpoint: Endpoint) -> Self {
        endpoint.0.into()
    }
}

fn default_timeout() -> Span {
    Span::seconds(10)
}

fn default_message() -> Bytes {
    Bytes(8 << 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::parse_document;

    fn parse(text: &str) -> Result<Sinks, String> {
        parse_document(std::path::Path::new("sinks.yaml"), text).map_err(|e| e.to_string())
    }

    #[test]
    fn what_is_wrong_is_refused() {
        let otlp =
            |more: &str| format!("[{{name: a, otlp: {{endpoint: 'https://c:4317'{more}}}}}]");
        let syslog = |more: &str| format!("[{{name: a, syslog: {{{more}}}}}]");
        for (text, part) in [
            ("[{name: A, stdout: {}}]".into(), "no name of a sink"),
            ("[{name: ../a, stdout: {}}]".into(), "no name of a sink"),
            ("[{name: a}]".into(), "needs one of"),
            (
                "[{name: a, stdout: {}, syslog: {address: 'a:1'}}]".into(),
                "needs one of",
            ),
            (
                "[{name: a, stdout: {}}, {name: a, stdout: {}}]".into(),
                "two sinks",
            ),
            ("[{name: a, stdout: {x: 1}}]".into(), "x"),
            (
                "[{name: a, stdout: {}, filter: {kinds: [conection]}}]".into(),
                "conection",
            ),
            (otlp(", tls: {}"), "tls"),
            (otlp(", headers: {authorization: x}"), "headersFile"),
            (otlp(", headers: {x-api-key: x}"), "headersFile"),
            (otlp(", headers: {host: x}"), "cannot be set"),
            (otlp(", headers: {'a b': x}"), "no header name"),
            (otlp(", headers: {a: ü}"), "visible ASCII"),
            (otlp(", certificate: c.pem"), "go together"),
            (
                "[{name: a, otlp: {endpoint: 'http://c', roots: r.pem}}]".into(),
                "https",
            ),
            ("[{name: a, otlp: {endpoint: 'ftp://c'}}]".into(), "neither"),
            (
                "[{name: a, otlp: {endpoint: 'https://u:hunter2@c'}}]".into(),
                "credentials",
            ),
            (syslog("address: '/dev/log'"), "path"),
            (syslog("address: 'c:514', transport: unix"), "path"),
            (syslog("address: ':514'"), "host:port"),
            (syslog("address: 'c:x'"), "host:port"),
            (syslog("address: 'c:514', facility: 24"), "facility"),
            (syslog("address: 'c:514', roots: r.pem"), "transport tls"),
            (syslog("address: 'c:514', messageBytes: 10"), "1024"),
        ] {
            let error = parse(&text).expect_err(&text);
            assert!(error.contains(part), "{text}: {error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn what_is_right_comes_out_as_it_went_in() {
        let text = "
- name: collector
  from: beginning
  format: ocsf
  filter: {kinds: [connection, gap]}
  otlp: {endpoint: 'https://c:4318/', protocol: http, headers: {x-tenant: t}, headersFile: h,
    compression: gzip, timeout: 3s, roots: r, certificate: c, key: k}
- name: out
  stdout: {}
- name: log-1
  syslog: {address: '[2001:db8::1]:6514', transport: tls, facility: 16, messageBytes: 2048}
";
        let sinks = parse(text).expect("it parses");
        let written = serde_json::to_string(&sinks).expect("JSON");
        assert_eq!(parse(&written).expect("it parses again"), sinks);
        let To::Syslog(syslog) = &sinks.0[2].to else {
            panic!("{sinks:?}")
        };
        assert_eq!(syslog.host_and_port(), Some(("2001:db8::1", 6514)));
        let filter = &sinks.0[0].filter;
        assert!(filter.takes("gap") && !filter.takes("request"));
        assert!(sinks.0[1].filter.takes("request"));
    }
}
