//! Reading and writing objects, as a request asks for.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Value, json};

use crate::{
    apply::{self, Manager},
    kinds::Kind,
    patch,
    route::{Query, Target},
    select::Selector,
    status::Refusal,
    store::{Key, Store, now, uid},
};

/// A write, and who writes.
pub struct Write<'a> {
    pub target: &'a Target,
    pub query: &'a Query,
    pub content_type: &'a str,
    /// What a manager is called that does not say.
    pub agent: &'a str,
    pub body: &'a [u8],
}

type Answer = Result<(u16, Value), Refusal>;

pub fn get(store: &Store, target: &Target) -> Answer {
    let (kind, key) = place(store, target)?;
    let object = store.get(&key).ok_or_else(|| missing(&kind, &key))?;
    Ok((200, shown(&kind, &target.version, object)))
}

pub fn list(store: &Store, target: &Target, query: &Query) -> Answer {
    let (kind, _) = place(store, target)?;
    let resource = kind.resource();
    let selector = Selector::parse(
        &resource,
        query.text("fieldSelector"),
        query.text("labelSelector"),
    )?;
    let asked = query.number("resourceVersion")?;
    let limit = query.number("limit")?.filter(|limit| *limit > 0);
    let exact = query.text("resourceVersionMatch") == "Exact";
    let (revision, after) = match query.text("continue") {
        "" => match asked {
            Some(asked) if asked > store.revision() => {
                let message = format!(
                    "Too large resource version: {asked}, current: {}",
                    store.revision()
                );
                return Err(Refusal::new(504, "Timeout", message));
            }
            Some(asked)
                if exact
                    || (limit.is_some()
                        && asked > 0
                        && query.text("resourceVersionMatch").is_empty()) =>
            {
                (asked, None)
            }
            _ => (store.revision(), None),
        },
        token => {
            let (revision, after) = parse_continue(token)?;
            (revision, Some(after))
        }
    };
    let all = store.at(&resource, revision).map_err(|expired| match after {
        None => expired,
        Some(_) => Refusal::new(410, "Expired",
            "The provided continue parameter is too old to display a consistent list result. You can start a new list without the continue parameter."),
    })?;
    let wanted = |key: &Key| {
        (target.namespace.is_empty() || key.namespace == target.namespace)
            && after
                .as_ref()
                .is_none_or(|(namespace, name)| (&key.namespace, &key.name) > (namespace, name))
    };
    let mut chosen = all
        .iter()
        .filter(|(key, object)| wanted(key) && selector.matches(object));
    let mut items = Vec::new();
    let mut last = None;
    for (key, object) in chosen.by_ref() {
        let mut object = shown(&kind, &target.version, object);
        if !kind.custom {
            // Of a typed list's items, the list says what they are.
            for name in ["apiVersion", "kind"] {
                patch::map(&mut object).remove(name);
            }
        }
        items.push(object);
        last = Some(key);
        if limit.is_some_and(|limit| items.len() as u64 >= limit) {
            break;
        }
    }
    let mut meta = json!({"resourceVersion": revision.to_string()});
    let rest = chosen.count();
    if let (Some(last), true) = (last, rest > 0) {
        let token = json!({"rv": revision, "namespace": last.namespace, "name": last.name});
        meta["continue"] = json!(BASE64_STANDARD.encode(token.to_string()));
        meta["remainingItemCount"] = json!(rest);
    }
    Ok((
        200,
        json!({
            "kind": format!("{}List", kind.kind), "apiVersion": kind.api_version(&target.version),
            "metadata": meta, "items": items,
        }),
    ))
}

fn parse_continue(token: &str) -> Result<(u64, (String, String)), Refusal> {
    let wrong = || Refusal::bad("continue key is not valid");
    let text = BASE64_STANDARD.decode(token).map_err(|_| wrong())?;
    let value: Value = serde_json::from_slice(&text).map_err(|_| wrong())?;
    let text = |name: &str| value[name].as_str().map(str::to_owned).ok_or_else(wrong);
    let revision = value["rv"].as_u64().ok_or_else(wrong)?;
    Ok((revision, (text("namespace")?, text("name")?)))
}

pub fn create(store: &mut Store, write: &Write) -> Answer {
    let (kind, mut key) = place(store, write.target)?;
    let mut object = read(&kind, write)?;
    let meta = &object["metadata"];
    key.name = match (meta["name"].as_str(), meta["generateName"].as_str()) {
        (Some(name), _) if !name.is_empty() => name.to_owned(),
        (_, Some(prefix)) => format!("{prefix}{}", &uid()[..5]),
        _ => {
            return Err(Refusal::invalid(
                "metadata.name: Required value: name or generateName is required",
            ));
        }
    };
    check_namespace(store, &kind, &key, &object)?;
    if store.get(&key).is_some() {
        let message = format!("{} {:?} already exists", kind.resource(), key.name);
        return Err(Refusal::new(409, "AlreadyExists", message));
    }
    owned_by_server(&mut object, None);
    if kind.status {
        patch::map(&mut object).remove("status");
        if kind.kind == "Pod" {
            object["status"] = json!({"phase": "Pending", "qosClass": "BestEffort"});
        }
    }
    apply::updated(&json!({}), &mut object, &manager(write, "Update"));
    Ok((201, stored(store, &kind, write, key, object)))
}

pub fn replace(store: &mut Store, write: &Write) -> Answer {
    let (kind, key) = place(store, write.target)?;
    let new = read(&kind, write)?;
    let old = store
        .get(&key)
        .cloned()
        .ok_or_else(|| missing(&kind, &key))?;
    check_version(&kind, &key, &old, &new)?;
    changed(store, &kind, write, key, &old, new)
}

pub fn patch(store: &mut Store, write: &Write, force: bool) -> Answer {
    let (kind, key) = place(store, write.target)?;
    let old = store.get(&key).cloned();
    let wanted = read(&kind, write)?;
    if write.content_type.starts_with("application/apply-patch") {
        return applied(store, &kind, write, key, &wanted, force);
    }
    let old = old.ok_or_else(|| missing(&kind, &key))?;
    check_version(&kind, &key, &old, &wanted)?;
    let mut new = (*old).clone();
    match write.content_type {
        "application/json-patch+json" => patch::json(&mut new, &wanted).ok_or_else(|| {
            Refusal::invalid("the server rejected our request due to an error in our request")
        })?,
        "application/merge-patch+json" => patch::merge(&mut new, &wanted),
        "application/strategic-merge-patch+json" if !kind.custom => {
            patch::strategic(&mut new, &wanted)
        }
        other => {
            let message = format!("the body of the request was in an unknown format - {other}");
            return Err(Refusal::new(415, "UnsupportedMediaType", message));
        }
    }
    changed(store, &kind, write, key, &old, new)
}

/// What a write may not touch stays as it was, and the rest is stored.
fn changed(
    store: &mut Store,
    kind: &Kind,
    write: &Write,
    key: Key,
    old: &Value,
    new: Value,
) -> Answer {
    let mut new = match (write.target.sub.as_deref(), kind.status) {
        (Some(_), _) => {
            let mut object = old.clone();
            object["status"] = new["status"].clone();
            object
        }
        (None, true) => {
            let mut object = new;
            match old.get("status") {
                Some(status) => object["status"] = status.clone(),
                None => drop(patch::map(&mut object).remove("status")),
            }
            object
        }
        (None, false) => new,
    };
    owned_by_server(&mut new, Some(old));
    apply::updated(old, &mut new, &manager(write, "Update"));
    Ok((200, stored(store, kind, write, key, new)))
}

fn applied(
    store: &mut Store,
    kind: &Kind,
    write: &Write,
    key: Key,
    wanted: &Value,
    force: bool,
) -> Answer {
    if write.query.text("fieldManager").is_empty() {
        return Err(Refusal::invalid(
            "PatchOptions.meta.k8s.io \"\" is invalid: fieldManager: Required value: is required for apply patch",
        ));
    }
    if wanted["metadata"]["managedFields"]
        .as_array()
        .is_some_and(|all| !all.is_empty())
    {
        return Err(Refusal::bad("metadata.managedFields must be nil"));
    }
    let named = &wanted["metadata"]["name"];
    if !named.is_null() && *named != key.name {
        return Err(Refusal::bad(
            "the name of the object does not match the name on the URL",
        ));
    }
    let old = store.get(&key).cloned();
    let sub = write.target.sub.is_some();
    if old.is_none() && sub {
        return Err(missing(kind, &key));
    }
    check_namespace(store, kind, &key, wanted)?;
    if let Some(old) = &old {
        check_version(kind, &key, old, wanted)?;
    }
    let mut wanted = wanted.clone();
    owned_by_server(&mut wanted, old.as_deref());
    let all = patch::map(&mut wanted);
    all.retain(|name, _| match (name.as_str(), sub) {
        ("apiVersion" | "kind" | "metadata", _) => true,
        ("status", sub) => sub || !kind.status,
        (_, sub) => !sub,
    });
    let live = match &old {
        Some(old) => (**old).clone(),
        None => json!({"apiVersion": wanted["apiVersion"], "kind": kind.kind, "metadata": {}}),
    };
    let new = apply::apply(&live, &wanted, &manager(write, "Apply"), force)?;
    let code = if old.is_some() { 200 } else { 201 };
    Ok((code, stored(store, kind, write, key, new)))
}

pub fn delete(store: &mut Store, write: &Write) -> Answer {
    let (kind, key) = place(store, write.target)?;
    let old = store
        .get(&key)
        .cloned()
        .ok_or_else(|| missing(&kind, &key))?;
    let options: Value = serde_json::from_slice(write.body).unwrap_or_default();
    for name in ["uid", "resourceVersion"] {
        let wanted = &options["preconditions"][name];
        if !wanted.is_null() && *wanted != old["metadata"][name] {
            return Err(Refusal::conflict(format!(
                "Precondition failed: {name} in precondition: {wanted}"
            )));
        }
    }
    if write.query.text("dryRun") == "All" {
        return Ok((200, shown(&kind, &write.target.version, &old)));
    }
    let held = old["metadata"]["finalizers"]
        .as_array()
        .is_some_and(|f| !f.is_empty());
    if held {
        let mut object = (*old).clone();
        object["metadata"]["deletionTimestamp"] = json!(now());
        let object = store.put(key, object);
        return Ok((200, shown(&kind, &write.target.version, &object)));
    }
    remove(store, &key);
    let details = json!({"name": key.name, "kind": kind.plural, "uid": old["metadata"]["uid"]});
    Ok((
        200,
        json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}),
    ))
}

/// Removes an object, and the kind that it defines.
pub fn remove(store: &mut Store, key: &Key) {
    let gone = store.remove(key);
    if let Some(kind) = gone.as_deref().and_then(Kind::defined) {
        store
            .kinds
            .retain(|k| (&k.group, &k.plural) != (&kind.group, &kind.plural));
        let resource = kind.resource();
        let keys: Vec<Key> = store.list(&resource).map(|(key, _)| key.clone()).collect();
        for key in keys {
            store.remove(&key);
        }
    }
}

/// Stores an object, and serves the kind that it defines.
pub fn put(store: &mut Store, key: Key, mut object: Value) -> Value {
    if let Some(kind) = Kind::defined(&object) {
        let known = |k: &Kind| (&k.group, &k.plural) == (&kind.group, &kind.plural);
        store.kinds.retain(|k| !known(k));
        store.kinds.push(kind);
        let condition = |name: &str| json!({"type": name, "status": "True", "reason": "NoConflicts", "message": ""});
        object["status"]["conditions"] =
            json!([condition("NamesAccepted"), condition("Established")]);
        object["status"]["acceptedNames"] = object["spec"]["names"].clone();
    }
    (*store.put(key, object)).clone()
}

fn stored(store: &mut Store, kind: &Kind, write: &Write, key: Key, object: Value) -> Value {
    let meta = &object["metadata"];
    let unheld = meta["finalizers"].as_array().is_none_or(Vec::is_empty);
    let object = if write.query.text("dryRun") == "All" {
        object
    } else if meta["deletionTimestamp"].is_string() && unheld && kind.kind != "Pod" {
        remove(store, &key);
        object
    } else {
        put(store, key, object)
    };
    shown(kind, &write.target.version, &object)
}

/// The kind and the key that a path means.
pub fn place(store: &Store, target: &Target) -> Result<(Kind, Key), Refusal> {
    let kind = store
        .kind(&target.group, &target.version, &target.plural)
        .ok_or_else(Refusal::no_such_path)?;
    let status = target.sub.as_deref() == Some("status") && kind.status;
    if target.sub.is_some() && !status || !kind.namespaced && !target.namespace.is_empty() {
        return Err(Refusal::no_such_path());
    }
    let key = Key {
        resource: kind.resource(),
        namespace: target.namespace.clone(),
        name: target.name.clone().unwrap_or_default(),
    };
    Ok((kind.clone(), key))
}

fn read(kind: &Kind, write: &Write) -> Result<Value, Refusal> {
    let yaml = write.content_type.ends_with("yaml");
    let text = std::str::from_utf8(write.body).map_err(|e| Refusal::bad(e.to_string()))?;
    let object: Value = match yaml {
        true => serde_saphyr::from_str(text).map_err(|e| Refusal::bad(e.to_string()))?,
        false => serde_json::from_str(text).map_err(|e| Refusal::bad(e.to_string()))?,
    };
    if write.content_type == "application/json-patch+json" {
        return Ok(object);
    }
    if !object.is_object() {
        return Err(Refusal::bad("the body of the request is no object"));
    }
    let whole = !write.content_type.contains("merge-patch");
    if whole && object["kind"] != kind.kind {
        let message = format!(
            "the object provided is no {}: {}",
            kind.kind, object["kind"]
        );
        return Err(Refusal::bad(message));
    }
    Ok(match kind.group.as_str() {
        "events.k8s.io" => renamed(object, false),
        _ => object,
    })
}

/// An object as a version of its kind.
pub fn shown(kind: &Kind, version: &str, object: &Value) -> Value {
    let mut object = match kind.group.as_str() {
        "events.k8s.io" => renamed(object.clone(), true),
        _ => object.clone(),
    };
    object["apiVersion"] = json!(kind.api_version(version));
    object["kind"] = json!(kind.kind);
    object
}

/// Events are stored as `v1` has them; the newer group has other names for the same.
const EVENT: &[(&str, &str)] = &[
    ("message", "note"),
    ("involvedObject", "regarding"),
    ("reportingComponent", "reportingController"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
];

fn renamed(mut object: Value, newer: bool) -> Value {
    let all = patch::map(&mut object);
    for (old, new) in EVENT {
        let (from, to) = if newer { (old, new) } else { (new, old) };
        if let Some(value) = all.remove(*from) {
            all.insert((*to).to_owned(), value);
        }
    }
    object
}

fn missing(kind: &Kind, key: &Key) -> Refusal {
    Refusal::missing(&kind.resource(), &key.name)
}

fn check_namespace(store: &Store, kind: &Kind, key: &Key, object: &Value) -> Result<(), Refusal> {
    if !kind.namespaced {
        return Ok(());
    }
    let said = &object["metadata"]["namespace"];
    if key.namespace.is_empty() || !said.is_null() && *said != key.namespace {
        return Err(Refusal::bad(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    let namespace = Key {
        resource: "namespaces".into(),
        namespace: String::new(),
        name: key.namespace.clone(),
    };
    match store.get(&namespace) {
        Some(_) => Ok(()),
        None => Err(Refusal::missing("namespaces", &key.namespace)),
    }
}

fn check_version(kind: &Kind, key: &Key, old: &Value, new: &Value) -> Result<(), Refusal> {
    for name in ["resourceVersion", "uid"] {
        let wanted = &new["metadata"][name];
        if wanted.as_str().is_some_and(|w| !w.is_empty()) && *wanted != old["metadata"][name] {
            let message = format!(
                "Operation cannot be fulfilled on {} {:?}: the object has been modified; please apply your changes to the latest version and try again",
                kind.resource(),
                key.name,
            );
            return Err(Refusal::conflict(message));
        }
    }
    Ok(())
}

/// What a client says of these is not heard.
fn owned_by_server(object: &mut Value, old: Option<&Value>) {
    let meta = patch::map(&mut object["metadata"]);
    for name in [
        "uid",
        "creationTimestamp",
        "generation",
        "resourceVersion",
        "deletionTimestamp",
        "managedFields",
    ] {
        meta.remove(name);
        if let Some(value) = old.and_then(|old| old["metadata"].get(name)) {
            meta.insert(name.into(), value.clone());
        }
    }
}

fn manager(write: &Write, operation: &str) -> Manager {
    let name = match write.query.text("fieldManager") {
        "" => write.agent.split('/').next().unwrap_or_default(),
        name => name,
    };
    Manager {
        name: name.to_owned(),
        operation: operation.to_owned(),
        subresource: write.target.sub.clone().unwrap_or_default(),
    }
}
