//! The key that checkpoints are signed with.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};
use base64::{Engine as _, engine::general_purpose::STANDARD};

use super::line::Hash;

pub struct Key {
    pair: Ed25519KeyPair,
}

impl Key {
    /// Made where there is none.
    pub fn open(path: &Path) -> io::Result<Self> {
        let invalid = |_| io::Error::new(io::ErrorKind::InvalidData, "no Ed25519 key in PKCS #8");
        let document = match fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => make(path)?,
            read => read?,
        };
        let pair = Ed25519KeyPair::from_pkcs8(&document).map_err(invalid)?;
        Ok(Self { pair })
    }

    /// Base64.
    pub fn public(&self) -> String {
        STANDARD.encode(self.pair.public_key())
    }

    /// Base64.
    pub fn sign(&self, text: &[u8]) -> String {
        STANDARD.encode(self.pair.sign(text))
    }
}

fn make(path: &Path) -> io::Result<Vec<u8>> {
    let failed = |_| io::Error::other("no key can be made");
    let pair = Ed25519KeyPair::generate().map_err(failed)?;
    let document = pair.to_pkcs8().map_err(failed)?.as_ref().to_vec();
    write_whole(path, &document)?;
    Ok(document)
}

/// Puts a file of mode 0600 in place: whole or not at all, also when the power goes.
pub fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_added_extension("tmp");
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    if let Err(error) = written.and_then(|()| fs::rename(&temporary, path)) {
        let _takes_no_room = fs::remove_file(&temporary);
        return Err(error);
    }
    sync_directory(path.parent().unwrap_or(Path::new(".")))
}

/// After it, names that were added or removed there stay so.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// SHA-256 of a public key.
pub fn id(public: &str) -> Option<Hash> {
    Some(Hash::of(&STANDARD.decode(public).ok()?))
}

/// All but the signature in base64, too.
pub fn verifies(public: &str, text: &[u8], signature: &str) -> bool {
    let (Ok(public), Ok(signature)) = (STANDARD.decode(public), STANDARD.decode(signature)) else {
        return false;
    };
    let key = UnparsedPublicKey::new(&ED25519, public);
    key.verify(text, &signature).is_ok()
}
