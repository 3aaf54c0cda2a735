//! How a line is chained to the one before.

use std::borrow::Cow;

use aws_lc_rs::digest::{SHA256, digest};
use serde::Deserialize;

/// SHA-256 in lower-case hexadecimal, as lines name each other.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Hash([u8; 64]);

impl Hash {
    /// `prev` of the first record ever.
    pub const NONE: Self = Self([b'0'; 64]);

    pub fn of(line: &[u8]) -> Self {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut hex = [0; 64];
        for (pair, byte) in hex.chunks_exact_mut(2).zip(digest(&SHA256, line).as_ref()) {
            pair[0] = DIGITS[usize::from(byte >> 4)];
            pair[1] = DIGITS[usize::from(byte & 15)];
        }
        Self(hex)
    }

    /// As it stands in a line.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.as_bytes().try_into().ok()?;
        let hex = text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        hex.then_some(Self(digits))
    }

    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("hexadecimal digits")
    }
}

/// What the chain asks of a line.
#[derive(Deserialize)]
pub struct Head<'a> {
    pub seq: u64,
    #[serde(borrow)]
    prev: Cow<'a, str>,
    #[serde(borrow)]
    pub kind: Cow<'a, str>,
}

impl<'a> Head<'a> {
    /// Of a line that is as the log writes it, with `seq` and `prev` first.
    pub fn parse(line: &'a [u8]) -> Result<(Self, Hash), String> {
        let head: Self = serde_json::from_slice(line).map_err(|e| e.to_string())?;
        let prev = Hash::parse(&head.prev).ok_or("`prev` is no SHA-256")?;
        let begin = format!("{{\"seq\":{},\"prev\":\"{}\",", head.seq, prev.as_str());
        if !line.starts_with(begin.as_bytes()) {
            return Err("it does not begin with `seq` and `prev`".into());
        }
        Ok((head, prev))
    }
}

/// Numbers that the log's own records carry, so that what was lost can be counted.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Counts {
    /// Which ledger `settled` is a number of.
    pub ledger: Option<u64>,
    pub settled: u64,
    pub lost: String,
    pub count: u64,
    pub reason: String,
    #[serde(rename = "lastSeq")]
    pub last_seq: u64,
}
