//! Files of the log, by the number of their first record.

use std::{
    io,
    path::{Path, PathBuf},
};

const PREFIX: &str = "audit-";
const PLAIN: &str = ".jsonl";
const PACKED: &str = ".jsonl.zst";
/// So that names sort as numbers do.
const DIGITS: usize = 20;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// `seq` of its first record, as its name says.
    pub first: u64,
    pub path: PathBuf,
    pub packed: bool,
}

impl Segment {
    pub fn plain(directory: &Path, first: u64) -> Self {
        Self::new(directory, first, false)
    }

    /// The same segment, compressed.
    pub fn to_packed(&self) -> Self {
        let directory = self.path.parent().unwrap_or(Path::new("."));
        Self::new(directory, self.first, true)
    }

    fn new(directory: &Path, first: u64, packed: bool) -> Self {
        let end = if packed { PACKED } else { PLAIN };
        Self {
            first,
            path: directory.join(format!("{PREFIX}{first:0DIGITS$}{end}")),
            packed,
        }
    }

    /// File name without its directory.
    pub fn name(&self) -> String {
        let name = self.path.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    fn parse(directory: &Path, name: &str) -> Option<Self> {
        let rest = name.strip_prefix(PREFIX)?;
        let (digits, end) = rest.split_at_checked(DIGITS)?;
        let packed = match end {
            PLAIN => false,
            PACKED => true,
            _ => return None,
        };
        let all_digits = digits.bytes().all(|b| b.is_ascii_digit());
        let first = all_digits.then(|| digits.parse().ok())??;
        Some(Self::new(directory, first, packed))
    }
}

/// All of a directory, oldest first. Of a segment that is there twice, because an agent
/// ended while it was compressed, the plain file comes first.
pub fn list_all(directory: &Path) -> io::Result<Vec<Segment>> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let name = entry?.file_name();
        all.extend(name.to_str().and_then(|n| Segment::parse(directory, n)));
    }
    all.sort_by_key(|segment| (segment.first, segment.packed));
    Ok(all)
}

/// As [`list_all`], each segment once.
pub fn list(directory: &Path) -> io::Result<Vec<Segment>> {
    let mut all = list_all(directory)?;
    all.dedup_by_key(|segment| segment.first);
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed_as_they_are_written() {
        let at = Path::new("/log");
        for segment in [Segment::plain(at, 1), Segment::plain(at, 7).to_packed()] {
            assert_eq!(Segment::parse(at, &segment.name()), Some(segment));
        }
        for name in [
            "audit-1.jsonl",
            "audit-+0000000000000000001.jsonl",
            "audit-00000000000000000001.jsonl.tmp",
            "audit-00000000000000000001",
            "other-00000000000000000001.jsonl",
            "audit-99999999999999999999.jsonl",
        ] {
            assert_eq!(Segment::parse(at, name), None, "{name}");
        }
    }
}
