//! Who may ask the admin address.
//!
//! On loopback whoever is on this machine, but no web page in an operator's browser:
//! names that lead here by DNS are refused, and what other sites' pages send. Elsewhere
//! it takes the token, in a header or, for people, for a cookie.

use std::{
    collections::VecDeque,
    net::{IpAddr, SocketAddr},
    sync::{Mutex, MutexGuard},
};

use aws_lc_rs::digest::{SHA256, digest};
use http::{
    HeaderMap, Method, StatusCode,
    header::{ACCEPT, AUTHORIZATION, COOKIE, HOST, ORIGIN},
    uri::Authority,
};
use subtle::ConstantTimeEq as _;

use crate::{
    authority::people::{Limit, hash, random},
    config::Guard,
    oauth::private_file,
};

const SHORTEST_TOKEN: usize = 32;
/// Seconds that somebody stays logged in, and how many may be at once.
const SESSION: u64 = 8 * 3_600;
const MOST_SESSIONS: usize = 32;
/// Wrong tokens of one address in a minute.
const ATTEMPTS: u32 = 10;
/// `__Host-`: of this host alone, and only over TLS (RFC 6265bis 4.1.3.2).
const COOKIE_NAME: &str = "__Host-postern-admin";

pub struct Access {
    address: IpAddr,
    secret: Option<Secret>,
}

struct Secret {
    /// SHA-256 of the token, so that comparing takes the same time for any length.
    token: [u8; 32],
    limit: Limit,
    sessions: Mutex<VecDeque<Session>>,
}

struct Session {
    hash: String,
    until: u64,
}

/// Of a request, what decides.
pub struct Asked<'a> {
    pub method: &'a Method,
    pub path: &'a str,
    pub headers: &'a HeaderMap,
    pub from: IpAddr,
    /// Seconds since 1970.
    pub now: u64,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// Let through.
    Pass,
    /// A person's browser: to the form.
    LogIn,
    Refused(StatusCode, &'static str),
}

#[derive(Debug, PartialEq, Eq)]
pub enum Login {
    /// The cookie to set.
    In(String),
    Wrong,
    TooMany,
}

impl Access {
    /// An error says which key is wrong, and why.
    pub fn new(address: SocketAddr, guard: Option<&Guard>) -> Result<Self, String> {
        let secret = match guard {
            None => None,
            Some(guard) => {
                let wrong = |why: String| format!("listen.adminToken: {why}");
                let content = private_file(&guard.token).map_err(|e| wrong(e.to_string()))?;
                let token = content.trim_ascii();
                if token.len() < SHORTEST_TOKEN || !token.iter().all(u8::is_ascii_graphic) {
                    return Err(wrong(format!(
                        "{} has to hold {SHORTEST_TOKEN} printable characters or more, without spaces",
                        guard.token.display()
                    )));
                }
                Some(Secret {
                    token: sha256(token),
                    limit: Limit::new(ATTEMPTS),
                    sessions: Mutex::default(),
                })
            }
        };
        Ok(Self {
            address: address.ip(),
            secret,
        })
    }

    /// Whether people log in here.
    pub fn guarded(&self) -> bool {
        self.secret.is_some()
    }

    pub fn judge(&self, asked: &Asked<'_>) -> Answer {
        if let Some(why) = foreign(asked) {
            return Answer::Refused(StatusCode::FORBIDDEN, why);
        }
        let Some(secret) = &self.secret else {
            // With a token a foreign name gets nobody anywhere.
            return match self.is_ours(asked.headers) {
                true => Answer::Pass,
                false => Answer::Refused(
                    StatusCode::MISDIRECTED_REQUEST,
                    "this is no name of the admin address",
                ),
            };
        };
        if matches!(asked.path, "/login" | "/style.css") || secret.knows(asked) {
            return Answer::Pass;
        }
        let bearer = asked.headers.get(AUTHORIZATION).map(|value| {
            let (scheme, token) = value.as_bytes().split_at_checked(7)?;
            scheme.eq_ignore_ascii_case(b"bearer ").then_some(token)
        });
        match bearer {
            Some(Some(token)) => match secret.check(token, asked.from, asked.now) {
                Ok(true) => Answer::Pass,
                Ok(false) => Answer::Refused(StatusCode::UNAUTHORIZED, WRONG),
                Err(TooMany) => Answer::Refused(StatusCode::TOO_MANY_REQUESTS, TOO_MANY),
            },
            Some(None) => Answer::Refused(StatusCode::UNAUTHORIZED, "a Bearer token is wanted"),
            None if wants_page(asked) => Answer::LogIn,
            None => Answer::Refused(StatusCode::UNAUTHORIZED, "a token is wanted"),
        }
    }

    /// By the form.
    pub fn log_in(&self, token: &str, from: IpAddr, now: u64) -> Login {
        let Some(secret) = &self.secret else {
            return Login::Wrong;
        };
        match secret.check(token.trim().as_bytes(), from, now) {
            Ok(true) => {}
            Ok(false) => return Login::Wrong,
            Err(TooMany) => return Login::TooMany,
        }
        let Ok(value) = random::<32>() else {
            tracing::error!("no random number for a session");
            return Login::Wrong;
        };
        let mut sessions = secret.sessions();
        sessions.retain(|session| session.until > now);
        if sessions.len() >= MOST_SESSIONS {
            sessions.pop_front();
        }
        sessions.push_back(Session {
            hash: hash(&value),
            until: now + SESSION,
        });
        Login::In(cookie(&value, SESSION))
    }

    /// Ends the session that the request has, and says what makes the cookie go.
    pub fn log_out(&self, headers: &HeaderMap) -> String {
        if let (Some(secret), Some(value)) = (&self.secret, session(headers)) {
            let hash = hash(value);
            secret.sessions().retain(|session| session.hash != hash);
        }
        cookie("", 0)
    }

    /// Whether the request is for a name that no foreign DNS server can have answered.
    /// The port may be another: of a tunnel, for example.
    fn is_ours(&self, headers: &HeaderMap) -> bool {
        let Some(host) = headers.get(HOST) else {
            // No browser sends none.
            return true;
        };
        let Some(name) = host
            .to_str()
            .ok()
            .and_then(|host| host.parse::<Authority>().ok())
        else {
            return false;
        };
        let name = name.host().trim_start_matches('[').trim_end_matches(']');
        name.eq_ignore_ascii_case("localhost")
            || (name.parse::<IpAddr>()).is_ok_and(|ip| ip.is_loopback() || ip == self.address)
    }
}

const WRONG: &str = "the token is wrong";
const TOO_MANY: &str = "too many wrong tokens; try again in a minute";

struct TooMany;

impl Secret {
    fn check(&self, token: &[u8], from: IpAddr, now: u64) -> Result<bool, TooMany> {
        if self.limit.spent(from, now) {
            return Err(TooMany);
        }
        let right: bool = sha256(token).ct_eq(&self.token).into();
        if !right {
            self.limit.admits(from, now);
        }
        Ok(right)
    }

    /// Whether the request is of somebody who has logged in.
    fn knows(&self, asked: &Asked<'_>) -> bool {
        let Some(value) = session(asked.headers) else {
            return false;
        };
        // By the hash: how long it takes to find tells nothing about the value.
        let hash = hash(value);
        let sessions = self.sessions();
        (sessions.iter()).any(|session| session.hash == hash && session.until > asked.now)
    }

    fn sessions(&self) -> MutexGuard<'_, VecDeque<Session>> {
        self.sessions.lock().expect("no panic while it is held")
    }
}

/// Why a request is another site's doing, if it is. Only a link may lead here.
fn foreign(asked: &Asked<'_>) -> Option<&'static str> {
    let header = |name: &str| asked.headers.get(name).map(|value| value.as_bytes());
    let reads = matches!(*asked.method, Method::GET | Method::HEAD);
    match header("sec-fetch-site") {
        Some(b"same-origin" | b"none") => None,
        Some(_) if reads && asked.path == "/" && header("sec-fetch-mode") == Some(b"navigate") => {
            None
        }
        Some(_) => Some("a page of another site sent this"),
        // Browsers that are too old to say it say at least this.
        None if reads => None,
        None => {
            let origin = asked.headers.get(ORIGIN)?.as_bytes();
            let host = asked
                .headers
                .get(HOST)
                .map_or(&b""[..], |host| host.as_bytes());
            let same = [&b"http://"[..], b"https://"]
                .iter()
                .any(|scheme| origin.strip_prefix(*scheme) == Some(host));
            (!same).then_some("a page of another site sent this")
        }
    }
}

fn wants_page(asked: &Asked<'_>) -> bool {
    let accept = asked
        .headers
        .get(ACCEPT)
        .and_then(|accept| accept.to_str().ok());
    *asked.method == Method::GET && accept.is_some_and(|accept| accept.contains("text/html"))
}

fn session(headers: &HeaderMap) -> Option<&str> {
    let all = headers.get_all(COOKIE).into_iter();
    all.filter_map(|value| value.to_str().ok())
        .flat_map(|cookies| cookies.split(';'))
        .filter_map(|cookie| cookie.trim().split_once('='))
        .find(|(name, _)| *name == COOKIE_NAME)
        .map(|(_, value)| value)
}

fn cookie(value: &str, seconds: u64) -> String {
    format!("{COOKIE_NAME}={value}; Path=/; Secure; HttpOnly; SameSite=Strict; Max-Age={seconds}")
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = digest(&SHA256, bytes);
    digest.as_ref().try_into().expect("SHA-256 has 32 bytes")
}

#[cfg(test)]
mod tests;
