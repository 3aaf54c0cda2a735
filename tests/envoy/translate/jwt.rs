//! Rules on tokens as Envoy's `jwt_authn`, and conditions on what tokens say.

use anyhow::{Context as _, Result};
use serde_json::{Map, Value, json};

use super::{
    list,
    matchers::{claim_at, string},
    typed,
};

/// Every rule is a provider. A request passes if one is satisfied, or if each is
/// either satisfied or finds no token.
pub fn filter(rules: &[&Value]) -> Result<Value> {
    let mut providers = Map::new();
    let mut alone = Vec::new();
    let mut together = Vec::new();
    for (index, rule) in rules.iter().enumerate() {
        let name = format!("origins-{index}");
        let satisfied = json!({ "provider_name": name });
        together.push(json!({"requires_any": {
            "requirements": [satisfied.clone(), {"allow_missing": {}}],
        }}));
        alone.push(satisfied);
        providers.insert(name, provider(rule)?);
    }
    let requires = if rules.len() == 1 {
        together.remove(0)
    } else {
        alone.push(json!({"requires_all": {"requirements": together}}));
        json!({"requires_any": {"requirements": alone}})
    };
    Ok(typed(
        "envoy.filters.http.jwt_authn",
        "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication",
        json!({
            "providers": providers,
            "rules": [{"match": {"prefix": "/"}, "requires": requires}],
            "bypass_cors_preflight": true,
        }),
    ))
}

fn provider(rule: &Value) -> Result<Value> {
    let keys = rule["jwks"]
        .as_str()
        .context("cases have their keys inline")?;
    let mut delimited = vec![json!("scope"), json!("permission")];
    delimited.extend_from_slice(list(&rule["spaceDelimitedClaims"]));
    let mut provider = json!({
        "local_jwks": {"inline_string": keys},
        "payload_in_metadata": "payload",
        "normalize_payload_in_metadata": {"space_delimited_claims": delimited},
    });
    for (from, to) in [
        ("issuer", "issuer"),
        ("audiences", "audiences"),
        ("fromParams", "from_params"),
        ("fromCookies", "from_cookies"),
        ("forwardOriginalToken", "forward"),
        ("outputPayloadToHeader", "forward_payload_header"),
    ] {
        if let Some(value) = rule.get(from) {
            provider[to] = value.clone();
        }
    }
    for (from, to, members) in [
        (
            "fromHeaders",
            "from_headers",
            [("name", "name"), ("prefix", "value_prefix")],
        ),
        (
            "outputClaimToHeaders",
            "claim_to_headers",
            [("header", "header_name"), ("claim", "claim_name")],
        ),
    ] {
        let renamed = list(&rule[from]).iter().map(|item| {
            let members = members.iter();
            let values = members.filter_map(|(from, to)| Some((*to, item.get(*from)?.clone())));
            json!(values.collect::<std::collections::BTreeMap<_, _>>())
        });
        let renamed: Vec<Value> = renamed.collect();
        if !renamed.is_empty() {
            provider[to] = renamed.into();
        }
    }
    Ok(provider)
}

/// A claim that is one of the values, or a list that has one of them.
pub fn claim_is_one_of(path: &[&str], values: &[&str]) -> Value {
    let one_of = |values: Vec<Value>| match values.len() {
        1 => values.into_iter().next().unwrap_or_default(),
        _ => json!({"or_match": {"value_matchers": values}}),
    };
    let texts = values
        .iter()
        .map(|value| json!({"string_match": string(value)}));
    let value = one_of(texts.collect());
    let listed = json!({"list_match": {"one_of": value.clone()}});
    claim_at(path, one_of(vec![listed, value]))
}
