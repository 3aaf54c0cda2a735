//! What is shipped is what is printed; schemas are structural, take what agents take,
//! and refuse what they can. Rules between fields (CEL) are tried by `cargo xtask lint`.

use std::path::Path;

use regex::Regex;
use serde_json::Value;

use super::{KINDS, definition, yaml};
use crate::{
    identity::TrustDomain,
    objects::load_text,
    policy::{Mesh, PolicyObject, PolicySet, Reading},
};

#[test]
fn the_chart_has_what_is_printed() {
    let shipped = include_str!("../../../config/kubernetes/chart/postern/crds/postern.dev.yaml");
    let printed = yaml().expect("printed");
    assert!(
        shipped == printed,
        "run `cargo xtask manifests`: the chart's CRDs are not what `postern crds` prints"
    );
}

/// Rules of structural schemas (KEP 1979), and those of a version's schema.
#[test]
fn schemas_are_structural() {
    fn walk(schema: &Value, path: &str) {
        const KNOWN: &[&str] = &[
            "type",
            "description",
            "properties",
            "additionalProperties",
            "items",
            "required",
            "enum",
            "pattern",
            "minLength",
            "maxLength",
            "minItems",
            "minimum",
            "format",
            "minProperties",
            "maxProperties",
            "x-kubernetes-validations",
            "x-kubernetes-list-type",
            "x-kubernetes-list-map-keys",
        ];
        let fields = schema
            .as_object()
            .unwrap_or_else(|| panic!("{path} is no schema"));
        for (key, value) in fields {
            assert!(KNOWN.contains(&key.as_str()), "{path} has {key}");
            assert!(!value.is_null(), "{path}.{key} is null");
        }
        let kind = schema["type"]
            .as_str()
            .unwrap_or_else(|| panic!("{path} has no type"));
        let both = fields.contains_key("properties") && fields.contains_key("additionalProperties");
        assert!(!both, "{path} has properties and additionalProperties");
        match kind {
            "object" => {}
            "array" => walk(&schema["items"], &format!("{path}[]")),
            "string" | "integer" | "boolean" => {}
            other => panic!("{path} is {other}"),
        }
        if let Some(pattern) = schema["pattern"].as_str() {
            Regex::new(pattern).unwrap_or_else(|e| panic!("{path}: {e}"));
        }
        for (name, field) in schema["properties"].as_object().into_iter().flatten() {
            walk(field, &format!("{path}.{name}"));
        }
        if let Some(values) = schema.get("additionalProperties") {
            walk(values, &format!("{path}.*"));
        }
        for name in schema["required"].as_array().into_iter().flatten() {
            let name = name.as_str().expect("a name");
            assert!(
                !schema["properties"][name].is_null(),
                "{path} requires {name}"
            );
        }
    }
    for kind in KINDS {
        let definition = definition(kind);
        let version = &definition["spec"]["versions"][0];
        let schema = &version["schema"]["openAPIV3Schema"];
        walk(schema, kind.kind);
        // Of what is above `spec`, the API server knows the types itself.
        assert_eq!(
            schema["properties"]["metadata"],
            serde_json::json!({"type": "object"})
        );
        assert!(version["subresources"]["status"].is_object());
        let words = schema["description"].as_str().unwrap_or_default();
        assert!(words.len() > 20, "{}: for `kubectl explain`", kind.kind);
        let (plural, name) = (kind.plural, definition["metadata"]["name"].as_str());
        assert_eq!(name, Some(format!("{plural}.postern.dev").as_str()));
    }
}

/// An object, as `kubectl apply` has it: `refused` says why a schema does.
fn judge(object: &Value) -> Option<Vec<String>> {
    let kind = KINDS.iter().find(|kind| object["kind"] == kind.kind)?;
    let mut wrong = Vec::new();
    let definition = definition(kind);
    let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    check(schema, object, kind.kind, &mut wrong);
    Some(wrong)
}

/// The part of JSON Schema that the schemas are made of. Unknown fields are wrong, as
/// they are to kubectl.
fn check(schema: &Value, value: &Value, path: &str, wrong: &mut Vec<String>) {
    let number = |name: &str| schema[name].as_u64();
    let mut expect = |holds: bool, what: &str| {
        if !holds {
            wrong.push(format!("{path}: {what}"));
        }
    };
    let fits = match schema["type"].as_str() {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("integer") => value.is_i64(),
        Some("boolean") => value.is_boolean(),
        _ => false,
    };
    expect(fits, "type");
    if let Some(all) = schema["enum"].as_array() {
        expect(all.contains(value), "enum");
    }
    if let Some(text) = value.as_str() {
        let length = text.chars().count() as u64;
        expect(
            number("minLength").is_none_or(|least| length >= least),
            "minLength",
        );
        expect(
            number("maxLength").is_none_or(|most| length <= most),
            "maxLength",
        );
        let pattern = schema["pattern"]
            .as_str()
            .map(|p| Regex::new(p).expect("a pattern"));
        expect(pattern.is_none_or(|p| p.is_match(text)), "pattern");
    }
    if let Some(items) = value.as_array() {
        let least = number("minItems").unwrap_or_default();
        expect(items.len() as u64 >= least, "minItems");
        for (at, item) in items.iter().enumerate() {
            check(&schema["items"], item, &format!("{path}[{at}]"), wrong);
        }
    } else if let Some(fields) = value.as_object() {
        // The API server takes null for a field that is not there.
        let fields: Vec<_> = fields
            .iter()
            .filter(|(_, value)| !value.is_null())
            .collect();
        let count = fields.len() as u64;
        expect(
            number("minProperties").is_none_or(|least| count >= least),
            "minProperties",
        );
        expect(
            number("maxProperties").is_none_or(|most| count <= most),
            "maxProperties",
        );
        for name in schema["required"].as_array().into_iter().flatten() {
            expect(fields.iter().any(|(field, _)| name == *field), "required");
        }
        let free = schema["properties"].is_null() && path.ends_with(".metadata");
        for (name, field) in fields.into_iter().filter(|_| !free) {
            let path = format!("{path}.{name}");
            match schema["properties"]
                .get(name)
                .or(schema.get("additionalProperties"))
            {
                Some(schema) => check(schema, field, &path, wrong),
                None => wrong.push(format!("{path}: unknown")),
            }
        }
    }
}

fn documents(text: &str) -> Vec<Value> {
    let parts = text.split("\n---").filter(|part| {
        part.lines()
            .any(|line| !line.trim_start_matches('-').trim().is_empty() && !line.starts_with('#'))
    });
    parts
        .map(|part| serde_saphyr::from_str(part).expect("YAML"))
        .collect()
}

/// Holds schemas to their word: what an agent takes, they take.
pub(crate) fn takes(text: &str) {
    for object in documents(&format!("\n{text}")) {
        if let Some(wrong) = judge(&object) {
            assert!(wrong.is_empty(), "{wrong:?}: {object}");
        }
    }
}

#[test]
fn example_policies_are_taken() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config/policies");
    let mut ours = Vec::new();
    for entry in std::fs::read_dir(directory).expect("examples") {
        let text = std::fs::read_to_string(entry.expect("a file").path()).expect("text");
        takes(&text);
        ours.extend(documents(&format!("\n{text}")).iter().filter_map(|object| {
            judge(object).map(|_| object["kind"].as_str().unwrap_or_default().to_owned())
        }));
    }
    for kind in KINDS {
        assert!(
            ours.iter().any(|one| one == kind.kind),
            "no example of {}",
            kind.kind
        );
    }
}

#[test]
fn what_is_refused_early_is_refused_by_agents_too() {
    let table: Vec<Value> =
        serde_saphyr::from_str(include_str!("../../../tests/manifests/refused.yaml"))
            .expect("YAML");
    assert!(table.len() > 50);
    for row in table {
        let mut object = serde_json::json!({
            "apiVersion": "postern.dev/v1alpha1",
            "kind": row["kind"],
            "metadata": {"name": "p", "namespace": "shop"},
        });
        if let Some(spec) = row.get("spec") {
            object["spec"] = spec.clone();
        }
        let wrong = judge(&object).expect("one of our kinds");
        match row["by"].as_str() {
            Some("fields") => assert!(!wrong.is_empty(), "taken: {object}"),
            Some("rules") => assert!(wrong.is_empty(), "no matter of rules, {wrong:?}: {object}"),
            by => panic!("by {by:?}"),
        }
        let objects = load_text::<PolicyObject>(Path::new("p.json"), &object.to_string());
        let Ok(objects) = objects else { continue };
        let mesh = Mesh {
            root_namespace: "istio-system",
            trust_domain: &TrustDomain::default(),
            aliases: &[],
            secrets: Path::new("/secrets"),
            requests: Reading::default(),
        };
        assert!(
            PolicySet::compile(objects, &mesh).is_err(),
            "an agent takes {object}"
        );
    }
}
