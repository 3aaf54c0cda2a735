//! Calls that were made once, as the audit log has them, judged by other policies: in
//! the order of this module's requests and connections, without providers, keys and
//! tokens. What depends on them, or on anything that is not recorded, is not decided.

use crate::{
    jwt::{Claims, TokenError},
    policy::{
        Denial, Facts, Layer, Partial, PolicyRef, RequestFacts, Selected, Token, Verdict, normalize,
    },
    request::Request,
};

/// What is known of what was carried.
#[derive(Debug)]
pub enum Carried {
    /// Nobody looked.
    Unread,
    /// Somebody looked: no HTTP.
    Raw,
    Request(PastRequest),
}

/// A request that was made. `None`: not recorded, or not in full.
#[derive(Debug)]
pub struct PastRequest {
    pub method: Option<String>,
    pub host: Option<String>,
    /// As sent, without its query.
    pub path: Option<String>,
    pub token: PastToken,
}

#[derive(Debug)]
pub enum PastToken {
    /// Somebody looked where tokens stand, and there was none.
    Absent,
    /// Nobody looked, or it did not hold.
    Unknown,
    Verified {
        claims: Box<Claims>,
        /// To a key or a certificate.
        bound: bool,
        /// By its issuer, not by its signature.
        introspected: bool,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// By the policy named, or because none selects the workload.
    Allow(Option<PolicyRef>),
    Deny(Denial),
    /// For its form, whatever policy says.
    Malformed(String),
    Undecidable(String),
}

/// Judges a connection, or one request of it.
pub fn judge(selected: &Selected, facts: &Facts, carried: &Carried) -> Outcome {
    if let Err(denial) = selected.transport(facts) {
        return Outcome::Deny(denial);
    }
    if selected.needs_request(facts).is_none() {
        // Nobody would read it: nothing else is asked for.
        let nothing = selected.providers(facts, Layer::Opaque).into_iter().next();
        return match nothing {
            Some((provider, policy)) => asks(provider, &policy),
            None => selected.decide(facts, Layer::Opaque).into(),
        };
    }
    match carried {
        Carried::Request(request) => read(selected, facts, request),
        Carried::Raw => settled(selected, facts, Partial::unread(), Layer::Opaque),
        Carried::Unread => unread(selected, facts),
    }
}

/// A connection that would be read, and was not: HTTP, or not.
fn unread(selected: &Selected, facts: &Facts) -> Outcome {
    let raw = settled(selected, facts, Partial::unread(), Layer::Opaque);
    let any = PastRequest {
        method: None,
        host: None,
        path: None,
        token: PastToken::Unknown,
    };
    match (raw, read(selected, facts, &any)) {
        (Outcome::Deny(denial), Outcome::Deny(_)) => Outcome::Deny(denial),
        (Outcome::Allow(by), Outcome::Allow(_)) => Outcome::Allow(by),
        (Outcome::Undecidable(why), _) | (_, Outcome::Undecidable(why)) => {
            Outcome::Undecidable(format!("{why}, and the connection was not read"))
        }
        _ => Outcome::Undecidable("the connection was not read: it may be HTTP or not".into()),
    }
}

fn read(selected: &Selected, facts: &Facts, past: &PastRequest) -> Outcome {
    if let Err(denial) = selected.contested() {
        return Outcome::Deny(denial);
    }
    let path = match past.path.as_deref() {
        Some(path) => match normalize(path, selected.reading.normalization) {
            Ok(normal) => normal.path,
            Err(bad) => return Outcome::Malformed(bad.to_string()),
        },
        None => "/".into(),
    };
    let method = past.method.as_deref().unwrap_or_default();
    if let Some(resource) = selected.resource() {
        if past.path.is_none() || past.method.is_none() {
            return Outcome::Undecidable(format!("{} answers some paths itself", resource.policy));
        }
        if resource.metadata(method, &path).is_some() {
            return Outcome::Allow(Some(resource.policy.clone()));
        }
    }
    let host = past.host.as_deref().unwrap_or_default();
    let request = Request {
        method,
        path: &path,
        host,
        headers: Vec::new(),
    };
    let host = host.to_lowercase();
    let about = |claims| RequestFacts {
        request: &request,
        path: &path,
        host: &host,
        remote_ip: facts.source_ip,
        claims,
    };
    let partial = |token| Partial {
        // Of HTTP no server's name is read.
        sni: false,
        remote_ip: selected.reading.trusted_proxies > 0,
        method: past.method.is_none(),
        host: past.host.is_none(),
        path: past.path.is_none(),
        token,
        ..Partial::unread()
    };
    let anonymous = about(None);
    let layer = Layer::Request(&anonymous);
    if let Some((provider, policy)) = selected.may_ask(facts, partial(Token::None), layer) {
        return asks(&provider, &policy);
    }
    match sender(selected, &past.token) {
        Sender::Nobody => settled(selected, facts, partial(Token::None), layer),
        Sender::Known { claims, bound } => {
            if let Err(denial) = selected.presenter(facts, claims) {
                return match bound {
                    true => Outcome::Undecidable(format!(
                        "{} asks to what the token is bound",
                        denial.policy()
                    )),
                    false => Outcome::Deny(denial),
                };
            }
            let known = about(Some(claims));
            settled(
                selected,
                facts,
                partial(Token::Recorded),
                Layer::Request(&known),
            )
        }
        Sender::Refused(denial) => Outcome::Deny(denial),
        // Refused for its token or for anything else, it is refused.
        Sender::Unknown(why) => match settled(selected, facts, partial(Token::Unknown), layer) {
            denied @ Outcome::Deny(_) => denied,
            _ => Outcome::Undecidable(why),
        },
    }
}

fn settled(selected: &Selected, facts: &Facts, partial: Partial, layer: Layer<'_>) -> Outcome {
    if matches!(layer, Layer::Opaque)
        && let Some((provider, policy)) = selected.may_ask(facts, partial, layer)
    {
        return asks(&provider, &policy);
    }
    match selected.decide_partly(facts, partial, layer) {
        Ok(verdict) => verdict.into(),
        Err(open) => Outcome::Undecidable(open.to_string()),
    }
}

fn asks(provider: &str, policy: &PolicyRef) -> Outcome {
    Outcome::Undecidable(format!("{policy} asks the provider {provider}"))
}

/// Who the sender is by its token, in the eyes of these policies.
enum Sender<'a> {
    Nobody,
    Known { claims: &'a Claims, bound: bool },
    Refused(Denial),
    Unknown(String),
}

fn sender<'a>(selected: &Selected, token: &'a PastToken) -> Sender<'a> {
    let rules = selected.tokens();
    let resource = selected.resource();
    let introspects = resource.is_some_and(|resource| resource.introspection.is_some());
    if rules.is_empty() && !introspects {
        return Sender::Nobody;
    }
    let by = match (resource, rules.is_empty()) {
        (Some(resource), true) => resource.policy.clone(),
        _ => selected.token_policy(0).clone(),
    };
    let (claims, bound) = match token {
        PastToken::Absent => return Sender::Nobody,
        PastToken::Unknown => {
            return Sender::Unknown(format!(
                "{by} asks for tokens, and it is not recorded whether there was one"
            ));
        }
        PastToken::Verified {
            claims,
            bound,
            introspected,
        } => {
            if *introspected {
                return Sender::Unknown(format!("{by}: the token was known by introspection only"));
            }
            (claims, *bound)
        }
    };
    if let Some(resource) = resource
        && (bound || !resource.takes_what_rules_take())
    {
        return Sender::Unknown(format!(
            "{} asks how the token was sent, or its issuer",
            resource.policy
        ));
    }
    let of_issuer = |issuer: Option<&str>| issuer.is_some() && issuer == claims.issuer();
    let mut own = (rules.iter().enumerate())
        .filter(|(_, rule)| of_issuer(rule.wanted.issuer()))
        .peekable();
    let Some((index, _)) = own.peek().copied() else {
        let issuer = claims.issuer().unwrap_or("an issuer without name");
        return Sender::Unknown(format!(
            "{by}: no rule is for tokens of {issuer}, and it is not recorded where this one stood"
        ));
    };
    if own.any(|(_, rule)| rule.takes_audience_of(claims)) {
        return Sender::Known { claims, bound };
    }
    if rules.iter().any(|rule| rule.wanted.issuer().is_none()) {
        return Sender::Unknown(format!("{by} takes tokens of any issuer whose keys fit"));
    }
    let policy = selected.token_policy(index).clone();
    Sender::Refused(Denial::Token(policy, TokenError::Audience.to_string()))
}

impl From<Verdict> for Outcome {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Allow(by) => Self::Allow(by),
            Verdict::Deny(denial) => Self::Deny(denial),
        }
    }
}
