//! Who is logged in, by a cookie of 256 random bits. Of a session's cookie the store has
//! the hash alone.
//!
//! Before a login the same cookie, of a value that the store does not know, ties forms
//! to the browser that got them. A login always makes a new value, so that nobody can
//! have planted it (session fixation).

use http::{HeaderMap, HeaderValue, header::COOKIE};
use zeroize::Zeroizing;

use super::{
    super::{Server, User},
    PeopleError, hash, random,
};

/// The prefix makes browsers refuse it from other hosts and without TLS (RFC 6265bis
/// 4.1.3.2).
const NAME: &str = "__Host-postern";
const ATTRIBUTES: &str = "Path=/; Secure; HttpOnly; SameSite=Lax";
/// 32 bytes in base64url.
const LENGTH: usize = 43;
/// A login that is not used for this long is over before its time.
const IDLE: u64 = 2 * 3600;
/// How exactly it is known when a login was used: one write in this time.
const TOUCH: u64 = 60;

/// A cookie's value. Never shown, and never stored.
pub struct Cookie(Zeroizing<String>);

/// A login.
pub struct Session {
    pub user: User,
    /// When the person gave the password, seconds since 1970.
    pub auth_time: u64,
}

/// The browser that asks.
pub struct Browser {
    pub cookie: Cookie,
    /// It has no cookie of ours yet and must be given this one.
    pub new: bool,
    pub session: Option<Session>,
}

impl Cookie {
    pub fn generate() -> Result<Self, PeopleError> {
        Ok(Self(Zeroizing::new(random::<32>()?)))
    }

    /// Of a request; one that is not of our form is none.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        let pairs = headers.get_all(COOKIE).into_iter();
        let mut values = pairs
            .filter_map(|header| header.to_str().ok())
            .flat_map(|header| header.split(';'))
            .filter_map(|pair| pair.trim().strip_prefix(NAME)?.strip_prefix('='));
        let value = values.next()?;
        let letter = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        (value.len() == LENGTH && value.bytes().all(letter))
            .then(|| Self(Zeroizing::new(value.to_owned())))
    }

    pub fn value(&self) -> &str {
        &self.0
    }

    fn hash(&self) -> String {
        hash(&self.0)
    }

    /// `Set-Cookie`; without a lifetime in seconds the browser keeps it until it ends.
    pub fn set(&self, lifetime: Option<u64>) -> HeaderValue {
        let text = match lifetime {
            Some(seconds) => format!("{NAME}={}; {ATTRIBUTES}; Max-Age={seconds}", *self.0),
            None => format!("{NAME}={}; {ATTRIBUTES}", *self.0),
        };
        let mut header = HeaderValue::try_from(text).expect("base64url and attributes");
        header.set_sensitive(true);
        header
    }

    /// `Set-Cookie` that takes it away.
    pub fn clear() -> HeaderValue {
        HeaderValue::try_from(format!("{NAME}=; {ATTRIBUTES}; Max-Age=0")).expect("ASCII")
    }
}

impl Server {
    /// The browser, and who is logged in with it.
    pub(in super::super) async fn browser(
        &self,
        headers: &HeaderMap,
    ) -> Result<Browser, PeopleError> {
        let Some(cookie) = Cookie::of(headers) else {
            return Ok(Browser {
                cookie: Cookie::generate()?,
                new: true,
                session: None,
            });
        };
        let session = self.logged_in(&cookie).await?;
        Ok(Browser {
            cookie,
            new: false,
            session,
        })
    }

    async fn logged_in(&self, cookie: &Cookie) -> Result<Option<Session>, PeopleError> {
        let (hash, now) = (cookie.hash(), self.clock.seconds());
        let idle_since = now.saturating_sub(IDLE);
        let stored = self.store.stored_session(&hash, now, idle_since);
        let Some(stored) = stored.await? else {
            return Ok(None);
        };
        // Who was disabled or removed is not logged in any more.
        let user = self.user(&stored.subject).await?.filter(|u| !u.disabled);
        let Some(user) = user else {
            return Ok(None);
        };
        if now >= stored.seen.saturating_add(TOUCH) {
            self.store.touch_session(&hash, now).await?;
        }
        Ok(Some(Session {
            user,
            auth_time: stored.auth_time,
        }))
    }

    /// Begins a session in place of whatever the browser had; its `Set-Cookie`.
    pub(super) async fn log_in(
        &self,
        before: &Cookie,
        user: &User,
    ) -> Result<HeaderValue, PeopleError> {
        let (cookie, now) = (Cookie::generate()?, self.clock.seconds());
        let lifetime = self.config.people.session.0.as_secs();
        self.store.end_session(&before.hash()).await?;
        let (hash, expires) = (cookie.hash(), now.saturating_add(lifetime));
        self.store
            .add_session(&hash, &user.id, now, expires)
            .await?;
        Ok(cookie.set(Some(lifetime)))
    }

    pub(super) async fn log_out(&self, cookie: &Cookie) -> Result<(), PeopleError> {
        Ok(self.store.end_session(&cookie.hash()).await?)
    }
}
