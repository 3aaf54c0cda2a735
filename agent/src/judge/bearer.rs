//! How a request's token is found and proven where a ProtectedResource selects the
//! workload: one token, by rules or by introspection, and by whom it must be sent.

#[cfg(test)]
mod tests;

use std::{borrow::Cow, sync::Arc, time::SystemTime};

use http::{HeaderName, HeaderValue, header};

use super::{Asked, Identified, Judge, Refused, Stage, Unsettled, Why};
use crate::{
    introspect::{IntrospectError, Introspected},
    jwt::{
        self, Checked, Claims, Outcome, Proof, ProofError, RemoteKeys, TokenError, is_jwt,
        is_preflight,
    },
    policy::{Denial, PolicyRef, ProtectedResource, Scheme, Unproven},
    request::{Edits, Reply, Request},
};

const DPOP: HeaderName = HeaderName::from_static("dpop");

/// How a request sends its token.
pub(super) struct Presented<'a> {
    /// `None`: there is none that anybody looks for.
    pub token: Option<Cow<'a, str>>,
    pub scheme: Scheme,
    /// In `Authorization`, with one of the schemes.
    in_header: bool,
    /// Where some rule looks for it.
    by_rules: bool,
    /// The header as rules know it.
    bearer: Option<HeaderValue>,
}

impl<'a> Presented<'a> {
    /// What is wrong is the form of the request (RFC 6750 3.1 `invalid_request`).
    fn read(
        resource: &ProtectedResource,
        rules: &[Arc<jwt::Rule>],
        request: &Request<'a>,
    ) -> Result<Self, (Scheme, &'static str)> {
        let mut presented = Self {
            token: None,
            scheme: Scheme::Bearer,
            in_header: false,
            by_rules: false,
            bearer: None,
        };
        if is_preflight(request) {
            return Ok(presented);
        }
        let sent = authorization(request)?;
        if let Some((scheme, token)) = sent {
            presented.scheme = scheme;
            let bearer = HeaderValue::try_from(format!("Bearer {token}"));
            presented.bearer = bearer.ok().map(|mut bearer| {
                bearer.set_sensitive(true);
                bearer
            });
        }
        let viewed = presented.view(request);
        let places: Vec<(bool, String)> = jwt::presented(rules, &viewed)
            .into_iter()
            .map(|(in_header, text)| (in_header, text.into_owned()))
            .collect();
        drop(viewed);
        let by_rules = places.iter().any(|(in_header, _)| *in_header);
        let only_introspected = sent.is_some() && !by_rules && resource.introspection.is_some();
        match (places.len() + usize::from(only_introspected), sent) {
            (0, _) => {}
            (1, Some((_, token))) if by_rules || only_introspected => {
                presented.token = Some(Cow::Borrowed(token));
                presented.in_header = true;
                presented.by_rules = by_rules;
            }
            (1, _) => {
                presented.token = places.into_iter().next().map(|(_, text)| text.into());
                presented.by_rules = true;
                presented.scheme = Scheme::Bearer;
            }
            _ => return Err((presented.scheme, "more than one token")),
        }
        Ok(presented)
    }

    /// The request as rules shall see it: schemes have no case (RFC 9110 11.1), and
    /// rules know one of them.
    fn view<'v>(&'v self, request: &'v Request<'_>) -> Request<'v> {
        let headers = request.headers.iter().map(|(name, value)| {
            let own = self
                .bearer
                .as_ref()
                .filter(|_| **name == header::AUTHORIZATION);
            (*name, own.unwrap_or(value))
        });
        Request {
            headers: headers.collect(),
            ..*request
        }
    }
}

/// The token of `Authorization: Bearer` or `DPoP`, if the header has one of these.
fn authorization<'a>(
    request: &Request<'a>,
) -> Result<Option<(Scheme, &'a str)>, (Scheme, &'static str)> {
    let all = || {
        request
            .headers
            .iter()
            .filter(|(name, _)| **name == header::AUTHORIZATION)
    };
    let parts = |value: &'a HeaderValue| {
        let (scheme, rest) = value
            .as_bytes()
            .split_at((value.as_bytes().iter().position(|b| *b == b' ')).unwrap_or(value.len()));
        let scheme = match scheme {
            s if s.eq_ignore_ascii_case(b"bearer") => Scheme::Bearer,
            s if s.eq_ignore_ascii_case(b"dpop") => Scheme::Dpop,
            _ => return None,
        };
        Some((scheme, rest.trim_ascii()))
    };
    let Some((scheme, token)) = all().find_map(|(_, value)| parts(value)) else {
        return Ok(None);
    };
    if all().nth(1).is_some() {
        return Err((scheme, "more than one Authorization header"));
    }
    // RFC 6750 2.1 b64token.
    let end = token
        .iter()
        .rposition(|b| *b != b'=')
        .map_or(0, |at| at + 1);
    let fine = |b: &u8| b.is_ascii_alphanumeric() || b"-._~+/".contains(b);
    match std::str::from_utf8(token) {
        Ok(text) if end > 0 && token[..end].iter().all(fine) => Ok(Some((scheme, text))),
        _ => Err((scheme, "the Authorization header holds no token")),
    }
}

impl Judge {
    /// Who the sender is by its token, if it has one. What cannot be proven is refused.
    pub(super) fn identify(
        &self,
        resource: &ProtectedResource,
        asked: &Asked<'_>,
        stage: Stage<'_>,
    ) -> Result<Identified, Unsettled> {
        let Asked {
            selected,
            facts,
            request,
            now,
            ..
        } = *asked;
        let rules = selected.tokens();
        let refuse = |why: String, reply: Reply| refused(&resource.policy, why, reply);
        let presented = Presented::read(resource, rules, request).map_err(|(scheme, why)| {
            let reply = resource.invalid_request(request, scheme, why);
            refuse(why.to_owned(), reply)
        })?;
        let viewed = presented.view(request);
        let keys = |from: &RemoteKeys| self.keys.get(from);
        let by_rules = |request: &Request<'_>| {
            jwt::authenticate_for(
                resource.demands(),
                rules,
                request,
                now,
                keys,
                Some(&self.verified),
            )
        };
        let scheme = presented.scheme;
        let Some(token) = presented.token.as_deref() else {
            return match by_rules(&viewed) {
                Outcome::Anonymous(edits) => Ok(Identified::anonymous(edits)),
                _ => unreachable!("there is nothing that a rule takes for a token"),
            };
        };
        // Before anybody is asked about the token.
        let proof = match scheme {
            Scheme::Bearer => None,
            Scheme::Dpop => Some(self.proof(resource, asked, token, stage).map_err(|error| {
                let nonce = resource.nonce.then(|| self.nonces.current(now));
                refuse(
                    error.to_string(),
                    resource.invalid_proof(request, &error, nonce),
                )
            })?),
        };
        let introspection = resource.introspection.as_ref();
        let opaque =
            introspection.filter(|_| presented.in_header && !(presented.by_rules && is_jwt(token)));
        let (mut edits, mut claims, mut expires) = match opaque {
            Some(_) => {
                let mut bare = viewed.clone();
                bare.headers
                    .retain(|(name, _)| **name != header::AUTHORIZATION);
                match by_rules(&bare) {
                    Outcome::Anonymous(edits) => (edits, None, None),
                    _ => unreachable!("its only token stands in that header"),
                }
            }
            None => match by_rules(&viewed) {
                Outcome::Verified(verified) => {
                    (verified.edits, Some(verified.claims), verified.expires)
                }
                Outcome::Refused(refusal) => {
                    let why = refusal.error.to_string();
                    let reply = resource.invalid_token(request, scheme, &why);
                    let policy = selected.token_policy(refusal.rule);
                    return Err(Unsettled {
                        unavailable: refusal.error == TokenError::KeysUnavailable,
                        sources: refusal.refetch,
                        ..refused(policy, why, reply)
                    });
                }
                Outcome::Anonymous(_) => unreachable!("a rule looks for this token"),
            },
        };
        let of_issuer = |claims: &Claims, issuer: &str| claims.issuer() == Some(issuer);
        let asks = introspection.filter(|introspection| match &claims {
            None => true,
            // A token is nobody's business but its issuer's.
            Some(claims) => {
                introspection.always && of_issuer(claims, &introspection.endpoint.issuer)
            }
        });
        if let Some(introspection) = asks {
            let told = match (stage, &claims) {
                (Stage::New(Some(told)), _) => told.clone(),
                (Stage::New(None), _) => Err(not_asked()),
                (Stage::Running(_), Some(claims)) => Ok(claims.clone()),
                (Stage::Running(held), None) => still(held, now),
            };
            let told = told.map_err(|error| {
                let why = error.to_string();
                let reply = match error.is_of_token() {
                    true => resource.invalid_token(request, scheme, &why),
                    false => resource.unavailable(),
                };
                Unsettled {
                    introspect: matches!(stage, Stage::New(None))
                        .then(|| (introspection.endpoint.clone(), token.to_owned().into())),
                    unavailable: !error.is_of_token(),
                    ..refuse(why, reply)
                }
            })?;
            let ends = told.expires();
            expires = expires.into_iter().chain(ends).min();
            claims = Some(match claims {
                Some(own) => Arc::new(own.confirmed()),
                None => {
                    jwt::put_out_introspected(rules, &told, &mut edits);
                    told
                }
            });
            if opaque.is_some() && !introspection.forward_original {
                edits.remove.push(header::AUTHORIZATION);
            }
        }
        if edits.remove.contains(&header::AUTHORIZATION) {
            edits.remove.push(DPOP);
        }
        let claims = claims.expect("verified by a rule, or told by the issuer");
        let key = proof.as_ref().map(Proof::thumbprint);
        resource.proven(&claims, facts, key).map_err(|error| {
            let why = error.to_string();
            let scheme = match error {
                Unproven::SentAsBearer => Scheme::Dpop,
                _ => scheme,
            };
            let reply = resource.invalid_token(request, scheme, &why);
            let mut unsettled = refuse(why, reply);
            unsettled.refused.claims = Some(claims.clone());
            unsettled
        })?;
        Ok(Identified {
            edits,
            claims: Some(claims),
            expires,
            scheme,
            proof: proof.map(|proof| proof.once()),
        })
    }

    /// The proof that comes with a token, as far as it can be checked without knowing
    /// whether it was used before.
    fn proof(
        &self,
        resource: &ProtectedResource,
        asked: &Asked<'_>,
        token: &str,
        stage: Stage<'_>,
    ) -> Result<Proof, ProofError> {
        let request = asked.request;
        let mut values = request.headers.iter().filter(|(name, _)| **name == DPOP);
        let (_, value) = values.next().ok_or(ProofError::Missing)?;
        if values.next().is_some() {
            return Err(ProofError::Repeated);
        }
        let proof = Proof::parse(value.to_str().map_err(|_| ProofError::Form)?)?;
        proof.check_use(request.method, token)?;
        let normalization = asked.selected.reading.normalization;
        if !resource.is_target(proof.target(), request, asked.path, normalization) {
            return Err(ProofError::Target);
        }
        // What runs was new when it came.
        if matches!(stage, Stage::New(_)) {
            proof.check_time(asked.now)?;
            let held = |nonce| self.nonces.holds(nonce, asked.now);
            if resource.nonce && !proof.nonce().is_some_and(held) {
                return Err(ProofError::Nonce);
            }
        }
        Ok(proof)
    }

    /// Notes the use of a proof, once all else would let the request pass: what is
    /// refused for another reason does not use it up.
    pub(super) fn first_use(
        &self,
        asked: &Asked<'_>,
        proof: ([u8; 32], u64),
        claims: Option<&Arc<Claims>>,
    ) -> Result<(), Box<Refused>> {
        let Some(resource) = asked.selected.resource() else {
            return Ok(());
        };
        (self.replays.first_use(proof, asked.now)).map_err(|error| {
            Box::new(Refused {
                why: Why::Denied(Denial::Token(resource.policy.clone(), error.to_string())),
                reply: resource.invalid_proof(asked.request, &error, None),
                claims: claims.cloned(),
            })
        })
    }
}

impl Identified {
    fn anonymous(edits: Edits) -> Self {
        Self {
            edits,
            claims: None,
            expires: None,
            scheme: Scheme::Bearer,
            proof: None,
        }
    }
}

/// Of a request that runs: what was told of its token when it came.
fn still(held: Option<&Arc<Claims>>, now: SystemTime) -> Introspected {
    match held {
        Some(claims) if *claims.checked() == Checked::Introspection => {
            claims.check_time(now)?;
            Ok(claims.clone())
        }
        _ => Err(not_asked()),
    }
}

fn not_asked() -> IntrospectError {
    IntrospectError::Unavailable("it is needed for this token, and was not done".into())
}

fn refused(policy: &PolicyRef, why: String, reply: Reply) -> Unsettled {
    Unsettled::from(Refused {
        why: Why::Denied(Denial::Token(policy.clone(), why)),
        reply,
        claims: None,
    })
}
