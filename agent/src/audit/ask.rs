//! Questions to the audit log: `postern audit query`, `tail` and `stats`. They read
//! what is committed, without the agent and while it runs. Nothing that they cannot
//! read is passed over in silence.

mod columns;
mod entry;
mod file;
mod filter;
mod segments;
mod stats;
mod table;
mod tail;
#[cfg(test)]
mod tests;
mod values;

use std::path::Path;

use super::chain::{ReadError, Reader};

pub use entry::{Entry, Unreadable};
pub use file::{FileError, Format, write_file};
pub use filter::Filter;
pub use stats::{By, Stats};
pub use table::{Table, grid, terminal_width};
pub use tail::{Tail, tail};

/// The records of a log that a filter lets through, in their order.
pub struct Scan {
    reader: Reader,
    filter: Filter,
    /// The first record that is not asked for any more.
    end: Option<u64>,
    ended: bool,
    /// What could not be read last: where that does not change, nothing more comes.
    stuck: Option<String>,
}

/// Why something in the log could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Record(#[from] Unreadable),
}

impl Scan {
    /// Of a settled filter. Segments that it needs nothing of are not opened.
    pub fn new(directory: &Path, filter: Filter) -> Result<Self, ReadError> {
        let span = segments::span(directory, &filter)?;
        Self::from(directory, filter, span.start, span.end)
    }

    /// From this record on.
    fn from(
        directory: &Path,
        filter: Filter,
        start: u64,
        end: Option<u64>,
    ) -> Result<Self, ReadError> {
        Ok(Self {
            reader: Reader::open(directory, start)?,
            filter,
            end,
            ended: false,
            stuck: None,
        })
    }
}

/// `None` at the end of what is committed; may be called again once there is more.
impl Iterator for Scan {
    type Item = Result<Entry, Trouble>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.ended {
            let line = match self.reader.next()? {
                Ok(line) => line,
                Err(error) => {
                    let said = Some(error.to_string());
                    if self.stuck == said {
                        return None;
                    }
                    self.stuck = said;
                    return Some(Err(error.into()));
                }
            };
            self.stuck = None;
            if self.end.is_some_and(|end| line.seq >= end) {
                self.ended = true;
                return None;
            }
            match Entry::parse(line) {
                Ok(entry) if self.filter.accepts(&entry) => return Some(Ok(entry)),
                Ok(_) => {}
                Err(unreadable) => return Some(Err(unreadable.into())),
            }
        }
        None
    }
}

/// Tells on standard error what could not be read, and counts it.
#[derive(Debug, Default)]
pub struct Troubles(u64);

impl Troubles {
    pub fn pass(&mut self, item: Result<Entry, Trouble>) -> Option<Entry> {
        match item {
            Ok(entry) => Some(entry),
            Err(trouble) => {
                eprintln!("postern: {trouble}");
                self.0 += 1;
                None
            }
        }
    }

    pub fn any(&self) -> bool {
        self.0 > 0
    }
}
