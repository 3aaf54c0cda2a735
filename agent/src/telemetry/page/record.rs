//! What is read out of records, whoever wrote them: text is cut, nothing is believed to
//! be there.

use std::fmt;

use serde::Serialize;
use serde_json::Value;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// Longest text that is kept of a field.
const LONGEST: usize = 256;

/// When something was, milliseconds since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct At(i64);

impl At {
    pub fn now() -> Self {
        Self::of(OffsetDateTime::now_utc())
    }

    pub fn parse(text: &str) -> Option<Self> {
        OffsetDateTime::parse(text, &Rfc3339).ok().map(Self::of)
    }

    pub fn seconds(self) -> i64 {
        self.0.div_euclid(1_000)
    }

    #[cfg(test)]
    pub fn from_seconds(seconds: i64) -> Self {
        Self(seconds * 1_000)
    }

    fn of(time: OffsetDateTime) -> Self {
        Self((time.unix_timestamp_nanos() / 1_000_000) as i64)
    }
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = OffsetDateTime::from_unix_timestamp_nanos(i128::from(self.0) * 1_000_000);
        let text = time.ok().and_then(|time| time.format(&Rfc3339).ok());
        f.write_str(&text.unwrap_or_default())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Allow,
    Deny,
    Failed,
}

impl Verdict {
    /// What was decided. Traffic past the agent was denied where the agent cut it; a
    /// token that did not come has failed.
    pub fn of(record: &Value) -> Option<Self> {
        match (text(record, "/kind"), text(record, "/verdict")) {
            (_, "allow") => Some(Self::Allow),
            (_, "deny") => Some(Self::Deny),
            (_, "failed") => Some(Self::Failed),
            ("bypass", _) if record["cut"] == true => Some(Self::Deny),
            ("token", _) if record.get("error").is_some() => Some(Self::Failed),
            ("token", _) => Some(Self::Allow),
            _ => None,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Failed => "failed",
        }
    }
}

/// Text at a JSON pointer; empty where there is none.
pub fn text<'a>(record: &'a Value, pointer: &str) -> &'a str {
    record
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

/// The policy that decided: its kind, and its name with its namespace.
pub fn policy(record: &Value) -> Option<String> {
    let policy = record.get("policy")?;
    let field = |name: &str| policy.get(name).and_then(Value::as_str).unwrap_or("?");
    Some(cut(&format!(
        "{} {}/{}",
        field("kind"),
        field("namespace"),
        field("name")
    )))
}

/// At most so much of a text that others chose.
pub fn cut(text: &str) -> String {
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_compared_as_times() {
        let at = |text: &str| At::parse(text).expect(text);
        assert!(at("2026-01-01T00:00:00Z") < at("2026-01-01T00:00:00.001Z"));
        assert_eq!(at("2026-01-01T01:00:00+01:00"), at("2026-01-01T00:00:00Z"));
        assert_eq!(
            at("2026-01-01T00:00:00Z").to_string(),
            "2026-01-01T00:00:00Z"
        );
        assert_eq!(At::parse("yesterday"), None);
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        let long = "ä".repeat(LONGEST + 1);
        assert_eq!(cut(&long).chars().count(), LONGEST + 1);
        assert!(cut(&long).ends_with('…'));
        let fits = "ä".repeat(LONGEST);
        assert_eq!(cut(&fits), fits);
    }
}
