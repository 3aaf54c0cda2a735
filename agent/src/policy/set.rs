//! All policies, and how those of one workload are found among them.

mod standin;

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::Arc,
};

use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{
    compile::{self, Mesh, Reach, Reading, Wrong},
    evaluate::{PolicyRef, Rule},
    extension::{Binding, Connect},
    outbound::{Outbound, same_reach},
    resource::ProtectedResource,
    schema::{self, Action, PolicyObject},
    selected::{Authorization, Level, Peer, Selected},
};
use crate::{
    jwt::{self, KeySource, RemoteKeys},
    objects::Located,
};

#[derive(Debug, thiserror::Error)]
#[error("{path}:{line}: {kind} {namespace}/{name}: {field}: {message}", path = path.display())]
pub struct PolicyError {
    pub path: PathBuf,
    pub line: u64,
    pub kind: &'static str,
    pub namespace: String,
    pub name: String,
    pub field: &'static str,
    pub message: String,
}

/// What policies select workloads by.
#[derive(Clone, Debug, Default)]
pub struct Subject {
    pub namespace: String,
    pub labels: BTreeMap<String, String>,
    /// Names of the services of its namespace that it is behind.
    pub services: Vec<String>,
}

/// All policies, compiled; published as one snapshot.
#[derive(Debug, Default)]
pub struct PolicySet {
    count: usize,
    reading: Reading,
    authorizations: Index<Authorization>,
    peers: Index<Peer>,
    tokens: Index<Tokens>,
    bindings: Index<Binding>,
    connects: Index<Connect>,
    resources: Index<ProtectedResource>,
    outbound: Index<Outbound>,
    remote_keys: Vec<RemoteKeys>,
    warnings: Vec<String>,
}

/// A compiled RequestAuthentication.
#[derive(Debug)]
struct Tokens {
    policy: PolicyRef,
    rules: Vec<Arc<jwt::Rule>>,
}

/// Policies by what selects them, so that finding a workload's own does not cost
/// more with those of others.
#[derive(Debug)]
struct Index<T>(HashMap<Key, Vec<Entry<T>>>);

/// Namespace (none: all) and one label of the selector (none: there are no labels).
type Key = (Option<Arc<str>>, Option<(String, String)>);

#[derive(Debug)]
struct Entry<T> {
    /// Place among all policies, so that the order is that of the files.
    order: usize,
    reach: Reach,
    item: Arc<T>,
}

impl<T> Default for Index<T> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<T> Index<T> {
    fn add(&mut self, order: usize, reach: Reach, item: T) {
        let label = reach.labels.iter().next();
        let key = (
            reach.namespace.clone(),
            label.map(|(k, v)| (k.clone(), v.clone())),
        );
        self.0.entry(key).or_default().push(Entry {
            order,
            reach,
            item: Arc::new(item),
        });
    }

    /// One that selects the same workloads by the same words.
    fn same(&self, reach: &Reach) -> Option<&T> {
        let all = self.0.values().flatten();
        all.into_iter()
            .find(|entry| {
                entry.reach.namespace == reach.namespace && entry.reach.labels == reach.labels
            })
            .map(|entry| &*entry.item)
    }

    fn select(&self, subject: &Subject) -> Vec<Arc<T>> {
        let namespaces = [None, Some(Arc::from(subject.namespace.as_str()))];
        let mut found: Vec<(usize, Arc<T>)> = Vec::new();
        for namespace in namespaces {
            let labels = subject
                .labels
                .iter()
                .map(|(k, v)| Some((k.clone(), v.clone())));
            for label in labels.chain([None]) {
                let entries = self.0.get(&(namespace.clone(), label));
                found.extend(
                    (entries.into_iter().flatten())
                        .filter(|entry| entry.reach.selects(subject))
                        .map(|entry| (entry.order, entry.item.clone())),
                );
            }
        }
        found.sort_by_key(|(order, _)| *order);
        found.into_iter().map(|(_, item)| item).collect()
    }
}

impl Level {
    /// Of policies that may have labels at every level.
    fn of(reach: &Reach) -> Self {
        match (reach.labels.is_empty(), &reach.namespace) {
            (false, _) => Self::Workload,
            (true, Some(_)) => Self::Namespace,
            (true, None) => Self::Mesh,
        }
    }
}

impl Reach {
    /// Namespace and the first label are the index's; looked at again, for they cost
    /// nothing and the rule is then in one place.
    fn selects(&self, subject: &Subject) -> bool {
        self.namespace
            .as_deref()
            .is_none_or(|n| n == subject.namespace)
            && self
                .labels
                .iter()
                .all(|(key, value)| subject.labels.get(key) == Some(value))
            && self.services.as_ref().is_none_or(|services| {
                services
                    .iter()
                    .any(|service| subject.services.contains(service))
            })
    }
}

impl PolicySet {
    /// All that is wrong is told, and then nothing is taken.
    pub fn compile(
        objects: Vec<Located<PolicyObject>>,
        mesh: &Mesh<'_>,
    ) -> Result<Self, Vec<PolicyError>> {
        let (set, errors) = Self::gather(objects, mesh);
        match errors.is_empty() {
            true => Ok(set),
            false => Err(errors),
        }
    }

    /// All that is right is taken, and what is wrong is told: whoever takes the rest has
    /// to close what the others guarded (`stand_in`).
    pub fn gather(
        objects: Vec<Located<PolicyObject>>,
        mesh: &Mesh<'_>,
    ) -> (Self, Vec<PolicyError>) {
        let mut set = Self {
            reading: mesh.requests,
            ..Self::default()
        };
        let mut errors = Vec::new();
        let mut seen = HashMap::new();
        for Located { object, path, line } in objects {
            let (kind, meta) = (object.kind(), object.metadata());
            let (namespace, name) = (meta.namespace().to_owned(), meta.name.clone());
            let identity = (kind, namespace.clone(), name.clone());
            let result = match seen.insert(identity, (path.clone(), line)) {
                Some((other, at)) => Err(Wrong {
                    field: "metadata.name",
                    message: format!("the same object stands at {}:{at}", other.display()),
                }),
                None => set.add(object, mesh),
            };
            if let Err(Wrong { field, message }) = result {
                errors.push(PolicyError {
                    path,
                    line,
                    kind,
                    namespace,
                    name,
                    field,
                    message,
                });
            }
        }
        (set, errors)
    }

    fn add(&mut self, object: PolicyObject, mesh: &Mesh<'_>) -> Result<(), Wrong> {
        let order = self.count;
        let kind = object.kind();
        let real_only = |dry_run: Option<bool>| match dry_run {
            Some(_) => Err(Wrong {
                field: "metadata.annotations[istio.io/dry-run]",
                message: "is for AuthorizationPolicy with ALLOW or DENY only".into(),
            }),
            None => Ok(()),
        };
        match object {
            PolicyObject::AuthorizationPolicy(object) => {
                let (policy, dry_run) = compile::identify(kind, &object)?;
                let spec = object.spec.unwrap_or_default();
                if !matches!(spec.action, Action::Allow | Action::Deny) {
                    real_only(dry_run)?;
                }
                let rules = (spec.rules.into_iter())
                    .map(|rule| compile::rule(rule, &policy.namespace, mesh))
                    .collect();
                self.warn(&policy, spec.selector.as_ref(), spec.targets.as_deref());
                let reach = compile::reach(&policy, spec.selector, spec.targets, mesh);
                let item = Authorization {
                    policy,
                    action: spec.action,
                    dry_run: dry_run == Some(true),
                    rules,
                };
                if item.action == Action::Deny && item.rules.iter().any(Rule::denies_all_tcp) {
                    self.warnings.push(format!(
                        "{}: without a port, a DENY rule on requests denies whatever is no HTTP",
                        item.policy
                    ));
                }
                self.authorizations.add(order, reach, item);
            }
            PolicyObject::PeerAuthentication(object) => {
                let (policy, dry_run) = compile::identify(kind, &object)?;
                real_only(dry_run)?;
                let created = (object.metadata.creation_timestamp.as_deref())
                    .map(|text| OffsetDateTime::parse(text, &Rfc3339))
                    .transpose()
                    .map_err(|_| Wrong {
                        field: "metadata.creationTimestamp",
                        message: "is no time of RFC 3339, such as 2026-01-31T12:00:00Z".into(),
                    })?;
                let spec = object.spec.unwrap_or_default();
                self.warn(&policy, spec.selector.as_ref(), None);
                let reach = compile::reach(&policy, spec.selector, None, mesh);
                self.add_peer(
                    order,
                    policy,
                    created,
                    reach,
                    spec.mtls,
                    &spec.port_level_mtls,
                );
            }
            PolicyObject::RequestAuthentication(object) => {
                let (policy, dry_run) = compile::identify(kind, &object)?;
                real_only(dry_run)?;
                let spec = object.spec.unwrap_or_default();
                let rules: Vec<Arc<jwt::Rule>> = (spec.jwt_rules.into_iter())
                    .map(|rule| Arc::new(compile::jwt_rule(rule)))
                    .collect();
                for rule in &rules {
                    match &rule.keys {
                        KeySource::Remote(keys) if !self.remote_keys.contains(keys) => {
                            self.remote_keys.push(keys.clone());
                        }
                        KeySource::Remote(_) => {}
                        KeySource::Inline(keys) => {
                            let skipped = keys.skipped().iter().map(ToString::to_string);
                            let private = keys
                                .has_private()
                                .then(|| "jwks has a private key; publish public ones".to_owned());
                            let all = skipped.chain(private).map(|why| format!("{policy}: {why}"));
                            self.warnings.extend(all);
                        }
                    }
                }
                self.warn(&policy, spec.selector.as_ref(), spec.targets.as_deref());
                let reach = compile::reach(&policy, spec.selector, spec.targets, mesh);
                self.tokens.add(order, reach, Tokens { policy, rules });
            }
            PolicyObject::ConnectPolicy(object) => {
                let (policy, dry_run) = compile::identify(kind, &object)?;
                real_only(dry_run)?;
                let mut spec = object.spec.unwrap_or_default();
                let reach = compile::reach(&policy, spec.selector.take(), None, mesh);
                self.connects.add(order, reach, Connect::new(policy, spec)?);
            }
            PolicyObject::TokenBinding(object) => {
                let (policy, dry_run) = compile::identify(kind, &object)?;
                real_only(dry_run)?;
                let Some(mut spec) = object.spec else {
                    return Err(Wrong {
                        field: "spec",
                        message: "is missing".into(),
                    });
                };
                let reach = compile::reach(&policy, spec.selector.take(), None, mesh);
                self.bindings.add(order, reach, Binding::new(policy, spec));
            }
            PolicyObject::ProtectedResource(object) => {
                let (policy, dry_run) = compile::identify(kind, &object)?;
                real_only(dry_run)?;
                let mut spec = object.spec.unwrap_or_default();
                let reach = compile::reach(&policy, spec.selector.take(), None, mesh);
                let level = Level::of(&reach);
                let resource = ProtectedResource::new(policy, level, spec, mesh)?;
                if let Some(other) = self.resources.same(&reach) {
                    return Err(Wrong {
                        field: "spec.selector",
                        message: format!("{} has the same; only one can count", other.policy),
                    });
                }
                self.resources.add(order, reach, resource);
            }
            PolicyObject::OutboundToken(object) => {
                let (policy, dry_run) = compile::identify(kind, &object)?;
                real_only(dry_run)?;
                let Some(mut spec) = object.spec else {
                    return Err(Wrong {
                        field: "spec",
                        message: "is missing".into(),
                    });
                };
                let reach = compile::reach(&policy, spec.selector.take(), None, mesh);
                let item = Outbound::new(policy, spec, mesh.secrets)?;
                let others = self.outbound.0.values().flatten();
                for other in others.filter(|other| same_reach(&other.reach, &reach)) {
                    if let Some(host) = item.collides(&other.item) {
                        let message = format!("`{host}` is {}'s already", other.item.policy);
                        let field = "spec.hosts";
                        return Err(Wrong { field, message });
                    }
                }
                self.outbound.add(order, reach, item);
            }
        }
        self.count += 1;
        Ok(())
    }

    fn add_peer(
        &mut self,
        order: usize,
        policy: PolicyRef,
        created: Option<OffsetDateTime>,
        reach: Reach,
        mtls: schema::MutualTls,
        ports: &BTreeMap<schema::PortKey, schema::MutualTls>,
    ) {
        let level = match (&reach.namespace, reach.labels.is_empty()) {
            (None, true) => Level::Mesh,
            (Some(_), true) => Level::Namespace,
            (Some(_), false) => Level::Workload,
            (None, false) => {
                let why = "a selector in the root namespace has no effect (Istio)";
                return self.warnings.push(format!("{policy}: {why}"));
            }
        };
        let item = Peer {
            policy,
            level,
            age: (created.is_none(), created),
            mode: mtls.mode,
            ports: ports
                .iter()
                .map(|(port, mtls)| (port.0, mtls.mode))
                .collect(),
        };
        self.peers.add(order, reach, item);
    }

    pub fn len(&self) -> usize {
        self.count
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// What may not be meant as it stands, and is taken as it stands.
    fn warn(
        &mut self,
        policy: &PolicyRef,
        selector: Option<&schema::Selector>,
        targets: Option<&[schema::TargetRef]>,
    ) {
        let mut say = |why: &str| self.warnings.push(format!("{policy}: {why}"));
        if selector.is_some_and(|s| s.match_labels.is_empty()) {
            say("an empty selector selects every workload");
        }
        if targets.is_some_and(|all| all.iter().all(|target| target.service.is_none())) {
            say("it is for gateways only, and selects no workload");
        }
    }

    /// What is taken, and may not be meant.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Providers that CUSTOM policies ask.
    pub fn provider_names(&self) -> impl Iterator<Item = &str> {
        let policies = self.authorizations.0.values().flatten();
        policies.filter_map(|entry| match &entry.item.action {
            Action::Custom(provider) => Some(provider.as_str()),
            _ => None,
        })
    }

    /// Key sets that are fetched for these policies.
    pub fn remote_keys(&self) -> &[RemoteKeys] {
        &self.remote_keys
    }

    /// The first policy that selects workloads of a namespace by more than that: which of
    /// them it reaches depends on their labels and services.
    pub fn selective(&self, namespace: &str) -> Option<PolicyRef> {
        fn of<'a, T>(
            index: &'a Index<T>,
            namespace: &'a str,
            policy: impl Fn(&T) -> &PolicyRef + 'a,
        ) -> impl Iterator<Item = PolicyRef> + 'a {
            let entries = index.0.values().flatten();
            let chosen = move |entry: &&Entry<T>| {
                let reach = &entry.reach;
                let some = !reach.labels.is_empty() || reach.services.is_some();
                some && (reach.namespace.as_deref()).is_none_or(|own| own == namespace)
            };
            entries
                .filter(chosen)
                .map(move |entry| policy(&entry.item).clone())
        }
        of(&self.authorizations, namespace, |one| &one.policy)
            .chain(of(&self.peers, namespace, |one| &one.policy))
            .chain(of(&self.tokens, namespace, |one| &one.policy))
            .chain(of(&self.bindings, namespace, |one| &one.policy))
            .chain(of(&self.resources, namespace, |one| &one.policy))
            .min_by_key(PolicyRef::path)
    }

    /// The policies of one workload.
    pub fn select(&self, subject: &Subject) -> Selected {
        let mut peers = self.peers.select(subject);
        peers.sort_by(|a, b| {
            let order = |p: &Peer| (p.level, p.age, p.policy.name.clone());
            order(a).cmp(&order(b))
        });
        let mut selected = Selected {
            reading: self.reading,
            peers,
            custom: Vec::new(),
            deny: Vec::new(),
            allow: Vec::new(),
            told: Vec::new(),
            tokens: Vec::new(),
            token_policies: Vec::new(),
            bindings: self.bindings.select(subject),
            connects: self.connects.select(subject),
            resource: None,
            contested: None,
            outbound: self.outbound.select(subject),
        };
        let mut resources = self.resources.select(subject);
        resources.sort_by_key(|one| (one.level, one.policy.name.clone()));
        let mut resources = resources.into_iter();
        selected.resource = resources.next();
        // Neither may be passed over for the other.
        selected.contested = (resources.next())
            .filter(|next| {
                selected
                    .resource
                    .as_ref()
                    .is_some_and(|r| r.level == next.level)
            })
            .map(|next| next.policy.clone());
        for policy in self.authorizations.select(subject) {
            match policy.action {
                _ if policy.dry_run => selected.told.push(policy),
                Action::Audit => selected.told.push(policy),
                Action::Custom(_) => selected.custom.push(policy),
                Action::Deny => selected.deny.push(policy),
                Action::Allow => selected.allow.push(policy),
            }
        }
        for tokens in self.tokens.select(subject) {
            let indices = 0..tokens.rules.len();
            selected.tokens.extend(tokens.rules.iter().cloned());
            (selected.token_policies).extend(indices.map(|index| tokens.policy.at(index)));
        }
        selected
    }
}
