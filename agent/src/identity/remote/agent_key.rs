//! The agent's own key and certificate: one PEM file of mode 0600, whole or as it was,
//! so that a restart needs no new proof.

use std::{path::Path, sync::Arc, time::SystemTime};

use arc_swap::ArcSwapOption;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use rustls::{
    SignatureScheme,
    client::ResolvesClientCert,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject as _},
    sign::CertifiedKey,
};
use zeroize::Zeroizing;

use super::pem;
use crate::{
    identity::{
        AgentId, BACKDATE, IdentityError, authority::write_new, backoff::renewal, issued::validity,
    },
    oauth::private_file,
};

pub struct AgentKey {
    der: Zeroizing<Vec<u8>>,
    certified: Arc<CertifiedKey>,
    id: Option<AgentId>,
    renew_at: SystemTime,
    not_after: SystemTime,
}

impl AgentKey {
    /// `der` is PKCS #8.
    pub fn new(
        der: Zeroizing<Vec<u8>>,
        chain: Vec<CertificateDer<'static>>,
    ) -> Result<Self, IdentityError> {
        let leaf = chain.first();
        let (not_before, not_after) = leaf
            .and_then(validity)
            .ok_or_else(|| IdentityError::Remote("the agent's certificate has no dates".into()))?;
        let id = leaf.and_then(AgentId::of);
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(der.to_vec()));
        let provider = aws_lc_rs::default_provider();
        let certified = CertifiedKey::new(chain, provider.key_provider.load_private_key(key)?);
        // A file that was put together by hand is found here, not by the authority.
        certified.keys_match()?;
        Ok(Self {
            der,
            certified: Arc::new(certified),
            id,
            renew_at: renewal(not_before + BACKDATE, not_after),
            not_after,
        })
    }

    pub fn read(path: &Path) -> Result<Self, IdentityError> {
        let content = |message: &str| IdentityError::Content {
            path: path.to_owned(),
            message: message.to_owned(),
        };
        let text = private_file(path).map_err(|e| IdentityError::Remote(e.to_string()))?;
        let PrivateKeyDer::Pkcs8(key) = PrivateKeyDer::from_pem_slice(&text)
            .map_err(|_could_quote_it| content("holds no PEM private key"))?
        else {
            return Err(content("holds no PKCS #8 private key"));
        };
        let chain = CertificateDer::pem_slice_iter(&text)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_could_quote_it| content("holds no PEM certificate"))?;
        let der = Zeroizing::new(key.secret_pkcs8_der().to_vec());
        Self::new(der, chain).map_err(|e| content(&e.to_string()))
    }

    pub fn write(&self, path: &Path) -> Result<(), IdentityError> {
        let encoded = Zeroizing::new(STANDARD.encode(&*self.der));
        let mut text = Zeroizing::new(String::with_capacity(16 << 10));
        text.push_str("-----BEGIN PRIVATE KEY-----\n");
        for line in encoded.as_bytes().chunks(64) {
            text.extend(line.iter().map(|&byte| char::from(byte)));
            text.push('\n');
        }
        text.push_str("-----END PRIVATE KEY-----\n");
        text.push_str(&pem(&self.certified.cert));
        write_new(path, text.as_bytes(), 0o600)
    }

    pub fn id(&self) -> Option<&AgentId> {
        self.id.as_ref()
    }

    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    pub fn renew_at(&self) -> SystemTime {
        self.renew_at
    }
}

/// What the agent shows to the authority: the latest.
#[derive(Default)]
pub struct Shown(ArcSwapOption<AgentKey>);

impl Shown {
    pub fn get(&self) -> Option<Arc<AgentKey>> {
        self.0.load_full()
    }

    pub fn set(&self, key: AgentKey) {
        self.0.store(Some(Arc::new(key)));
    }
}

impl std::fmt::Debug for Shown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shown").finish_non_exhaustive()
    }
}

impl ResolvesClientCert for Shown {
    fn resolve(
        &self,
        _issuers: &[&[u8]],
        _schemes: &[SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        Some(self.get()?.certified.clone())
    }

    fn has_certs(&self) -> bool {
        self.0.load().is_some()
    }
}
