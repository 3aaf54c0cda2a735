//! The objects, and how they came to be so: one revision for every write, as etcd
//! counts, and a window of the past from which lists and watches are answered.

use std::{
    collections::{BTreeMap, VecDeque},
    hash::{BuildHasher as _, RandomState},
    sync::Arc,
};

use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{kinds::Kind, status::Refusal};

/// Sorts as etcd's keys do, which is the order of lists.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    pub resource: String,
    pub namespace: String,
    pub name: String,
}

/// One write.
#[derive(Clone, Debug)]
pub struct Change {
    pub revision: u64,
    pub key: Key,
    pub old: Option<Arc<Value>>,
    pub new: Option<Arc<Value>>,
}

pub struct Store {
    pub kinds: Vec<Kind>,
    objects: BTreeMap<Key, Arc<Value>>,
    history: VecDeque<Change>,
    /// Writes that are remembered.
    window: usize,
    revision: u64,
    /// The oldest revision that can be answered from.
    compacted: u64,
}

impl Store {
    pub fn new(kinds: Vec<Kind>, window: usize) -> Self {
        Self {
            kinds,
            objects: BTreeMap::new(),
            history: VecDeque::new(),
            window,
            revision: 1000,
            compacted: 1000,
        }
    }

    pub fn revision(&self) -> u64 {
        self.revision
    }

    pub fn compacted(&self) -> u64 {
        self.compacted
    }

    /// Forgets the past. Something else of the cluster was written meanwhile, so that
    /// whatever a client has seen is too old.
    pub fn expire(&mut self) {
        self.revision += 1;
        self.compacted = self.revision;
        self.history.clear();
    }

    pub fn kind(&self, group: &str, version: &str, plural: &str) -> Option<&Kind> {
        self.kinds.iter().find(|kind| {
            kind.group == group
                && kind.plural == plural
                && kind.versions.iter().any(|v| v == version)
        })
    }

    /// The kind of an object by what it says of itself.
    pub fn kind_of(&self, object: &Value) -> Result<&Kind, Refusal> {
        let (api, kind) = (&object["apiVersion"], &object["kind"]);
        let version = api.as_str().unwrap_or_default();
        let (group, version) = version.split_once('/').unwrap_or(("", version));
        let found = self.kinds.iter().find(|k| {
            k.group == group && *kind == k.kind && k.versions.iter().any(|v| v == version)
        });
        found.ok_or_else(|| {
            let message = format!("no matches for kind {kind} in version {api}");
            Refusal::new(404, "NotFound", message)
        })
    }

    /// By its name alone, as `kubectl get KIND` finds one.
    pub fn kind_named(&self, name: &str) -> Option<&Kind> {
        self.kinds
            .iter()
            .find(|k| k.kind.eq_ignore_ascii_case(name) || k.plural.eq_ignore_ascii_case(name))
    }

    pub fn get(&self, key: &Key) -> Option<&Arc<Value>> {
        self.objects.get(key)
    }

    pub fn list(&self, resource: &str) -> impl Iterator<Item = (&Key, &Arc<Value>)> {
        let from = Key {
            resource: resource.to_owned(),
            namespace: String::new(),
            name: String::new(),
        };
        self.objects
            .range(from..)
            .take_while(move |(key, _)| key.resource == resource)
    }

    /// All of a resource as they were at a revision.
    pub fn at(&self, resource: &str, revision: u64) -> Result<BTreeMap<Key, Arc<Value>>, Refusal> {
        if revision < self.compacted {
            return Err(Refusal::expired(revision, self.compacted));
        }
        let mut all: BTreeMap<Key, Arc<Value>> = self
            .list(resource)
            .map(|(key, object)| (key.clone(), object.clone()))
            .collect();
        for change in self.history.iter().rev() {
            if change.revision <= revision {
                break;
            }
            if change.key.resource == resource {
                match &change.old {
                    Some(old) => all.insert(change.key.clone(), old.clone()),
                    None => all.remove(&change.key),
                };
            }
        }
        Ok(all)
    }

    /// What was written to a resource after a revision.
    pub fn since(&self, resource: &str, revision: u64) -> Result<Vec<Change>, Refusal> {
        if revision < self.compacted {
            return Err(Refusal::expired(revision, self.compacted));
        }
        let first = self.history.partition_point(|c| c.revision <= revision);
        let after = self.history.range(first..);
        Ok(after
            .filter(|change| change.key.resource == resource)
            .cloned()
            .collect())
    }

    /// Writes an object. What the server owns of its metadata is the server's.
    pub fn put(&mut self, key: Key, mut object: Value) -> Arc<Value> {
        let old = self.objects.get(&key).cloned();
        object["metadata"]["name"] = json!(key.name);
        if !key.namespace.is_empty() {
            object["metadata"]["namespace"] = json!(key.namespace);
        }
        if let Some(old) = &old
            && same(old, &object)
        {
            // Nothing is written that is so already.
            return old.clone();
        }
        self.revision += 1;
        let revision = self.revision;
        let meta = &mut object["metadata"];
        meta["resourceVersion"] = json!(revision.to_string());
        match &old {
            Some(old) => {
                let was = &old["metadata"];
                for owned in ["uid", "creationTimestamp"] {
                    meta[owned] = was[owned].clone();
                }
                let before = was["generation"].as_u64().unwrap_or(1);
                let changed = specification(old) != specification(&object);
                object["metadata"]["generation"] = json!(before + u64::from(changed));
            }
            None => {
                if !meta["uid"].is_string() {
                    meta["uid"] = json!(uid());
                }
                if !meta["creationTimestamp"].is_string() {
                    meta["creationTimestamp"] = json!(now());
                }
                meta["generation"] = json!(1);
            }
        }
        let new = Arc::new(object);
        self.objects.insert(key.clone(), new.clone());
        self.remember(key, old, Some(new.clone()));
        new
    }

    pub fn remove(&mut self, key: &Key) -> Option<Arc<Value>> {
        let old = self.objects.remove(key)?;
        self.revision += 1;
        self.remember(key.clone(), Some(old.clone()), None);
        Some(old)
    }

    fn remember(&mut self, key: Key, old: Option<Arc<Value>>, new: Option<Arc<Value>>) {
        self.history.push_back(Change {
            revision: self.revision,
            key,
            old,
            new,
        });
        while self.history.len() > self.window {
            if let Some(gone) = self.history.pop_front() {
                self.compacted = gone.revision;
            }
        }
    }
}

/// All but metadata and status: what a generation counts changes of.
fn specification(object: &Value) -> Vec<(&String, &Value)> {
    let all = object.as_object().into_iter().flatten();
    all.filter(|(key, _)| !["metadata", "status", "apiVersion", "kind"].contains(&key.as_str()))
        .collect()
}

/// Whether a write would change nothing.
fn same(old: &Value, new: &Value) -> bool {
    let bare = |object: &Value| {
        let mut object = object.clone();
        if let Some(meta) = object["metadata"].as_object_mut() {
            for owned in ["uid", "creationTimestamp", "generation", "resourceVersion"] {
                meta.remove(owned);
            }
            // Times in there differ at each write.
            for manager in meta
                .get_mut("managedFields")
                .and_then(Value::as_array_mut)
                .into_iter()
                .flatten()
            {
                manager["time"] = Value::Null;
            }
        }
        object
    };
    bare(old) == bare(new)
}

pub fn now() -> String {
    later(0)
}

/// The time in so many seconds.
pub fn later(seconds: u64) -> String {
    let now = OffsetDateTime::now_utc() + std::time::Duration::from_secs(seconds);
    let seconds = now.replace_nanosecond(0).unwrap_or(now);
    seconds
        .format(&Rfc3339)
        .expect("a time of this age has a form")
}

/// 128 bits that come once.
pub fn random() -> u128 {
    let half = || u128::from(RandomState::new().hash_one(0));
    (half() << 64) | half()
}

pub fn uid() -> String {
    let hex = format!("{:032x}", random());
    let part = |from: usize, to: usize| hex.get(from..to).unwrap_or_default();
    format!(
        "{}-{}-4{}-a{}-{}",
        part(0, 8),
        part(8, 12),
        part(13, 16),
        part(17, 20),
        part(20, 32)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        Key {
            resource: "pods".into(),
            namespace: "shop".into(),
            name: name.into(),
        }
    }

    fn pod(image: &str, phase: &str) -> Value {
        json!({"metadata": {}, "spec": {"image": image}, "status": {"phase": phase}})
    }

    #[test]
    fn a_generation_counts_specs_only() {
        let mut store = Store::new(Vec::new(), 10);
        let first = store.put(key("a"), pod("x", "Pending"));
        let second = store.put(key("a"), pod("x", "Running"));
        let third = store.put(key("a"), pod("y", "Running"));
        let of = |object: &Value| object["metadata"]["generation"].as_u64();
        assert_eq!(
            [of(&first), of(&second), of(&third)],
            [Some(1), Some(1), Some(2)]
        );
        assert_eq!(first["metadata"]["uid"], third["metadata"]["uid"]);
        assert_ne!(
            first["metadata"]["resourceVersion"],
            third["metadata"]["resourceVersion"]
        );
        let again = store.put(key("a"), pod("y", "Running"));
        assert_eq!(again, third, "nothing changed, nothing is written");
    }

    #[test]
    fn the_past_is_there_within_the_window() {
        let mut store = Store::new(Vec::new(), 3);
        store.put(key("a"), pod("x", ""));
        store.put(key("b"), pod("x", ""));
        let then = store.revision();
        store.put(key("a"), pod("y", ""));
        store.remove(&key("b"));
        store.put(key("c"), pod("x", ""));
        let past = store.at("pods", then).expect("within the window");
        let names: Vec<_> = past.keys().map(|key| key.name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(past[&key("a")]["spec"]["image"], "x");
        assert_eq!(store.since("pods", then).expect("within").len(), 3);
        store.put(key("d"), pod("x", ""));
        assert_eq!(store.at("pods", then).expect_err("too old").code, 410);
        assert_eq!(
            store.since("pods", then).expect_err("too old").reason,
            "Expired"
        );
        store.expire();
        let now = store.revision();
        assert!(store.since("pods", now - 1).is_err());
        assert!(
            store
                .since("pods", now)
                .is_ok_and(|changes| changes.is_empty())
        );
    }
}
