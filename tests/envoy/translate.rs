//! Istio's policies as Envoy's filters, as a sidecar would have them. Nothing here
//! is shared with Postern: what both get wrong in the same way would stay unseen.

mod jwt;
mod matchers;

use anyhow::{Context as _, Result, bail};
use serde_json::{Map, Value, json};

use crate::cases::{LABELS, NAMESPACE, ROOT_NAMESPACE, Set, TRUST_DOMAIN};
use matchers::{Side, claim, header, texts, uri};

/// The filters of a set of policies, in the order that they are asked.
pub fn filters(set: &Set) -> Result<Vec<Value>> {
    let mut filters = Vec::new();
    let rules: Vec<&Value> = selected(set, "RequestAuthentication")
        .flat_map(|policy| list(&policy["spec"]["jwtRules"]))
        .collect();
    if !rules.is_empty() {
        filters.push(jwt::filter(&rules)?);
    }
    for action in ["DENY", "ALLOW"] {
        let policies: Vec<&Value> = selected(set, "AuthorizationPolicy")
            .filter(|policy| policy["spec"]["action"].as_str().unwrap_or("ALLOW") == action)
            .filter(|policy| policy["metadata"]["annotations"]["istio.io/dry-run"] != "true")
            .collect();
        // A filter that allows nothing denies; none at all allows.
        if !policies.is_empty() {
            filters.push(authorization(set, action, &policies)?);
        }
    }
    filters.push(typed(
        "envoy.filters.http.router",
        "envoy.extensions.filters.http.router.v3.Router",
        json!({}),
    ));
    Ok(filters)
}

/// The policies of a kind that hold for the workload.
fn selected<'a>(set: &'a Set, kind: &'a str) -> impl Iterator<Item = &'a Value> {
    set.policies.iter().filter(move |policy| {
        let namespace = &policy["metadata"]["namespace"];
        let wanted = policy["spec"]["selector"]["matchLabels"].as_object();
        let labelled =
            |(name, value): (&String, &Value)| LABELS.iter().any(|(n, v)| n == name && value == v);
        policy["kind"] == kind
            && (namespace == NAMESPACE || namespace == ROOT_NAMESPACE)
            && wanted.is_none_or(|wanted| wanted.iter().all(labelled))
            && policy["spec"].get("targetRefs").is_none()
    })
}

fn authorization(set: &Set, action: &str, policies: &[&Value]) -> Result<Value> {
    let mut rules = Map::new();
    for policy in policies {
        let (namespace, name) = (
            &policy["metadata"]["namespace"],
            &policy["metadata"]["name"],
        );
        let scope = Scope {
            aliases: &set.aliases,
            namespace: namespace.as_str().context("a policy has a namespace")?,
        };
        for (index, rule) in list(&policy["spec"]["rules"]).iter().enumerate() {
            rules.insert(format!("{namespace}/{name}/{index}"), scope.rule(rule)?);
        }
    }
    Ok(typed(
        "envoy.filters.http.rbac",
        "envoy.extensions.filters.http.rbac.v3.RBAC",
        json!({"rules": {"action": action, "policies": rules}}),
    ))
}

/// What the fields of a policy are read with.
struct Scope<'a> {
    aliases: &'a [String],
    /// The policy's own.
    namespace: &'a str,
}

impl Scope<'_> {
    /// A rule is one pair: what is asked for, and by whom.
    fn rule(&self, rule: &Value) -> Result<Value> {
        let mut permissions = Vec::new();
        let mut principals = Vec::new();
        if let Some(to) = rule.get("to") {
            let entries = list(to).iter().map(|entry| self.entry(&entry["operation"]));
            let entries = entries.collect::<Result<Vec<_>>>()?;
            permissions.push(Side::Permission.any(entries.into_iter().map(|(p, _)| p)));
        }
        if let Some(from) = rule.get("from") {
            let entries = list(from).iter().map(|entry| self.entry(&entry["source"]));
            let entries = entries.collect::<Result<Vec<_>>>()?;
            principals.push(Side::Principal.any(entries.into_iter().map(|(_, p)| p)));
        }
        for when in list(&rule["when"]) {
            let key = when["key"].as_str().context("a condition has a key")?;
            for (values, negative) in [("values", false), ("notValues", true)] {
                if let Some(values) = when.get(values) {
                    let (side, term) = self.condition(key, &texts(values)?)?;
                    let term = if negative { side.not(term) } else { term };
                    match side {
                        Side::Permission => permissions.push(term),
                        Side::Principal => principals.push(term),
                    }
                }
            }
        }
        Ok(json!({
            "permissions": [Side::Permission.all(permissions)],
            "principals": [Side::Principal.all(principals)],
        }))
    }

    /// All fields of a source or an operation, each side for itself.
    fn entry(&self, entry: &Value) -> Result<(Value, Value)> {
        let mut permissions = Vec::new();
        let mut principals = Vec::new();
        for (field, values) in entry.as_object().context("an entry has fields")? {
            let (name, negative) = match field.strip_prefix("not") {
                Some(rest) => (rest[..1].to_lowercase() + &rest[1..], true),
                None => (field.clone(), false),
            };
            let (side, term) = self.condition(key_of(&name)?, &texts(values)?)?;
            let term = if negative { side.not(term) } else { term };
            match side {
                Side::Permission => permissions.push(term),
                Side::Principal => principals.push(term),
            }
        }
        let permission = Side::Permission.all(permissions);
        Ok((permission, Side::Principal.all(principals)))
    }

    /// Whether an attribute has one of the values.
    fn condition(&self, key: &str, values: &[&str]) -> Result<(Side, Value)> {
        let (attribute, inner) = match key.split_once('[') {
            Some((attribute, rest)) => (attribute, rest.trim_end_matches(']')),
            None => (key, ""),
        };
        let side = match attribute {
            "hosts" | "methods" | "paths" | "destination.ip" | "destination.port"
            | "connection.sni" => Side::Permission,
            _ => Side::Principal,
        };
        if let "request.auth.claims" | "request.auth.audiences" | "request.auth.presenter" =
            attribute
        {
            let path: Vec<&str> = match attribute {
                "request.auth.audiences" => vec!["aud"],
                "request.auth.presenter" => vec!["azp"],
                _ => inner.split("][").collect(),
            };
            return Ok((side, jwt::claim_is_one_of(&path, values)));
        }
        let mut terms = Vec::new();
        for value in values {
            terms.push(match attribute {
                "hosts" => header(":authority", value, true),
                "methods" => header(":method", value, false),
                "paths" => matchers::path(value),
                "destination.ip" => json!({"destination_ip": matchers::range(value)?}),
                "destination.port" => json!({"destination_port": value.parse::<u16>()?}),
                "connection.sni" => json!({"requested_server_name": matchers::string(value)}),
                // As seen with the PROXY protocol, which stands for the network here.
                "source.ip" => json!({"source_ip": matchers::range(value)?}),
                "remote.ip" => json!({"remote_ip": matchers::range(value)?}),
                "request.headers" => header(inner, value, false),
                "source.principal" => side.any(self.domains(value).iter().map(|v| uri(v))),
                "source.namespace" => {
                    let value = matchers::escaped(value).replace(r"\*", ".*");
                    matchers::identity(
                        json!({"safe_regex": {"regex": format!(".*/ns/{value}/.*")}}),
                    )
                }
                "source.serviceAccount" => self.account(value),
                "request.auth.principal" => claim_principal(value),
                unknown => bail!("no translation for {unknown}"),
            });
        }
        Ok((side, side.any(terms)))
    }

    fn account(&self, value: &str) -> Value {
        let (namespace, name) = value.split_once('/').unwrap_or((self.namespace, value));
        let (namespace, name) = (matchers::escaped(namespace), matchers::escaped(name));
        let regex = format!("spiffe://.+/ns/{namespace}/(.+/|)sa/{name}(/.+)?");
        matchers::identity(json!({"safe_regex": {"regex": regex}}))
    }

    /// A principal of our trust domain, under every name that this has.
    fn domains(&self, value: &str) -> Vec<String> {
        let ours = || {
            [TRUST_DOMAIN]
                .into_iter()
                .chain(self.aliases.iter().map(String::as_str))
        };
        match value.split_once('/') {
            Some((domain, rest))
                if value.split('/').count() == 5 && ours().any(|our| our == domain) =>
            {
                ours().map(|our| format!("{our}/{rest}")).collect()
            }
            _ => vec![value.to_owned()],
        }
    }
}

/// The attribute that a field of a source or an operation is about.
fn key_of(field: &str) -> Result<&str> {
    Ok(match field {
        "hosts" | "methods" | "paths" => field,
        "ports" => "destination.port",
        "principals" => "source.principal",
        "namespaces" => "source.namespace",
        "serviceAccounts" => "source.serviceAccount",
        "ipBlocks" => "source.ip",
        "remoteIpBlocks" => "remote.ip",
        "requestPrincipals" => "request.auth.principal",
        unknown => bail!("no translation for {unknown}"),
    })
}

/// An issuer and a subject, told apart at the last slash.
fn claim_principal(value: &str) -> Value {
    let any = || json!({"safe_regex": {"regex": ".+"}});
    let (issuer, subject) = match value.rsplit_once('/') {
        _ if value == "*" => (any(), any()),
        None => match (value.strip_prefix('*'), value.strip_suffix('*')) {
            (Some(suffix), _) => (any(), json!({ "suffix": suffix })),
            (None, Some(prefix)) => (json!({ "prefix": prefix }), any()),
            (None, None) => (json!({ "exact": value }), json!({"exact": ""})),
        },
        Some((issuer, subject)) if issuer.starts_with('*') => {
            (matchers::string(issuer), json!({ "exact": subject }))
        }
        Some((issuer, subject)) => (json!({ "exact": issuer }), matchers::string_end(subject)),
    };
    Side::Principal.all(vec![claim("iss", issuer), claim("sub", subject)])
}

/// A filter or another extension with its configuration.
pub fn typed(name: &str, kind: &str, mut config: Value) -> Value {
    config["@type"] = format!("type.googleapis.com/{kind}").into();
    json!({"name": name, "typed_config": config})
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}
