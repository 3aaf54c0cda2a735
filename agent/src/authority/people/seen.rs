//! What is recorded of a request: where it came from, and its trace.

use std::{
    convert::Infallible,
    net::{IpAddr, Ipv4Addr},
};

use axum::extract::FromRequestParts;
use http::{HeaderMap, request::Parts};

use super::super::Peer;

#[derive(Clone, Debug)]
pub struct Seen {
    pub address: IpAddr,
    /// Trace id of `traceparent` (W3C Trace Context 3.2.2).
    pub trace: Option<String>,
}

impl<S: Sync> FromRequestParts<S> for Seen {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Infallible> {
        let peer = parts.extensions.get::<Peer>();
        let address = peer.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |p| p.address.ip());
        Ok(Self {
            address: address.to_canonical(),
            trace: trace(&parts.headers),
        })
    }
}

/// `00-<trace id>-<parent id>-<flags>`; of later versions the beginning is the same.
fn trace(headers: &HeaderMap) -> Option<String> {
    let text = headers.get("traceparent")?.to_str().ok()?;
    let mut parts = text.split('-');
    let hex = |part: Option<&str>, length: usize| {
        let digit = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
        part.filter(|p| p.len() == length && p.bytes().all(digit))
            .map(str::to_owned)
    };
    let version = hex(parts.next(), 2).filter(|v| v != "ff")?;
    let trace = hex(parts.next(), 32).filter(|t| t.bytes().any(|b| b != b'0'))?;
    hex(parts.next(), 16).filter(|p| p.bytes().any(|b| b != b'0'))?;
    hex(parts.next(), 2)?;
    (version != "00" || parts.next().is_none()).then_some(trace)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_valid_traceparent_names_a_trace() {
        const ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
        let of = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("traceparent", text.parse().expect("a header"));
            trace(&headers)
        };
        let good = format!("00-{ID}-00f067aa0ba902b7-01");
        assert_eq!(of(&good).as_deref(), Some(ID));
        assert_eq!(of(&format!("cc{}-more", &good[2..])).as_deref(), Some(ID));
        for bad in [
            format!("{good}-more"),
            good.replace("00-4", "ff-4"),
            good.replace(ID, &"0".repeat(32)),
            good.replace("00f067aa0ba902b7", &"0".repeat(16)),
            good.to_uppercase(),
            good[..54].to_owned(),
            "no".to_owned(),
        ] {
            assert_eq!(of(&bad), None, "{bad}");
        }
    }
}
