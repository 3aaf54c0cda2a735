//! Key sets of issuers: one that is taken has a key that signatures are checked with,
//! and no key makes a signature good that nobody made.

#![no_main]

use std::time::UNIX_EPOCH;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use libfuzzer_sys::fuzz_target;
use postern::jwt::{Algorithm, Expected, KeySet, Token, TokenError};

const ANYBODY: Expected<'_> = Expected {
    issuer: None,
    audiences: &[],
    space_delimited: &[],
};

fuzz_target!(|text: &[u8]| {
    let set = match KeySet::parse(text) {
        Ok(set) => set,
        Err(error) => return drop(error.to_string()),
    };
    assert_eq!(set, KeySet::parse(text).expect("it was one"));
    for skipped in set.skipped() {
        drop(skipped.to_string());
    }
    let mut usable = false;
    for algorithm in Algorithm::ALL {
        let token = unsigned(algorithm);
        let token = Token::parse(&token).expect("a token's form");
        match token.verify(ANYBODY, Some(&set), UNIX_EPOCH) {
            Err(TokenError::Signature) => usable = true,
            Err(TokenError::UnknownKey) => {}
            other => panic!("{algorithm}: {other:?}"),
        }
    }
    assert!(usable, "a set without a key was taken");
});

/// A token without `kid`, which every key of the algorithm is tried for.
fn unsigned(algorithm: Algorithm) -> String {
    let header = format!(r#"{{"alg":"{algorithm}"}}"#);
    let length = match algorithm {
        Algorithm::Es256 | Algorithm::EdDsa => 64,
        Algorithm::Es384 => 96,
        Algorithm::Es512 => 132,
        _ => 256,
    };
    let [header, payload, signature] =
        [header.as_bytes(), b"{}", &vec![7; length]].map(|part| URL_SAFE_NO_PAD.encode(part));
    format!("{header}.{payload}.{signature}")
}
