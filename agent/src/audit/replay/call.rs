//! From a record to what is judged.

use std::{net::SocketAddr, sync::Arc};

use serde_json::{Map, Value, json};

use super::Destination;
use crate::{
    audit::ask::Entry,
    identity::SpiffeId,
    judge::past::{Carried, PastRequest, PastToken},
    jwt::{self, Claims},
    policy::{Facts, Selected},
};

/// A connection, or one request of it.
pub struct Call {
    pub facts: Facts,
    pub carried: Carried,
    pub destination: Destination,
    pub was: Was,
    /// By a policy that asks for tokens: there was one, or a rule for its lack.
    pub refused_by_token: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Was {
    Allowed,
    Denied,
}

impl Call {
    /// Learns from the policies that it was recorded under what had been looked at: what
    /// they asked for and is not recorded was not there.
    pub fn recorded_under(&mut self, recorded: &Selected, candidate: &Selected) {
        match &mut self.carried {
            Carried::Unread
                if self.was == Was::Allowed && recorded.needs_request(&self.facts).is_some() =>
            {
                self.carried = Carried::Raw;
            }
            Carried::Request(request)
                if matches!(request.token, PastToken::Unknown)
                    && !self.refused_by_token
                    && covers(recorded.tokens(), candidate.tokens()) =>
            {
                request.token = PastToken::Absent;
            }
            _ => {}
        }
    }
}

/// Whether rules look everywhere where others do.
fn covers(rules: &[Arc<jwt::Rule>], others: &[Arc<jwt::Rule>]) -> bool {
    let sought = |other: &Arc<jwt::Rule>| rules.iter().any(|own| own.locations == other.locations);
    others.iter().all(sought)
}

/// Characters that are kept of a method, a host and a path; of more the rest is cut.
const LONGEST: usize = 512;
/// Scopes that are kept.
const MOST_SCOPES: usize = 64;
/// Why the agent ends what it once let pass, by no policy's word.
const EXPIRED: &str = "its token has expired";

/// What a record tells of. `None`: nothing that is judged where it goes to; otherwise
/// the reason why it cannot be judged anew.
pub fn read(entry: &Entry) -> Option<Result<Call, &'static str>> {
    let value = &entry.value;
    let text = |name: &str| value[name].as_str();
    let is_request = match entry.kind() {
        "request" => true,
        "connection" => false,
        _ => return None,
    };
    let own_side = text("reporter") == Some("destination")
        || (!is_request && text("transport") == Some("local"));
    if !own_side {
        return None;
    }
    Some(judged(value, is_request).and_then(|was| call(value, is_request, was)))
}

/// How it was judged; otherwise the reason why it was not.
fn judged(value: &Value, is_request: bool) -> Result<Was, &'static str> {
    let text = |name: &str| value[name].as_str();
    if text("transport") == Some("probe") {
        return Err("a probe of the node itself, which no policy is asked about");
    }
    if !is_request && value.get("protocol").is_some() {
        return Err("a connection that its requests were judged of");
    }
    if value["policy"]["kind"] == "ConnectPolicy" {
        return Err("refused where it came from, by a ConnectPolicy");
    }
    match text("verdict") {
        Some("allow") => Ok(Was::Allowed),
        Some("deny") if text("reason") == Some(EXPIRED) => Ok(Was::Allowed),
        Some("deny") if value.get("policy").is_none() => Err("refused by no policy"),
        Some("deny") => Ok(Was::Denied),
        _ => Err("it failed before it was judged"),
    }
}

fn call(value: &Value, is_request: bool, was: Was) -> Result<Call, &'static str> {
    let text = |of: &Value, name: &str| of[name].as_str().map(str::to_owned);
    let (source, destination) = (&value["source"], &value["destination"]);
    let address = |end: &Value| -> Option<SocketAddr> { end["address"].as_str()?.parse().ok() };
    let (Some(from), Some(to)) = (address(source), address(destination)) else {
        return Err("the record lacks an address");
    };
    let Some(namespace) = text(destination, "namespace") else {
        return Err("the record does not say which workload it went to");
    };
    let identity = match source["identity"].as_str().map(str::parse::<SpiffeId>) {
        Some(Ok(identity)) => Some(identity),
        Some(Err(_)) => return Err("the identity of its source is no SPIFFE ID of a workload"),
        None => None,
    };
    let whole = |name: &str| {
        let told = value[name].as_str()?;
        (told.chars().count() < LONGEST).then(|| told.to_owned())
    };
    let carried = match is_request {
        true => Carried::Request(PastRequest {
            method: whole("method"),
            host: whole("host"),
            path: whole("path"),
            token: token(&value["token"]),
        }),
        false => Carried::Unread,
    };
    let by_token = ["RequestAuthentication", "ProtectedResource"];
    Ok(Call {
        facts: Facts::new(identity, from.ip().to_canonical(), to),
        carried,
        destination: Destination {
            namespace,
            pod: text(destination, "pod").unwrap_or_default(),
            workload: text(destination, "workload").unwrap_or_default(),
        },
        was,
        refused_by_token: was == Was::Denied
            && by_token.iter().any(|kind| value["policy"]["kind"] == *kind),
    })
}

/// The token that a record tells of, as far as it does.
fn token(record: &Value) -> PastToken {
    let Some(record) = record.as_object() else {
        return PastToken::Unknown;
    };
    let mut payload = Map::new();
    for name in ["iss", "sub", "aud", "azp", "client_id", "scope", "scp"] {
        if let Some(value) = record.get(name) {
            payload.insert(name.into(), value.clone());
        }
    }
    let list = |name: &str| record.get(name).and_then(Value::as_array);
    // From the one who acts now inwards.
    let actors = list("act").into_iter().flatten().rev();
    let act = actors.fold(None, |within: Option<Value>, actor| {
        Some(match within {
            Some(within) => json!({"sub": actor, "act": within}),
            None => json!({"sub": actor}),
        })
    });
    payload.extend(act.map(|act| ("act".to_owned(), act)));
    if list("scope").is_some_and(|scopes| scopes.len() >= MOST_SCOPES) {
        // There may have been more.
        return PastToken::Unknown;
    }
    PastToken::Verified {
        claims: Box::new(Claims::of_record(payload)),
        bound: list("cnf").is_some_and(|cnf| !cnf.is_empty()),
        introspected: record
            .get("checked")
            .is_some_and(|by| by == "introspection"),
    }
}
