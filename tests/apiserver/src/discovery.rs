//! What is served here, in the documents that clients discover it by.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::{kinds::Kind, status::Refusal, store::Store};

/// Answers a path that names no resource.
pub fn answer(store: &Store, path: &str) -> Result<Value, Refusal> {
    let steps: Vec<&str> = path.trim_matches('/').split('/').collect();
    match steps.as_slice() {
        ["version"] => Ok(json!({
            "major": "1", "minor": "33", "gitVersion": "v1.33.0", "gitCommit": "", "gitTreeState": "clean",
            "buildDate": "2025-04-23T13:07:27Z", "goVersion": "", "compiler": "gc", "platform": "linux/amd64",
        })),
        ["healthz" | "readyz" | "livez"] => Ok(json!("ok")),
        ["api"] => {
            Ok(json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}))
        }
        ["apis"] => {
            let groups: Vec<Value> = groups(store).iter().map(group).collect();
            Ok(json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}))
        }
        ["apis", name] => groups(store)
            .iter()
            .find(|(group, _)| group == name)
            .map(group)
            .ok_or_else(Refusal::no_such_path),
        ["api", version] => resources(store, "", version),
        ["apis", name, version] => resources(store, name, version),
        ["openapi", "v3"] => Ok(openapi(store)),
        ["openapi", "v3", "api", version] => Ok(validation(store, "", version)),
        ["openapi", "v3", "apis", group, version] => Ok(validation(store, group, version)),
        _ => Err(Refusal::no_such_path()),
    }
}

fn groups(store: &Store) -> Vec<(String, Vec<String>)> {
    let mut groups: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for kind in store.kinds.iter().filter(|kind| !kind.group.is_empty()) {
        let versions = groups.entry(kind.group.clone()).or_default();
        for version in &kind.versions {
            if !versions.contains(version) {
                versions.push(version.clone());
            }
        }
    }
    for name in ["authentication.k8s.io", "authorization.k8s.io"] {
        groups.insert(name.into(), vec!["v1".into()]);
    }
    groups.into_iter().collect()
}

fn group((name, versions): &(String, Vec<String>)) -> Value {
    let version = |v: &String| json!({"groupVersion": format!("{name}/{v}"), "version": v});
    let all: Vec<Value> = versions.iter().map(version).collect();
    json!({
        "kind": "APIGroup", "apiVersion": "v1", "name": name,
        "versions": all, "preferredVersion": all.first(),
    })
}

fn resources(store: &Store, group: &str, version: &str) -> Result<Value, Refusal> {
    let ours = |kind: &&Kind| kind.group == group && kind.versions.iter().any(|v| v == version);
    let mut all = Vec::new();
    for kind in store.kinds.iter().filter(ours) {
        all.push(json!({
            "name": kind.plural, "singularName": kind.kind.to_lowercase(), "namespaced": kind.namespaced,
            "kind": kind.kind, "shortNames": short(&kind.kind),
            "verbs": ["create", "delete", "get", "list", "patch", "update", "watch"],
        }));
        if kind.status {
            all.push(json!({
                "name": format!("{}/status", kind.plural), "singularName": "",
                "namespaced": kind.namespaced, "kind": kind.kind, "verbs": ["get", "patch", "update"],
            }));
        }
    }
    let reviews: &[&str] = match group {
        "authentication.k8s.io" => &["TokenReview", "SelfSubjectReview"],
        "authorization.k8s.io" => &["SubjectAccessReview", "SelfSubjectAccessReview"],
        _ => &[],
    };
    for kind in reviews {
        let name = format!("{}s", kind.to_lowercase());
        all.push(json!({"name": name, "singularName": "", "namespaced": false, "kind": kind, "verbs": ["create"]}));
    }
    if all.is_empty() {
        return Err(Refusal::no_such_path());
    }
    let name = match group {
        "" => version.to_owned(),
        group => format!("{group}/{version}"),
    };
    Ok(
        json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": name, "resources": all}),
    )
}

/// Where the schemas of each version are.
fn openapi(store: &Store) -> Value {
    let mut paths = json!({});
    for kind in &store.kinds {
        for version in &kind.versions {
            let path = match kind.group.as_str() {
                "" => format!("api/{version}"),
                group => format!("apis/{group}/{version}"),
            };
            paths[&path] = json!({"serverRelativeURL": format!("/openapi/v3/{path}")});
        }
    }
    json!({"paths": paths})
}

/// No schemas: it says that the server validates, and so clients do not.
fn validation(store: &Store, group: &str, version: &str) -> Value {
    let mut paths = json!({});
    let parameter = |name: &str| json!({"name": name, "in": "query", "schema": {"type": "string"}});
    for kind in store.kinds.iter().filter(|kind| kind.group == group) {
        paths[format!("/{}", kind.plural)] = json!({"patch": {
            "parameters": [parameter("fieldValidation"), parameter("dryRun")],
            "responses": {},
            "x-kubernetes-group-version-kind": {"group": group, "version": version, "kind": kind.kind},
        }});
    }
    json!({"openapi": "3.0.0", "info": {"title": "double", "version": "1"}, "paths": paths})
}

/// What `kubectl` users type.
fn short(kind: &str) -> &'static [&'static str] {
    match kind {
        "Pod" => &["po"],
        "Service" => &["svc"],
        "Namespace" => &["ns"],
        "Node" => &["no"],
        "ConfigMap" => &["cm"],
        "ServiceAccount" => &["sa"],
        "Event" => &["ev"],
        "DaemonSet" => &["ds"],
        "Deployment" => &["deploy"],
        "CustomResourceDefinition" => &["crd", "crds"],
        _ => &[],
    }
}
