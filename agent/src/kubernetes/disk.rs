//! What was known, on disk: the agent starts with it when the API server is away. It is
//! as trusted as the agent itself (0600, in the state directory of mode 0700), never
//! half written, and read only where nothing of it is missing.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{self, BufReader, BufWriter, Read as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::SystemTime,
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    Held, Scope, Store,
    held::{self, Stored},
    policies::{self, Id},
};
use crate::{objects::Head, workload::NamespacedName};

/// Raised whenever an older agent's file would be read wrongly.
const VERSION: u32 = 1;
/// A file that is larger is not written, and not read.
const LARGEST: u64 = 256 << 20;

#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("{path}: {source}", path = path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{path}: {message}; it is passed over", path = path.display())]
    Content { path: PathBuf, message: String },
}

#[derive(Deserialize, Serialize)]
struct Saved {
    version: u32,
    node: String,
    scopes: Vec<SavedScope>,
    /// Versions of policies that were taken, where a later one was refused.
    good: Vec<Stored>,
}

#[derive(Deserialize, Serialize)]
struct SavedScope {
    scope: Scope,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    workloads: Vec<Value>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    policies: Vec<Stored>,
}

/// What was read.
pub struct Loaded {
    pub scopes: Vec<(Scope, BTreeMap<NamespacedName, Held>)>,
    pub good: BTreeMap<Id, Stored>,
    /// When the API server had it so.
    pub at: SystemTime,
}

pub fn path(state: &Path) -> PathBuf {
    state.join("kubernetes.json")
}

/// The file's text; `None` while something is missing.
pub fn text(
    store: &Store,
    good: &BTreeMap<Id, Stored>,
    node: &str,
) -> Result<Option<Vec<u8>>, serde_json::Error> {
    let inner = store.lock();
    if !inner.scopes.values().all(|kept| kept.is_whole()) {
        return Ok(None);
    }
    let mut scopes = Vec::new();
    let mut current = BTreeMap::new();
    for (scope, kept) in &inner.scopes {
        let mut saved = SavedScope {
            scope: scope.clone(),
            workloads: Vec::new(),
            policies: Vec::new(),
        };
        for held in kept.objects.values() {
            match held {
                Held::Workload(object) => saved.workloads.push(serde_json::to_value(object)?),
                Held::Policy(stored) => {
                    current.insert(policies::id(stored), &**stored);
                    saved.policies.push((**stored).clone());
                }
            }
        }
        scopes.push(saved);
    }
    let older = good.iter().filter(|(id, stored)| {
        let now = current.get(*id);
        now.is_some_and(|now| !now.says_the_same(stored))
    });
    let good = older.map(|(_, stored)| stored.clone()).collect();
    let saved = Saved {
        version: VERSION,
        node: node.to_owned(),
        scopes,
        good,
    };
    serde_json::to_vec(&saved).map(Some)
}

pub fn save(path: &Path, text: &[u8]) -> Result<(), DiskError> {
    let fail = |source| DiskError::Io {
        path: path.to_owned(),
        source,
    };
    if text.len() as u64 > LARGEST {
        let why = format!(
            "{} bytes are more than the {LARGEST} that are kept",
            text.len()
        );
        return Err(fail(io::Error::other(why)));
    }
    let partial = path.with_added_extension("partial");
    let write = || {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&partial)?;
        let mut file = BufWriter::new(file);
        file.write_all(text)?;
        file.into_inner()?.sync_all()?;
        std::fs::rename(&partial, path)
    };
    write().map_err(fail)
}

/// It is still so: the time of the file is when that was last known.
pub fn confirm(path: &Path) -> Result<(), DiskError> {
    let file = OpenOptions::new().write(true).open(path);
    let confirmed = file.and_then(|file| file.set_modified(SystemTime::now()));
    confirmed.map_err(|source| DiskError::Io {
        path: path.to_owned(),
        source,
    })
}

/// `None` where there is no file.
pub fn load(path: &Path, node: &str) -> Result<Option<Loaded>, DiskError> {
    let fail = |source| DiskError::Io {
        path: path.to_owned(),
        source,
    };
    let wrong = |message: String| DiskError::Content {
        path: path.to_owned(),
        message,
    };
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(fail)?,
    };
    let meta = file.metadata().map_err(fail)?;
    let at = meta.modified().map_err(fail)?;
    if meta.len() > LARGEST {
        return Err(wrong(format!("{} bytes are too many", meta.len())));
    }
    let reader = BufReader::new(file.take(LARGEST));
    let saved: Saved = serde_json::from_reader(reader).map_err(|e| wrong(e.to_string()))?;
    if saved.version != VERSION {
        return Err(wrong(format!("it is of version {}", saved.version)));
    }
    if saved.node != node {
        return Err(wrong(format!("it is of node {}", saved.node)));
    }
    let mut scopes = Vec::new();
    for SavedScope {
        scope,
        workloads,
        policies,
    } in saved.scopes
    {
        let mut objects = BTreeMap::new();
        if let Some(resource) = scope.resources().into_iter().next() {
            let head = Head {
                api_version: resource.api_version,
                kind: resource.kind,
            };
            for value in workloads {
                let name = named(&value);
                let held = held::read(&head, value).map_err(wrong)?;
                objects.insert(name, held);
            }
        }
        for stored in policies {
            objects.insert(named(&stored.object), Held::Policy(Box::new(stored)));
        }
        scopes.push((scope, objects));
    }
    let good = saved.good.into_iter();
    Ok(Some(Loaded {
        scopes,
        good: good.map(|stored| (policies::id(&stored), stored)).collect(),
        at,
    }))
}

fn named(object: &Value) -> NamespacedName {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default();
    NamespacedName {
        namespace: text("namespace").to_owned(),
        name: text("name").to_owned(),
    }
}
