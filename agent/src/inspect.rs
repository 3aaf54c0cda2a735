//! Policies away from traffic: `postern policy check`, `eval` and `explain`. What is
//! said here is what the data path would do: it is the same code.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::BufRead,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use http::{HeaderName, HeaderValue, Method};
use serde::{Deserialize, Serialize};

use crate::{
    config::{Config, Normalization},
    identity::{SpiffeId, TrustDomain},
    judge::{Allowed, Judge, Refused, Why},
    objects::{LoadError, parse_document, read_directory},
    policy::{
        Denial, Facts, Layer, Mesh, PolicyError, PolicyObject, PolicySet, Reading, RequestFacts,
        Selected, Subject, normalize,
    },
    request::Request,
};

/// What policies are read with, where there is no agent's configuration.
#[derive(Clone, Debug)]
pub struct Context {
    pub root_namespace: String,
    pub trust_domain: TrustDomain,
    pub aliases: Vec<TrustDomain>,
    pub normalization: Normalization,
    pub trusted_proxies: usize,
}

/// One thing that is wrong with a directory of policies.
#[derive(Clone, Debug, Serialize)]
pub struct Problem {
    pub file: PathBuf,
    pub line: u64,
    /// `kind/namespace/name`.
    pub object: String,
    pub field: String,
    pub message: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            file,
            line,
            object,
            field,
            message,
        } = self;
        write!(f, "{}:{line}: ", file.display())?;
        for part in [object, field].into_iter().filter(|part| !part.is_empty()) {
            write!(f, "{part}: ")?;
        }
        f.write_str(message)
    }
}

impl From<LoadError> for Problem {
    fn from(error: LoadError) -> Self {
        match error {
            LoadError::Read { path, source } => Self {
                file: path,
                line: 0,
                object: String::new(),
                field: String::new(),
                message: source.to_string(),
            },
            LoadError::Parse {
                path,
                line,
                object,
                field,
                message,
            } => Self {
                file: path,
                line,
                object,
                field,
                message,
            },
        }
    }
}

impl From<PolicyError> for Problem {
    fn from(error: PolicyError) -> Self {
        Self {
            object: format!("{}/{}/{}", error.kind, error.namespace, error.name),
            file: error.path,
            line: error.line,
            field: error.field.into(),
            message: error.message,
        }
    }
}

/// Reads a directory as the agent does; everything that is wrong with it, otherwise.
pub fn load(directory: &Path, context: &Context) -> Result<PolicySet, Vec<Problem>> {
    let (objects, errors) =
        read_directory::<PolicyObject>(directory).map_err(|error| vec![error.into()])?;
    let mesh = Mesh {
        root_namespace: &context.root_namespace,
        trust_domain: &context.trust_domain,
        aliases: &context.aliases,
        requests: Reading {
            normalization: context.normalization,
            trusted_proxies: context.trusted_proxies,
        },
    };
    let mut problems: Vec<Problem> = errors.into_iter().map(Problem::from).collect();
    match PolicySet::compile(objects, &mesh) {
        Ok(set) if problems.is_empty() => Ok(set),
        Ok(_) => Err(problems),
        Err(more) => {
            problems.extend(more.into_iter().map(Problem::from));
            Err(problems)
        }
    }
}

/// What `postern policy check --output json` prints.
#[derive(Debug, Serialize)]
pub struct Checked {
    pub valid: bool,
    pub problems: Vec<Problem>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Workload {
    namespace: String,
    service_account: String,
    labels: BTreeMap<String, String>,
    /// Services of its namespace that it is behind, for `targetRefs`.
    services: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    #[serde(default)]
    name: Option<serde_json::Value>,
    connection: Connection,
    #[serde(default)]
    http: Option<Http>,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Connection {
    source_ip: IpAddr,
    source_port: u16,
    destination_ip: IpAddr,
    destination_port: u16,
    peer_identity: Option<String>,
    tls: bool,
    sni: Option<String>,
}

impl Default for Connection {
    fn default() -> Self {
        let nowhere = IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);
        Self {
            source_ip: nowhere,
            source_port: 0,
            destination_ip: nowhere,
            destination_port: 0,
            peer_identity: None,
            tls: false,
            sni: None,
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Http {
    #[serde(default = "get")]
    method: String,
    #[serde(default = "root")]
    path: String,
    #[serde(default)]
    host: String,
    #[serde(default)]
    headers: BTreeMap<String, Values>,
}

fn get() -> String {
    "GET".into()
}

fn root() -> String {
    "/".into()
}

/// A header's value, or its values where it is repeated.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Values {
    One(String),
    Many(Vec<String>),
}

/// What `postern policy eval` answers to a request.
#[derive(Debug, Serialize)]
pub struct Answer {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<serde_json::Value>,
    decision: Option<&'static str>,
    status: Option<u16>,
    policy: Option<String>,
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
    #[error("line {line}: {message}")]
    Request { line: usize, message: String },
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
        let identity = SpiffeId {
            trust_domain: context.trust_domain.clone(),
            namespace: described.namespace.clone(),
            service_account: account.into(),
        };
        let setup = |e: &dyn std::fmt::Display| InspectError::Setup(e.to_string());
        let judge = Judge::new(config).map_err(|e| setup(&e))?;
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

    /// Answers each line of a JSON Lines file in order.
    pub async fn answer_all(
        &self,
        requests: impl BufRead,
        mut each: impl FnMut(&Answer, String) -> std::io::Result<()>,
    ) -> Result<(), InspectError> {
        for (index, line) in requests.lines().enumerate() {
            let text = line?;
            if text.trim().is_empty() {
                continue;
            }
            let asked: Asked = serde_json::from_str(&text).map_err(|e| InspectError::Request {
                line: index + 1,
                message: e.to_string(),
            })?;
            let (answer, explained) = self.answer(asked).await;
            each(&answer, explained)?;
        }
        Ok(())
    }

    async fn answer(&self, asked: Asked) -> (Answer, String) {
        let mut answer = Answer {
            name: asked.name,
            decision: Some("deny"),
            status: None,
            policy: None,
            rule: None,
            reason: String::new(),
            headers: None,
        };
        let connection = asked.connection;
        // TLS without an identity is no mutual TLS: the peer is nobody.
        let peer = match connection
            .peer_identity
            .as_deref()
            .map(str::parse::<SpiffeId>)
        {
            None => None,
            Some(Ok(id)) => Some(id),
            Some(Err(error)) => {
                answer.reason = format!("peer_identity: {error}");
                return (answer, String::new());
            }
        };
        let destination = SocketAddr::new(connection.destination_ip, connection.destination_port);
        let source = SocketAddr::new(connection.source_ip.to_canonical(), connection.source_port);
        let mut facts = Facts::new(peer, source.ip(), destination);
        facts.sni = connection.sni;
        let _says_nothing_more = connection.tls;
        let Some(http) = asked.http else {
            let explained = self.explain(&facts, Layer::Opaque);
            let judged = (self.judge)
                .connection(&self.selected, &facts, Some(&self.identity), source)
                .await;
            match judged {
                Ok(permitted) => {
                    answer.decision = Some("allow");
                    answer.of_policy(permitted.by());
                    answer.reason = allowed_by(permitted.by());
                }
                Err(denial) => answer.of_denial(&denial),
            }
            return (answer, explained);
        };
        let head = match http.head() {
            Ok(head) => head,
            Err(why) => {
                answer.status = Some(400);
                answer.reason = why;
                return (answer, String::new());
            }
        };
        let request = head.request(&http);
        let now = self.now.unwrap_or_else(SystemTime::now);
        let judged = (self.judge)
            .request(
                &self.selected,
                &facts,
                Some(&self.identity),
                source,
                &request,
                now,
            )
            .await;
        let claims = match &judged {
            Ok(allowed) => allowed.claims.clone(),
            Err(refused) => refused.claims.clone(),
        };
        let explained = match normalize(request.path, self.selected.reading.normalization) {
            Ok(normal) => {
                let about = RequestFacts {
                    request: &request,
                    path: &normal.path,
                    host: &request.host.to_lowercase(),
                    remote_ip: source.ip(),
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
                answer.decision = Some("allow");
                answer.of_policy(permitted.by());
                answer.reason = allowed_by(permitted.by());
                let kept = head.headers.iter().filter(|(name, _)| edits.keeps(name));
                let mut headers = BTreeMap::new();
                for (name, value) in kept.chain(&edits.set) {
                    let text = String::from_utf8_lossy(value.as_bytes());
                    let entry: &mut String = headers.entry(name.to_string()).or_default();
                    if !entry.is_empty() {
                        entry.push(',');
                    }
                    entry.push_str(&text);
                }
                answer.headers = Some(headers);
            }
            Err(Refused { why, reply, .. }) => {
                answer.reason = why.to_string();
                match &why {
                    // The connection is closed before there is a request.
                    Why::Denied(denial @ Denial::Plaintext(_)) => answer.of_denial(denial),
                    Why::Denied(denial) => {
                        answer.of_denial(denial);
                        answer.status = Some(reply.status.as_u16());
                        if reply.status == http::StatusCode::UNAUTHORIZED {
                            answer.decision = Some("unauthenticated");
                        }
                    }
                    Why::Malformed(_) => answer.status = Some(reply.status.as_u16()),
                }
            }
        }
        (answer, explained)
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

fn allowed_by(policy: Option<&crate::policy::PolicyRef>) -> String {
    match policy {
        Some(policy) => format!("allowed by {policy}"),
        None => "no ALLOW policy selects the workload".into(),
    }
}

impl Answer {
    fn of_policy(&mut self, policy: Option<&crate::policy::PolicyRef>) {
        self.policy = policy.map(crate::policy::PolicyRef::path);
        self.rule = policy.and_then(|policy| policy.rule);
    }

    fn of_denial(&mut self, denial: &Denial) {
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
        format!(
            "{name}: {}{status}: {}",
            self.decision.unwrap_or("deny"),
            self.reason
        )
    }
}

/// Headers as they would have been parsed.
struct Head {
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl Http {
    fn head(&self) -> Result<Head, String> {
        let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
        if self.method.is_empty() || !self.method.bytes().all(token) {
            return Err(format!("`{}` is no method", self.method));
        }
        if self.method == Method::CONNECT.as_str() {
            return Err("CONNECT is refused".into());
        }
        if !self.path.bytes().all(|b| b.is_ascii_graphic()) {
            return Err("the path has characters that must be escaped".into());
        }
        let mut headers = Vec::new();
        for (name, values) in &self.headers {
            let name =
                HeaderName::try_from(name).map_err(|_| format!("`{name}` is no header name"))?;
            let values: Vec<&String> = match values {
                Values::One(value) => vec![value],
                Values::Many(values) => values.iter().collect(),
            };
            for value in values {
                let value = HeaderValue::from_bytes(value.trim().as_bytes())
                    .map_err(|_| format!("header {name} has a control character"))?;
                headers.push((name.clone(), value));
            }
        }
        Ok(Head { headers })
    }
}

impl Head {
    fn request<'a>(&'a self, http: &'a Http) -> Request<'a> {
        Request {
            method: &http.method,
            path: &http.path,
            host: &http.host,
            headers: self
                .headers
                .iter()
                .map(|(name, value)| (name, value))
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context() -> Context {
        Context {
            root_namespace: "istio-system".into(),
            trust_domain: TrustDomain::default(),
            aliases: Vec::new(),
            normalization: Normalization::default(),
            trusted_proxies: 0,
        }
    }

    fn directory(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a directory");
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).expect("a file");
        }
        dir
    }

    const OPEN: &str = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {name: open, namespace: shop}\n\
         spec:\n  rules:\n  - to: [{operation: {paths: ['/open/*'], methods: [GET]}}]\n";

    #[test]
    fn everything_that_is_wrong_is_told() {
        let misspelt = OPEN.replace("paths", "pahts");
        let unnamed = OPEN.replace("name: open, ", "");
        let both = format!("{OPEN}---\n{}", OPEN.replace("GET", "''"));
        let dir = directory(&[
            ("a.yaml", &misspelt),
            ("b.yaml", &both),
            ("c.yaml", &unnamed),
        ]);
        let problems = load(dir.path(), &context()).expect_err("they are wrong");
        let told: Vec<_> = problems
            .iter()
            .map(|p| {
                let file = p
                    .file
                    .file_name()
                    .and_then(|n| n.to_str())
                    .unwrap_or_default();
                (file, p.line, p.object.as_str(), p.field.as_str())
            })
            .collect();
        assert_eq!(
            told,
            [
                (
                    "a.yaml",
                    6,
                    "AuthorizationPolicy/shop/open",
                    "spec.rules[0].to[0].operation.pahts"
                ),
                (
                    "b.yaml",
                    13,
                    "AuthorizationPolicy/shop/open",
                    "spec.rules[0].to[0].operation.methods[0]"
                ),
                ("c.yaml", 1, "AuthorizationPolicy/shop/", "metadata.name"),
            ]
        );
    }

    #[tokio::test]
    async fn requests_are_answered_in_order_and_explained() {
        let policies = directory(&[("open.yaml", OPEN)]);
        let other = directory(&[(
            "workload.json",
            r#"{"namespace": "shop", "labels": {"a": "b"}}"#,
        )]);
        let workload = other.path().join("workload.json");
        let config = Config::default();
        let evaluation = Evaluation::new(policies.path(), &workload, &context(), None, &config)
            .expect("all is there");
        let call = |name: &str, http: &str| {
            format!(
                r#"{{"name": "{name}", "connection": {{"source_ip": "10.0.0.1", "destination_port": 80}}{http}}}"#
            )
        };
        let lines = [
            call(
                "open",
                r#", "http": {"path": "/open/../open/%61?q", "headers": {"A": "b"}}"#,
            ),
            call("closed", r#", "http": {"path": "/", "host": "h"}"#),
            String::new(),
            call("tcp", ""),
            call("bad", r#", "http": {"path": "/a%00"}"#),
        ]
        .join("\n");
        let mut said = Vec::new();
        let answered = evaluation.answer_all(lines.as_bytes(), |answer, explained| {
            let json = serde_json::to_value(answer).expect("JSON");
            said.push((json, explained));
            Ok(())
        });
        answered.await.expect("answers");
        let decisions: Vec<_> = said
            .iter()
            .map(|(json, _)| {
                let text = |key: &str| json[key].as_str().unwrap_or_default().to_owned();
                (text("name"), text("decision"), json["status"].as_u64())
            })
            .collect();
        let expected = [
            ("open", "allow", None),
            ("closed", "deny", Some(403)),
            ("tcp", "deny", None),
            ("bad", "deny", Some(400)),
        ];
        let expected = expected.map(|(n, d, s)| (n.to_owned(), d.to_owned(), s));
        assert_eq!(decisions, expected);
        assert_eq!(said[0].0["policy"], "AuthorizationPolicy/shop/open");
        assert_eq!(said[0].0["headers"]["a"], "b");
        assert!(
            said[1].1.contains("rule 0: to[0].paths does not match"),
            "{}",
            said[1].1
        );
        assert!(said[2].1.contains("asks for a request"), "{}", said[2].1);
    }
}
