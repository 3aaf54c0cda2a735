//! The authority's configuration: one YAML file. `config/authority.yaml` lists every
//! key with its default.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::clients::Client;
use crate::{
    audit::chain,
    config::{Count, Log, QueueLength, Span},
    identity::TrustDomain,
    objects::{LoadError, parse_document},
};

/// The whole configuration. Keys that are left out have the defaults shown in
/// `config/authority.yaml`; unknown keys are refused.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Config {
    /// Issuer identifier (RFC 8414 2): an https URL without query and fragment, and
    /// where people and clients reach the server.
    pub issuer: String,
    pub listen: SocketAddr,
    /// Directory for keys and the embedded database, mode 0700.
    pub state: PathBuf,
    /// `postgres://` URL for more than one replica, or a file that holds it (`@path`,
    /// mode 0600). Empty: SQLite in the state directory.
    pub database: Option<String>,
    pub tls: Tls,
    pub trust_domain: TrustDomain,
    pub tokens: Tokens,
    pub keys: Keys,
    pub people: People,
    pub certificates: Certificates,
    pub nodes: Nodes,
    /// OAuth 2.0 clients, beside those that the store has.
    pub clients: Vec<Client>,
    /// People, beside those that the store has.
    pub users: Vec<UserEntry>,
    pub audit: Audit,
    pub log: Log,
}

/// What the server shows to clients. Both empty: a certificate for the issuer's host,
/// signed by the trust domain's root.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Tls {
    /// Chain (PEM), leaf first.
    pub certificate: Option<PathBuf>,
    /// Private key (PEM), mode 0600.
    pub key: Option<PathBuf>,
}

/// Lifetimes of what is issued.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Tokens {
    pub access: Span,
    /// ID tokens.
    pub identity: Span,
    /// Authorization codes.
    pub code: Span,
    /// A refresh token that is not used for this long is void.
    pub refresh_idle: Span,
    /// A refresh token and all that came of it are void after this time.
    pub refresh: Span,
}

/// Keys that tokens are signed with.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Keys {
    pub algorithm: SigningAlgorithm,
    /// How often a new key takes over.
    pub rotate: Span,
    /// How long a key is published before it signs, and after it has stopped to.
    pub overlap: Span,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum SigningAlgorithm {
    #[serde(rename = "ES256")]
    Es256,
    #[serde(rename = "EdDSA")]
    EdDsa,
}

/// Logins.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct People {
    /// How long a login lasts. One that is not used for two hours is over before.
    pub session: Span,
    /// Wrong passwords in a row after which an account is locked...
    pub lockout_after: Count,
    /// ... for this long.
    pub lockout: Span,
    /// Login attempts of one address in a minute.
    pub attempts_per_minute: Count,
}

/// The trust domain's certificate authority.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Certificates {
    /// Root certificate (PEM). Both empty: a root is made in the state directory.
    pub root_certificate: Option<PathBuf>,
    /// Its private key (PEM, PKCS #8), mode 0600.
    pub root_key: Option<PathBuf>,
    /// Further roots (PEM) that agents are to trust: how a root is rotated.
    pub bundle: Option<PathBuf>,
    /// Lifetime of the authority's intermediate, whose key is in memory alone.
    pub intermediate_lifetime: Span,
    /// Lifetime of an agent's own certificate; it is renewed at half of that.
    pub agent_lifetime: Span,
    /// Lifetime of a workload's certificate.
    pub leaf_lifetime: Span,
    /// Lifetime of a JWT-SVID.
    pub jwt_svid: Span,
    /// Requests of one agent in a minute.
    pub per_minute: Count,
}

/// How agents prove which node they are, and what runs there.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Nodes {
    /// Directory of manifests (Pod): an agent gets certificates for the service
    /// accounts of its own node's pods alone. Empty: no agent gets any.
    pub manifests: Option<PathBuf>,
    /// Agents that prove their node by a token of their Kubernetes service account.
    pub kubernetes: Option<KubernetesNodes>,
    /// Instead of both: the cluster's API server, which says whose tokens are and what
    /// runs where.
    pub cluster: Option<ClusterNodes>,
}

/// The API server of the cluster that the agents are in.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ClusterNodes {
    /// Empty: as the pod that this server is in.
    #[serde(default)]
    pub kubeconfig: Option<PathBuf>,
    /// Namespace of the agents.
    pub namespace: String,
    /// Their service account.
    pub service_account: String,
    /// `aud` that their tokens must have. Empty: this server's issuer.
    #[serde(default)]
    pub audience: Option<String>,
    /// ConfigMap of that namespace that is told the roots, under `roots.pem`: what agents
    /// trust this server by. It must be there.
    #[serde(default)]
    pub roots_config_map: Option<String>,
}

/// Whose tokens count. Neither `jwksFile` nor `jwksUri`: keys by discovery at the issuer.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct KubernetesNodes {
    /// `iss` of the cluster's service account tokens.
    pub issuer: String,
    /// `aud` that tokens must have. Empty: this server's issuer.
    #[serde(default)]
    pub audience: Option<String>,
    /// The cluster's key set, watched.
    #[serde(default)]
    pub jwks_file: Option<PathBuf>,
    #[serde(default)]
    pub jwks_uri: Option<String>,
    /// Further roots (PEM) for fetching it.
    #[serde(default)]
    pub roots: Option<PathBuf>,
    /// Namespace of the agents.
    pub namespace: String,
    /// Their service account.
    pub service_account: String,
}

/// A person.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct UserEntry {
    /// `sub` of the person's tokens: never given to anybody else.
    pub id: String,
    /// What the person types.
    pub username: String,
    /// argon2id in PHC form, as `postern authority user hash` prints it.
    pub password_hash: String,
    #[serde(default)]
    pub name: Option<String>,
    #[serde(default)]
    pub email: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Audit {
    /// Directory of the log, mode 0700. Empty: `audit` in the state directory.
    pub directory: Option<PathBuf>,
    /// Records waiting for the writer; what comes beyond is lost and counted.
    pub queue: QueueLength,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            issuer: "https://localhost:8443".into(),
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 8443)),
            state: "/var/lib/postern-authority".into(),
            database: None,
            tls: Tls::default(),
            trust_domain: TrustDomain::default(),
            tokens: Tokens::default(),
            keys: Keys::default(),
            people: People::default(),
            certificates: Certificates::default(),
            nodes: Nodes::default(),
            clients: Vec::new(),
            users: Vec::new(),
            audit: Audit::default(),
            log: Log::default(),
        }
    }
}

impl Default for Tokens {
    fn default() -> Self {
        Self {
            access: Span::seconds(300),
            identity: Span::seconds(300),
            code: Span::seconds(60),
            refresh_idle: Span::hours(24 * 7),
            refresh: Span::hours(24 * 30),
        }
    }
}

impl Default for Keys {
    fn default() -> Self {
        Self {
            algorithm: SigningAlgorithm::Es256,
            rotate: Span::hours(24 * 30),
            overlap: Span::hours(24),
        }
    }
}

impl Default for People {
    fn default() -> Self {
        Self {
            session: Span::hours(12),
            lockout_after: Count(5),
            lockout: Span::seconds(15 * 60),
            attempts_per_minute: Count(20),
        }
    }
}

impl Default for Certificates {
    fn default() -> Self {
        Self {
            root_certificate: None,
            root_key: None,
            bundle: None,
            intermediate_lifetime: Span::hours(24 * 30),
            agent_lifetime: Span::hours(24),
            leaf_lifetime: Span::hours(24),
            jwt_svid: Span::seconds(300),
            per_minute: Count(600),
        }
    }
}

impl Default for Audit {
    fn default() -> Self {
        Self {
            directory: None,
            queue: QueueLength(16_384),
        }
    }
}

impl Config {
    pub fn audit_log(&self) -> chain::Settings {
        let own = self.audit.directory.clone();
        let directory = own.unwrap_or_else(|| self.state.join("audit"));
        chain::Settings::new(directory, &self.state)
    }

    /// Reads a file; the error names file, line and key.
    pub fn load(path: &Path) -> Result<Self, LoadError> {
        let text = std::fs::read_to_string(path).map_err(|source| LoadError::Read {
            path: path.to_owned(),
            source,
        })?;
        // An empty file means all defaults, and YAML's null is no mapping.
        if text
            .lines()
            .all(|line| line.trim().is_empty() || line.starts_with('#'))
        {
            return Ok(Self::default());
        }
        parse_document(path, &text)
    }

    /// What no single value shows: whether they fit together.
    pub fn check(&self) -> Result<(), String> {
        let url = url::Url::parse(&self.issuer).ok();
        let url = url.filter(|url| {
            url.scheme() == "https"
                && url.has_host()
                && url.query().is_none()
                && url.fragment().is_none()
                && url.username().is_empty()
                && url.password().is_none()
        });
        if url.is_none() {
            return Err(format!(
                "issuer `{}` is not an https URL without query, fragment and user",
                self.issuer
            ));
        }
        let overlap = self.keys.overlap.0;
        for (name, lifetime) in [
            ("tokens.access", self.tokens.access),
            ("tokens.identity", self.tokens.identity),
            ("certificates.jwtSvid", self.certificates.jwt_svid),
        ] {
            // A key is withdrawn this long after it has stopped to sign.
            if lifetime.0 > overlap {
                return Err(format!("{name} is longer than keys.overlap"));
            }
        }
        if self.keys.rotate.0 <= overlap {
            return Err("keys.rotate is not longer than keys.overlap".into());
        }
        let mut ids = std::collections::HashSet::new();
        for client in &self.clients {
            client.check(overlap)?;
            if !ids.insert(&client.id) {
                return Err(format!("client `{}` is listed twice", client.id));
            }
        }
        // RFC 9068 5: nobody takes a client for a person, or a person for a workload.
        for user in &self.users {
            if ids.contains(&user.id) || user.id.starts_with("spiffe://") {
                return Err(format!("user id `{}` could be a client's", user.id));
            }
        }
        Ok(())
    }

    /// Path of the issuer, without a slash at its end: empty for most.
    pub fn issuer_path(&self) -> String {
        let path = url::Url::parse(&self.issuer).map(|url| url.path().to_owned());
        path.unwrap_or_default().trim_end_matches('/').to_owned()
    }

    /// URL of an endpoint; `path` begins with a slash.
    pub fn endpoint(&self, path: &str) -> String {
        format!("{}{path}", self.issuer.trim_end_matches('/'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, LoadError> {
        parse_document(Path::new("authority.yaml"), text)
    }

    #[test]
    fn the_shipped_file_lists_every_default() {
        let text = include_str!("../../../config/authority.yaml");
        assert_eq!(parse(text).expect("it parses"), Config::default());
        let shipped: serde_json::Value =
            parse_document(Path::new("authority.yaml"), text).expect("yaml");
        let full = serde_json::to_value(Config::default()).expect("json");
        assert_eq!(
            keys(&shipped),
            keys(&full),
            "a key is missing in config/authority.yaml"
        );
        Config::default().check().expect("defaults fit together");
    }

    fn keys(value: &serde_json::Value) -> Vec<String> {
        let Some(map) = value.as_object() else {
            return Vec::new();
        };
        map.iter()
            .flat_map(|(key, value)| {
                let below = keys(value);
                if below.is_empty() {
                    return vec![key.clone()];
                }
                below.into_iter().map(|k| format!("{key}.{k}")).collect()
            })
            .collect()
    }

    #[test]
    fn what_does_not_fit_together_is_said() {
        let secret = "authentication: {clientSecret: {secretHash: x}}";
        for (text, expected) in [
            ("issuer: http://localhost\n".to_owned(), "https"),
            ("issuer: https://localhost/?a\n".into(), "query"),
            ("tokens: {access: 48h}\n".into(), "tokens.access"),
            ("keys: {rotate: 1h}\n".into(), "keys.rotate"),
            (
                format!("clients: [{{id: a, grants: [], {secret}}}]\n"),
                "PHC",
            ),
            (
                "clients: [{id: a, grants: [client_credentials], authentication: {none: {}}}]\n"
                    .into(),
                "public",
            ),
            (
                "clients:\n- {id: a, grants: [], authentication: {none: {}}}\n\
                 - {id: a, grants: [], authentication: {none: {}}}\n"
                    .into(),
                "twice",
            ),
            (
                "users: [{id: 'spiffe://a', username: a, passwordHash: b}]\n".into(),
                "could be a client's",
            ),
        ] {
            let error = parse(&text).expect("parses").check().expect_err(&text);
            assert!(error.contains(expected), "{error:?} lacks {expected:?}");
        }
        let unknown = parse("tokens: {acess: 5m}\n").expect_err("unknown key");
        assert!(
            unknown.to_string().contains("authority.yaml:1"),
            "{unknown}"
        );
    }
}
