//! Holds the documents to the repository: commands, paths, links and
//! configuration keys that they name have to exist.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{
    cmd,
    docs::markdown::{Document, Line},
    profile::Profile,
};

mod markdown;

const DOCUMENTS: &[&str] = &[
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/boot.md",
    "docs/oauth.md",
    "docs/kubernetes.md",
];
/// A document that is to be read in one sitting, and how long it may be.
const SHORT: (&str, usize) = ("ARCHITECTURE.md", 150);
/// They list every key of the agent's configuration, and of the authority's.
const CONFIG: [&str; 2] = ["config/agent.yaml", "config/authority.yaml"];
/// What a path of the repository begins with.
const DIRECTORIES: &[&str] = &[
    "agent/",
    "agent-ebpf/",
    "xtask/",
    "config/",
    "tests/",
    "fuzz/",
    ".ci/",
];
/// The heading above the table of configuration keys.
const CONFIGURE: &str = "Configure";

/// Verbs of `cargo xtask`, and the flags of each.
pub type Verbs = BTreeMap<String, BTreeSet<String>>;

/// What the documents are held to.
struct Facts<'a> {
    verbs: &'a Verbs,
    /// Whether `postern` has a subcommand.
    subcommand: &'a dyn Fn(&str) -> bool,
    /// Whether the repository has a path.
    exists: &'a dyn Fn(&str) -> bool,
    keys: BTreeSet<String>,
}

/// Check all documents.
pub fn run(verbs: &Verbs) -> Result<()> {
    let root = cmd::root();
    let mut known = BTreeSet::new();
    for name in CONFIG {
        let config = fs::read_to_string(root.join(name)).with_context(|| format!("read {name}"))?;
        known.extend(keys(&config).with_context(|| format!("parse {name}"))?);
    }
    Profile::Quick.build()?;
    let postern = Profile::Quick.directory().join("postern");
    let facts = Facts {
        verbs,
        subcommand: &|name| cmd::succeeds(cmd::in_root(&postern).args([name, "--help"])),
        exists: &|path| root.join(path).exists(),
        keys: known,
    };
    let mut wrong = Vec::new();
    for name in DOCUMENTS {
        match fs::read_to_string(root.join(name)) {
            Ok(text) => wrong.extend(check(name, &text, &facts)),
            Err(error) => wrong.push(format!("{name}: {error}")),
        }
    }
    for line in &wrong {
        eprintln!("{line}");
    }
    if !wrong.is_empty() {
        bail!("{} things in the documents are wrong", wrong.len());
    }
    Ok(())
}

/// What is wrong in the document `name`.
fn check(name: &str, text: &str, facts: &Facts) -> Vec<String> {
    let document = Document::new(text);
    let mut wrong = Vec::new();
    let (short, most) = SHORT;
    if name == short && document.lines.len() >= most {
        wrong.push(format!("{name}: not shorter than {most} lines"));
    }
    for (number, line) in (1..).zip(&document.lines) {
        let complaints = commands(line, facts)
            .into_iter()
            .chain(paths(line, facts))
            .chain(links(line, &document, facts))
            .chain(settings(line, facts));
        wrong.extend(complaints.map(|what| format!("{name}:{number}: {what}")));
    }
    wrong
}

fn commands(line: &Line, facts: &Facts) -> Vec<String> {
    let commands = line
        .code
        .iter()
        .flat_map(|code| code.split(['|', ';', '&']));
    commands
        .filter_map(|command| wrong_command(command, facts))
        .collect()
}

fn wrong_command(command: &str, facts: &Facts) -> Option<String> {
    let prefix = |word: &&str| matches!(*word, "$" | "sudo" | "exec") || is_assignment(word);
    let mut words = command.split_whitespace().skip_while(prefix);
    let program = words.next()?;
    if program == "cargo" && words.next() == Some("xtask") {
        let verb = words.next().filter(|word| is_name(word))?;
        let Some(flags) = facts.verbs.get(verb) else {
            return Some(format!("`cargo xtask {verb}`: there is no such verb"));
        };
        let mut given = words.take_while(|word| !matches!(*word, "--" | "#"));
        let unknown = given.find(|word| word.starts_with("--") && !flags.contains(flag(word)))?;
        return Some(format!("`cargo xtask {verb}` has no flag {unknown}"));
    }
    if program.rsplit('/').next() == Some("postern") {
        let name = words.next().filter(|word| is_name(word))?;
        let unknown = !(facts.subcommand)(name);
        return unknown.then(|| format!("`postern {name}`: there is no such command"));
    }
    None
}

fn flag(word: &str) -> &str {
    word.split('=').next().unwrap_or(word)
}

fn is_assignment(word: &str) -> bool {
    let name = word.split_once('=').map(|(name, _)| name);
    name.is_some_and(|name| name.bytes().all(|b| b.is_ascii_uppercase() || b == b'_'))
}

fn is_name(word: &str) -> bool {
    word.starts_with(|c: char| c.is_ascii_lowercase())
        && word.bytes().all(|b| b.is_ascii_lowercase() || b == b'-')
}

fn paths(line: &Line, facts: &Facts) -> Vec<String> {
    let mut wrong = Vec::new();
    for span in &line.spans {
        let path = span.split(':').next().unwrap_or(span);
        let ours = DIRECTORIES.iter().any(|dir| path.starts_with(dir)) || path.ends_with(".md");
        if !ours || path.contains(char::is_whitespace) || path.starts_with('/') {
            continue;
        }
        // Of a pattern, the directory before it has to exist.
        let fixed = path.split(['*', '<', '{']).next().unwrap_or(path);
        let fixed = match fixed.rsplit_once('/') {
            Some((dir, _)) if fixed != path => dir,
            _ => fixed,
        };
        if !(facts.exists)(fixed) {
            wrong.push(format!("`{path}` does not exist"));
        }
    }
    wrong
}

fn links(line: &Line, document: &Document, facts: &Facts) -> Vec<String> {
    let mut wrong = Vec::new();
    for link in &line.links {
        if link.contains("://") || link.starts_with("mailto:") {
            continue;
        }
        let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
        let fine = if path.is_empty() {
            document.anchors.contains(anchor)
        } else {
            (facts.exists)(path)
        };
        if !fine {
            wrong.push(format!("the link to {link} leads nowhere"));
        }
    }
    wrong
}

fn settings(line: &Line, facts: &Facts) -> Vec<String> {
    let table = line.row.as_ref().filter(|row| row.heading == CONFIGURE);
    let first_cell = table.map_or(&[][..], |row| &row.first_cell);
    let mut wrong = Vec::new();
    for span in &line.spans {
        let marked = span.strip_prefix("config: ").map(str::trim);
        let key = marked.unwrap_or(span);
        let meant = marked.is_some() || first_cell.contains(span) || is_ours(key, facts);
        if meant && !facts.keys.contains(key) {
            wrong.push(format!("{} has no key `{key}`", CONFIG.join(" or ")));
        }
    }
    wrong
}

/// Whether `word` looks like a key of our configuration, right or wrong.
fn is_ours(word: &str, facts: &Facts) -> bool {
    let part = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_lowercase())
            && part
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
    };
    let file = [".rs", ".md", ".yaml", ".toml", ".json", ".pem"];
    let Some((first, rest)) = word.split_once('.') else {
        return false;
    };
    facts.keys.contains(first)
        && part(first)
        && rest.split('.').all(part)
        && !file.iter().any(|end| word.ends_with(end))
}

/// All keys of a YAML document, dotted; those in a list go by the list's name.
fn keys(yaml: &str) -> Result<BTreeSet<String>> {
    fn walk(value: &Value, prefix: &str, keys: &mut BTreeSet<String>) {
        match value {
            Value::Object(map) => {
                for (name, value) in map {
                    let key = match prefix {
                        "" => name.clone(),
                        prefix => format!("{prefix}.{name}"),
                    };
                    walk(value, &key, keys);
                    keys.insert(key);
                }
            }
            Value::Array(items) => items.iter().for_each(|item| walk(item, prefix, keys)),
            _ => {}
        }
    }
    let value: Value = serde_saphyr::from_str(yaml)?;
    let mut keys = BTreeSet::new();
    walk(&value, "", &mut keys);
    if keys.is_empty() {
        bail!("it has no keys");
    }
    Ok(keys)
}

#[cfg(test)]
mod tests;
