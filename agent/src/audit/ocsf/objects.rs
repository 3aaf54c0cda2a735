//! Objects that events share. Each is `None` where the record has nothing for it.

use std::net::IpAddr;

use serde_json::{Map, Value, json};

use super::record::Record;

/// An object of what there is; `None` if that is nothing.
pub fn object<const N: usize>(fields: [(&str, Option<Value>); N]) -> Option<Value> {
    let present = fields.into_iter();
    let map: Map<String, Value> = present
        .filter_map(|(name, value)| Some((name.to_owned(), value?)))
        .collect();
    (!map.is_empty()).then_some(Value::Object(map))
}

pub fn device(node: &str) -> Option<Value> {
    (!node.is_empty()).then(|| json!({"hostname": node, "name": node, "type_id": 1}))
}

/// `network_endpoint` of a peer that stands at `place`.
pub fn endpoint(record: &mut Record, place: &str) -> Option<Value> {
    let address = record.address(&format!("{place}/address"));
    at(
        address,
        record.text(&format!("{place}/pod")),
        record.text(&format!("{place}/identity")),
    )
}

pub fn at(
    address: Option<(IpAddr, Option<u16>)>,
    name: Option<String>,
    uid: Option<String>,
) -> Option<Value> {
    object([
        ("ip", address.map(|(ip, _)| json!(ip))),
        ("port", address.and_then(|(_, port)| port).map(Value::from)),
        ("name", name.map(Value::from)),
        ("uid", uid.map(Value::from)),
    ])
}

/// What a kernel saw of a process. The hash of its arguments is no command line, and the
/// cgroup has no place: both stay.
pub fn process(record: &mut Record, place: &str) -> Option<Value> {
    let at = |name: &str| format!("{place}/{name}");
    let pid = record.number(&at("pid"))?;
    let exe = record.text(&at("exe"));
    let file = exe.map(|path| {
        let name = path.rsplit('/').next().unwrap_or_default().to_owned();
        json!({"path": path, "name": name, "type_id": 1})
    });
    let parent = record.number(&at("parent/pid")).map(|pid| {
        let mut parent = json!({"pid": pid});
        if let Some(name) = record.text(&at("parent/comm")) {
            parent["name"] = name.into();
        }
        parent
    });
    let uid = record.number(&at("uid"));
    object([
        ("pid", Some(json!(pid))),
        ("name", record.text(&at("comm")).map(Value::from)),
        ("file", file),
        ("user", uid.map(|uid| json!({"uid": uid.to_string()}))),
        ("parent_process", parent),
    ])
}
