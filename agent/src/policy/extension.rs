//! `postern.dev/v1alpha1`, compiled: which process may dial, and who may present a
//! token.

use std::{net::SocketAddr, sync::Arc};

use ipnet::IpNet;

use super::{
    compile::Wrong,
    evaluate::{Facts, PolicyRef},
    pattern::Pattern,
    schema::{ConnectAction, ConnectPolicy, ConnectRule, Presenter, TokenBinding},
};
use crate::jwt::{Claims, Confirmation};

/// A process that dials.
#[derive(Clone, Copy, Debug)]
pub struct Caller<'a> {
    /// `None` where it was gone before it could be looked at.
    pub executable: Option<&'a str>,
    pub uid: u32,
    pub destination: SocketAddr,
}

/// A compiled ConnectPolicy.
#[derive(Debug)]
pub struct Connect {
    policy: PolicyRef,
    action: ConnectAction,
    rules: Vec<Process>,
}

#[derive(Debug)]
struct Process {
    executables: (Vec<Pattern>, Vec<Pattern>),
    uids: (Vec<u32>, Vec<u32>),
    blocks: (Vec<IpNet>, Vec<IpNet>),
    ports: (Vec<u16>, Vec<u16>),
}

impl Connect {
    pub(super) fn new(policy: PolicyRef, spec: ConnectPolicy) -> Result<Self, Wrong> {
        if spec.action == ConnectAction::Deny && spec.rules.is_empty() {
            return Err(Wrong {
                field: "spec.rules",
                message: "DENY without rules never denies; `rules: [{}]` denies everything".into(),
            });
        }
        Ok(Self {
            policy,
            action: spec.action,
            rules: spec.rules.into_iter().map(Process::new).collect(),
        })
    }

    /// DENY first; where an ALLOW policy is among them, one must match.
    pub(super) fn decide(all: &[Arc<Self>], caller: &Caller<'_>) -> Result<(), PolicyRef> {
        let matching = |p: &Self| {
            let closing = p.action == ConnectAction::Deny;
            p.rules
                .iter()
                .position(|rule| rule.matches(caller, closing))
        };
        for policy in all.iter().filter(|p| p.action == ConnectAction::Deny) {
            if let Some(rule) = matching(policy) {
                return Err(policy.policy.at(rule));
            }
        }
        let mut allow = all
            .iter()
            .filter(|p| p.action == ConnectAction::Allow)
            .peekable();
        match allow.peek() {
            Some(first) => {
                let first = first.policy.clone();
                match allow.any(|p| matching(p).is_some()) {
                    true => Ok(()),
                    false => Err(first),
                }
            }
            None => Ok(()),
        }
    }
}

impl Process {
    fn new(rule: ConnectRule) -> Self {
        let patterns = |list: super::schema::List<super::schema::Text>| -> Vec<Pattern> {
            list.0.iter().map(|text| Pattern::parse(&text.0)).collect()
        };
        Self {
            executables: (patterns(rule.executables), patterns(rule.not_executables)),
            uids: (
                rule.uids.0.iter().map(|uid| uid.0).collect(),
                rule.not_uids.0.iter().map(|uid| uid.0).collect(),
            ),
            blocks: (
                rule.ip_blocks.0.iter().map(|block| block.0).collect(),
                rule.not_ip_blocks.0.iter().map(|block| block.0).collect(),
            ),
            ports: (
                rule.ports.0.iter().map(|port| port.0).collect(),
                rule.not_ports.0.iter().map(|port| port.0).collect(),
            ),
        }
    }

    /// What is not known is read so that less may connect.
    fn matches(&self, caller: &Caller<'_>, closing: bool) -> bool {
        fn accepts<T>((any, none): &(Vec<T>, Vec<T>), hit: impl Fn(&T) -> bool) -> bool {
            (any.is_empty() || any.iter().any(&hit)) && !none.iter().any(&hit)
        }
        let named = !self.executables.0.is_empty() || !self.executables.1.is_empty();
        let executable = match caller.executable {
            Some(executable) => accepts(&self.executables, |p| p.fits(executable)),
            None => closing || !named,
        };
        executable
            && accepts(&self.uids, |uid| *uid == caller.uid)
            && accepts(&self.blocks, |net| net.contains(&caller.destination.ip()))
            && accepts(&self.ports, |port| *port == caller.destination.port())
    }
}

/// A compiled TokenBinding.
#[derive(Debug)]
pub struct Binding {
    pub policy: PolicyRef,
    issuers: Vec<String>,
    presenters: Vec<Presenter>,
}

impl Binding {
    pub(super) fn new(policy: PolicyRef, spec: TokenBinding) -> Self {
        Self {
            policy,
            issuers: spec.issuers.0.into_iter().map(|text| text.0).collect(),
            presenters: spec.presenter,
        }
    }

    /// Whether the token is of another issuer, or names this peer as its owner.
    pub fn holds(&self, facts: &Facts, claims: &Claims) -> bool {
        let concerned = self.issuers.is_empty()
            || claims
                .issuer()
                .is_some_and(|iss| self.issuers.iter().any(|i| i == iss));
        let peer = facts.source.as_ref().map(ToString::to_string);
        let is_peer = |name: Option<&str>| name.is_some() && name == peer.as_deref();
        !concerned
            || self.presenters.iter().any(|presenter| match presenter {
                Presenter::Certificate => {
                    facts.certificate.is_some()
                        && claims.confirmation() == facts.certificate.map(Confirmation::Certificate)
                }
                Presenter::AuthorizedParty => is_peer(claims.presenter()),
                Presenter::Actor => is_peer(claims.actor()),
            })
    }
}
