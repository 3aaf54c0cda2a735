//! Passwords: argon2id (RFC 9106) in PHC form, never shorter work than the OWASP
//! Password Storage Cheat Sheet asks for: 19 MiB of memory, two passes, one lane.
//!
//! Their length is all that is asked of them (NIST SP 800-63B 5.1.1.2).

use argon2::{
    Algorithm, Argon2, Params, PasswordHasher as _, PasswordVerifier as _, Version,
    password_hash::phc::PasswordHash,
};

/// Bytes.
pub const SHORTEST: usize = 8;
/// Bytes.
pub const LONGEST: usize = 1024;

/// KiB.
const MEMORY: u32 = 19 * 1024;
const PASSES: u32 = 2;
const LANES: u32 = 1;

#[derive(Debug, thiserror::Error)]
pub enum PasswordError {
    #[error("the password has {0} bytes; use {SHORTEST} to {LONGEST}")]
    Length(usize),
    #[error(
        "the password hash is no argon2id hash in PHC form; \
         `postern authority user hash` makes one"
    )]
    Hash,
    /// Of the library: about memory or randomness, never about the password.
    #[error("cannot hash: {0}")]
    Hashing(argon2::password_hash::Error),
}

fn argon2() -> Argon2<'static> {
    let params = Params::new(MEMORY, PASSES, LANES, None).expect("within the RFC's limits");
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
}

/// Of a password that somebody chooses.
pub fn check_length(password: &str) -> Result<(), PasswordError> {
    match password.len() {
        SHORTEST..=LONGEST => Ok(()),
        other => Err(PasswordError::Length(other)),
    }
}

/// With a new salt. Takes tens of milliseconds and 19 MiB.
pub fn hash(password: &[u8]) -> Result<String, PasswordError> {
    let hash = argon2().hash_password(password);
    Ok(hash.map_err(PasswordError::Hashing)?.to_string())
}

/// Whether `hash` is of this password; false where it is no hash at all. Takes what the
/// hash's own parameters say.
pub fn verify(hash: &str, password: &[u8]) -> bool {
    parse(hash).is_ok_and(|hash| argon2().verify_password(password, &hash).is_ok())
}

/// Whether a hash made today would be another kind.
pub fn is_outdated(hash: &str) -> bool {
    let params = parse(hash).and_then(|h| Params::try_from(&h).map_err(|_| PasswordError::Hash));
    params.is_ok_and(|p| (p.m_cost(), p.t_cost(), p.p_cost()) != (MEMORY, PASSES, LANES))
}

pub fn check_hash(hash: &str) -> Result<(), PasswordError> {
    let hash = parse(hash)?;
    Params::try_from(&hash).map_err(|_| PasswordError::Hash)?;
    match (hash.salt, hash.hash) {
        (Some(_), Some(_)) => Ok(()),
        _ => Err(PasswordError::Hash),
    }
}

fn parse(hash: &str) -> Result<PasswordHash, PasswordError> {
    PasswordHash::new(hash)
        .ok()
        .filter(|h| h.algorithm == argon2::ARGON2ID_IDENT)
        .ok_or(PasswordError::Hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_is_of_one_password() {
        let made = hash(b"correct horse").expect("hashes");
        assert!(
            made.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"),
            "{made}"
        );
        assert!(verify(&made, b"correct horse"));
        assert!(!verify(&made, b"correct horsf"));
        assert!(!verify(&made, b""));
        assert!(!is_outdated(&made));
        assert!(check_hash(&made).is_ok());
        assert_ne!(hash(b"correct horse").expect("hashes"), made);
    }

    #[test]
    fn what_is_no_argon2id_hash_is_refused() {
        let made = hash(b"correct horse").expect("hashes");
        for bad in [
            "",
            "correct horse",
            "$argon2id$",
            "$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHQ",
            &made.replace("argon2id", "argon2i"),
            &made.replace("argon2id", "scrypt"),
        ] {
            assert!(check_hash(bad).is_err(), "{bad}");
            assert!(!verify(bad, b"correct horse"), "{bad}");
        }
    }

    #[test]
    fn weaker_hashes_are_known_as_such() {
        let weak = Params::new(8, 1, 1, None).expect("params");
        let weak = Argon2::new(Algorithm::Argon2id, Version::V0x13, weak)
            .hash_password(b"correct horse")
            .expect("hashes")
            .to_string();
        assert!(verify(&weak, b"correct horse") && is_outdated(&weak));
    }

    #[test]
    fn lengths() {
        assert!(check_length("1234567").is_err());
        assert!(check_length("12345678").is_ok());
        assert!(check_length(&"x".repeat(1024)).is_ok());
        assert!(check_length(&"x".repeat(1025)).is_err());
    }
}
