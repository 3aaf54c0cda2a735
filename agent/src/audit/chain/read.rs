//! The log, line by line, while it is written, rotated, compressed and cut.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::Deserialize;

use super::{
    lines::{LONGEST, Lines},
    segment::{self, Segment},
};

/// How often a directory is read again because a file of it was gone when it was opened.
const TRIES: usize = 16;

/// One record.
#[derive(Clone, Debug)]
pub struct Line {
    pub seq: u64,
    /// Without its line end.
    pub text: String,
    pub file: Arc<Path>,
    /// In its file, from 1.
    pub number: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{}:{number}: {why}", file.display())]
    Line {
        file: Arc<Path>,
        number: u64,
        why: String,
    },
}

impl ReadError {
    pub(super) fn file(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { path, source }
    }
}

/// Reads from a record on. Its `None` is the end of what is written in whole lines, and
/// not its last word: asked again, it goes on where it was, across rotation, compression
/// and retention. Hashes are for `verify`.
pub struct Reader {
    directory: PathBuf,
    /// Records before it are passed over.
    from: u64,
    current: Option<Current>,
}

/// The segment that it stands in.
struct Current {
    first: u64,
    file: Arc<Path>,
    /// None: it cannot be read any further.
    lines: Option<Lines>,
    /// Nothing is written to it any more.
    sealed: bool,
}

impl Reader {
    /// `from`: the first `seq` that is wanted; 0 or 1: all that is there.
    pub fn open(directory: &Path, from: u64) -> Result<Self, ReadError> {
        segment::list(directory).map_err(ReadError::file(directory))?;
        Ok(Self {
            directory: directory.to_owned(),
            from,
            current: None,
        })
    }

    fn following(&self) -> Result<Option<Segment>, ReadError> {
        let all = segment::list(&self.directory).map_err(ReadError::file(&self.directory))?;
        Ok(match &self.current {
            Some(current) => all.into_iter().find(|s| s.first > current.first),
            None => {
                let before = all.partition_point(|s| s.first <= self.from);
                all.into_iter().nth(before.saturating_sub(1))
            }
        })
    }

    /// Opens the segment behind the current one; false: there is none.
    fn advance(&mut self) -> Result<bool, ReadError> {
        for _ in 0..TRIES {
            let Some(next) = self.following()? else {
                return Ok(false);
            };
            let opened = Lines::open(&next);
            // It was compressed or removed in between.
            if let Err(error) = &opened
                && error.kind() == io::ErrorKind::NotFound
            {
                continue;
            }
            let (lines, error) = match opened {
                Ok(lines) => (Some(lines), None),
                Err(error) => (None, Some(error)),
            };
            self.current = Some(Current {
                first: next.first,
                file: next.path.as_path().into(),
                lines,
                sealed: next.packed,
            });
            return error.map_or(Ok(true), |e| Err(ReadError::file(&next.path)(e)));
        }
        let gone = io::Error::from(io::ErrorKind::NotFound);
        Err(ReadError::file(&self.directory)(gone))
    }

    fn step(&mut self) -> Result<Option<Line>, ReadError> {
        loop {
            let Some(current) = &mut self.current else {
                if self.advance()? {
                    continue;
                }
                return Ok(None);
            };
            if let Some(line) = current.next()? {
                if line.seq >= self.from {
                    return Ok(Some(line));
                }
            } else if current.sealed {
                if !self.advance()? {
                    return Ok(None);
                }
            } else if self.following()?.is_none() {
                return Ok(None);
            } else if let Some(current) = &mut self.current {
                // It was written to until the next one was there: once more.
                current.sealed = true;
            }
        }
    }
}

impl Iterator for Reader {
    type Item = Result<Line, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.step().transpose()
    }
}

impl Current {
    fn next(&mut self) -> Result<Option<Line>, ReadError> {
        let Some(lines) = &mut self.lines else {
            return Ok(None);
        };
        match lines.next() {
            Ok(None) => Ok(None),
            Ok(Some(text)) => match parse(text) {
                Ok((seq, text)) => Ok(Some(Line {
                    seq,
                    text: text.to_owned(),
                    file: self.file.clone(),
                    number: lines.number(),
                })),
                Err(why) => Err(ReadError::Line {
                    file: self.file.clone(),
                    number: lines.number(),
                    why,
                }),
            },
            Err(source) => {
                // The next call goes on with the next file.
                self.lines = None;
                self.sealed = true;
                Err(ReadError::file(&self.file)(source))
            }
        }
    }
}

/// The `seq` of the last record; 0: there is none.
pub fn last_seq(directory: &Path) -> Result<u64, ReadError> {
    for _ in 0..TRIES {
        let all = segment::list(directory).map_err(ReadError::file(directory))?;
        let Some(last) = all.last() else {
            return Ok(0);
        };
        match last_of(last) {
            // It was compressed in between.
            Err(ReadError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            // As long as nothing stands in it, its name says what stands before.
            Ok(None) => return Ok(last.first.saturating_sub(1)),
            Ok(Some(seq)) => return Ok(seq),
            Err(error) => return Err(error),
        }
    }
    let gone = io::Error::from(io::ErrorKind::NotFound);
    Err(ReadError::file(directory)(gone))
}

fn last_of(segment: &Segment) -> Result<Option<u64>, ReadError> {
    let last = if segment.packed {
        last_by_reading(segment)
    } else {
        last_from_end(&segment.path)
    };
    let Some(line) = last.map_err(ReadError::file(&segment.path))? else {
        return Ok(None);
    };
    let (seq, _) = parse(&line).map_err(|why| ReadError::File {
        path: segment.path.clone(),
        source: io::Error::new(io::ErrorKind::InvalidData, format!("last line: {why}")),
    })?;
    Ok(Some(seq))
}

fn last_by_reading(segment: &Segment) -> io::Result<Option<Vec<u8>>> {
    let mut lines = Lines::open(segment)?;
    let mut last = None;
    while let Some(line) = lines.next()? {
        let last = last.get_or_insert_with(Vec::new);
        last.clear();
        last.extend_from_slice(line);
    }
    Ok(last)
}

/// The last whole line, from ever larger pieces of the file's end.
fn last_from_end(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    let mut size = 64 << 10;
    loop {
        let start = length.saturating_sub(size);
        file.seek(SeekFrom::Start(start))?;
        let mut tail = Vec::new();
        (&mut file).take(length - start).read_to_end(&mut tail)?;
        let end = tail.iter().rposition(|&b| b == b'\n');
        let text = tail.get(..end.unwrap_or(0)).unwrap_or_default();
        match text.iter().rposition(|&b| b == b'\n') {
            Some(before) => return Ok(Some(text.get(before + 1..).unwrap_or_default().to_vec())),
            None if start == 0 => return Ok(end.map(|_| text.to_vec())),
            None if size > LONGEST => {
                let why = format!("a line of more than {LONGEST} bytes");
                return Err(io::Error::new(io::ErrorKind::InvalidData, why));
            }
            None => size *= 4,
        }
    }
}

#[derive(Deserialize)]
struct Head {
    seq: u64,
}

fn parse(line: &[u8]) -> Result<(u64, &str), String> {
    let text = std::str::from_utf8(line).map_err(|e| e.to_string())?;
    let head: Head = serde_json::from_str(text).map_err(|e| e.to_string())?;
    Ok((head.seq, text))
}

#[cfg(test)]
mod tests;
