//! `postern bugtool`: what others need to find out what is wrong on a node, in one archive
//! (tar.gz, mode 0600), without secrets. Each part is bounded in size and in time; what
//! cannot be had is said in its place. Of the audit log nothing, unless it is asked for.

mod parts;
mod redact;
#[cfg(test)]
mod tests;

use std::{
    fs::OpenOptions,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::mpsc,
    time::{Duration, Instant, SystemTime},
};

use flate2::{Compression, write::GzEncoder};

use crate::config::Config;
use redact::Known;

/// Largest part, bytes; what is beyond is cut off.
const MAX_PART: usize = 8 << 20;
/// For each part, and for all.
const PART: Duration = Duration::from_secs(20);
const ALL: Duration = Duration::from_secs(120);
/// Records of the audit log, at most.
pub const MAX_RECORDS: usize = 10_000;

/// What is wanted beside what always is.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Last records of the audit log.
    pub audit: usize,
    /// The agent's log, where it is in a file.
    pub log: Option<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
#[error("{path}: {source}")]
pub struct ArchiveError {
    path: PathBuf,
    source: io::Error,
}

/// Name of the archive, where none is given.
pub fn name(node: &str, now: SystemTime) -> PathBuf {
    let seconds = now
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let plain = |c: char| {
        if c.is_ascii_alphanumeric() || c == '-' || c == '.' {
            c
        } else {
            '_'
        }
    };
    let node: String = node.chars().map(plain).collect();
    format!("postern-{node}-{seconds}.tar.gz").into()
}

/// Writes the archive; a file of that name is not replaced.
pub fn write(config: &Config, wanted: &Wanted, path: &Path) -> Result<(), ArchiveError> {
    let fail = |source| ArchiveError {
        path: path.to_owned(),
        source,
    };
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    let mut archive =
        tar::Builder::new(GzEncoder::new(file.map_err(fail)?, Compression::default()));
    let known = Known::read(config);
    let end = Instant::now() + ALL;
    for (name, gather) in parts::all(config, wanted) {
        let left = end.saturating_duration_since(Instant::now()).min(PART);
        let text = within(left, gather);
        let mut text = known.clean(&text);
        if text.len() > MAX_PART {
            let cut = (0..=MAX_PART).rev().find(|at| text.is_char_boundary(*at));
            text.truncate(cut.unwrap_or(0));
            text.push_str("\n... cut off here\n");
        }
        append(&mut archive, name, text.as_bytes()).map_err(fail)?;
    }
    let mut file = archive
        .into_inner()
        .and_then(GzEncoder::finish)
        .map_err(fail)?;
    file.flush().and_then(|()| file.sync_all()).map_err(fail)
}

/// What a part says, or that it took too long: it is left behind then.
fn within(limit: Duration, gather: parts::Gather) -> String {
    let (done, result) = mpsc::channel();
    std::thread::spawn(move || {
        let _too_late = done.send(gather());
    });
    let result = result.recv_timeout(limit);
    result.unwrap_or_else(|_late| format!("not there within {limit:?}\n"))
}

fn append(
    archive: &mut tar::Builder<GzEncoder<std::fs::File>>,
    name: &str,
    content: &[u8],
) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o600);
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    header.set_mtime(since.unwrap_or_default().as_secs());
    header.set_cksum();
    archive.append_data(&mut header, format!("postern/{name}"), content)
}
