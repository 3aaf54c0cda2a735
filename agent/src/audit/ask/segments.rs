//! Which part of the log a question needs: files are named by the number of their first
//! record, and that record tells when it was written.

use std::path::Path;

use time::{Duration, OffsetDateTime};

use super::{entry::Entry, filter::Filter, values::When};
use crate::audit::chain::{ReadError, Reader};

/// Clocks are set back, by so much at most.
const SLACK: Duration = Duration::minutes(10);

/// Numbers of records that may be asked for.
#[derive(Debug, PartialEq, Eq)]
pub struct Span {
    pub start: u64,
    /// Not within any more.
    pub end: Option<u64>,
}

/// Of a settled filter.
pub fn span(directory: &Path, filter: &Filter) -> Result<Span, ReadError> {
    let range = filter.seq;
    let mut span = Span {
        start: range.map_or(1, |range| range.from),
        end: range.and_then(|range| range.to.checked_add(1)),
    };
    let at = |when: Option<When>| match when {
        Some(When::At(moment)) => Some(moment),
        _ => None,
    };
    let (since, until) = (at(filter.since), at(filter.until));
    if since.is_none() && until.is_none() {
        return Ok(span);
    }
    // Newest first: what is asked for is mostly of late.
    for first in firsts(directory).into_iter().rev() {
        let Some(written) = written(directory, first)? else {
            continue;
        };
        if until.is_some_and(|until| written > until + SLACK) {
            span.end = Some(span.end.map_or(first, |end| end.min(first)));
        } else if since.is_none_or(|since| written < since - SLACK) {
            if since.is_some() {
                span.start = span.start.max(first);
            }
            break;
        }
    }
    Ok(span)
}

/// Numbers of the first records of all segments, in order. A directory that cannot be
/// listed is told by who reads it.
fn firsts(directory: &Path) -> Vec<u64> {
    let number = |name: &str| -> Option<u64> {
        let rest = name.strip_prefix("audit-")?;
        let plain = rest.strip_suffix(".zst").unwrap_or(rest);
        plain.strip_suffix(".jsonl")?.parse().ok()
    };
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut all: Vec<u64> = entries
        .filter_map(|entry| number(entry.file_name().to_str()?))
        .collect();
    all.sort_unstable();
    // One that is being compressed stands there twice.
    all.dedup();
    all
}

/// When the record was written; `None` where that cannot be told.
fn written(directory: &Path, seq: u64) -> Result<Option<OffsetDateTime>, ReadError> {
    let first = Reader::open(directory, seq)?.next();
    Ok(first
        .and_then(Result::ok)
        .and_then(|line| Entry::parse(line).ok())
        .map(|entry| entry.time))
}
