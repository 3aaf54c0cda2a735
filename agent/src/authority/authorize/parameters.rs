//! The authorization request (RFC 6749 4.1.1, OpenID Connect Core 3.1.2.1), parsed into
//! what cannot be wrong.
//!
//! First who asks and where the answer may go: while these are not sure, there is an
//! error page and no redirect. All later errors are told to the client.

use super::{
    super::{
        Server,
        clients::{Client, Grant},
        people::PeopleError,
    },
    redirect::RedirectUri,
};

/// Longest query, in bytes.
pub const LONGEST: usize = 8 << 10;
const MOST_PARAMETERS: usize = 64;
const LONGEST_STATE: usize = 2048;
const LONGEST_NONCE: usize = 512;
const LONGEST_HINT: usize = 128;
const MOST_SCOPES: usize = 64;
const MOST_RESOURCES: usize = 8;
/// SHA-256 in base64url: a challenge (RFC 7636 4.2), a thumbprint (RFC 9449 10).
const SHA256_LENGTH: usize = 43;

/// Each at most once (RFC 6749 3.1), and `resource` (RFC 8707 2). Others are ignored.
const ONCE: &[&str] = &[
    "client_id",
    "redirect_uri",
    "response_type",
    "response_mode",
    "scope",
    "state",
    "nonce",
    "code_challenge",
    "code_challenge_method",
    "prompt",
    "max_age",
    "login_hint",
    "dpop_jkt",
    "request",
    "request_uri",
    "registration",
];

/// A request that can be answered.
pub struct Request {
    pub client: Client,
    pub to: Return,
    pub scopes: Vec<String>,
    /// Never empty.
    pub audiences: Vec<String>,
    pub nonce: Option<String>,
    pub challenge: String,
    pub dpop_jkt: Option<String>,
    pub prompt: Prompt,
    /// Seconds.
    pub max_age: Option<u64>,
    pub login_hint: Option<String>,
}

/// `prompt` (OpenID Connect Core 3.1.2.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prompt {
    pub none: bool,
    /// `login`, or `select_account`: the login page is where another is named.
    pub login: bool,
    pub consent: bool,
}

/// Where the answer goes.
#[derive(Clone)]
pub struct Return {
    pub uri: RedirectUri,
    pub state: Option<String>,
}

/// Why a request is not granted.
pub enum Refusal {
    /// Nobody can be told but the person.
    Page { why: &'static str },
    /// The client is told.
    Redirect {
        to: Return,
        client: String,
        error: &'static str,
        why: &'static str,
    },
}

/// The parameters that have a value (RFC 6749 3.1: others count as left out).
struct Parameters(Vec<(String, String)>);

impl Parameters {
    /// `Err` is for the person: while it is not known who asks, nobody else can be told.
    fn parse(query: &str) -> Result<Self, &'static str> {
        if query.len() > LONGEST {
            return Err("The request is too long.");
        }
        let all: Vec<_> = form_urlencoded::parse(query.as_bytes())
            .filter(|(_, value)| !value.is_empty())
            .map(|(name, value)| (name.into_owned(), value.into_owned()))
            .take(MOST_PARAMETERS + 1)
            .collect();
        if all.len() > MOST_PARAMETERS {
            return Err("The request has too many parameters.");
        }
        Ok(Self(all))
    }

    fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        let named = self.0.iter().filter(move |(other, _)| other == name);
        named.map(|(_, value)| value.as_str())
    }

    /// `None` too where it is there more than once.
    fn one<'a>(&'a self, name: &'a str) -> Option<&'a str> {
        let mut values = self.all(name);
        values.next().filter(|_| values.next().is_none())
    }

    fn has(&self, name: &str) -> bool {
        self.all(name).next().is_some()
    }
}

/// Error and description; the description has RFC 6749 4.1.2.1's characters.
type Wrong = (&'static str, &'static str);

/// The request of this query, or who is told what is wrong with it.
pub async fn validate(
    server: &Server,
    query: &str,
) -> Result<Result<Request, Refusal>, PeopleError> {
    let parameters = match Parameters::parse(query) {
        Ok(parameters) => parameters,
        Err(why) => return Ok(Err(Refusal::Page { why })),
    };
    let client = match parameters.one("client_id") {
        Some(id) => server.client(id).await?,
        None => None,
    };
    let Some(client) = client else {
        let why = "The application that sent you here is not known to this server.";
        return Ok(Err(Refusal::Page { why }));
    };
    let uri = parameters.one("redirect_uri");
    let Some(uri) = uri.and_then(|uri| RedirectUri::of(&client, uri)) else {
        let why = "The application wants you to be sent to an address that is not registered.";
        return Ok(Err(Refusal::Page { why }));
    };
    let state = parameters.one("state").filter(|s| s.len() <= LONGEST_STATE);
    let to = Return {
        uri,
        state: state.map(str::to_owned),
    };
    let id = client.id.clone();
    Ok(
        rest(&parameters, client, to.clone(), &server.config.issuer).map_err(|(error, why)| {
            Refusal::Redirect {
                to,
                client: id,
                error,
                why,
            }
        }),
    )
}

/// All that the client is told of.
fn rest(
    parameters: &Parameters,
    client: Client,
    to: Return,
    issuer: &str,
) -> Result<Request, Wrong> {
    const INVALID: &str = "invalid_request";
    if ONCE.iter().any(|name| parameters.all(name).count() > 1) {
        return Err((INVALID, "a parameter is there more than once"));
    }
    if parameters.has("state") && to.state.is_none() {
        return Err((INVALID, "state is too long"));
    }
    // OpenID Connect Core 3.1.2.6.
    for (name, error) in [
        ("request", "request_not_supported"),
        ("request_uri", "request_uri_not_supported"),
        ("registration", "registration_not_supported"),
    ] {
        if parameters.has(name) {
            return Err((error, "request objects and registration are not supported"));
        }
    }
    if !client.grants.contains(&Grant::AuthorizationCode) {
        let why = "the client may not use the authorization code grant";
        return Err(("unauthorized_client", why));
    }
    match parameters.one("response_type") {
        Some("code") => {}
        Some(_) => return Err(("unsupported_response_type", "only code is supported")),
        None => return Err((INVALID, "response_type is missing")),
    }
    if parameters
        .one("response_mode")
        .is_some_and(|mode| mode != "query")
    {
        return Err((INVALID, "only the response mode query is supported"));
    }
    let challenge = challenge(parameters)?;
    let scopes = scopes(parameters, &client)?;
    let audiences = audiences(parameters, &client, issuer)?;
    let nonce = parameters.one("nonce");
    if nonce.is_some_and(|nonce| nonce.len() > LONGEST_NONCE) {
        return Err((INVALID, "nonce is too long"));
    }
    let dpop_jkt = parameters.one("dpop_jkt");
    if dpop_jkt.is_some_and(|jkt| !is_sha256(jkt)) {
        return Err((INVALID, "dpop_jkt is no SHA-256 thumbprint"));
    }
    let max_age = parameters.one("max_age").map(seconds).transpose()?;
    let hint = parameters
        .one("login_hint")
        .filter(|hint| hint.len() <= LONGEST_HINT);
    Ok(Request {
        scopes,
        audiences,
        nonce: nonce.map(str::to_owned),
        challenge,
        dpop_jkt: dpop_jkt.map(str::to_owned),
        prompt: prompt(parameters)?,
        max_age,
        login_hint: hint.map(str::to_owned),
        client,
        to,
    })
}

/// S256 is the only method: `plain` protects from nobody who sees the request (RFC 9700
/// 2.1.1).
fn challenge(parameters: &Parameters) -> Result<String, Wrong> {
    const INVALID: &str = "invalid_request";
    let Some(challenge) = parameters.one("code_challenge") else {
        return Err((INVALID, "code_challenge is missing: PKCE is required"));
    };
    if parameters.one("code_challenge_method") != Some("S256") {
        return Err((INVALID, "code_challenge_method must be S256"));
    }
    match is_sha256(challenge) {
        true => Ok(challenge.to_owned()),
        false => Err((INVALID, "code_challenge is no SHA-256 in base64url")),
    }
}

fn is_sha256(text: &str) -> bool {
    let letter = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    text.len() == SHA256_LENGTH && text.bytes().all(letter)
}

/// At least one, and none that the client may not ask for.
fn scopes(parameters: &Parameters, client: &Client) -> Result<Vec<String>, Wrong> {
    let asked = parameters.one("scope").unwrap_or_default();
    let mut scopes: Vec<String> = Vec::new();
    for scope in asked.split(' ').filter(|s| !s.is_empty()) {
        if !client.scopes.iter().any(|s| s == scope) || scopes.len() >= MOST_SCOPES {
            return Err(("invalid_scope", "a scope is not the client's to ask for"));
        }
        if !scopes.iter().any(|s| s == scope) {
            scopes.push(scope.to_owned());
        }
    }
    match scopes.is_empty() {
        true => Err(("invalid_scope", "scope is missing")),
        false => Ok(scopes),
    }
}

/// What `resource` names (RFC 8707), else the client's first audience, else this server.
fn audiences(parameters: &Parameters, client: &Client, issuer: &str) -> Result<Vec<String>, Wrong> {
    let mut audiences: Vec<String> = Vec::new();
    for resource in parameters.all("resource") {
        let known = client.audiences.iter().any(|a| a == resource);
        if !known || resource.contains('#') || audiences.len() >= MOST_RESOURCES {
            return Err((
                "invalid_target",
                "a resource is not the client's to ask for",
            ));
        }
        if !audiences.iter().any(|a| a == resource) {
            audiences.push(resource.to_owned());
        }
    }
    if audiences.is_empty() {
        let first = client.audiences.first().map_or(issuer, String::as_str);
        audiences.push(first.to_owned());
    }
    Ok(audiences)
}

fn prompt(parameters: &Parameters) -> Result<Prompt, Wrong> {
    let mut prompt = Prompt::default();
    let words = parameters.one("prompt").unwrap_or_default();
    for word in words.split(' ').filter(|w| !w.is_empty()) {
        match word {
            "none" => prompt.none = true,
            "login" | "select_account" => prompt.login = true,
            "consent" => prompt.consent = true,
            _ => return Err(("invalid_request", "prompt has an unknown value")),
        }
    }
    match prompt.none && (prompt.login || prompt.consent) {
        true => Err(("invalid_request", "prompt has none beside other values")),
        false => Ok(prompt),
    }
}

fn seconds(text: &str) -> Result<u64, Wrong> {
    let digits = text.len() <= 10 && text.bytes().all(|b| b.is_ascii_digit());
    let seconds = digits.then(|| text.parse().ok()).flatten();
    seconds.ok_or(("invalid_request", "max_age is no number of seconds"))
}

/// The query for after a login: what asked for that login is done with.
pub fn after_login(query: &str) -> String {
    let mut after = form_urlencoded::Serializer::new(String::new());
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        match &*name {
            "max_age" => {}
            "prompt" => {
                let left: Vec<_> = value
                    .split(' ')
                    .filter(|word| !matches!(*word, "login" | "select_account"))
                    .collect();
                after.append_pair(&name, &left.join(" "));
            }
            _ => {
                after.append_pair(&name, &value);
            }
        }
    }
    after.finish()
}
