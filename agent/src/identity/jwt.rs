//! JWT-SVIDs (SPIFFE JWT-SVID standard): a workload's identity as a short-lived token
//! for one audience, signed by the trust domain's authority.
//!
//! Where agents hold the root, their keys are derived from the root's (HKDF, RFC 5869),
//! one for each period of time: agents that share a root share them without a word
//! between them, nothing more is kept in files, and nothing of the root's key can be
//! told from them. The key of the next period is published a period before it signs,
//! and that of the last for a period after it has stopped to.

use std::{
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::hkdf;
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::{IdentityError, Root, SpiffeId, TrustDomain, authority::write_new};
use crate::jwt::SigningKey;

/// Lifetime of a JWT-SVID.
const LIFETIME: Duration = Duration::from_secs(300);
/// How long a key signs.
const PERIOD: u64 = 30 * 24 * 3_600;
/// Sets these keys apart from whatever else may once be derived.
const PURPOSE: &[u8] = b"postern JWT-SVID keys, version 1";

/// A token for one audience.
#[derive(Clone)]
pub struct JwtSvid {
    pub token: Zeroizing<String>,
    pub expires: SystemTime,
}

/// Never the token.
impl fmt::Debug for JwtSvid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JwtSvid")
            .field("expires", &self.expires)
            .finish_non_exhaustive()
    }
}

/// Signs them on this node.
pub struct JwtIssuer {
    /// `iss`.
    name: String,
    trust_domain: TrustDomain,
    secret: hkdf::Prk,
    /// Where the public keys are written.
    file: PathBuf,
    current: Mutex<Option<Arc<Keys>>>,
    /// Of the file.
    published: Mutex<Option<u64>>,
}

/// Those of a period, and of both beside it.
struct Keys {
    period: u64,
    before: SigningKey,
    signing: SigningKey,
    after: SigningKey,
}

impl JwtIssuer {
    /// `file` gets the public keys (RFC 7517 5).
    pub fn new(root: &Root, trust_domain: &TrustDomain, name: String, file: PathBuf) -> Self {
        let salt = hkdf::Salt::new(hkdf::HKDF_SHA256, PURPOSE);
        Self {
            name,
            trust_domain: trust_domain.clone(),
            secret: salt.extract(&root.secret()),
            file,
            current: Mutex::default(),
            published: Mutex::default(),
        }
    }

    pub fn issue(
        &self,
        id: &SpiffeId,
        audience: &str,
        now: SystemTime,
    ) -> Result<JwtSvid, IdentityError> {
        let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let claims = json!({
            "iss": self.name,
            "sub": id.to_string(),
            "aud": [audience],
            "iat": since.as_secs(),
            "exp": (since + LIFETIME).as_secs(),
        });
        let keys = self.keys(now)?;
        let token = keys
            .signing
            .sign("JWT", &claims)
            .map_err(IdentityError::Sign)?;
        Ok(JwtSvid {
            token: Zeroizing::new(token),
            expires: now + LIFETIME,
        })
    }

    /// The public keys: of now, of what comes and of what was.
    pub fn jwks(&self, now: SystemTime) -> Result<Value, IdentityError> {
        let keys = self.keys(now)?;
        Ok(json!({"keys": [keys.signing.jwk(), keys.after.jwk(), keys.before.jwk()]}))
    }

    /// Writes them to the file, when they are others than are there.
    pub fn publish(&self, now: SystemTime) -> Result<(), IdentityError> {
        let mut published = self.published.lock().expect("no panic while it is held");
        let period = period(now);
        if *published != Some(period) {
            let keys = self.jwks(now)?.to_string();
            if !std::fs::read(&self.file).is_ok_and(|held| held == keys.as_bytes()) {
                write_new(&self.file, keys.as_bytes(), 0o644)?;
            }
            *published = Some(period);
        }
        Ok(())
    }

    fn keys(&self, now: SystemTime) -> Result<Arc<Keys>, IdentityError> {
        let period = period(now);
        let mut current = self.current.lock().expect("no panic while it is held");
        if let Some(keys) = &*current
            && keys.period == period
        {
            return Ok(keys.clone());
        }
        let keys = Arc::new(Keys {
            period,
            before: self.derive(period.saturating_sub(1))?,
            signing: self.derive(period)?,
            after: self.derive(period + 1)?,
        });
        *current = Some(keys.clone());
        Ok(keys)
    }

    fn derive(&self, period: u64) -> Result<SigningKey, IdentityError> {
        // Of 2^32 scalars one is none of the curve; then the next is taken.
        for attempt in 0_u8..=u8::MAX {
            let mut scalar = Zeroizing::new([0; 32]);
            self.secret
                .expand(
                    &[
                        self.trust_domain.as_str().as_bytes(),
                        b"\0",
                        &period.to_be_bytes(),
                        &[attempt],
                    ],
                    hkdf::HKDF_SHA256,
                )
                .and_then(|okm| okm.fill(&mut *scalar))
                .map_err(|_nothing_more| IdentityError::Randomness)?;
            if let Ok(key) = SigningKey::from_p256(&scalar) {
                return Ok(key);
            }
        }
        Err(IdentityError::Sign(crate::jwt::SigningKeyError::Unusable))
    }
}

fn period(now: SystemTime) -> u64 {
    now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() / PERIOD
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::jwt::{Expected, KeySet, Token, TokenError};

    const NAME: &str = "spiffe://cluster.local";

    fn issuer(dir: &Path, domain: &str) -> JwtIssuer {
        let domain = TrustDomain::try_from(domain.to_owned()).expect("valid");
        let root = Root::of(None, None, dir, &domain).expect("a root");
        JwtIssuer::new(&root, &domain, NAME.into(), dir.join("jwks.json"))
    }

    fn check(token: &JwtSvid, jwks: &[u8], now: SystemTime) -> Result<(), TokenError> {
        let keys = KeySet::parse(jwks).expect("a key set");
        let expected = Expected {
            issuer: Some(NAME),
            audiences: &["shop".into()],
            space_delimited: &[],
        };
        Token::parse(&token.token)?
            .verify(expected, Some(&keys), now)
            .map(|_claims| ())
    }

    #[test]
    fn agents_with_one_root_verify_each_other_and_others_do_not() {
        let (dir, other) = (tempfile::tempdir(), tempfile::tempdir());
        let (dir, other) = (dir.expect("directory"), other.expect("directory"));
        let now = SystemTime::now();
        let id = "spiffe://cluster.local/ns/a/sa/b".parse().expect("valid");
        let here = issuer(dir.path(), "cluster.local");
        let there = issuer(dir.path(), "cluster.local");
        let token = here.issue(&id, "shop", now).expect("issued");
        let keys = |of: &JwtIssuer| of.jwks(now).expect("keys").to_string();
        assert_eq!(check(&token, keys(&there).as_bytes(), now), Ok(()));
        for stranger in [
            issuer(other.path(), "cluster.local"),
            issuer(dir.path(), "other.example"),
        ] {
            let refused = check(&token, keys(&stranger).as_bytes(), now);
            assert_eq!(refused, Err(TokenError::UnknownKey));
        }
    }

    #[test]
    fn a_key_is_published_before_it_signs_and_after() {
        let dir = tempfile::tempdir().expect("directory");
        let issuer = issuer(dir.path(), "cluster.local");
        let id = "spiffe://cluster.local/ns/a/sa/b".parse().expect("valid");
        let start = UNIX_EPOCH + Duration::from_secs(700 * PERIOD);
        let day = Duration::from_secs(24 * 3_600);
        let mut kids = std::collections::HashSet::new();
        let mut now = start;
        while now < start + 100 * day {
            issuer.publish(now).expect("written");
            let file = std::fs::read(dir.path().join("jwks.json")).expect("a file");
            for earlier in [now - 29 * day, now - day, now] {
                // Signed with what was current then, by one whose clock shows now.
                let token = issuer.issue(&id, "shop", earlier).expect("issued");
                assert_eq!(check(&token, &file, earlier), Ok(()));
            }
            let soon = issuer.issue(&id, "shop", now + 30 * day).expect("issued");
            assert_eq!(check(&soon, &file, now + 30 * day), Ok(()));
            let long_ago = issuer.issue(&id, "shop", now - 61 * day).expect("issued");
            let refused = check(&long_ago, &file, now - 61 * day);
            assert_eq!(refused, Err(TokenError::UnknownKey));
            kids.insert(issuer.keys(now).expect("keys").signing.kid().to_owned());
            now += day;
        }
        assert_eq!(kids.len(), 4);
        let keys = std::fs::read(dir.path().join("jwks.json")).expect("a file");
        assert!(!KeySet::parse(&keys).expect("a set").has_private());
    }
}
