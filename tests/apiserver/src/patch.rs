//! Patches: RFC 7386's, and the strategic one, which merges lists of maps by key.

use serde_json::{Map, Value};

/// By which fields entries of a list are the same entry: what the real one has in its
/// schemas. `None`: the list is one value.
pub fn list_keys(field: &str) -> Option<&'static [&'static str]> {
    Some(match field {
        "conditions" => &["type"],
        "containers"
        | "initContainers"
        | "ephemeralContainers"
        | "volumes"
        | "env"
        | "imagePullSecrets" => &["name"],
        "volumeMounts" => &["mountPath"],
        "containerStatuses" | "initContainerStatuses" => &["name"],
        "ownerReferences" => &["uid"],
        "podIPs" | "hostIPs" => &["ip"],
        "addresses" => &["type"],
        "nodes" => &["name"],
        _ => return None,
    })
}

/// RFC 7386.
pub fn merge(into: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *into = patch.clone();
        return;
    };
    let into = map(into);
    for (key, value) in patch {
        if value.is_null() {
            into.remove(key);
        } else {
            merge(into.entry(key).or_insert(Value::Null), value);
        }
    }
}

pub fn strategic(into: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *into = patch.clone();
        return;
    };
    let into = map(into);
    for (key, value) in patch {
        match (value, list_keys(key)) {
            _ if key.starts_with('$') => {}
            (Value::Null, _) => {
                into.remove(key);
            }
            (Value::Array(entries), Some(keys)) => {
                let list = list(into.entry(key).or_insert(Value::Null));
                for entry in entries {
                    let at = list.iter().position(|there| same(there, entry, keys));
                    match (at, entry["$patch"] == "delete") {
                        (Some(at), true) => drop(list.remove(at)),
                        (Some(at), false) => strategic(&mut list[at], entry),
                        (None, true) => {}
                        (None, false) => list.push(entry.clone()),
                    }
                }
            }
            _ => strategic(into.entry(key).or_insert(Value::Null), value),
        }
    }
}

/// RFC 6902, as far as clients use it: `None` where it does not fit.
pub fn json(into: &mut Value, operations: &Value) -> Option<()> {
    for operation in operations.as_array()? {
        let path = operation["path"].as_str()?;
        let (parent, last) = path.rsplit_once('/')?;
        let last = last.replace("~1", "/").replace("~0", "~");
        let value = operation["value"].clone();
        match operation["op"].as_str()? {
            "test" => (*into.pointer(path)? == value).then_some(())?,
            "replace" => *into.pointer_mut(path)? = value,
            what => match (what, into.pointer_mut(parent)?) {
                ("add", Value::Object(all)) => drop(all.insert(last, value)),
                ("remove", Value::Object(all)) => drop(all.remove(&last)?),
                ("add", Value::Array(all)) if last == "-" => all.push(value),
                ("add", Value::Array(all)) => {
                    let at = last.parse().ok().filter(|at| *at <= all.len())?;
                    all.insert(at, value);
                }
                ("remove", Value::Array(all)) => {
                    let at = last.parse().ok().filter(|at| *at < all.len())?;
                    all.remove(at);
                }
                _ => return None,
            },
        }
    }
    Some(())
}

/// Whether two entries of a list are the same one.
pub fn same(one: &Value, other: &Value, keys: &[&str]) -> bool {
    keys.iter().all(|key| one[*key] == other[*key])
}

/// As a map, whatever it was.
pub fn map(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    value.as_object_mut().expect("just made one")
}

pub fn list(value: &mut Value) -> &mut Vec<Value> {
    if !value.is_array() {
        *value = Value::Array(Vec::new());
    }
    value.as_array_mut().expect("just made one")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn operations_are_done_in_turn() {
        let mut object = json!({"a": {"b/c": 1}, "l": [1, 2]});
        let operations = json!([
            {"op": "test", "path": "/a/b~1c", "value": 1},
            {"op": "replace", "path": "/a/b~1c", "value": 2},
            {"op": "add", "path": "/l/-", "value": 3},
            {"op": "remove", "path": "/l/0"},
        ]);
        assert_eq!(json(&mut object, &operations), Some(()));
        assert_eq!(object, json!({"a": {"b/c": 2}, "l": [2, 3]}));
        let fails = json!([{"op": "test", "path": "/a/b~1c", "value": 1}]);
        assert_eq!(json(&mut object, &fails), None);
    }

    #[test]
    fn lists_are_replaced_or_merged() {
        let object =
            json!({"spec": {"containers": [{"name": "a", "image": "x"}], "ports": [1]}, "gone": 1});
        let patch = json!({"spec": {"containers": [{"name": "b"}], "ports": [2]}, "gone": null});
        let mut merged = object.clone();
        merge(&mut merged, &patch);
        assert_eq!(
            merged,
            json!({"spec": {"containers": [{"name": "b"}], "ports": [2]}})
        );
        let mut merged = object;
        strategic(&mut merged, &patch);
        let containers = json!([{"name": "a", "image": "x"}, {"name": "b"}]);
        assert_eq!(
            merged,
            json!({"spec": {"containers": containers, "ports": [2]}})
        );
        strategic(
            &mut merged,
            &json!({"spec": {"containers": [{"$patch": "delete", "name": "a"}]}}),
        );
        assert_eq!(merged["spec"]["containers"], json!([{"name": "b"}]));
    }
}
