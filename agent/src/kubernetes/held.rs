//! Objects as they are kept: what Postern reads of them, and no more. `managedFields`,
//! most annotations, and whatever of a Pod or Node the types do not name are dropped as
//! soon as an object comes in.

use kube::api::{ApiResource, DynamicObject};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    objects::{Head, Object as _},
    workload::{NamespacedName, WorkloadObject},
};

use super::Scope;

#[derive(Clone, Debug, PartialEq)]
pub enum Held {
    Workload(Box<WorkloadObject>),
    Policy(Box<Stored>),
}

/// A policy as it was read, for it may be refused, and is then told so.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Stored {
    pub uid: String,
    pub generation: i64,
    /// Raised by each write, also of the status.
    pub version: String,
    /// Without its status.
    pub object: Value,
    /// `status.conditions`, which others may have written, too.
    pub conditions: Vec<Value>,
}

impl Held {
    /// Whether it says the same; who wrote what into a status is no matter.
    pub fn says_the_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Policy(one), Self::Policy(other)) => one.says_the_same(other),
            (one, other) => one == other,
        }
    }
}

impl Stored {
    pub fn says_the_same(&self, other: &Self) -> bool {
        self.uid == other.uid && self.object == other.object
    }

    pub fn text(&self, pointer: &str) -> &str {
        let found = self.object.pointer(pointer).and_then(Value::as_str);
        found.unwrap_or_default()
    }
}

pub fn name_of(object: &DynamicObject) -> NamespacedName {
    let meta = &object.metadata;
    NamespacedName {
        namespace: meta.namespace.clone().unwrap_or_default(),
        name: meta.name.clone().unwrap_or_default(),
    }
}

/// The object as it is kept; in words what cannot be read of it.
pub fn hold(scope: &Scope, resource: &ApiResource, object: DynamicObject) -> Result<Held, String> {
    let DynamicObject {
        metadata: mut meta,
        data,
        ..
    } = object;
    let uid = meta.uid.clone().unwrap_or_default();
    let generation = meta.generation.unwrap_or_default();
    meta.managed_fields = None;
    meta.self_link = None;
    meta.finalizers = None;
    let version = meta.resource_version.take().unwrap_or_default();
    if let Some(annotations) = &mut meta.annotations {
        annotations.retain(|key, _| {
            key == "istio.io/dry-run"
                || key.starts_with("postern.dev/")
                || key.starts_with("service.kubernetes.io/")
                // Of static pods: their cgroups have another uid.
                || key.starts_with("kubernetes.io/config.")
        });
    }
    let mut map = match data {
        Value::Object(map) => map,
        _ => Map::new(),
    };
    let mut metadata = serde_json::to_value(meta).map_err(|e| e.to_string())?;
    let head = Head {
        api_version: resource.api_version.clone(),
        kind: resource.kind.clone(),
    };
    if !matches!(scope, Scope::Policies(_)) {
        map.insert("metadata".into(), metadata);
        return read(&head, Value::Object(map));
    }
    // It changes with each write, also to the status.
    if let Some(metadata) = metadata.as_object_mut() {
        metadata.remove("generation");
    }
    map.insert("metadata".into(), metadata);
    let status = map.remove("status");
    map.insert("apiVersion".into(), head.api_version.into());
    map.insert("kind".into(), head.kind.into());
    let conditions = status.and_then(|mut status| match status["conditions"].take() {
        Value::Array(all) => Some(all),
        _ => None,
    });
    Ok(Held::Policy(Box::new(Stored {
        uid,
        generation,
        version,
        object: Value::Object(map),
        conditions: conditions.unwrap_or_default(),
    })))
}

/// A workload object from JSON, as the API server or the disk has it.
pub fn read(head: &Head, object: Value) -> Result<Held, String> {
    match WorkloadObject::read(head, object) {
        Ok(Some(object)) => Ok(Held::Workload(Box::new(object))),
        Ok(None) => Err(format!("{} {} is not read", head.api_version, head.kind)),
        Err(error) => Err(error.to_string()),
    }
}
