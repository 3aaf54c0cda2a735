//! The cases: sets of policies with the requests that are put to both.

use std::{collections::BTreeMap, fs, net::IpAddr, path::Path};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::tokens::{Keys, TokenSpec};

/// The workload that every request goes to.
pub const NAMESPACE: &str = "shop";
pub const SERVICE_ACCOUNT: &str = "web";
pub const LABELS: &[(&str, &str)] = &[("app", "web"), ("tier", "front")];
pub const ROOT_NAMESPACE: &str = "istio-system";
pub const TRUST_DOMAIN: &str = "cluster.local";

/// Policies that hold together, and requests.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Set {
    #[serde(skip)]
    pub name: String,
    #[serde(default = "base")]
    pub normalization: String,
    #[serde(default)]
    pub trusted_proxies: u32,
    /// Trust domains that are ours as well.
    #[serde(default)]
    pub aliases: Vec<String>,
    #[serde(default)]
    pub tokens: BTreeMap<String, TokenSpec>,
    pub policies: Vec<Value>,
    pub requests: Vec<Case>,
}

/// One request and what Postern has to answer; Envoy the same, unless it `differs`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    /// The status; 200 is the application's own answer.
    pub is: u16,
    #[serde(default = "get")]
    pub method: String,
    #[serde(default = "root")]
    pub path: String,
    #[serde(default = "host")]
    pub host: String,
    /// A list is a repeated header.
    #[serde(default)]
    pub headers: BTreeMap<String, Value>,
    /// A token of the set, sent as `Authorization: Bearer`.
    #[serde(default)]
    pub token: Option<String>,
    /// The client's identity without `spiffe://`; without it there is no TLS.
    #[serde(default, rename = "as")]
    pub peer: Option<String>,
    /// The server name that the client asks for, where it speaks TLS.
    #[serde(default)]
    pub sni: Option<String>,
    #[serde(default = "source")]
    pub from: IpAddr,
    #[serde(default = "port")]
    pub port: u16,
    /// Headers that the application has to get, or (null) must not.
    #[serde(default)]
    pub app: BTreeMap<String, Option<String>>,
    #[serde(default)]
    pub differs: Option<Differs>,
}

/// What Envoy does otherwise, and why that is right.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Differs {
    /// Envoy's status.
    #[serde(default)]
    pub envoy: Option<u16>,
    /// Headers that reach the application otherwise.
    #[serde(default)]
    pub headers: Vec<String>,
    pub because: String,
}

fn base() -> String {
    "BASE".into()
}

fn get() -> String {
    "GET".into()
}

fn root() -> String {
    "/".into()
}

fn host() -> String {
    "web.shop".into()
}

fn source() -> IpAddr {
    IpAddr::from([10, 0, 0, 1])
}

fn port() -> u16 {
    8080
}

impl Case {
    /// How a report names it.
    pub fn title(&self, index: usize) -> String {
        let mut title = format!("#{} {} {}", index + 1, self.method, self.path);
        for (what, said) in [("token", &self.token), ("as", &self.peer)] {
            if let Some(said) = said {
                title.push_str(&format!(", {what} {said}"));
            }
        }
        title
    }

    /// Where the connection goes: the family is that of where it comes from.
    pub fn destination(&self) -> IpAddr {
        match self.from {
            IpAddr::V4(_) => IpAddr::from([10, 0, 0, 10]),
            IpAddr::V6(_) => IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, 10]),
        }
    }

    /// Each header with each of its values.
    pub fn header_lines(&self) -> Vec<(&str, &str)> {
        let mut lines = Vec::new();
        for (name, value) in &self.headers {
            let values = match value {
                Value::Array(many) => many.as_slice(),
                one => std::slice::from_ref(one),
            };
            let texts = values.iter().filter_map(Value::as_str);
            lines.extend(texts.map(|text| (name.as_str(), text)));
        }
        lines
    }
}

/// Reads every set of a directory, in the order of their names.
pub fn load(directory: &Path, keys: &Keys) -> Result<Vec<Set>> {
    let mut files: Vec<_> = fs::read_dir(directory)
        .with_context(|| directory.display().to_string())?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    files.sort();
    files
        .iter()
        .map(|file| one(file, keys).with_context(|| file.display().to_string()))
        .collect()
}

fn one(file: &Path, keys: &Keys) -> Result<Set> {
    let mut set: Set = serde_saphyr::from_str(&fs::read_to_string(file)?)?;
    let stem = file.file_stem().context("a file has a name")?;
    set.name = stem.to_string_lossy().into_owned();
    let mut names = BTreeMap::new();
    for (name, spec) in &set.tokens {
        let token = keys.mint(spec).with_context(|| format!("token {name}"))?;
        names.insert(format!("${{{name}}}"), token);
    }
    for policy in &mut set.policies {
        fill(policy, &keys.documents());
    }
    for case in &mut set.requests {
        if let Some(token) = &case.token {
            let text = format!("Bearer ${{{token}}}");
            case.headers.insert("authorization".into(), text.into());
        }
        let mut value = Value::Object(Map::from_iter(case.headers.clone()));
        fill(&mut value, &names);
        let Value::Object(headers) = value else {
            bail!("headers are a map");
        };
        case.headers = headers.into_iter().collect();
        let mut path = Value::String(case.path.clone());
        fill(&mut path, &names);
        case.path = path.as_str().unwrap_or_default().to_owned();
        let left = case.header_lines().iter().any(|(_, v)| v.contains("${"));
        if left || case.path.contains("${") {
            bail!("a token of {case:?} is not in the set");
        }
    }
    Ok(set)
}

/// Replaces names in every string of a value.
fn fill(value: &mut Value, names: &BTreeMap<String, String>) {
    match value {
        Value::String(text) if text.contains("${") => {
            for (name, with) in names {
                *text = text.replace(name, with);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| fill(item, names)),
        Value::Object(members) => members.values_mut().for_each(|item| fill(item, names)),
        _ => {}
    }
}
