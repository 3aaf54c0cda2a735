//! Bearer tokens: none is taken but those that the issuer signed, and JSON is read no
//! more freely than `serde_json` reads it.

#![no_main]

use std::{
    sync::LazyLock,
    time::{Duration, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use libfuzzer_sys::fuzz_target;
use postern::jwt::{Expected, KeySet, MAX_TOKEN, Token, json};
use serde_json::Value;

/// Public keys whose private halves were thrown away.
static KEYS: LazyLock<KeySet> = LazyLock::new(|| {
    KeySet::parse(include_bytes!("../corpus/key_set/issuer.json")).expect("usable keys")
});

/// What they signed before.
const SIGNED: [&str; 6] = [
    include_str!("../corpus/token/rs256.jwt"),
    include_str!("../corpus/token/ps384.jwt"),
    include_str!("../corpus/token/es256.jwt"),
    include_str!("../corpus/token/es384.jwt"),
    include_str!("../corpus/token/es512.jwt"),
    include_str!("../corpus/token/eddsa.jwt"),
];

const NOW: Duration = Duration::from_secs(1_800_000_000);

const ANYBODY: Expected<'_> = Expected {
    issuer: None,
    audiences: &[],
    space_delimited: &[],
};

fuzz_target!(
    init: {
        for token in SIGNED {
            assert!(verifies(token), "{token}");
        }
    },
    |bytes: &[u8]| {
        if let Ok(value) = json::parse(bytes) {
            let loose: Value = serde_json::from_slice(bytes).expect("JSON");
            assert_eq!(value, loose);
        }
        if let Ok(text) = std::str::from_utf8(bytes) {
            assert_eq!(verifies(text), SIGNED.contains(&text));
        }
        // Header and payload as they are: mutations rarely survive base64.
        let mut parts = bytes.splitn(2, |byte| *byte == b'\n');
        let (header, payload) = (parts.next(), parts.next());
        let [header, payload] = [header, payload].map(|p| URL_SAFE_NO_PAD.encode(p.unwrap_or(b"{}")));
        let signature = URL_SAFE_NO_PAD.encode([7; 64]);
        assert!(!verifies(&format!("{header}.{payload}.{signature}")));
    }
);

fn verifies(text: &str) -> bool {
    let token = match Token::parse(text) {
        Ok(token) => token,
        Err(error) => {
            drop(error.to_string());
            return false;
        }
    };
    assert!(text.len() <= MAX_TOKEN);
    let claims = token.verify(ANYBODY, Some(&KEYS), UNIX_EPOCH + NOW);
    claims.is_ok()
}
