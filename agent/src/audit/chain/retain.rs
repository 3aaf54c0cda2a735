//! Which segments are old enough, or too many, to be kept.

use std::{
    fs, io,
    time::{Duration, SystemTime},
};

use serde::Serialize;

use super::{
    line::{Hash, Head},
    lines::Lines,
    segment::{self, Segment},
    write::Settings,
};

/// Oldest segments, which are to go.
pub struct Due {
    pub segments: Vec<Segment>,
    first: u64,
    last: u64,
    /// Of the last of their records; `None`: it is the log's last.
    hash: Option<Hash>,
}

/// What the log says of them before they go: `verify` finds in it what the log's new
/// beginning is behind.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Link {
    first_seq: u64,
    last_seq: u64,
    last_hash: String,
    files: Vec<String>,
}

impl Due {
    /// The last record that goes.
    pub fn last(&self) -> u64 {
        self.last
    }

    /// `end`: hash of the log's last record.
    pub fn link(&self, end: Hash) -> Link {
        Link {
            first_seq: self.first,
            last_seq: self.last,
            last_hash: self.hash.unwrap_or(end).as_str().to_owned(),
            files: self.segments.iter().map(Segment::name).collect(),
        }
    }
}

/// The oldest segments, as many as are beyond the bounds; never the one that is written to,
/// and none up to the record that is removed already.
pub fn due(settings: &Settings, active: u64, removed: u64) -> io::Result<Option<Due>> {
    let mut all = segment::list(&settings.directory)?;
    all.retain(|segment| segment.first > removed);
    let mut sizes = Vec::new();
    for segment in &all {
        match fs::metadata(&segment.path) {
            // It was compressed in between: next time.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            metadata => {
                let metadata = metadata?;
                sizes.push((metadata.len(), metadata.modified()?));
            }
        }
    }
    let mut total: u64 = sizes.iter().map(|(length, _)| length).sum();
    let now = SystemTime::now();
    let too_old = |at: SystemTime| {
        let age = now.duration_since(at).unwrap_or(Duration::ZERO);
        settings.retain_age.is_some_and(|limit| age > limit)
    };
    let mut count = 0;
    for (segment, (length, modified)) in all.iter().zip(sizes) {
        let too_much = settings.retain_bytes.is_some_and(|limit| total > limit);
        if segment.first >= active || !(too_much || too_old(modified)) {
            break;
        }
        total -= length;
        count += 1;
    }
    let Some(next) = all.get(count).filter(|_| count > 0) else {
        return Ok(None);
    };
    Ok(Some(Due {
        first: all[0].first,
        last: next.first - 1,
        hash: before(next)?,
        segments: all[..count].to_vec(),
    }))
}

/// What a segment's first record says of the one before.
fn before(segment: &Segment) -> io::Result<Option<Hash>> {
    let mut lines = Lines::open(segment)?;
    let Some(line) = lines.next()? else {
        return Ok(None);
    };
    let (_, prev) = Head::parse(line).map_err(|why| {
        let why = format!("{}: {why}", segment.path.display());
        io::Error::new(io::ErrorKind::InvalidData, why)
    })?;
    Ok(Some(prev))
}
