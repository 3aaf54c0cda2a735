//! A record as a message of RFC 5424.

use super::super::{config::Format, deliver::Severity, follow::Entry};

/// The enterprise number that RFC 5612 keeps for documentation: Postern has none.
const ENTERPRISE: u32 = 32473;
/// Longest HOSTNAME and MSGID (RFC 5424 6).
const MAX_HOST: usize = 255;
const MAX_ID: usize = 32;

/// What is the same for all messages.
pub struct Header {
    pub facility: u8,
    pub host: String,
    pub process: u32,
}

impl Header {
    pub fn new(facility: u8, node: &str) -> Self {
        Self {
            facility,
            host: name(node, MAX_HOST),
            process: std::process::id(),
        }
    }

    /// `None`: the format has nothing for this record. A message that is too long is cut
    /// where a character ends, and tells how long it was.
    pub fn message(&self, entry: &Entry, format: Format, limit: usize) -> Option<String> {
        let text = entry.formatted(format)?;
        let severity = match entry.severity() {
            Severity::Info => 6,
            Severity::Warning => 4,
            Severity::Error => 3,
        };
        let head = format!(
            "<{}>1 {} {} postern {} {} ",
            u32::from(self.facility) * 8 + severity,
            entry.record["time"]
                .as_str()
                .and_then(timestamp)
                .as_deref()
                .unwrap_or("-"),
            self.host,
            self.process,
            name(entry.kind(), MAX_ID),
        );
        // RFC 5424 6.4: UTF-8 is announced; what is ASCII alone need not be.
        let mark = if text.is_ascii() { "" } else { "\u{feff}" };
        let whole = format!("{head}{} {mark}{text}", data(entry, None));
        if whole.len() <= limit {
            return Some(whole);
        }
        let data = data(entry, Some(text.len()));
        let room = limit.saturating_sub(head.len() + data.len() + 1 + mark.len());
        let cut = &text[..text.floor_char_boundary(room)];
        Some(format!("{head}{data} {mark}{cut}"))
    }
}

fn data(entry: &Entry, whole: Option<usize>) -> String {
    let mut data = format!("[postern@{ENTERPRISE}");
    if let Some(seq) = entry.seq() {
        data.push_str(&format!(" seq=\"{seq}\""));
    }
    data.push_str(&format!(" kind=\"{}\"", escaped(entry.kind())));
    if let Some(bytes) = whole {
        data.push_str(&format!(" truncated=\"{bytes}\""));
    }
    data.push(']');
    data
}

/// PARAM-VALUE (RFC 5424 6.3.3).
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if matches!(c, '"' | '\\' | ']') {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// PRINTUSASCII of a bounded length; `-` is "none".
fn name(text: &str, longest: usize) -> String {
    let printable = text.chars().filter(char::is_ascii_graphic);
    let name: String = printable.take(longest).collect();
    if name.is_empty() { "-".into() } else { name }
}

/// RFC 3339 with at most six digits of a second (RFC 5424 6.2.3).
fn timestamp(text: &str) -> Option<String> {
    let Some((whole, rest)) = text.split_once('.') else {
        return Some(text.to_owned());
    };
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    let (fraction, zone) = rest.split_at(digits);
    Some(format!(
        "{whole}.{}{zone}",
        &fraction[..fraction.len().min(6)]
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn message(record: Value, limit: usize) -> String {
        let header = Header {
            facility: 13,
            host: "node1".into(),
            process: 42,
        };
        let entry = Entry {
            text: record.to_string(),
            record,
        };
        header
            .message(&entry, Format::Postern, limit)
            .expect("a message")
    }

    #[test]
    fn every_field_is_where_it_belongs() {
        let record = json!({"seq": 3, "time": "2026-01-02T03:04:05.123456789Z",
            "kind": "connection", "verdict": "deny"});
        let expected = format!(
            "<108>1 2026-01-02T03:04:05.123456Z node1 postern 42 connection \
             [postern@32473 seq=\"3\" kind=\"connection\"] {record}"
        );
        assert_eq!(message(record, 8_192), expected);
    }

    #[test]
    fn what_is_not_ascii_is_announced() {
        let text = message(json!({"kind": "agent", "detail": "é"}), 8_192);
        assert!(text.contains("] \u{feff}{"), "{text}");
        assert!(text.starts_with("<110>1 - "), "{text}");
    }

    #[test]
    fn what_is_too_long_is_cut_and_says_so() {
        let record = json!({"seq": 1, "kind": "agent", "detail": "é".repeat(2_000)});
        let (whole, limit) = (record.to_string().len(), 1_024);
        let text = message(record, limit);
        assert!((limit - 1..=limit).contains(&text.len()), "{}", text.len());
        assert!(text.contains(&format!(" truncated=\"{whole}\"]")), "{text}");
        assert!(text.ends_with('é'));
    }

    #[test]
    fn names_and_values_cannot_break_out() {
        let text = message(json!({"kind": "a b\"]x\n"}), 8_192);
        assert!(
            text.contains(" ab\"]x [postern@32473 kind=\"a b\\\"\\]x\n\"] "),
            "{text}"
        );
        assert_eq!(name("", 5), "-");
        assert_eq!(name("nodé-long-name", 5), "nod-l");
        assert_eq!(
            timestamp("2026-01-02T03:04:05Z").as_deref(),
            Some("2026-01-02T03:04:05Z")
        );
        assert_eq!(
            timestamp("2026-01-02T03:04:05.1+02:00").as_deref(),
            Some("2026-01-02T03:04:05.1+02:00")
        );
    }
}
