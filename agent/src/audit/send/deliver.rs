//! What all receivers have in common: they are handed records, and take them or not.

use std::{borrow::Cow, time::Duration};

use super::{
    Cause,
    config::{Format, Sink, To},
    follow::Entry,
    otlp::Exporter,
    stdout,
    syslog::Sender,
};
use crate::{audit::ocsf, identity::TrustDomain};

/// Records that were acknowledged.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// Of them, those that the receiver will not keep.
    pub rejected: u64,
    /// Why, in its words.
    pub message: String,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Failure {
    /// These records, as they are, will never be taken.
    Bad { why: String },
    /// So many at once are not taken.
    Large { why: String },
    /// Whatever is sent is not taken now; the receiver may say for how long.
    Later {
        after: Option<Duration>,
        why: String,
    },
}

pub enum Target {
    Otlp(Box<Exporter>),
    Stdout(Format),
    Syslog(Box<Sender>),
}

impl Failure {
    pub fn later(why: impl ToString) -> Self {
        Self::Later {
            after: None,
            why: why.to_string(),
        }
    }
}

impl Target {
    pub fn new(sink: &Sink, node: &str, domain: &TrustDomain) -> Result<Self, Cause> {
        Ok(match &sink.to {
            To::Otlp(otlp) => Self::Otlp(Box::new(Exporter::new(otlp, sink.format, node, domain)?)),
            To::Stdout(_) => Self::Stdout(sink.format),
            To::Syslog(syslog) => Self::Syslog(Box::new(Sender::new(syslog, sink.format, node)?)),
        })
    }

    pub async fn send(&mut self, entries: &[Entry]) -> Result<Taken, Failure> {
        match self {
            Self::Otlp(exporter) => exporter.send(entries).await,
            Self::Stdout(format) => stdout::send(entries, *format).await,
            Self::Syslog(sender) => sender.send(entries).await,
        }
    }

    /// Whether the receiver takes what is of its protocol and says nothing: what refuses
    /// that does not refuse a record for what is in it.
    pub async fn takes_nothing(&mut self) -> Result<(), Failure> {
        match self {
            Self::Otlp(exporter) => exporter.send(&[]).await.map(|_taken| ()),
            Self::Stdout(_) | Self::Syslog(_) => Ok(()),
        }
    }

    /// Ends a connection as its protocol has it.
    pub async fn close(&mut self) {
        if let Self::Syslog(sender) = self {
            sender.close().await;
        }
    }
}

impl Entry {
    /// The record in a format; `None` where OCSF has nothing for it.
    pub fn formatted(&self, format: Format) -> Option<Cow<'_, str>> {
        match format {
            Format::Postern => Some(Cow::Borrowed(&self.text)),
            Format::Ocsf => ocsf::map(&self.record).map(|event| Cow::Owned(event.to_string())),
        }
    }

    pub fn kind(&self) -> &str {
        self.record["kind"].as_str().unwrap_or_default()
    }

    /// None: of no log.
    pub fn seq(&self) -> Option<u64> {
        self.record["seq"].as_u64()
    }

    pub fn severity(&self) -> Severity {
        Severity::of(&self.record)
    }
}

/// How much a record is worth a look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    Info,
    /// Somebody was refused, or tried what is not allowed.
    Warning,
    /// The log itself is not whole.
    Error,
}

impl Severity {
    pub fn of(record: &serde_json::Value) -> Self {
        let is = |field: &str, values: &[&str]| {
            record[field].as_str().is_some_and(|v| values.contains(&v))
        };
        match record["kind"].as_str() {
            Some("gap") => Self::Error,
            Some("bypass") => Self::Warning,
            Some("authority") if is("event", &["refusal", "lockout", "reuse"]) => Self::Warning,
            _ if is("verdict", &["deny"]) || record["error"].is_string() => Self::Warning,
            _ => Self::Info,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn severities() {
        for (record, severity) in [
            (
                json!({"kind": "connection", "verdict": "allow"}),
                Severity::Info,
            ),
            (
                json!({"kind": "connection", "verdict": "deny"}),
                Severity::Warning,
            ),
            (
                json!({"kind": "request", "verdict": "deny"}),
                Severity::Warning,
            ),
            (
                json!({"kind": "connection", "verdict": "failed"}),
                Severity::Info,
            ),
            (json!({"kind": "gap", "count": 1}), Severity::Error),
            (json!({"kind": "bypass"}), Severity::Warning),
            (
                json!({"kind": "authority", "event": "lockout"}),
                Severity::Warning,
            ),
            (
                json!({"kind": "authority", "event": "login"}),
                Severity::Info,
            ),
            (
                json!({"kind": "token", "error": "no answer"}),
                Severity::Warning,
            ),
            (json!({"kind": "checkpoint"}), Severity::Info),
        ] {
            assert_eq!(Severity::of(&record), severity, "{record}");
        }
    }
}
