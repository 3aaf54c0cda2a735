//! The jwtRules of the RequestAuthentications that select a workload, against one
//! request.

use std::{
    borrow::{Borrow, Cow},
    sync::Arc,
    time::SystemTime,
};

use http::{HeaderName, Method, header};

use super::{
    cache::{Fingerprint, VerifiedTokens, Wanted},
    claims::Claims,
    headers::{put_out, remove, without_spoofed},
    keys::KeySet,
    locate::{Found, Locations, Place, without_parameters},
    outcome::{Outcome, Refusal, Verified},
    source::RemoteKeys,
    verify::{Expected, MAX_TOKEN, Token, TokenError, audience_fits, object},
};
use crate::request::{Edits, Request};

/// Tokens that one rule checks of a request. Each costs signature checks, and a query
/// can hold hundreds.
const MAX_TOKENS: usize = 8;
/// What some issuers have instead of `scope`: a string of words, or a list.
pub const SCP: &str = "scp";

/// One jwtRule, compiled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub wanted: Wanted,
    pub locations: Locations,
    /// Whether the application gets the token, too.
    pub forward_original: bool,
    /// Gets the payload as it stands in the token, base64url.
    pub payload_to_header: Option<HeaderName>,
    /// Headers, and the path to the claim that each gets.
    pub claims_to_headers: Vec<(HeaderName, Vec<String>)>,
    pub keys: KeySource,
}

impl Rule {
    /// Whether a token is for one of its audiences.
    pub fn takes_audience_of(&self, claims: &Claims) -> bool {
        audience_fits(self.wanted.audiences(), &claims.audiences())
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum KeySource {
    Inline(Arc<KeySet>),
    Remote(RemoteKeys),
}

/// Judges a request by all rules of its workload.
///
/// It passes if no rule finds a token, or if one rule verifies every token that it
/// finds and no token is left that no rule verifies. The first such rule gives the
/// claims. Rules of one issuer are alternatives. What is not proven is refused with the
/// error of the token that came farthest.
///
/// `keys` hands out what is known of an issuer's keys now, and does not wait.
pub fn authenticate<R: Borrow<Rule>>(
    rules: &[R],
    request: &Request<'_>,
    now: SystemTime,
    keys: impl Fn(&RemoteKeys) -> Option<Arc<KeySet>>,
    cache: Option<&VerifiedTokens>,
) -> Outcome {
    authenticate_for(Demands::default(), rules, request, now, keys, cache)
}

/// What a protected resource asks of tokens beside the rules.
#[derive(Clone, Copy, Debug, Default)]
pub struct Demands {
    /// Only access tokens by their own word (RFC 9068).
    pub access_tokens: bool,
    /// `scp` is a list like `scope`.
    pub scp: bool,
}

/// As [`authenticate`], for a protected resource.
pub fn authenticate_for<R: Borrow<Rule>>(
    demands: Demands,
    rules: &[R],
    request: &Request<'_>,
    now: SystemTime,
    keys: impl Fn(&RemoteKeys) -> Option<Arc<KeySet>>,
    cache: Option<&VerifiedTokens>,
) -> Outcome {
    let rules: Vec<&Rule> = rules.iter().map(Borrow::borrow).collect();
    let mut edits = without_spoofed(&rules);
    if is_preflight(request) {
        return Outcome::Anonymous(edits);
    }
    let judge = Judge {
        demands,
        now,
        keys,
        cache,
    };
    let mut judged = Vec::new();
    for (index, rule) in rules.iter().enumerate() {
        let all = rule.locations.find(request);
        let too_many = all.len() > MAX_TOKENS;
        for found in all {
            let verdict = match too_many {
                true => Err(TokenError::TooMany),
                false => judge.judge(rule, &found),
            };
            judged.push(Judged {
                rule: index,
                found,
                verdict,
            });
        }
    }
    if judged.is_empty() {
        return Outcome::Anonymous(edits);
    }
    let settled = |place: &Place| {
        judged
            .iter()
            .any(|j| j.found.place == *place && j.is_good())
    };
    let winner = judged
        .iter()
        .find(|j| judged.iter().all(|o| o.rule != j.rule || o.is_good()));
    let (Some(winner), true) = (winner, judged.iter().all(|j| settled(&j.found.place))) else {
        // With a winner, what is wrong is a token that nobody verified.
        let to_blame = |j: &&Judged<'_>| winner.is_none() || !settled(&j.found.place);
        return Outcome::Refused(refusal(&rules, judged.iter().filter(to_blame)));
    };
    take_out_tokens(&rules, &judged, winner.rule, request, &mut edits);
    let claims = winner.claims().expect("a winner has only good tokens");
    put_out(rules[winner.rule], &winner.found.text, claims, &mut edits);
    Outcome::Verified(Verified {
        claims: claims.clone(),
        rule: winner.rule,
        expires: judged
            .iter()
            .filter(|j| j.rule == winner.rule)
            .filter_map(|j| j.claims()?.expires())
            .min(),
        edits,
    })
}

/// What some rule takes for a token, each place once, and whether that is
/// `Authorization`. None of a preflight.
pub fn presented<'a, R: Borrow<Rule>>(
    rules: &[R],
    request: &Request<'a>,
) -> Vec<(bool, Cow<'a, str>)> {
    if is_preflight(request) {
        return Vec::new();
    }
    let mut all: Vec<Found<'a>> = Vec::new();
    for found in rules
        .iter()
        .flat_map(|rule| rule.borrow().locations.find(request))
    {
        if all.iter().all(|other| other.place != found.place) {
            all.push(found);
        }
    }
    let in_header = |place: &Place| *place == Place::Header(header::AUTHORIZATION);
    (all.into_iter())
        .map(|found| (in_header(&found.place), found.text))
        .collect()
}

/// What the application is told of a token that its issuer was asked about: the
/// headers that the first rule of that issuer makes of claims.
pub fn put_out_introspected<R: Borrow<Rule>>(rules: &[R], claims: &Claims, edits: &mut Edits) {
    let own = |rule: &&Rule| {
        let issuer = rule.wanted.issuer();
        issuer.is_some() && issuer == claims.issuer()
    };
    if let Some(rule) = rules.iter().map(Borrow::borrow).find(own) {
        let rule = Rule {
            // There is no such payload.
            payload_to_header: None,
            ..rule.clone()
        };
        put_out(&rule, "", claims, edits);
    }
}

/// Whether a token says of itself that it is a JWT: three parts, the first of them an
/// object with an algorithm. Nothing of it is proven.
pub fn is_jwt(token: &str) -> bool {
    let mut parts = token.split('.');
    let header = parts.next().unwrap_or_default();
    parts.count() == 2
        && token.len() <= MAX_TOKEN
        && object(header, TokenError::Header).is_ok_and(|header| header.contains_key("alg"))
}

/// A token in the eyes of one rule.
struct Judged<'a> {
    rule: usize,
    found: Found<'a>,
    verdict: Result<Arc<Claims>, TokenError>,
}

impl Judged<'_> {
    fn is_good(&self) -> bool {
        self.verdict.is_ok()
    }

    fn claims(&self) -> Option<&Arc<Claims>> {
        self.verdict.as_ref().ok()
    }
}

struct Judge<'a, K> {
    demands: Demands,
    now: SystemTime,
    keys: K,
    cache: Option<&'a VerifiedTokens>,
}

impl<K: Fn(&RemoteKeys) -> Option<Arc<KeySet>>> Judge<'_, K> {
    fn judge(&self, rule: &Rule, found: &Found<'_>) -> Result<Arc<Claims>, TokenError> {
        let claims = self.verify(rule, found)?;
        // Not of what is cached: others may take the token as it is.
        if self.demands.access_tokens {
            claims.check_access_token()?;
        }
        Ok(claims)
    }

    fn verify(&self, rule: &Rule, found: &Found<'_>) -> Result<Arc<Claims>, TokenError> {
        let token = &*found.text;
        // Before it is hashed.
        if token.len() > MAX_TOKEN {
            return Err(TokenError::TooLarge);
        }
        let keys = match &rule.keys {
            KeySource::Inline(keys) => Some(keys.clone()),
            KeySource::Remote(remote) => (self.keys)(remote),
        };
        let verify = || {
            let mut space_delimited = Cow::Borrowed(rule.wanted.space_delimited());
            if self.demands.scp {
                space_delimited.to_mut().push(SCP.to_owned());
            }
            let expected = Expected {
                issuer: rule.wanted.issuer(),
                audiences: rule.wanted.audiences(),
                space_delimited: &space_delimited,
            };
            Token::parse(token)?.verify(expected, keys.as_deref(), self.now)
        };
        let (Some(cache), Some(keys)) = (self.cache, &keys) else {
            return verify().map(Arc::new);
        };
        let fingerprint = Fingerprint::new(token, &rule.wanted, self.demands.scp, keys);
        if let Some(claims) = cache.get(&fingerprint) {
            return claims.check_time(self.now).map(|()| claims);
        }
        let claims = Arc::new(verify()?);
        cache.put(fingerprint, token, claims.clone());
        Ok(claims)
    }
}

/// Fetch, "CORS-preflight request". Browsers send it without credentials.
pub fn is_preflight(request: &Request<'_>) -> bool {
    let has = |name| request.header(&name).is_some_and(|value| !value.is_empty());
    request.method == Method::OPTIONS.as_str()
        && has(header::ORIGIN)
        && has(header::ACCESS_CONTROL_REQUEST_METHOD)
}

/// Of all tokens, unless the rule that verified it says to forward it: the winner if it
/// is one of its own, else the first.
fn take_out_tokens(
    rules: &[&Rule],
    judged: &[Judged<'_>],
    winner: usize,
    request: &Request<'_>,
    edits: &mut Edits,
) {
    let mut parameters = Vec::new();
    for (index, one) in judged.iter().enumerate() {
        let same_place = |j: &&Judged<'_>| j.found.place == one.found.place;
        if judged[..index].iter().any(|j| same_place(&j)) {
            continue;
        }
        let good = || judged.iter().filter(same_place).filter(|j| j.is_good());
        let owner = good().find(|j| j.rule == winner).or_else(|| good().next());
        if owner.is_some_and(|owner| rules[owner.rule].forward_original) {
            continue;
        }
        match &one.found.place {
            Place::Header(name) => remove(edits, name),
            Place::Param(index) => parameters.push(*index),
            // As Istio has it; a cookie is the application's session as well.
            Place::Cookie(_) => {}
        }
    }
    if !parameters.is_empty() {
        edits.path = Some(without_parameters(request.path, &parameters));
    }
}

fn refusal<'a>(rules: &[&Rule], to_blame: impl Iterator<Item = &'a Judged<'a>>) -> Refusal {
    let mut refusal: Option<Refusal> = None;
    let mut refetch = Vec::new();
    for judged in to_blame {
        let Err(error) = judged.verdict else {
            continue;
        };
        if let (true, KeySource::Remote(remote)) = (error.may_be_stale(), &rules[judged.rule].keys)
            && !refetch.contains(remote)
        {
            refetch.push(remote.clone());
        }
        if refusal
            .as_ref()
            .is_none_or(|known| known.error.stage() < error.stage())
        {
            refusal = Some(Refusal {
                error,
                rule: judged.rule,
                refetch: Vec::new(),
            });
        }
    }
    let mut refusal = refusal.expect("where nothing is wrong, a rule wins");
    refusal.refetch = refetch;
    refusal
}
