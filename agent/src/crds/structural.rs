//! JSON Schema, as schemars writes it, to what Kubernetes calls a structural schema:
//! every node has one `type`; no references, no alternatives of types, no `null`.
//! Unknown fields need no word: the API server drops them, or refuses the object where
//! the client asks for that, as kubectl does.

use serde_json::{Map, Value, json};

/// The structural schema that takes the same values.
pub fn of(schema: &Value) -> Value {
    let Some(schema) = schema.as_object() else {
        // `true`: a field that is read by other code and may hold anything.
        return json!({"x-kubernetes-preserve-unknown-fields": true});
    };
    let mut out = Map::new();
    for (key, value) in schema {
        match (key.as_str(), value) {
            // Defaults are the agent's: an object is stored as it was written.
            ("$schema" | "title" | "default" | "oneOf" | "anyOf", _) => {}
            ("additionalProperties", Value::Bool(_)) => {}
            ("description", Value::String(text)) => {
                out.insert(key.clone(), unwrapped(text).into());
            }
            ("type", Value::Array(types)) => {
                let some = types.iter().find(|one| **one != "null");
                out.insert(key.clone(), some.cloned().unwrap_or(Value::Null));
            }
            ("const", value) => {
                out.insert("enum".into(), json!([value]));
            }
            ("enum", Value::Array(values)) => {
                let some = values.iter().filter(|one| !one.is_null());
                out.insert(key.clone(), some.cloned().collect());
            }
            ("properties", Value::Object(fields)) => {
                let fields = fields.iter().map(|(name, field)| (name.clone(), of(field)));
                out.insert(key.clone(), Value::Object(fields.collect()));
            }
            ("items" | "additionalProperties", inner) => {
                out.insert(key.clone(), of(inner));
            }
            _ => {
                out.insert(key.clone(), value.clone());
            }
        }
    }
    for key in ["oneOf", "anyOf"] {
        let Some(Value::Array(all)) = schema.get(key) else {
            continue;
        };
        let some: Vec<Value> = (all.iter().filter(|one| one["type"] != "null").map(of)).collect();
        match &some[..] {
            // Optional: the field may be left out.
            [one] => join(&mut out, one),
            several if several.iter().all(|one| one.get("enum").is_some()) => {
                words(&mut out, several);
            }
            several => one_field_of(&mut out, several),
        }
    }
    Value::Object(out)
}

/// Doc comments are broken into lines; `kubectl explain` breaks them itself.
fn unwrapped(text: &str) -> String {
    text.replace('\n', " ")
}

fn join(out: &mut Map<String, Value>, one: &Value) {
    for (key, value) in one.as_object().into_iter().flatten() {
        // What stands beside the field says more than what its type says of itself.
        out.entry(key.clone()).or_insert_with(|| value.clone());
    }
}

/// An enum whose variants have documentation: each is an alternative of its own.
fn words(out: &mut Map<String, Value>, several: &[Value]) {
    let mut values = Vec::new();
    let mut told = Vec::new();
    for one in several {
        let own = one["enum"].as_array().into_iter().flatten();
        if let (Some(text), Some(word)) = (one["description"].as_str(), own.clone().next()) {
            told.push(format!("{}: {text}", word.as_str().unwrap_or_default()));
        }
        values.extend(own.cloned());
    }
    out.insert("type".into(), "string".into());
    out.insert("enum".into(), values.into());
    let before = out.get("description").and_then(Value::as_str);
    let all: Vec<String> = before.map(str::to_owned).into_iter().chain(told).collect();
    if !all.is_empty() {
        out.insert("description".into(), all.join(" ").into());
    }
}

/// An enum whose variants have fields: an object with exactly one field of them.
fn one_field_of(out: &mut Map<String, Value>, several: &[Value]) {
    let mut fields = Map::new();
    for one in several {
        let description = one.get("description");
        for (name, field) in one["properties"].as_object().into_iter().flatten() {
            let mut field = field.clone();
            if let (Some(text), Some(field)) = (description, field.as_object_mut()) {
                field.insert("description".into(), text.clone());
            }
            fields.insert(name.clone(), field);
        }
    }
    out.insert("type".into(), "object".into());
    out.insert("properties".into(), fields.into());
    out.insert("minProperties".into(), 1.into());
    out.insert("maxProperties".into(), 1.into());
}
