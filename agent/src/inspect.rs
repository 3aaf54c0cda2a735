//! Policies away from traffic: `postern policy check`, `eval` and `explain`. What is
//! said here is what the data path would do: it is the same code.

mod evaluation;

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::{
    config::{Config, Normalization},
    identity::TrustDomain,
    objects::{LoadError, read_directory},
    policy::{Mesh, PolicyError, PolicyObject, PolicySet, Reading},
};

pub use evaluation::{Answer, Evaluation, InspectError};

/// What policies are read with, where there is no agent's configuration.
#[derive(Clone, Debug)]
pub struct Context {
    pub root_namespace: String,
    pub trust_domain: TrustDomain,
    pub aliases: Vec<TrustDomain>,
    pub normalization: Normalization,
    pub trusted_proxies: usize,
    pub secrets: PathBuf,
}

impl From<&Config> for Context {
    fn from(config: &Config) -> Self {
        let policies = &config.policies;
        Self {
            root_namespace: policies.root_namespace.clone(),
            trust_domain: config.trust_domain.clone(),
            aliases: config.trust_domain_aliases.clone(),
            normalization: policies.path_normalization,
            trusted_proxies: policies.num_trusted_proxies,
            secrets: policies.secrets.clone(),
        }
    }
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
        secrets: &context.secrets,
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
            secrets: "/secrets".into(),
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

    /// The data path would ask; here that is said instead.
    #[tokio::test]
    async fn a_token_that_takes_introspection_is_refused_with_that_reason() {
        let policies = directory(&[(
            "api.yaml",
            "apiVersion: postern.dev/v1alpha1\nkind: ProtectedResource\n\
             metadata: {name: api, namespace: shop}\n\
             spec:\n  resource: https://api.example\n  introspection: {endpoint: 'https://as.example/i', \
             issuer: 'https://as.example', clientId: a, clientAuthentication: {none: {}}}\n",
        )]);
        let other = directory(&[("workload.json", r#"{"namespace": "shop"}"#)]);
        let workload = other.path().join("workload.json");
        let config = Config::default();
        let evaluation = Evaluation::new(policies.path(), &workload, &context(), None, &config)
            .expect("all is there");
        let lines = [
            r#"{"http": {"path": "/x", "headers": {"authorization": "Bearer opaque"}}}"#,
            r#"{"http": {"path": "/x", "host": "h"}}"#,
            r#"{"http": {"path": "/.well-known/oauth-protected-resource", "host": "h"}}"#,
        ]
        .join("\n");
        let mut said = Vec::new();
        let answered = evaluation.answer_all(lines.as_bytes(), |answer, _| {
            said.push(serde_json::to_value(answer).expect("JSON"));
            Ok(())
        });
        answered.await.expect("answers");
        let decisions: Vec<_> = said
            .iter()
            .map(|json| (json["decision"].as_str(), json["status"].as_u64()))
            .collect();
        let expected = [
            (Some("deny"), Some(503)),
            (Some("allow"), None),
            (Some("allow"), Some(200)),
        ];
        assert_eq!(decisions, expected);
        let reason = said[0]["reason"].as_str().unwrap_or_default();
        assert!(reason.contains("introspection"), "{reason}");
        assert_eq!(said[2]["policy"], "ProtectedResource/shop/api");
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
