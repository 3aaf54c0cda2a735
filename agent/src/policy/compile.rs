//! From objects to what is evaluated. Everything that can be wrong with a policy is
//! found here or while it is parsed, never when a connection is judged.

use std::{collections::BTreeMap, path::PathBuf};

use super::{
    evaluate::{
        Authorization, Denial, Facts, Match, Mode, Operation, Pattern, Permitted, PolicyRef, Reach,
        Rule, Source, Verdict,
    },
    schema::{self, Action, MtlsMode, PolicyObject, Resource, Selector},
};
use crate::{identity::TrustDomain, objects::Located};

#[derive(Debug, thiserror::Error)]
#[error("{path}:{line}: {kind} {name}: {message}", path = path.display())]
pub struct PolicyError {
    pub path: PathBuf,
    pub line: u64,
    pub kind: &'static str,
    pub name: String,
    pub message: String,
}

/// All policies, compiled; published as one snapshot.
#[derive(Clone, Debug, Default)]
pub struct PolicySet {
    authorizations: Vec<Authorization>,
    peers: Vec<Peer>,
}

/// A compiled PeerAuthentication.
#[derive(Clone, Debug)]
struct Peer {
    policy: PolicyRef,
    level: Level,
    reach: Reach,
    /// Oldest first decides among equals (Istio).
    created: Option<String>,
    mode: MtlsMode,
    ports: BTreeMap<u16, MtlsMode>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Workload,
    Namespace,
    Mesh,
}

/// What compilation needs to know of the mesh.
pub struct Mesh<'a> {
    pub root_namespace: &'a str,
    pub trust_domain: &'a TrustDomain,
    pub aliases: &'a [TrustDomain],
}

impl PolicySet {
    pub fn compile(
        objects: Vec<Located<PolicyObject>>,
        mesh: &Mesh<'_>,
    ) -> Result<Self, PolicyError> {
        let mut set = Self::default();
        for Located { object, path, line } in objects {
            let (kind, name, result) = match object {
                PolicyObject::AuthorizationPolicy(p) => {
                    let name = p.metadata.name.clone();
                    let compiled = authorization(*p, mesh);
                    (
                        "AuthorizationPolicy",
                        name,
                        compiled.map(|a| set.authorizations.push(a)),
                    )
                }
                PolicyObject::PeerAuthentication(p) => {
                    let name = p.metadata.name.clone();
                    let compiled = peer(*p, mesh);
                    (
                        "PeerAuthentication",
                        name,
                        compiled.map(|p| set.peers.extend(p)),
                    )
                }
            };
            result.map_err(|message| PolicyError {
                path,
                line,
                kind,
                name,
                message,
            })?;
        }
        set.peers.sort_by(|a, b| {
            let order = |p: &Peer| {
                (
                    p.level,
                    p.created.is_none(),
                    p.created.clone(),
                    p.policy.name.clone(),
                )
            };
            order(a).cmp(&order(b))
        });
        Ok(set)
    }

    pub fn len(&self) -> usize {
        self.authorizations.len() + self.peers.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Judges a connection: mutual TLS first, then DENY, then ALLOW.
    pub fn evaluate(&self, facts: &Facts) -> Verdict {
        if facts.source.is_none()
            && let Mode::Strict(policy) = self.mode(facts)
        {
            return Verdict::Deny(Denial::Plaintext(policy));
        }
        let selecting = |action: Action| {
            self.authorizations.iter().filter(move |a| {
                a.action == action && a.reach.selects(&facts.namespace, &facts.labels)
            })
        };
        if let Some(rule) = selecting(Action::Deny).find_map(|a| a.matching(facts)) {
            return Verdict::Deny(Denial::Rule(rule));
        }
        let Some(first) = selecting(Action::Allow).next() else {
            return Verdict::Allow(None);
        };
        match selecting(Action::Allow).find_map(|a| a.matching(facts)) {
            Some(rule) => Verdict::Allow(Some(rule)),
            None => Verdict::Deny(Denial::Implicit(first.policy.clone())),
        }
    }

    /// As [`Self::evaluate`], for the one who goes on to dial.
    pub fn authorize(&self, facts: &Facts) -> Result<Permitted, Denial> {
        match self.evaluate(facts) {
            Verdict::Allow(by) => Ok(Permitted { by }),
            Verdict::Deny(denial) => Err(denial),
        }
    }

    /// For a probe of the node itself, which the kernel vouches for: no policy
    /// applies to it.
    pub fn probe() -> Permitted {
        Permitted { by: None }
    }

    /// What the port accepts: the narrowest level that says anything; without any,
    /// both.
    fn mode(&self, facts: &Facts) -> Mode {
        let reaching = || {
            self.peers
                .iter()
                .filter(|p| p.reach.selects(&facts.namespace, &facts.labels))
        };
        // Per level only the winner counts, and the workload's winner has the ports.
        let winner = |level| reaching().find(|p| p.level == level);
        let workload = winner(Level::Workload);
        let on_port = workload.and_then(|p| Some((p, *p.ports.get(&facts.destination_port)?)));
        let levels = [Level::Workload, Level::Namespace, Level::Mesh];
        let whole = levels.into_iter().filter_map(winner).map(|p| (p, p.mode));
        match on_port
            .into_iter()
            .chain(whole)
            .find(|(_, mode)| *mode != MtlsMode::Unset)
        {
            Some((peer, MtlsMode::Strict)) => Mode::Strict(peer.policy.clone()),
            _ => Mode::Permissive,
        }
    }
}

const DRY_RUN: &str = "istio.io/dry-run";

fn identify<T>(kind: &'static str, object: &Resource<T>) -> Result<PolicyRef, String> {
    let meta = &object.metadata;
    if meta.annotations.contains_key(DRY_RUN) {
        return Err(format!("annotation {DRY_RUN} is not supported yet"));
    }
    if meta.name.is_empty() {
        return Err("metadata.name is missing".into());
    }
    Ok(PolicyRef {
        kind,
        namespace: meta.namespace().to_owned(),
        name: meta.name.clone(),
        rule: None,
    })
}

fn reach(policy: &PolicyRef, selector: Option<Selector>, mesh: &Mesh<'_>) -> Result<Reach, String> {
    let labels = selector.unwrap_or_default().match_labels;
    for (key, value) in &labels {
        if key.is_empty() || key.contains('*') || value.contains('*') {
            return Err(format!(
                "selector {key}: {value}: labels are matched exactly, without `*`"
            ));
        }
    }
    let root = policy.namespace == mesh.root_namespace;
    Ok(Reach {
        namespace: (!root).then(|| policy.namespace.clone()),
        labels,
    })
}

fn authorization(
    object: Resource<schema::AuthorizationPolicy>,
    mesh: &Mesh<'_>,
) -> Result<Authorization, String> {
    let policy = identify("AuthorizationPolicy", &object)?;
    let spec = object.spec.unwrap_or_default();
    if spec.action == Action::Deny && spec.rules.is_empty() {
        return Err("DENY without rules never denies; `rules: [{}]` denies everything".into());
    }
    let rules = spec
        .rules
        .into_iter()
        .enumerate()
        .map(|(index, rule)| {
            compile_rule(rule, &policy.namespace, mesh).map_err(|e| format!("rules[{index}]: {e}"))
        })
        .collect::<Result<_, _>>()?;
    Ok(Authorization {
        reach: reach(&policy, spec.selector, mesh)?,
        action: spec.action,
        policy,
        rules,
    })
}

fn compile_rule(rule: schema::Rule, namespace: &str, mesh: &Mesh<'_>) -> Result<Rule, String> {
    let from = match rule.from {
        Some(entries) => Some(
            entries
                .into_iter()
                .enumerate()
                .map(|(i, f)| {
                    source(f.source, namespace, mesh).map_err(|e| format!("from[{i}].source: {e}"))
                })
                .collect::<Result<_, _>>()?,
        ),
        None => None,
    };
    let to = rule.to.map(|entries| {
        let operation = |t: schema::To| {
            let ports =
                |list: schema::List<schema::Port>| list.0.into_iter().map(|p| p.0).collect();
            Operation {
                ports: Match {
                    any: ports(t.operation.ports),
                    none: ports(t.operation.not_ports),
                },
            }
        };
        entries.into_iter().map(operation).collect()
    });
    Ok(Rule { from, to })
}

fn source(source: schema::Source, namespace: &str, mesh: &Mesh<'_>) -> Result<Source, String> {
    let accounts = [&source.service_accounts, &source.not_service_accounts];
    let others = [
        &source.principals,
        &source.not_principals,
        &source.namespaces,
        &source.not_namespaces,
    ];
    if accounts.iter().any(|list| !list.0.is_empty()) && others.iter().any(|l| !l.0.is_empty()) {
        return Err("serviceAccounts cannot stand beside principals or namespaces".into());
    }
    if accounts.iter().any(|list| list.0.len() > 16) {
        return Err("at most 16 serviceAccounts".into());
    }
    let patterns = |list: schema::List<schema::Text>| -> Vec<Pattern> {
        list.0.iter().map(|text| Pattern::parse(&text.0)).collect()
    };
    let principals = |list: schema::List<schema::Text>| -> Vec<Pattern> {
        list.0
            .iter()
            .flat_map(|text| principal(&text.0, mesh))
            .collect()
    };
    let accounts = |list: schema::List<schema::ServiceAccount>| -> Vec<(String, String)> {
        list.0
            .into_iter()
            .map(|a| (a.namespace.unwrap_or_else(|| namespace.to_owned()), a.name))
            .collect()
    };
    let blocks = |list: schema::List<schema::Block>| list.0.into_iter().map(|b| b.0).collect();
    Ok(Source {
        principals: Match {
            any: principals(source.principals),
            none: principals(source.not_principals),
        },
        namespaces: Match {
            any: patterns(source.namespaces),
            none: patterns(source.not_namespaces),
        },
        service_accounts: Match {
            any: accounts(source.service_accounts),
            none: accounts(source.not_service_accounts),
        },
        ip_blocks: Match {
            any: blocks(source.ip_blocks),
            none: blocks(source.not_ip_blocks),
        },
    })
}

/// A principal of the local trust domain, of an alias or of `cluster.local` stands
/// for the same account in all of {local, aliases} (Istio trust-domain migration).
fn principal(text: &str, mesh: &Mesh<'_>) -> Vec<Pattern> {
    let ours = || {
        std::iter::once(mesh.trust_domain)
            .chain(mesh.aliases)
            .map(TrustDomain::as_str)
    };
    match text.split_once('/') {
        Some((domain, rest))
            if rest.split('/').count() == 4
                && (domain == "cluster.local" || ours().any(|d| d == domain)) =>
        {
            ours()
                .map(|domain| Pattern::parse(&format!("{domain}/{rest}")))
                .collect()
        }
        _ => vec![Pattern::parse(text)],
    }
}

/// `None` for one without effect: a labelled one in the root namespace (Istio).
fn peer(
    object: Resource<schema::PeerAuthentication>,
    mesh: &Mesh<'_>,
) -> Result<Option<Peer>, String> {
    let policy = identify("PeerAuthentication", &object)?;
    let created = object.metadata.creation_timestamp.clone();
    let spec = object.spec.unwrap_or_default();
    let reach = reach(&policy, spec.selector, mesh)?;
    let labelled = !reach.labels.is_empty();
    if !labelled && !spec.port_level_mtls.is_empty() {
        return Err("portLevelMtls needs a selector with labels".into());
    }
    let level = match (&reach.namespace, labelled) {
        (None, false) => Level::Mesh,
        (Some(_), false) => Level::Namespace,
        (Some(_), true) => Level::Workload,
        (None, true) => {
            tracing::warn!(%policy, "a selector in the root namespace has no effect");
            return Ok(None);
        }
    };
    let ports = spec
        .port_level_mtls
        .iter()
        .map(|(port, mtls)| (port.0, mtls.mode))
        .collect();
    Ok(Some(Peer {
        policy,
        level,
        reach,
        created,
        mode: spec.mtls.mode,
        ports,
    }))
}
