//! Kubernetes-shaped objects from a directory: YAML or JSON files, any number of
//! documents each, `kind: List` too. Every error names file, line and field.
//!
//! A directory is read whole or not at all: one bad file leaves the last good
//! state of all files standing, for half of a change may be wider than the whole.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{DeserializeOwned, DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

/// Largest file that is read, bytes: a directory is writable by operators only,
/// but a mistake should not take the memory of a node.
const MAX_FILE: u64 = 64 << 20;

#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("{path}: {source}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path}:{line}: {}{message}", prefix(.field))]
    Parse {
        path: PathBuf,
        line: u64,
        /// `kind/namespace/name`, as far as it says so; empty where it does not.
        object: String,
        /// Empty where it is the document as a whole.
        field: String,
        message: String,
    },
}

fn prefix(field: &str) -> String {
    match field {
        "" => String::new(),
        field => format!("{field}: "),
    }
}

/// What an object says of itself before it is known what it is.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Head {
    #[serde(rename = "apiVersion")]
    pub api_version: String,
    pub kind: String,
}

/// Kubernetes' ObjectMeta. All its fields are listed, so that a misspelt one is
/// refused: a policy without `namespace` is another policy.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Meta {
    #[serde(deserialize_with = "or_default")]
    pub name: String,
    pub namespace: Option<String>,
    #[serde(deserialize_with = "or_default")]
    pub uid: String,
    #[serde(deserialize_with = "or_default")]
    pub labels: BTreeMap<String, String>,
    #[serde(deserialize_with = "or_default")]
    pub annotations: BTreeMap<String, String>,
    /// RFC 3339 in UTC, which sorts as text.
    pub creation_timestamp: Option<String>,
    pub deletion_timestamp: Option<String>,
    #[serde(deserialize_with = "or_default")]
    pub owner_references: Vec<OwnerReference>,
    #[serde(rename = "generateName", skip_serializing)]
    _generate_name: IgnoredAny,
    #[serde(rename = "resourceVersion", skip_serializing)]
    _resource_version: IgnoredAny,
    #[serde(rename = "generation", skip_serializing)]
    _generation: IgnoredAny,
    #[serde(rename = "selfLink", skip_serializing)]
    _self_link: IgnoredAny,
    #[serde(rename = "deletionGracePeriodSeconds", skip_serializing)]
    _deletion_grace_period_seconds: IgnoredAny,
    #[serde(rename = "finalizers", skip_serializing)]
    _finalizers: IgnoredAny,
    #[serde(rename = "managedFields", skip_serializing)]
    _managed_fields: IgnoredAny,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct OwnerReference {
    pub kind: String,
    pub name: String,
    #[serde(deserialize_with = "or_default")]
    pub controller: bool,
}

impl Meta {
    /// The namespace, or the one that kubectl would put it into.
    pub fn namespace(&self) -> &str {
        self.namespace.as_deref().unwrap_or("default")
    }
}

/// Reads `null` as absent, as Kubernetes does.
pub fn or_default<'de, T: Default + Deserialize<'de>, D: Deserializer<'de>>(
    from: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

/// Types that objects are read into: one of a fixed set of kinds.
pub trait Object: Sized {
    /// Reads one object whose head is known. `None`: a kind that is none of ours.
    fn read<'de, D: Deserializer<'de>>(head: &Head, from: D) -> Result<Option<Self>, D::Error>;
}

/// An object and where it stands.
#[derive(Clone, Debug)]
pub struct Located<T> {
    pub object: T,
    pub path: PathBuf,
    /// Line where its document begins, from 1.
    pub line: u64,
}

/// All objects of a directory, in the order of file names; the first error if there
/// is any.
pub fn load_directory<T: Object>(directory: &Path) -> Result<Vec<Located<T>>, LoadError> {
    let (objects, errors) = read_directory(directory)?;
    match errors.into_iter().next() {
        Some(error) => Err(error),
        None => Ok(objects),
    }
}

/// All objects of a directory (or of one file) that can be read, and what is wrong
/// with the others.
/// Files whose names begin with a dot are passed over: Kubernetes' projected volumes
/// keep theirs there.
pub fn read_directory<T: Object>(
    directory: &Path,
) -> Result<(Vec<Located<T>>, Vec<LoadError>), LoadError> {
    let fail = |source| LoadError::Read {
        path: directory.to_owned(),
        source,
    };
    let mut paths = Vec::new();
    if directory.is_file() {
        return read_files(vec![directory.to_owned()]);
    }
    for entry in std::fs::read_dir(directory).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        let hidden = path
            .file_name()
            .is_some_and(|n| n.as_encoded_bytes().starts_with(b"."));
        let ours = path.extension().is_some_and(|e| {
            ["yaml", "yml", "json"]
                .iter()
                .any(|ours| e.eq_ignore_ascii_case(ours))
        });
        if ours && !hidden && path.is_file() {
            paths.push(path);
        }
    }
    paths.sort();
    read_files(paths)
}

fn read_files<T: Object>(
    paths: Vec<PathBuf>,
) -> Result<(Vec<Located<T>>, Vec<LoadError>), LoadError> {
    let (mut objects, mut errors) = (Vec::new(), Vec::new());
    for path in paths {
        let fail = |source| LoadError::Read {
            path: path.clone(),
            source,
        };
        let size = std::fs::metadata(&path).map_err(fail)?.len();
        if size > MAX_FILE {
            let why = format!("{size} bytes are more than the {MAX_FILE} that are read");
            return Err(fail(std::io::Error::other(why)));
        }
        let text = std::fs::read_to_string(&path).map_err(fail)?;
        for document in documents(&text) {
            match load_document(&path, &document) {
                Ok(read) => objects.extend(read),
                Err(error) => errors.push(error),
            }
        }
    }
    Ok((objects, errors))
}

/// All objects of one file's text.
pub fn load_text<T: Object>(path: &Path, text: &str) -> Result<Vec<Located<T>>, LoadError> {
    let all = documents(text);
    let each = all.iter().map(|document| load_document(path, document));
    Ok(each
        .collect::<Result<Vec<_>, _>>()?
        .into_iter()
        .flatten()
        .collect())
}

/// The objects of one document.
fn load_document<T: Object>(
    path: &Path,
    document: &Document,
) -> Result<Vec<Located<T>>, LoadError> {
    let heads: Heads = parse(path, document, |de| Heads::deserialize(de))?;
    let named = heads.object();
    let head = Head {
        api_version: heads.api_version,
        kind: heads.kind,
    };
    // Of any other kind, `items` is a field like others.
    let items = heads.items.as_ref().filter(|_| head.kind.ends_with("List"));
    let read: Result<Vec<Option<T>>, _> = parse(path, document, |de| match items {
        Some(items) => ListSeed {
            items,
            next: std::marker::PhantomData,
        }
        .deserialize(de),
        None => Ok(vec![T::read(&head, de)?]),
    });
    let read = read.map_err(|mut error| {
        if let LoadError::Parse { object, .. } = &mut error {
            *object = named;
        }
        error
    })?;
    let located = |object| Located {
        object,
        path: path.to_owned(),
        line: document.first_line,
    };
    Ok(read.into_iter().flatten().map(located).collect())
}

/// One document, such as the agent's configuration.
pub fn parse_document<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T, LoadError> {
    let document = Document {
        text: text.to_owned(),
        before: 0,
        first_line: 1,
    };
    parse(path, &document, |de| T::deserialize(de))
}

struct Document {
    text: String,
    /// Lines of the file before the text.
    before: u64,
    /// Line of the file that the content begins with.
    first_line: u64,
}

/// Splits at document markers (YAML 1.2.2, 9.1.2): a line of `---` at column 0
/// cannot be content. Documents of comments and blanks only are left out.
fn documents(text: &str) -> Vec<Document> {
    let mut all = vec![Document {
        text: String::new(),
        before: 0,
        first_line: 1,
    }];
    for (before, line) in (0..).zip(text.lines()) {
        let marker = line == "---" || line.starts_with("--- ");
        if marker {
            // What stands behind the marker is content.
            let rest = line[3..].trim_start();
            all.push(Document {
                text: format!("    {rest}\n"),
                before,
                first_line: before + if rest.is_empty() { 2 } else { 1 },
            });
        } else if let Some(last) = all.last_mut() {
            last.text.push_str(line);
            last.text.push('\n');
        }
    }
    all.retain(|document| {
        document
            .text
            .lines()
            .any(|l| !l.trim().is_empty() && !l.trim_start().starts_with('#'))
    });
    all
}

fn parse<T>(
    path: &Path,
    document: &Document,
    read: impl for<'de, 'e> FnOnce(
        serde_path_to_error::Deserializer<'_, '_, serde_saphyr::Deserializer<'de, 'e>>,
    ) -> Result<T, serde_saphyr::Error>,
) -> Result<T, LoadError> {
    let mut track = serde_path_to_error::Track::new();
    let result = serde_saphyr::with_deserializer_from_str(&document.text, |de| {
        read(serde_path_to_error::Deserializer::new(de, &mut track))
    });
    result.map_err(|error| {
        let field = track.path().to_string();
        LoadError::Parse {
            path: path.to_owned(),
            line: error
                .location()
                .map_or(document.first_line, |at| document.before + at.line()),
            object: String::new(),
            field: if field == "." { String::new() } else { field },
            message: plain(&error),
        }
    })
}

/// The message without the place, which is named before it.
fn plain(error: &serde_saphyr::Error) -> String {
    let text = error.without_snippet().to_string();
    let message = match text.rsplit_once(" at line ") {
        Some((message, _place)) => message,
        None => text.as_str(),
    };
    // In the reader's words, not the library's.
    for (theirs, ours) in [
        (
            "expected sequence start",
            "must be a list: each entry begins with `-`",
        ),
        ("expected mapping start", "must be a mapping: `key: value`"),
        ("expected string scalar", "must be a string"),
        (
            "cannot deserialize null into string",
            "is empty; must be a string",
        ),
        (
            "multiple YAML documents detected",
            "`...` ends a document; begin the next with `---`",
        ),
    ] {
        if message.contains(theirs) {
            return ours.to_owned();
        }
    }
    if let Some(key) = message.strip_prefix("duplicate mapping key: ") {
        let key = key.split(',').next().unwrap_or(key);
        return format!("`{key}` stands twice");
    }
    message.to_owned()
}

/// The head of a document, or of each item of a List.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Heads {
    #[serde(rename = "apiVersion")]
    api_version: String,
    kind: String,
    metadata: Name,
    items: Option<Vec<Head>>,
}

/// Who an object is, for an error about it; taken as it comes.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Name {
    name: serde_json::Value,
    namespace: serde_json::Value,
}

impl Heads {
    fn object(&self) -> String {
        let Name { name, namespace } = &self.metadata;
        let namespace = namespace.as_str().unwrap_or("default");
        match name.as_str() {
            Some(name) => format!("{}/{namespace}/{name}", self.kind),
            None => self.kind.clone(),
        }
    }
}

/// Reads a List a second time, each item as what its head said.
struct ListSeed<'a, T> {
    items: &'a [Head],
    next: std::marker::PhantomData<T>,
}

impl<'de, T: Object> DeserializeSeed<'de> for ListSeed<'_, T> {
    type Value = Vec<Option<T>>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de, T: Object> Visitor<'de> for ListSeed<'_, T> {
    type Value = Vec<Option<T>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a List of objects")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut objects = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            if key == "items" {
                objects = map.next_value_seed(Items(ListSeed {
                    items: self.items,
                    next: self.next,
                }))?;
            } else if matches!(key.as_str(), "apiVersion" | "kind" | "metadata") {
                map.next_value::<IgnoredAny>()?;
            } else {
                return Err(serde::de::Error::unknown_field(
                    &key,
                    &["apiVersion", "kind", "metadata", "items"],
                ));
            }
        }
        Ok(objects)
    }
}

struct Items<'a, T>(ListSeed<'a, T>);

impl<'de, T: Object> DeserializeSeed<'de> for Items<'_, T> {
    type Value = Vec<Option<T>>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        from.deserialize_seq(self)
    }
}

impl<'de, T: Object> Visitor<'de> for Items<'_, T> {
    type Value = Vec<Option<T>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut objects = Vec::new();
        for head in self.0.items {
            let seed = ItemSeed {
                head,
                next: std::marker::PhantomData::<T>,
            };
            objects.extend(seq.next_element_seed(seed)?);
        }
        Ok(objects)
    }
}

struct ItemSeed<'a, T> {
    head: &'a Head,
    next: std::marker::PhantomData<T>,
}

impl<'de, T: Object> DeserializeSeed<'de> for ItemSeed<'_, T> {
    type Value = Option<T>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        T::read(self.head, from)
    }
}

/// An object's head and whatever else it has: for kinds that are refused or ignored.
pub fn ignore<'de, D: Deserializer<'de>>(from: D) -> Result<(), D::Error> {
    IgnoredAny::deserialize(from).map(|_ignored| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Cat {
        #[serde(rename = "apiVersion")]
        _api: String,
        #[serde(rename = "kind")]
        _kind: String,
        lives: u8,
    }

    impl Object for Cat {
        fn read<'de, D: Deserializer<'de>>(h: &Head, from: D) -> Result<Option<Self>, D::Error> {
            if h.kind == "Cat" {
                return Self::deserialize(from).map(Some);
            }
            ignore(from)?;
            Ok(None)
        }
    }

    fn lives(text: &str) -> Result<Vec<(u64, u8)>, LoadError> {
        let all = load_text::<Cat>(Path::new("cats.yaml"), text)?;
        Ok(all.iter().map(|c| (c.line, c.object.lives)).collect())
    }

    #[test]
    fn reads_documents_lists_and_json() {
        let cat = "apiVersion: v1\nkind: Cat\nlives: 9\n";
        let dog = "apiVersion: v1\nkind: Dog\nbones: [1]\n";
        let both = format!(
            "# cats\n---\n{cat}---\n{dog}---\n# nothing\n--- # again\n{cat}--- {{apiVersion: v1, kind: Cat, lives: 4}}\n"
        );
        assert_eq!(lives(&both).expect("reads"), [(3, 9), (12, 9), (16, 4)]);
        let list = "kind: List\napiVersion: v1\nitems:\n- {kind: Dog}\n- {apiVersion: v1, kind: Cat, lives: 2}\n";
        assert_eq!(lives(list).expect("reads"), [(1, 2)]);
        let json = r#"{"apiVersion": "v1", "kind": "Cat", "lives": 3}"#;
        assert_eq!(lives(json).expect("reads"), [(1, 3)]);
        assert_eq!(lives("").expect("reads"), []);
    }

    #[test]
    fn errors_name_line_and_field() {
        let second = "kind: Dog\n---\napiVersion: v1\nkind: Cat\nlives: many\n";
        let error = lives(second).expect_err("no number").to_string();
        assert!(error.starts_with("cats.yaml:5: lives: "), "{error}");
        let listed = "kind: List\nitems:\n- kind: Cat\n  apiVersion: v1\n  tails: 1\n";
        let error = lives(listed).expect_err("unknown field").to_string();
        assert!(
            error.contains("cats.yaml:5") && error.contains("tails"),
            "{error}"
        );
        assert!(lives("kind: [\n").is_err());
    }

    #[test]
    fn documents_cost_no_more_with_others_before_them() {
        let text = "---\nkind: Dog\n".repeat(1000);
        let read: usize = documents(&text).iter().map(|d| d.text.len()).sum();
        assert!(read <= 2 * text.len(), "{read} bytes of {}", text.len());
    }
}
