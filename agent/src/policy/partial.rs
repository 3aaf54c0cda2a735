//! Decisions on what is only known in part: a call out of the audit log, which does not
//! say all that policies may ask for.
//!
//! Conditions stand under `and` and `or` alone (a `not` form is within its condition),
//! and among policies a match of DENY only takes away and a match of ALLOW only adds. So
//! it is enough to decide twice, by the rules of the data path: once with each open
//! condition taken the way that lets less through, once the other way. Where both come
//! to the same, no value of what is unknown could have made a difference. Where
//! conditions depend on each other this says "open" too often, never too seldom.

use super::{
    evaluate::{Address, Attribute, Condition, Facts, Layer, PolicyRef, Rule, Test, Verdict},
    selected::Selected,
};

/// What is not known of a call. Headers never are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partial {
    pub sni: bool,
    pub remote_ip: bool,
    pub method: bool,
    pub host: bool,
    pub path: bool,
    pub token: Token,
    pub lean: Lean,
}

/// What is known of a call's token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// All: there is none, or none that counts.
    None,
    /// The claims that records have.
    Recorded,
    Unknown,
}

/// How open conditions are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lean {
    Strict,
    Lenient,
}

/// Why there is no verdict: what the rule asks for is not known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{policy} asks for {}", .fields.join(", "))]
pub struct Open {
    pub policy: PolicyRef,
    pub fields: Vec<String>,
}

impl Partial {
    /// Of bytes that nobody has read.
    pub fn unread() -> Self {
        Self {
            sni: true,
            remote_ip: true,
            method: true,
            host: true,
            path: true,
            token: Token::Unknown,
            lean: Lean::Strict,
        }
    }

    /// Whether a condition takes what is not known.
    pub(super) fn hides(&self, condition: &Condition, layer: Layer<'_>) -> bool {
        let request = matches!(layer, Layer::Request(_));
        match &condition.test {
            Test::Text(attribute, _) => match attribute {
                Attribute::Principal | Attribute::Namespace | Attribute::TrustDomain => false,
                Attribute::Sni => self.sni,
                Attribute::Host | Attribute::Authority => self.host,
                Attribute::Method => self.method,
                Attribute::Header(_) => true,
                Attribute::Audiences | Attribute::Presenter => self.token == Token::Unknown,
                Attribute::Claim(path) => match self.token {
                    Token::None => false,
                    Token::Recorded => !is_recorded(path),
                    Token::Unknown => true,
                },
            },
            Test::Path(_) => self.path,
            Test::RequestPrincipal(_) => self.token == Token::Unknown,
            Test::Address(Address::Remote, _) => request && self.remote_ip,
            Test::Address(..) | Test::Account(_) | Test::Port(_) => false,
        }
    }

    /// What a hidden condition is taken for. `closing`: a match denies.
    pub(super) fn takes(&self, closing: bool) -> bool {
        closing == (self.lean == Lean::Strict)
    }

    fn leaning(self, lean: Lean) -> Self {
        Self { lean, ..self }
    }
}

/// Claims that the audit log has as the token has them.
fn is_recorded(path: &[String]) -> bool {
    let path: Vec<&str> = path.iter().map(String::as_str).collect();
    matches!(
        path[..],
        ["iss" | "sub" | "aud" | "azp" | "client_id" | "scope" | "scp"] | ["act", "sub"]
    )
}

impl Selected {
    /// DENY, then ALLOW, as far as what is known decides.
    pub fn decide_partly(
        &self,
        facts: &Facts,
        partial: Partial,
        layer: Layer<'_>,
    ) -> Result<Verdict, Open> {
        let leaning = |lean| facts.known_in_part(partial.leaning(lean));
        let (strict, lenient) = (leaning(Lean::Strict), leaning(Lean::Lenient));
        match (self.decide(&strict, layer), self.decide(&lenient, layer)) {
            (Verdict::Deny(_), Verdict::Allow(_)) => Err(self
                .first_open(&strict, &lenient, partial, layer)
                .expect("only an open condition makes a difference")),
            // What holds without any open condition is named.
            (Verdict::Deny(_), denial) => Ok(denial),
            (allowed, _) => Ok(allowed),
        }
    }

    /// CUSTOM policies that may ask a provider.
    pub fn may_ask(
        &self,
        facts: &Facts,
        partial: Partial,
        layer: Layer<'_>,
    ) -> Option<(String, PolicyRef)> {
        let strict = facts.known_in_part(partial.leaning(Lean::Strict));
        let mut providers = self.providers(&strict, layer).into_iter();
        providers
            .next()
            .map(|(provider, policy)| (provider.to_owned(), policy))
    }

    fn first_open(
        &self,
        strict: &Facts,
        lenient: &Facts,
        partial: Partial,
        layer: Layer<'_>,
    ) -> Option<Open> {
        let deny = self.deny.iter().map(|policy| (policy, true));
        let allow = self.allow.iter().map(|policy| (policy, false));
        deny.chain(allow).find_map(|(policy, closing)| {
            let (index, rule) =
                policy
                    .rules
                    .iter()
                    .enumerate()
                    .find(|(_, rule)| match closing {
                        true => rule.catches(strict, layer) && !rule.catches(lenient, layer),
                        false => rule.allows(lenient, layer) && !rule.allows(strict, layer),
                    })?;
            Some(Open {
                policy: policy.policy.at(index),
                fields: rule.hidden(partial, layer),
            })
        })
    }
}

impl Rule {
    fn hidden(&self, partial: Partial, layer: Layer<'_>) -> Vec<String> {
        let conditions = self.from.iter().chain(&self.to).chain([&self.when]);
        let mut names: Vec<String> = Vec::new();
        for condition in conditions.flatten().filter(|c| partial.hides(c, layer)) {
            if !names.iter().any(|name| *name == condition.name) {
                names.push(condition.name.clone().into_owned());
            }
        }
        names
    }
}
