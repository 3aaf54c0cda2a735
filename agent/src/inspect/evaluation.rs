//! `postern policy eval` and `explain`: one workload's policies are asked about
//! requests, one JSON object a line.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::BufRead,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use bytes::BytesMut;
use http::{StatusCode, header::HOST};
use serde::{Deserialize, Serialize};

use super::{Context, Problem, load};
use crate::{
    config::{self, Config},
    identity::SpiffeId,
    judge::{Allowed, Destination, Judge, Refused, Why, remote_ip},
    objects::{LoadError, or_default, parse_document},
    policy::{
        Denial, Facts, Layer, PolicyRef, PolicySet, RequestFacts, Selected, Subject, normalize,
    },
    proxy::http::{
        BadRequest,
        head::{self, Head},
    },
};

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Workload {
    namespace: String,
    #[serde(default, deserialize_with = "or_default")]
    service_account: String,
    #[serde(default, deserialize_with = "or_default")]
    labels: BTreeMap<String, String>,
    /// Services of its namespace that it is behind, for `targetRefs`.
    #[serde(default, deserialize_with = "or_default")]
    services: Vec<String>,
}

/// One line. What is `null` is as absent; what is not known here is passed over.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Asked {
    connection: Option<Connection>,
    http: Option<Http>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Connection {
    source_ip: Option<IpAddr>,
    source_port: Option<u16>,
    destination_ip: Option<IpAddr>,
    destination_port: Option<u16>,
    /// Proven, by mutual TLS or by the kernel. `None`: plaintext, or TLS with nobody.
    peer_identity: Option<String>,
    sni: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Http {
    method: Option<String>,
    path: Option<String>,
    host: Option<String>,
    headers: Option<BTreeMap<String, Values>>,
}

/// A header's value, or its values where it is repeated.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Values {
    Many(Vec<Value>),
    One(Value),
}

/// Numbers and the like are what they look like in a header.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Value {
    Text(String),
    Other(serde_json::Value),
}

/// What `postern policy eval` answers to a request.
#[derive(Debug, Serialize)]
pub struct Answer {
    name: Option<serde_json::Value>,
    decision: &'static str,
    status: Option<u16>,
    policy: Option<String>,
    /// Index of the rule; of a jwtRule where a token was refused.
    rule: Option<usize>,
    reason: String,
    headers: Option<BTreeMap<String, String>>,
}

/// Policies and one workload, to be asked about.
pub struct Evaluation {
    set: PolicySet,
    selected: Selected,
    identity: SpiffeId,
    judge: Judge,
    now: Option<SystemTime>,
}

#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Policies(Vec<Problem>),
    #[error(transparent)]
    File(#[from] LoadError),
    #[error("{path}: {message}", path = path.display())]
    Workload { path: PathBuf, message: String },
    #[error("{0}")]
    Setup(String),
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

impl Evaluation {
    pub fn new(
        policies: &Path,
        workload: &Path,
        context: &Context,
        now: Option<u64>,
        config: &Config,
    ) -> Result<Self, InspectError> {
        let set = load(policies, context).map_err(InspectError::Policies)?;
        let text = std::fs::read_to_string(workload).map_err(|source| LoadError::Read {
            path: workload.to_owned(),
            source,
        })?;
        let described: Workload = parse_document(workload, &text)?;
        let account = match described.service_account.as_str() {
            "" => "default",
            named => named,
        };
        let identity = SpiffeId::new(
            context.trust_domain.clone(),
            described.namespace.clone(),
            account.into(),
        );
        let setup = |e: &dyn std::fmt::Display| InspectError::Setup(e.to_string());
        let mut judge = Judge::new(config).map_err(|e| setup(&e))?;
        // The secrets that it takes are the node's; a token that needs it is refused.
        judge.introspector = None;
        judge.keys.want(set.remote_keys().iter().cloned().collect());
        let selected = set.select(&Subject {
            namespace: described.namespace,
            labels: described.labels,
            services: described.services,
        });
        Ok(Self {
            set,
            selected,
            identity,
            judge,
            now: now.map(|at| SystemTime::UNIX_EPOCH + Duration::from_secs(at)),
        })
    }

    /// Waits until keys that are fetched have come, or could not be.
    pub async fn ready(&self) {
        for keys in self.set.remote_keys() {
            let limit = keys.timeout() + Duration::from_secs(1);
            self.judge.keys.ready(keys, limit).await;
        }
    }

    /// Answers each line of a JSON Lines file in order; says how many could not be
    /// read. Those are answered, too.
    pub async fn answer_all(
        &self,
        requests: impl BufRead,
        mut each: impl FnMut(&Answer, String) -> std::io::Result<()>,
    ) -> Result<usize, InspectError> {
        let mut unreadable = 0;
        for (index, line) in requests.lines().enumerate() {
            let text = line?;
            if text.trim().is_empty() {
                continue;
            }
            let json = serde_json::from_str::<serde_json::Value>(&text);
            let mut answer = Answer {
                name: json.as_ref().ok().and_then(|v| v.get("name").cloned()),
                decision: "deny",
                status: None,
                policy: None,
                rule: None,
                reason: String::new(),
                headers: None,
            };
            let explained = match json.and_then(serde_json::from_value::<Asked>) {
                Ok(asked) => self.answer(asked, &mut answer).await,
                Err(error) => {
                    unreadable += 1;
                    answer.reason = format!("line {}: {error}", index + 1);
                    String::new()
                }
            };
            each(&answer, explained)?;
        }
        Ok(unreadable)
    }

    async fn answer(&self, asked: Asked, answer: &mut Answer) -> String {
        let connection = asked.connection.unwrap_or_default();
        let named = connection.peer_identity.filter(|id| !id.is_empty());
        let peer = match named.as_deref().map(str::parse::<SpiffeId>).transpose() {
            Ok(peer) => peer,
            Err(error) => {
                answer.reason = format!("peer_identity: {error}");
                return String::new();
            }
        };
        let address = |ip: Option<IpAddr>, port: Option<u16>| {
            let nowhere = IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);
            SocketAddr::new(ip.unwrap_or(nowhere).to_canonical(), port.unwrap_or(0))
        };
        let source = address(connection.source_ip, connection.source_port);
        let destination = address(connection.destination_ip, connection.destination_port);
        let mut facts = Facts::new(peer, source.ip(), destination);
        facts.sni = connection.sni.map(|name| name.to_lowercase());
        let identity = Some(&self.identity);
        let Some(http) = asked.http else {
            let judged = (self.judge)
                .connection(&self.selected, &facts, identity, source)
                .await;
            match judged {
                Ok(permitted) => answer.allow(permitted.by()),
                Err(denial) => answer.deny(&denial),
            }
            return self.explain(&facts, Layer::Opaque);
        };
        if let Err(denial) = self.selected.transport(&facts) {
            // The connection is closed before there is a request.
            answer.deny(&denial);
            return self.explain(&facts, Layer::Opaque);
        }
        let head = match http.head() {
            Ok(head) => head,
            Err(bad) => {
                answer.status = Some(bad.status.as_u16());
                answer.reason = bad.why.to_owned();
                return String::new();
            }
        };
        let request = head.request();
        let now = self.now.unwrap_or_else(SystemTime::now);
        let own = Destination {
            identity,
            credentials: None,
        };
        let judged = (self.judge)
            .request(&self.selected, &facts, own, source, &request, now)
            .await;
        let claims = match &judged {
            Ok(allowed) => allowed.claims.clone(),
            Err(refused) => refused.claims.clone(),
        };
        let reading = self.selected.reading;
        let explained = match normalize(request.path, reading.normalization) {
            Ok(normal) => {
                let about = RequestFacts {
                    request: &request,
                    path: &normal.path,
                    host: &request.host.to_lowercase(),
                    remote_ip: remote_ip(&request, source.ip(), reading.trusted_proxies),
                    claims: claims.as_deref(),
                };
                self.explain(&facts, Layer::Request(&about))
            }
            Err(_) => String::new(),
        };
        match judged {
            Ok(Allowed {
                permitted, edits, ..
            }) => {
                answer.allow(permitted.by());
                let mut headers: BTreeMap<String, Vec<String>> = BTreeMap::new();
                for (name, value) in edits.headers(&request) {
                    if *name != HOST || http.names_host() {
                        let text = String::from_utf8_lossy(value.as_bytes()).into_owned();
                        headers.entry(name.to_string()).or_default().push(text);
                    }
                }
                let joined = headers.into_iter().map(|(name, values)| {
                    let separator = if name == "cookie" { "; " } else { "," };
                    let value = values.join(separator);
                    (name, value)
                });
                answer.headers = Some(joined.collect());
            }
            Err(Refused { why, reply, .. }) => {
                answer.status = Some(reply.status.as_u16());
                answer.reason = why.to_string();
                match &why {
                    Why::Denied(denial) => answer.deny(denial),
                    Why::Answered(policy) => {
                        answer.decision = "allow";
                        answer.of_policy(Some(policy));
                    }
                    Why::Malformed(_) => {}
                }
                if reply.status == StatusCode::UNAUTHORIZED {
                    answer.decision = "unauthenticated";
                }
            }
        }
        explained
    }

    /// Each rule that was tried, and where it failed.
    fn explain(&self, facts: &Facts, layer: Layer<'_>) -> String {
        let mut out = String::new();
        if let Err(denial) = self.selected.transport(facts) {
            let _ = writeln!(out, "  {denial}");
        }
        for policy in self.selected.authorizations() {
            let trial = if policy.dry_run { ", dry run" } else { "" };
            let _ = writeln!(out, "  {} ({}{trial})", policy.policy, policy.action);
            for (index, rule) in policy.rules.iter().enumerate() {
                let said = match policy.outcome(rule, facts, layer) {
                    None => "matches".to_owned(),
                    Some(why) => why,
                };
                let _ = writeln!(out, "    rule {index}: {said}");
            }
            if policy.rules.is_empty() {
                let _ = writeln!(out, "    no rules: matches nothing");
            }
        }
        out
    }
}

impl Answer {
    fn of_policy(&mut self, policy: Option<&PolicyRef>) {
        self.policy = policy.map(PolicyRef::path);
        self.rule = policy.and_then(|policy| policy.rule);
    }

    fn allow(&mut self, by: Option<&PolicyRef>) {
        self.decision = "allow";
        self.of_policy(by);
        self.reason = match by {
            Some(policy) => format!("allowed by {policy}"),
            None => "no ALLOW policy selects the workload".into(),
        };
    }

    fn deny(&mut self, denial: &Denial) {
        self.of_policy(Some(denial.policy()));
        self.reason = denial.to_string();
    }

    /// For people.
    pub fn line(&self) -> String {
        let name = match &self.name {
            Some(serde_json::Value::String(name)) => name.clone(),
            Some(other) => other.to_string(),
            None => "request".into(),
        };
        let status = self.status.map(|s| format!(" {s}")).unwrap_or_default();
        format!("{name}: {}{status}: {}", self.decision, self.reason)
    }
}

impl Http {
    /// The head, written as HTTP/1 and read by the data path's parser.
    fn head(&self) -> Result<Head, BadRequest> {
        let bad = |why| BadRequest {
            status: StatusCode::BAD_REQUEST,
            why,
        };
        let host = self.host.as_deref().filter(|host| !host.is_empty());
        let mut lines: Vec<String> = host
            .map(|host| format!("host: {host}"))
            .into_iter()
            .collect();
        for (name, values) in self.headers.iter().flatten() {
            let values = match values {
                Values::One(value) => std::slice::from_ref(value),
                Values::Many(values) => values,
            };
            for value in values {
                let text = match value {
                    Value::Text(text) => text.clone(),
                    Value::Other(other) => other.to_string(),
                };
                // The same host twice is meant once.
                if !(name.eq_ignore_ascii_case("host") && host == Some(text.trim())) {
                    lines.push(format!("{name}: {text}"));
                }
            }
        }
        // HTTP/1.0 is the one that may have no host.
        let version = match host.is_some() || self.names_host() {
            true => "HTTP/1.1",
            false => "HTTP/1.0",
        };
        let method = self.method.as_deref().unwrap_or("GET");
        let path = self.path.as_deref().unwrap_or("/");
        lines.insert(0, format!("{method} {path} {version}"));
        if lines.iter().any(|line| line.contains(['\r', '\n', '\0'])) {
            return Err(bad("a control character in the head"));
        }
        let mut bytes = BytesMut::from(format!("{}\r\n\r\n", lines.join("\r\n")).as_str());
        let limits = (&config::Http::default()).into();
        head::parse(&mut bytes, &limits)?.ok_or(bad("the head has no end"))
    }

    /// Whether `Host` stands among the headers.
    fn names_host(&self) -> bool {
        let mut names = self.headers.iter().flatten().map(|(name, _)| name);
        names.any(|name| name.eq_ignore_ascii_case("host"))
    }
}
