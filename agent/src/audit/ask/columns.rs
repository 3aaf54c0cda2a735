//! The columns of Parquet and Arrow files: flat, of proper types, and the whole record
//! beside them. Columns are added at the end and never change their type, so that files
//! of different versions can be read together.

use std::sync::Arc;

use arrow_array::{
    ArrayRef, RecordBatch,
    builder::{StringBuilder, TimestampMicrosecondBuilder, UInt64Builder},
};
use arrow_schema::{ArrowError, DataType, Field, Schema, TimeUnit};
use time::OffsetDateTime;

use super::entry::{Entry, number, text, time};

#[derive(Clone, Copy)]
enum Type {
    Time,
    Number,
    Text,
}

use Type::{Number, Text, Time};

/// Name, type, and where it stands in a record.
const COLUMNS: &[(&str, Type, &str)] = &[
    ("seq", Number, "/seq"),
    ("time", Time, "/time"),
    ("node", Text, "/node"),
    ("kind", Text, "/kind"),
    ("event", Text, "/event"),
    ("verdict", Text, "/verdict"),
    ("id", Number, "/id"),
    ("connection", Number, "/connection"),
    ("reporter", Text, "/reporter"),
    ("transport", Text, "/transport"),
    ("protocol", Text, "/protocol"),
    ("direction", Text, "/direction"),
    ("started", Time, "/started"),
    ("duration_ms", Number, "/durationMs"),
    ("source_address", Text, "/source/address"),
    ("source_identity", Text, "/source/identity"),
    ("source_namespace", Text, "/source/namespace"),
    ("source_pod", Text, "/source/pod"),
    ("source_workload", Text, "/source/workload"),
    ("source_pid", Number, "/source/process/pid"),
    ("source_exe", Text, "/source/process/exe"),
    ("destination_address", Text, "/destination/address"),
    ("destination_identity", Text, "/destination/identity"),
    ("destination_namespace", Text, "/destination/namespace"),
    ("destination_pod", Text, "/destination/pod"),
    ("destination_workload", Text, "/destination/workload"),
    ("destination_pid", Number, "/destination/process/pid"),
    ("destination_exe", Text, "/destination/process/exe"),
    // Of records that are about one pod.
    ("namespace", Text, "/namespace"),
    ("pod", Text, "/pod"),
    ("workload", Text, "/workload"),
    ("identity", Text, "/identity"),
    ("local", Text, "/local"),
    ("remote", Text, "/remote"),
    ("pid", Number, "/process/pid"),
    ("uid", Number, "/process/uid"),
    ("comm", Text, "/process/comm"),
    ("exe", Text, "/process/exe"),
    ("container", Text, "/process/container"),
    ("dialled", Text, "/dialled"),
    ("service", Text, "/service"),
    ("requests", Number, "/requests"),
    ("method", Text, "/method"),
    ("host", Text, "/host"),
    ("path", Text, "/path"),
    ("status", Number, "/status"),
    ("policy_kind", Text, "/policy/kind"),
    ("policy_namespace", Text, "/policy/namespace"),
    ("policy_name", Text, "/policy/name"),
    ("policy_rule", Number, "/policy/rule"),
    ("bytes_sent", Number, "/bytes/sent"),
    ("bytes_received", Number, "/bytes/received"),
    ("tls_version", Text, "/tls/version"),
    ("tls_group", Text, "/tls/group"),
    ("token_issuer", Text, "/token/iss"),
    ("token_subject", Text, "/token/sub"),
    ("trace", Text, "/trace"),
    ("fault", Text, "/fault"),
    ("end", Text, "/end"),
    ("reason", Text, "/reason"),
    ("lost", Text, "/lost"),
    ("count", Number, "/count"),
    // The pointer to the whole document (RFC 6901 5).
    ("record", Text, ""),
];

pub fn schema() -> Arc<Schema> {
    let fields = COLUMNS.iter().map(|(name, of, pointer)| {
        let of = match of {
            Time => DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
            Number => DataType::UInt64,
            Text => DataType::Utf8,
        };
        let always = matches!(*pointer, "/seq" | "/time" | "/kind" | "");
        Field::new(*name, of, !always)
    });
    Arc::new(Schema::new(fields.collect::<Vec<_>>()))
}

/// Rows of one schema, so many at once.
pub fn batch(schema: &Arc<Schema>, entries: &[Entry]) -> Result<RecordBatch, ArrowError> {
    let columns = COLUMNS
        .iter()
        .map(|(_, of, pointer)| column(*of, pointer, entries));
    RecordBatch::try_new(schema.clone(), columns.collect())
}

fn column(of: Type, pointer: &str, entries: &[Entry]) -> ArrayRef {
    match of {
        Time => {
            let mut builder = TimestampMicrosecondBuilder::with_capacity(entries.len());
            for entry in entries {
                let told = entry.value.pointer(pointer).and_then(time);
                builder.append_option(told.and_then(micros));
            }
            Arc::new(builder.finish().with_timezone("UTC"))
        }
        Number => {
            let mut builder = UInt64Builder::with_capacity(entries.len());
            for entry in entries {
                builder.append_option(number(&entry.value, pointer));
            }
            Arc::new(builder.finish())
        }
        Text => {
            let mut builder = StringBuilder::new();
            for entry in entries {
                match pointer {
                    "" => builder.append_value(&entry.line.text),
                    _ => builder.append_option(text(&entry.value, pointer)),
                }
            }
            Arc::new(builder.finish())
        }
    }
}

fn micros(time: OffsetDateTime) -> Option<i64> {
    i64::try_from(time.unix_timestamp_nanos().div_euclid(1000)).ok()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_name_stands_twice() {
        let names: HashSet<_> = COLUMNS.iter().map(|(name, ..)| name).collect();
        assert_eq!(names.len(), COLUMNS.len());
    }

    #[test]
    fn times_are_floored_also_before_1970() {
        for (text, expected) in [
            ("2026-01-31T12:00:00.123456789Z", 1_769_860_800_123_456),
            ("2026-01-31T13:00:00+01:00", 1_769_860_800_000_000),
            ("1969-12-31T23:59:59.9999999Z", -1),
        ] {
            let read = time(&text.into()).and_then(micros);
            assert_eq!(read, Some(expected), "{text}");
        }
    }
}
