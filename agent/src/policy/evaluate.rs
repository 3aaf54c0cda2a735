//! The decision. No I/O, no clock: facts in, verdict out.

use std::{borrow::Cow, fmt, net::IpAddr, net::SocketAddr, sync::Arc};

use ipnet::IpNet;
use serde::Serialize;

use super::{
    partial::Partial,
    pattern::{PathPattern, Pattern, RequestPrincipal},
};
use crate::{identity::SpiffeId, jwt::Claims, request::Request};

/// What is known of a connection when it is judged, at its destination.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Proven by mutual TLS, or by the kernel on the same node. `None`: plaintext.
    pub source: Option<SpiffeId>,
    /// Source address of the packets.
    pub source_ip: IpAddr,
    /// At the pod, after any service was resolved.
    pub destination: SocketAddr,
    /// Server name of the TLS that came, if it had one.
    pub sni: Option<String>,
    /// SHA-256 of the peer's certificate, where there is one.
    pub certificate: Option<[u8; 32]>,
    /// Of what is long past: what is not known of it. `None` on live traffic.
    pub partial: Option<Partial>,
}

impl Facts {
    pub fn new(source: Option<SpiffeId>, source_ip: IpAddr, destination: SocketAddr) -> Self {
        Self {
            source,
            source_ip,
            destination,
            sni: None,
            certificate: None,
            partial: None,
        }
    }

    /// The same, where not all is known.
    #[must_use]
    pub(super) fn known_in_part(&self, partial: Partial) -> Self {
        Self {
            partial: Some(partial),
            ..self.clone()
        }
    }

    /// The peer's identity without its scheme.
    pub fn principal(&self) -> Option<&str> {
        self.source.as_ref().map(SpiffeId::principal)
    }
}

/// What is known of a request.
#[derive(Clone, Debug)]
pub struct RequestFacts<'a> {
    pub request: &'a Request<'a>,
    /// Normalized, without query.
    pub path: &'a str,
    /// Lower case.
    pub host: &'a str,
    /// The original client, as far as proxies are trusted to tell it.
    pub remote_ip: IpAddr,
    /// Of the token that was verified.
    pub claims: Option<&'a Claims>,
}

/// What a connection carries.
#[derive(Clone, Copy, Debug)]
pub enum Layer<'a> {
    /// Nobody has looked yet: whatever its bytes could tell may be so.
    Unread,
    /// Bytes that are not read: policy that needs a request cannot be met.
    Opaque,
    Request(&'a RequestFacts<'a>),
}

/// The policy, and the rule within it, that decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PolicyRef {
    pub kind: &'static str,
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    /// Index of the rule that matched, from 0; `None` where the policy as a whole
    /// decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<usize>,
}

impl PolicyRef {
    pub fn at(&self, rule: usize) -> Self {
        Self {
            rule: Some(rule),
            ..self.clone()
        }
    }

    /// `kind/namespace/name`.
    pub fn path(&self) -> String {
        format!("{}/{}/{}", self.kind, self.namespace, self.name)
    }
}

impl fmt::Display for PolicyRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}/{}", self.kind, self.namespace, self.name)?;
        match self.rule {
            Some(rule) => write!(f, " rule {rule}"),
            None => Ok(()),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// By the policy named, or because none selects the workload.
    Allow(Option<PolicyRef>),
    Deny(Denial),
}

impl Verdict {
    /// For the one who goes on to dial.
    pub fn permit(self) -> Result<Permitted, Denial> {
        match self {
            Self::Allow(by) => Ok(Permitted { by }),
            Self::Deny(denial) => Err(denial),
        }
    }
}

/// Why something is denied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    #[error("denied by {0}")]
    Rule(PolicyRef),
    /// ALLOW policies select the workload and none matched; one of them is named.
    #[error("no ALLOW policy matched (such as {0})")]
    Implicit(PolicyRef),
    /// PeerAuthentication asks for mutual TLS.
    #[error("plaintext, and {0} is STRICT")]
    Plaintext(PolicyRef),
    /// The provider of a CUSTOM policy said no, or could not be asked.
    #[error("{0}: {1}")]
    Custom(PolicyRef, String),
    /// A token that does not hold.
    #[error("{1} ({0})")]
    Token(PolicyRef, String),
    /// A token that belongs to another than the one who presents it.
    #[error("{0}: the token is bound to another presenter")]
    Presenter(PolicyRef),
    /// Policy has come to ask for requests, which were never looked for here.
    #[error("{0} asks for requests; this connection was opened before it")]
    Unread(PolicyRef),
    /// The process may not connect.
    #[error("the process may not connect: {0}")]
    Process(PolicyRef),
}

impl Denial {
    pub fn policy(&self) -> &PolicyRef {
        match self {
            Self::Rule(policy)
            | Self::Implicit(policy)
            | Self::Plaintext(policy)
            | Self::Custom(policy, _)
            | Self::Token(policy, _)
            | Self::Presenter(policy)
            | Self::Unread(policy)
            | Self::Process(policy) => policy,
        }
    }
}

/// Proof that something was authorized: what dials the application takes one. Only
/// a [`Verdict`] makes it.
#[derive(Clone, Debug)]
pub struct Permitted {
    by: Option<PolicyRef>,
}

impl Permitted {
    /// For a probe of the node itself, which the kernel vouches for: no policy
    /// applies to it, so that STRICT does not take a pod's readiness (as Istio's
    /// ambient mode has it).
    pub fn probe() -> Self {
        Self { by: None }
    }

    /// The policy that allowed it; `None` where none selects the workload.
    pub fn by(&self) -> Option<&PolicyRef> {
        self.by.as_ref()
    }
}

/// `from`, `to` and `when` are all required; entries of the first two are
/// alternatives. Empty: all.
#[derive(Clone, Debug, Default)]
pub struct Rule {
    pub(super) from: Vec<Clause>,
    pub(super) to: Vec<Clause>,
    pub(super) when: Clause,
    /// Whether something in it is about requests.
    pub(super) http: bool,
    /// Whether the first bytes are read for it: a request, or a server's name.
    pub(super) reads: bool,
    pub(super) sni: bool,
}

/// Conditions that are all required.
pub(super) type Clause = Vec<Condition>;

/// A field or key, and the values that it may and may not have.
#[derive(Clone, Debug)]
pub(super) struct Condition {
    /// As it is written.
    pub name: Cow<'static, str>,
    pub test: Test,
}

#[derive(Clone, Debug)]
pub(super) enum Test {
    Text(Attribute, Match<Pattern>),
    Path(Match<PathPattern>),
    RequestPrincipal(Match<RequestPrincipal>),
    Account(Match<(String, String)>),
    Address(Address, Match<IpNet>),
    Port(Match<u16>),
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Attribute {
    Principal,
    Namespace,
    TrustDomain,
    Sni,
    Host,
    Authority,
    Method,
    Header(http::HeaderName),
    Audiences,
    Presenter,
    Claim(Vec<String>),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Address {
    Source,
    Remote,
    Destination,
}

/// Values of a field and of its `not` form.
#[derive(Clone, Debug)]
pub(super) struct Match<T> {
    pub any: Vec<T>,
    pub none: Vec<T>,
}

impl<T> Match<T> {
    pub fn is_empty(&self) -> bool {
        self.any.is_empty() && self.none.is_empty()
    }

    /// An absent attribute fails every positive match and passes every negative one.
    fn accepts(&self, hit: impl Fn(&T) -> bool) -> bool {
        (self.any.is_empty() || self.any.iter().any(&hit)) && !self.none.iter().any(&hit)
    }

    /// As [`Self::accepts`], where a value may be read in a narrow and in a wide
    /// sense: that one which lets less through.
    fn accepts_safely(&self, closing: bool, hit: impl Fn(&T, bool) -> bool) -> bool {
        (self.any.is_empty() || self.any.iter().any(|value| hit(value, closing)))
            && !self.none.iter().any(|value| hit(value, !closing))
    }
}

impl Rule {
    /// Under ALLOW, what is about requests voids the whole rule where there are none
    /// to read (Istio).
    pub fn allows(&self, facts: &Facts, layer: Layer<'_>) -> bool {
        !self.void(layer) && self.failure(facts, layer, false).is_none()
    }

    pub fn void(&self, layer: Layer<'_>) -> bool {
        self.http && !matches!(layer, Layer::Request(_))
    }

    /// Under every other action, what cannot be read is left out and the rest
    /// decides: it fails closed.
    pub fn catches(&self, facts: &Facts, layer: Layer<'_>) -> bool {
        self.failure(facts, layer, true).is_none()
    }

    /// Whether under DENY it takes every connection of some peer that is no HTTP.
    pub(super) fn denies_all_tcp(&self) -> bool {
        let by_port = |c: &Condition| matches!(c.test, Test::Port(_));
        let everywhere = |clause: &Clause| !clause.iter().any(by_port);
        let to = self.to.is_empty() || self.to.iter().any(everywhere);
        self.http && to && everywhere(&self.when)
    }

    /// Whether it may match a request of this connection, and asks for it.
    pub fn needs_request(&self, facts: &Facts) -> bool {
        self.reads && self.catches(facts, Layer::Unread)
    }

    /// The part that does not match. `closing`: a match denies.
    fn failure(&self, facts: &Facts, layer: Layer<'_>, closing: bool) -> Option<Failure<'_>> {
        let fails = |clause: &Clause| !clause.iter().all(|c| c.holds(facts, layer, closing));
        if !self.from.is_empty() && self.from.iter().all(fails) {
            return Some(Failure::From);
        }
        if !self.to.is_empty() && self.to.iter().all(fails) {
            return Some(Failure::To);
        }
        let when = self.when.iter().find(|c| !c.holds(facts, layer, closing));
        when.map(|condition| Failure::When(&condition.name))
    }

    /// The scopes without which it does not match, each once, where it lacks nothing
    /// else; of alternatives the first. `any_token`: what is about the token apart from
    /// scopes is taken to hold.
    pub(super) fn lacking_scopes(
        &self,
        facts: &Facts,
        layer: Layer<'_>,
        any_token: bool,
    ) -> Option<Vec<String>> {
        let holds = |c: &Condition| {
            c.holds(facts, layer, false)
                || c.scopes_but_for(layer).is_some()
                || (any_token && c.is_of_token())
        };
        let some =
            |part: &[Clause]| part.is_empty() || part.iter().any(|all| all.iter().all(holds));
        if self.void(layer) || !some(&self.from) || !some(&self.to) || !self.when.iter().all(holds)
        {
            return None;
        }
        let mut scopes: Vec<String> = Vec::new();
        for condition in self.when.iter().filter(|c| !c.holds(facts, layer, false)) {
            let alternatives = condition.scopes_but_for(layer).unwrap_or_default();
            let exact = alternatives.iter().find_map(|pattern| match pattern {
                Pattern::Exact(scope) => Some(scope),
                _ => None,
            });
            scopes.extend(exact.filter(|scope| !scopes.contains(scope)).cloned());
        }
        Some(scopes)
    }

    /// In words, per alternative, what did not match.
    pub fn explain(&self, facts: &Facts, layer: Layer<'_>, closing: bool) -> Option<String> {
        let failure = self.failure(facts, layer, closing)?;
        let clauses = match failure {
            Failure::From => &self.from,
            Failure::To => &self.to,
            Failure::When(name) => return Some(format!("when {name} does not hold")),
        };
        let part = if matches!(failure, Failure::From) {
            "from"
        } else {
            "to"
        };
        let failed: Vec<String> = clauses
            .iter()
            .enumerate()
            .filter_map(|(index, clause)| {
                let condition = clause.iter().find(|c| !c.holds(facts, layer, closing))?;
                Some(format!("{part}[{index}].{} does not match", condition.name))
            })
            .collect();
        Some(failed.join(", "))
    }
}

/// The part of a rule that did not match.
pub(super) enum Failure<'a> {
    From,
    To,
    When(&'a str),
}

impl Condition {
    pub fn is_http(&self) -> bool {
        match &self.test {
            Test::Text(attribute, _) => !matches!(
                attribute,
                Attribute::Principal
                    | Attribute::Namespace
                    | Attribute::TrustDomain
                    | Attribute::Sni
            ),
            Test::Path(_) | Test::RequestPrincipal(_) => true,
            Test::Account(_) | Test::Address(..) | Test::Port(_) => false,
        }
    }

    /// Whether it is about the token.
    fn is_of_token(&self) -> bool {
        match &self.test {
            Test::Text(attribute, _) => matches!(
                attribute,
                Attribute::Audiences | Attribute::Presenter | Attribute::Claim(_)
            ),
            Test::RequestPrincipal(_) => true,
            _ => false,
        }
    }

    /// Where it asks for a scope, and no other scope stands against it: the scopes, of
    /// which each would do.
    fn scopes_but_for(&self, layer: Layer<'_>) -> Option<&[Pattern]> {
        let Test::Text(Attribute::Claim(path), values) = &self.test else {
            return None;
        };
        let is_scope = matches!(path.as_slice(), [name] if name == "scope" || name == "scp");
        let Layer::Request(request) = layer else {
            return None;
        };
        let claims = request.claims;
        let own = claims.map(|c| c.values(path)).unwrap_or_default();
        let against = |pattern: &Pattern| own.iter().any(|value| pattern.fits(value));
        let fits = is_scope && !values.any.is_empty() && !values.none.iter().any(against);
        fits.then_some(&values.any)
    }

    pub fn is_remote(&self) -> bool {
        matches!(self.test, Test::Address(Address::Remote, _))
    }

    pub fn is_sni(&self) -> bool {
        matches!(self.test, Test::Text(Attribute::Sni, _))
    }

    fn holds(&self, facts: &Facts, layer: Layer<'_>, closing: bool) -> bool {
        let request = match layer {
            Layer::Unread if self.is_remote() || self.is_sni() => return true,
            // Left out; under ALLOW the whole rule is void already.
            Layer::Unread | Layer::Opaque if self.is_http() => return true,
            Layer::Unread | Layer::Opaque => None,
            Layer::Request(request) => Some(request),
        };
        if let Some(partial) = &facts.partial
            && partial.hides(self, layer)
        {
            return partial.takes(closing);
        }
        match &self.test {
            Test::Text(attribute, values) => {
                values.accepts_safely(closing, |p, wide| attribute.fits(p, facts, request, wide))
            }
            Test::Path(values) => values.accepts(|path| request.is_some_and(|r| path.fits(r.path))),
            Test::RequestPrincipal(values) => {
                let principal = request.and_then(|r| r.claims?.principal());
                values.accepts(|value| principal.is_some_and(|(iss, sub)| value.fits(iss, sub)))
            }
            Test::Account(values) => values.accepts(|(namespace, name)| {
                facts
                    .source
                    .as_ref()
                    .is_some_and(|id| id.namespace == *namespace && id.service_account == *name)
            }),
            Test::Address(which, values) => {
                let ip = match which {
                    Address::Source => facts.source_ip,
                    // On raw TCP nobody can tell of another client.
                    Address::Remote => request.map_or(facts.source_ip, |r| r.remote_ip),
                    Address::Destination => facts.destination.ip(),
                };
                values.accepts(|net| net.contains(&ip))
            }
            Test::Port(values) => values.accepts(|port| *port == facts.destination.port()),
        }
    }
}

impl Attribute {
    /// Whether the attribute, or one of its values, fits. A header that is repeated is
    /// one string (Istio); in the wide sense it is each of its values, too, so that
    /// none can hide behind another (Envoy, CVE-2026-26308).
    fn fits(
        &self,
        pattern: &Pattern,
        facts: &Facts,
        request: Option<&RequestFacts<'_>>,
        wide: bool,
    ) -> bool {
        let of_peer = |value: Option<&str>| value.is_some_and(|v| pattern.fits(v));
        let id = facts.source.as_ref();
        match self {
            Self::Principal => return of_peer(facts.principal()),
            Self::Namespace => return of_peer(id.map(|id| id.namespace.as_str())),
            Self::TrustDomain => return of_peer(id.map(|id| id.trust_domain.as_str())),
            Self::Sni => return of_peer(facts.sni.as_deref()),
            _ => {}
        }
        let Some(request) = request else {
            return false;
        };
        let claims = request.claims;
        match self {
            Self::Host => pattern.fits(request.host),
            Self::Authority => pattern.fits(request.request.host),
            Self::Method => pattern.fits(request.request.method),
            // `*` is the header's presence, also with an empty value (Istio).
            Self::Header(name) => {
                let fits = |value: &str| *pattern == Pattern::Any || pattern.fits(value);
                request
                    .request
                    .header(name)
                    .is_some_and(|value| fits(&value))
                    || (wide && request.request.values(name).any(|value| fits(&value)))
            }
            Self::Audiences => {
                claims.is_some_and(|c| c.audiences().iter().any(|a| pattern.fits(a)))
            }
            Self::Presenter => claims
                .and_then(Claims::presenter)
                .is_some_and(|p| pattern.fits(p)),
            Self::Claim(path) => {
                claims.is_some_and(|c| c.values(path).iter().any(|v| pattern.fits(v)))
            }
            Self::Principal | Self::Namespace | Self::TrustDomain | Self::Sni => false,
        }
    }
}
