//! Projected tokens of the agent's service account. The kubelet replaces them before they
//! expire, so they are read whenever they are needed; their mode is the kubelet's choice.

use std::{io::Read as _, path::Path};

use zeroize::Zeroizing;

use super::IdentityError;

/// Longest token, bytes.
const MOST: u64 = 16 * 1024;

pub fn read_token(path: &Path) -> Result<Zeroizing<Vec<u8>>, IdentityError> {
    // Room for all of it at once: a buffer that grows leaves copies behind.
    let mut text = Zeroizing::new(Vec::with_capacity(MOST as usize + 1));
    std::fs::File::open(path)
        .and_then(|file| file.take(MOST + 1).read_to_end(&mut text))
        .map_err(|source| IdentityError::File {
            path: path.to_owned(),
            source,
        })?;
    let token = text.trim_ascii();
    let wrong = |message: &str| IdentityError::Content {
        path: path.to_owned(),
        message: message.into(),
    };
    if text.len() as u64 > MOST {
        return Err(wrong("is longer than a token can be"));
    }
    if token.is_empty() || !token.iter().all(u8::is_ascii_graphic) {
        return Err(wrong("holds no token"));
    }
    Ok(Zeroizing::new(token.to_vec()))
}
