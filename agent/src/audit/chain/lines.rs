//! Whole lines of one file, plain or compressed.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read as _, Seek as _, SeekFrom},
};

use super::segment::Segment;

/// Far above what a record can have: a file that was tampered with costs no more memory.
pub const LONGEST: u64 = 16 << 20;

pub struct Lines {
    source: Source,
    line: Vec<u8>,
    /// Of the line that was read last, from 1.
    number: u64,
    /// Bytes of whole lines so far.
    whole: u64,
}

enum Source {
    Plain(BufReader<File>),
    Packed(Box<dyn BufRead + Send>),
}

impl Lines {
    pub fn open(segment: &Segment) -> io::Result<Self> {
        let file = File::open(&segment.path)?;
        let source = if segment.packed {
            let decoder = zstd::Decoder::new(file)?;
            Source::Packed(Box::new(BufReader::new(decoder)))
        } else {
            Source::Plain(BufReader::with_capacity(64 << 10, file))
        };
        Ok(Self {
            source,
            line: Vec::new(),
            number: 0,
            whole: 0,
        })
    }

    /// The next whole line, without its end. `None`: there is none, or none yet; what
    /// stands behind the last whole line is in [`Self::rest`].
    pub fn next(&mut self) -> io::Result<Option<&[u8]>> {
        self.line.clear();
        let source: &mut dyn BufRead = match &mut self.source {
            Source::Plain(file) => file,
            Source::Packed(file) => file,
        };
        let read = source.take(LONGEST).read_until(b'\n', &mut self.line)? as u64;
        if self.line.last() == Some(&b'\n') {
            self.line.pop();
            self.number += 1;
            self.whole += read;
            return Ok(Some(&self.line));
        }
        if read == LONGEST {
            let why = format!("a line of more than {LONGEST} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        // The writer may cut a torn line off again: next time it is read anew.
        if let Source::Plain(file) = &mut self.source {
            file.seek(SeekFrom::Start(self.whole))?;
        }
        Ok(None)
    }

    /// After `None`: what has no line end.
    pub fn rest(&self) -> &[u8] {
        &self.line
    }

    pub fn number(&self) -> u64 {
        self.number
    }

    /// Bytes of the whole lines that were read.
    pub fn whole(&self) -> u64 {
        self.whole
    }
}
