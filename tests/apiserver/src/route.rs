//! What a request asks for.

use std::collections::HashMap;

use hyper::Method;

use crate::status::Refusal;

/// A path below `/api` or `/apis`, taken apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Target {
    pub group: String,
    pub version: String,
    pub namespace: String,
    pub plural: String,
    pub name: Option<String>,
    pub sub: Option<String>,
}

impl Target {
    /// `None`: it names no resource.
    pub fn parse(path: &str) -> Option<Self> {
        let mut steps = path.trim_matches('/').split('/');
        let mut target = Self::default();
        match steps.next()? {
            "api" => {}
            "apis" => target.group = steps.next()?.to_owned(),
            _ => return None,
        }
        target.version = steps.next()?.to_owned();
        let rest: Vec<String> = steps.map(decoded).collect();
        let rest = match rest.as_slice() {
            // Namespaces are a resource too, and have two subresources.
            [first, namespace, plural, ..]
                if first == "namespaces" && !["status", "finalize"].contains(&plural.as_str()) =>
            {
                target.namespace = namespace.clone();
                &rest[2..]
            }
            _ => &rest[..],
        };
        let mut rest = rest.iter();
        target.plural = rest.next()?.clone();
        target.name = rest.next().cloned();
        target.sub = rest.next().cloned();
        rest.next().is_none().then_some(target)
    }

    pub fn verb(&self, method: &Method, watch: bool) -> Option<&'static str> {
        Some(match (method.as_str(), &self.name) {
            ("GET", _) if watch => "watch",
            ("GET", Some(_)) => "get",
            ("GET", None) => "list",
            ("POST", _) => "create",
            ("PUT", Some(_)) => "update",
            ("PATCH", Some(_)) => "patch",
            ("DELETE", Some(_)) => "delete",
            ("DELETE", None) => "deletecollection",
            _ => return None,
        })
    }

    /// `pods/status`.
    pub fn resource(&self) -> String {
        match &self.sub {
            Some(sub) => format!("{}/{sub}", self.plural),
            None => self.plural.clone(),
        }
    }
}

fn decoded(step: &str) -> String {
    percent_encoding::percent_decode_str(step)
        .decode_utf8_lossy()
        .into_owned()
}

/// The parameters behind the question mark.
#[derive(Clone, Debug, Default)]
pub struct Query(HashMap<String, String>);

impl Query {
    pub fn parse(query: &str) -> Self {
        Self(
            form_urlencoded::parse(query.as_bytes())
                .into_owned()
                .collect(),
        )
    }

    pub fn text(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }

    pub fn flag(&self, name: &str) -> bool {
        matches!(self.text(name), "true" | "1")
    }

    pub fn number(&self, name: &str) -> Result<Option<u64>, Refusal> {
        let text = self.text(name);
        let wrong = || Refusal::bad(format!("{name}: Invalid value: {text:?}"));
        match text {
            "" => Ok(None),
            text => text.parse().map(Some).map_err(|_| wrong()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_taken_apart() {
        for (path, namespace, plural, name, sub) in [
            ("/api/v1/pods", "", "pods", None, None),
            ("/api/v1/namespaces", "", "namespaces", None, None),
            (
                "/api/v1/namespaces/shop",
                "",
                "namespaces",
                Some("shop"),
                None,
            ),
            (
                "/api/v1/namespaces/shop/status",
                "",
                "namespaces",
                Some("shop"),
                Some("status"),
            ),
            ("/api/v1/namespaces/shop/pods", "shop", "pods", None, None),
            (
                "/api/v1/namespaces/shop/pods/a/status",
                "shop",
                "pods",
                Some("a"),
                Some("status"),
            ),
            (
                "/apis/postern.dev/v1alpha1/x/a%3Ab",
                "",
                "x",
                Some("a:b"),
                None,
            ),
        ] {
            let target = Target::parse(path).expect(path);
            let seen = (target.namespace.as_str(), target.plural.as_str());
            assert_eq!(seen, (namespace, plural), "{path}");
            assert_eq!(
                (target.name.as_deref(), target.sub.as_deref()),
                (name, sub),
                "{path}"
            );
        }
        for path in [
            "/",
            "/version",
            "/api",
            "/api/v1",
            "/apis/x/v1",
            "/api/v1/a/b/c/d",
        ] {
            assert_eq!(Target::parse(path), None, "{path}");
        }
    }
}
