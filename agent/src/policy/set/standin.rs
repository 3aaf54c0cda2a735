//! What stands where an object was refused: it guarded something, and that is closed
//! until the object is right. Of the object only what it selects is taken, and where
//! that cannot be read either, all that it could have selected.
//!
//! | refused | stands |
//! |---|---|
//! | AuthorizationPolicy, RequestAuthentication, TokenBinding, ProtectedResource | every connection and request to what it selects is denied |
//! | AuthorizationPolicy that only tells (AUDIT, dry-run) | nothing: it guards nothing |
//! | PeerAuthentication | STRICT |
//! | ConnectPolicy | what it selects can dial nothing in the mesh |
//! | OutboundToken | requests to its hosts are answered 503 |

use serde::Deserialize as _;
use serde_json::Value;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{
    super::{
        compile::{self, DRY_RUN, Mesh, Reach},
        evaluate::{PolicyRef, Rule},
        extension::Connect,
        outbound::Outbound,
        schema::{
            Action, ConnectAction, ConnectPolicy, ConnectRule, MtlsMode, MutualTls, Selector,
            TargetRef,
        },
    },
    Authorization, PolicySet,
};

impl PolicySet {
    /// Closes what a refused object guarded. Says what stands now, as an operator is told.
    pub fn stand_in(
        &mut self,
        kind: &'static str,
        object: &Value,
        mesh: &Mesh<'_>,
    ) -> &'static str {
        const DENIED: &str = "what it selects is denied";
        let text = |path: &str| object.pointer(path).and_then(Value::as_str);
        let policy = PolicyRef {
            kind,
            namespace: text("/metadata/namespace").unwrap_or("default").into(),
            name: text("/metadata/name").unwrap_or_default().into(),
            rule: None,
        };
        let spec = object.get("spec").unwrap_or(&Value::Null);
        let reach = reach(&policy, spec, mesh);
        let order = self.count;
        let stands = match kind {
            "AuthorizationPolicy" if only_tells(object) => return "it guards nothing",
            "PeerAuthentication" => {
                let created = text("/metadata/creationTimestamp")
                    .and_then(|text| OffsetDateTime::parse(text, &Rfc3339).ok());
                let strict = MutualTls {
                    mode: MtlsMode::Strict,
                };
                self.add_peer(order, policy, created, reach, strict, &Default::default());
                "what it selects takes mutual TLS only"
            }
            "ConnectPolicy" => {
                let nothing = ConnectPolicy {
                    selector: None,
                    action: ConnectAction::Deny,
                    rules: vec![ConnectRule::default()],
                };
                match Connect::new(policy, nothing) {
                    Ok(connect) => self.connects.add(order, reach, connect),
                    Err(_) => unreachable!("a DENY with a rule is taken"),
                }
                "what it selects dials nothing in the mesh"
            }
            "OutboundToken" => {
                let list = |name| spec.get(name).and_then(Value::as_array);
                let hosts: Option<Vec<String>> = list("hosts").and_then(|all| {
                    let texts = all.iter().map(|host| host.as_str().map(str::to_lowercase));
                    texts.collect()
                });
                // Ports narrow it; without them it is wider.
                let outbound = Outbound::refused(policy, hosts.filter(|all| !all.is_empty()));
                self.outbound.add(order, reach, outbound);
                "requests to its hosts are refused"
            }
            _ => {
                let item = Authorization {
                    policy,
                    action: Action::Deny,
                    dry_run: false,
                    rules: vec![Rule::default()],
                };
                self.authorizations.add(order, reach, item);
                DENIED
            }
        };
        self.count += 1;
        stands
    }
}

fn only_tells(object: &Value) -> bool {
    let annotation = object["metadata"]["annotations"][DRY_RUN].as_str();
    let dry_run = matches!(annotation, Some("1" | "t" | "T" | "true" | "TRUE" | "True"));
    dry_run || object["spec"]["action"] == "AUDIT"
}

/// What the object selects if that can be read, else whatever it could select: its
/// namespace, and from the root namespace the mesh.
fn reach(policy: &PolicyRef, spec: &Value, mesh: &Mesh<'_>) -> Reach {
    let part = |name| spec.get(name).filter(|value| !value.is_null());
    let (selector, targets) = match (part("selector"), part("targetRef"), part("targetRefs")) {
        (Some(selector), None, None) => (Selector::deserialize(selector).ok(), None),
        (None, Some(target), None) => (None, TargetRef::deserialize(target).ok().map(|t| vec![t])),
        (None, None, Some(targets)) => (None, Vec::deserialize(targets).ok()),
        _ => (None, None),
    };
    compile::reach(policy, selector, targets, mesh)
}
