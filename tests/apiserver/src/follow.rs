//! Keeps objects in step with a directory of manifests, as a pipeline that applies
//! them would: a file that cannot be read leaves what it said before standing, an
//! object that the server has no kind for is passed over alone.

use std::{
    collections::BTreeMap,
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use serde_json::{Value, json};

use crate::{
    Shared, namespace, objects,
    status::Refusal,
    store::{Key, Store},
};

const POLL: Duration = Duration::from_millis(20);

#[derive(Default)]
struct Followed {
    files: BTreeMap<PathBuf, File>,
    /// What was put, as it was written.
    put: BTreeMap<Key, Value>,
}

struct File {
    stamp: (u64, i64, i64, u64),
    objects: Vec<Value>,
}

pub fn start(shared: Arc<Shared>, directory: PathBuf) -> io::Result<JoinHandle<()>> {
    let mut followed = Followed::default();
    followed.step(&shared, &directory)?;
    let stop = shared.stop.subscribe();
    std::thread::Builder::new()
        .name("follow".into())
        .spawn(move || {
            while !*stop.borrow() {
                std::thread::sleep(POLL);
                // A directory that is gone is no order to remove everything.
                let _unreadable = followed.step(&shared, &directory);
            }
        })
}

impl Followed {
    fn step(&mut self, shared: &Shared, directory: &Path) -> io::Result<()> {
        if !self.read(directory)? {
            return Ok(());
        }
        shared.write(|store| self.settle(store));
        Ok(())
    }

    /// Whether anything is other than before.
    fn read(&mut self, directory: &Path) -> io::Result<bool> {
        let mut changed = false;
        let mut there = Vec::new();
        for entry in std::fs::read_dir(directory)? {
            let path = entry?.path();
            let ours = path
                .extension()
                .is_some_and(|e| ["yaml", "yml", "json"].iter().any(|o| e == *o));
            let hidden = path
                .file_name()
                .is_some_and(|n| n.as_encoded_bytes().starts_with(b"."));
            // It may be gone by now.
            let Ok(meta) = std::fs::metadata(&path) else {
                continue;
            };
            if !ours || hidden || !meta.is_file() {
                continue;
            }
            there.push(path.clone());
            let stamp = (meta.ino(), meta.mtime(), meta.mtime_nsec(), meta.len());
            if self
                .files
                .get(&path)
                .is_some_and(|file| file.stamp == stamp)
            {
                continue;
            }
            changed = true;
            let read = std::fs::read_to_string(&path)
                .ok()
                .and_then(|text| parse(&text));
            let file = self.files.entry(path).or_insert(File {
                stamp,
                objects: Vec::new(),
            });
            file.stamp = stamp;
            if let Some(objects) = read {
                file.objects = objects;
            }
        }
        let before = self.files.len();
        self.files.retain(|path, _| there.contains(path));
        Ok(changed || self.files.len() != before)
    }

    fn settle(&mut self, store: &mut Store) {
        let mut wanted = BTreeMap::new();
        for object in self.files.values().flat_map(|file| &file.objects) {
            if let Ok(key) = key_of(store, object) {
                wanted.insert(key, object.clone());
            }
        }
        for key in self.put.keys().filter(|key| !wanted.contains_key(key)) {
            objects::remove(store, key);
            if key.resource == "namespaces" {
                // Others may be in it yet.
                ensure_namespace(store, &key.name);
            }
        }
        for (key, object) in &wanted {
            if self.put.get(key) == Some(object) {
                continue;
            }
            if !key.namespace.is_empty() {
                ensure_namespace(store, &key.namespace);
            }
            put(store, key.clone(), object.clone());
        }
        self.put = wanted;
    }
}

/// All objects of a file, of its lists too. `None`: it is broken.
fn parse(text: &str) -> Option<Vec<Value>> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).ok()?;
    let mut objects = Vec::new();
    for document in documents.into_iter().filter(|document| !document.is_null()) {
        let list = document["kind"]
            .as_str()
            .is_some_and(|kind| kind.ends_with("List"));
        match document["items"].as_array() {
            Some(items) if list => objects.extend(items.iter().cloned()),
            _ => objects.push(document),
        }
    }
    Some(objects)
}

pub fn key_of(store: &Store, object: &Value) -> Result<Key, Refusal> {
    let kind = store.kind_of(object)?;
    let meta = &object["metadata"];
    let name = meta["name"].as_str().filter(|name| !name.is_empty());
    let namespace = meta["namespace"].as_str().unwrap_or("default");
    Ok(Key {
        resource: kind.resource(),
        namespace: if kind.namespaced {
            namespace.to_owned()
        } else {
            String::new()
        },
        name: name
            .ok_or_else(|| Refusal::invalid("metadata.name: Required value"))?
            .to_owned(),
    })
}

pub fn ensure_namespace(store: &mut Store, name: &str) {
    let key = Key {
        resource: "namespaces".into(),
        namespace: String::new(),
        name: name.to_owned(),
    };
    if store.get(&key).is_none() {
        store.put(key, namespace(name));
    }
}

/// Puts an object as it is written. What clients wrote to its status stays unless the
/// object has one.
pub fn put(store: &mut Store, key: Key, mut object: Value) -> Value {
    if let Some(old) = store.get(&key).cloned() {
        let uid = &object["metadata"]["uid"];
        if uid.is_string() && *uid != old["metadata"]["uid"] {
            objects::remove(store, &key);
        } else {
            if let (None, Some(status)) = (object.get("status"), old.get("status")) {
                object["status"] = status.clone();
            }
            if let Some(fields) = old["metadata"].get("managedFields") {
                object["metadata"]["managedFields"] = fields.clone();
            }
        }
    }
    if key.resource == "namespaces" {
        object["metadata"]["labels"]["kubernetes.io/metadata.name"] = json!(key.name);
    }
    objects::put(store, key, object)
}
