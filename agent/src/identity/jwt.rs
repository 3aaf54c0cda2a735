//! JWT-SVIDs (SPIFFE JWT-SVID standard): a workload's identity as a short-lived token
//! for one audience, signed by the trust domain's authority.

use std::{
    fmt,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::json;
use zeroize::Zeroizing;

use super::{IdentityError, SpiffeId};
use crate::jwt::{Algorithm, SigningKey};

/// Lifetime of a JWT-SVID.
const LIFETIME: Duration = Duration::from_secs(300);

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

/// Signs them on this node, with a key beside the root's.
#[derive(Debug)]
pub struct JwtIssuer {
    key: SigningKey,
}

impl JwtIssuer {
    pub fn open(_state: &Path) -> Result<Self, IdentityError> {
        let key = SigningKey::generate(Algorithm::Es256).map_err(IdentityError::Sign)?;
        Ok(Self { key })
    }

    pub fn issue(
        &self,
        id: &SpiffeId,
        audience: &str,
        now: SystemTime,
    ) -> Result<JwtSvid, IdentityError> {
        let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let claims = json!({
            "sub": id.to_string(),
            "aud": [audience],
            "iat": since.as_secs(),
            "exp": (since + LIFETIME).as_secs(),
        });
        let token = self.key.sign("JWT", &claims).map_err(IdentityError::Sign)?;
        Ok(JwtSvid {
            token: Zeroizing::new(token),
            expires: now + LIFETIME,
        })
    }
}
