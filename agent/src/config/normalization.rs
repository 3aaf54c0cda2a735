//! How paths are normalized.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Istio's four degrees.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[value(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Normalization {
    /// Only the fragment is cut.
    None,
    /// RFC 3986 6.2.2: escapes of unreserved characters are decoded once, `\` is
    /// `/`, `.` and `..` are resolved.
    #[default]
    Base,
    /// And adjacent slashes become one.
    MergeSlashes,
    /// And `%2F` and `%5C` are decoded before that.
    DecodeAndMergeSlashes,
}
