//! Process Activity: programs that pods start, and their ends.

use serde_json::json;

use super::{
    event::{Event, PROCESS},
    objects::{device, process},
    record::Record,
};

pub fn event(record: &mut Record) -> Option<Event> {
    let (activity, name) = match record.peek("/event").as_deref() {
        Some("exec") => (1, "Launch"),
        Some("exit") => (2, "Terminate"),
        _ => (99, "Other"),
    };
    let mut event = Event::new(PROCESS, activity, name);
    let mut process = process(record, "/process")?;
    let container = record.text("/process/container");
    if let Some(uid) = container {
        process["container"] = json!({"uid": uid});
        event.profile("container");
    }
    // Who started it, if that is known, or ended: itself.
    let parent = process.get("parent_process").filter(|_| activity == 1);
    let actor = parent.unwrap_or(&process).clone();
    event.set("actor", Some(json!({"process": actor})));
    event.set("process", Some(process));
    event.set("exit_code", record.number("/code"));
    event.succeeded();
    // Not by the profile `host` here: the class has one of its own.
    event.set("device", device(&record.peek("/node")?));
    Some(event)
}
