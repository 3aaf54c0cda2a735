//! Random values that are handed out, and the hashes that are kept of them.

use aws_lc_rs::{
    digest::{SHA256, digest},
    rand,
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};

use super::PeopleError;

/// `N` random bytes as base64url.
pub fn random<const N: usize>() -> Result<String, PeopleError> {
    let mut bytes = [0; N];
    rand::fill(&mut bytes).map_err(|_says_nothing| PeopleError::Randomness)?;
    Ok(URL_SAFE_NO_PAD.encode(bytes))
}

/// SHA-256 as lowercase hexadecimal: what the store keeps instead of a value. Enough for
/// values of 256 random bits; passwords have [`super::password`].
pub fn hash(value: &str) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(64);
    for byte in digest(&SHA256, value.as_bytes()).as_ref() {
        write!(text, "{byte:02x}").expect("a String takes all");
    }
    text
}
