//! Records as OTLP log records.
//!
//! The body is the line as it stands in the log: its SHA-256 is the next one's `prev`, so
//! that whoever keeps the bodies can check the chain without the node. What searches go
//! by is in attributes. An OCSF event is a body with structure: nobody hashes it.

use std::time::{SystemTime, UNIX_EPOCH};

use opentelemetry_proto::tonic::{
    collector::logs::v1::ExportLogsServiceRequest,
    common::v1::{AnyValue, ArrayValue, InstrumentationScope, KeyValue, KeyValueList, any_value},
    logs::v1::{LogRecord, ResourceLogs, ScopeLogs, SeverityNumber},
    resource,
};
use serde_json::Value;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{
    super::{config::Format, deliver::Severity, follow::Entry},
    attributes,
};
use crate::{audit::ocsf, identity::TrustDomain};

/// Of the semantic conventions that attributes have their names of.
const CONVENTIONS: &str = "https://opentelemetry.io/schemas/1.37.0";

/// Whose log it is.
pub struct Resource(resource::v1::Resource);

impl Resource {
    /// Namespace, name and instance are unique together, and the same after a restart:
    /// with `postern.seq` they tell which records came twice.
    pub fn new(node: &str, domain: &TrustDomain) -> Self {
        let attributes = [
            ("service.namespace", domain.to_string()),
            ("service.name", "postern".into()),
            ("service.version", env!("CARGO_PKG_VERSION").into()),
            ("service.instance.id", node.into()),
            ("host.name", node.into()),
            ("k8s.node.name", node.into()),
        ]
        .map(|(key, value)| attribute(key, any_value::Value::StringValue(value)));
        Self(resource::v1::Resource {
            attributes: attributes.into(),
            ..Default::default()
        })
    }

    pub fn request(&self, entries: &[Entry], format: Format) -> ExportLogsServiceRequest {
        let scope = InstrumentationScope {
            name: "postern.audit".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        };
        let logs = ScopeLogs {
            scope: Some(scope),
            log_records: (entries.iter())
                .filter_map(|entry| log_record(entry, format))
                .collect(),
            schema_url: CONVENTIONS.into(),
        };
        ExportLogsServiceRequest {
            resource_logs: vec![ResourceLogs {
                resource: Some(self.0.clone()),
                scope_logs: vec![logs],
                schema_url: CONVENTIONS.into(),
            }],
        }
    }
}

fn log_record(entry: &Entry, format: Format) -> Option<LogRecord> {
    let record = &entry.record;
    let body = match format {
        Format::Postern => any_value::Value::StringValue(entry.text.clone()),
        Format::Ocsf => value(&ocsf::map(record)?)?,
    };
    let (severity, name) = match entry.severity() {
        Severity::Info => (SeverityNumber::Info, "INFO"),
        Severity::Warning => (SeverityNumber::Warn, "WARN"),
        Severity::Error => (SeverityNumber::Error, "ERROR"),
    };
    let time = nanoseconds(record["time"].as_str());
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    Some(LogRecord {
        time_unix_nano: time,
        observed_time_unix_nano: now.map_or(time, |now| now.as_nanos() as u64),
        severity_number: severity.into(),
        severity_text: name.into(),
        body: Some(AnyValue { value: Some(body) }),
        attributes: (attributes::of(record).into_iter())
            .filter_map(|(key, text)| Some(attribute(key, value(&text)?)))
            .collect(),
        trace_id: record["trace"].as_str().and_then(trace).unwrap_or_default(),
        event_name: format!("postern.{}", entry.kind()),
        ..Default::default()
    })
}

/// 0, which is "unknown", where there is none.
fn nanoseconds(time: Option<&str>) -> u64 {
    time.and_then(|text| OffsetDateTime::parse(text, &Rfc3339).ok())
        .and_then(|time| time.unix_timestamp_nanos().try_into().ok())
        .unwrap_or(0)
}

fn trace(text: &str) -> Option<Vec<u8>> {
    let fine = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
    let id = u128::from_str_radix(text, 16).ok();
    id.filter(|_| fine).map(|id| id.to_be_bytes().into())
}

fn attribute(key: &str, value: any_value::Value) -> KeyValue {
    KeyValue {
        key: key.into(),
        value: Some(AnyValue { value: Some(value) }),
        ..Default::default()
    }
}

/// JSON's null is an absent value.
fn value(json: &Value) -> Option<any_value::Value> {
    Some(match json {
        Value::Null => return None,
        Value::Bool(flag) => any_value::Value::BoolValue(*flag),
        Value::Number(number) => match number.as_i64() {
            Some(whole) => any_value::Value::IntValue(whole),
            None => any_value::Value::DoubleValue(number.as_f64()?),
        },
        Value::String(text) => any_value::Value::StringValue(text.clone()),
        Value::Array(list) => any_value::Value::ArrayValue(ArrayValue {
            values: list.iter().map(|v| AnyValue { value: value(v) }).collect(),
        }),
        Value::Object(map) => any_value::Value::KvlistValue(KeyValueList {
            values: (map.iter())
                .filter_map(|(key, v)| Some(attribute(key, value(v)?)))
                .collect(),
        }),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn sent(record: Value, format: Format) -> LogRecord {
        let entry = Entry {
            text: record.to_string(),
            record,
        };
        let domain = TrustDomain::default();
        let request = Resource::new("n1", &domain).request(&[entry], format);
        request.resource_logs[0].scope_logs[0].log_records[0].clone()
    }

    #[test]
    fn a_log_record_has_the_line_and_what_searches_go_by() {
        let record = json!({
            "seq": 9, "prev": "00", "time": "1970-01-01T00:00:01.000000005Z", "node": "n1",
            "kind": "request", "verdict": "deny", "method": "GET",
            "trace": "0af7651916cd43dd8448eb211c80319c",
        });
        let log = sent(record.clone(), Format::Postern);
        assert_eq!(log.time_unix_nano, 1_000_000_005);
        assert_eq!(log.severity_number, SeverityNumber::Warn as i32);
        assert_eq!(log.event_name, "postern.request");
        assert_eq!(log.trace_id.len(), 16);
        assert_eq!(log.trace_id[..2], [0x0a, 0xf7]);
        let body = log.body.and_then(|b| b.value);
        let line = any_value::Value::StringValue(record.to_string());
        assert_eq!(body, Some(line));
        let method = log
            .attributes
            .iter()
            .find(|a| a.key == "http.request.method");
        assert!(method.is_some(), "{:?}", log.attributes);
    }

    #[test]
    fn what_is_no_trace_is_none() {
        for text in ["", "0af7", "+af7651916cd43dd8448eb211c80319c", "zz"] {
            assert_eq!(trace(text), None, "{text}");
        }
        assert_eq!(nanoseconds(Some("yesterday")), 0);
    }

    #[test]
    fn an_ocsf_event_keeps_its_structure() {
        let record = json!({"kind": "gap", "time": "2026-01-01T00:00:00Z", "node": "n1",
            "lost": "records", "count": 2});
        let body = sent(record, Format::Ocsf).body.and_then(|b| b.value);
        let Some(any_value::Value::KvlistValue(list)) = body else {
            panic!("{body:?}")
        };
        assert!(list.values.iter().any(|pair| pair.key == "class_uid"));
    }

    #[test]
    fn numbers_keep_their_kind() {
        assert_eq!(value(&json!(-3)), Some(any_value::Value::IntValue(-3)));
        assert_eq!(value(&json!(0.5)), Some(any_value::Value::DoubleValue(0.5)));
        assert_eq!(
            value(&json!(u64::MAX)),
            Some(any_value::Value::DoubleValue(u64::MAX as f64))
        );
        assert_eq!(value(&Value::Null), None);
    }
}
