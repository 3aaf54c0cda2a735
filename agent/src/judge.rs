//! The order in which connections and requests are judged (Istio): mutual TLS, then
//! CUSTOM, then tokens, then DENY, then ALLOW. The same code for the data path and
//! for `postern policy eval`.

mod bearer;
mod nonce;
pub mod past;
mod replay;

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{HeaderName, HeaderValue, StatusCode, header};
use zeroize::Zeroizing;

use crate::{
    authorizer::{AuthorizerError, Authorizers, Check, Decision},
    config::Config,
    fetch::RootsError,
    identity::{Credentials, SpiffeId},
    introspect::{Endpoint, Introspected, Introspector},
    jwt::{
        self, Claims, KeyStore, LEEWAY, Options, Outcome, RemoteKeys, TokenError, VerifiedTokens,
    },
    policy::{
        Denial, Facts, Layer, Permitted, PolicyRef, RequestFacts, Scheme, Selected, normalize,
    },
    request::{Edits, Reply, Request},
};
use nonce::Nonces;
use replay::Replays;

/// What deciding needs beside policy: keys, and providers to ask.
pub struct Judge {
    pub keys: KeyStore,
    pub authorizers: Authorizers,
    pub verified: VerifiedTokens,
    /// `None`: nobody is asked, and what needs it is refused.
    pub introspector: Option<Introspector>,
    replays: Replays,
    nonces: Nonces,
}

/// The workload that a request is for, as far as it is known here.
#[derive(Clone, Copy, Default)]
pub struct Destination<'a> {
    pub identity: Option<&'a SpiffeId>,
    /// What authorization servers are asked with.
    pub credentials: Option<&'a Arc<Credentials>>,
}

#[derive(Debug, thiserror::Error)]
pub enum JudgeError {
    #[error("jwt.roots: {0}")]
    Roots(#[from] RootsError),
    #[error("policies.extensionProviders: {0}")]
    Providers(#[from] AuthorizerError),
    #[error("the system has no randomness")]
    Randomness,
}

/// A request that may go on.
#[derive(Debug)]
pub struct Allowed {
    pub permitted: Permitted,
    pub edits: Edits,
    /// Those of the edits that providers made, which the rest was judged with.
    pub by_providers: Edits,
    pub claims: Option<Arc<Claims>>,
    /// When its token no longer holds.
    pub expires: Option<SystemTime>,
    /// Policies without effect that have something to say.
    pub told: Vec<PolicyRef>,
}

/// A request that is refused, and what is answered.
#[derive(Debug)]
pub struct Refused {
    pub why: Why,
    pub reply: Reply,
    pub claims: Option<Arc<Claims>>,
}

#[derive(Debug, thiserror::Error)]
pub enum Why {
    #[error("{0}")]
    Malformed(String),
    #[error(transparent)]
    Denied(Denial),
    /// Not refused: the agent itself has the answer.
    #[error("answered by {0}")]
    Answered(PolicyRef),
}

/// What is judged, at one moment. The path is normalized.
struct Asked<'a> {
    selected: &'a Selected,
    facts: &'a Facts,
    request: &'a Request<'a>,
    path: &'a str,
    now: SystemTime,
}

#[derive(Clone, Copy)]
enum Stage<'a> {
    /// The request comes. What its token's issuer said, once it was asked.
    New(Option<&'a Introspected>),
    /// It runs, and was let pass with these claims.
    Running(Option<&'a Arc<Claims>>),
}

/// Who the sender is by its token.
struct Identified {
    edits: Edits,
    claims: Option<Arc<Claims>>,
    /// Leeway not included.
    expires: Option<SystemTime>,
    scheme: Scheme,
    /// That must not have been used before, and until when it could be.
    proof: Option<([u8; 32], u64)>,
}

/// What became of a request without waiting for anything.
struct Settled {
    permitted: Permitted,
    edits: Edits,
    claims: Option<Arc<Claims>>,
    expires: Option<SystemTime>,
    told: Vec<PolicyRef>,
    proof: Option<([u8; 32], u64)>,
}

/// A refusal, and what might make a difference to it.
struct Unsettled {
    refused: Box<Refused>,
    /// Where newer keys may come from.
    sources: Vec<RemoteKeys>,
    /// Nobody could say.
    unavailable: bool,
    /// The token about which its issuer is to be asked first.
    introspect: Option<(Arc<Endpoint>, Zeroizing<String>)>,
}

impl From<Refused> for Unsettled {
    fn from(refused: Refused) -> Self {
        Self {
            refused: Box::new(refused),
            sources: Vec::new(),
            unavailable: false,
            introspect: None,
        }
    }
}

impl Refused {
    fn malformed(status: StatusCode, why: String) -> Self {
        Self {
            reply: Reply::new(status, why.clone()),
            why: Why::Malformed(why),
            claims: None,
        }
    }

    /// A document that anyone may have, as JSON.
    fn answered(by: PolicyRef, document: &str) -> Self {
        let mut reply = Reply::new(StatusCode::OK, document.to_owned());
        let json = HeaderValue::from_static("application/json");
        let fresh = HeaderValue::from_static("max-age=300");
        reply.headers.push((header::CONTENT_TYPE, json));
        reply.headers.push((header::CACHE_CONTROL, fresh));
        Self {
            why: Why::Answered(by),
            reply,
            claims: None,
        }
    }

    /// As Istio answers.
    fn denied(denial: Denial) -> Self {
        Self {
            why: Why::Denied(denial),
            reply: Reply::new(StatusCode::FORBIDDEN, "RBAC: access denied"),
            claims: None,
        }
    }
}

/// How long a first fetch of keys may hold up a request.
const FIRST_FETCH: Duration = Duration::from_secs(5);

impl Judge {
    /// To be called within a runtime: keys are fetched by tasks.
    pub fn new(config: &Config) -> Result<Self, JudgeError> {
        let jwt = &config.jwt;
        let mut files: HashMap<_, _> = jwt.files.clone().into_iter().collect();
        if config.identity.authority.is_none() {
            // The embedded issuer's own JWT-SVIDs.
            let issuer = files.entry(config.jwt_issuer());
            issuer.or_insert_with(|| config.jwks_file());
        }
        Ok(Self {
            keys: KeyStore::new(Options {
                refresh: jwt.refresh.0,
                keep: jwt.keep.0,
                refetch_interval: jwt.refetch_interval.0,
                roots: jwt.roots.clone(),
                files,
            })?,
            authorizers: Authorizers::new(config.policies.extension_providers.clone())?,
            verified: VerifiedTokens::default(),
            introspector: Some(Introspector::new(jwt.roots.as_deref())?),
            replays: Replays::default(),
            nonces: Nonces::new().map_err(|_| JudgeError::Randomness)?,
        })
    }

    /// Judges a connection whose bytes are not read.
    pub async fn connection(
        &self,
        selected: &Selected,
        facts: &Facts,
        identity: Option<&SpiffeId>,
        source: SocketAddr,
    ) -> Result<Permitted, Denial> {
        selected.transport(facts)?;
        let providers = selected.providers(facts, Layer::Opaque);
        self.ask(&providers, facts, identity, source, None)
            .await
            .map_err(|(denial, _)| denial)?;
        selected.decide(facts, Layer::Opaque).permit()
    }

    /// Judges one request.
    pub async fn request(
        &self,
        selected: &Selected,
        facts: &Facts,
        own: Destination<'_>,
        source: SocketAddr,
        request: &Request<'_>,
        now: SystemTime,
    ) -> Result<Allowed, Refused> {
        selected.transport(facts).map_err(Refused::denied)?;
        selected.contested().map_err(Refused::denied)?;
        let normal = normalize(request.path, selected.reading.normalization)
            .map_err(|bad| Refused::malformed(StatusCode::BAD_REQUEST, bad.to_string()))?;
        if let Some(resource) = selected.resource()
            && let Some(metadata) = resource.metadata(request.method, &normal.path)
        {
            return Err(Refused::answered(resource.policy.clone(), metadata));
        }
        let target = normal.target();
        let as_sent = Request {
            path: &target,
            ..request.clone()
        };
        let about = RequestFacts {
            request: &as_sent,
            path: &normal.path,
            host: &as_sent.host.to_lowercase(),
            remote_ip: remote_ip(&as_sent, facts.source_ip, selected.reading.trusted_proxies),
            claims: None,
        };
        let providers = selected.providers(facts, Layer::Request(&about));
        let by_providers = self
            .ask(&providers, facts, own.identity, source, Some(&as_sent))
            .await
            .map_err(|(denial, reply)| Refused {
                reply: reply.unwrap_or_else(|| Refused::denied(denial.clone()).reply),
                why: Why::Denied(denial),
                claims: None,
            })?;
        // What comes next sees what they made of it.
        let asked = Request {
            headers: by_providers.headers(&as_sent),
            ..as_sent.clone()
        };
        let asked = Asked {
            selected,
            facts,
            request: &asked,
            path: &normal.path,
            now,
        };
        let Settled {
            permitted,
            edits,
            claims,
            expires,
            told,
            proof,
        } = self.settle_at_last(&asked, own).await?;
        if let Some(proof) = proof {
            self.first_use(&asked, proof, claims.as_ref())
                .map_err(|refused| *refused)?;
        }
        let mut all = by_providers.clone();
        merge(&mut all, edits);
        if all.path.is_none() && target != request.path {
            all.path = Some(target.clone());
        }
        Ok(Allowed {
            permitted,
            edits: all,
            by_providers,
            claims,
            expires,
            told,
        })
    }

    /// Waits for what may make a difference, once each: keys, and what an issuer says of
    /// a token.
    async fn settle_at_last(
        &self,
        asked: &Asked<'_>,
        own: Destination<'_>,
    ) -> Result<Settled, Refused> {
        let mut told: Option<Introspected> = None;
        let mut fetched = false;
        loop {
            let unsettled = match self.settle(asked, Stage::New(told.as_ref())) {
                Ok(settled) => return Ok(settled),
                Err(unsettled) => unsettled,
            };
            match (&unsettled.introspect, &self.introspector) {
                (Some((endpoint, token)), Some(introspector)) if told.is_none() => {
                    let asks = introspector.ask(endpoint, own.credentials, token, asked.now);
                    told = Some(asks.await);
                }
                // The issuer may have a new key, or none was fetched yet.
                _ if !unsettled.sources.is_empty() && !fetched => {
                    fetched = true;
                    for from in &unsettled.sources {
                        let had = self.keys.get(from).is_some();
                        if had || self.keys.ready(from, FIRST_FETCH).await.is_none() {
                            self.keys.refetch(from).await;
                        }
                    }
                }
                _ => return Err(*unsettled.refused),
            }
        }
    }

    /// Why a request that runs is no longer allowed, if it is not. Its head is as the
    /// providers left it, and its claims are those that it was allowed with; nobody is
    /// asked again, and no keys are waited for.
    pub fn no_longer(
        &self,
        selected: &Selected,
        facts: &Facts,
        request: &Request<'_>,
        claims: Option<&Arc<Claims>>,
        now: SystemTime,
    ) -> Option<Denial> {
        if let Err(denial) = selected
            .transport(facts)
            .and_then(|()| selected.contested())
        {
            return Some(denial);
        }
        // It was a path when the request was judged.
        let normal = normalize(request.path, selected.reading.normalization).ok()?;
        let asked = Asked {
            selected,
            facts,
            request,
            path: &normal.path,
            now,
        };
        let unsettled = self
            .settle(&asked, Stage::Running(claims))
            .err()
            .filter(|unsettled| !unsettled.unavailable)?;
        match unsettled.refused.why {
            Why::Denied(denial) => Some(denial),
            Why::Malformed(_) | Why::Answered(_) => None,
        }
    }

    /// Tokens, then DENY, then ALLOW, with the keys that are at hand. Policy sees the
    /// head that the application gets.
    fn settle(&self, asked: &Asked<'_>, stage: Stage<'_>) -> Result<Settled, Unsettled> {
        let Asked {
            selected,
            facts,
            request,
            path,
            now,
        } = *asked;
        let Identified {
            edits,
            claims,
            expires,
            scheme,
            proof,
        } = match selected.resource() {
            Some(resource) => self.identify(resource, asked, stage)?,
            None => self.by_rules(selected, request, now)?,
        };
        let refused = |denial| Refused {
            claims: claims.clone(),
            ..Refused::denied(denial)
        };
        if let Some(claims) = &claims
            && let Err(denial) = selected.presenter(facts, claims)
        {
            let why = "the token is bound to another presenter";
            let reply = match selected.resource() {
                Some(resource) => resource.invalid_token(request, scheme, why),
                None => jwt::invalid_token(request, StatusCode::UNAUTHORIZED, why.to_owned()),
            };
            return Err(Unsettled::from(Refused {
                reply,
                ..refused(denial)
            }));
        }
        let seen = Request {
            headers: edits.headers(request),
            ..request.clone()
        };
        let about = RequestFacts {
            request: &seen,
            path,
            host: &request.host.to_lowercase(),
            remote_ip: remote_ip(request, facts.source_ip, selected.reading.trusted_proxies),
            claims: claims.as_deref(),
        };
        let layer = Layer::Request(&about);
        let verdict = selected.decide(facts, layer);
        let permitted = verdict.permit().map_err(|denial| {
            let challenge = challenge(asked, layer, scheme, &denial);
            let mut refused = refused(denial);
            refused.reply = challenge.unwrap_or(refused.reply);
            Unsettled::from(refused)
        })?;
        let told = selected.told(facts, layer);
        drop(seen);
        Ok(Settled {
            permitted,
            expires: expires.and_then(lapse),
            claims,
            edits,
            told,
            proof,
        })
    }

    /// As Istio has it.
    fn by_rules(
        &self,
        selected: &Selected,
        request: &Request<'_>,
        now: SystemTime,
    ) -> Result<Identified, Unsettled> {
        let keys = |from: &RemoteKeys| self.keys.get(from);
        let rules = selected.tokens();
        let (edits, verified) =
            match jwt::authenticate(rules, request, now, keys, Some(&self.verified)) {
                Outcome::Anonymous(edits) => (edits, None),
                Outcome::Verified(verified) => (verified.edits.clone(), Some(verified)),
                Outcome::Refused(refusal) => {
                    let policy = selected.token_policy(refusal.rule).clone();
                    let denial = Denial::Token(policy, refusal.error.to_string());
                    let refused = Refused {
                        reply: refusal.reply(request),
                        why: Why::Denied(denial),
                        claims: None,
                    };
                    return Err(Unsettled {
                        unavailable: refusal.error == TokenError::KeysUnavailable,
                        sources: refusal.refetch,
                        ..Unsettled::from(refused)
                    });
                }
            };
        Ok(Identified {
            edits,
            expires: verified.as_ref().and_then(|v| v.expires),
            claims: verified.map(|v| v.claims),
            scheme: Scheme::Bearer,
            proof: None,
        })
    }

    /// Asks providers in turn; the first that says no ends it.
    async fn ask(
        &self,
        providers: &[(&str, PolicyRef)],
        facts: &Facts,
        identity: Option<&SpiffeId>,
        source: SocketAddr,
        request: Option<&Request<'_>>,
    ) -> Result<Edits, (Denial, Option<Reply>)> {
        let mut edits = Edits::default();
        for (provider, policy) in providers {
            let check = Check {
                source,
                source_principal: facts.source.as_ref().map(ToString::to_string),
                destination: facts.destination,
                destination_principal: identity.map(ToString::to_string),
                sni: facts.sni.clone(),
                request,
            };
            let answer = self.authorizers.check(provider, &check).await;
            match answer.decision {
                Decision::Allow(more) => merge(&mut edits, more),
                Decision::Deny(reply) => {
                    let why = format!("provider {provider}: {}", answer.reason);
                    return Err((Denial::Custom(policy.clone(), why), Some(reply)));
                }
            }
        }
        Ok(edits)
    }
}

/// What the client of a protected resource is told beside that it is refused: to bring
/// a token, or one with more scopes where that alone would do.
fn challenge(
    asked: &Asked<'_>,
    layer: Layer<'_>,
    scheme: Scheme,
    denial: &Denial,
) -> Option<Reply> {
    let resource = asked.selected.resource()?;
    let Layer::Request(RequestFacts { claims, .. }) = layer else {
        return None;
    };
    let lacking = |any_token| asked.selected.lacking_scopes(asked.facts, layer, any_token);
    match (claims, denial) {
        (None, _) => {
            let scopes = lacking(true).unwrap_or_default();
            Some(resource.unauthenticated(asked.request, &scopes))
        }
        (Some(_), Denial::Implicit(_)) => {
            let scopes = lacking(false)?;
            Some(resource.insufficient_scope(asked.request, scheme, &scopes))
        }
        (Some(_), _) => None,
    }
}

/// When a token that expires then is no longer taken; `None` where no clock gets to.
fn lapse(expires: SystemTime) -> Option<SystemTime> {
    expires.checked_add(Duration::from_secs(LEEWAY))
}

pub fn merge(edits: &mut Edits, more: Edits) {
    // What is removed or set later must not come back by what was set earlier.
    edits.set.retain(|(name, _)| more.keeps(name));
    edits.remove.extend(more.remove);
    edits.set.extend(more.set);
    edits.path = more.path.or(edits.path.take());
}

/// The `proxies`th address from the right of `X-Forwarded-For`; the packets' source
/// where there are fewer (Istio `numTrustedProxies`, Envoy `xff_num_trusted_hops`).
pub fn remote_ip(request: &Request<'_>, source: IpAddr, proxies: usize) -> IpAddr {
    const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
    if proxies == 0 {
        return source;
    }
    let told = request.header(&FORWARDED_FOR);
    let nth = told
        .as_deref()
        .and_then(|list| list.rsplit(',').nth(proxies - 1));
    let address = nth.map(str::trim).and_then(|text| {
        let text = text
            .strip_prefix('[')
            .and_then(|t| t.strip_suffix(']'))
            .unwrap_or(text);
        let plain = text.parse().ok();
        plain.or_else(|| text.parse::<SocketAddr>().ok().map(|a| a.ip()))
    });
    address.unwrap_or(source).to_canonical()
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn the_client_is_as_many_proxies_away_as_are_trusted() {
        let source: IpAddr = "10.0.0.9".parse().expect("address");
        for (forwarded, proxies, expected) in [
            (&["192.0.2.1, 192.0.2.2"][..], 0, "10.0.0.9"),
            (&["192.0.2.1, 192.0.2.2"], 1, "192.0.2.2"),
            (&["192.0.2.1, 192.0.2.2"], 2, "192.0.2.1"),
            (&["192.0.2.1, 192.0.2.2"], 3, "10.0.0.9"),
            (&["192.0.2.1", "192.0.2.2"], 2, "192.0.2.1"),
            (&["2001:db8::1"], 1, "2001:db8::1"),
            (&["[2001:db8::1]:99"], 1, "2001:db8::1"),
            (&["[2001:db8::1]"], 1, "2001:db8::1"),
            (&["192.0.2.1:99"], 1, "192.0.2.1"),
            (&["::ffff:192.0.2.1"], 1, "192.0.2.1"),
            (&["unknown"], 1, "10.0.0.9"),
            (&[""], 1, "10.0.0.9"),
            (&[], 1, "10.0.0.9"),
        ] {
            let name = HeaderName::from_static("x-forwarded-for");
            let values: Vec<HeaderValue> = forwarded
                .iter()
                .map(|v| HeaderValue::from_static(v))
                .collect();
            let request = Request {
                method: "GET",
                path: "/",
                host: "h",
                headers: values.iter().map(|value| (&name, value)).collect(),
            };
            let told = remote_ip(&request, source, proxies).to_string();
            assert_eq!(told, expected, "{forwarded:?} {proxies}");
        }
    }

    /// Some issuers write the greatest number for "never".
    #[test]
    fn a_token_may_outlast_every_clock() {
        let leeway = Duration::from_secs(LEEWAY);
        let last = SystemTime::UNIX_EPOCH + Duration::from_secs(i64::MAX as u64);
        assert_eq!(lapse(last), None);
        assert_eq!(lapse(last - leeway), Some(last));
    }

    #[test]
    fn what_is_removed_later_does_not_come_back() {
        let (a, b) = (HeaderName::from_static("a"), HeaderName::from_static("b"));
        let value = HeaderValue::from_static("v");
        let mut edits = Edits {
            set: vec![(a.clone(), value.clone()), (b.clone(), value)],
            ..Edits::default()
        };
        let more = Edits {
            remove: vec![a.clone()],
            path: Some("/x".into()),
            ..Edits::default()
        };
        merge(&mut edits, more);
        assert_eq!(edits.set.len(), 1);
        assert!(!edits.keeps(&a) && !edits.keeps(&b));
        assert_eq!(edits.path.as_deref(), Some("/x"));
    }
}
