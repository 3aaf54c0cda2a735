//! Who asks, and what they may: tokens as service accounts have them, and RBAC by the
//! roles and bindings that are stored.

use std::{
    collections::HashMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use serde_json::{Value, json};

use crate::store::{Key, Store, random, uid};

/// Whom tokens are for that the server itself takes.
pub const AUDIENCE: &str = "https://kubernetes.default.svc";

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub uid: String,
    pub groups: Vec<String>,
}

/// What a token says, as projected service account tokens do.
#[derive(Clone, Debug, Default)]
pub struct Claims {
    pub namespace: String,
    pub service_account: String,
    /// Name and uid of the pod that it is bound to: it is good while the pod is there.
    pub pod: Option<(String, String)>,
    /// Name and uid of that pod's node.
    pub node: Option<(String, String)>,
    /// Empty: the server itself.
    pub audiences: Vec<String>,
    /// Empty: an hour.
    pub lifetime: Option<Duration>,
}

struct Token {
    user: User,
    claims: Option<Claims>,
    expires: SystemTime,
}

#[derive(Default)]
pub struct Tokens(HashMap<String, Token>);

impl Tokens {
    /// One that may do everything.
    pub fn administrator(&mut self) -> String {
        let token = format!("{:032x}", random());
        let user = User {
            name: "kubernetes-admin".into(),
            uid: String::new(),
            groups: vec!["system:masters".into(), "system:authenticated".into()],
        };
        let known = Token {
            user,
            claims: None,
            expires: SystemTime::now() + Duration::from_secs(1 << 30),
        };
        self.0.insert(token.clone(), known);
        token
    }

    pub fn mint(&mut self, claims: Claims) -> String {
        let Claims {
            namespace,
            service_account,
            ..
        } = &claims;
        let user = User {
            name: format!("system:serviceaccount:{namespace}:{service_account}"),
            uid: uid(),
            groups: vec![
                "system:serviceaccounts".into(),
                format!("system:serviceaccounts:{namespace}"),
                "system:authenticated".into(),
            ],
        };
        let now = SystemTime::now();
        let expires = now + claims.lifetime.unwrap_or(Duration::from_secs(3600));
        let token = encoded(&claims, &user, now, expires);
        let known = Token {
            user,
            claims: Some(claims),
            expires,
        };
        self.0.insert(token.clone(), known);
        token
    }

    /// Where whose token it is lives.
    pub fn namespace(&self, token: &str) -> Option<&str> {
        let claims = self.0.get(token)?.claims.as_ref()?;
        Some(&claims.namespace)
    }

    pub fn revoke(&mut self, token: &str) {
        self.0.remove(token);
    }

    /// Who presents a token, where it is good for one of these audiences.
    pub fn user(
        &self,
        store: &Store,
        token: &str,
        audiences: &[String],
    ) -> Option<(User, Value, Vec<String>)> {
        let known = self.0.get(token)?;
        if known.expires <= SystemTime::now() {
            return None;
        }
        let own = vec![AUDIENCE.to_owned()];
        let asked = if audiences.is_empty() {
            &own
        } else {
            audiences
        };
        let Some(claims) = &known.claims else {
            return Some((known.user.clone(), json!({}), asked.to_vec()));
        };
        let good = if claims.audiences.is_empty() {
            &own
        } else {
            &claims.audiences
        };
        let common: Vec<String> = asked.iter().filter(|a| good.contains(a)).cloned().collect();
        if common.is_empty() {
            return None;
        }
        let mut extra = json!({});
        if let Some((name, uid)) = &claims.pod {
            let key = Key {
                resource: "pods".into(),
                namespace: claims.namespace.clone(),
                name: name.clone(),
            };
            if store.get(&key)?["metadata"]["uid"] != *uid {
                return None;
            }
            extra["authentication.kubernetes.io/pod-name"] = json!([name]);
            extra["authentication.kubernetes.io/pod-uid"] = json!([uid]);
        }
        if let Some((name, uid)) = &claims.node {
            extra["authentication.kubernetes.io/node-name"] = json!([name]);
            extra["authentication.kubernetes.io/node-uid"] = json!([uid]);
        }
        Some((known.user.clone(), extra, common))
    }
}

/// In a JWT's form, for there are readers of the claims. The signature is noise: what
/// is good is known by heart.
fn encoded(claims: &Claims, user: &User, now: SystemTime, expires: SystemTime) -> String {
    let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let named = |(name, uid): &(String, String)| json!({"name": name, "uid": uid});
    let audiences = match claims.audiences.is_empty() {
        true => vec![AUDIENCE.to_owned()],
        false => claims.audiences.clone(),
    };
    let mut bound = json!({
        "namespace": claims.namespace,
        "serviceaccount": {"name": claims.service_account, "uid": user.uid},
    });
    if let Some(pod) = &claims.pod {
        bound["pod"] = named(pod);
    }
    if let Some(node) = &claims.node {
        bound["node"] = named(node);
    }
    let payload = json!({
        "iss": AUDIENCE, "sub": user.name, "aud": audiences, "jti": uid(),
        "iat": seconds(now), "nbf": seconds(now), "exp": seconds(expires), "kubernetes.io": bound,
    });
    let header = json!({"alg": "RS256", "kid": "double"});
    let part = |value: &Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
    let noise = BASE64_URL_SAFE_NO_PAD.encode(random().to_be_bytes());
    format!("{}.{}.{noise}", part(&header), part(&payload))
}

/// What someone wants to do.
#[derive(Clone, Debug, Default)]
pub struct Attributes {
    pub verb: String,
    pub group: String,
    /// With its subresource.
    pub resource: String,
    pub namespace: String,
    pub name: String,
}

/// By the roles that are bound to the user.
pub fn allowed(store: &Store, user: &User, wanted: &Attributes) -> bool {
    if user.groups.iter().any(|group| group == "system:masters") {
        return true;
    }
    let reviews = wanted.resource.starts_with("selfsubject") && wanted.verb == "create";
    // `system:basic-user` gives everyone these.
    if reviews
        && user
            .groups
            .iter()
            .any(|group| group == "system:authenticated")
    {
        return true;
    }
    let resource = |plural: &str| format!("{plural}.rbac.authorization.k8s.io");
    let bindings = resource("clusterrolebindings");
    let everywhere = store.list(&bindings);
    let bindings = resource("rolebindings");
    let here = store
        .list(&bindings)
        .filter(|(key, _)| !wanted.namespace.is_empty() && key.namespace == wanted.namespace);
    everywhere
        .chain(here)
        .filter(|(_, binding)| binds(binding, user))
        .any(|(key, binding)| {
            let role = &binding["roleRef"];
            let (plural, namespace) = match role["kind"].as_str() {
                Some("Role") => ("roles", key.namespace.clone()),
                _ => ("clusterroles", String::new()),
            };
            let key = Key {
                resource: resource(plural),
                namespace,
                name: role["name"].as_str().unwrap_or_default().to_owned(),
            };
            let rules = store.get(&key).and_then(|role| role["rules"].as_array());
            rules.is_some_and(|rules| rules.iter().any(|rule| permits(rule, wanted)))
        })
}

fn binds(binding: &Value, user: &User) -> bool {
    let subjects = binding["subjects"].as_array();
    subjects.into_iter().flatten().any(|subject| {
        let name = subject["name"].as_str().unwrap_or_default();
        match subject["kind"].as_str() {
            Some("ServiceAccount") => {
                let namespace = subject["namespace"].as_str().unwrap_or_default();
                user.name == format!("system:serviceaccount:{namespace}:{name}")
            }
            Some("Group") => user.groups.iter().any(|group| group == name),
            _ => user.name == name,
        }
    })
}

fn permits(rule: &Value, wanted: &Attributes) -> bool {
    let has = |list: &str, one: &str| {
        let list = rule[list].as_array();
        list.is_some_and(|list| list.iter().any(|each| each == one || each == "*"))
    };
    let names = rule["resourceNames"].as_array();
    let named = names.is_none_or(|n| n.is_empty() || n.iter().any(|name| *name == wanted.name));
    has("verbs", &wanted.verb)
        && has("apiGroups", &wanted.group)
        && has("resources", &wanted.resource)
        && named
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(store: &mut Store, plural: &str, namespace: &str, name: &str, object: Value) {
        let key = Key {
            resource: plural.into(),
            namespace: namespace.into(),
            name: name.into(),
        };
        let mut object = object;
        object["metadata"] = json!({});
        store.put(key, object);
    }

    #[test]
    fn roles_say_what_may_be_done() {
        let mut store = Store::new(Vec::new(), 10);
        let rules = json!({"rules": [
            {"apiGroups": [""], "resources": ["pods", "pods/status"], "verbs": ["list"]},
            {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"], "resourceNames": ["one"]},
        ]});
        let to = json!([{"kind": "ServiceAccount", "namespace": "postern", "name": "agent"}]);
        let rbac = |plural: &str| format!("{plural}.rbac.authorization.k8s.io");
        put(&mut store, &rbac("clusterroles"), "", "r", rules);
        put(
            &mut store,
            &rbac("rolebindings"),
            "shop",
            "b",
            json!({"subjects": to, "roleRef": {"kind": "ClusterRole", "name": "r"}}),
        );
        let mut tokens = Tokens::default();
        let token = tokens.mint(Claims {
            namespace: "postern".into(),
            service_account: "agent".into(),
            ..Claims::default()
        });
        let (user, ..) = tokens.user(&store, &token, &[]).expect("known");
        for (verb, resource, namespace, name, wanted) in [
            ("list", "pods", "shop", "", true),
            ("list", "pods/status", "shop", "", true),
            ("watch", "pods", "shop", "", false),
            ("list", "pods", "", "", false),
            ("list", "pods", "other", "", false),
            ("get", "secrets", "shop", "one", true),
            ("get", "secrets", "shop", "two", false),
        ] {
            let attributes = Attributes {
                verb: verb.into(),
                group: String::new(),
                resource: resource.into(),
                namespace: namespace.into(),
                name: name.into(),
            };
            assert_eq!(
                allowed(&store, &user, &attributes),
                wanted,
                "{attributes:?}"
            );
        }
    }

    #[test]
    fn a_token_is_good_for_its_audience_while_its_pod_is_there() {
        let mut store = Store::new(Vec::new(), 10);
        let mut tokens = Tokens::default();
        put(&mut store, "pods", "postern", "agent-1", json!({}));
        let key = Key {
            resource: "pods".into(),
            namespace: "postern".into(),
            name: "agent-1".into(),
        };
        let uid = store.get(&key).expect("there")["metadata"]["uid"]
            .as_str()
            .expect("text")
            .to_owned();
        let token = tokens.mint(Claims {
            namespace: "postern".into(),
            service_account: "agent".into(),
            pod: Some(("agent-1".into(), uid)),
            node: Some(("node1".into(), "u1".into())),
            audiences: vec!["postern".into()],
            ..Claims::default()
        });
        let ours = ["postern".to_owned(), "other".to_owned()];
        let (_, extra, common) = tokens.user(&store, &token, &ours).expect("good");
        assert_eq!(
            extra["authentication.kubernetes.io/node-name"],
            json!(["node1"])
        );
        assert_eq!(common, ["postern"]);
        assert!(
            tokens.user(&store, &token, &[]).is_none(),
            "not the server's own"
        );
        store.remove(&key);
        assert!(
            tokens.user(&store, &token, &ours).is_none(),
            "the pod is gone"
        );
    }
}
