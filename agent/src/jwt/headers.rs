//! Headers that rules put out: what the application gets, and what clients cannot fake.

use http::{HeaderName, HeaderValue, header};
use serde_json::Value;

use super::{claims::Claims, rules::Rule};
use crate::request::Edits;

/// Whether a rule may put a claim into this header: not where it would change how the
/// message is framed or routed.
pub fn may_be_output(name: &HeaderName) -> bool {
    ![
        header::CONNECTION,
        header::CONTENT_LENGTH,
        header::EXPECT,
        header::HOST,
        header::TE,
        header::TRAILER,
        header::TRANSFER_ENCODING,
        header::UPGRADE,
    ]
    .contains(name)
        && !matches!(name.as_str(), "keep-alive" | "proxy-connection")
}

/// Takes out whatever the application would take for a rule's output, wherever it
/// may come: trailers are edited, too.
pub(super) fn without_spoofed(rules: &[&Rule]) -> Edits {
    let mut edits = Edits::default();
    for rule in rules {
        let claims = rule.claims_to_headers.iter().map(|(name, _)| name);
        let outputs = rule.payload_to_header.iter().chain(claims);
        for name in outputs.filter(|name| may_be_output(name)) {
            remove(&mut edits, name);
        }
    }
    edits
}

/// Values that no header can carry unchanged are left out.
pub(super) fn put_out(rule: &Rule, token: &str, claims: &Claims, edits: &mut Edits) {
    let payload = rule.payload_to_header.iter().map(|name| {
        let payload = token.split('.').nth(1).map(str::to_owned);
        (name, payload)
    });
    let claims = rule.claims_to_headers.iter().map(|(name, path)| {
        let value = claims.member(path).and_then(header_text);
        (name, value)
    });
    for (name, value) in payload
        .chain(claims)
        .filter(|(name, _)| may_be_output(name))
    {
        let value = value
            .filter(|value| value.trim_ascii().len() == value.len())
            .and_then(|value| HeaderValue::try_from(value.into_bytes()).ok());
        if let Some(mut value) = value {
            value.set_sensitive(true);
            edits.set.push((name.clone(), value));
        }
    }
}

pub(super) fn remove(edits: &mut Edits, name: &HeaderName) {
    if !edits.remove.contains(name) {
        edits.remove.push(name.clone());
    }
}

fn header_text(claim: &Value) -> Option<String> {
    /// Whole numbers up to here are exact.
    const EXACT: f64 = 9_007_199_254_740_992.0; // 2^53
    match claim {
        Value::String(text) => Some(text.clone()),
        Value::Bool(value) => Some(value.to_string()),
        Value::Number(number) => Some(match number.as_f64() {
            Some(float) if number.is_f64() && float.fract() == 0.0 && float.abs() < EXACT => {
                format!("{float:.0}")
            }
            _ => number.to_string(),
        }),
        _ => None,
    }
}
