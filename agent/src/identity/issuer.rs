//! Who signs for this node: exactly one of these, and all alike to those who ask.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::sync::Notify;

use super::{
    Authority, Bundle, IdentityError, JwtIssuer, JwtSvid, Remote, SpiffeId, Svid, istio::Istio,
    spire::Spire,
};
use crate::config::Config;

pub enum Issuer {
    /// A root on this node.
    Embedded {
        authority: Box<Authority>,
        jwt: Box<JwtIssuer>,
    },
    /// `postern authority`.
    Remote(Box<Remote>),
    /// The SPIRE agent of this node.
    Spire(Box<Spire>),
    /// Istio's certificate authority.
    Istio(Box<Istio>),
}

impl Issuer {
    /// Opens what the configuration says: the root, or what an earlier agent left of
    /// its place with the authority. Nobody is asked yet. `changed` is told when the
    /// issuer has something new of its own accord.
    pub fn open(
        config: &Config,
        node: &str,
        changed: &Arc<Notify>,
    ) -> Result<(Self, Arc<Bundle>), IdentityError> {
        let identity = &config.identity;
        let named: Vec<_> = [
            ("identity.authority", identity.authority.is_some()),
            ("identity.spire", identity.spire.is_some()),
            ("identity.istio", identity.istio.is_some()),
            (
                "identity.rootCertificate",
                identity.root_certificate.is_some(),
            ),
            ("identity.rootKey", identity.root_key.is_some()),
        ]
        .into_iter()
        .filter_map(|(key, set)| set.then_some(key))
        .collect();
        if named.len() > 1 && named != ["identity.rootCertificate", "identity.rootKey"] {
            return Err(IdentityError::Mixed(named));
        }
        if let Some(remote) = Remote::open(config, node)? {
            let bundle = remote.bundle().clone();
            return Ok((Self::Remote(Box::new(remote)), bundle));
        }
        if let Some(spire) = &identity.spire {
            let spire = Spire::open(config, spire, changed.clone())?;
            let bundle = spire.bundle().clone();
            return Ok((Self::Spire(Box::new(spire)), bundle));
        }
        if let Some(istio) = &identity.istio {
            let istio = Istio::open(config, istio)?;
            let bundle = istio.bundle().clone();
            return Ok((Self::Istio(Box::new(istio)), bundle));
        }
        let authority = Authority::open(config, node)?;
        let roots = vec![authority.root().certificate().clone()];
        let bundle = Bundle::new(roots, identity.bundle.clone())?;
        let jwt = JwtIssuer::new(
            authority.root(),
            &config.trust_domain,
            config.jwt_issuer(),
            config.jwks_file(),
        );
        jwt.publish(SystemTime::now())?;
        let issuer = Self::Embedded {
            authority: Box::new(authority),
            jwt: Box::new(jwt),
        };
        Ok((issuer, Arc::new(bundle)))
    }

    /// As problems name it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Embedded { .. } => "jwks.json",
            Self::Remote(_) => "the authority",
            Self::Spire(_) => "SPIRE",
            Self::Istio(_) => "the roots of Istio's CA",
        }
    }

    /// A certificate that needs nobody to be asked; `None`: it does.
    pub fn at_once(&self, id: &SpiffeId, now: SystemTime) -> Option<Result<Svid, IdentityError>> {
        match self {
            Self::Embedded { authority, .. } => Some(authority.issue(id, now)),
            Self::Remote(_) | Self::Spire(_) | Self::Istio(_) => None,
        }
    }

    pub async fn issue(&self, id: &SpiffeId, now: SystemTime) -> Result<Svid, IdentityError> {
        match self {
            Self::Embedded { authority, .. } => authority.issue(id, now),
            Self::Remote(remote) => remote.issue(id, now).await,
            Self::Spire(spire) => spire.issue(id, now).await,
            Self::Istio(istio) => istio.issue(id, now).await,
        }
    }

    pub async fn jwt_svid(
        &self,
        id: &SpiffeId,
        audience: &str,
        now: SystemTime,
    ) -> Result<JwtSvid, IdentityError> {
        match self {
            Self::Embedded { jwt, .. } => jwt.issue(id, audience, now),
            Self::Remote(remote) => remote.jwt_svid(id, audience, now).await,
            Self::Spire(spire) => spire.jwt_svid(id, audience, now).await,
            Self::Istio(_) => Err(IdentityError::Remote(
                "Istio's CA signs no JWT-SVIDs; identity.authority and identity.spire do".into(),
            )),
        }
    }

    /// The public keys that this node's JWT-SVIDs are signed with; `None` where another
    /// signs and publishes.
    pub fn jwks(&self) -> Option<serde_json::Value> {
        match self {
            Self::Embedded { jwt, .. } => jwt.jwks(SystemTime::now()).ok(),
            Self::Remote(_) | Self::Spire(_) | Self::Istio(_) => None,
        }
    }

    /// Does what the issuer itself needs. An error does not mean that nothing can be
    /// asked for: see [`Self::not_ready`].
    pub async fn keep(&self, now: SystemTime) -> Result<(), IdentityError> {
        match self {
            Self::Embedded { jwt, .. } => jwt.publish(now),
            Self::Remote(remote) => remote.keep(now).await,
            Self::Spire(spire) => spire.keep().await,
            Self::Istio(istio) => istio.keep(),
        }
    }

    /// Whether [`Self::keep`] asks somebody, who is not to be asked again at once.
    pub fn keeping_asks(&self) -> bool {
        matches!(self, Self::Remote(_))
    }

    /// When [`Self::keep`] has something to do; `None`: whenever it is called.
    pub fn due(&self, now: SystemTime) -> Option<Duration> {
        match self {
            Self::Embedded { .. } | Self::Spire(_) => None,
            Self::Remote(remote) => Some(remote.due(now)),
            Self::Istio(istio) => Some(istio.due()),
        }
    }

    /// Why nothing can be asked for yet.
    pub fn not_ready(&self, now: SystemTime) -> Option<&'static str> {
        match self {
            Self::Remote(remote) if !remote.joined(now) => {
                Some("the agent has not joined the authority")
            }
            Self::Spire(spire) if !spire.ready() => Some("SPIRE has given no bundle yet"),
            _ => None,
        }
    }

    /// A pod of this account is on the node. Only SPIRE asks which.
    pub fn pod(&self, id: &SpiffeId, uid: &str) {
        if let Self::Spire(spire) = self {
            spire.pod(id, uid);
        }
    }

    /// Whether there is a newer certificate than was issued last, to be had for the asking.
    pub fn has_newer(&self, id: &SpiffeId) -> bool {
        matches!(self, Self::Spire(spire) if spire.has_newer(id))
    }

    /// These accounts are used; what is kept of others can go.
    pub fn retain(&self, used: impl FnOnce() -> HashSet<SpiffeId>) {
        if let Self::Spire(spire) = self {
            spire.retain(&used());
        }
    }
}
