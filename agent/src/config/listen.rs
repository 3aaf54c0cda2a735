//! Addresses of the agent's own servers. An administration address that others than
//! this machine can reach is one with a token and a certificate, or none at all.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Addresses in the node's own network namespace.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "Keys", into = "Keys")]
pub struct Listen {
    pub admin: Admin,
    /// Prometheus metrics.
    pub metrics: SocketAddr,
    /// Readiness, for the kubelet.
    pub ready: SocketAddr,
}

/// Where administration is, and what guards it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admin {
    pub address: SocketAddr,
    /// Always there when the address is not on loopback.
    pub guard: Option<Guard>,
}

/// Files that make an administration address safe to reach from elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guard {
    /// A secret, mode 0600.
    pub token: PathBuf,
    /// PEM, the server's own certificate first.
    pub certificate: PathBuf,
    /// PEM, mode 0600.
    pub key: PathBuf,
}

/// As the file has it.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
#[schemars(
    rename = "Listen",
    description = "Addresses in the node's own network namespace."
)]
struct Keys {
    /// Administration. On another address than loopback the three keys that follow are
    /// required.
    admin: SocketAddr,
    /// File with the secret that every request to `admin` has to bring, mode 0600: at
    /// least 32 characters.
    admin_token: Option<PathBuf>,
    /// TLS certificate of `admin` (PEM, the server's own first).
    admin_certificate: Option<PathBuf>,
    /// Its private key (PEM), mode 0600.
    admin_key: Option<PathBuf>,
    /// Prometheus metrics.
    metrics: SocketAddr,
    /// Readiness, for the kubelet.
    ready: SocketAddr,
}

impl JsonSchema for Listen {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        Keys::schema_name()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        Keys::json_schema(generator)
    }
}

impl Default for Listen {
    fn default() -> Self {
        let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        Self {
            admin: Admin {
                address: (Ipv4Addr::LOCALHOST, 15000).into(),
                guard: None,
            },
            metrics: SocketAddr::new(any, 15020),
            ready: SocketAddr::new(any, 15021),
        }
    }
}

impl Default for Keys {
    fn default() -> Self {
        Listen::default().into()
    }
}

impl TryFrom<Keys> for Listen {
    type Error = String;

    fn try_from(keys: Keys) -> Result<Self, String> {
        let wanted = [
            ("listen.adminToken", &keys.admin_token),
            ("listen.adminCertificate", &keys.admin_certificate),
            ("listen.adminKey", &keys.admin_key),
        ];
        let missing = wanted.iter().filter(|(_, path)| path.is_none());
        let missing: Vec<&str> = missing.map(|(key, _)| *key).collect();
        let missing = missing.join(", ");
        let guard = match (keys.admin_token, keys.admin_certificate, keys.admin_key) {
            (Some(token), Some(certificate), Some(key)) => Some(Guard {
                token,
                certificate,
                key,
            }),
            (None, None, None) if keys.admin.ip().is_loopback() => None,
            _ if keys.admin.ip().is_loopback() => {
                return Err(format!(
                    "listen.adminToken, listen.adminCertificate and listen.adminKey belong \
                     together; not set: {missing}"
                ));
            }
            _ => {
                return Err(format!(
                    "listen.admin {} is not on loopback: that takes {missing}, too",
                    keys.admin
                ));
            }
        };
        Ok(Self {
            admin: Admin {
                address: keys.admin,
                guard,
            },
            metrics: keys.metrics,
            ready: keys.ready,
        })
    }
}

impl From<Listen> for Keys {
    fn from(listen: Listen) -> Self {
        let (token, certificate, key) = match listen.admin.guard {
            Some(guard) => (Some(guard.token), Some(guard.certificate), Some(guard.key)),
            None => (None, None, None),
        };
        Self {
            admin: listen.admin.address,
            admin_token: token,
            admin_certificate: certificate,
            admin_key: key,
            metrics: listen.metrics,
            ready: listen.ready,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: serde_json::Value) -> Result<Listen, String> {
        serde_json::from_value(json).map_err(|e| e.to_string())
    }

    #[test]
    fn what_others_can_reach_is_guarded_or_refused() {
        let keys = ["adminToken", "adminCertificate", "adminKey"];
        for (address, enough) in [
            ("127.0.0.1:15000", [0b000, 0b111].as_slice()),
            ("[::1]:15000", &[0b000, 0b111]),
            ("0.0.0.0:15000", &[0b111]),
            ("192.0.2.1:15000", &[0b111]),
            ("[2001:db8::1]:15000", &[0b111]),
            // Not loopback to those who bind it, so not to us.
            ("[::ffff:127.0.0.1]:15000", &[0b111]),
        ] {
            for set in 0..8 {
                let mut json = serde_json::json!({ "admin": address });
                for (bit, key) in keys.iter().enumerate() {
                    if set & (1 << bit) != 0 {
                        json[key] = format!("/etc/postern/{key}").into();
                    }
                }
                let parsed = parse(json.clone());
                assert_eq!(parsed.is_ok(), enough.contains(&set), "{json}");
                let Err(error) = parsed else { continue };
                for (bit, key) in keys.iter().enumerate() {
                    let named = error.split(": ").last().is_some_and(|e| e.contains(key));
                    assert_eq!(named, set & (1 << bit) == 0, "{json}: {error}");
                }
            }
        }
    }

    #[test]
    fn it_is_written_as_it_is_read() {
        let json = serde_json::json!({
            "admin": "192.0.2.1:1", "adminToken": "/a", "adminCertificate": "/b", "adminKey": "/c",
            "metrics": "0.0.0.0:2", "ready": "0.0.0.0:3",
        });
        let listen = parse(json.clone()).expect("valid");
        assert_eq!(serde_json::to_value(&listen).expect("JSON"), json);
        assert!(parse(serde_json::json!({ "adminTokn": "/a" })).is_err());
    }
}
