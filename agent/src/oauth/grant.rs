//! One request for a token, and what the server says to it, read strictly (RFC 6749
//! 5.1 and 5.2, RFC 8693 2.2).

use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use serde_json::{Map, Value};
use zeroize::Zeroizing;

use super::{ClientAuthenticationError, EndpointError, Grant, SubjectKind, Wanted};
use crate::{
    fetch::{Answer, FetchError},
    identity::IdentityError,
    jwt::{MAX_TOKEN, json},
};

/// RFC 8693 2.1 and 3.
pub(super) const TOKEN_EXCHANGE: &str = "urn:ietf:params:oauth:grant-type:token-exchange";
pub(super) const ACCESS_TOKEN: &str = "urn:ietf:params:oauth:token-type:access_token";
pub(super) const JWT: &str = "urn:ietf:params:oauth:token-type:jwt";

/// Life of a token whose server does not tell it (RFC 6749 5.1: it should).
const UNTOLD: Duration = Duration::from_secs(60);
/// No token is kept longer, whatever its server says.
const LONGEST: Duration = Duration::from_secs(24 * 3_600);
/// Largest answer, bytes.
const MAX_ANSWER: usize = 64 << 10;

/// Why there is no token. Never holds one.
#[derive(Debug, thiserror::Error)]
pub enum GrantError {
    #[error("token endpoint: {0}")]
    Endpoint(#[from] EndpointError),
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error("the authorization server refused: {error}{}", description.as_ref().map(|d| format!(" ({d})")).unwrap_or_default())]
    Refused {
        error: String,
        description: Option<String>,
    },
    #[error("the authorization server's answer ({status}): {why}")]
    Answer {
        status: StatusCode,
        why: &'static str,
    },
    #[error("client authentication: {0}")]
    Authentication(#[from] ClientAuthenticationError),
    #[error("JWT-SVID: {0}")]
    Identity(#[from] IdentityError),
    #[error("subject token: {0}")]
    Subject(String),
    #[error("no token within {0:?}")]
    Timeout(Duration),
    #[error("too many tokens are being got for this workload")]
    Busy,
    #[error("the agent ends")]
    Ended,
}

impl GrantError {
    /// For the application: which part failed, without addresses.
    pub fn told(&self) -> String {
        match self {
            Self::Refused { error, .. } => format!("the authorization server refused: {error}"),
            Self::Timeout(_)
            | Self::Endpoint(EndpointError::Fetch(FetchError::Timeout { .. }))
            | Self::Fetch(FetchError::Timeout { .. }) => {
                "the authorization server did not answer in time".into()
            }
            Self::Endpoint(EndpointError::Fetch(_)) | Self::Fetch(_) => {
                "the authorization server cannot be reached".into()
            }
            Self::Endpoint(_) => "the authorization server's metadata are not its own".into(),
            Self::Answer { why, .. } => format!("the authorization server's answer {why}"),
            Self::Authentication(_) => "the agent cannot authenticate as the client".into(),
            Self::Identity(_) => "no JWT-SVID".into(),
            Self::Subject(_) => "no subject token".into(),
            Self::Busy => "too many tokens are being got for this workload".into(),
            Self::Ended => "the agent ends".into(),
        }
    }
}

/// A form's fields; values may be secrets.
pub(super) type Form = Vec<(&'static str, Zeroizing<String>)>;

/// The grant's own fields. Who asks is added by client authentication.
pub(super) fn form(
    wanted: &Wanted,
    subject: Option<Zeroizing<String>>,
    actor: Option<Zeroizing<String>>,
) -> Form {
    let own = |text: &str| Zeroizing::new(text.to_owned());
    let mut form: Form = Vec::new();
    match &wanted.grant {
        Grant::TokenExchange { subject: kind, .. } => {
            form.push(("grant_type", own(TOKEN_EXCHANGE)));
            let subject_type = match kind {
                SubjectKind::Inbound => ACCESS_TOKEN,
                SubjectKind::ServiceAccount(_) => JWT,
            };
            form.push(("subject_token_type", own(subject_type)));
            form.extend(subject.map(|token| ("subject_token", token)));
            form.push(("requested_token_type", own(ACCESS_TOKEN)));
            if let Some(actor) = actor {
                form.push(("actor_token", actor));
                form.push(("actor_token_type", own(JWT)));
            }
        }
        Grant::ClientCredentials | Grant::WorkloadIdentity => {
            form.push(("grant_type", own("client_credentials")));
        }
    }
    form.extend(wanted.audiences.iter().map(|a| ("audience", own(a))));
    form.extend(wanted.resources.iter().map(|r| ("resource", own(r))));
    if !wanted.scopes.is_empty() {
        form.push(("scope", own(&wanted.scopes.join(" "))));
    }
    form
}

/// What was given, and for how long.
#[derive(Debug)]
pub(super) struct Given {
    pub token: Zeroizing<String>,
    pub life: Duration,
}

pub(super) fn read(wanted: &Wanted, answer: &Answer) -> Result<Given, GrantError> {
    let status = answer.status;
    let wrong = |why| GrantError::Answer { status, why };
    if answer.body.len() > MAX_ANSWER {
        return Err(wrong("is too large"));
    }
    let members = object(&answer.body);
    if status != StatusCode::OK {
        // RFC 6749 5.2: 400, or 401 for client authentication; others say it, too.
        let error = members.as_ref().and_then(|m| text(m, "error"));
        let Some(error) = error else {
            return Err(wrong("is neither a token nor an error of RFC 6749"));
        };
        return Err(GrantError::Refused {
            error: clean(error, 64),
            description: (members.as_ref().and_then(|m| text(m, "error_description")))
                .map(|d| clean(d, 200)),
        });
    }
    let members = members.ok_or_else(|| wrong("is no strict JSON object"))?;
    let token = text(&members, "access_token").ok_or_else(|| wrong("has no access_token"))?;
    if !is_token(token) {
        return Err(wrong("has an access_token that no header can carry"));
    }
    let exchange = matches!(wanted.grant, Grant::TokenExchange { .. });
    let kind = text(&members, "token_type").ok_or_else(|| wrong("has no token_type"))?;
    let not_applicable = exchange && kind.eq_ignore_ascii_case("N_A");
    if !kind.eq_ignore_ascii_case("bearer") && !not_applicable {
        return Err(wrong("has a token_type that is not Bearer"));
    }
    if exchange {
        match text(&members, "issued_token_type") {
            Some(ACCESS_TOKEN | JWT) => {}
            Some(_) => return Err(wrong("has an issued_token_type that was not asked for")),
            None => return Err(wrong("has no issued_token_type")),
        }
    }
    let life = match members.get("expires_in") {
        None => UNTOLD,
        Some(value) => match value.as_u64() {
            Some(seconds) if seconds > 0 => Duration::from_secs(seconds).min(LONGEST),
            _ => return Err(wrong("has an expires_in that is no number of seconds")),
        },
    };
    Ok(Given {
        token: Zeroizing::new(token.to_owned()),
        life,
    })
}

fn object(body: &Bytes) -> Option<Map<String, Value>> {
    match json::parse(body) {
        Ok(Value::Object(members)) => Some(members),
        _ => None,
    }
}

fn text<'a>(members: &'a Map<String, Value>, name: &str) -> Option<&'a str> {
    members.get(name)?.as_str()
}

/// `b64token` (RFC 6750 2.1): what stands in a header as it is.
pub fn is_token(text: &str) -> bool {
    let body = text.trim_end_matches('=');
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"-._~+/".contains(&b);
    !body.is_empty() && text.len() <= MAX_TOKEN && body.bytes().all(fits)
}

/// What a server says, for logs and answers: its characters (RFC 6749 5.2), cut, and
/// without long words, which may be tokens.
fn clean(text: &str, longest: usize) -> String {
    const WORD: usize = 40;
    let fits = |c: &char| matches!(c, ' '..='!' | '#'..='[' | ']'..='~');
    let plain: String = text.chars().filter(fits).take(4 * longest).collect();
    let words = plain.split(' ').map(|word| match word.len() > WORD {
        true => "[..]",
        false => word,
    });
    let mut cut = words.collect::<Vec<_>>().join(" ");
    cut.truncate(longest);
    cut
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oauth::{ClientAuthentication, Server};

    fn wanted(grant: Grant) -> Wanted {
        Wanted {
            object: "shop/to-back".into(),
            grant,
            server: Some(Server::Endpoint("https://as/token".into())),
            client_id: None,
            authentication: ClientAuthentication::None {},
            audiences: vec!["back".into(), "other".into()],
            resources: vec!["https://back".into()],
            scopes: vec!["a".into(), "b".into()],
            prefix: "Bearer ".into(),
            timeout: Duration::from_secs(5),
        }
    }

    fn exchange() -> Grant {
        Grant::TokenExchange {
            subject: SubjectKind::Inbound,
            actor: true,
        }
    }

    fn outcome(grant: Grant, status: u16, body: &str) -> Result<Given, String> {
        let answer = Answer {
            status: StatusCode::from_u16(status).expect("a status"),
            headers: http::HeaderMap::new(),
            body: Bytes::copy_from_slice(body.as_bytes()),
        };
        read(&wanted(grant), &answer).map_err(|e| e.to_string())
    }

    #[test]
    fn an_exchange_names_both_tokens_and_all_that_is_wanted() {
        let secret = |text: &str| Some(Zeroizing::new(text.to_owned()));
        let form = form(&wanted(exchange()), secret("s"), secret("a"));
        let form: Vec<(&str, &str)> = form.iter().map(|(n, v)| (*n, v.as_str())).collect();
        let expected = [
            ("grant_type", TOKEN_EXCHANGE),
            ("subject_token_type", ACCESS_TOKEN),
            ("subject_token", "s"),
            ("requested_token_type", ACCESS_TOKEN),
            ("actor_token", "a"),
            ("actor_token_type", JWT),
            ("audience", "back"),
            ("audience", "other"),
            ("resource", "https://back"),
            ("scope", "a b"),
        ];
        assert_eq!(form, expected);
    }

    #[test]
    fn answers_are_read_strictly() {
        let plain = || Grant::ClientCredentials;
        let long = "x".repeat(MAX_TOKEN + 1);
        let echo = format!(
            r#"{{"error": "invalid_grant", "error_description": "token {} is\n\"bad\" {}"}}"#,
            "eyJ".repeat(30),
            "x ".repeat(500)
        );
        for (grant, status, body, expected) in [
            (plain(), 200, r#"{"access_token": "t", "token_type": "Bearer", "expires_in": 9}"#.to_owned(), "t 9"),
            (plain(), 200, r#"{"access_token": "t", "token_type": "bearer"}"#.into(), "t 60"),
            (plain(), 200, r#"{"access_token": "t", "token_type": "Bearer", "expires_in": 999999999}"#.into(), "t 86400"),
            (plain(), 200, r#"{"access_token": "t", "token_type": "Bearer", "expires_in": "9"}"#.into(), "expires_in"),
            (plain(), 200, r#"{"access_token": "t", "token_type": "Bearer", "expires_in": -1}"#.into(), "expires_in"),
            (plain(), 200, r#"{"access_token": "t", "token_type": "Bearer", "expires_in": 0}"#.into(), "expires_in"),
            (plain(), 200, r#"{"access_token": "t"}"#.into(), "no token_type"),
            (plain(), 200, r#"{"access_token": "t", "token_type": "DPoP"}"#.into(), "not Bearer"),
            (plain(), 200, r#"{"access_token": "t", "token_type": "N_A"}"#.into(), "not Bearer"),
            (plain(), 200, r#"{"access_token": "t\r\nx: y", "token_type": "Bearer"}"#.into(), "no header can carry"),
            (plain(), 200, r#"{"access_token": "", "token_type": "Bearer"}"#.into(), "no header can carry"),
            (plain(), 200, format!(r#"{{"access_token": "{long}", "token_type": "Bearer"}}"#), "no header can carry"),
            (plain(), 200, r#"{"access_token": "a", "access_token": "b", "token_type": "Bearer"}"#.into(), "strict JSON"),
            (plain(), 200, r#"{"access_token": 7, "token_type": "Bearer"}"#.into(), "no access_token"),
            (plain(), 200, "<html>".into(), "strict JSON"),
            (plain(), 200, " ".repeat(MAX_ANSWER + 1), "too large"),
            (plain(), 201, r#"{"access_token": "t", "token_type": "Bearer"}"#.into(), "neither a token"),
            (plain(), 400, r#"{"error": "invalid_scope"}"#.into(), "refused: invalid_scope"),
            (plain(), 401, r#"{"error": "invalid_client", "error_description": "who"}"#.into(), "invalid_client (who)"),
            (plain(), 500, "oops".into(), "500"),
            (plain(), 302, String::new(), "302"),
            (plain(), 400, echo, "invalid_grant (token [..] isbad x"),
            (exchange(), 200, format!(r#"{{"access_token": "t", "token_type": "N_A", "issued_token_type": "{JWT}"}}"#), "t 60"),
            (exchange(), 200, format!(r#"{{"access_token": "t", "token_type": "Bearer", "issued_token_type": "{ACCESS_TOKEN}"}}"#), "t 60"),
            (exchange(), 200, r#"{"access_token": "t", "token_type": "Bearer"}"#.into(), "no issued_token_type"),
            (exchange(), 200, r#"{"access_token": "t", "token_type": "Bearer", "issued_token_type": "urn:ietf:params:oauth:token-type:refresh_token"}"#.into(), "not asked for"),
        ] {
            let said = match outcome(grant, status, &body) {
                Ok(given) => format!("{} {}", given.token.as_str(), given.life.as_secs()),
                Err(error) => error,
            };
            assert!(said.contains(expected), "{said} for {body}");
            assert!(said.len() < 400 && !said.contains("eyJ"), "{said}");
        }
    }
}
