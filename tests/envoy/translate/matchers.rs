//! Envoy's matchers of an authorization.

use std::net::IpAddr;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::typed;

/// An authorization has two sides, whose operators have different names.
#[derive(Clone, Copy, Debug)]
pub enum Side {
    /// What is asked for.
    Permission,
    /// Who asks.
    Principal,
}

impl Side {
    pub fn not(self, term: Value) -> Value {
        match self {
            Side::Permission => json!({ "not_rule": term }),
            Side::Principal => json!({ "not_id": term }),
        }
    }

    pub fn any(self, terms: impl IntoIterator<Item = Value>) -> Value {
        let terms: Vec<Value> = terms.into_iter().collect();
        match self {
            Side::Permission => json!({"or_rules": {"rules": terms}}),
            Side::Principal => json!({"or_ids": {"ids": terms}}),
        }
    }

    /// Without terms, everything.
    pub fn all(self, terms: Vec<Value>) -> Value {
        match self {
            _ if terms.is_empty() => json!({"any": true}),
            Side::Permission => json!({"and_rules": {"rules": terms}}),
            Side::Principal => json!({"and_ids": {"ids": terms}}),
        }
    }
}

/// Policies' four forms: exact, prefix, suffix, presence.
pub fn string(value: &str) -> Value {
    match value.strip_prefix('*') {
        Some("") => json!({"safe_regex": {"regex": ".+"}}),
        Some(suffix) => json!({ "suffix": suffix }),
        None => string_end(value),
    }
}

/// The forms whose star is at the end.
pub fn string_end(value: &str) -> Value {
    match value.strip_suffix('*') {
        Some("") => json!({"safe_regex": {"regex": ".+"}}),
        Some(prefix) => json!({ "prefix": prefix }),
        None => json!({ "exact": value }),
    }
}

pub fn header(name: &str, value: &str, ignore_case: bool) -> Value {
    if value == "*" {
        return json!({"header": {"name": name, "present_match": true}});
    }
    let mut matcher = string(value);
    matcher["ignore_case"] = ignore_case.into();
    json!({"header": {"name": name, "string_match": matcher}})
}

pub fn path(value: &str) -> Value {
    if !value.contains("{*}") && !value.contains("{**}") {
        return json!({"url_path": {"path": string(value)}});
    }
    let template = value.replace("{**}", "**").replace("{*}", "*");
    json!({"uri_template": typed(
        "envoy.path.match.uri_template.uri_template_matcher",
        "envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig",
        json!({ "path_template": template }),
    )})
}

/// An address or a block of them.
pub fn range(value: &str) -> Result<Value> {
    let (address, length) = match value.split_once('/') {
        Some((address, length)) => (address.parse::<IpAddr>(), Some(length)),
        None => (value.parse(), None),
    };
    let address = address.with_context(|| value.to_owned())?;
    let length = match length {
        Some(length) => length.parse::<u8>()?,
        None if address.is_ipv4() => 32,
        None => 128,
    };
    Ok(json!({"address_prefix": address.to_string(), "prefix_len": length}))
}

/// A peer whose URI is matched.
pub fn identity(matcher: Value) -> Value {
    json!({"authenticated": {"principal_name": matcher}})
}

/// One of the four forms, of the URI behind its scheme.
pub fn uri(value: &str) -> Value {
    identity(match (value.strip_prefix('*'), value.strip_suffix('*')) {
        (Some(""), _) => json!({"safe_regex": {"regex": ".+"}}),
        (Some(suffix), _) => {
            json!({"safe_regex": {"regex": format!("spiffe://.*{}", escaped(suffix))}})
        }
        (None, Some(prefix)) => json!({"prefix": format!("spiffe://{prefix}")}),
        (None, None) => json!({"exact": format!("spiffe://{value}")}),
    })
}

/// A claim at the top level.
pub fn claim(name: &str, matcher: Value) -> Value {
    claim_at(&[name], json!({ "string_match": matcher }))
}

pub fn claim_at(path: &[&str], value: Value) -> Value {
    let path = ["payload"].iter().chain(path);
    let path: Vec<Value> = path.map(|key| json!({ "key": key })).collect();
    let filter = "envoy.filters.http.jwt_authn";
    json!({"sourced_metadata": {
        "metadata_matcher": {"filter": filter, "path": path, "value": value},
    }})
}

/// Taken as it is written by a regular expression.
pub fn escaped(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        if !c.is_ascii_alphanumeric() && c != '-' && c != '/' {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

pub fn texts(values: &Value) -> Result<Vec<&str>> {
    let values = values.as_array().context("values are a list")?;
    values
        .iter()
        .map(|value| value.as_str().context("a value is a string"))
        .collect()
}
