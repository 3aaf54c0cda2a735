//! What a verified token says, as policy and the audit log ask for it.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Map, Value};

use super::verify::{TokenError, Validity, audience_fits, registered};

/// Lists that are written as one string (RFC 6749 3.3, and Istio).
const SPACE_DELIMITED: [&str; 2] = ["scope", "permission"];

/// Claims that an access token must have (RFC 9068 2.2).
const OF_ACCESS_TOKEN: [&str; 7] = ["iss", "exp", "aud", "sub", "client_id", "iat", "jti"];
/// Actors that are told of a chain (RFC 8693 4.1).
const MAX_ACTORS: usize = 8;

/// The payload of a token that a rule verified, or that its issuer told by
/// introspection. For live traffic only [`super::Token::verify`] and
/// [`Claims::introspected`] make it.
#[derive(Clone, PartialEq, Eq)]
pub struct Claims {
    payload: Arc<Map<String, Value>>,
    space_delimited: Vec<String>,
    validity: Validity,
    checked: Checked,
}

/// How it is known that the claims are so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Checked {
    /// By the issuer's signature. `typ` is the header's, in lower case and without
    /// `application/`.
    Jwt { typ: Option<Arc<str>> },
    /// The issuer was asked, alone or after the signature (RFC 7662).
    Introspection,
    /// Not now: the audit log says that it was.
    Record,
}

impl Checked {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Jwt { .. } => "jwt",
            Self::Introspection => "introspection",
            Self::Record => "record",
        }
    }
}

/// What the sender of a bound token must prove to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confirmation {
    /// The certificate with this SHA-256 (RFC 8705 3.1).
    Certificate([u8; 32]),
    /// The key with this thumbprint (RFC 9449 6.1, RFC 7638).
    Key([u8; 32]),
    /// Something that is not known here, or cannot be read. Never an unbound token.
    Other,
}

impl Claims {
    pub(super) fn new(
        payload: Arc<Map<String, Value>>,
        space_delimited: &[String],
        validity: Validity,
        checked: Checked,
    ) -> Self {
        Self {
            payload,
            space_delimited: space_delimited.to_vec(),
            validity,
            checked,
        }
    }

    /// What an authorization server says of a token that it calls active (RFC 7662
    /// 2.2). Without an `iss` it is of the server that was asked. Its time is still to
    /// be checked.
    pub fn introspected(
        mut answer: Map<String, Value>,
        issuer: &str,
        audiences: &[String],
        space_delimited: &[String],
    ) -> Result<Self, TokenError> {
        answer.remove("active");
        registered(&answer)?;
        let told = answer.entry("iss").or_insert_with(|| issuer.into());
        if told.as_str() != Some(issuer) {
            return Err(TokenError::Issuer);
        }
        let validity = Validity::of(&answer)?;
        let claims = Self::new(
            Arc::new(answer),
            space_delimited,
            validity,
            Checked::Introspection,
        );
        match audience_fits(audiences, &claims.audiences()) {
            true => Ok(claims),
            false => Err(TokenError::Audience),
        }
    }

    /// The same, after the issuer confirmed them.
    #[must_use]
    pub fn confirmed(&self) -> Self {
        Self {
            checked: Checked::Introspection,
            ..self.clone()
        }
    }

    pub fn checked(&self) -> &Checked {
        &self.checked
    }

    /// Whether it is an access token by its own word (RFC 9068 4): an ID token of the
    /// same issuer is none.
    pub fn check_access_token(&self) -> Result<(), TokenError> {
        if let Checked::Jwt { typ } = &self.checked
            && typ.as_deref() != Some("at+jwt")
        {
            return Err(TokenError::NotAccessToken);
        }
        let lacks = |name: &&&str| !self.payload.contains_key(**name);
        match OF_ACCESS_TOKEN.iter().find(lacks) {
            Some(name) => Err(TokenError::Missing(name)),
            None => Ok(()),
        }
    }

    /// What the audit log has of a token that was verified at its time.
    pub fn of_record(payload: Map<String, Value>) -> Self {
        let validity = Validity {
            not_before: None,
            expires: None,
        };
        Self::new(Arc::new(payload), &[], validity, Checked::Record)
    }

    /// Claims that no token was needed for.
    #[cfg(test)]
    pub(crate) fn of_test(payload: Value, space_delimited: &[&str]) -> Self {
        let Value::Object(payload) = payload else {
            panic!("claims are an object");
        };
        let names: Vec<String> = space_delimited.iter().map(|&n| n.to_owned()).collect();
        let validity = Validity {
            not_before: None,
            expires: None,
        };
        let checked = Checked::Jwt { typ: None };
        Self::new(Arc::new(payload), &names, validity, checked)
    }

    pub(super) fn is_of(&self, payload: &Map<String, Value>) -> bool {
        *self.payload == *payload
    }

    /// A token that was good once: whether it is still in its time.
    pub fn check_time(&self, now: SystemTime) -> Result<(), TokenError> {
        self.validity.check(now)
    }

    pub fn issuer(&self) -> Option<&str> {
        self.text("iss")
    }

    pub fn subject(&self) -> Option<&str> {
        self.text("sub")
    }

    /// Issuer and subject. Neither alone names anybody.
    pub fn principal(&self) -> Option<(&str, &str)> {
        let (issuer, subject) = (self.issuer()?, self.subject()?);
        (!issuer.is_empty() && !subject.is_empty()).then_some((issuer, subject))
    }

    /// As they stand in the token.
    pub fn audiences(&self) -> Vec<&str> {
        self.payload.get("aud").map(strings).unwrap_or_default()
    }

    /// The client that the token was made for.
    pub fn presenter(&self) -> Option<&str> {
        self.text("azp")
    }

    pub fn client(&self) -> Option<&str> {
        self.text("client_id")
    }

    /// The token's own name (RFC 7519 4.1.7). Whoever knows it knows no token.
    pub fn id(&self) -> Option<&str> {
        self.text("jti")
    }

    /// What the token is good for (RFC 6749 3.3), each once as it stands there; of
    /// `scp` where there is no `scope`.
    pub fn scopes(&self) -> Vec<&str> {
        let words = |name| match self.payload.get(name) {
            Some(Value::String(words)) => {
                Some(words.split(' ').filter(|w| !w.is_empty()).collect())
            }
            Some(list) => Some(strings(list)),
            None => None,
        };
        words("scope").or_else(|| words("scp")).unwrap_or_default()
    }

    /// The claim that [`Self::scopes`] are of: policy on `scope` does not look at `scp`.
    pub fn scope_claim(&self) -> &'static str {
        match self.payload.get("scope") {
            Some(_) => "scope",
            None => "scp",
        }
    }

    /// Who acts for the subject, the one who acts now first (RFC 8693 4.1).
    pub fn actors(&self) -> Vec<&str> {
        let first = self.payload.get("act");
        std::iter::successors(first, |actor| actor.get("act"))
            .take(MAX_ACTORS)
            .filter_map(|actor| actor.get("sub")?.as_str())
            .collect()
    }

    /// Who acts for the subject (RFC 8693 4.1).
    pub fn actor(&self) -> Option<&str> {
        self.payload.get("act")?.get("sub")?.as_str()
    }

    /// To whom the token is bound (RFC 7800). `None`: whoever bears it may use it.
    pub fn confirmation(&self) -> Option<Confirmation> {
        let all = self.confirmations();
        let certificate = |one: &&Confirmation| matches!(one, Confirmation::Certificate(_));
        all.iter().find(certificate).or(all.first()).copied()
    }

    /// All that the sender must prove to have. Empty: the token is not bound.
    pub fn confirmations(&self) -> Vec<Confirmation> {
        let digest = |value: &Value| {
            let bytes = URL_SAFE_NO_PAD.decode(value.as_str()?).ok()?;
            <[u8; 32]>::try_from(bytes).ok()
        };
        let one = |(name, value): (&String, &Value)| match (name.as_str(), digest(value)) {
            ("x5t#S256", Some(digest)) => Confirmation::Certificate(digest),
            ("jkt", Some(digest)) => Confirmation::Key(digest),
            _ => Confirmation::Other,
        };
        match self.payload.get("cnf") {
            None => Vec::new(),
            Some(Value::Object(members)) if !members.is_empty() => {
                members.iter().map(one).collect()
            }
            Some(_unreadable) => vec![Confirmation::Other],
        }
    }

    /// Seconds of leeway not included. `None`: never.
    pub fn expires(&self) -> Option<SystemTime> {
        UNIX_EPOCH.checked_add(Duration::from_secs(self.validity.expires?))
    }

    /// The strings that policy compares: of a list its strings, of a space-delimited
    /// claim its words. Each part of `path` is the whole name of a member; numbers,
    /// booleans and objects have no value.
    pub fn values(&self, path: &[String]) -> Vec<&str> {
        let Some(value) = self.member(path) else {
            return Vec::new();
        };
        match (value, path) {
            (Value::String(words), [name]) if self.is_space_delimited(name) => {
                words.split(' ').filter(|word| !word.is_empty()).collect()
            }
            _ => strings(value),
        }
    }

    /// The member at the end of a path through objects.
    pub(super) fn member(&self, path: &[String]) -> Option<&Value> {
        let (first, rest) = path.split_first()?;
        rest.iter()
            .try_fold(self.payload.get(first)?, |value, name| {
                value.as_object()?.get(name)
            })
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.payload.get(name)?.as_str()
    }

    fn is_space_delimited(&self, name: &str) -> bool {
        SPACE_DELIMITED.contains(&name) || self.space_delimited.iter().any(|own| own == name)
    }
}

/// Claims are personal data: how many, not which.
impl fmt::Debug for Claims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Claims")
            .field("members", &self.payload.len())
            .field("validity", &self.validity)
            .finish_non_exhaustive()
    }
}

fn strings(value: &Value) -> Vec<&str> {
    match value {
        Value::String(text) => vec![text],
        Value::Array(list) => list.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    }
}
