//! Records as events of the Open Cybersecurity Schema Framework, version 1.5.0.
//!
//! | record | class |
//! |---|---|
//! | `connection`, `flow`, `bypass` | Network Activity 4001 |
//! | `request` | API Activity 6003 |
//! | `process` | Process Activity 1007 |
//! | `token`; `authority`: `login`, `logout`, `lockout` | Authentication 3002 |
//! | `authority`: `grant`, `refusal`, `consent`, `code` | Authorize Session 3003 |
//! | `authority`: all else | API Activity 6003: operations of the authority |
//! | `agent` | Application Lifecycle 6002 |
//! | `gap`, `checkpoint`, `retention`, `reopened`, unknown ones | Base Event 0 |
//!
//! A record that lacks what its class requires is a Base Event. What a class has no
//! attribute for is under `unmapped`, as it was: nothing is left out.

mod application;
mod event;
mod identity;
mod network;
mod objects;
mod process;
mod record;
#[cfg(test)]
mod tests;

use serde_json::Value;

use event::Event;
use record::Record;

/// `None`: it is no record.
pub fn map(record: &Value) -> Option<Value> {
    let kind = record["kind"].as_str()?;
    let class = match kind {
        "connection" | "flow" | "bypass" => network::event,
        "request" => application::request,
        "process" => process::event,
        "token" => identity::token,
        "authority" => identity::authority,
        "agent" => application::agent,
        _ => base,
    };
    let mut left = Record::new(record);
    if let Some(event) = class(&mut left) {
        return Some(event.finish(record, left));
    }
    // Nothing that was tried is to be missing.
    let mut left = Record::new(record);
    Some(base(&mut left)?.finish(record, left))
}

fn base(record: &mut Record) -> Option<Event> {
    let mut event = Event::new(event::BASE, 99, record.peek("/kind").unwrap_or_default());
    if record.peek("/kind").as_deref() == Some("gap") {
        let (count, lost) = (record.number("/count"), record.text("/lost"));
        let reason = record.peek("/reason");
        event.failed();
        event.set("count", count);
        event.set("status_detail", record.text("/reason"));
        event.set(
            "message",
            Some(format!(
                "{} {} are missing: {}",
                count.unwrap_or(0),
                lost.unwrap_or_default(),
                reason.unwrap_or_default()
            )),
        );
    }
    Some(event)
}
