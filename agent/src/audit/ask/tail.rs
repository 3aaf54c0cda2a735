//! The last records, and those that are still to come.

use std::{collections::VecDeque, path::Path};

use super::{Scan, Trouble, entry::Entry, filter::Filter, segments};
use crate::audit::chain::{ReadError, last_seq};

/// Records that are looked through first for those that a filter lets through.
const FIRST_LOOK: u64 = 4096;

/// The last records, and the scan that goes on after them.
pub struct Tail {
    pub last: VecDeque<Entry>,
    pub troubles: Vec<Trouble>,
    pub scan: Scan,
}

/// Of a settled filter, the last `count` records. It is looked through from the end, in
/// growing steps.
pub fn tail(directory: &Path, filter: &Filter, count: usize) -> Result<Tail, ReadError> {
    let end = last_seq(directory)?.saturating_add(1);
    let span = segments::span(directory, filter)?;
    let mut look = FIRST_LOOK.max(count as u64);
    loop {
        let start = end.saturating_sub(look).max(span.start);
        let mut scan = Scan::from(directory, filter.clone(), start, span.end)?;
        let (mut last, mut troubles) = (VecDeque::new(), Vec::new());
        for item in &mut scan {
            match item {
                Ok(entry) => {
                    last.push_back(entry);
                    if last.len() > count {
                        last.pop_front();
                    }
                }
                Err(trouble) => troubles.push(trouble),
            }
        }
        if last.len() >= count || start <= span.start {
            return Ok(Tail {
                last,
                troubles,
                scan,
            });
        }
        look = look.saturating_mul(8);
    }
}
