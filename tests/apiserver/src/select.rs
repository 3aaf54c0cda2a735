//! Field and label selectors.

use serde_json::Value;

use crate::status::Refusal;

/// What a list or a watch is narrowed to.
#[derive(Clone, Debug, Default)]
pub struct Selector {
    fields: Vec<(String, bool, String)>,
    labels: Vec<Label>,
}

#[derive(Clone, Debug)]
enum Label {
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    Missing(String),
}

impl Selector {
    pub fn parse(resource: &str, fields: &str, labels: &str) -> Result<Self, Refusal> {
        let mut selector = Self::default();
        for part in fields.split(',').filter(|part| !part.is_empty()) {
            let (name, equal, value) = equation(part)
                .ok_or_else(|| Refusal::bad(format!("invalid field selector: {part:?}")))?;
            if !["metadata.name", "metadata.namespace"].contains(&name)
                && !supported(resource).contains(&name)
            {
                return Err(Refusal::bad(format!("field label not supported: {name}")));
            }
            selector.fields.push((name.into(), equal, value.into()));
        }
        for part in split_labels(labels) {
            selector.labels.push(label(part.trim())?);
        }
        Ok(selector)
    }

    pub fn matches(&self, object: &Value) -> bool {
        let field = |(name, equal, value): &(String, bool, String)| {
            (field(object, name) == *value) == *equal
        };
        let labels = &object["metadata"]["labels"];
        let label = |label: &Label| match label {
            Label::In(name, values) => labels[name]
                .as_str()
                .is_some_and(|label| values.iter().any(|v| v == label)),
            Label::NotIn(name, values) => !labels[name]
                .as_str()
                .is_some_and(|label| values.iter().any(|v| v == label)),
            Label::Exists(name) => labels[name].is_string(),
            Label::Missing(name) => !labels[name].is_string(),
        };
        self.fields.iter().all(field) && self.labels.iter().all(label)
    }

    /// The one name that is asked for, which permissions may be limited to.
    pub fn name(&self) -> Option<&str> {
        self.fields
            .iter()
            .find(|(name, equal, _)| name == "metadata.name" && *equal)
            .map(|(.., value)| value.as_str())
    }
}

/// As many fields as the real one selects by; custom resources have two.
fn supported(resource: &str) -> &'static [&'static str] {
    match resource {
        "pods" => &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
            "status.podIPs",
            "status.nominatedNodeName",
        ],
        "events" => &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "reason",
            "reportingComponent",
            "source",
            "type",
        ],
        "nodes" => &["spec.unschedulable"],
        "namespaces" => &["status.phase"],
        "secrets" => &["type"],
        "services" => &["spec.clusterIP", "spec.type"],
        _ => &[],
    }
}

fn field(object: &Value, name: &str) -> String {
    match name {
        // The first address alone: nobody is found by their second.
        "status.podIP" => {
            let first = &object["status"]["podIPs"][0]["ip"];
            first.as_str().unwrap_or_default().to_owned()
        }
        // Taken by the real one, and true of no pod.
        "status.podIPs" => String::new(),
        "source" => text(&object["source"]["component"]),
        _ => {
            let path = format!("/{}", name.replace('.', "/"));
            object.pointer(&path).map(text).unwrap_or_default()
        }
    }
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn equation(part: &str) -> Option<(&str, bool, &str)> {
    let (sign, equal) = [("!=", false), ("==", true), ("=", true)]
        .into_iter()
        .find(|(sign, _)| part.contains(sign))?;
    let (name, value) = part.split_once(sign)?;
    Some((name.trim(), equal, value.trim()))
}

/// At commas that stand outside of parentheses.
fn split_labels(text: &str) -> Vec<&str> {
    let mut depth = 0;
    text.split(|c| {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        c == ',' && depth == 0
    })
    .filter(|part| !part.trim().is_empty())
    .collect()
}

fn label(part: &str) -> Result<Label, Refusal> {
    let values = |list: &str| -> Option<Vec<String>> {
        let inner = list.trim().strip_prefix('(')?.strip_suffix(')')?;
        Some(inner.split(',').map(|v| v.trim().to_owned()).collect())
    };
    let wrong = || Refusal::bad(format!("unable to parse requirement: {part:?}"));
    if let Some((name, list)) = part.split_once(" notin ") {
        return Ok(Label::NotIn(
            name.trim().into(),
            values(list).ok_or_else(wrong)?,
        ));
    }
    if let Some((name, list)) = part.split_once(" in ") {
        return Ok(Label::In(
            name.trim().into(),
            values(list).ok_or_else(wrong)?,
        ));
    }
    if let Some((name, equal, value)) = equation(part) {
        let values = vec![value.to_owned()];
        return Ok(match equal {
            true => Label::In(name.into(), values),
            false => Label::NotIn(name.into(), values),
        });
    }
    Ok(match part.strip_prefix('!') {
        Some(name) => Label::Missing(name.trim().into()),
        None => Label::Exists(part.into()),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn selectors_say_what_the_real_one_says() {
        let pod = json!({
            "metadata": {"name": "a", "namespace": "shop", "labels": {"app": "web", "tier": "1"}},
            "spec": {"nodeName": "node1", "hostNetwork": false},
            "status": {"phase": "Running", "podIP": "10.0.0.1",
                       "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]},
        });
        for (fields, labels, matches) in [
            ("spec.nodeName=node1", "", true),
            ("spec.nodeName!=node1", "", false),
            ("spec.nodeName==node1,status.phase=Running", "", true),
            ("status.podIP=10.0.0.1", "", true),
            ("status.podIP=fd00::1", "", false),
            ("spec.hostNetwork=false", "", true),
            ("metadata.name=a,metadata.namespace=shop", "", true),
            ("", "app=web", true),
            ("", "app", true),
            ("", "!app", false),
            ("", "!gone,app in (web, db),tier notin (2,3)", true),
            ("", "app notin (web)", false),
            ("", "absent!=x", true),
        ] {
            let selector = Selector::parse("pods", fields, labels).expect(fields);
            assert_eq!(selector.matches(&pod), matches, "{fields} {labels}");
        }
        let refused = Selector::parse("pods", "spec.image=x", "").expect_err("refused");
        assert_eq!(refused.message, "field label not supported: spec.image");
        assert!(Selector::parse("services", "spec.nodeName=x", "").is_err());
    }
}
