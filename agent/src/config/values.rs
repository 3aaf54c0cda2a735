//! Values that cannot be wrong: each is checked where it is parsed.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A length of time as people write it: `90s`, `24h`, `500ms`, `1h30m`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Span(pub Duration);

impl Span {
    pub const fn seconds(n: u64) -> Self {
        Self(Duration::from_secs(n))
    }

    pub const fn hours(n: u64) -> Self {
        Self(Duration::from_secs(n * 3_600))
    }
}

impl TryFrom<String> for Span {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match humantime::parse_duration(&text) {
            Ok(span) if !span.is_zero() => Ok(Self(span)),
            _ => Err(format!(
                "`{text}` is not a length of time such as 500ms, 90s, 24h or 1h30m"
            )),
        }
    }
}

impl From<Span> for String {
    fn from(span: Span) -> Self {
        humantime::format_duration(span.0)
            .to_string()
            .replace(' ', "")
    }
}

/// Size of a BPF ring buffer: a power of two and whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(try_from = "u32", into = "u32")]
#[schemars(with = "u32")]
pub struct RingBytes(pub u32);

impl TryFrom<u32> for RingBytes {
    type Error = String;

    fn try_from(bytes: u32) -> Result<Self, String> {
        if bytes.is_power_of_two() && bytes >= 4_096 {
            return Ok(Self(bytes));
        }
        Err(format!("{bytes} is not a power of two of at least 4096"))
    }
}

impl From<RingBytes> for u32 {
    fn from(ring: RingBytes) -> Self {
        ring.0
    }
}

/// An HTTP/2 flow-control window (RFC 9113 6.9.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(try_from = "u32", into = "u32")]
#[schemars(with = "u32")]
pub struct Window(pub u32);

impl Window {
    pub const MIN: u32 = 65_535;
    pub const MAX: u32 = i32::MAX as u32;
}

impl TryFrom<u32> for Window {
    type Error = String;

    fn try_from(bytes: u32) -> Result<Self, String> {
        if (Self::MIN..=Self::MAX).contains(&bytes) {
            return Ok(Self(bytes));
        }
        Err(format!(
            "{bytes} is no window; use {} to {}",
            Self::MIN,
            Self::MAX
        ))
    }
}

impl From<Window> for u32 {
    fn from(window: Window) -> Self {
        window.0
    }
}

/// A size in bytes, from 1 KiB to 1 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(try_from = "u32", into = "u32")]
#[schemars(with = "u32")]
pub struct Bytes(pub u32);

impl TryFrom<u32> for Bytes {
    type Error = String;

    fn try_from(bytes: u32) -> Result<Self, String> {
        match (1 << 10..=1 << 20).contains(&bytes) {
            true => Ok(Self(bytes)),
            false => Err(format!("{bytes} is not from 1024 to 1048576")),
        }
    }
}

impl From<Bytes> for u32 {
    fn from(bytes: Bytes) -> Self {
        bytes.0
    }
}

/// A size on disk, bytes: at least 64 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(try_from = "u64", into = "u64")]
#[schemars(with = "u64")]
pub struct DiskBytes(pub u64);

impl TryFrom<u64> for DiskBytes {
    type Error = String;

    fn try_from(bytes: u64) -> Result<Self, String> {
        match bytes >= 64 << 10 {
            true => Ok(Self(bytes)),
            false => Err(format!("{bytes} is not 65536 or more")),
        }
    }
}

impl From<DiskBytes> for u64 {
    fn from(bytes: DiskBytes) -> Self {
        bytes.0
    }
}

/// When a log is made to outlive a loss of power: `always`, `never`, or how often.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub enum SyncPolicy {
    Always,
    Every(Duration),
    Never,
}

impl TryFrom<String> for SyncPolicy {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.as_str() {
            "always" => Ok(Self::Always),
            "never" => Ok(Self::Never),
            _ => match Span::try_from(text) {
                Ok(span) => Ok(Self::Every(span.0)),
                Err(why) => Err(format!("neither always nor never, and {why}")),
            },
        }
    }
}

impl From<SyncPolicy> for String {
    fn from(policy: SyncPolicy) -> Self {
        match policy {
            SyncPolicy::Always => "always".into(),
            SyncPolicy::Never => "never".into(),
            SyncPolicy::Every(span) => Span(span).into(),
        }
    }
}

/// A number of things: at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(try_from = "u32", into = "u32")]
#[schemars(with = "u32")]
pub struct Count(pub u32);

impl TryFrom<u32> for Count {
    type Error = String;

    fn try_from(count: u32) -> Result<Self, String> {
        if count > 0 {
            Ok(Self(count))
        } else {
            Err("must be at least 1".into())
        }
    }
}

impl From<Count> for u32 {
    fn from(count: Count) -> Self {
        count.0
    }
}

/// Length of a queue: at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(try_from = "usize", into = "usize")]
#[schemars(with = "usize")]
pub struct QueueLength(pub usize);

impl TryFrom<usize> for QueueLength {
    type Error = String;

    fn try_from(length: usize) -> Result<Self, String> {
        if length > 0 {
            Ok(Self(length))
        } else {
            Err("a queue holds at least 1".into())
        }
    }
}

impl From<QueueLength> for usize {
    fn from(queue: QueueLength) -> Self {
        queue.0
    }
}
