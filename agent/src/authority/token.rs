//! The token endpoint (RFC 6749 3.2): authorization codes with PKCE (RFC 7636), refresh
//! tokens that are used once (RFC 9700 4.14.2), client credentials, and token exchange
//! (RFC 8693). Resource indicators (RFC 8707) narrow what a token is for.
//!
//! What is answered was committed before. A code is taken by one statement; a refresh
//! token is taken in the transaction that keeps its successor. An answer that is lost on
//! its way is lost: there is no grace in which an old refresh token works again, since
//! nobody could tell its owner from a thief.

use aws_lc_rs::digest;
use axum::{
    Json, Router,
    extract::{Request, State},
    response::{IntoResponse as _, Response},
    routing::post,
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Map, Value, json};
use subtle::ConstantTimeEq as _;

use super::{
    Server, Shared, User,
    client_auth::{Authenticated, authenticate},
    clients::{Client, Grant, TokenFormat},
    dpop,
    error::{Code, OAuthError, no_store},
    issue::{self, Access, Subject},
    keys::hash,
    present::{self, Presented},
    request::{Asker, Form},
    store::{Family, Issued, Refreshed, Taken},
};
use crate::{audit::AuthorityRecord, identity::fingerprint};

pub const EXCHANGE: &str = "urn:ietf:params:oauth:grant-type:token-exchange";
const ACCESS_TOKEN: &str = "urn:ietf:params:oauth:token-type:access_token";
const JWT: &str = "urn:ietf:params:oauth:token-type:jwt";
/// Most `act` inside each other, the new one included.
const MAX_ACTORS: usize = 4;

pub fn routes() -> Router<Shared> {
    Router::new().route("/token", post(token))
}

async fn token(State(server): State<Shared>, request: Request) -> Response {
    let asker = Asker::new(&request);
    let mut record = asker.record("grant");
    let answer = match Form::read(request).await {
        Ok(form) => granted(&server, &asker, &form, &mut record).await,
        Err(error) => Err(error),
    };
    match answer {
        Ok(answer) => {
            server.told(record);
            (no_store(), Json(answer)).into_response()
        }
        Err(error) => {
            tell_refusal(&server, record, &error);
            error.into_response()
        }
    }
}

/// Writes down a refusal.
pub fn tell_refusal(server: &Server, record: AuthorityRecord, error: &OAuthError) {
    server.told(AuthorityRecord {
        event: if error.reuse { "reuse" } else { "refusal" },
        client: record.client.or_else(|| error.client.clone()),
        error: Some(error.code.name()),
        reason: error.reason(),
        ..record
    });
}

async fn granted(
    server: &Server,
    asker: &Asker,
    form: &Form,
    record: &mut AuthorityRecord,
) -> Result<Value, OAuthError> {
    let asked = form.required("grant_type", "grant_type is missing")?;
    let kind = match asked {
        "authorization_code" => Grant::AuthorizationCode,
        "refresh_token" => Grant::RefreshToken,
        "client_credentials" => Grant::ClientCredentials,
        EXCHANGE => Grant::TokenExchange,
        _ => {
            let why = "grant_type is not one of this server's";
            return Err(OAuthError::new(Code::UnsupportedGrantType, why));
        }
    };
    record.grant = Some(asked.to_owned());
    let Authenticated { client, method } = authenticate(server, asker, form).await?;
    record.client = Some(client.id.clone());
    record.authentication = Some(method);
    if !client.may(kind) {
        let why = "the client is not registered for this grant";
        return Err(OAuthError::new(Code::UnauthorizedClient, why));
    }
    let bound = binding(server, asker, &client).await?;
    let asked = Asked {
        server,
        form,
        client: &client,
        bound,
    };
    match kind {
        Grant::AuthorizationCode => asked.code(record).await,
        Grant::RefreshToken => asked.refresh(record).await,
        Grant::ClientCredentials => asked.credentials(record).await,
        Grant::TokenExchange => asked.exchange(record).await,
    }
}

/// `cnf` of the tokens: the certificate shown (RFC 8705 3), the key proven (RFC 9449 6).
async fn binding(
    server: &Server,
    asker: &Asker,
    client: &Client,
) -> Result<Option<Value>, OAuthError> {
    let mut bound = Map::new();
    let url = server.config.endpoint("/token");
    if let Some(jkt) = dpop::thumbprint(server, asker, "POST", &url, None).await? {
        bound.insert("jkt".into(), jkt.into());
    } else if client.dpop_bound {
        let why = "this client's tokens are bound: a DPoP proof is needed";
        return Err(OAuthError::new(Code::InvalidDpopProof, why));
    }
    if client.certificate_bound {
        let leaf = asker.certificates.first().ok_or_else(|| {
            OAuthError::request("this client's tokens are bound: a certificate is needed")
        })?;
        let thumbprint = URL_SAFE_NO_PAD.encode(fingerprint(leaf));
        bound.insert("x5t#S256".into(), thumbprint.into());
    }
    Ok((!bound.is_empty()).then_some(Value::Object(bound)))
}

/// A request whose client is known.
struct Asked<'a> {
    server: &'a Server,
    form: &'a Form,
    client: &'a Client,
    bound: Option<Value>,
}

impl Asked<'_> {
    /// RFC 6749 4.1.3.
    async fn code(&self, record: &mut AuthorityRecord) -> Result<Value, OAuthError> {
        let code = self.form.required("code", "code is missing")?;
        let redirect = self
            .form
            .required("redirect_uri", "redirect_uri is missing")?;
        let verifier = self
            .form
            .required("code_verifier", "code_verifier is missing")?;
        let targets = self.form.targets();
        let now = self.server.clock.seconds();
        let code_hash = hash(code);
        let taken = self
            .server
            .store
            .take_code(&code_hash, &self.client.id, now);
        let code = match taken.await? {
            Taken::Code(code) => code,
            Taken::Again { subject } => {
                record.subject = Some(subject);
                let error = OAuthError::grant("the code was used before");
                return Err(error
                    .with_detail("all tokens that came of it are revoked")
                    .of_reuse());
            }
            Taken::No => return Err(OAuthError::grant("the code is unknown or expired")),
        };
        record.subject = Some(code.subject.clone());
        if code.redirect_uri != redirect {
            return Err(OAuthError::grant("redirect_uri is not that of the request"));
        }
        if !verifies(verifier, &code.challenge) {
            return Err(OAuthError::grant("code_verifier does not fit"));
        }
        let jkt = self.bound.as_ref().and_then(|bound| bound.get("jkt"));
        if code.dpop_jkt.is_some() && code.dpop_jkt.as_deref() != jkt.and_then(Value::as_str) {
            let why = "the code is bound to another DPoP key";
            return Err(OAuthError::grant(why));
        }
        let user = self.user(&code.subject).await?;
        let audiences = narrowed(&code.audiences, &targets)?;
        let refreshes = self.client.may(Grant::RefreshToken);
        let tokens = &self.server.config.tokens;
        let refresh = match refreshes {
            true => Some((issue::random()?, now + tokens.refresh_idle.0.as_secs())),
            false => None,
        };
        let mut access = self.access(Subject {
            subject: &code.subject,
            scopes: code.scopes.clone(),
            audiences,
            auth_time: Some(code.auth_time),
            actor: None,
            bound: self.bound.clone(),
            latest: None,
        })?;
        let family = Family {
            id: issue::random()?,
            client: self.client.id.clone(),
            subject: code.subject.clone(),
            scopes: code.scopes.clone(),
            audiences: code.audiences.clone(),
            auth_time: code.auth_time,
            bound: self.refresh_binding(),
            expires: match refreshes {
                true => now + tokens.refresh.0.as_secs(),
                false => access.issued.access_expires,
            },
        };
        access.issued.refresh = refresh.as_ref().map(|(token, idle)| (hash(token), *idle));
        let identity = self.identity(
            &user,
            &code.scopes,
            code.auth_time,
            code.nonce.as_deref(),
            &access,
        )?;
        let kept = self
            .server
            .store
            .add_family(&code_hash, &family, &access.issued);
        if !kept.await? {
            // Somebody else brought it while it was being exchanged.
            return Err(OAuthError::grant("the code was used before").of_reuse());
        }
        self.told(record, &access, &code.scopes);
        let mut answer = answer(&access, &code.scopes, self.bound.as_ref());
        if let Some((token, _idle)) = refresh {
            answer.insert("refresh_token".into(), token.into());
        }
        if let Some(identity) = identity {
            answer.insert("id_token".into(), identity.into());
        }
        Ok(Value::Object(answer))
    }

    /// RFC 6749 6.
    async fn refresh(&self, record: &mut AuthorityRecord) -> Result<Value, OAuthError> {
        let token = self
            .form
            .required("refresh_token", "refresh_token is missing")?;
        let (scopes, targets) = (self.form.scopes()?, self.form.targets());
        let store = &self.server.store;
        let now = self.server.clock.seconds();
        let old = hash(token);
        let family = match store.refreshable(&old, &self.client.id, now).await? {
            Refreshed::Family(family) => family,
            other => return Err(not_refreshed(other, record)),
        };
        record.subject = Some(family.subject.clone());
        if family.bound.is_some() && family.bound != self.refresh_binding() {
            return Err(OAuthError::grant("the token is bound to another key"));
        }
        let user = self.user(&family.subject).await?;
        // What the client is no longer registered for is gone.
        let allowed: Vec<_> = family
            .scopes
            .iter()
            .filter(|scope| self.client.scopes.contains(scope))
            .cloned()
            .collect();
        let scopes = match scopes {
            Some(scopes) if scopes.iter().all(|scope| allowed.contains(scope)) => scopes,
            Some(_) => {
                let why = "scope is more than was granted";
                return Err(OAuthError::new(Code::InvalidScope, why));
            }
            None => allowed,
        };
        let mut access = self.access(Subject {
            subject: &family.subject,
            scopes: scopes.clone(),
            audiences: narrowed(&family.audiences, &targets)?,
            auth_time: Some(family.auth_time),
            actor: None,
            bound: self.bound.clone(),
            latest: Some(family.expires),
        })?;
        let new = issue::random()?;
        let idle = now + self.server.config.tokens.refresh_idle.0.as_secs();
        access.issued.refresh = Some((hash(&new), idle));
        let identity = self.identity(&user, &scopes, family.auth_time, None, &access)?;
        match store.rotate(&old, &family, &access.issued, now).await? {
            Refreshed::Family(_) => {}
            other => return Err(not_refreshed(other, record)),
        }
        self.told(record, &access, &scopes);
        let mut answer = answer(&access, &scopes, self.bound.as_ref());
        answer.insert("refresh_token".into(), new.into());
        if let Some(identity) = identity {
            answer.insert("id_token".into(), identity.into());
        }
        Ok(Value::Object(answer))
    }

    /// RFC 6749 4.4. The client is the subject, so it has no person's scopes.
    async fn credentials(&self, record: &mut AuthorityRecord) -> Result<Value, OAuthError> {
        let identity = self.client.identity();
        record.subject = Some(identity.to_owned());
        // RFC 9068 5: its tokens must not be taken for a person's.
        if self.server.user(identity).await?.is_some() {
            let why = "the client has the id of a person";
            return Err(OAuthError::new(Code::UnauthorizedClient, why));
        }
        let own: Vec<_> = self
            .client
            .scopes
            .iter()
            .filter(|scope| !matches!(scope.as_str(), "openid" | "offline_access"))
            .cloned()
            .collect();
        let scopes = self.scopes_among(own)?;
        let access = self.access(Subject {
            subject: identity,
            scopes: scopes.clone(),
            audiences: self.targets()?,
            auth_time: None,
            actor: None,
            bound: self.bound.clone(),
            latest: None,
        })?;
        self.keep(None, &access.issued).await?;
        self.told(record, &access, &scopes);
        Ok(Value::Object(answer(&access, &scopes, self.bound.as_ref())))
    }

    /// RFC 8693 2. A token that was made for this client is exchanged for one that says
    /// who acts for whom. It is never for more than both had, nor for longer.
    async fn exchange(&self, record: &mut AuthorityRecord) -> Result<Value, OAuthError> {
        let token = self
            .form
            .required("subject_token", "subject_token is missing")?;
        let kind = self
            .form
            .required("subject_token_type", "subject_token_type is missing")?;
        let requested = self
            .form
            .get("requested_token_type")
            .unwrap_or(ACCESS_TOKEN);
        let makes_jwt = self.client.token_format == TokenFormat::Jwt;
        if requested != ACCESS_TOKEN && !(requested == JWT && makes_jwt) {
            let why = "requested_token_type is not one that this client can have";
            return Err(OAuthError::request(why));
        }
        let subject = self.presented(token, kind).await?.ok_or_else(|| {
            // RFC 8693 2.2.2 has no other code for it.
            OAuthError::request("subject_token is not valid here, or no longer")
        })?;
        let sub = subject.text("sub").unwrap_or("").to_owned();
        record.subject = Some(sub.clone());
        if !self.client.is_among(subject.audiences()) {
            let error = OAuthError::request("subject_token was not made for this client");
            return Err(error.with_detail("exchange without permission"));
        }
        self.check_actor().await?;
        let user = self.server.user(&sub).await?;
        // Only people log in: without its account, a token with `auth_time` is nobody's.
        let person = subject.claims.contains_key("auth_time");
        if user.map_or(person, |user| user.disabled) {
            let why = "the subject's account is gone or disabled";
            return Err(OAuthError::request(why));
        }
        let mut actor = Map::from_iter([("sub".to_owned(), json!(self.client.identity()))]);
        if let Some(before) = subject.claims.get("act") {
            actor.insert("act".into(), before.clone());
        }
        let actor = Value::Object(actor);
        if depth(&actor) > MAX_ACTORS {
            return Err(OAuthError::request("too many have acted for the subject"));
        }
        let both: Vec<_> = subject
            .scopes()
            .into_iter()
            .filter(|scope| self.client.scopes.contains(scope))
            .collect();
        let scopes = self.scopes_among(both)?;
        record.actor = Some(self.client.identity().to_owned());
        let access = self.access(Subject {
            subject: &sub,
            scopes: scopes.clone(),
            audiences: self.targets()?,
            auth_time: subject.claims.get("auth_time").and_then(Value::as_u64),
            actor: Some(actor),
            bound: self.bound.clone(),
            latest: Some(subject.number("exp")),
        })?;
        // It ends with the agreement that it comes from.
        self.keep(subject.family.as_deref(), &access.issued).await?;
        self.told(record, &access, &scopes);
        let mut answer = answer(&access, &scopes, self.bound.as_ref());
        answer.insert("issued_token_type".into(), requested.into());
        Ok(Value::Object(answer))
    }

    /// A token of a type that is named. An ID token is not one: it tells a client who
    /// logged in, and is no right to anything.
    async fn presented(&self, token: &str, kind: &str) -> Result<Option<Presented>, OAuthError> {
        match kind {
            ACCESS_TOKEN => present::access(self.server, token).await,
            JWT => Ok(match present::svid(self.server, token) {
                Some(svid) => Some(svid),
                None if token.contains('.') => present::access(self.server, token).await?,
                None => None,
            }),
            _ => Err(OAuthError::request("the token type is not accepted")),
        }
    }

    /// `act` is always who authenticated. An `actor_token` may say the same, no more.
    async fn check_actor(&self) -> Result<(), OAuthError> {
        let pair = (
            self.form.get("actor_token"),
            self.form.get("actor_token_type"),
        );
        let (token, kind) = match pair {
            (None, None) => return Ok(()),
            (Some(token), Some(kind)) => (token, kind),
            _ => {
                let why = "actor_token and actor_token_type belong together";
                return Err(OAuthError::request(why));
            }
        };
        let actor = self.presented(token, kind).await?;
        let actor = actor.ok_or_else(|| OAuthError::request("actor_token is not valid here"))?;
        match actor.text("sub") == Some(self.client.identity()) && !actor.claims.contains_key("act")
        {
            true => Ok(()),
            false => Err(OAuthError::request("actor_token is not the client's own")),
        }
    }

    fn access(&self, subject: Subject<'_>) -> Result<Access, OAuthError> {
        issue::access(self.server, self.client, subject)
    }

    fn identity(
        &self,
        user: &User,
        scopes: &[String],
        auth_time: u64,
        nonce: Option<&str>,
        access: &Access,
    ) -> Result<Option<String>, OAuthError> {
        if !scopes.iter().any(|scope| scope == "openid") {
            return Ok(None);
        }
        let made = issue::identity(
            self.server,
            self.client,
            user,
            scopes,
            auth_time,
            nonce,
            &access.token,
        );
        made.map(Some)
    }

    /// A JWT without family needs no row: only its revocation would be written.
    async fn keep(&self, family: Option<&str>, issued: &Issued) -> Result<(), OAuthError> {
        if family.is_some() || issued.claims.is_some() {
            self.server.store.add_token(family, issued).await?;
        }
        Ok(())
    }

    async fn user(&self, id: &str) -> Result<User, OAuthError> {
        let user = self.server.user(id).await?;
        user.filter(|user| !user.disabled)
            .ok_or_else(|| OAuthError::grant("the person's account is gone or disabled"))
    }

    /// Of a public client, refresh tokens too are bound to its key (RFC 9449 5, RFC 8705
    /// 7.1); others authenticate.
    fn refresh_binding(&self) -> Option<String> {
        let bound = self.bound.as_ref().filter(|_| self.client.is_public());
        bound.map(Value::to_string)
    }

    /// `scope`, if it is among these; without it, all of them.
    fn scopes_among(&self, allowed: Vec<String>) -> Result<Vec<String>, OAuthError> {
        match self.form.scopes()? {
            None => Ok(allowed),
            Some(asked) if asked.iter().all(|scope| allowed.contains(scope)) => Ok(asked),
            Some(_) => {
                let why = "scope is more than this client can have";
                Err(OAuthError::new(Code::InvalidScope, why))
            }
        }
    }

    /// `resource` and `audience`, if the client is registered for them; without any,
    /// the first that it is registered for.
    fn targets(&self) -> Result<Vec<String>, OAuthError> {
        let asked = self.form.targets();
        let known = &self.client.audiences;
        if asked.iter().any(|target| !known.contains(target)) {
            let why = "the client is not registered for this resource or audience";
            return Err(OAuthError::new(Code::InvalidTarget, why));
        }
        if !asked.is_empty() {
            return Ok(asked);
        }
        match known.first() {
            Some(first) => Ok(vec![first.clone()]),
            None => {
                let why = "the client is registered for no audience";
                Err(OAuthError::new(Code::InvalidTarget, why))
            }
        }
    }

    fn told(&self, record: &mut AuthorityRecord, access: &Access, scopes: &[String]) {
        record.jti = Some(access.jti.clone());
        record.scope = scopes.to_vec();
        record.audience = access.audiences.clone();
    }
}

fn not_refreshed(refreshed: Refreshed, record: &mut AuthorityRecord) -> OAuthError {
    match refreshed {
        Refreshed::Again { subject } => {
            record.subject = Some(subject);
            OAuthError::grant("the refresh token was used before")
                .with_detail("its family is revoked")
                .of_reuse()
        }
        _ => OAuthError::grant("the refresh token is unknown, expired or revoked"),
    }
}

/// What was agreed to, or the part of it that is asked for (RFC 8707 2.2).
fn narrowed(agreed: &[String], asked: &[String]) -> Result<Vec<String>, OAuthError> {
    if asked.iter().any(|target| !agreed.contains(target)) {
        let why = "resource is not one that was agreed to";
        return Err(OAuthError::new(Code::InvalidTarget, why));
    }
    Ok(match asked {
        [] => agreed.to_vec(),
        _ => asked.to_vec(),
    })
}

/// RFC 7636 4.6, S256 only.
fn verifies(verifier: &str, challenge: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-._~".contains(&b);
    let well_formed = (43..=128).contains(&verifier.len()) && verifier.bytes().all(allowed);
    let digest = digest::digest(&digest::SHA256, verifier.as_bytes());
    let made = URL_SAFE_NO_PAD.encode(digest);
    well_formed && bool::from(made.as_bytes().ct_eq(challenge.as_bytes()))
}

/// Levels of `act`.
fn depth(actor: &Value) -> usize {
    std::iter::successors(Some(actor), |actor| actor.get("act")).count()
}

/// RFC 6749 5.1.
fn answer(access: &Access, scopes: &[String], bound: Option<&Value>) -> Map<String, Value> {
    let by_dpop = bound.is_some_and(|bound| bound.get("jkt").is_some());
    Map::from_iter([
        ("access_token".to_owned(), json!(access.token)),
        (
            "token_type".to_owned(),
            json!(if by_dpop { "DPoP" } else { "Bearer" }),
        ),
        ("expires_in".to_owned(), json!(access.expires_in)),
        ("scope".to_owned(), json!(scopes.join(" "))),
    ])
}
