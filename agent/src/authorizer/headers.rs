//! Headers between a request, a provider and a client.

use http::{HeaderName, HeaderValue, header};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::request::{Edits, Request};

/// Names of headers: `x-user`, `x-user-*` or `*-user`. Istio's presence match `*`
/// is refused, as there.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub enum Pattern {
    Exact(HeaderName),
    Prefix(String),
    Suffix(String),
}

impl Pattern {
    pub fn matches(&self, name: &HeaderName) -> bool {
        match self {
            Self::Exact(exact) => exact == name,
            Self::Prefix(start) => name.as_str().starts_with(start.as_str()),
            Self::Suffix(end) => name.as_str().ends_with(end.as_str()),
        }
    }
}

impl TryFrom<String> for Pattern {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a header name, `prefix*` or `*suffix`");
        let name = |part: &str| HeaderName::try_from(part).map_err(|_e| wrong());
        // A star is a valid character of a name (RFC 9110 5.6.2), but none is meant.
        if text.matches('*').count() > 1 {
            return Err(wrong());
        }
        if let Some(start) = text.strip_suffix('*') {
            Ok(Self::Prefix(name(start)?.as_str().to_owned()))
        } else if let Some(end) = text.strip_prefix('*') {
            Ok(Self::Suffix(name(end)?.as_str().to_owned()))
        } else if text.contains('*') {
            Err(wrong())
        } else {
            name(&text).map(Self::Exact)
        }
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> Self {
        match pattern {
            Pattern::Exact(name) => name.as_str().to_owned(),
            Pattern::Prefix(start) => format!("{start}*"),
            Pattern::Suffix(end) => format!("*{end}"),
        }
    }
}

/// Headers that belong to one connection or frame one message (RFC 9110 7.6.1),
/// and `Host`, which policy has been matched against: never carried over.
pub fn framing(name: &HeaderName) -> bool {
    const CONNECTION: [HeaderName; 7] = [
        header::CONNECTION,
        header::CONTENT_LENGTH,
        header::HOST,
        header::TE,
        header::TRAILER,
        header::TRANSFER_ENCODING,
        header::UPGRADE,
    ];
    CONNECTION.contains(name)
        || matches!(
            name.as_str(),
            "http2-settings" | "keep-alive" | "proxy-connection"
        )
}

/// Collects what a provider changes of one request.
pub struct Editor<'a> {
    request: Option<&'a Request<'a>>,
    edits: Edits,
}

impl<'a> Editor<'a> {
    /// Without a request, on raw TCP, there is nothing to change.
    pub fn new(request: Option<&'a Request<'a>>) -> Self {
        Self {
            request,
            edits: Edits::default(),
        }
    }

    /// The values as they would be sent on now.
    fn values(&self, name: &HeaderName) -> Vec<HeaderValue> {
        let set = self.edits.set.iter().filter(|(other, _)| other == name);
        let set: Vec<_> = set.map(|(_, value)| value.clone()).collect();
        if !set.is_empty() || self.edits.remove.contains(name) {
            return set;
        }
        let sent = self.request.iter().flat_map(|request| &request.headers);
        sent.filter(|(other, _)| *other == name)
            .map(|(_, value)| (*value).clone())
            .collect()
    }

    pub fn has(&self, name: &HeaderName) -> bool {
        !self.values(name).is_empty()
    }

    /// Replaces all values by this one.
    pub fn set(&mut self, name: HeaderName, value: HeaderValue) {
        self.edits.set.retain(|(other, _)| *other != name);
        self.edits.set.push((name, value));
    }

    /// Keeps the values that are there.
    pub fn append(&mut self, name: HeaderName, value: HeaderValue) {
        let values = self.values(&name);
        self.edits.set.retain(|(other, _)| *other != name);
        for value in values.into_iter().chain([value]) {
            self.edits.set.push((name.clone(), value));
        }
    }

    /// Removes what was sent and what was set, so that it is called last, as in
    /// Envoy. `Host` and what frames the message stay.
    pub fn remove(&mut self, name: HeaderName) {
        if framing(&name) || self.edits.remove.contains(&name) {
            return;
        }
        self.edits.set.retain(|(other, _)| *other != name);
        self.edits.remove.push(name);
    }

    pub fn finish(self) -> Edits {
        match self.request {
            Some(_) => self.edits,
            None => Edits::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        for (pattern, name, expected) in [
            ("X-User", "x-user", true),
            ("x-user", "x-user-id", false),
            ("X-User-*", "x-user-id", true),
            ("x-user-*", "x-user", false),
            ("*-Id", "x-user-id", true),
            ("*-id", "x-id-user", false),
        ] {
            let parsed = Pattern::try_from(pattern.to_owned()).expect(pattern);
            let name: HeaderName = name.parse().expect("a name");
            assert_eq!(parsed.matches(&name), expected, "{pattern} {name}");
            assert_eq!(String::from(parsed), pattern.to_lowercase());
        }
        for pattern in ["", "*", "**", "*x*", "a*b", ":path", "x y", "x y*"] {
            assert!(Pattern::try_from(pattern.to_owned()).is_err(), "{pattern}");
        }
    }

    #[test]
    fn appended_values_come_behind_what_was_sent() {
        let name = HeaderName::from_static("x-a");
        let value = HeaderValue::from_static;
        let (one, two) = (value("1"), value("2"));
        let request = Request {
            method: "GET",
            path: "/",
            host: "a",
            headers: vec![(&name, &one), (&name, &two)],
        };
        let mut editor = Editor::new(Some(&request));
        assert!(editor.has(&name) && !editor.has(&header::COOKIE));
        editor.append(name.clone(), value("3"));
        editor.set(header::COOKIE, value("a"));
        editor.set(header::COOKIE, value("b"));
        editor.append(header::COOKIE, value("c"));
        editor.remove(header::HOST);
        let set = editor.finish().set;
        let shown: Vec<_> = set.iter().map(|(_, v)| v.to_str().expect("text")).collect();
        assert_eq!(shown, ["1", "2", "3", "b", "c"]);
    }
}
