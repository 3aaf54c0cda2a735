//! What is shown of a workload's certificate. Its key stays where it is.

use std::time::{SystemTime, UNIX_EPOCH};

use rustls::pki_types::CertificateDer;
use serde::Serialize;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::identity::fingerprint;

/// One of `GET /api/certificates`.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Certificate {
    /// SPIFFE ID of the account.
    pub identity: String,
    /// `valid`; `due` from half of its life on, when it is renewed; `late` from three
    /// quarters on; `expired`; `missing` where there is none yet.
    pub state: &'static str,
    #[serde(flatten)]
    pub leaf: Option<Leaf>,
    /// Why there is none, or no new one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Leaf {
    /// Hexadecimal, as in the certificate.
    pub serial: String,
    /// SHA-256 of the certificate, hexadecimal: as `tls.peerCertificate` of records.
    pub fingerprint: String,
    /// Of the node's intermediate, or whoever signed.
    pub issuer: String,
    /// RFC 3339, and so the next two.
    pub not_before: String,
    pub not_after: String,
    /// When a new one is made.
    pub renew_at: String,
}

impl Certificate {
    pub fn new(
        identity: String,
        leaf: Option<(&CertificateDer<'_>, SystemTime)>,
        error: Option<String>,
        now: SystemTime,
    ) -> Self {
        let leaf = leaf.and_then(|(der, renew_at)| Leaf::new(der, renew_at, now));
        let (state, leaf) = match leaf {
            Some((state, leaf)) => (state, Some(leaf)),
            None => ("missing", None),
        };
        Self {
            identity,
            state,
            leaf,
            error,
        }
    }
}

impl Leaf {
    /// And its state. `None` for what is no certificate.
    fn new(
        der: &CertificateDer<'_>,
        renew_at: SystemTime,
        now: SystemTime,
    ) -> Option<(&'static str, Self)> {
        let (_rest, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
        let validity = certificate.validity();
        let (from, to) = (
            validity.not_before.timestamp(),
            validity.not_after.timestamp(),
        );
        let seconds = |time: SystemTime| {
            let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
            i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
        };
        let (now, renew) = (seconds(now), seconds(renew_at));
        let state = match now {
            now if now >= to => "expired",
            now if now >= to - (to - from) / 4 => "late",
            now if now >= renew => "due",
            _ => "valid",
        };
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let leaf = Self {
            serial: hex(certificate.raw_serial()),
            fingerprint: hex(&fingerprint(der)),
            issuer: certificate.issuer().to_string(),
            not_before: rfc3339(from),
            not_after: rfc3339(to),
            renew_at: rfc3339(renew),
        };
        Some((state, leaf))
    }
}

fn rfc3339(seconds: i64) -> String {
    let time = OffsetDateTime::from_unix_timestamp(seconds).ok();
    time.and_then(|time| time.format(&Rfc3339).ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_state_follows_the_life_of_a_certificate() {
        let key = rcgen::KeyPair::generate().expect("a key");
        let mut params = rcgen::CertificateParams::default();
        let start = OffsetDateTime::from_unix_timestamp(1_000_000).expect("a time");
        params.not_before = start;
        params.not_after = start + time::Duration::seconds(1_000);
        params.serial_number = Some(vec![0x0a, 0xff].into());
        let der = params.self_signed(&key).expect("a certificate");
        let at = |seconds: u64| UNIX_EPOCH + Duration::from_secs(1_000_000 + seconds);
        let shown = |seconds: u64| {
            let leaf = Some((der.der(), at(500)));
            Certificate::new("spiffe://a/ns/b/sa/c".into(), leaf, None, at(seconds))
        };
        for (seconds, state) in [
            (0, "valid"),
            (499, "valid"),
            (500, "due"),
            (749, "due"),
            (750, "late"),
            (999, "late"),
            (1_000, "expired"),
        ] {
            assert_eq!(shown(seconds).state, state, "{seconds}");
        }
        let json = serde_json::to_value(shown(0)).expect("JSON");
        assert_eq!(json["serial"], "0aff");
        assert_eq!(json["notBefore"], "1970-01-12T13:46:40Z");
        assert_eq!(json["notAfter"], "1970-01-12T14:03:20Z");
        assert_eq!(json["renewAt"], "1970-01-12T13:55:00Z");
        assert_eq!(json["fingerprint"].as_str().map(str::len), Some(64));
        let none = Certificate::new(
            "spiffe://a/ns/b/sa/c".into(),
            None,
            Some("why".into()),
            at(0),
        );
        let json = serde_json::to_value(none).expect("JSON");
        assert_eq!(
            (&json["state"], &json["error"]),
            (&"missing".into(), &"why".into())
        );
        assert!(json.get("serial").is_none());
    }
}
