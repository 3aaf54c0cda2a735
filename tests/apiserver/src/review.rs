//! Reviews: whose a token is, what someone may do; and tokens that are asked for.

use std::time::Duration;

use serde_json::{Value, json};

use crate::{
    Shared,
    access::{Attributes, Claims, User, allowed},
    route::Target,
    status::Refusal,
    store::{Key, later},
};

/// `None`: it is no review.
pub fn answer(
    shared: &Shared,
    user: &User,
    target: &Target,
    body: &[u8],
) -> Option<Result<Value, Refusal>> {
    let mut review: Value = match serde_json::from_slice(body) {
        Ok(review) => review,
        Err(error) => return Some(Err(Refusal::bad(error.to_string()))),
    };
    let status = match (
        target.group.as_str(),
        target.plural.as_str(),
        target.sub.as_deref(),
    ) {
        ("authentication.k8s.io", "tokenreviews", None) => token(shared, &review["spec"]),
        ("authentication.k8s.io", "selfsubjectreviews", None) => {
            json!({"userInfo": {"username": user.name, "uid": user.uid, "groups": user.groups}})
        }
        ("authorization.k8s.io", "selfsubjectaccessreviews", None) => {
            access(shared, user, &review["spec"])
        }
        ("authorization.k8s.io", "subjectaccessreviews", None) => {
            let spec = &review["spec"];
            let user = User {
                name: text(&spec["user"]),
                uid: text(&spec["uid"]),
                groups: texts(&spec["groups"]),
            };
            access(shared, &user, spec)
        }
        ("", "serviceaccounts", Some("token")) => {
            match requested(shared, target, &review["spec"]) {
                Ok(status) => status,
                Err(refusal) => return Some(Err(refusal)),
            }
        }
        _ => return None,
    };
    review["status"] = status;
    Some(Ok(review))
}

fn token(shared: &Shared, spec: &Value) -> Value {
    let audiences = texts(&spec["audiences"]);
    let store = shared.store();
    let known = shared
        .tokens()
        .user(&store, &text(&spec["token"]), &audiences);
    match known {
        Some((user, extra, audiences)) => json!({
            "authenticated": true, "audiences": audiences,
            "user": {"username": user.name, "uid": user.uid, "groups": user.groups, "extra": extra},
        }),
        None => json!({"authenticated": false, "user": {}, "error": "invalid bearer token"}),
    }
}

fn access(shared: &Shared, user: &User, spec: &Value) -> Value {
    let wanted = &spec["resourceAttributes"];
    let resource = match wanted["subresource"].as_str() {
        Some(sub) if !sub.is_empty() => format!("{}/{sub}", text(&wanted["resource"])),
        _ => text(&wanted["resource"]),
    };
    let attributes = Attributes {
        verb: text(&wanted["verb"]),
        group: text(&wanted["group"]),
        resource,
        namespace: text(&wanted["namespace"]),
        name: text(&wanted["name"]),
    };
    let allowed = !shared.options.rbac || allowed(&shared.store(), user, &attributes);
    json!({"allowed": allowed})
}

/// A token of a service account, bound to a pod where the request says so.
fn requested(shared: &Shared, target: &Target, spec: &Value) -> Result<Value, Refusal> {
    let seconds = spec["expirationSeconds"].as_u64().unwrap_or(3600);
    let mut claims = Claims {
        namespace: target.namespace.clone(),
        service_account: target.name.clone().unwrap_or_default(),
        audiences: texts(&spec["audiences"]),
        lifetime: Some(Duration::from_secs(seconds)),
        ..Claims::default()
    };
    let bound = &spec["boundObjectRef"];
    if bound["kind"] == "Pod" {
        let name = text(&bound["name"]);
        let key = |resource: &str, namespace: &str, name: &str| Key {
            resource: resource.into(),
            namespace: namespace.into(),
            name: name.into(),
        };
        let store = shared.store();
        let pod = store.get(&key("pods", &target.namespace, &name));
        let pod = pod.ok_or_else(|| Refusal::missing("pods", &name))?;
        let node = text(&pod["spec"]["nodeName"]);
        if let Some(object) = store.get(&key("nodes", "", &node)) {
            claims.node = Some((node, text(&object["metadata"]["uid"])));
        }
        claims.pod = Some((name, text(&pod["metadata"]["uid"])));
    }
    Ok(json!({"token": shared.tokens().mint(claims), "expirationTimestamp": later(seconds)}))
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn texts(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().map(text).collect()
}
