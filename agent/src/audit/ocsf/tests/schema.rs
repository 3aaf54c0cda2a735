//! The published schema, as far as the mapping uses it, and what is wrong with an event
//! by it.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

pub struct Schema {
    classes: BTreeMap<u64, Entity>,
    objects: BTreeMap<&'static str, Entity>,
}

#[derive(Default)]
struct Entity {
    attributes: BTreeMap<&'static str, Attribute>,
    /// `at_least_one` or `just_one`, and of which.
    constraints: Vec<(&'static str, Vec<&'static str>)>,
}

struct Attribute {
    kind: &'static str,
    list: bool,
    required: bool,
    profile: Option<&'static str>,
    values: BTreeSet<&'static str>,
}

impl Schema {
    pub fn published() -> Self {
        let mut schema = Self {
            classes: BTreeMap::new(),
            objects: BTreeMap::new(),
        };
        let mut entity: Option<&mut Entity> = None;
        for line in include_str!("ocsf-1.5.0.txt").lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                ["#", ..] => {}
                ["class", uid, ..] => {
                    let uid = uid.parse().expect("a number");
                    let entry = schema.classes.entry(uid).or_default();
                    entry.constraints = constraints(&words);
                    entity = Some(entry);
                }
                ["object", name, ..] => {
                    let entry = schema.objects.entry(name).or_default();
                    entry.constraints = constraints(&words);
                    entity = Some(entry);
                }
                [name, kind, requirement, profile, ref values @ ..] => {
                    let attribute = Attribute {
                        kind: kind.trim_end_matches("[]"),
                        list: kind.ends_with("[]"),
                        required: requirement == "required",
                        profile: (profile != "-").then_some(profile),
                        values: (values.iter()).flat_map(|v| v.split(',')).collect(),
                    };
                    let entity = entity.as_mut().expect("a class or an object before");
                    entity.attributes.insert(name, attribute);
                }
                _ => panic!("{line}"),
            }
        }
        schema
    }

    pub fn wrong(&self, event: &Value) -> Vec<String> {
        let mut wrong = Vec::new();
        let number = |name: &str| event[name].as_u64().unwrap_or(u64::MAX);
        let Some(class) = self.classes.get(&number("class_uid")) else {
            return vec!["class_uid".into()];
        };
        let (class_uid, activity) = (number("class_uid"), number("activity_id"));
        if Some(number("type_uid"))
            != class_uid
                .checked_mul(100)
                .and_then(|c| c.checked_add(activity))
        {
            wrong.push("type_uid is not class_uid * 100 + activity_id".into());
        }
        let listed = event["metadata"]["profiles"].as_array();
        let profiles: Vec<&str> = listed
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let fields = event.as_object().expect("an event is an object");
        self.check(class, fields, "", &profiles, &mut wrong);
        wrong
    }

    fn check(
        &self,
        entity: &Entity,
        fields: &Map<String, Value>,
        place: &str,
        profiles: &[&str],
        wrong: &mut Vec<String>,
    ) {
        for (name, attribute) in &entity.attributes {
            let applies = attribute.profile.is_none_or(|p| profiles.contains(&p));
            if attribute.required && applies && !fields.contains_key(*name) {
                wrong.push(format!("{place}{name}: required"));
            }
        }
        for (name, among) in &entity.constraints {
            let there = among.iter().filter(|n| fields.contains_key(**n)).count();
            if there == 0 || (*name == "just_one" && there > 1) {
                let place = place.trim_end_matches('.');
                wrong.push(format!("{place}: {name} of {among:?}, not {there}"));
            }
        }
        for (name, value) in fields {
            let here = format!("{place}{name}");
            let Some(attribute) = entity.attributes.get(name.as_str()) else {
                wrong.push(format!("{here}: unknown"));
                continue;
            };
            if let Some(profile) = attribute.profile
                && !profiles.contains(&profile)
            {
                wrong.push(format!("{here}: only by the profile {profile}"));
            }
            let values = match (attribute.list, value) {
                (false, value) => std::slice::from_ref(value),
                (true, Value::Array(list)) => list,
                (true, _) => {
                    wrong.push(format!("{here}: no list"));
                    continue;
                }
            };
            for value in values {
                self.check_value(attribute, value, &here, profiles, wrong);
            }
        }
    }

    fn check_value(
        &self,
        attribute: &Attribute,
        value: &Value,
        here: &str,
        profiles: &[&str],
        wrong: &mut Vec<String>,
    ) {
        let text = value.as_str().map_or(value.to_string(), str::to_owned);
        if !attribute.values.is_empty() && !attribute.values.contains(&*text) {
            wrong.push(format!("{here}: {value} is none of {:?}", attribute.values));
        }
        let Some(object) = attribute.kind.strip_prefix('=') else {
            if !is(attribute.kind, value) {
                wrong.push(format!("{here}: no {}", attribute.kind));
            }
            return;
        };
        match (self.objects.get(object), value) {
            // What is unmapped can be anything.
            (_, Value::Object(_)) if object == "object" => {}
            (Some(entity), Value::Object(fields)) => {
                self.check(entity, fields, &format!("{here}."), profiles, wrong);
            }
            _ => wrong.push(format!("{here}: no {object}")),
        }
    }
}

fn constraints(words: &[&'static str]) -> Vec<(&'static str, Vec<&'static str>)> {
    (words.iter())
        .filter_map(|word| word.split_once('='))
        .map(|(name, among)| (name, among.split(',').collect()))
        .collect()
}

fn is(kind: &str, value: &Value) -> bool {
    match kind {
        "boolean_t" => value.is_boolean(),
        "integer_t" | "long_t" => value.is_i64() || value.is_u64(),
        "timestamp_t" => value.as_i64().is_some_and(|time| time >= 0),
        "port_t" => value.as_u64().is_some_and(|port| port <= 65_535),
        "ip_t" => value
            .as_str()
            .is_some_and(|ip| ip.parse::<std::net::IpAddr>().is_ok()),
        "json_t" => true,
        _ => value.as_str().is_some_and(|text| !text.is_empty()),
    }
}
