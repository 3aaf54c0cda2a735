//! How a client proves to an authorization server who it is (RFC 6749 2.3, RFC 7523,
//! RFC 8705): shared by token requests and by introspection.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::rand;
use base64::{
    Engine,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use http::{HeaderName, HeaderValue, header};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, json};
use zeroize::Zeroizing;

use crate::{identity::Credentials, jwt::SigningKey};

/// RFC 7523 2.2.
const JWT_BEARER: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";
/// draft-ietf-oauth-spiffe-client-auth.
const JWT_SPIFFE: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-spiffe";
/// Lifetime of an assertion.
const ASSERTION: Duration = Duration::from_secs(60);
/// Longest secret in a file, bytes.
const MAX_SECRET: u64 = 4096;

/// One way, as policy and configuration name it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize, Serialize, JsonSchema)]
#[serde(
    rename_all = "camelCase",
    rename_all_fields = "camelCase",
    deny_unknown_fields
)]
pub enum ClientAuthentication {
    /// `client_secret_basic` (RFC 6749 2.3.1): a file of mode 0600 with the secret, in
    /// the directory of the object's namespace below `policies.secrets`.
    ClientSecretBasic { secret_file: PathBuf },
    /// `private_key_jwt` (OIDC Core 9): with the workload's own key and its certificate
    /// chain in `x5c`, or with a key from a file (PEM, PKCS #8, mode 0600).
    PrivateKeyJwt {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        key_file: Option<PathBuf>,
    },
    /// `tls_client_auth` (RFC 8705 2.1): the workload's certificate.
    TlsClientAuth {},
    /// The workload's JWT-SVID as assertion (draft-ietf-oauth-spiffe-client-auth).
    SpiffeJwt {},
    /// A public client: `client_id` alone.
    None {},
}

#[derive(Debug, thiserror::Error)]
pub enum ClientAuthenticationError {
    #[error("{path}: {message}")]
    File { path: PathBuf, message: String },
    #[error("{0} needs a workload to speak for")]
    NoWorkload(&'static str),
    #[error("cannot sign an assertion: {0}")]
    Sign(String),
}

/// What a proof is made with.
pub struct Prover<'a> {
    pub client_id: &'a str,
    /// Audience of assertions: the issuer's identifier (RFC 7523bis), or its token
    /// endpoint where that is what the server wants.
    pub audience: &'a str,
    /// The workload that is spoken for, if it is one.
    pub workload: Option<&'a Arc<Credentials>>,
    /// Its JWT-SVID for `audience`, where the way is [`ClientAuthentication::SpiffeJwt`].
    pub jwt_svid: Option<&'a str>,
}

/// What has to be added to a request. `with_certificate`: it must go over a connection
/// that shows the workload's certificate.
#[derive(Default)]
pub struct Prepared {
    pub form: Vec<(&'static str, Zeroizing<String>)>,
    pub headers: Vec<(HeaderName, HeaderValue)>,
    pub with_certificate: bool,
}

impl ClientAuthentication {
    pub fn name(&self) -> &'static str {
        match self {
            Self::ClientSecretBasic { .. } => "client_secret_basic",
            Self::PrivateKeyJwt { .. } => "private_key_jwt",
            Self::TlsClientAuth {} => "tls_client_auth",
            Self::SpiffeJwt {} => "spiffe_jwt",
            Self::None {} => "none",
        }
    }

    /// Whether a JWT-SVID has to be had first.
    pub fn needs_jwt_svid(&self) -> bool {
        matches!(self, Self::SpiffeJwt {})
    }

    /// With its files below the directory of a namespace: whoever writes policies may
    /// not have the agent send other files of the node away.
    pub fn below(self, secrets: &Path, namespace: &str) -> Result<Self, String> {
        use std::path::Component;
        let plain = |path: &Path| {
            let mut parts = path.components();
            !path.as_os_str().is_empty() && parts.all(|part| matches!(part, Component::Normal(_)))
        };
        let within = |file: PathBuf| {
            let directory = secrets.join(namespace);
            match plain(&file) && plain(Path::new(namespace)) {
                true => Ok(directory.join(file)),
                false => Err(format!(
                    "`{}` is no relative path without `..`; files are looked for in {}",
                    file.display(),
                    directory.display()
                )),
            }
        };
        Ok(match self {
            Self::ClientSecretBasic { secret_file } => Self::ClientSecretBasic {
                secret_file: within(secret_file)?,
            },
            Self::PrivateKeyJwt { key_file } => Self::PrivateKeyJwt {
                key_file: key_file.map(within).transpose()?,
            },
            other => other,
        })
    }

    /// Reads files anew each time, so that a rotated secret is taken at once.
    pub fn prepare(
        &self,
        prover: &Prover<'_>,
        now: SystemTime,
    ) -> Result<Prepared, ClientAuthenticationError> {
        let no_workload = || ClientAuthenticationError::NoWorkload(self.name());
        let id = || ("client_id", Zeroizing::new(prover.client_id.to_owned()));
        let asserted = |kind: &str, assertion: String| Prepared {
            form: vec![
                id(),
                ("client_assertion_type", Zeroizing::new(kind.to_owned())),
                ("client_assertion", Zeroizing::new(assertion)),
            ],
            ..Prepared::default()
        };
        match self {
            Self::None {} => Ok(Prepared {
                form: vec![id()],
                ..Prepared::default()
            }),
            Self::TlsClientAuth {} => {
                prover.workload.ok_or_else(no_workload)?;
                Ok(Prepared {
                    form: vec![id()],
                    with_certificate: true,
                    ..Prepared::default()
                })
            }
            Self::ClientSecretBasic { secret_file } => {
                let secret = private_file(secret_file)?;
                let secret =
                    std::str::from_utf8(&secret).map_err(|_| wrong(secret_file, "is not UTF-8"))?;
                let value = basic(prover.client_id, secret.trim_end_matches(['\r', '\n']));
                Ok(Prepared {
                    headers: vec![(header::AUTHORIZATION, value)],
                    ..Prepared::default()
                })
            }
            Self::PrivateKeyJwt { key_file: None } => {
                let workload = prover.workload.ok_or_else(no_workload)?;
                let (key, chain) = workload.signing();
                let key = key.ok_or_else(|| {
                    let why = "the workload's key is neither P-256 nor Ed25519";
                    ClientAuthenticationError::Sign(why.into())
                })?;
                let x5c: Vec<String> = chain.iter().map(|der| STANDARD.encode(der)).collect();
                let more = Map::from_iter([("x5c".to_owned(), json!(x5c))]);
                Ok(asserted(JWT_BEARER, assertion(&key, more, prover, now)?))
            }
            Self::PrivateKeyJwt {
                key_file: Some(path),
            } => {
                let pem = private_file(path)?;
                let key = signing_key(&pem).ok_or_else(|| {
                    wrong(path, "holds no PEM private key (PKCS #8, P-256 or Ed25519)")
                })?;
                Ok(asserted(
                    JWT_BEARER,
                    assertion(&key, Map::new(), prover, now)?,
                ))
            }
            Self::SpiffeJwt {} => {
                let svid = prover.jwt_svid.ok_or_else(no_workload)?;
                Ok(asserted(JWT_SPIFFE, svid.to_owned()))
            }
        }
    }
}

/// RFC 7523 3.
fn assertion(
    key: &SigningKey,
    more: Map<String, serde_json::Value>,
    prover: &Prover<'_>,
    now: SystemTime,
) -> Result<String, ClientAuthenticationError> {
    let failed = |e: &dyn std::fmt::Display| ClientAuthenticationError::Sign(e.to_string());
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut id = [0; 16];
    rand::fill(&mut id).map_err(|e| failed(&e))?;
    let claims = json!({
        "iss": prover.client_id,
        "sub": prover.client_id,
        "aud": prover.audience,
        "jti": URL_SAFE_NO_PAD.encode(id),
        "iat": now.as_secs(),
        "exp": (now + ASSERTION).as_secs(),
    });
    key.sign_with("JWT", more, &claims).map_err(|e| failed(&e))
}

/// RFC 6749 2.3.1: both parts are form-encoded before they are joined.
fn basic(id: &str, secret: &str) -> HeaderValue {
    let encode = |text: &str| form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>();
    let joined = Zeroizing::new(format!("{}:{}", encode(id), encode(secret)));
    let text = Zeroizing::new(format!("Basic {}", STANDARD.encode(joined.as_bytes())));
    let mut value = HeaderValue::from_str(&text).expect("base64 is visible ASCII");
    value.set_sensitive(true);
    value
}

fn signing_key(pem: &[u8]) -> Option<SigningKey> {
    use rustls::pki_types::{PrivatePkcs8KeyDer, pem::PemObject as _};
    let der = PrivatePkcs8KeyDer::from_pem_slice(pem).ok()?;
    SigningKey::from_pkcs8(der.secret_pkcs8_der()).ok()
}

/// Reads a secret that nobody else can read.
pub fn private_file(path: &Path) -> Result<Zeroizing<Vec<u8>>, ClientAuthenticationError> {
    use std::{io::Read as _, os::unix::fs::PermissionsExt as _};
    let failed = |e: std::io::Error| wrong(path, &e.to_string());
    let file = std::fs::File::open(path).map_err(failed)?;
    let mode = file.metadata().map_err(failed)?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        let message = format!("is readable by others (mode {mode:o}); secrets must be 0600");
        return Err(wrong(path, &message));
    }
    let mut content = Zeroizing::new(Vec::new());
    file.take(MAX_SECRET + 1)
        .read_to_end(&mut content)
        .map_err(failed)?;
    if content.len() as u64 > MAX_SECRET {
        return Err(wrong(path, &format!("is longer than {MAX_SECRET} bytes")));
    }
    Ok(content)
}

fn wrong(path: &Path, message: &str) -> ClientAuthenticationError {
    ClientAuthenticationError::File {
        path: path.to_owned(),
        message: message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn policies_name_secrets_of_their_own_namespace_alone() {
        let below = |file: &str, namespace: &str| {
            let way = ClientAuthentication::ClientSecretBasic {
                secret_file: file.into(),
            };
            way.below(Path::new("/secrets"), namespace)
        };
        let fine = ClientAuthentication::ClientSecretBasic {
            secret_file: "/secrets/shop/as/secret".into(),
        };
        assert_eq!(below("as/secret", "shop"), Ok(fine));
        for (file, namespace) in [
            ("/var/lib/postern/root.key", "shop"),
            ("../other/secret", "shop"),
            ("as/../../other/secret", "shop"),
            ("", "shop"),
            (".", "shop"),
            ("secret", ".."),
            ("secret", ""),
            ("secret", "/etc"),
        ] {
            let refused = below(file, namespace).expect_err(file);
            assert!(
                refused.contains("/secrets") || namespace == "/etc",
                "{refused}"
            );
        }
    }

    #[test]
    fn a_secret_is_sent_as_the_rfc_encodes_it_and_from_private_files_only() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("secret");
        std::fs::write(&path, "s:p c\n").expect("written");
        let way = ClientAuthentication::ClientSecretBasic {
            secret_file: path.clone(),
        };
        let prover = Prover {
            client_id: "a b",
            audience: "https://as",
            workload: None,
            jwt_svid: None,
        };
        let mode = |mode| {
            let mode = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(&path, mode).expect("chmod");
        };
        mode(0o644);
        let refused = way.prepare(&prover, SystemTime::now()).err();
        let refused = refused.expect("refused").to_string();
        assert!(refused.contains("0600"), "{refused}");
        mode(0o600);
        let prepared = way.prepare(&prover, SystemTime::now()).expect("prepared");
        let (name, value) = &prepared.headers[0];
        assert_eq!(name, header::AUTHORIZATION);
        assert!(value.is_sensitive());
        let expected = format!("Basic {}", STANDARD.encode("a+b:s%3Ap+c"));
        assert_eq!(value, expected.as_str());
    }
}
