//! Nonces of this agent for DPoP proofs (RFC 9449 9): a time and its code, so that
//! nothing has to be kept in mind.

use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::{
    constant_time::verify_slices_are_equal,
    hmac::{HMAC_SHA256, Key, sign},
    rand,
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use http::HeaderValue;

/// A nonce is good for one to two of these, in seconds.
const SLICE: u64 = 60;
const CODE: usize = 16;

/// With a key that is made at start: the nonces of other agents, and of the one
/// before, are not known here, and clients are told a new one.
pub struct Nonces(Key);

impl Nonces {
    pub fn new() -> Result<Self, aws_lc_rs::error::Unspecified> {
        let mut key = [0; 32];
        rand::fill(&mut key)?;
        Ok(Self(Key::new(HMAC_SHA256, &key)))
    }

    pub fn current(&self, now: SystemTime) -> HeaderValue {
        let nonce = URL_SAFE_NO_PAD.encode(self.of(slice(now)));
        HeaderValue::try_from(nonce).expect("base64url is visible ASCII")
    }

    pub fn holds(&self, nonce: &str, now: SystemTime) -> bool {
        let Ok(told) = URL_SAFE_NO_PAD.decode(nonce) else {
            return false;
        };
        let now = slice(now);
        [now, now.saturating_sub(1)]
            .into_iter()
            .any(|slice| verify_slices_are_equal(&told, &self.of(slice)).is_ok())
    }

    fn of(&self, slice: u64) -> Vec<u8> {
        let slice = slice.to_be_bytes();
        let code = sign(&self.0, &slice);
        [&slice, &code.as_ref()[..CODE]].concat()
    }
}

fn slice(now: SystemTime) -> u64 {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_secs() / SLICE
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_nonce_is_good_for_a_while_and_for_its_agent_only() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let (own, other) = (Nonces::new().expect("key"), Nonces::new().expect("key"));
        let nonce = own.current(at(6_059));
        let nonce = nonce.to_str().expect("ASCII");
        assert!(own.holds(nonce, at(6_059)) && own.holds(nonce, at(6_119)));
        assert!(!own.holds(nonce, at(6_120)) && !own.holds(nonce, at(5_999)));
        assert!(!other.holds(nonce, at(6_059)));
        for wrong in ["", "x", &nonce[1..], &format!("{nonce}A")] {
            assert!(!own.holds(wrong, at(6_059)), "{wrong}");
        }
    }
}
