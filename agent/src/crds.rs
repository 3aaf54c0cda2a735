//! CustomResourceDefinitions of `postern.dev/v1alpha1`, made from the types that
//! policies are read into: what the API server takes and what an agent takes cannot
//! drift apart. `postern crds` prints them; `config/kubernetes/chart/postern/crds` is
//! held to that by a test.
//!
//! A schema refuses early what it can, at `kubectl apply`. It never refuses what an
//! agent would take (but for numbers where a string is meant, which files may have), and
//! it is no guard: agents check every object whole.

mod structural;

use schemars::{JsonSchema, Schema, generate::SchemaSettings};
use serde_json::{Value, json};

use crate::policy::schema::{ConnectPolicy, OutboundToken, ProtectedResource, TokenBinding};

const GROUP: &str = "postern.dev";
const VERSION: &str = "v1alpha1";

/// One kind, and what its types do not say of it.
struct Kind {
    kind: &'static str,
    plural: &'static str,
    short: &'static str,
    spec: fn() -> Schema,
    /// Columns of `kubectl get`: name and path.
    columns: &'static [(&'static str, &'static str)],
    /// What must hold between fields (CEL), and what is said where it does not.
    rules: &'static [(&'static str, &'static str)],
}

const KINDS: &[Kind] = &[
    Kind {
        kind: "ConnectPolicy",
        plural: "connectpolicies",
        short: "cpol",
        spec: schema::<ConnectPolicy>,
        columns: &[("Action", ".spec.action")],
        rules: &[(
            "!has(self.action) || self.action != 'DENY' || (has(self.rules) && size(self.rules) > 0)",
            "DENY without rules denies nothing; name what it denies, or {} for all",
        )],
    },
    Kind {
        kind: "OutboundToken",
        plural: "outboundtokens",
        short: "otok",
        spec: schema::<OutboundToken>,
        columns: &[("Hosts", ".spec.hosts"), ("Issuer", ".spec.issuer")],
        rules: &[
            (
                "has(self.grant.workloadIdentity) || has(self.issuer) != has(self.tokenEndpoint)",
                "name one of issuer and tokenEndpoint",
            ),
            (
                "!has(self.grant.workloadIdentity) || !(has(self.issuer) || has(self.tokenEndpoint) || has(self.clientId) || has(self.clientAuthentication) || has(self.resources) || has(self.scopes))",
                "issuer, tokenEndpoint, clientId, clientAuthentication, resources and scopes are for a server, and workloadIdentity asks none",
            ),
            (
                "!has(self.grant.workloadIdentity) || (has(self.audiences) && size(self.audiences) == 1)",
                "workloadIdentity takes exactly one of audiences",
            ),
            (
                "!has(self.grant.clientCredentials) || !has(self.clientAuthentication) || !has(self.clientAuthentication.none)",
                "clientCredentials are for clients that prove who they are (RFC 6749 4.4)",
            ),
            (
                "!has(self.onBehalfOf) || (has(self.grant.tokenExchange) && self.grant.tokenExchange.subject == 'inbound')",
                "onBehalfOf is for tokenExchange with subject: inbound",
            ),
            (
                "!has(self.grant.tokenExchange) || !has(self.grant.tokenExchange.serviceAccountTokenPath) || self.grant.tokenExchange.subject == 'serviceAccount'",
                "serviceAccountTokenPath is for subject: serviceAccount",
            ),
            (
                "!has(self.application) || self.application != 'keep' || has(self.onBehalfOf) || !has(self.grant.tokenExchange) || self.grant.tokenExchange.subject != 'inbound' || (has(self.header) && has(self.header.name) && !self.header.name.matches('(?i)^authorization$'))",
                "application: keep would send the very token that is to be exchanged",
            ),
            (
                "!has(self.timeout) || (duration(self.timeout) >= duration('1ms') && duration(self.timeout) <= duration('1m'))",
                "timeout is from 1ms to 1m",
            ),
        ],
    },
    Kind {
        kind: "ProtectedResource",
        plural: "protectedresources",
        short: "pres",
        spec: schema::<ProtectedResource>,
        columns: &[("Resource", ".spec.resource")],
        rules: &[
            (
                "!has(self.authorizationServers) || has(self.resource)",
                "authorizationServers are told as metadata of resource, which is missing",
            ),
            (
                "!has(self.introspection) || !has(self.introspection.clientAuthentication.spiffeJwt)",
                "spiffeJwt is for token requests; use privateKeyJwt, tlsClientAuth or clientSecretBasic",
            ),
            (
                "!has(self.introspection) || !has(self.introspection.cache) || (duration(self.introspection.cache) >= duration('1ms') && duration(self.introspection.cache) <= duration('1h'))",
                "introspection.cache is from 1ms to 1h",
            ),
            (
                "!has(self.introspection) || !has(self.introspection.timeout) || (duration(self.introspection.timeout) >= duration('1ms') && duration(self.introspection.timeout) <= duration('30s'))",
                "introspection.timeout is from 1ms to 30s",
            ),
        ],
    },
    Kind {
        kind: "TokenBinding",
        plural: "tokenbindings",
        short: "tbind",
        spec: schema::<TokenBinding>,
        columns: &[("Presenter", ".spec.presenter")],
        rules: &[],
    },
];

/// All of them, as one file of YAML documents.
pub fn yaml() -> Result<String, serde_saphyr::ser::Error> {
    let mut text = String::from(
        "# Printed by `postern crds`; not to be edited. Istio's kinds are Istio's to install.\n",
    );
    for kind in KINDS {
        text.push_str("---\n");
        text.push_str(serde_saphyr::to_string(&definition(kind))?.trim_end());
        text.push('\n');
    }
    Ok(text)
}

fn schema<T: JsonSchema>() -> Schema {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.inline_subschemas = true;
        settings.meta_schema = None;
    });
    settings.into_generator().into_root_schema_for::<T>()
}

fn definition(kind: &Kind) -> Value {
    let mut spec = structural::of(&(kind.spec)().to_value());
    let description = spec["description"].take();
    let mut required = vec!["metadata"];
    if spec.get("required").is_some() {
        required.push("spec");
    }
    let rules =
        (kind.rules.iter()).map(|(rule, message)| json!({"rule": rule, "message": message}));
    let rules: Vec<Value> = rules.collect();
    let fields = spec.as_object_mut().expect("a spec is an object");
    fields.remove("description");
    if !rules.is_empty() {
        fields.insert("x-kubernetes-validations".into(), rules.into());
    }
    let accepted = r#".status.conditions[?(@.type=="Accepted")]"#;
    let mut columns: Vec<Value> = (kind.columns.iter())
        .map(|(name, path)| json!({"name": name, "type": "string", "jsonPath": path}))
        .collect();
    columns.extend([
        json!({"name": "Accepted", "type": "string", "jsonPath": format!("{accepted}.status")}),
        json!({"name": "Reason", "type": "string", "jsonPath": format!("{accepted}.reason"), "priority": 1}),
        json!({"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}),
    ]);
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": format!("{}.{GROUP}", kind.plural),
            "labels": {"app.kubernetes.io/name": "postern", "app.kubernetes.io/part-of": "postern"},
        },
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": kind.kind,
                "listKind": format!("{}List", kind.kind),
                "plural": kind.plural,
                "singular": kind.kind.to_lowercase(),
                "shortNames": [kind.short],
                "categories": ["postern"],
            },
            "versions": [{
                "name": VERSION,
                "served": true,
                "storage": true,
                "subresources": {"status": {}},
                "additionalPrinterColumns": columns,
                "schema": {"openAPIV3Schema": {
                    "description": description,
                    "type": "object",
                    "required": required,
                    "properties": {
                        "apiVersion": {"type": "string"},
                        "kind": {"type": "string"},
                        "metadata": {"type": "object"},
                        "spec": spec,
                        "status": status(),
                    },
                }},
            }],
        },
    })
}

/// What agents write back (metav1.Condition).
fn status() -> Value {
    let text = |most: usize| json!({"type": "string", "maxLength": most});
    json!({
        "type": "object",
        "description": "What agents made of it.",
        "properties": {
            "observedGeneration": {"type": "integer", "format": "int64", "minimum": 0},
            "conditions": {
                "type": "array",
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["type"],
                "items": {
                    "type": "object",
                    "required": ["type", "status", "lastTransitionTime", "reason", "message"],
                    "properties": {
                        "type": {"type": "string", "maxLength": 316},
                        "status": {"type": "string", "enum": ["True", "False", "Unknown"]},
                        "observedGeneration": {"type": "integer", "format": "int64", "minimum": 0},
                        "lastTransitionTime": {"type": "string", "format": "date-time"},
                        "reason": text(1024),
                        "message": text(32768),
                    },
                },
            },
        },
    })
}

#[cfg(test)]
pub(crate) mod tests;
