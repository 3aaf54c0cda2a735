//! What values are compared with.

use std::fmt;

use super::schema::Piece;

/// Istio's string forms: exact, `prefix*`, `*suffix`, `*` (any non-empty value).
#[derive(Clone, Debug, PartialEq)]
pub enum Pattern {
    Any,
    Exact(String),
    Prefix(String),
    Suffix(String),
}

impl Pattern {
    pub fn parse(text: &str) -> Self {
        // A leading star is looked at first: `*x*` is a suffix with a literal star.
        if text == "*" {
            Self::Any
        } else if let Some(suffix) = text.strip_prefix('*') {
            Self::Suffix(suffix.to_owned())
        } else if let Some(prefix) = text.strip_suffix('*') {
            Self::Prefix(prefix.to_owned())
        } else {
            Self::Exact(text.to_owned())
        }
    }

    pub fn fits(&self, value: &str) -> bool {
        match self {
            Self::Any => !value.is_empty(),
            Self::Exact(exact) => value == exact,
            Self::Prefix(prefix) => value.starts_with(prefix),
            Self::Suffix(suffix) => value.ends_with(suffix),
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Exact(exact) => f.write_str(exact),
            Self::Prefix(prefix) => write!(f, "{prefix}*"),
            Self::Suffix(suffix) => write!(f, "*{suffix}"),
        }
    }
}

/// A path: one of the string forms, or a template.
#[derive(Clone, Debug, PartialEq)]
pub enum PathPattern {
    Text(Pattern),
    Template(Vec<Piece>),
}

impl PathPattern {
    pub fn fits(&self, path: &str) -> bool {
        match self {
            Self::Text(pattern) => pattern.fits(path),
            Self::Template(pieces) => template(pieces, path),
        }
    }
}

fn template(pieces: &[Piece], path: &str) -> bool {
    match pieces {
        [] => path.is_empty(),
        [Piece::Literal(literal), rest @ ..] => path
            .strip_prefix(literal.as_str())
            .is_some_and(|path| template(rest, path)),
        [Piece::Segment, rest @ ..] => {
            let end = path.find('/').unwrap_or(path.len());
            end > 0 && template(rest, &path[end..])
        }
        [Piece::Rest] => true,
        // The last operator: only a literal can follow.
        [Piece::Rest, Piece::Literal(literal), ..] => path.ends_with(literal.as_str()),
        [Piece::Rest, ..] => false,
    }
}

impl fmt::Display for PathPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(pattern) => pattern.fmt(f),
            Self::Template(pieces) => pieces.iter().try_for_each(|piece| match piece {
                Piece::Literal(literal) => f.write_str(literal),
                Piece::Segment => f.write_str("{*}"),
                Piece::Rest => f.write_str("{**}"),
            }),
        }
    }
}

/// Istio `requestPrincipals`: the issuer and the subject of a token. A value is split
/// at its last slash (since 1.21).
#[derive(Clone, Debug, PartialEq)]
pub struct RequestPrincipal {
    text: String,
    issuer: Pattern,
    subject: Pattern,
}

impl RequestPrincipal {
    pub fn parse(text: &str) -> Self {
        let exact = |part: &str| Pattern::Exact(part.to_owned());
        let (issuer, subject) = match text.rsplit_once('/') {
            Some((issuer, subject)) => (
                match issuer.strip_prefix('*') {
                    Some("") => Pattern::Any,
                    Some(suffix) => Pattern::Suffix(suffix.to_owned()),
                    None => exact(issuer),
                },
                match subject.strip_suffix('*') {
                    Some("") => Pattern::Any,
                    Some(prefix) => Pattern::Prefix(prefix.to_owned()),
                    None => exact(subject),
                },
            ),
            None if text == "*" => (Pattern::Any, Pattern::Any),
            None => match (text.strip_prefix('*'), text.strip_suffix('*')) {
                (Some(suffix), _) => (Pattern::Any, Pattern::Suffix(suffix.to_owned())),
                (None, Some(prefix)) => (Pattern::Prefix(prefix.to_owned()), Pattern::Any),
                // An issuer and an empty subject, which no token has.
                (None, None) => (exact(text), exact("")),
            },
        };
        Self {
            text: text.to_owned(),
            issuer,
            subject,
        }
    }

    pub fn fits(&self, issuer: &str, subject: &str) -> bool {
        self.issuer.fits(issuer) && self.subject.fits(subject)
    }
}

impl fmt::Display for RequestPrincipal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
