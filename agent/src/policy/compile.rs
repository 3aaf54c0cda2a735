//! From objects to what is evaluated. Everything that can be wrong with a policy is
//! found here or while it is parsed, never when a connection is judged.

use std::{borrow::Cow, collections::BTreeMap, path::Path, sync::Arc};

use super::{
    evaluate::{Address, Attribute, Clause, Condition, Match, PolicyRef, Rule, Test},
    pattern::{PathPattern, Pattern, RequestPrincipal},
    schema::{
        self, Key, List, PathForm, Resource, Selector, ServiceAccount, TargetRef, Text, Values,
    },
};
use crate::{
    config::Normalization,
    identity::TrustDomain,
    jwt::{self, KeySource, Locations, RemoteKeys},
};

/// What compilation needs to know of the mesh.
pub struct Mesh<'a> {
    pub root_namespace: &'a str,
    pub trust_domain: &'a TrustDomain,
    pub aliases: &'a [TrustDomain],
    /// Where secrets are that policies name: a directory for each namespace.
    pub secrets: &'a Path,
    pub requests: Reading,
}

/// How requests are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    pub normalization: Normalization,
    /// Proxies before the workload whose `X-Forwarded-For` is believed (Istio
    /// `numTrustedProxies`).
    pub trusted_proxies: usize,
}

impl Mesh<'_> {
    fn domains(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.trust_domain)
            .chain(self.aliases)
            .map(TrustDomain::as_str)
    }
}

/// The workloads that a policy selects.
#[derive(Clone, Debug)]
pub(super) struct Reach {
    /// `None`: every namespace, for policies of the root namespace.
    pub namespace: Option<Arc<str>>,
    pub labels: BTreeMap<String, String>,
    /// Names of the services, of the policy's namespace, that the workload is behind.
    /// `None`: whatever it is behind.
    pub services: Option<Vec<String>>,
}

/// What is wrong, and in which field.
#[derive(Debug)]
pub(super) struct Wrong {
    pub field: &'static str,
    pub message: String,
}

pub(super) const DRY_RUN: &str = "istio.io/dry-run";

/// The object's name, and whether it is only tried (`istio.io/dry-run`).
pub(super) fn identify<T>(
    kind: &'static str,
    object: &Resource<T>,
) -> Result<(PolicyRef, Option<bool>), Wrong> {
    let meta = &object.metadata;
    if meta.name.is_empty() {
        return Err(Wrong {
            field: "metadata.name",
            message: "is missing".into(),
        });
    }
    // Go's strconv.ParseBool.
    let dry_run = match meta.annotations.get(DRY_RUN).map(String::as_str) {
        None => None,
        Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Some(true),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Some(false),
        Some(other) => {
            return Err(Wrong {
                field: "metadata.annotations[istio.io/dry-run]",
                message: format!("`{other}` is neither true nor false"),
            });
        }
    };
    let policy = PolicyRef {
        kind,
        namespace: meta.namespace().into(),
        name: meta.name.as_str().into(),
        rule: None,
    };
    Ok((policy, dry_run))
}

pub(super) fn reach(
    policy: &PolicyRef,
    selector: Option<Selector>,
    targets: Option<Vec<TargetRef>>,
    mesh: &Mesh<'_>,
) -> Reach {
    let root = *policy.namespace == *mesh.root_namespace;
    let services: Option<Vec<String>> =
        targets.map(|all| all.into_iter().filter_map(|t| t.service).collect());
    Reach {
        // Services are looked up in the policy's own namespace.
        namespace: (!root || services.is_some()).then(|| policy.namespace.clone()),
        labels: selector.unwrap_or_default().match_labels,
        services,
    }
}

pub(super) fn rule(rule: schema::Rule, namespace: &str, mesh: &Mesh<'_>) -> Rule {
    let from: Vec<Clause> = (rule.from.into_iter().flatten())
        .map(|entry| source(entry.source, namespace, mesh))
        .collect();
    let to: Vec<Clause> = (rule.to.into_iter().flatten())
        .map(|entry| operation(entry.operation))
        .collect();
    let when: Clause = (rule.when.into_iter().flatten())
        .map(|when| condition(when, namespace, mesh))
        .collect();
    let some = |test: fn(&Condition) -> bool| {
        (from.iter().chain(&to).chain([&when])).any(|clause| clause.iter().any(test))
    };
    let http = some(Condition::is_http);
    // Who the client is stands in a header where proxies are trusted.
    let told = mesh.requests.trusted_proxies > 0 && some(Condition::is_remote);
    let sni = some(Condition::is_sni);
    Rule {
        http,
        reads: http || told || sni,
        sni,
        from,
        to,
        when,
    }
}

/// The values of a field and of its `not` form.
fn both<T, U>(any: List<T>, none: List<T>, each: impl Fn(T) -> Vec<U>) -> Match<U> {
    Match {
        any: any.0.into_iter().flat_map(&each).collect(),
        none: none.0.into_iter().flat_map(&each).collect(),
    }
}

fn patterns(any: List<Text>, none: List<Text>) -> Match<Pattern> {
    both(any, none, |text| vec![Pattern::parse(&text.0)])
}

/// The conditions of an entry: those of its fields that have values.
fn clause<const N: usize>(fields: [(&'static str, Test); N]) -> Clause {
    let said = |test: &Test| match test {
        Test::Text(_, values) => !values.is_empty(),
        Test::Path(values) => !values.is_empty(),
        Test::RequestPrincipal(values) => !values.is_empty(),
        Test::Account(values) => !values.is_empty(),
        Test::Address(_, values) => !values.is_empty(),
        Test::Port(values) => !values.is_empty(),
    };
    fields
        .into_iter()
        .filter(|(_, test)| said(test))
        .map(|(name, test)| Condition {
            name: Cow::Borrowed(name),
            test,
        })
        .collect()
}

fn source(source: schema::Source, namespace: &str, mesh: &Mesh<'_>) -> Clause {
    let account = |a: ServiceAccount| vec![qualified(a, namespace)];
    clause([
        (
            "principals",
            Test::Text(
                Attribute::Principal,
                both(source.principals, source.not_principals, |text| {
                    principal(&text.0, mesh)
                }),
            ),
        ),
        (
            "requestPrincipals",
            Test::RequestPrincipal(both(
                source.request_principals,
                source.not_request_principals,
                |text| vec![RequestPrincipal::parse(&text.0)],
            )),
        ),
        (
            "namespaces",
            Test::Text(
                Attribute::Namespace,
                patterns(source.namespaces, source.not_namespaces),
            ),
        ),
        (
            "serviceAccounts",
            Test::Account(both(
                source.service_accounts,
                source.not_service_accounts,
                account,
            )),
        ),
        (
            "trustDomains",
            Test::Text(
                Attribute::TrustDomain,
                both(source.trust_domains, source.not_trust_domains, |domain| {
                    trust_domain(&domain.0, mesh)
                }),
            ),
        ),
        (
            "ipBlocks",
            Test::Address(
                Address::Source,
                both(source.ip_blocks, source.not_ip_blocks, |block| {
                    vec![block.0]
                }),
            ),
        ),
        (
            "remoteIpBlocks",
            Test::Address(
                Address::Remote,
                both(
                    source.remote_ip_blocks,
                    source.not_remote_ip_blocks,
                    |block| vec![block.0],
                ),
            ),
        ),
    ])
}

fn operation(operation: schema::Operation) -> Clause {
    let path = |form| {
        vec![match form {
            PathForm::Text(text) => PathPattern::Text(Pattern::parse(&text)),
            PathForm::Template(pieces) => PathPattern::Template(pieces),
        }]
    };
    // Hosts have no case (RFC 9110 4.2.3).
    let host = |text: Text| vec![Pattern::parse(&text.0.to_lowercase())];
    clause([
        (
            "hosts",
            Test::Text(
                Attribute::Host,
                both(operation.hosts, operation.not_hosts, host),
            ),
        ),
        (
            "ports",
            Test::Port(both(operation.ports, operation.not_ports, |p| vec![p.0])),
        ),
        (
            "methods",
            Test::Text(
                Attribute::Method,
                patterns(operation.methods, operation.not_methods),
            ),
        ),
        (
            "paths",
            Test::Path(both(operation.paths, operation.not_paths, path)),
        ),
    ])
}

fn condition(when: schema::Condition, namespace: &str, mesh: &Mesh<'_>) -> Condition {
    let (any, none) = (when.values, when.not_values);
    let test = match when.key {
        Key::SourceIp => Test::Address(Address::Source, blocks(any, none)),
        Key::RemoteIp => Test::Address(Address::Remote, blocks(any, none)),
        Key::DestinationIp => Test::Address(Address::Destination, blocks(any, none)),
        Key::DestinationPort => Test::Port(match (any, none) {
            (Values::Ports(any), Values::Ports(none)) => Match { any, none },
            _ => unreachable!("ports were read for this key"),
        }),
        Key::SourceServiceAccount => Test::Account(match (any, none) {
            (Values::Accounts(any), Values::Accounts(none)) => {
                both(List(any), List(none), |a| vec![qualified(a, namespace)])
            }
            _ => unreachable!("accounts were read for this key"),
        }),
        Key::RequestPrincipal => {
            Test::RequestPrincipal(texts(any, none, |v| vec![RequestPrincipal::parse(v)]))
        }
        Key::SourcePrincipal => Test::Text(
            Attribute::Principal,
            texts(any, none, |v| principal(v, mesh)),
        ),
        Key::SourceTrustDomain => Test::Text(
            Attribute::TrustDomain,
            texts(any, none, |v| trust_domain(v, mesh)),
        ),
        plain => {
            let attribute = match plain {
                Key::Header(name) => Attribute::Header(name),
                Key::Authority => Attribute::Authority,
                Key::Method => Attribute::Method,
                Key::SourceNamespace => Attribute::Namespace,
                Key::Audiences => Attribute::Audiences,
                Key::Presenter => Attribute::Presenter,
                Key::Claim(path) => Attribute::Claim(path),
                _ => Attribute::Sni,
            };
            // Names of servers have no case, and are lower case where they come from.
            let sni = attribute == Attribute::Sni;
            let pattern = |v: &str| match sni {
                true => vec![Pattern::parse(&v.to_lowercase())],
                false => vec![Pattern::parse(v)],
            };
            Test::Text(attribute, texts(any, none, pattern))
        }
    };
    Condition {
        name: when.name.into(),
        test,
    }
}

fn texts<U>(any: Values, none: Values, each: impl Fn(&str) -> Vec<U>) -> Match<U> {
    let list = |values| match values {
        Values::Text(list) => list.iter().flat_map(|text| each(text)).collect(),
        _ => unreachable!("texts were read for this key"),
    };
    Match {
        any: list(any),
        none: list(none),
    }
}

fn blocks(any: Values, none: Values) -> Match<ipnet::IpNet> {
    match (any, none) {
        (Values::Blocks(any), Values::Blocks(none)) => Match { any, none },
        _ => unreachable!("blocks were read for this key"),
    }
}

fn qualified(account: ServiceAccount, namespace: &str) -> (String, String) {
    let namespace = account.namespace.unwrap_or_else(|| namespace.to_owned());
    (namespace, account.name)
}

/// A principal of the local trust domain, of an alias or of `cluster.local` stands
/// for the same account in all of {local, aliases} (Istio trust-domain migration).
/// A domain that is a pattern stays for those that it matches.
fn principal(text: &str, mesh: &Mesh<'_>) -> Vec<Pattern> {
    let as_is = || vec![Pattern::parse(text)];
    let Some((domain, rest)) = text.split_once('/') else {
        return as_is();
    };
    if rest.split('/').count() != 4 || domain == "*" {
        return as_is();
    }
    let pattern = Pattern::parse(domain);
    if domain != "cluster.local" && !mesh.domains().any(|d| pattern.fits(d)) {
        return as_is();
    }
    let mut all: Vec<Pattern> = Vec::new();
    for own in mesh.domains() {
        let kept = matches!(&pattern, Pattern::Suffix(suffix) if own.ends_with(suffix.as_str()));
        let value = match kept {
            true => Pattern::parse(text),
            false => Pattern::parse(&format!("{own}/{rest}")),
        };
        if !all.contains(&value) {
            all.push(value);
        }
    }
    all
}

/// An exact domain that is ours stands for all of ours.
fn trust_domain(text: &str, mesh: &Mesh<'_>) -> Vec<Pattern> {
    let exact = !text.contains('*');
    if exact && mesh.domains().any(|d| d == text) {
        return mesh.domains().map(Pattern::parse).collect();
    }
    vec![Pattern::parse(text)]
}

pub(super) fn jwt_rule(rule: schema::JwtRule) -> jwt::Rule {
    let timeout = rule.timeout;
    let keys = match (rule.keys, &rule.issuer) {
        (schema::Keys::Inline(keys), _) => KeySource::Inline(keys),
        (schema::Keys::Url(url), _) => KeySource::Remote(RemoteKeys::Url { url, timeout }),
        (schema::Keys::Discovery, issuer) => KeySource::Remote(RemoteKeys::Discovery {
            issuer: issuer.clone().unwrap_or_default(),
            timeout,
        }),
    };
    let places = [
        rule.from_headers.len(),
        rule.from_params.len(),
        rule.from_cookies.len(),
    ];
    // Any of them replaces both defaults.
    let locations = match places {
        [0, 0, 0] => Locations::default(),
        _ => Locations {
            headers: rule.from_headers,
            params: rule.from_params,
            cookies: rule.from_cookies,
        },
    };
    jwt::Rule {
        wanted: jwt::Wanted::new(rule.issuer, rule.audiences, rule.space_delimited_claims),
        locations,
        forward_original: rule.forward_original_token,
        payload_to_header: rule.output_payload_to_header,
        claims_to_headers: rule.output_claim_to_headers,
        keys,
    }
}
