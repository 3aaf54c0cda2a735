//! What a receiver's answer means: taken, to be tried again, or never to be taken.
//!
//! OTLP has clients drop what is answered with a code that is not retryable. An audit
//! log does so only where the data itself is refused. A receiver that refuses the agent
//! (an expired credential, a wrong path) is one that somebody will mend: the log waits.
//! Whether it is the data, an empty request tells, which OTLP has every receiver take.

use std::time::Duration;

use http::{HeaderMap, StatusCode, header};
use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsServiceResponse;
use prost::Message;
use time::{OffsetDateTime, format_description::well_known::Rfc2822};
use tonic::Code;

use super::super::deliver::{Failure, Taken};

/// Of an error's text, what is told.
const MAX_TEXT: usize = 300;

pub fn taken(answer: ExportLogsServiceResponse) -> Taken {
    let partial = answer.partial_success.unwrap_or_default();
    Taken {
        rejected: partial.rejected_log_records.try_into().unwrap_or(0),
        message: shown(&partial.error_message),
    }
}

pub fn grpc(status: &tonic::Status) -> Failure {
    let why = format!("{:?}: {}", status.code(), shown(status.message()));
    let after = retry_info(status.details());
    match status.code() {
        Code::InvalidArgument => Failure::Bad { why },
        // A quota that fills again says when (OTLP: Failures); this is a message's size.
        Code::ResourceExhausted if after.is_none() => Failure::Large { why },
        _ => Failure::Later { after, why },
    }
}

pub fn http(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Failure {
    let told = Status::decode(body).unwrap_or_default();
    let why = match told.message.is_empty() {
        true => status.to_string(),
        false => format!("{status}: {}", shown(&told.message)),
    };
    match status {
        StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY => Failure::Bad { why },
        StatusCode::PAYLOAD_TOO_LARGE => Failure::Large { why },
        _ => Failure::Later {
            after: retry_after(headers, OffsetDateTime::now_utc()).or_else(|| retry_info(body)),
            why,
        },
    }
}

/// RFC 9110 10.2.3: seconds, or a date.
fn retry_after(headers: &HeaderMap, now: OffsetDateTime) -> Option<Duration> {
    let value = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = OffsetDateTime::parse(value, &Rfc2822).ok()?;
    Some((date - now).try_into().unwrap_or_default())
}

/// Of a `google.rpc.Status`: gRPC carries it beside its own status, HTTP as the body.
fn retry_info(status: &[u8]) -> Option<Duration> {
    let status = Status::decode(status).ok()?;
    let info =
        (status.details.iter()).find(|any| any.type_url.ends_with("/google.rpc.RetryInfo"))?;
    let delay = RetryInfo::decode(&*info.value).ok()?.retry_delay?;
    let seconds = delay.seconds.try_into().ok()?;
    Some(Duration::new(seconds, delay.nanos.try_into().ok()?))
}

fn shown(text: &str) -> String {
    let text: String = text.chars().take(MAX_TEXT).collect();
    text.escape_debug().to_string()
}

#[derive(Clone, PartialEq, Message)]
struct Status {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<Any>,
}

#[derive(Clone, PartialEq, Message)]
struct Any {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct RetryInfo {
    #[prost(message, optional, tag = "1")]
    retry_delay: Option<Delay>,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct Delay {
    #[prost(int64, tag = "1")]
    seconds: i64,
    #[prost(int32, tag = "2")]
    nanos: i32,
}

#[cfg(test)]
mod tests {
    use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsPartialSuccess;

    use super::*;

    fn status(delay: Delay) -> Vec<u8> {
        let info = RetryInfo {
            retry_delay: Some(delay),
        };
        let detail = Any {
            type_url: "type.googleapis.com/google.rpc.RetryInfo".into(),
            value: info.encode_to_vec(),
        };
        Status {
            code: 14,
            message: "busy\n".into(),
            details: vec![detail],
        }
        .encode_to_vec()
    }

    fn after(failure: &Failure) -> Option<Duration> {
        match failure {
            Failure::Later { after, .. } => *after,
            Failure::Bad { .. } | Failure::Large { .. } => panic!("{failure:?}"),
        }
    }

    #[test]
    fn only_bad_data_is_dropped() {
        for code in [400, 422] {
            let code = StatusCode::from_u16(code).expect("status");
            let failure = http(code, &HeaderMap::new(), b"");
            assert!(matches!(failure, Failure::Bad { .. }), "{code}");
        }
        let large = http(StatusCode::PAYLOAD_TOO_LARGE, &HeaderMap::new(), b"");
        assert!(matches!(large, Failure::Large { .. }));
        let large = grpc(&tonic::Status::resource_exhausted("message too large"));
        assert!(matches!(large, Failure::Large { .. }));
        for code in [301, 401, 403, 404, 408, 429, 500, 502, 503, 504] {
            let code = StatusCode::from_u16(code).expect("status");
            assert_eq!(after(&http(code, &HeaderMap::new(), b"")), None, "{code}");
        }
        let bad = grpc(&tonic::Status::invalid_argument("x"));
        assert!(matches!(bad, Failure::Bad { .. }));
        for code in [
            Code::Unauthenticated,
            Code::PermissionDenied,
            Code::Unimplemented,
            Code::Unavailable,
            Code::Internal,
        ] {
            assert_eq!(
                after(&grpc(&tonic::Status::new(code, "x"))),
                None,
                "{code:?}"
            );
        }
    }

    #[test]
    fn the_receiver_says_how_long_to_wait() {
        let now = OffsetDateTime::from_unix_timestamp(784_111_770).expect("time");
        for (text, expected) in [
            ("7", Some(7)),
            (" 120 ", Some(120)),
            ("Sun, 06 Nov 1994 08:49:37 GMT", Some(7)),
            ("Sun, 06 Nov 1994 08:00:00 GMT", Some(0)),
            ("soon", None),
            ("-1", None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::RETRY_AFTER, text.parse().expect("value"));
            let expected = expected.map(Duration::from_secs);
            assert_eq!(retry_after(&headers, now), expected, "{text}");
        }
        let body = status(Delay {
            seconds: 3,
            nanos: 500_000_000,
        });
        let failure = http(StatusCode::SERVICE_UNAVAILABLE, &HeaderMap::new(), &body);
        assert_eq!(after(&failure), Some(Duration::from_millis(3_500)));
        let Failure::Later { why, .. } = failure else {
            panic!("{failure:?}")
        };
        assert_eq!(why, "503 Service Unavailable: busy\\n");
        let with = tonic::Status::with_details(Code::Unavailable, "busy", body.into());
        assert_eq!(after(&grpc(&with)), Some(Duration::from_millis(3_500)));
        let negative = status(Delay {
            seconds: -3,
            nanos: 0,
        });
        assert_eq!(retry_info(&negative), None);
        assert_eq!(retry_info(b"\xff\xff"), None);
    }

    #[test]
    fn what_is_taken_in_part_says_how_much_is_not() {
        let answer = |rejected_log_records| ExportLogsServiceResponse {
            partial_success: Some(ExportLogsPartialSuccess {
                rejected_log_records,
                error_message: "too old".into(),
            }),
        };
        assert_eq!(taken(answer(3)).rejected, 3);
        assert_eq!(taken(answer(3)).message, "too old");
        assert_eq!(taken(answer(-1)).rejected, 0);
        assert_eq!(
            taken(ExportLogsServiceResponse::default()),
            Taken::default()
        );
    }
}
