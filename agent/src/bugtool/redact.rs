//! Secrets are taken out of all that goes into the archive, twice: what the files hold
//! that the configuration names as secret is looked for as it stands, and what looks like
//! a secret goes in any case. Fails closed: rather a word too many than one too few.

use std::{fs, io::Read as _, path::Path};

use serde_json::Value;
use zeroize::Zeroizing;

use crate::config::Config;

pub const REMOVED: &str = "<removed>";
/// Shorter lines of secret files could stand anywhere.
const SHORTEST: usize = 12;
/// Of one file of secrets, bytes; and how many files.
const LONGEST: u64 = 64 << 10;
const MOST_FILES: usize = 1_000;

/// Parts of names whose values are secret.
const NAMES: [&str; 12] = [
    "password",
    "passwd",
    "secret",
    "token",
    "apikey",
    "api_key",
    "api-key",
    "authorization",
    "cookie",
    "assertion",
    "credential",
    "private",
];
const SCHEMES: [&str; 5] = ["bearer", "basic", "dpop", "digest", "negotiate"];

/// Secrets of this node, as they stand in their files.
#[derive(Default)]
pub struct Known(Vec<Zeroizing<String>>);

impl Known {
    pub fn read(config: &Config) -> Self {
        let mut known = Self::default();
        let identity = &config.identity;
        let files = [
            config.listen.admin.guard.as_ref().map(|guard| &guard.token),
            config.listen.admin.guard.as_ref().map(|guard| &guard.key),
            identity.root_key.as_ref(),
            identity
                .authority
                .as_ref()
                .and_then(|a| a.join_token_file.as_ref()),
            identity
                .authority
                .as_ref()
                .and_then(|a| a.service_account_token_file.as_ref()),
            identity.istio.as_ref().map(|istio| &istio.token_file),
        ];
        for path in files.into_iter().flatten() {
            known.file(path);
        }
        known.directory(&config.policies.secrets, 3);
        known.file(Path::new(
            "/var/run/secrets/kubernetes.io/serviceaccount/token",
        ));
        for entry in fs::read_dir(&config.state).into_iter().flatten().flatten() {
            let path = entry.path();
            let secret =
                path.extension().is_some_and(|e| e == "key") || path.ends_with("agent.pem");
            if secret {
                known.file(&path);
            }
        }
        // The longest first: one may be a part of another.
        known
            .0
            .sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        known
    }

    fn directory(&mut self, path: &Path, depth: usize) {
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            match entry.path() {
                path if path.is_dir() && depth > 0 => self.directory(&path, depth - 1),
                path => self.file(&path),
            }
        }
    }

    fn file(&mut self, path: &Path) {
        let mut text = Zeroizing::new(String::new());
        let read = fs::File::open(path).and_then(|f| f.take(LONGEST).read_to_string(&mut text));
        if read.is_err() || self.0.len() > MOST_FILES * 100 {
            return;
        }
        for line in text.lines().map(str::trim) {
            let marks = line.starts_with("-----");
            if line.len() >= SHORTEST && !marks {
                self.0.push(Zeroizing::new(line.to_owned()));
            }
        }
    }

    /// Text without secrets.
    pub fn clean(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for secret in &self.0 {
            if text.contains(secret.as_str()) {
                text = text.replace(secret.as_str(), REMOVED);
            }
        }
        let text = without_keys(&text);
        text.split_inclusive('\n').map(line).collect()
    }
}

/// Values of a document that are secret by their names. Paths of files stay: they say
/// where a secret is, not what.
pub fn document(value: &mut Value) {
    match value {
        Value::Object(map) => {
            for (name, value) in map.iter_mut() {
                // Headers are fixed by whoever configures them, tokens among them.
                if is_secret(name) || name.to_ascii_lowercase().contains("headers") {
                    hide(value);
                } else {
                    document(value);
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(document),
        _ => {}
    }
}

fn hide(value: &mut Value) {
    match value {
        Value::String(text) if !text.starts_with('/') && !text.is_empty() => {
            *text = REMOVED.into();
        }
        Value::Object(map) => map.values_mut().for_each(hide),
        Value::Array(list) => list.iter_mut().for_each(hide),
        _ => {}
    }
}

fn is_secret(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    NAMES.iter().any(|part| name.contains(part))
}

/// Private keys in PEM.
fn without_keys(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("-----BEGIN ") {
        let (before, from) = rest.split_at(at);
        clean.push_str(before);
        let head = &from[11..from[11..].find("-----").map_or(from.len(), |end| 11 + end)];
        if !head.contains("PRIVATE KEY") {
            clean.push_str(&from[..11]);
            rest = &from[11..];
            continue;
        }
        clean.push_str(REMOVED);
        // One that does not end takes all that follows with it.
        rest = match from.find("-----END ") {
            Some(end) => {
                let tail = &from[end + 9..];
                tail.find("-----").map_or("", |stop| &tail[stop + 5..])
            }
            None => "",
        };
    }
    clean.push_str(rest);
    clean
}

fn line(text: &str) -> String {
    let text = without_user(text);
    let mut clean = String::with_capacity(text.len());
    let mut rest = text.as_str();
    let mut before = String::new();
    while let Some(first) = rest.chars().next() {
        let length = rest.find(|c| !in_word(c)).unwrap_or(rest.len());
        if length == 0 {
            clean.push(first);
            rest = &rest[first.len_utf8()..];
            continue;
        }
        let (word, after) = rest.split_at(length);
        rest = after;
        let lower = word.to_ascii_lowercase();
        if is_token(word) || (SCHEMES.contains(&before.as_str()) && word.len() >= 4) {
            clean.push_str(REMOVED);
        } else if let Some((name, value)) = word.split_once('=').filter(|(name, _)| is_secret(name))
        {
            clean.push_str(name);
            clean.push('=');
            let quoted = value.is_empty() && rest.starts_with(['"', '\'']);
            if quoted {
                rest = value_of(rest, &mut clean);
            } else if !value.starts_with('/') && !value.is_empty() {
                clean.push_str(REMOVED);
            } else {
                clean.push_str(value);
            }
        } else {
            clean.push_str(word);
            if is_secret(word) {
                rest = named(rest, &mut clean);
            }
        }
        before = lower;
    }
    clean
}

/// After a name that is secret: what follows its colon.
fn named<'a>(rest: &'a str, clean: &mut String) -> &'a str {
    let mark = rest.trim_start_matches(['"', '\'', '\\']);
    let Some(value) = mark.strip_prefix(':') else {
        return rest;
    };
    let value = value.trim_start_matches([' ', '\t']);
    clean.push_str(&rest[..rest.len() - value.len()]);
    value_of(value, clean)
}

/// Leaves a value out: a quoted one to its quote, another to the end of the line, for
/// cookies and credentials have spaces. Numbers, paths and what has parts of its own stay.
fn value_of<'a>(value: &'a str, clean: &mut String) -> &'a str {
    let opens = value.starts_with(['"', '\'']);
    let inner = if opens { &value[1..] } else { value };
    if inner.starts_with(['/', '{', '[', '\n'])
        || inner.starts_with(|c: char| c.is_ascii_digit()) && !opens
    {
        return value;
    }
    let end = match opens {
        true => inner
            .find(&value[..1])
            .unwrap_or(inner.trim_end_matches('\n').len()),
        false => inner
            .find(['\n', '"', '}', ']', ','])
            .unwrap_or(inner.len()),
    };
    if ["null", "true", "false", ""].contains(&inner[..end].trim()) {
        return value;
    }
    if opens {
        clean.push_str(&value[..1]);
    }
    clean.push_str(REMOVED);
    &inner[end..]
}

/// Users and passwords of URLs.
fn without_user(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + 3);
        clean.push_str(before);
        let stops = |c: char| c.is_whitespace() || "/?#\"'<>,".contains(c);
        let end = after.find(stops).unwrap_or(after.len());
        rest = after;
        if let Some(user) = after[..end].rfind('@') {
            clean.push_str(REMOVED);
            rest = &after[user..];
        }
    }
    clean.push_str(rest);
    clean
}

fn in_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || "._~+/=-".contains(c)
}

/// A JWT, or one of Postern's own tokens.
fn is_token(word: &str) -> bool {
    let word = word.rsplit('=').next().unwrap_or(word);
    let jwt = word.starts_with("eyJ") && word.matches('.').count() >= 2;
    jwt || (word.starts_with("postern-join-"))
}
