//! Certificates for both Envoys, of the shape that agents' have: ECDSA P-256, and a
//! SPIFFE ID as the only name.

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType, string::Ia5String,
};

pub struct Pki {
    pub root: String,
    pub client: Identity,
    pub server: Identity,
}

pub struct Identity {
    pub id: String,
    pub certificate: String,
    pub key: String,
}

impl Pki {
    pub fn new() -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let root = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let identity = |account: &str| -> Result<Identity> {
            let id = format!("spiffe://cluster.local/ns/shop/sa/{account}");
            let key = KeyPair::generate()?;
            let mut params = CertificateParams::default();
            params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(id.clone())?)];
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            params.extended_key_usages = vec![
                ExtendedKeyUsagePurpose::ClientAuth,
                ExtendedKeyUsagePurpose::ServerAuth,
            ];
            Ok(Identity {
                id,
                certificate: params.signed_by(&key, &root)?.pem(),
                key: key.serialize_pem(),
            })
        };
        Ok(Self {
            client: identity("client")?,
            server: identity("server")?,
            root: root.pem(),
        })
    }
}
