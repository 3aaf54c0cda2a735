//! A record as the log has it, and what questions look for in it.

use std::{path::Path, sync::Arc};

use serde_json::Value;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::audit::chain::Line;

/// One record: the line as it stands in the log, and what it says.
pub struct Entry {
    pub line: Line,
    pub value: Value,
    pub time: OffsetDateTime,
}

/// A line that is no record.
#[derive(Debug, thiserror::Error)]
#[error("{}:{number}: {why}", file.display())]
pub struct Unreadable {
    pub file: Arc<Path>,
    pub number: u64,
    pub why: String,
}

impl Entry {
    pub fn parse(line: Line) -> Result<Self, Unreadable> {
        let read = |text: &str| -> Result<(Value, OffsetDateTime), String> {
            let value: Value = serde_json::from_str(text).map_err(|e| e.to_string())?;
            for name in ["kind", "time"] {
                if !value[name].is_string() {
                    return Err(format!("the record has no `{name}`"));
                }
            }
            let time = time(&value["time"]).ok_or("its `time` is no time of RFC 3339")?;
            Ok((value, time))
        };
        match read(&line.text) {
            Ok((value, time)) => Ok(Self { line, value, time }),
            Err(why) => Err(Unreadable {
                file: line.file,
                number: line.number,
                why,
            }),
        }
    }

    pub fn kind(&self) -> &str {
        text(&self.value, "/kind").unwrap_or_default()
    }

    /// The processes that it is about.
    pub fn processes(&self) -> impl Iterator<Item = &Value> {
        ["/process", "/source/process", "/destination/process"]
            .into_iter()
            .filter_map(|pointer| self.value.pointer(pointer))
    }

    /// Who began it. Of what the kernel saw of one pod, that pod where it dialled.
    pub fn source(&self) -> Option<&Value> {
        self.end("source", "outbound")
    }

    pub fn destination(&self) -> Option<&Value> {
        self.end("destination", "inbound")
    }

    fn end(&self, name: &str, direction: &str) -> Option<&Value> {
        let own = self.value["direction"] == direction;
        self.value.get(name).or(own.then_some(&self.value))
    }

    /// Whoever it names: the ends of a call, or the pod that it is about.
    pub fn ends(&self) -> impl Iterator<Item = &Value> {
        let ends = ["source", "destination"].into_iter();
        ends.filter_map(|name| self.value.get(name))
            .chain([&self.value])
    }
}

/// A text at a JSON pointer.
pub fn text<'a>(value: &'a Value, pointer: &str) -> Option<&'a str> {
    value.pointer(pointer)?.as_str()
}

pub fn number(value: &Value, pointer: &str) -> Option<u64> {
    value.pointer(pointer)?.as_u64()
}

pub fn time(value: &Value) -> Option<OffsetDateTime> {
    OffsetDateTime::parse(value.as_str()?, &Rfc3339).ok()
}
