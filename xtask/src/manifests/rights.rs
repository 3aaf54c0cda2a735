//! What accounts may do: RBAC as it is rendered, and as the document tells it, each with
//! its reason.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::cmd;

const DOCUMENT: &str = "docs/kubernetes.md";
const ACCOUNTS: [&str; 2] = ["postern-agent", "postern-authority"];

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Right {
    account: String,
    /// In the own namespace alone.
    own: bool,
    group: String,
    /// With its subresource, and where it is one object's, that one's name.
    resource: String,
    verb: String,
}

/// Fails where the document does not tell just what these files together give.
pub fn told(files: &[(&Path, Vec<Value>)]) -> Result<()> {
    let text = fs::read_to_string(cmd::root().join(DOCUMENT)).context(DOCUMENT)?;
    let told = documented(&text)?;
    let given: BTreeSet<Right> = files.iter().flat_map(|(_, all)| given(all)).collect();
    let list = |rights: BTreeSet<&Right>| -> String {
        let lines = rights.iter().map(|right| format!("\n  {right:?}"));
        lines.collect()
    };
    let untold = list(given.difference(&told).collect());
    let never = list(told.difference(&given).collect());
    if given.is_empty() || !untold.is_empty() || !never.is_empty() {
        bail!("{DOCUMENT}: rights that it does not tell:{untold}\nthat nobody has:{never}");
    }
    Ok(())
}

/// By roles, which have their accounts' names.
fn given(objects: &[Value]) -> Vec<Right> {
    let texts = |value: &Value| -> Vec<String> {
        let all = value.as_array().into_iter().flatten();
        all.filter_map(|one| Some(one.as_str()?.to_owned()))
            .collect()
    };
    let mut rights = Vec::new();
    for object in objects {
        let own = match object["kind"].as_str() {
            Some("ClusterRole") => false,
            Some("Role") => true,
            _ => continue,
        };
        for rule in object["rules"].as_array().into_iter().flatten() {
            let names = match texts(&rule["resourceNames"]) {
                names if names.is_empty() => vec![String::new()],
                names => names.iter().map(|name| format!(" {name}")).collect(),
            };
            for group in texts(&rule["apiGroups"]) {
                for resource in texts(&rule["resources"]) {
                    for (name, verb) in names
                        .iter()
                        .flat_map(|n| texts(&rule["verbs"]).into_iter().map(move |v| (n, v)))
                    {
                        rights.push(Right {
                            account: object["metadata"]["name"]
                                .as_str()
                                .unwrap_or_default()
                                .to_owned(),
                            own,
                            group: group.clone(),
                            resource: format!("{resource}{name}"),
                            verb,
                        });
                    }
                }
            }
        }
    }
    rights
}

/// Tables of group, resources, verbs and reason, each below a line that names whose they
/// are.
fn documented(text: &str) -> Result<BTreeSet<Right>> {
    const HEAD: &str = "| group | resources | verbs | why |";
    let mut rights = BTreeSet::new();
    let (mut account, mut inside) = (None, false);
    for line in text.lines() {
        let named = |account: &&&str| line.contains(&format!("`{account}`"));
        if !line.starts_with('|') {
            inside = false;
            account = ACCOUNTS.iter().find(named).or(account);
            continue;
        }
        if line == HEAD || line.starts_with("|--") {
            inside |= line == HEAD;
            continue;
        }
        if !inside {
            continue;
        }
        let account = account.with_context(|| format!("whose right: {line}"))?;
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [group, resources, verbs, why] = cells[..] else {
            bail!("not four cells: {line}");
        };
        if why.is_empty() {
            bail!("no reason: {line}");
        }
        let (group, own) = match group.strip_suffix(" (own namespace)") {
            Some(group) => (group, true),
            None => (group, false),
        };
        for resource in resources.split(", ") {
            for verb in verbs.split(", ") {
                rights.insert(Right {
                    account: (*account).to_owned(),
                    own,
                    group: group.replace("core", ""),
                    resource: resource.replace('`', ""),
                    verb: verb.to_owned(),
                });
            }
        }
    }
    Ok(rights)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rules_and_rows_say_the_same() {
        let rules = [
            json!({"kind": "ClusterRole", "metadata": {"name": "postern-agent"}, "rules": [
                {"apiGroups": ["a.b"], "resources": ["xs", "xs/status"], "verbs": ["list", "watch"]},
            ]}),
            json!({"kind": "Role", "metadata": {"name": "postern-authority"}, "rules": [
                {"apiGroups": [""], "resources": ["ys"], "resourceNames": ["one"], "verbs": ["get"]},
            ]}),
            json!({"kind": "Pod", "rules": [{"verbs": ["get"]}]}),
        ];
        let text = "\
            Agents, `postern-agent`:\n\n\
            | group | resources | verbs | why |\n|---|---|---|---|\n\
            | a.b | xs, xs/status | list, watch | for it |\n\n\
            `postern-authority`:\n\n\
            | group | resources | verbs | why |\n|---|---|---|---|\n\
            | core (own namespace) | ys `one` | get | for it |\n\n\
            | another | table |\n|---|---|\n| a | b |\n";
        let told = documented(text).expect("tables");
        assert_eq!(told, given(&rules).into_iter().collect());
        assert_eq!(told.len(), 5);
    }

    #[test]
    fn a_row_has_a_reason_and_an_owner() {
        let head = "| group | resources | verbs | why |\n|---|---|---|---|\n";
        let row = "| core | xs | get | for it |\n";
        assert!(documented(&format!("{head}{row}")).is_err(), "whose");
        let of = "`postern-agent`\n\n";
        assert!(documented(&format!("{of}{head}{row}")).is_ok());
        assert!(documented(&format!("{of}{head}| core | xs | get | |\n")).is_err());
        assert!(documented(&format!("{of}{head}| core | xs | get |\n")).is_err());
    }
}
