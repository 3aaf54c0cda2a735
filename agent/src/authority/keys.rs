//! Keys that tokens are signed with: files of mode 0600 in the state directory.

use std::{
    io::Write as _,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
};

use serde_json::{Value, json};

use super::{Config, config::SigningAlgorithm};
use crate::jwt::{Algorithm, SigningKey, SigningKeyError};

#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    #[error("{path}: {message}")]
    File {
        path: std::path::PathBuf,
        message: String,
    },
    #[error(transparent)]
    Key(#[from] SigningKeyError),
}

pub struct Keys {
    current: SigningKey,
}

impl Keys {
    pub fn open(config: &Config) -> Result<Self, KeysError> {
        let directory = config.state.join("keys");
        let failed = |e: std::io::Error| KeysError::File {
            path: directory.clone(),
            message: e.to_string(),
        };
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(failed)?;
        let path = directory.join("current.key");
        if let Ok(der) = std::fs::read(&path) {
            return Ok(Self {
                current: SigningKey::from_pkcs8(&der)?,
            });
        }
        let current = SigningKey::generate(match config.keys.algorithm {
            SigningAlgorithm::Es256 => Algorithm::Es256,
            SigningAlgorithm::EdDsa => Algorithm::EdDsa,
        })?;
        let der = current.to_pkcs8()?;
        std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut file| file.write_all(&der).and_then(|()| file.sync_all()))
            .map_err(failed)?;
        Ok(Self { current })
    }

    /// A token of these claims by the key that signs now.
    pub fn sign(&self, typ: &str, claims: &Value) -> Result<String, SigningKeyError> {
        self.current.sign(typ, claims)
    }

    /// The public keys (RFC 7517 5).
    pub fn jwks(&self) -> Value {
        json!({"keys": [self.current.jwk()]})
    }
}
