//! Values of filters, checked while the command line is read: an error says what is
//! wrong and what would be right.

use std::{net::IpAddr, str::FromStr, time::Duration};

use serde_json::Value;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::entry::{number, text};

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Wrong(String);

/// A moment, or so long before now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    At(OffsetDateTime),
    Ago(Duration),
}

/// A text, or the beginning of one where `*` stands at its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pattern {
    Exact(String),
    Prefix(String),
}

/// A SPIFFE ID, or the beginning of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity(Pattern);

/// A path, or the beginning of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathOf(Pattern);

/// `name` or `namespace/name`, of a pod or of a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    namespace: Option<String>,
    name: String,
}

/// One end of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    Identity(Identity),
    Address(IpAddr),
    Pod(Name),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Process {
    Pid(u64),
    Executable(String),
    Command(String),
}

/// `404` or `4xx`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Exact(u64),
    Class(u64),
}

/// Trace id of W3C Trace Context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace(String);

/// Both ends are within.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub from: u64,
    pub to: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind(&'static str);

/// What records can be.
const KINDS: [&str; 12] = [
    "connection",
    "request",
    "flow",
    "bypass",
    "process",
    "token",
    "authority",
    "agent",
    "gap",
    "checkpoint",
    "retention",
    "reopened",
];

impl When {
    pub fn at(self, now: OffsetDateTime) -> OffsetDateTime {
        match self {
            Self::At(moment) => moment,
            // Further back than time goes is all.
            Self::Ago(span) => time::Duration::try_from(span)
                .ok()
                .and_then(|span| now.checked_sub(span))
                .unwrap_or(OffsetDateTime::UNIX_EPOCH),
        }
    }
}

impl Pattern {
    pub fn fits(&self, value: &str) -> bool {
        match self {
            Self::Exact(exact) => value == exact,
            Self::Prefix(prefix) => value.starts_with(prefix),
        }
    }

    fn parse(text: &str) -> Result<Self, Wrong> {
        let (rest, star) = match text.strip_suffix('*') {
            Some(rest) => (rest, true),
            None => (text, false),
        };
        if rest.contains('*') {
            return Err(Wrong(format!("`{text}`: `*` may stand at the end only")));
        }
        Ok(match star {
            true => Self::Prefix(rest.to_owned()),
            false => Self::Exact(rest.to_owned()),
        })
    }
}

impl Identity {
    pub fn fits(&self, end: &Value) -> bool {
        text(end, "/identity").is_some_and(|id| self.0.fits(id))
    }
}

impl PathOf {
    pub fn fits(&self, path: &str) -> bool {
        self.0.fits(path)
    }
}

impl Name {
    /// Of an object that has its name in the member `name`.
    pub fn fits(&self, object: &Value, name: &str) -> bool {
        object[name] == *self.name
            && (self.namespace.as_ref()).is_none_or(|own| object["namespace"] == **own)
    }
}

impl End {
    pub fn fits(&self, end: &Value) -> bool {
        match self {
            Self::Identity(identity) => identity.fits(end),
            Self::Pod(pod) => pod.fits(end, "pod"),
            Self::Address(ip) => ["/address", "/local"]
                .into_iter()
                .filter_map(|pointer| text(end, pointer))
                .filter_map(|address| address.parse::<std::net::SocketAddr>().ok())
                .any(|address| address.ip() == *ip),
        }
    }
}

impl Process {
    pub fn fits(&self, process: &Value) -> bool {
        match self {
            Self::Pid(pid) => number(process, "/pid") == Some(*pid),
            Self::Executable(path) => process["exe"] == **path,
            Self::Command(name) => process["comm"] == **name,
        }
    }
}

impl Status {
    pub fn fits(self, status: u64) -> bool {
        match self {
            Self::Exact(exact) => status == exact,
            Self::Class(class) => status / 100 == class,
        }
    }
}

impl Trace {
    pub fn fits(&self, trace: &str) -> bool {
        trace.eq_ignore_ascii_case(&self.0)
    }
}

impl Range {
    pub fn contains(self, seq: u64) -> bool {
        (self.from..=self.to).contains(&seq)
    }
}

impl Kind {
    pub fn is(self, kind: &str) -> bool {
        self.0 == kind
    }
}

macro_rules! read {
    ($($name:ty: $read:expr;)*) => {$(
        impl FromStr for $name {
            type Err = Wrong;

            fn from_str(text: &str) -> Result<Self, Wrong> {
                let read: fn(&str) -> Result<Self, Wrong> = $read;
                read(text)
            }
        }
    )*};
}

read! {
    When: |text| {
        if let Ok(moment) = OffsetDateTime::parse(text, &Rfc3339) {
            return Ok(Self::At(moment));
        }
        humantime::parse_duration(text).map(Self::Ago).map_err(|_| Wrong(format!(
            "`{text}` is neither a time such as 2026-01-31T12:00:00Z nor a span back such as 15m or 2h"
        )))
    };
    Identity: |text| match text.strip_prefix("spiffe://") {
        Some(_) => Pattern::parse(text).map(Self),
        None => Err(Wrong(format!(
            "`{text}` is no SPIFFE ID such as spiffe://cluster.local/ns/shop/sa/cart; a `*` may end it"
        ))),
    };
    PathOf: |text| match text.starts_with(['/', '*']) {
        true => Pattern::parse(text).map(Self),
        false => Err(Wrong(format!("`{text}` is no path: it begins with `/`; a `*` may end it"))),
    };
    Name: |text| {
        let parts: Vec<&str> = text.split('/').collect();
        match parts[..] {
            [name] if !name.is_empty() => Ok(Self { namespace: None, name: name.into() }),
            [namespace, name] if !namespace.is_empty() && !name.is_empty() => Ok(Self {
                namespace: Some(namespace.into()),
                name: name.into(),
            }),
            _ => Err(Wrong(format!("`{text}` is neither `name` nor `namespace/name`"))),
        }
    };
    End: |text| {
        if text.starts_with("spiffe:") {
            return text.parse().map(Self::Identity);
        }
        if let Ok(ip) = text.parse() {
            return Ok(Self::Address(ip));
        }
        text.parse().map(Self::Pod).map_err(|_| Wrong(format!(
            "`{text}` is neither a SPIFFE ID, nor an address, nor a pod (`name` or `namespace/name`)"
        )))
    };
    Process: |text| match text.parse() {
        Ok(pid) => Ok(Self::Pid(pid)),
        Err(_) if text.is_empty() => Err(Wrong("a process is named by pid, by path or by name".into())),
        Err(_) if text.starts_with('/') => Ok(Self::Executable(text.into())),
        Err(_) => Ok(Self::Command(text.into())),
    };
    Status: |text| {
        let wrong = || Wrong(format!("`{text}` is no status such as 403 or 4xx"));
        let class = text.strip_suffix("xx").and_then(|class| class.parse().ok());
        match (class, text.parse()) {
            (Some(class @ 1..=5), _) => Ok(Self::Class(class)),
            (_, Ok(status @ 100..=599)) => Ok(Self::Exact(status)),
            _ => Err(wrong()),
        }
    };
    Trace: |text| match text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit()) {
        true => Ok(Self(text.into())),
        false => Err(Wrong(format!("`{text}` is no trace id: 32 hexadecimal digits"))),
    };
    Range: |text| {
        let wrong = || Wrong(format!(
            "`{text}` is no range such as 100..200, 100.. or ..200 (both ends are within)"
        ));
        let (from, to) = text.split_once("..").unwrap_or((text, text));
        let bound = |text: &str, open: u64| match text {
            "" => Ok(open),
            text => text.parse().map_err(|_| wrong()),
        };
        let (from, to) = (bound(from, 1)?, bound(to, u64::MAX)?);
        match from <= to && !text.is_empty() {
            true => Ok(Self { from, to }),
            false => Err(wrong()),
        }
    };
    Kind: |text| match KINDS.iter().find(|kind| **kind == text) {
        Some(kind) => Ok(Self(kind)),
        None => Err(Wrong(format!("`{text}` is no kind of record; they are {}", KINDS.join(", ")))),
    };
}
