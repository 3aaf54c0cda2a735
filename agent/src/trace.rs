//! W3C Trace Context: which requests belong together. Only what is strictly a
//! `traceparent` counts; anything else is as if it were not there.

use std::fmt;

use http::{HeaderName, HeaderValue};

use crate::request::Request;

pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// A trace's id: 16 bytes, not all zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceId([u8; 16]);

/// A `traceparent`, and the trace that it names.
#[derive(Clone, Debug)]
pub struct Trace {
    pub id: TraceId,
    /// As it was sent.
    pub value: HeaderValue,
}

impl Trace {
    /// Of a header that stands in a request once.
    pub fn of(request: &Request<'_>, header: &HeaderName) -> Option<Self> {
        let mut values = request.headers.iter().filter(|(name, _)| *name == header);
        let (Some((_, value)), None) = (values.next(), values.next()) else {
            return None;
        };
        Some(Self {
            id: TraceId::parse(value.as_bytes())?,
            value: (*value).clone(),
        })
    }
}

/// All traces that an application could read from a header, by whatever it takes for
/// one: to be told of what is not strictly a `traceparent`, not to act by it.
pub fn mentioned(request: &Request<'_>, header: &HeaderName) -> Vec<TraceId> {
    let mut all: Vec<TraceId> = Vec::new();
    for value in request.values(header) {
        for part in value.split(',').take(8) {
            let id = part.trim().split('-').nth(1);
            let id = id.filter(|id| id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit()));
            if let Some(Ok(id)) = id.map(|id| u128::from_str_radix(id, 16)) {
                all.push(TraceId(id.to_be_bytes()));
            }
        }
    }
    all.sort_unstable_by_key(|id| id.0);
    all.dedup();
    all
}

impl TraceId {
    /// From `version "-" trace-id "-" parent-id "-" flags` (Trace Context 3.2.2). A
    /// version to come may have more behind that (4.3).
    pub fn parse(traceparent: &[u8]) -> Option<Self> {
        const SHORT: usize = 55;
        let (head, more) = traceparent.split_at_checked(SHORT)?;
        let fields = [0..2, 3..35, 36..52, 53..55];
        let hex = |b: &u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
        let well_formed = fields.iter().all(|f| head[f.clone()].iter().all(hex))
            && [2, 35, 52].iter().all(|at| head[*at] == b'-');
        let [version, trace, parent, _] = fields.map(|f| &head[f]);
        let zero = |field: &[u8]| field.iter().all(|b| *b == b'0');
        let ends = match version {
            b"ff" => false,
            b"00" => more.is_empty(),
            _ => more.is_empty() || more[0] == b'-',
        };
        if !well_formed || !ends || zero(trace) || zero(parent) {
            return None;
        }
        let text = std::str::from_utf8(trace).ok()?;
        let id = u128::from_str_radix(text, 16).ok()?;
        Some(Self(id.to_be_bytes()))
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0af7651916cd43dd8448eb211c80319c";

    #[test]
    fn only_what_is_strictly_a_traceparent_names_a_trace() {
        for (text, fine) in [
            (format!("00-{ID}-b7ad6b7169203331-01"), true),
            (format!("00-{ID}-b7ad6b7169203331-00"), true),
            (format!("cc-{ID}-b7ad6b7169203331-01-more"), true),
            (format!("cc-{ID}-b7ad6b7169203331-01more"), false),
            (format!("00-{ID}-b7ad6b7169203331-01-more"), false),
            (format!("ff-{ID}-b7ad6b7169203331-01"), false),
            (
                format!("00-{}-b7ad6b7169203331-01", ID.to_uppercase()),
                false,
            ),
            (format!("00-{}-b7ad6b7169203331-01", "0".repeat(32)), false),
            (format!("00-{ID}-0000000000000000-01"), false),
            (format!("00-{ID}_b7ad6b7169203331-01"), false),
            (format!("00-{ID}-b7ad6b7169203331-0"), false),
            (format!(" 00-{ID}-b7ad6b7169203331-01"), false),
            (format!("00-+{}-b7ad6b7169203331-01", &ID[1..]), false),
            (String::new(), false),
        ] {
            let parsed = TraceId::parse(text.as_bytes()).map(|id| id.to_string());
            assert_eq!(parsed.as_deref(), fine.then_some(ID), "{text}");
        }
    }

    #[test]
    fn a_header_that_is_repeated_names_none() {
        let value = HeaderValue::try_from(format!("00-{ID}-b7ad6b7169203331-01")).expect("value");
        let request = |headers| Request {
            method: "GET",
            path: "/",
            host: "h",
            headers,
        };
        let name = TRACEPARENT;
        let once = request(vec![(&name, &value)]);
        assert!(Trace::of(&once, &name).is_some());
        let twice = request(vec![(&name, &value), (&name, &value)]);
        assert!(Trace::of(&twice, &name).is_none());
        let other = HeaderValue::try_from(format!(" 00-{}-x, q", ID.to_uppercase()));
        let other = other.expect("value");
        let odd = request(vec![(&name, &value), (&name, &other)]);
        assert_eq!(
            mentioned(&odd, &name),
            [TraceId::parse(value.as_bytes()).expect("id")]
        );
    }
}
