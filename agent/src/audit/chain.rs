//! The log on disk: a directory of segments, `audit-<seq of the first record>.jsonl`,
//! compressed ones with `.zst` behind that. Every line has the next `seq`, and in `prev`
//! the SHA-256 of the line before; checkpoints sign what is before them.
//!
//! `write` is the writer: `batch` makes lines, `reopen` finds where the log before ends,
//! `ledger` counts what a killed agent could not write, `pack` compresses and removes what
//! `retain` names. `read` follows the log, `verify` proves it.
//!
//! No decision of the agent reads it. Senders and commands read what is written.

mod batch;
mod key;
mod ledger;
mod line;
mod lines;
mod pack;
mod read;
mod reopen;
mod retain;
mod segment;
mod verify;
mod write;

pub use ledger::{KINDS, Ledger};
pub use read::{Line, ReadError, Reader, last_seq};
pub use verify::{Problem, Report, VerifyError, latest_checkpoint, verify};
pub use write::{Committed, Log, OpenError, PUBLIC_KEY, Settings, Sync};

/// Settings for one more of several servers in a test's directory: a log has one writer.
#[cfg(test)]
pub fn beside(settings: Settings) -> Settings {
    let name = |n: u32| settings.directory.with_added_extension(n.to_string());
    let number = (0..).find(|n| !name(*n).exists()).expect("a number");
    Settings {
        ledger: settings.ledger.with_added_extension(number.to_string()),
        directory: name(number),
        ..settings
    }
}

/// What was handed in to the logs that [`beside`] made of this one.
#[cfg(test)]
pub fn records_beside(directory: &std::path::Path) -> Vec<serde_json::Value> {
    (0..100)
        .map(|n: u32| directory.with_added_extension(n.to_string()))
        .filter(|directory| directory.exists())
        .flat_map(|directory| records(&directory))
        .collect()
}

/// Records that were handed in, for tests.
#[cfg(test)]
pub fn records(directory: &std::path::Path) -> Vec<serde_json::Value> {
    let own = ["checkpoint", "reopened", "retention"];
    let lines = Reader::open(directory, 0).expect("a log");
    lines
        .map(|line| serde_json::from_str(&line.expect("a line").text).expect("JSON"))
        .filter(|record: &serde_json::Value| !own.contains(&record["kind"].as_str().unwrap_or("")))
        .collect()
}
