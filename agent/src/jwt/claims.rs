//! What a verified token says, as policy and the audit log ask for it.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Map, Value};

use super::verify::{TokenError, Validity};

/// Lists that are written as one string (RFC 6749 3.3, and Istio).
const SPACE_DELIMITED: [&str; 2] = ["scope", "permission"];

/// The payload of a token that a rule verified. Only [`super::Token::verify`] makes it.
#[derive(Clone, PartialEq, Eq)]
pub struct Claims {
    payload: Arc<Map<String, Value>>,
    space_delimited: Vec<String>,
    validity: Validity,
}

/// What the sender of a bound token must prove to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confirmation {
    /// The certificate with this SHA-256 (RFC 8705 3.1).
    Certificate([u8; 32]),
    /// Something that is not known here, or cannot be read. Never an unbound token.
    Other,
}

impl Claims {
    pub(super) fn new(
        payload: Arc<Map<String, Value>>,
        space_delimited: &[String],
        validity: Validity,
    ) -> Self {
        Self {
            payload,
            space_delimited: space_delimited.to_vec(),
            validity,
        }
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
        Self::new(Arc::new(payload), &names, validity)
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

    /// Who acts for the subject (RFC 8693 4.1).
    pub fn actor(&self) -> Option<&str> {
        self.payload.get("act")?.get("sub")?.as_str()
    }

    /// To whom the token is bound (RFC 7800). `None`: whoever bears it may use it.
    pub fn confirmation(&self) -> Option<Confirmation> {
        let thumbprint = self.payload.get("cnf")?.get("x5t#S256");
        let certificate = thumbprint
            .and_then(Value::as_str)
            .and_then(|text| URL_SAFE_NO_PAD.decode(text).ok())
            .and_then(|bytes| bytes.try_into().ok());
        Some(certificate.map_or(Confirmation::Other, Confirmation::Certificate))
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
