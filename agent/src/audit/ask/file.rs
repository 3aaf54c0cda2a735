//! Records as files of other programs: Parquet and Arrow, in groups of bounded size.

use std::io::Write;

use arrow_ipc::writer::FileWriter;
use arrow_schema::ArrowError;
use parquet::{
    arrow::ArrowWriter,
    basic::{Compression, ZstdLevel},
    errors::ParquetError,
    file::properties::WriterProperties,
};

use super::{columns, entry::Entry};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Parquet,
    /// Arrow IPC file ("Feather V2").
    Arrow,
}

#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("Parquet: {0}")]
    Parquet(#[from] ParquetError),
    #[error("Arrow: {0}")]
    Arrow(#[from] ArrowError),
}

/// Records of a group, and bytes of their lines: what is held in memory.
const GROUP: usize = 32_768;
const GROUP_BYTES: usize = 32 << 20;

enum Writer<W: Write + Send> {
    Parquet(Box<ArrowWriter<W>>),
    Arrow(Box<FileWriter<W>>),
}

/// Writes a whole file. Also one without records has its columns.
pub fn write_file<W: Write + Send>(
    to: W,
    format: Format,
    entries: impl Iterator<Item = Entry>,
) -> Result<(), FileError> {
    let schema = columns::schema();
    let mut writer = match format {
        Format::Parquet => {
            let properties = WriterProperties::builder()
                .set_compression(Compression::ZSTD(ZstdLevel::try_new(3)?))
                .build();
            let writer = ArrowWriter::try_new(to, schema.clone(), Some(properties))?;
            Writer::Parquet(Box::new(writer))
        }
        Format::Arrow => Writer::Arrow(Box::new(FileWriter::try_new(to, &schema)?)),
    };
    let (mut group, mut bytes) = (Vec::new(), 0);
    for entry in entries {
        bytes += entry.line.text.len();
        group.push(entry);
        if group.len() >= GROUP || bytes >= GROUP_BYTES {
            writer.group(&columns::batch(&schema, &group)?)?;
            group.clear();
            bytes = 0;
        }
    }
    if !group.is_empty() {
        writer.group(&columns::batch(&schema, &group)?)?;
    }
    match writer {
        Writer::Parquet(writer) => {
            writer.close()?;
        }
        Writer::Arrow(mut writer) => writer.finish()?,
    }
    Ok(())
}

impl<W: Write + Send> Writer<W> {
    fn group(&mut self, batch: &arrow_array::RecordBatch) -> Result<(), FileError> {
        match self {
            Self::Parquet(writer) => {
                writer.write(batch)?;
                // Ends the row group.
                writer.flush()?;
            }
            Self::Arrow(writer) => writer.write(batch)?,
        }
        Ok(())
    }
}
