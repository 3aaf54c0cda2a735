//! How far a sink got: the sequence number of the last record that its receiver has
//! acknowledged, in a file of its own. It is written after that, so that a crash sends
//! some again and leaves none out.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

pub struct Cursor {
    path: PathBuf,
    reached: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum CursorError {
    #[error("{path}: {source}")]
    File { path: PathBuf, source: io::Error },
    #[error("{path}: holds no sequence number; remove it to begin anew")]
    Content { path: PathBuf },
}

impl Cursor {
    /// Of this name; a new one stands at `first`, and is written at once: "now" is a
    /// moment, not each start until something was sent.
    pub fn open(directory: &Path, name: &str, first: u64) -> Result<Self, CursorError> {
        let path = directory.join(name);
        let failed = |source| CursorError::File {
            path: path.clone(),
            source,
        };
        match fs::read_to_string(&path) {
            // What a power cut may leave of it: all is sent again.
            Ok(text) if text.trim().is_empty() => {
                tracing::warn!(
                    "{}: is empty; the log is sent from its beginning",
                    path.display()
                );
                Ok(Self { path, reached: 0 })
            }
            Ok(text) => match text.trim().parse() {
                Ok(reached) => Ok(Self { path, reached }),
                Err(_) => Err(CursorError::Content { path }),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let mut private = fs::DirBuilder::new();
                private.recursive(true).mode(0o700);
                private.create(directory).map_err(failed)?;
                let mut cursor = Self { path, reached: 0 };
                cursor.reach(first)?;
                Ok(cursor)
            }
            Err(error) => Err(failed(error)),
        }
    }

    pub fn reached(&self) -> u64 {
        self.reached
    }

    /// Whole or as it was, whatever happens in between.
    pub fn reach(&mut self, seq: u64) -> Result<(), CursorError> {
        // No name of a sink has a dot.
        let partial = self.path.with_extension("new");
        let written = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&partial)
            .and_then(|mut file| {
                writeln!(file, "{seq}")?;
                file.sync_data()
            })
            .and_then(|()| fs::rename(&partial, &self.path));
        written.map_err(|source| CursorError::File {
            path: self.path.clone(),
            source,
        })?;
        self.reached = seq;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_stands_where_it_was_left() {
        let directory = tempfile::tempdir().expect("directory");
        let directory = directory.path().join("cursors");
        let mut cursor = Cursor::open(&directory, "a", 7).expect("new");
        assert_eq!(cursor.reached(), 7);
        let again = Cursor::open(&directory, "a", 99).expect("there");
        assert_eq!(again.reached(), 7, "now is when it was made");
        cursor.reach(12).expect("written");
        let again = Cursor::open(&directory, "a", 99).expect("there");
        assert_eq!(again.reached(), 12);
        let other = Cursor::open(&directory, "b", 0).expect("new");
        assert_eq!(other.reached(), 0);
    }

    #[test]
    fn a_file_that_is_no_cursor_is_not_overwritten() {
        let directory = tempfile::tempdir().expect("directory");
        fs::write(directory.path().join("a"), "twelve").expect("written");
        let error = Cursor::open(directory.path(), "a", 0)
            .err()
            .expect("refused");
        assert!(error.to_string().contains("no sequence number"), "{error}");
    }
}
