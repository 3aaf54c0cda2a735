//! The policies of one workload, and what they say to its connections and requests.

use std::{collections::BTreeMap, sync::Arc};

use time::OffsetDateTime;

use super::{
    compile::Reading,
    evaluate::{Denial, Facts, Layer, PolicyRef, Rule, Verdict},
    extension::{Binding, Caller, Connect},
    outbound::{Outbound, Unclear},
    resource::ProtectedResource,
    schema::{Action, MtlsMode},
};
use crate::jwt;

/// A compiled AuthorizationPolicy.
#[derive(Debug)]
pub struct Authorization {
    pub policy: PolicyRef,
    pub action: Action,
    /// Evaluated and told, never enforced.
    pub dry_run: bool,
    pub rules: Vec<Rule>,
}

/// A compiled PeerAuthentication.
#[derive(Debug)]
pub(super) struct Peer {
    pub policy: PolicyRef,
    pub level: Level,
    /// Oldest first decides among equals (Istio); those without come last.
    pub age: (bool, Option<OffsetDateTime>),
    pub mode: MtlsMode,
    pub ports: BTreeMap<u16, MtlsMode>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    Workload,
    Namespace,
    Mesh,
}

/// The policies that select one workload: what its connections and requests are
/// judged by. One snapshot: what is judged by it is judged by all of it.
#[derive(Clone, Debug, Default)]
pub struct Selected {
    pub reading: Reading,
    /// The narrowest level first.
    pub(super) peers: Vec<Arc<Peer>>,
    pub(super) custom: Vec<Arc<Authorization>>,
    pub(super) deny: Vec<Arc<Authorization>>,
    pub(super) allow: Vec<Arc<Authorization>>,
    /// AUDIT and dry-run: told, without effect.
    pub(super) told: Vec<Arc<Authorization>>,
    pub(super) tokens: Vec<Arc<jwt::Rule>>,
    /// The policy, and the index in it, of each of those.
    pub(super) token_policies: Vec<PolicyRef>,
    pub(super) bindings: Vec<Arc<Binding>>,
    pub(super) connects: Vec<Arc<Connect>>,
    pub(super) resource: Option<Arc<ProtectedResource>>,
    /// Another of the same level: which of them counts is not said.
    pub(super) contested: Option<PolicyRef>,
    pub(super) outbound: Vec<Arc<Outbound>>,
}

impl Selected {
    /// PeerAuthentication: whether plaintext may come in at this port.
    pub fn transport(&self, facts: &Facts) -> Result<(), Denial> {
        if facts.source.is_some() {
            return Ok(());
        }
        let port = facts.destination.port();
        // Per level only the winner counts, and the workload's winner has the ports.
        let winner = |level| self.peers.iter().find(|p| p.level == level);
        let on_port = winner(Level::Workload).and_then(|p| Some((p, *p.ports.get(&port)?)));
        let levels = [Level::Workload, Level::Namespace, Level::Mesh];
        let whole = levels.into_iter().filter_map(winner).map(|p| (p, p.mode));
        match on_port
            .into_iter()
            .chain(whole)
            .find(|(_, mode)| *mode != MtlsMode::Unset)
        {
            Some((peer, MtlsMode::Strict)) => Err(Denial::Plaintext(peer.policy.clone())),
            // DISABLE is read as PERMISSIVE, as in Istio's ambient mode.
            _ => Ok(()),
        }
    }

    /// The policy that asks to read the requests of this connection, if any does.
    pub fn needs_request(&self, facts: &Facts) -> Option<&PolicyRef> {
        let resource = self.resource.as_ref().map(|resource| &resource.policy);
        let tokens = self.token_policies.first().or(resource);
        tokens.or_else(|| {
            self.enforced()
                .find(|p| p.rules.iter().any(|rule| rule.needs_request(facts)))
                .map(|p| &p.policy)
        })
    }

    fn enforced(&self) -> impl Iterator<Item = &Arc<Authorization>> {
        [&self.custom, &self.deny, &self.allow]
            .into_iter()
            .flatten()
    }

    /// Whether some rule goes by the server's name of the TLS within.
    pub fn asks_for_sni(&self) -> bool {
        self.enforced().any(|p| p.rules.iter().any(|rule| rule.sni))
    }

    /// The providers that decide first, each once, and the policies that ask them.
    pub fn providers(&self, facts: &Facts, layer: Layer<'_>) -> Vec<(&str, PolicyRef)> {
        let mut providers: Vec<(&str, PolicyRef)> = Vec::new();
        for policy in &self.custom {
            if let Action::Custom(name) = &policy.action
                && !providers.iter().any(|(other, _)| other == name)
                && let Some(rule) = policy.rules.iter().position(|r| r.catches(facts, layer))
            {
                providers.push((name, policy.policy.at(rule)));
            }
        }
        providers
    }

    pub fn has_providers(&self) -> bool {
        !self.custom.is_empty()
    }

    /// DENY, then ALLOW.
    pub fn decide(&self, facts: &Facts, layer: Layer<'_>) -> Verdict {
        for policy in &self.deny {
            if let Some(rule) = policy.rules.iter().position(|r| r.catches(facts, layer)) {
                return Verdict::Deny(Denial::Rule(policy.policy.at(rule)));
            }
        }
        let Some(first) = self.allow.first() else {
            return Verdict::Allow(None);
        };
        for policy in &self.allow {
            if let Some(rule) = policy.rules.iter().position(|r| r.allows(facts, layer)) {
                return Verdict::Allow(Some(policy.policy.at(rule)));
            }
        }
        Verdict::Deny(Denial::Implicit(first.policy.clone()))
    }

    /// PeerAuthentication, DENY and ALLOW for a connection whose bytes are not read.
    pub fn opaque(&self, facts: &Facts) -> Verdict {
        match self.transport(facts) {
            Err(denial) => Verdict::Deny(denial),
            Ok(()) => self.decide(facts, Layer::Opaque),
        }
    }

    /// What policies without effect would say: AUDIT that match, dry-run DENY that
    /// match, dry-run ALLOW of which none matches.
    pub fn told(&self, facts: &Facts, layer: Layer<'_>) -> Vec<PolicyRef> {
        let mut told = Vec::new();
        let mut tried: Option<&PolicyRef> = None;
        let mut allowed = false;
        for policy in &self.told {
            if policy.action == Action::Allow {
                tried = tried.or(Some(&policy.policy));
                allowed |= policy.rules.iter().any(|r| r.allows(facts, layer));
            } else if let Some(rule) = policy.rules.iter().position(|r| r.catches(facts, layer)) {
                told.push(policy.policy.at(rule));
            }
        }
        if let (Some(policy), false) = (tried, allowed) {
            told.push(policy.clone());
        }
        told
    }

    /// The rules by which tokens are verified.
    pub fn tokens(&self) -> &[Arc<jwt::Rule>] {
        &self.tokens
    }

    /// The policy that such a rule is of.
    pub fn token_policy(&self, rule: usize) -> &PolicyRef {
        &self.token_policies[rule]
    }

    /// Two ProtectedResources of one level select the workload: no request passes.
    pub fn contested(&self) -> Result<(), Denial> {
        match (&self.contested, &self.resource) {
            (Some(other), Some(resource)) => {
                let why = format!(
                    "{} selects the same workload; one of them must go",
                    resource.policy
                );
                Err(Denial::Token(other.clone(), why))
            }
            _ => Ok(()),
        }
    }

    /// What the workload is as an OAuth resource server, if it is one.
    pub fn resource(&self) -> Option<&Arc<ProtectedResource>> {
        self.resource.as_ref()
    }

    /// The scopes that would make the first ALLOW rule match that needs nothing else;
    /// empty where it does not name them one by one. `any_token`: nor a certain token.
    pub fn lacking_scopes(
        &self,
        facts: &Facts,
        layer: Layer<'_>,
        any_token: bool,
    ) -> Option<Vec<String>> {
        let mut rules = self.allow.iter().flat_map(|policy| &policy.rules);
        rules.find_map(|rule| rule.lacking_scopes(facts, layer, any_token))
    }

    /// Whether a verified token may be presented by this peer.
    pub fn presenter(&self, facts: &Facts, claims: &jwt::Claims) -> Result<(), Denial> {
        match self.bindings.iter().find(|b| !b.holds(facts, claims)) {
            Some(binding) => Err(Denial::Presenter(binding.policy.clone())),
            None => Ok(()),
        }
    }

    /// Whether a process of this workload may dial.
    pub fn connect(&self, caller: &Caller<'_>) -> Result<(), Denial> {
        Connect::decide(&self.connects, caller).map_err(Denial::Process)
    }

    /// Whether requests that the workload sends to this port may need a token.
    pub fn sends_tokens(&self, port: u16) -> bool {
        self.outbound.iter().any(|one| one.on_port(port))
    }

    /// The OutboundToken for a request that it sends.
    pub fn outbound(&self, port: u16, host: &str) -> Result<Option<&Arc<Outbound>>, Unclear> {
        Outbound::choose(&self.outbound, port, host)
    }

    /// Headers that tell, of requests that come in, on whose behalf others go out.
    pub fn on_behalf(&self) -> impl Iterator<Item = &http::HeaderName> {
        (self.outbound.iter()).filter_map(|one| one.on_behalf.as_ref())
    }

    /// All AuthorizationPolicies, in the order in which they are asked.
    pub fn authorizations(&self) -> impl Iterator<Item = &Authorization> {
        [&self.custom, &self.deny, &self.allow, &self.told]
            .into_iter()
            .flatten()
            .map(|policy| &**policy)
    }
}

impl Authorization {
    /// `None` where the rule matches, or else where it does not.
    pub fn outcome(&self, rule: &Rule, facts: &Facts, layer: Layer<'_>) -> Option<String> {
        if self.action == Action::Allow && rule.void(layer) {
            return Some("asks for a request, and this is none".into());
        }
        rule.explain(facts, layer, self.action != Action::Allow)
    }
}
