//! Server-side apply: who owns which field, by `managedFields` in the real one's form.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use crate::{
    patch::{list, list_keys, map, same},
    status::Refusal,
    store::now,
};

/// Where a field is: names of fields, and `k:{..}` for entries of lists.
type Path = Vec<String>;
type Fields = BTreeSet<Path>;

/// Who writes, and by what.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Manager {
    pub name: String,
    /// `Apply` or `Update`.
    pub operation: String,
    /// `status`, or nothing.
    pub subresource: String,
}

/// Applies what a manager wants: its fields are set, those that it no longer names are
/// removed unless they are another's as well.
pub fn apply(
    live: &Value,
    wanted: &Value,
    manager: &Manager,
    force: bool,
) -> Result<Value, Refusal> {
    let mut owners = owners(live);
    let fields = fields(wanted);
    let mut conflicts = Vec::new();
    for (other, theirs) in owners.iter_mut().filter(|(other, _)| *other != manager) {
        let clash = |path: &&Path| theirs.contains(*path) && at(live, path) != at(wanted, path);
        let clashes: Vec<Path> = fields.iter().filter(clash).cloned().collect();
        for path in clashes {
            conflicts.push(format!(
                "conflict with {:?}: .{}",
                other.name,
                path.join(".")
            ));
            theirs.remove(&path);
        }
    }
    if !conflicts.is_empty() && !force {
        let message = format!(
            "Apply failed with {} conflicts: {}",
            conflicts.len(),
            conflicts.join(", ")
        );
        return Err(Refusal::conflict(message));
    }
    let before = owners
        .insert(manager.clone(), fields.clone())
        .unwrap_or_default();
    let mut object = live.clone();
    overlay(&mut object, wanted);
    for path in before.difference(&fields) {
        if !owners.values().any(|theirs| theirs.contains(path)) {
            remove(&mut object, path);
        }
    }
    set_owners(&mut object, &owners);
    Ok(object)
}

/// After a write of any other kind: who writes owns what changed.
pub fn updated(old: &Value, new: &mut Value, manager: &Manager) {
    let mut owners = owners(old);
    let (was, is) = (fields(old), fields(new));
    let changed: Fields = is
        .iter()
        .filter(|path| at(old, path) != at(new, path))
        .cloned()
        .collect();
    for theirs in owners.values_mut() {
        theirs.retain(|path| !changed.contains(path) && (is.contains(path) || !was.contains(path)));
    }
    if !changed.is_empty() {
        owners.entry(manager.clone()).or_default().extend(changed);
    }
    set_owners(new, &owners);
}

/// The leaves of an object; what the server itself writes is nobody's.
fn fields(object: &Value) -> Fields {
    let mut all = Fields::new();
    for (key, value) in object.as_object().into_iter().flatten() {
        match key.as_str() {
            "apiVersion" | "kind" => {}
            "metadata" => {
                for name in ["labels", "annotations", "ownerReferences", "finalizers"] {
                    if let Some(value) = value.get(name) {
                        leaves(value, name, vec!["metadata".into(), name.into()], &mut all);
                    }
                }
            }
            _ => leaves(value, key, vec![key.clone()], &mut all),
        }
    }
    all
}

fn leaves(value: &Value, field: &str, path: Path, all: &mut Fields) {
    let below = |step: String| path.iter().cloned().chain([step]).collect::<Path>();
    match (value, list_keys(field)) {
        (Value::Object(entries), _) if !entries.is_empty() => {
            for (key, value) in entries {
                leaves(value, key, below(key.clone()), all);
            }
        }
        (Value::Array(entries), Some(keys)) if !entries.is_empty() => {
            for entry in entries {
                leaves(entry, "", below(entry_key(entry, keys)), all);
            }
        }
        _ => {
            all.insert(path);
        }
    }
}

fn entry_key(entry: &Value, keys: &[&str]) -> String {
    let key: Map<String, Value> = keys
        .iter()
        .map(|key| ((*key).to_owned(), entry[*key].clone()))
        .collect();
    format!("k:{}", Value::Object(key))
}

fn parse_key(step: &str) -> Option<Value> {
    serde_json::from_str(step.strip_prefix("k:")?).ok()
}

fn fits(entry: &Value, key: &Value) -> bool {
    let all = key.as_object();
    all.is_some_and(|all| all.iter().all(|(name, value)| entry[name] == *value))
}

fn at<'a>(object: &'a Value, path: &Path) -> Option<&'a Value> {
    path.iter()
        .try_fold(object, |value, step| match parse_key(step) {
            Some(key) => value.as_array()?.iter().find(|entry| fits(entry, &key)),
            None => value.get(step),
        })
}

/// Removes a leaf, and what it leaves empty.
fn remove(object: &mut Value, path: &[String]) {
    let Some((step, rest)) = path.split_first() else {
        return;
    };
    // By place, for an entry that loses its key is no longer found by it.
    let place = match (parse_key(step), &*object) {
        (Some(key), Value::Array(all)) => all.iter().position(|entry| fits(entry, &key)),
        _ => None,
    };
    let child = match place {
        Some(place) => object.get_mut(place),
        None => object.get_mut(step),
    };
    let Some(child) = child else { return };
    remove(child, rest);
    let empty = match child {
        Value::Object(all) => all.is_empty(),
        Value::Array(all) => all.is_empty(),
        _ => false,
    };
    if !(rest.is_empty() || empty) {
        return;
    }
    match (place, object) {
        (Some(place), Value::Array(all)) => drop(all.remove(place)),
        (None, Value::Object(all)) => drop(all.remove(step)),
        _ => {}
    }
}

/// Puts what is wanted over what is there.
fn overlay(into: &mut Value, wanted: &Value) {
    let Value::Object(wanted) = wanted else {
        *into = wanted.clone();
        return;
    };
    let into = map(into);
    for (name, value) in wanted {
        let there = into.entry(name).or_insert(Value::Null);
        match (value, list_keys(name)) {
            (Value::Array(entries), Some(keys)) => {
                let there = list(there);
                for entry in entries {
                    match there.iter_mut().find(|one| same(one, entry, keys)) {
                        Some(one) => overlay(one, entry),
                        None => there.push(entry.clone()),
                    }
                }
            }
            _ => overlay(there, value),
        }
    }
}

fn owners(object: &Value) -> BTreeMap<Manager, Fields> {
    let text = |entry: &Value, name: &str| entry[name].as_str().unwrap_or_default().to_owned();
    let all = object["metadata"]["managedFields"].as_array();
    let one = |entry: &Value| {
        let manager = Manager {
            name: text(entry, "manager"),
            operation: text(entry, "operation"),
            subresource: text(entry, "subresource"),
        };
        let mut fields = Fields::new();
        read_fields(&entry["fieldsV1"], Path::new(), &mut fields);
        (manager, fields)
    };
    all.into_iter().flatten().map(one).collect()
}

fn read_fields(value: &Value, path: Path, all: &mut Fields) {
    let entries = value.as_object().filter(|entries| !entries.is_empty());
    let Some(entries) = entries else {
        if !path.is_empty() {
            all.insert(path);
        }
        return;
    };
    for (step, value) in entries {
        let step = step.strip_prefix("f:").unwrap_or(step).to_owned();
        read_fields(value, path.iter().cloned().chain([step]).collect(), all);
    }
}

fn set_owners(object: &mut Value, owners: &BTreeMap<Manager, Fields>) {
    let version = object["apiVersion"].clone();
    let entry = |(manager, fields): (&Manager, &Fields)| {
        let mut tree = json!({});
        for path in fields {
            let mut at = &mut tree;
            for step in path {
                let step = match step.starts_with("k:") {
                    true => step.clone(),
                    false => format!("f:{step}"),
                };
                at = map(at).entry(step).or_insert_with(|| json!({}));
            }
        }
        let mut entry = json!({
            "manager": manager.name, "operation": manager.operation, "apiVersion": version,
            "time": now(), "fieldsType": "FieldsV1", "fieldsV1": tree,
        });
        if !manager.subresource.is_empty() {
            entry["subresource"] = json!(manager.subresource);
        }
        entry
    };
    let all = owners.iter().filter(|(_, fields)| !fields.is_empty());
    object["metadata"]["managedFields"] = all.map(entry).collect();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manager(name: &str) -> Manager {
        Manager {
            name: name.into(),
            operation: "Apply".into(),
            subresource: "status".into(),
        }
    }

    fn condition(kind: &str, status: &str) -> Value {
        json!({"status": {"conditions": [{"type": kind, "status": status}]}})
    }

    #[test]
    fn two_managers_share_a_list_of_conditions() {
        let live = json!({"apiVersion": "v1", "metadata": {"name": "a"}});
        let one = apply(&live, &condition("A", "True"), &manager("one"), false).expect("applies");
        let two = apply(&one, &condition("B", "True"), &manager("two"), false).expect("applies");
        assert_eq!(
            two["status"]["conditions"].as_array().map(Vec::len),
            Some(2)
        );
        let refused = apply(&two, &condition("A", "False"), &manager("two"), false);
        assert_eq!(refused.expect_err("it is the other's").code, 409);
        let forced = apply(&two, &condition("A", "False"), &manager("two"), true).expect("forced");
        // B was two's, and it no longer names it.
        let conditions = &forced["status"]["conditions"];
        assert_eq!(*conditions, json!([{"type": "A", "status": "False"}]));
        let none = apply(&forced, &json!({}), &manager("two"), false).expect("applies");
        // What one still owns of it is its key.
        assert_eq!(none["status"]["conditions"], json!([{"type": "A"}]));
        let gone = apply(&none, &json!({}), &manager("one"), false).expect("applies");
        assert!(gone.get("status").is_none(), "{gone}");
    }

    #[test]
    fn who_updates_takes_over() {
        let live = json!({"apiVersion": "v1", "metadata": {"name": "a"}});
        let old = apply(
            &live,
            &json!({"spec": {"x": 1, "y": 1}}),
            &manager("one"),
            false,
        )
        .expect("applies");
        let mut new = old.clone();
        new["spec"]["x"] = json!(2);
        updated(&old, &mut new, &manager("two"));
        let refused = apply(&new, &json!({"spec": {"x": 3}}), &manager("one"), false);
        assert!(refused.expect_err("two's").message.contains(".spec.x"));
        let fine =
            apply(&new, &json!({"spec": {"x": 2}}), &manager("one"), false).expect("as it is");
        assert_eq!(fine["spec"], json!({"x": 2}));
    }
}
