//! Where in a request tokens are, and how they are taken out of it.

use std::borrow::Cow;

use http::{HeaderName, header};
use percent_encoding::percent_decode_str;

use crate::request::Request;

/// Where one rule looks for tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Locations {
    /// A header and what its value begins with, case included, before the token.
    pub headers: Vec<(HeaderName, String)>,
    pub params: Vec<String>,
    pub cookies: Vec<String>,
}

/// Those of a rule that names none: `Authorization: Bearer` and `access_token`.
impl Default for Locations {
    fn default() -> Self {
        Self {
            headers: vec![(header::AUTHORIZATION, "Bearer ".to_owned())],
            params: vec!["access_token".to_owned()],
            cookies: Vec::new(),
        }
    }
}

/// A part of the request that can hold one token. Rules that look at the same place
/// with different prefixes still share it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Header(HeaderName),
    /// Counted among the parameters of the query.
    Param(usize),
    /// Counted among the cookies.
    Cookie(usize),
}

#[derive(Clone, Debug)]
pub(super) struct Found<'a> {
    pub place: Place,
    pub text: Cow<'a, str>,
}

impl Locations {
    /// All tokens, the header's first. Every occurrence of a parameter or cookie is
    /// one: which of them the application would read is not known.
    pub(super) fn find<'a>(&self, request: &Request<'a>) -> Vec<Found<'a>> {
        let mut found = Vec::new();
        for (name, prefix) in &self.headers {
            if let Some(text) = in_header(request, name, prefix) {
                let place = Place::Header(name.clone());
                found.push(Found { place, text });
            }
        }
        if !self.params.is_empty() {
            for (index, parameter) in parameters(request.path).enumerate() {
                let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
                if self.params.iter().any(|own| *own == form_decoded(name)) {
                    found.push(Found {
                        place: Place::Param(index),
                        text: form_decoded(value),
                    });
                }
            }
        }
        if !self.cookies.is_empty() {
            for (index, (name, value)) in cookies(request).into_iter().enumerate() {
                if self.cookies.contains(&name) {
                    found.push(Found {
                        place: Place::Cookie(index),
                        text: Cow::Owned(value),
                    });
                }
            }
        }
        found.retain(|found| !found.text.is_empty());
        found
    }
}

/// The path without some of its parameters. The others keep their order and spelling.
pub(super) fn without_parameters(path: &str, gone: &[usize]) -> String {
    let (before, _) = path.split_once('?').unwrap_or((path, ""));
    let kept: Vec<&str> = parameters(path)
        .enumerate()
        .filter(|(index, _)| !gone.contains(index))
        .map(|(_, parameter)| parameter)
        .collect();
    match kept.is_empty() {
        true => before.to_owned(),
        false => format!("{before}?{}", kept.join("&")),
    }
}

/// The prefix counts at the start only: further in, it would be found inside of other
/// credentials.
fn in_header<'a>(request: &Request<'a>, name: &HeaderName, prefix: &str) -> Option<Cow<'a, str>> {
    let rest = |value: &str| Some(value.strip_prefix(prefix)?.trim_start_matches(' ').len());
    let is_token = |value: Cow<'_, str>| rest(&value).is_some_and(|length| length > 0);
    if !request.values(name).any(is_token) {
        return None;
    }
    // Repeated: the joined value has a comma in it and is no token, as nobody knows
    // which of them the application would read.
    let value = request.header(name)?;
    let start = value.len() - rest(&value).unwrap_or(value.len());
    Some(match value {
        Cow::Borrowed(value) => Cow::Borrowed(&value[start..]),
        Cow::Owned(value) => Cow::Owned(value[start..].to_owned()),
    })
}

fn parameters(path: &str) -> impl Iterator<Item = &str> {
    path.split_once('?')
        .into_iter()
        .flat_map(|(_, query)| query.split('&'))
}

/// As `application/x-www-form-urlencoded`, the way applications read a query.
fn form_decoded(text: &str) -> Cow<'_, str> {
    let decode = |text: &str| -> String {
        let decoded = percent_decode_str(text).decode_utf8_lossy();
        decoded.into_owned()
    };
    match text.contains(['%', '+']) {
        true => Cow::Owned(decode(&text.replace('+', " "))),
        false => Cow::Borrowed(text),
    }
}

/// RFC 6265 4.1.1; a value may stand in quotes.
fn cookies(request: &Request<'_>) -> Vec<(String, String)> {
    let Some(all) = request.header(&header::COOKIE) else {
        return Vec::new();
    };
    all.split(';')
        .filter_map(|cookie| cookie.split_once('='))
        .map(|(name, value)| {
            let value = value.trim();
            let bare = value
                .strip_prefix('"')
                .and_then(|value| value.strip_suffix('"'))
                .unwrap_or(value);
            (name.trim().to_owned(), bare.to_owned())
        })
        .collect()
}
