//! The log on disk: a directory of segments, `audit-<seq of the first record>.jsonl`,
//! compressed ones with `.zst` behind that. Every line has the next `seq`, and in `prev`
//! the SHA-256 of the line before.
//!
//! No decision of the agent reads it. Senders and commands read what is written.

mod lines;
mod read;
mod segment;

pub use read::{Line, ReadError, Reader, last_seq};
