//! Paths as they are matched, and as the application gets them: both see the same
//! (Istio `pathNormalization`).

use std::{borrow::Cow, fmt::Write as _};

use crate::config::Normalization;

/// A path apart from its query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Normal<'a> {
    pub path: Cow<'a, str>,
    pub query: Option<&'a str>,
}

impl Normal<'_> {
    /// Both together, as a request carries them.
    pub fn target(&self) -> String {
        match self.query {
            Some(query) => format!("{}?{query}", self.path),
            None => self.path.clone().into_owned(),
        }
    }
}

/// Why a path is refused: 400, whatever policy says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPath {
    #[error("the path has a NUL")]
    Nul,
    #[error("the path does not begin with `/`")]
    Form,
}

pub fn normalize(target: &str, degree: Normalization) -> Result<Normal<'_>, BadPath> {
    let target = target.split('#').next().unwrap_or(target);
    let (path, query) = match target.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (target, None),
    };
    if path != "*" && !path.starts_with('/') && !(path.starts_with('\\')) {
        return Err(BadPath::Form);
    }
    if path.contains("%00") || path.contains('\0') {
        return Err(BadPath::Nul);
    }
    if degree == Normalization::None || path == "*" {
        return match path.starts_with('\\') {
            true => Err(BadPath::Form),
            false => Ok(Normal {
                path: path.into(),
                query,
            }),
        };
    }
    let odd = |c: char| matches!(c, '%' | '\\') || is_illegal(c);
    let plain = !path.contains(odd) && !path.contains("/.") && !path.contains("//");
    if plain {
        return Ok(Normal {
            path: path.into(),
            query,
        });
    }
    let decoded = decode(path, degree == Normalization::DecodeAndMergeSlashes);
    let mut resolved = resolve(&decoded);
    if degree != Normalization::Base {
        resolved = merge(&resolved);
    }
    Ok(Normal {
        path: resolved.into(),
        query,
    })
}

/// Characters that a path cannot have (RFC 3986 3.3) and that servers take for their
/// escapes all the same.
fn is_illegal(c: char) -> bool {
    matches!(c, '"' | '<' | '>' | '^' | '`' | '{' | '|' | '}') || !c.is_ascii_graphic()
}

/// Decodes once: unreserved characters (RFC 3986 2.3), and slashes if asked for.
/// Escapes what should have been escaped.
fn decode(path: &str, slashes: bool) -> String {
    let mut out = String::with_capacity(path.len());
    let mut rest = path;
    while let Some(at) = rest.find(|c| matches!(c, '%' | '\\') || is_illegal(c)) {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some(illegal) = rest.chars().next().filter(|c| is_illegal(*c)) {
            let mut utf8 = [0; 4];
            for byte in illegal.encode_utf8(&mut utf8).bytes() {
                let _ = write!(out, "%{byte:02X}");
            }
            rest = &rest[illegal.len_utf8()..];
            continue;
        }
        if let Some(after) = rest.strip_prefix('\\') {
            out.push('/');
            rest = after;
            continue;
        }
        match escaped(rest) {
            Some(b'/' | b'\\') if slashes => out.push('/'),
            Some(byte) if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) => {
                out.push(char::from(byte));
            }
            // Neither to be decoded nor to be looked at twice.
            other => {
                out.push('%');
                rest = &rest[1..];
                if other.is_none() && becomes_escape(rest) {
                    out.push_str("25");
                }
                continue;
            }
        }
        rest = &rest[3..];
    }
    out.push_str(rest);
    out
}

/// The byte that an escape at the beginning stands for.
fn escaped(text: &str) -> Option<u8> {
    let hex = text.strip_prefix('%')?.get(..2)?;
    let digits = hex.bytes().all(|b| b.is_ascii_hexdigit());
    digits.then(|| u8::from_str_radix(hex, 16).ok())?
}

/// Whether what follows a stray `%` begins with two hexadecimal digits once it is
/// decoded: `%%32e` would come out as `%2e`, which the application decodes again.
fn becomes_escape(rest: &str) -> bool {
    let digit = |text: &str| match escaped(text) {
        Some(byte) => (byte, 3),
        None => (text.bytes().next().unwrap_or_default(), 1),
    };
    let (first, length) = digit(rest);
    first.is_ascii_hexdigit() && digit(&rest[length..]).0.is_ascii_hexdigit()
}

/// Resolves `.` and `..` (RFC 3986 5.2.4), which never climb above the root. Empty
/// segments count as segments.
fn resolve(path: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    let mut segments = path.split('/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        // Servlet containers take `..;x` for `..`, parameters apart.
        match segment.split(';').next().unwrap_or(segment) {
            name @ ("." | "..") => {
                if name == ".." {
                    kept.pop();
                }
                if last {
                    kept.push("");
                }
            }
            _ => kept.push(segment),
        }
    }
    let mut out = String::with_capacity(path.len());
    for segment in kept {
        out.push('/');
        out.push_str(segment);
    }
    if out.is_empty() {
        out.push('/');
    }
    out
}

fn merge(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    for c in path.chars() {
        if c != '/' || !out.ends_with('/') {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::{Normalization::*, *};

    #[test]
    fn degrees() {
        for (target, none, base, merged, decoded) in [
            ("/a", "/a", "/a", "/a", "/a"),
            ("/", "/", "/", "/", "/"),
            ("/a/../b", "/a/../b", "/b", "/b", "/b"),
            ("/a//../b", "/a//../b", "/a/b", "/a/b", "/a/b"),
            ("/a//b", "/a//b", "/a//b", "/a/b", "/a/b"),
            ("/a/./b/.", "/a/./b/.", "/a/b/", "/a/b/", "/a/b/"),
            ("/a/b/..", "/a/b/..", "/a/", "/a/", "/a/"),
            ("/../../a", "/../../a", "/a", "/a", "/a"),
            ("/..", "/..", "/", "/", "/"),
            ("/%61dmin", "/%61dmin", "/admin", "/admin", "/admin"),
            ("/%2e%2E/a", "/%2e%2E/a", "/a", "/a", "/a"),
            ("/a\\b", "/a\\b", "/a/b", "/a/b", "/a/b"),
            ("/a%2fb", "/a%2fb", "/a%2fb", "/a%2fb", "/a/b"),
            (
                "/a%5C..%2Fb",
                "/a%5C..%2Fb",
                "/a%5C..%2Fb",
                "/a%5C..%2Fb",
                "/b",
            ),
            ("/a%252fb", "/a%252fb", "/a%252fb", "/a%252fb", "/a%252fb"),
            ("/%2561", "/%2561", "/%2561", "/%2561", "/%2561"),
            ("/a%zz%4", "/a%zz%4", "/a%zz%4", "/a%zz%4", "/a%zz%4"),
            // What is put together by decoding is no escape.
            (
                "/%%32e%2%65/a",
                "/%%32e%2%65/a",
                "/%252e%252e/a",
                "/%252e%252e/a",
                "/%252e%252e/a",
            ),
            (
                "/%%%30%30%4",
                "/%%%30%30%4",
                "/%%2500%4",
                "/%%2500%4",
                "/%%2500%4",
            ),
            ("/a%%61", "/a%%61", "/a%a", "/a%a", "/a%a"),
            ("/a;x=1/b", "/a;x=1/b", "/a;x=1/b", "/a;x=1/b", "/a;x=1/b"),
            ("/A", "/A", "/A", "/A", "/A"),
            ("/x/..;/a", "/x/..;/a", "/a", "/a", "/a"),
            ("/x/.;p=1/a", "/x/.;p=1/a", "/x/a", "/x/a", "/x/a"),
            ("/x/%2e%2e;/a", "/x/%2e%2e;/a", "/a", "/a", "/a"),
            (
                "/a\"|{}",
                "/a\"|{}",
                "/a%22%7C%7B%7D",
                "/a%22%7C%7B%7D",
                "/a%22%7C%7B%7D",
            ),
            (
                "/a/%C3%A9",
                "/a/%C3%A9",
                "/a/%C3%A9",
                "/a/%C3%A9",
                "/a/%C3%A9",
            ),
            ("/.hidden", "/.hidden", "/.hidden", "/.hidden", "/.hidden"),
            ("*", "*", "*", "*", "*"),
        ] {
            for (degree, expected) in [
                (None, none),
                (Base, base),
                (MergeSlashes, merged),
                (DecodeAndMergeSlashes, decoded),
            ] {
                let normal = normalize(target, degree).expect(target);
                assert_eq!(normal.path, expected, "{target} {degree:?}");
                // Once is enough.
                assert_eq!(normalize(expected, degree).expect("again").path, expected);
            }
        }
    }

    #[test]
    fn query_and_fragment() {
        let normal = normalize("/a/../b?x=/../%2e#f?y", Base).expect("a path");
        assert_eq!((&*normal.path, normal.query), ("/b", Some("x=/../%2e")));
        assert_eq!(normal.target(), "/b?x=/../%2e");
        assert_eq!(normalize("/a#/../b", None).expect("a path").target(), "/a");
        assert_eq!(normalize("/a?#", Base).expect("a path").target(), "/a?");
    }

    #[test]
    fn refused() {
        for nul in ["/a%00", "/%/\0"] {
            assert_eq!(normalize(nul, Base), Err(BadPath::Nul));
            assert_eq!(normalize(nul, None), Err(BadPath::Nul));
        }
        for form in ["", "a", "?a", "#", "http://x/", "%2Fa"] {
            assert_eq!(normalize(form, Base), Err(BadPath::Form), "{form}");
        }
        assert_eq!(normalize("\\a", None), Err(BadPath::Form));
        assert_eq!(normalize("\\a", Base).expect("a path").path, "/a");
    }
}
